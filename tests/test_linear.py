"""Float32 products on the CPU by oneDNN and OpenBLAS against PyTorch's own, in values and in gradients."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vtok import counters
from vtok.layers.linear import ALONE, ROWS, SHARED, WIDE, Linear, linear, long, multiply, open_blas, slow_mkl

here = torch.backends.mkldnn.is_available()
needs_onednn = pytest.mark.skipif(not here, reason="this build has no oneDNN products for this processor")
needs_openblas = pytest.mark.skipif(open_blas() is None, reason="this numpy has another library than OpenBLAS")


@pytest.fixture(autouse=True)
def on_a_processor_that_it_is_for(monkeypatch):
    monkeypatch.setattr("vtok.layers.linear.slow_mkl", lambda: here)


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def wide_counts(run, path="linear.wide"):
    counters.reset()
    run()
    return counters.read().get(path, 0)


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(64,), (3, 40), (2, 5, 8)])
def test_values_and_gradients_are_those_of_float64(shape, bias):
    """Of contiguous and of transposed x, the larger error of the two libraries being that of a sum of 768."""
    torch.manual_seed(0)
    layer = Linear(768, 1536, bias=bias)
    x = torch.randn(*shape, 768, requires_grad=True)
    given = torch.randn(*shape, 1536)
    assert layer.weight.numel() >= WIDE and x.numel() // 768 >= ROWS
    assert wide_counts(lambda: layer(x).mul(given).sum().backward()) == 1
    exact = nn.Linear(768, 1536, bias=bias).double()
    exact.load_state_dict(layer.state_dict())
    z = x.detach().double().requires_grad_()
    exact(z).mul(given.double()).sum().backward()
    pairs = [(layer(x), exact(z)), (x.grad, z.grad)]
    pairs += [(a.grad, b.grad) for a, b in zip(layer.parameters(), exact.parameters(), strict=True)]
    for got, want in pairs:
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=2e-4)
    turned = x.detach().transpose(0, -2).contiguous().transpose(0, -2)
    torch.testing.assert_close(layer(turned), layer(x), rtol=1e-6, atol=1e-5)


@needs_onednn
def test_gradients_of_gradients_are_pytorchs():
    """A penalty on gradients, of a weight alone."""
    torch.manual_seed(0)
    x, weight = torch.randn(64, 512), torch.randn(2048, 512) / 512**0.5
    found = []
    for product in (linear, F.linear):
        w, y = weight.clone().requires_grad_(), x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(product(y, w).square().sum(), y, create_graph=True)
        slope.square().mean().backward()
        found.append(w.grad)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_what_it_is_not_faster_for_is_pytorchs_own(monkeypatch):
    """Few rows, few numbers, more inputs than outputs, other dtypes, autocast, weights that are frozen or not."""
    x, weight = torch.randn(64, 512), torch.randn(2048, 512)
    few, small, tall = (x[:63], weight), (x, weight[:2047]), (torch.randn(64, 2048), torch.randn(512, 2048))
    others = [few, small, tall, (x.double(), weight.double()), (x.bfloat16(), weight.bfloat16())]
    for given in others:
        assert wide_counts(lambda given=given: linear(*given)) == 0
        assert torch.equal(linear(*given), F.linear(*given))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert wide_counts(lambda: linear(x, weight)) == 0
        assert linear(x, weight).dtype == torch.bfloat16
    assert wide_counts(lambda: linear(x, weight)) == int(here)
    monkeypatch.setattr("vtok.layers.linear.slow_mkl", lambda: False)
    assert wide_counts(lambda: linear(x, weight)) == 0


def test_it_is_for_amd_without_avx512(monkeypatch, tmp_path):
    """By what PyTorch says of the instructions and Linux of the maker."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    for maker, level, want in (("AuthenticAMD", "AVX2", True), ("AuthenticAMD", "AVX512", False), ("X", "AVX2", False)):
        info = tmp_path / "cpuinfo"
        info.write_text(f"vendor_id\t: {maker}\n")
        monkeypatch.setattr("vtok.layers.linear.Path", lambda _, info=info: info)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda level=level: level)
        assert slow_mkl.__wrapped__() is want
    info.unlink()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert slow_mkl.__wrapped__() is False


@needs_onednn
def test_only_what_needs_a_gradient_gets_one():
    x, weight = torch.randn(64, 512), torch.randn(2048, 512)
    frozen = x.clone().requires_grad_()
    linear(frozen, weight).sum().backward()
    torch.testing.assert_close(frozen.grad, weight.sum(0).expand_as(x), rtol=1e-5, atol=1e-4)
    learned = weight.clone().requires_grad_()
    linear(x, learned).sum().backward()
    torch.testing.assert_close(learned.grad, x.sum(0).expand_as(weight), rtol=1e-5, atol=1e-4)


@needs_openblas
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [(768, 1536), (1536, 768)])
def test_openblas_gradients_are_those_of_float64(sizes, bias, threads, monkeypatch):
    """Of x that is a transpose, of gradients that are expanded or not, on threads that do not divide the rows."""
    monkeypatch.setattr("vtok.layers.linear.ALONE", 0)
    monkeypatch.setattr("vtok.layers.linear.SHARED", 0)
    torch.manual_seed(0)
    layer, exact = Linear(*sizes, bias=bias), nn.Linear(*sizes, bias=bias).double()
    exact.load_state_dict(layer.state_dict())
    x = torch.randn(37, 2, sizes[0]).transpose(0, 1).requires_grad_()
    z = x.detach().double().requires_grad_()
    for given in (torch.randn(2, 37, sizes[1]), torch.randn(sizes[1]).expand(2, 37, -1)):
        for part in (layer, exact):
            part.zero_grad()
        x.grad = z.grad = None
        assert wide_counts(lambda given=given: (layer(x) * given).sum().backward(), "linear.gradients") == 1
        (exact(z) * given.double()).sum().backward()
        pairs = [(x.grad, z.grad)]
        pairs += [(a.grad, b.grad) for a, b in zip(layer.parameters(), exact.parameters(), strict=True)]
        for got, want in pairs:
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=2e-4)


@needs_openblas
def test_openblas_multiplies_as_many_rows_as_there_are(threads):
    for rows in (1, 2, 7, 64):
        a, b = torch.randn(50, rows).T, torch.randn(50, 30)
        torch.testing.assert_close(multiply(a, b).double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


@needs_openblas
def test_the_number_of_openblas_threads_is_left_as_it_was():
    before = open_blas().info()
    multiply(torch.randn(8, 8), torch.randn(8, 8))
    assert open_blas().info() == before


@needs_openblas
def test_a_forked_process_has_threads_of_its_own():
    """Without them it would wait for its parent's for ever."""
    code = """
import os, torch
from vtok.layers.linear import multiply
torch.set_num_threads(2)
a = torch.ones(64, 64)
multiply(a, a)
child = os.fork()
if child == 0:
    os._exit(int(multiply(a, a)[63, 63]))
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 64
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env=environment)


def test_which_gradients_are_long_enough(threads, monkeypatch):
    """In multiply-adds of one product: rows times numbers of the weight, which is large itself."""
    least = ALONE if threads == 1 else threads * SHARED
    weight = torch.empty(1024, 4096, device="meta")
    enough = -(-least // weight.numel())
    assert long(enough, weight) == (open_blas() is not None) and not long(enough - 1, weight)
    assert not long(2**40, torch.empty(1024, 1023, device="meta"))
    monkeypatch.setattr("vtok.layers.linear.open_blas", lambda: None)
    assert not long(enough, weight)
