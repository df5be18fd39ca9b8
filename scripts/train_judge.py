"""Train the CIFAR-10 judge (eval/judge.py) and write its fp16 weights with accuracy and SHA-256.

    python scripts/train_judge.py folder=<folder with train/ and test/, one folder a class>

One-cycle SGD with Nesterov momentum, label smoothing, flips and shifts; about 11 minutes on two cores with AMX. The
test images are judged once, at the end, with the weights as stored.
"""

from __future__ import annotations

import hashlib
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from vtok.cli import check_place, check_whole_number, entry  # noqa: E402


def read_split(folder: Path, side: int):
    """uint8 images [N, 3, side, side], labels int64 [N] and class names of a class-per-folder tree, in sorted order."""
    import numpy as np
    import torch
    from PIL import Image

    classes = sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
    if not classes:
        raise ValueError(f"{folder} holds no class folders: change `folder`")
    if empty := next((name for name in classes if not any((folder / name).iterdir())), None):
        raise ValueError(f"{folder / empty} holds no images: change `folder`")
    images, labels = [], []
    for label, name in enumerate(classes):
        for path in sorted((folder / name).iterdir()):
            with Image.open(path) as image:
                images.append(
                    np.asarray(
                        image.convert("RGB").resize((side, side))
                        if image.size != (side, side)
                        else image.convert("RGB")
                    )
                )
            labels.append(label)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels), classes


def augment(images, shift: int, generator):
    """Random flip, then a random translation with reflected edges, of float images [B, 3, H, W]."""
    import torch

    B, _, H, W = images.shape
    flip = torch.rand(B, generator=generator) < 0.5
    images = torch.where(flip.view(B, 1, 1, 1), images.flip(3), images)
    padded = torch.nn.functional.pad(images, (shift,) * 4, mode="reflect")
    dy, dx = torch.randint(0, 2 * shift + 1, (2, B, 1), generator=generator)
    rows, columns = dy + torch.arange(H), dx + torch.arange(W)
    return padded[torch.arange(B).view(B, 1, 1), :, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2)


def accuracy(judge, images, labels, batch: int = 1000) -> float:
    """Share of uint8 images [N, 3, H, W] that the judge labels right, in float32."""
    import torch

    from eval.judge import to_float

    right = 0
    with torch.inference_mode():
        for start in range(0, len(images), batch):
            _, logits = judge(to_float(images[start : start + batch]))
            right += int((logits.argmax(1) == labels[start : start + batch]).sum())
    return right / len(images)


@entry(
    "train_judge",
    ROOT / "configs",
    whole={"epochs": 1, "shift": 0, "threads": 1},
    numbers=dict.fromkeys(("lr", "weight_decay"), (0, math.inf))
    | dict.fromkeys(("warmup", "momentum", "label_smoothing"), (0, 1)),
)
def main(config) -> None:
    import torch

    from eval.judge import SIDE, Judge, save_judge, to_float

    if config.precision not in ("bf16", "fp32"):
        raise ValueError(f"precision={config.precision}: choose bf16 or fp32")
    if not isinstance(config.widths, Sequence) or len(config.widths) != 3:
        raise ValueError(f"widths={config.widths}: give a list of three, for the stages")
    for width in config.widths:
        check_whole_number("widths", width, 1)
    if config.shift >= SIDE:
        raise ValueError(f"shift={config.shift}: below the {SIDE} pixels of a side")
    check_place("out", config.out, endings=(".safetensors",))
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    began = time.perf_counter()
    images, labels, classes = read_split(Path(config.folder) / "train", SIDE)
    test, answers, names = read_split(Path(config.folder) / "test", SIDE)  # what is wrong with it comes before the work
    if names != classes:
        raise ValueError(f"train/ and test/ of folder={config.folder} hold different classes")
    if len(images) < config.batch_size:
        raise ValueError(f"batch_size={config.batch_size}: there are {len(images)} training images")
    print(f"{len(images)} training images of {len(classes)} classes read in {time.perf_counter() - began:.0f} s")

    widths = tuple(config.widths)
    judge = Judge(widths=widths, classes=len(classes)).to(memory_format=torch.channels_last)
    judge.set_whitening(to_float(images[:: max(1, len(images) // 5000)]))
    count = sum(p.numel() for p in judge.parameters())
    batch, (N,) = config.batch_size, labels.shape
    per_epoch = N // batch
    total = config.epochs * per_epoch
    rise = max(1, round(config.warmup * total))
    if rise >= total:
        raise ValueError(f"warmup={config.warmup} is all of the {total} steps: lower it, or raise epochs")
    optimizer = torch.optim.SGD(
        [p for p in judge.parameters() if p.requires_grad],
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: min((k + 1) / rise, max(0.0, (total - k) / (total - rise)))
    )
    print(f"{count:,} parameters, {total} steps of {batch} images")
    trained = time.perf_counter()
    for epoch in range(config.epochs):
        order = torch.randperm(N, generator=generator)
        running = right = 0.0
        for k in range(per_epoch):
            index = order[k * batch : (k + 1) * batch]
            x = augment(to_float(images[index]), config.shift, generator).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=config.precision == "bf16"):
                _, logits = judge(x)
            loss = torch.nn.functional.cross_entropy(
                logits.float(), labels[index], label_smoothing=config.label_smoothing
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            running += loss.item()
            right += (logits.argmax(1) == labels[index]).sum().item()
        seconds = time.perf_counter() - trained
        left = seconds / (epoch + 1) * (config.epochs - epoch - 1)
        print(
            f"epoch {epoch + 1}/{config.epochs}  loss {running / per_epoch:.3f}  augmented training accuracy "
            f"{right / per_epoch / batch:.3f}  {per_epoch * batch * (epoch + 1) / seconds:.0f} images/s  "
            f"{left:.0f} s left",
            flush=True,
        )

    judge.eval()
    exact = accuracy(judge, test, answers)
    judge.half().float()  # what the file holds
    right = accuracy(judge, test, answers)
    out = Path(config.out)
    save_judge(judge, out, classes=classes, widths=widths, test_accuracy=right)
    print(f"test accuracy {right:.4f} with weights rounded to fp16, as stored ({exact:.4f} before)")
    digest = hashlib.sha256(out.read_bytes()).hexdigest()
    print(f"{out}  {out.stat().st_size:,} bytes  {count:,} parameters  sha256 {digest}")
    print(f"{time.perf_counter() - began:.0f} s in all, {time.process_time():.0f} CPU-seconds")


if __name__ == "__main__":
    main()
