"""iFSQ's autoencoder and quantizer: every recorded output, met through vtok.convert.convert."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from references import assert_close, read

from vtok.convert import convert
from vtok.layers.cnn import from_map, to_map
from vtok.quantize.fsq import FSQ


@torch.no_grad()
def test_ifsq_vae():
    state, given, want, info = read("ifsq_vae")
    module = convert("ifsq", state, info["ctor"])
    features = module.features(given["image"])
    side = features.shape[1]
    assert_close(to_map(features, side), want["features"])
    found = module.quantizer(features)
    assert_close(to_map(found.z, side), want["quant"])
    tokens = module.encode(given["image"])
    assert torch.equal(tokens, want["indices"].flatten(1))
    assert_close(module(given["image"]).images, want["image"])
    assert_close(module.decode(tokens), want["image"])
    assert_close(module.decode(given["indices"].flatten(1)), want["image_from_given"])


@torch.no_grad()
def test_ifsq_quantizer_in_groups_with_projections_and_on_sequences():
    """What tests/test_vtok_goldens.py leaves over of the quantizer's record."""
    state, given, want, _ = read("ifsq_quantizer")
    z = from_map(given["z"])
    found = FSQ(levels=[17] * 4, activation="ifsq", groups=[2, 2])
    quantized = found(z)
    assert found.factors == (289, 289)
    assert_close(to_map(quantized.z, 6), want["factorized_codes"])
    parts = found.split(quantized.ids)
    assert torch.equal(parts.flatten(), want["factorized_indices"].flatten())
    assert torch.equal(found.join(parts).flatten(), want["factorized_global"].flatten())
    assert torch.equal(found.join(parts), quantized.ids)
    assert_close(to_map(found.lookup(quantized.ids), 6), want["factorized_roundtrip"])
    # two codebooks over one half of the channels each are one codebook whose ids split in two
    double = FSQ(levels=[5] * 4, activation="ifsq", groups=[2, 2])
    assert_close(to_map(double(z).z, 6), want["two_codebooks_codes"])
    assert torch.equal(double.split(double.indices(z)).flatten(), want["two_codebooks_indices"].flatten())
    # projections are the tokenizer's
    inside, outside = (
        [state[f"projected.project_{way}.{kind}"] for kind in ("weight", "bias")] for way in ("in", "out")
    )
    projected = FSQ(levels=[5] * 3, activation="ifsq")
    inner = projected(F.linear(from_map(given["z6"]), *inside))
    assert_close(to_map(F.linear(inner.z, *outside), 6), want["projected_codes"])
    assert torch.equal(inner.ids.flatten(), want["projected_indices"].flatten())
    back = projected.lookup(inner.ids)
    shapes = [to_map(x, 6) for x in (back, F.linear(back, *outside))]
    assert_close(next(x for x in shapes if x.shape == want["projected_roundtrip"].shape), want["projected_roundtrip"])
    plain = FSQ(levels=[17] * 4, activation="ifsq")
    sequence = plain(z.flatten(1, 2))
    assert_close(sequence.z, want["ifsq_seq_codes"])
    assert torch.equal(sequence.ids.flatten(), want["ifsq_seq_indices"].flatten())


def test_every_key_and_argument_counts():
    state, _, _, info = read("ifsq_vae")
    ((name, arguments),) = info["ctor"].items()
    for key in set(state) - {"quantize.running_mean", "quantize.running_var"}:
        with pytest.raises(ValueError):
            convert("ifsq", {k: v for k, v in state.items() if k != key}, info["ctor"])
    for wrong in (
        {"embed_dim": 8},
        {"colour": 1},
        {"act_fun": "tanh"},
        {"norm_type": "layernorm"},
        {"attn_resolutions": [16]},
        {"encoder_spatial_downsample": ["", "Downsample"]},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            convert("ifsq", state, {name: arguments | wrong})
    with pytest.raises(ValueError, match="ImageVAEModel"):
        convert("ifsq", state, {"AutoencoderKL": {}})


def test_the_vq_and_the_continuous_variants_convert():
    """The original's other two classes share the networks: the state of the one with another bottleneck's keys."""
    state, given, _, info = read("ifsq_vae")
    arguments = {k: v for k, v in info["ctor"]["ImageFSQVAEModel"].items() if k not in ("levels", "act_fun")}
    arguments.pop("do_simple_bound")
    table = torch.randn(32, 4)
    vq = convert("ifsq", state | {"quantize.embedding.weight": table}, {"ImageVQVAEModel": arguments | {"n_e": 32}})
    z = vq.features(given["image"]).detach()
    ids = torch.cdist(z.flatten(1, 2).double(), table.double().expand(len(z), -1, -1)).argmin(-1)
    assert torch.equal(vq.encode(given["image"]), ids)
    found = vq.quantizer(z)
    error = (table[ids] - z.flatten(1, 2)).square().mean()
    torch.testing.assert_close(found.loss["commitment"], error)
    torch.testing.assert_close(found.loss["codebook"], 0.5 * error)  # the original weighs this one
    wide = {k: torch.cat([v, v]) if k.startswith("quant_conv") else v for k, v in state.items()}
    wide = {k: v for k, v in wide.items() if not k.startswith("quantize")}
    ae = convert("ifsq", wide, {"ImageVAEModel": arguments | {"deterministic": True}})
    torch.testing.assert_close(ae.encode(given["image"]), z.flatten(1, 2))
    assert not ae.train()(given["image"]).losses
