"""TiTok: an image as a few one-dimensional tokens, written and read by vision transformers.

Yu et al., arXiv 2406.07550: the encoder sees [class token, patches, learned latents] and keeps the latents, the decoder
sees [class token, mask tokens, latents] and keeps the mask tokens. Two heads: ProxyHead gives logits over the codes of
a MaskGIT-VQGAN, whose expected code goes through that model's decoder (trained in two stages); PatchHead gives pixels
(one stage; Kim et al., TA-TiTok, arXiv 2501.07730, who also let the decoder see text features).

Pixels inside are in [0, 1] as published. `legacy_reshape` is a slip of the first releases (L-32, B-64, S-128) that
their weights depend on: the latents [N, D] are read as [D, N] without a transpose, which mixes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from vtok.checkpoint import best_weights, load_module
from vtok.config import Configured, describe
from vtok.layers.cnn import Decoder, to_map
from vtok.layers.cnn_maskgit import DECODER
from vtok.layers.trunk import Trunk
from vtok.layers.vit import NARROW, PatchEmbed, initialise, positions, table, together, unpatchify
from vtok.layout import SequenceLayout
from vtok.noise import SampleNoise
from vtok.tokenizer import Part, Quantized, Quantizer, Reconstruction, Tokenizer, TokenSpec, without_first_stage

Size = Sequence[int]  # width, depth, heads


class PatchHead(Configured, nn.Module):
    """Hidden states [B, h * w, dim] to images [B, 3, H, W] in [0, 1]: pixels of patches, then a 3 x 3 convolution."""

    def __init__(self, *, dim: int, patch: int = 16) -> None:
        super().__init__()
        self.dim, self.patch = dim, patch
        self.project = nn.Linear(dim, 3 * patch * patch)
        self.smooth = nn.Conv2d(3, 3, 3, padding=1)
        initialise(self, width=dim)
        if dim < NARROW:
            nn.init.dirac_(self.smooth.weight)  # as small weights it holds back all gradients for hundreds of steps

    def render(self, h: Tensor, side: int) -> Tensor:
        return self.smooth(unpatchify(self.project(h), self.patch, side))

    @property
    def last_layer(self) -> nn.Parameter:
        return self.smooth.weight


class ProxyHead(Configured, nn.Module):
    """Hidden states to logits over `codes` proxy codes, and their expected code through a CNN to images in [0, 1].

    width: of a code; channels, multipliers, blocks, groups: of the CNN, see vtok.layers.cnn. weights: run,
    checkpoint or folder of the MaskGITVQGAN that codes and CNN are copied from (averaged weights, where it has them);
    it is read once and not recorded.
    """

    def __init__(
        self,
        *,
        dim: int,
        codes: int = 1024,
        width: int = 256,
        channels: int = 128,
        multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        blocks: int = 2,
        groups: int = 32,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.project = nn.Sequential(nn.Linear(dim, 2 * dim), nn.Tanh(), nn.Linear(2 * dim, codes))
        initialise(self.project, width=dim)
        self.codes = nn.Embedding(codes, width)
        shape = dict(channels=channels, multipliers=multipliers, blocks=blocks, mid_blocks=blocks, groups=groups)
        self.cnn = Decoder(in_channels=width, **shape, **DECODER)
        self.patch, self.copied = self.cnn.stride, weights is not None
        if weights is not None:
            from vtok.models import FAMILIES  # the table of families imports nothing; this module is one of them

            teacher = load_module(weights, FAMILIES, best_weights(weights))
            self.codes.weight.data.copy_(teacher.quantizer.codebook.table())
            self.cnn.load_state_dict(teacher.decoder.state_dict())
            self.arguments["weights"] = None

    def logits(self, h: Tensor) -> Tensor:
        return self.project(h)

    def render(self, logits: Tensor, side: int) -> Tensor:
        return self.cnn(to_map(logits.softmax(-1) @ self.codes.weight.to(logits.dtype), side))

    @property
    def last_layer(self) -> nn.Parameter:
        return self.cnn.conv_out.weight


class TiTok(Tokenizer):
    """image_size: a multiple of the patch, the only side that it then takes. tokens: N. encoder, decoder: [width,
    depth, heads] of the transformers. text: [length, width] of features that the decoder can be given. patch: of the
    encoder, where it is not the head's; images then come out head.patch / patch times as large.

    stage: "joint" trains everything; "proxy" freezes the codes and the CNN of a ProxyHead and learns from the
    cross-entropy of `features["proxy_logits"]` with the teacher's codes (vtok.losses.proxy), without making
    images; "decoder" freezes the encoder, the latents and the quantizer.
    """

    def __init__(
        self,
        *,
        image_size: int,
        quantizer: Quantizer,
        head: PatchHead | ProxyHead,
        tokens: int = 32,
        encoder: Size = (1024, 24, 16),
        decoder: Size = (1024, 24, 16),
        legacy_reshape: bool = False,
        text: Sequence[int] | None = None,
        stage: Literal["joint", "proxy", "decoder"] = "joint",
        patch: int | None = None,
    ) -> None:
        super().__init__()
        if stage not in ("joint", "proxy", "decoder"):
            raise ValueError(f"stage={stage!r}: choose joint, proxy or decoder")
        patch = head.patch if patch is None else patch
        if image_size % patch:
            raise ValueError(f"image_size={image_size} must be a multiple of the patch {patch}")
        if head.dim != decoder[0]:
            raise ValueError(f"head.dim={head.dim} must be the decoder's width {decoder[0]}")
        self.stage, self.tokens = stage, tokens
        self.stride, self.side = patch, image_size // patch
        shape = dict(cells=self.side**2, tokens=tokens)
        self.encoder = LatentEncoder(
            size=encoder, patch=patch, out=quantizer.width, legacy_reshape=legacy_reshape, **shape
        )
        self.decoder = LatentDecoder(size=decoder, channels=quantizer.channels, text=text, **shape)
        initialise(self.encoder, width=encoder[0])
        initialise(self.decoder, width=decoder[0])
        self.head, self.quantizer = head, quantizer
        if stage == "proxy":
            if not isinstance(head, ProxyHead):
                raise ValueError("stage=proxy learns the codes of another model: it needs a ProxyHead as head")
            head.codes.requires_grad_(False)
            head.cnn.requires_grad_(False)
        elif stage == "decoder":
            self.encoder.requires_grad_(False)
            quantizer.requires_grad_(False)
        part = Part(tokens, quantizer.vocab_size, quantizer.channels)
        self.spec = TokenSpec(SequenceLayout.line(tokens), (part,), image_size, describe(quantizer))

    def spec_for(self, size: int) -> TokenSpec:
        return self.only_size(size)

    def features(self, images: Tensor) -> Tensor:
        """What the quantizer gets, [B, N, quantizer.width]."""
        self.check_images(images)
        self.spec_for(images.shape[2])
        return self.encoder(images * 0.5 + 0.5)

    def pixels(
        self,
        z: Tensor,
        *,
        size: int | None = None,
        noise: SampleNoise | None = None,
        text: Tensor | None = None,
    ) -> Tensor:
        """text: features [B, l, width] that the decoder sees beside the latents, in models built with text."""
        h = self.decoder(z, text)
        if isinstance(self.head, ProxyHead):
            h = self.head.logits(h)
        return self.head.render(h, self.side) * 2 - 1

    def forward(
        self,
        images: Tensor,
        *,
        key: Tensor | None = None,
        progress: float = 0.0,
        text: Tensor | None = None,
    ) -> Reconstruction:
        """features["proxy_logits"] [B, h * w, codes], with a ProxyHead: what stage 1 compares with its teacher."""
        if self.stage == "decoder":  # no losses, and nothing that would move the codes
            with torch.no_grad():
                tokens = self.quantizer.tokens(self.features(images))
                found = Quantized(self.quantizer.assemble(self.embed(tokens)), tokens, tokens)
        else:
            found = self.quantize(self.features(images), key)
        h, features = self.decoder(found.z, text), {}
        if isinstance(self.head, ProxyHead):
            h = features["proxy_logits"] = self.head.logits(h)
        blind = self.stage == "proxy" and self.training  # nothing learns from its images
        recon = None if blind else self.head.render(h, self.side) * 2 - 1
        return Reconstruction(recon, found.ids, found.loss, found.stats, features)

    @property
    def last_layer(self) -> nn.Parameter:
        return self.head.last_layer

    def undecayed(self) -> list[nn.Parameter]:
        """Tables, codes, and what reads patches and codes: all that the original calls token or embedding."""
        found = [part for half in (self.encoder, self.decoder) for part in (half.register, half.position)]
        found += [self.encoder.latents, self.encoder.latent_position, self.encoder.embed.conv.weight]
        found += [self.decoder.mask, self.decoder.latent_position, self.decoder.embed.weight]
        found += [] if self.decoder.text_position is None else [self.decoder.text_position]
        found += [self.head.codes.weight] if isinstance(self.head, ProxyHead) else []
        return [*found, *self.quantizer.parameters()]

    def fresh_start(self) -> str | None:
        if self.stage == "proxy" and not self.head.copied:
            raise ValueError(
                "stage=proxy freezes the head's codes and CNN, which are random here: pass tokenizer.head.weights=<run "
                "or folder of a MaskGITVQGAN>, or init_from=<run of stage proxy>"
            )
        if self.stage != "decoder":
            return None
        raise without_first_stage("proxy" if isinstance(self.head, ProxyHead) else "joint")


class LatentEncoder(nn.Module):
    """Images [B, 3, H, W] in [0, 1] to latents [B, N, out]."""

    def __init__(self, *, size: Size, patch: int, cells: int, tokens: int, out: int, legacy_reshape: bool) -> None:
        super().__init__()
        dim = size[0]
        self.tokens, self.legacy_reshape = tokens, legacy_reshape
        self.embed = PatchEmbed(dim=dim, patch=patch)
        self.register, self.position = table(1, dim), positions(1 + cells, dim)
        self.latents, self.latent_position = positions(tokens, dim), positions(tokens, dim)
        self.norm_in = nn.LayerNorm(dim)
        self.trunk = vit(size)
        self.out = nn.Linear(dim, out)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.embed(images)
        rows = len(patches)
        x = torch.cat([self.register.expand(rows, -1, -1), patches], 1) + self.position
        latents = (self.latents + self.latent_position).expand(rows, -1, -1)
        h = self.trunk(together(self.norm_in(torch.cat([x, latents], 1))))[:, -self.tokens :]
        if self.legacy_reshape:
            h = h.reshape(rows, -1, self.tokens).transpose(1, 2)
        return self.out(h)


class LatentDecoder(nn.Module):
    """Latents [B, N, channels], and text features if given, to one hidden state per patch [B, h * w, width]."""

    def __init__(self, *, size: Size, cells: int, tokens: int, channels: int, text: Sequence[int] | None) -> None:
        super().__init__()
        dim, self.cells = size[0], cells
        self.embed = nn.Linear(channels, dim)
        self.register, self.position = table(1, dim), positions(1 + cells, dim)
        self.mask, self.latent_position = table(1, dim), positions(tokens, dim)
        self.norm_in = nn.LayerNorm(dim)
        self.trunk = vit(size)
        self.text = nn.Linear(text[1], dim) if text else None
        self.text_position = positions(text[0], dim) if text else None

    def forward(self, z: Tensor, text: Tensor | None = None) -> Tensor:
        latents = self.embed(z.to(self.embed.weight.dtype)) + self.latent_position
        places = torch.cat([self.register, self.mask.expand(self.cells, -1)]) + self.position
        sequence = [places.expand(len(z), -1, -1), latents]
        if text is not None:
            if self.text is None:
                raise ValueError("this tokenizer was built without text: set tokenizer.text=[length, width]")
            sequence.append(self.text(text.to(latents.dtype)) + self.text_position)
        h = self.trunk(together(self.norm_in(torch.cat(sequence, 1))))
        return h[:, 1 : 1 + self.cells]


def vit(size: Size) -> Trunk:
    """The plain vision transformer of both halves: LayerNorm, biases, exact GELU, four times the width inside."""
    width, depth, heads = size
    return Trunk(dim=width, depth=depth, heads=heads, hidden=4 * width, norm="layer", ffn="gelu", bias="qkv")
