"""ReToK: a GigaTok whose sequence may be cut anywhere, with redundant tokens behind it so that its tail learns too.

Improving Flexible Image Tokenizers for Autoregressive Image Generation, arXiv 2601.01535. (1) Redundant token padding:
the tail queries (published: 32 to 255 of 256) are repeated with positions of their own, 480 in all, and nested dropout
cuts the longer sequence, so the last real tokens are in use more often. (2) Dropped tokens are not replaced: what the
decoder reads is shorter. (3) Hierarchical semantic regularisation: the fewer tokens, the stronger the alignment. (4) At
last the decoder alone is trained on, with encoder and codebook frozen.
Only code for inference is public. Distribution of the cut and law of the decay are therefore ours: a uniform number of
1 to 480 kept tokens, and a weight that falls linearly from 1 at one token to 0 at all of them.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from vtok.layers.nested import Distribution, check_keep, keep_counts, keep_sums, kept
from vtok.models.gigatok import GigaTok
from vtok.noise import SampleNoise, noise_of
from vtok.tokenizer import Quantized, Quantizer, Reconstruction, Tokenizer, TokenSpec, without_first_stage

KEEP = 31  # stream of the noise that draws how many tokens a sample keeps


class ReToK(Tokenizer):
    """network: a GigaTok with `redundant` tokens, of which this is the training and the decoding of prefixes.

    nested: how many of its tokens + redundant a training sample keeps, see vtok.layers.nested; "all" switches the
    dropout off (then take redundant=0: evaluation, which reads the first `tokens`, would read fewer than training).
    alignment_power: features["alignment_weight"], float32 [B], is (1 - (kept - 1) / (tokens + redundant - 1)) to this
    power; 0 makes it 1. alignment_decay: and that times (1 - progress) to this power; 0 leaves it alone over training.
    stage: "joint" trains everything, "decoder" freezes all that makes the tokens, and has no losses of the codebook.
    """

    prefixes = True

    def __init__(
        self,
        *,
        network: GigaTok,
        nested: Distribution = "uniform",
        alignment_power: float = 1.0,
        alignment_decay: float = 0.0,
        stage: Literal["joint", "decoder"] = "joint",
    ) -> None:
        super().__init__()
        if stage not in ("joint", "decoder"):
            raise ValueError(f"stage={stage!r}: choose joint or decoder")
        if min(alignment_power, alignment_decay) < 0:
            raise ValueError("alignment_power and alignment_decay must not be negative")
        self.network, self.nested, self.stage = network, nested, stage
        if stage == "decoder":
            for module in (network.encoder, network.to_tokens, network.project_in, network.quantizer):
                module.requires_grad_(False)
        self.alignment_power, self.alignment_decay = alignment_power, alignment_decay
        self.length = network.tokens + network.redundant
        self.register_buffer("keep_sums", keep_sums(nested, self.length), persistent=False)
        self.stride, self.spec = network.stride, network.spec

    @property
    def quantizer(self) -> Quantizer:
        return self.network.quantizer

    def spec_for(self, size: int) -> TokenSpec:
        return self.network.spec_for(size)

    def features(self, images: Tensor) -> Tensor:
        return self.network.features(images)

    def pixels(self, z: Tensor, *, size: int | None = None, noise: SampleNoise | None = None) -> Tensor:
        return self.network.pixels(z, size=size, noise=noise)

    @torch.no_grad()
    def decode(
        self,
        tokens: Tensor,
        *,
        keep: int | Tensor | None = None,
        size: int | None = None,
        noise: SampleNoise | None = None,
    ) -> Tensor:
        """keep: the first `keep` tokens, from 1 to all: one number, or int64 [B], one a sample."""
        check_keep(keep, self.network.tokens)
        if not isinstance(keep, Tensor):
            return super().decode(tokens, keep=keep, size=size, noise=noise)
        (self.spec if size is None else self.spec_for(size)).check(tokens)
        return self.network.pixels(self.embed(tokens), size=size, seen=kept(keep, tokens.shape[1], tokens.device))

    def forward(self, images: Tensor, *, key: Tensor | None = None, progress: float = 0.0) -> Reconstruction:
        network = self.network
        if self.stage == "decoder":  # no losses, and nothing that would move the codes
            with torch.no_grad():
                grid = network.grid(images)
                ids = network.quantizer.indices(network.vectors(grid))
                codes = network.quantizer.lookup(ids)
            found = Quantized(codes, codes, ids)
        else:
            grid = network.grid(images)
            found = self.quantize(network.vectors(grid), key)
        if not self.training:
            counts = torch.full((len(images),), network.tokens, device=images.device)
            z, seen = found.z[:, : network.tokens], None
        else:
            counts = keep_counts(self.keep_sums, noise_of(key, images), stream=KEEP)
            z, seen = found.z, kept(counts, self.length)
        recon = network.reconstruct(images, grid, found, z, seen, progress)
        if "alignment" in recon.features:
            share = 1 - (counts - 1).float() / max(self.length - 1, 1)
            decay = (1 - progress) ** self.alignment_decay
            recon.features["alignment_weight"] = decay * share**self.alignment_power
        return recon

    @property
    def last_layer(self) -> nn.Parameter:
        return self.network.last_layer

    def fresh_start(self) -> str | None:
        if self.stage != "decoder":
            return None
        raise without_first_stage("joint")
