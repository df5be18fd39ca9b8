"""LlamaGen-REPA: a hidden state of the next-token model is pulled towards what a frozen vision model says of the image.

REPA (Yu et al., arXiv 2410.06940) for autoregression, as iFSQ trains it (Tencent-Hunyuan/iFSQ): the state after block 8
at the position that predicts token p goes through an MLP of two hidden layers and is compared, by its cosine, with
patch p of DINOv2; the class position is included, as it predicts token 0. loss = cross-entropy + weight (1 - cosine).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vgen.models.llamagen import LlamaGen
from vtok.layout import SequenceLayout
from vtok.losses.alignment import projection
from vtok.tokenizer import TokenSpec


class LlamaGenREPA(LlamaGen):
    """block: how many blocks the aligned state has gone through. channels: of the vision model's patches, as many as
    there are tokens, which training hands over as batch["patches"] [B, L, channels] (train.py: teacher=...).
    alignment: weight of the loss. hidden: width of the MLP. spec: tokens that are one grid, row by row, as patches are.
    The other arguments are LlamaGen's.
    """

    reads_also = ("patches",)

    def __init__(
        self,
        spec: TokenSpec | Mapping[str, Any],
        num_classes: int,
        *,
        block: int = 8,
        channels: int = 768,
        alignment: float = 2.0,
        hidden: int = 2048,
        width: int,
        depth: int,
        heads: int,
        multiple_of: int = 256,
        position: Literal["rope_2d", "rope_1d", "learned"] = "rope_2d",
        factors: Sequence[int] | Literal["auto"] | None = None,
        factor_depth: int = 0,
        factor_tied: bool = False,
        dropout: float = 0.1,
        token_dropout: float = 0.1,
        label_drop: float = 0.1,
    ) -> None:
        shape = {"width": width, "depth": depth, "heads": heads, "multiple_of": multiple_of}
        shape |= {"position": position, "factors": factors, "factor_depth": factor_depth}
        shape |= {"factor_tied": factor_tied}
        super().__init__(
            spec, num_classes, dropout=dropout, token_dropout=token_dropout, label_drop=label_drop, **shape
        )
        if not 0 < block < depth:
            raise ValueError(f"block={block}: align the state after one of the {depth} blocks but the last")
        self.block, self.channels, self.alignment = block, channels, alignment
        self.projector = projection(width, hidden, channels)

    @classmethod
    def accepts(cls, spec: TokenSpec) -> None:
        super().accepts(spec)
        sides = spec.layout.sides
        if sides[0][0] == 1 or spec.layout.coords != SequenceLayout.raster(*sides[0]).coords:
            where = f"these {spec.layout.length} tokens lie on {sides}{', in another order' * (sides[0][0] > 1)}"
            raise ValueError(
                "LlamaGenREPA compares token p with patch p of the picture, so that tokens must fill one grid row by "
                f"row, but {where}; choose a 2D tokenizer, or model=llamagen_*"
            )

    def loss(self, batch: Mapping[str, Any], *, progress: float = 0.0) -> dict[str, Tensor]:
        """As Generator.loss; "loss" includes the alignment, also given as "alignment", where there are patches."""
        canvas = self.arrange(batch["tokens"])
        context = self.arrange(batch["context"]) if "context" in batch else canvas
        cond, states = self.conditioner(batch["label"], self.dropped(batch)), []
        then = cond.at.get(self.block, lambda h, place: h)
        cond = replace(cond, at={**cond.at, self.block: lambda h, place: (states.append(h), then(h, place))[1]})
        nats = self.head.loss(self(context, cond), canvas.tokens, canvas.layout.sizes)
        found = {"loss": nats.mean(), "nats": nats.detach()}
        if "patches" not in batch:
            if self.training:
                raise ValueError("LlamaGenREPA aligns with a vision model: pass teacher={model: ..., size: ...}")
            return found
        target = batch["patches"]
        want = (len(nats), self.layout.length, self.channels)
        if tuple(target.shape) != want:
            raise ValueError(f"the teacher gives patches {tuple(target.shape)}, expected {want}: change teacher.size")
        with torch.autocast(nats.device.type, enabled=False):  # float32: near 1 every digit of a cosine counts
            cosine = F.cosine_similarity(self.projector(states[0].float()), target.float(), dim=-1)
        distance = (1 - cosine).mean()
        return {
            "loss": found["loss"] + self.alignment * distance,
            "nats": found["nats"],
            "alignment": distance.detach(),
        }
