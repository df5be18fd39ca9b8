"""Visual tokenizers: images to tokens and back.

    tokenizer = Tokenizer.load("outputs/my_run")     # or an exported folder; zoo models: scripts/convert.py
    tokens = tokenizer.encode(images)                # float [B, 3, H, W] in [-1, 1] -> int64 [B, L], or latents
    copies = tokenizer.decode(tokens)                # float [B, 3, H, W], about [-1, 1]

One class a family and a quantizer (vtok.models.FAMILIES); `spec` of a tokenizer says what its tokens are. The names of
`__all__` load on first use, so that a command's --help need not wait for torch; training, data and pretrained
backbones, which pull in more, are in modules of their own.
"""

import importlib

from vtok.models import FAMILIES

_EXPORTS = {
    "Part": "vtok.tokenizer",
    "Quantizer": "vtok.tokenizer",
    "SampleNoise": "vtok.noise",
    "SequenceLayout": "vtok.layout",
    "TokenSpec": "vtok.tokenizer",
    "Tokenizer": "vtok.tokenizer",
    **{name: place.partition(":")[0] for name, place in FAMILIES.items()},
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module 'vtok' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
