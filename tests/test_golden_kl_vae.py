"""The KL-16 autoencoder of MAR and xAR: its recorded outputs, met through vtok.convert.convert."""

from __future__ import annotations

import pytest
import torch
from references import assert_close, read

from vtok.convert import convert
from vtok.layers.cnn import to_map


@torch.no_grad()
def test_kl_vae():
    state, given, want, info = read("kl_vae")
    module = convert("kl", state, info["ctor"] | {"image_size": given["image"].shape[-1]})
    quantizer = module.quantizer
    mean, log_variance = quantizer.posterior(module.features(given["image"]))
    side = mean.shape[1]
    assert_close(to_map(mean, side), want["mean"])
    assert_close(to_map(log_variance, side), want["logvar"])
    assert_close(quantizer.divergence(module.features(given["image"])), want["kl"])
    tokens = module.encode(given["image"])
    assert_close(to_map(tokens, side) / 0.2325, want["mean"])
    assert_close(module.decode(tokens), want["decoded"])
    assert_close(module(given["image"]).images, want["decoded"])
    latents = given["latents"].flatten(2).transpose(1, 2)
    assert_close(module.decode(latents * 0.2325, size=2 * given["latents"].shape[-1]), want["decoded_given"])
    plain = convert("kl", state, info["ctor"] | {"image_size": given["image"].shape[-1], "scale": 1.0})
    assert_close(plain.encode(given["image"]) * 0.2325, tokens)


def test_every_key_and_argument_counts():
    state, _, _, info = read("kl_vae")
    for extra in ("loss.logvar", "decoder.up.1.attn.0.norm.scale", "module.encoder.conv_in.weight"):
        with pytest.raises(ValueError, match=extra):
            convert("kl", state | {extra: torch.zeros(1)}, info["ctor"])
    for key in state:
        with pytest.raises(ValueError):
            convert("kl", {k: v for k, v in state.items() if k != key}, info["ctor"])
    for wrong in ({"embed_dim": 8}, {"colour": 1}, {"use_variational": False}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            convert("kl", state, info["ctor"] | {"AutoencoderKL": info["ctor"]["AutoencoderKL"] | wrong})
