"""Ancestral sampling from recorded CUDA graphs: one launch a step instead of hundreds of kernels.

A step of decoding one image is a few microseconds of work a kernel, less than the host needs to launch it. Here every
step of a sampling run is captured once and replayed ever after. All that a step takes from the host (its position,
guidance scale, solver times, the slice of the cache that attention reads) is part of its own graph, so no family needs
code of its own, nothing is padded or masked, and the kernels are those of the plain path: the tokens are the same.

What changes between calls lives at fixed addresses and is overwritten: conditions, seeds, the canvas, the cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from vgen.conditioning import Cond
from vgen.generator import Canvas, Generator
from vgen.guidance import Guidance, Progress
from vgen.heads import DrawRule
from vgen.samplers.ancestral import PLAIN, UNGUIDED, ancestral, check_rows, empty_cache, phases, write_step
from vtok.counters import count
from vtok.layers.cache import KVCache
from vtok.noise import SampleNoise

CANVAS, COND = ("tokens", "order", "time", "known"), ("start", "prefix", "vector")


class Capture(Protocol):
    """How steps are recorded: `warm` runs something beforehand; a call records what it is given, returns its replay."""

    def warm(self, run: Callable[[], Any]) -> None: ...

    def __call__(self, run: Callable[[], Any]) -> Callable[[], None]: ...


class CudaCapture:
    """CUDA graphs on `device` that share one memory pool: they are replayed in the order in which they were recorded.

    All of it names the device: PyTorch takes the current one otherwise, which need not be the model's.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.pool: Any = None

    def warm(self, run: Callable[[], Any]) -> None:
        """On a side stream, as capturing wants it: libraries allocate and choose kernels on their first call."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            run()
        current.wait_stream(self.stream)

    def __call__(self, run: Callable[[], Any]) -> Callable[[], None]:
        with torch.cuda.device(self.device):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                run()
        self.pool = graph.pool() if self.pool is None else self.pool
        return graph.replay


@dataclass
class Recording:
    """The steps of one setting, and the tensors that they read and write."""

    cond: Cond
    noise: SampleNoise
    canvas: Canvas
    cache: KVCache | None
    steps: list[tuple[Callable[[], None], Progress]]

    def load(self, cond: Cond, noise: SampleNoise, canvas: Canvas) -> None:
        """Overwrite everything that differs between calls."""
        for old, new, names in ((self.cond, cond, COND), (self.canvas, canvas, CANVAS)):
            for name in names:
                if getattr(old, name) is not None:
                    getattr(old, name).copy_(getattr(new, name))
        self.noise.seeds.copy_(noise.seeds)
        if self.cache is not None:
            self.cache.length.zero_()
            self.cache.kept.clear()


class GraphSampler:
    """A sampler (see `ancestral`) that records the steps at the first call and replays them at every later one.

    The last setting is kept: rows, streams, guidance, rule, layout, which fields the canvas fills. Another one is
    recorded anew, which takes as long as a few runs. capture: how to record; None is CUDA.
    """

    def __init__(self, generator: Generator, *, capture: Callable[[], Capture] | None = None) -> None:
        if generator.sampler is not ancestral:
            raise ValueError(
                f"cuda_graphs=true: {type(generator).__name__} chooses its tokens at run time, and has no fixed steps "
                "to record; choose cuda_graphs=false"
            )
        device = next(generator.parameters()).device
        if capture is None and device.type != "cuda":
            raise ValueError(f"cuda_graphs=true needs device=cuda, not {device.type}")
        self.capture = functools.partial(CudaCapture, device) if capture is None else capture
        self.key: Any = None
        self.recording: Recording | None = None

    def __call__(
        self,
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
        """As `ancestral`; the canvas that on_step sees is written on by later steps. cond.at cannot be recorded."""
        if cond.at:
            raise ValueError("cuda_graphs=true: edits of blocks (cond.at) are not recorded; choose cuda_graphs=false")
        check_rows(cond, noise, guide)
        with torch.inference_mode(False), torch.no_grad():  # later calls overwrite tensors: they must be plain ones
            canvas = generator.begin(noise) if canvas is None else canvas
            greedy = generator.greedy_sides
            shapes = (_shapes(cond, COND), _shapes(canvas, CANVAS))
            key = (id(generator), guide, rule, stop, canvas.layout, greedy, *shapes)
            if key != self.key or self.recording is None:
                self.key, self.recording = None, None  # frees the old graphs' memory first
                self.recording = self.record(generator, cond, noise, guide, rule, canvas, stop)
                self.key = key
            recording = self.recording
            recording.load(cond, noise, canvas)
            for replay, progress in recording.steps:
                replay()
                count("graph.replayed")
                if on_step is not None:
                    on_step(recording.canvas, progress)
            return replace(recording.canvas, tokens=recording.canvas.tokens.clone())

    def record(
        self,
        generator: Generator,
        cond: Cond,
        noise: SampleNoise,
        guide: Guidance,
        rule: DrawRule | Callable[[Progress], DrawRule],
        canvas: Canvas,
        stop: int | None,
    ) -> Recording:
        """Run everything once as it is, then capture step after step on tensors of our own."""
        capture, layout = self.capture(), canvas.layout
        cache = empty_cache(generator, cond, canvas)
        cond = replace(cond, **{name: _own(getattr(cond, name)) for name in COND})
        begun, canvas = canvas, replace(canvas, **{name: _own(getattr(canvas, name)) for name in CANVAS})
        noise = SampleNoise(noise.seeds.clone())
        options = {"noise": noise, "rule": rule}
        capture.warm(lambda: ancestral(generator, cond, canvas=canvas, stop=stop, guide=guide, **options))
        made = Recording(cond, noise, canvas, cache, [])
        made.load(cond, noise, begun)
        for k, given, kept, now in phases(cond, cache, guide, canvas, layout.steps if stop is None else stop):
            seen: list[Progress] = []
            step = functools.partial(write_step, generator, canvas, given, k, cache=kept, guide=now, **options)
            made.steps.append((capture(lambda step=step, seen=seen: seen.append(step())), *seen))
            count("graph.captured")
        return made


def _own(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()


def _shapes(holder: Cond | Canvas, names: tuple[str, ...]) -> tuple:
    """Shape and dtype of every field, None where it is empty."""
    fields = [getattr(holder, name) for name in names]
    return tuple(None if field is None else (tuple(field.shape), field.dtype) for field in fields)
