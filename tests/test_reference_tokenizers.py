"""Options of published tokenizers that no golden shows, against what the originals computed on the same weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from references import assert_close, read

from vtok.checkpoint import load_strict
from vtok.convert import convert
from vtok.convert.table import Rule, translate
from vtok.layers.cnn import to_map
from vtok.losses.prior import ARPrior


def sequence(x: torch.Tensor) -> torch.Tensor:
    """[B, C, 1, N] to [B, N, C]."""
    return x.squeeze(2).transpose(1, 2)


@pytest.mark.parametrize("name", ("titok_one_stage", "tatitok_vq"))
@torch.no_grad()
def test_titok_in_one_stage(name):
    """Neither the legacy reshape nor proxy codes: patches of pixels, with text features beside the latents or not."""
    state, given, want, info = read(name)
    module = convert("titok", state, info["ctor"])
    z = module.features(given["image"] * 2 - 1)
    assert_close(z, sequence(want["z"]))
    assert float(want["index_margin"]) > 1e-4
    found, text = module.quantizer(z), {"text": given["text"]} if "text" in given else {}
    assert torch.equal(found.ids, want["indices"].flatten(1))
    assert_close(found.z, sequence(want["zq"]))
    assert_close(module.pixels(found.z, **text) * 0.5 + 0.5, want["image"])
    assert_close(module.pixels(module.embed(given["indices"]), **text) * 0.5 + 0.5, want["image_from_given"])


@pytest.mark.parametrize("name", ("titok_vae", "tatitok_vae"))
@torch.no_grad()
def test_titok_with_continuous_latents(name):
    state, given, want, info = read(name)
    module = convert("titok", state, info["ctor"])
    text = {"text": given["text"]} if "text" in given else {}
    moments = module.features(given["image"] * 2 - 1)
    assert_close(moments, sequence(want["z"]))
    mean, logvar = module.quantizer.posterior(moments)
    assert_close(mean, sequence(want["mean"]))
    assert_close(logvar, sequence(want["logvar"]))
    assert_close(module.pixels(mean, **text) * 0.5 + 0.5, want["image"])
    assert_close(module.pixels(sequence(given["latents"]), **text) * 0.5 + 0.5, want["image_from_given"])


@torch.no_grad()
def test_open_magvit2():
    state, given, want, info = read("magvit2")
    module = convert("magvit2", state, info["ctor"] | {"image_size": 16})
    features = module.features(given["image"])
    assert_close(to_map(features, 4), want["features"])
    assert float(want["margin"]) > 1e-4  # no sign is decided by rounding
    found = module.quantizer(features)
    assert torch.equal(found.ids, want["indices"])
    assert_close(to_map(found.z, 4), want["quant"])
    assert_close(module.decode(found.ids), want["image"])
    assert_close(module.decode(given["indices"]), want["image_from_given"])
    commitment = found.loss["commitment"] / module.quantizer.beta
    losses = torch.stack([found.stats["sample_entropy"], found.stats["batch_entropy"], commitment])
    assert_close(losses, want["losses"])


@torch.no_grad()
def test_open_magvit2_in_sub_codes():
    """The bits of the two sub-codes; their decoder is the same. The original weighs entropies of the two groups."""
    state, given, want, info = read("magvit2_factorised")
    module = convert("magvit2", state, info["ctor"] | {"image_size": 16})
    ids = module.encode(given["image"])
    parts = module.quantizer.split(ids)
    for part, name in enumerate(("indices_pre", "indices_post")):
        assert torch.equal(parts[..., part], want[name].long())
    assert_close(module.decode(ids), want["image"])


@torch.no_grad()
def test_ibq():
    state, given, want, info = read("ibq")
    module = convert("ibq", state, info["ctor"] | {"image_size": 16})
    features = module.features(given["image"])
    assert_close(to_map(features, 8), want["features"])
    found = module.quantizer(features)
    clear = want["gaps"] > 1e-5  # of products up to 0.03; the others are ties within rounding
    assert clear.float().mean() > 0.9 and torch.equal(found.ids[clear], want["indices"][clear])
    assert_close(to_map(module.embed(want["indices"]).unflatten(1, (8, 8)), 8), want["quant"])
    assert_close(module.decode(want["indices"]), want["image"])
    assert_close(module.decode(given["indices"]), want["image_from_given"])
    weight = module.quantizer.entropy_weight
    losses = torch.stack(
        [
            found.loss["quantization"],
            found.stats["sample_entropy"],
            found.stats["batch_entropy"],
            found.loss["entropy"] / weight,
        ]
    )
    assert_close(losses, want["losses"])


class Recorded(torch.nn.Module):
    """In place of the frozen network: its recorded output, whatever the images."""

    def __init__(self, tokens: torch.Tensor) -> None:
        super().__init__()
        self.tokens = tokens

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.tokens


@torch.no_grad()
def test_hita_ultra():
    """Hita-U, whose decoder also predicts what the frozen network says of the image."""
    state, given, want, info = read("hita_ultra")
    module = convert("hita", state, info["ctor"])
    module.side = Recorded(given["vfm"])
    carriers, cells = module.fuse(module.encoder(given["image"]).permute(0, 2, 3, 1), given["vfm"])
    assert_close(carriers, want["slots"])
    assert_close(cells, want["z"].flatten(2).transpose(1, 2))
    ids = module.encode(given["image"])
    assert torch.equal(ids, torch.cat([want["slot_indices"], want["z_indices"]], 1))
    found = module(given["image"])
    assert_close(found.images, want["image"])
    assert_close(found.features["alignment"][:1, :, ::16], want["vision"])
    parts = [given[name].view(2, -1) for name in ("slot_indices", "z_indices")]
    assert_close(module.decode(torch.cat(parts, 1), size=16), want["image_from_given"])


@torch.no_grad()
def test_larp_prior():
    """The prior's transformer and its cosines with the codes: no converter, since no other file than LARP's has one."""
    state, given, want, info = read("larp_prior")
    arguments = info["ctor"]["GPTCConfig"]
    prior = ARPrior(
        channels=arguments["n_ind"],
        length=arguments["max_seq_len"],
        width=arguments["n_embd"],
        depth=arguments["n_layer"],
        heads=arguments["n_head"],
        temperature=0.5,
    ).eval()
    names = {"ln1": "norm1", "ln2": "norm2", "attn.proj": "attention.out", "mlp.0": "ffn.up", "mlp.2": "ffn.down"}
    both = r"(weight|bias)"
    rules = [Rule(rf"blocks\.(\d+)\.{a}\.{both}", rf"trunk.blocks.\1.{b}.\2") for a, b in names.items()]
    for part, name in enumerate(("query", "key", "value")):
        key = rf"blocks\.(\d+)\.attn\.{name}\.{both}"
        rules.append(Rule(key, r"trunk.blocks.\1.attention.qkv.\2", part=(part, 3)))
    rules += [Rule(rf"ln_f\.{both}", r"trunk.norm.\1"), Rule(rf"input_proj\.{both}", r"embed.\1")]
    rules += [Rule(rf"head\.{both}", r"head.\1"), Rule("pos_emb", "position")]
    load_strict(prior, translate(state, rules, "LARP"), "LARP")
    logits = prior.logits(given["codes"][:, :-1], given["table"])
    assert_close(logits, want["logits"])
    assert_close(F.cross_entropy(logits.flatten(0, 1), given["ids"][:, 1:].flatten()).view(1), want["loss"])


@torch.no_grad()
def test_dar_encoder():
    """With gates near one, as after training: from the golden's gates near zero only ids come, which notice little."""
    state, given, want, info = read("dar_encoder")
    assert_close(convert("dar", state, info["ctor"]).features(given["image"]), want["features"])
