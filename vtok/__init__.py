"""Visual tokenizers: images to tokens and back.

The names below load on first use, so that a command's --help need not wait for torch; training, data and pretrained
backbones, which pull in more, are in modules of their own.
"""

import importlib

_EXPORTS = {
    "CNNTokenizer": "vtok.models.cnn",
    "FSQ": "vtok.quantize.fsq",
    "MultiScaleVQ": "vtok.quantize.residual",
    "Part": "vtok.tokenizer",
    "Quantizer": "vtok.tokenizer",
    "SequenceLayout": "vtok.layout",
    "TokenSpec": "vtok.tokenizer",
    "Tokenizer": "vtok.tokenizer",
    "VARTokenizer": "vtok.models.var",
    "VQ": "vtok.quantize.vq",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module 'vtok' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)
