"""Semantic alignment: a tokenizer's hidden states are pulled towards what a frozen vision model says of the image.

loss = weight * mean(relu(1 - margin - cos(feature, target))). Margin 0 is the negative cosine (up to a constant) of
GigaTok (Xiong et al., arXiv 2504.08736), Hita (arXiv 2507.02358), D-AR (arXiv 2505.23660) and DetailFlow (arXiv
2505.21473); margin 0.25 that of ResTok. ReToK weights samples by how many tokens they keep and lets the weights decay
over training: its tokenizer gives these weights along. The vision model stands in no checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok.losses.backbone import Backbone
from vtok.losses.frozen import Frozen
from vtok.precision import full
from vtok.tokenizer import Reconstruction, Tokenizer

Target = Literal["patch", "class", "mean"]


class Alignment(nn.Module):
    """A term of the objective, one loss for each of `features`, by its name.

    features: name in Reconstruction.features -> what it predicts: "patch", states [B, n, D] for the model's n patches
    in raster order; "class" or "mean", states [B, D] (or [B, n, D], averaged) for the class token or the mean patch.
    states may come with weights float [B] as features["<name>_weight"]. model, size, weights_path: see Backbone.
    weight, margin: above. final: share of the weight that is left at the end of training, falling linearly. width:
    of the states where the tokenizer does not project them to D itself; then a trained MLP of two hidden layers does.
    """

    def __init__(
        self,
        *,
        model: str,
        features: Mapping[str, Target],
        size: int = 224,
        weights_path: str | Path | None = None,
        weight: float = 0.5,
        margin: float = 0.0,
        final: float = 1.0,
        width: int | None = None,
        hidden: int = 2048,
        lr_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if not features or not set(features.values()) <= {"patch", "class", "mean"}:
            raise ValueError(f"features={dict(features)}: map names of states to patch, class or mean")
        if weight < 0 or not 0 <= margin < 2 or not 0 <= final <= 1:
            raise ValueError(f"weight={weight} must be >= 0, margin={margin} in [0, 2), final={final} in [0, 1]")
        backbone = Backbone(model=model, size=size, weights_path=weights_path)
        if "class" in features.values() and not backbone.has_class:
            raise ValueError(f"{model} has no class token: map features to mean or patch")
        self.backbone, self.size = Frozen(backbone), size
        self.features, self.weight, self.margin, self.final = dict(features), weight, margin, final
        self.lr_scale = lr_scale
        out = backbone.net.num_features
        self.projections = nn.ModuleDict()
        if width is not None:
            self.projections.update({name: projection(width, hidden, out) for name in features})

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
        """images [B, 3, H, W] in [-1, 1]: the inputs. Validation leaves out what a tokenizer gives only in training."""
        missing = sorted(set(self.features) - set(recon.features))
        if missing and torch.is_grad_enabled():
            raise ValueError(
                f"objective.terms aligns the states {missing}, the tokenizer gives {sorted(recon.features)}: "
                "change the term's features, or switch the tokenizer's projection on"
            )
        present = [name for name in self.features if name in recon.features]
        if not present:
            return {}
        with torch.no_grad():
            targets = self.targets(images)
        weight = self.weight * (1 - (1 - self.final) * progress)
        return {name: weight * self.distance(recon.features, name, targets) for name in present}

    def targets(self, images: Tensor) -> dict[Target, Tensor | None]:
        """What features can be mapped to, float32: class [B, D], mean [B, D], patch [B, n, D]."""
        label, patches = self.backbone(images)
        return {"class": label, "patch": full(patches), "mean": full(patches).mean(1)}

    def distance(self, features: Mapping[str, Tensor], name: str, targets: Mapping[Target, Tensor]) -> Tensor:
        """Mean over the samples, weighted if the tokenizer says so, of the mean over their states."""
        states, target = features[name], targets[self.features[name]]
        if name in self.projections:
            states = self.projections[name](states)
        if target.dim() == 2 and states.dim() == 3:
            states = states.mean(1)
        if states.shape != target.shape:
            raise ValueError(
                f"features[{name!r}] is {tuple(states.shape)}, the {self.features[name]} of the vision model at "
                f"size={self.size} is {tuple(target.shape)}: change size, or set width to the states' channels"
            )
        cosine = F.cosine_similarity(full(states), full(target), dim=-1)  # float32: near 1 every digit counts
        loss = (
            F.relu(1 - self.margin - cosine).flatten(1).mean(1)
            if cosine.dim() > 1
            else F.relu(1 - self.margin - cosine)
        )
        weights = features.get(f"{name}_weight")
        return loss.mean() if weights is None else (weights.float() * loss).mean()


def projection(width: int, hidden: int, out: int) -> nn.Sequential:
    """The MLP of GigaTok and REPA: two hidden layers with SiLU."""
    return nn.Sequential(
        nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, out)
    )
