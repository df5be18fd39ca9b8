"""Sub-codes: a normalised likelihood, draws that follow it, and the plain head where there is one factor."""

import pytest
import torch
from generators import grid_spec, llamagen, make

from vgen.guidance import ClassifierFree, Constant, Progress, Unguided
from vgen.heads import CategoricalHead, DrawRule
from vgen.heads_factorised import FactorisedEmbedding, FactorisedHead, check_factors
from vgen.models.llamagen import LlamaGen
from vtok.config import describe
from vtok.layout import SequenceLayout
from vtok.noise import SampleNoise, sample_seeds
from vtok.quantize.factors import join, split
from vtok.quantize.fsq import FSQ
from vtok.tokenizer import Part, TokenSpec

FACTORS = (2, 3, 4)


def head_of(depth, factors=FACTORS, dim=8):
    torch.manual_seed(0)
    head = FactorisedHead(dim=dim, factors=factors, depth=depth, heads=2)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return head.eval()


def test_split_and_join_are_the_quantizers():
    ids = torch.arange(24).view(2, 12)
    assert torch.equal(join(split(ids, FACTORS), FACTORS), ids)
    assert torch.equal(split(ids, FACTORS)[1, 3], torch.tensor([15 % 2, 15 // 2 % 3, 15 // 6]))
    quantizer = FSQ(levels=FACTORS)  # its channels are the factors: digit f of an id is that of channel f
    codes = quantizer.lookup(ids)
    for f, size in enumerate(FACTORS):
        levels = codes[..., f].unique(sorted=True)
        assert torch.equal(levels[split(ids, FACTORS)[..., f]], codes[..., f]) and len(levels) == size


@pytest.mark.parametrize("depth", [0, 1])
def test_probabilities_of_all_codes_sum_to_one(depth):
    head, h = head_of(depth), torch.randn(1, 5, 8)
    ids = torch.arange(24)[:, None].expand(-1, 5)
    with torch.no_grad():
        logs = head.log_prob(h.expand(24, -1, -1), ids, (1,) * 5)
    assert logs.std() > 0.5
    torch.testing.assert_close(logs.double().exp().sum(0), torch.ones(5, dtype=torch.float64), rtol=1e-5, atol=0)


@pytest.mark.parametrize("depth", [0, 1])
def test_draws_have_the_frequencies_of_the_likelihood(depth):
    head, count = head_of(depth), 40_000
    h = torch.randn(1, 1, 8)
    with torch.no_grad():
        want = head.log_prob(h.expand(24, -1, -1), torch.arange(24)[:, None], (1,))[:, 0].exp()
        ids = head.draw(
            h.expand(1, count, -1),
            (1,) * count,
            guide=Unguided(),
            noise=SampleNoise(sample_seeds(0, 0, 1)),
            position=torch.arange(count),
            rule=DrawRule(),
            progress=Progress(0, 1),
        )
    got = torch.bincount(ids[0], minlength=24) / count
    sigma = (want * (1 - want) / count).sqrt()
    assert ((got - want).abs() < 4.5 * sigma + 1e-4).all()


@pytest.mark.parametrize("depth", [0, 1])
def test_guided_draws_are_the_race_on_guided_logits(depth):
    head, seeds = head_of(depth), sample_seeds(0, 0, 3)
    h, position = torch.randn(6, 7, 8), torch.arange(7)
    noise, guide = SampleNoise(seeds), ClassifierFree(Constant(2.5))
    with torch.no_grad():
        settings = {"guide": guide, "noise": noise, "position": position, "progress": Progress(0, 1)}
        ids = head.draw(h, (1,) * 7, rule=DrawRule(), **settings)
        logits = head.logits(h, ids.repeat(2, 1))
    for f, (scores, part) in enumerate(zip(logits, split(ids, FACTORS).unbind(-1))):
        conditional, null = scores.unflatten(0, (2, 3))
        guided = null + 2.5 * (conditional - null)
        race = guided + noise.gumbel(position, torch.arange(FACTORS[f]), stream=f)
        assert torch.equal(race.argmax(-1), part)


def test_one_factor_is_the_plain_head():
    plain = CategoricalHead(dim=8, vocab_size=24)
    head = head_of(0, (24,))
    head.load_state_dict(plain.state_dict())
    h, ids = torch.randn(6, 7, 8), torch.randint(24, (6, 7))
    torch.testing.assert_close(head.loss(h, ids, ()), plain.loss(h, ids, ()), rtol=1e-6, atol=1e-6)
    settings = {"guide": ClassifierFree(Constant(2.0)), "noise": SampleNoise(sample_seeds(0, 0, 3))}
    settings |= {"position": torch.arange(7), "rule": DrawRule(top_k=9, top_p=0.9), "progress": Progress(0, 1)}
    assert torch.equal(head.draw(h, (), **settings), plain.draw(h, (), **settings))


def test_later_sub_codes_change_no_earlier_logits():
    head, h = head_of(1), torch.randn(2, 3, 8)
    ids = join(torch.tensor([1, 1, 0]), FACTORS).expand(2, 3)
    for f in range(3):
        parts = split(ids, FACTORS).clone()
        parts[..., f] = 0
        for g, (a, b) in enumerate(zip(head.logits(h, ids), head.logits(h, join(parts, FACTORS)))):
            assert torch.allclose(a, b, atol=1e-6) == (g <= f or f == 2), "sub-code f is read by factors > f alone"


def test_embedding_is_the_sum_of_the_tables():
    table = FactorisedEmbedding(FACTORS, 8)
    ids = torch.randint(24, (2, 5))
    parts, tables = split(ids, FACTORS), table.weight.split(FACTORS)
    want = sum(tables[f][parts[..., f]] for f in range(3))
    torch.testing.assert_close(table(ids), want)


def test_a_vocabulary_of_two_to_the_eighteen_needs_two_small_tables():
    spec = TokenSpec(SequenceLayout.raster(16, 16), (Part(256, 1 << 18, 18),), 256)
    with torch.device("meta"):
        model = LlamaGen(spec, 1000, depth=12, width=768, heads=12, factors=[512, 512])
    assert model.tokens.weight.numel() == model.head.linear.weight.numel() == 1024 * 768


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"factors=\[4, 5\] multiply to 20, the tokens have 24 codes"):
        llamagen(grid_spec(), factors=[4, 5])
    with pytest.raises(ValueError, match="factors"):
        check_factors([1, 24], 24)
    with pytest.raises(ValueError, match="pass ids"):
        make("llamagen_factorised_depth").head.logits(torch.randn(1, 2, 16))


def test_factors_may_come_from_the_tokenizers_quantizer():
    layout = SequenceLayout.raster(2, 2)

    def spec(quantizer):
        return TokenSpec(layout, (Part(4, quantizer.vocab_size, quantizer.channels),), 16, describe(quantizer))

    grouped = spec(FSQ(levels=[5, 5, 3], groups=[2, 1]))
    assert llamagen(grouped, factors="auto").head.factors == (25, 3)
    with pytest.raises(ValueError, match=r"factors=auto.*FSQ has none"):
        llamagen(spec(FSQ(levels=[5, 5, 3])), factors="auto")
    with pytest.raises(ValueError, match="quantizer none"):
        llamagen(grid_spec(), factors="auto")
