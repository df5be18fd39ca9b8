"""MaskGIT: what a step may see, which tokens it keeps, the masked loss, learning, published sizes."""

import math

import pytest
import torch
from generators import CLASSES, grid_spec, latent_spec, make, maskgit, tokens_of

from vgen.conditioning import Cond
from vgen.generator import Canvas
from vgen.guidance import Previous, Progress, guidance
from vgen.heads import DrawRule
from vgen.models.maskgit import MaskGIT
from vgen.pipeline import Pipeline
from vgen.samplers.refine import CONFIDENCE_STREAM, least, refine
from vtok.checkpoint import save_folder
from vtok.data.transforms import to_uint8
from vtok.layout import SequenceLayout
from vtok.models.cnn import CNNTokenizer
from vtok.noise import SampleNoise, sample_seeds
from vtok.quantize.vq import VQ
from vtok.tokenizer import Part, TokenSpec

BOTH = pytest.mark.parametrize("name", ["maskgit", "maskgit_uvit"])
LABELS = torch.tensor([0, 3, CLASSES])
NOISE = SampleNoise(sample_seeds(0, 0, 3))


@BOTH
def test_hidden_tokens_are_not_seen_and_known_ones_are(name):
    model = make(name)
    tokens, cond = tokens_of(model, 3), model.conditioner(LABELS)
    known = torch.rand(3, 16, generator=torch.Generator().manual_seed(0)) < 0.5
    h = model(Canvas(tokens, model.layout, known=known), cond)
    hidden = torch.where(known, tokens, (tokens + 1) % 24)
    assert torch.equal(model(Canvas(hidden, model.layout, known=known), cond), h)
    for cell in range(16):
        changed = tokens.clone()
        changed[:, cell] = (changed[:, cell] + 1) % 24
        moved = (model(Canvas(changed, model.layout, known=known), cond) - h).abs().amax((1, 2)) > 1e-4
        assert torch.equal(moved, known[:, cell])


@BOTH
def test_what_the_canvas_does_not_say_is_known_up_to_the_step(name):
    model = make(name)
    tokens, cond = tokens_of(model, 3), model.conditioner(LABELS)
    a, _ = model.layout.written(2, 3)
    known = (torch.arange(16) < a).expand(3, -1)
    assert torch.equal(model(model.arrange(tokens), cond, 2, 3), model(Canvas(tokens, model.layout, known=known), cond))
    values = torch.nn.functional.one_hot(tokens, 24).float()
    torch.testing.assert_close(
        model(model.arrange(values), cond, 2, 3), model(model.arrange(tokens), cond, 2, 3), rtol=1e-4, atol=1e-5
    )


def test_u_vit_by_hand():
    """Blocks around the middle, joined from the outermost pair inwards; every block pre-norm."""
    model = make("maskgit_uvit", depth=4)
    trunk, x = model.trunk, torch.randn(2, 5, 16)

    def block(i, x):
        b = trunk.blocks[i]
        y = torch.nn.functional.layer_norm(x, (16,), b.norm1.weight, b.norm1.bias, 1e-5)
        q, k, v = (y @ b.attention.qkv.weight.T).view(2, 5, 3, 2, 8).permute(2, 0, 3, 1, 4)
        y = ((q @ k.transpose(-1, -2) / math.sqrt(8)).softmax(-1) @ v).transpose(1, 2).reshape(2, 5, 16)
        x = x + y @ b.attention.out.weight.T + b.attention.out.bias
        y = torch.nn.functional.layer_norm(x, (16,), b.norm2.weight, b.norm2.bias, 1e-5)
        return x + b.ffn.down(torch.nn.functional.gelu(b.ffn.up(y)))

    first = block(0, x)
    second = block(1, first)
    y = block(2, second)
    y = block(3, trunk.skips[0](torch.cat([y, second], -1)))
    y = block(4, trunk.skips[1](torch.cat([y, first], -1)))
    want = torch.nn.functional.layer_norm(y, (16,), trunk.norm.weight, trunk.norm.bias, 1e-5)
    torch.testing.assert_close(trunk(x, Cond(x[:, :1])), want, rtol=1e-4, atol=1e-4)


def bent(logits, progress):
    """A processor for which it matters whether the temperature came before."""
    return 4 * torch.tanh(logits / 4)


@BOTH
@pytest.mark.parametrize("process", [lambda logits, progress: logits, bent], ids=["plain", "bent"])
def test_every_step_keeps_the_surest_by_brute_force(name, process):
    """Guidance, temperature, processors, then the noise: of a token and, in the same units, of its confidence."""
    model, states = make(name), []
    guide, top = guidance(2.0, "previous"), 3.0
    cond = Cond.cat([model.conditioner(LABELS), model.conditioner.null(3)])
    rule = DrawRule(temperature=top, processors=(process,))
    done = refine(model, cond, noise=NOISE, guide=guide, rule=rule, on_step=lambda c, p: states.append(c))
    ids = [[None] * 16 for _ in range(3)]
    for step in range(5):
        known = torch.tensor([[i is not None for i in row] for row in ids])
        given = torch.tensor([[i or 0 for i in row] for row in ids])
        h = model(Canvas(given, model.layout, known=known).repeat(2), cond)
        c, u = model.head.logits(h)[0].unflatten(0, (2, 3))
        logits = (u + (1 + step / 5) * (c - u)).detach()
        heat = top * (1 - (step + 1) / 5)
        logits = process(logits / heat, None) if heat else process(logits, None)
        cells, noisy = torch.arange(16), float(heat > 0)
        token = (logits + noisy * NOISE.gumbel(cells, torch.arange(24), step)).argmax(-1)
        race = NOISE.gumbel(cells, torch.zeros(1, dtype=torch.int64), CONFIDENCE_STREAM + step)[..., 0]
        for row in range(3):
            open_ = [i for i in range(16) if ids[row][i] is None]
            open_.sort(key=lambda i: -float(logits[row, i, token[row, i]] + noisy * race[row, i]))
            for i in open_[: model.layout.sizes[step]]:
                ids[row][i] = int(token[row, i])
        assert torch.equal(states[step].known, torch.tensor([[i is not None for i in row] for row in ids]))
    assert torch.equal(done.tokens, torch.tensor(ids)) and done.known.all()
    assert len(states) == 5 and len(done.tokens.unique()) > 3


def test_processors_top_k_and_stop():
    model, seen = make("maskgit"), []
    cond = model.conditioner(LABELS)
    rule = DrawRule(temperature=5.0, processors=(lambda logits, progress: seen.append(progress.step) or logits,))
    part = refine(model, cond, noise=NOISE, rule=rule, stop=2)
    assert seen == [0, 1] and torch.equal(part.known.sum(1), torch.full((3,), sum(model.layout.sizes[:2])))
    assert (part.tokens[~part.known] == 0).all()
    greedy = refine(model, cond, noise=NOISE, rule=DrawRule(temperature=0))
    hot = refine(model, cond, noise=NOISE, rule=DrawRule(temperature=50.0))
    assert not torch.equal(hot.tokens, greedy.tokens)
    by_progress = refine(model, cond, noise=NOISE, rule=lambda progress: DrawRule(temperature=0))
    assert torch.equal(by_progress.tokens, greedy.tokens)


@BOTH
def test_given_tokens_stay_and_the_rest_is_filled(name):
    model = make(name)
    tokens = tokens_of(model, 3)
    known = torch.zeros(3, 16, dtype=torch.bool)
    known[0, :3], known[1, 1:] = True, True  # of the third sample, nothing
    canvas, counts = Canvas(tokens, model.layout, known=known), []
    done = refine(
        model, model.conditioner(LABELS), noise=NOISE, canvas=canvas, on_step=lambda c, p: counts.append(c.known.sum(1))
    )
    assert torch.equal(done.tokens[known], tokens[known]) and done.known.all()
    counts = torch.stack(counts)
    assert (counts.diff(dim=0) >= 0).all() and (counts[:-1, 1] == 15).all()
    free = refine(model, model.conditioner(LABELS), noise=NOISE)
    assert torch.equal(done.tokens[2], free.tokens[2])


def test_the_least_sure_are_found():
    confidence = torch.tensor([[3.0, 1.0, 2.0, 0.0], [1.0, 1.0, 1.0, 9.0], [0.0, 1.0, 2.0, 3.0]])
    open_ = torch.tensor([[True, True, True, False], [True, True, True, True], [False, False, False, True]])
    assert least(confidence, open_, 2).tolist() == [
        [False, True, True, False],
        [True, True, False, False],  # a tie is cut in order
        [False, False, False, True],  # one is open: it stays so until the last step
    ]
    assert least(confidence, open_, 3).sum(1).tolist() == [2, 3, 1]  # every step keeps one
    assert not least(confidence, open_, 0).any()


@BOTH
def test_the_loss_by_hand(name):
    model = make(name)
    batch = {"tokens": tokens_of(model, 3), "label": LABELS, "key": sample_seeds(0, 0, 3)}
    hidden, out = model.hide(batch), model.loss(batch)
    h = model(Canvas(batch["tokens"], model.layout, known=~hidden), model.conditioner(LABELS))
    logs = model.head.logits(h)[0].log_softmax(-1)
    plain = -logs.gather(-1, batch["tokens"][..., None])[..., 0]
    smooth = 0.9 * plain - 0.1 * logs.mean(-1)
    weight = torch.where(hidden, 1.0, 0.1)
    torch.testing.assert_close(out["loss"], (smooth * weight).sum() / weight.sum())
    torch.testing.assert_close(out["nats"][:, 0], torch.stack([plain[i][hidden[i]].mean() for i in range(3)]))
    other = model.loss(batch | {"context": tokens_of(model, 3, seed=9)})["nats"]
    assert not torch.allclose(other, out["nats"])


def test_hidden_counts_follow_the_arccosine():
    """P(count <= c) = P(round(16 arccos(u) 2 / pi) <= c), u uniform; every cell is hidden equally often."""
    model = make("maskgit")
    hidden = model.hide({"key": sample_seeds(0, 0, 20_000)})
    counts = hidden.sum(1)
    assert counts.min() == 1 and counts.max() == 16
    for c in (1, 4, 8, 12, 15):
        want = 1 - math.cos(math.pi / 2 * (c + 0.5) / 16)
        assert abs(float((counts <= c).double().mean()) - want) < 0.015
    share = hidden.double().mean(0)
    assert (share - share.mean()).abs().max() < 0.015
    assert torch.equal(model.hide({"key": sample_seeds(0, 5, 9)}), hidden[5:9])


@BOTH
def test_one_batch_is_learned(name):
    torch.manual_seed(0)
    quiet = {"dropout": 0.0, "attention_dropout": 0.0, "label_drop": 0.0, "smoothing": 0.0}
    arch = "uvit" if name == "maskgit_uvit" else "bert"
    model = maskgit(width=32, arch=arch, **quiet).train()
    tokens, labels = tokens_of(model, 4), torch.arange(4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    for step in range(120):
        optimizer.zero_grad()
        model.loss({"tokens": tokens, "label": labels, "key": sample_seeds(step, 0, 4)})["loss"].backward()
        optimizer.step()
    model.eval()
    noise = SampleNoise(sample_seeds(0, 0, 4))
    drawn = refine(model, model.conditioner(labels), noise=noise, rule=DrawRule(temperature=0.5))
    assert torch.equal(drawn.tokens, tokens)


def test_the_pipeline_refines(tmp_path):
    torch.manual_seed(0)
    shape = dict(channels=8, multipliers=(1, 2), blocks=1, groups=4, attention=False, mid_attention=False)
    tokenizer = CNNTokenizer(image_size=8, quantizer=VQ(vocab_size=24, channels=6), z_channels=6, **shape)
    model = MaskGIT(tokenizer.spec, CLASSES, depth=1, width=16, heads=2, steps=4)
    torch.nn.init.normal_(model.head.linear.weight, std=2.0)
    save_folder(tokenizer, tmp_path / "tokenizer")
    save_folder(model, tmp_path, kind="generator")
    pipeline, labels, seeds = Pipeline.load(tmp_path, chunk=2), torch.arange(3), sample_seeds(0, 0, 3)
    rule, guide = DrawRule(temperature=3.0), guidance(2.0, "previous")
    tokens = pipeline.tokens(labels, seeds, guide=guide, rule=rule)
    cond = Cond.cat([model.eval().conditioner(labels), model.conditioner.null(3)])
    assert torch.equal(tokens, refine(model, cond, noise=SampleNoise(seeds), guide=guide, rule=rule).tokens)
    images = pipeline(labels, seeds, guidance=guide, rule=rule)
    assert torch.equal(images, to_uint8(tokenizer.eval().decode(tokens)))


def test_guidance_follows_the_share_before_the_step():
    scales = [Previous(5.5)(Progress(step, 8)) for step in range(8)]
    assert scales == pytest.approx([1 + 4.5 * step / 8 for step in range(8)])  # TiTok's t = ratio * 4.5, s = 1 + t


def test_specs_that_do_not_fit_say_why():
    with pytest.raises(ValueError, match="continuous"):
        MaskGIT.accepts(latent_spec())
    with pytest.raises(ValueError, match="2 parts"):
        MaskGIT.accepts(TokenSpec(SequenceLayout.line(4), (Part(2, 8, 8), Part(2, 9, 8)), 32))
    with pytest.raises(ValueError, match="arch='vit'"):
        maskgit(grid_spec(), arch="vit")
    with pytest.raises(ValueError, match="even number"):
        maskgit(grid_spec(), arch="uvit", depth=3)


@pytest.mark.parametrize(
    "tokens, sizes, count",
    [
        (32, {"depth": 24, "width": 768}, 177_202_432),
        (64, {"depth": 24, "width": 768}, 177_227_008),
        (128, {"depth": 20, "width": 1024, "arch": "uvit", "steps": 64}, 294_990_848),
    ],
)
def test_published_parameter_counts(tokens, sizes, count):
    spec = TokenSpec(SequenceLayout.line(tokens), (Part(tokens, 4096, 12),), 256)
    with torch.device("meta"):
        model = MaskGIT(spec, 1000, heads=16, **sizes)
    assert sum(p.numel() for p in model.parameters()) == count
