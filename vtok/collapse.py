"""A figure of how a tokenizer's codes are used, over the steps of training: collapse shows as curves that fall early.

Each validation counts every code over the whole held-out set (vtok.lit). The curve of a validation is the codes' use in
descending order, relative to equal use, against the share of the codes; the codes right of its end are dead.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor

from vtok.callbacks import save_picture, show_picture
from vtok.quantize.statistics import perplexity, usage

POINTS = 256  # of a curve


def curve(counts: Tensor) -> Tensor:
    """Use of the codes in descending order, 1 = as if all were used alike, at POINTS places: float32 [POINTS]."""
    ordered = counts.double().sort(descending=True).values
    places = torch.linspace(0, len(ordered) - 1, POINTS, device=counts.device).round().long()
    return (ordered[places] * len(ordered) / ordered.sum().clamp(min=1)).float().cpu()


class CodeUse(L.Callback):
    """Writes <folder>/code_use_<step>.png after every validation. The curves so far stand in the checkpoint."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.history: dict[int, list[dict[str, Any]]] = {}  # step -> per part: curve, usage, perplexity, dead

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = dict(state_dict["history"])

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        counts = {k: v for k, v in pl_module.histograms.items() if not k.endswith("_raw")}
        if not counts:
            return
        self.history[trainer.global_step] = [
            {
                "curve": curve(histogram),
                "usage": float(usage(histogram)),
                "perplexity": float(perplexity(histogram)),
                "dead": int((histogram == 0).sum()),
            }
            for histogram in counts.values()
        ]
        if trainer.is_global_zero:
            sheet = self.draw()
            save_picture(sheet, self.folder / f"code_use_{trainer.global_step:07d}.png")
            show_picture(trainer, "code_use", sheet)

    def draw(self) -> np.ndarray:
        """The figure, uint8 [H, W, 3]: a panel a part, a curve a validation, from light to dark."""
        from matplotlib import colormaps
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        steps = sorted(self.history)
        parts = len(self.history[steps[-1]])
        figure = Figure(figsize=(5 * parts, 3.5), layout="constrained")
        canvas = FigureCanvasAgg(figure)
        for part, axes in enumerate(np.atleast_1d(figure.subplots(1, parts))):
            for number, step in enumerate(steps):
                used = self.history[step][part]["curve"].numpy()
                shade = colormaps["viridis_r"](0.1 + 0.9 * (number + 1) / len(steps))
                label = f"step {step}" if number in (0, len(steps) - 1) else None
                axes.plot(np.linspace(0, 1, POINTS), np.where(used > 0, used, np.nan), color=shade, label=label)
            last = self.history[steps[-1]][part]
            axes.set_yscale("log")
            axes.set_xlim(0, 1)
            axes.set_xlabel("share of the codes, by use")
            axes.set_ylabel("use, 1 = all alike")
            axes.set_title(
                f"{'' if parts == 1 else f'part {part}: '}usage {last['usage']:.1%}, perplexity "
                f"{last['perplexity']:.4g}, dead {last['dead']}",
                fontsize="medium",
            )
            axes.legend()
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()
