"""Published tokenizers as ours: `convert(family, state, config)`.

state: the original's state dict (of the right weights, without wrapper keys); config: the constructor arguments of the
original's classes, {class: {argument: value}}. Sizes come from the shapes, the rest from config.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vtok.tokenizer import Tokenizer

CONVERTERS: dict[str, str] = {
    "gigatok": "vtok.convert.gigatok",
    "dar": "vtok.convert.dar",
    "flexvar": "vtok.convert.flexvar",
    "ibq": "vtok.convert.ibq",
    "ifsq": "vtok.convert.ifsq",
    "kl": "vtok.convert.kl",
    "detailflow": "vtok.convert.detailflow",
    "flextok": "vtok.convert.flextok",
    "llamagen": "vtok.convert.llamagen",
    "magvit2": "vtok.convert.magvit2",
    "maskgit_vqgan": "vtok.convert.maskgit_vqgan",
    "hita": "vtok.convert.hita",
    "retok": "vtok.convert.retok",
    "restok": "vtok.convert.restok",
    "titok": "vtok.convert.titok",
    "var": "vtok.convert.var",
}


def convert(family: str, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Tokenizer:
    """Our module with the original's weights, in eval mode.

    Raises ValueError for an unknown family, an unknown or missing key, and a config that does not fit the shapes.
    """
    return call(CONVERTERS, family, state, config)


def call(table: Mapping[str, str], family: str, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Any:
    """What the converter of that family in a table of "module" or "module:function" (without: convert) returns."""
    if family not in table:
        raise ValueError(f"unknown family {family!r}; known are {', '.join(sorted(table))}")
    module, _, function = table[family].partition(":")
    return getattr(importlib.import_module(module), function or "convert")(state, config)
