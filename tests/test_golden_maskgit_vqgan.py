"""MaskGIT's VQGAN against its recorded outputs and its published size."""

from __future__ import annotations

import pytest
import torch
from references import assert_close, read

from vtok.convert import convert
from vtok.models.maskgit_vqgan import MaskGITVQGAN
from vtok.quantize.vq import VQ


@torch.no_grad()
def test_every_recorded_output():
    state, given, want, info = read("maskgit_vqgan")
    module = convert("maskgit_vqgan", state, info["ctor"])
    image = given["image"] * 2 - 1
    features = module.features(image)
    assert_close(features.permute(0, 3, 1, 2), want["features"])
    tokens = module.encode(image)
    assert float(want["index_margin"]) > 1e-4  # so that no index is decided by rounding
    assert torch.equal(tokens, want["indices"])
    assert_close((module.decode(tokens) * 0.5 + 0.5).clamp(0, 1), want["image"])
    found = module.decode(given["indices"]) * 0.5 + 0.5
    # recorded through the same clamped decode
    assert_close(found.clamp(0, 1), want["image_from_given"].clamp(0, 1))
    assert_close(sum(module(image).losses.values()).reshape(want["loss"].shape), want["loss"])


@torch.no_grad()
def test_every_key_counts():
    state, _, _, info = read("maskgit_vqgan")
    for extra in ("encoder.conv_in.bias", "encoder.down.0.downsample.conv.weight", "loss.weight"):
        with pytest.raises(ValueError, match=extra):
            convert("maskgit_vqgan", state | {extra: torch.zeros(1)}, info["ctor"])
    for key in state:
        with pytest.raises(ValueError):
            convert("maskgit_vqgan", {k: v for k, v in state.items() if k != key}, info["ctor"])
    for name, wrong in (("Encoder_Decoder", {"colour": 1}), ("Encoder_Decoder", {"num_res_blocks": 3})):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            convert("maskgit_vqgan", state, info["ctor"] | {name: info["ctor"][name] | wrong})


def test_published_size():
    with torch.device("meta"):
        model = MaskGITVQGAN(image_size=256, quantizer=VQ(vocab_size=1024, channels=256, l2_norm=False))
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    assert count(model.encoder) == 23_775_104 and count(model.decoder) == 30_478_339
    assert count(model) == 54_515_587  # with the 1024 x 256 codebook
    assert model.spec.layout.length == 256
