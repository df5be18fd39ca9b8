"""Converted xAR against what the original computed on the same weights, sampling with its recorded noise included."""

import pytest
import torch
from references import assert_close, read

from vgen.conditioning import Cond
from vgen.convert import convert
from vgen.guidance import ClassifierFree, Linear, Unguided
from vgen.heads import DrawRule
from vgen.samplers.ancestral import ancestral
from vtok.flow import interpolate


class Tape:
    """Recorded normal numbers, read left to right, in the place of keyed ones."""

    def __init__(self, numbers, rows):
        self.numbers, self.seeds, self.at = numbers.flatten(), torch.zeros(rows, dtype=torch.int64), 0

    def normal(self, position, channels, stream=0):
        count = len(self.seeds) * len(position) * channels
        self.at += count
        return self.numbers[self.at - count : self.at].view(len(self.seeds), len(position), channels)


@pytest.fixture(scope="module")
def golden():
    state, inputs, outputs, info = read("xar")
    return convert("xar", state, info["ctor"]), inputs, outputs, state, info


def raster(latents):
    return latents.flatten(2).transpose(1, 2)


def test_cells_velocity_and_loss(golden):
    model, inputs, outputs, _, _ = golden
    canvas, rows = model.arrange(raster(inputs["latents"])), len(inputs["latents"])
    assert_close(canvas.tokens.unflatten(1, (4, 64)), outputs["cells"])
    assert torch.equal(model.restore(canvas), raster(inputs["latents"]))
    canvas.time = inputs["time"].view(4, rows).T.contiguous()
    noise, data = inputs["noise"].transpose(0, 1).flatten(1, 2), canvas.tokens
    canvas.tokens = interpolate(data, noise, canvas.time[:, model.entities])
    h = model(canvas, model.conditioner(inputs["label"].long()))
    assert_close(model.head(h), outputs["velocity"])
    assert_close(model.head.loss(h, noise - data, model.layout.sizes).mean(), outputs["loss"].reshape(()))


@pytest.mark.parametrize(
    "name, tape, solver, steps, cfg",
    [
        ("sampled", "tape", "euler_maruyama", 4, 2.0),
        ("sampled_euler", "tape_euler", "euler", 4, 2.0),
        ("sampled_euler_nocfg", "tape_euler", "euler", 3, 1.0),
    ],
)
@pytest.mark.parametrize("cached", [True, False])
def test_sampling(golden, name, tape, solver, steps, cfg, cached):
    model, inputs, outputs, _, _ = golden
    labels = inputs["sample_label"].long()
    guide = Unguided() if cfg == 1 else ClassifierFree(Linear(cfg))
    noise = Tape(inputs[tape], len(labels))
    streams = [model.conditioner(labels)] + [model.conditioner.null(len(labels))] * (guide.streams - 1)
    rule = DrawRule(solver=solver, solver_steps=steps)
    canvas = ancestral(model, Cond.cat(streams), noise=noise, guide=guide, rule=rule, cached=cached)
    assert noise.at == len(noise.numbers), "all recorded noise is used, no more"
    assert_close(model.restore(canvas).transpose(1, 2).unflatten(2, (16, 16)), outputs[name])


def test_other_keys_tables_and_arguments_are_errors(golden):
    _, _, _, state, info = golden
    with pytest.raises(ValueError, match="1 unknown keys: surprise"):
        convert("xar", {**state, "surprise": torch.zeros(1)}, info["ctor"])
    with pytest.raises(ValueError, match="keys missing"):
        convert("xar", {k: v for k, v in state.items() if k != "pred.bias"}, info["ctor"])
    table = "encoder_blocks.1.attn.rope.freqs_sin"
    with pytest.raises(ValueError, match=table.replace(".", r"\.")):
        convert("xar", {**state, table: state[table].roll(1, 0)}, info["ctor"])
    with pytest.raises(ValueError, match="clusters=16"):
        convert("xar", state, {"xAR": {**info["ctor"]["xAR"], "clusters": 16}})


def test_a_swapped_gate_is_seen(golden):
    _, inputs, outputs, state, info = golden
    gate, value = (f"encoder_blocks.0.mlp.fc1_{n}.weight" for n in "gx")
    model = convert("xar", {**state, gate: state[value], value: state[gate]}, info["ctor"])
    canvas, rows = model.arrange(raster(inputs["latents"])), len(inputs["latents"])
    canvas.time = inputs["time"].view(4, rows).T
    noise = inputs["noise"].transpose(0, 1).flatten(1, 2)
    canvas.tokens = interpolate(canvas.tokens, noise, canvas.time[:, model.entities])
    with pytest.raises(AssertionError, match="relative error"):
        assert_close(model.head(model(canvas, model.conditioner(inputs["label"].long()))), outputs["velocity"])
