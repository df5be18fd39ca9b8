"""Nested dropout and the small parts of one-dimensional tokenizers."""

from __future__ import annotations

import pytest
import torch

from vtok.layers.nested import keep_counts, keep_probabilities, keep_sums, kept, replace_dropped
from vtok.layers.vit import PatchEmbed, patchify, unpatchify
from vtok.noise import SampleNoise, noise_of


def test_probabilities_by_their_definition():
    assert keep_probabilities("uniform", 5).tolist() == pytest.approx([0.2] * 5)
    assert keep_probabilities("all", 3).tolist() == [0, 0, 1]
    assert keep_probabilities("power_of_two", 8).tolist() == pytest.approx([0.25, 0.25, 0, 0.25, 0, 0, 0, 0.25])
    # 6 is no power of two: the ends are 1, 2, 4 and 6
    assert keep_probabilities("power_of_two", 6).tolist() == pytest.approx([0.25, 0.25, 0, 0.25, 0, 0.25])
    rounded = torch.zeros(8)
    for number in range(1, 9):
        rounded[next(p for p in (1, 2, 4, 8) if p >= number) - 1] += 1 / 8
    assert keep_probabilities("uniform_power_of_two", 8).tolist() == pytest.approx(rounded.tolist())
    # ResTok's published list
    weights = {4: 1, 8: 2, 16: 4, 32: 8, 64: 16, 128: 124}
    found = keep_probabilities(weights, 128)
    assert {int(i) + 1: float(found[i]) * 155 for i in found.nonzero()} == pytest.approx(weights)
    assert torch.equal(keep_probabilities({str(k): v for k, v in weights.items()}, 128), found)  # keys of a JSON file
    for wrong in ("half", {}, {9: 1}, {0: 1}, {1: -1, 2: 2}, {1: 0}):
        with pytest.raises(ValueError, match="nested"):
            keep_probabilities(wrong, 8)


@pytest.mark.parametrize("distribution", ("uniform", "power_of_two", "uniform_power_of_two", {2: 1, 7: 3}))
def test_draws_follow_it_and_their_keys(distribution):
    noise = SampleNoise(torch.arange(20_000))
    sums = keep_sums(distribution, 8)
    counts = keep_counts(sums, noise, stream=5)
    assert counts.dtype == torch.int64
    shares = torch.bincount(counts, minlength=9)[1:] / 20_000
    assert float((shares - keep_probabilities(distribution, 8)).abs().max()) < 0.015  # four standard deviations
    alone = keep_counts(sums, noise.rows(slice(123, 125)), stream=5)
    assert torch.equal(alone, counts[123:125])
    assert not torch.equal(counts, keep_counts(sums, noise, stream=6))


@pytest.mark.parametrize("distribution", ("all", "uniform", {3: 1, 7: 1e-9}, {2: 1, 7: 0}, {1: 1, 2: 2}))
@pytest.mark.parametrize("length", (7, 10, 480))
def test_sums_in_float32_decide_as_exact_ones_do(distribution, length):
    """For every float32 number near a sum, and 0 and 1."""
    table, sums = keep_probabilities(distribution, length), keep_sums(distribution, length)
    exact = table.cumsum(0)
    near = [exact.float()]
    near += [near[0].nextafter(torch.tensor(end)) for end in (0.0, 2.0)]
    uniform = torch.cat([*near, torch.tensor([2.0**-41, 1.0])]).clamp(2.0**-41, 1)
    want = 1 + (exact < uniform[:, None].double()).sum(1).clamp(max=int(table.nonzero().max()))
    assert torch.equal(1 + (sums < uniform[:, None]).sum(1), want)
    assert table[want - 1].min() > 0, "what has no weight is never kept"


def test_what_is_kept():
    counts = torch.tensor([1, 3])
    assert kept(counts, 3).tolist() == [[True, False, False], [True] * 3]
    tokens = torch.arange(12.0).view(2, 3, 2)
    fill = torch.tensor([-1.0, -2.0])
    found = replace_dropped(tokens, counts, fill)
    assert found[0].tolist() == [[0, 1], [-1, -2], [-1, -2]] and torch.equal(found[1], tokens[1])
    assert torch.equal(replace_dropped(tokens, 1, fill)[:, 1:], fill.expand(2, 2, 2))
    assert torch.equal(replace_dropped(tokens, None, fill), tokens)


def test_noise_of_keys_or_of_the_generator():
    batch = torch.zeros(3, 2)
    assert torch.equal(noise_of(torch.tensor([1, 2, 3]), batch).seeds, torch.tensor([1, 2, 3]))
    torch.manual_seed(0)
    first = noise_of(None, batch).seeds
    torch.manual_seed(0)
    assert torch.equal(noise_of(None, batch).seeds, first) and len(set(first.tolist())) == 3
    assert not torch.equal(noise_of(None, batch).seeds, first)


def test_patches():
    images = torch.arange(2 * 3 * 4 * 6, dtype=torch.float32).view(2, 3, 4, 6)
    tokens = patchify(images, 2)
    assert tokens.shape == (2, 6, 12)
    # second patch of the first row: its pixels row by row, channels last
    want = images[0, :, 0:2, 2:4].permute(1, 2, 0).flatten()
    assert torch.equal(tokens[0, 1], want)
    assert torch.equal(unpatchify(tokens, 2, 2), images)
    embed = PatchEmbed(dim=5, patch=2)
    weight = embed.conv.weight.permute(0, 2, 3, 1).flatten(1)  # the same order of pixels
    torch.testing.assert_close(embed(images), tokens @ weight.T + embed.conv.bias, rtol=1e-4, atol=1e-4)
