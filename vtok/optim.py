"""What tokenizer and generator training share: AdamW with decay groups, the learning rate of a step, weight averaging.

Learning rate, weight decay and averaging are pure functions of the optimizer step, so a resumed run needs no state of
them. The averaged weights follow Polyak and Juditsky (SIAM J. Control Optim. 1992) with the warm-up
decay_s = min(decay, (1 + s) / (10 + s)) that lets early steps forget the initial weights.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

Kind = Literal["constant", "cosine", "linear"]
WEIGHT_DECAY = 0.05


@dataclass(frozen=True)
class Recipe:
    """How long and how a module is trained; the keys of configs/train.yaml.

    optimizer: arguments of `make_optimizer`; schedule: of `rate`. steps: length of the schedule in optimizer steps.
    accumulate: batches per step. clip: largest gradient norm, None for none. ema: decay of the averaged weights, None
    for none. log_every: steps between two records. on_nan: stop, or skip a step whose gradient is not finite.
    final_weight_decay: what optimizer.weight_decay moves to (`weight_decay`); None leaves it as it is.
    """

    optimizer: Mapping[str, Any]
    schedule: Mapping[str, Any]
    steps: int
    accumulate: int = 1
    clip: float | None = 1.0
    ema: float | None = 0.999
    log_every: int = 20
    on_nan: Literal["stop", "skip"] = "stop"
    final_weight_decay: float | None = None

    def __post_init__(self) -> None:
        if self.on_nan not in ("stop", "skip"):
            raise ValueError(f"on_nan={self.on_nan!r}: choose stop or skip")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"ema is a decay between 0 and 1, or null for none, got {self.ema}")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip is a positive gradient norm, or null for none, got {self.clip}")
        check_arguments("schedule", check_schedule, self.schedule)
        check_arguments("optimizer", check_optimizer, self.optimizer)
        if self.final_weight_decay is not None and not (self.final_weight_decay > 0 and self.decay(0) > 0):
            # groups that decay are told by a decay above 0
            raise ValueError(
                f"final_weight_decay={self.final_weight_decay} and optimizer.weight_decay={self.decay(0)} must both be "
                "positive; final_weight_decay=null keeps the decay constant"
            )

    def decay(self, step: int) -> float:
        """Weight decay in optimizer step `step`, counted from 0."""
        begin = self.optimizer.get("weight_decay", WEIGHT_DECAY)
        end = begin if self.final_weight_decay is None else self.final_weight_decay
        return weight_decay(step, self.steps, begin, end)


def check_arguments(name: str, check: Callable[..., None], given: Mapping[str, Any]) -> None:
    """Call check(**given); a key that it does not have is a ValueError naming the configuration's key."""
    known = list(inspect.signature(check).parameters)
    for key in given:
        if key not in known:
            raise ValueError(f"{name}.{key} is not known; {name} has {', '.join(known)}")
    check(**given)


def make_optimizer(
    modules: Iterable[nn.Module],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.95),
    weight_decay: float = WEIGHT_DECAY,
    eps: float = 1e-8,
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters of `modules`. Tensors with fewer than two dimensions (biases, norms) get no
    weight decay, as in LlamaGen (arXiv 2406.06525); neither do those that a module's `undecayed()` lists, where it has
    one. `lr` is the rate at the configured global batch: nothing is scaled.
    """
    check_optimizer(lr=lr, betas=betas, weight_decay=weight_decay, eps=eps)
    modules = list(modules)
    spared = {id(p) for module in modules for p in getattr(module, "undecayed", tuple)()}
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    decayed = [p.dim() >= 2 and id(p) not in spared for p in parameters]
    groups = [
        {"params": [p for p, decays in zip(parameters, decayed) if decays], "weight_decay": weight_decay},
        {"params": [p for p, decays in zip(parameters, decayed) if not decays], "weight_decay": 0.0},
    ]
    devices = {p.device.type for p in parameters}
    fused = True if devices in ({"cuda"}, {"cpu"}) else None  # no pass over memory for each operation
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=tuple(betas), eps=eps, fused=fused)


def check_optimizer(
    *, lr: float, betas: tuple[float, float] = (0.9, 0.95), weight_decay: float = WEIGHT_DECAY, eps: float = 1e-8
) -> None:
    """Raise ValueError naming the key unless these are arguments of `make_optimizer`."""
    for name, value in (("lr", lr), ("weight_decay", weight_decay), ("eps", eps)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0 or (name == "lr" and value == 0):
            raise ValueError(
                f"optimizer.{name} must be a {'positive number' if name == 'lr' else 'number >= 0'}, got {value!r}"
            )
    numbers = isinstance(betas, Sequence) and len(betas) == 2 and all(isinstance(b, (int, float)) for b in betas)
    if not numbers or not all(0 <= b < 1 for b in betas):
        raise ValueError(f"optimizer.betas must be two numbers in [0, 1), got {betas!r}")


def check_schedule(
    *, warmup: float = 0, kind: Kind = "cosine", final: float = 0.0, hold: float = 0, drops: Sequence[int] = ()
) -> None:
    """Raise ValueError naming the key unless these are arguments of `rate`."""
    if kind not in ("constant", "cosine", "linear"):
        raise ValueError(f"schedule.kind={kind!r}: choose constant, cosine or linear")
    if warmup < 0:
        raise ValueError(f"schedule.warmup must not be negative, got {warmup}")
    if hold < 0:
        raise ValueError(f"schedule.hold must not be negative, got {hold}")
    if not 0 <= final <= 1:
        raise ValueError(f"schedule.final is a share of optimizer.lr between 0 and 1, got {final}")
    if drops and (min(drops) < 1 or kind != "constant"):
        raise ValueError(f"schedule.drops are steps of a schedule of kind constant, got {list(drops)} and kind {kind}")


def rate(
    step: int,
    steps: int,
    *,
    warmup: float = 0,
    kind: Kind = "cosine",
    final: float = 0.0,
    hold: float = 0,
    drops: Sequence[int] = (),
) -> float:
    """Factor of the learning rate in optimizer step `step` of `steps`, counted from 0.

    warmup: steps of linear warm-up, or a share of `steps` where it is below 1; the first step has lr / warmup. After
    it the factor falls from 1 to `final` at the last step, or stays (kind "constant"). hold: the step, or share of
    `steps` below 1, up to which it stays at 1 before it falls (warm-up, stable, decay: GigaTok, VAR, D-AR, xAR).
    drops: steps from each of which on a constant rate is a tenth of what it was (Open-MAGVIT2, IBQ).
    """
    rise = warmup * steps if warmup < 1 else warmup
    if step < rise:
        return min(1.0, (step + 1) / rise)
    if kind == "constant":
        return 0.1 ** sum(step >= at for at in drops)
    begin = max(rise, hold * steps if hold < 1 else hold)
    share = min(1.0, max(0.0, step - begin) / max(1.0, steps - 1 - begin))
    fall = 0.5 * (1 + math.cos(math.pi * share)) if kind == "cosine" else 1 - share
    return final + (1 - final) * fall


def weight_decay(step: int, steps: int, begin: float, end: float) -> float:
    """Weight decay in optimizer step `step` of `steps`, counted from 0: half a cosine from `begin` to `end` at the last
    step, as in VAR's code (arXiv 2404.02905: 0.05 to 0.08 for d30 and d36)."""
    share = min(1.0, step / max(1, steps - 1))
    return end + (begin - end) * 0.5 * (1 + math.cos(math.pi * share))


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the rate of all groups; a group with an `lr_scale` gets that multiple of it."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def set_decay(optimizer: torch.optim.Optimizer, decay: float) -> None:
    """Set the weight decay of the groups that have one."""
    for group in optimizer.param_groups:
        if group["weight_decay"] > 0:
            group["weight_decay"] = decay


@torch.no_grad()
def average(ema: nn.Module, module: nn.Module, step: int, decay: float) -> None:
    """Move `ema` towards `module` after optimizer step number `step` (the first is 1); buffers are copied.

    Buffers are copied, not averaged: counters are integers, and an averaged codebook or batch statistic already is one.
    """
    keep = min(decay, (1 + step) / (10 + step))
    averaged, current = ([_local(p) for p in m.parameters()] for m in (ema, module))
    if averaged:
        torch._foreach_lerp_(averaged, [p.to(a.dtype) for a, p in zip(averaged, current)], 1 - keep)
    for old, new in zip(ema.buffers(), module.buffers()):
        old.copy_(new)


def _local(parameter: torch.Tensor) -> torch.Tensor:
    """This process's part of a parameter that may be cut over processes (trainer=fsdp)."""
    return parameter.detach().to_local() if hasattr(parameter, "to_local") else parameter


def memory(modules: Mapping[str, nn.Module | None], *, trained: Iterable[str]) -> dict[str, int]:
    """Estimated bytes that training keeps: weights of all modules; gradients and AdamW's two moments of the trained."""
    trained = set(trained)
    count = {
        name: 0 if m is None else sum(p.numel() * p.element_size() for p in m.parameters())
        for name, m in modules.items()
    }
    grads = sum(
        p.numel() * p.element_size()
        for name in trained
        if (m := modules[name]) is not None
        for p in m.parameters()
        if p.requires_grad
    )
    return {**count, "gradients": grads, "optimizer": 2 * grads}
