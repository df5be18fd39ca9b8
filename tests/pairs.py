"""A small tokenizer with a small generator of every family on its tokens, as folders that commands read."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import make as make_tokenizer

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
from vtok.checkpoint import save_folder

CLASSES = 4
LLAMA, HEAD = {"multiple_of": 8}, {"head_depth": 1, "head_width": 32, "solver_steps": 2}
# family -> (tokenizer of tests/tokenizers.py, class, options beside depth, width and heads)
PAIRS = {
    "llamagen": ("cnn_vq", LlamaGen, LLAMA),
    "llamagen_factorised": ("cnn_ifsq", LlamaGen, LLAMA | {"factors": "auto", "factor_depth": 1}),
    "llamagen_repa": ("cnn_vq", LlamaGenREPA, LLAMA | {"block": 1, "channels": 10, "hidden": 12}),
    "gigatok": ("gigatok", LlamaGen, LLAMA | {"position": "learned"}),
    "retok": ("retok", LlamaGen, LLAMA | {"position": "learned"}),
    "dar": ("dar", LlamaGen, LLAMA | {"position": "rope_1d"}),
    "flextok": ("flextok", LlamaGen, LLAMA | {"position": "rope_1d"}),
    "hita": ("hita", HitaGPT, LLAMA),
    "rar": ("cnn_vq", RAR, {}),
    "nbp": ("cnn_vq", NBP, LLAMA),
    "par": ("cnn_vq", PAR, LLAMA),
    "har": ("restok", HAR, LLAMA | {"first": 2}),
    "detailflow": ("detailflow", DetailFlow, LLAMA | {"group": 2}),
    "var": ("var", VAR, {}),
    "flexvar": ("flexvar", FlexVAR, {}),
    "maskgit": ("titok", MaskGIT, {"steps": 3}),
    "maskgit_grid": ("cnn_vq", MaskGIT, {"steps": 3, "arch": "uvit"}),
    "mar": ("cnn_kl", MAR, HEAD | {"steps": 3, "buffer": 2}),
    "mar_flow": ("titok_kl", MAR, HEAD | {"steps": 3, "buffer": 2, "head": "flow"}),
    "orthus": ("cnn_kl", Orthus, HEAD | {"codes": 8}),
    "xar": ("cnn_kl", XAR, {"solver_steps": 2}),
    "xar_scale": ("cnn_kl", XAR, {"solver_steps": 2, "entity": "scale"}),
    "flowar": ("cnn_kl", FlowAR, HEAD),
    "ecar": ("cnn_kl", ECAR, HEAD),
    "dtm": ("cnn_kl", DTM, HEAD | {"levels": 2}),
    "artm": ("cnn_kl", ARTM, HEAD | {"levels": 2}),
    "fhtm": ("cnn_kl", FHTM, HEAD | {"levels": 2}),
}


def pair(name: str, *, seed: int = 0) -> tuple[Generator, torch.nn.Module]:
    """(generator, tokenizer) in eval mode, with every parameter drawn."""
    kind, cls, options = PAIRS[name]
    tokenizer = make_tokenizer(kind)
    torch.manual_seed(seed)
    generator = cls(tokenizer.spec, CLASSES, depth=2, width=16, heads=2, **options)
    with torch.no_grad():
        for key, parameter in sorted(generator.named_parameters()):
            if not key.startswith("quantizer"):
                parameter.copy_(0.2 * torch.randn(parameter.shape) + (1.0 if key.endswith("norm.weight") else 0.0))
    generator.adopt(tokenizer)
    return generator.eval(), tokenizer


def pair_folder(name: str, folder: Path) -> Path:
    """The pair as an exported folder with the tokenizer in it."""
    generator, tokenizer = pair(name)
    save_folder(generator, folder, class_names=["ant", "bee", "cat", "dog"])
    save_folder(tokenizer, folder / "tokenizer")
    return folder
