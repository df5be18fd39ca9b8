"""Small generators of every family, on random weights, for the tests that loop over families."""

from __future__ import annotations

import torch

from vgen.generator import Generator
from vgen.models.llamagen import LlamaGen
from vgen.models.var import VAR
from vtok.config import describe
from vtok.layout import SequenceLayout
from vtok.quantize.residual import MultiScaleVQ
from vtok.tokenizer import Part, TokenSpec

VOCABULARY, CHANNELS, CLASSES = 24, 6, 5


def grid_spec(height: int = 4, width: int = 4, vocabulary: int = VOCABULARY) -> TokenSpec:
    layout = SequenceLayout.raster(height, width)
    return TokenSpec(layout, (Part(layout.length, vocabulary, CHANNELS),), 8 * width)


def scale_spec(sides: tuple[int, ...] = (1, 2, 3, 4), vocabulary: int = VOCABULARY) -> TokenSpec:
    layout = SequenceLayout.scales(sides)
    quantizer = MultiScaleVQ(vocab_size=vocabulary, channels=CHANNELS, sides=sides, phi=2)
    return TokenSpec(layout, (Part(layout.length, vocabulary, CHANNELS),), 8 * sides[-1], describe(quantizer))


def llamagen(spec: TokenSpec | None = None, **options) -> LlamaGen:
    return LlamaGen(spec or grid_spec(), CLASSES, depth=2, width=16, heads=2, multiple_of=8, **options)


def var(spec: TokenSpec | None = None, **options) -> VAR:
    return VAR(spec or scale_spec(), CLASSES, depth=2, width=16, heads=2, **options)


FAMILIES = {
    "llamagen": llamagen,
    "llamagen_wide_grid": lambda **o: llamagen(grid_spec(2, 6), **o),
    "var": var,
    "var_shared_modulation": lambda **o: var(modulation="shared", **o),
    "var_plain_attention": lambda **o: var(l2_attention=False, **o),
}


def make(name: str, *, seed: int = 0, **options) -> Generator:
    """A generator of that family in eval mode, with every parameter drawn so that no path is zero at the start."""
    torch.manual_seed(seed)
    model = FAMILIES[name](**options)
    with torch.no_grad():
        for key, parameter in sorted(model.named_parameters()):
            spread = 0.5 if key.startswith("head") else 0.2
            parameter.copy_(spread * torch.randn(parameter.shape) + (1.0 if key.endswith("norm.weight") else 0.0))
    return model.eval()


def tokens_of(model: Generator, rows: int, *, seed: int = 1) -> torch.Tensor:
    drawer = torch.Generator().manual_seed(seed)
    vocabulary = model.spec.parts[0].vocab_size
    return torch.randint(vocabulary, (rows, model.layout.length), generator=drawer)
