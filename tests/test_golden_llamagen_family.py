"""Generators that are "LlamaGen, except", converted, against what the originals computed, guided sampling included."""

import pytest
import torch
from references import assert_close, read
from sampling import Schedule, greedy

from vgen.convert import convert
from vgen.guidance import ClassifierFree, Constant, Interval, Linear, Unguided


def loaded(family, name):
    state, inputs, outputs, info = read(name)
    return convert(family, state, info["ctor"]), inputs, outputs


def teacher_forced(model, tokens, label):
    return model.head.logits(model(model.arrange(tokens.long()), model.conditioner(label.long())))[0]


def check_samples(model, inputs, outputs, guides):
    for name, guide in guides.items():
        want = outputs[name].long()
        assert torch.equal(greedy(model, inputs["label"][: len(want)].long(), guide).tokens, want), name


def test_gigatok():
    model, inputs, outputs = loaded("gigatok", "gigatok_gpt")
    assert_close(teacher_forced(model, inputs["indices"], inputs["label"]), outputs["logits"])
    last = model.layout.steps - 1
    step = Interval(2.0, low=0.3, first=True)  # token 0 is always guided; off is 1.0001 there
    ramp = Schedule(lambda p: 2.0 if p.step == 0 else 1 + p.step / last + 1e-4)
    guides = {"greedy_cfg": ClassifierFree(Constant(2.0)), "greedy_nocfg": Unguided()}
    guides |= {"greedy_step": ClassifierFree(step), "greedy_linear": ClassifierFree(ramp)}
    check_samples(model, inputs, outputs, guides)


def test_dar():
    model, inputs, outputs = loaded("dar", "dar_gpt")
    assert_close(teacher_forced(model, inputs["indices"], inputs["label"]), outputs["logits"])
    guides = {"greedy_cfg": ClassifierFree(Constant(2.0)), "greedy_nocfg": Unguided()}
    check_samples(model, inputs, outputs, guides | {"greedy_ramp": ClassifierFree(Linear(3.0, start=1.5))})


def test_har():
    model, inputs, outputs = loaded("har", "restok_gpt_har")
    tokens, label = inputs["indices"].long(), inputs["label"].long()
    assert_close(teacher_forced(model, tokens, label), outputs["logits"])
    loss = model.loss({"tokens": tokens, "label": label})["loss"]
    assert_close(loss, outputs["loss"].reshape(()))
    rank = model.layout.ranks()
    assert torch.equal(rank[:, None] >= rank, outputs["group_mask"][: len(rank), : len(rank)] == 0)

    def done(p):  # the original's ratio: of levels, by their first token; of the single tokens, an accident of its loop
        return {1: 1 / 15, 2: 2 / 3, 3: 1.0}.get(p.step, round(p.before * 16) / 15)

    guides = {"greedy_cfg": ClassifierFree(Constant(2.0)), "greedy_nocfg": Unguided()}
    guides["greedy_linear"] = ClassifierFree(Schedule(lambda p: 1 + done(p) + 1e-4))
    triangle = Schedule(lambda p: 1 + (2 * done(p) if done(p) < 0.5 else 2 * (1 - done(p))) + 1e-4)
    check_samples(model, inputs, outputs, guides | {"greedy_triangular": ClassifierFree(triangle)})
    by_its_tokenizers_name = loaded("restok", "restok_gpt_har")[0]
    assert torch.equal(teacher_forced(by_its_tokenizers_name, tokens, label), teacher_forced(model, tokens, label))


def test_detailflow():
    model, inputs, outputs = loaded("detailflow", "detailflow_gpt")
    tokens, label = inputs["indices"].long(), inputs["label"].long()
    assert_close(teacher_forced(model, tokens, label), outputs["logits"])
    assert_close(model.loss({"tokens": tokens, "label": label})["loss"], outputs["loss"].reshape(()))
    rank = model.layout.ranks()
    assert torch.equal(rank[:, None] >= rank, outputs["group_mask"][: len(rank), : len(rank)].bool())
    groups, causal, size = 4, 4, 4

    def gradual(p):  # falls over the groups, and only there
        group = (p.step - causal) + causal // size
        return 2.0 if p.step < causal else 2.0 * (groups - group + 1) / (groups + 1)

    guides = {"greedy_cfg": ClassifierFree(Constant(2.0)), "greedy_gradual": ClassifierFree(Schedule(gradual))}
    check_samples(model, inputs, outputs, guides)


def test_hita():
    model, inputs, outputs = loaded("hita", "hita_gpt")
    tokens = torch.cat([inputs["slot_indices"], inputs["indices"]], dim=1).long()
    assert model.last_query == "grid"
    check_samples(model, inputs, outputs, {"greedy_cfg": ClassifierFree(Constant(2.0)), "greedy_nocfg": Unguided()})
    model.last_query = "own"  # as the original trains, though not as it samples
    logits, slots = teacher_forced(model, tokens, inputs["label"]), inputs["slot_indices"].shape[1]
    assert_close(logits[:, :slots], outputs["logits"][:, :slots, :64])
    assert_close(logits[:, slots:], outputs["logits"][:, slots:, 64:])
    out = model.loss({"tokens": tokens, "label": inputs["label"].long()})
    losses = torch.stack([out["nats"][:, :slots].mean(), out["nats"][:, slots:].mean()])
    assert_close(losses, outputs["losses"])
    assert_close(out["loss"], outputs["losses"].sum())


FAMILY_OF = {"gigatok": "gigatok_gpt", "dar": "dar_gpt", "har": "restok_gpt_har", "detailflow": "detailflow_gpt"}
FAMILY_OF |= {"hita": "hita_gpt", "rar": "rar", "flexvar": "flexvar"}


@pytest.mark.parametrize("family", FAMILY_OF)
def test_keys_and_arguments_that_are_not_known_are_errors(family):
    state, _, _, info = read(FAMILY_OF[family])
    with pytest.raises(ValueError, match="1 unknown keys: surprise"):
        convert(family, {**state, "surprise": torch.zeros(1)}, info["ctor"])
    lost = next(k for k in sorted(state) if k.endswith(("ffn_norm.weight", "fc1.bias")))
    with pytest.raises(ValueError, match="keys missing"):
        convert(family, {k: v for k, v in state.items() if k != lost}, info["ctor"])
    name = next(iter(info["ctor"]))
    with pytest.raises(ValueError, match="unknown arguments"):
        convert(family, state, {**info["ctor"], name: {**info["ctor"][name], "model": {"surprise": 1}, "surprise": 1}})


@pytest.mark.parametrize(
    "family, part",
    [
        ("gigatok", "dim"),
        ("har", "spe_token_num"),
        ("hita", "block_size"),
        ("detailflow", "n_head"),
        ("dar", "norm_eps"),
    ],
)
def test_arguments_that_do_not_fit_are_errors(family, part):
    state, _, _, info = read(FAMILY_OF[family])
    arguments = dict(info["ctor"]["Transformer_ModelArgs"])
    arguments[part] = {"n_head": None, "norm_eps": 1e-6, "spe_token_num": 7}.get(part, 15)
    if part == "n_head":
        del arguments[part]
    with pytest.raises(ValueError, match=part.removesuffix("_num")):
        convert(family, state, {"Transformer_ModelArgs": arguments})


@pytest.mark.parametrize(
    "family, name, swap",
    [
        ("hita", "hita_gpt", ("slot_embeddings.weight", "tok_embeddings.weight")),
        ("har", "restok_gpt_har", ("layers.0.feed_forward.w1.weight", "layers.0.feed_forward.w3.weight")),
        ("rar", "rar", ("blocks.0.norm1.weight", "blocks.0.norm2.weight")),
        ("rar", "rar", ("pos_embed", "target_aware_pos_embed")),
    ],
)
def test_a_swapped_pair_of_keys_is_seen(family, name, swap):
    state, inputs, outputs, info = read(name)
    a, b = swap
    model = convert(family, {**state, a: state[b], b: state[a]}, info["ctor"])
    tokens, want = inputs["indices"].long(), outputs["logits_raster" if family == "rar" else "logits"]
    if family == "hita":
        tokens, want = torch.cat([inputs["slot_indices"].long(), tokens], 1), want[..., :64]
    got = teacher_forced(model, tokens, inputs["label"])[:, :4]
    with pytest.raises(AssertionError, match="relative error"):
        assert_close(got, want[:, :4])
