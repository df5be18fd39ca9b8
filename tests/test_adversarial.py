"""Discriminators against recorded outputs of the originals, augmentation by brute force, the GAN's options."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from drawn import dino_state, draw, ramp
from torch import nn

from vtok.losses.adversarial import LeCam, adaptive_weight
from vtok.losses.augment import DiffAug
from vtok.losses.dino import FILE, DinoDiscriminator, LocalBatchNorm, resample
from vtok.losses.discriminators import MaskBitDiscriminator, PatchGAN, StyleGANDiscriminator, blur, spread
from vtok.losses.gan import GAN
from vtok.losses.objective import TokenizerObjective
from vtok.losses.transformer_discriminator import TransformerDiscriminator
from vtok.noise import SampleNoise
from vtok.tokenizer import Reconstruction

RECORDED = json.loads((Path(__file__).parent / "references" / "discriminators.json").read_text())


def check(name: str, module: nn.Module) -> None:
    """Our logits on drawn weights are those that the original computed on the same ones."""
    record = RECORDED[name]
    with torch.no_grad():
        logits = module(ramp(record["batch"], record["side"])).flatten()[:: record.get("every", 1)]
    want = torch.tensor(record["logits"])
    # 1e-4 of the largest: float32 sums in another order
    assert (logits - want).abs().max() <= 1e-4 * want.abs().max()
    assert want.std() > 1e-3 * want.abs().max()  # a record that could be a constant would show nothing


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dino")
    torch.save(dino_state(seed=RECORDED["dino"]["weights_seed"], depth=3), folder / FILE)
    return folder


def test_stylegan_is_llamagens():
    check("stylegan", draw(StyleGANDiscriminator(**RECORDED["stylegan"]["arguments"]), RECORDED["stylegan"]["seed"]))


def test_maskbit_is_titoks():
    check("maskbit", draw(MaskBitDiscriminator(**RECORDED["maskbit"]["arguments"]), RECORDED["maskbit"]["seed"]))


def test_dino_is_gigatoks(dino_folder):
    module = DinoDiscriminator(weights_path=dino_folder, **RECORDED["dino"]["arguments"])
    check("dino", draw(module, RECORDED["dino"]["seed"]).eval())


def test_published_sizes():
    with torch.device("meta"):
        counts = [
            sum(p.numel() for p in m.parameters())
            for m in (PatchGAN(), StyleGANDiscriminator(), MaskBitDiscriminator())
        ]
    assert counts == [2_765_633, 36_500_225, 1_909_889]


def test_dino_stays_out_of_checkpoints_and_passes_gradients(dino_folder):
    module = DinoDiscriminator(weights_path=dino_folder / FILE, depths=(0, 2), depth=3, size=32)
    assert sum(p.numel() for p in module.parameters()) == 3 * 1_477_249  # 5 heads published: 7.39 M
    assert all(name.startswith("heads.") for name in module.state_dict())
    module.train()
    assert not module.features.net.training
    images = ramp(2, 32).requires_grad_()
    module(images).sum().backward()
    assert images.grad.abs().sum() > 0 and all(p.grad is None for p in module.features.net.parameters())
    assert module(ramp(2, 32)).shape == (2, 3 * 4)
    assert module.to(torch.float64).features.net.patches.weight.dtype == torch.float64


def test_missing_and_foreign_dino_weights_are_named(tmp_path):
    with pytest.raises(ValueError, match=rf"{FILE} \(83 MB\) in {tmp_path}: get it from https://.*weights_path="):
        DinoDiscriminator(weights_path=tmp_path)
    torch.save({"head.weight": torch.zeros(1)}, tmp_path / FILE)
    with pytest.raises(ValueError, match="not DINO's weights"):
        DinoDiscriminator(weights_path=tmp_path)
    with pytest.raises(ValueError, match="depths"):
        DinoDiscriminator(depths=(3, 12))
    with pytest.raises(ValueError, match="size"):
        DinoDiscriminator(size=100)


def test_positions_resize_as_an_image():
    table = torch.randn(1, 1 + 9, 2)
    assert resample(table, 3) is table
    small = resample(table, 6)
    torch.testing.assert_close(small[:, :1], table[:, :1])
    want = F.interpolate(table[:, 1:].transpose(1, 2).reshape(1, 2, 3, 3), size=6, mode="bilinear")
    torch.testing.assert_close(small[0, 1:], want[0].flatten(1).T)


def test_local_batch_norm_is_batch_norm_of_each_run():
    x = torch.randn(10, 3, 5)
    module = LocalBatchNorm(3, 8)  # 10 images: two runs of 5
    want = torch.cat([nn.BatchNorm1d(3, eps=1e-6)(part) for part in (x[:5], x[5:])])
    torch.testing.assert_close(module(x), want)


def test_blur_and_spread_by_hand():
    image = torch.zeros(1, 1, 5, 5)
    image[0, 0, 2, 2] = 16.0
    torch.testing.assert_close(
        blur(image, (1, 2, 1)), torch.tensor([[[[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]]]])
    )
    x = torch.tensor([0.0, 2.0, 5.0]).view(3, 1, 1, 1)
    torch.testing.assert_close(spread(x, 2).flatten(), torch.tensor([1.0, 1.0, 1e-4]))  # (0, 2), then 5 alone
    assert StyleGANDiscriminator(image_size=8, width=1, minibatch_std=2)(ramp(3, 8)).shape == (3, 1)
    with pytest.raises(ValueError, match="image_size"):
        StyleGANDiscriminator(image_size=24)


def test_the_transformer_sees_every_patch_and_where_it_is():
    torch.manual_seed(0)
    module = TransformerDiscriminator(patch=4, width=16, depth=2, heads=2)
    image = ramp(2, 8).requires_grad_()
    logits = module(image)
    assert logits.shape == (2, 1)
    logits[0].sum().backward()
    assert (image.grad[0].abs().sum(0) > 0).all() and not image.grad[1].any()
    swapped = torch.cat([ramp(2, 8)[..., 4:], ramp(2, 8)[..., :4]], -1)  # the same patches elsewhere
    assert (module(swapped) - logits).abs().min() > 1e-4
    with torch.device("meta"):
        published = sum(p.numel() for p in TransformerDiscriminator().parameters())
    layer = 12 * 512**2 + 13 * 512  # four and eight squares, their biases, two norms
    assert published == 3 * 256 * 512 + 512 + 512 + 12 * layer + 1024 + 513
    with pytest.raises(ValueError, match="heads"):
        TransformerDiscriminator(width=10)


# --- augmentation ---------------------------------------------------------------------------------------------------


def noise(count: int = 4) -> SampleNoise:
    return SampleNoise(torch.arange(count) * 1_000_003 + 7)


UNIT = pytest.mark.parametrize("unit", [False, True])  # ResTok's, on pixels in [0, 1]


@UNIT
def test_translation_and_cutout_by_loops(unit):
    images = ramp(6, 16)
    drawn = noise(6).uniform(torch.arange(14))
    moved = DiffAug(color=False, cutout=0.0, unit=unit)(images, noise(6))
    holed = DiffAug(color=False, translation=0.0, cutout=0.25, unit=unit)(images, noise(6))
    fill, near = torch.full((3,), -1.0 if unit else 0.0), {"rtol": 0, "atol": 1e-6 if unit else 0}
    for b in range(6):
        down, right = (int(drawn[b, i] * 5) - 2 for i in (6, 7))  # round(16 / 8) = 2 in either direction
        top, left = (int(drawn[b, i] * 17) - 2 for i in (8, 9))
        for y in range(16):
            for x in range(16):
                inside = 0 <= y + down < 16 and 0 <= x + right < 16
                want = images[b, :, y + down, x + right] if inside else fill
                assert torch.allclose(moved[b, :, y, x], want, **near)
                hole = top <= y < top + 4 and left <= x < left + 4
                assert torch.allclose(holed[b, :, y, x], fill if hole else images[b, :, y, x], **near)


@UNIT
def test_colour_is_the_formula(unit):
    images = ramp(3, 8)
    found = DiffAug(translation=0.0, cutout=0.0, unit=unit)(images, noise(3))
    found = (found + 1) / 2 if unit else found
    drawn = noise(3).uniform(torch.arange(14))
    for b in range(3):
        x = ((images[b] + 1) / 2 if unit else images[b]) + (drawn[b, 3] - 0.5)
        x = (x - x.mean(0)) * 2 * drawn[b, 4] + x.mean(0)
        x = (x - x.mean()) * (drawn[b, 5] + 0.5) + x.mean()
        torch.testing.assert_close(found[b], x)


def test_views_are_crops_or_the_whole_image():
    images = ramp(16, 24)
    found = DiffAug(prob=0.0, size=16, crop=0.5)(images, noise(16))
    whole = F.interpolate(images, size=(16, 16), mode="area")
    crops = images.unfold(2, 16, 1).unfold(3, 16, 1)  # [B, 3, 9, 9, 16, 16]
    kinds = []
    for b in range(16):
        is_whole = torch.equal(found[b], whole[b])
        is_crop = bool((crops[b] == found[b][:, None, None]).all(-1).all(-1).all(0).any())
        assert is_whole != is_crop
        kinds.append(is_crop)
    assert 3 <= sum(kinds) <= 13
    assert DiffAug(prob=0.0, size=32)(images, noise(16)).shape[-1] == 32


def test_an_augmentation_belongs_to_its_sample():
    images, aug = ramp(4, 16), DiffAug(prob=0.5)
    together = aug(images, noise(), 3)
    for b in range(4):
        assert torch.equal(aug(images[b : b + 1], noise().rows(slice(b, b + 1)), 3)[0], together[b])
    assert not torch.equal(aug(images, noise(), 4), together)
    images.requires_grad_()
    aug(images, noise()).sum().backward()
    assert images.grad.abs().sum() > 0
    for options, word in (({"prob": 2.0}, "prob"), ({"crop": 0.5}, "size")):
        with pytest.raises(ValueError, match=word):
            DiffAug(**options)


# --- the GAN's options ----------------------------------------------------------------------------------------------


def gan(**options) -> GAN:
    torch.manual_seed(0)
    return GAN(**{"discriminator": PatchGAN(width=4, layers=1), "start": 10} | options)


def test_when_it_acts():
    module = gan(weight=0.5, ramp=4, every=3)
    assert [module.active(s) for s in (9, 10, 99)] == [False, True, True]
    assert [s for s in range(20) if module.learns(s)] == [10, 13, 16, 19]
    assert [module.strength(s) for s in (9, 10, 11, 12, 13, 14)] == [0, 0.125, 0.25, 0.375, 0.5, 0.5]
    assert gan(weight=0.5).strength(10) == 0.5
    turns = gan(alternate=True)
    assert [s for s in range(18) if turns.learns(s)] == [11, 13, 15, 17]
    objective = TokenizerObjective(perceptual_weight=0, gan=turns)
    assert [s for s in range(18) if not objective.tokenizer_learns(s)] == [11, 13, 15, 17]
    assert all(TokenizerObjective(perceptual_weight=0, gan=gan()).tokenizer_learns(s) for s in range(18))
    for other in ({"every": 2}, {"first": "discriminator"}):
        with pytest.raises(ValueError, match=r"gan\.alternate"):
            gan(alternate=True, **other)


def test_two_losses_for_two_players():
    module = gan(loss="hinge", generator_loss="non_saturating").eval()
    images, fakes = ramp(2, 16), ramp(2, 16).flip(0)
    logits = module.discriminator(fakes)
    loss, _ = module.judge(fakes, torch.zeros(()), None, 10, None)
    torch.testing.assert_close(loss, 0.5 * F.softplus(-logits).mean())
    want = 0.5 * (F.relu(1 - module.discriminator(images)).mean() + F.relu(1 + logits).mean())
    torch.testing.assert_close(module.train_loss(images, fakes, None)[0], want)
    assert gan(loss="softplus").train_loss(images, fakes, None)[0] > 0


def test_consistency_is_the_difference_of_two_views():
    weak, strong = DiffAug(prob=0.0), DiffAug(prob=1.0, translation=0.0, cutout=0.5)
    module = gan(augment=weak, strong=strong, consistency_weight=4.0).eval()
    images, fakes, key = ramp(2, 16), ramp(2, 16).flip(0), torch.tensor([5, 6])
    loss, logs = module.train_loss(images, fakes, key)
    plain, _ = gan(augment=weak).eval().train_loss(images, fakes, key)
    torch.testing.assert_close(loss - plain, logs["consistency"])
    d = module.discriminator
    squares = [
        (d(x) - d(strong(x, SampleNoise(key), stream))).square().mean() for x, stream in ((images, 403), (fakes, 404))
    ]
    torch.testing.assert_close(logs["consistency"], 4 * sum(squares) / 2)


def test_without_augmentation_nothing_is_drawn():
    module, images = gan(), ramp(2, 16)
    before = torch.get_rng_state()
    module.train_loss(images, images, None)
    module.judge(images, torch.zeros(()), None, 10, None)
    assert torch.equal(torch.get_rng_state(), before)


def test_spectral_norm_and_frozen_judging_go_together(dino_folder):
    """Judging moves the power iteration's vectors but leaves no gradient in the discriminator."""
    module = GAN(discriminator=DinoDiscriminator(weights_path=dino_folder, depths=(2,), depth=3, size=32), start=0)
    fakes = ramp(2, 32).requires_grad_()
    loss, _ = module.judge(fakes, torch.zeros(()), None, 0, None)
    loss.backward()
    assert fakes.grad.abs().sum() > 0 and all(p.grad is None for p in module.parameters())
    module.train_loss(ramp(2, 32), fakes, None)[0].backward()
    assert all(p.grad is not None for p in module.parameters())


def test_lecam_forgets_what_is_not_finite():
    module = gan(lecam_weight=0.1)
    module.lecam(torch.tensor([float("nan")]), torch.tensor([1.0]))
    assert module.lecam.real.item() == 0 and module.lecam.fake.item() == pytest.approx(0.001)


# --- plug-ins -------------------------------------------------------------------------------------------------------


class Extra(nn.Module):
    """A plug-in that shows what it was given."""

    def __init__(self, label: str = "extra") -> None:
        super().__init__()
        self.label, self.seen = label, []

    def forward(self, recon, images, *, step, progress, key, tokenizer):
        self.seen.append((step, progress))
        return {self.label: 0.5 * recon.images.square().mean()}


def test_terms_and_own_weights_enter_the_sum():
    images = ramp(2, 8)
    recon = Reconstruction(images * 0.5, torch.zeros(2, 1).long(), {"commitment": torch.tensor(3.0)})
    term = Extra()
    objective = TokenizerObjective(perceptual_weight=0.0, own_weights={"commitment": 2.0}, terms={"x": term})
    loss, logs = objective.generator_loss(recon, images, None, 5, progress=0.25)
    extra = 0.5 * recon.images.square().mean()
    torch.testing.assert_close(loss, F.mse_loss(recon.images, images) + 6 + extra)
    torch.testing.assert_close(logs["extra"], extra)
    objective.validation(recon, images)
    assert term.seen[0] == (5, 0.25) and term.seen[1][1] == 1.0
    assert not TokenizerObjective(perceptual_weight=0.0, terms={"a": None}).terms  # objective.terms.a=null
    twice = TokenizerObjective(perceptual_weight=0.0, terms={"a": Extra(), "b": Extra()})
    with pytest.raises(ValueError, match="two losses are called extra"):
        twice.generator_loss(recon, images, None, 5)


# --- two processes --------------------------------------------------------------------------------------------------


def measured(images: torch.Tensor) -> torch.Tensor:
    """Adaptive weight and LeCam's means of a batch, with fixed weights."""
    torch.manual_seed(0)
    decoder, critic = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 1, 1)
    made = decoder(images)
    weight = adaptive_weight((made - images).square().mean(), critic(made).square().mean(), decoder.weight)
    lecam = LeCam(decay=0.5)
    lecam(critic(images), critic(made).detach())
    return torch.stack([weight, lecam.real, lecam.fake]).detach()


def worker(rank: int, folder: str) -> None:
    """One of two processes: measures its half of the batch."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    images = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    torch.save(measured(images[rank * 4 : rank * 4 + 4]), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_measure_what_one_does(tmp_path):
    here = Path(__file__)
    environment = os.environ | {"PYTHONPATH": str(here.parents[1]), "GLOO_SOCKET_IFNAME": "lo"}
    running = [
        subprocess.Popen([sys.executable, str(here), str(rank), str(tmp_path)], env=environment) for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    whole = measured(torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(1)))
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), whole, rtol=1e-5, atol=1e-7)


if __name__ == "__main__":
    worker(int(sys.argv[1]), sys.argv[2])
