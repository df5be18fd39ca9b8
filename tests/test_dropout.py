"""Dropout on the CPU: shares, scale, gradient, and that the four entries of a draw are independent."""

import pytest
import torch

from vtok.layers.dropout import Dropout, dropout


@pytest.mark.parametrize("p", [0.03, 0.1, 0.5, 0.9])
def test_a_share_of_the_entries_is_zero_and_the_mean_stays(p):
    torch.manual_seed(0)
    y = dropout(torch.ones(400_001, dtype=torch.float64), p)
    zero, tolerance = float((y == 0).double().mean()), 5 * (p * (1 - p) / 400_001) ** 0.5
    assert abs(zero - p) < tolerance
    torch.testing.assert_close(y[y != 0].unique(), torch.tensor([1 / (1 - p)], dtype=torch.float64), rtol=1e-3, atol=0)
    assert abs(float(y.mean()) - 1) < tolerance / (1 - p)


def test_neighbours_are_dropped_independently():
    """The share of pairs that are both dropped is p^2, for places that share a draw and places that do not."""
    torch.manual_seed(0)
    p, gone = 0.3, dropout(torch.ones(2**20), 0.3) == 0
    for distance in range(1, 9):
        pairs = gone[:-distance] & gone[distance:]
        for lane in range(4):
            found = float(pairs[lane::4].double().mean())
            assert abs(found - p * p) < 5 * (p * p / len(pairs[lane::4])) ** 0.5, (distance, lane)


def test_the_gradient_has_the_mask_of_the_values():
    x = torch.randn(7, 9, requires_grad=True)
    torch.manual_seed(0)
    y = dropout(x, 0.4)
    y.sum().backward()
    torch.testing.assert_close(x.grad * x.detach(), y.detach())
    torch.manual_seed(0)
    torch.testing.assert_close(dropout(x.t().contiguous().t(), 0.4), y, rtol=0, atol=0)


def test_nothing_is_dropped_at_zero_or_outside_of_training_and_all_at_one():
    x, layer = torch.randn(5), Dropout(0.5)
    assert dropout(x, 0.0) is x and torch.equal(layer.eval()(x), x)
    assert torch.equal(dropout(x, 1.0), torch.zeros(5)) and dropout(torch.empty(0, 3), 0.5).shape == (0, 3)
    assert (layer.train()(torch.ones(100)) == 0).any()
    with pytest.raises(ValueError, match="between 0 and 1"):
        Dropout(1.5)
