"""Every configuration of a generator, thin, on tokens of its own shape: no leakage, cached = teacher-forced, sameness.

tests/test_generators.py holds the families to more; here are the options that configurations add to them.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from generators import CLASSES, drawn, tokens_of
from omegaconf import OmegaConf
from test_generators import assert_same, draw
from test_matrix import make_thin
from test_model_configs import PUBLISHED, SMALL, STATED, section

from vgen.generator import Generator
from vgen.guidance import guidance
from vgen.models.mar import MAR
from vgen.models.maskgit import MaskGIT
from vgen.models.transition import DTM
from vgen.models.xar import XAR
from vtok.config import instantiate
from vtok.noise import sample_seeds
from vtok.tokenizer import TokenSpec

SPECS: dict[str, TokenSpec] = {**{name: spec for name, (spec, _) in PUBLISHED.items()}, **STATED, **SMALL}
# no place of the sequence comes before another, or no step can be kept: tests of their own, and below only sameness
WITHOUT_ORDER, WITHOUT_CACHE = (MAR, MaskGIT), (MAR, MaskGIT, DTM)
FIRST, DRAWN = 12, 6  # steps that are compared one by one; steps of a draw


def thin(name: str) -> dict:
    """The configuration with few layers of little width; sizes leave, all else stays."""
    config = OmegaConf.to_container(section(name))
    make_thin(config)
    if config.get("arch") == "uvit":  # two halves, joined block by block
        config |= {"depth": 2}
    if name.startswith("flexvar"):  # its widths follow from the depth
        config |= {"width": 16, "heads": 2}
    return config


def unlike() -> dict[str, list[str]]:
    """First name -> all names that are the same once they are thin."""
    found: dict[str, tuple[str, list[str]]] = {}
    for name in sorted(SPECS):
        found.setdefault(repr((sorted(thin(name).items(), key=repr), SPECS[name])), (name, []))[1].append(name)
    return dict(found.values())


ALIKE = unlike()


def make(name: str) -> Generator:
    torch.manual_seed(0)
    return drawn(instantiate(OmegaConf.create(thin(name)), _convert_="all", _partial_=True)(SPECS[name], CLASSES))


def test_every_configuration_is_looped_over():
    assert sorted(itertools.chain.from_iterable(ALIKE.values())) == sorted(SPECS)


@pytest.mark.parametrize("name", ALIKE)
@torch.no_grad()
def test_a_configuration_keeps_what_its_family_promises(name):
    model = make(name)
    labels = torch.tensor([0, CLASSES])
    if not isinstance(model, WITHOUT_ORDER):
        leaks_nothing(model, labels)
    assert model.caches != isinstance(model, WITHOUT_CACHE)
    if model.caches:
        cached_is_teacher_forced(model, labels)
    seeds, options = sample_seeds(0, 0, 2), {"guide": guidance(2.0), "stop": min(DRAWN, model.layout.steps)}
    whole = draw(model, labels, seeds, **options).tokens
    assert_same(draw(model, labels[1:], seeds[1:], **options).tokens, whole[1:])
    assert len(whole.unique()) > 2


def leaks_nothing(model: Generator, labels: torch.Tensor) -> None:
    """Changed tokens from a step on move nothing before it, and something from there on."""
    canvas, cond, steps = model.arrange(tokens_of(model, 2)), model.conditioner(labels), model.layout.steps
    before = model(canvas, cond)
    for step in sorted({0, 1, steps // 2, steps - 1} & set(range(steps))):
        a, b = model.layout.written(step, step + 1)
        changed = canvas.tokens.clone()
        changed[:, a:] += 1
        if model.spec.discrete:
            changed[:, a:] %= min(part.vocab_size for part in model.spec.parts)
        after, edge = model(replace(canvas, tokens=changed), cond), a if isinstance(model, XAR) else b
        torch.testing.assert_close(after[:, :edge], before[:, :edge], rtol=1e-5, atol=1e-5)
        assert edge == model.layout.length or not torch.allclose(after[:, edge:], before[:, edge:], atol=1e-3)


def cached_is_teacher_forced(model: Generator, labels: torch.Tensor) -> None:
    canvas, cond, layout = model.arrange(tokens_of(model, 2)), model.conditioner(labels), model.layout
    whole, cache, steps = model(canvas, cond), model.cache(2), min(FIRST, layout.steps)
    parts = []
    for k in range(steps):
        parts.append(model(canvas, cond, k, k + 1, cache))
        cache.commit(layout.reads[k])
    if steps < layout.steps:
        parts.append(model(canvas, cond, steps, None, cache))
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)
