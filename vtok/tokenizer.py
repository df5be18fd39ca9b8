"""What a tokenizer is: images to tokens and back, and the specification that a generator builds on.

Conventions: images are float [-1, 1] NCHW; tokens are one flat tensor in the tokenizer's order, int64 ids [B, L] or
continuous latents [B, L, C]; channels come last inside tokens. Straight-through estimates are written
`q + (z - z.detach())`, which is bitwise q (`z + (q - z).detach()` is not), so `lookup(ids)` equals the codes bitwise.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from vtok.config import Configured, describe
from vtok.layout import SequenceLayout
from vtok.noise import SampleNoise
from vtok.quantize.factors import join, split

# arguments of tokenizers and their parts that act in training alone: the same weights give the same codes and pictures
TRAINING = {
    "alignment_channels", "alignment_decay", "alignment_depth", "alignment_power", "auxiliary_until", "batch_weight",
    "beta", "checkpointing", "codebook_weight", "degradation", "draw_sides", "dropout", "ema_decay", "entropy_groups",
    "entropy_temperature", "entropy_weight", "feature_weight", "gate", "global_width", "init", "kl_weight",
    "nested", "null_drop", "repa_block", "repa_side", "repa_width", "restart", "rotation", "sample_weight",
    "scale_weight", "semantic", "stage", "stochastic", "temperature", "time", "vision", "vision_channels",
}  # fmt: skip

FAR = 10.0  # no image in [-1, 1] reaches it, not resized or as normalised noise; one in 0..255 does


@dataclass(frozen=True)
class Part:
    """A run of tokens with one vocabulary. Ids are local to the part.

    count: tokens; vocab_size: number of codes, None for continuous latents; channels: width of a code or latent.
    """

    count: int
    vocab_size: int | None
    channels: int


@dataclass(frozen=True)
class TokenSpec:
    """What a tokenizer emits: order, vocabularies, image size, and the quantizer where a generator needs it.

    quantizer: plain description (family and arguments) of the quantizer that maps ids to codes and codes to a latent
    map; next-scale generators rebuild it, and copy its weights, to form their inputs.
    """

    layout: SequenceLayout
    parts: tuple[Part, ...]
    image_size: int
    quantizer: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        counted = sum(part.count for part in self.parts)
        if counted != self.layout.length:
            raise ValueError(f"parts hold {counted} tokens, the layout {self.layout.length}")

    def __str__(self) -> str:
        kinds = ("latents" if p.vocab_size is None else f"tokens of {p.vocab_size} codes" for p in self.parts)
        parts = " and ".join(f"{p.count} {kind}, {p.channels} wide" for p, kind in zip(self.parts, kinds))
        return f"{parts}, in {self.layout.steps} steps"

    @property
    def discrete(self) -> bool:
        return all(part.vocab_size is not None for part in self.parts)

    @property
    def bits(self) -> float:
        """Bits that the ids of one image take; infinite for continuous tokens."""
        if not self.discrete:
            return math.inf
        return sum(part.count * math.log2(part.vocab_size) for part in self.parts)

    def check(self, tokens: Tensor) -> None:
        """Raise ValueError unless `tokens` has this spec's shape, dtype and range."""
        length = self.layout.length
        if not self.discrete:
            want = (length, self.parts[0].channels)
            if tuple(tokens.shape[1:]) != want or not tokens.is_floating_point():
                raise ValueError(
                    f"tokens are {tuple(tokens.shape)} {tokens.dtype}, expected float [B, {want[0]}, {want[1]}]"
                )
            return
        if tokens.dim() != 2 or tokens.shape[1] != length or tokens.dtype != torch.int64:
            raise ValueError(f"tokens are {tuple(tokens.shape)} {tokens.dtype}, expected int64 [B, {length}]")
        start = 0
        for part in self.parts:
            ids = tokens[:, start : start + part.count]
            low, high = torch.stack(ids.aminmax()).tolist() if ids.numel() else (0, 0)  # a GPU is waited for once
            if not 0 <= low <= high < part.vocab_size:
                raise ValueError(f"ids span {low}..{high}, expected 0..{part.vocab_size - 1}")
            start += part.count

    def to_config(self) -> dict:
        parts = [[p.count, p.vocab_size, p.channels] for p in self.parts]
        return {
            "layout": self.layout.to_config(),
            "parts": parts,
            "image_size": self.image_size,
            "quantizer": self.quantizer,
        }

    @classmethod
    def from_config(cls, data: Mapping | TokenSpec) -> TokenSpec:
        """Inverse of `to_config`; a TokenSpec passes through."""
        if isinstance(data, TokenSpec):
            return data
        missing = {"layout", "parts", "image_size"} - set(data)
        if missing:
            raise ValueError(f"a token spec lacks {', '.join(sorted(missing))}")
        parts = tuple(Part(int(n), None if v is None else int(v), int(c)) for n, v, c in data["parts"])
        quantizer = data.get("quantizer")
        if isinstance(quantizer, Configured):  # `build` has made a module of it on the way
            quantizer = describe(quantizer)
        return cls(SequenceLayout.from_config(data["layout"]), parts, int(data["image_size"]), quantizer)


@dataclass
class Quantized:
    """z [.., C] what the decoder gets; codes [B, L, C] one per id; ids [B, L]; weighted losses; stats for logs."""

    z: Tensor
    codes: Tensor
    ids: Tensor
    loss: dict[str, Tensor] = field(default_factory=dict)
    stats: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Reconstruction:
    """images [B, 3, H, W] in about [-1, 1], None in a training pass that could give them no gradient; tokens; losses of
    the family itself, weighted; stats for logs.

    features: hidden states by name, for objectives that align them with a pretrained network. targets: what `images`
    should be, row by row, where that is not the input: degraded images, or several decodings of one image, [n B, ..].
    """

    images: Tensor | None
    tokens: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)
    stats: dict[str, Tensor] = field(default_factory=dict)
    features: dict[str, Tensor] = field(default_factory=dict)
    targets: Tensor | None = None

    def real(self, images: Tensor) -> Tensor:
        """What `images` should be, given the inputs of the pass."""
        return images if self.targets is None else self.targets


class Quantizer(Configured, nn.Module):
    """Maps vectors to codes. Runs in float32 whatever the surrounding precision: nearest codes are decided by small
    differences of large distances.

    `forward(z)` takes [B, L, C] or a map [B, h, w, C]; multi-scale quantizers need the map. One that `draws` takes
    `forward(z, noise)` with a SampleNoise, or None for its mean. scales: what codes on maps of several sides are, parts
    of one sum or each map a whole image; None where there is one side.
    """

    vocab_size: int | None
    channels: int
    draws: bool = False
    scales: Literal["residual", "independent"] | None = None

    @property
    def width(self) -> int:
        """Channels of the z that `forward` takes, where they are not those of a code."""
        return self.channels

    def forward(self, z: Tensor) -> Quantized:
        raise NotImplementedError

    def indices(self, z: Tensor) -> Tensor:
        """Ids int64 [B, L] of z, without gradients, losses or statistics."""
        raise NotImplementedError

    def tokens(self, z: Tensor, noise: SampleNoise | None = None) -> Tensor:
        """What an image becomes: the ids, unless a continuous quantizer says otherwise."""
        return self.indices(z)

    def lookup(self, ids: Tensor) -> Tensor:
        """Codes [.., C] of ids [..], bitwise those that `forward` returns."""
        raise NotImplementedError

    def assemble(self, codes: Tensor, keep: int | None = None) -> Tensor:
        """The decoder's z from codes [B, L, C]: the codes themselves, or a residual sum over the first `keep`."""
        return codes if keep is None else codes[:, :keep]

    @property
    def factors(self) -> tuple[int, ...]:
        """Sizes of the F sub-codes that `split` writes an id as; their product is vocab_size. (vocab_size,) where the
        quantizer was not asked for more. Raises ValueError for continuous tokens."""
        if self.vocab_size is None:
            raise ValueError(f"{type(self).__name__} has continuous tokens: they have no factors")
        return (self.vocab_size,)

    def split(self, ids: Tensor) -> Tensor:
        """Sub-codes int64 [.., F] of ids [..], the f-th below factors[f]: id = sum_f part_f * product(factors[:f])."""
        return split(ids, self.factors)

    def join(self, parts: Tensor) -> Tensor:
        """Ids int64 [..] of sub-codes [.., F]: the inverse of `split`."""
        if parts.shape[-1] != len(self.factors):
            raise ValueError(f"parts are {tuple(parts.shape)}, expected [.., {len(self.factors)}], one per factor")
        return join(parts, self.factors)


def without_first_stage(first: str) -> ValueError:
    """What a family raises whose decoder is to train on the codes of no earlier run of stage `first`."""
    return ValueError(
        "stage=decoder learns to decode frozen codes, which are random without the stage before: pass "
        f"init_from=<run of tokenizer.stage={first}>"
    )


class Tokenizer(Configured, nn.Module):
    """Images to tokens and back. One subclass per architecture family, in vtok/models.

    A family writes `spec_for`, `features`, `pixels` and `last_layer`; `encode`, `decode` and `forward` follow from
    them, and a family whose paper differs there overrides them. `quantizer` is the bottleneck; `spec` describes the
    tokens at the trained image size; where a family takes other sizes, `spec_for(size)` describes those.
    """

    spec: TokenSpec
    stride: int
    quantizer: Quantizer
    prefixes: bool = False  # whether decode(keep=) works
    # whether a larger image has more tokens: no, squares only, or any H x W, one token for each cell of the stride
    grows: Literal["no", "squares", "any"] = "no"
    layouts: bool = False  # whether decode(layout=) works: any list of scales
    decoder_draws: bool = False  # whether decode(noise=) changes images
    # whether forward(host_key=) is taken: `key` as an array on the host, from which it draws what decides shapes
    host_draws: bool = False

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        *,
        weights: Literal["ema", "raw"] = "ema",
        device: str | torch.device = "cpu",
        trust: Sequence[str] = (),
    ) -> Self:
        """From a run directory, a .ckpt in it or an exported folder, in eval mode: `Tokenizer.load("outputs/mine")`.

        weights: ema or raw. trust: modules of yours that a run may name (docs/add_a_paper). Raises CheckpointError, a
        ValueError, for what holds none, or another class than that by which `load` was called.
        """
        from vtok.checkpoint import CheckpointError, load_module
        from vtok.config import Families
        from vtok.models import FAMILIES

        if (inside := Path(path) / "tokenizer").is_dir():
            raise CheckpointError(f"{path} holds a generator: give its tokenizer, {inside}")
        found = load_module(path, Families(FAMILIES, trust), weights)
        if not isinstance(found, cls):
            raise CheckpointError(f"{path} holds a {type(found).__name__}, expected a {cls.__name__}")
        return found.to(device)

    def spec_for(self, size: int) -> TokenSpec:
        """Specification of the tokens of size x size images; ValueError where the family cannot take them."""
        raise NotImplementedError

    def features(self, images: Tensor) -> Tensor:
        """What the quantizer gets: [B, L, C], or a map [B, h, w, C]."""
        raise NotImplementedError

    def pixels(self, z: Tensor, *, size: int | None = None, noise: SampleNoise | None = None) -> Tensor:
        """Images of what the quantizer gives, z [B, L, C] or [B, h, w, C]; size: image side where z is flat."""
        raise NotImplementedError

    @torch.no_grad()
    def encode(
        self,
        images: Tensor,
        *,
        layout: SequenceLayout | None = None,
        prefix: Tensor | None = None,
        noise: SampleNoise | None = None,
    ) -> Tensor:
        """Tokens of images [B, 3, H, W] in [-1, 1]: ids int64 [B, L] or latents [B, L, C].

        layout: another order or set of scales, where the family allows one. prefix: ids that are already fixed, for
        families that re-encode after them. noise: for stochastic encoders; without it they give their mean.
        """
        if prefix is not None or layout not in (None, self.spec.layout):
            raise ValueError(f"{type(self).__name__}.encode takes no prefix, and no layout but that of its spec")
        return self.quantizer.tokens(self.features(images), noise)

    def embed(self, tokens: Tensor) -> Tensor:
        """Codes [B, L, C] of tokens; continuous tokens pass through."""
        return self.quantizer.lookup(tokens)

    @torch.no_grad()
    def decode(
        self,
        tokens: Tensor,
        *,
        keep: int | Tensor | None = None,
        size: int | None = None,
        noise: SampleNoise | None = None,
    ) -> Tensor:
        """Images [B, 3, H, W] in about [-1, 1] (not clamped) of tokens.

        keep: use only the first `keep` tokens (int, or int64 [B]), for families that decode prefixes. size: image side,
        where it is not the trained one. noise: for stochastic decoders.
        """
        if keep is not None and not self.prefixes:
            raise ValueError(f"{type(self).__name__} decodes all tokens of an image: leave keep away")
        (self.spec if size is None else self.spec_for(size)).check(tokens)
        return self.pixels(self.quantizer.assemble(self.embed(tokens), keep), size=size, noise=noise)

    def forward(self, images: Tensor, *, key: Tensor | None = None, progress: float = 0.0) -> Reconstruction:
        """Encode, quantize and decode with gradients: what training runs.

        key int64 [B]: of the samples, for whatever is drawn (nested dropout, flow times), so that a sample's draws do
        not depend on batch or process; None draws from torch's generator. progress: share of training done.
        """
        found = self.quantize(self.features(images), key)
        return Reconstruction(self.pixels(found.z), found.ids, found.loss, found.stats)

    def quantize(self, z: Tensor, key: Tensor | None = None) -> Quantized:
        """The bottleneck's training pass on z. One that draws gets the noise of `key` int64 [B]; without keys it draws
        them in training and takes the mean in eval mode."""
        if not self.quantizer.draws:
            return self.quantizer(z)
        if key is None and self.training:
            key = torch.randint(2**62, (len(z),), device=z.device)
        return self.quantizer(z, None if key is None else SampleNoise(key))

    @property
    def last_layer(self) -> nn.Parameter:
        """Weight of the last decoder layer: the adaptive GAN weight compares gradients there."""
        raise NotImplementedError

    def undecayed(self) -> list[nn.Parameter]:
        """Parameters without weight decay beside those of fewer than two dimensions (vtok/optim.py)."""
        return []

    def fresh_start(self) -> str | None:
        """What to tell a user who trains it from random weights, if anything; ValueError where that is of no use."""
        return None

    def only_size(self, size: int) -> TokenSpec:
        """`spec_for` of a family whose positions are tables, learned at the size that it was built for."""
        own = self.spec.image_size
        if size == own:
            return self.spec
        if size % self.stride:
            raise ValueError(f"image_size={size} must be a multiple of the stride {self.stride}")
        raise ValueError(
            f"this {type(self).__name__} was built for image_size={own}, asked for {size}, and has learned positions; "
            f"leave data.image_size={own}, or train a tokenizer with data.image_size={size}; scripts/reconstruct.py "
            "cuts larger images into tiles"
        )

    @property
    def encoder_draws(self) -> bool:
        """Whether encode(noise=) changes tokens: a bottleneck draws, the family's or that of a frozen VAE inside."""
        return any(isinstance(part, Quantizer) and part.draws for part in self.modules())

    def check_images(self, images: Tensor) -> None:
        """Raise ValueError unless images are float [B, 3, H, W] with sides that the stride divides; both sides alike
        unless the family `grows` by any H x W, for decode(size=) is one side. On the CPU also where they are of another
        range by far, as 0..255; a GPU would be waited for."""
        if not isinstance(images, Tensor):
            raise ValueError(f"images are a {type(images).__name__}, expected a float tensor [B, 3, H, W] in [-1, 1]")
        if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(f"images are {tuple(images.shape)} {images.dtype}, expected float [B, 3, H, W] in [-1, 1]")
        if images.shape[2] % self.stride or images.shape[3] % self.stride:
            raise ValueError(f"image sides {tuple(images.shape[2:])} must be multiples of the stride {self.stride}")
        if images.device.type == "cpu" and images.numel() and (largest := float(images.amax())) > FAR:
            raise ValueError(f"images reach {largest:.4g}, expected values in [-1, 1]: images / 127.5 - 1 from 0..255")
        if images.shape[2] != images.shape[3] and self.grows != "any":
            raise ValueError(
                f"{type(self).__name__} takes square images, got {tuple(images.shape[2:])}: decode(size=) is one side; "
                "crop them, or let scripts/reconstruct.py cut them into tiles"
            )
