"""The tokenizer half of the FlexVAR record: its quantizer; the networks are LlamaGen's, recorded by themselves."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from references import assert_close, read

from vtok.convert import convert
from vtok.layers.cnn import from_map, to_map
from vtok.layout import SequenceLayout
from vtok.quantize.independent import IndependentVQ


@torch.no_grad()
def test_flexvar_quantizer():
    state, given, want, info = read("flexvar")
    sides = info["ctor"]["FlexVAR"]["patch_nums"]
    quantizer = IndependentVQ(vocab_size=64, channels=32, sides=sides)
    quantizer.codebook.weight.copy_(state["vae.quantize.embedding.weight"])
    z = from_map(given["features"])
    ids = quantizer.indices(z)
    assert torch.equal(ids, want["indices"])
    found = quantizer(z)
    assert torch.equal(found.ids, ids)
    for name in ("llamagen_cfg", "var_cfg"):
        codes = quantizer.lookup(want[f"{name}_indices"])
        assert_close(to_map(quantizer.assemble(codes), 6), want[f"{name}_quant"])


@torch.no_grad()
def test_flexvar_networks_are_llamagens():
    """Where the encoder's own grid is the last scale, FlexVAR decodes what LlamaGen does; other scales are pooled."""
    state, given, want, info = read("llamagen_vq")
    config = {k: v for k, v in info["ctor"].items()}
    config["VQModel_ModelArgs"] = config["VQModel_ModelArgs"] | {"entropy_loss_ratio": 0.0}
    image = given["image"]
    side = want["features"].shape[-1]
    module = convert("flexvar", state, config | {"patch_nums": [1, 3, side]})
    tokens = module.encode(image)
    assert torch.equal(tokens[:, -side * side :].flatten(), want["indices"])
    assert_close(module.decode(tokens), want["recon"])
    pooled = F.adaptive_avg_pool2d(want["features"], 3)
    assert torch.equal(tokens[:, 1:10], module.quantizer.indices(from_map(pooled), [3]))
    other = SequenceLayout.scales([2, side])
    chosen = module.encode(image, layout=other)
    assert chosen.shape == (len(image), 4 + side * side)
    assert_close(module.decode(chosen, layout=other), want["recon"])
    with pytest.raises(ValueError, match="entropy_loss_ratio"):
        convert("flexvar", state, info["ctor"])
