"""FlexTok (apple/ml-flextok) as FlexTokTokenizer, and its VAE (diffusers' AutoencoderKL) as CNNTokenizer with a KL.

Files: EPFL-VILAB/flextok_{d12_d12_in1k,d18_d18_in1k,d18_d28_in1k,d18_d28_dfn}, model.safetensors, which holds the VAE
as well; flextok_vae_c{4,8,16}, diffusion_pytorch_model.safetensors. No reference available: how the files name their
modules is in their own configuration, so the table goes by what a tensor is called inside its module, whatever the
module's name; a file with other parts ends in an error. Fixed positions are checked against ours and dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vtok.checkpoint import load_strict
from vtok.convert.table import Rule, highest, shape, translate
from vtok.layers.flex import sincos
from vtok.models.cnn import CNNTokenizer
from vtok.models.flextok import FlexTokTokenizer
from vtok.quantize.fsq import FSQ
from vtok.quantize.kl import KL

SOURCE, VAE_SOURCE = "FlexTok", "FlexTok's VAE"
ARGUMENTS = {"levels", "size_sampling_mode", "scaling_factor", "image_size", "head_dim", "patch_size"}
NESTED = {"uniform": "uniform", "pow2": "power_of_two", "uniform_pow2": "uniform_power_of_two"}
VAE = "vae.vae."
P = r"(weight|bias)"


def _pointwise(weight: Tensor) -> Tensor:
    """A linear layer's weight as that of a 1 x 1 convolution; biases pass."""
    return weight[:, :, None, None] if weight.dim() == 2 else weight


def vae_rules() -> list[Rule]:
    half, mid = r"(encoder|decoder)", r"(encoder|decoder)\.mid_block\.attentions\.0\."
    level = rf"{half}\.(?:down|up)_blocks\.(\d+)\."
    names = (("to_q", "query"), ("to_k", "key"), ("to_v", "value"))
    return [
        Rule(rf"{half}\.(conv_in|conv_out)\.{P}", r"\1.\2.\3"),
        Rule(rf"{half}\.conv_norm_out\.{P}", r"\1.norm_out.\2"),
        Rule(rf"{level}resnets\.(\d+)\.(norm1|conv1|norm2|conv2)\.{P}", r"\1.levels.\2.blocks.\3.\4.\5"),
        Rule(rf"{level}resnets\.(\d+)\.conv_shortcut\.{P}", r"\1.levels.\2.blocks.\3.shortcut.\4"),
        Rule(rf"{level}(?:downsamplers|upsamplers)\.0\.conv\.{P}", r"\1.levels.\2.resample.conv.\3"),
        Rule(rf"{half}\.mid_block\.resnets\.0\.(norm1|conv1|norm2|conv2)\.{P}", r"\1.mid.0.\2.\3"),
        Rule(rf"{half}\.mid_block\.resnets\.1\.(norm1|conv1|norm2|conv2)\.{P}", r"\1.mid.2.\2.\3"),
        Rule(rf"{mid}group_norm\.{P}", r"\1.mid.1.norm.\2"),
        *(
            Rule(rf"{mid}(?:{new}|{old})\.{P}", r"\1.mid.1.qkv.\2", part=(i, 3), change=_pointwise)
            for i, (new, old) in enumerate(names)
        ),
        Rule(rf"{mid}(?:to_out\.0|proj_attn)\.{P}", r"\1.mid.1.out.\2", change=_pointwise),
        Rule(rf"quant_conv\.{P}", r"project_in.\1"),
        Rule(rf"post_quant_conv\.{P}", r"project_out.\1"),
    ]


def convert_vae(state: Mapping[str, Tensor], *, scale: float, image_size: int = 256) -> CNNTokenizer:
    """scale: the configuration's scaling_factor, by which latents are multiplied. In eval mode."""
    tensors = translate(state, vae_rules(), VAE_SOURCE)
    levels = highest(state, r"encoder\.down_blocks\.(\d+)\..*", VAE_SOURCE)
    channels = shape(state, "encoder.conv_in.weight", VAE_SOURCE)[0]
    widths = [shape(state, f"encoder.down_blocks.{i}.resnets.0.conv1.weight", VAE_SOURCE)[0] for i in range(levels)]
    module = CNNTokenizer(
        image_size=image_size,
        quantizer=KL(channels=shape(state, "post_quant_conv.weight", VAE_SOURCE)[0], scale=scale),
        channels=channels,
        multipliers=[width // channels for width in widths],
        blocks=highest(state, r"encoder\.down_blocks\.0\.resnets\.(\d+)\..*", VAE_SOURCE),
        z_channels=None,
        attention=False,
        groups=min(32, channels),
    )
    load_strict(module, tensors, VAE_SOURCE)
    return module.eval()


def reordered(weight: Tensor, parts: int) -> Tensor:
    """Per part, gates, then shift and scale of attention, of feed-forward, to gates, scales, shifts."""
    pieces = weight.view(parts, 6, -1, *weight.shape[1:])
    return pieces[:, [0, 1, 3, 5, 2, 4]].reshape(weight.shape)


def swapped(weight: Tensor) -> Tensor:
    """Shift and scale to scale and shift."""
    return torch.cat(weight.chunk(2)[::-1])


def rules(patch: int, channels: int) -> list[Rule]:
    """The table of encoder and decoder, without positions, for patches of that side of latents of so many channels."""
    name = r"(encoder|decoder)\.module_dict\.[^.]+\."
    inside, outside = r"encoder\.module_dict\.[^.]+\.", r"decoder\.module_dict\.[^.]+\."
    block, ours = rf"{name}blocks\.(\d+)\.", r"\1.blocks.\2"

    def kernel(weight: Tensor) -> Tensor:  # columns (row, column, channel)
        return weight.view(len(weight), patch, patch, channels).permute(0, 3, 1, 2)

    embeds = [
        Rule(rf"{half}patch_proj\.{p}", f"{target}.conv.{p}", change=kernel if p == "weight" else None)
        for half, target in ((inside, "patches"), (outside, "noisy"))
        for p in ("weight", "bias")
    ]
    return [
        *embeds,
        *(
            Rule(rf"{block}attn\.w{n}\.weight", f"{ours}.attention.qkv.weight", part=(i, 3))
            for i, n in enumerate("qkv")
        ),
        Rule(rf"{block}attn\.proj\.weight", f"{ours}.attention.out.weight"),
        Rule(rf"{block}mlp\.fc1\.weight", f"{ours}.ffn.up.weight", part=(0, 2)),
        Rule(rf"{block}mlp\.fc3\.weight", f"{ours}.ffn.up.weight", part=(1, 2)),
        Rule(rf"{block}mlp\.fc2\.weight", f"{ours}.ffn.down.weight"),
        Rule(
            rf"{block}adaLN_modulation\.1\.{P}",
            rf"{ours}.modulation.projection.\3",
            change=lambda w: reordered(w, 2),
        ),
        Rule(rf"{inside}registers", "registers"),
        Rule(rf"{inside}proj\.{P}", r"project_in.\1"),
        Rule(rf"{outside}dropout_mask_token", "dropped"),
        Rule(rf"{outside}nullcond", "null"),
        Rule(rf"{outside}mlp\.0\.{P}", r"time.up.\1"),
        Rule(rf"{outside}mlp\.2\.{P}", r"time.down.\1"),
        Rule(rf"{outside}adaLN_modulation\.1\.{P}", r"norm.projection.\1", change=swapped),
        Rule(r"decoder\.module_dict\.head\.proj\.(weight|bias)", r"out.\1"),
        Rule(rf"{outside}proj\.{P}", r"project_out.\1"),
        Rule(r"places", "places"),
        Rule(r"table", "table"),
        Rule(r"noisy_table", "noisy_table"),
    ]


def convert(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> FlexTokTokenizer:
    """config: {"FlexTok": what shapes do not tell, from the file's own configuration: `levels` of FSQ,
    `size_sampling_mode` of the nested dropout, `scaling_factor` of the VAE, and `patch_size`, `head_dim`, `image_size`
    where they are not 2, 64 and 256}.
    """
    arguments = dict(config.get("FlexTok", {}))
    unknown = (set(arguments) - ARGUMENTS) | (set(config) - {"FlexTok"})
    if unknown:
        raise ValueError(f"{SOURCE}: unknown arguments {sorted(unknown)}")
    vae = {k.removeprefix(VAE): v for k, v in state.items() if k.startswith(VAE)}
    rest = {k: v for k, v in state.items() if not k.startswith(VAE)}
    size, patch = arguments.get("image_size", 256), arguments.get("patch_size", 2)
    inner = convert_vae(vae, scale=arguments.get("scaling_factor", 1.0), image_size=size) if vae else None
    rest, learned = _positions(rest)
    rest = _head(rest)
    embed = next((v for k, v in rest.items() if k.startswith("encoder.") and k.endswith("patch_proj.weight")), None)
    registers = next((v for k, v in rest.items() if k.endswith(".registers")), None)
    if embed is None or registers is None or "places" not in rest:
        raise ValueError(f"{SOURCE}: no patch_proj, registers or positions of the registers; another model's file?")
    tensors = translate(rest, rules(patch, embed.shape[1] // patch**2), SOURCE)
    depths = [
        highest(rest, rf"{half}\.module_dict\.[^.]+\.blocks\.(\d+)\..*", SOURCE) for half in ("encoder", "decoder")
    ]
    module = FlexTokTokenizer(
        image_size=size,
        quantizer=FSQ(levels=arguments.get("levels", (8, 8, 8, 5, 5, 5))),
        vae=inner,
        patch=patch,
        dim=embed.shape[0],
        depth=depths[0],
        decoder_dim=rest["places"].shape[1],
        decoder_depth=depths[1],
        head=arguments.get("head_dim", 64),
        tokens=len(registers),
        nested=NESTED[arguments.get("size_sampling_mode", "pow2")],
        positions="learned" if learned else "sincos",
        grid=round(len(rest["table"]) ** 0.5) if learned else 16,
    )
    if inner is not None:
        tensors |= {f"vae.{k}": v for k, v in inner.state_dict().items()}
    load_strict(module, tensors, SOURCE)
    return module.eval()


def _positions(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
    """The state with positions under our names, and whether those of the patches are learned.

    posembs [1, D, h, w] are fixed ones, which must be ours; [1, 1, D, N], and extra_registers [N, D], learned ones of
    the registers; [2, 1, D, S] learned ones of the patches, a sum of rows and columns.
    """
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.endswith(".extra_registers"):
            found["places"] = value
        elif not key.endswith(".posembs"):
            found[key] = value
        elif value.dim() == 4 and len(value) == 2:
            rows, columns = value[:, 0]
            total = (rows[:, :, None] + columns[:, None, :]).flatten(1).T
            found["table" if key.startswith("encoder.") else "noisy_table"] = total
        elif value.dim() == 4 and value.shape[:2] == (1, 1):
            found["places"] = value[0, 0].T
        else:
            fixed = sincos(*value.shape[2:], value.shape[1], value.device)
            if not torch.allclose(value[0].flatten(1).T, fixed, atol=1e-5):
                raise ValueError(f"{SOURCE}: {key} is not the fixed table of sines and cosines")
    return found, "table" in found


def _head(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state with the decoder's last projection, the one of a module with a modulation, under `head`."""
    modulated = {k.split(".adaLN_modulation")[0] for k in state if k.startswith("decoder.") and ".adaLN" in k}
    found = {}
    for key, value in state.items():
        owner, _, last = key.rpartition(".proj.")
        found[f"decoder.module_dict.head.proj.{last}" if owner in modulated else key] = value
    return found
