"""Reading published weight files: .pth, .pt, .bin, .ckpt and .safetensors, weights-only, whatever wraps the weights.

Nothing in a file is run: a pickle that asks for more than tensors and plain values is refused with the reason.
`argparse.Namespace`, in which many training scripts keep their arguments, is allowed: it only holds values. Files are
mapped, and `settle` copies what a module uses one tensor at a time, so that loading needs little more memory than the
tensors that stay.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import pickle
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from vtok.checkpoint import CheckpointError

AVERAGED = ("ema", "model_ema", "ema_state_dict", "ema_sd")
RAW = ("model", "module", "state_dict", "var_wo_ddp", "gen_model", "sd", "trainer")
# what training scripts keep beside the weights; anything else that is not a tensor is an error
IGNORED = {"optimizer", "optimizer_state", "optimizer_disc", "optimizer_states", "discriminator", "dics_model", "steps"}
IGNORED |= {"args", "epoch", "global_step", "step", "iteration", "it", "iter", "scaler", "lr_scheduler", "scheduler"}
IGNORED |= {"lr_schedulers", "callbacks", "loops", "hyper_parameters", "hparams_name", "pytorch-lightning_version"}
IGNORED |= {"config", "vae_local", "disc", "best_val_loss", "rng_state", "native_amp_scaling", "MixedPrecision"}
DONTNEED = 4  # MADV_DONTNEED of Linux


def read_weights(path: str | os.PathLike, which: str = "auto") -> dict[str, Tensor]:
    """State dict of a published file, without wrapper keys and without the prefixes of DDP and torch.compile.

    which: "auto" prefers averaged weights to raw ones; "ema" and "raw" take only these; another name is the key that
    holds the weights. Raises CheckpointError for a file that is missing, truncated, no weights, or more than weights.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist: give the published file, or the folder that holds it")
    with open(path, "rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull`, or download it again")
    if start.lstrip()[:1] == b"<":
        raise CheckpointError(f"{path} is a web page, not weights: the download went wrong, get it again")
    data = _safetensors(path) if path.suffix == ".safetensors" else _torch(path)
    return strip_prefixes(choose(data, which, path))


def _safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or truncated ({_first(error)})") from None


def _torch(path: Path) -> Any:
    with open(path, "rb") as file:
        zipped = file.read(2) == b"PK"  # the format before torch 1.6 cannot be mapped
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        lines = [line.strip() for line in str(error).splitlines() if "GLOBAL" in line or "Unsupported" in line]
        reason = lines[0] if lines else _first(error)
        raise CheckpointError(
            f"{path} holds more than weights, or is damaged; nothing in it was run ({reason:.160}). If you trust it, "
            "load it on a machine where that does no harm, and save only its tensors with torch.save"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, AssertionError) as error:
        raise CheckpointError(f"{path} is damaged or truncated ({_first(error)})") from None


def _first(error: Exception) -> str:
    """The first line of what an error says, or its name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]


def choose(data: Any, which: str, source: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors that `which` means among what a file holds. Training state is ignored by name, the rest is an error.

    Wrappers may be nested. Raises CheckpointError where nothing fits.
    """
    if not isinstance(data, Mapping):
        raise CheckpointError(f"{source} holds a {type(data).__name__}, not a table of weights")
    data = {str(key): value for key, value in data.items()}
    found = [key for key, value in data.items() if isinstance(value, Mapping) and value and key not in IGNORED]
    order = {"auto": AVERAGED + RAW, "ema": AVERAGED, "raw": RAW}.get(which, (which,))
    inner = next((key for key in order if key in found), None)
    if inner is None and which == "ema" and any(isinstance(data[key], Mapping) for key in found):
        inner = next((key for key in RAW if key in found and _wraps(data[key], AVERAGED)), None)
    if inner is not None:
        # an averaged set is flat; a raw one may be wrapped again (trainer -> var_wo_ddp)
        deeper = which if which in ("auto", "ema", "raw") and inner in RAW else "auto"
        flat = inner in AVERAGED or all(isinstance(v, Tensor) for v in data[inner].values())
        return choose(data[inner], "auto" if flat else deeper, f"{source}: {inner}")
    tensors = {key: value for key, value in data.items() if isinstance(value, Tensor)}
    left = [key for key in data if key not in tensors and key not in IGNORED]
    if left or not tensors or (which not in ("auto", "raw") and which not in data):
        have = ", ".join(sorted(found)[:6] or sorted(left)[:6]) or "nothing"
        want = "weights" if which == "auto" else f"{which!r} weights"
        raise CheckpointError(f"{source} holds no {want}; it has {have}. Choose another of its keys with inside=")
    return tensors


def _wraps(value: Mapping, names: tuple[str, ...]) -> bool:
    return any(isinstance(value.get(name), Mapping) for name in names)


def strip_prefixes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys without `module.` (DDP) in front of all of them, and without `_orig_mod.` (torch.compile) anywhere."""
    state = {re.sub(r"(^|\.)_orig_mod\.", r"\1", key): value for key, value in state.items()}
    while state and all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return state


@contextmanager
def without_weights() -> Iterator[None]:
    """Modules built inside have parameters without memory, on the meta device, and their usual buffers.

    `vtok.checkpoint.load_strict` then takes the tensors that it is given, instead of copying them.
    """

    def hollow(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        before = module._parameters.get(name)
        if parameter is None or parameter.is_meta or (before is not None and before.is_meta):  # the last: it is loaded
            return None
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(hollow)
    try:
        yield
    finally:
        handle.remove()


def settle(module: nn.Module, state: Mapping[str, Tensor], path: str | os.PathLike) -> nn.Module:
    """Give the module float32 tensors of its own, in place, so that the mapped file is not needed any more.

    state: what was read from `path`. Pages of the file are given back as they are copied.
    """
    mapped = FileView.of(state, path)
    mapped.release()
    seen: set[int] = set()
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_meta:
            raise CheckpointError(f"{path} does not give {name} a value")
        own = tensor.untyped_storage().data_ptr()
        whole = tensor.untyped_storage().nbytes() == tensor.nbytes and own not in seen
        seen.add(own)
        kind = torch.float32 if tensor.is_floating_point() else tensor.dtype
        if whole and tensor.is_contiguous() and tensor.dtype == kind and not mapped.holds(tensor):
            continue
        before = tensor.detach()
        tensor.data = before.to(kind, copy=True, memory_format=torch.contiguous_format)
        if mapped.holds(before):
            mapped.release(before)
    return module


class FileView:
    """The part of memory that shows a file. `release` gives its pages back to the system; they can be read again."""

    def __init__(self, start: int, stop: int) -> None:
        self.start, self.stop = start, stop

    @classmethod
    def of(cls, state: Mapping[str, Tensor], path: str | os.PathLike) -> FileView:
        """Empty where the tensors are not views of the file, or the system (not Linux) does not say."""
        spans = [(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in state.values()]
        spans = [(at, size) for at, size in spans if size]
        table = Path("/proc/self/maps")
        if not spans or not table.is_file():
            return cls(0, 0)
        start, stop = min(at for at, _ in spans), max(at + size for at, size in spans)
        name = str(Path(path).resolve())
        for line in table.read_text().splitlines():
            if line.endswith(name):
                low, high = (int(number, 16) for number in line.split()[0].split("-"))
                if low <= start and stop <= high:
                    return cls(start, stop)
        return cls(0, 0)

    def holds(self, tensor: Tensor) -> bool:
        return self.start <= tensor.data_ptr() < self.stop

    def release(self, tensor: Tensor | None = None) -> None:
        """Of one tensor, or of the whole file. Only pages that nobody has written to: `read_weights` never does."""
        start, stop = self.start, self.stop
        if tensor is not None:
            start, stop = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        page = mmap.PAGESIZE
        start, stop = -(-start // page) * page, stop // page * page
        if stop > start:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), DONTNEED)
