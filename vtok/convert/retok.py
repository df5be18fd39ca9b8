"""ReToK's tokenizers (zfu006/ReTok, tokenizer/tokenizer_image/vq/vq_vit_model.py): GigaTok's keys and two more tables.

File: VQ_SB256_e250.pt; pass its `model` entry (or `ema`). The tables hold the positions of the redundant tokens, which
in ours follow those of the tokens in the same table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vtok.checkpoint import load_strict
from vtok.convert.gigatok import RULES, arguments_of, position_table
from vtok.convert.table import Rule, shape, translate
from vtok.models.gigatok import GigaTok
from vtok.models.retok import ReToK

SOURCE = "ReToK"
TABLES = {
    r"s2to1encoder\.latent_token_positional_embedding": "to_tokens.position",
    r"s1to2decoder\.latent_token_positional_embedding": "to_grid.place",
}
JOINED = tuple(
    Rule(pattern + tail, target, part=(i, 2), change=position_table)
    for pattern, target in TABLES.items()
    for i, tail in enumerate(("", "_comp"))
)


def convert(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> ReToK:
    """config: as for GigaTok; how ReToK was trained is not public, so training options are ours."""
    redundant = shape(state, "s2to1encoder.latent_token_positional_embedding_comp", SOURCE)[0]
    network = GigaTok(**arguments_of(state, config, SOURCE), redundant=redundant)
    load_strict(network, translate(state, JOINED + RULES, SOURCE), SOURCE)
    return ReToK(network=network).eval()
