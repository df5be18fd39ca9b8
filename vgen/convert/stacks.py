"""The keys that xAR's and FlowAR's checkpoints share: two stacks of blocks become one trunk."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vtok.convert.table import Rule

BOTH = r"(weight|bias)"


def stack_rules(depth: int) -> list[Rule]:
    """Rules of everything before the head. depth: blocks of each stack. Buffers are dropped: see `check_buffers`."""
    rules = [
        Rule(r"class_emb\.weight", "conditioner.table.weight"),
        Rule(rf"z_proj\.{BOTH}", r"stacks.project.\1"),
        Rule(r"z_proj_ln\.weight", "stacks.enter_norm.weight"),
        Rule(r"encoder_pos_embed_learned", "stacks.enter_position"),
        Rule(r"encoder_norm\.weight", "stacks.middle_norm.weight"),
        Rule(rf"decoder_embed\.{BOTH}", r"stacks.middle.\1"),
        Rule(r"decoder_pos_embed_learned", "stacks.middle_position"),
        Rule(r"decoder_norm\.weight", "trunk.norm.weight"),
        Rule(r"mask", None),
        Rule(r"(?:encoder|decoder)_blocks\.\d+\.attn\.rope\.(?:freqs|freqs_cos|freqs_sin)", None),
    ]
    for stack, first in (("encoder", 0), ("decoder", depth)):
        inside = {
            rf"attn\.qkv\.{BOTH}": ("attention.qkv", None),
            rf"attn\.proj\.{BOTH}": ("attention.out", None),
            rf"mlp\.fc1_g\.{BOTH}": ("ffn.up", (0, 2)),
            rf"mlp\.fc1_x\.{BOTH}": ("ffn.up", (1, 2)),
            rf"mlp\.fc2\.{BOTH}": ("ffn.down", None),
            rf"ada_lin\.1\.{BOTH}": ("modulation", None),
        }
        for pattern, (name, part) in inside.items():
            rules.append(
                Rule(
                    rf"{stack}_blocks\.(\d+)\.{pattern}",
                    lambda m, first=first, name=name: f"trunk.blocks.{first + int(m[1])}.{name}.{m[2]}",
                    part=part,
                )
            )
    return rules


def check_buffers(state: Mapping[str, Tensor], cos: Tensor, sin: Tensor, ranks: Tensor, source: str) -> None:
    """ValueError where the rope tables or the mask that a file holds are not those that our layout gives."""
    for key, value in state.items():
        name = key.rsplit(".", 1)[-1]
        if name in ("freqs_cos", "freqs_sin"):
            ours = (cos if name == "freqs_cos" else sin).repeat_interleave(2, dim=-1)
        elif key == "mask":
            value, ours = value[0, 0] == 0, ranks[:, None] >= ranks[None]
        else:
            continue
        if value.shape != ours.shape or not torch.allclose(value.float(), ours.float(), atol=1e-5):
            raise ValueError(f"{source}: {key} is not that of this order of tokens; is this another variant?")
