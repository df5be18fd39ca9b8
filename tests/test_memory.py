"""Bytes counted tensor by tensor, and what they say of the pieces of the cross-entropy and of growing models."""

import pytest
import torch
import torch.nn.functional as F

from eval.memory import Memory
from vgen.cross_entropy import linear_cross_entropy


def test_bytes_are_those_of_living_tensors():
    before = torch.zeros(1000)
    with Memory() as memory:
        a = torch.ones(100)  # 400
        b = a[:50].view(5, 10)
        c = a + before[:100]  # 800
        a.mul_(2)
        del a
        d = c * 2 * 3  # b keeps a; two of the three products at once: 400 + 400 + 400 + 400
        del b, c
        e = torch.ones(10, dtype=torch.float64)
    assert memory.peak == 1600 and memory.largest == 400 and memory.now == 400 + 80
    assert d.sum() == 100 * 2 * 6 / 2 and e.sum() == 10


def test_pieces_of_the_cross_entropy_hold_less_at_once(monkeypatch):
    """64 rows, 1000 codes: whole, logits, their gradient and the softmax are 256 kB each; in pieces of 8 rows 32 kB."""
    torch.manual_seed(0)
    weight, target = torch.randn(1000, 4, requires_grad=True), torch.randint(1000, (64,))
    peaks, found = {}, {}
    for most in (10**6, 8000):
        monkeypatch.setattr("vgen.cross_entropy.MOST", most)
        h = torch.randn(64, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with Memory() as memory:
            loss = linear_cross_entropy(h, weight, None, target)
            found[most] = (loss.detach(), *torch.autograd.grad(loss.sum(), (h, weight)))
            del loss
        peaks[most] = memory.peak
        assert memory.largest == (64 if most == 10**6 else 8) * 1000 * 4
    assert peaks[10**6] > 2 * 64 * 1000 * 4 > 4 * peaks[8000]
    h = torch.randn(64, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    plain = F.cross_entropy(h @ weight.T, target, reduction="none")
    want = (plain.detach(), *torch.autograd.grad(plain.sum(), (h, weight)))
    for most in found:
        for a, b in zip(found[most], want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recomputed", [False, True])
def test_a_linear_chain_holds_its_activations(recomputed):
    """Ten sines of a kilobyte each are kept for the backward pass, or one of every five."""
    from torch.utils.checkpoint import checkpoint

    x = torch.zeros(256, requires_grad=True)

    def five(y):
        for _ in range(5):
            y = y.sin()
        return y

    with Memory() as memory:
        y = x
        for _ in range(2):
            y = checkpoint(five, y, use_reentrant=False) if recomputed else five(y)
        kept = memory.now
    assert kept == (2 if recomputed else 10) * 1024
