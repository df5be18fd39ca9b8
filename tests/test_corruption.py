"""Context corruption against brute force: which tokens, which codes, keyed by the sample, and what the loss does."""

import pytest
import torch
from generators import CLASSES, FAMILIES, latent_spec, make, map_spec, parts_spec, tokens_of

from vgen.corruption import Corruption
from vgen.models import FAMILIES as TABLE
from vtok.layout import SequenceLayout
from vtok.models import FAMILIES as TOKENIZERS
from vtok.noise import SampleNoise, sample_seeds
from vtok.quantize.parts import PartsQuantizer
from vtok.quantize.vq import VQ
from vtok.tokenizer import Part, TokenSpec


def quantizer(vocabulary=24, channels=6):
    torch.manual_seed(0)
    made = VQ(vocab_size=vocabulary, channels=channels)
    torch.nn.init.normal_(made.codebook.weight)
    return made


def batch_of(spec: TokenSpec, rows: int):
    torch.manual_seed(1)
    length = spec.layout.length
    tokens = torch.randint(24, (rows, length)) if spec.discrete else torch.randn(rows, length, spec.parts[0].channels)
    return {"tokens": tokens, "key": sample_seeds(3, 0, rows), "label": torch.zeros(rows, dtype=torch.int64)}


@pytest.mark.parametrize("kind", ["random", "near", "noise"])
def test_draws_belong_to_the_sample_and_the_rate_is_met(kind):
    spec = map_spec()
    corrupt, batch = Corruption(spec, quantizer(), kind=kind, rate=0.4, near=3, sigma=3.0), batch_of(spec, 2000)
    out = corrupt(batch)
    assert torch.equal(out["tokens"], batch["tokens"]) and out["context"].min() >= 0 and out["context"].max() < 24
    share = (out["context"] != batch["tokens"]).float().mean()
    low, high = {"random": (0.36, 0.41), "near": (0.385, 0.415), "noise": (0.2, 0.41)}[kind]
    assert low < share < high  # a random code is the same one in 24; a noisy vector may stay
    alone = corrupt({name: value[7:9] for name, value in batch.items()})
    assert torch.equal(alone["context"], out["context"][7:9])


def test_near_codes_are_the_nearest_by_brute_force():
    spec, made = map_spec(), quantizer()
    batch = batch_of(spec, 50)
    context = Corruption(spec, made, kind="near", rate=1.0, near=4)(batch)["context"]
    table = made.codebook.table().detach()
    for right, wrong in zip(batch["tokens"].flatten().tolist()[:200], context.flatten().tolist()):
        order = (table - table[right]).norm(dim=1).argsort().tolist()
        assert order[0] == right and wrong in order[1:5]
    assert len(set(context[batch["tokens"] == 5].tolist())) == 4


def test_noise_moves_codes_to_the_nearest_and_small_noise_moves_none():
    spec = map_spec()
    batch = batch_of(spec, 50)
    still = Corruption(spec, quantizer(), kind="noise", rate=1.0, sigma=1e-4)(batch)["context"]
    assert torch.equal(still, batch["tokens"])


def test_continuous_tokens_take_noise_of_the_given_size():
    spec = latent_spec()
    batch = batch_of(spec, 500)
    moved = Corruption(spec, None, kind="noise", rate=0.25, sigma=0.5)(batch)["context"] - batch["tokens"]
    hit = moved.abs().sum(-1) > 0
    assert abs(hit.float().mean() - 0.25) < 0.02 and abs(moved[hit].std() - 0.5) < 0.02
    with pytest.raises(ValueError, match="continuous"):
        Corruption(spec, None, kind="near")


def test_parts_have_codes_of_their_own():
    spec = parts_spec()
    made = PartsQuantizer(quantizers=[quantizer(), quantizer()], counts=[spec.parts[0].count])
    assert Corruption(spec, made, kind="near", rate=1.0)(batch_of(spec, 3))["context"].shape == (3, 13)


@pytest.mark.parametrize("name", ["llamagen", "rar", "hita", "nbp_rows", "flexvar", "detailflow"])
def test_the_loss_reads_the_context_and_keeps_the_targets(name):
    model = make(name)
    batch = {"tokens": tokens_of(model, 3), "label": torch.zeros(3).long(), "key": sample_seeds(0, 0, 3)}
    wrong = Corruption(model.spec, None, kind="random", rate=0.5)(batch)
    logs = model.log_prob(
        model.arrange(batch["tokens"]), model.conditioner(batch["label"]), context=model.arrange(wrong["context"])
    )
    torch.testing.assert_close(model.loss(wrong)["nats"], -logs)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_reads_the_context_and_keeps_the_targets(name):
    """The right tokens as context change nothing; wrong ones do. A head that does not listen, its last weights zero,
    shows the targets alone: they are the same."""
    model, rows = make(name), 8
    labels = torch.arange(rows) % CLASSES
    batch = {"tokens": tokens_of(model, rows), "label": labels, "key": sample_seeds(0, 0, rows)}
    clean = model.loss(batch)["nats"]
    assert torch.equal(model.loss(batch | {"context": batch["tokens"]})["nats"], clean)
    wrong = Corruption(model.spec, None, kind="random", rate=0.5)(batch)
    assert not torch.allclose(model.loss(wrong)["nats"], clean, atol=1e-3)
    deaf = [
        p for key, p in model.head.named_parameters() if key in ("linear.weight", "output.weight", "mlp.output.weight")
    ]
    assert len(deaf) == 1
    torch.nn.init.zeros_(deaf[0])
    torch.testing.assert_close(model.loss(wrong)["nats"], model.loss(batch)["nats"], rtol=1e-5, atol=1e-5)


def test_the_loop_covers_every_family():
    assert {type(FAMILIES[name]()).__name__ for name in FAMILIES} == set(TABLE) - set(TOKENIZERS)


def test_xar_noises_the_context_on_its_way_to_the_right_tokens():
    model, keys = make("xar_cell"), sample_seeds(0, 0, 3)
    canvas, wrong = (model.arrange(tokens_of(model, 3, seed=seed)) for seed in (1, 5))
    plain, velocity = model.corrupt(canvas, keys)
    noised, same = model.corrupt(canvas, keys, wrong)
    t = noised.time[:, model.entities, None]
    assert torch.equal(same, velocity) and torch.equal(noised.time, plain.time)
    torch.testing.assert_close(noised.tokens - plain.tokens, (1 - t) * (wrong.tokens - canvas.tokens))


@pytest.mark.parametrize("name", ["ecar", "artm", "fhtm"])
def test_noisy_chains_of_the_context_have_the_noise_of_the_tokens(name, monkeypatch):
    """What the trunk reads is linear in the tokens: the part of the noise is the same with and without a context."""
    model, seen = make(name), []
    monkeypatch.setattr(
        model, "inputs", lambda canvas, *rest: seen.append(canvas) or type(model).inputs(model, canvas, *rest)
    )
    keys, labels = sample_seeds(0, 0, 3), torch.zeros(3, dtype=torch.int64)
    tokens, context = tokens_of(model, 3), tokens_of(model, 3, seed=5)
    for given in ({}, {"context": context}, {"context": 2 * context - tokens}):
        model.loss({"tokens": tokens, "label": labels, "key": keys, **given})
    plain, middle, far = (canvas.tokens for canvas in seen)
    assert not torch.allclose(plain, middle, atol=0.1)
    torch.testing.assert_close(far - middle, middle - plain, rtol=1e-4, atol=1e-4)


def test_which_tokens_are_wrong_says_nothing_of_what_a_family_draws():
    """The coin of a sample's first token and Transition Matching's level, both keyed by the sample, are independent."""
    model, rows = make("dtm"), 4000
    batch = {"tokens": torch.zeros(rows, 16, 6), "key": sample_seeds(0, 0, rows)}
    wrong = Corruption(model.spec, None, kind="random", rate=0.5)(batch)["context"][:, 0].abs().sum(-1) > 0
    _, time = model.level_of(batch["tokens"], SampleNoise(batch["key"]))
    assert abs(float(time[wrong].mean() - time[~wrong].mean())) < 0.04  # 4 sigma of 0.28 / sqrt(1000)


def test_mistakes_name_the_key():
    for options, word in (({"kind": "far"}, "kind"), ({"kind": "random", "rate": 0}, "rate")):
        with pytest.raises(ValueError, match=word):
            Corruption(map_spec(), quantizer(), **options)
    with pytest.raises(ValueError, match="this tokenizer has none: use random"):
        Corruption(map_spec(), None, kind="near")
    many = TokenSpec(SequenceLayout.line(2), (Part(2, 2**18, 18),), 32)
    with pytest.raises(ValueError, match="262144 of them are too many, use random"):
        Corruption(many, quantizer(), kind="noise")
