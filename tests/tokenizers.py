"""Small tokenizers of every family, on random weights, for the tests that loop over families."""

from __future__ import annotations

import torch

from vtok.models.cnn import CNNTokenizer
from vtok.models.dar import DARTokenizer
from vtok.models.detailflow import DetailFlowTokenizer
from vtok.models.flextok import FlexTokTokenizer
from vtok.models.flexvar import FlexVARTokenizer
from vtok.models.gigatok import GigaTok
from vtok.models.hita import Hita
from vtok.models.magvit2 import MAGVIT2Tokenizer
from vtok.models.maskgit_vqgan import MaskGITVQGAN
from vtok.models.restok import ResTok
from vtok.models.retok import ReToK
from vtok.models.titok import PatchHead, ProxyHead, TiTok
from vtok.models.var import VARTokenizer
from vtok.quantize.binary import BSQ, LFQ
from vtok.quantize.fsq import FSQ
from vtok.quantize.ibq import IBQ
from vtok.quantize.independent import IndependentVQ
from vtok.quantize.kl import KL
from vtok.quantize.parts import PartsQuantizer
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


def dar(**options) -> DARTokenizer:
    quantizer = VQ(vocab_size=32, channels=6, l2_norm=True)
    sizes = dict(patch=4, dim=16, depth=2, decoder_depth=1, heads=2, tokens=8, groups=4, query_rank=4, max_tokens=12)
    sizes |= dict(flow_patch=4, flow_dim=16, flow_depth=2, flow_heads=2)
    return DARTokenizer(image_size=SIZE, quantizer=quantizer, **(sizes | options))


def cnn_ibq(**options) -> CNNTokenizer:
    quantizer = IBQ(vocab_size=32, channels=6)
    return CNNTokenizer(image_size=SIZE, quantizer=quantizer, z_channels=8, **(CNN | options))


def cnn_ifsq(**options) -> CNNTokenizer:
    shape = CNN | dict(z_channels=6, decoder_z_channels=3, mid_blocks=1, decoder_blocks=1)
    quantizer = FSQ(levels=(5, 5, 3), activation="ifsq", groups=(2, 1))
    return CNNTokenizer(image_size=SIZE, quantizer=quantizer, **(shape | options))


def cnn_rotation(**options) -> CNNTokenizer:
    quantizer = VQ(vocab_size=32, channels=6, rotation=True)
    return CNNTokenizer(image_size=SIZE, quantizer=quantizer, z_channels=8, **(CNN | options))


def magvit2(**options) -> MAGVIT2Tokenizer:
    shape = dict(channels=8, multipliers=(1, 1, 2), blocks=1, groups=4)
    return MAGVIT2Tokenizer(image_size=SIZE, quantizer=LFQ(bits=5, groups=(2, 3)), **(shape | options))


def magvit2_bsq(**options) -> MAGVIT2Tokenizer:
    shape = dict(channels=8, multipliers=(1, 1, 2), blocks=1, groups=4)
    return MAGVIT2Tokenizer(image_size=SIZE, quantizer=BSQ(bits=6, entropy_groups=(3, 3)), **(shape | options))


def flexvar(**options) -> FlexVARTokenizer:
    quantizer = IndependentVQ(vocab_size=32, channels=6, sides=(1, 2, 4))
    return FlexVARTokenizer(image_size=SIZE, quantizer=quantizer, z_channels=8, **(CNN | options))


def cnn_kl(**options) -> CNNTokenizer:
    quantizer = KL(channels=4, scale=0.5)
    return CNNTokenizer(image_size=SIZE, quantizer=quantizer, z_channels=None, **(CNN | options))


def gigatok(**options) -> GigaTok:
    shape = dict(encoder=(32, 2, 4), decoder=(64, 3, 4), channels=8, multipliers=(1, 1, 2), blocks=1, groups=4)
    shape |= dict(tokens=8, z_channels=24, alignment_depth=1, alignment_channels=10, auxiliary_until=0.6)
    shape["quantizer"] = VQ(vocab_size=32, channels=6, rotation=True)
    return GigaTok(image_size=SIZE, **(shape | options))


def retok(**options) -> ReToK:
    return ReToK(network=gigatok(redundant=6), alignment_decay=1.0, **options)


def hita(**options) -> Hita:
    shape = dict(channels=8, multipliers=(1, 1, 2), blocks=1, groups=4, dim=16, depth=1, heads=2, hidden=24)
    shape |= dict(dropout=0.0, side_channels=None, shift=2, vision_channels=10)
    quantizers = [VQ(vocab_size=32, channels=5), VQ(vocab_size=24, channels=6)]
    quantizer = PartsQuantizer(quantizers=quantizers, counts=[4])
    return Hita(image_size=SIZE, quantizer=quantizer, **(shape | options))


def detailflow(**options) -> DetailFlowTokenizer:
    quantizer = VQ(vocab_size=32, channels=6, l2_norm=True)
    sizes = dict(tokens=8, group=2, patch=4, dim=16, depth=2, heads=2, hidden=24, grid=4, near=4)
    sizes |= dict(decoder_dim=16, decoder_depth=2, decoder_heads=2, decoder_hidden=24)
    sizes |= dict(correction=False, degradation=0.0)  # tests/test_detailflow.py has both
    return DetailFlowTokenizer(image_size=SIZE, quantizer=quantizer, **(sizes | options))


def maskgit_vqgan(**options) -> MaskGITVQGAN:
    shape = dict(channels=8, multipliers=(1, 1, 2), blocks=1, groups=4)
    quantizer = VQ(vocab_size=32, channels=6, l2_norm=False, beta=1.0, codebook_weight=0.25)
    return MaskGITVQGAN(image_size=SIZE, quantizer=quantizer, **(shape | options))


def titok(**options) -> TiTok:
    sizes = dict(encoder=(32, 2, 4), decoder=(32, 1, 4), tokens=6, head=PatchHead(dim=32, patch=4))
    return TiTok(image_size=SIZE, quantizer=VQ(vocab_size=32, channels=5), **(sizes | options))


def titok_proxy(**options) -> TiTok:
    head = ProxyHead(dim=32, codes=16, width=6, channels=8, multipliers=(1, 1, 2), blocks=1, groups=4)
    return titok(head=head, legacy_reshape=True, **options)


def titok_kl(**options) -> TiTok:
    sizes = dict(encoder=(32, 1, 4), decoder=(32, 1, 4), tokens=6, head=PatchHead(dim=32, patch=4))
    return TiTok(image_size=SIZE, quantizer=KL(channels=5), **(sizes | options))


def restok(**options) -> ResTok:
    sizes = dict(encoder=(32, 4, 4), decoder=(32, 1, 4), tokens=8, stages=3, semantic=5, nested={1: 1, 4: 1})
    sizes |= dict(width=12, channels=8, multipliers=(1, 1, 2), blocks=1, groups=4)
    return ResTok(image_size=SIZE, quantizer=VQ(vocab_size=32, channels=6), **(sizes | options))


def flextok(**options) -> FlexTokTokenizer:
    sizes = dict(patch=4, dim=16, depth=2, decoder_dim=16, decoder_depth=2, head=8, tokens=8, steps=3, grid=4)
    return FlexTokTokenizer(image_size=SIZE, quantizer=FSQ(levels=(5, 4, 3)), **(sizes | options))


def flextok_vae(**options) -> FlexTokTokenizer:
    """With a frozen VAE of stride 4, guidance and learned positions."""
    return flextok(vae=cnn_kl(), patch=2, grid=2, positions="learned", guidance=2.0, **options)


# name -> maker of a tokenizer of SIZE x SIZE images
FAMILIES = {"flexvar": flexvar, "cnn_kl": cnn_kl, "cnn_vq": cnn_vq, "cnn_fsq": cnn_fsq, "var": var}
FAMILIES |= {"dar": dar, "detailflow": detailflow, "flextok": flextok, "flextok_vae": flextok_vae}
FAMILIES |= {"gigatok": gigatok, "retok": retok, "hita": hita, "hita_vision": lambda: hita(vision=3)}
FAMILIES |= {"maskgit_vqgan": maskgit_vqgan, "titok": titok, "titok_proxy": titok_proxy, "titok_kl": titok_kl}
FAMILIES |= {"restok": restok}
FAMILIES |= {"cnn_ibq": cnn_ibq, "cnn_ifsq": cnn_ifsq, "cnn_rotation": cnn_rotation}
FAMILIES |= {"magvit2": magvit2, "magvit2_bsq": magvit2_bsq}
# whose decoder draws noise, so that two decodings with different noise differ
STOCHASTIC_DECODERS: set[str] = {"dar", "flextok", "flextok_vae"}


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
