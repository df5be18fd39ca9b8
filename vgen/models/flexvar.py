"""FlexVAR: next-scale prediction of the map itself, on any list of scales (Jiao et al., arXiv 2502.20313).

VAR, except: the target of a scale is the code map of the latent downsampled to it, with no residual, so every scale
decodes to a picture alone. The input of scale k is the embedded map of scale k - 1, resized. No level embedding; the
learned 32 x 32 position table is averaged down to each scale's side. A scale's tokens do not depend on the list that it
stands in, so a tokenizer that emits all sides 1..16 serves every list, and training draws a new one a step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgen.conditioning import Cond
from vgen.generator import Canvas, require_ids
from vgen.guidance import ClassifierFree, Constant, Guidance, Linear
from vgen.heads import DrawRule
from vgen.models.var import VAR, scales_of
from vtok.acceleration import pairs, trunk_operations
from vtok.layers.cache import KVCache
from vtok.layers.packed import float32_linear
from vtok.layers.resolution import interpolate
from vtok.layers.trunk import Inputs
from vtok.layout import SequenceLayout
from vtok.noise import SampleNoise, sample_seeds
from vtok.quantize.independent import drawn_sides
from vtok.tokenizer import TokenSpec

TABLE = 32  # side of the position table
SCALES_STREAM = 7301
DRAWS = 256  # lists of scales, for a mean


class FlexVAR(VAR):
    """Published sizes at 256 px: depth D in 16, 20, 24 with width 64 D and D heads.

    spec: independent maps on growing square sides, the first 1 x 1. sides: the list that is written, some of the spec's
    (None = all). sample_scales: draw a list from the spec's sides at every training step. Other arguments as VAR's.
    """

    def __init__(
        self,
        spec: TokenSpec | Mapping[str, Any],
        num_classes: int,
        *,
        depth: int,
        sides: Sequence[int] | None = None,
        sample_scales: bool = True,
        width: int | None = None,
        heads: int | None = None,
        drop_path: float | None = None,
        modulation: Literal["own", "shared"] = "own",
        gate_init: float = 1e-3,
        label_drop: float = 0.1,
        l2_attention: bool = True,
        checkpointing: bool = False,
    ) -> None:
        options = {"depth": depth, "width": width, "heads": heads, "modulation": modulation, "gate_init": gate_init}
        options |= {"label_drop": label_drop, "drop_path": drop_path, "l2_attention": l2_attention}
        super().__init__(spec, num_classes, checkpointing=checkpointing, **options)
        del self.level_embedding, self.levels
        self.sample_scales = sample_scales
        self.known_sides = tuple(side for side, _ in self.spec.layout.sides)
        self.own_sides = self.known_sides if sides is None else tuple(sides)
        self.layout = self.layout_of(self.own_sides)
        self.position = nn.Parameter(positions(TABLE, self.trunk.dim))

    cache_kind = KVCache  # nothing is summed

    @classmethod
    def accepts(cls, spec: TokenSpec) -> None:
        require_ids(spec, "FlexVAR")
        if spec.quantizer is None:
            raise ValueError(
                "FlexVAR embeds codes, but these tokens come from quantizer none: choose tokenizer=flexvar_*"
            )
        if scales_of(spec) == "residual":
            made = f"these tokens are residuals of maps (quantizer {spec.quantizer['family']})"
            raise ValueError(f"FlexVAR predicts maps, but {made}: choose tokenizer=flexvar_*, or model=var_*")
        sides = [side for side, _ in spec.layout.sides]
        if spec.layout != SequenceLayout.scales(sides) or sides[0] != 1 or len(sides) < 2:
            raise ValueError(f"FlexVAR writes square maps from 1 x 1 up, these tokens lie on {spec.layout.sides}")

    def blank(self, rows: int, layout: SequenceLayout | None = None) -> Canvas:
        """An empty canvas; layout: SequenceLayout.scales of any sides, seen in training or not (up to the table's 32
        the positions are known ones). Decode what is written there with `decode(tokens, layout=canvas.layout)`.
        """
        layout = self.layout if layout is None else layout
        ids = torch.zeros(rows, layout.length, dtype=torch.int64, device=self.position.device)
        return Canvas(ids, layout)

    def layout_of(self, sides: Sequence[int]) -> SequenceLayout:
        """The layout of a list of sides. Raises ValueError unless it is some of the spec's, from 1 on, growing."""
        sides = tuple(sides)
        if sides[0] != 1 or tuple(sorted(set(sides))) != sides or not set(sides) <= set(self.known_sides):
            raise ValueError(f"sides={list(sides)}: start with 1, grow, and stay among {list(self.known_sides)}")
        return SequenceLayout.scales(sides)

    def set_sides(self, sides: Sequence[int]) -> None:
        """Sample on any list of sides, seen in training or not, up to the position table's. Decode what is written then
        with `decode(tokens, layout=free_layout)`. Those in `greedy_sides` are drawn by argmax, see `draw`."""
        sides = tuple(sides)
        whole = all(isinstance(side, int) for side in sides)
        if not whole or len(sides) < 2 or sides[0] != 1 or sides[-1] > TABLE or sorted(set(sides)) != list(sides):
            raise ValueError(f"sides={list(sides)}: give at least two that start with 1, grow, and end by {TABLE}")
        self.layout = self.free_layout = SequenceLayout.scales(sides)
        self.greedy_sides = tuple(side for side in sides if side not in self.own_sides)

    # --- lists of scales ----------------------------------------------------------------------------------------------

    def arrange(self, tokens: Tensor, layout: SequenceLayout | None = None) -> Canvas:
        """The scales of `layout` (None = own) out of tokens [B, L] or codes [B, L, C] of all scales of the spec."""
        layout = self.layout if layout is None else layout
        return Canvas(tokens if layout == self.spec.layout else tokens[:, self._places(layout, tokens)], layout)

    def restore(self, canvas: Canvas) -> Tensor:
        """Tokens [B, L] of the spec; scales that were not written hold zeros (a decoder reads the last one alone).

        Sides that the spec lacks, or that `set_sides` chose: the tokens as they are, to be decoded with the layout of
        the canvas.
        """
        sides = {side for side, _ in canvas.layout.sides}
        if canvas.layout in (self.spec.layout, self.free_layout) or not sides <= set(self.known_sides):
            return canvas.tokens
        tokens = canvas.tokens.new_zeros(len(canvas.tokens), self.spec.layout.length, *canvas.tokens.shape[2:])
        tokens[:, self._places(canvas.layout, tokens)] = canvas.tokens
        return tokens

    def _places(self, layout: SequenceLayout, tokens: Tensor) -> Tensor:
        unknown = sorted({side for side, _ in layout.sides} - set(self.known_sides))
        if unknown:
            raise ValueError(
                f"sides={unknown} are none of the tokenizer's {list(self.known_sides)}, so these tokens lack them: "
                "encode with tokenizer.encode(images, layout=...), or choose other sides with set_sides"
            )
        spans = (self.spec.layout.written(k, k + 1) for k in map(self.known_sides.index, (s for s, _ in layout.sides)))
        return torch.cat([torch.arange(a, b, device=tokens.device) for a, b in spans])

    def arrange_batch(self, tokens: Tensor, batch: Mapping[str, Any], progress: float) -> Canvas:
        if not (self.training and self.sample_scales):
            return self.arrange(tokens)
        return self.arrange(tokens, self.layout_of(self.draw_sides(batch.get("host_key", batch["key"]))))

    def draw_sides(self, key: Tensor | np.ndarray) -> tuple[int, ...]:
        """The list of one training step, some of the spec's sides, from the key of its first sample (a batch shares its
        shapes). Keys on a GPU, in place of those on the host, are waited for."""
        return drawn_sides(int(key[0]), SCALES_STREAM, self.own_sides, self.known_sides)

    def trained_length(self, key: Tensor, progress: float) -> int:
        return self.layout_of(self.draw_sides(key) if self.sample_scales else self.own_sides).length

    @property
    def drawn_operations(self) -> bool:
        return self.sample_scales

    @property
    def operations_formula(self) -> str:
        return super().operations_formula + (", a mean of drawn lists of scales" if self.sample_scales else "")

    def operations(self, key: Tensor | None = None) -> float:
        """Of the list of scales that the training step of these samples draws."""
        if not self.sample_scales:
            return super().operations()
        keys = sample_seeds(0, 0, DRAWS).split(1) if key is None else [key]
        layouts = [self.layout_of(self.draw_sides(drawn)) for drawn in keys]
        length, seen = (sum(values) / len(layouts) for values in zip(*((x.length, pairs(x)) for x in layouts)))
        return trunk_operations(self.trunk, length, seen, self.vectors) + self.head.operations(length)

    # --- inputs -------------------------------------------------------------------------------------------------------

    def inputs(self, canvas: Canvas, cond: Cond, start: int, stop: int) -> Inputs:
        return self.read(self.maps(canvas, start, stop), cond, canvas.layout, start, stop)

    def maps(self, canvas: Canvas, start: int, stop: int) -> Tensor:
        """Input maps of steps max(start, 1)..stop-1, float32 [R, n, C]: the codes of the step before, resized."""
        found, layout = [], canvas.layout
        with torch.autocast(canvas.tokens.device.type, enabled=False):  # float32: what the codes were fitted with
            for step in range(max(start, 1), stop):
                a, b = layout.written(step - 1, step)
                given = canvas.tokens[:, a:b]
                codes = given if given.is_floating_point() else self.quantizer.lookup(given)
                grid = codes.float().transpose(1, 2).unflatten(2, layout.sides[step - 1])
                found.append(F.interpolate(grid, size=layout.sides[step], mode="bicubic").flatten(2).transpose(1, 2))
        empty = torch.zeros(len(canvas.tokens), 0, self.spec.parts[0].channels, device=canvas.tokens.device)
        return torch.cat(found, dim=1) if found else empty

    def read(self, maps: Tensor, cond: Cond, layout: SequenceLayout, start: int, stop: int) -> Inputs:
        """The trunk's inputs of steps start..stop-1 with input maps [R, n, C]."""
        table = self.position.unsqueeze(0)
        spots = [interpolate(table, layout.sides[step], mode="area").flatten(2) for step in range(start, stop)]
        parts = [cond.start + self.start] if start == 0 else []
        parts.append(float32_linear(self.map_embedding, maps))
        x = torch.cat(parts, dim=1) + torch.cat(spots, dim=2).transpose(1, 2)
        rank, pattern = layout.ranks(start, stop, device=x.device), layout.pattern(start, stop)
        return Inputs(x=x, rank=rank, pattern=pattern, vector=cond.vector)

    # --- the draw -----------------------------------------------------------------------------------------------------

    def draw(
        self,
        canvas: Canvas,
        cond: Cond,
        k: int,
        *,
        cache: KVCache | None,
        noise: SampleNoise,
        guide: Guidance,
        rule: DrawRule,
    ) -> Tensor:
        """As Generator.draw; on a list of `set_sides`, as the original draws: sides that the model's own list lacks by
        argmax, and those above its largest under the whole scale of a linear guidance."""
        side = canvas.layout.sides[k][0]
        if canvas.layout == self.free_layout and side in self.greedy_sides:
            rule = replace(rule, temperature=0.0)
            if side > self.own_sides[-1] and isinstance(guide, ClassifierFree) and isinstance(guide.schedule, Linear):
                guide = ClassifierFree(Constant(guide.schedule.scale))
        return super().draw(canvas, cond, k, cache=cache, noise=noise, guide=guide, rule=rule)


def positions(side: int, width: int) -> Tensor:
    """Start of the position table, float32 [D, side, side]: even channels sin(row w), odd ones cos(column w)."""
    frequency = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
    turn = torch.arange(side).float()[:, None] * frequency  # [side, D / 2]
    table = torch.empty(side, side, width)
    table[..., 0::2], table[..., 1::2] = turn.sin()[:, None], turn.cos()[None]
    return table.permute(2, 0, 1).contiguous()
