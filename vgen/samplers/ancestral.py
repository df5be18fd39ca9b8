"""Ancestral sampling: draw the tokens of one step after another, each given all earlier ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from vgen.conditioning import Cond
from vgen.generator import Canvas, Generator
from vgen.guidance import Guidance, Progress, Unguided, guided_steps
from vgen.heads import DrawRule
from vtok.counters import count
from vtok.layers.cache import KVCache
from vtok.noise import SampleNoise

PLAIN, UNGUIDED = DrawRule(), Unguided()


@torch.no_grad()
def ancestral(
    generator: Generator,
    cond: Cond,
    *,
    noise: SampleNoise,
    guide: Guidance = UNGUIDED,
    rule: DrawRule | Callable[[Progress], DrawRule] = PLAIN,
    canvas: Canvas | None = None,
    stop: int | None = None,
    on_step: Callable[[Canvas, Progress], None] | None = None,
    cached: bool = True,
) -> Canvas:
    """Write a canvas of B = len(noise.seeds) samples.

    cond: guide.streams * B rows, stream-major; behind the last guided step, and where nothing is cached in every
    unguided one, the first B alone are run, unless `cond.at` is set. rule: one for all steps, or a function of the
    progress. canvas: tokens to start from; where `known` is true they are kept. stop: write only the steps before it.
    on_step: called after each step with the canvas so far. cached=False recomputes every prefix (slow; the same
    tokens).
    """
    check_rows(cond, noise, guide)
    canvas = generator.begin(noise) if canvas is None else canvas
    cache = empty_cache(generator, cond, canvas) if cached else None
    steps = canvas.layout.steps if stop is None else stop
    for k, given, kept, now in phases(cond, cache, guide, canvas, steps):
        progress = write_step(generator, canvas, given, k, cache=kept, noise=noise, guide=now, rule=rule)
        if on_step is not None:
            on_step(canvas, progress)
    return canvas


def phases(
    cond: Cond, cache: KVCache | None, guide: Guidance, canvas: Canvas, steps: int
) -> Iterator[tuple[int, Cond, KVCache | None, Guidance]]:
    """What each of the first `steps` steps runs with: behind the last guided one, and without a cache in every unguided
    one, no null rows, but where `cond.at` is set, whose edits may know all rows."""
    guided, samples, alone = guided_steps(guide, canvas.layout), len(canvas.tokens), None
    for k in range(steps):
        needed = guided[k] if cache is None else any(guided[k:])
        if needed or guide.streams == 1 or cond.at:
            yield k, cond, cache, guide
            continue
        if alone is None:
            alone = cond.first(samples), None if cache is None else cache.first(samples), UNGUIDED
        yield k, *alone


def check_rows(cond: Cond, noise: SampleNoise, guide: Guidance) -> None:
    """ValueError unless the conditions have one row for each stream and sample."""
    rows, samples = len(cond.start), len(noise.seeds)
    if rows != guide.streams * samples:
        raise ValueError(f"cond has {rows} rows, expected {guide.streams} streams x {samples} samples")


def empty_cache(generator: Generator, cond: Cond, canvas: Canvas) -> KVCache | None:
    """A cache for writing this canvas under these conditions; None for families that keep nothing."""
    prefix = 0 if cond.prefix is None else cond.prefix.shape[1]
    other = {} if canvas.layout is generator.layout else {"layout": canvas.layout}
    return generator.cache(len(cond.start), prefix=prefix, **other)


def write_step(
    generator: Generator,
    canvas: Canvas,
    cond: Cond,
    k: int,
    *,
    cache: KVCache | None,
    noise: SampleNoise,
    guide: Guidance,
    rule: DrawRule | Callable[[Progress], DrawRule],
) -> Progress:
    """Draw the tokens of step k into the canvas, but for those it knows; returns where generation stood."""
    count("step.cached" if cache is not None else "step.recomputed" if generator.caches else "step.whole")
    count("rows.single" if guide.streams == 1 else "rows.guided")
    layout = canvas.layout
    a, b = layout.written(k, k + 1)
    progress = Progress.of(layout, k)
    chosen = rule if isinstance(rule, DrawRule) else rule(progress)
    tokens = generator.draw(canvas, cond, k, cache=cache, noise=noise, guide=guide, rule=chosen)
    if canvas.known is not None:
        known = canvas.known[:, a:b] if tokens.dim() == 2 else canvas.known[:, a:b, None]
        tokens = torch.where(known, canvas.tokens[:, a:b], tokens)
    canvas.tokens[:, a:b] = tokens
    return progress
