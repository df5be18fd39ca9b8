"""Small tokenizers of every family, on random weights, for the tests that loop over families."""

from __future__ import annotations

import torch

from vtok.models.cnn import CNNTokenizer
from vtok.models.var import VARTokenizer
from vtok.quantize.fsq import FSQ
from vtok.quantize.residual import MultiScaleVQ
from vtok.quantize.vq import VQ
from vtok.tokenizer import Tokenizer

SIZE = 16
CNN = dict(channels=8, multipliers=(1, 1, 2), blocks=1, attention=False, mid_attention=False, groups=4)


def cnn_vq(**options) -> CNNTokenizer:
    quantizer = VQ(vocab_size=32, channels=6, l2_norm=True)
    return CNNTokenizer(image_size=SIZE, quantizer=quantizer, z_channels=8, **(CNN | options))


def cnn_fsq(**options) -> CNNTokenizer:
    return CNNTokenizer(image_size=SIZE, quantizer=FSQ(levels=(5, 4, 3)), z_channels=8, **(CNN | options))


def var(**options) -> VARTokenizer:
    quantizer = MultiScaleVQ(vocab_size=32, channels=6, sides=(1, 2, 4), phi=2)
    return VARTokenizer(image_size=SIZE, quantizer=quantizer, z_channels=None, projection=3, **(CNN | options))


# name -> maker of a tokenizer of SIZE x SIZE images
FAMILIES = {"cnn_vq": cnn_vq, "cnn_fsq": cnn_fsq, "var": var}
# whose decoder draws noise, so that two decodings with different noise differ
STOCHASTIC_DECODERS: set[str] = set()


def make(name: str, *, seed: int = 0, **options) -> Tokenizer:
    """A tokenizer of that family in eval mode, with every parameter drawn so that no path is zero at the start."""
    torch.manual_seed(seed)
    model = FAMILIES[name](**options)
    with torch.no_grad():
        for key, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad and "codebook" not in key:
                parameter.add_(0.05 * torch.randn(parameter.shape))
    return model.eval()


def images(rows: int = 3, *, seed: int = 1) -> torch.Tensor:
    return torch.rand(rows, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)) * 2 - 1
