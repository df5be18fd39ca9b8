"""The published recipes of the convolutional tokenizers: what their papers' files say, read from the configurations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from vtok import optim
from vtok.config import instantiate
from vtok.losses.adversarial import adaptive_weight

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
IMAGES = 1_281_167
# epochs, batch, parameters, epochs of the drops, pixel loss, (weight, start, adaptive, LeCam) of the GAN
# of the adaptive weight; VQGAN's are 1e-4 and 1e4, latent diffusion's those for a sum over an image
LIMITS = {"ifsq": (1e-6, 1e6), "kl16": (1e-4, pytest.approx(1e4 / (3 * 256 * 256), rel=1e-5))}
RECIPES = {
    "kl16": (50, 256, 66_456_019, (), "l1", (0.5, 50_001, True, 0.0)),
    "flexvar": (40, 128, 72_049_827, (), "l2", (0.5, 20_000, False, 0.0)),
    "ifsq": (100, 128, 83_324_099, (), "l1", (0.5, 50_000, True, 0.0)),
    "magvit2": (270, 256, 115_127_829, (200, 250), "l1", (0.1, 0, False, 0.05)),
    "ibq": (330, 256, 110_982_019, (250, 300), "l1", (0.1, 0, False, 0.05)),
}


@pytest.mark.parametrize("name", RECIPES)
def test_published_recipes(name):
    epochs, batch, parameters, drops, pixel, wanted = RECIPES[name]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("train", overrides=[f"experiment={name}_imagenet256"])
    epoch = IMAGES // batch
    assert config.name == f"{name}_imagenet256" and config.batch_size == batch
    assert (config.data.crop == "short") == (name in ("ifsq", "magvit2", "ibq"))
    assert config.steps == epochs * epoch and config.optimizer.lr == config.discriminator_optimizer.lr == 1e-4
    assert list(config.schedule.get("drops", [])) == [at * epoch for at in drops]
    optim.check_arguments("schedule", optim.check_schedule, config.schedule)
    assert config.schedule.kind == "constant" and optim.rate(0, config.steps, **config.schedule) == 1.0
    last = optim.rate(config.steps - 1, config.steps, **config.schedule)
    assert last == pytest.approx(0.1 ** len(drops))
    assert (config.objective.pixel, config.objective.perceptual_weight) == (pixel, 1.0)
    gan = instantiate(config.objective.gan, _convert_="all")
    assert (gan.weight, gan.start, gan.adaptive, gan.lecam_weight) == wanted
    assert (gan.adaptive_eps, gan.adaptive_max) == LIMITS.get(name, (1e-4, 1e4))
    assert (gan.alternate, gan.clip) == ((True, False) if name == "ifsq" else (False, True))
    if name == "ifsq":  # train_ddp.py: current_step % 2 == 1 and current_step >= disc_start
        assert sum(gan.learns(step) for step in range(config.steps)) == 475_450 == config.steps - 525_450
    assert gan.loss == "hinge" and gan.fooling == ("non_saturating" if drops else "hinge")
    with torch.device("meta"):
        tokenizer = instantiate(config.tokenizer, _convert_="all")
    assert sum(p.numel() for p in tokenizer.parameters()) == parameters
    assert tokenizer.spec.image_size == config.data.image_size == 256
    assert tokenizer.spec.layout.length == (680 if name == "flexvar" else 256)
    assert getattr(tokenizer, "draw_sides", False) == (name == "flexvar")


@pytest.mark.parametrize("strength", [1.0, 100.0])
def test_the_adaptive_weight_of_kl16_is_latent_diffusions(strength):
    """contperceptual.py: losses summed over an image, the weight within [0, 1e4]; its whole loss is 196,608 times ours.
    Beside a weak gradient of the discriminator the limit is met, beside a strong one it is not."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("train", overrides=["experiment=kl16_imagenet256"]).objective.gan
    torch.manual_seed(0)
    images, layer, size = torch.rand(2, 3, 256, 256), torch.rand(3, requires_grad=True), 3 * 256 * 256
    made = images * layer.view(1, 3, 1, 1)
    summed, fooled = (images - made).abs().sum() / 2, -strength * made.mean()
    wanted, pushed = (torch.autograd.grad(v, layer, retain_graph=True)[0] for v in (summed, fooled))
    theirs = torch.clamp(torch.norm(wanted) / (torch.norm(pushed) + 1e-4), 0.0, 1e4)
    limits = {"eps": config.adaptive_eps, "most": config.adaptive_max}
    ours = adaptive_weight((images - made).abs().mean(), fooled, layer, **limits)
    assert (float(theirs) == 1e4) == (strength == 1.0)
    torch.testing.assert_close(ours, theirs / size, rtol=1e-4, atol=0)


def test_adam_of_kl16_moves_as_beside_a_sum_over_an_image():
    """Adam of a summed loss with eps 1e-8 makes the same steps, also of weights whose mean gradient is about 1e-8."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("train", overrides=["experiment=kl16_imagenet256"])
    ours = dict(config.optimizer)
    assert dict(config.discriminator_optimizer)["eps"] == 1e-8, "its loss is a mean there too"
    moved, size = {}, 3 * 256 * 256
    slopes = torch.logspace(-9, -4, 6)
    for name, factor, options in (
        ("summed", size, ours | {"eps": 1e-8}),
        ("mean", 1, ours),
        ("as was", 1, ours | {"eps": 1e-8}),
    ):
        layer = torch.nn.Linear(6, 1, bias=False)
        torch.nn.init.zeros_(layer.weight)
        optimizer = optim.make_optimizer([layer], **options)
        for step in range(3):
            optimizer.zero_grad()
            (factor * (step + 1) * (layer.weight[0] * slopes).sum()).backward()
            optimizer.step()
        moved[name] = layer.weight.detach()[0]
    torch.testing.assert_close(moved["mean"], moved["summed"], rtol=1e-4, atol=0)
    assert float((moved["as was"] / moved["summed"])[0]) < 0.5


def header(path: str) -> str:
    """The comment that a configuration starts with, as one line."""
    lines = (CONFIGS / path).read_text().splitlines()
    return " ".join(line.removeprefix("#").strip() for line in lines[: [*(x[:1] for x in lines), ""].index("_")])


def test_what_has_no_published_recipe_says_so():
    """And why; no experiment trains it. KL's training has no reference, which its code, recipe and tests say."""
    names = ["bsq_small", "cnn_fsq_small", *(p.stem for p in sorted((CONFIGS / "tokenizer").glob("tatitok_*.yaml")))]
    experiments = {p: p.read_text() for p in (CONFIGS / "experiment").glob("*_imagenet256.yaml")}
    assert len(names) == 8
    for name in names:
        assert "No experiment of ImageNet at 256 px: " in header(f"tokenizer/{name}.yaml"), name
        assert not [p.name for p, text in experiments.items() if f"/tokenizer: {name}\n" in text], name
    for path in ("vtok/quantize/kl.py", "configs/experiment/kl16_imagenet256.yaml", "tests/test_kl.py"):
        text = " ".join((CONFIGS.parent / path).read_text().replace("\n#", "\n").split())
        assert "No reference available" in text, path


def test_the_f8_models_recipe():
    overrides = ["experiment=magvit2_imagenet256", "tokenizer=magvit2_f8", "data.image_size=128"]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("train", overrides=[*overrides, "steps=1751400", "schedule.drops=[1251000,1501200]"])
    assert config.steps == 350 * (IMAGES // 256)
    assert list(config.schedule.drops) == [at * (IMAGES // 256) for at in (250, 300)]
    with torch.device("meta"):
        tokenizer = instantiate(config.tokenizer, _convert_="all")
    assert tokenizer.spec.layout.length == 256 and tokenizer.spec.image_size == 128
