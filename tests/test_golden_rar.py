"""RAR converted, against what the original computed: random orders, the null class, guided and plain sampling."""

import torch
from references import assert_close, read
from sampling import greedy

from vgen.convert import convert
from vgen.guidance import ClassifierFree, Cosine, Unguided


def test_rar():
    state, inputs, outputs, info = read("rar")
    model = convert("rar", state, info["ctor"])
    tokens, orders = inputs["indices"].long(), inputs["orders"].long()
    cond, null = model.conditioner(inputs["label"]), model.conditioner.null(len(tokens))
    logits = {
        "raster": model.head.logits(model(model.arrange(tokens), cond))[0],
        "orders": model.head.logits(model(model.arrange(tokens, orders), cond))[0],
        "none": model.head.logits(model(model.arrange(tokens), null))[0],
    }
    for name, got in logits.items():
        assert_close(got, outputs[f"logits_{name}"][:, :-1])  # the original's last position predicts nothing
    assert torch.equal(model.arrange(tokens, orders).tokens, outputs["labels_orders"].long())


def test_rar_sampling():
    state, inputs, outputs, info = read("rar")
    assert float(outputs["greedy_margin"].min()) > 1e-4
    model = convert("rar", state, info["ctor"])
    label = inputs["label"][: len(outputs["greedy_cfg"])]
    assert torch.equal(greedy(model, label, ClassifierFree(Cosine(4.0, 2.75))).tokens, outputs["greedy_cfg"].long())
    assert torch.equal(greedy(model, label, Unguided()).tokens, outputs["greedy_nocfg"].long())
