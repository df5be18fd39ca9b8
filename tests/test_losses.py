"""Reconstruction and adversarial losses against closed forms and torchvision's VGG16."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vtok.losses.adversarial import LeCam, adaptive_weight, discriminator_loss, generator_loss
from vtok.losses.discriminators import PatchGAN
from vtok.losses.frozen import weights_folder
from vtok.losses.gan import GAN
from vtok.losses.objective import TokenizerObjective
from vtok.losses.reconstruction import HEADS_FILE, LPIPS, VGG_FILE, pixel_loss
from vtok.tokenizer import Reconstruction


@pytest.fixture(scope="module")
def lpips_folder(tmp_path_factory):
    """Random weights in the published files' format."""
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights")
    features = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])
    for module in features:
        if isinstance(module, nn.Conv2d):  # keep the signal's size through 13 layers, so every layer counts
            nn.init.kaiming_normal_(module.weight)
            nn.init.uniform_(module.bias, -0.1, 0.1)
    state = {f"features.{k}": v for k, v in features.state_dict().items()}
    torch.save(state | {"classifier.6.bias": torch.zeros(1000)}, folder / VGG_FILE)
    widths = (64, 128, 256, 512, 512)
    torch.save({f"lin{i}.model.1.weight": torch.rand(1, w, 1, 1) for i, w in enumerate(widths)}, folder / HEADS_FILE)
    return folder


def test_pixel_losses():
    a, b = torch.tensor([0.0, 1.0, -1.0]), torch.tensor([0.5, 1.0, 1.0])
    assert pixel_loss(a, b, "l1").item() == pytest.approx(2.5 / 3)
    assert pixel_loss(a, b, "l2").item() == pytest.approx(4.25 / 3)


def test_lpips_is_the_formula_on_torchvisions_vgg(lpips_folder):
    import torchvision

    features = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])
    weights = torch.load(lpips_folder / VGG_FILE)
    features.load_state_dict({k.removeprefix("features."): v for k, v in weights.items() if k.startswith("features")})
    heads = torch.load(lpips_folder / HEADS_FILE)
    a, b = torch.rand(2, 2, 3, 32, 32).mul(2).sub(1)
    a[0] = torch.linspace(-1, 1, a[0].numel()).view_as(a[0])  # a ramp
    want, x, y = torch.zeros(2), a, b
    shift = torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1)
    x, y = (x - shift) / scale, (y - shift) / scale
    for i, layer in enumerate(features):
        x, y = layer(x), layer(y)
        if i in (3, 8, 15, 22, 29):
            head = heads[f"lin{(3, 8, 15, 22, 29).index(i)}.model.1.weight"]
            difference = F.normalize(x, dim=1, eps=1e-10) - F.normalize(y, dim=1, eps=1e-10)
            want = want + F.conv2d(difference.square(), head).mean((1, 2, 3))
    module = LPIPS(weights_path=lpips_folder)
    torch.testing.assert_close(module(a, b), want.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(module(b, a), module(a, b))
    assert module(a, a).tolist() == [0, 0]
    with pytest.raises(ValueError, match="16 x 16, got 20 x 15: set perceptual_weight=0"):
        module(*torch.zeros(2, 1, 3, 15, 20))
    assert module(*torch.zeros(2, 1, 3, 16, 16)).shape == (1,)
    assert not list(module.parameters()) and not module.state_dict()  # frozen, and in no checkpoint
    a.requires_grad_()
    module(a, b).sum().backward()
    assert a.grad.abs().sum() > 0


def test_missing_lpips_files_are_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=rf"{VGG_FILE} \(528 MB\) in {tmp_path}: get it from https://.*weights_path="):
        LPIPS(weights_path=tmp_path)
    (tmp_path / VGG_FILE).write_bytes(b"half a file")
    with pytest.raises(ValueError, match="damaged"):
        LPIPS(weights_path=tmp_path)
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / VGG_FILE)
    with pytest.raises(ValueError, match=rf"{HEADS_FILE} \(7 KB\)"):
        LPIPS(weights_path=tmp_path)
    torch.save({}, tmp_path / HEADS_FILE)
    with pytest.raises(ValueError, match=r"features\.0\.weight"):
        LPIPS(weights_path=tmp_path)
    monkeypatch.setenv("VTOK_WEIGHTS", str(tmp_path / "elsewhere"))
    assert weights_folder() == tmp_path / "elsewhere" and weights_folder(tmp_path) == tmp_path
    monkeypatch.delenv("VTOK_WEIGHTS")
    assert weights_folder().parts[-2:] == (".cache", "vtok")


def test_patchgan_is_the_published_one():
    torch.manual_seed(0)
    module = PatchGAN()
    assert sum(p.numel() for p in module.parameters()) == 2_765_633
    assert module(torch.zeros(1, 3, 256, 256)).shape == (1, 1, 30, 30)
    convs = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
    assert [(c.stride[0], c.bias is not None) for c in convs] == [
        (2, True),
        (2, False),
        (2, False),
        (1, False),
        (1, True),
    ]
    assert all(c.weight.std().item() == pytest.approx(0.02, rel=0.1) for c in convs)
    # the receptive field of a logit is 70 px
    module.eval()
    image = torch.zeros(1, 3, 128, 128, requires_grad=True)
    logits = module(image)
    logits[0, 0, 7, 7].backward()
    assert image.grad.abs().sum((0, 1, 2)).nonzero().numel() == 70


def test_gan_losses_are_the_formulas():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, 0.0, 3.0])
    assert discriminator_loss(real, fake, "hinge").item() == pytest.approx(0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1 + 4) / 3))
    assert generator_loss(fake, "hinge").item() == pytest.approx(-1 / 3)
    log_sigmoid = lambda x: -math.log1p(math.exp(-x))  # noqa: E731
    want = -0.5 * (sum(map(log_sigmoid, real.tolist())) + sum(log_sigmoid(-x) for x in fake.tolist())) / 3
    assert discriminator_loss(real, fake, "non_saturating").item() == pytest.approx(want)
    assert generator_loss(fake, "non_saturating").item() == pytest.approx(-sum(map(log_sigmoid, fake.tolist())) / 3)


def test_adaptive_weight_is_the_ratio_of_gradients():
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    assert adaptive_weight((3 * weight).sum(), (0.5 * weight).sum(), weight).item() == pytest.approx(6, rel=1e-3)
    assert adaptive_weight((3 * weight).sum(), (0 * weight).sum(), weight).item() == 1e4
    assert not adaptive_weight((3 * weight).sum(), weight.sum(), weight).requires_grad
    # |3 * ones(n)| / (|d * ones(n)| + eps), the norms sqrt(n) times the factors
    root = weight.numel() ** 0.5
    for eps, most, d in ((1e-6, 1e6, 1e-5), (1e-4, 1e4, 1e-5), (1e-6, 1e6, 0.0), (1e-4, 50.0, 1e-5)):
        found = adaptive_weight((3 * weight).sum(), (d * weight).sum(), weight, eps=eps, most=most).item()
        assert found == pytest.approx(min(3 * root / (d * root + eps), most), rel=1e-4)


def test_lecam_by_hand():
    means = LeCam(decay=0.5, of="mean")
    assert means(torch.tensor([4.0, 0.0]), torch.tensor([-2.0, 2.0])).item() == pytest.approx(2**2 + 1**2)
    with pytest.raises(ValueError, match="lecam_of"):
        LeCam(of="image")
    module = LeCam(decay=0.5)
    real, fake = torch.tensor([4.0, 0.0]), torch.tensor([-2.0, 2.0])
    # means become real 1, fake 0
    assert module(real, fake).item() == pytest.approx((16 + 0) / 2 + (9 + 0) / 2)
    assert (module.real.item(), module.fake.item()) == (1, 0)


# --- the whole objective ---------------------------------------------------------------------------------------------


class Toy(nn.Module):
    """A one-layer decoder with a bottleneck loss."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Conv2d(3, 3, 1)

    def forward(self, images: torch.Tensor) -> Reconstruction:
        tokens = torch.zeros(len(images), 1, dtype=torch.long)
        return Reconstruction(self.last(images), tokens, {"commitment": 0.25 * self.last.weight.square().mean()})


def setting(*, adversary: dict | None = {}, **options):  # noqa: B006
    """A toy tokenizer, its objective with a small GAN (adversary: its further arguments, None = no GAN), images."""
    torch.manual_seed(0)
    gan = None if adversary is None else GAN(**{"discriminator": PatchGAN(width=4), "start": 2} | adversary)
    objective = TokenizerObjective(**{"perceptual_weight": 0.0, "gan": gan} | options)
    return Toy(), objective, torch.rand(2, 3, 32, 32) * 2 - 1


def test_before_the_start_step_there_is_no_gan():
    toy, objective, images = setting(adversary={"weight": 0.7})
    recon = toy(images)
    before = {k: v.clone() for k, v in objective.state_dict().items()}
    loss, logs = objective.generator_loss(recon, images, toy.last.weight, 1)
    torch.testing.assert_close(loss, F.mse_loss(recon.images, images) + recon.losses["commitment"])
    assert set(logs) == {"pixel", "commitment", "loss"} and not objective.gan_active(1)
    zero, _ = objective.discriminator_loss(images, recon.images, 1)
    zero.backward()
    assert zero.item() == 0 and all(not p.grad.any() for p in objective.discriminator.parameters())
    assert all(torch.equal(v, before[k]) for k, v in objective.state_dict().items())  # not even BatchNorm's statistics


@pytest.mark.parametrize("adaptive", (False, True))
def test_the_generators_loss_is_the_weighted_sum(adaptive):
    toy, objective, images = setting(adversary={"weight": 0.7, "adaptive": adaptive}, pixel="l1", pixel_weight=3.0)
    objective.discriminator.eval()
    recon = toy(images)
    loss, logs = objective.generator_loss(recon, images, toy.last.weight, 2)
    pixel, adversarial = 3 * F.l1_loss(recon.images, images), -objective.discriminator(recon.images).mean()
    weight = 0.7 * (adaptive_weight(pixel, adversarial, toy.last.weight) if adaptive else 1)
    torch.testing.assert_close(loss, pixel + recon.losses["commitment"] + weight * adversarial)
    torch.testing.assert_close(loss.detach(), sum(logs[k] for k in ("pixel", "commitment", "adversarial")))
    objective.zero_grad()
    loss.backward()
    assert toy.last.weight.grad.any() and all(p.grad is None for p in objective.discriminator.parameters())


def test_the_limits_of_the_adaptive_weight_are_the_gans():
    free, *cut = (
        setting(adversary={"weight": 0.7, "adaptive": True} | limits)
        for limits in ({}, {"adaptive_max": 1e-3}, {"adaptive_eps": 1e6})
    )
    found = []
    for toy, objective, images in (free, *cut):
        objective.discriminator.eval()
        found.append(objective.generator_loss(toy(images), images, toy.last.weight, 2)[1]["adversarial_weight"].item())
    assert found[0] > 1e-2 and found[1] == pytest.approx(0.7e-3) and found[2] < 1e-4


@pytest.mark.parametrize("kind", ("hinge", "non_saturating"))
def test_the_discriminator_learns_and_the_tokenizer_does_not(kind):
    toy, objective, images = setting(adversary={"loss": kind, "lecam_weight": 0.1})
    fakes = toy(images).images
    optimizer = torch.optim.Adam(objective.discriminator.parameters(), 1e-3)
    losses = []
    for step in range(2, 12):
        loss, logs = objective.discriminator_loss(images, fakes, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(logs["discriminator"].item())
    assert losses[-1] < losses[0] and toy.last.weight.grad is None
    assert logs["logits_real"] > logs["logits_fake"] and logs["lecam"] >= 0


def test_validation_leaves_the_gan_out():
    toy, objective, images = setting(adversary={"start": 0})
    recon = toy(images)
    logs = objective.validation(recon, images)
    torch.testing.assert_close(logs["loss"], logs["pixel"] + logs["commitment"])
    assert set(logs) == {"pixel", "commitment", "loss"}


def test_lpips_enters_with_its_weight(lpips_folder):
    toy, objective, images = setting(adversary=None, perceptual_weight=0.5, weights_path=lpips_folder)
    recon = toy(images)
    loss, logs = objective.generator_loss(recon, images, None, 0)
    want = 0.5 * LPIPS(weights_path=lpips_folder)(recon.images, images).mean()
    torch.testing.assert_close(logs["perceptual"], want.detach())
    torch.testing.assert_close(loss, F.mse_loss(recon.images, images) + want + recon.losses["commitment"])
    assert objective.discriminator is None and not objective.gan_active(10**9)


def test_lpips_rises_and_judges_a_second_decoding(lpips_folder):
    toy, objective, images = setting(
        adversary=None, perceptual_weight=0.5, perceptual_warmup=4, weights_path=lpips_folder
    )
    recon, other = toy(images), images.flip(3)
    recon.features["direct_images"] = other
    logs = [objective.generator_loss(recon, images, None, step)[1] for step in (0, 1, 4, 9)]
    lpips = LPIPS(weights_path=lpips_folder)
    for name, made in (("perceptual", recon.images), ("perceptual_direct", other)):
        want = 0.5 * lpips(made, images).mean().detach()
        for share, found in zip((0, 0.25, 1, 1), logs):
            torch.testing.assert_close(found[name], share * want)
    assert all(set(found) >= {"perceptual", "perceptual_direct"} for found in logs)


def test_targets_of_the_family_replace_the_images():
    toy, objective, images = setting(adversary=None, own_weights={"commitment": 0.0})
    recon = toy(images)
    recon.targets = images * 0.5
    loss, _ = objective.generator_loss(recon, images, None, 0)
    torch.testing.assert_close(loss, F.mse_loss(recon.images, images * 0.5))


def test_mistakes_are_named(tmp_path):
    for options, word in (
        ({"pixel": "l3"}, "pixel"),
        ({"pixel_weight": -1.0}, "pixel_weight"),
        ({"perceptual_weight": 1.0, "weights_path": tmp_path}, "perceptual_weight=0"),
        ({"adversary": {"loss": "wasserstein"}}, r"gan\.loss"),
        ({"adversary": {"generator_loss": "wasserstein"}}, r"gan\.generator_loss"),
        ({"adversary": {"weight": -1.0}}, r"gan\.weight"),
        ({"adversary": {"first": "both"}}, r"gan\.first"),
        ({"adversary": {"every": 0}}, r"gan\.every"),
        ({"adversary": {"adaptive_eps": 0.0}}, r"gan\.adaptive_eps"),
        ({"adversary": {"adaptive_max": -1.0}}, r"gan\.adaptive_max"),
        ({"adversary": {"consistency_weight": 1.0}}, r"gan\.strong"),
    ):
        with pytest.raises(ValueError, match=word):
            setting(**options)
    toy, objective, images = setting(adversary={"adaptive": True})
    with pytest.raises(ValueError, match="adaptive"):
        objective.generator_loss(toy(images), images, None, 5)
    _, objective, images = setting(adversary=None)
    with pytest.raises(ValueError, match="gan=null"):
        objective.discriminator_loss(images, images, 5)
    toy, objective, images = setting(own_weights={"comitment": 2.0})
    with pytest.raises(ValueError, match=r"\['commitment'\], not \['comitment'\]"):
        objective.generator_loss(toy(images), images, None, 0)
