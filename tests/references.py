"""Recorded outputs of original implementations: tests/goldens, and tests/references for options that those do not show.

A reference is NAME.json with NAME.safetensors; tests/goldens/README.md says what is in them. Weights are not stored but
drawn again from the seed.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

TESTS = Path(__file__).resolve().parent
FOLDERS = (TESTS / "goldens", TESTS / "references", TESTS.parents[1] / "shared" / "goldens")
PARTS = ("input/", "output/")


def read(name: str):
    """(state, inputs, outputs, info) of one reference; skips the test where the references are not there."""
    folder = next((folder for folder in FOLDERS if (folder / f"{name}.safetensors").is_file()), None)
    if folder is None:
        pytest.skip(f"the reference outputs {name} are not at {FOLDERS[0]}")
    info = json.loads((folder / f"{name}.json").read_text())
    tensors = load_file(folder / f"{name}.safetensors")
    draws = np.random.RandomState(info["seed"])
    state = {}
    for key in sorted(info["state"]):
        shape, _, kind = info["state"][key]
        if kind == "kept":
            state[key] = tensors[f"kept/{key}"]
            continue
        weights = torch.from_numpy((0.05 * draws.standard_normal(tuple(shape))).astype("float32")).reshape(shape)
        state[key] = weights + 1 if kind == "one_plus" else weights
    under = {part: {k[len(part) :]: v for k, v in tensors.items() if k.startswith(part)} for part in PARTS}
    return state, under["input/"], under["output/"], info


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    """max|a-b| / max|b| <= 1e-4 over the whole tensor."""
    assert got.shape == want.shape, f"{tuple(got.shape)} instead of {tuple(want.shape)}"
    got, want = got.detach().double(), want.double()
    error = float((got - want).abs().max() / want.abs().max())
    assert error <= 1e-4, f"relative error {error:.2e}"
