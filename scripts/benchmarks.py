"""Write docs/benchmarks.md from measured rows: eval.versus on the CPU and on a GPU, eval.throughput on a GPU.

    python scripts/benchmarks.py

A cell without a row says "not measured". versus: the JSON of eval.versus that the repository keeps; profiles: that of
eval.throughput; gpu: the folder of scripts/bench_gpu.py, which may be empty.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from eval.peers import LIGHT_IMAGES, LIGHT_TOLERANCE  # noqa: E402
from eval.shares import line  # noqa: E402
from eval.throughput import mfu, steps  # noqa: E402
from scripts.bench_gpu import ROWS, VERSUS, compiled, measured  # noqa: E402
from vtok.cli import check_place, entry  # noqa: E402

NONE = "not measured"
LIGHT = 4.0  # wanted of sampling with our bf16 trunk against the original in float32
WANTED = [  # title, peer, sizes (the first is what the command takes), part, batches, ratio
    ("sampling, LlamaGen-B", "llamagen", "GPT-B", "sample", (1, 2, 8), 2.0),
    ("sampling, LlamaGen-L", "llamagen", "GPT-L", "sample", (1, 2, 8), 2.0),
    ("sampling, VAR-d16", "var", "d16", "sample", (1, 8), 1.3),
    ("sampling, xAR-B", "xar", "xar_base", "sample", (1,), 1.3),
    ("sampling, RAR-B", "rar", "rar_b", "sample", (1,), 1.3),
    ("sampling, MAR-B", "mar", "mar_base", "sample", (1,), 1.3),
    ("training step, LlamaGen-B", "llamagen", "GPT-B", "train", (2,), 1.1),
    ("training step, LlamaGen-L", "llamagen", "GPT-L", "train", (2,), 1.1),
    ("training step, VAR-d16", "var", "d16", "train", (2,), 1.1),
    ("training step, xAR-B", "xar", "xar_base", "train", (2,), 1.1),
    ("training step, RAR-B", "rar", "rar_b", "train", (2,), 1.1),
    ("training step, MAR-B", "mar", "mar_base", "train", (2,), 1.1),
    ("encoding, VQ-16", "llamagen_vq", "VQ-16", "encode", (1,), 1.1),
    ("decoding, VQ-16", "llamagen_vq", "VQ-16", "decode", (1,), 1.1),
    ("encoding, VAR's VQVAE", "var_vqvae", "vae_ch160v4096z32", "encode", (1,), 1.1),
    ("decoding, VAR's VQVAE", "var_vqvae", "vae_ch160v4096z32", "decode", (1,), 1.1),
    ("encoding, TiTok-L", "titok", "titok_l32", "encode", (1,), 1.1),
    ("decoding, TiTok-L", "titok", "titok_l32", "decode", (1,), 1.1),
]

GOALS = {  # rows on a GPU -> (figure, the share that is wanted); training at the best batch of its model
    **dict.fromkeys(("llamagen_l_sample_1", "llamagen_l_sample_1_compiled"), ("fraction", 0.30)),
    **dict.fromkeys(("llamagen_3b_sample_1", "llamagen_3b_sample_1_compiled"), ("fraction", 0.55)),
    **{f"{model}_train{end}": ("mfu", 0.45) for model in ("llamagen_l", "var_d16") for end in ("", "_32", "_128")},
}
PROFILED = [  # tokenizer, model, part, batch, dtype
    ("llamagen_vq16", "llamagen_b", "sample", 1, "bfloat16"),
    ("var_vqvae", "var_d16", "sample", 1, "bfloat16"),
    ("var_vqvae", "var_d16", "sample", 8, "float32"),
    ("llamagen_vq16", "llamagen_b", "train", 2, "float32"),
    ("var_vqvae", "var_d16", "train", 2, "float32"),
    ("kl16", "xar_b", "train", 2, "float32"),
    ("maskgit_vqgan", "rar_b", "train", 2, "float32"),
    ("kl16", "mar_b", "train", 2, "float32"),
]
THROUGHPUT = "python -m eval.throughput tokenizer=llamagen_vq16"
FAST = [  # path, command with the key, the key, where it is shown to change nothing but rounding
    (
        "packed weights, CPU",
        "python -m eval.versus peer=llamagen dir=../LlamaGen size=GPT-B parts=[sample] steps=64 threads=2 packed=false",
        "packed",
        "tests/test_light_weights.py",
    ),
    (
        "packed bf16 weights, CPU, against the original",
        "python -m eval.versus peer=llamagen dir=../LlamaGen size=GPT-B parts=[sample] steps=64 threads=1 clock=cpu "
        "dtype=bfloat16",
        "packed",
        "tests/test_light_weights.py",
    ),
    (
        "packed bf16 weights, CPU",
        f"{THROUGHPUT} model=llamagen_b parts=[sample] batches=[1,8] device=cpu dtype=bfloat16",
        "packed",
        "tests/test_light_weights.py",
    ),
    (
        "int8 weights, float8 weights",
        f"{THROUGHPUT} model=llamagen_b parts=[sample] batches=[1] dtype=bfloat16 quant=int8",
        "quant",
        "tests/test_light_weights.py: logits of a tiny model off by 0.4 % of the largest in int8, 1.4 % in float8; the "
        "generator of `make demo` has 3.0405 nats a token on 300 held-out digits in float32, 3.0401 in int8, 3.0404 in "
        "float8, and with dtype=bfloat16 besides 3.0404 and 3.0402 "
        "(`python -m eval.likelihood from=outputs/demo/generator images=300 quant=float8`)",
    ),
    (
        "channels-last bf16 decoding, CPU",
        f"{THROUGHPUT} parts=[decode] batches=[1,8] device=cpu dtype=bfloat16",
        "dtype",
        "tests/test_light_weights.py",
    ),
    (
        "bf16 encoding and decoding, CUDA: channels-last, maps that stay bf16",
        f"{THROUGHPUT} parts=[encode,decode] batches=[1,64] device=cuda dtype=bfloat16",
        "dtype",
        "tests/test_cnn.py, tests/test_light_weights.py",
    ),
    (
        "a head's weights in float16, CUDA",
        f"{THROUGHPUT} model=llamagen_b parts=[sample] batches=[256] device=cuda dtype=bfloat16 cuda_graphs=true",
        "packed",
        "tests/test_light_weights.py",
    ),
    (
        "packed tokenizers, CPU",
        "python -m eval.throughput tokenizer=titok_l32 parts=[encode,decode] batches=[1,8] device=cpu",
        "packed",
        "tests/test_light_weights.py",
    ),
    (
        "CUDA graphs",
        "python scripts/bench_gpu.py only=[llamagen_l_sample_1,llamagen_l_sample_1_plain]",
        "the row",
        "tests/test_graphs.py",
    ),
    (
        "compiled steps",
        f"{THROUGHPUT} model=llamagen_b parts=[sample] batches=[1] device=cpu dtype=bfloat16 compile=true",
        "compile",
        "tests/test_light_weights.py",
    ),
    (
        "compiled steps inside CUDA graphs",
        "python scripts/bench_gpu.py only=[llamagen_l_sample_1,llamagen_l_sample_1_compiled]",
        "the row",
        "tests/test_light_weights.py, tests/test_graphs.py",
    ),
    (
        "compiled training, CUDA",
        "python scripts/bench_gpu.py only=[llamagen_l_train,llamagen_l_train_plain]",
        "the row",
        "tests/test_acceleration.py",
    ),
    (
        "attention of block-causal training: FlexAttention, or a call a step",
        "python scripts/bench_gpu.py only=[var_d16_train,var_d16_train_prefixes]",
        "the row",
        "tests/test_attention.py",
    ),
]


def paths_table() -> str:
    lines = ["| path | command | key to vary | equality |", "|" + "---|" * 4]
    return "\n".join(lines + [f"| {name} | `{command}` | {key} | {where} |" for name, command, key, where in FAST])


def profile_commands() -> str:
    return "\n".join(
        f"    python -m eval.throughput tokenizer={tokenizer} model={model} parts=[{part}] batches=[{batch}] "
        f"dtype={dtype} device=cpu threads=1 repeats=1 profile=true out=docs/profiles.json"
        for tokenizer, model, part, batch, dtype in PROFILED
    )


def profile_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line for each command, of rows of eval.throughput."""
    lines = ["| | batch | dtype | what one run of it takes | where |", "|" + "---|" * 5]
    for tokenizer, model, part, batch, dtype in PROFILED:
        key = {"tokenizer": tokenizer, "model": model, "part": part, "batch": batch, "dtype": dtype}
        found = [row for row in rows if row["profile"] and all(row[k] == value for k, value in key.items())]
        for row in found:
            lines.append(f"| {part}, {model} | {batch} | {dtype} | {line(row['profile'])} | {row['device']} |")
        if not found:
            lines.append(f"| {part}, {model} | {batch} | {dtype} | {NONE} | |")
    return "\n".join(lines)


def cpu_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line for each wanted cell, and for every measured row."""
    lines = [
        "| | batch | our weights | wanted | ratio, 10-90 % | reached | at most | original, ours (s) | what | where "
        "| note |",
        "|" + "---|" * 11,
    ]
    for title, peer, size, part, batches, wanted in WANTED:
        for batch in batches:
            key = (peer, size, part, batch)
            found = [r for r in rows if (r["peer"], r["size"], r["part"], r["batch"]) == key and r.get("on") != "cuda"]
            for row in found:
                seconds = f"{row['original_seconds']:.2f}, {row['our_seconds']:.2f}"
                told = (
                    row["dtype"],
                    row.get("packed") and "packed",
                    row.get("quant"),
                    row.get("compile") and "compiled",
                )
                stored = ", ".join(word for word in told if word)
                goal = LIGHT if part == "sample" and is_light(row) else wanted
                reached = "yes" if row["ratio_low"] >= goal else "no"
                lines.append(
                    f"| {title} | {batch} | {stored} | >= {goal} | {span(row, goal)} | {reached} | {at_most(row)} "
                    f"| {seconds} | {row['setting']} | {where(row)} | {row['note'] or ''} |"
                )
            if not found:
                lines.append(f"| {title} | {batch} | float32 | >= {wanted} | {NONE} | | | | | | |")
            if part == "sample" and batch == 1 and not any(is_light(row) for row in found):
                lines.append(f"| {title} | 1 | bfloat16 | >= {LIGHT} | {NONE} | | | | | | |")
    return "\n".join(lines)


def where(row: Mapping[str, Any]) -> str:
    return f"{row['clock']}, {row['device']}, {'two processes' if row.get('apart') else 'one process'}"


def is_light(row: Mapping[str, Any]) -> bool:
    return row["dtype"] != "float32" or bool(row.get("quant"))


def span(row: Mapping[str, Any], goal: float) -> str:
    """The ratio and its range; to three places where two would look as if the goal were reached."""
    places = 3 if row["ratio_low"] < goal <= round(row["ratio_low"], 2) else 2
    return f"{row['ratio']:.2f} ({row['ratio_low']:.{places}f} to {row['ratio_high']:.2f})"


def at_most(row: Mapping[str, Any]) -> str:
    """The ratio if only our matrix products took time, at the rate measured beside it; empty where that is unknown,
    or that of another library than multiplies."""
    if "operations" not in row or "linear.gradients" in row.get("paths", ()):
        return ""
    return f"{row['original_seconds'] * row['matmul_rate'] / row['operations']:.2f}"


def gpu_versus_table(rows: Sequence[Mapping[str, Any]], folder: Path) -> str:
    """One line for each row of bench_gpu's VERSUS, from `rows` and the files in `folder`."""
    names = ("row", "wanted", "ratio, 10-90 %", "reached", "original, ours (ms)", "what", "GPU", "date", "torch")
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    for name, (peer, size, part, batch, wanted) in VERSUS.items():
        key = {"peer": peer, "size": size, "part": part, "batch": batch, "on": "cuda", "dtype": "bfloat16"}
        key |= {"quant": None, "compiled_original": compiled(peer, part)}
        every = (*rows, *measured(folder / f"{name}.json"))
        found = [row for row in every if all(row.get(k) == value for k, value in key.items())]
        for row in found:
            reached = "yes" if row["ratio_low"] >= wanted else "no"
            milliseconds = f"{1000 * row['original_seconds']:.1f}, {1000 * row['our_seconds']:.1f}"
            lines.append(
                f"| {name} | >= {wanted} | {span(row, wanted)} | {reached} | {milliseconds} | {row['setting']} "
                f"| {row['device']} | {row['date']} | {row['versions']['torch']} |"
            )
        if not found:
            lines.append(f"| {name} | >= {wanted} | {NONE} | | | | | | |")
    return "\n".join(lines)


def gpu_table(folder: Path) -> str:
    names = ("row", "part", "steps", "batch", "images/s", "ms/image", "roofline reached", "MFU", "GPU")
    names += ("wanted", "reached", "peak memory, GiB", "date", "torch")
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    for name in ROWS:
        rows = measured(folder / f"{name}.json")
        figure, share = GOALS.get(name, ("", 0.0))
        goal = f">= {share:.0%} {'MFU' if figure == 'mfu' else 'of the roofline'}" if figure else ""
        if not rows:
            lines.append(f"| {name} | | | | {NONE} | {NONE} | {NONE} | | | {goal} | | | | |")
        for row in rows:
            reached = ("yes" if (row.get(figure) or 0.0) >= share else "no") if figure else ""
            lines.append(
                f"| {name} | {row['part']} | {steps(row)} | {row['batch']} | {row['images_per_second']:.2f} "
                f"| {row['ms_per_image']:.1f} | {row['fraction']:.0%} | {mfu(row)} | {row['device']} "
                f"| {goal} | {reached} | {row['peak_memory_bytes'] / 2**30:.1f} | {row['date']} "
                f"| {row['versions']['torch']} |"
            )
    return "\n".join(lines)


def growth_table(scaling: Mapping[str, Any] | None) -> str:
    """One line for each point of scripts/scaling.py."""
    if scaling is None:
        return f"{NONE.capitalize()}."
    lines = [
        "| tokens | batch | depth | decode step, ms | last / second quarter | sampling, s | its memory, MiB "
        "| training step, ms | its memory, MiB |",
        "|" + "---|" * 9,
    ]
    for row in scaling["rows"]:
        lines.append(
            f"| {row['tokens']} | {row['batch']} | {row['depth']} | {row['step_ms']:.2f} | {row['growth']:.2f} "
            f"| {row['sample_seconds']:.2f} | {row['sample_bytes'] / 2**20:.1f} | {1000 * row['train_seconds']:.0f} "
            f"| {row['train_bytes'] / 2**20:.1f} |"
        )
    return "\n".join([*lines, "", f"{scaling['device']}, {scaling['date']}.", "", "![growth](scaling/scaling.png)"])


def page(
    rows: Sequence[Mapping[str, Any]],
    gpu: Path,
    scaling: Mapping[str, Any] | None = None,
    profiles: Sequence[Mapping[str, Any]] = (),
) -> str:
    devices = sorted({f"{row['device']}, {row['date']}, torch {row['versions']['torch']}" for row in rows})
    where = "\n".join(f"- {device}" for device in devices) or f"- {NONE}"
    return f"""# Benchmarks

Written by `python scripts/benchmarks.py`; change the rows, not this page.

## Against the originals, CPU

The original's time over ours: the median over at least seven turns on the same weights, each side in a process of its
own (rows that say so; one process before memory was kept, which would have served the original too), with its
10-90 % range, after a check that outputs agree (teacher-forced logits within 1e-4, equal greedy tokens). A ratio counts
as reached where the lower end is above what is wanted. At most: if our matrix products alone took time, at the rate
that large ones had in that run. Sampling does not include decoding; a training step is forward and backward, without
the optimizer. What is timed is checked too: where it rounds (bf16, 8 bits), logits may be off by
{LIGHT_TOLERANCE} of the largest, images by {LIGHT_IMAGES}; `differences` of a row in the JSON says what was checked.

    python -m eval.versus peer=llamagen dir=../LlamaGen size=GPT-B parts=[sample] threads=2 out=docs/benchmarks.json
    python -m eval.versus peer=llamagen_vq dir=../LlamaGen size=VQ-16 threads=2 out=docs/benchmarks.json
    python -m eval.versus peer=llamagen dir=../LlamaGen size=GPT-B parts=[sample] steps=64 threads=1 clock=cpu

The third form is for a machine that other jobs share: seconds of the process's own, on one thread. Our side stores its
weights as dtype, packed and quant say; each row keeps the paths that ran, and a fallback is an error. A run that is cut
short (steps) favours the original, whose cache is then as short as the cut.

Rows of 4.0 are what a processor with bf16 instructions is asked for, `dtype=bfloat16 compile=true`, against the
original as shipped, in float32. `sample.py` starts from float32 without compilation, whose tokens are the same in every
batch.

{cpu_table(rows)}

Measured on:

{where}

What decides a sampling step of few rows is how fast the weights are read, and then the small operations between the
products. Rows marked `packed` have weights in the order of the CPU's matrix kernels, `packed=false` gives the stored
one. In bf16 LlamaGen-B's head, which a step of one position reads as a fifth of all weights, is kept in float16, its
product in float32 (docs/architecture.md); while it was read in float32, the compiled row was 3.81 (3.66 to 3.90).
VAR-d16 in bf16 is at 61 % of the roofline, 64 % with compiled blocks (`eval.throughput` with two threads), and could be
3.8 times as fast as the original at most.

What limits many rows is the rate of the products, 195 to 199 billion operations a second on two threads with AVX-512,
109 to 151 with AVX2, as shared as that machine is (the `matmul_rate` that `eval.throughput` writes): on the first,
sampling of VAR-d16 at batch 8 could be 1.28 at most by it (91 % of that roofline while fresh memory was still cleared,
when the ratio was 1.17), and xAR-B reaches 78 %. Tensors above 32 MiB were the other limit: fresh memory for each costs
more than writing it, which memory that is kept does not (VAR's VQVAE was 1.10 and 1.08 without).

What limits a training step is the same: products are most of it (next table). `At most` says what a row could be were
all else free, at the rate of its own run; on AVX-512, at 197 billion, that is 1.3 for VAR-d16, 1.4 for LlamaGen-B, 1.5
for RAR-B and MAR-B and 1.9 for xAR-B. What is gained lies in the rest: memory that is kept, dropout of four entries a
draw, attention with dropout without PyTorch's kernel, and in MAR an encoder and a head that read what the batch shows
and hides. Compiling the blocks (`compile=true`) gives little more. Rows that name AVX2 have more: oneDNN's forward
products (`linear.wide`, on such processors alone), OpenBLAS's gradients in VAR-d16 and in LlamaGen-B's head
(`linear.gradients`, not at the rate behind `at most`), attention of steps in a few calls (`attention.spans`), gradients
of gates written where they belong, modulated branches added in one pass, and xAR's modulation without a copy for each
position. Rows that name no instructions are of before, on an EPYC with AVX-512.

Rows that are not reached, and what keeps them:

- LlamaGen-B in bf16, not compiled: small operations between the products, a fifth of its profile; compiled it reaches.
- VAR-d16 in bf16: the rate of products; it could be 3.8 at most.
- VAR-d16 at batch 8: the rate of products. AVX-512 allows 1.28. With AVX2 the products are 86 % of its profile, at 126
  billion operations a second on two threads, and one thread reaches 77 % of the roofline. A run of before gave 1.32
  (1.18 to 1.34).
- Training of VAR-d16: the rate of products, which are most of its profile. A step has 1.79e12 operations, all within
  12.9 s: 138 billion a second, where large products had 175 at their best in that run. Runs of before gave 1.17 (1.12
  to 1.24) and 1.06 (1.03 to 1.11), against an original that took 20.6 and 18.4 s, not 13.3: the more of the machine is
  free, the nearer MKL comes to the other two. In turns with what is there, OpenBLAS for the forward products as well
  gave 1.00 to 1.02 and for shorter gradients 0.98, and putting PyTorch's waiting threads to sleep before it 1.04, in
  turns that differed by more.
- Training of MAR-B: the medians of both runs are above 1.1, the lower ends, in minutes that other jobs shared, are 1.06
  and 1.09. Products are 87 % of its profile, at most 1.56 by the rate of that run.
- Training of LlamaGen-B, xAR-B and RAR-B on AVX-512: these rows are of before; on AVX2 all three reach. What their
  profiles have beside products was brought down since, but no processor with AVX-512 was there to measure it again.

Where the time goes, by PyTorch's profiler in one run of one thread (training: with the AdamW update):

{profile_commands()}

{profile_table(profiles)}

## Against the originals, one GPU, bf16

The same turns with both sides in bfloat16 on one GPU: `python scripts/bench_gpu.py peers=<folder of their clones>`.
Ours samples from CUDA graphs and trains with compiled blocks. LlamaGen's original samples through `torch.compile`, as
its own script's `--compile` does (`compiled_original=true`), and our blocks then do too. The last number of a row's
name is the batch.

{gpu_versus_table(rows, gpu)}

## What each fast path gives

Run each command with its key and without; measured is the first alone, in the table above. Outputs are those of the
plain path, up to the rounding of bfloat16 and of 8 bits where those are named.

{paths_table()}

## One GPU, bf16

`make bench-gpu`, then `python scripts/benchmarks.py`. The roofline is the larger of the time of the matrix products at
the measured rate and of reading the weights at the measured bandwidth; reads of the cache of keys and values are not in
it, which at large batches are many. MFU is the share of the rate that the GPU's maker states for bf16; a training step
here has a fused AdamW update in it. Steps are those of sampling, and of the solver in each of them. Training counts as
reached at the best batch of its model.

{gpu_table(gpu)}

## Growth

`python scripts/scaling.py out=docs/scaling` measures a small LlamaGen (width 64) over tokens, batch and depth, one at a
time: CPU seconds of one thread, and the most bytes that tensors made by a run hold at once (weights come on top). What
a decode step takes in the last quarter of the steps over the second quarter is what grows with the position: the
attention over the keys that are there, alone (tests/test_bench.py: all steps run the same operations).

{growth_table(scaling)}
"""


def measurements(key: str, path: Path) -> dict[str, Any]:
    """What a JSON file of rows holds. ValueError, naming its key, where it is none."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{key}={path} is no JSON file that can be read ({error})") from None
    if not isinstance(found, dict) or not isinstance(found.get("rows"), list):
        raise ValueError(f"{key}={path} holds no rows: give a file of the command that measures them")
    return found


def run(config: Mapping[str, Any]) -> str:
    check_place("out", ROOT / config["out"], endings=(".md",))
    rows = measurements("versus", ROOT / config["versus"])["rows"]
    profiles = measurements("profiles", ROOT / config["profiles"])["rows"]
    if (gpu := ROOT / config["gpu"]).is_file():
        raise ValueError(f"gpu={gpu} is a file: give the folder of scripts/bench_gpu.py")
    text = page(rows, gpu, measurements("scaling", ROOT / config["scaling"]), profiles)
    Path(ROOT / config["out"]).write_text(text)
    print(f"wrote {config['out']}: {len(rows)} CPU rows, {len(list((ROOT / config['gpu']).glob('*.json')))} GPU files")
    return text


@entry("benchmarks", ROOT / "configs", texts=("versus", "gpu", "scaling", "profiles"))
def main(config: Any) -> None:
    run(config)


if __name__ == "__main__":
    main()
