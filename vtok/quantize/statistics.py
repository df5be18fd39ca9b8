"""How a codebook is used: counts over all processes, share of codes in use, perplexity.

Counts are summed over the processes of a distributed run, so every process sees the same numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist

COUNTED = 2**20  # largest vocabulary whose codes are counted, in training, validation and evaluation


def all_sum(value: Tensor) -> Tensor:
    """`value` summed over all processes, in place; itself outside of a distributed run."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(value)
    return value


def all_mean(value: Tensor) -> Tensor:
    """`value` averaged over all processes."""
    if dist.is_available() and dist.is_initialized():
        return all_sum(value.clone()) / dist.get_world_size()
    return value


def shared_mean(value: Tensor, *, everywhere: bool) -> Tensor:
    """`value` as its mean over all processes, with the gradient of this process's own: averaging the gradients of the
    processes, as DDP and FSDP do, then gives that of a function of the mean. `everywhere` False: `value` itself."""
    return value + (all_mean(value.detach()) - value.detach()) if everywhere else value


def count_ids(ids: Tensor, vocab_size: int, *, everywhere: bool = True) -> Tensor:
    """How often each code occurs in `ids`, float32 [vocab_size]; `everywhere` sums over all processes."""
    counts = torch.zeros(vocab_size, device=ids.device)
    # scatter_add of ones: torch.bincount waits for the device and has no deterministic form on CUDA
    counts.scatter_add_(0, ids.reshape(-1), torch.ones(ids.numel(), device=ids.device))
    return all_sum(counts) if everywhere else counts


def usage(counts: Tensor) -> Tensor:
    """Share of codes that occur at all, scalar in [0, 1]."""
    return (counts > 0).float().mean()


def perplexity(counts: Tensor) -> Tensor:
    """exp(entropy of the codes' histogram), scalar in [1, V]: V where all codes occur equally often."""
    shares = counts / counts.sum().clamp(min=1)
    return torch.exp(-torch.special.xlogy(shares, shares).sum())


def code_statistics(ids: Tensor, vocab_size: int, *, everywhere: bool) -> dict[str, Tensor]:
    """{"usage", "perplexity"} of the ids of a batch; nothing above COUNTED codes. `everywhere` sums over all processes
    (a collective call)."""
    if vocab_size > COUNTED:
        return {}
    counts = count_ids(ids, vocab_size, everywhere=everywhere)
    return {"usage": usage(counts), "perplexity": perplexity(counts)}
