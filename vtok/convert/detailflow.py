"""DetailFlow's tokenizer (ByteFlow-AI/DetailFlow, modelling/tokenizer.py) as DetailFlowTokenizer.

Files: DetailFlow-16/32/64, 128.pt / 256.pt / 512.pt; pass their `model` entry (or `ema`). The frozen SigLIP2 inside,
`repa_model`, `codebook_used`, and the projection of the unused REPA branch are dropped. The patch embedding is a linear
layer over (row, column, colour) in the original, a convolution here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vtok.checkpoint import load_strict
from vtok.convert.table import Rule, check, highest, shape, translate
from vtok.models.detailflow import DetailFlowTokenizer
from vtok.quantize.vq import VQ

SOURCE = "DetailFlow tokenizer"
ARGUMENTS = {"image_size", "max_image_size", "codebook_size", "codebook_embed_dim", "codebook_l2_norm"}
ARGUMENTS |= {"codebook_show_usage", "commit_loss_beta", "entropy_loss_ratio", "vq_loss_ratio", "enc_type", "dec_type"}
ARGUMENTS |= {"encoder_model", "decoder_model", "num_latent_tokens", "enc_tuning_method", "dec_tuning_method"}
ARGUMENTS |= {"enc_pretrained", "dec_pretrained", "enc_patch_size", "dec_patch_size", "causal_encoder"}
ARGUMENTS |= {"causal_decoder", "group_size", "causal_num", "global_token_loss_weight", "correction_training", "repa"}
ARGUMENTS |= {"repa_model", "repa_patch_size", "repa_proj_dim", "repa_loss_weight", "repa_layer_indices", "repa_align"}
SIZES = {"pretrained", "num_latent_tokens", "layer_num", "embed_dim", "num_heads", "patch_size", "group_size"}
SIZES |= {"causal_num"}
REPLACED = "SiglipEncoder_and_Decoder"  # the goldens' sizes; the published ones are in the names of ModelArgs
HEADS = {1152: 16, 768: 12}  # of SigLIP2 so400m and of the decoder
P = r"(weight|bias)"


def _siglip(half: str, target: str, patch: int, dim: int) -> list[Rule]:
    """A SigLIP2 trunk, patches and positions."""
    layer = rf"{half}encoder\.layers\.(\d+)"
    rules = [
        Rule(rf"{layer}\.self_attn\.{n}_proj\.{P}", rf"{target}.trunk.blocks.\1.attention.qkv.\2", part=(i, 3))
        for i, n in enumerate("qkv")
    ]
    return [
        *rules,
        Rule(rf"{layer}\.self_attn\.out_proj\.{P}", rf"{target}.trunk.blocks.\1.attention.out.\2"),
        Rule(rf"{layer}\.layer_norm(1|2)\.{P}", rf"{target}.trunk.blocks.\1.norm\2.\3"),
        Rule(rf"{layer}\.mlp\.fc1\.{P}", rf"{target}.trunk.blocks.\1.ffn.up.\2"),
        Rule(rf"{layer}\.mlp\.fc2\.{P}", rf"{target}.trunk.blocks.\1.ffn.down.\2"),
        Rule(rf"{half}post_layernorm\.{P}", rf"{target}.trunk.norm.\1"),
        Rule(rf"{half}embeddings\.position_embedding\.weight", f"{target}.positions"),
        Rule(rf"{half}embeddings\.patch_embedding\.bias", f"{target}.patches.conv.bias"),
        Rule(
            rf"{half}embeddings\.patch_embedding\.weight",
            f"{target}.patches.conv.weight",
            change=lambda w: w.view(dim, patch, patch, 3).permute(0, 3, 1, 2),
        ),
    ]


def rules(patch: int, dim: int, correction: bool) -> list[Rule]:
    """The table for an encoder of that patch and width; without correction its second queries are unused."""

    def row(table: Tensor) -> Tensor:
        return table[0]

    return [
        *_siglip(r"encoder\.visual_model\.", "encoder", patch, dim),
        *_siglip(r"decoder\.visual_model\.", "decoder", patch, dim),
        Rule(r"encoder\.latent_tokens", "encoder.latents", change=row),
        Rule(r"encoder\.refined_tokens", "encoder.refined" if correction else None, change=row),
        Rule(r"(encoder|decoder)\.latent_pos_embed", r"\1.places", change=row),
        Rule(r"decoder\.mask_token", "decoder.mask", change=row),
        Rule(rf"decoder\.to_pixel\.model\.{P}", r"decoder.out.\1"),
        Rule(rf"quant_conv\.{P}", r"project_in.\1"),
        Rule(rf"post_quant_conv\.{P}", r"project_out.\1"),
        Rule(rf"refine_conv\.{P}", r"project_back.\1"),
        Rule(rf"global_token_proj\.(0|2|4)\.{P}", r"global_head.\1.\2"),
        Rule(r"quantize\.embedding\.weight", "quantizer.codebook.weight"),
        Rule(r"quantize\.codebook_used", None),
        Rule(r"repa_model\.visual_model\..*", None),
        Rule(rf"projection\.(0|2|4)\.{P}", None),
    ]


def start_from_siglip2(module: DetailFlowTokenizer, state: Mapping[str, Tensor]) -> DetailFlowTokenizer:
    """The encoder's patches, positions, layers and norm from SigLIP2 so400m-patch16-naflex, in place.

    state: the published model.safetensors, of which text tower and pooling head are left aside, as are layers beyond
    the encoder's depth (12 of 27). Save the result as a folder and train with init_from=<folder>.
    """
    prefix, encoder = "vision_model.", module.encoder
    vision = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    depth = len(encoder.trunk.blocks)
    used = {
        key: value
        for key, value in vision.items()
        if not key.startswith("head.")
        and not ((at := re.match(r"encoder\.layers\.(\d+)\.", key)) and int(at[1]) >= depth)
    }
    dim, patch = encoder.trunk.dim, encoder.patches.patch
    tensors = translate(used, _siglip("", "encoder", patch, dim), "SigLIP2")
    own = module.state_dict()
    wanted = {k for k in own if k.startswith(("encoder.trunk.", "encoder.patches.", "encoder.positions"))}
    if wanted != set(tensors):
        raise ValueError(f"SigLIP2: {len(wanted ^ set(tensors))} tensors do not fit, e.g. {min(wanted ^ set(tensors))}")
    load_strict(module, own | tensors, "SigLIP2")
    return module


def convert(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> DetailFlowTokenizer:
    """config: {"ModelArgs": arguments of the original's class, as config.json holds them}; what is left out has its
    default there. The goldens name the sizes of their smaller trunks beside it; heads are the published ones otherwise.
    """
    arguments, sizes = dict(config.get("ModelArgs", {})), dict(config.get(REPLACED, {}))
    unknown = (set(arguments) - ARGUMENTS) | (set(config) - {"ModelArgs", REPLACED, "siglip2_config"})
    unknown |= set(sizes) - SIZES
    if unknown:
        raise ValueError(f"{SOURCE}: unknown arguments {sorted(unknown)}")
    if not arguments.get("causal_encoder", False) or arguments.get("causal_decoder", True):
        raise ValueError(f"{SOURCE}: only causal_encoder=True with causal_decoder=False is supported")
    dim, columns = shape(state, "encoder.visual_model.embeddings.patch_embedding.weight", SOURCE)
    patch = int((columns // 3) ** 0.5)
    tensors = translate(state, rules(patch, dim, "refine_conv.weight" in state), SOURCE)
    vocab_size, channels = shape(state, "quantize.embedding.weight", SOURCE)
    tokens = shape(state, "encoder.latent_tokens", SOURCE)[1]
    decoder_dim = shape(state, "decoder.mask_token", SOURCE)[2]
    found = {"codebook_size": vocab_size, "codebook_embed_dim": channels, "num_latent_tokens": tokens}
    check(arguments, found | {"enc_patch_size": patch, "dec_patch_size": patch}, SOURCE)
    check(sizes, {"num_latent_tokens": tokens, "embed_dim": dim, "patch_size": patch}, SOURCE)
    if not sizes and not {dim, decoder_dim} <= set(HEADS):
        raise ValueError(f"{SOURCE}: widths {dim} and {decoder_dim} are not the published ones; name num_heads")
    layers = r"\.visual_model\.encoder\.layers\.(\d+)\..*"
    widths = {
        half: shape(state, f"{half}.visual_model.encoder.layers.0.mlp.fc1.weight", SOURCE)[0]
        for half in ("encoder", "decoder")
    }
    module = DetailFlowTokenizer(
        image_size=arguments.get("image_size", 256),
        quantizer=VQ(
            vocab_size=vocab_size,
            channels=channels,
            l2_norm=arguments.get("codebook_l2_norm", True),
            beta=arguments.get("commit_loss_beta", 0.25),
            entropy_weight=arguments.get("entropy_loss_ratio", 0.0),
            codebook_weight=arguments.get("vq_loss_ratio", 1.0),
        ),
        tokens=tokens,
        group=arguments.get("group_size", 1),
        causal=arguments.get("causal_num") or sizes.get("causal_num"),
        patch=patch,
        dim=dim,
        depth=highest(state, rf"encoder{layers}", SOURCE),
        heads=sizes.get("num_heads") or HEADS[dim],
        hidden=widths["encoder"],
        decoder_dim=decoder_dim,
        decoder_depth=highest(state, rf"decoder{layers}", SOURCE),
        decoder_heads=sizes.get("num_heads") or HEADS[decoder_dim],
        decoder_hidden=widths["decoder"],
        grid=int(shape(state, "encoder.visual_model.embeddings.position_embedding.weight", SOURCE)[0] ** 0.5),
        correction="refine_conv.weight" in state,
        global_width=state["global_token_proj.4.weight"].shape[0] if "global_token_proj.4.weight" in state else None,
    )
    load_strict(module, tensors, SOURCE)
    return module.eval()
