"""What the studies of scripts/tokenizer_study.py count and conclude, and their sections of docs/tokenizers.md.

Pure functions of counts and rows: no training, no files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from scripts.tables import Column, markdown

Row = Mapping[str, Any]


# --- counting -------------------------------------------------------------------------------------------------------


def bin_counts(ids: Tensor, levels: Sequence[int]) -> list[Tensor]:
    """How often each level of each channel occurs among FSQ's ids int64 [..]: int64 [levels[i]] for channel i."""
    counts, rest = [], ids.flatten()
    for level in levels:
        counts.append(torch.bincount(rest % level, minlength=level))
        rest = rest // level
    return counts


def entropy(counts: Tensor) -> float:
    """Entropy in bits of the distribution that counts [V] make; at most log2 V."""
    share = counts[counts > 0].double() / counts.sum()
    return float(-(share * share.log2()).sum()) + 0.0  # without the sign of -0


def code_use(counts: Tensor, bins: Sequence[Tensor]) -> dict[str, Any]:
    """Use of codes, from counts [V] over a whole set, and of the levels of the channels, from `bin_counts`.

    codebook_usage, bin_usage: shares of codes and of all levels that occur. entropy, bin_entropy: in bits, of the codes
    and, mean over the channels, of the levels. bins: share of every level, a list a channel.
    """
    shares = [(count.double() / count.sum()).tolist() for count in bins]
    return {
        "codebook_usage": float((counts > 0).double().mean()),
        "entropy": entropy(counts),
        "bin_usage": mean(float(share > 0) for channel in shares for share in channel),
        "bin_entropy": mean(entropy(count) for count in bins),
        "bin_least": min(min(channel) for channel in shares),
        "bin_most": max(max(channel) for channel in shares),
        "bins": shares,
    }


# --- concluding -----------------------------------------------------------------------------------------------------


def span(values: Iterable[float], shape: str = "{:.2f}") -> str:
    """`mean (least .. largest)`."""
    values = list(values)
    return f"{shape.format(mean(values))} ({shape.format(min(values))} .. {shape.format(max(values))})"


def compared(first: Sequence[float], second: Sequence[float]) -> str:
    """Whether the runs of `first` lie above or below all of `second`; "no difference" where the ranges overlap."""
    if min(first) > max(second):
        return "higher"
    return "lower" if max(first) < min(second) else "no difference"


def rises(values: Sequence[float]) -> bool:
    """Whether every value is larger than the one before it."""
    return all(a < b for a, b in pairwise(values))


def prefix_lengths(tokens: int, ends: Sequence[int] | None = None) -> tuple[list[int], int]:
    """([1, 4, 16, N], N / 4). ends: prefixes that can be decoded, where not all can: the nearest stands for each."""

    def nearest(k: int) -> int:
        return k if ends is None else min(ends, key=lambda end: (abs(end - k), end))

    return sorted({nearest(k) for k in (1, 4, 16, tokens) if k <= tokens}), nearest(max(1, tokens // 4))


def judged(row: Row) -> list[str]:
    """The two verdicts on nested dropout: the PSNR over the row's `path` of prefixes, and the model without dropout."""
    at = {int(k): value for k, value in row["psnr"].items()}
    verdicts = ["strictly rises" if rises([at[k] for k in row["path"]]) else "does NOT strictly rise"]
    if row.get("without") is None:
        return [*verdicts, ""]
    fine = row["without"]["psnr"][str(row["quarter"])] < at[row["quarter"]]
    return [*verdicts, "untrained does not reach it" if fine else "untrained REACHES it"]


# --- sections of the page -------------------------------------------------------------------------------------------


def sections(found: Sequence[Row]) -> list[str]:
    """Lines of all studies that have rows."""
    writers: dict[str, Callable[[list[Row]], list[str]]] = {"ifsq": ifsq_section, "nested": nested_section}
    writers["locality"] = locality_section
    lines: list[str] = []
    for study, write in writers.items():
        members = [row for row in found if row["study"] == study]
        lines += write(members) if members else []
    return lines


MEASURES = (  # (title, key, format)
    ("PSNR", "psnr_mean", "{:.2f}"), ("codes in use", "codebook_usage", "{:.3f}"),
    ("entropy of codes, bits", "entropy", "{:.2f}"), ("levels in use", "bin_usage", "{:.3f}"),
    ("entropy of a channel, bits", "bin_entropy", "{:.3f}"), ("rarest level", "bin_least", "{:.3f}"),
    ("commonest level", "bin_most", "{:.3f}"),
)  # fmt: skip


def ifsq_section(found: list[Row]) -> list[str]:
    """iFSQ beside FSQ: mean (least .. largest) over the seeds."""
    groups = {name: [row for row in found if row["activation"] == name] for name in ("tanh", "ifsq")}
    groups = {name: members for name, members in groups.items() if members}
    some = found[0]
    lines = [
        "",
        "## iFSQ against FSQ",
        "",
        f"One network ({some['parameters']:,} parameters), levels {some['levels']}, CIFAR-10, the same steps; only",
        f"the squashing function differs. Mean (least .. largest) over the seeds, on {some['images']:,} test images.",
        f"Entropy is at most {some['bits']:.2f} bits for codes and {some['bits_of_level']:.2f} for a channel's levels.",
        "",
        "| quantizer | seeds | steps | " + " | ".join(title for title, _, _ in MEASURES) + " |",
        "|" + "---|" * (3 + len(MEASURES)),
    ]
    for name, members in groups.items():
        cells = [span([row[key] for row in members], shape) for _, key, shape in MEASURES]
        steps = "/".join(str(n) for n in sorted({row["steps"] for row in members}))
        lines.append(f"| {TITLES[name]} | {len(members)} | {steps} | " + " | ".join(cells) + " |")
    lines += ["", "Share of each level, over seeds and channels:", ""]
    places = range(len(some["bins"][0]))
    lines += ["| quantizer | " + " | ".join(f"level {i}" for i in places) + " |", "|" + "---|" * (1 + len(places))]
    for name, members in groups.items():
        cells = [span([channel[i] for row in members for channel in row["bins"]], "{:.3f}") for i in places]
        lines.append(f"| {TITLES[name]} | " + " | ".join(cells) + " |")
    if len(groups) == 2:
        words = [
            f"{title}: {compared([r[key] for r in groups['ifsq']], [r[key] for r in groups['tanh']])}"
            for title, key, _ in MEASURES
        ]
        lines += ["", f"iFSQ beside FSQ, by whether the ranges overlap: {'; '.join(words)}."]
    return lines


TITLES = {"tanh": "FSQ (tanh)", "ifsq": "iFSQ"}


def nested_section(found: list[Row]) -> list[str]:
    """PSNR by the number of tokens kept."""
    lines = ["", "## Prefixes", "", *PREFIXES, ""]
    lines += ["| family | training | tokens | steps | k: PSNR | verdict |", "|" + "---|" * 6]
    for row in sorted(found, key=lambda row: row["family"]):
        path, quarter = judged(row)
        trained = "as it is" if row["without"] is None else "with nested dropout"
        lines.append(_prefix_line(row, trained, row, path))
        if row["without"] is not None:
            lines.append(_prefix_line(row, "without", row["without"], quarter))
    return lines


PREFIXES = (
    "Mean PSNR over 100 held-out images of CIFAR-10 at k of N tokens: over k = 1, 4, 16, N it must strictly rise, and",
    "the same model, trained as long without nested dropout, must not reach the trained one at k = N / 4. DetailFlow",
    "trains its prefixes on smaller images: a prefix is decoded at the full side and at that one, enlarged, and the",
    "better counts. D-AR, VAR and FlexVAR train without nested dropout (D-AR's order comes from its flow, those of the",
    "others from their scales, of which only whole ones decode).",
)


def _prefix_line(row: Row, training: str, figures: Row, verdict: str) -> str:
    psnr = ", ".join(f"{k}: {value:.2f}" for k, value in sorted(figures["psnr"].items(), key=lambda item: int(item[0])))
    return f"| {row['family']} | {training} | {row['tokens']} | {figures['steps']} | {psnr} | {verdict} |"


LOCALITY: tuple[Column, ...] = (
    ("legacy_reshape", "flag", "{}"), ("tokens that change", "changed", "{:.2f}"),
    ("of the finest level's change, over the patch", "local", "{:.3f}"),
    ("coarser tokens that a later level changes", "leaked", "{:.2f}"),
    ("least .. largest change of a token", "range", "{}"),
)  # fmt: skip


def locality_section(found: list[Row]) -> list[str]:
    """What one patch changes in ResTok's tokens."""
    row = found[0]
    members = [
        values | {"flag": flag, "range": f"{values['least']:.3f} .. {values['most']:.3f}"}
        for flag, values in row["flags"].items()
    ]
    return [
        "",
        "## ResTok: which latents one patch changes",
        "",
        f"One of {row['patches']} patches of an image is replaced, before any training: random weights of",
        f"{row['seeds']} seeds, {row['tokens']} latents in levels of {', '.join(map(str, row['levels']))}. Change:",
        "length of the difference over the mean length of a latent. Second column: share of the finest level's",
        f"squared change that is in the latent of the patch's own cell ({1 / row['patches']:.4f} if even).",
        "Third: when one level of the latents is replaced before the projections, share of the tokens of coarser",
        "levels that change; a generator that predicts level by level needs 0.",
        "",
        *markdown(LOCALITY, members),
        "",
        "![Changes by patch and latent](images/restok_locality.png)",
    ]
