"""What is particular to RAR, FlexVAR, the grouped families, Hita, LlamaGen-REPA and VAR's progressive training."""

import math
from dataclasses import replace

import pytest
import torch
from generators import (
    CLASSES,
    flexvar,
    grid_spec,
    line_spec,
    make,
    map_spec,
    rar,
    scale_spec,
    small,
    tokens_of,
    var,
)
from hydra import compose, initialize_config_dir
from runs import CONFIGS, GENERATOR, losses, run, tokenizer_folder

from vgen.generator import Canvas
from vgen.models import FAMILIES
from vgen.models.detailflow import DetailFlow
from vgen.models.flexvar import FlexVAR, positions
from vgen.models.har import HAR
from vgen.models.hita import HitaGPT
from vgen.models.nbp import NBP
from vgen.models.par import PAR
from vgen.models.repa import LlamaGenREPA
from vgen.models.var import VAR
from vtok.checkpoint import load_module, save_folder
from vtok.config import Families, describe, instantiate
from vtok.data.codes import CORRECTED, CORRECTION_STREAM, OnlineTokens, corrected
from vtok.data.module import keep_keys
from vtok.layers.attention import padded
from vtok.layout import SequenceLayout
from vtok.noise import SampleNoise, sample_seeds
from vtok.optim import rate
from vtok.quantize.independent import IndependentVQ
from vtok.quantize.residual import MultiScaleVQ
from vtok.tokenizer import TokenSpec

KEYS = sample_seeds(5, 0, 2000)


# --- RAR --------------------------------------------------------------------------------------------------------------


def test_rar_orders_are_permutations_keyed_by_the_sample_and_anneal():
    model = rar(anneal=(0.5, 0.75))
    raster = torch.arange(16)
    for progress, share in ((0.0, 1.0), (0.49, 1.0), (0.55, 0.8), (0.7, 0.2), (0.75, 0.0), (1.0, 0.0)):
        orders = model.orders(KEYS, progress)
        assert torch.equal(orders.sort(1).values, raster.expand(2000, -1))
        random = (orders != raster).any(1).float().mean()
        assert abs(random - share) < 4 * math.sqrt(0.25 / 2000)
        assert torch.equal(model.orders(KEYS[40:43], progress), orders[40:43])
    first = model.orders(KEYS, 0.0)[:, 0]
    assert (torch.bincount(first, minlength=16).float() / 2000 - 1 / 16).abs().max() < 0.03


def test_rar_restores_what_it_arranged_and_its_likelihood_follows_the_order():
    model = make("rar")
    tokens = tokens_of(model, 3)
    orders = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(i)) for i in range(3)])
    canvas, cond = model.arrange(tokens, orders), model.conditioner(torch.tensor([0, 1, 2]))
    assert torch.equal(model.restore(canvas), tokens)
    whole = model(canvas, cond)
    cache, parts = model.cache(3), []
    for k in range(16):
        parts.append(model(canvas, cond, k, k + 1, cache))
        cache.commit(model.layout.reads[k])
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)
    later = Canvas(canvas.tokens.clone(), canvas.layout, canvas.order)
    later.tokens[:, 9:] = (later.tokens[:, 9:] + 1) % 24
    torch.testing.assert_close(model(later, cond)[:, :10], whole[:, :10], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model.log_prob(canvas, cond).sum(1), model.log_prob(model.arrange(tokens), cond).sum(1))


def test_rar_trains_on_random_orders_only_in_training_mode():
    model = make("rar", anneal=(1.0, 1.0), dropout=0.0, attention_dropout=0.0, label_drop=0.0)
    tokens, label, key = tokens_of(model, 3), torch.tensor([0, 1, 2]), KEYS[:3]
    batch = {"tokens": tokens, "label": label, "key": key}
    plain = -model.log_prob(model.arrange(tokens), model.conditioner(label))
    torch.testing.assert_close(model.loss(batch)["nats"], plain)
    random = -model.log_prob(model.arrange(tokens, model.orders(key, 0.3)), model.conditioner(label))
    torch.testing.assert_close(model.train().loss(batch, progress=0.3)["nats"], random)


# --- groups -----------------------------------------------------------------------------------------------------------


def test_group_sizes_and_specials_are_the_published_ones():
    def sizes(model):
        return model.layout.sizes, model.specials.num_embeddings

    assert sizes(small(HAR, line_spec(128))) == ((1, 1, 1, 1, 4, 8, 16, 32, 64), 127)
    assert sizes(small(DetailFlow, line_spec(128))) == ((1,) * 8 + (8,) * 15, 7)
    rows = small(NBP, grid_spec(16, 16))
    assert sizes(rows) == ((1,) * 16 + (16,) * 15, 15) and rows.layout.steps == 31
    assert small(NBP, grid_spec(16, 16), start="shifted").layout.steps == 16
    assert small(PAR, grid_spec(24, 24)).layout.steps == 147


def test_groups_read_the_group_before_then_specials():
    """Slot by slot, by hand: HAR on 16 tokens, 2 single ones."""
    model = small(HAR, line_spec(16), first=2).eval()
    tokens = tokens_of(model, 1)
    cond = model.conditioner(torch.tensor([0]))
    x = model.inputs(model.arrange(tokens), cond, 0, model.layout.steps).x[0]
    t, s = model.tokens.weight, model.specials.weight
    ids = tokens[0].tolist()
    want = [cond.start[0, 0], t[ids[0]], t[ids[1]], s[0]]  # class; t0; then level 2..3 reads t1 and a special
    want += [t[ids[2]], t[ids[3]], s[1], s[2]]
    want += [t[i] for i in ids[4:8]] + list(s[3:7])
    torch.testing.assert_close(x, torch.stack(want))


def test_par_writes_one_token_of_every_region_a_step_and_restores_the_raster():
    model = small(PAR, grid_spec(4, 6))
    coords, tokens = model.layout.coords, tokens_of(model, 2)
    assert coords[:4] == ((0, 0, 0), (0, 0, 3), (0, 2, 0), (0, 2, 3))
    for step in range(4, model.layout.steps):
        a, b = model.layout.written(step, step + 1)
        cells = [(r % 2, c % 3) for _, r, c in coords[a:b]]
        assert len(set(cells)) == 1 and len(cells) == 4
    canvas = model.arrange(tokens)
    assert torch.equal(model.restore(canvas), tokens)
    for index, (_, row, column) in enumerate(coords):
        assert torch.equal(canvas.tokens[:, index], tokens[:, 6 * row + column])


def test_detailflow_reads_the_wrong_tokens_of_those_samples_that_have_some():
    model = small(DetailFlow, line_spec(), group=4, dropout=0.0, token_dropout=0.0, label_drop=0.0)
    torch.nn.init.normal_(model.head.linear.weight)
    clean, wrong, repaired, other = (tokens_of(model, 6, seed=i) for i in range(4))
    batch = {"tokens": clean, "label": torch.zeros(6).long(), "key": KEYS[:6]}
    hit = torch.tensor([False, True, False, False, True, False])[:, None]
    full = {**batch, "corrupted": torch.where(hit, wrong, clean), "repaired": torch.where(hit, repaired, clean)}
    got = model.train().loss(full)["nats"]
    plain, fixed = model.loss(batch)["nats"], model.loss({**batch, "tokens": repaired, "context": wrong})["nats"]
    torch.testing.assert_close(got, torch.where(hit, fixed, plain))
    spoilt = model.loss({**batch, "context": other})["nats"]  # corruption= beside corrections=
    torch.testing.assert_close(model.loss({**full, "context": other})["nats"], torch.where(hit, fixed, spoilt))
    torch.testing.assert_close(model.eval().loss(full)["nats"], plain)


def in_tiles() -> TokenSpec:
    return replace(grid_spec(), layout=SequenceLayout.tiles(4, 4, 2, 2))


def in_levels() -> TokenSpec:
    return replace(line_spec(3), layout=SequenceLayout.levels([1, 2]))


@pytest.mark.parametrize(
    "cls, spec, options, words",
    [
        (HAR, line_spec(24), {}, "power of two"),
        (HAR, line_spec(16), {"first": 3}, "first=3"),
        *(
            (HAR, line_spec(16), {"first": first}, f"first={first}: .* at least 1 and at most all 16")
            for first in (0, -1, 17)
        ),
        *((cls, grid_spec(), {}, r"these tokens lie on \(\(4, 4\),\)") for cls in (HAR, DetailFlow)),
        (DetailFlow, line_spec(16), {"group": 5}, "group=5"),
        (DetailFlow, line_spec(16), {"group": 0}, "group=0"),
        (NBP, line_spec(16), {}, "full grid"),
        (NBP, grid_spec(), {"group": [3, 1]}, "divide"),
        (NBP, grid_spec(), {"group": [0, 4]}, r"group=\[0, 4\]"),
        (PAR, grid_spec(), {"group": [3, 1]}, "divide"),
        (PAR, grid_spec(), {"group": [2, -2]}, r"group=\[2, -2\]"),
        (LlamaGenREPA, line_spec(16), {}, r"these 16 tokens lie on \(\(1, 16\),\); choose a 2D"),
        (LlamaGenREPA, in_levels(), {}, r"these 3 tokens lie on \(\(1, 1\), \(1, 2\)\); choose a 2D"),
        (LlamaGenREPA, in_tiles(), {}, r"these 16 tokens lie on \(\(4, 4\),\), in another order; choose a 2D"),
        (HitaGPT, grid_spec(), {}, "two parts"),
        (FlexVAR, grid_spec(), {}, "quantizer"),
    ],
)
def test_groups_that_do_not_fit_say_why(cls, spec, options, words):
    plain = {"depth": 1, "width": 16, "heads": 2} if cls is FlexVAR else {}
    with pytest.raises(ValueError, match=words):
        cls(spec, CLASSES, **plain) if cls is FlexVAR else small(cls, spec, **options)


# --- FlexVAR ----------------------------------------------------------------------------------------------------------


def test_flexvar_draws_lists_within_the_token_budget():
    default = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    with torch.device("meta"):
        model = FlexVAR(map_spec(tuple(range(1, 17))), CLASSES, depth=1, width=16, heads=2, sides=default)
    lists = [model.draw_sides(key[None]) for key in KEYS]
    assert lists == [model.draw_sides(key[None]) for key in KEYS]
    assert all(list(s) == sorted(set(s)) and s[:2] == (1, 2) and sum(n * n for n in s) <= 680 for s in lists)
    share = sum(s == default for s in lists) / len(lists)
    assert 0.03 < share < 0.07
    ends = sum(s[-1] == 16 for s in lists) / len(lists)
    assert 0.4 < ends < 1.0  # the largest scale itself may be the one that is dropped
    assert {len(s) for s in lists} >= {6, 7, 8, 9, 10}
    assert {n for s in lists for n in s} == set(range(1, 17))
    lengths = {sum(n * n for n in s) for s in lists}
    assert len(lengths) > 64 and {padded(length) for length in lengths} <= {128 * n for n in range(1, 7)}, (
        "FlexAttention compiles a kernel for each length that it sees"
    )


def test_flexvar_arranges_any_list_and_reads_only_the_map_before():
    model = make("flexvar", spec=map_spec((1, 2, 3, 4, 5)), sides=(1, 3, 5))
    torch.manual_seed(0)
    tokens = torch.randint(24, (2, 55))
    canvas = model.arrange(tokens)
    assert torch.equal(canvas.tokens, torch.cat([tokens[:, :1], tokens[:, 5:14], tokens[:, 30:]], 1))
    back = model.restore(canvas)
    assert torch.equal(back[:, 5:14], tokens[:, 5:14]) and (back[:, 14:30] == 0).all()
    cond = model.conditioner(torch.tensor([0, 1]))
    changed = canvas.tokens.clone()
    changed[:, :1] = (changed[:, :1] + 1) % 24
    a, b = (model.maps(Canvas(t, canvas.layout), 0, 3) for t in (canvas.tokens, changed))
    assert torch.equal(a[:, 9:], b[:, 9:]) and not torch.equal(a[:, :9], b[:, :9])
    batch = {"tokens": tokens, "label": torch.tensor([0, 1]), "key": KEYS[:2]}
    model.sample_scales = True
    drawn = model.layout_of(model.draw_sides(KEYS[:2]))
    out = model.train().loss(batch)
    assert out["nats"].shape == (2, drawn.length)
    assert torch.equal(out["nats"], model.loss(keep_keys(batch))["nats"]), "the host's keys draw the same list"
    unseen = SequenceLayout.scales((1, 2, 7))  # a resolution of no training step
    assert model.eval()(model.blank(2, unseen), cond).shape == (2, 54, 16)


def test_flexvar_positions_and_guidance():
    table = positions(32, 8)
    for c, (row, column) in ((0, (3, 5)), (1, (3, 5)), (6, (7, 2)), (7, (7, 2))):
        turn = 10000 ** -(2 * (c // 2) / 8) * (row if c % 2 == 0 else column)
        want = math.sin(turn) if c % 2 == 0 else math.cos(turn)
        assert abs(table[c, row, column] - want) < 1e-5
    from vgen.guidance import Linear, Progress

    rising = Linear(3.5, reached=9)
    assert rising(Progress(9, 13)) == 3.5 and rising(Progress(12, 13)) > 3.5 and rising(Progress(5, 6)) == 3.5


class OwnSums(MultiScaleVQ):
    """A residual quantizer of a user's own module."""


class OwnMaps(IndependentVQ):
    """One of independent maps."""


def test_next_scale_models_ask_what_a_quantizer_does_not_its_name(tmp_path):
    sizes = {"vocab_size": 24, "channels": 6}
    sums = replace(scale_spec(), quantizer=describe(OwnSums(**sizes, sides=(1, 2, 3, 4), phi=2)))
    maps = replace(map_spec(), quantizer=describe(OwnMaps(**sizes, sides=(1, 2, 3))))
    model = var(sums)
    assert isinstance(model.quantizer, OwnSums) and isinstance(flexvar(maps).quantizer, OwnMaps)
    with pytest.raises(ValueError, match="are residuals of maps"):
        FlexVAR.accepts(sums)
    with pytest.raises(ValueError, match="residual scales"):
        VAR.accepts(maps)
    save_folder(model, tmp_path)
    with pytest.raises(ValueError, match=rf"trust=\[{__name__}\]"):
        load_module(tmp_path, FAMILIES, "ema")
    assert isinstance(load_module(tmp_path, Families(FAMILIES, [__name__]), "ema").quantizer, OwnSums)
    away = {"family": "no_such_module:Own", "arguments": {}}
    for family in (VAR, FlexVAR):  # nothing is imported because a spec names it
        with pytest.raises(ValueError, match=r"trust=\[no_such_module\]"):
            family.accepts(replace(scale_spec(), quantizer=away))


# --- VAR's progressive training, REPA, the schedule -------------------------------------------------------------------


def test_progressive_training_adds_scales_and_ramps_the_newest():
    model = make("var", progressive_until=0.5, progressive_first=1, progressive_ramp=0.1, label_drop=0.0).train()
    model.trunk.eval()
    tokens, label = tokens_of(model, 2), torch.tensor([0, 1])
    batch = {"tokens": tokens, "label": label, "key": KEYS[:2]}
    full = model.eval().loss(batch)["nats"]
    model.train()
    model.trunk.eval()
    seen = [model.scales_at(p)[0] for p in (0.0, 0.1, 0.2, 0.3, 0.45, 0.5, 1.0)]
    assert seen == [1, 2, 2, 3, 4, 4, 4]
    for progress in (0.0, 0.1, 0.12, 0.3):
        scales, newest = model.scales_at(progress)
        a, b = model.layout.written(scales - 1, scales)
        want = (full[:, :a].sum(1) + newest * full[:, a:b].sum(1)).mean() / model.layout.length
        torch.testing.assert_close(model.loss(batch, progress=progress)["loss"], want)
    assert model.scales_at(0.1)[1] == pytest.approx((0.1 - 0.5 / 3 * 0.5) / 0.1)
    published = make("var", progressive_until=0.5, progressive_first=1)  # pgwp = ep / 300 epochs of ep [C]
    assert published.scales_at(0.25 / 3 + 1 / 600)[1] == pytest.approx(0.5)
    with pytest.raises(ValueError, match="progressive_first=4 leaves nothing to add to 4 scales"):
        make("var", progressive_until=0.5, progressive_first=4)


def test_repa_adds_the_cosine_distance_of_a_hidden_state():
    torch.manual_seed(0)
    options = {"depth": 3, "block": 1, "channels": 7, "hidden": 8, "dropout": 0.0, "token_dropout": 0.0}
    model = small(LlamaGenREPA, grid_spec(), **options, label_drop=0.0).train()
    tokens, label, patches = tokens_of(model, 2), torch.tensor([0, 1]), torch.randn(2, 16, 7)
    batch = {"tokens": tokens, "label": label, "key": KEYS[:2]}
    out = model.loss(batch | {"patches": patches})
    inputs = model.inputs(model.arrange(tokens), model.conditioner(label), 0, 16)
    h = model.trunk.blocks[0](inputs.x, vector=None, position=inputs.position, mask="causal", cache=None, layer=0)
    cosine = torch.nn.functional.cosine_similarity(model.projector(h), patches, dim=-1)
    torch.testing.assert_close(out["loss"], out["nats"].mean() + 2.0 * (1 - cosine).mean())
    with pytest.raises(ValueError, match="teacher"):
        model.loss(batch)
    torch.testing.assert_close(model.eval().loss(batch)["loss"], out["nats"].mean())


def test_a_schedule_may_hold_its_rate_before_it_falls():
    got = [rate(s, 101, warmup=10, kind="linear", final=0.1, hold=0.8 * 101) for s in (0, 9, 50, 80, 100)]
    assert got[:4] == [0.1, 1.0, 1.0, 1.0] and got[4] == pytest.approx(0.1)
    assert rate(90, 101, kind="linear", hold=0.8) == pytest.approx(1 - (90 - 80.8) / (100 - 80.8))
    assert rate(30, 101, kind="cosine", hold=0) == rate(30, 101, kind="cosine")


# --- through the command ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["nbp_small", "par_small", "rar_small"])
def test_the_command_trains_with_corrupted_context(model, tmp_path):
    folder = tokenizer_folder(tmp_path / "tokenizer")
    sizes = ("model.depth=1", "model.width=16", "model.heads=2")
    base = (*GENERATOR, f"model={model}", *sizes, f"tokenizer_from={folder}", "steps=2")
    run(*base, f"run_dir={tmp_path / 'clean'}")
    run(*base, f"run_dir={tmp_path / 'wrong'}", "+corruption.kind=near", "+corruption.near=3", "+corruption.rate=0.5")
    clean, wrong = (losses(tmp_path / name) for name in ("clean", "wrong"))
    assert len(clean) == len(wrong) and clean != wrong
    with pytest.raises(ValueError, match=r"corruption\.kind"):
        run(*base, f"run_dir={tmp_path / 'x'}", "+corruption.kind=far")


def test_online_corrections_differ_from_clean_rows_behind_one_place_only(monkeypatch):
    torch.manual_seed(0)
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("train", overrides=["data=fake", "data.image_size=32", "tokenizer=detailflow_small"])
    tokenizer, images = instantiate(config.tokenizer, _convert_="all"), instantiate(config.data, _convert_="all")
    online = OnlineTokens(data=images, tokenizer=tokenizer, corrections=True)
    shown = {"image": torch.rand(24, 3, 32, 32) * 2 - 1, "key": KEYS[:24], "label": torch.zeros(24).long()}
    refine, passes = tokenizer.refine, []
    monkeypatch.setattr(tokenizer, "refine", lambda x, *rest: passes.append(len(x)) or refine(x, *rest))
    batch = online.encode(shown)
    drawn = SampleNoise(KEYS[:24]).uniform(torch.zeros(1, dtype=torch.int64), CORRECTION_STREAM)[:, 0]
    rows = (drawn < 0.3).nonzero()[:, 0].tolist()
    assert 0 < len(rows) < 24 and passes == [len(rows)], "only what is read is computed"
    hit = (batch["corrupted"] != batch["tokens"]).any(1).nonzero()[:, 0].tolist()
    assert set(hit) <= set(rows) and len(hit) >= len(rows) - 1
    every = [part[rows] for part in tokenizer.corrupted(shown["image"], SampleNoise(KEYS[:24]))]
    assert all(torch.equal(batch[n][rows], x) for n, x in zip(("tokens", "corrupted", "repaired"), every))
    keyed = keep_keys(shown)
    assert torch.equal(online.encode(keyed)["corrupted"], batch["corrupted"])
    passes.clear()
    held_out = online.encode(shown, training=False)
    assert "corrupted" not in held_out and torch.equal(held_out["tokens"], batch["tokens"]) and not passes
    share = len(corrected(sample_seeds(0, 0, 4000))) / 4000
    assert abs(share - CORRECTED) < 4 * math.sqrt(0.21 / 4000)
    model = small(DetailFlow, online.spec, group=tokenizer.group).train()
    assert model.loss(batch)["loss"].isfinite()
    wrong, right, clean = batch["corrupted"], batch["repaired"], batch["tokens"]
    for row in rows:
        places = (wrong[row] != right[row]).nonzero()[:, 0].tolist()  # the replaced group, no longer than a group
        assert not places or places[-1] - places[0] < tokenizer.group
        upto = places[-1] + 1 if places else 0
        assert torch.equal(right[row, :upto], clean[row, :upto])
    tokenizer.correction = False
    with pytest.raises(ValueError, match="repairs"):
        OnlineTokens(data=images, tokenizer=tokenizer, corrections=True)
