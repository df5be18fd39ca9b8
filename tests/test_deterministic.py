"""trainer.deterministic=true on a GPU: no training meets an operation whose gradient PyTorch refuses there."""

import generators
import pytest
import tokenizers
import torch
import torch.nn.functional as F
from fake_cuda import fake_cuda
from tape import Watch
from test_waits import TOKENIZERS, trained
from torch import Tensor, nn

from vtok.layers import resolution
from vtok.layers.resolution import interpolate, must_repeat
from vtok.layers.vit import cell_means
from vtok.losses import augment, discriminators
from vtok.losses.discriminators import MaskBitDiscriminator, mirrored
from vtok.models.hita import resized
from vtok.noise import sample_seeds

REFUSED = (
    "adaptive_avg_pool2d_backward", "adaptive_max_pool2d_backward", "reflection_pad", "replication_pad", "grid_sampler",
    "upsample_bicubic2d_backward", "upsample_bicubic2d_aa_backward", "upsample_bilinear2d_aa_backward", "max_pool3d",
    "avg_pool3d", "nll_loss2d", "kthvalue", "median", "histc", "ctc_loss", "max_unpool", "index_reduce",
)  # fmt: skip


def refused(*values: Tensor) -> set[str]:
    """Operations in the backward passes of the sum of squares."""
    seen: set[str] = set()
    with Watch(lambda function, *_: seen.add(str(function))):
        sum(value.float().square().mean() for value in values if value.requires_grad).backward()
    return {name for name in seen if any(part in name for part in REFUSED)}


@pytest.fixture
def strict(monkeypatch):
    """As on a GPU with deterministic algorithms."""
    for module in (resolution, discriminators):
        monkeypatch.setattr(module, "must_repeat", lambda x: torch.is_grad_enabled() and x.requires_grad)


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_tokenizers_train_without_what_is_refused(name, strict, monkeypatch):
    monkeypatch.setattr(tokenizers, "FAMILIES", TOKENIZERS)
    model = tokenizers.make(name).train()
    recon = model(tokenizers.images(3), key=sample_seeds(0, 0, 3), progress=0.02)
    features = [value for value in recon.features.values() if isinstance(value, Tensor)]
    assert refused(*recon.losses.values(), *features, *([] if recon.images is None else [recon.images])) == set()


@pytest.mark.parametrize("name", generators.FAMILIES)
def test_generators_train_without_what_is_refused(name, strict):
    model, batch = trained(name)
    assert refused(model.loss(batch, progress=0.5)["loss"]) == set()


MAPS = {  # what PyTorch has, of maps 12 x 10
    "bicubic": lambda x, f: f(x, (7, 15), mode="bicubic"),
    "bicubic, aligned": lambda x, f: f(x, (7, 15), mode="bicubic", align_corners=True),
    "bicubic, scaled": lambda x, f: f(x, mode="bicubic", scale_factor=(15.1 / 12, 20.1 / 10)),
    "antialiased": lambda x, f: f(x, (5, 15), mode="bilinear", align_corners=False, antialias=True),
    "area": lambda x, f: f(x, (5, 4), mode="area"),
    "one number": lambda x, f: f(x, 8, mode="area"),
}


@pytest.mark.parametrize("name", MAPS)
def test_two_products_are_the_interpolation(name, strict):
    x = torch.randn(2, 3, 12, 10, dtype=torch.float64, requires_grad=True)
    want, got = (MAPS[name](x, function) for function in (F.interpolate, interpolate))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(want)
    gradients = [torch.autograd.grad((y * weights).sum(), x)[0] for y in (want, got)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)
    assert refused(MAPS[name](x, interpolate)) == set() != refused(MAPS[name](x, F.interpolate))
    plain = x.detach().float()
    assert torch.equal(MAPS[name](plain, interpolate), MAPS[name](plain, F.interpolate))
    assert MAPS[name](x.bfloat16(), interpolate).dtype is torch.bfloat16


def test_other_places_are_the_same_numbers_either_way(strict):
    x = torch.randn(2, 32, 12, 12, requires_grad=True)
    table = nn.Parameter(torch.randn(16, 4))
    places = {
        "cells": lambda: cell_means(x, 5, 7),
        "augment": lambda: augment.resize(x, 8),
        "table": lambda: resized(table, 5, 6),
        "edges": lambda: mirrored(x),
    }
    for name, place in places.items():
        assert refused(place()) == set(), name
        with torch.no_grad():
            plain = place()
        torch.testing.assert_close(place().detach(), plain, rtol=1e-5, atol=1e-6, msg=name)
    network = MaskBitDiscriminator(width=8, stages=1, groups=4, patches=3)
    images = torch.randn(2, 3, 12, 12)
    assert refused(network(images)) == set()
    h = torch.randn(2, 8, 6, 6)
    assert torch.equal(network._largest(h), F.adaptive_max_pool2d(h, 3))
    with pytest.raises(ValueError, match=r"map of 8 x 8 overlap.*set objective\.gan\.discriminator\.patches"):
        network(torch.randn(2, 3, 16, 16))


def test_only_gradients_on_a_gpu_have_to_repeat():
    assert not must_repeat(torch.ones(1, requires_grad=True))
    torch.use_deterministic_algorithms(True)
    try:
        assert not must_repeat(torch.ones(1, requires_grad=True)), "the CPU repeats every gradient"
        with fake_cuda(nn.Linear(1, 1), {"x": torch.ones(1), "w": nn.Parameter(torch.ones(1))}) as batch:
            assert must_repeat(batch["w"]) and not must_repeat(batch["x"])
            with torch.no_grad():
                assert not must_repeat(batch["w"])
            torch.use_deterministic_algorithms(False)
            assert not must_repeat(batch["w"])
    finally:
        torch.use_deterministic_algorithms(False)
