"""The diagonal Gaussian bottleneck: against torch.distributions, and its keyed draws.

No reference available for KL training: the published autoencoder's class has no training step to record.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch.distributions import Normal, kl_divergence

from vtok.convert.kl import SCALE
from vtok.models.cnn import CNNTokenizer
from vtok.noise import SampleNoise
from vtok.quantize.kl import KL

KEYS = torch.tensor([5, 6, 7])


def test_divergence_and_loss():
    quantizer = KL(channels=3, kl_weight=0.01)
    z = torch.randn(3, 4, 5, 6, requires_grad=True)
    mean, deviation = z[..., :3], torch.exp(0.5 * z[..., 3:])
    want = kl_divergence(Normal(mean, deviation), Normal(torch.zeros(()), torch.ones(()))).flatten(1).sum(1)
    torch.testing.assert_close(quantizer.divergence(z), want)
    found = quantizer(z)
    torch.testing.assert_close(found.loss["kl"], 0.01 * want.mean())
    torch.testing.assert_close(found.z, mean)  # no noise: the mean
    far = torch.cat([torch.zeros(1, 2, 3), torch.tensor([-1e4, 1e4, 0.0]).expand(1, 2, 3)], -1)
    assert quantizer.posterior(far)[1][0, 0].tolist() == [-30, 20, 0]


def test_samples_have_the_posteriors_law_and_depend_on_the_key_alone():
    quantizer = KL(channels=2, scale=0.5)
    mean, log_variance = torch.tensor([1.0, -2.0]), torch.tensor([0.0, -1.0])
    z = torch.cat([mean, log_variance]).expand(3, 40, 50, 4)
    noise = SampleNoise(KEYS)
    found = quantizer(z, noise)
    torch.testing.assert_close(found.z.flatten(0, 2).mean(0), mean, atol=0.05, rtol=0)  # 6000 draws: 5 sigma
    torch.testing.assert_close(found.z.flatten(0, 2).var(0), log_variance.exp(), atol=0.1, rtol=0)
    assert torch.equal(quantizer(z[2:], SampleNoise(KEYS[2:])).z, found.z[2:])
    tokens = quantizer.tokens(z, noise)
    assert torch.equal(tokens, found.ids) and torch.equal(tokens, 0.5 * found.z.flatten(1, 2))
    assert torch.equal(quantizer.assemble(tokens).view_as(found.z), found.z)
    assert torch.equal(quantizer.lookup(tokens), tokens)
    with pytest.raises(ValueError, match="continuous"):
        quantizer.indices(z)
    with pytest.raises(ValueError, match="continuous"):
        quantizer.factors  # noqa: B018


def test_a_tokenizer_draws_in_training_and_encodes_the_same_with_the_same_noise():
    torch.manual_seed(0)
    shape = dict(channels=8, multipliers=[1, 2], blocks=1, groups=4, attention=False, mid_attention=False)
    module = CNNTokenizer(image_size=8, quantizer=KL(channels=3, scale=2.0), z_channels=None, **shape)
    images = torch.rand(3, 3, 8, 8)
    drawn = module(images, key=KEYS)
    assert torch.equal(drawn.tokens, module.encode(images, noise=SampleNoise(KEYS)))
    torch.testing.assert_close(module.decode(drawn.tokens), drawn.images)
    assert not torch.equal(module(images).tokens, module(images).tokens)  # no keys: fresh ones
    module.eval()
    assert torch.equal(module(images).tokens, module.encode(images))


def test_a_plain_autoencoder_neither_draws_nor_loses():
    quantizer = KL(channels=3, deterministic=True)
    z = torch.randn(3, 4, 6)
    found = quantizer(z, SampleNoise(KEYS))
    assert torch.equal(found.z, z[..., :3]) and not found.loss


def test_published_size():
    with torch.device("meta"):
        module = CNNTokenizer(
            image_size=256, quantizer=KL(channels=16, scale=0.2325), z_channels=None, decoder_attention=False
        )
    assert sum(p.numel() for p in module.parameters()) == 66_456_019
    assert not module.spec.discrete and module.spec.layout.length == 256 and module.spec.parts[0].channels == 16


@pytest.mark.parametrize("wrong", ({"channels": 0}, {"scale": 0.0}, {"kl_weight": -1.0}))
def test_mistakes_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        KL(**({"channels": 2} | wrong))
    with pytest.raises(ValueError, match=r"2 \* channels"):
        KL(channels=2)(torch.randn(1, 2, 2))


def test_the_scale_of_kl16_has_one_value():
    """The tokenizer's configuration and the converter of the published file, on which MAR, xAR and FlowAR train."""
    config = OmegaConf.load(Path(__file__).resolve().parents[1] / "configs" / "tokenizer" / "kl16.yaml")
    assert config.quantizer.scale == SCALE
