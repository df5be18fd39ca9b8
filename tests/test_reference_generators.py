"""Options of published generators that no golden shows, against what the originals computed on the same weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from references import assert_close, read
from sampling import Schedule, greedy

from vgen.conditioning import Cond
from vgen.convert import convert
from vgen.guidance import ClassifierFree, Constant, Cosine, Linear, Previous, Unguided
from vgen.heads import DrawRule
from vgen.latents import entity_layout, stretched_rope
from vgen.masking import masked_layout
from vgen.samplers.ancestral import ancestral
from vtok.layout import SequenceLayout
from vtok.noise import SampleNoise, sample_seeds
from vtok.quantize.factors import join, split


def teacher_forced(model, tokens, label):
    return model.head.logits(model(model.arrange(tokens.long()), model.conditioner(label.long())))[0]


@pytest.mark.parametrize("name", ["var_shared", "var_plain_attention"])
def test_var(name):
    """VAR-d36's one modulation for all blocks; attention without normalised queries and keys."""
    state, inputs, outputs, info = read(name)
    model, label = convert("var", state, info["ctor"]), inputs["label"]
    assert_close(teacher_forced(model, inputs["indices"], label), outputs["logits"])
    assert float(outputs["sample_margin"]) > 1e-4
    seen = []
    canvas = greedy(model, label, ClassifierFree(Linear(1 + 2.0)), seen)  # the original's cfg = 2 is a last scale of 3
    assert torch.equal(canvas.tokens, outputs["sample_indices"])
    assert_close(torch.cat(seen, 1), outputs["sample_logits"])
    fhat = model.quantizer.assemble(model.quantizer.lookup(canvas.tokens))
    assert_close(fhat.permute(0, 3, 1, 2), outputs["sample_fhat"])


GPTS = {
    "gigatok": ["adaln", "shared_adaln", "qk_norm", "adaln_qk_norm"],
    "llamagen": ["wide", "384"],
    "ifsq": ["", "repa"],
}


@pytest.mark.parametrize("family, option", [(family, option) for family in GPTS for option in GPTS[family]])
def test_gpt(family, option):
    """GigaTok's adaptive norms and normed queries, LlamaGen's rope at 24 x 24 and at another base, iFSQ's alignment."""
    state, inputs, outputs, info = read(f"{family}_gpt_{option}".removesuffix("_"))
    model = convert(family, state, info["ctor"])
    assert_close(teacher_forced(model, inputs["indices"], inputs["label"]), outputs["logits"])
    for name, guide in {"greedy_cfg": ClassifierFree(Constant(2.0)), "greedy_nocfg": Unguided()}.items():
        if name in outputs:
            assert torch.equal(greedy(model, inputs["label"][:2] % 10, guide).tokens, outputs[name].long()), name
    if "projected" in outputs:
        states = []
        cond = model.conditioner(inputs["label"])
        cond = replace(cond, at={model.block: lambda h, place: (states.append(h), h)[1]})
        model(model.arrange(inputs["indices"]), cond)
        assert_close(model.projector(states[0]), outputs["projected"])


def test_ifsq_with_sub_codes():
    """Two blocks over the sub-codes of a token, with the trunk's tables, rope and norm: logits, and guided decoding."""
    state, inputs, outputs, info = read("ifsq_gpt_sub_codes")
    model = convert("ifsq", state, info["ctor"])
    sizes, parts = info["ctor"]["Transformer_ModelArgs"]["vocab_size"], inputs["parts"]
    assert sum(p.numel() for p in model.parameters()) == sum(v.numel() for v in state.values())
    ids, states = join(parts.movedim(0, -1), sizes), []
    cond = model.conditioner(inputs["label"])
    cond = replace(cond, at={model.block: lambda h, place: (states.append(h), h)[1]})
    canvas = model.arrange(ids)
    for f, logits in enumerate(model.head.logits(model(canvas, cond), canvas.tokens)):
        assert_close(logits, outputs[f"logits_{f}"])
    assert_close(model.projector(states[0]), outputs["projected"])
    assert outputs["margin"] > 1e-4
    for name, guide in {"greedy_cfg": ClassifierFree(Constant(2.0)), "greedy_nocfg": Unguided()}.items():
        got = greedy(model, inputs["label"][:2] % 10, guide).tokens
        assert torch.equal(split(got, sizes), outputs[name].long()), name
    with pytest.raises(ValueError, match=r"vocab_size=\[5, 6, 4\] in the config, but the weights have sub-codes"):
        given = info["ctor"]["Transformer_ModelArgs"]
        convert("ifsq", state, {"Transformer_ModelArgs": given | {"vocab_size": [5, 6, 4]}})


@pytest.mark.parametrize("name", ("elm_gpt", "elm_gpt_one"))
def test_elm(name):
    """Two sub-codes by concatenated and projected tables, and one code: logits, and decoding under rising guidance."""
    state, inputs, outputs, info = read(name)
    model, arguments = convert("elm", state, info["ctor"]), info["ctor"]["Transformer_ModelArgs"]
    sizes = (2 ** arguments["code_dim"],) * arguments["token_each"]
    ids = join(inputs["parts"], sizes)
    states, want = model(model.arrange(ids), model.conditioner(inputs["label"])), outputs["logits"]
    found = model.head.logits(states, ids) if len(sizes) > 1 else model.head.logits(states)
    for f, logits in enumerate(found):
        assert_close(logits, want.unflatten(1, (-1, len(sizes)))[:, :, f])
    assert outputs["margin"] > 1e-4
    rising = ClassifierFree(Schedule(lambda p: 1 + 2 * (p.step + 1) / p.steps))
    for key, guide in {"greedy_linear": rising, "greedy_nocfg": Unguided()}.items():
        got = greedy(model, inputs["label"][:2], guide).tokens
        assert torch.equal(split(got, sizes), outputs[key].long()), key
    wrongs = {"use_adaLN": True, "pos_type": "rope1d", "token_each": 3, "code_dim": 5, "block_size": 15, "surprise": 1}
    for option, value in wrongs.items():
        with pytest.raises(ValueError, match=option):
            convert("elm", state, {"Transformer_ModelArgs": arguments | {option: value}})


def test_what_ifsqs_converter_does_not_know_is_an_error():
    state, _, _, info = read("ifsq_gpt_repa")
    given = info["ctor"]["Transformer_ModelArgs"]
    same = convert("ifsq", state, {"Transformer_ModelArgs": given | {"vocab_size": [64]}})  # as its trainer writes it
    assert same.head.vocab_size == 64 and same.channels == 24
    wrongs = {"vocab_size": [8, 8], "z_dims": [24, 24], "rope_base": 500.0, "encoder_depth": 3, "z_dims_": None}
    for name, value in wrongs.items():
        word = "block" if name == "encoder_depth" else "rope_base" if name == "rope_base" else name
        with pytest.raises(ValueError, match=word):
            convert("ifsq", state, {"Transformer_ModelArgs": given | {name: value}})
    with pytest.raises(ValueError, match=r"unknown keys: projectors"):
        convert("ifsq", state, {"Transformer_ModelArgs": given | {"z_dims": None}})


def test_maskgit_of_the_uvit_kind():
    """TiTok's larger generators: skips between the halves, pre-norm, no bias in qkv."""
    state, inputs, outputs, info = read("maskgit_uvit")
    model = convert("maskgit", state, info["ctor"])
    ids, label = inputs["indices"], inputs["label"]
    canvas = model.arrange(ids.clamp(max=63))
    canvas.known = ids != 64
    assert_close(model.head.logits(model(canvas, model.conditioner(label)))[0], outputs["logits"])
    assert_close(model.head.logits(model(canvas, model.conditioner.null(len(label))))[0], outputs["logits_uncond"])
    # the original's scale g is g + 1 here where it computes c + g (c - u)
    schedules = {"constant": Constant(4.0), "linear": Previous(4.0), "power_cosine": Cosine(3.0, power=2)}
    for name, schedule in schedules.items():
        canvas = model.blank(len(label))
        canvas.layout = masked_layout(model.layout, 4, "arccos")
        cond = Cond.cat([model.conditioner(label), model.conditioner.null(len(label))])
        noise, guide = SampleNoise(sample_seeds(0, 0, len(label))), ClassifierFree(schedule)
        got = model.sampler(model, cond, noise=noise, guide=guide, rule=DrawRule(temperature=0), canvas=canvas).tokens
        assert torch.equal(got, outputs[f"greedy_{name}"]), name


class Uniform:
    """Recorded uniform numbers [step, B, V] as Gumbel noise, a row a step."""

    def __init__(self, numbers):
        self.numbers, self.seeds, self.step = numbers, sample_seeds(0, 0, numbers.shape[1]), 0

    def gumbel(self, position, ids, stream):
        self.step += 1
        return -torch.log(-torch.log(self.numbers[self.step - 1].unsqueeze(1)))


def test_rar_sampling_with_temperatures_and_power_cosine_guidance():
    state, inputs, outputs, info = read("rar_sampling")
    model, label = convert("rar", state, info["ctor"]), inputs["label"]
    assert float(outputs["margin"]) > 1e-4
    runs = {
        "base": (ClassifierFree(Cosine(16.0, 2.75)), 1.0),
        "xxl": (ClassifierFree(Cosine(8.0, 1.2)), 1.02),
        "hot": (ClassifierFree(Cosine(4.0, 1.5)), 1.6),
        "unguided": (Unguided(), 1.02),
    }
    for name, (guide, temperature) in runs.items():
        streams = [model.conditioner(label)] + [model.conditioner.null(len(label))] * (guide.streams - 1)
        noise, rule = Uniform(inputs["uniform"]), DrawRule(temperature=temperature)
        canvas = ancestral(model, Cond.cat(streams), noise=noise, guide=guide, rule=rule)
        assert torch.equal(canvas.tokens, outputs[name]), name


def test_flexvar_on_lists_of_scales_that_it_was_not_built_with():
    state, inputs, outputs, info = read("flexvar_scales")
    model, label = convert("flexvar", state, info["ctor"]), inputs["label"]
    runs = {  # the original's cfg is our scale, or with VAR's kind of guidance our scale - 1
        "short": ((1, 3, 5, 7), Constant(2.0)),
        "long": ((1, 2, 3, 4, 5, 6, 7), Linear(3.0, reached=9)),
        "large": ((1, 2, 4, 9), Linear(2.5, reached=9)),
    }
    for name, (sides, schedule) in runs.items():
        assert float(outputs[f"{name}_margin"]) > 1e-4
        seen, layout = [], SequenceLayout.scales(sides)
        canvas = greedy(model, label, ClassifierFree(schedule), seen, canvas=model.blank(len(label), layout))
        assert torch.equal(canvas.tokens, outputs[f"{name}_indices"]), name
        assert_close(seen[-1], outputs[f"{name}_logits"])


@pytest.mark.parametrize("head", [64, 80])
def test_xar_rope_at_published_widths(head):
    """B and L have heads of 64, H of 80; the tables run in the order of cells, 16 x 16 over 16 places."""
    _, _, outputs, _ = read("xar_rope")
    cos, sin = stretched_rope(entity_layout(16, 16, "cell", 8), head)
    for name, table in (("cos", cos), ("sin", sin)):
        assert_close(table.repeat_interleave(2, dim=-1)[::7], outputs[f"{name}_{head}"])
