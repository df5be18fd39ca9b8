"""Sizes of the generators' configurations, on the meta device: the published ones, and those that a header states."""

import functools
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from generators import map_spec
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from vgen.generator import Generator
from vtok.config import describe, instantiate
from vtok.layout import SequenceLayout
from vtok.quantize.fsq import FSQ
from vtok.quantize.independent import IndependentVQ
from vtok.quantize.residual import MultiScaleVQ
from vtok.tokenizer import Part, TokenSpec

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def line(length: int, vocab_size: int) -> TokenSpec:
    return TokenSpec(SequenceLayout.line(length), (Part(length, vocab_size, 8),), 256)


def grid(side: int, vocab_size: int) -> TokenSpec:
    return TokenSpec(SequenceLayout.raster(side, side), (Part(side * side, vocab_size, 8),), 16 * side)


def latents(side: int, channels: int) -> TokenSpec:
    return TokenSpec(SequenceLayout.raster(side, side), (Part(side * side, None, channels),), 256)


def hita() -> TokenSpec:
    coords = tuple((0, 0, i) for i in range(128)) + tuple((1, r, c) for r in range(21) for c in range(21))
    return TokenSpec(SequenceLayout((1,) * 569, coords), (Part(128, 16384, 12), Part(441, 16384, 8)), 336)


def maps() -> TokenSpec:
    layout = SequenceLayout.scales(range(1, 17))
    quantizer = describe(IndependentVQ(vocab_size=8912, channels=32, sides=tuple(range(1, 17))))
    return TokenSpec(layout, (Part(layout.length, 8912, 32),), 256, quantizer)


def residuals(sides: tuple[int, ...], vocab_size: int = 4096, channels: int = 32) -> TokenSpec:
    layout = SequenceLayout.scales(sides)
    quantizer = describe(MultiScaleVQ(vocab_size=vocab_size, channels=channels, sides=sides))
    return TokenSpec(layout, (Part(layout.length, vocab_size, channels),), 16 * sides[-1], quantizer)


SIDES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
KL16, KL_SMALL = latents(16, 16), latents(8, 8)
PUBLISHED = {
    "llamagen_b": (grid(16, 16384), 110_888_448),
    "llamagen_l": (grid(16, 16384), 342_910_976),
    "llamagen_xl": (grid(16, 16384), 774_699_520),
    "llamagen_xxl": (grid(16, 16384), 1_410_972_672),
    "llamagen_3b": (grid(16, 16384), 3_096_659_200),
    # no d12 was published; its count by hand: 12 (18 d^2 + 14 d + 12) + 2 d^2 + 5823 d + 4096 with d = 768
    "var_d12": (residuals(SIDES), 133_186_960),
    "var_d16": (residuals(SIDES), 310_283_520),
    "var_d20": (residuals(SIDES), 600_917_136),
    "var_d24": (residuals(SIDES), 1_033_399_360),
    "var_d30": (residuals(SIDES), 2_010_020_356),
    "var_d36": (residuals((1, 2, 3, 4, 6, 9, 13, 18, 24, 32)), 2_353_893_904),
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
    "mar_b": (KL16, 207_924_768),
    "mar_l": (KL16, 478_326_304),
    "mar_h": (KL16, 942_403_104),
    "xar_b": (KL16, 172_638_224),
    "xar_l": (KL16, 608_397_968),
    "xar_h": (KL16, 1_186_024_096),
    "maskgit_titok_l32": (line(32, 4096), 177_202_432),
    "maskgit_titok_b64": (line(64, 4096), 177_227_008),
    "maskgit_titok_s128": (line(128, 4096), 294_990_848),
    "hita_b": (hita(), 136.2),  # in millions, as published
    "hita_l": (hita(), 376.6),
    "hita_xl": (hita(), 816.8),
    "hita_xxl": (hita(), 1461.5),
    "hita_2b": (hita(), 2251.5),
}
STATED = {  # a header states the count: no published one is exact, or there is none
    **dict.fromkeys(("flowar_s", "flowar_b", "flowar_l", "flowar_h"), KL16),
    **dict.fromkeys(("ecar_l", "dtm_l", "artm_l", "fhtm_l", "orthus_l"), KL16),
    **dict.fromkeys(("xar_small", "flowar_small", "ecar_small", "dtm_small", "artm_small", "fhtm_small"), KL_SMALL),
    "orthus_small": KL_SMALL,
    **dict.fromkeys(("nbp_l", "par_l"), grid(16, 16384)),
    **dict.fromkeys(("elm_l", "elm_xl"), grid(16, 2**20)),
    **dict.fromkeys(("elm_xxl", "elm_2b"), grid(16, 2**24)),
}
SMALL = {
    **dict.fromkeys(("llamagen_tiny", "llamagen_small"), grid(8, 1024)),
    **dict.fromkeys(("var_tiny", "var_small"), residuals((1, 2, 4, 8), 1024, 8)),
    "rar_small": grid(8, 1024),
    "gigatok_small": line(32, 1024),
    "dar_small": line(32, 1024),
    "har_small": line(32, 1024),
    "maskgit_small": line(32, 1024),
    "detailflow_small": line(64, 1024),
    "nbp_small": grid(8, 1024),
    "par_small": grid(8, 1024),
    "ifsq_small": replace(grid(8, 625), quantizer=describe(FSQ(levels=[5] * 4, groups=[2, 2]))),
    "elm_small": grid(8, 1024),
    "llamagen_factorised_small": grid(8, 1024),
    "llamagen_repa_small": grid(8, 1024),
    "flexvar_small": map_spec((1, 2, 3, 4, 5, 6, 7, 8)),
    "mar_small": KL_SMALL,
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


@functools.cache
def section(name: str) -> DictConfig:
    """The choice alone: it needs no other key of train.py."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose(f"model/{name}").model


def build(name: str, spec: TokenSpec, classes: int) -> Generator:
    config = section(name)
    with torch.device("meta"):
        return instantiate(config, _convert_="all", _partial_=True)(spec=spec, num_classes=classes)


def trained(model: Generator) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def header(name: str) -> str:
    text = (CONFIGS / "model" / f"{name}.yaml").read_text().split("_target_")[0]
    return " ".join(line[2:] for line in text.splitlines())


def test_every_configuration_is_built():
    found = sorted(file.stem for file in (CONFIGS / "model").glob("*.yaml"))
    assert sorted([*PUBLISHED, *STATED, *SMALL]) == found


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_have_the_published_parameters(name):
    spec, count = PUBLISHED[name]
    found = trained(build(name, spec, 1000))
    if isinstance(count, float):
        assert abs(found - count * 1e6) <= 0.05e6
    else:
        assert found == count
        assert name.startswith("dar") or f"{count:,}" in header(name), "the header states the count"


def test_detailflow_is_as_large_for_any_number_of_tokens():
    for length in (256, 512):
        assert trained(build("detailflow", line(length, 8192), 1000)) == 326_140_928


@pytest.mark.parametrize("name", STATED)
def test_a_header_states_the_parameters(name):
    model = build(name, STATED[name], 10 if name.endswith("small") else 1000)
    counted = int(re.search(r"([\d,]+) parameters", header(name))[1].replace(",", ""))
    assert sum(p.numel() for p in model.parameters()) == counted


@pytest.mark.parametrize("name", SMALL)
def test_other_sizes_build(name):
    model = build(name, SMALL[name], 10)
    assert not name.endswith("small") or 1e6 < trained(model) < 8e6


def test_elm_has_the_published_sizes():
    """About 1.4B (XXL) and 1.9B (2B), arXiv 2410.16257."""
    for name, billions in (("elm_xxl", 1.4), ("elm_2b", 1.9)):
        assert round(trained(build(name, STATED[name], 1000)) / 1e9, 1) == billions
