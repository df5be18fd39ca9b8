"""Configurations of the flow-matching generators: parameters as in the header, status, recipes of the papers."""

import re
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from vtok.config import instantiate
from vtok.layout import SequenceLayout
from vtok.tokenizer import Part, TokenSpec

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
BIG = TokenSpec(SequenceLayout.raster(16, 16), (Part(256, None, 16),), 256)  # kl16
SMALL = TokenSpec(SequenceLayout.raster(8, 8), (Part(64, None, 8),), 32)  # kl_small
OFFICIAL = ["xar_b", "xar_l", "xar_h", "xar_small"]
UNOFFICIAL = ["flowar_s", "flowar_b", "flowar_l", "flowar_h", "flowar_small", "ecar_small"]
UNOFFICIAL += ["dtm_small", "artm_small", "fhtm_small"]


@pytest.mark.parametrize("name", OFFICIAL + UNOFFICIAL)
def test_the_header_tells_parameters_and_status(name):
    file = CONFIGS / "model" / f"{name}.yaml"
    header = " ".join(line[2:] for line in file.read_text().splitlines() if line.startswith("#"))
    spec, classes = (SMALL, 10) if name.endswith("small") else (BIG, 1000)
    with torch.device("meta"):
        model = instantiate(OmegaConf.load(file), _convert_="all", _partial_=True)(spec=spec, num_classes=classes)
    counted = int(re.search(r"([\d,]+) parameters", header)[1].replace(",", ""))
    assert sum(p.numel() for p in model.parameters()) == counted
    assert header.startswith("status: unofficial") == (name in UNOFFICIAL)


EPOCH = 1_281_167 // 2048
RECIPES = {  # specification: rate, betas, decay, batch, epochs, warm-up epochs, last constant epoch, share at the end
    "xar_imagenet256": (4e-4, [0.9, 0.96], 0.02, 2048, 800, 100, 600, 1e-5 / 4e-4, 1.0),
    "flowar_imagenet256": (4e-4, [0.9, 0.95], 0.02, 2048, 400, 100, None, None, 3.0),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name):
    lr, betas, decay, batch, epochs, warmup, hold, final, clip = RECIPES[name]
    with initialize_config_dir(str(CONFIGS), version_base=None):
        config = compose("train", overrides=[f"experiment={name}"])
    assert (config.optimizer.lr, list(config.optimizer.betas), config.optimizer.weight_decay) == (lr, betas, decay)
    assert (config.batch_size, config.steps, config.schedule.warmup) == (batch, epochs * EPOCH, warmup * EPOCH)
    assert (config.clip, config.ema, config.model.label_drop) == (clip, 0.9999, 0.1)
    if hold is None:
        assert config.schedule.kind == "constant"
    else:
        assert config.schedule.kind == "cosine" and config.schedule.hold == hold * EPOCH
        assert config.schedule.final == pytest.approx(final)
        assert config.model.dropout == config.model.attention_dropout == 0.1
