"""Original tokenizers beside ours, as eval/peers.py does for generators: encoding and decoding of 256-pixel images."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eval.peers import LIGHT_IMAGES, Options, Output, Pair, exact, fill, resets_kept, shipped, sized, timed
from vtok.convert import convert
from vtok.decoding import decode_images, encode_images, light_tokenizer
from vtok.tokenizer import Tokenizer


def compare(
    encode: Callable[[Tensor], Tensor],
    decode: Callable[[Tensor], Tensor],
    ours: Tokenizer,
    options: Options,
    *,
    clamped: bool = False,
) -> Pair:
    """The pair of an original's encode (images to ids [B, N]) and decode (ids to images) with our module.

    clamped: the original's decode ends by clamping to [-1, 1]. Where it does not, neither side is clamped for the
    check: random weights leave that range several times over, and so does the rounding that the check allows for.
    """
    size, fast = ours.spec.image_size, copy.deepcopy(ours.to(options.device))
    light_tokenizer(fast, options.dtype)
    images = (torch.rand(options.batch, 3, size, size) * 2 - 1).to(options.device)
    with torch.inference_mode(), exact():
        ids = encode(images)

    def inferred(run: Callable[[Tensor], Any], given: Tensor) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with torch.inference_mode():
                return run(given)

        return call

    def quick_encode(given: Tensor) -> Tensor:
        return encode_images(fast, given, dtype=options.dtype_of("encode"))

    def quick_decode(given: Tensor) -> Tensor:
        return decode_images(fast, given, dtype=options.dtype)

    def same() -> list[Output]:
        with torch.inference_mode():
            theirs, plain, quick = decode(ids), ours.decode(ids), quick_decode(ids)
            if clamped:
                plain, quick = plain.clamp(-1, 1), quick.clamp(-1, 1)
            return [
                Output("ids", ids, ours.encode(images)),
                Output("images", theirs, plain),
                timed("ids", ids, quick_encode(images), options.rounded("encode")),
                timed("images", theirs, quick, options.rounded("decode"), LIGHT_IMAGES),
            ]

    theirs = [shipped(inferred(run, given), options) for run, given in ((encode, images), (decode, ids))]
    parts = {
        "encode": (theirs[0], inferred(quick_encode, images)),
        "decode": (theirs[1], inferred(quick_decode, ids)),
    }
    return Pair(same, parts, fast, f"{size} px, {ids.shape[1]} tokens")


def spread(module: nn.Module) -> nn.Module:
    """Random weights; the codes further apart, so that rounding decides no id."""
    fill(module.requires_grad_(True)).requires_grad_(False)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("quantize.embedding.weight") and "pixel" not in name:
                parameter.normal_()
    return module


def llamagen_vq(folder: Path, options: Options) -> Pair:
    module = importlib.import_module("tokenizer.tokenizer_image.vq_model")
    size = sized(options, module.VQ_models)
    theirs = spread(module.VQ_models[size](codebook_size=16384, codebook_embed_dim=8))
    ours = convert("llamagen", theirs.state_dict(), {"VQModel_ModelArgs": vars(theirs.config)})
    theirs.to(options.device)
    side, channels = int(ours.spec.layout.length**0.5), theirs.config.codebook_embed_dim

    def decode(ids: Tensor) -> Tensor:
        return theirs.decode_code(ids, (len(ids), channels, side, side))

    return compare(lambda x: theirs.encode(x)[2][2].view(len(x), -1), decode, ours, options)


def var_vqvae(folder: Path, options: Options) -> Pair:
    sized(options, ["vae_ch160v4096z32"])
    models = importlib.import_module("models")
    with resets_kept():
        vae, _ = models.build_vae_var(device="cpu", depth=1)
    spread(vae)
    sides = vae.quantize.v_patch_nums
    ours = convert("var", vae.state_dict(), {"VQVAE": {"v_patch_nums": sides}})
    vae.to(options.device)

    def decode(ids: Tensor) -> Tensor:
        return vae.idxBl_to_img(list(ids.split([s * s for s in sides], 1)), same_shape=True, last_one=True)

    return compare(lambda x: torch.cat(vae.img_to_idxBl(x), 1), decode, ours, options, clamped=True)


def titok(folder: Path, options: Options) -> Pair:
    omegaconf, module = importlib.import_module("omegaconf"), importlib.import_module("modeling.titok")
    configs = folder / "configs/infer/TiTok"
    size = sized(options, sorted(file.stem for file in configs.glob("*.yaml")))
    config = omegaconf.OmegaConf.load(configs / f"{size}.yaml")
    theirs = spread(module.TiTok(config).eval())
    ours = convert("titok", theirs.state_dict(), {"TiTok_config": omegaconf.OmegaConf.to_container(config)})
    theirs.to(options.device)

    def encode(images: Tensor) -> Tensor:
        return theirs.encode((images + 1) / 2)[1]["min_encoding_indices"].view(len(images), -1)

    return compare(encode, lambda ids: theirs.decode_tokens(ids.unsqueeze(1)) * 2 - 1, ours, options)


BUILDERS = {"llamagen_vq": llamagen_vq, "var_vqvae": var_vqvae, "titok": titok}
