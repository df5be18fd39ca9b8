"""Converted LlamaGen and VAR against what the originals computed on the same weights, sampling included."""

import pytest
import torch
from references import assert_close, read

from vgen.conditioning import Cond
from vgen.convert import convert
from vgen.guidance import ClassifierFree, Constant, Linear, Progress, Unguided
from vgen.heads import DrawRule, survivors
from vgen.samplers.ancestral import ancestral
from vtok.noise import SampleNoise, sample_seeds

MARGIN = 1e-4


def greedy(model, labels, guide, seen=None):
    """Greedy tokens; `seen` collects the guided logits of every step."""

    def record(logits, progress):
        if seen is not None:
            seen.append(logits)
        return logits

    streams = [model.conditioner(labels)] + [model.conditioner.null(len(labels))] * (guide.streams - 1)
    rule = DrawRule(temperature=0, processors=(record,))
    noise = SampleNoise(sample_seeds(0, 0, len(labels)))
    return ancestral(model, Cond.cat(streams), noise=noise, guide=guide, rule=rule)


class FirstSteps:
    """LlamaGen's cfg_interval: guided for step <= last."""

    def __init__(self, scale, last):
        self.scale, self.last = scale, last

    def __call__(self, progress: Progress) -> float:
        return self.scale if progress.step <= self.last else 1.0


def test_llamagen():
    state, inputs, outputs, info = read("llamagen_gpt")
    model = convert("llamagen", state, info["ctor"])
    canvas, label = model.arrange(inputs["indices"]), inputs["label"]
    logits = model.head.logits(model(canvas, model.conditioner(label)))[0]
    assert_close(logits, outputs["logits"])
    assert_close(model.loss({"tokens": inputs["indices"], "label": label})["loss"], outputs["loss"].reshape(()))
    table = torch.stack([model.cos, model.sin], dim=-1)
    assert_close(table, outputs["freqs_cis"][: len(table)])
    values, ids = survivors(logits[:, -1], top_k=20, top_p=0.6)
    filtered = torch.full_like(logits[:, -1], -torch.inf).scatter(-1, ids, values)
    kept = outputs["filtered"] > -torch.inf
    assert torch.equal(filtered > -torch.inf, kept)
    assert_close(filtered[kept], outputs["filtered"][kept])


def test_llamagen_sampling():
    state, inputs, outputs, info = read("llamagen_gpt")
    assert float(outputs["greedy_margin"].min()) > MARGIN
    model, label, seen = convert("llamagen", state, info["ctor"]), inputs["label"][:2], []
    assert torch.equal(greedy(model, label, ClassifierFree(Constant(2.0)), seen).tokens, outputs["greedy_cfg"].long())
    assert_close(torch.cat(seen, 1), outputs["greedy_cfg_logits"])
    assert torch.equal(greedy(model, label, Unguided()).tokens, outputs["greedy_nocfg"].long())
    gated = greedy(model, label, ClassifierFree(FirstSteps(2.0, 7)))
    assert torch.equal(gated.tokens, outputs["greedy_cfg_interval"].long())


def test_var():
    state, inputs, outputs, info = read("var")
    model = convert("var", state, info["ctor"])
    logits = model.head.logits(model(model.arrange(inputs["indices"]), model.conditioner(inputs["label"])))[0]
    assert_close(logits, outputs["logits"])


def test_var_sampling():
    state, inputs, outputs, info = read("var")
    assert float(outputs["sample_margin"].min()) > MARGIN
    model, seen = convert("var", state, info["ctor"]), []
    label = inputs["label"][: len(outputs["sample_indices"])]
    canvas = greedy(model, label, ClassifierFree(Linear(1 + 2.0)), seen)  # the original's cfg = 2 is a last scale of 3
    assert torch.equal(canvas.tokens, outputs["sample_indices"].long())
    assert_close(torch.cat(seen, 1), outputs["sample_logits"])
    fhat = model.quantizer.assemble(model.quantizer.lookup(canvas.tokens))
    assert_close(fhat.permute(0, 3, 1, 2), outputs["sample_fhat"])


@pytest.mark.parametrize("family, name", [("llamagen", "llamagen_gpt"), ("var", "var")])
def test_keys_that_no_rule_names_and_missing_ones_are_errors(family, name):
    state, _, _, info = read(name)
    with pytest.raises(ValueError, match="1 unknown keys: surprise"):
        convert(family, {**state, "surprise": torch.zeros(1)}, info["ctor"])
    lost = next(k for k in sorted(state) if k.endswith(("attention_norm.weight", "ffn.fc1.bias")))
    with pytest.raises(ValueError, match="keys missing"):
        convert(family, {k: v for k, v in state.items() if k != lost}, info["ctor"])


@pytest.mark.parametrize(
    "family, name, swap",
    [
        ("llamagen", "llamagen_gpt", ("layers.0.feed_forward.w1.weight", "layers.0.feed_forward.w3.weight")),
        ("llamagen", "llamagen_gpt", ("layers.0.attention_norm.weight", "layers.0.ffn_norm.weight")),
        ("var", "var", ("var.blocks.0.attn.q_bias", "var.blocks.0.attn.v_bias")),
        ("var", "var", ("vae.quantize.quant_resi.qresi_ls.0.weight", "vae.quantize.quant_resi.qresi_ls.1.weight")),
    ],
)
def test_a_swapped_pair_of_keys_is_seen(family, name, swap):
    """The comparison above would notice: two tensors of equal shape exchanged move the logits beyond its tolerance."""
    state, inputs, outputs, info = read(name)
    a, b = swap
    model = convert(family, {**state, a: state[b], b: state[a]}, info["ctor"])
    logits = model.head.logits(model(model.arrange(inputs["indices"]), model.conditioner(inputs["label"])))[0]
    with pytest.raises(AssertionError, match="relative error"):
        assert_close(logits, outputs["logits"])


def test_var_without_its_quantizer_waits_for_adopt():
    state, inputs, _, info = read("var")
    alone = {k.removeprefix("var."): v for k, v in state.items() if k.startswith("var.")}
    model = convert("var", alone, info["ctor"])
    h = model(model.arrange(inputs["indices"]), model.conditioner(inputs["label"]))
    assert h[:, 1:].isnan().all(), "an input without a codebook must not look like a result"
