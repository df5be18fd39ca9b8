"""What a coarse-to-fine generator has after every step, as a strip (columns = steps) or an animated GIF.

Where the tokenizer decodes prefixes and the generator writes tokens in the tokenizer's order (VAR, FlexVAR, HAR,
DetailFlow, D-AR and every other family on ResTok, FlexTok, ReToK), a step's picture is the prefix that it ends. D-AR
(arXiv 2505.23660) shows a prefix as its walk that ends there: the previews of its diffusion. Where a generator writes
one latent map at growing resolution (FlowAR, xAR's scales, E-CAR), a step's picture is its map, enlarged as FlowAR
hands it to the next scale; E-CAR's are noisy until the last. Written tokens never change, so all pictures come from the
finished ones, and the last is the image itself. Where the tokenizer has scales (VAR, FlexVAR), only the ends of whole
scales are pictures: of a generator that stops between them (RAR on VAR's tokens) the steps that end one are shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from vgen.generator import Canvas, Generator
from vgen.latents import enlarge, scale_map
from vgen.pipeline import Pipeline
from vtok.checkpoint import write_atomic
from vtok.data.transforms import to_uint8
from vtok.layout import SequenceLayout
from vtok.tokenizer import Tokenizer

FRAMES, ROWS = 16, 8  # pictures of one image, and images, at most
FRAME_MS, HOLD = 250, 8  # of a GIF: a frame's time, and how many times longer the last one stays


def writes_maps(generator: Generator) -> bool:
    """Whether every step writes one map of latents, each larger than the one before, and the last is the image."""
    layout, spec = generator.layout, generator.spec
    sides = [side for side, _ in layout.sides]
    growing = len(sides) > 1 and all(a < b for a, b in pairwise(sides))
    return (
        not spec.discrete
        and growing
        and layout == SequenceLayout.scales(sides)
        and spec.layout.length == sides[-1] ** 2
    )


def preview_ends(generator: Generator, tokenizer: Tokenizer) -> list[int]:
    """How many tokens each shown step leaves written; at most FRAMES, the last is all. Raises ValueError, with the
    reason, where a part of the tokens is no picture."""
    model, name = type(generator).__name__, type(tokenizer).__name__
    if writes_maps(generator):
        return _shown([generator.layout.written(0, k + 1)[1] for k in range(generator.layout.steps)])
    if not tokenizer.prefixes:
        raise ValueError(
            f"preview: {name} decodes whole images only, so the steps of {model} have no pictures; leave preview away, "
            "or use a coarse-to-fine tokenizer (VAR's, FlexVAR's, ResTok, DetailFlow, D-AR) or FlowAR"
        )
    length = generator.spec.layout.length
    free = generator.free_layout is not None
    own = generator.layout.length == length and not free
    if own and generator.layout.coords != generator.spec.layout.coords:
        raise ValueError(f"preview: {model} writes tokens in an order of its own; leave preview away")
    if not generator.caches:
        raise ValueError(f"preview: {model} writes tokens all over the image at every step; leave preview away")
    if own or free:
        ends = [generator.layout.written(0, k + 1)[1] for k in range(generator.layout.steps)]
    else:  # some of the tokenizer's scales (FlexVAR)
        where = list(generator.spec.layout.sides)
        ends = [generator.spec.layout.written(0, where.index(side) + 1)[1] for side in generator.layout.sides]
    if tokenizer.quantizer.scales is not None and not free:  # which decodes whole scales; free layouts consist of them
        scales = generator.spec.layout
        whole = {scales.written(0, k + 1)[1] for k in range(scales.steps)}
        ends = [end for end in ends if end in whole]
    return _shown(ends)


def _shown(ends: list[int]) -> list[int]:
    """At most FRAMES of them, the first and the last among these."""
    shown = np.linspace(0, len(ends) - 1, min(FRAMES, len(ends))).round().astype(int)
    return [ends[k] for k in shown]


def enlarged(generator: Generator, tokens: Tensor, end: int) -> Tensor:
    """Tokens in the tokenizer's order of the map that ends at place `end` of a canvas's tokens [B, L, C], enlarged to
    the last map's side."""
    layout = generator.layout
    step = next(k for k in range(layout.steps) if layout.written(0, k + 1)[1] == end)
    full = enlarge(scale_map(tokens, layout, step), layout.sides[-1][0]).flatten(1, 2)
    return generator.restore(Canvas(torch.cat([tokens[:, : -layout.sizes[-1]], full], dim=1), layout))


def previews(pipeline: Pipeline, tokens: Tensor, seeds: Tensor | None = None) -> Tensor:
    """uint8 [B, K, H, W, 3], the picture after each of K steps, of a finished canvas's tokens [B, L(, C)]. seeds int64
    [B]: as in Pipeline.decode."""
    generator = pipeline.generator
    ends = preview_ends(generator, pipeline.tokenizer)
    if writes_maps(generator):
        pictures = [pipeline.decode(enlarged(generator, tokens, end), seeds) for end in ends]
    else:
        tokens = generator.restore(Canvas(tokens, generator.layout))
        pictures = [pipeline.decode(tokens, seeds, keep=end) for end in ends]
    return torch.stack([to_uint8(picture).cpu() for picture in pictures], dim=1)


def tiled(rows: Sequence[Sequence[np.ndarray]], titles: Sequence[str] = ()) -> Image.Image:
    """One picture of rows of uint8 images [H, W, 3] of one size, with a title over each column; small ones enlarged."""
    height, width = rows[0][0].shape[:2]
    zoom, gap, head = max(1, 64 // height), 2, 14 if titles else 0
    cell_h, cell_w = height * zoom + gap, width * zoom + gap
    sheet = Image.new("RGB", (max(map(len, rows)) * cell_w, head + len(rows) * cell_h), "white")
    pen = ImageDraw.Draw(sheet)
    for c, title in enumerate(titles):
        pen.text((c * cell_w + 2, 1), title, fill="black")
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            tile = Image.fromarray(image).resize((width * zoom, height * zoom), Image.Resampling.NEAREST)
            sheet.paste(tile, (c * cell_w, head + r * cell_h))
    return sheet


class Previews:
    """Collects the tokens of the first images of a run of the Pipeline and writes their pictures to `path`.

    seeds: of the run's images. .png: a strip, a row an image and a column a step, titled with the tokens so far; .gif:
    an animation. Raises ValueError at once for another ending, and where the steps have no pictures.
    """

    def __init__(self, pipeline: Pipeline, path: str | Path, seeds: Tensor | None = None) -> None:
        self.pipeline, self.path, self.seeds, self.tokens = pipeline, Path(path), seeds, []
        if self.path.suffix not in (".png", ".gif"):
            raise ValueError(f"preview={path}: the ending must be .png (a strip) or .gif")
        self.ends = preview_ends(pipeline.generator, pipeline.tokenizer)

    def __call__(self, start: int, tokens: Tensor) -> None:
        """Takes the canvas's tokens of a chunk whose first image is number `start`."""
        if start < ROWS:
            self.tokens.append(tokens[: ROWS - start])

    def frames(self, images: np.ndarray) -> np.ndarray:
        """uint8 [N, K, H, W, 3]; the last ones are `images` uint8 [.., H, W, 3], which a larger batch has decoded."""
        tokens = torch.cat(self.tokens)
        seeds = None if self.seeds is None else self.seeds[: len(tokens)]
        found = previews(self.pipeline, tokens, seeds).numpy()
        found[:, -1] = images[: len(found)]
        return found

    def strip(self, images: np.ndarray) -> Image.Image:
        """A row an image and a column a step, titled with the tokens so far; `images` as in `frames`."""
        return tiled([list(image) for image in self.frames(images)], [str(end) for end in self.ends])

    def write(self, images: np.ndarray) -> None:
        if self.path.suffix == ".png":
            picture = self.strip(images)
            write_atomic(self.path, lambda file: picture.save(file, "PNG"))
            return
        frames = self.frames(images)
        shown = [tiled([list(frames[:, k])]).quantize() for k in range(frames.shape[1])]
        times = [FRAME_MS] * (len(shown) - 1) + [FRAME_MS * HOLD]
        options = {"save_all": True, "append_images": shown[1:], "duration": times, "loop": 0}
        write_atomic(self.path, lambda file: shown[0].save(file, "GIF", **options))
