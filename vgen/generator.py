"""What a generator is: how the input of a step is built, what the head predicts, and in which order tokens come.

`inputs` serves training and sampling, so the two cannot drift apart; it is stateless, and the input of step k reads
tokens of steps < k only. `run` is tensors in, tensors out: the one thing that compilation wraps. Only `draw` commits to
the cache. A paper is one subclass in vgen/models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vgen.conditioning import ClassConditioner, Cond, Edit
from vgen.gaussian import Moments
from vgen.guidance import Guidance, Progress
from vgen.heads import CategoricalHead, DrawRule
from vtok.acceleration import pairs, trunk_operations
from vtok.config import Configured
from vtok.layers.cache import KVCache
from vtok.layers.trunk import Inputs, Trunk
from vtok.layout import SequenceLayout
from vtok.noise import SampleNoise
from vtok.tokenizer import Tokenizer, TokenSpec

DROP_STREAM = 7001  # noise stream of the label-drop coin


@dataclass
class Canvas:
    """Tokens being written, in the generator's order.

    tokens: ids int64 [R, L], or values float [R, L, E] (codes, latents; accepted wherever ids are); order: int64
    [R, L], cell of each place where the order differs between samples; time: [R, K], noise time of each step; known:
    bool [R, L], tokens that are given and must not be drawn.
    """

    tokens: Tensor
    layout: SequenceLayout
    order: Tensor | None = None
    time: Tensor | None = None
    known: Tensor | None = None

    def repeat(self, streams: int) -> Canvas:
        """The same rows for every guidance stream, stream-major."""
        if streams == 1:
            return self
        fields = {name: getattr(self, name) for name in ("tokens", "order", "time", "known")}
        return replace(
            self, **{k: None if v is None else v.repeat(streams, *[1] * (v.dim() - 1)) for k, v in fields.items()}
        )


class Generator(Configured, nn.Module):
    """Base of all generators. A subclass sets the fields below in its constructor and writes `inputs`.

    spec: the tokens it was built for; num_classes: 0 = unconditional; label_drop: share of training samples whose class
    is hidden; layout: its own order; caches: whether earlier steps stay as they are, so that their keys and values can
    be kept, in a cache of cache_kind; reads_also: which of "patches" (of a teacher) and "corrupted" (corrections) its
    loss takes from a batch; drawn_operations: whether `operations` depend on the samples.
    """

    caches: bool = True
    free_layout: SequenceLayout | None = None  # of `restore`d tokens, where it is not that of the spec (set_sides)
    greedy_sides: tuple[int, ...] = ()  # of `free_layout`, those that are drawn by argmax
    closed: bool = True  # whether log_prob is a likelihood of the ids: no, where steps choose what they decide
    reads_also: tuple[str, ...] = ()
    cache_kind: type[KVCache] = KVCache
    drawn_operations: bool = False
    operations_formula: str = (
        "6 matmul parameters x positions + 6 modulation parameters x vectors + 12 width x depth x pairs"
    )
    spec: TokenSpec
    num_classes: int
    label_drop: float
    layout: SequenceLayout
    conditioner: ClassConditioner
    trunk: Trunk
    head: CategoricalHead

    @classmethod
    def accepts(cls, spec: TokenSpec) -> None:
        """Raise ValueError with the reason where tokens of this spec do not fit this family."""

    def adopt(self, tokenizer: Tokenizer) -> None:
        """Take over what a step's input needs of the tokenizer's quantizer. Nothing, unless the family says so."""

    def undecayed(self) -> list[nn.Parameter]:
        """Parameters without weight decay beside those of fewer than two dimensions (vtok/optim.py)."""
        return []

    @property
    def vectors(self) -> int:
        """Condition vectors that modulate the blocks in a pass over a whole image, where anything does."""
        return 1

    # --- the tokenizer's order <-> our own --------------------------------------------------------------------------

    def arrange(self, tokens: Tensor) -> Canvas:
        """The canvas of tokens [B, L] in the tokenizer's order."""
        return Canvas(tokens, self.layout)

    def restore(self, canvas: Canvas) -> Tensor:
        """Tokens in the tokenizer's order, inverse of `arrange`."""
        return canvas.tokens

    def arrange_batch(self, tokens: Tensor, batch: Mapping[str, Any], progress: float) -> Canvas:
        """`arrange` in training, for families whose order is drawn a sample (by batch["key"]) or follows progress.

        tokens: batch["tokens"] or batch["context"]; both must come out in one order.
        """
        return self.arrange(tokens)

    def blank(self, rows: int) -> Canvas:
        """An empty canvas to be written."""
        device, shape = next(self.parameters()).device, (rows, self.layout.length)
        if not self.spec.discrete:
            values = torch.zeros(*shape, self.spec.parts[0].channels, dtype=torch.float32, device=device)
            return Canvas(values, self.layout)
        return Canvas(torch.zeros(shape, dtype=torch.int64, device=device), self.layout)

    def begin(self, noise: SampleNoise) -> Canvas:
        """An empty canvas of the samples of `noise`; a family that draws an order for each sample does it here."""
        return self.blank(len(noise.seeds))

    def hold(self, tokens: Tensor, noise: SampleNoise, temperature: float = 1.0) -> Canvas:
        """The canvas that sampling with `noise` would leave if it drew tokens [B, L] (the tokenizer's order), of which
        token constraints keep a part (vgen/editing.py). Families that write noisy values on the way noise them here, at
        the draw's temperature."""
        return self.arrange(tokens)

    def set_steps(self, steps: int) -> None:
        """Sample in that many steps; only for families whose training does not depend on it (MAR, MaskGIT)."""
        raise ValueError(f"steps={steps}: {type(self).__name__} samples in {self.layout.steps} steps; leave steps away")

    def set_sides(self, sides: Sequence[int]) -> None:
        """Sample on that list of scales; only for families to which any list will do (FlexVAR)."""
        raise ValueError(f"sides={list(sides)}: {type(self).__name__} has no free scales; leave sides away")

    def check_rule(self, rule: DrawRule) -> None:
        """Raise ValueError where a rule asks for what these tokens, or the head that draws them, do not have."""
        if self.spec.discrete:
            rule.require_ids()
        else:
            self.head.check_rule(rule)

    @property
    def sampler(self) -> Callable[..., Canvas]:
        """How a canvas is written (vgen/samplers): step after step, unless a family says otherwise."""
        from vgen.samplers.ancestral import ancestral

        return ancestral

    # --- one step or many -------------------------------------------------------------------------------------------

    def inputs(self, canvas: Canvas, cond: Cond, start: int, stop: int) -> Inputs:
        """What the trunk reads in steps start..stop-1, without prefix and edits of `cond`. This is the paper."""
        raise NotImplementedError

    def inputs_behind(self, cache: KVCache | None, canvas: Canvas, cond: Cond, start: int, stop: int) -> Inputs:
        """`inputs`, for a family whose cache keeps a part of them."""
        return self.inputs(canvas, cond, start, stop)

    def run(self, inputs: Inputs, cache: KVCache | None = None) -> Tensor:
        """Hidden states of the positions that predict, [R, n, D]."""
        h = self.trunk(inputs, cache)
        return h if inputs.read is None else h[:, inputs.read]

    def forward(
        self, canvas: Canvas, cond: Cond, start: int = 0, stop: int | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """Hidden states for the tokens written in steps start..stop-1, [R, n, D]. With start > 0 a cache is needed."""
        stop = canvas.layout.steps if stop is None else stop
        inputs = self.inputs_behind(cache, canvas, cond, start, stop)
        place = predicted(inputs, canvas, start, stop) if cond.at else None
        return self.run(conditioned(inputs, cond, start, place), cache)

    def cache(self, rows: int, *, prefix: int = 0, layout: SequenceLayout | None = None) -> KVCache | None:
        """An empty cache for `rows` rows (streams included) of whole sequences behind `prefix` extra positions.

        layout: of the canvas, where it is not the generator's own (FlexVAR's free scale lists). None where no step
        can be kept. In the weights' dtype (under autocast, in its), but for bfloat16 on the CPU with one position a
        step: float32.
        """
        if not self.caches:
            return None
        weight = self.trunk.blocks[0].attention.qkv.weight
        dtype = torch.get_autocast_dtype(weight.device.type) if _autocast(weight) else weight.dtype
        layout = self.layout if layout is None else layout
        if dtype is torch.bfloat16 and weight.device.type == "cpu" and layout.single:
            dtype = torch.float32  # attention of one query to 256 keys in bfloat16 takes five times as long there
        return self.trunk.cache(
            rows, sum(layout.reads) + prefix, dtype=dtype, device=weight.device, kind=self.cache_kind
        )

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
        """Tokens of step k, [B, n]. cond holds guide.streams * B rows. cache None recomputes the whole prefix."""
        layout = canvas.layout
        (a, b), rows = layout.written(k, k + 1), canvas.repeat(guide.streams)
        if cache is None and self.caches:
            h = self(rows, cond, 0, k + 1)[:, a:b]
        else:
            h = self(rows, cond, k, k + 1, cache)
        tokens = self.head.draw(
            h,
            layout.sizes[k : k + 1],
            guide=guide,
            noise=noise,
            position=torch.arange(a, b, device=h.device) if canvas.order is None else canvas.order[:, a:b],
            rule=rule,
            progress=Progress.of(layout, k),
        )
        if cache is not None:
            cache.commit(layout.reads[k] + cond.ahead(k))
        return tokens

    # --- training and likelihood ------------------------------------------------------------------------------------

    def trained_length(self, key: Tensor, progress: float) -> int:
        """Tokens of an image in the training step of the samples key int64 [B] at this share of training."""
        return self.layout.length

    def operations(self, key: Tensor | None = None) -> float | None:
        """Operations of a training step an image (vtok/acceleration.py), as `operations_formula` says: where they are
        drawn those of the samples key int64 [B], which lies on the host, or without it on average. None where a family
        has no closed form: without a cache, or with a head that does not tell its own."""
        head = getattr(self.head, "operations", None)
        if head is None or not self.caches:
            return None
        layout = self.layout
        return trunk_operations(self.trunk, sum(layout.reads), pairs(layout), self.vectors) + head(layout.length)

    def loss(self, batch: Mapping[str, Any], *, progress: float = 0.0) -> dict[str, Tensor]:
        """Training loss of {"tokens" [B, L], "label" [B], "key" [B]}; "context" replaces the inputs, not the targets;
        "host_key", an array, is "key" where the host need not wait for it.

        progress: share of training done, for families whose task changes. Returns "loss" (mean nats a token) and
        "nats" [B, L], detached.
        """
        canvas = self.arrange_batch(batch["tokens"], batch, progress)
        context = self.arrange_batch(batch["context"], batch, progress) if "context" in batch else canvas
        h = self(context, self.conditioner(batch["label"], self.dropped(batch)))
        nats = self.head.loss(h, canvas.tokens, canvas.layout.sizes)
        return {"loss": nats.mean(), "nats": nats.detach()}

    def moments(self, tokens: Tensor) -> Moments:
        """What `gaussian_loss` knows of the data: mean and variance at each place of training tokens [N, L, C]."""
        return Moments.of(self.arrange(tokens).tokens)

    def gaussian_loss(self, batch: Mapping[str, Any], moments: Moments) -> dict[str, Tensor]:
        """As `loss`, at the same times and noises, of the best Gaussian for each place in the network's place: the
        baseline of families of continuous tokens (vgen/gaussian.py)."""
        raise ValueError(f"{type(self).__name__} has no loss of a Gaussian: its baseline is the histogram of the codes")

    def dropped(self, batch: Mapping[str, Any]) -> Tensor | None:
        """Which labels are hidden, bool [B]: a coin keyed by the sample, the same on any batch and world size."""
        if not self.training or self.label_drop == 0:
            return None
        position = torch.zeros(1, dtype=torch.int64, device=batch["key"].device)
        return SampleNoise(batch["key"]).uniform(position, DROP_STREAM)[:, 0] < self.label_drop

    def log_prob(self, canvas: Canvas, cond: Cond, *, context: Canvas | None = None) -> Tensor:
        """log p of every token given those of earlier steps, float32 [B, L]."""
        h = self(canvas if context is None else context, cond)
        return self.head.log_prob(h, canvas.tokens, canvas.layout.sizes)


def conditioned(inputs: Inputs, cond: Cond, start: int = 0, place: Tensor | None = None) -> Inputs:
    """What the trunk reads from step `start` on, with the edits of `cond` after the family's own and, where it starts,
    behind the prefix. place: what the edits are told of the positions, see Cond; None where there are no edits."""
    at = dict(inputs.at)
    for block, edit in cond.at.items():
        at[block] = placed(edit, place, at.get(block))
    inputs = replace(inputs, at=at)
    return inputs.behind(cond.prefix) if cond.ahead(start) else inputs


def placed(edit: Edit, place: Tensor, before: Callable[[Tensor], Tensor] | None = None) -> Callable[[Tensor], Tensor]:
    """An edit of positions that predict `place`, after `before`."""
    return lambda h: edit(h if before is None else before(h), place)


def predicted(inputs: Inputs, canvas: Canvas, start: int, stop: int) -> Tensor:
    """The token that each position of `inputs` predicts in steps start..stop-1, int64 [l] or [R, l], as in Cond."""
    a, b = canvas.layout.written(start, stop)
    tokens = torch.arange(a, b, device=inputs.x.device) if canvas.order is None else canvas.order[:, a:b]
    if inputs.read is None:
        return tokens
    length = inputs.x.shape[1]
    place = tokens.new_full((*tokens.shape[:-1], length), -1)
    place[..., inputs.read] = tokens
    return place.masked_fill(inputs.read.bincount(minlength=length) > 1, -1)


def require_ids(spec: TokenSpec, family: str, instead: str = "") -> None:
    """ValueError with the reason unless tokens are ids of one vocabulary; instead: what else the message offers."""
    if not spec.discrete:
        raise ValueError(f"{family} predicts ids, but these tokens are continuous; choose a tokenizer with codes")
    if len(spec.parts) != 1:
        raise ValueError(f"{family} has one vocabulary, but these tokens have {len(spec.parts)} parts{instead}")


def _autocast(weight: Tensor) -> bool:
    return weight.dtype == torch.float32 and torch.is_autocast_enabled(weight.device.type)
