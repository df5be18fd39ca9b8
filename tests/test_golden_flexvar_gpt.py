"""FlexVAR's transformer converted, against what the original computed: other lists of scales, both guidances."""

import torch
from references import assert_close, read
from sampling import greedy

from vgen.convert import convert
from vgen.generator import Canvas
from vgen.guidance import ClassifierFree, Constant, Linear
from vtok.layout import SequenceLayout


def test_flexvar():
    state, inputs, outputs, info = read("flexvar")
    model = convert("flexvar", state, info["ctor"])
    cond, features = model.conditioner(inputs["label"].long()), inputs["features"]
    tokens = model.quantizer.indices(features.permute(0, 2, 3, 1))
    assert torch.equal(tokens, outputs["indices"].long())
    canvas = Canvas(tokens, model.layout)
    assert_close(model.maps(canvas, 0, model.layout.steps), outputs["var_input"])
    assert_close(model.head.logits(model(canvas, cond))[0], outputs["logits"])
    other = SequenceLayout.scales((1, 2, 4, 5))
    h = model.run(model.read(inputs["x_other"], cond, other, 0, other.steps))
    assert_close(model.head.logits(h)[0], outputs["logits_other_scales"])


def test_flexvar_sampling():
    state, inputs, outputs, info = read("flexvar")
    model, label = convert("flexvar", state, info["ctor"]), inputs["sample_label"].long()
    guides = {"llamagen_cfg": Constant(2.0), "var_cfg": Linear(3.0, reached=9)}  # the original's t is our scale - 1
    for name, schedule in guides.items():
        assert float(outputs[f"{name}_margin"].min()) > 1e-4
        seen = []
        canvas = greedy(model, label, ClassifierFree(schedule), seen)
        assert torch.equal(canvas.tokens, outputs[f"{name}_indices"].long())
        assert_close(torch.cat(seen, 1), outputs[f"{name}_logits"])
        a, b = model.layout.written(model.layout.steps - 1, model.layout.steps)
        last = model.quantizer.lookup(canvas.tokens[:, a:b]).unflatten(1, model.layout.sides[-1])
        assert_close(last.permute(0, 3, 1, 2), outputs[f"{name}_quant"])
