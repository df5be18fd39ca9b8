"""ResTok against its recorded outputs."""

from __future__ import annotations

import pytest
import torch
from references import assert_close, read

from vtok.convert import convert


def first(z: torch.Tensor) -> torch.Tensor:
    """[B, N, C] as the original's [B, C, 1, N]."""
    return z.transpose(1, 2).unsqueeze(2)


@torch.no_grad()
def test_every_recorded_output():
    state, given, want, info = read("restok")
    module = convert("restok", state, info["ctor"])
    image = given["image"] * 2 - 1
    z, levels = module.image_levels(image)
    assert [level.shape[1] for level in levels] == [8, 16, 32, 64]
    grid = lambda tokens: tokens.transpose(1, 2).unflatten(2, (8, 8))  # noqa: E731
    assert_close(grid(levels[-1]), want["first_image_tokens"])
    assert_close(levels[0].transpose(1, 2).unsqueeze(2), want["last_image_tokens"])
    total = sum(level.repeat_interleave(64 // level.shape[1], dim=1) for level in levels)
    assert_close(grid(total), want["image_tokens_sum"])

    assert float(want["index_margin"]) > 1e-4  # so that no index is decided by rounding
    found = module.quantizer(z)
    assert torch.equal(found.ids.unsqueeze(1), want["indices"])
    assert torch.equal(module.encode(image), found.ids)
    assert_close(first(found.z), want["zq"])
    assert_close(found.loss["commitment"].reshape(want["commitment_loss"].shape), want["commitment_loss"])
    assert_close(found.loss["codebook"].reshape(want["codebook_loss"].shape), want["codebook_loss"])
    given_z = given["z"].squeeze(2).transpose(1, 2)
    again = module.quantizer(given_z)
    assert_close(first(again.z), want["z_quant"])
    assert torch.equal(again.ids.view(want["z_indices"].shape), want["z_indices"])

    assert_close(grid(module.decoder(given_z, 8)), want["decoder_out"])
    assert_close(module(image).images * 0.5 + 0.5, want["image"])
    assert_close(module.decode(found.ids) * 0.5 + 0.5, want["image"])
    assert_close(module.decode(found.ids, keep=8) * 0.5 + 0.5, want["image_8_tokens"])
    assert_close(module.decode(found.ids, keep=torch.tensor([8, 8]))[:1] * 0.5 + 0.5, want["image_8_tokens"][:1])
    assert_close(module.decode(given["indices"]) * 0.5 + 0.5, want["image_from_given"])


@torch.no_grad()
def test_every_key_counts():
    state, _, _, info = read("restok")
    for extra in ("encoder.blocks.0.attn.k_bias", "encoder.level_embedding", "foundation_model.cls_token"):
        with pytest.raises(ValueError, match=extra):
            convert("restok", state | {extra: torch.zeros(1)}, info["ctor"])
    for key in sorted(state)[::6]:  # every kind of key, of one layer or another
        with pytest.raises(ValueError):
            convert("restok", {k: v for k, v in state.items() if k != key}, info["ctor"])
    for wrong in ({"colour": 1}, {"multi_quant": False}, {"hierarchy_stages": 3}, {"num_latent_tokens": 32}):
        vq = info["ctor"]["ResTok_config"]["model"]["vq_model"] | wrong
        with pytest.raises(ValueError, match=next(iter(wrong))):
            convert("restok", state, info["ctor"] | {"ResTok_config": {"model": {"vq_model": vq}}})
