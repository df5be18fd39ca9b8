"""FlexTok: an ordered sequence of registers, any prefix of which a rectified-flow decoder turns into an image.

Bachmann et al., arXiv 2502.13967; code apple/ml-flextok. Patches of the latents of a frozen VAE and learned registers
pass a transformer, in which registers are causal and see all patches; FSQ makes 64,000 codes of each register. Nested
dropout replaces registers behind a random prefix by a learned vector; the decoder denoises the latents' patches next to
the registers, with modulations of their own for either. Published: 256 registers, levels 8, 8, 8, 5, 5, 5.

No reference available for the whole: its training code and model configurations are not public with the code. From the
code are layers, norms, mask, time embedding, nested dropout, flow and guidance; how the parts are joined follows the
paper. Without a VAE the flow works on pixels, which small images allow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from vtok import flow
from vtok.apg import guided
from vtok.config import describe
from vtok.layers.cnn import from_map, to_map
from vtok.layers.dit import ModulatedNorm, repa_head
from vtok.layers.flex import flex_trunk, sincos
from vtok.layers.nested import Distribution, check_keep, keep_counts, keep_sums, replace_dropped
from vtok.layers.resolution import resize_table
from vtok.layers.time import TimeEmbedding
from vtok.layers.trunk import Inputs
from vtok.layers.vit import PatchEmbed, unpatchify
from vtok.layout import SequenceLayout, behind
from vtok.noise import SampleNoise, noise_of
from vtok.tokenizer import Part, Quantizer, Reconstruction, Tokenizer, TokenSpec

HEAD = 64  # channels of a head
POSTERIOR, KEEP, DROP, TIME, START = 60, 61, 62, 63, 64  # streams of the keyed noise
FREQUENCIES, LONGEST = 256, 256.0  # of the time embedding


class FlexTokTokenizer(Tokenizer):
    """image_size: trained side. quantizer: pointwise, FSQ in the paper. vae: a tokenizer with continuous tokens on a
    raster, frozen; null works on pixels.

    patch: side of the patches, in latents. dim, depth: of the encoder; decoder_dim, decoder_depth: of the decoder;
    heads have `head` channels. tokens: N registers. nested: distribution of the prefix that a sample keeps in training,
    see vtok.layers.nested. null_drop: share of samples that train without any register, for guidance. positions: of
    the patches, fixed "sincos" or a "learned" table of grid x grid. repa_block: index of the decoder block whose input
    is put through a network to repa_width channels, as Reconstruction.features["repa"] [B, patches, repa_width]; null
    builds none. steps, guidance, project: what `decode` does unless told; project: adaptive projected guidance.
    time: mean and deviation of the normal whose sigmoid is the time that training draws; a mean above 0 trains more on
    noise, where the picture has to come from the registers. init: "paper", or "open" for trainings of minutes: learned
    vectors of deviation 1, modulation that passes every block on from the first step, and registers in the middle of
    FSQ's range; from the paper's start they all say the same and a short training never tells them apart.

    Reconstruction.losses["flow"] is the squared error of the velocity; Reconstruction.images the one-step estimate,
    which a training pass with a VAE leaves out: no gradient comes through its decoder.
    """

    prefixes = True
    decoder_draws = True

    def __init__(
        self,
        *,
        image_size: int,
        quantizer: Quantizer,
        vae: Tokenizer | None = None,
        patch: int = 2,
        dim: int = 768,
        depth: int = 12,
        decoder_dim: int = 768,
        decoder_depth: int = 12,
        head: int = HEAD,
        tokens: int = 256,
        nested: Distribution = "power_of_two",
        null_drop: float = 0.1,
        positions: Literal["sincos", "learned"] = "sincos",
        grid: int = 16,
        repa_block: int | None = None,
        repa_width: int = 1024,
        steps: int = 25,
        guidance: float = 1.0,
        project: bool = True,
        time: Sequence[float] = (0.0, 1.0),
        init: Literal["paper", "open"] = "paper",
    ) -> None:
        super().__init__()
        if init not in ("paper", "open"):
            raise ValueError(f"init={init!r}: choose paper or open")
        if len(time) != 2 or time[1] <= 0:
            raise ValueError(f"time={list(time)} must be a mean and a deviation above 0")
        if positions not in ("sincos", "learned"):
            raise ValueError(f"positions={positions!r}: choose sincos or learned")
        if repa_block is not None and not 0 <= repa_block < decoder_depth:
            raise ValueError(f"repa_block={repa_block} is none of the {decoder_depth} blocks of decoder_depth")
        if vae is not None and vae.spec.discrete:
            raise ValueError(f"vae must have continuous tokens, {type(vae).__name__} has ids")
        if quantizer.vocab_size is None:
            raise ValueError(
                f"registers are ids: choose FSQ or another discrete quantizer, not {type(quantizer).__name__}"
            )
        self.register_buffer("keep_sums", keep_sums(nested, tokens), persistent=False)
        self.vae = None if vae is None else vae.requires_grad_(False).eval()
        self.channels = 3 if vae is None else vae.spec.parts[0].channels
        self.tokens, self.patch, self.nested, self.null_drop = tokens, patch, nested, null_drop
        self.steps, self.guidance, self.project = steps, guidance, project
        self.repa_block, self.time_normal = repa_block, tuple(time)
        self.scale = 1 if vae is None else vae.stride

        self.patches = PatchEmbed(dim=dim, patch=patch, channels=self.channels)
        self.registers = nn.Parameter(0.02 * torch.randn(tokens, dim))
        self.encoder = flex_trunk(dim, depth, head, modulated=False)
        self.project_in = nn.Linear(dim, quantizer.width)
        self.quantizer = quantizer
        self.project_out = nn.Linear(quantizer.channels, decoder_dim)
        self.dropped = nn.Parameter(0.02 * torch.randn(decoder_dim))  # stands for a register that is not kept
        self.null = nn.Parameter(0.02 * torch.randn(decoder_dim))  # for every register of an unconditional row
        self.places = nn.Parameter(0.02 * torch.randn(tokens, decoder_dim))
        self.noisy = PatchEmbed(dim=decoder_dim, patch=patch, channels=self.channels)
        learned = positions == "learned"
        self.table = nn.Parameter(0.02 * torch.randn(grid * grid, dim)) if learned else None
        self.noisy_table = nn.Parameter(0.02 * torch.randn(grid * grid, decoder_dim)) if learned else None
        self.time = TimeEmbedding(dim=decoder_dim, frequencies=FREQUENCIES, longest=LONGEST)
        self.decoder = flex_trunk(decoder_dim, decoder_depth, head, modulated=True)
        self.norm = ModulatedNorm(dim=decoder_dim, eps=1e-5)
        self.out = nn.Linear(decoder_dim, self.channels * patch * patch)
        self.repa = None if repa_block is None else repa_head(decoder_dim, repa_width)
        for linear in (self.project_in, self.project_out, self.time.up, self.time.down):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        if init == "open":
            self.open()
        self.stride = patch * self.scale
        self.spec = self.spec_for(image_size)

    def open(self) -> None:
        """The start for short trainings, see `init`."""
        for vectors in (self.registers, self.places, self.dropped, self.null):
            nn.init.normal_(vectors)
        nn.init.normal_(self.project_in.weight, std=0.4 * self.project_in.in_features**-0.5)
        for block in self.decoder.blocks:
            modulation = block.modulation
            nn.init.normal_(modulation.projection.weight, std=0.02)
            nn.init.ones_(modulation.projection.bias.data.view(modulation.parts, 6, -1)[:, :2])  # the two gates

    def train(self, mode: bool = True) -> FlexTokTokenizer:
        """The VAE stays in eval mode."""
        super().train(mode)
        if self.vae is not None:
            self.vae.eval()
        return self

    def spec_for(self, size: int) -> TokenSpec:
        if size < self.stride or size % self.stride:
            raise ValueError(f"image_size={size} must be a multiple of {self.stride}, patch times the VAE's stride")
        part = Part(self.tokens, self.quantizer.vocab_size, self.quantizer.channels)
        return TokenSpec(SequenceLayout.line(self.tokens), (part,), size, describe(self.quantizer))

    # --- encoding -----------------------------------------------------------------------------------------------------

    def latents(self, images: Tensor, noise: SampleNoise | None = None) -> Tensor:
        """[B, C, h, w] of images: the VAE's tokens (with noise, drawn from its posterior), or the images themselves."""
        self.check_images(images)
        if self.vae is None:
            return images
        found = self.vae.encode(images, noise=noise)
        return to_map(found, images.shape[2] // self.scale)

    def features(self, images: Tensor) -> Tensor:
        return self.read(self.latents(images))

    def read(self, latents: Tensor) -> Tensor:
        """Registers [B, N, C] of latents: patches see patches, registers see patches and earlier registers."""
        patches = self.placed(self.patches, self.table, latents)
        rank = torch.arange(self.tokens, device=latents.device) + 1
        rank = torch.cat([rank.new_zeros(patches.shape[1]), rank])
        registers = self.registers.expand(len(latents), -1, -1)
        pattern = behind("causal", self.tokens, patches.shape[1])
        h = self.encoder(Inputs(torch.cat([patches, registers], 1), rank, pattern))
        return self.project_in(h[:, patches.shape[1] :])

    @torch.no_grad()
    def encode(
        self,
        images: Tensor,
        *,
        layout: SequenceLayout | None = None,
        prefix: Tensor | None = None,
        noise: SampleNoise | None = None,
    ) -> Tensor:
        """noise: draws the VAE's latents from their posterior, as the original does; without it they are its means."""
        if prefix is not None or layout not in (None, self.spec.layout):
            raise ValueError("FlexTokTokenizer.encode takes no prefix, and no layout but that of its spec")
        return self.quantizer.indices(self.read(self.latents(images, noise)))

    def placed(self, embed: PatchEmbed, table: Tensor | None, latents: Tensor) -> Tensor:
        """Patches [B, h * w, D] with their positions."""
        height, width = (side // self.patch for side in latents.shape[2:])
        x = embed(latents)
        if table is not None:
            return x + resize_table(table, height, width)
        return x + sincos(height, width, x.shape[-1], x.device).to(x.dtype)

    # --- the flow -----------------------------------------------------------------------------------------------------

    def condition(self, z: Tensor, counts: int | Tensor | None = None, null: Tensor | None = None) -> Tensor:
        """Registers [B, N, D] as the decoder gets them, of z [B, N, C].

        counts: how many of each row are kept (all where None); null: bool [B], rows without any.
        """
        x = self.project_out(z.to(self.project_out.weight.dtype))
        x = replace_dropped(x, counts, self.dropped)
        if null is not None:
            x = torch.where(null.view(-1, 1, 1), self.null.to(x.dtype), x)
        return x + self.places

    def velocity(self, x: Tensor, t: Tensor, registers: Tensor) -> tuple[Tensor, Tensor | None]:
        """Velocity of latents x [B, C, h, w], float32, at times t [B], and the tapped states [B, h * w, repa_width]."""
        patches = self.placed(self.noisy, self.noisy_table, x)
        count, vector = patches.shape[1], self.time(t)[:, None]
        sequence = torch.cat([patches, registers], 1)
        each = torch.zeros(sequence.shape[1], dtype=torch.int64, device=x.device)
        each[count:] = 1
        tapped: list[Tensor] = []

        def tap(h: Tensor) -> Tensor:
            tapped.append(self.repa(h[:, :count]))
            return h

        at = {} if self.repa is None else {self.repa_block: tap}
        h = self.decoder(Inputs(sequence, torch.zeros_like(each), "full", vector=vector, at=at, each=each))
        made = self.out(self.norm(h[:, :count], vector))
        return unpatchify(made, self.patch, x.shape[2] // self.patch).float(), tapped[0] if tapped else None

    def forward(self, images: Tensor, *, key: Tensor | None = None, progress: float = 0.0) -> Reconstruction:
        """In eval mode every register is kept; the time of the flow is drawn either way."""
        noise = noise_of(key, images)
        one = torch.zeros(1, dtype=torch.int64, device=images.device)
        latents = self.latents(images, noise if self.training else None)
        found = self.quantizer(self.read(latents))
        counts = null = None
        if self.training:
            counts = keep_counts(self.keep_sums, noise, stream=KEEP)
            null = noise.uniform(one, DROP).squeeze(1) < self.null_drop
        mean, deviation = self.time_normal
        t = flow.logit_normal(mean + deviation * noise.normal(one, 1, TIME).flatten())
        data = latents.float()
        start = flow.normal_map(noise, *data.shape[1:], stream=START)
        x = flow.interpolate(data, start, t)
        velocity, tapped = self.velocity(x, t, self.condition(found.z, counts, null))
        loss = (velocity - (start - data)).square().mean()
        rendered = self.vae is None or not self.training
        estimate = self.images(flow.data_of(x, velocity, t)) if rendered else None
        features = {} if tapped is None else {"repa": tapped}
        return Reconstruction(estimate, found.ids, found.loss | {"flow": loss}, found.stats, features)

    def images(self, latents: Tensor) -> Tensor:
        """Images of latents [B, C, h, w]."""
        if self.vae is None:
            return latents
        return self.vae.decode(from_map(latents).flatten(1, 2), size=latents.shape[2] * self.scale)

    # --- decoding -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def decode(
        self,
        tokens: Tensor,
        *,
        keep: int | Tensor | None = None,
        size: int | None = None,
        noise: SampleNoise | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        project: bool | None = None,
        solver: flow.Solver = "euler",
        on_step: flow.OnStep | None = None,
    ) -> Tensor:
        """As Tokenizer.decode; steps, guidance and project replace the constructor's.

        noise: keys the start; None starts every image from one fixed noise. on_step: see vtok.flow.solve, in latents.
        """
        (self.spec if size is None else self.spec_for(size)).check(tokens)
        return self.pixels(
            self.embed(tokens),
            size=size,
            noise=noise,
            counts=check_keep(keep, self.tokens),
            steps=steps,
            guidance=guidance,
            project=project,
            solver=solver,
            on_step=on_step,
        )

    def pixels(
        self,
        z: Tensor,
        *,
        size: int | None = None,
        noise: SampleNoise | None = None,
        counts: int | Tensor | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        project: bool | None = None,
        solver: flow.Solver = "euler",
        on_step: flow.OnStep | None = None,
    ) -> Tensor:
        """Images of z [B, N, C], of which the first `counts` registers are used; see `decode`."""
        side = (size or self.spec.image_size) // self.scale
        if noise is None:
            noise = SampleNoise(torch.zeros(len(z), dtype=torch.int64, device=z.device))
        scale = self.guidance if guidance is None else guidance
        project = self.project if project is None else project
        registers = self.condition(z, counts)
        none = self.condition(z, null=torch.ones(len(z), dtype=torch.bool, device=z.device))

        def one(x: Tensor, t: float) -> Tensor:
            return self.velocity(x, x.new_full((len(x),), t), registers)[0]

        def pair(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
            both = torch.cat([x, x])
            made = self.velocity(both, both.new_full((len(both),), t), torch.cat([registers, none]))[0]
            return made[: len(x)], made[len(x) :]

        start = flow.normal_map(noise, self.channels, side, side, stream=START)
        velocity = one if scale == 1 else guided(pair, scale, project=project)
        grid = flow.times(self.steps if steps is None else steps)
        return self.images(flow.solve(velocity, start, grid, solver=solver, on_step=on_step))

    @property
    def last_layer(self) -> nn.Parameter:
        return self.out.weight

    def fresh_start(self) -> str | None:
        if self.vae is None:
            return None
        raise ValueError(
            "FlexTok's frozen VAE is untrained, and a flow in its latents of no use: pass init_from=<folder>, made of "
            f"EPFL-VILAB/flextok_vae_c{self.channels} by python scripts/convert.py family=flextok_vae start=<this "
            "one> from=diffusion_pytorch_model.safetensors config=config.json out=<folder>"
        )
