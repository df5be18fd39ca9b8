"""Keys of train.py that change what a generator learns from, each by a tiny training through the command: corruption of
the context, corrections of a tokenizer that repairs, a teacher to align with."""

import lightning
import pytest
import torch
from hydra import compose, initialize_config_dir
from runs import CONFIGS, GENERATOR, TOKENIZER, losses, run, state, tokenizer_folder

from vgen import training
from vgen.models import FAMILIES
from vtok.checkpoint import load_module, save_folder
from vtok.config import instantiate

THIN = ("model.depth=2", "model.width=16", "model.heads=2")


def test_every_key_has_a_comment():
    """The line of the key in train.yaml says what it does and what can be given."""
    lines = {line.split(":")[0]: line for line in (CONFIGS / "train.yaml").read_text().splitlines()}
    for key, words in {
        "teacher": ("model", "size"),
        "corrections": ("DetailFlow",),
        "tokenizer_sides": ("scales", "FlexVAR", "null"),
        "corruption": ("random", "near", "noise", "rate"),
    }.items():
        assert all(word in lines[key].partition("#")[2] for word in words), key


@pytest.mark.parametrize("kind, options", [("random", ()), ("near", ("near=3",)), ("noise", ("sigma=0.5",))])
def test_corruption_changes_training_but_not_held_out_tokens(kind, options, tmp_path):
    folder = tokenizer_folder(tmp_path / "tokenizer")
    base = (*GENERATOR, "model=llamagen_small", *THIN, f"tokenizer_from={folder}", "steps=2", "val_every=2")
    quiet = ("model.dropout=0", "model.token_dropout=0", "model.label_drop=0", "ema=null")
    wrong = (f"+corruption.kind={kind}", "+corruption.rate=0.9", *(f"+corruption.{o}" for o in options))
    run(*base, *quiet, f"run_dir={tmp_path / 'clean'}")
    run(*base, *quiet, *wrong, f"run_dir={tmp_path / 'wrong'}")
    one, two = (state(tmp_path / name)["state_dict"] for name in ("clean", "wrong"))
    assert any(not torch.equal(one[key], two[key]) for key in one)
    # at a vanishing rate the weights stay, and held-out losses are those of clean tokens in both runs
    run(*base, *quiet, "optimizer.lr=1e-12", f"run_dir={tmp_path / 'c'}")
    run(*base, *quiet, "optimizer.lr=1e-12", *wrong, f"run_dir={tmp_path / 'w'}")
    held = [float(losses(tmp_path / name)[-1]["val/loss"]) for name in ("c", "w")]
    assert held[0] == pytest.approx(held[1], rel=1e-5)


@pytest.mark.parametrize("kind, key", [("random", "near"), ("random", "sigma"), ("near", "sigma"), ("noise", "near")])
def test_keys_of_another_corruption_are_refused(kind, key, tmp_path):
    folder = tokenizer_folder(tmp_path / "tokenizer")
    base = (*GENERATOR, "model=llamagen_small", *THIN, f"tokenizer_from={folder}", f"run_dir={tmp_path / 'run'}")
    with pytest.raises(ValueError, match=rf"corruption\.{key} is of corruption.kind=.*not of {kind}"):
        run(*base, f"+corruption.kind={kind}", f"+corruption.{key}=1")


@pytest.mark.parametrize(
    "options", [("+corruption.kind=random",), ("+teacher.model=x", "+teacher.size=56"), ("corrections=true",)]
)
def test_what_generators_learn_from_is_refused_for_a_tokenizer(options, tmp_path):
    key = options[0].lstrip("+").split(".")[0].split("=")[0]
    with pytest.raises(ValueError, match=f"{key}= is for the training of a generator"):
        run(*TOKENIZER, *options, f"run_dir={tmp_path / 'run'}")


def detailflow_folder(folder, **changes):
    torch.manual_seed(0)
    thin = ["tokens=8", "group=2", "dim=16", "depth=1", "hidden=16", "decoder_dim=16", "decoder_depth=1", "grid=4"]
    thin += ["decoder_hidden=16", "near=4", "quantizer.vocab_size=16", "heads=2", "decoder_heads=2"]
    thin += [f"{key}={value}" for key, value in changes.items()]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose(
            "train",
            overrides=["data=fake", "data.image_size=16", "tokenizer=detailflow_small"]
            + [f"tokenizer.{item}" for item in thin],
        )
    return save_folder(instantiate(config.tokenizer, _convert_="all"), folder)


def test_corrections_train_detailflow_on_repaired_rows(tmp_path):
    folder = detailflow_folder(tmp_path / "tokenizer")
    base = (*GENERATOR, "model=detailflow_small", *THIN, "model.group=2", "steps=2", "val_every=2")
    for name, key in (("plain", ()), ("repaired", ("corrections=true",))):
        run(*base, *key, f"tokenizer_from={folder}", f"run_dir={tmp_path / name}")
    one, two = (state(tmp_path / name)["state_dict"] for name in ("plain", "repaired"))
    assert any(not torch.equal(one[key], two[key]) for key in one)
    other = tokenizer_folder(tmp_path / "other")
    with pytest.raises(ValueError, match="corrections=true needs a tokenizer that repairs"):
        run(*GENERATOR, "model=llamagen_small", *THIN, "corrections=true", f"tokenizer_from={other}", "steps=1")


TEACHER = "vit_small_patch14_dinov2.lvd142m"


@pytest.fixture
def teacher(tmp_path, monkeypatch):
    """Random weights of DINOv2-S, two blocks deep, in the file that a user would have fetched."""
    timm = pytest.importorskip("timm")
    from safetensors.torch import save_file

    whole = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **options: whole(name, **{"depth": 2} | options))
    torch.manual_seed(0)
    save_file(timm.create_model(TEACHER, num_classes=0).state_dict(), tmp_path / f"{TEACHER}.safetensors")
    return tmp_path


REPA = (*GENERATOR, "model=ifsq_l", *THIN, "model.block=1", "model.channels=384", "model.hidden=16", "steps=2")


def test_a_teacher_aligns_llamagen_and_is_in_no_checkpoint(teacher):
    folder = tokenizer_folder(teacher / "tokenizer")  # 4 x 4 tokens of 16 px
    aligned = (f"+teacher.model={TEACHER}", "+teacher.size=56", f"+teacher.weights_path={teacher}")
    run(*REPA, *aligned, f"tokenizer_from={folder}", f"run_dir={teacher / 'run'}")
    saved = state(teacher / "run")["state_dict"]
    assert {key.split(".")[0] for key in saved} == {"module", "ema"}
    model = load_module(teacher / "run", FAMILIES, "raw")
    torch.manual_seed(0)
    start = type(model)(**{**model.arguments, "spec": model.spec})
    assert not torch.equal(model.projector[0].weight, start.projector[0].weight), "the alignment has been trained"
    rows = losses(teacher / "run")
    assert all(float(row["train/loss"]) > float(row["train/nats"]) for row in rows if "train/loss" in row)


@pytest.mark.parametrize("key", ["teacher", "corrections"])
def test_a_model_that_learns_nothing_from_it_refuses_it(key, tmp_path):
    folder = detailflow_folder(tmp_path / "tokenizer")
    options = {"teacher": ("+teacher.model=x", "+teacher.size=56"), "corrections": ("corrections=true",)}[key]
    with pytest.raises(ValueError, match=f"{key} is for models that learn from it"):
        run(*GENERATOR, "model=dar_small", *THIN, *options, f"tokenizer_from={folder}", f"run_dir={tmp_path / 'run'}")


def test_mistakes_with_a_teacher_are_named_before_anything_long(teacher, tmp_path, monkeypatch):
    def never(*_, **__):
        raise AssertionError("too late")

    monkeypatch.setattr(lightning.Trainer, "fit", never)
    folder = tokenizer_folder(tmp_path / "tokenizer")
    base = (*REPA, f"tokenizer_from={folder}", f"run_dir={tmp_path / 'run'}")
    with pytest.raises(ValueError, match="pass teacher="):
        run(*base)
    with pytest.raises(ValueError, match="data=codes has none"):
        run("data=codes", "data.folder=none", "model=ifsq_l", f"run_dir={tmp_path / 'run'}")
    with pytest.raises(ValueError, match="4 patches of 384 channels an image, expected 16 of 384: change"):
        run(*base, f"+teacher.model={TEACHER}", "+teacher.size=28", f"+teacher.weights_path={teacher}")
    with pytest.raises(ValueError, match=r"teacher=.*give \{model"):
        run(*base, f"+teacher.model={TEACHER}")
    with pytest.raises(ValueError, match=f"(?s){TEACHER}.safetensors.*teacher=null"):
        run(*base, f"+teacher.model={TEACHER}", "+teacher.size=56", f"+teacher.weights_path={tmp_path / 'none'}")
    wide = (f"+teacher.model={TEACHER}", "+teacher.size=56", f"+teacher.weights_path={teacher}", "model.channels=768")
    with pytest.raises(ValueError, match="16 patches of 384 channels an image, expected 16 of 768: change"):
        run(*base, *wide)
    monkeypatch.setattr(training, "build_data", never)  # these need neither data nor weights
    with pytest.raises(ValueError, match=r"teacher.model='vit_nothing': timm has no such model"):
        run(*base, "+teacher.model=vit_nothing", "+teacher.size=56")
    with pytest.raises(ValueError, match="LlamaGenREPA aligns with a vision model: pass teacher="):
        run(*base)
