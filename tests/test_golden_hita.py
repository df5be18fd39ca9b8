"""Hita's recorded outputs, met through vtok.convert.convert."""

import pytest
import torch
from references import assert_close, read

from vtok.convert import convert
from vtok.layers.cnn import from_map


def converted():
    state, given, want, info = read("hita")
    model = convert("hita", state, info["ctor"])
    model.side = Recorded(given["vfm"])
    return model, state, given, want, info["ctor"]


class Recorded(torch.nn.Module):
    """In place of the frozen network: its recorded output, whatever the images."""

    def __init__(self, tokens: torch.Tensor) -> None:
        super().__init__()
        self.tokens = tokens

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.tokens


@torch.no_grad()
def test_outputs():
    model, _, given, want, _ = converted()
    image, quantizer = given["image"], model.quantizer
    grid = model.encoder(image)
    assert_close(grid, want["features"])
    carriers, cells = model.fuse(from_map(grid), given["vfm"])
    assert_close(carriers, want["slots"])
    assert_close(cells, from_map(want["z"]).flatten(1, 2))
    assert min(want["z_margin"], want["slot_margin"]) > 1e-4  # so the indices decide nothing by rounding
    ids = model.encode(image)
    model.spec_for(16).check(ids)
    assert torch.equal(ids[:, :8].flatten(), want["slot_indices"].flatten())
    assert torch.equal(ids[:, 8:].flatten(), want["z_indices"].flatten())
    found = quantizer(model.features(image))
    holistic, z = quantizer.split_parts(found.z)
    assert_close(holistic, want["slots_quant"])
    assert_close(z, from_map(want["z_quant"]).flatten(1, 2))
    assert_close(model.decode(ids, size=16), want["image"])
    assert_close(model(image).images, want["image"])
    parts = [given[name].view(len(image), -1) for name in ("slot_indices", "z_indices")]
    assert_close(model.decode(torch.cat(parts, 1), size=16), want["image_from_given"])


def test_every_key_and_argument_counts():
    _, state, _, _, config = converted()
    for extra in ("encode_transformer.backbone.cls_token", "quantize.embedding.bias", "decode_transformer.norm.scale"):
        with pytest.raises(ValueError, match=extra):
            convert("hita", state | {extra: torch.zeros(1)}, config)
    for key in sorted(state)[::7]:
        with pytest.raises(ValueError):
            convert("hita", {k: v for k, v in state.items() if k != key}, config)
    for wrong in ({"colour": 1}, {"z_channels": 7}, {"codebook_slots_embed_dim": 3}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            convert("hita", state, config | {"ModelArgs": config["ModelArgs"] | wrong})
    for wrong in ({"n_carrier": 9}, {"mlp_dim": 99}, {"layer_type": "slots"}, {"depth": 3}):
        settings = config["transformer_config"]["encoder_config"]
        changed = {"encoder_config": settings | {"params": settings["params"] | wrong}}
        with pytest.raises(ValueError, match=next(iter(wrong))):
            convert("hita", state, config | {"transformer_config": config["transformer_config"] | changed})
