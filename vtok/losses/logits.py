"""A perceptual loss on the logits of an ImageNet classifier: ConvNeXt-S, as MaskBit and TiTok train with.

Mean squared difference of the 1,000 logits of image and reconstruction (Weber et al., arXiv 2409.16211; TiTok, arXiv
2406.07550, weighs it 0.1), at 224 px by antialiased bilinear resizing. The classifier is torchvision's ConvNeXt with
its first ImageNet weights (Liu et al., arXiv 2201.03545), a file that a user fetches once.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok.layers.resolution import interpolate
from vtok.losses.frozen import Frozen, find_weights, read_weights
from vtok.tokenizer import Reconstruction, Tokenizer

# model -> (file, size) at download.pytorch.org/models
FILES = {
    "convnext_tiny": ("convnext_tiny-983f1562.pth", "109 MB"),
    "convnext_small": ("convnext_small-0c510722.pth", "192 MB"),
}
SIZE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class LogitDistance(nn.Module):
    """A term of the objective: {"logits": weight * mean squared difference of the logits}.

    model: "convnext_small" or "convnext_tiny". weights_path: its file, or the folder of it.
    """

    lr_scale = 1.0
    of_images = True

    def __init__(
        self, *, weight: float = 0.1, model: str = "convnext_small", weights_path: str | Path | None = None
    ) -> None:
        super().__init__()
        if model not in FILES:
            raise ValueError(f"model={model!r}: choose {' or '.join(FILES)}")
        from torchvision import models

        name, size = FILES[model]
        path = find_weights(weights_path, name)
        state = read_weights(
            path,
            who="the distance of logits",
            size=size,
            source=f"https://download.pytorch.org/models/{name}",
            remedy="drop it by objective.terms.<its name>=null",
        )
        net = getattr(models, model)(weights=None)
        try:
            net.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(
                f"{path} does not hold torchvision's {model}: {str(error).splitlines()[1].strip()}"
            ) from None
        self.net, self.weight = Frozen(net), weight
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)

    def prepare(self, images: Tensor) -> Tensor:
        """What the classifier sees of images in [-1, 1]."""
        x = interpolate((images.float() + 1) / 2, SIZE, mode="bilinear", antialias=True)
        return (x - self.mean) / self.std

    def forward(
        self,
        recon: Reconstruction,
        images: Tensor,
        *,
        step: int = 0,
        progress: float = 0.0,
        key: Tensor | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> dict[str, Tensor]:
        """Gradients reach the reconstruction only."""
        with torch.no_grad():
            target = self.net(self.prepare(recon.real(images)))
        made = self.net(self.prepare(recon.images))
        return {"logits": self.weight * F.mse_loss(made.float(), target.float())}
