"""GigaTok and ReToK: the pooled queries, the Q-Former against torch's own attention, the rotation trick, prefixes."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from tokenizers import gigatok, images, make, retok
from torch import nn

from vtok.config import instantiate
from vtok.layers.nested import keep_counts, keep_sums
from vtok.layers.qformer import PositionedAttention, QFormerDecoder, QFormerEncoder, QFormerLayer, pooled, pyramid
from vtok.models.retok import KEEP, ReToK
from vtok.noise import SampleNoise
from vtok.quantize.rotation import rotated
from vtok.quantize.vq import VQ

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
KEYS = torch.tensor([11, 22, 33])
COUNTS = {
    "gigatok_ss": 136_073_227,
    "gigatok_sb": 232_399_627,
    "gigatok_bl": 621_637_131,
    "gigatok_xlxxl": 2_893_970_443,
    "retok_ss": 136_302_603,
    "retok_sb": 232_686_347,
    "gigatok_small": 2_962_139,
    "retok_small": 2_439_131,
}


@pytest.mark.parametrize("name", COUNTS)
def test_published_sizes(name):
    data, tokens = ("cifar10", 32) if name.endswith("small") else ("imagenet256", 256)
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("train", overrides=[f"tokenizer={name}", f"data={data}"])
    with torch.device("meta"):
        model = instantiate(config.tokenizer, _convert_="all")
    count = sum(p.numel() for p in model.parameters())
    assert count == COUNTS[name] and model.spec.layout.length == tokens
    if not name.endswith("small"):  # all sizes have the same convolutions
        network = getattr(model, "network", model)
        inside = [sum(p.numel() for p in part.parameters()) for part in (network.encoder, network.decoder)]
        assert inside == [26_143_232, 50_161_155]
    assert f"{count:,} parameters" in (CONFIGS / "tokenizer" / f"{name}.yaml").read_text()


@pytest.mark.parametrize(
    "name, epochs, start", (("gigatok", 100, 20_000), ("retok", 250, 20_000), ("retok_stage2", 50, 0))
)
def test_recipes_compose(name, epochs, start):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("train", overrides=[f"experiment={name}_imagenet256"])
    with torch.device("meta"):
        model = instantiate(config.tokenizer, _convert_="all")
    assert config.name == f"{name}_imagenet256" and model.spec.image_size == config.data.image_size == 256
    assert config.steps == 1_281_167 // config.batch_size * epochs
    assert (config.objective.gan.start, config.objective.gan.weight) == (start, 0.5)
    network = getattr(model, "network", model)
    frozen = {k.split(".")[0] for k, p in network.named_parameters() if not p.requires_grad}
    assert frozen == ({"encoder", "to_tokens", "project_in", "quantizer"} if name == "retok_stage2" else set())
    assert network.alignment[-1].out_features == 768 and "alignment" in config.objective.terms.alignment.features


def test_the_other_sizes_follow_the_lines_of_the_header():
    """Epochs of the file names [R]: 200 for S-B and B-L, 300 for XL-XXL, which alone warms up [C]."""
    lines = (CONFIGS / "experiment" / "gigatok_imagenet256.yaml").read_text().partition("\ndefaults:")[0].splitlines()
    text = " ".join(line.removeprefix("# ") for line in lines)
    for names, epochs, warmup in ((("gigatok_sb", "gigatok_bl"), 200, 0), (("gigatok_xlxxl",), 300, 5000)):
        options = [o for o in text.split(f"tokenizer={' or '.join(names)}:")[1].split(". ")[0].split() if "=" in o]
        for name in names:
            with initialize_config_dir(str(CONFIGS), version_base="1.3"):
                config = compose("train", overrides=["experiment=gigatok_imagenet256", f"tokenizer={name}", *options])
            assert (config.batch_size, config.steps) == (256, epochs * (1_281_167 // 256))
            assert config.schedule.warmup == warmup
            # the auxiliary losses end after 15,000 steps, but for XL-XXL, which has none
            assert config.tokenizer.auxiliary_until * config.steps == pytest.approx(0 if warmup else 15_000, rel=1e-3)


def test_queries_are_means_of_cells(monkeypatch):
    """By loops: 1, 1, 2, 4, .. cells in raster order, columns halved first; the last level halves the grid's rows."""
    side, grid = 8, torch.randn(2, 8, 8, 3)
    expected = []
    for rows, columns in ((1, 1), (1, 1), (1, 2), (2, 2), (2, 4)):
        high, wide = side // rows, side // columns
        for r in range(rows):
            for c in range(columns):
                expected.append(grid[:, r * high : (r + 1) * high, c * wide : (c + 1) * wide].mean((1, 2)))
    torch.testing.assert_close(pooled(grid, 16), torch.stack(expected, 1))
    odd = torch.randn(2, 5, 5, 3)  # cells that do not divide the grid overlap: from floor to ceiling
    wanted = []
    for rows, columns in pyramid(8, 5):
        for r in range(rows):
            for c in range(columns):
                up, left = r * 5 // rows, c * 5 // columns
                wanted.append(odd[:, up : -(-(r + 1) * 5 // rows), left : -(-(c + 1) * 5 // columns)].mean((1, 2)))
    torch.testing.assert_close(pooled(odd, 8), torch.stack(wanted, 1))
    # where they divide it, no operation that trainer.deterministic=true refuses on a GPU; nor in ResTok and D-AR
    monkeypatch.setattr(torch.nn.functional, "adaptive_avg_pool2d", lambda *_: pytest.fail("an adaptive average"))
    pooled(grid, 16)
    make("restok")(images())
    make("dar", repa_block=1, repa_side=2)(images())
    assert pyramid(256, 16)[-1] == (8, 16)
    with pytest.raises(ValueError, match="power of two"):
        pyramid(12, 8)
    with pytest.raises(ValueError, match="larger image_size"):
        pyramid(256, 12)


def reference(layer: PositionedAttention) -> nn.MultiheadAttention:
    """torch's attention with the same weights, sequence first."""
    dim = layer.q.in_features
    theirs = nn.MultiheadAttention(dim, layer.heads)
    parts = (layer.q, layer.k, layer.v)
    theirs.in_proj_weight.data = torch.cat([p.weight.data for p in parts])
    theirs.in_proj_bias.data = torch.cat([p.bias.data for p in parts])
    theirs.out_proj.load_state_dict(layer.out.state_dict())
    return theirs


@torch.no_grad()
def test_layer_is_that_of_detr():
    torch.manual_seed(0)
    layer = QFormerLayer(dim=12, heads=3)
    x, context, position, place = torch.randn(2, 5, 12), torch.randn(2, 7, 12), torch.randn(5, 12), torch.randn(7, 12)
    seen = torch.tensor([[True] * 4 + [False] * 3, [True] * 7])
    h = x.transpose(0, 1)
    context_first, at, there = context.transpose(0, 1), position[:, None], place[:, None]
    a = layer.norm1(h)
    h = h + reference(layer.own)(a + at, a + at, a)[0]
    a = layer.norm2(h)
    h = h + reference(layer.cross)(a + at, context_first + there, context_first, key_padding_mask=~seen)[0]
    h = h + layer.ffn.down(F.gelu(layer.ffn.up(layer.norm3(h))))
    torch.testing.assert_close(layer(x, context, position, place, seen[:, None, None]), h.transpose(0, 1))


@torch.no_grad()
def test_redundant_queries_repeat_the_tail():
    """With equal positions the repeated queries cannot be told from those that they repeat."""
    torch.manual_seed(0)
    former = QFormerEncoder(channels=6, dim=8, depth=2, heads=2, side=4, tokens=8, redundant=3)
    former.position[8:] = former.position[5:8]
    out = former(torch.randn(2, 4, 4, 6))
    assert out.shape == (2, 11, 6)
    torch.testing.assert_close(out[:, 8:], out[:, 5:8])
    with pytest.raises(ValueError, match="redundant"):
        QFormerEncoder(channels=6, dim=8, depth=1, heads=2, side=4, tokens=8, redundant=8)


@torch.no_grad()
def test_a_tap_is_the_state_after_its_layer():
    torch.manual_seed(0)
    former = QFormerDecoder(channels=6, dim=8, depth=3, heads=2, side=4, tokens=8)
    tokens = torch.randn(2, 8, 6)
    whole, tapped = former(tokens, tap=2)
    context = former.embed(former.norm_in(tokens))
    x = context[:, :1].expand(-1, 16, -1)
    for i, layer in enumerate(former.layers):
        x = layer(x, context, former.position, former.place)
        if i == 1:
            torch.testing.assert_close(tapped, x)
    torch.testing.assert_close(whole, former.out(former.norm(x).transpose(1, 2).unflatten(2, (4, 4))))


def test_rotation_turns_gradients():
    """Against the matrix: R is orthogonal and takes z's direction to the code's; gradients pass ratio * R^T."""
    torch.manual_seed(0)
    z, codes, upstream = (torch.randn(5, 4, dtype=torch.float64) for _ in range(3))
    z.requires_grad_()
    out = rotated(z, codes)
    assert torch.equal(out, codes)
    (out * upstream).sum().backward()
    for i in range(5):
        u, q = F.normalize(z[i].detach(), dim=0), F.normalize(codes[i], dim=0)
        r = F.normalize(u + q, dim=0)
        turn = torch.eye(4, dtype=torch.float64) - 2 * torch.outer(r, r) + 2 * torch.outer(q, u)
        torch.testing.assert_close(turn @ turn.T, torch.eye(4, dtype=torch.float64))
        torch.testing.assert_close(turn @ u, q)
        ratio = codes[i].norm() / z[i].detach().norm()
        torch.testing.assert_close(z.grad[i], ratio * turn.T @ upstream[i])


def test_rotation_changes_no_value_of_vq():
    torch.manual_seed(0)
    plain, turned = VQ(vocab_size=16, channels=4), VQ(vocab_size=16, channels=4, rotation=True)
    turned.load_state_dict(plain.state_dict())
    z = torch.randn(2, 6, 4)
    assert torch.equal(plain(z).z, turned(z).z) and torch.equal(plain(z).ids, turned(z).ids)


def test_sizes_that_do_not_fit_are_named():
    for wrong, word in (
        (dict(tokens=12), "power of two"),
        (dict(alignment_depth=4), "alignment_depth"),
        (dict(decoder_multipliers=(1, 1)), "decoder_multipliers"),
    ):
        with pytest.raises(ValueError, match=word):
            gigatok(**wrong)
    with pytest.raises(ValueError, match="image_size=16"):
        make("gigatok").encode(torch.zeros(1, 3, 24, 24))
    assert "alignment" not in make("gigatok", alignment_depth=None)(images()).features


# --- ReToK ----------------------------------------------------------------------------------------------------------


def test_prefixes_of_each_sample_are_prefixes_alone():
    model = make("retok")
    tokens, keep = model.encode(images()), torch.tensor([1, 5, 8])
    together = model.decode(tokens, keep=keep)
    for i, count in enumerate(keep.tolist()):
        torch.testing.assert_close(model.decode(tokens[i : i + 1], keep=count), together[i : i + 1])
    for wrong in (0, 9, torch.tensor([1, 0, 2])):
        with pytest.raises(ValueError, match="keep"):
            model.decode(tokens, keep=wrong)
    assert torch.equal(model.decode(tokens, keep=keep, size=16), together)
    for count in (5, keep):
        with pytest.raises(ValueError, match="built for image_size=16, asked for 32"):
            model.decode(tokens, keep=count, size=32)


def test_training_keeps_what_the_keys_say():
    """Every training image is the decoding of the drawn prefix of tokens and redundant ones; the weights follow."""
    model = make("retok")
    network, length = model.network, 14
    z = model.quantizer(network.vectors(network.grid(images()))).z
    counts = keep_counts(keep_sums("uniform", length), SampleNoise(KEYS), stream=KEEP)
    recon = model.train()(images(), key=KEYS, progress=0.75)
    for i, count in enumerate(counts.tolist()):
        torch.testing.assert_close(network.pixels(z[i : i + 1, :count])[0], recon.images[i], rtol=1e-4, atol=1e-5)
    expected = 0.25 * (1 - (counts - 1) / (length - 1))
    torch.testing.assert_close(recon.features["alignment_weight"], expected.float())
    assert recon.tokens.shape == (3, 8)
    torch.testing.assert_close(model.eval()(images()).images, network.pixels(z[:, :8]))


def test_nested_dropout_can_be_chosen():
    model = make("retok", nested={3: 1.0}).train()
    z = model.quantizer(model.network.vectors(model.network.grid(images()))).z
    torch.testing.assert_close(model(images(), key=KEYS).images, model.network.pixels(z[:, :3]), rtol=1e-4, atol=1e-5)
    for wrong in ({"nested": {15: 1.0}}, {"alignment_power": -1.0}):
        with pytest.raises(ValueError):
            retok(**wrong)


def test_the_decoders_stage_changes_the_decoder_alone():
    """Tokens, images and prefixes are those of the joint tokenizer; a codebook of moving averages stays as well."""
    moving = VQ(vocab_size=32, channels=6, rotation=True, ema_decay=0.9, restart=0.5)
    joint = ReToK(network=gigatok(redundant=6, quantizer=moving))
    moving = VQ(vocab_size=32, channels=6, rotation=True, ema_decay=0.9, restart=0.5)
    model = ReToK(network=gigatok(redundant=6, quantizer=moving), stage="decoder")
    model.load_state_dict(joint.state_dict())
    for mode in (False, True):
        before = {k: v.clone() for k, v in joint.state_dict().items()}
        want = joint.train(mode)(images(), key=KEYS, progress=0.9)
        joint.load_state_dict(before)  # training has moved its codebook
        got = model.train(mode)(images(), key=KEYS, progress=0.9)
        assert torch.equal(got.tokens, want.tokens) and torch.equal(got.images, want.images)
        assert not got.losses and want.losses and set(got.features) == set(want.features)
        assert torch.equal(got.features["alignment_weight"], want.features["alignment_weight"])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    (got.images.square().mean() + got.features["alignment"].square().mean()).backward()
    optimizer.step()
    moved = {k.split(".")[1] for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {"to_grid", "project_out", "decoder", "alignment"}
    with pytest.raises(ValueError, match="stage='second'"):
        retok(stage="second")
    assert joint.fresh_start() is None
    with pytest.raises(ValueError, match=r"init_from=<run of tokenizer\.stage=joint>"):
        model.fresh_start()
