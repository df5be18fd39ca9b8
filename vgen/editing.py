"""Token constraints: keep some tokens of an image and draw the others anew.

In-painting, out-painting and class-conditional editing as VAR does them (Tian et al., arXiv 2404.02905, section 5 and
its notebook): every scale has a mask of its own, and where it says "keep" the token of the image takes the place of the
drawn one before the next step reads it. Here that is a canvas whose `known` tokens no sampler draws, in the order of
whichever family completes it: raster, blocks, scales, entities, levels; where the order is the sample's own (MAR),
known tokens come first. Tokens of lines have no place in the picture; what they can do is reuse a prefix (D-AR, arXiv
2505.23660: same layout, new details), or lend it to another image (Hita, arXiv 2507.02358: style transfer).

What to expect. A cell is kept if more than half of its area is. The image is encoded whole, so tokens near an edge have
seen what is behind it. Families that go from one end to the other (next token, blocks, cells) do not see what is kept
further on, and leave seams; scales and MaskGIT, MAR see everything. Residual scales leak a little into each other.
Kept pixels are reconstructions: `composite` pastes the real ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from vgen.generator import Canvas, Generator
from vgen.guidance import Guidance, Progress
from vgen.heads import DrawRule
from vgen.pipeline import Pipeline
from vtok.data.transforms import to_uint8
from vtok.layout import SequenceLayout
from vtok.noise import SampleNoise
from vtok.tokenizer import TokenSpec


def has_places(layout: SequenceLayout) -> bool:
    """Whether some tokens stand on a grid over the picture."""
    return any(height > 1 for height, _ in layout.sides)


def kept_cells(layout: SequenceLayout, keep: Tensor, keep_scales: int = 0) -> Tensor:
    """Which tokens of a layout are kept, bool [L], of the picture's kept pixels `keep` bool [H, W].

    A token is kept if more than half of its cell's area is; the cell of a token without a place, and of a 1 x 1 scale,
    is the whole picture. keep_scales: of so many of the first scales, as far as they are coarser than the last, all is
    kept.
    """
    share, parts = keep.float()[None, None], []
    last = layout.sides[-1]
    for scale, (height, width) in enumerate(layout.sides):
        whole = height == 1 and last[0] > 1  # a 1 x 1 scale, or tokens beside the grid
        cells = F.adaptive_avg_pool2d(share, (1, 1) if whole else (height, width))[0, 0] > 0.5
        if scale < keep_scales and (height, width) != last:
            cells = torch.ones_like(cells)
        parts.append(cells.expand(height, width) if whole else cells)
    return torch.stack([parts[s][r, c] for s, r, c in layout.coords])


def constrain(
    generator: Generator,
    tokens: Tensor,
    noise: SampleNoise,
    cells: Callable[[Canvas], Tensor],
    temperature: float = 1.0,
) -> Canvas:
    """The canvas to be completed of tokens [B, L] in the tokenizer's order; cells(canvas): bool [L] of its layout.

    Tokens that are not kept are blanked. Where a sample has an order of its own, the kept ones come first in it.
    temperature: of the draw that will complete it, for families that write noisy values on the way (E-CAR).
    """
    canvas = generator.hold(tokens, noise, temperature)
    known = cells(canvas).to(tokens.device).expand(len(tokens), -1)
    values, order = canvas.tokens, canvas.order
    if order is not None:
        known = known.gather(1, order)
        first = (~known).long().argsort(dim=1, stable=True)
        known, order = known.gather(1, first), order.gather(1, first)
        values = values.gather(1, first if values.dim() == 2 else first.unsqueeze(-1).expand_as(values))
    values = torch.where(known if values.dim() == 2 else known.unsqueeze(-1), values, torch.zeros_like(values))
    return replace(canvas, tokens=values, order=order, known=known if bool(known.any()) else None)


def region(
    generator: Generator,
    tokens: Tensor,
    noise: SampleNoise,
    keep: Tensor,
    keep_scales: int = 1,
    temperature: float = 1.0,
) -> Canvas:
    """The canvas that keeps the tokens of the pixels `keep` bool [H, W]; see kept_cells and constrain. Raises
    ValueError where the tokens have no places."""
    if not has_places(generator.spec.layout):
        raise ValueError(
            f"these {generator.spec.layout.length} tokens stand on a line, not at places of the picture, so that no "
            "region of it can be kept: task=prefix keep=<k> keeps the first k of them; for a region choose a model on "
            "a grid or on scales"
        )
    return constrain(generator, tokens, noise, lambda canvas: kept_cells(canvas.layout, keep, keep_scales), temperature)


def prefix(generator: Generator, tokens: Tensor, noise: SampleNoise, count: int, temperature: float = 1.0) -> Canvas:
    """The canvas that keeps the first `count` tokens in the generator's order (of a model with several whole levels:
    of each); see constrain. Raises ValueError where there are not that many."""
    length, levels = generator.layout.length, 1
    if length > generator.spec.layout.length and length % generator.spec.layout.length == 0:
        levels = length // generator.spec.layout.length
    if not 0 <= count <= length // levels:
        raise ValueError(f"keep={count}: choose 0 .. {length // levels} tokens")
    kept = (torch.arange(length // levels) < count).repeat(levels)
    return constrain(generator, tokens, noise, lambda canvas: kept, temperature)


def swap_parts(spec: TokenSpec, content: Tensor, style: Tensor) -> Tensor:
    """Tokens with the first part, the picture as a whole, of `style` and the other, its places, of `content`; both are
    ids [B, L] of a tokenizer of two parts (Hita). Raises ValueError for any other."""
    if len(spec.parts) != 2:
        raise ValueError(
            f"task=style swaps holistic tokens for those of another image: it needs a tokenizer of two parts (Hita), "
            f"these tokens have {len(spec.parts)}"
        )
    return torch.cat([style[:, : spec.parts[0].count], content[:, spec.parts[0].count :]], dim=1)


@torch.no_grad()
def complete(
    pipeline: Pipeline,
    canvas: Canvas,
    labels: Tensor,
    seeds: Tensor,
    *,
    guide: Guidance,
    rule: DrawRule | Callable[[Progress], DrawRule],
) -> Tensor:
    """uint8 images [B, H, W, 3] of a constrained canvas of B rows; labels: the null class (num_classes) for none."""
    tokens = pipeline.tokens(labels, seeds, guide=guide, rule=rule, canvas=canvas)
    return to_uint8(pipeline.decode(tokens, seeds)).cpu()


def composite(edited: Tensor, original: Tensor, keep: Tensor) -> Tensor:
    """Images uint8 [B, H, W, 3] with the pixels `keep` bool [H, W] of the original [H, W, 3]."""
    return torch.where(keep[None, :, :, None], original[None], edited)
