"""Published generators as ours: `convert(family, state, config)`.

state: the original's state dict (of the right weights, without wrapper keys); config: the constructor arguments of the
original's classes, {class: {argument: value}}. Sizes come from the shapes, the rest from config.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vgen.generator import Generator
from vtok.convert import call

CONVERTERS: dict[str, str] = {
    "llamagen": "vgen.convert.llamagen",
    "gigatok": "vgen.convert.llamagen_family:gigatok",
    "dar": "vgen.convert.llamagen_family:dar",
    "har": "vgen.convert.llamagen_family:har",
    "restok": "vgen.convert.llamagen_family:har",  # ResTok's generator, by the name of its tokenizer
    "detailflow": "vgen.convert.llamagen_family:detailflow",
    "hita": "vgen.convert.llamagen_family:hita",
    "ifsq": "vgen.convert.llamagen_family:ifsq",
    "elm": "vgen.convert.elm:convert",
    "rar": "vgen.convert.rar",
    "flexvar": "vgen.convert.flexvar",
    "mar": "vgen.convert.mar",
    "maskgit": "vgen.convert.maskgit",
    "var": "vgen.convert.var",
    "xar": "vgen.convert.xar",
    "flowar": "vgen.convert.flowar",
}


def convert(family: str, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Generator:
    """Our module with the original's weights, in eval mode.

    Raises ValueError for an unknown family, an unknown or missing key, and a config that does not fit the shapes.
    """
    return call(CONVERTERS, family, state, config)
