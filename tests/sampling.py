"""Greedy sampling, for tests that compare with recorded outputs of original implementations."""

from __future__ import annotations

from vgen.conditioning import Cond
from vgen.heads import DrawRule
from vgen.samplers.ancestral import ancestral
from vtok.noise import SampleNoise, sample_seeds


def greedy(model, labels, guide, seen=None, **options):
    """The canvas of greedy tokens; `seen` collects the guided logits of every step."""

    def record(logits, progress):
        if seen is not None:
            seen.append(logits)
        return logits

    streams = [model.conditioner(labels)] + [model.conditioner.null(len(labels))] * (guide.streams - 1)
    rule = DrawRule(temperature=0, processors=(record,))
    noise = SampleNoise(sample_seeds(0, 0, len(labels)))
    return ancestral(model, Cond.cat(streams), noise=noise, guide=guide, rule=rule, **options)


class Schedule:
    """A guidance scale as a function of the progress."""

    def __init__(self, scale) -> None:
        self.scale = scale

    def __call__(self, progress) -> float:
        return self.scale(progress)
