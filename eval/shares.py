"""Where the time of a run goes: the shares of matrix products, attention and convolutions, by PyTorch's profiler."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

PRODUCTS = ("mm", "bmm", "addmm", "addmv", "baddbmm", "mv", "linear", "_linear_pointwise", "_int_mm", "_scaled_mm")
PRODUCTS += ("linear_dynamic_fp16", "ProductBackward")  # the latter by OpenBLAS, which the profiler does not see
FUSED = ("## Call Compiled", "triton_")  # what torch.compile made, by its backend
LARGEST = 5


def kind_of(name: str) -> str:
    """products, attention (as one kernel; put together of products it counts as those), convolutions, compiled or
    other, of an operation's name as the profiler gives it."""
    last = name.rpartition("::")[2]
    if "attention" in last or last.startswith("flex_"):
        return "attention"
    if "convolution" in last:
        return "convolutions"
    if last.startswith(FUSED):
        return "compiled"
    return "products" if last.removeprefix("mkldnn_") in PRODUCTS else "other"


def shares(run: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """One run under the profiler: {"seconds": of all operations, {kind: share of them}, "largest": {name: share} of the
    other operations}. Times are of an operation without those it calls, on the GPU those of its kernels. What Python
    does between operations is in none, and the profiler itself makes small operations look larger."""
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=kinds) as recorded:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    of = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    # kernels stand beside the operations that started them, with the same times
    found = {event.key: getattr(event, of) for event in recorded.key_averages() if event.device_type.name == "CPU"}
    total, each, others = sum(found.values()), Counter(), Counter()
    for name, spent in found.items():
        each[kind_of(name)] += spent / total
        if kind_of(name) == "other":
            others[name] += spent / total
    return {"seconds": total / 1e6, "shares": dict(each.most_common()), "largest": dict(others.most_common(LARGEST))}


def line(found: dict[str, Any]) -> str:
    """The same for people."""
    kinds = ", ".join(f"{kind} {share:.0%}" for kind, share in found["shares"].items())
    others = ", ".join(f"{name} {share:.0%}" for name, share in found["largest"].items())
    return f"{found['seconds']:.3g} s in operations: {kinds} (of the others {others})"
