"""Published sizes of the discrete families and their recipes, read from the configurations, on the meta device."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from generators import map_spec
from hydra import compose, initialize_config_dir

from vgen.generator import Generator
from vtok.config import describe, instantiate
from vtok.layout import SequenceLayout
from vtok.quantize.fsq import FSQ
from vtok.quantize.independent import IndependentVQ
from vtok.tokenizer import Part, TokenSpec

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def line(length: int, vocab_size: int) -> TokenSpec:
    return TokenSpec(SequenceLayout.line(length), (Part(length, vocab_size, 8),), 256)


def grid(side: int, vocab_size: int) -> TokenSpec:
    return TokenSpec(SequenceLayout.raster(side, side), (Part(side * side, vocab_size, 8),), 16 * side)


def hita() -> TokenSpec:
    coords = tuple((0, 0, i) for i in range(128)) + tuple((1, r, c) for r in range(21) for c in range(21))
    return TokenSpec(SequenceLayout((1,) * 569, coords), (Part(128, 16384, 12), Part(441, 16384, 8)), 336)


def maps() -> TokenSpec:
    layout = SequenceLayout.scales(range(1, 17))
    quantizer = describe(IndependentVQ(vocab_size=8912, channels=32, sides=tuple(range(1, 17))))
    return TokenSpec(layout, (Part(layout.length, 8912, 32),), 256, quantizer)


PUBLISHED = {
    "rar_b": (grid(16, 1024), 260_923_648),
    "rar_l": (grid(16, 1024), 461_668_352),
    "rar_xl": (grid(16, 1024), 955_425_024),
    "rar_xxl": (grid(16, 1024), 1_498_520_704),
    "gigatok_b": (line(256, 16384), 111_085_824),
    "gigatok_l": (line(256, 16384), 343_174_144),
    "gigatok_xl": (line(256, 16384), 775_028_480),
    "gigatok_xxl": (line(256, 16384), 1_411_367_424),
    "dar_l": (line(256, 16384), 342_910_976),
    "dar_xl": (line(256, 16384), 774_699_520),
    "dar_xxl": (line(256, 16384), 1_410_972_672),
    "har_l": (line(128, 8192), 326_263_808),
    "detailflow": (line(128, 8192), 326_140_928),
    "flexvar_d16": (maps(), 315_561_936),
    "flexvar_d20": (maps(), 607_513_952),
    "flexvar_d24": (maps(), 1_041_314_576),
    "hita_b": (hita(), 136.2e6),  # in millions, as published
    "hita_l": (hita(), 376.6e6),
    "hita_xl": (hita(), 816.8e6),
    "hita_xxl": (hita(), 1461.5e6),
    "hita_2b": (hita(), 2251.5e6),
}
SMALL = {
    "rar_small": grid(8, 512),
    "gigatok_small": line(64, 512),
    "dar_small": line(64, 512),
    "har_small": line(64, 512),
    "detailflow_small": line(64, 512),
    "nbp_small": grid(8, 512),
    "par_small": grid(8, 512),
    "ifsq_small": replace(grid(8, 625), quantizer=describe(FSQ(levels=[5] * 4, groups=[2, 2]))),
    "flexvar_small": map_spec((1, 2, 3, 4, 5, 6, 7, 8)),
    "ifsq_l": grid(16, 17**4),
    "ifsq_l_factorised": grid(16, 17**4),
}
SMALL["hita_small"] = TokenSpec(
    SequenceLayout(
        (1,) * 20, tuple((0, 0, i) for i in range(4)) + tuple((1, r, c) for r in range(4) for c in range(4))
    ),
    (Part(4, 512, 8), Part(16, 512, 8)),
    32,
)


def build(name: str, spec: TokenSpec, classes: int) -> Generator:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("train", overrides=[f"model={name}"]).model
    with torch.device("meta"):
        return instantiate(config, _convert_="all", _partial_=True)(spec=spec, num_classes=classes)


def trained(model: Generator) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_have_the_published_parameters(name):
    spec, count = PUBLISHED[name]
    found = trained(build(name, spec, 1000))
    if isinstance(count, float):
        assert abs(found - count) <= 0.05e6
    else:
        assert found == count
        text = (CONFIGS / "model" / f"{name}.yaml").read_text()
        assert name.startswith("dar") or f"{count:,}" in text, "the header states the count"


def test_detailflow_is_as_large_for_any_number_of_tokens():
    for length in (256, 512):
        assert trained(build("detailflow", line(length, 8192), 1000)) == 326_140_928


@pytest.mark.parametrize("name", SMALL)
def test_other_sizes_build_and_unofficial_ones_say_so(name):
    model = build(name, SMALL[name], 10)
    assert not name.endswith("small") or 1e6 < trained(model) < 8e6
    header = (CONFIGS / "model" / f"{name}.yaml").read_text().split("_target_")[0]
    assert ("status: unofficial" in header) == (type(model).__name__ in ("NBP", "PAR"))


# lr, betas, batch, steps, warm-up, kind, final share, weight decay, clip, EMA: generators.md 14.1, epochs as steps
RECIPES = {
    "rar_imagenet256": (4e-4, (0.9, 0.96), 2048, 250_000, 62_500, "cosine", 1e-5 / 4e-4, 0.03, 1.0, None),
    "gigatok_gpt_imagenet256": (1e-4, (0.9, 0.95), 256, 1_501_367, 5000, "linear", 0.1, 0.05, 1.0, None),
    "retok_gpt_imagenet256": (1e-4, (0.9, 0.95), 256, 1_501_367, 5000, "linear", 0.1, 0.05, 1.0, None),
    "dar_gpt_imagenet256": (4e-4, (0.9, 0.95), 1024, 360_000, 0, "linear", 1e-5 / 4e-4, 0.05, 1.0, None),
    "hita_gpt_imagenet256": (1e-4, (0.9, 0.95), 256, 1_501_367, 0, "constant", 0.0, 0.05, 1.0, 0.9999),
    "har_imagenet256": (1e-4, (0.9, 0.95), 256, 1_500_000, 5000, "cosine", 0.1, 0.05, 1.0, 0.9999),
    "detailflow_gpt_imagenet256": (1e-4, (0.9, 0.95), 256, 1_501_367, 0.05, "cosine", 0.01, 0.05, 1.0, 0.9999),
    "flexvar_gpt_imagenet256": (3e-4, (0.9, 0.95), 768, 300_273, 0.02, "linear", 0.1, 0.05, 2.0, None),
    "ifsq_gpt_imagenet256": (1e-4, (0.9, 0.95), 256, 500_455, 0, "constant", 0.0, 0.05, 1.0, 0.9999),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_the_published_ones(name):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("train", overrides=[f"experiment={name}"])
    optimizer, schedule = config.optimizer, config.schedule
    found = (optimizer.lr, tuple(optimizer.betas), config.batch_size, config.steps, schedule.warmup, schedule.kind)
    found += (schedule.final, optimizer.weight_decay, config.clip, config.ema)
    assert found == RECIPES[name] and config.name == name
    assert config.model.label_drop == 0.1 and config.precision == "bf16-mixed"
    published = {"gigatok": 0.8, "retok": 0.8, "dar": 300_000, "flexvar": 0.05}
    assert schedule.get("hold", 0) == published.get(name.split("_")[0], 0)
