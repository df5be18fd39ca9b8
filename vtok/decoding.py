"""Encoding and decoding images for speed: channels-last convolutions, packed weights, bfloat16, some images at once.

Decoding is apart from the generator's batch: its rows cost little memory, a decoder's activations at full resolution
much. Codes are found and looked up in float32 whatever the dtype, as everywhere; the rest changes by rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vtok.counters import count
from vtok.layers.packed import can_pack, pack_linears
from vtok.layout import SequenceLayout
from vtok.noise import SampleNoise
from vtok.tokenizer import Tokenizer


def channels_last(tokenizer: nn.Module) -> int:
    """Store the weights of all two-dimensional convolutions channels-last, in place; returns how many. Tensor cores and
    AMX want them so; nothing else changes, since other tensors are left alone."""
    convolutions = [m for m in tokenizer.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
    for convolution in convolutions:
        convolution.to(memory_format=torch.channels_last)
    return len(convolutions)


def light_tokenizer(tokenizer: nn.Module, dtype: torch.dtype) -> None:
    """Store the weights, in place, as encoding and decoding in `dtype` read them fastest on the device where they are:
    convolutions channels-last, and on the CPU linear layers packed, which leaves them without gradients and out of the
    state dict: not for a tokenizer that is still to be saved, hashed or copied from."""
    channels_last(tokenizer)
    if dtype == torch.float32 and can_pack(tokenizer):  # under autocast the products are not the packed ones
        pack_linears(tokenizer)


@torch.no_grad()
def encode_images(
    tokenizer: Tokenizer, images: Tensor, *, dtype: torch.dtype = torch.float32, noise: SampleNoise | None = None
) -> Tensor:
    """Tokens [B, ..] of images [B, 3, H, W] in [-1, 1]. dtype bfloat16: under autocast; float32: without, whatever is
    around.

    noise: see Tokenizer.encode.
    """
    drawn = {} if noise is None else {"noise": noise}
    with _counted("encode", tokenizer, images.device, dtype):
        return tokenizer.encode(images, **drawn)


@torch.no_grad()
def decode_images(
    tokenizer: Tokenizer,
    tokens: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    at_once: int | None = None,
    noise: SampleNoise | None = None,
    size: int | None = None,
    keep: int | None = None,
    layout: SequenceLayout | None = None,
) -> Tensor:
    """Images float32 [B, 3, H, W] of tokens [B, ..], `at_once` of them at a time. dtype bfloat16: under autocast.

    noise, size, keep: see Tokenizer.decode; keep only for tokenizers of prefixes, layout only for those of any scales.
    """
    pieces = tokens.split(at_once or len(tokens))
    options = {"size": size, "keep": keep, "layout": layout}
    given = {name: value for name, value in options.items() if value is not None}
    images, start = [], 0
    with _counted("decode", tokenizer, tokens.device, dtype):
        for part in pieces:
            drawn = {} if noise is None else {"noise": noise.rows(slice(start, start + len(part)))}
            images.append(tokenizer.decode(part, **given, **drawn).float())
            start += len(part)
    return torch.cat(images)


@contextmanager
def _counted(part: str, module: nn.Module, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Autocast to dtype, none for float32, in which `part`, encode or decode, counts: its dtype, and whether the
    results of all convolutions inside lie channels-last, where there are any that show it."""
    light, seen = dtype != torch.float32, set()
    count(f"{part}.bfloat16" if light else f"{part}.float32")

    def look(convolution: nn.Module, given: tuple[Tensor, ...], result: Tensor) -> None:
        if result.is_contiguous() != (last := result.is_contiguous(memory_format=torch.channels_last)):
            seen.add(last)  # a map of 1 x 1 or of one channel is both at once

    hooks = [m.register_forward_hook(look) for m in module.modules() if isinstance(m, nn.Conv2d) and _has_order(m)]
    try:
        with torch.autocast(device.type, dtype, enabled=light):
            yield
    finally:
        for hook in hooks:
            hook.remove()
    if seen:
        count(f"{part}.channels_last" if all(seen) else f"{part}.channels_first")


def _has_order(convolution: nn.Conv2d) -> bool:
    """One with a 1 x 1 kernel or one channel has the same weights in both orders, and leaves x in its own."""
    return min(convolution.weight.shape[1:]) > 1
