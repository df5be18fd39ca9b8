"""TiTok against its recorded outputs."""

from __future__ import annotations

import pytest
import torch
from references import assert_close, read

from vtok.convert import convert


@torch.no_grad()
def test_every_recorded_output():
    state, given, want, info = read("titok")
    module = convert("titok", state, info["ctor"])
    image = given["image"] * 2 - 1
    z = module.features(image)
    assert_close(z.transpose(1, 2).unsqueeze(2), want["z"])
    assert float(want["index_margin"]) > 1e-4  # so that no index is decided by rounding
    found = module.quantizer(z)
    assert_close(found.z.transpose(1, 2).unsqueeze(2), want["zq"])
    assert torch.equal(module.encode(image).unsqueeze(1), want["indices"])
    recon = module(image)
    logits = recon.features["proxy_logits"].transpose(1, 2).unflatten(2, (4, 4))
    assert_close(logits, want["logits_or_pixels"])
    assert_close(recon.images * 0.5 + 0.5, want["image"])
    assert_close(module.decode(module.encode(image)) * 0.5 + 0.5, want["image"])
    assert_close(module.decode(given["indices"]) * 0.5 + 0.5, want["image_from_given"])


@torch.no_grad()
def test_every_key_counts():
    state, _, _, info = read("titok")
    for extra in ("encoder.conv_in.weight", "decoder.conv_out.weight", "pixel_encoder.conv_in.weight"):
        with pytest.raises(ValueError, match=extra):
            convert("titok", state | {extra: torch.zeros(1)}, info["ctor"])
    for key in state:
        with pytest.raises(ValueError):
            convert("titok", {k: v for k, v in state.items() if k != key}, info["ctor"])
    for wrong in ({"colour": 1}, {"codebook_size": 65}, {"num_latent_tokens": 7}, {"quantize_mode": "fsq"}):
        vq = info["ctor"]["TiTok_config"]["model"]["vq_model"] | wrong
        with pytest.raises(ValueError, match=next(iter(wrong))):
            convert("titok", state, info["ctor"] | {"TiTok_config": {"model": {"vq_model": vq}}})
