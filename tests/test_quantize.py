"""Quantisers against brute force, published vectors and closed forms."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vtok.config import build, describe
from vtok.models import FAMILIES
from vtok.quantize.codebook import Codebook, nearest
from vtok.quantize.fsq import FSQ
from vtok.quantize.residual import MultiScaleVQ, phi_table
from vtok.quantize.statistics import count_ids, perplexity, usage
from vtok.quantize.vq import VQ, entropy_loss

VAR_SIDES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)


def make(name: str):
    torch.manual_seed(0)
    return {
        "vq_cosine": lambda: VQ(vocab_size=37, channels=5),
        "vq_plain": lambda: VQ(vocab_size=37, channels=5, l2_norm=False, entropy_weight=0.1),
        "vq_ema": lambda: VQ(vocab_size=37, channels=5, ema_decay=0.9, restart=0.1),
        "fsq_even": lambda: FSQ(levels=[8, 8, 5, 4, 2]),
        "fsq_odd": lambda: FSQ(levels=[7, 5, 5, 3, 3]),
        "ifsq": lambda: FSQ(levels=[17, 5, 3, 9, 3], activation="ifsq"),
        "scales": lambda: MultiScaleVQ(vocab_size=37, channels=5, sides=[1, 2, 3, 6]),
        "scales_cosine": lambda: MultiScaleVQ(vocab_size=37, channels=5, sides=[2, 6], l2_norm=True, phi=1),
        "scales_alone": lambda: MultiScaleVQ(vocab_size=37, channels=5, sides=[1, 6], phi=0, ema_decay=0.9),
        "scales_no_phi": lambda: MultiScaleVQ(vocab_size=37, channels=5, sides=[1, 4, 6], phi_weight=0.0),
    }[name]()


NAMES = ("vq_cosine", "vq_plain", "vq_ema", "fsq_even", "fsq_odd", "ifsq", "scales", "scales_cosine", "scales_alone")
NAMES += ("scales_no_phi",)


def bits(x: torch.Tensor) -> torch.Tensor:
    return (x + 0.0).contiguous().view(torch.int32)  # + 0.0: minus zero is zero


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("training", (False, True))
def test_lookup_equals_codes_bitwise(name, training):
    quantizer = make(name).train(training)
    frozen = copy.deepcopy(quantizer)  # an EMA codebook moves after the forward of a training step
    z = (3 * torch.randn(3, 6, 6, 5)).to(torch.bfloat16)
    z.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = quantizer(z)
        assert torch.equal(frozen.indices(z), found.ids)
        codes = frozen.lookup(found.ids)
        whole = frozen.assemble(codes)
    assert found.ids.dtype == torch.int64 and found.ids.min() >= 0 and found.ids.max() < quantizer.vocab_size
    assert found.z.dtype == codes.dtype == torch.float32 and found.z.shape == z.shape
    assert torch.equal(bits(codes), bits(found.codes))
    assert torch.equal(bits(whole).view_as(found.z), bits(found.z))
    for row in (0, 7):  # a single id gives the same bits as the whole table
        assert torch.equal(bits(frozen.lookup(found.ids[:, row])), bits(found.codes[:, row]))


@pytest.mark.parametrize("name", NAMES)
def test_a_quantizer_is_rebuilt_from_its_description(name):
    quantizer = make(name)
    again = build(describe(quantizer), FAMILIES)
    again.load_state_dict(quantizer.state_dict())
    z = torch.randn(2, 6, 6, 5)
    assert torch.equal(again.indices(z), quantizer.indices(z))


@pytest.mark.parametrize("name", ("vq_cosine", "vq_plain", "fsq_even", "ifsq"))
def test_sequences_and_maps_are_the_same(name):
    quantizer = make(name).eval()
    z = torch.randn(2, 4, 3, 5)
    grid, line = quantizer(z), quantizer(z.flatten(1, 2))
    assert torch.equal(grid.ids, line.ids) and torch.equal(grid.z.flatten(1, 2), line.z)


@pytest.mark.parametrize("name", NAMES)
def test_wrong_channels_are_named(name):
    with pytest.raises(ValueError, match=r"channels|expected"):
        make(name)(torch.randn(2, 6, 6, 4))


def test_nearest_is_brute_force_and_chunks_do_not_matter(monkeypatch):
    vectors, table = torch.randn(50, 4), torch.randn(23, 4)
    want = (vectors[:, None] - table).square().sum(-1).argmin(1)
    assert torch.equal(nearest(vectors, table), want)
    monkeypatch.setattr("vtok.quantize.codebook.SEARCH_BUDGET", 23 * 7)
    assert torch.equal(nearest(vectors, table), want)


def test_vq_losses_and_gradients_are_the_formulas():
    quantizer = make("vq_plain")
    z = torch.randn(2, 9, 5, requires_grad=True)
    found = quantizer(z)
    table = quantizer.codebook.weight.detach()
    code = table[(z.detach()[:, :, None] - table).square().sum(-1).argmin(-1)]
    error = (z - code).square().mean()
    torch.testing.assert_close(found.loss["codebook"], error.detach())
    torch.testing.assert_close(found.loss["commitment"], 0.25 * error.detach())
    (gradient,) = torch.autograd.grad(found.loss["commitment"], z, retain_graph=True)
    torch.testing.assert_close(gradient, 0.25 * 2 * (z.detach() - code) / z.numel())
    push = torch.randn_like(z)  # straight through: what arrives at z is what leaves the decoder
    (passed,) = torch.autograd.grad((found.z * push).sum(), z, retain_graph=True)
    assert torch.equal(passed, push)
    (table_gradient,) = torch.autograd.grad(found.loss["codebook"], quantizer.codebook.weight)
    want = torch.zeros_like(table).index_add_(
        0, found.ids.flatten(), (2 * (code - z.detach()) / z.numel()).flatten(0, 1)
    )
    torch.testing.assert_close(table_gradient, want)


def test_cosine_vq_ignores_length():
    quantizer = make("vq_cosine")
    z = torch.randn(2, 9, 5)
    assert torch.equal(quantizer.indices(z), quantizer.indices(7.5 * z))
    norms = quantizer(z).codes.norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones_like(norms))


def test_codebook_starts_uniform_and_on_the_sphere():
    torch.manual_seed(0)
    plain = Codebook(vocab_size=1000, channels=8, l2_norm=False).weight
    assert plain.abs().max() <= 1e-3 and plain.abs().mean().item() == pytest.approx(5e-4, rel=0.02)
    sphere = Codebook(vocab_size=1000, channels=8, l2_norm=True).weight
    torch.testing.assert_close(sphere.norm(dim=1), torch.ones(1000))


def test_entropy_loss_of_two_limits():
    table = torch.eye(4)
    # each vector sure of a code of its own: no entropy per vector, log 4 of the mean
    assert entropy_loss(torch.eye(4), table, 0.01).item() == pytest.approx(-math.log(4), abs=1e-3)
    # every vector equally far from all codes: both entropies are log 4
    assert entropy_loss(torch.zeros(3, 4), table, 0.01).item() == pytest.approx(0, abs=1e-3)


def test_ema_codebook_follows_the_means():
    quantizer = VQ(vocab_size=2, channels=2, l2_norm=False, ema_decay=0.5)
    quantizer.codebook.weight.copy_(torch.tensor([[0.0, 0.0], [10.0, 10.0]]))
    quantizer.codebook.sums.copy_(quantizer.codebook.weight)
    z = torch.tensor([[[1.0, 0.0], [3.0, 0.0], [9.0, 9.0]]])
    quantizer(z)
    # counts (1, 1) -> (1.5, 1), sums (0, 0), (10, 10) -> (2, 0), (9.5, 9.5)
    torch.testing.assert_close(quantizer.codebook.weight, torch.tensor([[2 / 1.5, 0.0], [9.5, 9.5]]))
    assert "codebook" not in quantizer(z).loss and not list(quantizer.parameters())
    before = quantizer.eval().codebook.weight.clone()
    quantizer(z)
    assert torch.equal(quantizer.codebook.weight, before)


@pytest.mark.parametrize("ema_decay", (None, 0.9))
def test_dead_codes_restart_at_vectors_of_the_batch(ema_decay):
    torch.manual_seed(0)
    quantizer = VQ(vocab_size=16, channels=2, l2_norm=False, ema_decay=ema_decay, restart=0.2)
    with torch.no_grad():
        quantizer.codebook.weight[1:] = 1e4  # nothing comes near: only code 0 is alive
    z = torch.randn(1, 200, 2)
    for _ in range(400):
        quantizer(z)
    counts = count_ids(quantizer.eval()(z).ids, 16)
    assert quantizer.codebook.weight.abs().max() < 5
    assert usage(counts) >= 0.9


@pytest.mark.parametrize("restart", (0.0, 0.2))
def test_a_vector_that_is_not_finite_leaves_no_trace(restart):
    """on_nan=skip drops the step; the table is that of the same batch without it, restarts aside."""
    torch.manual_seed(0)
    one, two = (Codebook(vocab_size=8, channels=2, l2_norm=False, ema_decay=0.9, restart=restart) for _ in range(2))
    two.load_state_dict(one.state_dict())
    for step in range(4):
        z = torch.randn(60, 2, generator=torch.Generator().manual_seed(step))
        bad = z.index_fill(0, torch.tensor([3, 7]), torch.nan)
        kept = z[[i for i in range(60) if i not in (3, 7)]]
        one.update(bad, nearest(bad, one.table()))
        two.update(kept, nearest(kept, two.table()))
        assert one.weight.isfinite().all() and one.sums.isfinite().all()
        if not restart:
            torch.testing.assert_close(one.state_dict(), two.state_dict())
    one.update(torch.full((5, 2), torch.nan), torch.zeros(5, dtype=torch.int64))
    assert one.weight.isfinite().all() and one.counts.isfinite().all()


@pytest.mark.parametrize("l2_norm", (True, False))
@pytest.mark.parametrize("ema_decay", (None, 0.9))
def test_the_table_may_move_between_forward_and_backward(l2_norm, ema_decay):
    options = dict(vocab_size=64, channels=5, l2_norm=l2_norm, ema_decay=ema_decay, restart=0.5)
    for quantizer in (VQ(**options, entropy_weight=0.1), MultiScaleVQ(**options, sides=[1, 3])):
        quantizer.codebook.counts[3:] = 0.01  # these restart in the first step
        still = copy.deepcopy(quantizer)
        still.codebook.update = lambda *_: None
        z = torch.randn(2, 3, 3, 5)
        gradients = []
        for module in (quantizer, still):
            x = z.clone().requires_grad_()
            found = module(x)
            (found.z.sum() + sum(found.loss.values())).backward()
            gradients.append([x.grad, *(p.grad for p in module.parameters() if p.grad is not None)])
        assert not torch.equal(quantizer.codebook.weight, still.codebook.weight)
        assert all(torch.equal(one, other) for one, other in zip(*gradients))


def test_statistics_of_known_histograms():
    counts = count_ids(torch.tensor([[0, 1], [1, 3]]), 4)
    assert counts.tolist() == [1, 2, 0, 1]
    assert usage(counts).item() == 0.75
    assert perplexity(counts).item() == pytest.approx(math.exp(0.5 * math.log(2) + 0.5 * math.log(4)))
    assert perplexity(torch.full((8,), 5.0)).item() == pytest.approx(8)


def worker(rank: int, folder: Path) -> None:
    """One of two processes: trains quantisers on its half of every batch and saves what it has then."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for name in ("vq_ema", "scales_alone"):
        quantizer = make(name).train()
        for z in torch.load(folder / "z.pt"):
            found = quantizer(z.chunk(2)[rank])
        torch.save((quantizer.state_dict(), found.stats), folder / f"{name}-{rank}.pt")
    z, weight = (part.chunk(2)[rank] for part in torch.load(folder / "weighted.pt"))
    torch.save(weighted_losses(z, weight), folder / f"weighted-{rank}.pt")
    torch.distributed.destroy_process_group()


def weighted_losses(z: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(3)
    return torch.stack(list(VQ(vocab_size=16, channels=5).train()(z, weight=weight).loss.values())).detach()


def test_two_processes_keep_one_codebook(tmp_path: Path):
    batches = [torch.randn(4, 6, 6, 5) for _ in range(3)]
    torch.save(batches, tmp_path / "z.pt")
    weighted = torch.randn(4, 6, 5), (torch.arange(6) < torch.tensor([[6], [5], [1], [2]])).float()
    torch.save(weighted, tmp_path / "weighted.pt")
    here = Path(__file__)
    environment = os.environ | {"PYTHONPATH": str(here.parents[1]), "GLOO_SOCKET_IFNAME": "lo"}
    running = [
        subprocess.Popen([sys.executable, str(here), str(rank), str(tmp_path)], env=environment) for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    for name in ("vq_ema", "scales_alone"):
        (first, stats), (second, other) = (torch.load(tmp_path / f"{name}-{rank}.pt") for rank in range(2))
        for key in first:
            assert torch.equal(first[key], second[key]), key
        assert all(torch.equal(stats[k], other[k]) for k in stats)
    halves = [torch.load(tmp_path / f"weighted-{rank}.pt") for rank in range(2)]  # 11 and 3 vectors count
    torch.testing.assert_close(sum(halves) / 2, weighted_losses(*weighted))
    # scales_alone has no restarts: there two halves are one whole
    alone = make("scales_alone").train()
    for z in batches:
        found = alone(z)
    for key, value in alone.state_dict().items():
        torch.testing.assert_close(first[key], value, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stats["perplexity"], found.stats["perplexity"])


# --- finite scalars --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "levels, activation, z, codes, index",
    (
        ([8, 8, 8, 5, 5, 5], "tanh", [0.0] * 6, [0.0] * 6, 32036),
        ([8, 8, 8, 5, 5, 5], "tanh", [1, -1, 0.5, 2, -2, 0.1], [0.5, -0.75, 0.25, 1, -1, 0], 27982),
        ([8, 8, 8, 5, 5, 5], "tanh", [9.0] * 6, [0.75, 0.75, 0.75, 1, 1, 1], 63999),
        ([8, 8, 8, 5, 5, 5], "tanh", [-9.0] * 6, [-1.0] * 6, 0),
        ([17] * 4, "ifsq", [0.0] * 4, [0.0] * 4, 41760),
        ([17] * 4, "ifsq", [1, -1, 0.5, -0.25], [0.625, -0.625, 0.375, -0.25], 32721),
        ([17] * 4, "ifsq", [9.0] * 4, [1.0] * 4, 83520),
        ([17] * 4, "ifsq", [-9.0] * 4, [-1.0] * 4, 0),
    ),
)
def test_fsq_vectors(levels, activation, z, codes, index):
    found = FSQ(levels=levels, activation=activation)(torch.tensor(z, dtype=torch.float32).view(1, 1, -1))
    assert found.codes.flatten().tolist() == codes
    assert found.ids.item() == index


@pytest.mark.parametrize("levels, activation", (([4, 3, 2, 5], "tanh"), ([5, 3, 7], "ifsq")))
def test_every_fsq_code_is_reached_and_comes_back(levels, activation):
    quantizer = FSQ(levels=levels, activation=activation)
    ids = torch.arange(quantizer.vocab_size)
    codes = quantizer.lookup(ids)
    assert len(codes.unique(dim=0)) == quantizer.vocab_size
    half = torch.tensor(levels) // 2
    digits = (codes * half + half).round().long()
    assert torch.equal((digits * torch.tensor([math.prod(levels[:i]) for i in range(len(levels))])).sum(-1), ids)
    # a z whose bounded value is exactly the code's step, by inverting the bound
    size = torch.tensor(levels, dtype=torch.float64)
    steps = (digits - half).double()
    if activation == "ifsq":
        z = torch.logit((steps / ((size - 1) / 2) * 0.999 + 1) / 2) / 1.6
    else:
        reach, offset = (size - 1) * 1.001 / 2, 0.5 * (1 - size % 2)
        z = torch.atanh((steps + offset) / reach) - torch.atanh(offset / reach)
    assert torch.equal(quantizer.indices(z.float().view(1, -1, len(levels)))[0], ids)


def test_fsq_gradient_is_the_bounds():
    quantizer = FSQ(levels=[8, 5])
    z = torch.randn(1, 6, 2, requires_grad=True)
    quantizer(z).z.sum().backward()
    again = z.detach().clone().requires_grad_()
    (quantizer.bound(again) / torch.tensor([4.0, 2.0])).sum().backward()
    torch.testing.assert_close(z.grad, again.grad)


def test_ifsq_with_steepness_two_is_a_tanh():
    z = torch.randn(1, 50, 3)
    steep = FSQ(levels=[9, 9, 9], activation="ifsq", steepness=2.0).bound(z)
    torch.testing.assert_close(steep, 4 * torch.tanh(z))


@pytest.mark.parametrize(
    "arguments, word",
    (
        ({"levels": []}, "levels"),
        ({"levels": [1, 4]}, "levels"),
        ({"levels": [4, 4], "activation": "ifsq"}, "odd"),
        ({"levels": [4], "activation": "relu"}, "activation"),
    ),
)
def test_fsq_mistakes_are_named(arguments, word):
    with pytest.raises(ValueError, match=word):
        FSQ(**arguments)


# --- scales ----------------------------------------------------------------------------------------------------------


def test_phi_tables():
    assert phi_table(10, 4) == (0, 0, 1, 1, 1, 2, 2, 3, 3, 3)
    assert phi_table(14, 4) == (0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3)
    for count in range(2, 9):  # the original's arithmetic, ties included
        margin = 1 / 3 / count if count == 4 else 1 / 2 / count
        ticks = np.linspace(margin, 1 - margin, count)
        for scales in range(2, 40):
            want = [int(np.argmin(np.abs(ticks - k / (scales - 1)))) for k in range(scales)]
            assert list(phi_table(scales, count)) == (list(range(scales)) if count == scales else want)
            if count == scales:
                assert want == list(range(scales))
    assert phi_table(1, 4) == (0,) and phi_table(5, 1) == (0,) * 5


def reference(quantizer: MultiScaleVQ, z: torch.Tensor):
    """Algorithm 1 of the paper, scale by scale with plain loops over cells where they are few."""
    f = z.permute(0, 3, 1, 2)
    rest, total, ids, loss, sums = f.clone(), torch.zeros_like(f), [], 0.0, []
    table = quantizer.codebook.weight
    for k, side in enumerate(quantizer.sides):
        last = k == len(quantizer.sides) - 1
        pooled = F.adaptive_avg_pool2d(rest, side)  # area interpolation is the mean over the same windows
        vectors = pooled.permute(0, 2, 3, 1).reshape(-1, f.shape[1])
        if quantizer.l2_norm:
            index = F.cosine_similarity(vectors[:, None], table[None], dim=-1).argmax(1)
        else:
            index = torch.cdist(vectors.double(), table.double()).argmin(1)
        h = table[index].view(len(f), side, side, -1).permute(0, 3, 1, 2)
        h = h if last else F.interpolate(h, size=f.shape[2:], mode="bicubic")
        if len(quantizer.phi):
            conv = quantizer.phi[phi_table(len(quantizer.sides), len(quantizer.phi))[k]]
            h = 0.5 * h + 0.5 * conv(h)
        total, rest = total + h, rest - h
        sums.append(total)
        ids.append(index.view(len(f), -1))
        loss = loss + 1.25 * (total - f).square().mean() / len(quantizer.sides)
    return torch.cat(ids, 1), total.permute(0, 2, 3, 1), loss, sums


@pytest.mark.parametrize("name", ("scales", "scales_cosine", "scales_no_phi"))
def test_multi_scale_quantiser_is_the_algorithm(name):
    quantizer = make(name)
    with torch.no_grad():
        quantizer.codebook.weight.normal_()
    z = torch.randn(3, 6, 6, 5)
    ids, total, loss, _ = reference(quantizer, z)
    found = quantizer(z)
    assert torch.equal(found.ids, ids)
    torch.testing.assert_close(found.z, total, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.loss["codebook"] + found.loss["commitment"], loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.loss["commitment"], 0.25 * found.loss["codebook"], rtol=1e-5, atol=1e-6)


def test_multi_scale_gradients():
    quantizer = make("scales")
    z = torch.randn(2, 6, 6, 5, requires_grad=True)
    found, push = quantizer(z), torch.randn(2, 6, 6, 5)
    (passed,) = torch.autograd.grad((found.z * push).sum(), z, retain_graph=True)
    assert torch.equal(passed, push)
    found.loss["codebook"].backward(retain_graph=True)
    assert z.grad is None and quantizer.codebook.weight.grad.abs().sum() > 0
    assert all(conv.weight.grad.abs().sum() > 0 for i, conv in enumerate(quantizer.phi) if i in quantizer.shared)
    quantizer.zero_grad()
    found.loss["commitment"].backward()
    assert z.grad.abs().sum() > 0 and quantizer.codebook.weight.grad is None


def test_maps_are_the_pooled_sums_of_earlier_scales():
    quantizer = make("scales")
    with torch.no_grad():
        quantizer.codebook.weight.normal_()
    z = torch.randn(3, 6, 6, 5)
    ids, _, _, sums = reference(quantizer, z)
    want = [F.adaptive_avg_pool2d(sums[k - 1], side).flatten(2).mT for k, side in list(enumerate(quantizer.sides))[1:]]
    codes = quantizer.lookup(ids)
    got = quantizer.maps(codes, 1, 4)
    torch.testing.assert_close(got, torch.cat(want, 1), rtol=1e-5, atol=1e-5)
    assert torch.equal(torch.cat([quantizer.maps(codes, k, k + 1) for k in (1, 2, 3)], 1), got)
    assert torch.equal(torch.cat([quantizer.maps(codes, 1, 3), quantizer.maps(codes, 3, 4)], 1), got)


def test_maps_read_earlier_scales_only():
    quantizer = MultiScaleVQ(vocab_size=9, channels=4, sides=VAR_SIDES)
    codes = torch.randn(2, 680, 4)
    for k in range(1, 10):
        end = quantizer.bounds[k]
        poisoned = codes.clone()
        poisoned[:, end:] = math.nan
        want = quantizer.maps(codes, k, k + 1)
        assert torch.equal(quantizer.maps(poisoned, k, k + 1), want)
        assert torch.equal(quantizer.maps(codes[:, :end], k, k + 1), want)
        with pytest.raises(ValueError, match="codes"):
            quantizer.maps(codes[:, : end - 1], k, k + 1)
    for span in ((0, 1), (3, 3), (9, 11)):
        with pytest.raises(ValueError, match="maps exist"):
            quantizer.maps(codes, *span)


def test_assemble_keeps_whole_scales():
    quantizer = make("scales")
    ids, _, _, sums = reference(quantizer, torch.randn(2, 6, 6, 5))
    codes = quantizer.lookup(ids)
    assert quantizer.bounds == (0, 1, 5, 14, 50)
    assert not quantizer.assemble(codes, 0).any()
    for k, end in enumerate(quantizer.bounds[1:]):
        torch.testing.assert_close(quantizer.assemble(codes, end), sums[k].permute(0, 2, 3, 1), rtol=1e-5, atol=1e-5)
        assert torch.equal(quantizer.assemble(codes[:, :end]), quantizer.assemble(codes, end))
    for keep in (2, 51):
        with pytest.raises(ValueError, match="end of a scale"):
            quantizer.assemble(codes, keep)


def test_one_scale_is_a_plain_vq():
    torch.manual_seed(0)
    scales = MultiScaleVQ(vocab_size=11, channels=3, sides=[4], phi_weight=0.0)
    plain = VQ(vocab_size=11, channels=3, l2_norm=False)
    plain.codebook.load_state_dict(scales.codebook.state_dict())
    z = torch.randn(2, 4, 4, 3)
    one, other = scales(z), plain(z)
    assert torch.equal(one.ids, other.ids) and torch.equal(one.z, other.z)
    for name in ("codebook", "commitment"):
        torch.testing.assert_close(one.loss[name], other.loss[name])


@pytest.mark.parametrize(
    "arguments, word",
    (
        ({"sides": []}, "sides"),
        ({"sides": [2, 1]}, "sides"),
        ({"sides": [1], "phi": -1}, "phi"),
        ({"sides": [1], "ema_decay": 1.0}, "ema_decay"),
        ({"sides": [1], "restart": 2.0}, "restart"),
        ({"sides": [1], "vocab_size": 0}, "vocab_size"),
    ),
)
def test_multi_scale_mistakes_are_named(arguments, word):
    with pytest.raises(ValueError, match=word):
        MultiScaleVQ(**({"vocab_size": 4, "channels": 2} | arguments))


if __name__ == "__main__":
    worker(int(sys.argv[1]), Path(sys.argv[2]))
