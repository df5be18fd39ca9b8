"""FlowAR's checkpoints (OliverRensu/FlowAR on Hugging Face: FlowAR-S.pth, FlowAR-L.pth, FlowAR-H.pth) as FlowAR.

Status: unofficial. The repository holds no code. The trunk's keys are xAR's without time and velocity, with one more
table; they were read from a second-hand copy. The inner names of the flow head (flownet.*) are not known to us: a file
that holds them is refused with their names, unless config says {"trunk_only": true}, which leaves the head at its start
(for training one on the published trunk). Whoever has a file adds the rules to HEAD_RULES.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vgen.convert.stacks import check_buffers, stack_rules
from vgen.models.flowar import FlowAR
from vtok.checkpoint import load_strict
from vtok.convert.table import Rule, highest, shape, translate
from vtok.layout import SequenceLayout
from vtok.tokenizer import Part, TokenSpec

SOURCE = "FlowAR"
HEAD_RULES: list[Rule] = []
HEADS = {1024: (12, 1024, True), 1536: (12, 1536, True)}  # of a trunk's width: the head's depth, width, cross-attention


def convert(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> FlowAR:
    """config: {"heads": of attention (12 or 16 where left out), "trunk_only": bool, "head": [depth, width, cross]}."""
    unknown = set(config) - {"heads", "trunk_only", "head", "note"}
    if unknown:
        raise ValueError(f"{SOURCE}: unknown arguments {sorted(unknown)}")
    inner = sorted(key for key in state if key.startswith("flownet."))
    trunk_only = bool(config.get("trunk_only", False))
    if inner and not HEAD_RULES and not trunk_only:
        raise ValueError(
            f"{SOURCE}: the names inside the flow head are not known ({len(inner)} keys: {', '.join(inner[:3])}, ...); "
            "write their rules into HEAD_RULES, or pass trunk_only=true"
        )
    width, channels = shape(state, "z_proj.weight", SOURCE)
    depth = highest(state, r"encoder_blocks\.(\d+)\..*", SOURCE)
    length = shape(state, "diffusion_pos_embed_learned", SOURCE)[1]
    side = math.isqrt((3 * length + 1) // 4)  # scales 1, 2, 4, .., s have (4 s^2 - 1) / 3 cells
    if (4 * side**2 - 1) // 3 != length:
        raise ValueError(f"{SOURCE}: {length} positions are not those of scales 1, 2, 4, ..; is this another variant?")
    head_depth, head_width, cross = config.get("head", HEADS.get(width, (2, 1024, False)))
    module = FlowAR(
        TokenSpec(SequenceLayout.raster(side, side), (Part(side * side, None, channels),), 16 * side),
        shape(state, "class_emb.weight", SOURCE)[0] - 1,
        depth=depth,
        width=width,
        heads=config.get("heads", 12 if width <= 768 else 16),
        head_depth=head_depth,
        head_width=head_width,
        head_cross=cross,
    )
    check_buffers(state, module.cos, module.sin, module.layout.ranks(), SOURCE)
    rules = [*stack_rules(depth), Rule(r"diffusion_pos_embed_learned", "state_position"), *HEAD_RULES]
    tensors = translate({k: v for k, v in state.items() if k not in inner or not trunk_only}, rules, SOURCE)
    if trunk_only:
        tensors |= {k: v for k, v in module.state_dict().items() if k.startswith("head.")}
    load_strict(module, tensors, SOURCE)
    return module.eval()
