"""Generators of visual tokens, step by step. The names below load on first use (see vtok)."""

import importlib

_EXPORTS = {
    "Canvas": "vgen.generator",
    "DrawRule": "vgen.heads",
    "Generator": "vgen.generator",
    "LlamaGen": "vgen.models.llamagen",
    "Pipeline": "vgen.pipeline",
    "VAR": "vgen.models.var",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module 'vgen' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)
