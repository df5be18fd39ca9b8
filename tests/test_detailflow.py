"""DetailFlow: resolutions of prefixes, who sees whom, corruption and repair, and the published sizes."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from runs import run
from safetensors.torch import save_file
from tokenizers import detailflow, images, make

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.convert import convert
from vtok.checkpoint import load_folder
from vtok.convert.detailflow import start_from_siglip2
from vtok.layers.resolution import decode_side, degrade, prefix_side, resize_table
from vtok.layout import SequenceLayout
from vtok.models import FAMILIES
from vtok.models.detailflow import DEGRADE, LENGTH
from vtok.noise import SampleNoise, host_uniforms
from vtok.quantize.fsq import FSQ

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "tokenizer"
KEYS = SampleNoise(torch.tensor([5, 6, 7]))
# R(t) at 256 px and p = 1.5, computed with the original
PUBLISHED = {
    128: {8: 21, 16: 44, 32: 88, 64: 164, 96: 223},
    256: {8: 11, 32: 46, 64: 89, 128: 165, 192: 223},
    512: {8: 6, 64: 46, 128: 89, 256: 165, 384: 224},
}


@pytest.mark.parametrize("tokens", PUBLISHED)
def test_resolutions_of_prefixes(tokens):
    sides = [prefix_side(t, tokens, 256, 1.5) for t in range(1, tokens + 1)]
    assert {t: sides[t - 1] for t in PUBLISHED[tokens]} == PUBLISHED[tokens]
    assert sides[0] == 1 and sides[-1] == 256 and sides == sorted(sides)
    assert [decode_side(s, 16) for s in (1, 16, 17, 223, 256)] == [16, 16, 32, 224, 256]


def test_degraded_images_keep_block_means_only():
    image = images()
    coarse = degrade(image, 4, 4)
    assert torch.allclose(coarse, image.unflatten(3, (4, 4)).unflatten(2, (4, 4)).mean((3, 5)))
    assert torch.equal(degrade(image, 16, 16), image)
    flat = degrade(image, 1, 8)
    torch.testing.assert_close(flat, image.mean((2, 3), keepdim=True).expand(-1, -1, 8, 8))
    table = torch.randn(16, 3)
    assert resize_table(table, 4, 4) is table
    torch.testing.assert_close(resize_table(torch.ones(16, 3), 2, 3), torch.ones(6, 3))
    with pytest.raises(ValueError, match="square"):
        resize_table(table[:15], 4, 4)


@torch.no_grad()
def test_latents_see_patches_earlier_groups_and_their_own():
    """The first group is causal, later ones see themselves whole. Patches see none: else latent 0 would change."""
    model = make("detailflow")
    before = model.features(images())
    for index, changed in ((0, range(8)), (1, range(1, 8)), (2, range(2, 8)), (3, range(2, 8)), (5, range(4, 8))):
        model.encoder.latents[index, 0] += 1.0  # of one channel: the norm undoes a shift of all
        after = model.features(images())
        model.encoder.latents[index, 0] -= 1.0
        found = ((before - after).abs() > 1e-5).any(2).any(0).nonzero().flatten().tolist()
        assert found == list(changed), index
    other = images()
    other[:, :, -1, -1] += 1.0
    assert bool(((before - model.features(other)).abs() > 1e-6).any(2).all())


@torch.no_grad()
def test_a_corruption_is_near_in_one_place_and_the_rest_is_written_anew():
    model = make("detailflow", correction=True)
    rows = 64
    noise = SampleNoise(torch.arange(rows))
    pictures = images().repeat(22, 1, 1, 1)[:rows]
    z = model.features(pictures)
    clean = model.quantizer.indices(z)
    for length, ends in ((8, {1, 2, 4, 6}), (4, {1, 2}), (2, {1, 2}), (1, {0})):
        counts = torch.full((rows,), length)
        ids, start, end = model.corrupt(z, clean, counts, noise)
        assert set(end.tolist()) == ends, length
        for row in range(rows):
            a, b = int(start[row]), int(end[row])
            if b == 0:
                assert torch.equal(ids[row], clean[row])
                continue
            outside = torch.ones(8, dtype=torch.bool)
            outside[a:b] = False
            assert torch.equal(ids[row][outside], clean[row][outside]) and b - a == (1 if a < 2 else 2)
            near = model.quantizer.near(z[row, a:b], 4)
            assert bool((near == ids[row, a:b, None]).any(1).all())
    clean, given, wanted = model.corrupted(pictures, noise)
    ids, start, end = model.corrupt(z, clean, torch.full((rows,), 8), noise)
    assert bool((ids != clean).any())
    for row in range(rows):
        b = int(end[row])
        assert torch.equal(given[row, :b], ids[row, :b]) and torch.equal(wanted[row, :b], clean[row, :b])
        assert torch.equal(given[row, b:], wanted[row, b:])
        again = model.encode(pictures[row : row + 1], prefix=given[row : row + 1, :b])
        assert torch.equal(again[0], given[row])


def test_training_decodes_clean_and_repaired_tokens_and_judges_what_it_wrote():
    model = make("detailflow", correction=True, degradation=0.0).train()
    keys = torch.tensor([1, 2, 3])
    recon = model(images(), key=keys)
    assert recon.images.shape == (6, 3, 16, 16) and torch.equal(recon.targets, images().repeat(2, 1, 1, 1))
    z = model.features(images())
    found = model.quantizer(z)
    torch.testing.assert_close(recon.images[:3], model.pixels(found.z))
    ids, _, end = model.corrupt(z, found.ids, torch.full((3,), 8), SampleNoise(keys))
    second = model.refine(images(), model.quantizer.lookup(ids), end)
    unit, again = F.normalize(z, dim=-1), F.normalize(second, dim=-1)
    judged = torch.arange(8) >= end[:, None]
    errors = [(unit - found.codes.detach()).square().mean(-1).flatten()]
    codes = model.quantizer.lookup(model.quantizer.indices(second))
    errors.append((again - codes).square().mean(-1)[judged])
    want = 0.25 * torch.cat(errors).mean()  # both passes, every token that the encoder wrote counted once
    torch.testing.assert_close(recon.losses["commitment"], want, rtol=1e-4, atol=1e-7)
    mixed = torch.where(judged[..., None], codes, model.quantizer.lookup(ids))
    torch.testing.assert_close(recon.images[3:], model.pixels(mixed), rtol=1e-4, atol=1e-5)
    (recon.images.square().mean() + sum(recon.losses.values())).backward()
    assert all(p.grad is not None for p in model.parameters())


def lengths_of(model, keys: torch.Tensor) -> torch.Tensor:
    """Of the samples with these keys, int64 [B]."""
    place = torch.zeros(1, dtype=torch.int64)
    return model.draw_length(*(SampleNoise(keys).uniform(place, s)[:, 0] for s in (LENGTH, DEGRADE))).long()


def test_prefixes_train_on_their_resolution_whatever_the_batch():
    model = make("detailflow", degradation=1.0).train()
    keys = torch.arange(24)
    lengths = lengths_of(model, keys)
    assert set(lengths.tolist()) == {1, 2, 4, 6}
    pictures = images().repeat(8, 1, 1, 1)
    recon = model(pictures, key=keys)
    given = model(pictures, key=keys, host_key=keys.numpy())
    assert torch.equal(given.images, recon.images) and torch.equal(given.targets, recon.targets)
    alone = model(pictures[5:6], key=keys[5:6])
    torch.testing.assert_close(alone.images, recon.images[5:6], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(alone.targets, recon.targets[5:6])
    for row, length in enumerate(lengths.tolist()):
        side = prefix_side(length, 8, 16, 1.5)
        small = degrade(pictures[row : row + 1], side, model.side_of(length))
        want = F.interpolate(small, size=(16, 16), mode="bilinear", align_corners=False)
        torch.testing.assert_close(recon.targets[row : row + 1], want)
    few = make("detailflow", degradation=0.2)
    drawn, most = lengths_of(few, torch.arange(4000)), few.tokens - few.group
    assert float((drawn < 8).float().mean()) == pytest.approx(0.2, abs=0.03)
    numbers = (host_uniforms(np.arange(4000), 1, stream)[:, 0] for stream in (LENGTH, DEGRADE))
    assert np.array_equal(few.draw_length(*numbers), drawn.numpy()), "the host knows what the device drew"
    for place, length in ((1e-9, 1), (1 / 6, 2), (2 / 6 + 1e-3, 4), (1.0, most)):  # 1 .. 6, from 3 on in whole groups
        assert float(few.draw_length(torch.tensor([place]), torch.tensor([0.1]))) == length


@torch.no_grad()
def test_prefixes_are_decoded_at_the_side_at_which_they_trained():
    model = make("detailflow")
    tokens = model.encode(images())
    sides = {1: 4, 2: 4, 4: 12, 6: 16, 8: 16}  # R(k) of 8 tokens at 16 px is 1, 4, 9, 13, 16; in whole patches of 4
    made = {}
    for keep, side in sides.items():
        small = model.pixels(model.embed(tokens[:, :keep]), size=side)
        made[keep] = model.decode(tokens, keep=keep)
        torch.testing.assert_close(made[keep], F.interpolate(small, size=(16, 16), mode="bilinear"))
        assert torch.equal(model.decode(tokens, keep=keep, size=16), made[keep])
    assert torch.equal(made[8], model.decode(tokens)) and made[8].shape == model.decode(tokens, keep=1, size=16).shape
    assert model.side_of(4, 32) == 20 and torch.equal(
        model.decode(tokens, keep=4, size=32),
        F.interpolate(model.pixels(model.embed(tokens[:, :4]), size=20), size=(32, 32), mode="bilinear"),
    )
    mixed = model.decode(tokens, keep=torch.tensor([6, 1, 4]))
    for row, keep in enumerate((6, 1, 4)):
        torch.testing.assert_close(mixed[row], made[keep][row], rtol=1e-4, atol=1e-5)


def test_the_correction_weighs_processes_as_one_batch(monkeypatch):
    """Two processes judge unequal numbers of tokens: the mean of their losses is the loss of the whole batch."""
    model = detailflow(correction=True, degradation=0.5).train()
    pictures, key, counts = images(4), torch.tensor([5, 6, 8, 9]), []

    def losses(rows: slice) -> dict[str, float]:
        return {k: float(v.detach()) for k, v in model(pictures[rows], key=key[rows]).losses.items()}

    def all_mean(value: torch.Tensor) -> torch.Tensor:
        counts.append(float(value))
        return value if len(counts) <= 4 else value.new_tensor(mean)

    whole = losses(slice(None))
    for module in ("vtok.quantize.vq", "vtok.models.detailflow"):
        monkeypatch.setattr(f"{module}.all_mean", all_mean)
    halves = slice(0, 2), slice(2, 4)
    for half in halves:  # each pass asks twice: in the quantizer, and for the share of the second pass
        losses(half)
    assert counts[0] == counts[1] != counts[2] == counts[3]
    mean = (counts[0] + counts[2]) / 2
    found = [losses(half) for half in halves]
    for name, value in whole.items():
        assert sum(part[name] for part in found) / 2 == pytest.approx(value, rel=1e-5), name


def test_mistakes_are_named():
    for wrong, word in ((dict(group=3), "group"), (dict(causal=1), "causal"), (dict(causal=8), "causal")):
        with pytest.raises(ValueError, match=word):
            detailflow(**wrong)
    with pytest.raises(ValueError, match="correction"):
        type(detailflow())(image_size=16, quantizer=FSQ(levels=(5, 4, 3)), tokens=8, group=2, patch=4)
    model = detailflow()
    with pytest.raises(ValueError, match="correction=true"):
        model.encode(images(), prefix=torch.zeros(3, 2).long())
    with pytest.raises(ValueError, match="layout"):
        model.encode(images(), prefix=torch.zeros(3, 2).long(), layout=SequenceLayout.raster(2, 4))
    with pytest.raises(ValueError, match="keep=9"):
        model.decode(torch.zeros(1, 8).long(), keep=9)


def siglip2_state(width: int, patch: int, hidden: int, places: int, layers: int) -> dict[str, torch.Tensor]:
    """A SigLIP2 file of these sizes."""
    torch.manual_seed(0)
    state = {"vision_model.embeddings.patch_embedding.weight": torch.randn(width, patch * patch * 3)}
    state |= {"vision_model.embeddings.patch_embedding.bias": torch.randn(width)}
    state |= {"vision_model.embeddings.position_embedding.weight": torch.randn(places, width)}
    for name in ("post_layernorm", *(f"encoder.layers.{i}.layer_norm{j}" for i in range(layers) for j in (1, 2))):
        state |= {f"vision_model.{name}.{k}": torch.randn(width) for k in ("weight", "bias")}
    for i in range(layers):
        at = f"vision_model.encoder.layers.{i}"
        for name, (rows, columns) in {"fc1": (hidden, width), "fc2": (width, hidden)}.items():
            state |= {f"{at}.mlp.{name}.weight": torch.randn(rows, columns), f"{at}.mlp.{name}.bias": torch.randn(rows)}
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            state |= {f"{at}.self_attn.{name}.weight": torch.randn(width, width)}
            state |= {f"{at}.self_attn.{name}.bias": torch.randn(width)}
    return state | {"vision_model.head.probe": torch.randn(1, 1, width), "text_model.final": torch.randn(3)}


def test_the_encoder_starts_from_siglip2():
    state = siglip2_state(16, 4, 24, 16, 3)  # one layer more than the encoder has
    model = start_from_siglip2(detailflow(), state)
    kernel = state["vision_model.embeddings.patch_embedding.weight"]
    pixels = images()[:, :, :4, :4].permute(0, 2, 3, 1).flatten(1)  # rows, columns, colours
    want = pixels @ kernel.T + state["vision_model.embeddings.patch_embedding.bias"]
    torch.testing.assert_close(model.encoder.patches(images())[:, 0], want, rtol=1e-4, atol=1e-5)
    norm = model.encoder.trunk.blocks[1].norm2.weight
    assert torch.equal(norm, state["vision_model.encoder.layers.1.layer_norm2.weight"])
    del state["vision_model.encoder.layers.1.mlp.fc1.bias"]
    with pytest.raises(ValueError, match="do not fit"):
        start_from_siglip2(detailflow(), state)


def test_its_folder_is_written_by_a_command_and_its_absence_said(tmp_path, monkeypatch, capsys):
    state = siglip2_state(128, 8, 512, 16, 5)
    save_file(state, tmp_path / "model.safetensors")
    given = {"from": tmp_path / "model.safetensors", "family": "siglip2", "start": "detailflow_small"}
    with initialize_config_dir(str(CONFIGS.parent), version_base="1.3"):
        options = [*(f"{k}={v}" for k, v in given.items()), "image_size=32", f"out={tmp_path / 'start'}"]
        folder = convert(compose("convert", overrides=options))
    module = load_folder(folder, FAMILIES)
    norm = module.encoder.trunk.blocks[3].norm1.bias
    assert torch.equal(norm, state["vision_model.encoder.layers.3.layer_norm1.bias"])

    training = [
        "data=fake",
        "data.image_size=32",
        "data.train_images=8",
        "data.val_images=4",
        "batch_size=4",
        "steps=1",
    ]
    training += ["tokenizer=detailflow_small", "ema=null", "picture_every=null", "bar=false", "trainer=cpu"]
    run(*training, f"run_dir={tmp_path / 'a'}")
    assert "SigLIP2" not in capsys.readouterr().out  # a small one is not meant to have them
    monkeypatch.setattr("vtok.models.detailflow.SIGLIP2", 128)
    run(*training, f"run_dir={tmp_path / 'b'}")
    assert capsys.readouterr().out.count("note: DetailFlow's encoder starts without SigLIP2's weights") == 1
    run(*training, f"run_dir={tmp_path / 'c'}", f"init_from={folder}")
    assert "note: DetailFlow" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ("128", "256", "512", "small"))
def test_published_and_small_sizes(name):
    """Encoder and decoder of 128 tokens as counted on the original; more tokens add rows of five tables only."""
    path = CONFIGS / f"detailflow_{name}.yaml"
    config = OmegaConf.merge({"data": {"image_size": 32 if name == "small" else 256}}, {"t": OmegaConf.load(path)}).t
    with torch.device("meta"):
        model = instantiate(config, _convert_="all")
    count, encoder, decoder = (sum(p.numel() for p in m.parameters()) for m in (model, model.encoder, model.decoder))
    stated = re.search(r"([\d,]+) parameters", path.read_text())[1]
    assert f"{count:,}" == stated
    if name == "small":
        assert 1e6 < count < 8e6
        return
    more = int(name) - 128
    assert "SigLIP2" in model.fresh_start()
    assert (encoder, decoder) == (184_499_520 + 3 * 1152 * more, 85_942_272 + 768 * more)
    assert model.spec.layout.sizes == (1,) * 8 + (8,) * (int(name) // 8 - 1)
