"""Guidance: schedule tables, the one convention, and what "off" means."""

import math

import pytest
import torch

from vgen.guidance import (
    SCHEDULES,
    ClassifierFree,
    Constant,
    Cosine,
    Gate,
    Interval,
    Linear,
    Progress,
    Unguided,
    guidance,
    guided_steps,
)
from vtok.layout import SequenceLayout


@pytest.mark.parametrize(
    "schedule, values",
    [
        (Constant(2.0), {0: 2.0, 5: 2.0, 9: 2.0}),
        (Linear(2.5), {0: 1.0, 3: 1.5, 9: 2.5}),  # VAR with cfg 1.5 and 10 scales: 1 + 1.5 k / 9
        (Linear(8.0, start=1.2), {0: 1.2, 9: 8.0}),  # D-AR-L
        (Cosine(3.0), {0: 1.0, 5: 2.0}),
        (Cosine(16.0, power=2.75), {0: 1.0, 5: 1 + 15 * math.sin(math.pi / 2**3.75) ** 2}),  # RAR-B
        (Interval(4.0, low=0.3, high=0.7), {0: 1.0, 3: 4.0, 6: 4.0, 7: 1.0}),
        (Interval(4.0, low=0.3, first=True), {0: 4.0, 1: 1.0, 2: 1.0, 3: 4.0, 9: 4.0}),  # GigaTok, ReToK
    ],
)
def test_schedule_tables(schedule, values):
    for step, want in values.items():
        assert schedule(Progress(step, 10)) == pytest.approx(want, abs=1e-6)


def test_schedules_of_other_lengths():
    """HAR's nine steps, off in the first two; LlamaGen's cfg_interval of n tokens, off behind token n; FlexVAR's growth
    behind step 9 of 13."""
    har = [Interval(3.75, low=0.25)(Progress(k, 9)) for k in range(9)]
    assert har == [1.0, 1.0] + [3.75] * 7
    early = [Interval(2.0, high=100 / 255)(Progress(k, 256)) for k in range(256)]
    assert early == [2.0] * 101 + [1.0] * 155
    flexvar = [Linear(3.5, reached=9)(Progress(k, 13)) for k in (0, 9, 12)]
    assert flexvar == pytest.approx([1.0, 3.5, 1 + 2.5 * 12 / 9])
    assert Linear(3.5, reached=9)(Progress(5, 6)) == 3.5


@pytest.mark.parametrize("name", SCHEDULES)
def test_one_step_alone_has_the_whole_scale(name):
    one = SequenceLayout.line(1)
    for options in ({}, {"interval": {"low": 0.2, "high": 0.9}, "linear": {"start": 2.0}}.get(name, {})):
        guide = guidance(5.0, name, **options)
        assert guide.schedule(Progress.of(one, 0)) == 5.0 and guided_steps(guide, one) == [True]


def test_scale_one_is_the_conditional_branch_bitwise():
    out = torch.randn(2, 4, 5)
    assert torch.equal(ClassifierFree(Constant(1.0))(out, Progress(0, 2)), out[0])


def test_convention():
    out = torch.tensor([[3.0], [1.0]])
    assert ClassifierFree(Constant(2.5))(out, Progress(0, 1)).item() == 3 + 1.5 * 2


def test_off_runs_no_null_row():
    assert isinstance(guidance(1.0), Unguided) and guidance(1.0, "linear").streams == 1
    assert guidance(2.0).streams == 2 and guidance(1.0, "linear", start=2.0).streams == 2


def test_guided_steps_are_those_whose_scale_is_not_one():
    ten = SequenceLayout.line(10)
    for schedule, steps in [
        (Interval(4.0, low=0.2, high=0.5), [2, 3, 4]),  # shares 2/9 to 4/9
        (Interval(4.0, low=0.2, high=0.5, first=True), [0, 2, 3, 4]),
        (Interval(4.0, low=0.95, high=0.98, first=True), [0]),
        (Interval(4.0, low=0.95, high=0.98), []),
        (Interval(4.0), range(10)),
        (Linear(1.0, start=3.0), range(9)),
        (Linear(3.0), range(1, 10)),
        (Cosine(3.0), range(1, 10)),
        (Constant(2.0), range(10)),
        (Gate(3.0, high=0.4), range(1, 10)),  # open at small flow times, closed at noise
        (lambda progress: 1.0, range(10)),  # who knows what it says at another flow time
    ]:
        guided = guided_steps(ClassifierFree(schedule), ten)
        assert [k for k in range(10) if guided[k]] == list(steps), schedule
    assert guided_steps(Unguided(), ten) == [True] * 10


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="choose constant, linear"):
        guidance(2.0, "sine")
    with pytest.raises(ValueError, match="power"):
        guidance(2.0, "linear", power=2)
