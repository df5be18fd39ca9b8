"""Recorded outputs of original implementations, read from ../shared/goldens where that folder is."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "goldens"


def read(name: str):
    """(state, inputs, outputs, info) of one reference; skips the test where the references are not there."""
    if not (FOLDER / f"{name}.json").is_file():
        pytest.skip(f"the reference outputs {name} are not at {FOLDER}")
    loader = importlib.util.spec_from_file_location("read", FOLDER / "read.py")
    module = importlib.util.module_from_spec(loader)
    loader.loader.exec_module(module)
    return module.read(name, FOLDER)


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    """max|a-b| / max|b| <= 1e-4 over the whole tensor."""
    assert got.shape == want.shape, f"{tuple(got.shape)} instead of {tuple(want.shape)}"
    got, want = got.detach().double(), want.double()
    error = float((got - want).abs().max() / want.abs().max())
    assert error <= 1e-4, f"relative error {error:.2e}"
