"""TiTok's converted MaskGIT against what the original computed on the same weights, sampling included."""

import pytest
import torch
from references import assert_close, read

from vgen.conditioning import Cond
from vgen.convert import convert
from vgen.guidance import ClassifierFree, Constant, Cosine, Previous
from vgen.heads import DrawRule
from vgen.masking import masked_layout
from vtok.noise import sample_seeds

STEPS = 4


class Tape:
    """Recorded uniform numbers as Gumbel noise, handed out in the order in which the original asked."""

    def __init__(self, numbers, rows):
        self.numbers, self.seeds, self.used = numbers, sample_seeds(0, 0, rows), 0

    def gumbel(self, position, ids, stream):
        shape = (len(self.seeds), position.shape[-1], ids.shape[-1])
        count = shape[0] * shape[1] * shape[2]
        drawn = self.numbers[self.used : self.used + count].view(shape)
        self.used += count
        return -torch.log(-torch.log(drawn))


def loaded():
    state, inputs, outputs, info = read("maskgit_bert")
    return convert("maskgit", state, info["ctor"]), inputs, outputs


def drawn(model, label, guide, rule, noise):
    canvas = model.blank(len(label))
    canvas.layout = masked_layout(model.layout, STEPS, "arccos")
    cond = Cond.cat([model.conditioner(label), model.conditioner.null(len(label))])
    return model.sampler(model, cond, noise=noise, guide=guide, rule=rule, canvas=canvas).tokens


def test_logits():
    model, inputs, outputs = loaded()
    ids = inputs["indices"].long()
    canvas = model.arrange(ids.clamp(max=63))
    canvas.known = ids != 64
    label = inputs["label"].long()
    assert_close(model.head.logits(model(canvas, model.conditioner(label)))[0], outputs["logits"])
    assert_close(model.head.logits(model(canvas, model.conditioner.null(len(label))))[0], outputs["logits_uncond"])


@pytest.mark.parametrize(
    "name, schedule",
    [("constant", Constant(4.0)), ("linear", Previous(4.0)), ("power_cosine", Cosine(3.0, power=2))],
)
def test_greedy_sampling(name, schedule):
    """The original's scale g is g + 1 here where it computes c + g (c - u)."""
    model, inputs, outputs = loaded()
    want = outputs[f"greedy_{name}"].long()
    got = drawn(model, inputs["label"].long(), ClassifierFree(schedule), DrawRule(temperature=0), Tape(None, len(want)))
    assert torch.equal(got, want)


def test_sampling_with_noise():
    model, inputs, outputs = loaded()
    want = outputs["sampled"].long()

    def anneal(logits, progress):
        return logits / (0.5 + 0.8 * (1 - (progress.step + 1) / progress.steps))

    tape = Tape(inputs["uniform"], len(want))
    rule = DrawRule(temperature=2.0, processors=(anneal,))
    got = drawn(model, inputs["label"].long(), ClassifierFree(Previous(4.0)), rule, tape)
    assert torch.equal(got, want)
