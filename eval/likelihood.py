"""`python -m eval.likelihood`: held-out loss of a generator, against the codes' histogram and against wrong labels.

    python -m eval.likelihood from=outputs/cifar10_llamagen data=cifar10 data.folder=...

Three figures, in nats a token:
- held_out: mean of -log p(token | earlier steps, right label) over held-out images (EMA or raw weights).
- histogram: entropy of the training codes' histogram, one histogram per step of the layout (codes of all positions of a
  step pooled): what a model loses that knows how often each code occurs at each step, and nothing else.
- shuffled: as held_out, with labels permuted among the images so that no image keeps its class. Whether right labels
  lose less is decided on the paired differences per image by a one-sided t test and a sign test.

Continuous tokens have no likelihood and no codes: there held_out is the family's own loss, and histogram that of the
best Gaussian for each place at the same times and noises, in the same units; for a diffusion head also both in nats, a
variational bound. MaskGIT, whose steps choose what they decide: held_out is the mean over the tokens that a random mask
hides, histogram that of the codes of each place. For both see eval/keyed.py.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.drawing import results_folder
from eval.fid import CONFIGS
from eval.keyed import flow_losses, masked_losses
from eval.progress import progress_bar
from vtok.cli import check_json, check_numbers, entry
from vtok.data.transforms import to_float
from vtok.noise import SampleNoise, sample_seeds


def histogram_entropy(counts: Tensor) -> float:
    """Entropy in nats of a histogram counts [V]."""
    share = counts[counts > 0].double() / counts.sum()
    return float(-(share * share.log()).sum())


def step_entropies(tokens: Tensor, sizes: Sequence[int]) -> Tensor:
    """Entropy in nats of the codes of each step, float64 [K], from ids int64 [N, L] in generation order."""
    return torch.tensor(
        [histogram_entropy(torch.bincount(part.reshape(-1))) for part in tokens.split(list(sizes), dim=1)],
        dtype=torch.float64,
    )


def deranged(labels: Tensor, seed: int) -> Tensor:
    """labels [N] permuted among the images so that every image gets another class than its own.

    Sorted by class and shifted by the size of the largest class: possible as long as no class holds over half of them.
    """
    largest = int(torch.bincount(labels).max())
    if 2 * largest > len(labels):
        raise ValueError("labels cannot be shuffled: one class holds more than half of the images")
    mixed = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = mixed[labels[mixed].argsort(stable=True)]
    shuffled = torch.empty_like(labels)
    shuffled[order] = labels[order].roll(largest)
    assert bool((shuffled != labels).all()), "the shift left a label in place"
    return shuffled


def other_labels(generator: Any, labels: Tensor, seed: int) -> Tensor | None:
    """`deranged` labels; None, with a note, where there are no classes or one of them holds too much."""
    if generator.num_classes < 2:
        return None
    try:
        return deranged(labels, seed)
    except ValueError as error:
        print(f"note: no test of right against wrong labels: {error}", flush=True)
        return None


def paired_test(right: Tensor, wrong: Tensor) -> dict[str, float]:
    """One-sided tests that `right` [N] is lower than `wrong` [N]: t (normal tail, N large) and sign test."""
    gain = (wrong - right).double()
    count = len(gain)
    deviation = float(gain.std())
    t = float(gain.mean()) / (deviation / math.sqrt(count)) if deviation > 0 else math.inf * gain.mean().sign().item()
    t = 0.0 if math.isnan(t) else t  # all differences are zero: no evidence
    wins, ties = int((gain > 0).sum()), int((gain == 0).sum())
    return {
        "mean_gain": float(gain.mean()),
        "t": t,
        # Above 100 images the t distribution is the normal one to within a few per cent of p.
        "p_value": 0.5 * math.erfc(t / math.sqrt(2)),
        "wins": wins,
        "sign_p_value": binomial_tail(wins, count - ties),
    }


def binomial_tail(wins: int, count: int) -> float:
    """P(at least `wins` heads in `count` fair throws)."""
    logs = [
        math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1) - count * math.log(2)
        for k in range(wins, count + 1)
    ]
    return min(1.0, math.fsum(map(math.exp, logs)))


@torch.inference_mode()
def losses(generator: Any, tokens: Tensor, labels: Tensor, *, batch_size: int) -> Tensor:
    """-log p of each token, float32 [N, L] in generation order, of tokens [N, L] in the tokenizer's order."""
    device = next(generator.parameters()).device
    found = []
    with progress_bar("likelihood", len(tokens)) as advance:
        for part, label in zip(tokens.split(batch_size), labels.split(batch_size)):
            canvas = generator.arrange(part.to(device))
            found.append(-generator.log_prob(canvas, generator.conditioner(label.to(device), None)).float().cpu())
            advance(len(part))
    return torch.cat(found)


@torch.inference_mode()
def encode(tokenizer: Any, batches: Iterable[Tensor], total: int, seed: int) -> Tensor:
    """Tokens [N, L] or [N, L, C] of uint8 batches [B, H, W, 3], drawn as training draws them: a KL tokenizer's are
    samples of its posteriors, not their means. seed: of the draws, one an image."""
    device = next(tokenizer.parameters()).device
    found, done, noise = [], 0, SampleNoise(sample_seeds(seed, 0, total).to(device))
    with progress_bar("encoding", total) as advance:
        for batch in batches:
            images = to_float(batch.to(device), channels_last=True)
            rows = slice(done, done := done + len(batch))
            found.append(tokenizer.encode(images, noise=noise.rows(rows)).cpu())
            advance(len(batch))
    return torch.cat(found)


def likelihood(
    generator: Any, train_tokens: Tensor, tokens: Tensor, labels: Tensor, *, batch_size: int, seed: int = 0
) -> dict[str, Any]:
    """All figures. train_tokens, tokens: ids [N, L] in the tokenizer's order; labels [N] of the held-out ones."""
    sizes = generator.layout.sizes
    entropies = step_entropies(generator.arrange(train_tokens).tokens, sizes)
    weights = torch.tensor(sizes, dtype=torch.float64) / sum(sizes)
    right = losses(generator, tokens, labels, batch_size=batch_size)
    per_step = torch.stack([part.double().mean() for part in right.split(list(sizes), dim=1)])
    result: dict[str, Any] = {
        "held_out": float(right.double().mean()),
        "histogram": float((entropies * weights).sum()),
        "held_out_images": len(tokens),
        "histogram_images": len(train_tokens),
        "held_out_per_step": per_step.tolist(),
        "histogram_per_step": entropies.tolist(),
    }
    result["below_histogram"] = result["histogram"] - result["held_out"]
    if (others := other_labels(generator, labels, seed)) is not None:
        shuffled = losses(generator, tokens, others, batch_size=batch_size)
        result["shuffled"] = float(shuffled.double().mean())
        result["labels"] = paired_test(right.double().mean(1), shuffled.double().mean(1))
    return result


def evaluate(config: Mapping[str, Any], data: Any) -> dict[str, Any]:
    """The command: measures, prints, writes JSON; returns what it wrote."""
    from eval.sources import from_data
    from vgen.pipeline import Pipeline
    from vgen.sampling import resolve_device, resolve_dtype
    from vtok.checkpoint import write_json

    check_numbers(config)
    out = Path(config["out"] or results_folder(str(config["from"])) / "likelihood.json")
    check_json("out", out)
    dtype, quant = config.get("dtype", "float32"), config.get("quant")
    pipeline = Pipeline.load(
        config["from"],
        weights=config["weights"],
        tokenizer=config["tokenizer_from"],
        device=resolve_device(config["device"]),
        dtype=resolve_dtype(dtype),
        quant=quant,
        trust=config.get("trust") or (),
    )
    if data.image_size != (side := pipeline.generator.spec.image_size):
        raise ValueError(f"data.image_size={data.image_size}: the generator works at {side} px; make them equal")
    if 0 < (known := pipeline.generator.num_classes) < data.num_classes:
        raise ValueError(f"data has {data.num_classes} classes, the generator {known}: choose the data of its training")
    held = from_data(data, "val", int(config["images"]))
    seen = from_data(data, "train", config["train_images"])
    batch = int(config["batch_size"])
    seed = int(config["seed"])
    tokens = encode(pipeline.tokenizer, held.batches(batch), held.count, seed)
    train_tokens = encode(pipeline.tokenizer, seen.batches(batch), seen.count, seed + 1)
    labels = torch.zeros(held.count, dtype=torch.int64) if held.labels is None else held.labels
    measure, unit = likelihood, "nats a token"
    if not pipeline.tokenizer.spec.discrete:
        measure, unit = flow_losses, "(the family's loss)"
    elif not pipeline.generator.closed:
        measure, unit = masked_losses, "nats a hidden token"
    result = measure(pipeline.generator, train_tokens, tokens, labels, batch_size=batch, seed=seed)
    result |= {"dtype": dtype, "quant": quant}
    result |= {"weights": config["weights"], "command": "python -m eval.likelihood " + " ".join(sys.argv[1:])}
    for name, value in result.items():
        if isinstance(value, float):
            print(f"{name} {value:.4f} {unit}")
    for name, value in result.get("bound", {}).items():
        print(f"bound: {name} {value:.4f} nats a hidden token")
    if "labels" in result:
        test = result["labels"]
        print(
            f"right labels against shuffled ones, {result['held_out_images']} images: gain {test['mean_gain']:.4f}, "
            f"t {test['t']:.2f}, one-sided p {test['p_value']:.3g} (sign test {test['sign_p_value']:.3g})"
        )
    named = {k: result[k] for k in ("held_out", "histogram", "below_histogram", "shuffled") if k in result}
    metrics = {f"loss[{k}]": v for k, v in named.items()} | {
        f"bound[{k}]": v for k, v in result.get("bound", {}).items()
    }
    write_json(out, result | {"metrics": metrics})  # as eval.compare reads them
    print(f"wrote {out}")
    return result


@entry("eval_likelihood", CONFIGS, whole={"images": 1})
def main(config: Any) -> None:
    from vtok.config import instantiate
    from vtok.data.module import ImageData

    data = instantiate(config.data)
    if not isinstance(data, ImageData):
        raise ValueError(f"data={type(data).__name__} gives no images; choose digits, cifar10, imagefolder, ...")
    evaluate(config, data)


if __name__ == "__main__":
    main()
