"""MAR: masked autoregression over continuous tokens with a diffusion head (Li et al., arXiv 2406.11838).

An encoder reads the tokens decided so far behind 64 copies of the class embedding; a decoder reads what it gives, with
a mask token at every open cell; the head draws the tokens of the next set, each given its decoder state. The sets are
cut from a random order, one a sample. Attention is bidirectional everywhere, so a step changes what earlier tokens see
and nothing can be cached. Differs from the original: in training every sample has a mask ratio of its own (there, one a
batch), so that it does not depend on the batch; the encoder is padded to the most tokens that can be kept, on the CPU
to the most that are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from statistics import NormalDist
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vgen.conditioning import ClassConditioner, Cond, Edit
from vgen.gaussian import Moments
from vgen.generator import Canvas, Generator, conditioned, placed
from vgen.heads_continuous import Network
from vgen.heads_diffusion import DiffusionHead
from vgen.heads_token_flow import FlowHead
from vgen.masking import masked_layout, random_order, ratio_uniform
from vtok.acceleration import trunk_operations
from vtok.layers.cache import KVCache
from vtok.layers.trunk import Trunk, check_edits
from vtok.layers.vit import together
from vtok.noise import SampleNoise, sample_seeds
from vtok.tokenizer import TokenSpec

DRAWS = 1000  # samples, for a mean
RATIO_MEAN, RATIO_STD = 1.0, 0.25  # of the normal whose part in [mask_ratio, 1] is the share hidden in training


class MAR(Generator):
    """Published: B 12 + 12 x 768, 12 heads, head 6 x 1024; L 16 + 16 x 1024, 16 heads, head 8 x 1280; H 20 + 20 x 1280,
    16 heads, head 12 x 1536; 256 tokens of 16 channels.

    spec: continuous tokens of one part. depth, width, heads: of the encoder, and of the decoder unless decoder_* say
    otherwise. steps: sets that sampling decides. buffer: copies of the class embedding before the tokens. mask_ratio:
    smallest share hidden in training. head: "diffusion" or "flow", of head_depth x head_width, walked in solver_steps;
    clip: of the diffusion head.
    dropout: after attention, and on and after the feed-forward's hidden values.
    """

    caches = False
    drawn_operations = True
    operations_formula = (
        "6 (encoder parameters x (buffer + shown) + decoder parameters x (buffer + tokens) + head parameters x repeats "
        "x hidden, once those that take the state in) + 12 width x depth x pairs, on average"
    )
    head: DiffusionHead | FlowHead

    def __init__(
        self,
        spec: TokenSpec | Mapping[str, Any],
        num_classes: int,
        *,
        depth: int,
        width: int,
        heads: int,
        decoder_depth: int | None = None,
        decoder_width: int | None = None,
        decoder_heads: int | None = None,
        steps: int = 64,
        buffer: int = 64,
        mask_ratio: float = 0.7,
        head: Literal["diffusion", "flow"] = "diffusion",
        head_depth: int = 6,
        head_width: int = 1024,
        solver_steps: int = 100,
        repeats: int = 4,
        clip: float | None = None,
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
        label_drop: float = 0.1,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        spec = TokenSpec.from_config(spec)
        self.accepts(spec)
        if not 0 < mask_ratio < 1 or buffer < 1:
            raise ValueError(f"mask_ratio={mask_ratio} must lie between 0 and 1, buffer={buffer} be at least 1")
        if head not in ("diffusion", "flow"):
            raise ValueError(f"head={head!r}: choose diffusion or flow")
        if head == "flow" and clip is not None:
            raise ValueError(f"clip={clip} belongs to head=diffusion; leave it away")
        length, channels, wide = spec.layout.length, spec.parts[0].channels, decoder_width or width
        self.spec, self.num_classes, self.label_drop = spec, num_classes, label_drop
        self.layout = masked_layout(spec.layout, steps, "cosine")
        self.buffer, self.mask_ratio = buffer, mask_ratio
        self.conditioner = ClassConditioner(num_classes=num_classes, dim=width)
        self.embedding, self.embedding_norm = nn.Linear(channels, width), nn.LayerNorm(width, eps=1e-6)
        self.decoder_embedding = nn.Linear(width, wide)
        self.mask_token = nn.Parameter(torch.empty(1, 1, wide))
        self.encoder_position = nn.Parameter(torch.empty(buffer + length, width))
        self.decoder_position = nn.Parameter(torch.empty(buffer + length, wide))
        self.head_position = nn.Parameter(torch.empty(length, wide))
        common: dict[str, Any] = {"norm": "layer", "eps": 1e-6, "ffn": "gelu", "bias": "qkv", "dropout": dropout}
        common |= {"ffn_dropout": dropout, "attention_dropout": attention_dropout, "checkpointing": checkpointing}
        encoder = Trunk(dim=width, depth=depth, heads=heads, hidden=4 * width, **common)
        decoder = Trunk(dim=wide, depth=decoder_depth or depth, heads=decoder_heads or heads, hidden=4 * wide, **common)
        self.trunk = nn.ModuleDict({"encoder": encoder, "decoder": decoder})
        sizes = {"dim": wide, "channels": channels, "width": head_width, "depth": head_depth}
        sizes |= {"solver_steps": solver_steps, "repeats": repeats}
        self.head = DiffusionHead(**sizes, clip=clip) if head == "diffusion" else FlowHead(**sizes)
        self._init()

    @classmethod
    def accepts(cls, spec: TokenSpec) -> None:
        if any(part.vocab_size is not None for part in spec.parts):
            raise ValueError("MAR draws continuous tokens, but these are ids; choose a tokenizer with a KL bottleneck")
        if len(spec.parts) != 1:
            raise ValueError(f"MAR has tokens of one kind, but these have {len(spec.parts)} parts")

    def _init(self) -> None:
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and not name.startswith("head."):  # the head has its own start
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        tables = (self.encoder_position, self.decoder_position, self.head_position)
        for table in (self.mask_token, self.conditioner.table.weight, *tables):
            nn.init.normal_(table, std=0.02)

    def undecayed(self) -> list[nn.Parameter]:
        """The whole head, as published."""
        return list(self.head.parameters())

    # --- a canvas holds tokens in the sample's own order ------------------------------------------------------------

    def arrange(self, tokens: Tensor, order: Tensor | None = None) -> Canvas:
        """The canvas of latents [B, L, C] in the order of cells `order` int64 [B, L] (None: as they are)."""
        if order is None:
            return Canvas(tokens, self.layout)
        return Canvas(tokens.gather(1, order.unsqueeze(-1).expand_as(tokens)), self.layout, order)

    def restore(self, canvas: Canvas) -> Tensor:
        if canvas.order is None:
            return canvas.tokens
        return torch.empty_like(canvas.tokens).scatter_(
            1, canvas.order.unsqueeze(-1).expand_as(canvas.tokens), canvas.tokens
        )

    def set_steps(self, steps: int) -> None:
        self.layout = masked_layout(self.spec.layout, steps, "cosine")

    def begin(self, noise: SampleNoise) -> Canvas:
        return replace(self.blank(len(noise.seeds)), order=random_order(noise, self.layout.length))

    def hold(self, tokens: Tensor, noise: SampleNoise, temperature: float = 1.0) -> Canvas:
        return self.arrange(tokens, self.begin(noise).order)

    # --- hidden states ----------------------------------------------------------------------------------------------

    def forward(
        self, canvas: Canvas, cond: Cond, start: int = 0, stop: int | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """Hidden states [R, n, D] of the tokens that steps start..stop-1 write, all given those before `start`.

        Tokens that the canvas says are known are given too, wherever in the order they stand.
        """
        a, b = canvas.layout.written(start, canvas.layout.steps if stop is None else stop)
        order = canvas.order
        if order is None:
            order = torch.arange(canvas.layout.length, device=canvas.tokens.device).expand(len(canvas.tokens), -1)
        if canvas.known is None:
            h = self.states(canvas.tokens[:, :a], order[:, :a], cond)
        else:
            given = canvas.known | (torch.arange(canvas.layout.length, device=order.device) < a)
            count = given.sum(1)
            places = (~given).long().argsort(dim=1, stable=True)[:, : int(count.max())]  # the given ones first
            tokens = canvas.tokens.gather(1, places.unsqueeze(-1).expand(-1, -1, canvas.tokens.shape[-1]))
            h = self.states(tokens, order.gather(1, places), cond, count)
        return h.gather(1, order[:, a:b, None].expand(-1, -1, h.shape[-1]))

    def states(self, tokens: Tensor, cells: Tensor, cond: Cond, count: Tensor | None = None) -> Tensor:
        """Hidden states of all cells, [R, L, D], given latents [R, m, C] at int64 `cells` [R, m].

        count: int64 [R], how many of them (the first ones) are there at all, where it differs between rows.
        """
        there = None if count is None else torch.arange(tokens.shape[1], device=tokens.device) < count[:, None]
        return self.decode(self.encode(tokens, cells, cond, there), cells, there, cond.at)

    def encode(self, tokens: Tensor, cells: Tensor, cond: Cond, there: Tensor | None = None) -> Tensor:
        """Encoder output [R, P + buffer + m, D], P of a prefix; there: bool [R, m], which tokens are no padding."""
        buffer, table = self.buffer, self.encoder_position
        x = self.embedding(tokens.to(self.embedding.weight.dtype)) + table[buffer:][cells]
        x = self.embedding_norm(torch.cat([cond.start + table[:buffer], x], dim=1))
        mask = None
        if there is not None:
            mask = torch.cat([there.new_ones(len(there), buffer), there], dim=1)[:, None, None]
        depth = len(self.trunk["encoder"].blocks)
        check_edits(cond.at, depth + len(self.trunk["decoder"].blocks))
        at = {block: edit for block, edit in cond.at.items() if block < depth}
        nothing = cells.new_full(x.shape[1:2], -1)  # the encoder reads decided tokens alone
        return self.trunk["encoder"](conditioned(together(x, mask=mask), replace(cond, at=at), place=nothing))

    def decode(
        self, encoded: Tensor, cells: Tensor, there: Tensor | None = None, at: Mapping[int, Edit] | None = None
    ) -> Tensor:
        """Hidden states [R, L, D] of an encoder output whose tokens lie at `cells`; at: see Cond."""
        x = self.decoder_embedding(encoded.to(self.decoder_embedding.weight.dtype))
        ahead = x.shape[1] - self.buffer - cells.shape[1]  # a prefix
        prefix, slots, given = x.split([ahead, self.buffer, cells.shape[1]], dim=1)
        if there is not None:
            given = torch.where(there.unsqueeze(-1), given, self.mask_token.to(given.dtype))
        filled = self.mask_token.to(x.dtype).expand(len(x), len(self.head_position), -1)
        filled = filled.scatter(1, cells.unsqueeze(-1).expand_as(given), given)
        depth, edits = len(self.trunk["encoder"].blocks), at or {}
        inputs = together(torch.cat([slots, filled], dim=1) + self.decoder_position)
        place = torch.arange(-self.buffer, len(self.head_position), device=x.device).clamp(min=-1)
        at = {block - depth: placed(edit, place) for block, edit in edits.items() if block >= depth}
        inputs = replace(inputs, at=at)
        x = self.trunk["decoder"](inputs.behind(prefix) if ahead else inputs)
        return x[:, ahead + self.buffer :] + self.head_position

    # --- training ---------------------------------------------------------------------------------------------------

    def hidden_count(self, noise: SampleNoise) -> Tensor:
        """How many tokens of each sample training hides, int64 [B]: ceil(L r), r from the truncated normal."""
        below, above = (NormalDist(RATIO_MEAN, RATIO_STD).cdf(end) for end in (self.mask_ratio, 1.0))
        ratio = RATIO_MEAN + RATIO_STD * torch.special.ndtri(below + ratio_uniform(noise) * (above - below))
        length = self.layout.length
        return (length * ratio).ceil().long().clamp(length - self.most_kept, length)

    @property
    def most_kept(self) -> int:
        """The most tokens that training leaves to be seen."""
        return self.layout.length - math.ceil(self.layout.length * self.mask_ratio)

    def operations(self, key: Tensor | None = None) -> float:
        """The encoder reads the tokens that a sample shows, the decoder all, and the head those it hides, `repeats`
        times each; padding is no work."""
        key = sample_seeds(0, 0, DRAWS) if key is None else key
        length, encoder, decoder = self.layout.length, self.trunk["encoder"], self.trunk["decoder"]
        hidden = self.hidden_count(SampleNoise(key)).double()
        shown, all_places = length - hidden, self.buffer + length
        read = self.buffer + shown
        embedded = self.embedding.weight.numel() * shown + self.decoder_embedding.weight.numel() * read
        drawn = 6.0 * embedded + self.head.operations(hidden) + trunk_operations(encoder, read, read * read)
        return float(drawn.mean()) + trunk_operations(decoder, all_places, all_places * all_places)

    def loss(self, batch: Mapping[str, Any], *, progress: float = 0.0) -> dict[str, Tensor]:
        """Head loss averaged over the hidden tokens of each sample. "nats" [B, 1] is it a sample (not nats here)."""
        noise = SampleNoise(batch["key"])
        order = random_order(noise, self.layout.length)
        kept = self.layout.length - self.hidden_count(noise)
        least, most = self.shown(kept)
        context = self.arrange(batch.get("context", batch["tokens"]), order)
        cond = self.conditioner(batch["label"], self.dropped(batch))
        h = self.states(context.tokens[:, :most], order[:, :most], cond, kept)
        return self.over_hidden(h, batch["tokens"], noise, order[:, least:], kept - least)

    def shown(self, kept: Tensor) -> tuple[int, int]:
        """Bounds of how many tokens of a sample are seen, int64 [B]: those of the batch on the CPU, elsewhere of all
        batches, so that shapes stay and the device is not waited for."""
        return (int(kept.min()), int(kept.max())) if kept.device.type == "cpu" else (0, self.most_kept)

    def gaussian_loss(self, batch: Mapping[str, Any], moments: Moments) -> dict[str, Tensor]:
        noise, tokens = SampleNoise(batch["key"]), batch["tokens"]
        kept, order = self.layout.length - self.hidden_count(noise), random_order(noise, self.layout.length)
        return self.over_hidden(moments.hidden(tokens), tokens, noise, order, kept, self.head.gaussian())

    def over_hidden(
        self, h: Tensor, tokens: Tensor, noise: SampleNoise, cells: Tensor, kept: Tensor, network: Network | None = None
    ) -> dict[str, Tensor]:
        """The loss of the cells int64 [B, n] but for the first `kept` int64 [B] of each sample, which are seen."""
        h, tokens = (x.gather(1, cells.unsqueeze(-1).expand(-1, -1, x.shape[-1])) for x in (h, tokens))
        losses = self.head.loss(h, tokens, self.layout.sizes, noise=noise, position=cells, network=network)
        hidden = (torch.arange(cells.shape[1], device=cells.device) >= kept[:, None]).to(losses.dtype)
        each = (losses * hidden).sum(1) / (cells.shape[1] - kept)
        return {"loss": each.mean(), "nats": each.detach().unsqueeze(1)}
