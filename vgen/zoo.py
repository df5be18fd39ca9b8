"""Published generators: their files, the settings that their papers sample with, and what was reported.

    python -m vgen.zoo            lists them all
    python sample.py from=zoo:var-d16 classes=[207,360] out=grid.png

sampling uses the keys of configs/sample.yaml; guidance scales are ours, c + (s - 1)(c - u), so VAR's cfg 1.5 is 2.5.
FIDs carry their evaluator, since evaluators do not agree: ADM's TensorFlow one, torch-fidelity, or pytorch_fid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vtok.zoo import BIG_SIDES, TOKENIZERS, UNSTATED, Entry

ADM, FIDELITY, PYTORCH_FID = "ADM TensorFlow evaluator", "torch-fidelity", "pytorch_fid"
GOOGLE = "Google Drive, linked in the README of "


@dataclass(frozen=True)
class GeneratorEntry(Entry):
    """A published generator. tokenizer: name in vtok.zoo; tokenizer_config: what its config says differently here.

    sampling: the paper's settings, None where none are published. fid, inception_score, evaluator: as reported with
    them; source: README, paper, or a third party. image_size: what it draws; resize: how it is brought to 256 px for
    evaluation, None where it already is.
    """

    tokenizer: str = ""
    tokenizer_config: Mapping[str, Any] = field(default_factory=dict)
    sampling: Mapping[str, Any] | None = None
    fid: float | None = None
    inception_score: float | None = None
    evaluator: str | None = None
    source: str | None = None
    image_size: int = 256
    resize: str | None = None
    kind: str = field(default="generator", kw_only=True)


LLAMAGEN = {  # depth, width, heads, parameters
    "B": (12, 768, 12, 110_888_448),
    "L": (24, 1024, 16, 342_910_976),
    "XL": (36, 1280, 20, 774_699_520),
    "XXL": (48, 1536, 24, 1_410_972_672),
    "3B": (24, 3200, 32, 3_096_659_200),
    "2B": (48, 1920, 32, None),
}


def _ctor(size: str, tokens: int, vocab_size: int, **more: Any) -> dict[str, Any]:
    depth, width, heads, _ = LLAMAGEN[size]
    found = {"dim": width, "n_layer": depth, "n_head": heads, "vocab_size": vocab_size, "block_size": tokens}
    return {"Transformer_ModelArgs": found | {"num_classes": 1000, "model_type": "c2i", "cls_token_num": 1} | more}


def _llamagen(size: str, pixels: int, scale: float | None, fid: float, score: float | None) -> GeneratorEntry:
    tokens = (pixels // 16) ** 2
    big = size in ("XXL", "3B")
    return GeneratorEntry(
        f"llamagen-{size.lower()}-{pixels}",
        "llamagen",
        f"c2i_{size}_{pixels}.pt",
        _ctor(size, tokens, 16384),
        "FoundationVision/LlamaGen",
        inside="raw",
        licence="MIT",
        parameters=LLAMAGEN[size][3],
        tokenizer="llamagen-vq16",
        tokenizer_config={"image_size": pixels},
        sampling=None if scale is None else {"guidance": scale, "schedule": "constant"},
        fid=fid,
        inception_score=score,
        evaluator=ADM,
        source="README; IS: paper" if score else "README",
        image_size=pixels,
        resize="bicubic" if pixels != 256 else None,
        note="labels drawn at random, not balanced" + ("; a bare state dict" if big else ""),
    )


def _var(depth: int, parameters: int, fid: float, score: float | None = None) -> GeneratorEntry:
    arguments: dict[str, Any] = {"num_classes": 1000, "depth": depth, "embed_dim": 64 * depth, "num_heads": depth}
    arguments |= {"shared_aln": depth == 36, "attn_l2_norm": True, "drop_path_rate": 0.1 * depth / 24}
    sides = {"v_patch_nums": BIG_SIDES} if depth == 36 else {}
    arguments |= {"patch_nums": BIG_SIDES} if depth == 36 else {}
    known = {"guidance": 2.5, "schedule": "linear", "top_k": 900, "top_p": 0.96}
    vqvae = {"vocab_size": 4096, "z_channels": 32, "ch": 160, "share_quant_resi": 4, "test_mode": True} | sides
    return GeneratorEntry(
        f"var-d{depth}",
        "var",
        f"var_d{depth}.pth",
        {"VAR": arguments, "VQVAE": vqvae},
        "FoundationVision/var",
        licence="MIT",
        parameters=parameters,
        tokenizer="var-vqvae",
        tokenizer_config={"VQVAE": sides},
        sampling=None if depth == 36 else known,
        fid=fid,
        inception_score=score,
        evaluator=ADM,
        source="README and paper, at 512 px" if depth == 36 else "README",
        image_size=512 if depth == 36 else 256,
        note="the paper's settings at 512 px are not known to us" if depth == 36 else "",
    )


def _flexvar(depth: int, epoch: int, parameters: int, fid: float, score: float) -> GeneratorEntry:
    arguments = {"num_classes": 1000, "depth": depth, "embed_dim": 64 * depth, "num_heads": depth}
    return GeneratorEntry(
        f"flexvar-d{depth}",
        "flexvar",
        f"FlexVARd{depth}-epo{epoch}.pth",
        {"FlexVAR": arguments | {"attn_l2_norm": True, "drop_path_rate": 0.1 * depth / 24}},
        "jiaosiyu1999/FlexVAR",
        licence="MIT",
        parameters=parameters,
        tokenizer="flexvar-vqvae",
        sampling={
            "guidance": 3.5,
            "schedule": "linear",
            "schedule_options": {"reached": 9},
            "top_k": 900,
            "top_p": 0.95,
        },
        fid=fid,
        inception_score=score,
        evaluator=ADM,
        source="README, 10 steps",
    )


def _xar(size: str, sizes: tuple[int, int, int], parameters: int, scale: float, fid: float, score: float):
    width, depth, heads = sizes
    arguments = {"img_size": 256, "vae_stride": 16, "patch_size": 1, "vae_embed_dim": 16, "class_num": 1000}
    for stack in ("encoder", "decoder"):
        arguments |= {f"{stack}_embed_dim": width, f"{stack}_depth": depth, f"{stack}_num_heads": heads}
    return GeneratorEntry(
        f"xar-{size.lower()}",
        "xar",
        f"xAR-{size}.pth",
        {"xAR": arguments},
        "OliverRen/xAR",
        parameters=parameters,
        tokenizer="kl16",
        sampling={
            "guidance": scale,
            "schedule": "linear",
            "solver": "euler_maruyama",
            "solver_steps": 40 if size == "B" else 50,
        },
        fid=fid,
        inception_score=score,
        evaluator=FIDELITY,
        source="paper",
        licence=UNSTATED,
    )


MAR_NAMES = {"B": "base", "L": "large", "H": "huge"}


def _mar(size: str, sizes: tuple[int, int, int], head: tuple[int, int], parameters: int, scale: float, *reported):
    width, depth, heads = sizes
    arguments: dict[str, Any] = {"img_size": 256, "vae_stride": 16, "patch_size": 1, "vae_embed_dim": 16}
    for stack in ("encoder", "decoder"):
        arguments |= {f"{stack}_embed_dim": width, f"{stack}_depth": depth, f"{stack}_num_heads": heads}
    arguments |= {"class_num": 1000, "buffer_size": 64, "diffloss_d": head[0], "diffloss_w": head[1]}
    return GeneratorEntry(
        f"mar-{size.lower()}",
        "mar",
        f"mar_{MAR_NAMES[size]}/checkpoint-last.pth",
        {"MAR": arguments | {"num_sampling_steps": "100"}},
        origin="Dropbox, linked in the README of LTH14/mar; mirror huggingface.co/jadechoghari/mar",
        inside="ema",
        licence="MIT",
        parameters=parameters,
        tokenizer="kl16",
        sampling={
            "guidance": scale,
            "schedule": "count",
            "schedule_options": {"tokens": 256},
            "steps": 256,
            "solver_steps": 100,
        },
        fid=reported[0],
        inception_score=reported[1],
        evaluator=FIDELITY,
        source="README",
    )


def _rar(size: str, sizes: tuple[int, int, int], parameters: int, drawn: tuple, fid: float, score: float):
    width, depth, hidden = sizes
    arguments = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": 16}
    arguments |= {"intermediate_size": hidden, "image_seq_len": 256, "condition_num_classes": 1000}
    arguments |= {"dropout": 0.1, "attn_drop": 0.1}
    return GeneratorEntry(
        f"rar-{size.lower()}",
        "rar",
        f"rar_{size.lower()}.bin",
        {"RAR_config": {"model": {"generator": arguments, "vq_model": {"codebook_size": 1024}}}},
        "yucornetto/RAR",
        licence="Apache-2.0",
        parameters=parameters,
        tokenizer="maskgit-vqgan",
        sampling={
            "guidance": drawn[0],
            "schedule": "cosine",
            "schedule_options": {"power": drawn[1]},
            "temperature": drawn[2],
        },
        fid=fid,
        inception_score=score,
        evaluator=ADM,
        source="README and paper",
    )


def _maskgit(size: str, bert: bool, parameters: int | None, sampling: dict, fid: float, score: float | None):
    tokens = int(size[1:])
    arguments = {"hidden_size": 768, "num_hidden_layers": 24, "intermediate_size": 3072} if bert else {}
    if not bert:
        arguments = {"hidden_size": 1024, "num_hidden_layers": 20, "intermediate_size": 4096}
    arguments |= {"num_attention_heads": 16, "image_seq_len": tokens, "condition_num_classes": 1000}
    arguments |= {"dropout": 0.1, "attn_drop": 0.1, "num_steps": sampling["steps"]}
    config = {"model": {"generator": arguments, "vq_model": {"codebook_size": 4096}}}
    return GeneratorEntry(
        f"maskgit-titok-{size}",
        "maskgit",
        "model.safetensors",
        {"ImageBert_config" if bert else "UViTBert_config": config},
        f"yucornetto/generator_titok_{size}_imagenet",
        licence="Apache-2.0",
        parameters=parameters,
        tokenizer=f"titok-{size}",
        sampling=sampling,
        fid=fid,
        inception_score=score,
        evaluator=ADM,
        source="README",
    )


FULL_FIRST = {"first": True}  # these samplers prefill with the full scale, whatever the schedule says


def _gigatok(name: str, size: str, tokenizer: str, fid: float, file: str, scale: float = 1.75, **more: Any):
    owner = "zfu006/ReTok" if tokenizer.startswith("retok") else "SilentView/GigaTok"
    parameters = {"B": 111_085_824, "XL": 775_028_480, "XXL": 1_411_367_424}[size]
    return GeneratorEntry(
        name,
        "gigatok",
        file,
        _ctor(size, 256, 16384),
        origin=GOOGLE + owner,
        licence=UNSTATED if tokenizer.startswith("retok") else "MIT",
        parameters=parameters,
        tokenizer=tokenizer,
        sampling={"guidance": scale, "schedule": "interval", "schedule_options": {"low": 0.18} | FULL_FIRST},
        fid=fid,
        evaluator=ADM,
        source="README",
        **more,
    )


HITA = {"B": 136_152_576, "L": 376_596_480, "XL": 816_806_400, "XXL": 1_461_500_928, "2B": 2_251_549_440}


def _hita(letter: str, size: str, epochs: int, fid: float, score: float) -> GeneratorEntry:
    folder = {"v": "vanilla", "u": "ultra"}[letter]
    return GeneratorEntry(
        f"hita-{letter}-{size.lower()}-{epochs}",
        "hita",
        f"{folder}/GPT-{size}/GPT-{size}-{epochs}e.pt",
        _ctor(size, 441, 16384, num_slots=128),
        "yexiguafu/hita-gen",
        inside="ema",
        licence="MIT",
        parameters=HITA[size],
        tokenizer=f"hita-{letter}",
        fid=fid,
        inception_score=score,
        evaluator=ADM,
        source="README, with guidance",
        image_size=336,
        resize="bicubic",
        note="guidance scales are not published; the file's name follows the README, whose labels are partly wrong; "
        "drawn with last_query=grid, as the original samples, not as it trains",
    )


def _detailflow(tokens: int, scale: float, fid: float, score: float | None) -> GeneratorEntry:
    return GeneratorEntry(
        f"detailflow-{tokens // 8}-l",
        "detailflow",
        f"checkpoints/{tokens}.pt",
        _ctor("L", tokens, 8192, group_size=8, causal_num=8),
        f"ByteFlow-AI/DetailFlow-{tokens // 8}-GPT-L",
        inside="ema",
        licence="Apache-2.0",
        parameters=326_140_928,
        tokenizer=f"detailflow-{tokens // 8}",
        sampling={"guidance": scale, "schedule": "constant", "top_k": 8192},
        fid=fid,
        inception_score=score,
        evaluator=ADM,
        source="README; IS: a third party's table" if score else "README",
    )


def _dar(size: str, parameters: int | None, fid: float, score: float, scale: float | None) -> GeneratorEntry:
    return GeneratorEntry(
        f"dar-{size.lower()}",
        "dar",
        f"D-AR-{size}-360K.pt",
        _ctor(size, 256, 16384),
        "showlab/D-AR",
        licence="MIT",
        parameters=parameters,
        tokenizer="dar",
        sampling=scale and {"guidance": scale, "schedule": "linear", "schedule_options": {"start": 1.2}},
        fid=fid,
        inception_score=score,
        evaluator=ADM,
        source="README",
        note="" if scale else "guidance of this size is not known to us",
    )


def _flowar(size: str, sampling: dict, fid: float, score: float | None, source: str) -> GeneratorEntry:
    return GeneratorEntry(
        f"flowar-{size.lower()}",
        "flowar",
        f"FlowAR-{size}.pth",
        {},
        "OliverRen/FlowAR",
        verified=False,
        tokenizer="kl16",
        sampling={"schedule": "gate", **sampling},
        fid=fid,
        inception_score=score,
        source=source,
        note="the names inside its flow head are not known to us: the converter refuses them until they are added",
    )


TABLE: list[GeneratorEntry] = [
    _llamagen("B", 256, 2.0, 5.46, 193.6),
    _llamagen("B", 384, 2.0, 6.09, None),
    _llamagen("L", 256, 2.0, 3.80, 248.3),
    _llamagen("L", 384, 2.0, 3.07, 256.1),
    _llamagen("XL", 384, 1.75, 2.62, 244.1),
    _llamagen("XXL", 384, 1.75, 2.34, 253.9),
    _llamagen("3B", 384, 1.65, 2.18, 263.3),
    _var(16, 310_283_520, 3.55),
    _var(20, 600_917_136, 2.95),
    _var(24, 1_033_399_360, 2.33),
    _var(30, 2_010_020_356, 1.97),
    _var(36, 2_353_893_904, 2.63, 303.2),
    _flexvar(16, 179, 315_561_936, 3.05, 291.3),
    _flexvar(20, 249, 607_513_952, 2.41, 299.3),
    _flexvar(24, 349, 1_041_314_576, 2.21, 299.1),
    _xar("B", (768, 8, 12), 172_638_224, 2.7, 1.72, 280.4),
    _xar("L", (1024, 16, 16), 608_397_968, 2.3, 1.28, 292.5),
    _xar("H", (1280, 20, 16), 1_186_024_096, 2.2, 1.24, 301.6),
    _mar("B", (768, 12, 12), (6, 1024), 207_924_768, 2.9, 2.31, 281.7),
    _mar("L", (1024, 16, 16), (8, 1280), 478_326_304, 3.0, 1.78, 296.0),
    _mar("H", (1280, 20, 16), (12, 1536), 942_403_104, 3.2, 1.55, 303.7),
    _rar("B", (768, 24, 3072), 260_923_648, (16.0, 2.75, 1.0), 1.95, 290.5),
    _rar("L", (1024, 24, 4096), 461_668_352, (15.5, 2.5, 1.02), 1.70, 299.5),
    _rar("XL", (1280, 32, 5120), 955_425_024, (6.9, 1.5, 1.02), 1.50, 306.9),
    _rar("XXL", (1408, 40, 6144), 1_498_520_704, (8.0, 1.2, 1.02), 1.48, 326.0),
    _maskgit(
        "l32", True, 177_202_432, {"guidance": 5.5, "schedule": "previous", "temperature": 9.5, "steps": 8}, 2.77, 199.8
    ),
    _maskgit(
        "b64",
        True,
        177_227_008,
        {"guidance": 4.0, "schedule": "previous", "temperature": 11.0, "steps": 8},
        2.48,
        None,
    ),
    _maskgit(
        "s128",
        False,
        294_990_848,
        {
            "guidance": 6.9,
            "schedule": "cosine",
            "schedule_options": {"power": 3.0},
            "temperature": 2.8,
            "steps": 64,
        },
        1.97,
        281.8,
    ),
    _gigatok("gigatok-b-vq-ss", "B", "gigatok-ss", 4.05, "GPT_B256_e300_VQ_SS.pt", inception_score=240.6),
    _gigatok("gigatok-b-vq-sb", "B", "gigatok-sb", 3.83, "GPT_B256_e300_VQ_SB.pt"),
    _gigatok("gigatok-b-vq-bl", "B", "gigatok-bl", 3.26, "GPT_B256_e300_VQ_BL.pt"),
    _gigatok("gigatok-b-vq-xlxxl", "B", "gigatok-xlxxl", 3.15, "GPT_B256_e300_VQ_XLXXL.pt"),
    _gigatok("gigatok-xl-vq-bl", "XL", "gigatok-bl", 2.13, "GPT_XL256_e300_VQ_BL.pt"),
    _gigatok("gigatok-xxl-vq-bl", "XXL", "gigatok-bl", 2.03, "GPT_XXL256_e300_VQ_BL.pt"),
    _gigatok("gigatok-xxl-vq-xlxxl", "XXL", "gigatok-xlxxl", 1.98, "GPT_XXL256_e300_VQ_XLXXL.pt"),
    _gigatok("retok-xl", "XL", "retok-sb", 2.27, "GPT_XL256_e300_VQ_SB.pt", 1.5, inception_score=245.9),
    GeneratorEntry(
        "har-l",
        "har",
        "pytorch_model.bin",
        _ctor("L", 128, 8192, ar_token_num=4, spe_token_num=127),
        "xushu-me/llamagen_l_c2i_restok_l_128.r256_in1k",
        licence="Apache-2.0",
        parameters=326_263_808,
        tokenizer="restok-l128",
        sampling={"guidance": 3.75, "schedule": "interval", "schedule_options": {"low": 0.25}, "top_p": 0.95},
        fid=2.34,
        evaluator=ADM,
        source="README",
        note="the file's name is that of the original's training; the hub's was not seen",
    ),
    _hita("v", "B", 300, 4.33, 238.9),
    _hita("v", "L", 300, 2.86, 267.3),
    _hita("v", "XL", 50, 2.98, 253.4),
    _hita("v", "XXL", 50, 2.70, 274.8),
    _hita("v", "2B", 50, 2.59, 281.9),
    _hita("u", "B", 250, 3.49, 237.5),
    _hita("u", "L", 250, 2.44, 274.6),
    _hita("u", "XL", 100, 2.16, 275.3),
    _hita("u", "XXL", 100, 2.01, 276.4),
    _hita("u", "2B", 100, 1.82, 282.9),
    _detailflow(128, 1.45, 2.96, None),
    _detailflow(256, 1.5, 2.75, 250.8),
    _detailflow(512, 1.32, 2.59, 245.3),
    _dar("L", LLAMAGEN["L"][3], 2.44, 262.9, 8.0),
    _dar("XL", LLAMAGEN["XL"][3], 2.09, 298.4, None),
    _flowar("S", {"guidance": 4.3, "schedule_options": {"high": 0.9}, "solver_steps": 25}, 3.61, None, "from memory"),
    _flowar("L", {"guidance": 2.4, "schedule_options": {"high": 0.9}, "solver_steps": 25}, 1.90, None, "third party"),
    _flowar(
        "H", {"guidance": 2.4, "schedule_options": {"high": 0.7}, "solver_steps": 50}, 1.65, 296.5, "third parties"
    ),
]
GENERATORS: dict[str, GeneratorEntry] = {entry.name: entry for entry in TABLE}
ZOO: dict[str, Entry] = {**TOKENIZERS, **GENERATORS}


def lines(width: int = 22) -> list[str]:
    """The table as text: name, parameters, licence, reported FID with its evaluator, where the file belongs."""
    found = []
    for entry in ZOO.values():
        size = "?" if entry.parameters is None else f"{entry.parameters / 1e6:.0f} M"
        if isinstance(entry, GeneratorEntry):
            reported = f"FID {entry.fid:.2f} ({entry.evaluator or 'evaluator unknown'}; {entry.source})"
            if entry.resize:
                reported += f", {entry.image_size} px resized to 256 ({entry.resize})"
            elif entry.image_size != 256:
                reported += f", {entry.image_size} px"
        else:
            reported = "rFID unknown" if entry.rfid is None else f"rFID {entry.rfid:.2f}"
        found.append(f"{entry.name:{width}} {entry.kind:9} {size:>7}  {reported}")
        found.append(f"{'':{width}} {entry.place}; licence: {entry.licence}")
        asks = ["asks for accept_license=true"] if entry.research_only else []
        asks += [] if entry.verified else ["keys unverified"]
        if notes := [*asks, *([entry.note] if entry.note else [])]:
            found.append(f"{'':{width}} {'; '.join(notes)}")
    return found


if __name__ == "__main__":
    print("\n".join(lines()))
