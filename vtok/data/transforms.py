"""Pixels before a model and after it: crops, flips, ten-crop, and the map between uint8 and [-1, 1].

Sources. ADM's centre and random crop: Dhariwal & Nichol (2021), arXiv 2105.05233, guided-diffusion's data loader (box
halving while the short side is at least twice the target, then bicubic, then crop). VAR's resize + crop: Tian et al.
(2024), arXiv 2404.02905; at ratio 1 and bicubic that of TiTok: Yu et al. (2024), arXiv 2406.07550. Ten-crop codes: Sun
et al. (2024), LlamaGen, arXiv 2406.06525.

Differs from them: random choices come from `Draws`, a hash of (sample key, number of the draw), so augmentation is the
same on any worker, world size or library version. Greyscale, palette, CMYK, RGBA and 16-bit images become RGB; alpha
is dropped, as in the evaluation code of the field.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vtok.noise import key

Crop = Literal["center", "random", "short", "var", "ten", "none"]
CROPS = ("center", "random", "short", "var", "ten", "none")


class Draws:
    """Independent uniform integers from one key: the n-th draw is a hash of (key, n), whatever came before."""

    def __init__(self, sample_key: int) -> None:
        self.key, self.count = sample_key, 0

    def below(self, stop: int) -> int:
        """Uniform integer in 0..stop-1 (the bias of the modulo is below stop / 2^63)."""
        self.count += 1
        return key(self.key, self.count) % stop


# --- to RGB ---------------------------------------------------------------------------------------------------------


def to_rgb(image: Image.Image | np.ndarray) -> Image.Image:
    """An 8-bit RGB picture of a PIL image or array (uint8 or uint16; [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]).

    16-bit values are divided by 257, so that 65535 becomes 255 (PIL alone would clip them). Raises ValueError for
    other kinds of values.
    """
    if isinstance(image, np.ndarray):
        return _array_to_rgb(image)
    if image.mode == "RGB":
        return image
    if image.mode in ("I", "I;16", "I;16L", "I;16B", "I;16N"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"a greyscale image spans {values.min()}..{values.max()}, expected 16 bits (0..65535)")
        return _array_to_rgb(values.astype(np.uint16))
    if image.mode == "F":
        raise ValueError("a floating-point image (mode F) has no known range; convert it to 8 or 16 bits")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # palettes with an alpha table warn when they go straight to RGB
    return image.convert("RGB")


def _array_to_rgb(array: np.ndarray) -> Image.Image:
    if array.dtype == np.uint16:
        array = ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise ValueError(f"an image array is {array.dtype} {array.shape}, expected uint8 or uint16 [H, W(, 1, 3 or 4)]")
    if array.ndim == 2:
        array = array[:, :, None]
    if array.shape[2] == 1:
        array = np.repeat(array, 3, axis=2)
    return Image.fromarray(np.ascontiguousarray(array[:, :, :3]))


# --- crops: RGB image -> RGB image of size x size --------------------------------------------------------------------


def shrink(image: Image.Image, short: int) -> Image.Image:
    """Resize so that the short side is `short`: halve by box while it is at least twice that, then bicubic (ADM)."""
    while min(image.size) >= 2 * short:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = short / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    return image if image.size == size else image.resize(size, resample=Image.Resampling.BICUBIC)


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop: the protocol behind ImageNet 256 and its reference statistics."""
    image = shrink(image, size)
    return _cut(image, (image.width - size) // 2, (image.height - size) // 2, size)


def random_crop(image: Image.Image, size: int, draws: Draws, low: float = 0.8, high: float = 1.0) -> Image.Image:
    """ADM's random crop: a random place of the image shrunk so that the crop covers `low`..`high` of its short side."""
    smallest, largest = math.ceil(size / high), math.ceil(size / low)
    image = shrink(image, smallest + draws.below(largest - smallest + 1))
    return _random_place(image, size, draws)


def resize_crop(
    image: Image.Image,
    size: int,
    draws: Draws | None,
    ratio: float = 1.125,
    resample: Image.Resampling = Image.Resampling.LANCZOS,
) -> Image.Image:
    """VAR's: short side to round(ratio * size), then a random crop (the centre without draws)."""
    short = round(ratio * size)
    width, height = image.size
    if width <= height:
        target = (short, int(short * height / width))
    else:
        target = (int(short * width / height), short)
    image = image.resize(target, resample=resample)
    if draws is not None:
        return _random_place(image, size, draws)
    return _cut(image, round((image.width - size) / 2), round((image.height - size) / 2), size)


def ten_crop(image: Image.Image, size: int, ratio: float = 1.1) -> list[Image.Image]:
    """Four corners and the centre of the ADM crop at int(ratio * size), then the same five of its mirror image."""
    wide = center_crop(image, int(ratio * size))
    margin = wide.width - size
    places = [(0, 0), (margin, 0), (0, margin), (margin, margin), (round(margin / 2), round(margin / 2))]
    return [_cut(source, x, y, size) for source in (wide, mirror(wide)) for x, y in places]


def mirror(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def _random_place(image: Image.Image, size: int, draws: Draws) -> Image.Image:
    top = draws.below(image.height - size + 1)
    return _cut(image, draws.below(image.width - size + 1), top, size)


def _cut(image: Image.Image, left: int, top: int, size: int) -> Image.Image:
    if (left, top) == (0, 0) and image.size == (size, size):
        return image
    return image.crop((left, top, left + size, top + size))


# --- one sample ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageTransform:
    """PIL image or array to uint8 [size, size, 3], with augmentation only where draws are given.

    crop: center and random are ADM's, short is a random place of the image whose short side became the size, var is
    VAR's, ten one of LlamaGen's ten (half of which are mirrored), none takes images that have the size already. Without
    draws, random, short and ten become center. flip: mirror half of the images. shift: move by up to that many pixels
    each way, the border pixel repeated. window: of all this, a random square of that side is given, for tokenizers that
    take any size: more pictures for the same work.
    """

    size: int
    crop: Crop = "center"
    flip: bool = False
    shift: int = 0
    window: int | None = None

    def __call__(self, image: Any, draws: Draws | None = None) -> np.ndarray:
        array = self._cropped(image, draws)
        if draws is None:
            return array
        if self.flip and draws.below(2):
            array = array[:, ::-1]
        if self.shift:
            x, y = draws.below(2 * self.shift + 1), draws.below(2 * self.shift + 1)
            pad = (self.shift, self.shift)
            array = np.pad(array, (pad, pad, (0, 0)), mode="edge")[y : y + self.size, x : x + self.size]
        if self.window is not None:
            x, y = (draws.below(self.size - self.window + 1) for _ in range(2))
            array = array[y : y + self.window, x : x + self.window]
        return array

    def _cropped(self, image: Any, draws: Draws | None) -> np.ndarray:
        ready = isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape == (self.size, self.size, 3)
        if ready and self.crop in ("center", "none"):
            return image
        image = to_rgb(image)
        if self.crop == "none":
            if image.size != (self.size, self.size):
                raise ValueError(
                    f"an image is {image.size[0]} x {image.size[1]}, expected {self.size} x {self.size}; "
                    "change data.image_size or data.crop"
                )
        elif self.crop == "var":
            image = resize_crop(image, self.size, draws)
        elif self.crop == "random" and draws is not None:
            image = random_crop(image, self.size, draws)
        elif self.crop == "ten" and draws is not None:
            image = ten_crop(image, self.size)[draws.below(10)]
        elif self.crop == "short" and draws is not None:
            image = resize_crop(image, self.size, draws, 1.0, Image.Resampling.BICUBIC)
        else:
            image = center_crop(image, self.size)
        return np.asarray(image)


# --- numbers ---------------------------------------------------------------------------------------------------------


def to_float(images: np.ndarray | Tensor, *, channels_last: bool = False) -> Tensor:
    """uint8 [.., H, W, 3] to float32 [.., 3, H, W] in [-1, 1], on the images' device: x / 127.5 - 1.

    channels_last: in memory the channels stay last, as convolutions without gradients are fastest.
    """
    if isinstance(images, np.ndarray):
        images = torch.from_numpy(np.array(images, order="C"))
    images = images.movedim(-1, -3)
    floats = (images if channels_last else images.contiguous()).float()
    # CUDA multiplies by the reciprocal of a number of the host, which rounds 111 of the 256 values otherwise
    return floats.div_(floats.new_full((), 127.5)).sub_(1)


def to_uint8(images: Tensor) -> Tensor:
    """float [.., 3, H, W] in about [-1, 1] to uint8 [.., H, W, 3]: clamp(127.5 x + 127.5, 0, 255), rounded to nearest.

    Inverse of `to_float` on all 256 values. Rounding matters for FID: truncating after adding 128, as some published
    code does, shifts half of the greys.
    """
    return images.float().mul(127.5).add(127.5).clamp(0, 255).round().to(torch.uint8).movedim(-3, -1).contiguous()
