"""A pretrained vision transformer as a frozen judge of images: DINOv2, DINOv3, SigLIP2 or any other of timm's ViTs.

Weights are a file that a user fetches once from timm's page of the model (`weights_path`); nothing is downloaded.
Mean and standard deviation are those that timm records with the weights. Images are resized with bicubic interpolation
without antialiasing, as GigaTok and ResTok do; the positions of a model that was trained at another size are resampled
by timm (bicubic with antialiasing, where DINOv2's own code has none: features differ in the third digit).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from vtok.layers.resolution import interpolate
from vtok.losses.frozen import DAMAGE, find_weights, read_weights


def require_known(model: str, key: str = "model") -> None:
    """ValueError, naming the key, unless timm has a model of that name, its tag left aside."""
    import timm

    if not timm.is_model(str(model).split(".")[0]):
        raise ValueError(f"{key}={model!r}: timm has no such model")


class Backbone(nn.Module):
    """Images [B, 3, H, W] in [-1, 1] to (class token [B, D] or None, patch tokens [B, n, D]), after the final norm.

    model: timm's name with its tag, "vit_base_patch14_dinov2.lvd142m". size: side to which images are resized.
    weights_path: the file <model>.safetensors, or its folder. remedy: the way to do without it, for the message. Raises
    ValueError that names file, size and source.
    """

    def __init__(
        self,
        *,
        model: str,
        size: int,
        weights_path: str | Path | None = None,
        remedy: str = "drop it by objective.terms.<its name>=null",
    ) -> None:
        super().__init__()
        import timm

        require_known(model)
        path = find_weights(weights_path, f"{model}.safetensors")
        if not path.is_file():
            with torch.device("meta"):
                count = sum(p.numel() for p in timm.create_model(model, num_classes=0).parameters())
            read_weights(
                path,
                who=f"the alignment with {model}",
                size=f"about {4 * count / 1e6:.0f} MB",
                source=f"https://huggingface.co/timm/{model} (model.safetensors)",
                remedy=remedy,
            )
        try:
            net = timm.create_model(
                model, pretrained=True, pretrained_cfg_overlay={"file": str(path)}, img_size=size, num_classes=0
            )
        except DAMAGE as error:
            message = f"{path} does not fit timm's {model} at size={size} ({type(error).__name__}: {error})"
            raise ValueError(message.replace("\n", " ")[:400]) from None
        if not hasattr(net, "num_prefix_tokens"):
            raise ValueError(f"model={model!r} is no vision transformer: it has no patch tokens")
        self.net, self.size = net.eval(), size
        self.prefix = net.num_prefix_tokens
        self.has_class = getattr(net, "cls_token", None) is not None
        config = net.pretrained_cfg
        self.register_buffer("mean", torch.tensor(config["mean"]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(config["std"]).view(1, 3, 1, 1))

    @property
    def patches(self) -> tuple[int, int]:
        """(n, D) of the patch tokens of an image."""
        return self.net.patch_embed.num_patches, self.net.num_features

    def prepare(self, images: Tensor) -> Tensor:
        """What the network sees of images in [-1, 1]: normalised and resized."""
        x = ((images.float() + 1) / 2 - self.mean) / self.std
        if x.shape[2:] == (self.size, self.size):
            return x
        return interpolate(x, self.size, mode="bicubic", align_corners=False)

    def forward(self, images: Tensor) -> tuple[Tensor | None, Tensor]:
        tokens = self.net.forward_features(self.prepare(images))
        return (tokens[:, 0] if self.has_class else None), tokens[:, self.prefix :]
