"""A discriminator that is a small vision transformer with a class token, as LARP trains one.

Wang et al., arXiv 2410.21264, judge video; here the patches are those of an image, with fixed sine-cosine positions.
What differs further: queries, keys and values have biases.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vtok.layers.flex import sincos
from vtok.layers.trunk import Inputs, Trunk


class TransformerDiscriminator(nn.Module):
    """Images [B, 3, H, W], H and W multiples of `patch`, to one logit each [B, 1]. width, depth, heads: published 512,
    12 and 8."""

    def __init__(self, *, patch: int = 16, width: int = 512, depth: int = 12, heads: int = 8) -> None:
        super().__init__()
        if width % 4 or width % heads:
            raise ValueError(f"width={width} must be a multiple of 4 and of heads={heads}")
        self.patch = patch
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.label = nn.Parameter(torch.empty(1, 1, width))
        self.trunk = Trunk(
            dim=width, depth=depth, heads=heads, hidden=4 * width, norm="layer", eps=1e-6, ffn="gelu", bias="qkv"
        )
        self.head = nn.Linear(width, 1)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patches.weight.view(width, -1))
        nn.init.zeros_(self.patches.bias)
        nn.init.xavier_uniform_(self.label)

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[2] % self.patch or images.shape[3] % self.patch:
            raise ValueError(
                f"images are {tuple(images.shape[2:])}, the discriminator takes multiples of its patch {self.patch}: "
                "change objective.gan.discriminator.patch"
            )
        x = self.patches(images)
        places = sincos(*x.shape[2:], x.shape[1], x.device)
        x = x.flatten(2).transpose(1, 2) + places
        x = torch.cat([self.label.expand(len(x), -1, -1).to(x.dtype), x], 1)
        rank = torch.zeros(x.shape[1], dtype=torch.long, device=x.device)
        return self.head(self.trunk(Inputs(x, rank, "full"))[:, 0])
