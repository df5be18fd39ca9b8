"""FlexTok: who sees whom, prefixes and nested dropout, modulation by parts, guidance, the frozen VAE, sizes."""

import math
import re
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from tokenizers import cnn_kl, cnn_vq, flextok, images, make

from vtok import flow
from vtok.apg import classifier_free, projected
from vtok.layers.attention import attend_naive
from vtok.layers.flex import flex_trunk, sincos
from vtok.layers.trunk import Inputs
from vtok.models.flextok import FlexTokTokenizer
from vtok.noise import SampleNoise
from vtok.quantize.kl import KL

CONFIGS = Path(__file__).parents[1] / "configs" / "tokenizer"
KEYS = SampleNoise(torch.tensor([5, 6, 7]))


@torch.no_grad()
def test_registers_are_causal_and_patches_do_not_see_them():
    model = make("flextok")
    before = model.features(images())
    model.registers[3, 0] += 1.0  # of one channel: the norm undoes a shift of all
    after = model.features(images())
    changed = ((before - after).abs() > 1e-6).any(2).any(0)
    assert changed.tolist() == [False] * 3 + [True] * 5


@torch.no_grad()
def test_a_prefix_is_what_the_learned_vector_leaves():
    """Dropped registers read as the same vector whatever they held; rows may keep different numbers."""
    model = make("flextok")
    z = model.embed(model.encode(images()))
    keep = torch.tensor([1, 8, 4])
    registers = model.condition(z, keep)
    for row, k in enumerate(keep.tolist()):
        full = model.project_out(z[row, :k]) + model.places[:k]
        assert torch.equal(registers[row, :k], full)
        assert torch.equal(registers[row, k:], model.dropped + model.places[k:])
    none = model.condition(z, null=torch.tensor([True, False, True]))
    assert torch.equal(none[0], model.null + model.places) and torch.equal(none[1], model.condition(z)[1])
    together = model.decode(model.encode(images()), keep=keep, noise=KEYS)
    for row, k in enumerate(keep.tolist()):
        alone = model.decode(model.encode(images()), keep=k, noise=KEYS)
        torch.testing.assert_close(together[row], alone[row], rtol=1e-4, atol=1e-5)


def test_training_keeps_what_it_drew():
    """With one count in the distribution, registers behind it get no gradient; with null_drop = 1 none does."""
    for options, reaches in ((dict(nested={3: 1.0}), 3), (dict(nested="all"), 8), (dict(null_drop=1.0), 0)):
        model = make("flextok", **({"null_drop": 0.0} | options)).train()
        seen = []
        original = model.project_out.forward
        model.project_out.forward = lambda z, f=original, s=seen: (z.retain_grad(), s.append(z), f(z))[2]
        model(images(), key=torch.arange(3)).losses["flow"].backward()
        moved = (seen[0].grad != 0).any(2).any(0)
        assert moved.tolist() == [i < reaches for i in range(8)]


@torch.no_grad()
def test_the_last_step_of_the_walk_is_the_image():
    model, seen = make("flextok"), []
    tokens = model.encode(images())
    whole = model.decode(tokens, noise=KEYS, on_step=lambda i, x, slope: seen.append(x))
    assert len(seen) == 3 and torch.equal(seen[-1], whole)
    assert not torch.equal(seen[0], whole)


@torch.no_grad()
def test_guidance_of_scale_one_is_off_and_others_mix_two_passes():
    model = make("flextok")
    tokens = model.encode(images())
    off = model.decode(tokens, noise=KEYS)
    assert torch.equal(model.decode(tokens, noise=KEYS, guidance=1.0), off)
    z = model.embed(tokens)
    start = flow.normal_map(KEYS, 3, 16, 16, stream=64)
    one = torch.ones(3)
    cond = model.velocity(start, one, model.condition(z))[0]
    null = model.velocity(start, one, model.condition(z, null=torch.ones(3).bool()))[0]
    for project, want in ((False, cond + 2 * (cond - null)), (True, projected(cond, null, 3.0)[0])):
        got = model.decode(tokens, noise=KEYS, steps=1, guidance=3.0, project=project)
        torch.testing.assert_close(got, start - want, rtol=1e-4, atol=1e-4)


def test_projected_guidance_by_hand():
    """The added part is orthogonal to the conditional prediction and no longer than the limit times s - 1."""
    cond, null = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    added = projected(cond, null, 3.0, limit=0.5)[0] - cond
    assert float((added * cond).flatten(1).sum(1).abs().max()) < 1e-4
    assert bool((added.flatten(1).norm(dim=1) <= 2 * 0.5 + 1e-5).all())
    free = projected(cond, null, 3.0, limit=0.0, parallel=1.0)[0]
    torch.testing.assert_close(free, classifier_free(cond, null, 3.0))
    assert classifier_free(cond, null, 1.0) is cond


def test_a_layer_by_its_formula():
    """One modulated block over 3 patches and 2 registers against the equations, written out part by part."""
    torch.manual_seed(0)
    trunk = flex_trunk(16, 1, 8, modulated=True)
    block = trunk.blocks[0]
    torch.nn.init.normal_(block.modulation.projection.weight, std=0.1)
    torch.nn.init.normal_(block.modulation.projection.bias, std=0.1)
    x, vector, each = torch.randn(2, 5, 16), torch.randn(2, 1, 16), torch.tensor([0, 0, 0, 1, 1])
    rows = block.modulation.projection(torch.nn.functional.silu(vector[:, 0])).view(2, 2, 6, 16)
    want = []
    for part, here in ((0, slice(0, 3)), (1, slice(3, 5))):
        want.append(rows[:, part].unsqueeze(1).expand(-1, here.stop - here.start, -1, -1))
    gate1, gate2, scale1, scale2, shift1, shift2 = torch.cat(want, 1).unbind(2)

    def norm(h: torch.Tensor) -> torch.Tensor:
        return (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()

    def split(h: torch.Tensor) -> torch.Tensor:
        return h.view(2, 5, 2, 8).transpose(1, 2)

    h = norm(x) * (1 + scale1) + shift1
    q, k, v = (split(h @ w.T) for w in block.attention.qkv.weight.chunk(3))
    mixed = attend_naive(norm(q), norm(k), v, scale=8 / 8).transpose(1, 2).reshape(2, 5, 16)
    y = x + gate1 * (mixed @ block.attention.out.weight.T)
    h = norm(y) * (1 + scale2) + shift2
    gate, value = (h @ w.T for w in block.ffn.up.weight.chunk(2))
    y = y + gate2 * ((torch.nn.functional.silu(gate) * value) @ block.ffn.down.weight.T)
    rank = torch.zeros(5, dtype=torch.int64)
    torch.testing.assert_close(trunk(Inputs(x, rank, "full", vector=vector, each=each)), y, rtol=1e-4, atol=1e-5)


def test_fixed_positions():
    table = sincos(2, 3, 8, torch.device("cpu"))
    for row in range(2):
        for column in range(3):
            want = [f(p * w) for p in (row, column) for f in (math.sin, math.cos) for w in (1.0, 0.01)]
            torch.testing.assert_close(table[row * 3 + column], torch.tensor(want))


def test_the_vae_is_frozen_and_samples_its_posterior():
    model = make("flextok_vae").train()
    assert not model.vae.training and not any(p.requires_grad for p in model.vae.parameters())
    latents = model.latents(images())
    assert latents.shape == (3, 4, 4, 4)
    torch.testing.assert_close(model.images(latents), model.vae.decode(model.vae.encode(images())))
    assert not torch.equal(model.latents(images(), KEYS), latents)
    assert torch.equal(model.encode(images(), noise=KEYS), model.encode(images(), noise=KEYS))
    recon = model(images(), key=torch.arange(3))
    recon.losses["flow"].backward()
    assert all(p.grad is None for p in model.vae.parameters())
    with pytest.raises(ValueError, match="continuous"):
        flextok(vae=cnn_vq())
    assert make("flextok_vae").spec_for(32).image_size == 32 and cnn_kl().spec.discrete is False


def test_the_tapped_states_train_the_decoder():
    model = make("flextok", repa_block=1, repa_width=5).train()
    found = model(images(), key=torch.arange(3)).features["repa"]
    assert found.shape == (3, 16, 5)
    found.square().sum().backward()
    assert model.decoder.blocks[0].attention.qkv.weight.grad is not None
    assert model.decoder.blocks[1].attention.qkv.weight.grad is None


def test_mistakes_are_named():
    for wrong, word in (
        (dict(positions="rope"), "positions"),
        (dict(repa_block=2), "repa_block"),
        (dict(nested="some"), "nested"),
        (dict(head=5), "head"),
    ):
        with pytest.raises(ValueError, match=word):
            flextok(**wrong)
    with pytest.raises(ValueError, match="discrete quantizer, not KL"):
        FlexTokTokenizer(image_size=16, quantizer=KL(channels=4))


@pytest.mark.parametrize("name", ("d12_d12", "d18_d18", "d18_d28", "small"))
def test_published_and_small_sizes(name):
    """Trunks have 12 W^2 parameters a layer, the modulated one 24 W^2 and its biases."""
    path = CONFIGS / f"flextok_{name}.yaml"
    config = OmegaConf.merge({"data": {"image_size": 32 if name == "small" else 256}}, {"t": OmegaConf.load(path)}).t
    with torch.device("meta"):
        model = instantiate(config, _convert_="all")
    count = sum(p.numel() for p in model.parameters())
    assert re.search(r"([\d,]+) parameters", path.read_text())[1] == f"{count:,}"
    if name == "small":
        assert 1e6 < count < 8e6
        return
    depths = [int(d) for d in re.findall(r"d(\d+)", name)]
    for trunk, depth, modulated in ((model.encoder, depths[0], False), (model.decoder, depths[1], True)):
        width = 64 * depth
        layer = 4 * width**2 + 3 * width * int(8 * width / 3) + modulated * 12 * (width**2 + width)
        assert sum(p.numel() for p in trunk.parameters()) == depth * layer
    assert model.quantizer.vocab_size == 64_000 and model.spec.layout.length == 256
