"""The published tokenizers' recorded outputs, met through vtok.convert.convert."""

from __future__ import annotations

import pytest
import torch
from references import read

from vtok.convert import convert
from vtok.convert.table import Rule, translate
from vtok.quantize.fsq import FSQ

TOLERANCE = 1e-4  # max|a - b| / max|b| over a tensor: float32 through some dozen layers


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.shape == want.shape
    assert ((got - want).abs().max() / want.abs().max()).item() <= TOLERANCE


def channels_first(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 3, 1, 2)


@torch.no_grad()
def test_llamagen_vq():
    state, given, want, info = read("llamagen_vq")
    module = convert("llamagen", state, info["ctor"])
    features = module.features(given["image"])
    close(channels_first(features), want["features"])
    assert want["index_margin"] > 1e-4  # so the indices decide nothing by rounding
    tokens = module.encode(given["image"])
    assert torch.equal(tokens.flatten(), want["indices"])
    found = module.quantizer(want["features"].permute(0, 2, 3, 1))
    close(channels_first(found.z), want["quant"])
    losses = torch.stack([found.loss[name] for name in ("codebook", "commitment", "entropy")])
    close(losses, want["losses"])
    close(module(given["image"]).images, want["recon"])
    close(module.decode(tokens, size=16), want["recon"])
    close(module.decode(given["indices"], size=16), want["image_from_given"])


@torch.no_grad()
def test_var_vqvae():
    state, given, want, info = read("var_vqvae")
    module = convert("var", state, info["ctor"])
    quantizer, image = module.quantizer, given["image"]
    close(channels_first(module.features(image)), want["features"])
    assert torch.equal(module.encode(image), want["indices"])
    found = quantizer(want["features"].permute(0, 2, 3, 1))
    assert torch.equal(found.ids, want["indices"])
    close(channels_first(found.z), want["vq_fhat"])
    close(sum(found.loss.values()).view(1), want["vq_loss"])
    codes = module.embed(want["indices"])
    close(quantizer.maps(codes, 1, 6), want["var_input"])
    close(channels_first(quantizer.assemble(codes)), want["fhat"])
    close(channels_first(quantizer.assemble(codes)), want["fhat_from_idx"])
    close(channels_first(quantizer.assemble(codes, 1 + 4 + 9)), want["fhat_scale2"])
    close(module.decode(want["indices"]).clamp(-1, 1), want["image"])
    close(module.decode(given["indices"]).clamp(-1, 1), want["image_from_given"])


@pytest.mark.parametrize(
    "name, quantizer",
    (
        ("ifsq", FSQ(levels=[17] * 4, activation="ifsq")),
        ("tanh", FSQ(levels=[17] * 4, activation="ifsq", steepness=2.0)),
        ("fsq_bound", FSQ(levels=[8, 5, 5, 5])),
    ),
)
def test_ifsq_quantizer(name, quantizer):
    _, given, want, _ = read("ifsq_quantizer")
    found = quantizer(given["z"].permute(0, 2, 3, 1))
    close(channels_first(found.z), want[f"{name}_codes"])
    assert torch.equal(found.ids.flatten(), want[f"{name}_indices"].flatten())
    close(channels_first(quantizer.lookup(found.ids).view_as(found.z)), want[f"{name}_roundtrip"])


FAMILY = {"llamagen": "llamagen_vq", "var": "var_vqvae"}


@pytest.mark.parametrize("family", FAMILY)
def test_every_key_counts(family):
    state, _, _, info = read(FAMILY[family])
    for extra in ("encoder.conv_in.scale", "loss.weight", "quantize.embedding.bias", "module.encoder.conv_in.weight"):
        with pytest.raises(ValueError, match=extra):
            convert(family, state | {extra: torch.zeros(1)}, info["ctor"])
    dropped = {"quantize.ema_vocab_hit_SV", "quantize.codebook_used"}
    for key in set(state) - dropped:
        with pytest.raises(ValueError):
            convert(family, {k: v for k, v in state.items() if k != key}, info["ctor"])
    key = "decoder.conv_out.weight"
    with pytest.raises(ValueError, match="conv_out"):
        convert(family, state | {key: state[key][:, :-1]}, info["ctor"])


@pytest.mark.parametrize("family, name", (("llamagen", "VQModel_ModelArgs"), ("var", "VQVAE")))
def test_configs_are_checked(family, name):
    state, _, _, info = read(FAMILY[family])
    for wrong in ({"colour": 1}, {"z_channels": 7}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            convert(family, state, info["ctor"] | {name: info["ctor"][name] | wrong})
    with pytest.raises(ValueError, match="unknown arguments"):
        convert(family, state, info["ctor"] | {"other": {}})
    with pytest.raises(ValueError, match=r"known are .*llamagen, .*var"):
        convert("vqgan", state, info["ctor"])


def original_shapes(family: str) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of a published file, from the lists that the papers' code implies (channels, levels, blocks)."""
    shapes: dict[str, tuple[int, ...]] = {}

    def conv(name: str, wide: int, width: int, kernel: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (wide, width, kernel, kernel), (wide,)

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    def block(name: str, width: int, wide: int) -> None:
        norm(f"{name}.norm1", width)
        conv(f"{name}.conv1", wide, width, 3)
        norm(f"{name}.norm2", wide)
        conv(f"{name}.conv2", wide, wide, 3)
        if width != wide:
            conv(f"{name}.nin_shortcut", wide, width, 1)

    def attention(name: str, width: int) -> None:
        norm(f"{name}.norm", width)
        if family == "var":
            conv(f"{name}.qkv", 3 * width, width, 1)
        else:
            for part in "qkv":
                conv(f"{name}.{part}", width, width, 1)
        conv(f"{name}.proj_out", width, width, 1)

    var = family == "var"
    channels, width_z, codes = (160, 32, (4096, 32)) if var else (128, 256, (16384, 8))
    multipliers = (1, 2, 2, 4) if family == "vq8" else (1, 1, 2, 2, 4)
    widths = [channels * m for m in multipliers]
    last = len(widths) - 1
    middle = ("block_1", "attn_1", "block_2") if var else ("0", "1", "2")
    for half, blocks in (("encoder", 2), ("decoder", 3)):
        encoder = half == "encoder"
        conv(f"{half}.conv_in", *((channels, 3) if encoder else (widths[-1], width_z)), 3)
        block(f"{half}.mid.{middle[0]}", widths[-1], widths[-1])
        attention(f"{half}.mid.{middle[1]}", widths[-1])
        block(f"{half}.mid.{middle[2]}", widths[-1], widths[-1])
        width = channels if encoder else widths[-1]
        for level in range(last + 1) if encoder else range(last, -1, -1):
            index = level if var or encoder else last - level
            name = f"{half}.{('down' if encoder else 'up') if var else 'conv_blocks'}.{index}"
            for j in range(blocks):
                block(f"{name}.{'block' if var else 'res'}.{j}", width, widths[level])
                width = widths[level]
                if level == last:
                    attention(f"{name}.attn.{j}", width)
            if level != (last if encoder else 0):
                conv(f"{name}.{'downsample' if encoder else 'upsample'}.conv", width, width, 3)
        norm(f"{half}.norm_out", width)
        conv(f"{half}.conv_out", *((width_z, width) if encoder else (3, width)), 3)
    kernel = 3 if var else 1
    conv("quant_conv", codes[1], width_z, kernel)
    conv("post_quant_conv", width_z, codes[1], kernel)
    shapes["quantize.embedding.weight"] = codes
    if var:
        for i in range(4):
            conv(f"quantize.quant_resi.qresi_ls.{i}", 32, 32, 3)
        shapes["quantize.ema_vocab_hit_SV"] = (10, 4096)
    else:
        shapes["quantize.codebook_used"] = (65536,)
    return shapes


@pytest.mark.parametrize(
    "name, family, config, count",
    (
        ("vq16", "llamagen", {"VQModel_ModelArgs": {"encoder_ch_mult": [1, 1, 2, 2, 4]}}, 71_883_403),
        ("vq8", "llamagen", {"VQModel_ModelArgs": {"encoder_ch_mult": [1, 2, 2, 4], "z_channels": 256}}, 70_109_835),
        ("var", "var", {"VQVAE": {"vocab_size": 4096, "z_channels": 32, "ch": 160, "test_mode": True}}, 108_948_355),
        ("var", "var", {"VQVAE": {"v_patch_nums": [1, 2, 3, 4, 6, 9, 13, 18, 24, 32]}}, 108_948_355),
    ),
)
def test_published_files_convert(name, family, config, count):
    shapes = original_shapes(name)
    state = {key: torch.zeros(()).expand(shape) for key, shape in shapes.items()}  # no memory
    module = convert(family, state, config)
    assert sum(p.numel() for p in module.parameters()) == count
    if name == "vq16":
        with pytest.raises(ValueError, match="ch_mult"):
            convert(family, state, {"VQModel_ModelArgs": {"encoder_ch_mult": [1, 2, 2, 4]}})


def test_a_table_joins_splits_and_refuses():
    rules = [
        Rule(r"a\.(\d)\.q", r"qkv.\1", part=(0, 2)),
        Rule(r"a\.(\d)\.k", r"qkv.\1", part=(1, 2)),
        Rule(r"both\.(w|b)", (r"left.\1", r"right.\1")),
        Rule(r"up\.(\d)", lambda m: f"level.{3 - int(m[1])}", change=lambda x: 2 * x),
        Rule("statistics", None),
    ]
    one, two = torch.ones(1, 2), torch.zeros(2, 2)
    state = {"a.0.k": two, "a.0.q": one, "both.w": torch.arange(4), "up.1": one, "statistics": one}
    found = translate(state, rules, "test")
    assert sorted(found) == ["left.w", "level.2", "qkv.0", "right.w"]
    assert torch.equal(found["qkv.0"], torch.cat([one, two])) and torch.equal(found["level.2"], 2 * one)
    assert found["left.w"].tolist() == [0, 1] and found["right.w"].tolist() == [2, 3]
    for wrong, word in (
        ({"a.0.q": one}, "2 parts"),
        ({"statistics.weight": one}, "unknown keys: statistics.weight"),
        ({"xstatistics": one}, "unknown keys"),
        ({"both.w": torch.ones(3)}, "does not split"),
    ):
        with pytest.raises(ValueError, match=word):
            translate(wrong, rules, "test")
    with pytest.raises(ValueError, match="two keys"):
        translate({"x": one, "y": one}, [Rule("x|y", "z")], "test")
