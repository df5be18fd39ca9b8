"""ResTok: pyramid, merging, what depends on what, nested dropout, published size."""

from __future__ import annotations

import pytest
import torch
from tokenizers import images, make, restok

from vtok.convert.restok import keep_weights
from vtok.models.restok import ResTok, halve, level_sizes, residual_pyramid
from vtok.quantize.vq import VQ

PUBLISHED_KEEP = {4: 1, 8: 2, 16: 4, 32: 8, 64: 16, 128: 124}


def test_levels_double():
    assert level_sizes(128) == [1, 1, 2, 4, 8, 16, 32, 64] and level_sizes(2) == [1, 1]
    for wrong in (1, 12):
        with pytest.raises(ValueError, match="tokens"):
            level_sizes(wrong)
    assert keep_weights(128, 4, 0.2) == PUBLISHED_KEEP


def test_pyramid_codes_what_coarser_levels_leave():
    grid = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    found = residual_pyramid(grid, level_sizes(64)).transpose(1, 2)
    assert found.shape == (2, 3, 64)
    rest, start = grid, 0
    for height, width in ((1, 1), (1, 1), (1, 2), (2, 2), (2, 4), (4, 4), (4, 8)):
        tall, wide = 8 // height, 8 // width
        means = rest.reshape(2, 3, height, tall, width, wide).mean((3, 5))
        torch.testing.assert_close(found[..., start : start + height * width], means.flatten(2))
        rest = rest - means.repeat_interleave(tall, 2).repeat_interleave(wide, 3)
        start += height * width
    assert float(found[..., 1].abs().max()) < 1e-12  # a second 1 x 1 level has nothing left to say


def test_halving_keeps_a_coarse_level_and_its_residual():
    x = torch.tensor([3.0, 5.0, 2.0, 7.0, 9.0]).view(1, 5, 1)
    assert halve(x, 4).flatten().tolist() == [3.0, 2.0, 0.0, 2.0, 0.0, 5.0, 9.0]


def test_places_go_along_the_diagonal():
    """By hand for image levels of 2 x 1 and 2 x 2 and latents of 1, 1, 2, 4; a level sees itself and coarser ones."""
    encoder = restok().encoder
    (cos, sin, _), mask = encoder.places([(2, 1), (2, 2)], torch.device("cpu"))
    rows = torch.tensor([0, 1, 2, 2, 3, 3, *range(6, 14)]).float()
    columns = torch.tensor([0, 0, 2, 3, 2, 3, *range(6, 14)]).float()
    turn = torch.stack([rows, rows * 1e-2, columns, columns * 1e-2], -1)  # heads of 8 channels: frequencies 1, 1e-2
    torch.testing.assert_close(cos, turn.cos())
    torch.testing.assert_close(sin, turn.sin())
    level = [0] * 2 + [1] * 4 + [2, 3, 4, 4, 5, 5, 5, 5]
    assert mask.tolist() == [[query >= key for key in level] for query in level]


def moved(one: torch.Tensor, other: torch.Tensor) -> list[int]:
    """Tokens whose vectors differ."""
    return torch.nonzero((one - other).abs().amax(-1)[0] > 1e-6).flatten().tolist()


@pytest.mark.parametrize("legacy", (False, True))
@torch.no_grad()
def test_what_a_change_reaches(legacy):
    """Block-causal: a latent changed on its way into the trunk reaches its own and finer levels. With the published
    reshape it reaches every token, and so does even a change of the last latent after the trunk. A patch of the image
    reaches every token in either case: all latents see all image tokens."""
    model = make("restok", legacy_reshape=legacy)
    encoder, everything = model.encoder, list(range(8))
    x = images()[:1]
    features = model.cnn_encoder(x)
    z, _ = encoder(features)
    level_of = [0, 1, 2, 2, 3, 3, 3, 3]

    plain = encoder.latent_level.data.clone()
    for level in range(4):
        encoder.latent_level.data = plain.clone()
        encoder.latent_level.data[level] += torch.linspace(-1, 1, 32)
        reached = moved(encoder(features)[0], z)
        assert reached == (everything if legacy else [i for i in everything if level_of[i] >= level])
    encoder.latent_level.data = plain

    latents = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(0))
    last = latents.clone()
    last[:, -1] += 1
    assert moved(encoder.project(latents), encoder.project(last)) == (everything if legacy else [7])

    other = x.clone()
    other[..., 4:8, 8:12] *= -1
    assert moved(model.features(other), model.features(x)) == everything


def test_nested_dropout_is_keyed_and_replaces_the_rest():
    model = make("restok", nested={1: 1.0, 8: 1.0}).train()
    seen = []
    model.decoder.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    key = torch.arange(40)
    many = images(3)[:1].expand(40, -1, -1, -1)
    model(many, key=key)
    (z,) = seen
    dropped = (z == model.fill).all(-1)
    counts = 8 - dropped.sum(1)
    assert set(counts.tolist()) == {1, 8} and 8 < int((counts == 1).sum()) < 32
    assert torch.equal(dropped, torch.arange(8) >= counts[:, None])
    model(many[:3], key=key[7:10])
    assert torch.equal((seen[1] == model.fill).all(-1), dropped[7:10])
    with pytest.raises(ValueError, match="between 1 and 8"):
        restok(nested={16: 1.0})


@torch.no_grad()
def test_prefixes_by_row():
    model = make("restok")
    tokens = model.encode(images())
    keep = torch.tensor([1, 8, 3])
    by_row = [model.decode(tokens[i : i + 1], keep=int(k)) for i, k in enumerate(keep)]
    torch.testing.assert_close(model.decode(tokens, keep=keep), torch.cat(by_row), rtol=1e-4, atol=1e-5)
    for wrong in (0, 9, torch.tensor([1, 9, 1])):
        with pytest.raises(ValueError, match="keep"):
            model.decode(tokens, keep=wrong)


@torch.no_grad()
def test_other_sizes_have_the_same_tokens():
    model = make("restok")
    large = torch.rand(2, 3, 32, 32) * 2 - 1
    tokens = model.encode(large)
    assert tokens.shape == (2, 8) and model.decode(tokens, size=32).shape == large.shape
    torch.testing.assert_close(model(large).images, model.decode(tokens, size=32), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="image_size"):
        model.spec_for(20)


@pytest.mark.parametrize("semantic, count", ((None, 659_693_771), (1024, 661_791_947)))
def test_published_size(semantic, count):
    with torch.device("meta"):
        quantizer = VQ(vocab_size=8192, channels=8)
        model = ResTok(image_size=256, quantizer=quantizer, nested=PUBLISHED_KEEP, semantic=semantic)
    assert sum(p.numel() for p in model.parameters()) == count  # 661,791,947: ours, "662M" published
    parts = {name: sum(p.numel() for p in child.parameters()) for name, child in model.named_children()}
    assert parts["cnn_encoder"] == 23_775_104 and parts["cnn_decoder"] == 30_478_339
    assert model.encoder.merges == {5, 11, 17}
    assert model.spec.layout.sizes == (1, 1, 2, 4, 8, 16, 32, 64)


@pytest.mark.parametrize("narrow", ("encoder", "decoder", "both", "neither"))
def test_each_half_starts_by_its_own_width(narrow):
    """The start for short trainings: sharper queries, and a last layer of a tenth of a narrow decoder."""
    sizes = {half: (32 if narrow in (half, "both") else 384, 3, 4) for half in ("encoder", "decoder")}
    model = restok(**sizes)
    quick = narrow in ("decoder", "both")
    weight = model.cnn_decoder.conv_out.weight
    usual = weight[0].numel() ** -0.5 if quick else 0.02
    assert 0.8 < weight.std() / (usual * (0.1 if quick else 1.0)) < 1.1
    for name, size in sizes.items():
        sharp = set(getattr(model, name).trunk.blocks[0].attention.q_norm.weight.tolist())
        assert sharp == {3.0 if size[0] == 32 else 1.0}
        weight = getattr(model, name).trunk.blocks[1].ffn.up.weight
        assert 0.8 < weight.std() / (size[0] ** -0.5 if size[0] == 32 else 0.02) < 1.1
