"""The judge: a CIFAR-10 classifier of under a million parameters, committed as eval/judge.safetensors.

It is the extractor behind every FD[cifar10-judge] and behind the class accuracy of CIFAR-10 samples, so its weights
never change without a new name. Three stages of two 3 x 3 convolutions with BatchNorm and GELU after a frozen layer
that whitens 2 x 2 patches, as in Jordan, "94% on CIFAR-10 in 3.29 seconds" (2024, arXiv 2404.00498), with narrower
stages and a mean over the last map in place of a maximum: averages are closer to Gaussian, which Frechet distances
assume. Trained by scripts/train_judge.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

WEIGHTS = Path(__file__).with_name("judge.safetensors")
SIDE = 32


class Judge(nn.Module):
    """images float [B, 3, 32, 32] in [-1, 1] -> (features [B, widths[-1]], logits [B, classes]).

    widths: channels of the three stages.
    """

    def __init__(self, *, widths: tuple[int, int, int] = (64, 144, 208), classes: int = 10) -> None:
        super().__init__()
        self.whiten = nn.Conv2d(3, 24, 2, bias=False)  # 12 directions of a 2 x 2 x 3 patch, each with both signs
        self.whiten.weight.requires_grad_(False)
        inputs = (24, *widths[:-1])
        self.stages = nn.Sequential(*(_stage(i, o) for i, o in zip(inputs, widths)))
        self.classify = nn.Linear(widths[-1], classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        h = nn.functional.gelu(self.whiten(images))
        features = self.stages(h).mean(dim=(2, 3))
        return features, self.classify(features)

    @torch.no_grad()
    def set_whitening(self, images: Tensor) -> None:
        """Fill the first layer from patches of `images` [N, 3, H, W]: covariance becomes about the identity."""
        patches = nn.functional.unfold(images.float(), 2).transpose(1, 2).reshape(-1, 12).double()
        patches = patches - patches.mean(0)
        values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        # Without the floor the directions of least variance, mostly compression noise, would dominate.
        filters = (vectors / (values + 2e-3).sqrt()).T.reshape(12, 3, 2, 2).float()
        self.whiten.weight.copy_(torch.cat([filters, -filters]))


def to_float(images: Tensor) -> Tensor:
    """uint8 images of any layout to float32 [-1, 1]."""
    return images.float().div(127.5).sub(1)


def _stage(inputs: int, outputs: int) -> nn.Sequential:
    """Two convolutions; the side is halved after the first."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.MaxPool2d(2),
        nn.BatchNorm2d(outputs),
        nn.GELU(),
        nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.GELU(),
    )


def save_judge(judge: Judge, path: str | Path, *, classes: list[str], widths: tuple[int, ...], **facts: float) -> None:
    """Write fp16 weights with one metadata entry `judge` (JSON: classes, widths, facts). Bytes depend on these only."""
    from safetensors.torch import save

    from vtok.checkpoint import write_atomic

    state = {k: v.half().contiguous() for k, v in judge.state_dict().items() if not k.endswith("num_batches_tracked")}
    about = json.dumps({"classes": classes, "widths": list(widths), **facts})
    payload = save(state, metadata={"judge": about})
    write_atomic(path, lambda file: file.write(payload))


def load_judge(path: str | Path = WEIGHTS) -> tuple[Judge, dict]:
    """The judge in float32 and eval mode, with its metadata. Raises ValueError where the file is missing or damaged."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise ValueError(f"{path} is missing: it is part of the clone; make it with scripts/train_judge.py folder=...")
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("judge", "null"))
            state = {k: file.get_tensor(k).float() for k in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or truncated ({error})") from None
    if about is None:
        raise ValueError(f"{path} was not written by scripts/train_judge.py (no `judge` metadata)")
    judge = Judge(widths=tuple(about["widths"]), classes=len(about["classes"]))
    # The batch counters of BatchNorm are not stored: they have no part in inference.
    state |= {k: v for k, v in judge.state_dict().items() if k.endswith("num_batches_tracked")}
    judge.load_state_dict(state)
    return judge.eval().requires_grad_(False), about
