"""Every generator of a published size: what its configuration says beyond the number of parameters, the recipe of the
sizes that an experiment names in its header, and the published tokenizer whose tokens it writes."""

import functools
import re
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from test_model_configs import PUBLISHED, trained
from test_recipes import IMAGES, LLAMAGEN, TABLE, VIT, resolved, text_of_header

from vtok.config import instantiate
from vtok.data.codes import on_sides, spec_at

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
FULL = {p.stem for p in (CONFIGS / "model").glob("*.yaml") if not p.stem.endswith(("small", "tiny"))}
LLAMA = {"b": (12, 768, 12), "l": (24, 1024, 16), "xl": (36, 1280, 20), "xxl": (48, 1536, 24)}
SHAPES = {f"{f}_{s}": shape for f in ("llamagen", "gigatok", "hita") for s, shape in LLAMA.items()}
SHAPES |= {f"{f}_{s}": LLAMA[s] for f in ("dar", "elm") for s in ("l", "xl", "xxl")}
SHAPES |= dict.fromkeys(("har_l", "detailflow", "nbp_l", "par_l", "ifsq_l", "ifsq_l_factorised"), LLAMA["l"])
SHAPES |= {"llamagen_3b": (24, 3200, 32), "hita_2b": (48, 1920, 32), "elm_2b": (48, 1792, 28)}
SHAPES |= {f"var_d{d}": (d, 64 * d, d) for d in (12, 16, 20, 24, 30, 36)}
SHAPES |= {f"flexvar_d{d}": (d, 64 * d, d) for d in (16, 20, 24)}
SHAPES |= {"xar_b": (8, 768, 12), "xar_l": (16, 1024, 16), "xar_h": (20, 1280, 16)}  # blocks of each of two stacks
SHAPES |= {"mar_b": (12, 768, 12), "mar_l": (16, 1024, 16), "mar_h": (20, 1280, 16)}
SHAPES |= {"flowar_s": (6, 768, 12), "flowar_l": (8, 1024, 16), "flowar_h": (15, 1536, 16)}
SHAPES |= {"rar_b": (24, 768, 16), "rar_l": (24, 1024, 16), "rar_xl": (32, 1280, 16), "rar_xxl": (40, 1408, 16)}
SHAPES |= dict.fromkeys(("maskgit_titok_l32", "maskgit_titok_b64"), (24, 768, 16)) | {
    "maskgit_titok_s128": (20, 1024, 16)
}
OURS = {"flowar_b", "ecar_l", "dtm_l", "artm_l", "fhtm_l", "orthus_l"}  # of no published shape

# what else the papers' code sets by size [C, R]
OTHER = {f"var_d{d}": {"gate_init": g} for d, g in ((16, 1e-3), (20, 1e-3), (24, 1e-4), (30, 1e-5), (36, 5e-6))}
OTHER |= {f"flexvar_d{d}": {"gate_init": g, "sample_scales": True} for d, g in ((16, 1e-3), (20, 1e-3), (24, 1e-4))}
for depth in (12, 16, 20, 24, 30, 36):
    OTHER.setdefault(f"var_d{depth}", {})["modulation"] = "shared" if depth == 36 else "own"
OTHER |= {f"rar_{s}": {"anneal": [0.5, 0.75]} for s in LLAMA}  # of 250,000 steps: 125,000 and 187,500
EULER = {"entity": "cell", "entity_size": 8, "solver": "euler_maruyama"}
OTHER |= {f"xar_{s}": EULER | {"solver_steps": n} for s, n in (("b", 40), ("l", 50), ("h", 50))}
MASKS = {"steps": 256, "buffer": 64, "mask_ratio": 0.7, "head": "diffusion", "solver_steps": 100, "repeats": 4}
HEADS = (("b", 6, 1024), ("l", 8, 1280), ("h", 12, 1536))
OTHER |= {f"mar_{s}": MASKS | {"head_depth": d, "head_width": w} for s, d, w in HEADS}
FLOWS = (("s", 2, 1024, False, 25), ("l", 12, 1024, True, 25), ("h", 12, 1536, True, 50))
OTHER |= {f"flowar_{s}": dict(zip(("head_depth", "head_width", "head_cross", "solver_steps"), r)) for s, *r in FLOWS}
SMOOTH = {"smoothing": 0.1, "unmasked_weight": 0.1}
OTHER |= {f"maskgit_titok_{s}": SMOOTH | {"arch": "bert", "steps": 8} for s in ("l32", "b64")}
OTHER |= {"maskgit_titok_s128": SMOOTH | {"arch": "uvit", "steps": 64}}
OTHER |= {f"gigatok_{s}": {"position": "learned"} for s in LLAMA} | {
    f"dar_{s}": {"position": "rope_1d"} for s in ("l", "xl", "xxl")
}
OTHER |= {f"elm_{s}": {"factors": [1024, 1024], "factor_depth": 0} for s in ("l", "xl")}
OTHER |= {f"elm_{s}": {"factors": [4096, 4096], "factor_depth": 0} for s in ("xxl", "2b")}
ALIGNED = {"block": 8, "channels": 768, "hidden": 2048, "alignment": 2.0}
OTHER |= {"ifsq_l": ALIGNED, "ifsq_l_factorised": ALIGNED | {"factors": [289, 289], "factor_depth": 2}}
OTHER |= {"har_l": {"first": 4}, "detailflow": {"group": 8}, "nbp_l": {"group": None}, "par_l": {"group": [2, 2]}}

# the published tokenizer of each family, at what options
TOKENIZERS = {
    **dict.fromkeys(("llamagen", "nbp", "par"), ("llamagen_vq16",)),
    "var": ("var_vqvae",),
    "flexvar": ("flexvar_vqvae",),
    "rar": ("maskgit_vqgan",),
    "gigatok": ("gigatok_bl",),
    "dar": ("dar",),
    "har": ("restok",),
    "detailflow": ("detailflow_128",),
    "hita": ("hita", "data.image_size=336"),
    "ifsq": ("ifsq_f16",),
    "maskgit_titok_l32": ("titok_l32",),
    "maskgit_titok_b64": ("titok_b64",),
    "maskgit_titok_s128": ("titok_s128",),
    **dict.fromkeys(("mar", "xar", "flowar", "ecar", "dtm", "artm", "fhtm", "orthus"), ("kl16",)),
}
BITS = ("magvit2_16k", "tokenizer.quantizer.bits=20", "tokenizer.quantizer.groups=[10,10]")
WIDE = ("magvit2_16k", "tokenizer.quantizer.bits=24", "tokenizer.quantizer.groups=[12,12]")
WIDE += ("+tokenizer.quantizer.entropy_groups=[12,12]",)
TOKENIZERS |= {"elm_l": BITS, "elm_xl": BITS, "elm_xxl": WIDE, "elm_2b": WIDE}
SCALES = {"var_d36": [1, 2, 3, 4, 6, 9, 13, 18, 24, 32]} | {f"flexvar_d{d}": [*range(1, 17)] for d in (16, 20, 24)}


def family(name: str) -> str:
    return name.partition("_")[0]


def said(name: str) -> dict:
    return OmegaConf.to_container(OmegaConf.load(CONFIGS / "model" / f"{name}.yaml"))


def test_every_published_size_is_listed():
    assert set(SHAPES) | OURS == FULL and not OURS & set(SHAPES)


@pytest.mark.parametrize("name", SHAPES)
def test_depth_width_and_heads_are_the_published_ones(name):
    """The number of heads is in no count of parameters."""
    config = said(name)
    width, heads = config.get("width") or 64 * config["depth"], config.get("heads") or config["depth"]
    assert (config["depth"], width, heads) == SHAPES[name]


@pytest.mark.parametrize("name", OTHER)
def test_what_else_a_size_sets(name):
    found = said(name)
    assert {key: found[key] for key in OTHER[name]} == OTHER[name]


@pytest.mark.parametrize("name", sorted(FULL))
def test_every_size_drops_what_its_family_does(name):
    """What U-ViT has no dropout for, and what LlamaGenREPA has no key for, is 0; VAR's and FlexVAR's is a rule of the
    depth (test_recipes)."""
    config = said(name)
    rows = [row.drops for row in TABLE.values() if family(row.model) == family(name)]
    want = rows[0] if name != "maskgit_titok_s128" else dict.fromkeys(VIT, 0.0)
    assert all(row == rows[0] for row in rows) and config["label_drop"] == 0.1
    assert {key: config.get(key, 0.0) for key in ("token_dropout", "dropout", "attention_dropout")} == (
        dict.fromkeys(LLAMAGEN, 0.0) | want
    )


@pytest.mark.parametrize("name", sorted(FULL))
def test_an_experiment_says_how_it_is_trained(name):
    """By its name: as model=<name>, in a list of sizes that are trained alike, or as the default."""
    found = [
        e for e in TABLE if re.search(rf"\b{name}\b", (CONFIGS / "experiment" / f"{e}_imagenet256.yaml").read_text())
    ]
    assert found and all(family(TABLE[e].model) == family(name) for e in found)


# millions of parameters in a part, and the names of its modules
MODULATION = ("modulation", "shared", "final", "offset")
PARTS = {f"mar_{s}": (("head",), n) for s, n in (("b", 35.7), ("l", 72.2), ("h", 151.2))}
PARTS |= {f"var_d{d}": (MODULATION, n) for d, n in ((16, 102.9), (20, 200.0), (24, 344.7), (30, 671.3), (36, 43.0))}


@pytest.mark.parametrize("name", PARTS)
def test_heads_and_modulations_have_the_published_parameters(name):
    """MAR's diffusion head (arXiv 2406.11838); VAR's adaptive norms, the head's with them (arXiv 2404.02905)."""
    with torch.device("meta"):
        config = OmegaConf.load(CONFIGS / "model" / f"{name}.yaml")
        model = instantiate(config, _convert_="all", _partial_=True)(spec=PUBLISHED[name][0], num_classes=1000)
    words, count = PARTS[name]
    found = sum(p.numel() for key, p in model.named_parameters() if {*key.split(".")} & {*words})
    assert abs(found / 1e6 - count) <= 0.05


LINES = {  # epochs [R], rate and end of the schedule [C]
    ("flexvar_gpt", "flexvar_d20"): (250, 3e-4, 0.1),
    ("flexvar_gpt", "flexvar_d24"): (350, 2.4e-4, 0.01),
    ("hita_gpt", "hita_2b"): (50, 1e-4, 0.0),
}


@pytest.mark.parametrize("experiment, model", LINES)
def test_the_line_of_a_size_gives_its_recipe(experiment, model):
    text = text_of_header(f"experiment/{experiment}_imagenet256.yaml")
    words = text.split(f"{model}:")[1].partition("model=")[0].split()
    options = [word.rstrip(".;,") for word in words[: next(i for i, w in enumerate([*words, ""]) if "=" not in w)]]
    config = resolved(experiment, f"model={model}", *options)
    epochs, rate, final = LINES[experiment, model]
    assert config["steps"] == pytest.approx(epochs * IMAGES / config["batch_size"], abs=1)
    assert (config["optimizer"]["lr"], config["schedule"]["final"]) == (rate, final)


def test_hitas_other_lengths():
    text = text_of_header("experiment/hita_gpt_imagenet256.yaml")
    for epochs in (50, 100, 250):
        assert f"steps={epochs * IMAGES // 256} ({epochs}" in text


def test_the_scales_that_are_encoded():
    """FlexVAR draws lists from all sides up to 16, of which its tokenizer has ten [C]; VAR-d36 has those of 512 px."""
    assert resolved("flexvar_gpt")["tokenizer_sides"] == SCALES["flexvar_d16"]
    assert resolved("var")["tokenizer_sides"] is None
    line = text_of_header("experiment/var_imagenet256.yaml").split("model=var_d36:")[1]
    assert f"tokenizer_sides={SCALES['var_d36']}".replace(" ", "") in line


@functools.cache
def tokenizer_of(*options: str):
    name, *more = options
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("train", overrides=["data=imagenet256", f"tokenizer={name}", "data.folder=x", *more])
    with torch.device("meta"):
        return instantiate(config.tokenizer, _convert_="all")


@pytest.mark.parametrize("name", sorted(FULL))
def test_it_writes_the_tokens_of_the_published_tokenizer(name):
    """Both as configured, without memory: the tokens fit, and the count is that of the spec that tests write down."""
    tokenizer = tokenizer_of(*TOKENIZERS.get(name, TOKENIZERS.get(family(name), ())))
    with torch.device("meta"):
        tokenizer = on_sides(tokenizer, SCALES[name]) if name in SCALES else tokenizer
        spec = spec_at(tokenizer, 512 if name == "var_d36" else 336 if family(name) == "hita" else 256)
        make = instantiate(OmegaConf.load(CONFIGS / "model" / f"{name}.yaml"), _convert_="all", _partial_=True)
        make.func.accepts(spec)
        model = make(spec=spec, num_classes=1000)
    if name in PUBLISHED:
        count = PUBLISHED[name][1]
        assert abs(trained(model) - count) < 1 if isinstance(count, int) else abs(trained(model) / 1e6 - count) <= 0.05
    if family(name) == "flexvar":
        lists = [model.draw_sides(torch.tensor([key])) for key in range(200)]
        assert {side for sides in lists for side in sides} == set(range(1, 17))
