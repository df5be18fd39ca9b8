"""Keyed noise: its law, its independence of batch and order, and the race that draws from it."""

import numpy as np
import pytest
import torch

from vgen.guidance import Progress
from vgen.heads import DrawRule, draw_ids, survivors
from vtok.noise import SampleNoise, host_uniforms, key, keys, mix, sample_seeds

PROGRESS = Progress(0, 1)


def test_mix_equals_splitmix64_on_python_integers():
    def reference(x: int) -> int:
        x &= (1 << 64) - 1
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % (1 << 64)
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % (1 << 64)
        return x ^ (x >> 31)

    values = [0, 1, -1, 2**62 + 12345, -(2**63), 987654321]
    got = mix(torch.tensor(values)).tolist()
    assert [g % (1 << 64) for g in got] == [reference(v) for v in values]


def test_published_splitmix64_sequence():
    """The generator's reference output for state 1234567: the finaliser of state + k * golden."""
    golden = 0x9E3779B97F4A7C15
    states = [(1234567 + k * golden) % (1 << 64) for k in (1, 2)]
    signed = [s - (1 << 64) if s >> 63 else s for s in states]
    assert [v % (1 << 64) for v in mix(torch.tensor(signed)).tolist()] == [6457827717110365317, 3203168211198807973]


def test_numbers_of_the_host_are_those_of_the_sample():
    seeds = torch.tensor([0, 1, 2**62, 2**63 - 1, -5, key(3, 1)])
    for stream in (0, 70, 7301):
        found = host_uniforms(seeds.numpy(), 64, stream)
        assert np.array_equal(found, SampleNoise(seeds).uniform(torch.arange(64), stream).numpy())


def test_many_keys_are_those_of_each():
    indices = [0, 1, -1, 2**62, -(2**63), 2**63 - 1, 987654321]
    epochs = [3, 0, 2**40, -7, 1, 1, 0]
    for seed in (0, 7, -3, 2**63, 2**64 - 1):
        want = [key(seed, epoch, index) for epoch, index in zip(epochs, indices)]
        assert keys(seed, np.array(epochs), np.array(indices)).tolist() == want
        assert keys(np.array(want), 1).tolist() == [key(k, 1) for k in want]
    assert sample_seeds(5, 3, 9).tolist() == [key(5, i) for i in range(3, 9)]


def test_noise_of_a_sample_does_not_depend_on_its_batch():
    seeds, position = sample_seeds(7, 0, 6), torch.arange(5)
    whole = SampleNoise(seeds)
    for i in range(6):
        alone = SampleNoise(sample_seeds(7, i, i + 1))
        assert torch.equal(alone.uniform(position, 3)[0], whole.uniform(position, 3)[i])
        assert torch.equal(alone.normal(position, 4)[0], whole.normal(position, 4)[i])
        assert torch.equal(alone.gumbel(position, torch.arange(9))[0], whole.gumbel(position, torch.arange(9))[i])
    survivors_only = whole.gumbel(position[2:3], torch.tensor([[[4, 1]]]).expand(6, 1, 2))
    assert torch.equal(survivors_only[..., 0], whole.gumbel(position, torch.arange(9))[:, 2:3, 4])


def test_streams_and_seeds_differ():
    noise, position = SampleNoise(sample_seeds(0, 0, 64)), torch.arange(64)
    a, b = noise.uniform(position, 0).flatten(), noise.uniform(position, 1).flatten()
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.05  # 4 sigma at 4,096 pairs is 0.063
    assert len({key(0, i) for i in range(1000)} | {key(1, i) for i in range(1000)}) == 2000


def test_laws_of_uniform_and_normal():
    noise, position = SampleNoise(sample_seeds(1, 0, 500)), torch.arange(200)
    u = noise.uniform(position).double().flatten()
    counts = torch.histc(u, 20, 0, 1)
    assert ((counts - 5000) ** 2 / 5000).sum() < 45  # chi-square, 19 degrees of freedom, p < 0.001 at 43.8
    z = noise.normal(position, 2).double().flatten()
    assert abs(z.mean()) < 0.01 and abs(z.var() - 1) < 0.02 and abs((z**4).mean() - 3) < 0.12


def test_race_draws_from_the_softmax():
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.1])
    position = torch.arange(100)
    noise = SampleNoise(sample_seeds(3, 0, 1000))
    ids = draw_ids(logits.expand(1000, 100, 5), DrawRule(temperature=0.7), noise, position, PROGRESS).flatten()
    want = (logits / 0.7).softmax(0) * 100_000
    assert ((torch.bincount(ids, minlength=5) - want) ** 2 / want).sum() < 20  # 4 degrees of freedom, p < 0.0005 at 20


@pytest.mark.parametrize("top_k, top_p", [(3, 1.0), (0, 0.6), (4, 0.8)])
def test_filters_equal_a_literal_nucleus(top_k, top_p):
    torch.manual_seed(0)
    logits = torch.randn(50, 12)
    values, ids = survivors(logits, top_k, top_p)
    for row in range(50):
        order = sorted(range(12), key=lambda i: -float(logits[row, i]))
        order = order[:top_k] if top_k else order
        weights = np.exp([float(logits[row, i]) for i in order])
        mass, keep = 0.0, []
        for i, weight in zip(order, weights / weights.sum()):
            if mass < top_p or not keep:
                keep.append(i)
            mass += weight
        assert ids[row][values[row] > -torch.inf].tolist() == keep


def test_a_filtered_token_never_wins():
    noise = SampleNoise(sample_seeds(5, 0, 2000))
    logits = torch.tensor([0.0, 1.0, 0.9, -3.0])
    ids = draw_ids(logits.expand(2000, 50, 4), DrawRule(top_k=2), noise, torch.arange(50), PROGRESS)
    assert set(ids.unique().tolist()) == {1, 2}


def test_argmax_at_temperature_zero_and_top_k_one():
    logits, noise = torch.randn(4, 3, 9), SampleNoise(sample_seeds(0, 0, 4))
    for rule in (DrawRule(temperature=0), DrawRule(top_k=1)):
        assert torch.equal(draw_ids(logits, rule, noise, torch.arange(3), PROGRESS), logits.argmax(-1))


def test_small_changes_of_the_logits_rarely_change_the_token():
    torch.manual_seed(0)
    logits, noise = torch.randn(8, 16, 4096), SampleNoise(sample_seeds(0, 0, 8))
    a = draw_ids(logits, DrawRule(), noise, torch.arange(16), PROGRESS)
    b = draw_ids(logits + 1e-2 * torch.randn_like(logits), DrawRule(), noise, torch.arange(16), PROGRESS)
    assert (a == b).float().mean() > 0.95  # an inverse-CDF draw keeps about half


@pytest.mark.parametrize("bad", [{"temperature": -1}, {"top_k": -2}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_bad_rules_are_refused(bad):
    with pytest.raises(ValueError, match="temperature must be"):
        DrawRule(**bad)
