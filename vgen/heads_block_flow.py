"""Block flow head: a small diffusion transformer that flows all tokens of one step together (FlowAR, arXiv 2412.15205).

The trunk's hidden state of a position conditions that position ("spatial adaLN"). Without cross-attention six slots a
position, from time + state, modulate self-attention and feed-forward. With it, self-attention is modulated by the time
alone, tokens then attend to the states of the step, and the feed-forward is modulated by time + state.

Status: unofficial. No code was published; chosen by us: weightless RMSNorm, GEGLU of 8/3 of the width, biases, no rope
(the states carry the place), gate-first slots, and a start at zero of all modulations and of the output. With these the
parameter counts of the third-party table are met within 1 %.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgen.flow_draw import FlowDraw, pinned
from vgen.guidance import Guidance, Progress
from vgen.heads import DrawRule
from vtok.acceleration import linear_parameters, trunk_operations
from vtok.flow import interpolate
from vtok.layers.attention import Attention
from vtok.layers.block import FeedForward, make_norm
from vtok.layers.dit import ConditionAttention
from vtok.layers.time import TimeEmbedding
from vtok.layers.trunk import Inputs, Trunk
from vtok.noise import SampleNoise

TIME_STREAM, NOISE_STREAM = 7301, 7302


class CrossBlock(nn.Module):
    """Self-attention modulated by time, attention to the states, feed-forward modulated by time + state."""

    def __init__(self, *, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (make_norm("rms", dim, 1e-6, affine=False) for _ in range(2))
        self.query_norm, self.state_norm = make_norm("rms", dim, 1e-6), make_norm("rms", dim, 1e-6)
        self.attention = Attention(dim=dim, heads=heads, bias="qkv", out_bias=True)
        self.cross = ConditionAttention(dim=dim, heads=heads, qk_norm="none")
        self.ffn = FeedForward(dim=dim, hidden=int(dim * 8 / 3), kind="geglu", bias=True)
        self.by_time, self.by_place = nn.Linear(dim, 3 * dim), nn.Linear(dim, 3 * dim)

    def keys(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """What the tokens attend to, of state [R, n, W]."""
        return self.cross.keys(self.state_norm(state))

    def forward(self, x: Tensor, time: Tensor, place: Tensor, keys: tuple[Tensor, Tensor]) -> Tensor:
        """x [R, n, W]; time [R or 1, 1, W] and place [R, n, W] after their SiLU."""
        gate, scale, shift = self.by_time(time).chunk(3, dim=-1)
        x = torch.addcmul(x, gate, self.attention(torch.addcmul(shift, self.norm1(x), 1 + scale)))
        x = x + self.cross(self.query_norm(x), keys)
        gate, scale, shift = self.by_place(place).chunk(3, dim=-1)
        return torch.addcmul(x, gate, self.ffn(torch.addcmul(shift, self.norm2(x), 1 + scale)))


class CrossBlocks(nn.Module):
    """Blocks with cross-attention and a modulated final norm."""

    def __init__(self, *, dim: int, depth: int, heads: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(CrossBlock(dim=dim, heads=heads) for _ in range(depth))
        self.norm, self.final = make_norm("rms", dim, 1e-6, affine=False), nn.Linear(dim, 2 * dim)

    def forward(self, x: Tensor, time: Tensor, state: Tensor, keys: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        place = F.silu(time + state)
        for block, seen in zip(self.blocks, keys, strict=True):
            x = block(x, F.silu(time), place, seen)
        scale, shift = self.final(place).chunk(2, dim=-1)
        return torch.addcmul(shift, self.norm(x), 1 + scale)


class BlockFlowHead(nn.Module):
    """dim: of the hidden states; channels: of the tokens; width, depth: of the transformer, with width / 64 heads.

    flow: the solver of sampling.
    """

    def __init__(self, *, dim: int, channels: int, width: int, depth: int, cross: bool, flow: FlowDraw) -> None:
        super().__init__()
        heads = max(1, width // 64)
        self.channels, self.flow, self.cross = channels, flow, cross
        self.time, self.state = TimeEmbedding(dim=width, whole=True), nn.Linear(dim, width)
        self.input, self.output = nn.Linear(channels, width), nn.Linear(width, channels)
        if cross:
            self.net = CrossBlocks(dim=width, depth=depth, heads=heads)
        else:
            self.net = Trunk(
                dim=width,
                depth=depth,
                heads=heads,
                hidden=int(width * 8 / 3),
                norm="rms",
                eps=1e-6,
                ffn="geglu",
                bias="qkv",
                modulation="own",
            )

    def check_rule(self, rule: DrawRule) -> None:
        self.flow.of(rule)

    def close(self) -> None:
        """Zero all modulations and the output: the head starts as the velocity 0."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and name.endswith(
                ("modulation", "final", "by_time", "by_place", "output")
            ):
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, t: Tensor, h: Tensor) -> Tensor:
        """Velocity float32 [R, n, C] of the tokens x [R, n, C] of one step at times t [R], given h [R, n, D]."""
        return self.at(x, t, self.condition(h))

    def condition(self, h: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """(state [R, n, W], what each block attends to) of h [R, n, D]: a solver computes it once for all its steps."""
        with torch.autocast(h.device.type, enabled=False):
            state = self.state(h.float())
            return state, [block.keys(state) for block in self.net.blocks] if self.cross else []

    def at(self, x: Tensor, t: Tensor, condition: tuple[Tensor, list[tuple[Tensor, Tensor]]]) -> Tensor:
        """The same of condition(h), at times t [R], or [1] for all."""
        state, keys = condition
        with torch.autocast(x.device.type, enabled=False):  # float32, as errors add up over a solve
            x, time = self.input(x.float()), self.time(t)[:, None]
            if self.cross:
                return self.output(self.net(x, time, state, keys))
            rank = torch.zeros(x.shape[1], dtype=torch.int64, device=x.device)
            return self.output(self.net(Inputs(x=x, rank=rank, pattern="full", vector=time + state)))

    def operations(self, sizes: Sequence[int]) -> float:
        """Operations of a training step of steps of these sizes (vtok/acceleration.py), whose tokens see each other."""
        positions, seen = sum(sizes), sum(size * size for size in sizes)
        entered = sum(linear_parameters(layer) for layer in (self.input, self.state, self.output)) * positions
        entered += linear_parameters(self.time) * len(sizes)
        if not self.cross:
            return 6.0 * entered + trunk_operations(self.net, positions, seen, positions)
        times = sum(linear_parameters(block.by_time) for block in self.net.blocks)
        dense = (linear_parameters(self.net) - times) * positions + times * len(sizes)
        attended = 2 * 12.0 * self.output.in_features * len(self.net.blocks) * seen  # to the tokens, and to the states
        return 6.0 * (entered + dense) + attended

    def error(self, h: Tensor, x: Tensor, t: Tensor, velocity: Tensor, sizes: Sequence[int]) -> Tensor:
        """Squared error of the velocity, channels averaged, float32 [B, L]; x [B, L, C] has step k at time t [B, K]."""
        parts, a = [], 0
        for k, size in enumerate(sizes):
            got = self(x[:, a : a + size], t[:, k], h[:, a : a + size])
            parts.append((got - velocity[:, a : a + size]).square().mean(-1))
            a += size
        return torch.cat(parts, dim=1)

    def loss(self, h: Tensor, target: Tensor, sizes: Sequence[int], *, noise: SampleNoise) -> Tensor:
        """The same for targets [B, L, C], at one uniform time a sample and step, keyed by `noise`."""
        t, x, velocity, _ = self.noised(target, sizes, noise)
        return self.error(h, x, t, velocity, sizes)

    def noised(self, target: Tensor, sizes: Sequence[int], noise: SampleNoise) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(t [B, K], x and its velocity [B, L, C], the time of every token [B, L]) that training shows the head."""
        device = target.device
        t = noise.uniform(torch.arange(len(sizes), device=device), TIME_STREAM)
        error = noise.normal(torch.arange(sum(sizes), device=device), self.channels, NOISE_STREAM)
        each = at_tokens(t, sizes)
        return t, interpolate(target, error, each), error - target, each

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
        start: Tensor | None = None,
        span: tuple[float, float] = (0.0, 1.0),
        known: Tensor | None = None,
        given: Tensor | None = None,
    ) -> Tensor:
        """Tokens float32 [B, n, C] of one step from h [S * B, n, D], stream-major.

        start: the tokens at the later time of `span`, where the path does not begin at noise (E-CAR). known: which
        tokens, bool [B, n], are those of `given` [B, n, C]: the flow of the others sees them.
        """
        low, high = span
        state, keys = self.condition(h)

        def velocity(x: Tensor, t: float, streams: int) -> Tensor:
            count, time = streams * len(x), x.new_full((1,), low + t * (high - low))
            seen = [(k[:count], v[:count]) for k, v in keys]
            return self.at(x.repeat(streams, 1, 1), time, (state[:count], seen))

        if known is not None:
            begin = noise.normal(position, self.channels) * rule.temperature if start is None else start
            velocity = pinned(velocity, known, given, begin)
        return self.flow(
            velocity,
            self.channels,
            guide=guide,
            noise=noise,
            position=position,
            rule=rule,
            progress=progress,
            start=start,
            span=span,
        )

    def log_prob(self, h: Tensor, target: Tensor, sizes: Sequence[int]) -> Tensor:
        raise ValueError("BlockFlowHead has no likelihood in closed form; compare its loss instead")


def at_tokens(values: Tensor, sizes: Sequence[int]) -> Tensor:
    """Values [B, K] of the steps, at every token of theirs: [B, L]. An index made on the host would be waited for."""
    return torch.cat([values[:, k : k + 1].expand(-1, size) for k, size in enumerate(sizes)], dim=1)
