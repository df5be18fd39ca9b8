"""D-AR's sequential diffusion tokenizer: tokens in the order in which a pixel flow needs them.

Gao and Shou, arXiv 2505.23660, section 3; code showlab/D-AR. A transformer reads patches and causal queries; the
quantized queries pass a causal transformer and condition a flow in pixel space, one group of tokens for each span of
flow time, coarse to fine. So any prefix of whole groups decodes to a preview: the walk stops there and steps straight
to the data. Published size: 256 tokens in 8 groups, V = 16384, C = 8. Time counts from data (0) to noise (1) here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok import flow
from vtok.config import describe
from vtok.layers.flex import sincos
from vtok.layers.pixel_flow import EPS, PixelFlow, grid_rope, init_std, plain_norm
from vtok.layers.trunk import Inputs, Trunk
from vtok.layers.vit import PatchEmbed, initialise
from vtok.layout import SequenceLayout, behind
from vtok.noise import SampleNoise, noise_of
from vtok.quantize.vq import VQ
from vtok.tokenizer import Part, Quantizer, Reconstruction, Tokenizer, TokenSpec

TIME, START = 41, 42  # streams of the keyed noise
Preview = Callable[[int, Tensor], None]


class DARTokenizer(Tokenizer):
    """image_size: trained side. quantizer: pointwise; of a VQ, only tokens that the drawn time uses count in the loss.

    patch, dim, depth, decoder_depth, heads: of the encoder and of the causal decoder of tokens. tokens: N. groups:
    spans of flow time, each with N / groups tokens. query_rank: of the factorised query table; null learns it whole.
    max_tokens: rows of the query and position tables. flow_*: of the pixel flow. data_std: images are multiplied by it
    in the flow. time_shift: see vtok.flow.times. repa_block, repa_width, repa_side: see PixelFlow; the tapped states
    come out as Reconstruction.features["repa"] [B, repa_side^2, repa_width]. gate: start value of the gates on the
    residual branches of encoder and token decoder; at the published 0 all images have the same tokens at first, from
    which a small codebook may not recover. solver: of `decode`, unless told; the published one extrapolates from slope
    to slope, which overshoots in two steps. positions: "sincos" adds fixed ones to the patches of encoder and flow,
    beside the paper's "rope". init: "paper", or "open" for trainings of minutes: queries and positions of tokens of
    deviation 1, a flow whose blocks all pass on from the first step, and sharper attention on both sides.

    Training draws a time for every sample; Reconstruction.losses["flow"] is the squared error of the velocity over
    data_std^2, and Reconstruction.images the one-step estimate of the data, which LPIPS judges in the paper.
    """

    prefixes = True
    decoder_draws = True

    def __init__(
        self,
        *,
        image_size: int,
        quantizer: Quantizer,
        patch: int = 16,
        dim: int = 768,
        depth: int = 8,
        decoder_depth: int = 8,
        heads: int = 12,
        tokens: int = 256,
        groups: int = 8,
        query_rank: int | None = 8,
        max_tokens: int = 1024,
        flow_patch: int = 8,
        flow_dim: int = 768,
        flow_depth: int = 12,
        flow_heads: int = 12,
        data_std: float = 0.6,
        time_shift: float = 2.0,
        repa_block: int | None = None,
        repa_width: int = 768,
        repa_side: int = 16,
        gate: float = 0.0,
        solver: flow.Solver = "ab2_uniform",
        positions: Literal["rope", "sincos"] = "rope",
        init: Literal["paper", "open"] = "paper",
    ) -> None:
        super().__init__()
        if solver not in get_args(flow.Solver):
            raise ValueError(f"solver={solver!r}: choose {', '.join(get_args(flow.Solver))}")
        if positions not in ("rope", "sincos"):
            raise ValueError(f"positions={positions!r}: choose rope or sincos")
        if init not in ("paper", "open"):
            raise ValueError(f"init={init!r}: choose paper or open")
        if tokens % groups or tokens > max_tokens:
            raise ValueError(f"tokens={tokens} must be a multiple of groups={groups} and at most {max_tokens=}")
        self.tokens, self.groups, self.window, self.heads = tokens, groups, tokens // groups, heads
        self.data_std, self.time_shift, self.solver = data_std, time_shift, solver
        self.fixed = positions == "sincos"
        shape = dict(dim=dim, heads=heads, hidden=4 * dim, norm="layer", eps=EPS, ffn="silu", bias="qkv")
        shape |= dict(qk_norm="layer", layer_scale=gate, final_norm=False)
        self.patches = PatchEmbed(dim=dim, patch=patch)
        self.queries = nn.Parameter(torch.randn(max_tokens, query_rank or dim))
        self.query_out = nn.Linear(query_rank, dim) if query_rank else nn.Identity()
        self.encoder = Trunk(depth=depth, **shape)
        self.project_in = nn.Linear(dim, quantizer.width, bias=False)
        self.quantizer = quantizer
        self.project_out = nn.Linear(quantizer.channels, dim, bias=False)
        self.places = nn.Parameter(0.02 * torch.randn(max_tokens, dim))
        self.decoder = Trunk(depth=decoder_depth, **shape)
        for part in (self.encoder, self.decoder):
            initialise(part, init_std(dim), width=dim)
        self.flow = PixelFlow(
            dim=flow_dim,
            depth=flow_depth,
            heads=flow_heads,
            patch=flow_patch,
            condition=dim,
            tap=repa_block,
            tap_width=repa_width,
            tap_side=repa_side,
            fixed=self.fixed,
        )
        if not query_rank:
            nn.init.normal_(self.queries, std=0.02)
        if init == "open":
            nn.init.normal_(self.queries)
            nn.init.normal_(self.places)
            self.flow.open()
            for block in self.encoder.blocks:
                nn.init.constant_(block.attention.q_norm.weight, 3.0)
        self.stride = math.lcm(patch, flow_patch)
        self.spec = self.spec_for(image_size)

    def spec_for(self, size: int) -> TokenSpec:
        if size < self.stride or size % self.stride:
            raise ValueError(f"image_size={size} must be a multiple of {self.stride}, of patch and of flow_patch")
        part = Part(self.tokens, self.quantizer.vocab_size, self.quantizer.channels)
        return TokenSpec(SequenceLayout.line(self.tokens), (part,), size, describe(self.quantizer))

    def features(self, images: Tensor) -> Tensor:
        """[B, N, C]: patches see patches, queries see patches and earlier queries; rope turns the patches only."""
        self.check_images(images)
        height, width = (side // self.patches.patch for side in images.shape[2:])
        patches = self.patches(images)
        if self.fixed:
            patches = patches + sincos(height, width, self.encoder.dim, images.device).to(patches.dtype)
        patches = plain_norm(patches)
        queries = self.query_out(self.queries[: self.tokens]).expand(len(images), -1, -1)
        cos, sin = grid_rope(height, width, self.encoder.dim // self.heads, images.device)
        cos, sin = (F.pad(table, (0, 0, 0, self.tokens), value=float(one)) for table, one in ((cos, 1), (sin, 0)))
        rank = torch.arange(self.tokens, device=images.device) + 1
        rank = torch.cat([rank.new_zeros(height * width), rank])
        pattern = behind("causal", self.tokens, height * width)
        h = self.encoder(Inputs(torch.cat([patches, queries], 1), rank, pattern, (cos, sin, None)))
        return self.project_in(plain_norm(h[:, height * width :]))

    def condition(self, z: Tensor) -> Tensor:
        """What the flow reads, [B, n, D], of the first n quantized tokens z [B, n, C]."""
        x = self.project_out(z.to(self.project_out.weight.dtype)) + self.places[: z.shape[1]]
        rank = torch.arange(z.shape[1], device=z.device)
        return plain_norm(self.decoder(Inputs(x, rank, "causal")))

    def group_of(self, uniform: Tensor) -> Tensor:
        """Group that conditions the (unshifted) time u in [0, 1], int64: floor(G (1 - u) + 1/2), at most the last."""
        return ((1 - uniform) * self.groups + 0.5).floor().long().clamp(max=self.groups - 1)

    def velocity(self, x: Tensor, t: Tensor, condition: Tensor) -> tuple[Tensor, Tensor | None]:
        """See PixelFlow; x is scaled by data_std, condition is one group's tokens."""
        return self.flow(x, t, condition)

    def flow_pass(
        self, images: Tensor, uniform: Tensor, start: Tensor, condition: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(flow loss, one-step estimate of the images, tapped states) at unshifted times [B] with noise `start`."""
        t = flow.shifted(uniform, self.time_shift)
        data = self.data_std * images.float()
        x = flow.interpolate(data, start, t)
        velocity, tapped = self.velocity(x, t, condition)
        loss = (velocity - (start - data)).square().mean() / self.data_std**2
        return loss, flow.data_of(x, velocity, t) / self.data_std, tapped

    def forward(self, images: Tensor, *, key: Tensor | None = None, progress: float = 0.0) -> Reconstruction:
        noise = noise_of(key, images)
        uniform = noise.uniform(torch.zeros(1, dtype=torch.int64, device=images.device), TIME).squeeze(1)
        first = self.window * self.group_of(uniform)
        index = first[:, None] + torch.arange(self.window, device=images.device)
        used = torch.arange(self.tokens, device=images.device) <= index[:, -1:]
        z = self.features(images)
        found = self.quantizer(z, weight=used.float()) if isinstance(self.quantizer, VQ) else self.quantize(z, key)
        condition = self.condition(found.z)
        condition = condition.gather(1, index[..., None].expand(-1, -1, condition.shape[-1]))
        start = flow.normal_map(noise, 3, *images.shape[2:], stream=START)
        loss, estimate, tapped = self.flow_pass(images, uniform, start, condition)
        features = {} if tapped is None else {"repa": tapped}
        return Reconstruction(estimate, found.ids, found.loss | {"flow": loss}, found.stats, features)

    @torch.no_grad()
    def decode(
        self,
        tokens: Tensor,
        *,
        keep: int | Tensor | None = None,
        size: int | None = None,
        noise: SampleNoise | None = None,
        steps: int | None = None,
        solver: flow.Solver | None = None,
        on_step: Preview | None = None,
    ) -> Tensor:
        """As Tokenizer.decode, walking the flow in `steps` steps (null: one a group) from noise keyed by `noise`.

        keep: the walk ends with the group of token keep - 1, with a step straight to the data. noise: None starts every
        image from one fixed noise. on_step(i, images): preview after step i, what a walk that ends there would give.
        """
        spec = self.spec if size is None else self.spec_for(size)
        spec.check(tokens)
        if isinstance(keep, Tensor):
            noise = self.default_noise(tokens) if noise is None else noise
            images = torch.empty(len(tokens), 3, spec.image_size, spec.image_size, device=tokens.device)
            for value in keep.unique().tolist():
                rows = (keep == value).nonzero().squeeze(1)
                options = dict(size=size, noise=noise.rows(rows), steps=steps, solver=solver)
                images[rows] = self.decode(tokens[rows], keep=value, **options)
            return images
        if keep is not None and not 1 <= keep <= self.tokens:
            raise ValueError(f"keep={keep}: an image has 1..{self.tokens} tokens")
        z = self.quantizer.assemble(self.embed(tokens), keep)
        return self.pixels(z, size=size, noise=noise, steps=steps, solver=solver, on_step=on_step)

    def pixels(
        self,
        z: Tensor,
        *,
        size: int | None = None,
        noise: SampleNoise | None = None,
        steps: int | None = None,
        solver: flow.Solver | None = None,
        on_step: Preview | None = None,
    ) -> Tensor:
        """Images of the first tokens z [B, n, C], n <= N; see `decode`."""
        size = size or self.spec.image_size
        noise = self.default_noise(z) if noise is None else noise
        start = flow.normal_map(noise, 3, size, size, stream=START)
        return self.walk(self.condition(z), start, steps=steps, solver=solver, on_step=on_step)

    def walk(
        self,
        condition: Tensor,
        start: Tensor,
        *,
        steps: int | None = None,
        solver: flow.Solver | None = None,
        on_step: Preview | None = None,
    ) -> Tensor:
        """Images [B, 3, H, W] from noise `start` with conditions [B, n, D] of the first n tokens."""
        steps = steps or self.groups
        uniform = torch.tensor([1 - i / steps for i in range(steps)])
        groups = [g for g in self.group_of(uniform).tolist() if g * self.window < condition.shape[1]]
        grid = [*flow.times(steps, self.time_shift)[: len(groups)], 0.0]
        group = dict(zip(grid, groups))
        before = [start]

        def velocity(x: Tensor, t: float) -> Tensor:
            first = self.window * group[t]
            return self.velocity(x, x.new_full((len(x),), t), condition[:, first : first + self.window])[0]

        def preview(i: int, x: Tensor, slope: Tensor) -> None:
            used = (x - before[0]) / (grid[i + 1] - grid[i])
            before[0] = x
            on_step(i, (x - grid[i + 1] * used) / self.data_std)

        x = flow.solve(velocity, start, grid, solver=solver or self.solver, on_step=preview if on_step else None)
        return x / self.data_std

    @staticmethod
    def default_noise(rows: Tensor) -> SampleNoise:
        return SampleNoise(torch.zeros(len(rows), dtype=torch.int64, device=rows.device))

    @property
    def last_layer(self) -> nn.Parameter:
        return self.flow.out.weight
