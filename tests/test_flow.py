"""Rectified flow: endpoints, the exact walk along a straight path, and the order of the solvers."""

import math

import pytest
import torch

from vtok.flow import data_of, interpolate, logit_normal, settle, solve, solve_stochastic, times


def test_a_straight_path_is_walked_exactly_by_every_solver_and_any_grid():
    data, noise = torch.randn(2, 5, 3, dtype=torch.float64), torch.randn(2, 5, 3, dtype=torch.float64)
    for solver in ("euler", "heun", "ab2"):
        for grid in (times(1), times(7), times(5, shift=3.0)):
            got = solve(lambda x, t: noise - data, noise, grid, solver=solver)
            torch.testing.assert_close(got, data)
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    mixed = interpolate(data, noise, t)
    assert torch.equal(mixed[0], data[0]) and torch.equal(mixed[1], noise[1])
    t = torch.rand(2, 5, dtype=torch.float64)
    torch.testing.assert_close(data_of(interpolate(data, noise, t), noise - data, t), data)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("ab2", 2)])
def test_solvers_have_their_order(solver, order):
    """dx/dt = x from time 1 to 0.5: x(0.5) = e^-0.5; halving the step divides the error by 2^order."""
    errors = []
    for steps in (20, 40):
        grid = [1 - 0.5 * i / steps for i in range(steps + 1)]
        got = solve(lambda x, t: x, torch.ones(1, dtype=torch.float64), grid, solver=solver)
        errors.append(abs(float(got) - math.exp(-0.5)))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)


def test_ab2_on_an_uneven_grid_is_exact_for_a_linear_slope():
    """A slope linear in time is what two slopes extrapolate exactly, after the Euler step."""
    grid = [1.0, 0.7, 0.6, 0.2, 0.0]
    got = solve(lambda x, t: torch.full_like(x, 2 * t), torch.zeros(1, dtype=torch.float64), grid, solver="ab2")
    assert float(got) == pytest.approx((0.7 - 1.0) * 2.0 + (0.0 - 0.7**2))


def test_time_grids():
    assert times(4) == [1.0, 0.75, 0.5, 0.25, 0.0]
    shifted = times(4, shift=3.0)
    assert shifted[0] == 1 and shifted[-1] == 0 and all(b > a for a, b in zip(times(4)[1:4], shifted[1:4], strict=True))
    with pytest.raises(ValueError, match="at least one step"):
        times(0)
    with pytest.raises(ValueError, match="solver"):
        solve(lambda x, t: x, torch.ones(1), [1.0, 0.0], solver="rk45")
    assert float(logit_normal(torch.zeros(1), mean=0.0)) == 0.5


def test_the_stochastic_solver_keeps_the_marginal_of_gaussian_data():
    """Data N(1, 0.5^2): the velocity is linear and known, and 20,000 walks end in that law whatever noise is added."""
    drawer, mean, spread = torch.Generator().manual_seed(0), 1.0, 0.5

    def velocity(x, t):
        variance = t**2 + (1 - t) ** 2 * spread**2
        centred = x - (1 - t) * mean
        return (t - (1 - t) * spread**2) / variance * centred - mean

    def normal(step):
        return torch.randn(20_000, generator=drawer, dtype=torch.float64)

    steps = []
    grid = settle(200, end=0.01)
    x = solve_stochastic(velocity, normal(0), grid, normal, on_step=lambda i, x, slope: steps.append(i))
    assert steps == list(range(200)) and grid[-2] == pytest.approx(0.01) and grid[-1] == 0
    assert abs(float(x.mean()) - mean) < 0.02 and abs(float(x.std()) - spread) < 0.02
    one = solve_stochastic(lambda x, t: 2 * x, torch.tensor([1.0]), [1.0, 0.0], normal)
    assert float(one) == 1 - (1 + (2 - 1) * 2)  # a single step is the last one, without noise: x - (x + (2 - t) v)
