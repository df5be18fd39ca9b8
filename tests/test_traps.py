"""Places where published checkpoints differ from what their papers or common sense suggest, each against a closed form.

Each test fails where the trap is stepped into; the recorded outputs of the originals (test_golden_*.py and
test_reference_*.py) hold the same traps together.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from generators import FAMILIES
from references import read

from vgen.convert import convert
from vtok.convert import convert as convert_tokenizer
from vtok.layers.time import TimeEmbedding, sinusoids
from vtok.quantize.residual import phi_table


def test_llamagen_sees_its_class_through_the_value_only():
    """The table's row of zeros: a query weighs the class by exp(0), whatever its key would be; the class, which has no
    query, is not turned by a place either. Cell (0, 0), the first that is read, turns by nothing.
    """
    model = FAMILIES["llamagen"]().eval()
    cos, sin = model.cos[:4], model.sin[:4]
    assert not cos[0].any() and not sin[0].any() and torch.equal(cos[1], torch.ones_like(cos[1]))
    attention, heads = model.trunk.blocks[0].attention, model.trunk.heads
    x = torch.randn(1, 4, model.trunk.dim)
    q, k, v = F.linear(x, attention.qkv.weight).view(4, 3, heads, -1).unbind(1)

    def turned(t):
        """Neighbours of a head's channels as complex numbers, by the angle of the cell that is read."""
        number = torch.view_as_complex(t.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(number * torch.complex(cos, sin)[:, None]).flatten(-2)

    scores = torch.einsum("qhd,khd->hqk", turned(q), turned(k)) / q.shape[-1] ** 0.5
    assert not scores[:, :, 0].any()
    scores = scores.masked_fill(torch.ones(4, 4).triu(1).bool(), -torch.inf)
    mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
    mask = torch.ones(4, 4).tril().bool()
    found = attention(x, position=(cos, sin, None), mask=mask)
    torch.testing.assert_close(found[0], F.linear(mixed, attention.out.weight))
    with_key = attention(x, position=(torch.ones_like(cos), sin, None), mask=mask)
    assert not torch.allclose(with_key, found), "a class with a key would give something else"


def test_llamagen_refuses_grouped_heads():
    """n_kv_head: an argument of the original that no published file uses; the weights alone would split wrongly."""
    state, inputs, outputs, info = read("llamagen_gpt")
    arguments = info["ctor"]["Transformer_ModelArgs"]
    same = {"Transformer_ModelArgs": arguments | {"n_kv_head": arguments["n_head"]}}
    model = convert("llamagen", state, same)
    tokens, label = inputs["indices"].long(), inputs["label"].long()
    logits = model.head.logits(model(model.arrange(tokens), model.conditioner(label)))[0]
    torch.testing.assert_close(logits, outputs["logits"], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="n_kv_head=1"):
        convert("llamagen", state, {"Transformer_ModelArgs": arguments | {"n_kv_head": 1}})


@pytest.mark.parametrize("name, norm", [("var", True), ("var_plain_attention", False)])
def test_var_scales_its_attention(name, norm):
    """Normalised queries and keys: a logit is exp(min(scale, log 100)) times a cosine, with no 1 / sqrt(head width).
    Without the norm: 0.25 / sqrt(head width), a quarter of the usual.
    """
    state, _, _, info = read(name)
    attention = convert("var", state, info["ctor"]).trunk.blocks[0].attention
    heads, dim = info["ctor"]["VAR"]["num_heads"], info["ctor"]["VAR"]["embed_dim"]
    x = torch.randn(1, 5, dim)
    q, k, v = F.linear(x, state["var.blocks.0.attn.mat_qkv.weight"]).view(1, 5, 3, heads, dim // heads).unbind(2)
    q = q + state["var.blocks.0.attn.q_bias"].view(heads, -1)
    v = v + state["var.blocks.0.attn.v_bias"].view(heads, -1)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if norm:
        scale = state["var.blocks.0.attn.scale_mul_1H11"].clamp(max=torch.tensor(100.0).log()).exp()
        scores = scale.view(heads, 1, 1) * F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    else:
        scores = 0.25 / (dim // heads) ** 0.5 * q @ k.transpose(-2, -1)
    mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    want = F.linear(mixed, state["var.blocks.0.attn.proj.weight"], state["var.blocks.0.attn.proj.bias"])
    torch.testing.assert_close(attention(x), want)


def test_var_shares_four_convolutions_among_ten_scales_and_ten_among_fourteen():
    assert phi_table(10, 4) == (0, 0, 1, 1, 1, 2, 2, 3, 3, 3)  # ticks at 1/12, 13/36 ..: not thirds
    assert phi_table(14, 4) == (0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3)
    state, _, _, info = read("var")
    quantizer = convert("var", state, info["ctor"]).quantizer
    assert quantizer.phi_weight == 0.5 and len(quantizer.phi) == 4


def test_rar_tells_a_position_where_its_target_stands():
    """Row 0 of the target table is not used: the start has none, the class that of the first cell in the order."""
    state, inputs, _, info = read("rar")
    model = convert("rar", state, info["ctor"])
    order = inputs["orders"].long()[:1]
    tokens, label = inputs["indices"].long()[:1], inputs["label"].long()[:1]
    canvas, cond = model.arrange(tokens, order), model.conditioner(label)
    x = model.inputs(canvas, cond, 0, canvas.layout.steps).x[0]
    positions, targets = state["pos_embed"][0], state["target_aware_pos_embed"][0]
    embedded, shuffled = state["embeddings.weight"], tokens[0][order[0]]
    vocab_size = info["ctor"]["RAR_config"]["model"]["vq_model"]["codebook_size"]
    length = len(shuffled)
    want = [state["cls_token"][0, 0] + positions[0]]
    want.append(embedded[vocab_size + 1 + int(label)] + positions[1] + targets[2 + order[0, 0]])
    for k in range(length - 1):
        want.append(embedded[shuffled[k]] + positions[2 + order[0, k]] + targets[2 + order[0, k + 1]])
    torch.testing.assert_close(x, torch.stack(want))


def test_mar_latents_are_scaled_and_its_buffer_holds_the_class():
    """0.2325 is applied by MAR's scripts, outside the VAE; the 64 rows before the tokens are copies of the class."""
    state, given, _, info = read("kl_vae")
    scaled, plain = (convert_tokenizer("kl", state, {**info["ctor"], "scale": s}) for s in (0.2325, 1.0))
    torch.testing.assert_close(scaled.encode(given["image"]), 0.2325 * plain.encode(given["image"]))
    default = convert_tokenizer("kl", state, info["ctor"])
    assert torch.equal(default.encode(given["image"]), scaled.encode(given["image"]))
    latents, size = given["latents"].flatten(2).transpose(1, 2), 2 * given["latents"].shape[-1]
    torch.testing.assert_close(scaled.decode(0.2325 * latents, size=size), plain.decode(latents, size=size))
    weights, inputs, _, made = read("mar")
    model = convert("mar", weights, made["ctor"])
    assert model.buffer == made["ctor"]["MAR"]["buffer_size"]
    seen = []
    model.trunk.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0].x))
    cells = torch.zeros(1, 0, dtype=torch.int64)
    latents = torch.zeros(1, 0, weights["z_proj.weight"].shape[1])
    model.encode(latents, cells, model.conditioner(inputs["label"][:1]))
    rows = weights["class_emb.weight"][inputs["label"][0]] + weights["encoder_pos_embed_learned"][0, : model.buffer]
    norm = {k: weights[f"z_proj_ln.{k}"] for k in ("weight", "bias")}
    torch.testing.assert_close(seen[0][0], F.layer_norm(rows, rows.shape[-1:], **norm, eps=1e-6))


def test_titok_reads_images_from_0_to_1():
    """Our images are in [-1, 1]: the first convolution of a converted TiTok sees what the original was given."""
    state, given, _, info = read("titok")
    module = convert_tokenizer("titok", state, info["ctor"])
    seen = []
    conv = module.encoder.embed.conv
    conv.register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    module.features(2 * given["image"] - 1)
    torch.testing.assert_close(seen[0], given["image"])


def test_titok_reshapes_its_latents_without_a_transpose():
    """The published models of two stages read [N, D] as [D, N]; those of one stage do not."""
    for name, legacy in (("titok", True), ("titok_one_stage", False)):
        state, _, _, info = read(name)
        encoder = convert_tokenizer("titok", state, info["ctor"]).encoder
        tokens, dim = state["latent_tokens"].shape
        h = torch.randn(2, tokens, dim)
        encoder.trunk.forward = lambda inputs, h=h: h
        x = h.reshape(2, dim, tokens).transpose(1, 2) if legacy else h
        want = F.linear(x, state["encoder.conv_out.weight"].flatten(1), state["encoder.conv_out.bias"])
        if legacy:  # and back: [B, C, N, 1] is read as [B, C, 1, N]
            want = want.transpose(1, 2).reshape(2, -1, tokens).transpose(1, 2)
        torch.testing.assert_close(encoder(torch.zeros(2, 3, 32, 32)), want)


def test_xar_embeds_whole_thousandths_of_the_time():
    """t x 1000, rounded down: 0.4567 is 456, as the original's integer times are."""
    state, _, _, info = read("xar")
    embedding = convert("xar", state, info["ctor"]).time
    assert isinstance(embedding, TimeEmbedding) and embedding.whole
    waves = sinusoids(torch.tensor([456.0]), state["time_embed.mlp.0.weight"].shape[1])
    up = F.linear(waves, state["time_embed.mlp.0.weight"], state["time_embed.mlp.0.bias"])
    want = F.linear(F.silu(up), state["time_embed.mlp.2.weight"], state["time_embed.mlp.2.bias"])
    torch.testing.assert_close(embedding(torch.tensor([0.4567])), want)
    half = waves.shape[-1] // 2
    frequencies = torch.exp(-torch.arange(half) * (torch.tensor(10000.0).log() / half))
    torch.testing.assert_close(waves[0], torch.cat([(456 * frequencies).cos(), (456 * frequencies).sin()]))
