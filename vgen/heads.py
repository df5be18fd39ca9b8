"""Heads: from the trunk's hidden state to tokens. Guidance, logit processing and the draw happen inside.

Order of operations, everywhere: guidance, temperature, processors, top-k, top-p, draw. The draw is a Gumbel race on
keyed noise (vtok/noise.py), so equal seeds give equal tokens on any batch; temperature 0 or top_k 1 is the argmax.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vgen.cross_entropy import linear_cross_entropy
from vgen.guidance import Guidance, Progress
from vtok.layers.packed import float32_linear
from vtok.noise import SampleNoise

Processor = Callable[[Tensor, Progress], Tensor]


@dataclass(frozen=True)
class DrawRule:
    """How a categorical token is drawn.

    temperature: 0 = argmax. top_k: 0 = off. top_p: 1 = off; a token is kept while the mass before it is < top_p.
    processors: functions of guided, tempered logits [B, n, V] and the progress. For continuous tokens: temperature
    multiplies the noise; solver_steps and solver replace the model's own (None).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    processors: tuple[Processor, ...] = ()
    solver_steps: int | None = None
    solver: str | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            got = f"{self.temperature}, {self.top_k}, {self.top_p}"
            raise ValueError(f"temperature must be >= 0, top_k >= 0 and 0 < top_p <= 1, got {got}")
        if self.solver_steps is not None and self.solver_steps < 1:
            raise ValueError(f"solver_steps={self.solver_steps}: at least one step is taken; null = the model's own")

    def require_ids(self) -> None:
        """ValueError where it asks for what only continuous tokens have."""
        if self.solver is not None or self.solver_steps is not None:
            raise ValueError("solver and solver_steps are for continuous tokens; these are ids: leave them out")

    def require_continuous(self) -> None:
        """ValueError where it asks for what only ids have."""
        if self.top_k or self.top_p != 1 or self.processors:
            raise ValueError("top_k, top_p and processors are for ids; these tokens are continuous: leave them out")


def survivors(logits: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """The logits that top-k, then top-p, leave, and their ids: both [.., k], best first, dropped ones at -inf."""
    size = logits.shape[-1]
    count = min(top_k, size) if top_k else size
    values, ids = logits.topk(count, dim=-1) if count < size else logits.sort(dim=-1, descending=True)
    if top_p < 1:
        before = values.softmax(-1).cumsum(-1).roll(1, -1)
        before[..., 0] = 0  # the best token always stays
        values = values.masked_fill(before >= top_p, -math.inf)
    return values, ids


def draw_ids(logits: Tensor, rule: DrawRule, noise: SampleNoise, position: Tensor, progress: Progress, stream: int = 0):
    """Ids int64 [B, n] from guided logits float32 [B, n, V]; position int64 [n] or [B, n] keys the noise."""
    rule.require_ids()
    if rule.temperature not in (0, 1):
        logits = logits / rule.temperature
    for process in rule.processors:
        logits = process(logits, progress)
    if rule.temperature == 0 or rule.top_k == 1:
        return logits.argmax(-1)
    if rule.top_k == 0 and rule.top_p == 1:
        ids = torch.arange(logits.shape[-1], device=logits.device)
        return (logits + noise.gumbel(position, ids, stream)).argmax(-1)
    if rule.top_p == 1 and rule.top_k < logits.shape[-1]:  # a race needs no order among the survivors
        kept, ids = logits.topk(rule.top_k, dim=-1, sorted=False)
    else:
        kept, ids = survivors(logits, rule.top_k, rule.top_p)
    winner = (kept + noise.gumbel(position, ids, stream)).argmax(-1, keepdim=True)
    return ids.gather(-1, winner).squeeze(-1)


class CategoricalHead(nn.Module):
    """One softmax over the vocabulary. Logits and losses are float32: bf16 loses ties and small probabilities.

    So is their product in sampling, and under autocast too; beside a trunk in bfloat16, on CUDA or with one position a
    step, of weights kept in float16: logits are then off by 2e-4 of the largest (16,384 codes, width 768, random
    weights), where a product in bfloat16, which rounds them too, would be off by 3e-3. In training on CUDA under
    autocast to bf16 the product takes rounded states and weights and sums in float32 (vgen/cross_entropy.py): between
    VAR's published head, whose product rounds to TF32, and LlamaGen's and FlexVAR's, which round the logits too. In
    float32 it would bound the MFU of training, by arithmetic: for LlamaGen-L on an H200 (its maker states 989 TFLOP/s
    in bf16 and 67 in float32, 14.8 times less) the head's products are 6 x 1024 x 16,384 x 256 = 25.8 of an image's 509
    GFLOP, 5.1 %, so that not more than 1 / (0.949 + 0.051 x 14.8) = 59 % could be reached; now all of it.
    """

    halves = ("linear",)  # what may be kept in float16 for sampling

    def __init__(self, *, dim: int, vocab_size: int, bias: bool = False) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.linear = nn.Linear(dim, vocab_size, bias=bias)

    def logits(self, h: Tensor) -> tuple[Tensor]:
        """A tuple with one entry a factor: float32 [.., V] of h [.., D]."""
        return (float32_linear(self.linear, h),)

    def operations(self, tokens: int) -> float:
        """Operations of a training step of that many tokens (vtok/acceleration.py)."""
        return 6.0 * self.linear.weight.numel() * tokens

    def loss(self, h: Tensor, target: Tensor, sizes: Sequence[int]) -> Tensor:
        """Cross-entropy in nats, float32 [B, n], of h [B, n, D] and ids [B, n]."""
        return linear_cross_entropy(h, self.linear.weight, self.linear.bias, target)

    def log_prob(self, h: Tensor, target: Tensor, sizes: Sequence[int]) -> Tensor:
        """log p(target), float32 [B, n]."""
        return -self.loss(h, target, sizes)

    def draw(
        self,
        h: Tensor,
        sizes: Sequence[int],
        *,
        guide: Guidance,
        noise: SampleNoise,
        position: Tensor,
        rule: DrawRule,
        progress: Progress,
    ) -> Tensor:
        """Ids int64 [B, n] from h [S * B, n, D], stream-major."""
        logits = guide(self.logits(h)[0].unflatten(0, (guide.streams, -1)), progress)
        return draw_ids(logits, rule, noise, position, progress)
