"""LFQ, BSQ and Open-MAGVIT2's networks: against their defining equations, by enumeration."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vtok.convert import convert
from vtok.layers.cnn import Decoder, Downsample, Encoder
from vtok.layers.cnn_adaptive import AdaptiveGroupNorm, DepthToSpaceUpsample, depth_to_space
from vtok.models.magvit2 import MAGVIT2Tokenizer
from vtok.quantize.binary import BSQ, LFQ
from vtok.quantize.entropy import EPS


def every_code(bits: int, size: float = 1.0) -> torch.Tensor:
    """All codes in the order of their ids, written out bit by bit."""
    rows = [[size if (code >> i) & 1 else -size for i in range(bits)] for code in range(2**bits)]
    return torch.tensor(rows, dtype=torch.float64)


def enumerated(z: torch.Tensor, codes: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Both entropies from the whole table of N x V probabilities."""
    logarithms = torch.log_softmax(2 * z @ codes.T / temperature, -1)
    shares = logarithms.exp()
    mean = shares.mean(0)
    return -(shares * logarithms).sum(-1).mean(), -(mean * torch.log(mean + EPS)).sum()


def test_published_ids():
    quantizer = LFQ(bits=18, entropy_weight=0.0)
    z = -torch.ones(4, 1, 18)
    z[1, 0, 0] = z[2, 0, 17] = 1
    z[3] = 0.5
    assert quantizer.indices(z).flatten().tolist() == [0, 1, 131072, 262143]
    assert quantizer.indices(torch.zeros(1, 1, 18)).item() == 0  # 0 counts as -1


@pytest.mark.parametrize("make", (LFQ, BSQ))
def test_ids_codes_and_gradients(make):
    quantizer = make(bits=6)
    table = every_code(6, quantizer.size).float()
    z = torch.randn(3, 4, 5, 6, requires_grad=True)
    found = quantizer(z)
    vectors = z.detach().flatten(0, 2)
    assert torch.equal(found.ids.flatten(), torch.cdist(vectors, table).argmin(1))
    assert torch.equal(found.codes.detach().flatten(0, 1), table[found.ids.flatten()])
    assert torch.equal(quantizer.lookup(found.ids), found.codes) and torch.equal(quantizer.indices(z), found.ids)
    (gradient,) = torch.autograd.grad((found.z * torch.arange(6.0)).sum(), z, retain_graph=True)
    prepared = z if make is LFQ else F.normalize(z, dim=-1)
    (want,) = torch.autograd.grad((prepared * torch.arange(6.0)).sum(), z, retain_graph=True)
    torch.testing.assert_close(gradient, want)
    want = 0.25 * (prepared - found.z.detach()).square().mean()
    torch.testing.assert_close(found.loss["commitment"], want)


def test_bsq_lives_on_the_unit_sphere():
    quantizer = BSQ(bits=9)
    found = quantizer(3 * torch.randn(2, 7, 9))
    torch.testing.assert_close(found.codes.norm(dim=-1), torch.ones(2, 7))
    assert torch.equal(quantizer.indices(2 * found.codes), found.ids)


@pytest.mark.parametrize("make, temperature", ((LFQ, 1.0), (LFQ, 0.01), (BSQ, 0.1), (BSQ, 1.0)))
def test_entropies_equal_enumeration(make, temperature):
    """The products of halves against the table of all 64 codes, values and gradients."""
    torch.manual_seed(0)
    quantizer = make(bits=6, temperature=temperature, sample_weight=0.7, batch_weight=1.3)
    z = torch.randn(5, 6, 6, dtype=torch.float64, requires_grad=True)
    on_sphere = z if make is LFQ else F.normalize(z, dim=-1)
    want = enumerated(on_sphere.flatten(0, 1), every_code(6, quantizer.size), temperature)
    got = quantizer.entropies(on_sphere)
    for ours, theirs in zip(got, want):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    pairs = [torch.autograd.grad(one - other, z, retain_graph=True)[0] for one, other in (got, want)]
    torch.testing.assert_close(*pairs, rtol=1e-6, atol=1e-6)
    loss = quantizer(z.float()).loss["entropy"].double()
    torch.testing.assert_close(loss, 0.1 * (0.7 * want[0] - 1.3 * want[1]), rtol=1e-5, atol=1e-6)


def test_groups_of_bits_add_up_to_the_whole_where_bits_are_independent():
    """The mean of products is a product of means when N = 1; otherwise groups bound the whole from above."""
    torch.manual_seed(0)
    whole, parts = LFQ(bits=8, temperature=1.0), LFQ(bits=8, temperature=1.0, entropy_groups=[3, 3, 2])
    one = 0.3 * torch.randn(1, 8, dtype=torch.float64)
    torch.testing.assert_close(whole.entropies(one)[1], parts.entropies(one)[1], atol=1e-2, rtol=0)  # up to EPS
    many = torch.randn(4, 8, dtype=torch.float64)
    assert whole.entropies(many)[1] < parts.entropies(many)[1]
    torch.testing.assert_close(whole.entropies(many)[0], parts.entropies(many)[0])


def test_the_entropy_of_many_codes_fits():
    """2^18 codes: uniform bits have entropies 18 log 2 and, with EPS in the logarithm, -log(2^-18 + EPS)."""
    quantizer = LFQ(bits=18)
    z = torch.zeros(2, 4, 18, requires_grad=True)
    sample, batch = quantizer.entropies(z)
    assert math.isclose(sample.item(), 18 * math.log(2), rel_tol=1e-5)
    assert math.isclose(batch.item(), -math.log(2**-18 + EPS), rel_tol=1e-5)
    (sample - batch).backward()
    assert bool(z.grad.isfinite().all())


def test_sub_codes_are_bits():
    quantizer = LFQ(bits=18, groups=[6, 12], entropy_weight=0.0)
    ids = torch.tensor([[0, 1, 63, 64, 262143, 131072]])
    assert quantizer.factors == (64, 4096)
    assert quantizer.split(ids).tolist() == [[[0, 0], [1, 0], [63, 0], [0, 1], [63, 4095], [0, 2048]]]
    assert torch.equal(quantizer.join(quantizer.split(ids)), ids)
    assert LFQ(bits=5).factors == (32,)
    with pytest.raises(ValueError, match="one per factor"):
        quantizer.join(ids.unsqueeze(-1))


@pytest.mark.parametrize(
    "arguments, word",
    (
        ({"bits": 0}, "bits"),
        ({"bits": 63}, "bits"),
        ({"bits": 4, "temperature": 0.0}, "temperature"),
        ({"bits": 4, "groups": [2, 3]}, "groups"),
        ({"bits": 24}, "entropy_groups"),
    ),
)
def test_mistakes_are_named(arguments, word):
    with pytest.raises(ValueError, match=word):
        LFQ(**arguments)
    with pytest.raises(ValueError, match="channels"):
        LFQ(bits=4)(torch.randn(1, 2, 5))


# --- Open-MAGVIT2's networks ------------------------------------------------------------------------------------------


def test_depth_to_space_has_the_block_slowest():
    x = torch.randn(2, 4 * 3, 2, 5)
    got = depth_to_space(x)
    for a, b, c in itertools.product(range(2), range(2), range(3)):
        assert torch.equal(got[:, c, a::2, b::2], x[:, (2 * a + b) * 3 + c])
    assert not torch.equal(got, F.pixel_shuffle(x, 2))
    layer = DepthToSpaceUpsample(3)
    assert torch.equal(layer(x[:, :3]), depth_to_space(layer.conv(x[:, :3])))


def test_adaptive_norm_scales_and_shifts_by_the_latents_statistics():
    layer = AdaptiveGroupNorm(8, 3, 4).double()
    x, latent = (torch.randn(2, n, 4, 5, dtype=torch.float64) for n in (8, 3))
    groups = x.view(2, 4, 2 * 20)
    mean, var = groups.mean(-1, keepdim=True), groups.var(-1, keepdim=True, unbiased=False)
    normal = ((groups - mean) / (var + 1e-6).sqrt()).view_as(x)
    flat = latent.flatten(2)
    deviation = ((flat - flat.mean(-1, keepdim=True)).square().sum(-1) / (20 - 1) + 1e-6).sqrt()  # unbiased
    scale = deviation @ layer.scale.weight.T + layer.scale.bias
    bias = flat.mean(-1) @ layer.bias.weight.T + layer.bias.bias
    want = scale[..., None, None] * normal + bias[..., None, None]
    torch.testing.assert_close(layer(x, latent), want, rtol=1e-6, atol=1e-6)  # its statistics are float32
    with pytest.raises(ValueError, match="two cells"):
        layer(x, latent[..., :1, :1])


def test_pads():
    for symmetric, want in ((False, [[9, 6], [6, 4]]), (True, [[4, 6], [6, 9]])):
        layer = Downsample(1, symmetric=symmetric)
        nn.init.ones_(layer.conv.weight)
        nn.init.zeros_(layer.conv.bias)
        assert layer(torch.ones(1, 1, 4, 4))[0, 0].tolist() == want
    for make, wrong in ((Encoder, {"downsample": "none"}), (Decoder, {"upsample": "none"})):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            make(**({"out_channels": 4} if make is Encoder else {"in_channels": 4}), **wrong)


@pytest.mark.parametrize(
    "bits, multipliers, count",
    ((18, (1, 1, 2, 2, 4), 115_127_829), (14, (1, 1, 2, 2, 4), 115_094_033), (18, (1, 2, 2, 4), 112_021_653)),
)
def test_published_sizes(bits, multipliers, count):
    with torch.device("meta"):
        module = MAGVIT2Tokenizer(image_size=256, quantizer=LFQ(bits=bits), multipliers=multipliers)
    assert sum(p.numel() for p in module.parameters()) == count
    assert module.stride == 2 ** (len(multipliers) - 1)


def original(module: MAGVIT2Tokenizer) -> dict[str, torch.Tensor]:
    """The state of `module` under the original's names, without our table."""
    last, state = len(module.encoder.levels) - 1, {}
    swaps = {"shortcut": "nin_shortcut", "scale": "gamma", "bias": "beta"}
    for key, value in module.state_dict().items():
        half, *rest = key.split(".")
        if rest[0] == "levels":
            index = int(rest[1]) if half == "encoder" else last - int(rest[1])
            name = ["down" if half == "encoder" else "up", str(index)]
            if rest[2] == "blocks":
                name += ["block", rest[3], swaps.get(rest[4], rest[4]), rest[5]]
            else:
                name += ["downsample", rest[4]] if half == "encoder" else ["upsample", "conv1", rest[4]]
        elif rest[0] == "adaptive":
            name = ["adaptive", str(last - int(rest[1])), swaps[rest[2]], rest[3]]
        else:
            name = ["mid_block" if rest[0] == "mid" else rest[0], *rest[1:]]
        state[".".join([half, *name])] = value
    return state


def test_original_files_convert():
    torch.manual_seed(0)
    shape = dict(channels=32, multipliers=[1, 2], blocks=2)
    module = MAGVIT2Tokenizer(image_size=16, quantizer=LFQ(bits=5), **shape).eval()
    state = original(module)
    assert "decoder.up.1.upsample.conv1.weight" in state and "encoder.down.0.downsample.weight" in state
    file = {k: torch.zeros_like(v) for k, v in state.items()}  # the live weights, beside their average
    file |= {"model_ema." + k.replace(".", ""): v for k, v in state.items()}
    file |= {"model_ema.decay": torch.ones(()), "model_ema.num_updates": torch.ones(()), "loss.x": torch.ones(1)}
    network = {"ch": 32, "ch_mult": [1, 2], "num_res_blocks": 2, "z_channels": 5, "double_z": False}
    config = {"VQModel": {"ddconfig": network, "n_embed": 32, "embed_dim": 5}, "image_size": 16}
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    again = convert("magvit2", file, config)
    assert torch.equal(again.encode(images), module.encode(images))
    assert torch.equal(again(images).images, module(images).images)
    assert not any(p.any() for p in convert("magvit2", file, config | {"weights": "raw"}).parameters())
    assert torch.equal(convert("magvit2", state, config).encode(images), module.encode(images))
    for wrong, word in (
        ({"VQModel": config["VQModel"] | {"embed_dim": 6}}, "embed_dim"),
        ({"VQModel": config["VQModel"] | {"ddconfig": network | {"ch": 64}}}, "ch="),
        ({"weights": "best"}, "weights"),
        ({"colour": 1}, "colour"),
    ):
        with pytest.raises(ValueError, match=word):
            convert("magvit2", state, config | wrong)
    with pytest.raises(ValueError, match=r"unknown keys: quantize\.mask"):
        convert("magvit2", state | {"quantize.mask": torch.ones(1)}, config)
    with pytest.raises(ValueError, match="no averaged weights"):
        convert("magvit2", state, config | {"weights": "ema"})
