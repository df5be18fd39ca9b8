"""Converted MAR against what the original computed on the same weights: training pieces and two whole samplings."""

import pytest
import torch
from references import assert_close, read

from vgen.conditioning import Cond
from vgen.convert import convert
from vgen.guidance import ClassifierFree, Constant, Count, Unguided
from vgen.heads import DrawRule
from vgen.masking import masked_layout
from vgen.samplers.ancestral import ancestral
from vtok.noise import sample_seeds


class Tape:
    """Recorded normal numbers, handed out in the order in which the original asked: a row a token, cells ascending.

    steps: diffusion steps; the original draws in the last one too, without use. doubled: with guidance, it drew noise
    for the null rows of every diffusion step too, which goes unused.
    """

    def __init__(self, numbers, rows, steps, doubled):
        self.numbers, self.steps, self.doubled, self.used = numbers, steps, doubled, 0
        self.seeds = sample_seeds(0, 0, rows)

    def uniform(self, position, stream=0):
        return torch.arange(position.shape[-1]).expand(len(self.seeds), -1).float()

    def normal(self, position, channels, stream):
        count = position.numel() * channels
        drawn = self.numbers[self.used : self.used + count].view(*position.shape, channels)
        times = (stream > 0) + (stream == self.steps - 1)
        self.used += count * (times * (2 if self.doubled else 1) if stream else 1)
        rank = position.argsort(dim=1).argsort(dim=1)
        return drawn.gather(1, rank.unsqueeze(-1).expand_as(drawn))


def loaded():
    state, inputs, outputs, info = read("mar")
    model = convert("mar", state, info["ctor"])
    latents = inputs["latents"].flatten(2).transpose(1, 2)
    return model, latents, inputs, outputs


def test_training_pieces():
    model, latents, inputs, outputs = loaded()
    order, hidden = inputs["orders"].flip(1), 12  # the original hides the first of its order: ours runs from the end
    mask = torch.zeros_like(outputs["mask"]).scatter(1, order[:, -hidden:], 1.0)
    assert torch.equal(mask, outputs["mask"])
    cells = order[:, :-hidden].sort(dim=1).values
    known = latents.gather(1, cells.unsqueeze(-1).expand(-1, -1, latents.shape[-1]))
    encoded = model.encode(known, cells, model.conditioner(inputs["label"]))
    assert_close(encoded, outputs["encoder"])
    z = model.decode(encoded, cells)
    assert_close(z, outputs["z"])
    rows = outputs["net"].shape[0]
    net = model.head.mlp(inputs["noise"][:rows], inputs["t"][:rows] / 1000, z.flatten(0, 1)[:rows])
    assert_close(net, outputs["net"])
    repeats = model.head.repeats
    t = inputs["t"].view(repeats, *mask.shape)
    noise = inputs["noise"].view(repeats, *latents.shape)
    losses = torch.stack([model.head.denoising_loss(z, latents, t[i], noise[i]) for i in range(repeats)])
    assert_close((losses * mask).sum() / (repeats * mask.sum()), outputs["loss"].reshape(()))


@pytest.mark.parametrize("padding", [0, 3])
def test_padded_rows_of_the_encoder_change_nothing(padding):
    model, latents, inputs, outputs = loaded()
    order, kept = inputs["orders"].flip(1), torch.full((2,), 4)
    canvas = model.arrange(latents, order)
    h = model.states(canvas.tokens[:, : 4 + padding], order[:, : 4 + padding], model.conditioner(inputs["label"]), kept)
    assert_close(h, outputs["z"])


def sampled(model, inputs, tape, steps, guide, rule, labelled):
    layout = masked_layout(model.layout, steps, "cosine")
    canvas = model.arrange(torch.zeros(2, layout.length, model.head.channels), inputs["orders"].flip(1))
    canvas.layout = layout
    conditioner = model.conditioner
    streams = [conditioner(inputs["label"]) if labelled else conditioner.null(2)]
    streams += [conditioner.null(2)] * (guide.streams - 1)
    done = ancestral(model, Cond.cat(streams), noise=tape, guide=guide, rule=rule, canvas=canvas)
    return model.restore(done).transpose(1, 2).unflatten(2, (4, 4))


def test_sampling():
    model, _, inputs, outputs = loaded()
    numbers, (first, second) = inputs["tape"], outputs["tape_used"].tolist()
    tape = Tape(numbers, 2, model.head.solver_steps, doubled=True)
    guide = ClassifierFree(Count(2.0, tokens=model.layout.length))
    got = sampled(model, inputs, tape, 4, guide, DrawRule(temperature=0.9), True)
    assert_close(got, outputs["sampled"])
    assert tape.used == first
    tape = Tape(numbers, 2, model.head.solver_steps, doubled=False)  # from the start of the tape again
    assert_close(sampled(model, inputs, tape, 3, Unguided(), DrawRule(), False), outputs["sampled_uncond"])
    assert tape.used == second


def test_sampling_with_other_schedules_and_temperatures():
    """Guidance that does not move, noise of half the size, and one token a step without guidance."""
    state, inputs, outputs, info = read("mar_sampling")
    model = convert("mar", state, info["ctor"])
    runs = {
        "constant": (3, ClassifierFree(Constant(3.0)), 1.0),
        "cold": (5, ClassifierFree(Count(2.9, tokens=16)), 0.5),
        "one_a_step": (16, Unguided(), 0.95),
    }
    for (name, (steps, guide, temperature)), used in zip(runs.items(), outputs["tape_used"].tolist()):
        tape = Tape(inputs["tape"], 2, model.head.solver_steps, doubled=guide.streams == 2)
        got = sampled(model, inputs, tape, steps, guide, DrawRule(temperature=temperature), True)
        assert_close(got, outputs[name])
        assert tape.used == used, name
