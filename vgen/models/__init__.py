"""One file a paper. FAMILIES names every module that a shared folder may describe."""

from vtok.models import FAMILIES as TOKENIZERS

FAMILIES: dict[str, str] = {
    **TOKENIZERS,
    "LlamaGen": "vgen.models.llamagen:LlamaGen",
    "LlamaGenREPA": "vgen.models.repa:LlamaGenREPA",
    "RAR": "vgen.models.rar:RAR",
    "HitaGPT": "vgen.models.hita:HitaGPT",
    "HAR": "vgen.models.har:HAR",
    "DetailFlow": "vgen.models.detailflow:DetailFlow",
    "FlexVAR": "vgen.models.flexvar:FlexVAR",
    "NBP": "vgen.models.nbp:NBP",
    "PAR": "vgen.models.par:PAR",
    "MAR": "vgen.models.mar:MAR",
    "MaskGIT": "vgen.models.maskgit:MaskGIT",
    "VAR": "vgen.models.var:VAR",
    "Orthus": "vgen.models.orthus:Orthus",
    "XAR": "vgen.models.xar:XAR",
    "FlowAR": "vgen.models.flowar:FlowAR",
    "ECAR": "vgen.models.ecar:ECAR",
    "DTM": "vgen.models.transition:DTM",
    "ARTM": "vgen.models.transition_causal:ARTM",
    "FHTM": "vgen.models.transition_causal:FHTM",
}
