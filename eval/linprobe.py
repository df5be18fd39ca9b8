"""`python -m eval.linprobe`: how well a linear classifier reads the class from a tokenizer's tokens.

    python -m eval.linprobe from=outputs/cifar10_tokenizer data=cifar10 data.folder=data/cifar10

What a linear probe of GigaTok (arXiv 2504.08736) and ReTok measures: whether tokens carry meaning that a generator can
use. Here it is the multinomial logistic regression of the codes of the frozen tokenizer, averaged over the tokens
(`pool=mean`) or side by side (`pool=flat`), standardised, fitted to convergence, with the weight decay that is best on
a tenth of the training images; accuracy on held-out images. GigaTok trains its probe by SGD on features inside its
network, so numbers are comparable within this command only.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from eval.drawing import results_folder
from eval.fid import CONFIGS
from eval.progress import progress_bar
from eval.sources import Images, from_data
from vtok.checkpoint import write_json
from vtok.cli import check_numbers, check_place, entry
from vtok.data.transforms import to_float

POOLS = ("mean", "flat")
DECAYS = (1e-4, 1e-3, 1e-2, 1e-1)


@torch.inference_mode()
def read(tokenizer: Any, images: Images, pool: str, *, batch_size: int, device: torch.device) -> Tensor:
    """float32 [N, C] (mean) or [N, L * C] (flat): the codes of every image's tokens."""
    rows = []
    with progress_bar("encoding", images.count) as advance:
        for batch in images.batches(batch_size):
            x = to_float(batch.to(device), channels_last=True)
            codes = tokenizer.embed(tokenizer.encode(x)).float()
            rows.append((codes.mean(1) if pool == "mean" else codes.flatten(1)).cpu())
            advance(len(batch))
    return torch.cat(rows)


def fit(x: Tensor, y: Tensor, classes: int, decay: float, steps: int = 200) -> tuple[Tensor, Tensor]:
    """weight [classes, d] and bias [classes] that minimise mean cross-entropy + decay / 2 |weight|^2."""
    weight = torch.zeros(classes, x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([weight, bias], max_iter=steps, line_search_fn="strong_wolfe", tolerance_change=1e-10)

    def loss() -> Tensor:
        search.zero_grad()
        value = F.cross_entropy(x @ weight.T + bias, y) + decay / 2 * weight.square().sum()
        value.backward()
        return value

    search.step(loss)
    return weight.detach(), bias.detach()


def accuracy(model: tuple[Tensor, Tensor], x: Tensor, y: Tensor) -> float:
    return float(((x @ model[0].T + model[1]).argmax(1) == y).double().mean())


def probe(train: Tensor, labels: Tensor, held_out: Tensor, answers: Tensor, seed: int = 0) -> dict[str, float]:
    """Accuracies of a standardised linear probe on features [N, d] and labels [N]; `decay` is chosen inside `train`."""
    classes = int(max(labels.max(), answers.max())) + 1
    train, held_out = train.double(), held_out.double()
    mean, scale = train.mean(0), train.std(0).clamp(min=1e-6)
    train, held_out = (train - mean) / scale, (held_out - mean) / scale
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    inner, chosen = order[len(order) // 10 :], order[: max(1, len(order) // 10)]

    def score(decay: float) -> float:
        return accuracy(fit(train[inner], labels[inner], classes, decay), train[chosen], labels[chosen])

    decay = max(DECAYS, key=score)
    model = fit(train, labels, classes, decay)
    most = torch.bincount(labels, minlength=classes).argmax()
    return {
        "probe_accuracy": accuracy(model, held_out, answers),
        "probe_train_accuracy": accuracy(model, train, labels),
        "chance": float((answers == most).double().mean()),
        "decay": decay,
        "features": train.shape[1],
    }


def evaluate(config: Mapping[str, Any], data: Any) -> dict[str, Any]:
    """The command: measures, prints, writes JSON; returns what it wrote."""
    from vgen.models import FAMILIES
    from vgen.sampling import checkpoint_hash, resolve_device
    from vtok.checkpoint import load_module
    from vtok.config import Families
    from vtok.tokenizer import Tokenizer

    check_numbers(config)
    if config["pool"] not in POOLS:
        raise ValueError(f"pool={config['pool']}: choose {' or '.join(POOLS)}")
    out = Path(config["out"] or results_folder(str(config["from"])) / "linprobe.json")
    check_place("out", out)
    device = resolve_device(config["device"])
    tokenizer = load_module(config["from"], Families(FAMILIES, config.get("trust") or ()), config["weights"])
    if not isinstance(tokenizer, Tokenizer):
        raise ValueError(f"from={config['from']} holds a {type(tokenizer).__name__}: give a tokenizer's run")
    tokenizer = tokenizer.to(device).eval()
    if data.image_size != tokenizer.spec.image_size:
        raise ValueError(f"data.image_size={data.image_size}: pass data.image_size={tokenizer.spec.image_size}")
    sides = from_data(data, "train", config["train_images"]), from_data(data, "val", config["images"])
    if any(side.labels is None for side in sides) or data.num_classes < 2:
        raise ValueError("a probe needs labels of at least two classes: choose another data=")
    batch = int(config["batch_size"])
    train, held_out = (read(tokenizer, s, config["pool"], batch_size=batch, device=device) for s in sides)
    metrics = probe(train, sides[0].labels, held_out, sides[1].labels, int(config["seed"]))
    result = {
        "metrics": metrics,
        "tokenizer": f"{config['from']} (sha256 {checkpoint_hash(config['from'])})",
        "weights": config["weights"],
        "pool": config["pool"],
        "train_images": sides[0].count,
        "images": sides[1].count,
        "source": sides[1].name,
        "command": "python -m eval.linprobe " + " ".join(sys.argv[1:]),
    }
    for name, value in result["metrics"].items():
        print(f"{name} {value:.4g}")
    write_json(out, result)
    print(f"wrote {out}")
    return result


@entry("eval_linprobe", CONFIGS)
def main(config: Any) -> None:
    from vtok.config import instantiate

    evaluate(config, instantiate(config.data))


if __name__ == "__main__":
    main()
