"""Hita: two vocabularies in one sequence, the shifted read-out, side tokens of a network outside of the state."""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import save_file
from tokenizers import hita, images, make

from vtok.config import describe, instantiate
from vtok.layers.trunk import Inputs
from vtok.models.hita import resized
from vtok.models.hita_side import DinoTokens
from vtok.models.hita_side import resized as resized_images
from vtok.quantize.fsq import FSQ
from vtok.quantize.parts import PartsQuantizer
from vtok.quantize.vq import VQ
from vtok.tokenizer import Part, TokenSpec

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
DINO = "vit_small_patch14_reg4_dinov2.lvd142m"


@pytest.mark.parametrize(
    "name, size, count, tokens",
    (
        ("hita", 336, 104_240_839, 569),
        ("hita", 256, 104_051_399, 384),
        ("hita_ultra", 336, 104_767_687, 569),
        ("hita_small", 32, 2_095_495, 80),
    ),
)
def test_published_sizes(name, size, count, tokens):
    data = "cifar10" if size == 32 else "imagenet256"
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("train", overrides=[f"tokenizer={name}", f"data={data}", f"data.image_size={size}"])
    with torch.device("meta"):
        model = instantiate(config.tokenizer, _convert_="all")
    size_of = {k: sum(p.numel() for p in getattr(model, k).parameters()) for k in ("fuse", "unfold")}
    assert sum(p.numel() for p in model.parameters()) == count and model.spec.layout.length == tokens
    assert f"{count:,} parameters" in (CONFIGS / "tokenizer" / f"{name}.yaml").read_text()
    if size == 336:
        assert size_of["fuse"] == 20_020_256
        decoder = size_of["unfold"] + model.place.numel() + model.holistic_place.numel()
        if model.vision:
            modules = (model.vision_norm, model.vision_out)
            decoder += model.vision_query.numel() + sum(p.numel() for m in modules for p in m.parameters())
        assert decoder == (10_290_704 if model.vision else 9_763_856)
        assert model.spec.parts == (Part(128, 16384, 12), Part(441, 16384, 8))


def test_recipe_composes():
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("train", overrides=["experiment=hita_imagenet256"])
    with torch.device("meta"):
        model = instantiate(config.tokenizer, _convert_="all")
    assert config.name == "hita_imagenet256" and model.spec.image_size == config.data.image_size == 336
    assert config.steps == 1_281_167 // config.batch_size * 50
    assert config.schedule.warmup == 1_281_167 // config.batch_size * 4


def test_specification_has_two_parts():
    model = make("hita")
    assert model.spec.parts == (Part(4, 32, 5), Part(16, 24, 6))
    assert model.spec.layout.coords[:5] == ((0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 0, 3), (1, 0, 0))
    assert TokenSpec.from_config(model.spec.to_config()) == model.spec
    tokens = model.encode(images())
    tokens[0, 5] = 24
    with pytest.raises(ValueError, match=r"0\.\.23"):
        model.decode(tokens)
    larger = torch.rand(1, 3, 24, 24) * 2 - 1
    tokens = model.encode(larger)
    assert tokens.shape == (1, 4 + 36)
    torch.testing.assert_close(model.decode(tokens, size=24), model(larger).images)


def test_cells_are_read_early():
    """The last `shift` cells reach no image; the one before them does; with shift 0 the last one does."""
    for shift in (0, 2):
        model = make("hita", shift=shift)
        tokens = model.encode(images())
        whole = model.decode(tokens)
        for place in range(-3, 0):
            other = tokens.clone()
            other[:, place] = (other[:, place] + 1) % 24
            assert torch.equal(model.decode(other), whole) == (-place <= shift)
    with pytest.raises(ValueError, match="shift=5"):
        hita(shift=5)


@torch.no_grad()
def test_order_of_the_decoder_is_causal():
    """What is read for cell j does not depend on cells after j - shift."""
    model = make("hita")
    z = torch.randn(1, 20, 6)
    read = {}
    model.decoder.register_forward_pre_hook(lambda _, inputs: read.__setitem__("map", inputs[0].flatten(2)))
    model.pixels(z)
    first = read["map"]
    changed = z.clone()
    changed[:, 4 + 7] += 1
    model.pixels(changed)
    moved = (read["map"] != first).any(1)[0]
    assert not moved[: 7 + 2].any() and moved[7 + 2 :].all()


@torch.no_grad()
def test_vision_queries_see_all_and_holistic_tokens_only_earlier_ones():
    model = make("hita_vision")
    holistic = torch.randn(2, 4, 16)
    seen = torch.ones(13, 13, dtype=torch.bool)
    seen[:4] = torch.ones(4, 13, dtype=torch.bool).tril()
    queries = (model.vision_query + resized(model.place, 3, 3)).expand(2, -1, -1)
    x = model.vision_norm(torch.cat([holistic, queries], 1))
    h = model.unfold.trunk(Inputs(x, torch.zeros(13).long(), mask=seen))
    torch.testing.assert_close(model.see(holistic), model.vision_out(h[:, 4:]))
    assert model(images()).features["alignment"].shape == (3, 9, 10)


# --- the quantiser of parts -------------------------------------------------------------------------------------------


def test_parts_are_coded_apart():
    torch.manual_seed(0)
    first, second = VQ(vocab_size=8, channels=3), FSQ(levels=(5, 5))
    joined = PartsQuantizer(quantizers=[first, second], counts=[2])
    a, b = torch.randn(2, 2, 3), torch.randn(2, 4, 2)
    z = joined.join_parts([a, b])
    assert z.shape == (2, 6, 3) and torch.equal(z[:, 2:, 2], torch.zeros(2, 4))
    found, one, two = joined(z), first(a), second(b)
    assert torch.equal(found.ids, torch.cat([one.ids, two.ids], 1)) and torch.equal(joined.indices(z), found.ids)
    for got, part in zip(joined.split_parts(found.z), (one, two)):
        assert torch.equal(got, part.z)
    assert torch.equal(joined.lookup(found.ids), found.codes)
    pair = PartsQuantizer(quantizers=[first, VQ(vocab_size=4, channels=2)], counts=[2])
    losses = pair(z).loss
    for name in ("codebook", "commitment"):
        torch.testing.assert_close(losses[name], one.loss[name] + pair.parts[1](b).loss[name])
    with pytest.raises(ValueError, match="counts"):
        PartsQuantizer(quantizers=[first, second], counts=[2, 4])
    with pytest.raises(ValueError, match="last part"):
        joined.lookup(found.ids[:, :2])
    with pytest.raises(ValueError, match="expected"):
        joined(z[..., :2])


# --- side tokens ------------------------------------------------------------------------------------------------------


class Constant(torch.nn.Module):
    def __init__(self, tokens: torch.Tensor) -> None:
        super().__init__()
        self.tokens = tokens

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.tokens.expand(len(images), -1, -1)


def test_side_tokens_are_needed_for_encoding_only():
    model = make("hita", side_channels=7)
    tokens = torch.zeros(1, 20).long()
    model.decode(tokens)
    with pytest.raises(ValueError, match="side_channels"):
        model.encode(images())
    torch.manual_seed(0)
    found = []
    for _ in range(2):
        model.side = Constant(torch.randn(1, 5, 7))
        found.append(model.features(images()))
    assert (found[0] - found[1]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="side needs"):
        hita(side=Constant(tokens))


def test_frozen_network_is_read_from_its_file_and_stays_outside(tmp_path):
    import timm

    side = DinoTokens(model=DINO, weights_path=str(tmp_path), size=28)
    model = hita(side=side, side_channels=384)
    with pytest.raises(ValueError, match=rf"{DINO}.safetensors .*weights_path=.*side=null"):
        model.encode(images())
    torch.manual_seed(0)
    net = timm.create_model(DINO, num_classes=0, img_size=28).eval()
    save_file(net.state_dict(), tmp_path / f"{DINO}.safetensors")
    tokens = side(images())
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        whole = net.forward_features(((resized_images(images(), 28) + 1) / 2 - mean) / std)
    torch.testing.assert_close(tokens, torch.cat([whole[:, :1], whole[:, 5:]], 1))
    assert tokens.shape == (3, 5, 384)
    model.encode(images())
    assert not any("side" in key for key in model.state_dict()) and not list(side.parameters())
    assert describe(model)["arguments"]["side"]["arguments"]["model"] == DINO


def test_resizing_keeps_a_ramp():
    """Corners are aligned: a ramp stays one and within [-1, 1], up to the error of torch's bicubic kernel
    (below 0.01; with corners that are not aligned 0.017 and more)."""
    for side in (20, 50):
        ramp = torch.linspace(-1, 1, side).expand(1, 3, side, side)
        found = resized_images(ramp, 28)
        expected = torch.linspace(-1, 1, 28).expand(1, 3, 28, 28)
        torch.testing.assert_close(found, expected, atol=0.01, rtol=0)
        assert found.abs().max() <= 1
        torch.testing.assert_close(resized_images(ramp.mT, 28), found.mT)
