"""One table of the published training recipes, compared with what the experiments resolve to.

Where a number comes from: [C] code or scripts of the original, [P] paper, [R] README, [X] others' tables, [O] chosen by
us because nothing is published; a recipe with an [O] beside its schedule belongs to a `status: unofficial` family.
"""

import inspect
from dataclasses import dataclass
from pathlib import Path

import generators
import pytest
import references
import tokenizers
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from vtok.config import instantiate
from vtok.convert import convert
from vtok.data.imagefolder import ImageFolder
from vtok.optim import make_optimizer, rate

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
IMAGES = 1_281_167
UNOFFICIAL = (
    "nbp",
    "par",
    "flowar",
    "ecar",
    "dtm",
    "artm",
    "fhtm",
    "orthus",
    "elm",
)  # no code or outputs to check against
LLAMAGEN = {"token_dropout": 0.1, "dropout": 0.1, "attention_dropout": 0.0}
VIT = {"dropout": 0.1, "attention_dropout": 0.1}
CACHED, CENTRE, RANDOM, VAR, TEN = "cached", ("center", True), ("random", True), ("var", False), ("ten", False)


@dataclass(frozen=True)
class Row:
    """rate: peak, at `batch`. length: epochs, or steps from 10,000 on. points: (share of training, or step, and factor
    on the rate), a step where it is above 1. codes: cached, or (crop, flip) of images that are encoded online.
    precision: the published one. said: what is done otherwise, in the words of the experiment's header.
    """

    model: str
    rate: float
    betas: tuple[float, float]
    batch: int
    length: int
    points: tuple[tuple[float, float], ...]
    decay: float
    clip: float
    ema: float | None
    codes: str | tuple[str, bool]
    drops: dict[str, float]
    precision: str = "bf16"
    said: tuple[str, ...] = ()


FLAT = ((0, 1.0), (0.5, 1.0), (1.0, 1.0))
OLD, NEW = (0.9, 0.95), (0.9, 0.96)
WSD = ((2500, 0.5), (5000, 1.0), (0.5, 1.0), (0.8, 1.0), (0.9, 0.55), (1.0, 0.1))
TRANSITION = ((5000, 0.5), (10_000, 1.0), (1.0, 1.0))
FALL = (
    (0.01, 0.5),
    (0.02, 1.0),
    (0.069, 1.0),
    (0.525, 0.5592),
    (1.0, 0.1),
)  # warm-up ep / 50, flat for 5 % of the rest
TABLE = {
    # constant without warm-up [C]; ten crops at 1.1 [C]; averaged weights optional, samplers load the raw ones [C]
    "llamagen": Row("llamagen_b", 1e-4, OLD, 256, 300, FLAT, 0.05, 1.0, None, CACHED, LLAMAGEN),
    # lin0 with wp = ep / 50 and wpe = 0.1; 1e-4 per 256 images; crop 288 -> 256 without flip; no averaged weights [C]
    "var": Row(
        "var_d16", 3e-4, OLD, 768, 200, FALL, 0.05, 2.0, None, VAR, {}, "fp16",
        ("bf16 for fp16", "warm-up from 0, not 0.005x", "the class table decays"),
    ),
    # as VAR; 180 epochs; flip and ADM's random crop [C]
    "flexvar_gpt": Row(
        "flexvar_d16", 3e-4, OLD, 768, 180, FALL, 0.05, 2.0, None, RANDOM, {}, "fp16",
        ("bf16 for fp16", "warm-up from 0, not 0.005x", "the class table decays"),
    ),
    # warm-up 100 epochs, flat to 600, cosine to 1e-5 [C]; cached moments of centre and mirror image [C], online here
    "xar": Row(
        "xar_b", 4e-4, NEW, 2048, 800,
        ((0.0625, 0.5), (0.125, 1.0), (0.75, 1.0), (0.875, 0.5125), (1.0, 0.025)), 0.02, 1.0, 0.9999, CENTRE, VIT,
        "fp16", ("fp16 or TF32; here bf16", "published: cached moments"),
    ),
    # rate, batch, epochs, warm-up [R]; a paper table found second-hand has 2e-4 @ 1024 [X]; betas, decay, clip, EMA,
    # constant rate after MAR's code [O]
    "flowar": Row(
        "flowar_s", 4e-4, OLD, 2048, 400, ((0.125, 0.5), (0.25, 1.0), (1.0, 1.0)), 0.02, 3.0, 0.9999, CENTRE, {},
    ),
    # no recipe was found: FlowAR's [O]
    "ecar": Row(
        "ecar_l", 4e-4, OLD, 2048, 400, ((0.125, 0.5), (0.25, 1.0), (1.0, 1.0)), 0.02, 3.0, 0.9999, CENTRE, {},
    ),
    # steps and batch [P]; the rest after MAR's code [O]
    "dtm": Row("dtm_l", 4e-4, OLD, 2048, 500_000, TRANSITION, 0.02, 3.0, 0.9999, CENTRE, {}),
    "artm": Row("artm_l", 4e-4, OLD, 2048, 500_000, TRANSITION, 0.02, 3.0, 0.9999, CENTRE, {}),
    "fhtm": Row("fhtm_l", 4e-4, OLD, 2048, 500_000, TRANSITION, 0.02, 3.0, 0.9999, CENTRE, {}),
    # no recipe for images alone: MAR's [O]
    "orthus": Row(
        "orthus_l", 8e-4, OLD, 2048, 800, ((0.0625, 0.5), (0.125, 1.0), (1.0, 1.0)), 0.02, 3.0, 0.9999, CENTRE,
        {"dropout": 0.1},
    ),
    # the recipe of video: UCF-101 [C]; crops, clip and drops [O]
    "nbp": Row(
        "nbp_l", 6e-4, OLD, 256, 100_000,
        ((2500, 0.5), (5000, 1.0), (52_500, 0.5), (1.0, 0.0)), 0.01, 1.0, None, CENTRE, LLAMAGEN,
    ),
    # LlamaGen's [O], on whose code it is built [P]
    "par": Row("par_l", 1e-4, OLD, 256, 300, FLAT, 0.05, 1.0, None, CACHED, LLAMAGEN),
    # constant, betas, decay, 400 epochs, centre crop and flip [C]; clip and drops [O]
    "elm": Row("elm_l", 1e-4, OLD, 256, 400, FLAT, 0.05, 1.0, None, CENTRE, LLAMAGEN),
    # 100 epochs of warm-up, then constant [C]; 800 epochs in the README's models [R], 400 by default [C]
    "mar": Row(
        "mar_b", 8e-4, OLD, 2048, 800, ((0.0625, 0.5), (0.125, 1.0), (1.0, 1.0)), 0.02, 3.0, 0.9999, CENTRE, VIT,
        "fp16", ("in fp16, here bf16", "The original caches the moments"),
    ),
    # 250k steps, 62.5k of warm-up, cosine to 1e-5 [C]; ten crops for the released models [R]; no averaged weights [C]
    "rar": Row(
        "rar_b", 4e-4, NEW, 2048, 250_000,
        ((31_250, 0.5), (62_500, 1.0), (156_250, 0.5125), (1.0, 0.025)), 0.03, 1.0, None, CACHED, VIT,
    ),
    # 500k steps, 10k of warm-up, cosine to 1e-5 [C]; EMA of the trainer's code [C]
    "maskgit_titok": Row(
        "maskgit_titok_l32", 2e-4, NEW, 2048, 500_000,
        ((5000, 0.5), (10_000, 1.0), (255_000, 0.525), (1.0, 0.05)), 0.03, 1.0, 0.999, CENTRE, VIT,
    ),
    # 1.5M steps, 5k of warm-up, cosine to 1e-5 [C]
    "har": Row(
        "har_l", 1e-4, OLD, 256, 1_500_000,
        ((2500, 0.5), (5000, 1.0), (752_500, 0.55), (1.0, 0.1)), 0.05, 1.0, 0.9999, CACHED, LLAMAGEN,
    ),
    # 5 % of warm-up, cosine to 0.01x [C]; ten-crop rows with corrections made once [C], made online here
    "detailflow_gpt": Row(
        "detailflow", 1e-4, OLD, 256, 300,
        ((0.025, 0.5), (0.05, 1.0), (0.525, 0.505), (1.0, 0.01)), 0.05, 1.0, 0.9999, TEN, LLAMAGEN,
        said=("Published: ten-crop codes", "here one of the ten crops", "warm-up from 0.005x; here from 0"),
    ),
    # warm-up 5k, flat, the last fifth down to 1e-5 [R, C]; no averaged weights [C]
    "gigatok_gpt": Row("gigatok_b", 1e-4, OLD, 256, 300, WSD, 0.05, 1.0, None, CACHED, LLAMAGEN),
    "retok_gpt": Row("gigatok_xl", 1e-4, OLD, 256, 300, WSD, 0.05, 1.0, None, CACHED, LLAMAGEN),
    # 4e-4, 360k steps called 300 epochs, the last 50 linear to 1e-5 [P]; the default of the code is 1e-4 [C]; the batch
    # follows from steps and epochs; one of ten crops, online [C]; EMA not stated
    "dar_gpt": Row(
        "dar_l", 4e-4, OLD, 1024, 360_000,
        ((0, 1.0), (300_000, 1.0), (330_000, 0.5125), (1.0, 0.025)), 0.05, 1.0, None, TEN, LLAMAGEN,
    ),
    # constant [C]; 300 epochs for B [R]; averaged weights are used [C], the decay is LlamaGen's
    "hita_gpt": Row("hita_b", 1e-4, OLD, 256, 300, FLAT, 0.05, 1.0, 0.9999, CENTRE, LLAMAGEN),
    # constant, 100 epochs, random crop and flip online, averaged weights [C]
    "ifsq_gpt": Row("ifsq_l", 1e-4, OLD, 256, 100, FLAT, 0.05, 1.0, 0.9999, RANDOM, LLAMAGEN),
}  # fmt: skip


# what else a recipe says of its model [C]
OWN = {
    "mar": {"mask_ratio": 0.7, "repeats": 4, "buffer": 64, "solver_steps": 100},
    "maskgit_titok": {"smoothing": 0.1, "unmasked_weight": 0.1, "steps": 8},
    "orthus": {"codes": 1024, "repeats": 4, "solver_steps": 100},
    "elm": {"factors": [1024, 1024], "factor_depth": 0},
    "dtm": {"levels": 32},
    "artm": {"levels": 3},
    "fhtm": {"levels": 3},
}


def resolved(name: str, *overrides: str) -> dict:
    places = ["tokenizer_from=a"]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("train", overrides=[f"experiment={name}_imagenet256", *places, *overrides])
    if "folder" in config.data:
        config.data.folder = "b"
    return OmegaConf.to_container(config, resolve=True)


def text_of_header(path: str) -> str:
    """The comment that a configuration starts with, as one line."""
    lines = (CONFIGS / path).read_text().partition("\ndefaults:")[0].splitlines()
    return " ".join(line.removeprefix("#").strip() for line in lines)


@pytest.mark.parametrize("name", TABLE)
def test_the_experiment_resolves_to_the_published_recipe(name):
    row, config = TABLE[name], resolved(name)
    optimizer, schedule, data, model = (config[key] for key in ("optimizer", "schedule", "data", "model"))
    assert config["name"] == f"{name}_imagenet256"
    assert (optimizer["lr"], tuple(optimizer["betas"]), optimizer["eps"]) == (row.rate, row.betas, 1e-8)
    assert (config["batch_size"], optimizer["weight_decay"]) == (row.batch, row.decay)
    assert (config["clip"], config["ema"], config["precision"]) == (row.clip, row.ema, "bf16-mixed")
    # some originals drop the last batch of an epoch, which is up to 0.1 % of the steps
    whole = {row.length * IMAGES // row.batch, row.length * (IMAGES // row.batch)}
    assert config["steps"] in ({row.length} if row.length >= 10_000 else whole)
    for place, factor in row.points:
        step = round(place * config["steps"]) if place <= 1 else int(place)
        # at most one step apart: rates of ours count from the first step, those of some originals from the second
        got = rate(min(step, config["steps"] - 1), config["steps"], **schedule)
        assert got == pytest.approx(factor, abs=2e-3), (place, factor, got)
    if row.codes == CACHED:
        assert (data["_target_"], data["crops"]) == ("vtok.data.codes.Codes", "ten")
    else:
        assert (data["crop"], data["flip"]) == row.codes and data["num_classes"] == 1000
        assert data["image_size"] == (336 if name == "hita_gpt" else 256)
    assert model["label_drop"] == 0.1
    assert {key: model.get(key, 0.0) for key in row.drops} == row.drops
    assert {key: model[key] for key in OWN.get(name, {})} == OWN.get(name, {})
    assert config["final_weight_decay"] is None
    header = text_of_header(f"experiment/{name}_imagenet256.yaml")
    assert ("fp16" in header) == (row.precision == "fp16")
    assert not [words for words in row.said if words not in header]
    assert OmegaConf.load(CONFIGS / "model" / f"{row.model}.yaml")._target_ == model["_target_"]
    assert {k: v for k, v in model.items() if k in ("depth", "width", "heads", "arch")}.items() <= dict(
        OmegaConf.load(CONFIGS / "model" / f"{row.model}.yaml")
    ).items()


@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if row.codes == CACHED])
def test_cached_recipes_also_take_images_or_other_codes(name):
    images, codes = (resolved(name, f"data={data}")["data"] for data in ("imagenet256", "codes"))
    keys = inspect.signature(ImageFolder.__init__).parameters
    assert images.pop("_target_") == "vtok.data.imagefolder.ImageFolder" and images.keys() <= keys.keys()
    assert (codes["_target_"], codes["crops"]) == ("vtok.data.codes.Codes", None)


def test_every_published_generator_has_an_experiment():
    """Models of a published size are those without "small" or "tiny" in their name; each is of a family with a row
    above (which experiment names it: test_published_sizes), and every experiment of a generator has a row."""
    families = {str(OmegaConf.load(CONFIGS / "model" / f"{row.model}.yaml")._target_) for row in TABLE.values()}
    for file in sorted((CONFIGS / "model").glob("*.yaml")):
        if file.stem.endswith(("small", "tiny")):
            continue
        assert str(OmegaConf.load(file)._target_) in families, file.name
    made = [p for p in (CONFIGS / "experiment").glob("*_imagenet256.yaml") if "override /model" in p.read_text()]
    assert {p.stem.removesuffix("_imagenet256") for p in made} == set(TABLE)


def test_what_has_no_reference_says_so():
    """In every configuration of it, in its experiment and on the page of our choices; no other generator says it."""
    page = (ROOT / "docs" / "unofficial.md").read_text()
    experiments = [CONFIGS / "experiment" / f"{name}_imagenet256.yaml" for name in TABLE]
    for file in [*(CONFIGS / "model").glob("*.yaml"), *experiments]:
        header = file.read_text().partition("\n_target_" if file.parent.name == "model" else "\ndefaults:")[0].lower()
        family = file.stem.partition("_")[0]
        unofficial = family in UNOFFICIAL
        assert ("status: unofficial" in header) == unofficial, file.name
        words = header.replace("\n# ", " ")
        assert not unofficial or "our choices" in words or "chosen by us" in words, file.name
    for family in UNOFFICIAL:
        assert f"`{family}_*`" in page and (CONFIGS / "experiment" / f"{family}_imagenet256.yaml").is_file(), family


def test_tokenizers_say_what_has_no_reference_too():
    """Every FlexTok, of which no whole output was recorded, and its row; no tokenizer whose outputs are met. What lacks
    the recipe alone says that; of KL-16's and ReToK's some was published."""
    page = (ROOT / "docs" / "unofficial.md").read_text().partition("\n## Tokenizers")[2]
    read = {p.stem: p.read_text() for p in (CONFIGS / "experiment").glob("*.yaml")}
    experiments = {n: text.partition("\ndefaults:")[0] for n, text in read.items() if "override /tokenizer" in text}
    headers = {p.stem: p.read_text().partition("\n_target_")[0] for p in (CONFIGS / "tokenizer").glob("*.yaml")}
    for name, header in (headers | experiments).items():
        assert ("status: unofficial" in header) == name.startswith("flextok"), name
    rows = [row for row in page.splitlines() if "status: unofficial" in row and row.startswith("|")]
    assert len(rows) == 1 and "`flextok_imagenet256`" in rows[0]
    lacking = {name for name, text in experiments.items() if "Recipe not published" in text}
    assert lacking == {"maskgit_vqgan_imagenet256", "var_vqvae_imagenet256", "flexvar_imagenet256"}
    assert all(f"`{name}`" in page for name in lacking)


@pytest.mark.parametrize(
    "model, epochs, batch, lr, final, decay",
    [
        ("var_d20", 250, 768, 3e-4, 0.1, None),
        ("var_d24", 350, 768, 2.4e-4, 0.01, None),
        ("var_d30", 350, 1024, 3.2e-4, 0.01, 0.08),
        ("var_d36", 350, 768, 2.4e-4, 0.01, 0.08),
    ],
)
def test_other_sizes_of_var_follow_the_lines_of_its_header(model, epochs, batch, lr, final, decay):
    text = (CONFIGS / "experiment" / "var_imagenet256.yaml").read_text().replace("\n# ", " ")
    options = text.split(f"model={model}:")[1].split(". ")[0].split()
    config = resolved("var", f"model={model}", *(o for o in options if "=" in o))
    assert config["steps"] == pytest.approx(epochs * IMAGES / batch, abs=1) and config["batch_size"] == batch
    assert (config["optimizer"]["lr"], config["schedule"]["final"]) == (lr, final)
    assert (config["optimizer"]["weight_decay"], config["final_weight_decay"]) == (0.05, decay)  # [R] twd, twde
    assert config["data"]["image_size"] == (512 if model == "var_d36" else 256)
    assert batch * 1e-4 * (1 if model == "var_d20" else 0.8) / 256 == pytest.approx(lr)  # [C] tblr of the sizes


@pytest.mark.parametrize("name", ["gigatok", "ibq", "magvit2", "restok", "titok", "titok_onestage", "titok_vae"])
def test_tokenizers_published_in_fp16_say_that_they_train_in_bf16(name):
    header = text_of_header(f"experiment/{name}_imagenet256.yaml")
    assert "fp16" in header and "bf16" in header


@pytest.mark.parametrize("family, depths", [("var", (16, 20, 24, 30, 36)), ("flexvar", (16, 20, 24))])
def test_var_drops_paths_and_nothing_else(family, depths):
    """0.1 D / 24 in the last block, rising linearly from 0; dropouts of 0 [C]. Not a key of the configurations."""
    spec = generators.scale_spec() if family == "var" else generators.map_spec(tuple(range(1, 17)))
    for depth in depths:
        config = OmegaConf.load(CONFIGS / "model" / f"{family}_d{depth}.yaml")
        with torch.device("meta"):
            model = instantiate(config, _convert_="all", _partial_=True)(spec=spec, num_classes=10)
        rates = [block.drop_path.rate for block in model.trunk.blocks]
        assert rates == pytest.approx([0.1 * depth / 24 * i / (depth - 1) for i in range(depth)])
        assert not any(m.p for m in model.modules() if isinstance(m, torch.nn.Dropout))
        assert model.trunk.attention_dropout == 0


# tensors of two and more dimensions without weight decay, by the last names of the parameter [C]
SPARED = {
    "llamagen": (),
    "gigatok": (),
    "dar": (),
    "hita": (),
    "har": (),
    "detailflow": (),
    "var": ("position", "start", "level_embedding.weight", "log_scale"),
    "var_shared_modulation": ("position", "start", "level_embedding.weight", "log_scale", "offset"),
    "flexvar": ("position", "start", "log_scale"),
    "rar": ("tokens.weight", "conditioner.table.weight", "positions", "targets", "places", "trunk.final.weight"),
    "maskgit": ("tokens.weight", "conditioner.table.weight", "position", "segment"),
    "mar": ("head.",),  # a prefix: all of the diffusion head
    "xar_cell": (),
}


@pytest.mark.parametrize("name", SPARED)
def test_weight_decay_is_left_out_where_the_original_does(name):
    model = generators.make(name)
    groups = make_optimizer([model], lr=1.0, weight_decay=0.1).param_groups
    spared = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    matrices = {key: p for key, p in model.named_parameters() if p.dim() >= 2}
    found = {key for key, p in matrices.items() if id(p) in spared}
    assert found == {
        key for key in matrices if key.endswith(SPARED[name]) or (name == "mar" and key.startswith("head."))
    }
    assert sum(len(group["params"]) for group in groups) == sum(p.requires_grad for p in model.parameters())
    assert all(id(p) in spared for p in model.parameters() if p.dim() < 2 and p.requires_grad)


# in the names of parameters that do not decay: utils/train_utils.py of bytedance/1d-tokenizer and Kwai-Kolors/ResTok
NO_DECAY = ("ln", "bias", "latent_tokens", "mask_token", "embedding", "norm", "gamma", "embed", "mask_latent_token")


@pytest.mark.parametrize("name", ["titok", "titok_one_stage", "tatitok_vq", "titok_vae", "restok"])
def test_tokenizers_leave_out_the_weight_decay_that_the_original_does(name):
    """Every tensor of a published file is filled with a number of its own, by which it is known after conversion."""
    family = "restok" if name == "restok" else "titok"
    state, _, _, info = references.read(name)
    numbered = {key: torch.full_like(value, float(i + 1)) for i, (key, value) in enumerate(sorted(state.items()))}
    module = convert(family, numbered, info["ctor"])
    keys, spared = sorted(state), set()
    for group in make_optimizer([module], lr=1.0, weight_decay=0.1).param_groups:
        spared |= {id(p) for p in group["params"] if group["weight_decay"] == 0}
    made_of = {n: {keys[int(v) - 1] for v in p.unique()} for n, p in module.named_parameters() if p.dim() >= 2}
    parameters = dict(module.named_parameters())
    assert len(made_of) > 20
    for own, theirs in made_of.items():
        (wanted,) = {any(part in key for part in NO_DECAY) for key in theirs}
        assert (id(parameters[own]) in spared) == wanted, (own, theirs)


def test_restok_spares_the_mask_of_its_second_pass_too():
    model = tokenizers.make("restok")
    names = {n for n, p in model.named_parameters() if any(p is q for q in model.undecayed())}
    assert "semantic_mask" in names and not any(n.startswith("align_") for n in names)  # feat_mask_token; vf_proj


def test_flexvar_spares_the_offsets_of_a_shared_modulation_too():
    """As VAR's, whose code it is: ada_gss is among the names without decay in both [C]."""
    model = generators.make("flexvar", modulation="shared")
    spared = {id(p) for p in model.undecayed()}
    offsets = [p for name, p in model.named_parameters() if name.endswith("offset")]
    assert len(offsets) == 2 and all(id(p) in spared for p in offsets)


def test_the_recipe_of_maskgits_vqgan_is_that_of_vqgan_plus_and_says_so():
    """Nothing is published for MaskGIT's own; MaskBit's vqgan_plus_10bit.yaml [C] trains the same sizes with L2 of
    weight 4 in [0, 1]. Batch, classifier, end of the cosine and averaging [O]."""
    name = "maskgit_vqgan_imagenet256"
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = OmegaConf.to_container(compose("train", overrides=[f"experiment={name}"]), resolve=False)
    assert "Recipe not published" in (CONFIGS / "experiment" / f"{name}.yaml").read_text()
    assert (config["name"], config["steps"], config["clip"]) == (name, 1_350_000, 1.0)
    assert config["batch_size"] * config["steps"] / IMAGES == pytest.approx(270, rel=1e-3)  # epochs
    for section in (config["optimizer"], config["discriminator_optimizer"]):
        assert (section["lr"], section["betas"], section["weight_decay"], section["eps"]) == (
            1e-4, [0.9, 0.999], 1e-4, 1e-8,
        )  # fmt: skip
    for step, factor in ((2500, 0.5), (5000, 1.0), (677_500, 0.55), (1_350_000, 0.1)):
        assert rate(step, config["steps"], **config["schedule"]) == pytest.approx(factor, abs=2e-3)
    objective, gan = config["objective"], config["objective"]["gan"]
    assert (objective["pixel"], objective["pixel_weight"], objective["perceptual_weight"]) == ("l2", 4 / 2**2, 0.0)
    assert (gan["weight"], gan["start"], gan["loss"], gan["lecam_weight"]) == (0.02, 20_000, "hinge", 0.001)
    assert (gan["discriminator"]["width"], gan["discriminator"]["stages"]) == (128, 4)
    assert objective["terms"]["logits"]["weight"] == 0.1 and config["data"]["crop"] == "random"
