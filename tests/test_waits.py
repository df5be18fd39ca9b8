"""Training and sampling on CUDA never wait for the device: seen on the CPU, with fake tensors and with watched backward
passes."""

from contextlib import nullcontext
from typing import Any

import pytest
import tokenizers
import torch
from fake_cuda import Arrivals, fake_cuda
from generators import FAMILIES, also_read, make, map_spec, tokens_of
from tape import Watch
from test_generators import LABELS
from torch import nn

from vgen.conditioning import Cond
from vgen.corruption import Corruption
from vgen.generator import Generator
from vgen.guidance import guidance
from vgen.heads import DrawRule
from vtok import counters
from vtok.data.module import keep_keys
from vtok.layers.trunk import Trunk
from vtok.losses.objective import TokenizerObjective
from vtok.noise import SampleNoise, sample_seeds

OPTIONS = {"rar": {"anneal": (0.0, 1.0)}, "var": {"progressive_until": 0.9, "progressive_first": 1, "drop_path": 0.1}}
OPTIONS["flexvar"] = {"sample_scales": True, "spec": map_spec((1, 2, 3, 4, 5)), "sides": (1, 3, 5)}
OPTIONS |= {name: {"dropout": 0.1, "attention_dropout": 0.1} for name in ("xar_cell", "flowar", "ecar", "mar")}


def trained(name: str) -> tuple[Generator, dict[str, Any]]:
    model = make(name, **OPTIONS.get(name, {})).train()
    tokens = tokens_of(model, 3)
    if name == "flexvar":  # of all scales that the spec knows
        tokens = torch.zeros(3, model.spec.layout.length, dtype=torch.int64)
    batch = keep_keys({"tokens": tokens, "label": LABELS, "key": sample_seeds(0, 0, 3)})
    return model, batch | also_read(model, 3)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_training_step_never_waits_for_the_device(name, monkeypatch):
    """The second: the first places constants there."""
    monkeypatch.setattr(Trunk, "prefixes", True)  # FlexAttention's masks are built once a layout, and compiled
    model, batch = trained(name)
    loss = model.loss(batch, progress=0.5)["loss"]
    with Watch(lambda *_: None):
        loss.backward()
    assert any(p.grad is not None for p in model.parameters())
    corrupt = Corruption(model.spec, None, kind="random")
    with fake_cuda(model, batch) as batch:
        model.loss(corrupt(batch), progress=0.5)
        with Arrivals():
            loss = model.loss(corrupt(batch), progress=0.5)["loss"]
        assert loss.is_cuda and loss.requires_grad


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("mar", "orthus", "orthus_linear")])
def test_a_sampling_step_never_waits_for_the_device(name):
    """The second run: the first places constants there. Guidance ends behind the first step, where the null rows go.
    A diffusion head reads its schedule on the host, where fake tensors have no values; tests/test_graphs.py records
    it.
    """
    model, guide = make(name), guidance(3.0, "interval", high=0.01)
    rule = DrawRule(temperature=0.9, top_k=9, top_p=0.8) if model.spec.discrete else DrawRule(solver_steps=2)
    with torch.no_grad(), fake_cuda(model, {"label": LABELS, "key": sample_seeds(0, 0, 3)}) as batch:
        streams = [model.conditioner(batch["label"]), model.conditioner.null(3)]
        cond, noise = Cond.cat(streams), SampleNoise(batch["key"])
        stop = min(3, model.layout.steps)
        counters.reset()
        for watch in (nullcontext(), Arrivals()):
            with watch:
                tokens = model.sampler(model, cond, noise=noise, guide=guide, rule=rule, stop=stop).tokens
        assert tokens.is_cuda
        taken = counters.read()
        assert taken["rows.guided"] == 2 and taken.get("rows.single", 0) == 2 * (stop - 1)


TOKENIZERS = tokenizers.FAMILIES | {
    "flexvar_drawn": lambda: tokenizers.flexvar(draw_sides=True),
    "detailflow_drawn": lambda: tokenizers.detailflow(correction=True, degradation=0.9),
}


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_a_tokenizers_forward_pass_never_waits_for_the_device(name, monkeypatch):
    monkeypatch.setattr(Trunk, "prefixes", True)
    monkeypatch.setattr(tokenizers, "FAMILIES", TOKENIZERS)
    model = tokenizers.make(name).train()
    objective = TokenizerObjective(perceptual_weight=0.0)
    batch = keep_keys({"images": tokenizers.images(3), "key": sample_seeds(0, 0, 3)})
    with fake_cuda(model, batch) as batch:
        keys = {"key": batch["key"], "host_key": batch["host_key"]}
        objective.reconstruct(model, batch["images"], **keys)
        with Arrivals():
            found = objective.reconstruct(model, batch["images"], **keys)
        made = [value for value in (found.images, *found.losses.values()) if value is not None]
        assert made and all(value.is_cuda for value in made)


WAITING = {
    "a value": lambda x: x.sum().item(),
    "a condition": lambda x: bool(x.sum() > 0),
    "a size": lambda x: x[x > 0],
    "numbers": lambda x: torch.tensor([0.5, 1.0], device=x.device),
    "one number": lambda x: torch.tensor(0.5, device=x.device),
    "an index": lambda x: x[[1, 0]],
    "a table": lambda x: torch.ones(2).to(x.device),
    "the way back": lambda x: x.cpu(),
}


@pytest.mark.parametrize("name", WAITING)
def test_what_waits_is_seen(name):
    with fake_cuda(nn.Linear(2, 2), {"x": torch.ones(2, 2)}) as batch, Arrivals():
        (batch["x"] * 2 + torch.arange(2, device="cuda")).sum()  # nothing waits
        with pytest.raises(Exception, match=r"waited for|_local_scalar_dense|nonzero"):
            WAITING[name](batch["x"])


@pytest.mark.parametrize("kind", ["near", "noise"])
def test_tables_of_wrong_codes_are_placed_once(kind):
    from test_corruption import quantizer  # VQ of 24 codes

    model, batch = trained("llamagen")
    corrupt = Corruption(model.spec, quantizer(), kind=kind)
    with fake_cuda(model, batch) as batch:
        corrupt.tables = [torch.empty(table.shape) for table in corrupt.tables]
        corrupt.neighbours = [torch.empty(table.shape, dtype=torch.int64) for table in corrupt.neighbours]
        with pytest.raises(AssertionError, match="waited for"), Arrivals():
            corrupt(batch)
        corrupt(batch)
        with Arrivals():
            assert corrupt(batch)["context"].is_cuda
