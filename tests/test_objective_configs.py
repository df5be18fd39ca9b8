"""Every configs/objective: its keys are arguments of what it names, and its numbers are the published ones."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

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
            assert gan["augment"] is not None


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


@pytest.mark.parametrize("name", sorted(p.stem for p in (CONFIGS / "experiment").glob("*_imagenet256.yaml")))
def test_objectives_of_experiments_are_well_formed(name):
    config = experiment(name)
    if config.get("model") is None:
        check(OmegaConf.to_container(config.objective, resolve=False), name)
