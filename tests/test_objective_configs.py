"""Every configs/objective: its keys are arguments of what it names, and its numbers are the published ones."""

from __future__ import annotations

import functools
import importlib
import inspect
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from vgen.training import build_module
from vtok.config import instantiate

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
NAMES = sorted(p.stem for p in (CONFIGS / "objective").glob("*.yaml"))
# start of the GAN, its weight, weight of the pixels in [-1, 1]: from the papers' configurations
PUBLISHED = {
    "vqgan": (20_000, 0.5, 1.0),
    "stylegan": (20_000, 0.5, 1.0),
    "gigatok": (20_000, 0.5, 1.0),
    "gigatok_dino": (80_000, 0.5, 1.0),
    "restok": (20_000, 0.5, 0.25),
    "hita": (20_000, 0.5, 2.0),
    "hita_ultra": (20_000, 0.5, 2.0),
    "detailflow": (40_000, 0.2, 1.0),
    "ifsq": (50_000, 0.5, 1.0),
    "magvit2": (0, 0.1, 1.0),
    "ibq": (0, 0.1, 1.0),
    "titok": (200_000, 0.1, 0.25),
    "titok_stage2": (20_000, 0.01, 0.25),
    "larp": (0, 0.3, 0.5),
}
WITHOUT_GAN = {"plain", "dar", "titok_stage1"}
OURS = {"gan", "any_gan", "dino"}  # of no paper


@functools.cache
def read(name: str) -> dict:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("train", overrides=["data=imagenet256", "tokenizer=llamagen_vq16", f"objective={name}"])
    return OmegaConf.to_container(config.objective, resolve=True)


def check(value: object, name: str) -> None:
    """No key that its `_target_` does not take, at any depth; none left out that it must have."""
    if isinstance(value, dict):
        if "_target_" in value:
            module, _, attribute = value["_target_"].rpartition(".")
            known = inspect.signature(getattr(importlib.import_module(module), attribute).__init__).parameters
            given = set(value) - {"_target_"}
            assert given <= set(known), f"{name}: {sorted(given - set(known))}"
            needed = {k for k, p in known.items() if p.default is p.empty and k != "self"}
            assert needed <= given, f"{name}: lacks {sorted(needed - given)}"
        for inner in value.values():
            check(inner, name)


def test_every_objective_is_known_here():
    assert set(NAMES) == set(PUBLISHED) | WITHOUT_GAN | OURS


@pytest.mark.parametrize("name", NAMES)
def test_keys_are_arguments(name):
    config = read(name)
    check({k: v for k, v in config.items() if not (name == "any_gan" and k == "gan")}, name)
    assert (config["gan"] is None) == (name in WITHOUT_GAN)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_numbers(name):
    config = read(name)
    assert (config["gan"]["start"], config["gan"]["weight"], config["pixel_weight"]) == PUBLISHED[name]


def test_the_dino_discriminator_gets_its_views():
    """Wherever it judges, half of the images are cropped to its 224 px, as its authors' code does inside."""
    for name in NAMES:
        gan = read(name)["gan"] or {}
        if isinstance(gan.get("discriminator"), dict) and gan["discriminator"]["_target_"].endswith(
            "DinoDiscriminator"
        ):
            for augment in (gan["augment"], gan["strong"]):
                assert augment is None or (augment["size"], augment["crop"]) == (224, 0.5), name
                # the one whose loop hands it images in [0, 1]: losses.py of Kwai-Kolors/ResTok
                assert augment is None or augment.get("unit", False) == (name == "restok"), name
            assert gan["augment"] is not None


# --- LARP's on every discrete tokenizer -----------------------------------------------------------------------------

CONTINUOUS = {"kl_small"}
TOKENIZERS = sorted(p.stem for p in (CONFIGS / "tokenizer").glob("*_small.yaml"))
# without LPIPS's files, and with networks of a test's size
LARP = ("data=fake", "data.image_size=32", "objective=larp", "objective.perceptual_weight=0", "trainer=cpu")
LARP += tuple(f"objective.gan.discriminator.{k}" for k in ("width=16", "depth=1", "heads=2"))
LARP += tuple(f"objective.terms.prior.{k}" for k in ("width=16", "depth=1", "heads=2"))


def trained_with_larp(name: str, *options: str):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("train", overrides=[f"tokenizer={name}", *LARP, *options])
    torch.manual_seed(0)
    return build_module(config, SimpleNamespace(image_size=32), ())


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if name not in CONTINUOUS])
def test_larps_objective_trains_every_discrete_tokenizer(name):
    """Built for the tokens at hand; the first step's loss is finite and reaches the tokenizer, the prior's included."""
    lit = trained_with_larp(name)
    model, objective = lit.module.train(), lit.objective
    parts, prior = model.spec.parts, objective.terms["prior"]
    assert prior.part == (None if len(parts) == 1 else 1)  # Hita's grid, longer than its holistic tokens
    chosen = parts[prior.part or 0]
    assert (prior.channels, prior.length) == (chosen.channels, chosen.count)
    images, key = torch.rand(2, 3, 32, 32) * 2 - 1, torch.tensor([3, 4])
    recon = objective.reconstruct(model, images, key=key)
    loss, logs = objective.generator_loss(recon, images, model.last_layer, 0, key=key, tokenizer=model)
    assert loss.isfinite() and logs["prior"] > 0 and logs["adversarial"] > 0
    for loss_name, value in recon.losses.items():
        factor = 0.1 if loss_name in ("commitment", "codebook", "quantization") else 1.0
        torch.testing.assert_close(logs[loss_name], factor * value.detach())
    loss.backward()
    for module in (model, prior):
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


def test_larps_prior_can_be_told_and_refuses_what_it_cannot_predict():
    prior = trained_with_larp("hita_small", "objective.terms.prior.part=0").objective.terms["prior"]
    assert (prior.part, prior.length, prior.channels) == (0, 16, 12)
    assert trained_with_larp("cnn_vq_small", "objective.terms.prior.length=99").objective.terms["prior"].length == 99
    with pytest.raises(ValueError, match=r"terms\.prior predicts discrete"):
        trained_with_larp("kl_small")
    with pytest.raises(ValueError, match=r"prior\.part=1: the tokens have 1"):
        trained_with_larp("cnn_vq_small", "objective.terms.prior.part=1")
    frozen = trained_with_larp("retok_small", "tokenizer.stage=decoder")
    with pytest.raises(ValueError, match="are frozen"):
        frozen.objective.reconstruct(frozen.module, torch.zeros(1, 3, 32, 32), key=torch.tensor([3]))
    with pytest.raises(ValueError, match=r"own_weights.*codebook"):  # every other objective says what is absent
        lit = trained_with_larp("cnn_fsq_small", "objective.own_strict=true")
        images = torch.zeros(1, 3, 32, 32)
        recon = lit.objective.reconstruct(lit.module, images)
        lit.objective.generator_loss(recon, images, None, 0, tokenizer=lit.module)


# --- experiments ----------------------------------------------------------------------------------------------------

# parameters, steps, batch: LlamaGen's tokenizers train 40 epochs of 10,009 steps; VAR's recipe is LlamaGen's
TRAINED = {
    "llamagen_vq16": (71_883_403, 400_360, 128),
    "llamagen_vq8": (70_109_835, 400_360, 128),
    "var_vqvae": (108_948_355, 400_360, 128),
}


def experiment(name: str) -> DictConfig:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("train", overrides=[f"experiment={name}"])


@pytest.mark.parametrize("name", TRAINED)
def test_recipes_of_convolutional_tokenizers(name):
    config = experiment(f"{name}_imagenet256")
    assert config.name == f"{name}_imagenet256"
    with torch.device("meta"):
        tokenizer = instantiate(config.tokenizer, _convert_="all")
    counted = sum(p.numel() for p in tokenizer.parameters())
    assert (counted, config.steps, config.batch_size) == TRAINED[name]
    for section in (config.optimizer, config.discriminator_optimizer):
        assert (section.lr, list(section.betas), section.weight_decay) == (1e-4, [0.9, 0.95], 0.0)
    assert (config.schedule.kind, config.clip, config.ema, config.data.crop) == ("constant", 1.0, 0.9999, "random")


# the other tokenizers: rate, betas, decay, batch, steps, warm-up, end of the cosine (1.0: constant), clip, EMA; epochs
# of 1,281,167 images without the last part of a batch. Of 1d-tokenizer's, ResTok's and GigaTok's files, and the scripts
# of Hita, DetailFlow and D-AR; FlexTok's is ours
OLD = (0.9, 0.95)
NUMBERS = {
    "titok": (1e-4, (0.9, 0.99), 1e-4, 256, 1_000_000, 10_000, 0.1, 1.0, 0.999),
    "titok_stage2": (1e-4, (0.9, 0.999), 1e-4, 256, 500_000, 5_000, 0.1, 1.0, 0.999),
    "titok_onestage": (1e-4, (0.9, 0.999), 1e-4, 256, 1_000_000, 10_000, 0.1, 1.0, 0.999),
    "titok_vae": (1e-4, (0.9, 0.999), 1e-4, 256, 1_000_000, 10_000, 0.1, 1.0, 0.999),
    "hita": (1e-4, OLD, 0.0, 256, 50 * 5004, 4 * 5004, 1.0, 1.0, 0.9999),
    "gigatok": (1e-4, OLD, 1e-4, 128, 100 * 10_009, 0, 0.1, 10.0, None),
    "retok": (1e-4, OLD, 1e-4, 128, 250 * 10_009, 0, 0.1, 10.0, None),
    "retok_stage2": (1e-4, OLD, 1e-4, 128, 50 * 10_009, 0, 0.1, 10.0, None),
    "restok": (1e-4, OLD, 1e-4, 256, 1_000_000, 5_000, 0.1, 10.0, 0.9999),
    "detailflow": (1e-4, OLD, 0.0, 256, 250 * 5004, 5004, 0.1, 1.0, None),
    "dar": (2e-4, OLD, 0.0, 512, 100 * 2502, 500, 1.0, 1.0, 0.999),
    "flextok": (2e-4, OLD, 0.05, 512, 500_000, 5_000, 0.01, 1.0, 0.9999),
}
ELSEWHERE = {"kl16", "flexvar", "ifsq", "magvit2", "ibq", "maskgit_vqgan", *TRAINED}  # tests/test_cnn_recipes.py, above


def test_every_tokenizers_recipe_is_pinned():
    files = [p for p in (CONFIGS / "experiment").glob("*_imagenet256.yaml") if "override /tokenizer" in p.read_text()]
    assert {p.stem.removesuffix("_imagenet256") for p in files} == set(NUMBERS) | ELSEWHERE


@pytest.mark.parametrize("name", sorted(p.stem for p in (CONFIGS / "experiment").glob("*_imagenet256.yaml")))
def test_experiments_have_well_formed_objectives_and_published_numbers(name):
    config = experiment(name)
    if config.get("model") is None:
        check(OmegaConf.to_container(config.objective, resolve=False), name)
    if (row := NUMBERS.get(name.removesuffix("_imagenet256"))) is None:
        return
    rate, betas, decay, batch, steps, warmup, end, clip, ema = row
    pair = [config.optimizer] if config.objective.gan is None else [config.optimizer, config.discriminator_optimizer]
    for section in pair:
        assert (section.lr, tuple(section.betas), section.weight_decay) == (rate, betas, decay)
    assert (config.batch_size, config.steps, config.clip, config.ema) == (batch, steps, clip, ema)
    schedule = {"kind": "constant", "final": 0.0} if end == 1.0 else {"kind": "cosine", "final": end}
    assert dict(config.schedule) == schedule | {"warmup": warmup}
