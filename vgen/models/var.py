"""VAR: next-scale prediction over residual token maps (Tian et al., arXiv 2404.02905).

Step k writes the whole map of scale k. The input at a cell of scale k is that cell of the reconstruction accumulated
from scales < k, resampled to scale k; nothing is shifted. Attention sees all cells of this and earlier scales. The
accumulation needs the tokenizer's codebook and phi convolutions, which the generator keeps (frozen), not its decoder.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vgen.conditioning import ClassConditioner, Cond
from vgen.generator import Canvas, Generator, require_ids
from vgen.heads import CategoricalHead
from vtok.config import build, describe, family_class, imported
from vtok.layers.cache import KVCache
from vtok.layers.packed import float32_linear
from vtok.layers.trunk import Inputs, Trunk
from vtok.layout import SequenceLayout
from vtok.models import FAMILIES
from vtok.tokenizer import Tokenizer, TokenSpec


class MapCache(KVCache):
    """Keys and values, and beside them the sum of the maps of the scales that are done, so that a step adds one map to
    it instead of all; provisional until `commit`, as they are.

    summed: (sum [rows, C, H, W], how many scales are in it); pending: the same with the scale that was added last.
    """

    summed: tuple[Tensor | None, int] = (None, 0)
    pending: tuple[Tensor | None, int] | None = None

    def first(self, rows: int) -> MapCache:
        part, (total, scales) = super().first(rows), self.summed
        part.summed, part.pending = (None if total is None else total[:rows], scales), None
        return part

    def commit(self, n: int | Tensor) -> None:
        super().commit(n)
        if not isinstance(n, int):  # rows stand at different places
            self.summed = None, 0
        elif self.pending is not None:
            self.summed = self.pending
        self.pending = None

    def truncate(self, n: int | Tensor) -> None:
        super().truncate(n)
        self.summed, self.pending = (None, 0), None

    def take(self, rows: Tensor) -> None:
        super().take(rows)
        self.summed, self.pending = (None, 0), None


class VAR(Generator):
    """Published sizes: depth D in 16, 20, 24, 30 (256 px) with width 64 D, D heads, drop_path 0.1 D / 24; d36 (512 px)
    with shared modulation.

    spec: residual tokens on growing square maps; its `quantizer` is rebuilt here. l2_attention: q and k normalised,
    with a learned temperature a head; without it the softmax scale is 0.25 / sqrt(E). gate_init: factor on the gate
    rows of the modulation at the start (1e-3 for d16, d20; 1e-4 d24; 1e-5 d30; 5e-6 d36).

    Progressive training, off in all published runs: until the share `progressive_until` of training is done, only the
    first scales are trained, from `progressive_first` of them on, one more at a time; the loss of the newest one rises
    from 0.01 to full weight over the share `progressive_ramp`. The original's code begins to add when the warm-up ends;
    here from the first step on.
    """

    def __init__(
        self,
        spec: TokenSpec | Mapping[str, Any],
        num_classes: int,
        *,
        depth: int,
        width: int | None = None,
        heads: int | None = None,
        modulation: Literal["own", "shared"] = "own",
        l2_attention: bool = True,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        drop_path: float | None = None,
        label_drop: float = 0.1,
        gate_init: float = 1e-3,
        checkpointing: bool = False,
        progressive_until: float = 0.0,
        progressive_first: int = 5,
        progressive_ramp: float = 1 / 300,
    ) -> None:
        super().__init__()
        if not 0 <= progressive_until <= 1 or progressive_first < 1 or progressive_ramp <= 0:
            got = f"{progressive_until}, {progressive_first}, {progressive_ramp}"
            raise ValueError(f"progressive_until in 0..1, progressive_first >= 1, progressive_ramp > 0, got {got}")
        self.progressive = progressive_until, progressive_first, progressive_ramp
        spec = TokenSpec.from_config(spec)
        self.accepts(spec)
        if progressive_until and progressive_first >= spec.layout.steps:
            raise ValueError(
                f"progressive_first={progressive_first} leaves nothing to add to {spec.layout.steps} scales: choose "
                "fewer, or progressive_until=0"
            )
        width, heads = width or 64 * depth, heads or depth
        self.spec, self.num_classes, self.label_drop, self.layout = spec, num_classes, label_drop, spec.layout
        self.quantizer = build(spec.quantizer, imported(FAMILIES, spec.quantizer)).requires_grad_(False)
        part = spec.parts[0]
        self.conditioner = ClassConditioner(num_classes=num_classes, dim=width, vector=True)
        self.map_embedding = nn.Linear(part.channels, width)
        self.level_embedding = nn.Embedding(self.layout.steps, width)
        self.position = nn.Parameter(torch.empty(1, self.layout.length, width))
        self.start = nn.Parameter(torch.empty(1, 1, width))
        self.trunk = Trunk(
            dim=width,
            depth=depth,
            heads=heads,
            hidden=4 * width,
            norm="layer",
            eps=1e-6,
            ffn="gelu_tanh",
            bias="qv",
            qk_norm="l2" if l2_attention else "none",
            attention_scale=None if l2_attention else 0.25 / math.sqrt(width // heads),
            modulation=modulation,
            dropout=dropout,
            attention_dropout=attention_dropout,
            drop_path=0.1 * depth / 24 if drop_path is None else drop_path,
            checkpointing=checkpointing,
        )
        self.head = CategoricalHead(dim=width, vocab_size=part.vocab_size, bias=True)
        self.register_buffer("levels", self.layout.steps_of_tokens(), persistent=False)
        self._init(gate_init)

    @classmethod
    def accepts(cls, spec: TokenSpec) -> None:
        require_ids(spec, "VAR")
        if scales_of(spec) != "residual":
            have = "none" if spec.quantizer is None else spec.quantizer["family"]
            raise ValueError(
                f"VAR builds its inputs from residual scales, but the tokens come from quantizer {have}; "
                "choose a multi-scale residual tokenizer (tokenizer=var_*) or model=llamagen*"
            )
        if spec.layout.sizes[0] != 1:
            raise ValueError(f"VAR starts from a 1 x 1 map, but the first scale has {spec.layout.sizes[0]} tokens")

    cache_kind = MapCache

    def undecayed(self) -> list[nn.Parameter]:
        """Positions, scale embedding, start, temperatures and shared offsets, as in the published code; the class table
        decays there too."""
        named = ("position", "start", "level_embedding", "log_scale", "offset")
        return [p for name, p in self.named_parameters() if name.removesuffix(".weight").split(".")[-1] in named]

    def _init(self, gate_init: float) -> None:
        std = math.sqrt(1 / self.trunk.dim / 3)
        for name, module in self.named_modules():
            if name.startswith("quantizer"):
                continue
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.trunc_normal_(module.weight, std=std)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
        for parameter in (self.position, self.start):
            nn.init.trunc_normal_(parameter, std=std)
        with torch.no_grad():
            self.head.linear.weight.mul_(0.02)
            self.trunk.final.weight.mul_(0.5)
            gates = 2 * self.trunk.dim
            for block in self.trunk.blocks:
                block.attention.out.weight.div_(math.sqrt(2 * len(self.trunk.blocks)))
                block.ffn.down.weight.div_(math.sqrt(2 * len(self.trunk.blocks)))
                if block.modulation is not None:
                    block.modulation.weight[:gates].mul_(gate_init)
                    block.modulation.weight[gates:].mul_(0.5)
                else:
                    block.offset[:, :, :2].mul_(gate_init)
                    block.offset[:, :, 2:].mul_(0.5)

    def adopt(self, tokenizer: Tokenizer) -> None:
        """Copy codebook and phi convolutions. Raises ValueError where the tokenizer's quantizer is another one."""
        own, given = self.quantizer.arguments, getattr(tokenizer.quantizer, "arguments", None)
        if describe(tokenizer.quantizer) != describe(self.quantizer):
            raise ValueError(f"the tokenizer's quantizer {given} is not the one the model was built for, {own}")
        self.quantizer.load_state_dict(tokenizer.quantizer.state_dict())

    def train(self, mode: bool = True) -> VAR:
        super().train(mode)
        self.quantizer.eval()  # frozen: no codebook statistics may move
        return self

    def scales_at(self, progress: float) -> tuple[int, float]:
        """How many scales are trained at this share of training, and the weight of the newest one."""
        until, first, ramp = self.progressive
        extra = self.layout.steps - first
        if progress >= until or extra <= 0:
            return self.layout.steps, 1.0
        added = round(progress / until * extra)
        if added == 0 or added == extra:
            return first + added, 1.0
        since = progress - (added - 0.5) / extra * until
        return first + added, min(max(since / ramp, 0.01), 1.0)

    def trained_length(self, key: Tensor, progress: float) -> int:
        return self.layout.written(0, self.scales_at(progress)[0])[1]

    def loss(self, batch: Mapping[str, Any], *, progress: float = 0.0) -> dict[str, Tensor]:
        scales, newest = self.scales_at(progress) if self.training else (self.layout.steps, 1.0)
        if scales == self.layout.steps:
            return super().loss(batch, progress=progress)
        canvas = self.arrange(batch["tokens"])
        context = self.arrange(batch["context"]) if "context" in batch else canvas
        h = self(context, self.conditioner(batch["label"], self.dropped(batch)), 0, scales)
        a, b = canvas.layout.written(scales - 1, scales)
        nats = self.head.loss(h, canvas.tokens[:, :b], canvas.layout.sizes[:scales])
        weighted = nats[:, :a].sum(1) + newest * nats[:, a:].sum(1)
        return {"loss": weighted.mean() / canvas.layout.length, "nats": nats.detach()}

    def inputs_behind(self, cache: KVCache | None, canvas: Canvas, cond: Cond, start: int, stop: int) -> Inputs:
        if isinstance(cache, MapCache):
            cache.pending = None
            if start > 0 and stop == start + 1:
                return self.read(self.next_map(canvas, start, cache), cond, canvas.layout, start, stop)
        return self.inputs(canvas, cond, start, stop)

    def inputs(self, canvas: Canvas, cond: Cond, start: int, stop: int) -> Inputs:
        maps = None
        if stop > 1:
            maps = self.quantizer.maps(self.codes(canvas, 0, stop - 1), max(start, 1), stop)
        return self.read(maps, cond, canvas.layout, start, stop)

    def read(self, maps: Tensor | None, cond: Cond, layout: SequenceLayout, start: int, stop: int) -> Inputs:
        """The trunk's inputs of steps start..stop-1 with input maps float32 [R, n, C]; None: of step 0 alone."""
        a, b = layout.written(start, stop)
        parts = [cond.start + self.start] if start == 0 else []
        if maps is not None:
            parts.append(float32_linear(self.map_embedding, maps))
        x = torch.cat(parts, dim=1) + self.level_embedding(self.levels[a:b]) + self.position[:, a:b]
        return Inputs(
            x=x,
            rank=layout.ranks(start, stop, device=x.device),
            pattern=layout.pattern(start, stop),
            vector=cond.vector,
        )

    def next_map(self, canvas: Canvas, step: int, cache: MapCache) -> Tensor:
        """The input map of a step, float32 [R, n, C], from the sum in the cache and the scales that it still lacks."""
        total, done = cache.summed if cache.summed[1] <= step else (None, 0)
        for scale in range(done, step):
            total = self.quantizer.add(total, self.codes(canvas, scale, scale + 1), scale)
        cache.pending = total, step
        return self.quantizer.input_of(total, step)

    def codes(self, canvas: Canvas, start: int, stop: int) -> Tensor:
        """Codes float32 [R, n, C] of the tokens of steps start..stop-1: in float32 they were fitted."""
        a, b = canvas.layout.written(start, stop)
        given = canvas.tokens[:, a:b]
        return (given if given.is_floating_point() else self.quantizer.lookup(given)).float()


def scales_of(spec: TokenSpec) -> str | None:
    """What the spec's quantizer says that codes on several maps are (`Quantizer.scales`); None where it has one map, or
    the spec describes none."""
    if spec.quantizer is None:
        return None
    return getattr(family_class(spec.quantizer["family"], imported(FAMILIES, spec.quantizer)), "scales", None)
