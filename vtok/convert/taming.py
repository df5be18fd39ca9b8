"""The key names of taming-transformers' autoencoder, which VAR, latent diffusion, MAR, IBQ, iFSQ and MAGVIT-v2 vary.

Encoder levels are `down.i`, decoder levels `up.i`; both count from the highest resolution, where ours run in the order
of execution. The middle is `mid.block_1, attn_1, block_2`, or, without attention, `mid_block.j`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from vtok.convert.table import Rule, highest, shape

NORM = r"(weight|bias)"


def rules(levels: int) -> list[Rule]:
    """The table of the encoder's and the decoder's keys of an autoencoder of `levels` resolutions."""

    def level(match: re.Match) -> str:
        half, index = ("encoder", int(match[2])) if match[1] == "down" else ("decoder", levels - 1 - int(match[2]))
        return f"{half}.levels.{index}"

    at, mid = r"(?:encoder|decoder)\.(down|up)\.(\d+)\.", r"(encoder|decoder)\.mid\."
    table = [
        Rule(rf"(encoder|decoder)\.(conv_in|norm_out|conv_out)\.{NORM}", r"\1.\2.\3"),
        Rule(
            rf"{at}block\.(\d+)\.(norm1|conv1|norm2|conv2)\.{NORM}", lambda m: f"{level(m)}.blocks.{m[3]}.{m[4]}.{m[5]}"
        ),
        Rule(rf"{at}block\.(\d+)\.nin_shortcut\.{NORM}", lambda m: f"{level(m)}.blocks.{m[3]}.shortcut.{m[4]}"),
        Rule(rf"{at}attn\.(\d+)\.(norm|qkv)\.{NORM}", lambda m: f"{level(m)}.attention.{m[3]}.{m[4]}.{m[5]}"),
        Rule(rf"{at}attn\.(\d+)\.proj_out\.{NORM}", lambda m: f"{level(m)}.attention.{m[3]}.out.{m[4]}"),
        Rule(rf"{at}(?:downsample|upsample)\.conv1?\.{NORM}", lambda m: f"{level(m)}.resample.conv.{m[3]}"),
        Rule(rf"{mid}block_1\.(norm1|conv1|norm2|conv2)\.{NORM}", r"\1.mid.0.\2.\3"),
        Rule(rf"{mid}attn_1\.(norm|qkv)\.{NORM}", r"\1.mid.1.\2.\3"),
        Rule(rf"{mid}attn_1\.proj_out\.{NORM}", r"\1.mid.1.out.\2"),
        Rule(rf"{mid}block_2\.(norm1|conv1|norm2|conv2)\.{NORM}", r"\1.mid.2.\2.\3"),
        Rule(rf"(encoder|decoder)\.mid_block\.(\d+)\.(norm1|conv1|norm2|conv2)\.{NORM}", r"\1.mid.\2.\3.\4"),
        Rule(rf"quant_conv\.{NORM}", r"project_in.\1"),
        Rule(rf"post_quant_conv\.{NORM}", r"project_out.\1"),
    ]
    for i, name in enumerate("qkv"):
        place = lambda m: f"{level(m)}.attention.{m[3]}.qkv.{m[4]}"  # noqa: E731
        table.append(Rule(rf"{at}attn\.(\d+)\.{name}\.{NORM}", place, part=(i, 3)))
        table.append(Rule(rf"{mid}attn_1\.{name}\.{NORM}", r"\1.mid.1.qkv.\2", part=(i, 3)))
    return table


def sizes(state: Mapping[str, Tensor], source: str) -> dict:
    """The arguments of CNNTokenizer that the shapes and names of `state` tell: widths, blocks, where attention is."""
    channels = shape(state, "encoder.conv_in.weight", source)[0]
    levels = highest(state, r"encoder\.down\.(\d+)\..*", source)
    widths = [shape(state, f"encoder.down.{i}.block.0.conv1.weight", source)[0] for i in range(levels)]
    attention, decoder_attention, mid_attention = (
        any(key.startswith(start) for key in state)
        for start in (f"encoder.down.{levels - 1}.attn.", f"decoder.up.{levels - 1}.attn.", "encoder.mid.attn_1.")
    )
    mid = any(key.startswith("encoder.mid_block.") for key in state)
    return dict(
        channels=channels,
        multipliers=[wide // channels for wide in widths],
        blocks=highest(state, r"encoder\.down\.0\.block\.(\d+)\..*", source),
        decoder_blocks=highest(state, r"decoder\.up\.0\.block\.(\d+)\..*", source),
        mid_blocks=highest(state, r"encoder\.mid_block\.(\d+)\..*", source) if mid else 2,
        attention=attention,
        decoder_attention=decoder_attention,
        mid_attention=mid_attention,
    )
