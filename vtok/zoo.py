"""Published tokenizers: where the file is, what is inside it, under which licence, and what was reported.

A plain table. Facts come from the originals' code, READMEs and papers; what is not known to us is None. Keys that were
not compared with the original's own class say `verified=False`, and loading such a file warns. Hub downloads are the
ordinary client's; files kept elsewhere (Google Drive, Dropbox) are fetched by hand and passed as weights=.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

UNSTATED = "none stated in the repository"
RESEARCH = "Apple research licence for the weights (LICENSE_WEIGHTS of apple/ml-flextok)"


@dataclass(frozen=True)
class Entry:
    """A published file. family, config: the converter and the original's own constructor arguments.

    repo, file: on the Hugging Face hub; repo None: not there, `origin` says where. inside: which of the file's weights,
    as `vtok.weight_files.read_weights` takes it. drop: patterns of keys that are no part of the model (frozen
    networks). parameters: of the published model. rfid: as reported, at the image size of the model unless `note` says
    otherwise. licence: of the repository; terms of the weights may differ. research_only: loading asks for consent.
    """

    name: str
    family: str
    file: str
    config: Mapping[str, Any]
    repo: str | None = None
    origin: str | None = None
    inside: str = "auto"
    drop: tuple[str, ...] = ()
    licence: str = UNSTATED
    research_only: bool = False
    parameters: int | None = None
    rfid: float | None = None
    verified: bool = True
    note: str = ""
    kind: str = field(default="tokenizer", kw_only=True)

    @property
    def place(self) -> str:
        """Where the file is published."""
        return f"huggingface.co/{self.repo}: {self.file}" if self.repo else f"{self.origin}: {self.file}"


LLAMAGEN = {"codebook_size": 16384, "codebook_embed_dim": 8}
BIG_SIDES = [1, 2, 3, 4, 6, 9, 13, 18, 24, 32]
VAR_VQVAE = {"vocab_size": 4096, "z_channels": 32, "ch": 160, "share_quant_resi": 4, "test_mode": True}


def _titok(name: str, parameters: int | None, rfid: float | None, *, ta: bool = False, **vq: Any) -> Entry:
    base = {"vit_enc_patch_size": 16, "vit_dec_patch_size": 16}
    config = {"TiTok_config": {"model": {"vq_model": base | vq}, "dataset": {"preprocessing": {"crop_size": 256}}}}
    repo = f"turkeyju/tokenizer_{name}" if ta else f"yucornetto/tokenizer_{name}_imagenet"
    note = "trained on DataComp, with text in the decoder" if ta else ""
    return Entry(
        name.replace("_", "-"),
        "titok",
        "model.safetensors",
        config,
        repo,
        licence="Apache-2.0",
        parameters=parameters,
        rfid=rfid,
        note=note,
    )


def _sizes(encoder: str, decoder: str, tokens: int) -> dict[str, Any]:
    return {"vit_enc_model_size": encoder, "vit_dec_model_size": decoder, "num_latent_tokens": tokens}


LEGACY = {"codebook_size": 4096, "token_size": 12, "use_l2_norm": True, "commitment_cost": 0.25}
LEGACY |= {"finetune_decoder": True}
ONE_STAGE = {"finetune_decoder": False, "is_legacy": False}
VQ8K = ONE_STAGE | {"codebook_size": 8192, "token_size": 64, "use_l2_norm": False, "commitment_cost": 0.25}
VAE16 = ONE_STAGE | {"quantize_mode": "vae", "token_size": 16}
TA_VQ = VQ8K | {"quantize_mode": "vq", "clustering_vq": False}


def _gigatok(name: str, file: str, parts: tuple[str, str], parameters: int, rfid: float | None, **more: Any) -> Entry:
    arguments = {"codebook_size": 16384, "codebook_embed_dim": 8, "codebook_l2_norm": True, "codebook_show_usage": True}
    arguments |= {"commit_loss_beta": 0.25, "entropy_loss_ratio": more.pop("entropy", 0.0), "model_size": None}
    arguments |= {"encoder_ch_mult": [1, 1, 2, 2, 4], "decoder_ch_mult": [1, 1, 2, 2, 4], "num_latent_tokens": 256}
    arguments |= {"encoder_size": parts[0], "decoder_size": parts[1], "z_channels": 256, "dropout_p": 0.0}
    arguments |= {"multi_level_query_init": True, "adaptive_gn": True, "d2s_up": True, "rot": True, "use_attn": False}
    arguments |= {"last_level_2d_query_init": False, "multi_level_2d_query_init": False, "distill_depth": 3}
    arguments |= {"fea_rec_loss_type": "mse", "fea_rec_loss_weight": 1.0}
    family = "retok" if name.startswith("retok") else "gigatok"
    owner = "zfu006/ReTok" if family == "retok" else "SilentView/GigaTok"
    config = {"VQVitModelPlusArgs": arguments}
    facts = {"origin": f"Google Drive, linked in the README of {owner}", "parameters": parameters, "rfid": rfid}
    licence = UNSTATED if family == "retok" else "MIT"
    return Entry(name, family, file, config, licence=licence, **facts, **more)


def _hita(name: str, file: str, ultra: bool, parameters: int, rfid: float) -> Entry:
    shared = {"layer_type": "normal", "image_size": 336, "patch_size": 16, "dim": 512, "depth": 3, "num_head": 8}
    shared |= {"mlp_dim": 2048, "dim_head": 64, "dropout": 0.1, "n_carrier": 128}
    side = {"target": "hita.modules.encoders.pretrained_enc_arch.SelfSupervisedCondtionEmbedder"}
    encoder = {"params": shared | {"in_channels": 1024, "visual_encoder_config": side}}
    decoder = {"params": shared | {"enable_vfm_recon": ultra, "shift_k": 4}}
    arguments = LLAMAGEN | {"codebook_slots_embed_dim": 12, "z_channels": 512}
    return Entry(
        name,
        "hita",
        file,
        {"ModelArgs": arguments, "transformer_config": {"encoder_config": encoder, "decoder_config": decoder}},
        "yexiguafu/hita-gen",
        drop=(r"encode_transformer\.(?:condition_embedder|visual_encoder|encoder)\..*",),
        licence="MIT",
        parameters=parameters,
        rfid=rfid,
        note="reconstructed at 336 px, resized to 256; encoding needs DINOv2-L/14 with registers",
    )


def _detailflow(tokens: int, parameters: int, rfid: float) -> Entry:
    arguments = {"image_size": 256, "max_image_size": 256, "codebook_size": 8192, "codebook_embed_dim": 8}
    arguments |= {"enc_type": "siglip2", "dec_type": "siglip2", "num_latent_tokens": tokens, "group_size": 8}
    arguments |= {"causal_encoder": True, "causal_decoder": False, "global_token_loss_weight": 1.0}
    return Entry(
        f"detailflow-{tokens // 8}",
        "detailflow",
        f"checkpoints/{tokens}.pt",
        {"ModelArgs": arguments},
        f"ByteFlow-AI/DetailFlow-{tokens // 8}",
        drop=(r"repa_model\..*",),
        licence="Apache-2.0",
        parameters=parameters,
        rfid=rfid,
        note="the README warns of +-0.3 between runs",
    )


def _seed_voken(name: str, file: str, repo: str, config: dict, rfid: float, parameters: int | None) -> Entry:
    facts = {"licence": "Apache-2.0", "parameters": parameters, "rfid": rfid, "inside": "state_dict"}
    return Entry(name, "ibq" if "IBQ" in config else "magvit2", file, config, repo, **facts)


def _network(channels: int, multipliers: list[int]) -> dict[str, Any]:
    return {"double_z": False, "z_channels": channels, "ch": 128, "ch_mult": multipliers, "num_res_blocks": 4}


def _ibq(codes: int, parameters: int, rfid: float) -> Entry:
    config = {"IBQ": {"ddconfig": _network(256, [1, 1, 2, 2, 4]), "n_embed": codes, "embed_dim": 256}}
    return _seed_voken(
        f"ibq-{codes}", f"imagenet256_{codes}.ckpt", f"TencentARC/IBQ-Tokenizer-{codes}", config, rfid, parameters
    )


def _magvit2(size: int, multipliers: list[int], rfid: float, parameters: int) -> Entry:
    arguments = {"ddconfig": _network(18, multipliers), "n_embed": 2**18, "embed_dim": 18}
    config, repo = {"VQModel": arguments, "image_size": size}, f"TencentARC/Open-MAGVIT2-Tokenizer-{size}-resolution"
    return _seed_voken(f"open-magvit2-{size}", f"imagenet_{size}_L.ckpt", repo, config, rfid, parameters)


def _flextok(size: str, data: str) -> Entry:
    return Entry(
        f"flextok-{size}-{data}",
        "flextok",
        "model.safetensors",
        {},
        f"EPFL-VILAB/flextok_{size.replace('-', '_')}_{data}",
        licence=RESEARCH,
        research_only=True,
        verified=False,
        note="its configuration is in the file's config.json; the module names in the file are not known to us",
    )


DAR = {"encoder_patch_size": 16, "num_encoder_layers": 8, "num_decoder_layers": 8, "query_low_rank": True}
DAR |= {"encoder_dim": 768, "decoder_dim": 768, "vq_dim": 8, "vq_codebook_size": 16384, "num_denoising_steps": 8}
DAR |= {"num_query_groups": 8, "num_all_queries": 256, "queries_per_step": 32, "vq_enable": True}
DAR["diff_decoder"] = {"in_dim": 3, "out_dim": 3, "dim": 768, "cond_dim": 768, "patch_size": 8, "depth": 12}
DAR["diff_decoder"] |= {"data_std": 0.6, "time_shift": 2, "mlp_head": False, "share_time_encoding": False}
RESTOK = {"codebook_size": 8192, "token_size": 8, "use_l2_norm": True, "commitment_cost": 0.25}
RESTOK |= {"entropy_loss_ratio": 0.0, "vit_enc_model_size": "large", "vit_dec_model_size": "large"}
RESTOK |= {"vit_enc_patch_size": 16, "vit_dec_patch_size": 16, "num_latent_tokens": 128, "num_min_tokens": 4}
RESTOK |= {"hierarchy_stages": 4, "drop_latent_tokens": False}

TABLE: list[Entry] = [
    Entry(
        "llamagen-vq16",
        "llamagen",
        "vq_ds16_c2i.pt",
        {"VQModel_ModelArgs": LLAMAGEN | {"encoder_ch_mult": [1, 1, 2, 2, 4], "decoder_ch_mult": [1, 1, 2, 2, 4]}},
        "FoundationVision/LlamaGen",
        inside="model",
        licence="MIT",
        parameters=71_883_403,
        rfid=2.19,
        note="0.94 on 24 x 24 tokens (384 px), 0.70 on 32 x 32, all evaluated at 256 px",
    ),
    Entry(
        "llamagen-vq8",
        "llamagen",
        "vq_ds8_c2i.pt",
        {"VQModel_ModelArgs": LLAMAGEN | {"encoder_ch_mult": [1, 2, 2, 4], "decoder_ch_mult": [1, 2, 2, 4]}},
        "FoundationVision/LlamaGen",
        inside="model",
        licence="MIT",
        parameters=70_109_835,
        rfid=0.59,
    ),
    Entry(
        "var-vqvae",
        "var",
        "vae_ch160v4096z32.pth",
        {"VQVAE": VAR_VQVAE},
        "FoundationVision/var",
        licence="MIT",
        parameters=108_948_355,
        note="the same file serves 256 and 512 px (v_patch_nums)",
    ),
    Entry(
        "flexvar-vqvae",
        "flexvar",
        "FlexVAE.pth",
        {"VQModel_ModelArgs": {"codebook_size": 8912, "codebook_embed_dim": 32}},
        "jiaosiyu1999/FlexVAR",
        inside="model",
        licence="MIT",
        parameters=72_049_827,
        note="8,912 codes, not 8,192",
    ),
    Entry(
        "kl16",
        "kl",
        "kl16.ckpt",
        {"AutoencoderKL": {"embed_dim": 16, "ch_mult": [1, 1, 2, 2, 4]}},
        origin="Dropbox, linked in the README of LTH14/mar",
        inside="model",
        licence="MIT",
        parameters=66_456_019,
        rfid=0.53,
        note="of MAR, xAR and FlowAR; about 254 MB; others measure rFID 0.57",
    ),
    Entry(
        "maskgit-vqgan",
        "maskgit_vqgan",
        "maskgit-vqgan-imagenet-f16-256.bin",
        {"Encoder_Decoder": {"channel_mult": [1, 1, 2, 2, 4]}, "VectorQuantizer": {"num_embeddings": 1024}},
        "fun-research/TiTok",
        licence="Apache-2.0",
        parameters=54_515_587,
        rfid=2.28,
        note="RAR's tokenizer; rFID about, by a maintainer",
    ),
    _titok("titok_l32", 641_054_735, 2.21, **LEGACY, **_sizes("large", "large", 32)),
    _titok("titok_b64", 204_814_095, 1.70, **LEGACY, **_sizes("base", "base", 64)),
    _titok("titok_s128", 83_674_639, 1.71, **LEGACY, **_sizes("small", "small", 128)),
    _titok("titok_bl64_vq8k", 390_016_148, 2.06, **VQ8K, **_sizes("base", "large", 64)),
    _titok("titok_bl128_vq8k", 390_179_988, 1.49, **VQ8K, **_sizes("base", "large", 128)),
    _titok("titok_sl256_vq8k", 330_260_884, 1.03, **VQ8K, **_sizes("small", "large", 256)),
    _titok("titok_ll32_vae_c16", 606_879_604, 1.61, **VAE16, **_sizes("large", "large", 32)),
    _titok("titok_bl64_vae_c16", 389_418_100, 1.25, **VAE16, **_sizes("base", "large", 64)),
    _titok("titok_bl128_vae_c16", 389_581_940, 0.84, **VAE16, **_sizes("base", "large", 128)),
    _titok("tatitok_bl32_vq", 390_800_532, 3.95, ta=True, **TA_VQ, **_sizes("base", "large", 32)),
    _titok("tatitok_bl64_vq", 390_882_452, 2.43, ta=True, **TA_VQ, **_sizes("base", "large", 64)),
    _titok("tatitok_bl128_vq", 391_046_292, 1.53, ta=True, **TA_VQ, **_sizes("base", "large", 128)),
    _titok("tatitok_bl32_vae", 390_202_484, 1.53, ta=True, **VAE16, **_sizes("base", "large", 32)),
    _titok("tatitok_bl64_vae", 390_284_404, 1.47, ta=True, **VAE16, **_sizes("base", "large", 64)),
    _titok("tatitok_sl128_vae", 330_275_188, 0.90, ta=True, **VAE16, **_sizes("small", "large", 128)),
    _gigatok("gigatok-ss", "VQ_SS256_e100.pt", ("small", "small"), 136_073_227, 1.01),
    _gigatok("gigatok-sb", "VQ_SB256_e200.pt", ("small", "base"), 232_399_627, 0.89),
    _gigatok("gigatok-bl", "VQ_BL256_e200.pt", ("base", "large"), 621_637_131, 0.81),
    _gigatok("gigatok-bl-dino", "VQ_BL256_dino_disc.pt", ("base", "large"), 621_637_131, 0.51),
    _gigatok("gigatok-xlxxl", "VQ_XLXXL256_e300.pt", ("xl", "xxl"), 2_893_970_443, 0.79, entropy=0.005),
    _gigatok("retok-sb", "VQ_SB256_e250.pt", ("small", "base"), 232_686_347, None),
    Entry(
        "restok-l128",
        "restok",
        "pytorch_model.bin",
        {"ResTok_config": {"model": {"vq_model": RESTOK}, "dataset": {"preprocessing": {"crop_size": 256}}}},
        "xushu-me/restok_l_128.r256_in1k",
        drop=(r"foundation_model\..*",),
        licence="Apache-2.0",
        parameters=659_693_771,
        rfid=1.28,
        note="661.79 M with the heads of training",
    ),
    _hita("hita-v", "vanilla/tokenizer/hita-tok.pt", False, 104_240_839, 1.03),
    _hita("hita-u", "ultra/tokenizer/hita-ultra.pt", True, 104_767_687, 0.57),
    _detailflow(128, 272_773_448, 1.13),
    _detailflow(256, 273_314_120, 0.80),
    _detailflow(512, 274_395_464, 0.52),
    Entry(
        "dar",
        "dar",
        "D-AR-tokenizer_v1.pt",
        {"VQModel": DAR},
        "showlab/D-AR",
        licence="MIT",
        parameters=307_444_672,
        rfid=1.52,
        note="averaged weights where the file has them; rFID depends on the noise's seed",
    ),
    _flextok("d12-d12", "in1k"),
    _flextok("d18-d18", "in1k"),
    _flextok("d18-d28", "in1k"),
    _flextok("d18-d28", "dfn"),
    _magvit2(256, [1, 1, 2, 2, 4], 1.17, 115_127_829),
    _magvit2(128, [1, 2, 2, 4], 1.18, 112_021_653),
    _ibq(1024, 107_049_859, 2.24),
    _ibq(8192, 108_884_867, 1.87),
    _ibq(16384, 110_982_019, 1.37),
    _ibq(262144, 173_896_579, 1.00),
    Entry(
        "ifsq-f16",
        "ifsq",
        "none",
        {
            "ImageFSQVAEModel": {
                "hidden_size": 128,
                "z_channels": 4,
                "hidden_size_mult": [1, 1, 2, 4, 4],
                "num_res_blocks": 2,
                "embed_dim": 4,
                "resolution": 256,
                "attn_resolutions": [],
                "levels": [17, 17, 17, 17],
                "do_simple_bound": True,
                "act_fun": "scale_sigmoid_16",
            }
        },
        origin="no weights are published; a file of the original's training",
        inside="ema",
        licence="Apache-2.0 (badge; the files have Tencent's header)",
        parameters=83_324_099,
    ),
]
TOKENIZERS: dict[str, Entry] = {entry.name: entry for entry in TABLE}
