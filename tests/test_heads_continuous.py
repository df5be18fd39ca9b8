"""Diffusion and flow heads against closed forms: Gaussian data have an optimal network that can be written down."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from vgen.guidance import ClassifierFree, Constant, Progress, Unguided
from vgen.heads import DrawRule
from vgen.heads_continuous import LOSS_STREAM
from vgen.heads_diffusion import STEPS, DiffusionHead, chain, spaced
from vgen.heads_token_flow import FlowHead
from vtok.noise import SampleNoise, sample_seeds

MEAN, STD, COUNT = 0.7, 0.4, 20_000
HEADS = pytest.mark.parametrize("make", [DiffusionHead, FlowHead])


def draw(head, h, *, guide=None, rule=None, rows=None, position=None):
    guide = guide or Unguided()
    rows = rows or len(h) // guide.streams
    position = torch.arange(h.shape[1]) if position is None else position
    noise = SampleNoise(sample_seeds(0, 0, rows))
    settings = {"guide": guide, "noise": noise, "position": position, "progress": Progress(0, 1)}
    with torch.no_grad():
        return head.draw(h, (h.shape[1],), rule=rule or DrawRule(), **settings)


def drawn_head(make, **options):
    torch.manual_seed(0)
    head = make(dim=8, channels=3, width=16, depth=2, **options)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return head.eval()


class BestEps(torch.nn.Module):
    """E[e | x_t] of data N(MEAN, STD^2), and the middle of the two bounds for the variance."""

    def forward(self, x, t, h):
        tables = chain()
        index = (t * STEPS).round().long()
        signal, spread = (table[index].float().unsqueeze(-1) for table in (tables.signal, tables.spread))
        eps = spread * (x - signal * MEAN) / (signal**2 * STD**2 + spread**2)
        return torch.cat([eps, torch.zeros_like(eps)], dim=-1)


class BestVelocity(torch.nn.Module):
    """E[e - x_0 | x_t] of the same data."""

    def forward(self, x, t, h):
        t = t.unsqueeze(-1)
        variance = (1 - t) ** 2 * STD**2 + t**2
        return -MEAN + (t - (1 - t) * STD**2) * (x - (1 - t) * MEAN) / variance


@pytest.mark.parametrize("make, best", [(DiffusionHead, BestEps()), (FlowHead, BestVelocity())])
def test_the_optimal_network_draws_the_data(make, best):
    options = {"solver_steps": 100} if make is DiffusionHead else {"solver_steps": 50, "solver": "heun"}
    head = make(dim=8, channels=2, width=8, depth=1, **options)
    head.mlp.at = lambda x, time, condition: best(x, x.new_full(x.shape[:-1], time), condition)
    x = draw(head, torch.zeros(1, COUNT, 8))
    assert abs(float(x.mean()) - MEAN) < 5 * STD / math.sqrt(2 * COUNT)
    assert abs(float(x.std()) / STD - 1) < 0.02  # steps are finite
    assert abs(float(torch.corrcoef(x[0].T)[0, 1])) < 0.03
    assert abs(float((((x - x.mean()) / x.std()) ** 4).mean()) - 3) < 0.15  # Gaussian


def test_the_chain_is_the_bayes_rule_of_gaussians():
    tables = chain()
    torch.testing.assert_close(tables.signal**2 + tables.spread**2, torch.ones(STEPS, dtype=torch.float64))
    for t in (1, 17, 500, 998):
        step = tables.signal[t] / tables.signal[t - 1]  # x_t = step x_(t-1) + sqrt(beta) e
        beta = tables.high[t].exp()
        torch.testing.assert_close(step**2 + beta, torch.ones((), dtype=torch.float64))
        before = tables.spread[t - 1] ** 2
        precision = 1 / before + step**2 / beta
        torch.testing.assert_close(tables.low[t].exp(), 1 / precision)
        torch.testing.assert_close(tables.mean_noisy[t], step / beta / precision)
        torch.testing.assert_close(tables.mean_data[t], tables.signal[t - 1] / before / precision)


def test_a_respaced_chain_has_the_marginals_of_the_whole():
    kept = spaced(5)
    assert kept == [0, 250, 500, 749, 999] and spaced(1000) == list(range(1000)) and spaced(1) == [0]
    few, all_ = chain(tuple(kept)), chain()
    torch.testing.assert_close(few.signal, all_.signal[kept])
    torch.testing.assert_close(few.high[2:].exp(), 1 - (few.signal[2:] / few.signal[1:-1]) ** 2)
    with pytest.raises(ValueError, match="solver_steps=0"):
        DiffusionHead(dim=4, channels=1, solver_steps=0)


@pytest.mark.parametrize("kind", [DiffusionHead, FlowHead])
@pytest.mark.parametrize("options", [{"top_k": 5}, {"top_p": 0.9}, {"processors": (lambda logits, progress: logits,)}])
def test_what_only_ids_have_is_refused(kind, options):
    head, position = drawn_head(kind), torch.arange(1)
    with pytest.raises(ValueError, match="these tokens are continuous"):
        head.draw(
            torch.zeros(1, 1, 8), (1,), guide=Unguided(), noise=SampleNoise(sample_seeds(0, 0, 1)), position=position,
            rule=DrawRule(**options), progress=Progress(0, 1, 0, 1, 1),
        )  # fmt: skip


def test_the_diffusion_loss_by_hand():
    """Squared error of eps plus the Kullback-Leibler divergence in bits (the last step's bin: see MAR's golden)."""
    head, tables = drawn_head(DiffusionHead), chain()
    h, target, noise = torch.randn(4, 8), torch.randn(4, 3), torch.randn(4, 3)
    t = torch.tensor([1, 30, 500, 999])
    signal, spread, mean_data, mean_noisy, low, high = (table[t].float().unsqueeze(-1) for table in tables)
    noisy = signal * target + spread * noise
    eps, fraction = head.mlp(noisy, t / STEPS, h).chunk(2, dim=-1)
    share = (fraction + 1) / 2
    model = Normal(
        mean_data * (noisy - spread * eps) / signal + mean_noisy * noisy,
        (0.5 * (share * high + (1 - share) * low)).exp(),
    )
    truth = Normal(mean_data * target + mean_noisy * noisy, (0.5 * low).exp())
    want = (eps - noise).square().mean(-1) + kl_divergence(truth, model).mean(-1) / math.log(2)
    torch.testing.assert_close(head.denoising_loss(h, target, t, noise), want, rtol=1e-3, atol=1e-4)


def test_the_bound_trains_the_variance_alone():
    head = drawn_head(DiffusionHead)
    h, target, noise = torch.randn(4, 8), torch.randn(4, 3), torch.randn(4, 3)
    t = torch.full((4,), 999)  # where the bound would dominate
    gradient = torch.autograd.grad(head.denoising_loss(h, target, t, noise).sum(), head.mlp.output.bias)[0]
    noisy = head.tables[0, 999] * target + head.tables[1, 999] * noise
    eps = head.mlp(noisy, t / STEPS, h)[:, :3]
    torch.testing.assert_close(gradient[:3], (2 / 3 * (eps - noise)).sum(0), rtol=1e-4, atol=1e-5)


@HEADS
def test_a_sample_s_loss_does_not_depend_on_its_batch(make):
    head, keys = drawn_head(make, repeats=3), sample_seeds(0, 0, 4)
    h, target = torch.randn(4, 5, 8), torch.randn(4, 5, 3)
    whole = head.loss(h, target, (5,), noise=SampleNoise(keys))
    assert whole.shape == (4, 5) and whole.std() > 0.01
    torch.testing.assert_close(head.loss(h[2:3], target[2:3], (5,), noise=SampleNoise(keys[2:3])), whole[2:3])


@HEADS
def test_repeats_are_the_mean_of_passes_of_their_own(make):
    """Loss and gradients of three draws at once, and of a pass each."""
    head, noise, index = drawn_head(make, repeats=3), SampleNoise(sample_seeds(0, 0, 4)), torch.arange(5)
    h, target = torch.randn(4, 5, 8, requires_grad=True), torch.randn(4, 5, 3)
    given = [h, *head.parameters()]
    together = head.loss(h, target, (5,), noise=noise)
    found = torch.autograd.grad(together.sum(), given)
    passes = []
    for repeat in range(3):
        t = head.times(noise.uniform(index, LOSS_STREAM + 2 * repeat))
        e = noise.normal(index, 3, LOSS_STREAM + 2 * repeat + 1)
        passes.append(head.denoising_loss(h, target, t, e))
    apart = torch.stack(passes).mean(0)
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-6)
    for one, other in zip(found, torch.autograd.grad(apart.sum(), given)):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@HEADS
def test_training_times_are_uniform(make):
    t = make(dim=4, channels=1).times(SampleNoise(sample_seeds(0, 0, 50)).uniform(torch.arange(1000))).flatten()
    t = t.double() / (STEPS if make is DiffusionHead else 1)
    assert t.min() >= 0 and t.max() <= 1
    for q in (0.1, 0.5, 0.9):
        assert abs(float((t < q).double().mean()) - q) < 0.01


@HEADS
def test_guidance_is_inside_the_solver(make):
    head = drawn_head(make, solver_steps=4)
    h = torch.randn(4, 5, 8)
    plain = draw(head, h[:2])
    near = 1e-5 * float(plain.abs().max())  # other shapes, other rounding
    off = draw(head, h, guide=ClassifierFree(Constant(1.0)))
    torch.testing.assert_close(off, plain, rtol=0, atol=near)
    same = draw(head, torch.cat([h[:2], h[:2]]), guide=ClassifierFree(Constant(3.0)))
    torch.testing.assert_close(same, plain, rtol=0, atol=10 * near)
    assert not torch.allclose(draw(head, h, guide=ClassifierFree(Constant(3.0))), plain, atol=100 * near)


@HEADS
def test_temperature_and_solver_steps_of_the_rule(make):
    head, h = drawn_head(make, solver_steps=4), torch.randn(2, 5, 8)
    again = drawn_head(make, solver_steps=7)
    assert torch.equal(draw(head, h, rule=DrawRule(solver_steps=7)), draw(again, h))
    cold, warm = (draw(head, h, rule=DrawRule(temperature=t)) for t in (0.0, 1.0))
    assert not torch.allclose(cold, warm, atol=1e-2)


def test_the_diffusion_walks_as_written():
    """Four steps by the update x_(t-1) ~ N(mean(x_t, x_0), variance), with keyed noise scaled by the temperature."""
    head = drawn_head(DiffusionHead, solver_steps=4)
    h, noise, position = torch.randn(2, 5, 8), SampleNoise(sample_seeds(0, 0, 2)), torch.arange(5)
    kept = spaced(4)
    tables = [table.float() for table in chain(tuple(kept))]
    x = noise.normal(position, 3, 0)
    with torch.no_grad():
        for i, t in enumerate((3, 2, 1, 0)):
            signal, spread, mean_data, mean_noisy, low, high = (table[t] for table in tables)
            eps, fraction = head.mlp(x, torch.full((2, 5), kept[t] / STEPS), h).chunk(2, dim=-1)
            mean = mean_data * (x - spread * eps) / signal + mean_noisy * x
            std = (low + (fraction + 1) / 2 * (high - low)).mul(0.5).exp()
            x = mean + (0.9 * std * noise.normal(position, 3, 1 + i) if t else 0)
    torch.testing.assert_close(draw(head, h, rule=DrawRule(temperature=0.9)), x, rtol=1e-4, atol=1e-4)


def test_a_clip_bounds_what_steps_point_to():
    free, bound = (drawn_head(DiffusionHead, solver_steps=10, clip=clip) for clip in (None, 0.5))
    h = torch.randn(2, 50, 8)
    assert draw(free, h).abs().max() > 100 and draw(bound, h).abs().max() < 1


@HEADS
def test_no_likelihood_is_claimed(make):
    with pytest.raises(ValueError, match="no likelihood"):
        make(dim=4, channels=1).log_prob(torch.zeros(1, 1, 4), torch.zeros(1, 1, 1), (1,))
