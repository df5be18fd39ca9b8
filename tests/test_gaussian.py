"""The baseline of continuous families: closed forms against brute force, an oracle model, and what it must not beat."""

import json

import numpy as np
import pytest
import tokenizers
import torch
from generators import CONTINUOUS, FAMILIES, make, tokens_of
from hydra import compose, initialize_config_dir
from pairs import pair_folder

from eval.keyed import flow_losses, masked_losses
from eval.likelihood import histogram_entropy
from vgen.gaussian import Moments, noise_network, posterior, velocity_network
from vgen.generator import Canvas
from vgen.heads_diffusion import DiffusionHead
from vtok.flow import interpolate
from vtok.noise import SampleNoise, sample_seeds

EVERY = [name for name in (*CONTINUOUS, "mar", "mar_flow") if name in FAMILIES]
every_family = pytest.mark.parametrize("name", EVERY)
ROWS = 400


def gaussian_data(rows: int = ROWS, *, length: int = 16, seed: int = 0):
    """Latents [rows, length, 6] with a mean and spread of their own at every place, and the true moments."""
    drawer = torch.Generator().manual_seed(seed)
    mean = torch.randn(length, 6, generator=drawer)
    deviation = 0.2 + 1.5 * torch.rand(length, 6, generator=drawer)
    drawn = torch.randn(rows, length, 6, generator=drawer)
    return mean + deviation * drawn, Moments(mean, deviation**2)


def batch_of(tokens, seed: int = 0):
    return {
        "tokens": tokens,
        "label": torch.zeros(len(tokens), dtype=torch.int64),
        "key": sample_seeds(seed, 0, len(tokens)),
    }


@pytest.mark.parametrize("both", [0.0, 0.4, -0.7])
def test_velocities_are_those_of_least_squares(both):
    """The regression of start - end on x over many draws gives the same line, for correlated ends too."""
    drawer = torch.Generator().manual_seed(0)
    end = 0.5 + 1.3 * torch.randn(200_000, generator=drawer, dtype=torch.float64)
    start = -1 + both * end + 0.8 * torch.randn(200_000, generator=drawer, dtype=torch.float64)
    moments = Moments.of(end[:, None, None].float(), start[:, None, None].float())
    for u in (0.05, 0.5, 0.9):
        x = (1 - u) * end + u * start
        design = torch.stack([torch.ones_like(x), x], 1)
        line = torch.linalg.lstsq(design, (start - end).unsqueeze(1)).solution[:, 0]
        got = moments.velocity(torch.tensor([[[0.0]], [[1.0]]]), torch.full((2, 1), u))[:, 0, 0].double()
        torch.testing.assert_close(got, torch.stack([line[0], line.sum()]), rtol=1e-3, atol=1e-3)


def test_posteriors_are_those_of_least_squares():
    drawer = torch.Generator().manual_seed(0)
    data = 0.5 + 1.3 * torch.randn(200_000, generator=drawer, dtype=torch.float64)
    seen = 0.6 * data + 0.4 * torch.randn(200_000, generator=drawer, dtype=torch.float64)
    design = torch.stack([torch.ones_like(seen), seen], 1)
    line = torch.linalg.lstsq(design, data.unsqueeze(1)).solution[:, 0]
    mean, variance = posterior(torch.tensor(0.5), torch.tensor(1.69), torch.tensor([0.0, 1.0]), 0.6)
    torch.testing.assert_close(mean.double(), torch.stack([line[0], line.sum()]), rtol=2e-3, atol=2e-3)
    left = (data - line[0] - line[1] * seen).var()
    torch.testing.assert_close(variance.double(), left.expand(2), rtol=2e-2, atol=0)


def test_the_diffusion_predictor_is_a_minimum():
    """Any other noise or variance loses more on Gaussian data, over all steps of the chain."""
    head = DiffusionHead(dim=4, channels=2, width=8, depth=1, repeats=1)
    drawer = torch.Generator().manual_seed(0)
    mean, variance = torch.tensor([0.7, -1.0]), torch.tensor([0.3, 2.0])
    count = 40_000
    target = mean + variance.sqrt() * torch.randn(count, 2, generator=drawer)
    noise = torch.randn(count, 2, generator=drawer)
    t = torch.randint(1, 1000, (count,), generator=drawer)
    h = torch.cat([mean, variance]).expand(count, -1)

    def loss(scale: float, shift: float) -> float:
        def network(x, t, h):
            eps, fraction = noise_network(head.tables, x, t, h).chunk(2, dim=-1)
            return torch.cat([eps * scale, fraction + shift], dim=-1)

        return float(head.denoising_loss(h, target, t, noise, network).mean())

    best = loss(1.0, 0.0)
    assert all(best < loss(*other) for other in [(0.9, 0.0), (1.1, 0.0), (1.0, -0.5), (1.0, 0.5)])


def test_the_bound_of_gaussian_data_is_their_entropy():
    """The steps back from Gaussian data are Gaussian, so the bound is tight: the entropy of the data in its bins."""
    head = DiffusionHead(dim=4, channels=2, width=8, depth=1, repeats=1, clip=0.1)
    drawer = torch.Generator().manual_seed(0)
    mean, variance = torch.tensor([0.1, -0.2]), torch.tensor([0.3, 0.05])
    t = torch.arange(1000).repeat(200)
    target = mean + variance.sqrt() * torch.randn(len(t), 2, generator=drawer)
    noise, h = torch.randn(len(t), 2, generator=drawer), torch.cat([mean, variance]).expand(len(t), -1)
    with head.in_nats():
        found = head.denoising_loss(h, target, t, noise, head.gaussian())  # the bound on the last step is its mass
    entropy = 0.5 * (2 * torch.pi * torch.e * variance).log() - torch.tensor(2 / 255).log()
    assert float(found.mean()) == pytest.approx(float(entropy.sum()), rel=0.01)
    own = head.denoising_loss(h, target, t, noise)  # outside it is the loss of training
    with head.in_nats():
        assert not torch.allclose(own, head.denoising_loss(h, target, t, noise))
    torch.testing.assert_close(own, head.denoising_loss(h, target, t, noise))


@every_family
def test_no_untrained_model_beats_the_baseline_on_gaussian_data(name):
    model = make(name)
    tokens, moments = gaussian_data(length=model.spec.layout.length)
    batch = batch_of(tokens)
    known = model.moments(tokens)
    with torch.inference_mode():
        baseline, own = model.gaussian_loss(batch, known), model.loss(batch)
    assert baseline["nats"].shape == own["nats"].shape
    assert float(baseline["loss"]) < float(own["loss"])
    if known.mean.shape == moments.mean.shape and known.start_mean is None and "scale" not in name:
        fitted = float(baseline["loss"])
        if model.layout.length == model.spec.layout.length and name.startswith("xar"):
            return  # in the order of the entities
        torch.testing.assert_close(float(model.gaussian_loss(batch, moments)["loss"]), fitted, rtol=0.05, atol=0.02)


@every_family
def test_another_gaussian_loses_more(name):
    """The moments of the data beat wider, narrower and shifted ones on the same times and noises."""
    from dataclasses import replace

    model = make(name)
    tokens, _ = gaussian_data(length=model.spec.layout.length)
    known, batch = model.moments(tokens), batch_of(tokens, seed=5)
    with torch.inference_mode():
        best = float(model.gaussian_loss(batch, known)["loss"])
        for other in (
            replace(known, mean=known.mean + 0.3),
            replace(known, variance=known.variance * 4),
            replace(known, variance=known.variance / 4),
        ):
            assert float(model.gaussian_loss(batch, other)["loss"]) > best


@pytest.mark.parametrize("name", ["mar", "mar_flow"])
def test_an_oracle_in_the_heads_place_reaches_the_baseline(name, monkeypatch):
    """A model whose states are the moments of their cells, and whose head knows what follows, has its loss."""
    model = make(name)
    tokens, moments = gaussian_data()
    network = model.head.gaussian()

    class Oracle(torch.nn.Module):
        def forward(self, x, t, h):
            return network(x, t, h)

    want = model.gaussian_loss(batch_of(tokens), moments)
    model.head.mlp = Oracle()
    monkeypatch.setattr(model, "states", lambda *_: moments.hidden(tokens))
    got = model.loss(batch_of(tokens))
    torch.testing.assert_close(got["loss"], want["loss"])
    torch.testing.assert_close(got["nats"], want["nats"])


@pytest.mark.parametrize("name", ["xar_cell", "xar_scale", "xar_image"])
def test_an_oracle_trunk_reaches_the_baseline_of_xar(name, monkeypatch):
    model = make(name)
    tokens, _ = gaussian_data()
    moments = model.moments(tokens)

    def forward(canvas, cond, *span):
        time = canvas.time[:, model.layout.steps_of_tokens()]
        return velocity_network(canvas.tokens, time, moments.hidden(canvas.tokens))

    want = model.gaussian_loss(batch_of(tokens), moments)["loss"]
    monkeypatch.setattr(model, "forward", forward)
    model.head.forward = lambda h: h
    torch.testing.assert_close(model.loss(batch_of(tokens))["loss"], want)


@pytest.mark.parametrize("name", ["flowar", "ecar"])
def test_an_oracle_head_reaches_the_baseline_of_flows_of_scales(name, monkeypatch):
    model = make(name)
    tokens, _ = gaussian_data()
    moments, step = model.moments(tokens), iter(range(model.layout.steps))

    def forward(x, t, h):
        k = next(step)
        a, b = model.layout.written(k, k + 1)
        u = t if name == "flowar" else (t - model.ends[k]) / (model.starts[k] - model.ends[k])
        cut = Moments(*(None if part is None else part[a:b] for part in vars(moments).values()))
        return cut.velocity(x, u[:, None].expand(-1, b - a))

    want = model.gaussian_loss(batch_of(tokens), moments)["loss"]
    monkeypatch.setattr(model.head, "forward", forward)
    torch.testing.assert_close(model.loss(batch_of(tokens))["loss"], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["dtm", "artm", "fhtm"])
def test_an_oracle_of_the_transition_reaches_the_baseline(name, monkeypatch):
    """The state is what the true law says of the next level, by conditioning a joint Gaussian of data and levels."""
    model = make(name)
    tokens, moments = gaussian_data()
    network, count = model.head.gaussian(), 16

    def conditioned(levels, shares, target_share, own_noise: bool):
        """[mean, variance] of the target given levels [B, n, L, C], by the covariance matrix of (levels, data)."""
        share = torch.tensor(shares, dtype=torch.float64)
        mean, variance = moments.mean.double(), moments.variance.double()
        among = variance[..., None, None] * share[:, None] * share + torch.diag((1 - share) ** 2)
        cross = variance[..., None] * share
        weights = torch.linalg.solve(among, cross.unsqueeze(-1)).squeeze(-1)  # [L, C, n]
        seen = levels.double().movedim(1, -1) - mean[..., None] * share
        data = mean + (weights * seen).sum(-1)
        left = (variance - (weights * cross).sum(-1)).expand_as(data)
        if own_noise:
            return torch.cat([target_share * data, target_share**2 * left + (1 - target_share) ** 2], -1).float()
        x, t = levels[:, 0].double(), 1 - share[0]
        return torch.cat([(data - x) / t, left / t**2], -1).float()

    batch = batch_of(tokens)
    if name == "dtm":
        start, time = model.level_of(tokens, SampleNoise(batch["key"]))
        x = interpolate(tokens, start, time)
        h = torch.cat([conditioned(x[i : i + 1, None], [float(1 - time[i])], 1, False) for i in range(len(x))])
        monkeypatch.setattr(model, "run", lambda inputs, cache=None: h)
    else:
        levels = model.chain(tokens, SampleNoise(batch["key"])).unflatten(1, (model.levels + 1, count))
        parts = [torch.zeros(len(tokens), count, 12)]
        for t in range(model.levels):
            first = t if name == "artm" else 0
            shares = [k / model.levels for k in range(first, t + 1)]
            parts.append(conditioned(levels[:, first : t + 1], shares, (t + 1) / model.levels, True))
        monkeypatch.setattr(model, "forward", lambda *_: torch.cat(parts, dim=1))
    model.head.mlp = type("Oracle", (torch.nn.Module,), {"forward": lambda self, x, t, h: network(x, t, h)})()
    got = model.loss(batch)["loss"]
    torch.testing.assert_close(got, model.gaussian_loss(batch, moments)["loss"], rtol=1e-4, atol=1e-5)


def test_figures_have_the_names_of_the_likelihood_and_do_not_depend_on_the_batch():
    model = make("xar_cell")
    tokens, _ = gaussian_data(60)
    labels = torch.arange(60) % 5
    found = flow_losses(model, tokens, tokens, labels, batch_size=60)
    again = flow_losses(model, tokens, tokens, labels, batch_size=7)
    assert found["below_histogram"] == pytest.approx(found["histogram"] - found["held_out"])
    for name in ("held_out", "histogram", "shuffled"):
        assert found[name] == pytest.approx(again[name], rel=1e-4)
    with pytest.raises(ValueError, match="histogram of the codes"):
        make("var").gaussian_loss({}, Moments(tokens[0], tokens[0]))


def test_masked_ids_are_measured_where_a_mask_hides_them():
    """held_out is the mean of -log p over the hidden tokens of each image, by another way to the same logits."""
    model = make("maskgit")
    tokens, labels = tokens_of(model, 12), torch.arange(12) % 5
    found = masked_losses(model, tokens[:8], tokens, labels, batch_size=5)
    hidden = model.hide({"key": sample_seeds(0, 0, 12)})
    h = model(Canvas(tokens, model.layout, known=~hidden), model.conditioner(labels)).detach()
    nats = -model.head.logits(h)[0].detach().log_softmax(-1).gather(-1, tokens.unsqueeze(-1))[..., 0]
    want = torch.stack([nats[i][hidden[i]].mean() for i in range(12)]).mean()
    assert found["held_out"] == pytest.approx(want.item(), rel=1e-5)
    places = [histogram_entropy(torch.bincount(tokens[:8, i])) for i in range(16)]
    assert found["histogram"] == pytest.approx(sum(places) / 16)
    assert found["below_histogram"] == pytest.approx(found["histogram"] - found["held_out"])


def test_latents_are_drawn_as_training_draws_them():
    """Samples of the posteriors, whatever the batches: their spread around the means is the posteriors' own."""
    from eval.likelihood import encode

    tokenizer, pixels = tokenizers.make("cnn_kl"), torch.randint(0, 256, (6, 16, 16, 3), dtype=torch.uint8)
    got = encode(tokenizer, pixels.split(4), 6, seed=3)
    torch.testing.assert_close(got, encode(tokenizer, pixels.split(1), 6, seed=3))
    images = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
    want = tokenizer.encode(images, noise=SampleNoise(sample_seeds(3, 0, 6)))
    torch.testing.assert_close(got, want)
    assert (got - tokenizer.encode(images)).abs().min() > 0


def test_the_command_measures_continuous_tokens(tmp_path):
    from eval.likelihood import CONFIGS, evaluate
    from vtok.config import instantiate

    folder = pair_folder("flowar", tmp_path / "run")
    words = [
        f"from={folder}",
        "data=fake",
        "data.image_size=16",
        "data.train_images=24",
        "data.val_images=12",
        "data.num_classes=4",
    ]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("eval_likelihood", overrides=[*words, "images=12", "batch_size=8", "device=cpu"])
    data = instantiate(config.data)
    data.sources.val.labels = np.arange(12) % 4  # the source draws its labels with its images
    evaluate(config, data)
    result = json.loads((folder / "eval" / "likelihood.json").read_text())
    assert "bound" not in result
    assert result["below_histogram"] == pytest.approx(result["histogram"] - result["held_out"])
