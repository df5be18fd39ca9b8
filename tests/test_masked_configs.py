"""Published sizes and recipes of MAR and MaskGIT, read from the configurations, and small ones for a CPU."""

from pathlib import Path

import pytest
import torch
from generators import make
from hydra import compose, initialize_config_dir

from vtok.config import instantiate
from vtok.layout import SequenceLayout
from vtok.optim import make_optimizer
from vtok.tokenizer import Part, TokenSpec

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def latents(side: int, channels: int) -> TokenSpec:
    return TokenSpec(SequenceLayout.raster(side, side), (Part(side * side, None, channels),), 256)


def line(length: int, vocab_size: int) -> TokenSpec:
    return TokenSpec(SequenceLayout.line(length), (Part(length, vocab_size, 12),), 256)


PUBLISHED = {
    "mar_b": (latents(16, 16), 207_924_768),
    "mar_l": (latents(16, 16), 478_326_304),
    "mar_h": (latents(16, 16), 942_403_104),
    "maskgit_titok_l32": (line(32, 4096), 177_202_432),
    "maskgit_titok_b64": (line(64, 4096), 177_227_008),
    "maskgit_titok_s128": (line(128, 4096), 294_990_848),
}
SMALL = {
    "mar_small": latents(8, 8),
    "maskgit_small": line(64, 512),
    "llamagen_factorised_small": TokenSpec(SequenceLayout.raster(8, 8), (Part(64, 1024, 10),), 32),
}


def build(name, spec, classes):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("train", overrides=[f"model={name}"]).model
    with torch.device("meta"):
        return instantiate(config, _convert_="all", _partial_=True)(spec=spec, num_classes=classes)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_have_the_published_parameters(name):
    spec, count = PUBLISHED[name]
    assert sum(p.numel() for p in build(name, spec, 1000).parameters()) == count
    assert f"{count:,}" in (CONFIGS / "model" / f"{name}.yaml").read_text()


@pytest.mark.parametrize("name", SMALL)
def test_small_sizes_build(name):
    assert 1e6 < sum(p.numel() for p in build(name, SMALL[name], 10).parameters()) < 8e6


# lr, betas, batch, steps, warm-up, kind, final share, weight decay, clip, EMA: generators.md 14.1, epochs as steps
RECIPES = {
    "mar_imagenet256": (8e-4, (0.9, 0.95), 2048, 500_455, 62_556, "constant", 0.0, 0.02, 3.0, 0.9999),
    "maskgit_titok_imagenet256": (2e-4, (0.9, 0.96), 2048, 500_000, 10_000, "cosine", 1e-5 / 2e-4, 0.03, 1.0, 0.999),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_the_published_ones(name):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("train", overrides=[f"experiment={name}"])
    optimizer, schedule = config.optimizer, config.schedule
    found = (optimizer.lr, tuple(optimizer.betas), config.batch_size, config.steps, schedule.warmup, schedule.kind)
    found += (schedule.final, optimizer.weight_decay, config.clip, config.ema)
    assert found == RECIPES[name]
    model, data = config.model, config.data
    assert (model.label_drop, model.dropout, model.attention_dropout) == (0.1, 0.1, 0.1) and config.name == name
    assert (data.crop, data.flip) == ("center", True) and config.precision == "bf16-mixed"
    if name.startswith("mar"):
        assert (model.mask_ratio, model.repeats, model.buffer, model.solver_steps) == (0.7, 4, 64, 100)
    else:
        assert (model.smoothing, model.unmasked_weight, model.steps) == (0.1, 0.1, 8)


@pytest.mark.parametrize(
    "family, spared", [("mar", ("head.",)), ("maskgit", ("tokens.", "conditioner.", "position", "segment"))]
)
def test_weight_decay_leaves_out_what_the_paper_does(family, spared):
    model = make(family)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, other = make_optimizer([model], lr=1.0, weight_decay=0.1).param_groups
    assert decayed["weight_decay"] == 0.1 and other["weight_decay"] == 0
    found = {names[id(p)] for p in decayed["params"]}
    want = {name for name, p in model.named_parameters() if p.dim() > 1 and not name.startswith(spared)}
    assert found == want and len(found) + len(other["params"]) == len(names)
