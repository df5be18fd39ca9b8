"""Ids as sub-codes: `factors`, `split` and `join` of every quantiser."""

from __future__ import annotations

import itertools

import pytest
import torch

from vtok.quantize.binary import LFQ
from vtok.quantize.fsq import FSQ
from vtok.quantize.kl import KL
from vtok.quantize.vq import VQ


@pytest.mark.parametrize(
    "quantizer, factors",
    (
        (VQ(vocab_size=60, channels=3), (60,)),
        (FSQ(levels=(5, 4, 3)), (60,)),
        (FSQ(levels=(5, 4, 3), groups=(1, 2)), (5, 12)),
        (FSQ(levels=(5, 4, 3), groups=(1, 1, 1)), (5, 4, 3)),
        (LFQ(bits=6, groups=(2, 3, 1)), (4, 8, 2)),
    ),
)
def test_split_and_join_are_inverse_over_all_ids(quantizer, factors):
    assert quantizer.factors == factors
    ids = torch.arange(quantizer.vocab_size).view(2, -1)
    parts = quantizer.split(ids)
    assert parts.shape == (*ids.shape, len(factors)) and torch.equal(quantizer.join(parts), ids)
    # the lowest factor runs fastest
    wanted = [list(reversed(row)) for row in itertools.product(*(range(f) for f in reversed(factors)))]
    assert parts.flatten(0, 1).tolist() == wanted


def test_a_sub_code_depends_on_its_own_channels_alone():
    quantizer = FSQ(levels=(5, 5, 3, 3), groups=(2, 2))
    z = torch.randn(4, 7, 4)
    other = torch.cat([z[..., :2], torch.randn(4, 7, 2)], -1)
    one, two = (quantizer.split(quantizer.indices(x)) for x in (z, other))
    assert torch.equal(one[..., 0], two[..., 0]) and not torch.equal(one[..., 1], two[..., 1])
    alone = FSQ(levels=(5, 5)).indices(z[..., :2])
    assert torch.equal(one[..., 0], alone)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="continuous"):
        KL(channels=2).split(torch.zeros(1, 1).long())
    for groups in ((2, 2), (), (3, 0)):
        with pytest.raises(ValueError, match="groups"):
            FSQ(levels=(5, 4, 3), groups=groups)
