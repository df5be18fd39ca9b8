"""`python -m eval.throughput`: images a second of encoding, decoding, sampling and training, beside the roofline.

    python -m eval.throughput model=llamagen_b tokenizer=llamagen_vq16 batches=[1,8]

Random weights of the published sizes: speed does not depend on their values. For each part the smallest possible time
is the larger of (matrix operations counted / measured matmul rate) and (bytes of weights read / measured bandwidth);
`fraction` is that over the measured time. Weights are read once a pass; sampling makes one pass for each step of the
layout. Sampling does not include decoding. Training is forward, backward and a fused AdamW update, as in train.py.

Every row holds the paths that were taken (vtok/counters.py), and a setting whose path was not is an error: a fallback
is no measurement of it (eval/paths.py). compile is for training, cuda_graphs, packed and quant are for sampling.
"""

from __future__ import annotations

import copy
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from eval import paths
from eval.fid import CONFIGS
from eval.protocol import library_versions
from vtok import counters
from vtok.acceleration import compile_blocks, light_weights
from vtok.cli import entry
from vtok.decoding import channels_last, decode_images
from vtok.layers.packed import PackedLinear

PARTS = ("encode", "decode", "sample", "train")
PRODUCTS = {  # operations of what PyTorch's counter does not know: shapes of x and the weight in
    torch.ops.mkldnn._linear_pointwise: lambda x, weight, *_, **__: 2 * x.numel() * weight[0]
}
OPTIONS = ("compile", "cuda_graphs", "packed", "quant")


@dataclass
class Job:
    """What is timed: `run` reads the weights of `module` `passes` times. graded: with gradients. asked: the paths to be
    taken. plain: what counts its operations, where `run` hides them (replayed graphs)."""

    run: Callable[[], Any]
    module: nn.Module
    passes: int
    graded: bool
    asked: paths.Asked
    plain: Callable[[], Any] | None = None


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(run: Callable[[], Any], device: torch.device, repeats: int) -> list[float]:
    """Wall-clock seconds of `repeats` runs after one to warm up."""
    run()
    found = []
    for _ in range(repeats):
        wait(device)
        start = time.perf_counter()
        run()
        wait(device)
        found.append(time.perf_counter() - start)
    return found


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second (two a multiplication) of a square matrix product, large enough to be bound by them."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / min(seconds(lambda: a @ b, device, 5))


def bandwidth(device: torch.device) -> float:
    """Bytes a second of reading a large array (a sum), as a pass over weights does."""
    x = torch.ones(2**28 if device.type == "cuda" else 2**26, device=device)
    return x.numel() * 4 / min(seconds(lambda: x.sum(), device, 5))


def weight_bytes(module: nn.Module) -> int:
    """Bytes of the weights that every pass reads: all but lookup tables, as they are stored."""
    tables = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    return sum(stored_bytes(t) for t in stored(module) if id(t) not in tables)


def stored(module: nn.Module) -> list[Tensor]:
    """All weights, packed ones too."""
    packed = [t for m in module.modules() if isinstance(m, PackedLinear) for t in (m.weight, m.bias) if t is not None]
    return [*module.parameters(), *packed]


def stored_bytes(tensor: Tensor) -> int:
    """Of all that a tensor is made of: 8-bit weights have scales beside them, and show the dtype they stand for."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(stored_bytes(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()


def floor(run: Callable[[], Any], bytes_read: float, rate: float, speed: float) -> tuple[float, float]:
    """(operations of matrix products in `run`, the smallest seconds that they and `bytes_read` allow)."""
    with FlopCounterMode(display=False, custom_mapping=PRODUCTS) as counter:
        run()
    operations = float(counter.get_total_flops())
    return operations, max(operations / rate, bytes_read / speed)


def measure(config: Mapping[str, Any], tokenizer: nn.Module, generator: nn.Module | None) -> list[dict[str, Any]]:
    """One row for each part and batch size."""
    device, dtype = next(tokenizer.parameters()).device, getattr(torch, config["dtype"])
    rate, speed = matmul_rate(device, dtype), bandwidth(device)
    autocast = torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext()
    rows, light = [], generator
    if generator is not None:  # training needs weights of its own
        light = copy.deepcopy(generator) if "train" in config["parts"] else generator
        light_weights(light, dtype, **storage(config))
    for batch in config["batches"]:
        work = jobs(config, tokenizer, generator, light, int(batch), device)
        for part in config["parts"]:
            if part not in work:
                continue
            job = work[part]
            own = part in ("sample", "decode")  # these bring their precision with them
            with nullcontext() if own else autocast, nullcontext() if job.graded else torch.inference_mode():
                operations, smallest = floor(job.plain or job.run, job.passes * weight_bytes(job.module), rate, speed)
                counters.reset()  # only what is timed counts, with the run that warms it up
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                spent = seconds(job.run, device, int(config["repeats"]))
            taken = counters.read()
            job.asked.check(taken, f"{part} at batch {batch}")
            middle = statistics.median(spent)
            rows.append(
                {
                    "part": part,
                    "batch": int(batch),
                    "images_per_second": batch / middle,
                    "ms_per_image": 1000 * middle / batch,
                    "seconds": sorted(spent),
                    "roofline_ms_per_image": 1000 * smallest / batch,
                    "fraction": smallest / middle,
                    "matmul_operations_per_image": operations / batch,
                    "peak_memory_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
                    "parameters": sum(t.numel() for t in stored(job.module)),
                    "paths": taken,
                }
            )
            print(
                f"{part:7} batch {batch:4}  {rows[-1]['images_per_second']:9.2f} images/s  "
                f"{rows[-1]['ms_per_image']:9.1f} ms/image  {rows[-1]['fraction']:6.1%} of the roofline\n"
                f"        paths: {', '.join(f'{path} {times}' for path, times in taken.items()) or 'none counted'}",
                flush=True,
            )
    facts = {"matmul_rate": rate, "bandwidth": speed, "device": describe(device), "threads": torch.get_num_threads()}
    return [row | facts for row in rows]


def jobs(
    config: Mapping[str, Any],
    tokenizer: Any,
    generator: Any | None,
    light: Any | None,
    batch: int,
    device: torch.device,
) -> dict[str, Job]:
    """What is timed, by part. light: the generator with its weights as they are stored for sampling."""
    size = tokenizer.spec.image_size
    drawer = torch.Generator().manual_seed(int(config["seed"]))
    images = (torch.rand(batch, 3, size, size, generator=drawer) * 2 - 1).to(device)
    seeds = torch.arange(batch, device=device)
    from vtok.noise import SampleNoise

    noise = SampleNoise(seeds)
    with torch.inference_mode():
        tokens = tokenizer.encode(images, noise=noise)
    dtype = getattr(torch, config["dtype"])
    decode = lambda: decode_images(tokenizer, tokens, dtype=dtype, noise=noise)  # noqa: E731
    found = {
        "encode": Job(lambda: tokenizer.encode(images, noise=noise), tokenizer, 1, False, paths.Asked()),
        "decode": Job(decode, tokenizer, 1, False, paths.decoding(dtype=dtype)),
    }
    if generator is None:
        return found
    from vgen.guidance import guidance
    from vgen.heads import DrawRule
    from vgen.pipeline import Pipeline

    guide, graphs = guidance(float(config["guidance"])), bool(config["cuda_graphs"])
    labels = torch.arange(batch, device=device) % max(generator.num_classes, 1)
    if "sample" in config["parts"]:
        fast, plain = Pipeline(light, tokenizer, cuda_graphs=graphs), Pipeline(light, tokenizer)
        draw = lambda pipeline: pipeline.tokens(labels, seeds, guide=guide, rule=DrawRule())  # noqa: E731
        asked = paths.sampling(light, dtype=dtype, guided=guide.streams > 1, cuda_graphs=graphs, **storage(config))
        found["sample"] = Job(lambda: draw(fast), light, light.layout.steps, False, asked, lambda: draw(plain))
    if "train" in config["parts"]:
        compiled, given = bool(config["compile"]), {"tokens": tokens.clone(), "label": labels, "key": seeds}
        asked = paths.training(generator, batch=batch, device=device, compiled=compiled)
        step = trainer(generator, given, compiled=compiled)
        plain_step = lambda: trainer(generator, given)()  # noqa: E731 (nothing of it stays in memory)
        found["train"] = Job(step, generator, 3, True, asked, plain_step if compiled else None)
    return found


def storage(config: Mapping[str, Any]) -> dict[str, Any]:
    """How the trunk's weights are stored for sampling, beside their dtype."""
    return {"packed": config["packed"], "quant": config["quant"]}


def trainer(generator: Any, batch: Mapping[str, Tensor], *, compiled: bool = False) -> Callable[[], None]:
    """One optimizer step on a copy of the generator."""
    model = copy.deepcopy(generator).float().train()
    if compiled:
        compile_blocks(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        with torch.inference_mode(False):
            optimizer.zero_grad(set_to_none=True)
            model.loss(batch, progress=0.5)["loss"].backward()
            optimizer.step()

    return step


def describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    except OSError:
        pass
    return f"{model}, {torch.get_num_threads()} threads"


def table(rows: list[Mapping[str, Any]]) -> str:
    """Markdown of all rows."""
    lines = ["| tokenizer | model | part | dtype | batch | images/s | ms/image | roofline ms | of it | on |"]
    lines.append("|" + "---|" * 10)
    for row in rows:
        lines.append(
            f"| {row['tokenizer']} | {row['model'] or ''} | {row['part']} | {row['dtype']} | {row['batch']} "
            f"| {row['images_per_second']:.2f} | {row['ms_per_image']:.1f} | {row['roofline_ms_per_image']:.1f} "
            f"| {row['fraction']:.0%} | {row['device']} |"
        )
    return "\n".join(lines) + "\n"


def plot(path: str, rows: list[Mapping[str, Any]]) -> None:
    """Images a second over the batch size, one line for each part, dashed where the roofline is."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4))
    for part in dict.fromkeys(row["part"] for row in rows):
        members = sorted((r for r in rows if r["part"] == part), key=lambda r: r["batch"])
        batches = [r["batch"] for r in members]
        (line,) = axis.plot(batches, [r["images_per_second"] for r in members], marker="o", label=part)
        axis.plot(batches, [1000 / r["roofline_ms_per_image"] for r in members], "--", color=line.get_color())
    axis.set(xscale="log", yscale="log", xlabel="images at once", ylabel="images/s (dashed: roofline)")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def evaluate(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The command: measures, prints, writes `out`; returns the rows of this call."""
    from vgen.sampling import resolve_device, resolve_dtype
    from vtok.checkpoint import write_json
    from vtok.config import instantiate

    unknown = set(config["parts"]) - set(PARTS)
    if unknown or not config["batches"] or min(config["batches"]) < 1 or config["repeats"] < 1:
        raise ValueError(f"parts must be of {', '.join(PARTS)}; batches and repeats at least 1")
    device, dtype = resolve_device(config["device"]), resolve_dtype(config["dtype"])
    if config["threads"]:
        torch.set_num_threads(int(config["threads"]))
    torch.manual_seed(int(config["seed"]))
    tokenizer = instantiate(config["tokenizer"], _convert_="all").to(device).eval().requires_grad_(False)
    if dtype != torch.float32:
        channels_last(tokenizer)
    generator = None
    if config.get("model") is not None:
        make = instantiate(config["model"], _convert_="all", _partial_=True)
        make.func.accepts(tokenizer.spec)
        generator = make(spec=tokenizer.spec, num_classes=int(config["num_classes"]))
        generator.adopt(tokenizer)
        generator.to(device).eval()
    elif {"sample", "train"} & set(config["parts"]):
        print("model=null: encoding and decoding only")
    from hydra.core.hydra_config import HydraConfig

    choices = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    names = {"tokenizer": choices.get("tokenizer"), "model": choices.get("model"), "dtype": config["dtype"]}
    names |= {key: config[key] for key in OPTIONS}
    rows = [{**names, **row} for row in measure(config, tokenizer, generator)]
    key = ("tokenizer", "model", "dtype", *OPTIONS, "part", "batch", "device")
    out = Path(config["out"])
    earlier = json.loads(out.read_text())["rows"] if out.is_file() else []
    done = {tuple(row.get(k) for k in key) for row in rows}
    rows_all = [row for row in earlier if tuple(row.get(k) for k in key) not in done] + rows
    date = time.strftime("%Y-%m-%d")
    write_json(out, {"rows": rows_all, "versions": library_versions(), "date": date})
    print(f"wrote {out}")
    if config["table"]:
        Path(config["table"]).write_text(table(rows_all))
    if config["plot"]:
        plot(config["plot"], rows)
    return rows


@entry("eval_throughput", CONFIGS)
def main(config: Any) -> None:
    evaluate(config)


if __name__ == "__main__":
    main()
