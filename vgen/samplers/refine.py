"""Refinement: every step predicts all open tokens and keeps the surest (MaskGIT, Chang et al., arXiv 2202.04200).

As TiTok's generators do it (arXiv 2406.07550): the confidence of a token is its guided logit, and one temperature T,
which falls to 0 at the last step, scales the Gumbel noise of both the token and its confidence. Here the logits are
divided by T, as every head does before it hands them to processors: logits + T g orders as logits / T + g. The layout
says how many tokens each step decides; which ones, the confidences. A token once kept is never asked again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from vgen.conditioning import Cond
from vgen.generator import Canvas, Generator
from vgen.guidance import Guidance, Progress
from vgen.heads import DrawRule, draw_ids
from vgen.samplers.ancestral import PLAIN, UNGUIDED, check_rows, phases
from vtok.counters import count
from vtok.noise import SampleNoise

CONFIDENCE_STREAM = 100_000  # noise streams: step k draws tokens on k, confidences on this plus k


@torch.no_grad()
def refine(
    generator: Generator,
    cond: Cond,
    *,
    noise: SampleNoise,
    guide: Guidance = UNGUIDED,
    rule: DrawRule | Callable[[Progress], DrawRule] = PLAIN,
    canvas: Canvas | None = None,
    stop: int | None = None,
    on_step: Callable[[Canvas, Progress], None] | None = None,
) -> Canvas:
    """Write a canvas of B = len(noise.seeds) samples; its `known` says what is decided, in the end everything.

    As `ancestral`, except: rule.temperature is that of a first step before the first, and falls linearly to 0 at the
    last (TiTok's randomize_temperature), where the logits stay as they are. With `stop`, open cells hold 0.
    """
    check_rows(cond, noise, guide)
    canvas = generator.begin(noise) if canvas is None else canvas
    layout, tokens = canvas.layout, canvas.tokens
    known = torch.zeros_like(tokens, dtype=torch.bool) if canvas.known is None else canvas.known
    canvas = replace(canvas, tokens=torch.where(known, tokens, 0), known=known)
    position = torch.arange(layout.length, device=tokens.device)
    steps = layout.steps if stop is None else stop
    for k, given, _, now in phases(cond, None, guide, canvas, steps):
        progress = Progress.of(layout, k)
        chosen = rule if isinstance(rule, DrawRule) else rule(progress)
        temperature = chosen.temperature * (1 - (k + 1) / layout.steps)
        count("step.whole")
        count("rows.single" if now.streams == 1 else "rows.guided")
        h = generator(canvas.repeat(now.streams), given, k, k + 1)
        logits = now(generator.head.logits(h)[0].unflatten(0, (now.streams, -1)), progress)
        if temperature:
            logits = logits / temperature
        for process in chosen.processors:
            logits = process(logits, progress)
        plain = replace(chosen, temperature=1.0 if temperature else 0.0, processors=())
        drawn = draw_ids(logits, plain, noise, position, progress, stream=k)
        confidence = logits.gather(-1, drawn.unsqueeze(-1)).squeeze(-1)
        if temperature:
            zero = torch.zeros(1, dtype=torch.int64, device=tokens.device)
            race = noise.gumbel(position, zero, CONFIDENCE_STREAM + k)[..., 0]
            confidence = confidence + race
        kept = canvas.known | ~least(confidence, ~canvas.known, layout.length - layout.written(k, k + 1)[1])
        filled = torch.where(canvas.known, canvas.tokens, drawn)
        canvas = replace(canvas, tokens=torch.where(kept, filled, 0), known=kept)
        if on_step is not None:
            on_step(canvas, progress)
    return canvas


def least(confidence: Tensor, open_: Tensor, left: int) -> Tensor:
    """The `left` open cells of lowest confidence, bool [B, L]; one fewer than are open, but at least one, where fewer
    are open (some were given); none where left is 0."""
    count = open_.sum(1, keepdim=True)
    if left == 0:
        return torch.zeros_like(open_)
    stay = torch.minimum(count, (count - 1).clamp(max=left).clamp(min=1))
    rank = confidence.masked_fill(~open_, math.inf).argsort(dim=1, stable=True).argsort(dim=1)
    return (rank < stay) & open_
