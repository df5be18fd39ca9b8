"""The originals' own modules of the zoo's entries, at full size, for `scripts/manifests.py`.

Each branch says how an original's class is called with the arguments of the entry, and adds the published settings that
do not change what our converter does. Imports come from the checkout that is first on sys.path.
"""

from __future__ import annotations

import importlib
import json
import sys
import types
from typing import Any

CHECKOUTS = {
    "llamagen": "FoundationVision+LlamaGen",
    "var": "FoundationVision+VAR",
    "flexvar": "jiaosiyu1999+FlexVAR",
    "xar": "OliverRensu+xAR",
    "mar": "LTH14+mar",
    "kl": "LTH14+mar",
    "rar": "bytedance+1d-tokenizer",
    "titok": "bytedance+1d-tokenizer",
    "maskgit": "bytedance+1d-tokenizer",
    "maskgit_vqgan": "bytedance+1d-tokenizer",
    "gigatok": "SilentView+GigaTok",
    "retok": "zfu006+ReTok",
    "restok": "Kwai-Kolors+ResTok",
    "har": "Kwai-Kolors+ResTok",
    "hita": "CVMI-Lab+Hita",
    "dar": "showlab+D-AR",
    "detailflow": "ByteFlow-AI+DetailFlow",
    "magvit2": "TencentARC+SEED-Voken",
    "ibq": "TencentARC+SEED-Voken",
    "ifsq": "Tencent-Hunyuan+iFSQ/ifsq",
}


def checkout(entry: Any) -> str | None:
    """Folder of the original, None where its class is not public. ReTok's GPT is GigaTok's, from its own repository."""
    return CHECKOUTS.get("retok" if entry.name.startswith("retok") else entry.family)


def of(name: str, **arguments: Any) -> Any:
    """arguments as an object that configurations are read from with dots."""
    from omegaconf import OmegaConf

    return OmegaConf.create(arguments[name])


def _detailflow(arguments: dict[str, Any]) -> Any:
    """The tokenizer, with SigLIP2 of the published so400m-patch16-naflex size in place of its downloaded weights."""
    import os

    import transformers

    os.environ["CACHE_DATA_PATH"] = "."
    sizes = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
    sizes |= {"num_patches": 256, "patch_size": 16}

    def config(folder: str, attn_implementation: str = "", **changes: Any) -> Any:
        return transformers.Siglip2VisionConfig(**sizes | changes)

    real = transformers.Siglip2VisionModel

    class Shell(real):
        from_pretrained = staticmethod(lambda folder, **_: real(config(folder)))

    vit = importlib.import_module("modelling.modules.siglip2_vit")
    vit.Siglip2VisionModel, vit.Siglip2VisionConfig.from_pretrained = Shell, config
    module = importlib.import_module("modelling.tokenizer")
    published = {"encoder_model": "siglip2_base", "decoder_model": "siglip2_base", "repa_model": "siglip2"}
    return module.VQModel(module.ModelArgs(**published, repa_proj_dim=1024, **arguments))


def build(entry: Any) -> Any:
    """The original's module of a zoo entry. Imports from the current sys.path."""
    import torch

    get, config, generator = importlib.import_module, dict(entry.config), entry.kind == "generator"
    if entry.family == "var":
        models = get("models")
        arguments = {k: v for k, v in config.get("VQVAE", {}).items() if k != "v_patch_nums"}
        sides = tuple(config.get("VQVAE", {}).get("v_patch_nums", (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)))
        vae = models.VQVAE(**arguments, v_patch_nums=sides)
        return models.VAR(vae_local=vae, **config["VAR"] | {"patch_nums": sides}) if generator else vae
    if entry.family == "flexvar":
        vq = get("models.vq_llama")
        if not generator:
            return vq.VQModel(vq.ModelArgs(**config["VQModel_ModelArgs"]))
        vae = vq.VQModel(vq.ModelArgs(codebook_size=8912, codebook_embed_dim=32))
        return get("models.flexvar").FlexVAR(vae_local=vae, **config["FlexVAR"])
    if entry.family in ("llamagen", "gigatok", "retok", "dar", "hita", "detailflow", "har") and generator:
        names = {"gigatok": "gpt_1d", "retok": "gpt_1d", "har": "gpt_har"}
        gpt = get(f"autoregressive.models.{names.get(entry.family, 'gpt')}")
        if entry.family == "har":
            gpt.Transformer.__init__.__globals__["BaseModel"] = torch.nn.Module
        return gpt.Transformer(gpt.ModelArgs(**config["Transformer_ModelArgs"]))
    if entry.family == "llamagen":
        vq = get("tokenizer.tokenizer_image.vq_model")
        return vq.VQModel(vq.ModelArgs(**config["VQModel_ModelArgs"]))
    if entry.family == "xar":
        return get("models.xar").xAR(**config["xAR"])
    if entry.family == "mar":
        return get("models.mar").MAR(**config["MAR"])
    if entry.family == "kl":
        return get("models.vae").AutoencoderKL(**config["AutoencoderKL"])
    if entry.family == "rar":
        return get("modeling.rar").RAR(of("RAR_config", **config))
    if entry.family == "maskgit":
        # the versions of 2024 tied nothing here, since BertModel had no output embedding; the files' 177 M say so
        get("transformers").BertModel.get_output_embeddings = lambda self: None
        name = next(iter(config))
        return getattr(get("modeling.maskgit"), name.removesuffix("_config"))(of(name, **config))
    if entry.family == "titok":
        ta = entry.name.startswith("ta")
        module = get("modeling.tatitok" if ta else "modeling.titok")
        return (module.TATiTok if ta else module.TiTok)(of("TiTok_config", **config))
    if entry.family == "maskgit_vqgan":
        module = get("modeling.modules.maskgit_vqgan")
        network = {"channel_mult": [1, 1, 2, 2, 4], "num_resolutions": 5, "dropout": 0.0, "hidden_channels": 128}
        network |= {"num_channels": 3, "num_res_blocks": 2, "resolution": 256, "z_channels": 256}
        parts = torch.nn.Module()
        parts.encoder, parts.decoder = module.Encoder(of("n", n=network)), module.Decoder(of("n", n=network))
        parts.quantize = module.VectorQuantizer(num_embeddings=1024, embedding_dim=256, commitment_cost=0.25)
        return parts
    if entry.family in ("gigatok", "retok"):
        module = get("tokenizer.tokenizer_image.vq.vq_vit_model")
        return module.VQVitModelPlus(module.VQVitModelPlusArgs(**config["VQVitModelPlusArgs"]))
    if entry.family == "restok":
        published = {"merge_tokens": True, "residual_image_tokens": True, "residual_latent_tokens": True}
        published |= {"learnable_latent_tokens": False, "learnable_dec_image_tokens": True, "multi_quant": True}
        published |= {"vae_encoder": True, "latent_hierarchy": True, "learnable_dec_feat_tokens": True}
        published |= {"reduction_ratio": 0.5, "rope_base_len": 10000, "test_num_latent_tokens": 128, "drop_prob": 0.0}
        published |= {"encoder_feature_supervision": False, "decoder_feature_supervision": False}
        whole = json.loads(json.dumps(config["ResTok_config"]))
        whole["model"]["vq_model"] |= published
        return get("modeling.restok").ResTok(of("c", c=whole))
    if entry.family == "hita":
        module = get("hita.tokenizer.tokenizer_image.vq_model")
        stand_in = types.ModuleType("stand_in")
        stand_in.Frozen = type("Frozen", (torch.nn.Module,), {"is_trainable": False})
        stand_in.Frozen.__init__ = lambda self, **_: torch.nn.Module.__init__(self)
        sys.modules["stand_in"] = stand_in
        whole = json.loads(json.dumps(config["transformer_config"]))
        for half, name in (("encoder", "Encoder"), ("decoder", "Decoder")):
            whole[f"{half}_config"]["target"] = f"hita.core.layers.{name}"
        side = {"target": "stand_in.Frozen", "params": {}}
        whole["encoder_config"]["params"]["visual_encoder_config"] = side
        keys = {
            k: v for k, v in config["ModelArgs"].items() if k in ("codebook_size", "codebook_embed_dim", "z_channels")
        }
        return module.VQ_models["VQ-16"](**keys, transformer_config=of("c", c=whole))
    if entry.family == "detailflow":
        return _detailflow(config["ModelArgs"])
    if entry.family == "ifsq":
        sys.modules["src"] = types.ModuleType("src")  # its own __init__ imports data sets and metrics
        sys.modules["src"].__path__ = [f"{sys.path[0]}/src"]
        get("diffusers").ModelMixin = get("diffusers.models.modeling_utils").ModelMixin = torch.nn.Module
        settings = get("diffusers.configuration_utils")
        settings.ConfigMixin = get("diffusers").ConfigMixin = type("ConfigMixin", (), {})
        settings.register_to_config = lambda init: init
        get("diffusers.utils").BaseOutput = type("BaseOutput", (), {})
        arguments = {k: v for k, v in config["ImageFSQVAEModel"].items() if k != "attn_resolutions"}
        blocks, half = ["ResnetBlock2D"] * 5, "spatial_{}sample"
        arguments |= {"encoder_resnet_blocks": blocks, "decoder_resnet_blocks": blocks, "norm_type": "groupnorm"}
        arguments |= {f"encoder_{half.format('down')}": ["Downsample"] * 4 + [""]}
        arguments |= {f"decoder_{half.format('up')}": [""] + ["Upsample"] * 4}
        return get("src.model.fsqvae.modeling_imagefsqvae").ImageFSQVAEModel(**arguments)
    if entry.family == "dar":
        return get("tokenizer.tokenizer_image.vq_model").VQModel(of("VQModel", **config))
    if entry.family in ("magvit2", "ibq"):
        main = types.ModuleType("main")
        main.instantiate_from_config = lambda config: torch.nn.Module()
        sys.modules["main"] = main
        if entry.family == "ibq":
            return get("src.IBQ.models.ibqgan").IBQ(
                **_voken(config["IBQ"], attn_resolutions=[16], dropout=0.0), lossconfig={}, use_ema=False
            )
        weights = {"sample_minimization_weight": 1.0, "batch_maximization_weight": 1.0}
        arguments = _voken(config["VQModel"]) | weights
        return get("src.Open_MAGVIT2.models.lfqgan").VQModel(**arguments, lossconfig={}, use_ema=False)
    raise ValueError(f"{entry.name}: nothing builds {entry.family}")


def _voken(arguments: dict, **network: Any) -> dict[str, Any]:
    common = {"resolution": 256, "in_channels": 3, "out_ch": 3}
    return arguments | {"ddconfig": common | arguments["ddconfig"] | network}
