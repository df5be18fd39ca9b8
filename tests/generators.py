"""Small generators of every family, on random weights, for the tests that loop over families."""

from __future__ import annotations

import torch

from vgen.generator import Generator
from vgen.models.detailflow import DetailFlow
from vgen.models.ecar import ECAR
from vgen.models.flexvar import FlexVAR
from vgen.models.flowar import FlowAR
from vgen.models.har import HAR
from vgen.models.hita import HitaGPT
from vgen.models.llamagen import LlamaGen
from vgen.models.mar import MAR
from vgen.models.maskgit import MaskGIT
from vgen.models.nbp import NBP
from vgen.models.orthus import Orthus
from vgen.models.par import PAR
from vgen.models.rar import RAR
from vgen.models.repa import LlamaGenREPA
from vgen.models.transition import DTM
from vgen.models.transition_causal import ARTM, FHTM
from vgen.models.var import VAR
from vgen.models.xar import XAR
from vtok.config import describe
from vtok.layout import SequenceLayout
from vtok.quantize.independent import IndependentVQ
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


def line_spec(length: int = 16, vocabulary: int = VOCABULARY) -> TokenSpec:
    return TokenSpec(SequenceLayout.line(length), (Part(length, vocabulary, CHANNELS),), 32)


def parts_spec(queries: int = 4, side: int = 3, vocabularies: tuple[int, int] = (VOCABULARY, VOCABULARY)) -> TokenSpec:
    """Queries on a line, then a grid: two vocabularies, as Hita's."""
    coords = tuple((0, 0, i) for i in range(queries)) + tuple((1, r, c) for r in range(side) for c in range(side))
    parts = tuple(Part(n, v, CHANNELS) for n, v in zip((queries, side * side), vocabularies))
    return TokenSpec(SequenceLayout((1,) * len(coords), coords), parts, 8 * side)


def map_spec(sides: tuple[int, ...] = (1, 2, 3), vocabulary: int = VOCABULARY) -> TokenSpec:
    """Independent maps of one codebook, as FlexVAR's."""
    layout = SequenceLayout.scales(sides)
    quantizer = describe(IndependentVQ(vocab_size=vocabulary, channels=CHANNELS, sides=sides))
    return TokenSpec(layout, (Part(layout.length, vocabulary, CHANNELS),), 8 * sides[-1], quantizer)


def small(cls, spec: TokenSpec, **options) -> Generator:
    """A model of LlamaGen's kind."""
    return cls(spec, CLASSES, **{"depth": 2, "width": 16, "heads": 2, "multiple_of": 8, **options})


def rar(spec: TokenSpec | None = None, **options) -> RAR:
    return RAR(spec or grid_spec(), CLASSES, **{"depth": 2, "width": 16, "heads": 2, "anneal": (0.0, 0.0), **options})


def flexvar(spec: TokenSpec | None = None, **options) -> FlexVAR:
    plain = {"depth": 2, "width": 16, "heads": 2, "sample_scales": False, **options}
    return FlexVAR(spec or map_spec(), CLASSES, **plain)


def var(spec: TokenSpec | None = None, **options) -> VAR:
    return VAR(spec or scale_spec(), CLASSES, depth=2, width=16, heads=2, **options)


def latent_spec(height: int = 4, width: int = 4) -> TokenSpec:
    layout = SequenceLayout.raster(height, width)
    return TokenSpec(layout, (Part(layout.length, None, CHANNELS),), 8 * width)


def xar(entity: str, size: int | None = None, spec: TokenSpec | None = None, **options) -> XAR:
    plain = {"dropout": 0.0, "attention_dropout": 0.0, "solver_steps": 4, **options}
    return XAR(spec or latent_spec(), CLASSES, depth=1, width=16, heads=2, entity=entity, entity_size=size, **plain)


def block_flow(cls, **options):
    sizes = {"depth": 1, "width": 16, "heads": 2, "head_depth": 1, "head_width": 32, "solver_steps": 4, **options}
    return cls(latent_spec(), CLASSES, **sizes)


def transition(cls, levels: int, **options):
    sizes = {"depth": 2, "width": 16, "heads": 2, "head_depth": 1, "head_width": 32, "solver_steps": 4, **options}
    return cls(latent_spec(), CLASSES, levels=levels, **sizes)


def orthus(**options):
    sizes = {"depth": 2, "width": 16, "heads": 2, "head_depth": 1, "head_width": 16, "solver_steps": 4, "codes": 12}
    return Orthus(latent_spec(), CLASSES, **{**sizes, "repeats": 2, "clip": 12.0, **options})  # trained for seconds


CONTINUOUS = {
    "xar_token": lambda **o: xar("token", spec=latent_spec(2, 4), **o),
    "xar_cell": lambda **o: xar("cell", **o),
    "xar_cell_euler": lambda **o: xar("cell", spec=latent_spec(2, 4), size=2, solver="euler", **o),
    "xar_subsample": lambda **o: xar("subsample", **o),
    "xar_scale": lambda **o: xar("scale", **o),
    "xar_image": lambda **o: xar("image", **o),
    "flowar": lambda **o: block_flow(FlowAR, **o),
    "flowar_cross": lambda **o: block_flow(FlowAR, head_cross=True, **o),
    "ecar": lambda **o: block_flow(ECAR, **o),
    "dtm": lambda **o: transition(DTM, 4, **o),
    "artm": lambda **o: transition(ARTM, 2, **o),
    "fhtm": lambda **o: transition(FHTM, 2, **o),
    "orthus": lambda **o: orthus(**o),
    "orthus_linear": lambda **o: orthus(codes=0, **o),
}
OWN_INPUT = {name for name in CONTINUOUS if name.startswith("xar")}  # step k reads its own tokens, noised


def mar(spec: TokenSpec | None = None, **options) -> MAR:
    small = {"depth": 1, "width": 16, "heads": 2, "buffer": 2, "steps": 5, "head_depth": 1, "head_width": 16}
    return MAR(spec or latent_spec(), CLASSES, **{**small, "solver_steps": 4, "repeats": 2, **options})


def maskgit(spec: TokenSpec | None = None, **options) -> MaskGIT:
    return MaskGIT(spec or grid_spec(), CLASSES, **{"depth": 2, "width": 16, "heads": 2, "steps": 5, **options})


# families that read the decided tokens anew at every step: nothing can be cached, and their hidden states answer for
# one given set of known tokens, not for every prefix at once; tests/test_mar.py and test_maskgit.py hold their own
MASKED = ("mar", "mar_flow", "maskgit", "maskgit_uvit")

FAMILIES = {
    **CONTINUOUS,
    "llamagen": llamagen,
    "llamagen_repa": lambda **o: small(LlamaGenREPA, grid_spec(), block=1, channels=10, hidden=12, **o),
    "llamagen_wide_grid": lambda **o: llamagen(grid_spec(2, 6), **o),
    "var": var,
    "var_shared_modulation": lambda **o: var(modulation="shared", **o),
    "var_plain_attention": lambda **o: var(l2_attention=False, **o),
    "gigatok": lambda **o: llamagen(line_spec(), position="learned", **o),
    "gigatok_adaln": lambda **o: llamagen(line_spec(), position="learned", modulation="own", qk_norm="layer", **o),
    "gigatok_shared": lambda **o: llamagen(line_spec(), position="learned", modulation="shared", **o),
    "dar": lambda **o: llamagen(line_spec(), position="rope_1d", **o),
    "hita": lambda **o: small(HitaGPT, parts_spec(), **o),
    "rar": rar,
    "har": lambda **o: small(HAR, line_spec(), first=2, **o),
    "detailflow": lambda **o: small(DetailFlow, line_spec(), group=4, **o),
    "nbp_rows": lambda **o: small(NBP, grid_spec(), **o),
    "nbp_cells_shifted": lambda **o: small(NBP, grid_spec(4, 6), group=[2, 3], start="shifted", **o),
    "par": lambda **o: small(PAR, grid_spec(4, 6), **o),
    "flexvar": flexvar,
    "llamagen_factorised": lambda **o: llamagen(factors=[4, 6], **o),
    "llamagen_factorised_depth": lambda **o: llamagen(
        factors=[2, 3, 4], factor_depth=1, **{"dropout": 0.0, "token_dropout": 0.0, **o}
    ),
    "llamagen_factorised_tied": lambda **o: llamagen(
        factors=[2, 3, 4], factor_depth=1, factor_tied=True, **{"dropout": 0.0, "token_dropout": 0.0, **o}
    ),
    "mar": mar,
    "mar_flow": lambda **o: mar(head="flow", decoder_width=24, decoder_depth=2, **o),
    "maskgit": maskgit,
    "maskgit_uvit": lambda **o: maskgit(arch="uvit", **o),
}


def make(name: str, *, seed: int = 0, **options) -> Generator:
    """A generator of that family in eval mode, with every parameter drawn so that no path is zero at the start."""
    torch.manual_seed(seed)
    return drawn(FAMILIES[name](**options))


def drawn(model: Generator) -> Generator:
    """The model in eval mode with every parameter drawn, as `make` does."""
    with torch.no_grad():
        for key, parameter in sorted(model.named_parameters()):
            # a strong velocity would make the flow chaotic, and rounding visible
            spread = 0.5 if key.startswith("head.linear") and model.spec.discrete else 0.2
            parameter.copy_(spread * torch.randn(parameter.shape) + (1.0 if key.endswith("norm.weight") else 0.0))
    return model.eval()


def tokens_of(model: Generator, rows: int, *, seed: int = 1) -> torch.Tensor:
    drawer = torch.Generator().manual_seed(seed)
    if not model.spec.discrete:
        return torch.randn(rows, model.spec.layout.length, model.spec.parts[0].channels, generator=drawer)
    vocabulary = model.spec.parts[0].vocab_size
    return torch.randint(vocabulary, (rows, model.spec.layout.length), generator=drawer)


def also_read(model: Generator, rows: int) -> dict[str, torch.Tensor]:
    """What training of the family reads beside tokens, labels and keys: a teacher's patches, here all alike."""
    if "patches" not in model.reads_also:
        return {}
    return {"patches": torch.linspace(-1, 1, model.channels).expand(rows, model.layout.length, -1)}
