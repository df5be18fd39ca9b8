"""The held-out loss of generators without a likelihood, against a baseline that knows each place alone.

Continuous tokens: there is no likelihood in closed form, so the family's own loss is measured, at times and noises
keyed by the image; the baseline is the same loss, at the same times and noises, with the best Gaussian for each place
in the network's place (vgen/gaussian.py). In it are the mean and variance of the training latents at each place and
channel. Both are squared errors of what the family predicts (velocity, or noise and a bound in bits for MAR's diffusion
head), not nats; a generator that has learned anything of neighbours or classes is below the baseline. For a diffusion
head the variational bound of both is measured beside it ("bound"), which is in nats.

Masked generators of ids (MaskGIT): the mean cross-entropy of the tokens that a mask hides, the mask being keyed by the
image; the baseline is the entropy of the codes' histogram at each place, the mean over places.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from eval.progress import progress_bar
from vgen.heads_diffusion import DiffusionHead
from vtok.noise import sample_seeds

Loss = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


@torch.inference_mode()
def mean_loss(
    loss: Loss,
    tokens: Tensor,
    labels: Tensor,
    *,
    batch_size: int,
    seed: int,
    device: torch.device,
    text: str,
) -> tuple[float, Tensor]:
    """(mean loss, mean error of each image float32 [N]) of tokens [N, L] or [N, L, C] whose masks, times and noises
    are keyed by (seed, number of the image)."""
    keys, total, each = sample_seeds(seed, 0, len(tokens)), 0.0, []
    with progress_bar(text, len(tokens)) as advance:
        for start in range(0, len(tokens), batch_size):
            part = slice(start, start + batch_size)
            batch = {"tokens": tokens[part], "label": labels[part], "key": keys[part]}
            found = loss({name: value.to(device) for name, value in batch.items()})
            total += float(found["loss"]) * len(batch["key"])
            each.append(found["nats"].mean(1).float().cpu())
            advance(len(batch["key"]))
    return total / len(tokens), torch.cat(each)


def flow_losses(
    generator: Any, train_tokens: Tensor, tokens: Tensor, labels: Tensor, *, batch_size: int, seed: int = 0
) -> dict[str, Any]:
    """All figures, under the names of eval.likelihood. train_tokens, tokens: latents [N, L, C] in the tokenizer's
    order; labels [N] of the held-out ones."""
    device = next(generator.parameters()).device
    moments = generator.moments(train_tokens.to(device))
    common = {"batch_size": batch_size, "seed": seed, "device": device}

    def baseline(batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return generator.gaussian_loss(batch, moments)

    gaussian, _ = mean_loss(baseline, tokens, labels, text="baseline", **common)
    unit = "the family's own loss; histogram: of the best Gaussian for each place"
    found = figures(generator, generator.loss, gaussian, tokens, labels, unit, common)
    if isinstance(generator.head, DiffusionHead):
        with generator.head.in_nats():
            bounds = [
                mean_loss(loss, tokens, labels, text="variational bound", **common)[0]
                for loss in (generator.loss, baseline)
            ]
        found["bound"] = {"held_out": bounds[0], "histogram": bounds[1], "below_histogram": bounds[1] - bounds[0]}
    return found | {"histogram_images": len(train_tokens)}


def masked_losses(
    generator: Any, train_tokens: Tensor, tokens: Tensor, labels: Tensor, *, batch_size: int, seed: int = 0
) -> dict[str, Any]:
    """As `flow_losses`, of ids [N, L]."""
    from eval.likelihood import step_entropies

    common = {"batch_size": batch_size, "seed": seed, "device": next(generator.parameters()).device}
    places = step_entropies(train_tokens, (1,) * train_tokens.shape[1])

    def loss(batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        nats = generator.loss(batch)["nats"]
        return {"loss": nats.mean(), "nats": nats}

    unit = "nats a hidden token; histogram: of the codes of each place"
    found = figures(generator, loss, float(places.mean()), tokens, labels, unit, common)
    return found | {"histogram_images": len(train_tokens)}


def figures(
    generator: Any, loss: Loss, baseline: float, tokens: Tensor, labels: Tensor, unit: str, common: Mapping[str, Any]
) -> dict[str, Any]:
    from eval.likelihood import other_labels, paired_test

    held, right = mean_loss(loss, tokens, labels, text="held-out loss", **common)
    result = {"held_out": held, "histogram": baseline, "below_histogram": baseline - held, "unit": unit}
    result |= {"held_out_images": len(tokens)}
    if (mixed := other_labels(generator, labels, common["seed"])) is not None:
        shuffled, wrong = mean_loss(loss, tokens, mixed, text="shuffled labels", **common)
        result |= {"shuffled": shuffled, "labels": paired_test(right, wrong)}
    return result
