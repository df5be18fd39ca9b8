"""Decoding tokens to images for speed: bfloat16 with channels-last convolutions, some images at once.

Apart from the generator's batch: its rows cost little memory, a decoder's activations at full resolution much. Codes
are looked up in float32 whatever the dtype, as everywhere; the images change by bfloat16's rounding.
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
    convolutions channels-last, and on the CPU linear layers packed, which leaves them without gradients."""
    channels_last(tokenizer)
    if dtype == torch.float32 and can_pack(tokenizer):  # under autocast the products are not the packed ones
        pack_linears(tokenizer)


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
    light, pieces = dtype != torch.float32, tokens.split(at_once or len(tokens))
    count("decode.bfloat16" if light else "decode.float32")
    options = {"size": size, "keep": keep, "layout": layout}
    given = {name: value for name, value in options.items() if value is not None}
    images, start = [], 0
    with torch.autocast(tokens.device.type, dtype, enabled=light), _watched(tokenizer) as seen:
        for part in pieces:
            drawn = {} if noise is None else {"noise": noise.rows(slice(start, start + len(part)))}
            images.append(tokenizer.decode(part, **given, **drawn).float())
            start += len(part)
    if seen:
        count("decode.channels_last" if all(seen) else "decode.channels_first")
    return torch.cat(images)


@contextmanager
def _watched(module: nn.Module) -> Iterator[set[bool]]:
    """Whether the results of the convolutions that run inside lie channels-last: {True}, {False}, both, or neither."""
    seen: set[bool] = set()

    def look(convolution: nn.Module, given: tuple[Tensor, ...], result: Tensor) -> None:
        if result.is_contiguous() != (last := result.is_contiguous(memory_format=torch.channels_last)):
            seen.add(last)  # a map of 1 x 1 or of one channel is both at once

    hooks = [m.register_forward_hook(look) for m in module.modules() if isinstance(m, nn.Conv2d) and _has_order(m)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _has_order(convolution: nn.Conv2d) -> bool:
    """One with a 1 x 1 kernel or one channel has the same weights in both orders, and leaves x in its own."""
    return min(convolution.weight.shape[1:]) > 1
