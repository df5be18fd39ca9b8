"""What MAGVIT-v2's decoder adds to the convolutional one: depth-to-space upsampling and adaptive GroupNorm.

Yu et al., arXiv 2310.05737; as Open-MAGVIT2 (arXiv 2409.04410) writes it, whose decoder GigaTok and ReTok reuse. Both
are options of vtok.layers.cnn.Decoder: upsample="depth_to_space" and adaptive=True.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vtok.layers.group_norm import Norm


class DepthToSpaceUpsample(nn.Module):
    """Twice the resolution: a 3 x 3 convolution to four times the channels, which `depth_to_space` spreads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, 4 * width, 3, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        return depth_to_space(self.conv(h))


class AdaptiveGroupNorm(nn.Module):
    """x [B, width, H, W] normalised without weights, times a scale and plus a bias that come from the latent map.

    The scale is linear in the latent's standard deviation over space (unbiased, eps 1e-6 inside of the root), the bias
    in its mean over space. There is no 1 added to the scale. Since both are global, decoding is not local.
    """

    def __init__(self, width: int, latent_channels: int, groups: int) -> None:
        super().__init__()
        self.norm = Norm(groups, width, eps=1e-6, affine=False)
        self.scale = nn.Linear(latent_channels, width)
        self.bias = nn.Linear(latent_channels, width)

    def forward(self, x: Tensor, latent: Tensor) -> Tensor:
        """latent [B, latent_channels, h, w], of at least two cells. Raises ValueError for a single cell."""
        if latent.shape[2] * latent.shape[3] < 2:
            raise ValueError("adaptive GroupNorm needs a latent map of two cells or more: enlarge image_size")
        flat = latent.float().flatten(2)  # half precision loses a variance
        deviation = torch.sqrt(flat.var(dim=-1) + 1e-6).to(self.scale.weight.dtype)
        mean = flat.mean(-1).to(self.bias.weight.dtype)
        return self.scale(deviation)[..., None, None] * self.norm(x) + self.bias(mean)[..., None, None]


def depth_to_space(x: Tensor) -> Tensor:
    """[B, 4C, h, w] to [B, C, 2h, 2w]; channel (a * 2 + b) * C + c goes to the pixel (a, b) of channel c.

    This is the order DCR, where the block is the slowest; torch.nn.PixelShuffle's order is CRD, where it is the
    fastest: with weights made for the one, the other gives noise.
    """
    x = x.unflatten(1, (2, 2, -1))  # [B, a, b, C, h, w]
    return x.permute(0, 3, 4, 1, 5, 2).flatten(4, 5).flatten(2, 3)
