"""`python -m eval.throughput`: images a second of encoding, decoding, sampling and training, beside the roofline.

    python -m eval.throughput model=llamagen_b tokenizer=llamagen_vq16 batches=[1,8]

Random weights of the published sizes: speed does not depend on their values. For each part the smallest possible time
is the larger of (matrix operations counted / measured matmul rate) and (bytes of weights read / measured bandwidth);
`fraction` is that over the measured time. What is counted is a plain run, eager and without graphs: products by
PyTorch's counter, weights whenever a module that has them is called, so that passes of a solver and a second reading of
finished entities are in it; weights that no operation takes, such as those of training alone, are not. A training step
counts as in MFU (vtok/acceleration.py) and reads its weights three times. Sampling does not include decoding. Training
is forward and backward, the loss under autocast as in train.py, and a fused AdamW update; `mfu` is its share of the
peak that the GPU's maker states. online is such a step on images, whose encoding is not among its operations: in
float32 as in train.py, and on a GPU with encode_ahead beside the step before. Peak memory is what PyTorch allocates on
the GPU, and on the CPU what is resident of the whole process while the part runs (eval/resident.py), with whatever
other parts keep there; "not measured" where the system does not tell it.

Every row holds the paths that were taken (vtok/counters.py), and a setting whose path was not is an error: a fallback
is no measurement of it (eval/paths.py). prefixes is for training, cuda_graphs and quant are for sampling, compile for
both, and packed for all but training, which needs weights of its own, as does what it encodes with. profile=true runs
once more under PyTorch's profiler and says what the time goes into (eval/shares.py).
"""

from __future__ import annotations

import copy
import itertools
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from eval import paths
from eval.fid import CONFIGS
from eval.protocol import library_versions
from eval.resident import Resident
from eval.shares import line, shares
from vtok import counters
from vtok.acceleration import compile_blocks, light_weights, peak_rate, training_operations, utilisation
from vtok.cli import check_json, check_place, check_whole_number, entry, is_list
from vtok.data.ahead import Ahead
from vtok.decoding import channels_last, decode_images, encode_images, light_tokenizer
from vtok.layers.packed import HalfLinear, PackedLinear
from vtok.layers.trunk import Trunk
from vtok.noise import SampleNoise

PARTS = ("encode", "decode", "sample", "train", "online")
LEARNING = {"train", "online"}  # those that change weights
PRODUCTS = {  # operations of what PyTorch's counter does not know: shapes of x and the weight in
    torch.ops.mkldnn._linear_pointwise: lambda x, weight, *_, **__: 2 * x.numel() * weight[0],
    torch.ops.quantized.linear_dynamic_fp16: lambda x, *_, out_shape, **__: 2 * x.numel() * out_shape[-1],
}
OPTIONS = ("compile", "prefixes", "cuda_graphs", "packed", "quant", "encode_ahead")
PLOTS = (".png", ".jpg", ".pdf", ".svg")
STEPS = ("steps", "solver_steps")  # of sampling
PROGRESS = 0.5  # share of training done, in the step that is timed


@dataclass
class Job:
    """What is timed. cost: (operations of its matrix products, bytes of weights read). module: whose weights those are.
    asked: the paths to be taken. graded: with gradients. facts: what else tells its row from others, of STEPS."""

    run: Callable[[], Any]
    cost: Callable[[], tuple[float, float]]
    module: nn.Module
    asked: paths.Asked
    graded: bool = False
    facts: dict[str, Any] = field(default_factory=dict)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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
    passes = 16 if device.type == "cuda" else 1  # there one takes but ten times what launching and waiting do

    def read() -> None:
        for _ in range(passes):
            x.sum()

    return passes * x.numel() * 4 / min(seconds(read, device, 5))


def weight_bytes(
    module: nn.Module, calls: Mapping[nn.Module, int] | None = None, taken: Callable[[Tensor], bool] | None = None
) -> int:
    """Bytes of the weights that a pass reads: all but lookup tables, as they are stored.

    calls: how often each module inside was called in a run, whose bytes are wanted; a module that never was has its
    weights read by the one that holds it, as often as that was called. taken: whether any operation of that run took a
    weight; others were not read, though their owner was called.
    """
    times: dict[str, int] = {}
    total = 0
    for name, part in module.named_modules():  # owners first
        times[name] = 1 if calls is None else calls.get(part) or times.get(name.rpartition(".")[0], 0)
        if not isinstance(part, nn.Embedding):
            read = [t for t in stored(part, recurse=False) if taken is None or taken(t)]
            total += times[name] * sum(stored_bytes(t) for t in read)
    return total


def stored(module: nn.Module, *, recurse: bool = True) -> list[Tensor]:
    """All weights, packed ones too."""
    inside = module.modules() if recurse else [module]
    kinds = (PackedLinear, HalfLinear)
    packed = [t for m in inside if isinstance(m, kinds) for t in (m.weight, m.bias) if t is not None]
    return [*module.parameters(recurse), *packed]


def pieces(tensor: Tensor) -> list[Tensor]:
    """All that a tensor is made of: 8-bit weights have scales beside them, and show the dtype they stand for."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [piece for name in names for piece in pieces(getattr(tensor, name))]


def stored_bytes(tensor: Tensor) -> int:
    return sum(piece.numel() * piece.element_size() for piece in pieces(tensor))


class Taken(TorchDispatchMode):
    """Which tensors the operations inside it take, by what holds their numbers, so that a view counts as its base."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = tree_leaves((args, kwargs))
        self.seen.update(self.holder(piece) for t in given if isinstance(t, Tensor) for piece in pieces(t))
        return operation(*args, **(kwargs or {}))

    def __call__(self, tensor: Tensor) -> bool:
        if tensor.is_meta:  # of a HalfLinear, whose product reads all of it
            return True
        return any(self.holder(piece) in self.seen for piece in pieces(tensor))

    @staticmethod
    def holder(tensor: Tensor) -> int:
        return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)  # packed: no storage


def counted(run: Callable[[], Any], module: nn.Module) -> tuple[float, float]:
    """(operations of the matrix products of a run, bytes of the weights of `module` that it reads)."""
    calls: Counter[nn.Module] = Counter()
    hooks = [part.register_forward_pre_hook(lambda part, _: calls.update([part])) for part in module.modules()]
    try:
        with (
            torch.compiler.set_stance("force_eager"),
            FlopCounterMode(display=False, custom_mapping=PRODUCTS) as counter,
            Taken() as taken,
        ):
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return float(counter.get_total_flops()), weight_bytes(module, calls, taken)


def training_cost(generator: Any, batch: Mapping[str, Tensor]) -> tuple[float, float]:
    """The same of a training step, in closed form where there is one, else counted. Of a batch on CUDA those of its
    first image on the CPU are: PyTorch's counter cannot see into FlexAttention, which is compiled, and fails on it."""
    count, operations = len(batch["label"]), training_operations(generator, batch["key"].cpu())
    if operations is not None:
        total = count * operations
    elif batch["label"].device.type == "cpu":
        total, _ = counted(trainer(generator, lambda: batch), generator)
    else:
        row = {name: value[:1].cpu() for name, value in batch.items() if isinstance(value, Tensor)}
        copied = copy.deepcopy(generator).cpu()
        total = count * counted(trainer(copied, lambda: row), copied)[0]
    return total, 3.0 * weight_bytes(generator)


def measure(config: Mapping[str, Any], tokenizer: nn.Module, generator: nn.Module | None) -> list[dict[str, Any]]:
    """One row for each part and batch size."""
    device, dtype = next(tokenizer.parameters()).device, getattr(torch, config["dtype"])
    rate, speed = matmul_rate(device, dtype), bandwidth(device)
    rows, light, quick = [], generator, tokenizer
    if config["packed"] is not False:
        quick = copy.deepcopy(tokenizer) if "online" in config["parts"] else tokenizer
        light_tokenizer(quick, dtype)
    if generator is not None:  # training needs weights of its own
        light = copy.deepcopy(generator) if LEARNING & set(config["parts"]) else generator
        light_weights(light, dtype, compiled=bool(config["compile"]), **storage(config))
    for batch in config["batches"]:
        if config["compile"]:
            torch._dynamo.reset()  # for this size alone, as in a training, and not for any
        work = jobs(config, tokenizer, quick, generator, light, int(batch), device)
        for part in config["parts"]:
            if part not in work:
                continue
            job = work[part]
            with nullcontext() if job.graded else torch.inference_mode():
                operations, bytes_read = job.cost()
                begun = paths.begin(device)  # only what is timed counts, with the run that warms it up
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(device)
                with paths.fused(device, dtype):
                    with Resident() as resident:
                        spent = seconds(job.run, device, int(config["repeats"]))
                    taken = counters.read()
                    profiled = shares(job.run, device) if config["profile"] else None
            (begun | job.asked).check(taken, f"{part} at batch {batch}")
            middle, smallest = statistics.median(spent), max(operations / rate, bytes_read / speed)
            peak = peak_rate(device) if job.graded and dtype == torch.bfloat16 else None
            rows.append(
                {
                    "part": part,
                    "batch": int(batch),
                    **dict.fromkeys(STEPS),
                    **job.facts,
                    "images_per_second": batch / middle,
                    "ms_per_image": 1000 * middle / batch,
                    "seconds": sorted(spent),
                    "roofline_ms_per_image": 1000 * smallest / batch,
                    "fraction": smallest / middle,
                    "mfu": utilisation(batch / middle, operations / batch, peak, 1),
                    "matmul_operations_per_image": operations / batch,
                    "weight_bytes_read": bytes_read,
                    **peak_memory(device, resident),
                    "parameters": sum(t.numel() for t in stored(job.module)),
                    "paths": taken,
                    "profile": profiled,
                }
            )
            print(
                f"{part:7} batch {batch:4}  {rows[-1]['images_per_second']:9.2f} images/s  "
                f"{rows[-1]['ms_per_image']:9.1f} ms/image  {rows[-1]['fraction']:6.1%} of the roofline"
                f"{'' if rows[-1]['mfu'] is None else '  MFU ' + mfu(rows[-1])}\n"
                f"        peak memory, GiB: {memory(rows[-1])}\n"
                f"        paths: {', '.join(f'{path} {times}' for path, times in taken.items()) or 'none counted'}",
                flush=True,
            )
            if profiled is not None:
                print(f"        profile: {line(profiled)}", flush=True)
    facts = {"matmul_rate": rate, "bandwidth": speed, "device": describe(device), "threads": torch.get_num_threads()}
    return [row | facts for row in rows]


def peak_memory(device: torch.device, resident: Resident) -> dict[str, Any]:
    """Bytes, or None, and of what they are."""
    if device.type == "cuda":
        peak, of = torch.cuda.max_memory_allocated(device), "allocated on the GPU"
    else:
        peak, of = resident.peak if device.type == "cpu" else None, "resident, of the process"
    return {"peak_memory_bytes": peak, "peak_memory_of": "not measured" if peak is None else of}


def jobs(
    config: Mapping[str, Any],
    tokenizer: Any,
    quick: Any,
    generator: Any | None,
    light: Any | None,
    batch: int,
    device: torch.device,
) -> dict[str, Job]:
    """What is timed, by part. light: the generator with its weights as they are stored for sampling; quick: so the
    tokenizer, for all but training."""
    size = tokenizer.spec.image_size
    drawer = torch.Generator().manual_seed(int(config["seed"]))
    images = (torch.rand(batch, 3, size, size, generator=drawer) * 2 - 1).to(device)
    seeds = torch.arange(batch, device=device)
    noise = SampleNoise(seeds)
    with torch.inference_mode():
        tokens = encode_images(quick, images, noise=noise)
    dtype = getattr(torch, config["dtype"])
    encode = lambda: encode_images(quick, images, dtype=dtype, noise=noise)  # noqa: E731
    decode = lambda: decode_images(quick, tokens, dtype=dtype, noise=noise)  # noqa: E731
    found = {
        "encode": Job(encode, lambda: counted(encode, quick), quick, paths.encoding(quick, dtype=dtype)),
        "decode": Job(decode, lambda: counted(decode, quick), quick, paths.decoding(quick, dtype=dtype)),
    }
    if generator is None:
        return found
    from vgen.guidance import guidance
    from vgen.heads import DrawRule
    from vgen.pipeline import Pipeline

    guide, graphs = guidance(float(config["guidance"])), bool(config["cuda_graphs"])
    labels = torch.arange(batch, device=device) % max(generator.num_classes, 1)
    if "sample" in config["parts"]:
        fast, plain = Pipeline(light, quick, cuda_graphs=graphs), Pipeline(light, quick)
        draw = lambda pipeline: pipeline.tokens(labels, seeds, guide=guide, rule=DrawRule())  # noqa: E731
        asked = paths.sampling(
            light,
            dtype=dtype,
            guided=guide.streams > 1,
            cuda_graphs=graphs,
            compiled=bool(config["compile"]),
            **storage(config),
        )
        facts = {"steps": light.layout.steps, "solver_steps": config["model"].get("solver_steps")}
        cost = lambda: counted(lambda: draw(plain), light)  # noqa: E731
        found["sample"] = Job(lambda: draw(fast), cost, light, asked, facts=facts)
    if not LEARNING & set(config["parts"]):
        return found
    given = {"tokens": tokens.clone(), "label": labels, "key": seeds, "host_key": seeds.cpu().numpy()}
    if "patches" in generator.reads_also:  # any will do: the teacher's own time is not in it
        given["patches"] = torch.randn(batch, generator.layout.length, generator.channels, device=device)
    return found | learning(config, tokenizer, generator, images, given)


def learning(
    config: Mapping[str, Any], tokenizer: Any, generator: Any, images: Tensor, given: Mapping[str, Tensor]
) -> dict[str, Job]:
    """`train`: steps on `given`, whose tokens are there; `online`: on those of `images`, encoded a step ahead."""
    device, noise, compiled = images.device, SampleNoise(given["key"]), bool(config["compile"])
    options = {"dtype": getattr(torch, config["dtype"]), "compiled": compiled, "prefixes": bool(config["prefixes"])}
    asked = paths.training(generator, key=given["key"], progress=PROGRESS, device=device, **options)
    cost, found = lambda: training_cost(generator, given), {}

    @torch.no_grad()
    def encode(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {**given, "tokens": encode_images(tokenizer, batch["image"], noise=noise)}

    if "train" in config["parts"]:
        found["train"] = Job(trainer(generator, lambda: given, **options), cost, generator, asked, graded=True)
    if "online" in config["parts"]:
        ahead = device.type == "cuda" and bool(config["encode_ahead"])
        pictures = itertools.repeat({"image": images})
        batches = iter(Ahead(pictures, encode, device)) if ahead else map(encode, pictures)
        asked |= paths.encoding(tokenizer, dtype=torch.float32) | paths.Asked({"tokens.ahead"} if ahead else set())
        step = trainer(generator, lambda: next(batches), **options)
        found["online"] = Job(step, cost, generator, asked, graded=True)
    return found


def storage(config: Mapping[str, Any]) -> dict[str, Any]:
    """How the trunk's weights are stored for sampling, beside their dtype."""
    return {"packed": config["packed"], "quant": config["quant"]}


def trainer(
    generator: Any,
    batch: Callable[[], Mapping[str, Tensor]],
    *,
    dtype: torch.dtype = torch.float32,
    compiled: bool = False,
    prefixes: bool = False,
) -> Callable[[], None]:
    """One optimizer step on a copy of the generator. batch: gives a step's batch. dtype: of autocast, around the loss
    alone. prefixes: as Trunk's."""
    model = copy.deepcopy(generator).float().train()
    for trunk in model.modules():
        if isinstance(trunk, Trunk):
            trunk.prefixes = prefixes
    device = next(model.parameters()).device
    if compiled:
        compile_blocks(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        with torch.inference_mode(False):
            optimizer.zero_grad(set_to_none=True)
            given = batch()
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss = model.loss(given, progress=PROGRESS)["loss"]
            loss.backward()
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
    return f"{model} with {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def table(rows: list[Mapping[str, Any]]) -> str:
    """Markdown of all rows."""
    names = ("tokenizer", "model", "part", "steps", "dtype", "batch", "images/s", "ms/image", "roofline ms", "of it")
    names += ("MFU", "peak memory, GiB", "on")
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    for row in rows:
        lines.append(
            f"| {row['tokenizer']} | {row['model'] or ''} | {row['part']} | {steps(row)} | {row['dtype']} "
            f"| {row['batch']} | {row['images_per_second']:.2f} | {row['ms_per_image']:.1f} "
            f"| {row['roofline_ms_per_image']:.1f} | {row['fraction']:.0%} | {mfu(row)} | {memory(row)} "
            f"| {row['device']} |"
        )
    return "\n".join(lines) + "\n"


def steps(row: Mapping[str, Any]) -> str:
    """Of sampling, and of the solver in each of them: "16 x 100"; empty for other parts."""
    return " x ".join(str(row[name]) for name in STEPS if row.get(name))


def mfu(row: Mapping[str, Any]) -> str:
    return "" if row.get("mfu") is None else f"{row['mfu']:.0%}"


def memory(row: Mapping[str, Any]) -> str:
    """Peak memory in GiB."""
    peak = row.get("peak_memory_bytes")
    return "not measured" if peak is None else f"{peak / 2**30:.2f}"


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

    parts, batches = config["parts"], config["batches"]
    if not is_list(parts) or not parts or set(parts) - set(PARTS):
        raise ValueError(f"parts={parts}: give a list, of {', '.join(PARTS)}")
    if not is_list(batches) or not batches:
        raise ValueError(f"batches={batches}: give a list of whole numbers")
    for batch in batches:
        check_whole_number("batches", batch, 1)
    check_whole_number("repeats", config["repeats"], 1)
    check_whole_number("data.image_size", config["data"]["image_size"], 1)
    if config.get("model") is None and not {"encode", "decode"} & set(parts):
        raise ValueError(f"parts={list(parts)} are of a generator: give model=<name>, or parts=[encode,decode]")
    check_json("out", config["out"], "rows")
    check_place("table", config["table"], endings=(".md", ".txt"))
    check_place("plot", config["plot"], endings=PLOTS)
    if config["profile"] and config["cuda_graphs"]:
        raise ValueError("profile=true sees no operations inside CUDA graphs: pass cuda_graphs=false")
    device = resolve_device(config["device"])
    resolve_dtype(config["dtype"])  # or an error that names those there are
    torch.manual_seed(int(config["seed"]))
    tokenizer = instantiate(config["tokenizer"], _convert_="all").to(device).eval().requires_grad_(False)
    channels_last(tokenizer)
    generator = None
    if config.get("model") is not None:
        make = instantiate(config["model"], _convert_="all", _partial_=True)
        make.func.accepts(tokenizer.spec)
        generator = make(spec=tokenizer.spec, num_classes=int(config["num_classes"]))
        generator.adopt(tokenizer)
        generator.to(device).eval()
    elif {"sample", *LEARNING} & set(config["parts"]):
        print("model=null: encoding and decoding only")
    from hydra.core.hydra_config import HydraConfig

    choices = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    names = {"tokenizer": choices.get("tokenizer"), "model": choices.get("model"), "dtype": config["dtype"]}
    names |= {key: config[key] for key in OPTIONS}
    rows = [{**names, **row} for row in measure(config, tokenizer, generator)]
    out = Path(config["out"])
    earlier = check_json("out", out, "rows").get("rows", [])
    rows_all = [row for row in earlier if not any(same_settings(row, new) for new in rows)] + rows
    date = time.strftime("%Y-%m-%d")
    write_json(out, {"rows": rows_all, "versions": library_versions(), "date": date})
    print(f"wrote {out}")
    if config["table"]:
        Path(config["table"]).write_text(table(rows_all))
    if config["plot"]:
        plot(config["plot"], rows)
    return rows


def same_settings(earlier: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
    """Whether `row` takes the place of a row of before, which lacks keys where an older version wrote it: one of
    OPTIONS was off then, one of STEPS is not known."""
    key = ("tokenizer", "model", "dtype", "part", "batch", "device", *(k for k in STEPS if k in earlier))
    options = all(earlier[k] == row.get(k) if k in earlier else not row.get(k) for k in OPTIONS)
    return options and all(earlier.get(k) == row.get(k) for k in key)


@entry("eval_throughput", CONFIGS, whole={"num_classes": 0, "repeats": 1})
def main(config: Any) -> None:
    evaluate(config)


if __name__ == "__main__":
    main()
