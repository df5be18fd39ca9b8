"""A figure of how a tokenizer's codes are used, over the steps of training: collapse shows as curves that fall early.

Each validation counts every code over the whole held-out set (vtok.lit). The curve of a validation is the codes' use in
descending order, relative to equal use, against the share of the codes; the codes right of its end are dead. Tokens in
scales (VAR, FlexVAR) get one more panel, the perplexity of each: coarse scales have too few tokens to show in the rest.
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
        self.scales: dict[int, list[float]] = {}  # step -> perplexity per scale

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history, "scales": self.scales}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = dict(state_dict["history"])
        self.scales = dict(state_dict.get("scales", {}))  # none in checkpoints of earlier versions

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        counts = {k: v for k, v in pl_module.histograms.items() if not k.endswith("_raw")}
        if not counts:
            return
        scales = [counts.pop(name) for name in list(counts) if name.startswith("count_step_")]
        if scales:
            self.scales[trainer.global_step] = [float(perplexity(histogram)) for histogram in scales]
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
        """The figure, uint8 [H, W, 3]: a panel a part, and one of the scales; a curve a validation, light to dark."""
        from matplotlib import colormaps
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        steps = sorted(self.history)
        shades = [colormaps["viridis_r"](0.1 + 0.9 * (number + 1) / len(steps)) for number in range(len(steps))]
        newest = self.history[steps[-1]]
        parts, panels = len(newest), len(newest) + (steps[-1] in self.scales)
        figure = Figure(figsize=(5 * panels, 3.5), layout="constrained")
        canvas = FigureCanvasAgg(figure)
        every = np.atleast_1d(figure.subplots(1, panels))
        for part, axes in enumerate(every[:parts]):
            for step, shade in zip(steps, shades):
                used = self.history[step][part]["curve"].numpy()
                label = f"step {step}" if step in (steps[0], steps[-1]) else None
                axes.plot(np.linspace(0, 1, POINTS), np.where(used > 0, used, np.nan), color=shade, label=label)
            last = newest[part]
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
        for axes in every[parts:]:
            for step, shade in zip(steps, shades):
                if step in self.scales:
                    axes.plot(range(1, len(self.scales[step]) + 1), self.scales[step], ".-", color=shade)
            axes.set_yscale("log")
            axes.set_xticks(range(1, len(self.scales[steps[-1]]) + 1))
            axes.set_xlabel("scale, coarse to fine")
            axes.set_title("perplexity of each scale", fontsize="medium")
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()
