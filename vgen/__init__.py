"""Generators of visual tokens, step by step.

    pipeline = Pipeline.load("outputs/my_run")       # or an exported folder, "hf:<owner>/<name>", "zoo:<name>"
    images = pipeline(labels, seeds, guidance=2.0)   # int64 [N] each -> uint8 [N, H, W, 3]

One class a paper (vgen.models.FAMILIES), built from a tokenizer's `spec`. The names of `__all__` load on first use (see
vtok).
"""

import importlib

from vgen.models import FAMILIES, TOKENIZERS

_EXPORTS = {
    "Canvas": "vgen.generator",
    "DrawRule": "vgen.heads",
    "Generator": "vgen.generator",
    "Guidance": "vgen.guidance",
    "HubPipeline": "vgen.hub",
    "Pipeline": "vgen.pipeline",
    **{name: place.partition(":")[0] for name, place in FAMILIES.items() if name not in TOKENIZERS},
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module 'vgen' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
