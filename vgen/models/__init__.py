"""One file a paper. FAMILIES names every module that a shared folder may describe."""

from vtok.models import FAMILIES as TOKENIZERS

FAMILIES: dict[str, str] = {
    **TOKENIZERS,
    "LlamaGen": "vgen.models.llamagen:LlamaGen",
    "VAR": "vgen.models.var:VAR",
}
