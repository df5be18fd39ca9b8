"""What must hold for every generator: no leakage, cached = teacher-forced, guidance, sameness, likelihood, learning."""

import itertools
from dataclasses import replace

import generators
import pytest
import torch
from generators import (
    CLASSES,
    CONTINUOUS,
    FAMILIES,
    MASKED,
    OWN_INPUT,
    also_read,
    drawn,
    flexvar,
    grid_spec,
    line_spec,
    llamagen,
    make,
    map_spec,
    parts_spec,
    rar,
    scale_spec,
    small,
    tokens_of,
    var,
)
from patterns import watched_patterns

from vgen.conditioning import Cond
from vgen.guidance import ClassifierFree, Progress, Unguided, guidance
from vgen.heads import DrawRule
from vgen.heads_factorised import FactorisedHead
from vgen.models import FAMILIES as TABLE
from vgen.models.detailflow import DetailFlow
from vgen.models.har import HAR
from vgen.models.hita import HitaGPT
from vgen.models.llamagen import LlamaGen
from vgen.models.nbp import NBP
from vgen.models.par import PAR
from vgen.models.repa import LlamaGenREPA
from vgen.models.var import VAR
from vtok.config import build, describe
from vtok.layers.trunk import Trunk
from vtok.layout import SequenceLayout
from vtok.models import FAMILIES as TOKENIZERS
from vtok.noise import SampleNoise, sample_seeds
from vtok.quantize.factors import split
from vtok.tokenizer import Part, TokenSpec

every_family = pytest.mark.parametrize("name", FAMILIES)
every_sequence = pytest.mark.parametrize("name", [name for name in FAMILIES if name not in MASKED])
every_discrete = pytest.mark.parametrize("name", [n for n in FAMILIES if n not in CONTINUOUS and n not in MASKED])
every_continuous = pytest.mark.parametrize("name", CONTINUOUS)
LABELS = torch.tensor([0, 3, CLASSES])
LEVELS = ("dtm", "artm", "fhtm")  # the first step is noise
NO_CACHE = "every step encodes all tokens anew: MAR and MaskGIT fill masks, DTM's levels are Markov"


def draw(model, labels, seeds, guide=None, rule=None, **options):
    guide = guide or Unguided()
    streams = [model.conditioner(labels)] + [model.conditioner.null(len(labels))] * (guide.streams - 1)
    rule = rule or DrawRule()
    return model.sampler(model, Cond.cat(streams), noise=SampleNoise(seeds), guide=guide, rule=rule, **options)


def sub_codes(model, tokens):
    """[(vocabulary, sub-codes [.., n])] of tokens; one entry, the tokens, where the head has one softmax."""
    if isinstance(model.head, FactorisedHead):
        return list(zip(model.head.factors, split(tokens, model.head.factors).unbind(-1)))
    return [(model.spec.parts[0].vocab_size, tokens)]


def logits_of(model, canvas, cond):
    """Teacher-forced logits, one tensor a sub-code."""
    h = model(canvas, cond)
    return model.head.logits(h, canvas.tokens) if isinstance(model.head, FactorisedHead) else model.head.logits(h)


def assert_same(got, want):
    """Ids are equal; values are equal up to the rounding of kernels that depends on shapes."""
    if want.is_floating_point():
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * max(1.0, float(want.abs().max())))
    else:
        assert torch.equal(got, want)


@every_sequence
def test_later_tokens_change_no_earlier_output(name):
    model = make(name)
    canvas, cond = model.arrange(tokens_of(model, 3)), model.conditioner(LABELS)
    before = model(canvas, cond)
    for step in range(model.layout.steps):
        a, b = model.layout.written(step, step + 1)
        changed = canvas.tokens.clone()
        changed[:, a:] += 1
        if model.spec.discrete:
            changed[:, a:] %= model.spec.parts[0].vocab_size
        after = model(replace(canvas, tokens=changed), cond)
        edge = a if name in OWN_INPUT else b
        torch.testing.assert_close(after[:, :edge], before[:, :edge], rtol=1e-5, atol=1e-5)
        if edge < model.layout.length:
            assert not torch.allclose(after[:, edge:], before[:, edge:], atol=1e-3), "earlier tokens must be seen"


@every_family
def test_cached_steps_equal_teacher_forcing(name):
    model = make(name)
    if not model.caches:
        pytest.skip(NO_CACHE)
    canvas, cond = model.arrange(tokens_of(model, 3)), model.conditioner(LABELS)
    whole, cache, parts = model(canvas, cond), model.cache(3), []
    for k in range(model.layout.steps):
        parts.append(model(canvas, cond, k, k + 1, cache))
        cache.commit(model.layout.reads[k])
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)


@every_family
def test_several_steps_at_once_against_a_cache(name):
    model = make(name)
    if not model.caches or model.layout.steps < 3:
        pytest.skip(NO_CACHE if not model.caches else "one or two steps have no further ones")
    canvas, cond = model.arrange(tokens_of(model, 3)), model.conditioner(LABELS)
    whole, cache = model(canvas, cond), model.cache(3)
    model(canvas, cond, 0, 2, cache)
    cache.commit(sum(model.layout.reads[:2]))
    a, _ = model.layout.written(2, 3)
    torch.testing.assert_close(model(canvas, cond, 2, None, cache), whole[:, a:], rtol=1e-5, atol=1e-5)


@every_discrete
def test_embedded_tokens_give_what_ids_give(name):
    model = make(name)
    tokens, cond = tokens_of(model, 3), model.conditioner(LABELS)
    if isinstance(model, VAR):
        values = model.quantizer.lookup(tokens)
    else:
        hot = [torch.nn.functional.one_hot(ids, size) for size, ids in sub_codes(model, tokens)]
        values = torch.cat(hot, dim=-1).float()
    torch.testing.assert_close(model(model.arrange(values), cond), model(model.arrange(tokens), cond))


@every_sequence
def test_draws_without_a_cache_are_the_same(name):
    model, seeds = make(name), sample_seeds(0, 0, 3)
    rule = DrawRule(temperature=0.9, top_k=12, top_p=0.9) if model.spec.discrete else DrawRule(temperature=0.9)
    cached = draw(model, LABELS, seeds, guidance(2.0), rule)
    assert_same(cached.tokens, draw(model, LABELS, seeds, guidance(2.0), rule, cached=False).tokens)
    assert len(cached.tokens.unique()) > 5


@every_discrete
def test_a_draw_follows_its_own_likelihood(name):
    """The token drawn is the Gumbel race over the teacher-forced distribution of the finished canvas."""
    model, seeds = make(name), sample_seeds(2, 0, 3)
    canvas = draw(model, LABELS, seeds)
    every = logits_of(model, canvas, model.conditioner(LABELS))
    for f, (logits, (size, want)) in enumerate(zip(every, sub_codes(model, canvas.tokens), strict=True)):
        noise = SampleNoise(seeds).gumbel(torch.arange(model.layout.length), torch.arange(size), stream=f)
        assert torch.equal((logits + noise).argmax(-1), want)


@every_family
def test_guidance_one_is_the_conditional_branch_and_runs_no_null_row(name, monkeypatch):
    model, seeds, rows = make(name), sample_seeds(0, 0, 3), []
    run, masked = type(model).run, type(model).forward
    monkeypatch.setattr(type(model), "run", lambda self, x, cache=None: rows.append(len(x.x)) or run(self, x, cache))
    if name in MASKED:
        monkeypatch.setattr(type(model), "forward", lambda *a: rows.append(len(a[2].start)) or masked(*a))
    plain = draw(model, LABELS, seeds)
    assert torch.equal(draw(model, LABELS, seeds, guidance(1.0)).tokens, plain.tokens) and set(rows) == {3}
    rows.clear()
    one = ClassifierFree(lambda progress: 1.0)  # nobody knows before it is asked: scale 1 at every step, with null rows
    assert_same(draw(model, LABELS, seeds, one).tokens, plain.tokens)
    assert set(rows) == {6}
    rows.clear()
    ramp = guidance(3.0, "interval", low=2.0, high=3.0)  # never inside, which its schedule says
    assert_same(draw(model, LABELS, seeds, ramp).tokens, plain.tokens)
    assert set(rows) == {3}


@every_discrete
def test_guided_logits_are_combined_by_hand(name):
    model, seen = make(name), []
    keep = DrawRule(temperature=0, processors=(lambda logits, progress: seen.append((logits, progress)) or logits,))
    canvas = draw(model, LABELS, sample_seeds(0, 0, 3), guidance(2.5, "linear"), keep)
    ramp = torch.tensor([1 + 1.5 * k / (model.layout.steps - 1) for k in range(model.layout.steps)])
    scale = ramp[model.layout.steps_of_tokens()][None, :, None]
    pairs = zip(*(logits_of(model, canvas, cond) for cond in (model.conditioner(LABELS), model.conditioner.null(3))))
    factors = len(sub_codes(model, canvas.tokens))
    for f, (conditional, null) in enumerate(pairs):
        want = null + scale * (conditional - null)
        torch.testing.assert_close(torch.cat([s for s, _ in seen[f::factors]], 1), want, rtol=1e-4, atol=1e-4)
    assert [p.step for _, p in seen[::factors]] == list(range(model.layout.steps)) and seen[-1][1].after == 1


@every_family
def test_a_sample_does_not_depend_on_its_batch(name):
    model = make(name)
    labels, seeds = torch.arange(6) % CLASSES, sample_seeds(0, 0, 6)
    whole = draw(model, labels, seeds, guidance(2.0)).tokens
    for rows in ([4], [5, 0], [3, 1, 2]):
        assert_same(draw(model, labels[rows], seeds[rows], guidance(2.0)).tokens, whole[rows])


@every_family
def test_known_tokens_are_kept_and_stop_leaves_the_rest(name):
    model = make(name)
    if name.startswith("maskgit"):
        pytest.skip("which cells a step writes is decided by confidence; tests/test_maskgit.py has its own")
    given = model.arrange(tokens_of(model, 3))
    given.known = torch.rand(given.tokens.shape[:2], generator=torch.Generator().manual_seed(0)) < 0.5
    want = given.tokens.clone()
    done = draw(model, LABELS, sample_seeds(0, 0, 3), canvas=given)
    assert torch.equal(done.tokens[given.known], want[given.known])
    free = draw(model, LABELS, sample_seeds(0, 0, 3))
    stop = min(2, model.layout.steps)
    part = draw(model, LABELS, sample_seeds(0, 0, 3), stop=stop)
    _, b = model.layout.written(0, stop)
    assert torch.equal(part.tokens[:, :b], free.tokens[:, :b]) and (part.tokens[:, b:] == 0).all()


def with_prefix(cond: Cond, seed: int) -> Cond:
    drawer = torch.Generator().manual_seed(seed)
    return replace(cond, prefix=torch.randn(len(cond.start), 2, cond.start.shape[-1], generator=drawer))


@every_family
def test_every_prediction_sees_the_prefix(name):
    model = make(name)
    canvas, cond = model.arrange(tokens_of(model, 3)), model.conditioner(LABELS)
    plain, seen = model(canvas, cond), model(canvas, with_prefix(cond, 0))
    predicts = (plain != 0).any(-1)  # all but DTM's first level, which is noise
    assert seen.shape == plain.shape and predicts.any()
    assert ((seen - plain).abs().amax(-1) > 1e-5)[predicts].all()


@every_family
def test_patterns_say_what_the_ranks_say(name, monkeypatch):
    """Masks of training come from the pattern (FlexAttention, calls a block) or from the ranks: the same ones."""
    model = make(name)
    canvas, cond = model.arrange(tokens_of(model, 3)), model.conditioner(LABELS)
    seen = watched_patterns(monkeypatch)
    for given in (cond, with_prefix(cond, 0)):
        model(canvas, given)
    assert seen or not any(isinstance(m, Trunk) for m in model.modules())


@every_family
def test_a_prefix_is_read_once_and_belongs_to_its_row(name):
    """Kept keys and values, whole passes and single rows draw the same; each stream of guidance has its own prefix."""
    model, seeds = make(name), sample_seeds(0, 0, 3)
    streams = [with_prefix(model.conditioner(LABELS), 1), with_prefix(model.conditioner.null(3), 2)]
    options = {"guide": guidance(2.0), "rule": DrawRule(temperature=0.9)}
    cond = Cond.cat(streams)
    made = model.sampler(model, cond, noise=SampleNoise(seeds), **options).tokens
    if model.caches:
        canvas, cache, parts = model.arrange(tokens_of(model, 3)), model.cache(3, prefix=2), []
        for k in range(model.layout.steps):
            parts.append(model(canvas, streams[0], k, k + 1, cache))
            cache.commit(model.layout.reads[k] + 2 * (k == 0))
        torch.testing.assert_close(torch.cat(parts, 1), model(canvas, streams[0]), rtol=1e-5, atol=1e-5)
        whole = model.sampler(model, cond, noise=SampleNoise(seeds), cached=False, **options)
        assert_same(made, whole.tokens)
    alone = [
        Cond(c.start[1:2], prefix=c.prefix[1:2], vector=None if c.vector is None else c.vector[1:2]) for c in streams
    ]
    row = model.sampler(model, Cond.cat(alone), noise=SampleNoise(seeds[1:2]), **options)
    assert_same(row.tokens, made[1:2])


@every_family
def test_edits_are_made_on_entry_to_every_block(name):
    """Of one stream and not of the other; where the family has an edit of its own (xAR, FlowAR), after that."""
    model = make(name)
    canvas, cond, null = model.arrange(tokens_of(model, 3)), model.conditioner(LABELS), model.conditioner.null(3)
    stacks = model.trunk.values() if isinstance(model.trunk, torch.nn.ModuleDict) else [model.trunk]
    count = sum(len(stack.blocks) for stack in stacks)
    plain, other = model(canvas, cond), model(canvas, null)

    def push(h, place):
        return h + torch.linspace(-1, 1, h.shape[-1])

    for block in range(count):
        assert torch.equal(model(canvas, replace(cond, at={block: lambda h, place: h})), plain)
        pushed = replace(cond, at={block: push})
        moved = model(canvas, pushed)
        assert not torch.allclose(moved, plain, atol=1e-3)
        both = model(canvas.repeat(2), Cond.cat([pushed, null]))
        torch.testing.assert_close(both, torch.cat([moved, other]), rtol=1e-4, atol=1e-4)
        if model.caches:
            cache, parts = model.cache(3), []
            for k in range(model.layout.steps):
                parts.append(model(canvas, pushed, k, k + 1, cache))
                cache.commit(model.layout.reads[k])
            torch.testing.assert_close(torch.cat(parts, 1), moved, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=rf"edits of blocks \[{count}\]"):
        model(canvas, replace(cond, at={count: push}))


@every_family
def test_control_aligned_with_the_tokens_reaches_what_it_belongs_to(name):
    """A table with a row a token, added to the state that predicts it, as ControlAR does (arXiv 2410.02705): another
    row moves that token's state and those of later steps alone; kept keys and values and rows in another batch draw the
    same; a table of zeros changes nothing, and null rows have none."""
    model, seeds = make(name), sample_seeds(0, 0, 3)
    canvas, cond, null = model.arrange(tokens_of(model, 3)), model.conditioner(LABELS), model.conditioner.null(3)
    stacks = model.trunk.values() if isinstance(model.trunk, torch.nn.ModuleDict) else [model.trunk]
    last, length = sum(len(stack.blocks) for stack in stacks) - 1, model.layout.length
    plain = model(canvas, cond)
    table = torch.randn(3, length, plain.shape[-1], generator=torch.Generator().manual_seed(3))

    def control(table):
        def add(h, place):
            place = place.expand(len(h), -1)
            row = torch.arange(len(h)) * len(table) // len(h)  # DTM has several rows for one
            return h + torch.where(place[..., None] >= 0, table[row[:, None], place.clamp(min=0)], 0)

        return {last: add}

    seen = model(canvas, replace(cond, at=control(table)))
    assert torch.equal(model(canvas, replace(cond, at=control(0 * table))), plain)
    step = model.layout.steps_of_tokens()
    for token in {model.layout.written(k, k + 1)[0] for k in range(model.layout.steps)}:
        other = table.clone()
        other[:, token] += torch.linspace(-3, 3, table.shape[-1])  # a constant would leave LayerNorm as it is
        moved = (model(canvas, replace(cond, at=control(other))) - seen).abs().amax(-1) > 1e-4
        if name not in MASKED and name != "dtm":  # bidirectional in their last block
            assert not moved[:, step < step[token]].any()
        if not (name in LEVELS and step[token] == 0):  # which is noise
            assert moved[:, token].all()
    if model.caches:
        cache, parts = model.cache(3), []
        for k in range(model.layout.steps):
            parts.append(model(canvas, replace(cond, at=control(table)), k, k + 1, cache))
            cache.commit(model.layout.reads[k])
        torch.testing.assert_close(torch.cat(parts, 1), seen, rtol=1e-4, atol=1e-4)
    both = Cond.cat([replace(cond, at=control(table)), null])
    torch.testing.assert_close(
        model(canvas.repeat(2), both), torch.cat([seen, model(canvas, null)]), rtol=1e-4, atol=1e-4
    )
    options = {"guide": guidance(2.0), "rule": DrawRule(temperature=0.9)}
    made = model.sampler(model, both, noise=SampleNoise(seeds), **options).tokens
    alone = Cond.cat([replace(model.conditioner(LABELS[1:2]), at=control(table[1:2])), model.conditioner.null(1)])
    assert_same(model.sampler(model, alone, noise=SampleNoise(seeds[1:2]), **options).tokens, made[1:2])
    free = model.sampler(model, Cond.cat([cond, null]), noise=SampleNoise(seeds), **options).tokens
    assert not torch.equal(free, made)


@pytest.mark.parametrize("name", ["rar", "mar"])
def test_aligned_control_follows_an_order_of_the_sample(name):
    """In another order the same token has the same row: `place` is the token's in the tokenizer's order."""
    model, rows = make(name), []
    order = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(i)) for i in range(3)])
    cond = model.conditioner(LABELS)
    stacks = model.trunk.values() if isinstance(model.trunk, torch.nn.ModuleDict) else [model.trunk]
    last = sum(len(stack.blocks) for stack in stacks) - 1
    at = {last: lambda h, place: (rows.append(place.expand(len(h), -1)), h)[1]}
    model(model.arrange(tokens_of(model, 3), order), replace(cond, at=at))
    want = order if name == "rar" else torch.arange(16).expand(3, -1)  # MAR's decoder reads every cell in its place
    assert torch.equal(rows[0][:, -16:], want) and bool((rows[0][:, :-16] == -1).all())


# families with a likelihood, so small that all of their sequences can be listed
TINY = {
    "llamagen": lambda: llamagen(grid_spec(2, 2, 3)),
    "llamagen_factorised": lambda: llamagen(grid_spec(1, 3, 6), factors=[2, 3], position="rope_1d"),
    "llamagen_factorised_depth": lambda: llamagen(
        grid_spec(1, 3, 6), factors=[2, 3], factor_depth=1, position="rope_1d"
    ),
    "llamagen_factorised_tied": lambda: llamagen(grid_spec(2, 2, 4), factors=[2, 2], factor_depth=1, factor_tied=True),
    "llamagen_repa": lambda: small(LlamaGenREPA, grid_spec(2, 2, 3), block=1, channels=10, hidden=12),
    "gigatok": lambda: llamagen(line_spec(4, 3), position="learned", modulation="own", qk_norm="layer"),
    "dar": lambda: llamagen(line_spec(4, 3), position="rope_1d"),
    "hita": lambda: small(HitaGPT, parts_spec(2, 2, (3, 2))),
    "rar": lambda: rar(grid_spec(2, 2, 3)),
    "har": lambda: small(HAR, line_spec(4, 3), first=2),
    "detailflow": lambda: small(DetailFlow, line_spec(4, 3), group=2),
    "nbp": lambda: small(NBP, grid_spec(2, 2, 3)),
    "nbp_shifted": lambda: small(NBP, grid_spec(2, 2, 3), start="shifted"),
    "par": lambda: small(PAR, grid_spec(2, 4, 2)),
    "var": lambda: var(scale_spec((1, 2), 3)),
    "flexvar": lambda: flexvar(map_spec((1, 2), 3)),
}


def test_the_loops_cover_every_family():
    """Of the table, of those with a likelihood; and no family but these is let off the tests of the cache."""
    models = {name: FAMILIES[name]() for name in FAMILIES}
    assert {type(model).__name__ for model in models.values()} >= set(TABLE) - set(TOKENIZERS)
    closed = {type(model) for model in models.values() if model.closed and model.spec.discrete}
    assert {type(build_tiny()) for build_tiny in TINY.values()} >= closed
    assert {name for name, model in models.items() if not model.caches} == {*MASKED, "dtm"}
    assert {name for name, model in models.items() if not model.closed} == {"maskgit", "maskgit_uvit"}


@pytest.mark.parametrize("family", TINY)
def test_likelihood_sums_to_one_over_every_sequence(family):
    """Every sequence of every part's vocabulary: 3^4 and the like (VAR: scales of 1 and 4 tokens, 3^5)."""
    torch.manual_seed(0)
    model = drawn(TINY[family]())
    torch.nn.init.normal_(model.head.linear.weight, std=2.0)
    ranges = [range(part.vocab_size) for part in model.spec.parts for _ in range(part.count)]
    tokens = torch.tensor(list(itertools.product(*ranges)))
    with torch.no_grad():
        logs = model.log_prob(model.arrange(tokens), model.conditioner(torch.full((len(tokens),), 2)))
    assert logs.std() > 0.1
    torch.testing.assert_close(
        logs.double().sum(1).exp().sum(), torch.tensor(1.0, dtype=torch.float64), rtol=1e-5, atol=0
    )


@every_continuous
def test_one_image_of_latents_is_overfitted(name):
    """Four draws of noise a step on one image: most of the error goes, and samples are near the image, of power 9.
    After 100 steps, or sooner where it is so."""
    torch.manual_seed(0)
    diffuses = name.startswith("orthus")  # what a chain of few steps draws is far from what its network knows
    model = CONTINUOUS[name](**{"head_depth": 2, "head_width": 64, "repeats": 4} if diffuses else {}).train()
    image, labels = 3 * tokens_of(model, 1), torch.zeros(4, dtype=torch.int64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    losses = []
    for step in range(100):
        optimizer.zero_grad()
        batch = {"tokens": image.expand(4, -1, -1), "label": labels, "key": sample_seeds(step, 0, 4)}
        loss = model.loss(batch)["loss"]
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        if step in (59, 79, 99):
            model.eval()
            canvas = draw(model, labels, sample_seeds(0, 0, 4), rule=DrawRule(solver_steps=50 if diffuses else 8))
            error = float((model.restore(canvas) - image).square().mean())
            if sum(losses[-5:]) < 0.3 * sum(losses[:5]) and error < 0.7 * float(image.square().mean()):
                return
            model.train()
    pytest.fail(f"loss {losses[-1]}, error {error}")


@every_discrete
def test_one_batch_is_overfitted(name):
    """The loss falls to a tenth and the greedy tokens are the batch: after 150 steps, or sooner."""
    torch.manual_seed(0)
    model = FAMILIES[name]().train()
    tokens = tokens_of(model, 4)
    batch = {"tokens": tokens, "label": torch.arange(4), "key": sample_seeds(0, 0, 4)} | also_read(model, 4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    first = model.loss(batch)["loss"].item()
    for step in range(150):
        optimizer.zero_grad()
        model.loss(batch)["loss"].backward()
        optimizer.step()
        if step in (39, 59, 89, 119, 149):
            model.eval()
            last = model.loss(batch)["loss"].item()
            greedy = draw(model, torch.arange(4), sample_seeds(0, 0, 4), rule=DrawRule(temperature=0))
            if last < 0.1 * first and torch.equal(model.restore(greedy), tokens):
                return
            model.train()
    pytest.fail(f"loss {last} of {first}, {int((model.restore(greedy) != tokens).sum())} tokens are others")


@every_discrete
def test_loss_is_the_mean_negative_log_probability(name):
    model = make(name)
    tokens = tokens_of(model, 3)
    out = model.loss({"tokens": tokens, "label": LABELS, "key": sample_seeds(0, 0, 3)})
    logs = model.log_prob(model.arrange(tokens), model.conditioner(LABELS))
    mean = -logs.mean()
    if name == "hita":  # its loss is the sum of the two parts' means, as published
        mean = -logs[:, : model.count].mean() - logs[:, model.count :].mean()
    torch.testing.assert_close(out["loss"], mean)
    torch.testing.assert_close(out["nats"], -logs)


@every_discrete
def test_context_replaces_the_inputs_but_not_the_targets(name):
    model = make(name)
    tokens, context = tokens_of(model, 3), tokens_of(model, 3, seed=9)
    batch = {"tokens": tokens, "label": LABELS, "key": sample_seeds(0, 0, 3)}
    logs = model.log_prob(model.arrange(tokens), model.conditioner(LABELS), context=model.arrange(context))
    torch.testing.assert_close(model.loss(batch | {"context": context})["nats"], -logs)
    assert not torch.allclose(model.loss(batch)["nats"], -logs)


@every_family
def test_labels_are_dropped_by_a_coin_of_the_sample(name):
    model = make(name, label_drop=0.3).train()
    keys = sample_seeds(0, 0, 4000)
    dropped = model.dropped({"key": keys})
    assert abs(dropped.float().mean() - 0.3) < 0.03  # 4 sigma
    assert torch.equal(model.dropped({"key": keys[100:200]}), dropped[100:200])
    assert model.eval().dropped({"key": keys}) is None


@every_family
def test_description_rebuilds_the_same_module(name):
    model = make(name)
    twin = build(describe(model), TABLE).eval()
    twin.load_state_dict(model.state_dict())
    canvas = model.arrange(tokens_of(model, 2))
    assert torch.equal(twin(canvas, twin.conditioner(LABELS[:2])), model(canvas, model.conditioner(LABELS[:2])))


def test_rule_may_follow_the_progress():
    model, seeds = make("var"), sample_seeds(0, 0, 3)

    def rule(progress: Progress) -> DrawRule:
        return DrawRule(temperature=0.0 if progress.step < 2 else 1.0)

    mixed, greedy = draw(model, LABELS, seeds, rule=rule), draw(model, LABELS, seeds, rule=DrawRule(temperature=0.0))
    assert torch.equal(mixed.tokens[:, :5], greedy.tokens[:, :5]) and not torch.equal(mixed.tokens, greedy.tokens)


def test_unconditional_models_have_the_null_row_alone():
    torch.manual_seed(0)
    model = LlamaGen(grid_spec(), 0, depth=1, width=16, heads=2, multiple_of=8).eval()
    assert model.conditioner.table.weight.shape == (1, 16)
    assert draw(model, torch.zeros(2, dtype=torch.int64), sample_seeds(0, 0, 2)).tokens.shape == (2, 16)


@every_family
def test_without_classes_a_family_reads_no_label(name, monkeypatch):
    """num_classes=0: one row, which trains and from which samples come, whatever the labels say."""
    monkeypatch.setattr(generators, "CLASSES", 0)
    model, keys = make(name).train(), sample_seeds(0, 0, 3)
    assert model.num_classes == 0 and len(model.conditioner.table.weight) == 1
    batch = {"tokens": tokens_of(model, 3), "key": keys} | also_read(model, 3)
    losses = []
    for label in (torch.zeros(3, dtype=torch.int64), LABELS):
        torch.manual_seed(0)  # of the dropout
        losses.append(model.loss(batch | {"label": label})["loss"])
    assert torch.equal(*losses)
    losses[0].backward()
    assert model.conditioner.table.weight.grad.abs().sum() > 0
    model.eval()
    assert torch.equal(draw(model, LABELS, keys).tokens, draw(model, torch.zeros_like(LABELS), keys).tokens)


@pytest.mark.parametrize(
    "cls, spec, words",
    [
        (LlamaGen, scale_spec(), "4 scales"),
        (VAR, grid_spec(), "residual scales"),
        (LlamaGen, TokenSpec(SequenceLayout.line(4), (Part(4, None, 8),), 32), "continuous"),
        (LlamaGen, TokenSpec(SequenceLayout.line(4), (Part(2, 8, 8), Part(2, 9, 8)), 32), "2 parts"),
    ],
)
def test_specs_that_do_not_fit_say_why(cls, spec, words):
    with pytest.raises(ValueError, match=words):
        cls.accepts(spec)


PUBLISHED = {
    ("llamagen", 12, 768, 12): 110_888_448,
    ("llamagen", 24, 1024, 16): 342_910_976,
    ("llamagen", 36, 1280, 20): 774_699_520,
    ("llamagen", 48, 1536, 24): 1_410_972_672,
    ("llamagen", 24, 3200, 32): 3_096_659_200,
    ("var", 16, None, None): 310_283_520,
    ("var", 20, None, None): 600_917_136,
    ("var", 24, None, None): 1_033_399_360,
    ("var", 30, None, None): 2_010_020_356,
    ("var_shared", 36, None, None): 2_353_893_904,
}


@pytest.mark.parametrize("size", PUBLISHED, ids=str)
def test_published_parameter_counts(size):
    """LlamaGen on VQ-16 at 256 px, VAR at 256 px (d36: 512 px), 1,000 classes; VAR's frozen quantizer not counted."""
    family, depth, width, heads = size
    with torch.device("meta"):
        if family == "llamagen":
            spec = TokenSpec(SequenceLayout.raster(16, 16), (Part(256, 16384, 8),), 256)
            model = LlamaGen(spec, 1000, depth=depth, width=width, heads=heads)
        else:
            sides = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32) if depth == 36 else (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
            from vtok.quantize.residual import MultiScaleVQ

            quantizer = describe(MultiScaleVQ(vocab_size=4096, channels=32, sides=sides))
            layout = SequenceLayout.scales(sides)
            spec = TokenSpec(layout, (Part(layout.length, 4096, 32),), 16 * sides[-1], quantizer)
            model = VAR(spec, 1000, depth=depth, modulation="shared" if family == "var_shared" else "own")
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == PUBLISHED[size]
