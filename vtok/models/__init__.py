"""Tokenizers by family name, for shared folders and checkpoints (vtok.config.build); quantisers are among them."""

FAMILIES: dict[str, str] = {
    "CNNTokenizer": "vtok.models.cnn:CNNTokenizer",
    "VARTokenizer": "vtok.models.var:VARTokenizer",
    "VQ": "vtok.quantize.vq:VQ",
    "FSQ": "vtok.quantize.fsq:FSQ",
    "MultiScaleVQ": "vtok.quantize.residual:MultiScaleVQ",
}
