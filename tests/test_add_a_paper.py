"""A new paper is one file and one configuration: the two of docs/add_a_paper, outside the packages, go through every
command and every property test, with nothing edited under vtok/, vgen/ and configs/."""

import inspect
import json
import sys
from pathlib import Path

import generators
import pytest
import test_corruption
import test_editing
import test_generators
import test_tokenizers
import tokenizers
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from docs.add_a_paper.diagonal import Diagonal, diagonals
from docs.add_a_paper.vit_vq import ViTVQ
from vgen.models import FAMILIES
from vtok import counters
from vtok.checkpoint import CheckpointError, load_module, read_config, save_folder
from vtok.config import Families, build, describe, instantiate
from vtok.layers.packed import packable
from vtok.quantize.vq import VQ

ROOT = Path(__file__).resolve().parents[1]
PAPER = ROOT / "docs" / "add_a_paper"
GENERATOR, TOKENIZER = "docs.add_a_paper.diagonal", "docs.add_a_paper.vit_vq"
TRUST = f"trust=[{GENERATOR},{TOKENIZER}]"


def command(monkeypatch, module: str, *arguments: object) -> int:
    """The command in this process, as from a shell: through Hydra and the guard for mistakes; its exit code."""
    from importlib import import_module

    GlobalHydra.instance().clear()
    monkeypatch.setattr(sys, "argv", [f"{module}.py", *map(str, arguments)])
    try:
        import_module(module).main()
    except SystemExit as ended:
        return int(ended.code or 0)
    finally:
        GlobalHydra.instance().clear()
    return 0


# --- the commands ---------------------------------------------------------------------------------------------------

DATA = ("data=fake", "data.image_size=16", "data.train_images=24", "data.val_images=8")
QUICK = ("trainer=cpu", "steps=2", "batch_size=8", "val_every=2", "picture_every=2", "bar=false", "save_every=2")
OUTSIDE = ("--config-dir", PAPER)
THIN = {
    "tokenizer": ("tokenizer.dim=16", "tokenizer.depth=1", "tokenizer.heads=2", "tokenizer.quantizer.vocab_size=16")
}
THIN["model"] = ("model.width=16", "model.depth=1", "model.heads=2", "pictures.samples.classes=2")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of the tokenizer and of the generator on its tokens, made by train.py."""
    folder = tmp_path_factory.mktemp("paper")
    patch = pytest.MonkeyPatch()
    tokenizer = (*OUTSIDE, "tokenizer=vit_vq", *THIN["tokenizer"], *DATA, *QUICK, TRUST)
    assert command(patch, "train", *tokenizer, f"run_dir={folder / 'tokenizer'}") == 0
    generator = (*OUTSIDE, "model=diagonal", *THIN["model"], *DATA, *QUICK, TRUST)
    places = (f"tokenizer_from={folder / 'tokenizer'}", f"run_dir={folder / 'generator'}")
    assert command(patch, "train", *generator, *places) == 0
    patch.undo()
    return folder


def test_training_and_resuming(runs, monkeypatch, capsys):
    for kind in ("tokenizer", "generator"):
        assert (runs / kind / "checkpoints" / "last.ckpt").is_file()
        assert list((runs / kind / "pictures").glob("*_0000002.png"))
    generator = (*OUTSIDE, "model=diagonal", *THIN["model"], *DATA, *QUICK, TRUST, "resume=last", "stop_after=2")
    places = (f"tokenizer_from={runs / 'tokenizer'}", f"run_dir={runs / 'generator'}")
    assert command(monkeypatch, "train", *generator, *places) == 0
    assert "nothing to do" in capsys.readouterr().out


def packed():
    """Whether packed weights were read, where the processor has them."""
    return bool(counters.read().get("linear.packed")) == packable(torch.zeros(1))


def test_sampling_and_evaluation(runs, monkeypatch):
    source, data = f"from={runs / 'generator'}", ("data=fake", "data.image_size=16", "data.val_images=8")
    out = runs / "samples.npz"
    assert command(monkeypatch, "sample", source, TRUST, "num_images=6", "guidance=2", f"out={out}") == 0
    small = ("images=8", "extractor=cifar", "splits=2", f"out={runs / 'fid.json'}")
    assert command(monkeypatch, "eval.fid", source, TRUST, "reference=val", *data, *small) == 0
    assert any(key.startswith("fd") or "FD" in key for key in (runs / "fid.json").read_text().split('"'))
    out = runs / "reconstruction.json"
    tokenizer = (f"from={runs / 'tokenizer'}", TRUST, *data, "extractor=none", f"out={out}")
    counters.reset()
    assert command(monkeypatch, "eval.reconstruction", *tokenizer) == 0
    assert counters.read()["encode.float32"] > 0 and packed()
    assert "psnr" in out.read_text().lower()


def test_cached_codes_and_likelihood(runs, monkeypatch):
    codes = runs / "codes"
    small = ("data=fake", "data.image_size=16", "data.train_images=24", "data.val_images=8")
    source = (f"from={runs / 'tokenizer'}", TRUST, f"out={codes}", "device=cpu")
    counters.reset()
    assert command(monkeypatch, "scripts.cache_codes", *source, *small) == 0
    assert counters.read()["encode.float32"] > 0 and packed()
    generator = (*OUTSIDE, "model=diagonal", *THIN["model"], "data=codes", f"data.folder={codes}", *QUICK)
    assert command(monkeypatch, "train", *generator, TRUST, f"run_dir={runs / 'cached'}") == 0
    out = (f"from={runs / 'cached'}", TRUST, f"out={runs / 'likelihood.json'}", "images=24")
    digits = ("data=digits", "data.image_size=16", "train_images=24")
    assert command(monkeypatch, "eval.likelihood", *out, *digits) == 0
    plain = json.loads((runs / "likelihood.json").read_text())
    light = runs / "light.json"
    counters.reset()
    assert command(monkeypatch, "eval.likelihood", *out, *digits, "dtype=bfloat16", f"out={light}") == 0
    rounded = json.loads(light.read_text())  # what bf16 weights cost
    assert (plain["dtype"], rounded["dtype"]) == ("float32", "bfloat16")
    assert rounded["held_out"] == pytest.approx(plain["held_out"], rel=0.01)
    assert counters.read()["weights.bfloat16"] > 0


def test_export_and_sampling_from_the_folder(runs, monkeypatch, capsys):
    folder = runs / "exported"
    assert command(monkeypatch, "scripts.convert", f"from={runs / 'generator'}", TRUST, f"out={folder}") == 0
    again = runs / "exported_again"  # by the command that writes a run alone
    assert command(monkeypatch, "scripts.export", f"from={runs / 'generator'}", TRUST, f"out={again}") == 0
    for file in ("model.safetensors", "tokenizer/model.safetensors", "README.md"):
        assert (again / file).read_bytes() == (folder / file).read_bytes()
    assert read_config(folder)["family"] == f"{GENERATOR}:Diagonal"
    assert read_config(folder / "tokenizer")["family"] == f"{TOKENIZER}:ViTVQ"
    for source in (runs / "generator", folder):
        arguments = (f"from={source}", "num_images=4", f"out={runs / source.name}.npz")
        assert command(monkeypatch, "sample", *arguments, TRUST) == 0
        capsys.readouterr()
        assert command(monkeypatch, "sample", *arguments) == 2, "without trust its code is not run"
        assert f"trust=[{GENERATOR}]" in capsys.readouterr().err
    import numpy as np

    one, two = (np.load(runs / f"{name}.npz")["arr_0"] for name in ("generator", "exported"))
    assert one.shape == (4, 16, 16, 3) and np.array_equal(one, two)


# --- the properties of every family ---------------------------------------------------------------------------------


def diagonal(**options) -> Diagonal:
    return Diagonal(generators.grid_spec(3, 4), generators.CLASSES, depth=2, width=16, heads=2, **options)


def vit_vq(**options) -> ViTVQ:
    quantizer = VQ(vocab_size=32, channels=6, l2_norm=True)
    return ViTVQ(image_size=tokenizers.SIZE, quantizer=quantizer, patch=4, dim=16, depth=1, heads=2, **options)


def loops(module, example: str) -> list[str]:
    """Tests of a module that loop over families by `name` and take the family `example`."""
    found = []
    for name, test in inspect.getmembers(module, inspect.isfunction):
        marks = [m for m in getattr(test, "pytestmark", []) if m.name == "parametrize" and m.args[0] == "name"]
        if name.startswith("test_") and any(example in m.args[1] for m in marks):
            found.append(name)
    return found


def call(test, name: str, monkeypatch) -> None:
    """The test of a family, with what it takes beside the name."""
    test(name, **({"monkeypatch": monkeypatch} if "monkeypatch" in inspect.signature(test).parameters else {}))


@pytest.mark.parametrize("test", loops(test_generators, "llamagen"))
def test_a_generators_properties(test, monkeypatch):
    monkeypatch.setitem(generators.FAMILIES, "diagonal", diagonal)
    monkeypatch.setattr(test_generators, "TABLE", Families(test_generators.TABLE, [GENERATOR]))
    call(getattr(test_generators, test), "diagonal", monkeypatch)


@pytest.mark.parametrize(
    "module, test", [(m, t) for m in (test_corruption, test_editing) for t in loops(m, "llamagen") if "line" not in t]
)
def test_a_generator_learns_from_wrong_tokens_and_edits(module, test, monkeypatch):
    monkeypatch.setitem(generators.FAMILIES, "diagonal", diagonal)
    call(getattr(module, test), "diagonal", monkeypatch)


@pytest.mark.parametrize("test", loops(test_tokenizers, "cnn_vq"))
def test_a_tokenizers_properties(test, monkeypatch):
    monkeypatch.setitem(tokenizers.FAMILIES, "vit_vq", vit_vq)
    monkeypatch.setattr(test_tokenizers, "ONE_SIZE", {*test_tokenizers.ONE_SIZE, "vit_vq"})
    monkeypatch.setattr(test_tokenizers, "CLASSES", Families(test_tokenizers.CLASSES, [TOKENIZER]))
    call(getattr(test_tokenizers, test), "vit_vq", monkeypatch)


def test_all_loops_are_found():
    """As many as pytest itself runs on a family of the packages."""
    assert len(loops(test_generators, "llamagen")) >= 15 and len(loops(test_tokenizers, "cnn_vq")) >= 6
    assert len(loops(test_editing, "llamagen")) >= 6 and len(loops(test_corruption, "llamagen")) == 2


def test_diagonals_by_hand():
    layout = diagonals(2, 3)
    assert layout.sizes == (1, 2, 2, 1)
    assert [cell[1:] for cell in layout.coords] == [(0, 0), (0, 1), (1, 0), (0, 2), (1, 1), (1, 2)]


# --- what is trusted ------------------------------------------------------------------------------------------------


def test_code_is_run_only_where_its_module_is_named(tmp_path):
    model = diagonal()
    description = describe(model)
    assert description["family"] == f"{GENERATOR}:Diagonal"
    for trust in ((), ("docs.add_a_paper.vit_vq",), ("docs.add_a",), ("",), ("vtok",)):
        with pytest.raises(ValueError, match=r"pass trust=\[docs.add_a_paper.diagonal\]"):
            build(description, Families(FAMILIES, trust))
    for trust in ((GENERATOR,), ("docs",), ("docs.add_a_paper",)):
        assert type(build(description, Families(FAMILIES, trust))) is Diagonal
    save_folder(model, tmp_path)
    assert isinstance(load_module(tmp_path, Families(FAMILIES, (GENERATOR,))), Diagonal)
    with pytest.raises(CheckpointError, match="outside this toolkit"):
        load_module(tmp_path, FAMILIES)


@pytest.mark.parametrize("family", ["os:system", "subprocess:Popen", "json:loads", "os:nothing", "no_such_module:X"])
def test_a_trusted_module_gives_families_only(family):
    """A description can reach a class of ours or of a user's family, never a function or a foreign class."""
    with pytest.raises(ValueError, match="trust"):
        build({"family": family, "arguments": {}}, Families(FAMILIES, ()))
    with pytest.raises(ValueError, match=r"no tokenizer, generator|cannot be imported"):
        build({"family": family, "arguments": {}}, Families(FAMILIES, (family.partition(":")[0],)))


def test_targets_of_a_configuration_need_trust():
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = compose("train", overrides=["data=fake", "data.image_size=16", "hydra.searchpath=[]"])
    section = {"_target_": f"{TOKENIZER}.ViTVQ", "image_size": 16, "quantizer": None}
    with pytest.raises(ValueError, match="trust"):
        instantiate(section, _partial_=True)
    assert config.trust == [] and instantiate(section, trust=(TOKENIZER,), _partial_=True).func is ViTVQ


def test_the_files_are_as_short_as_the_page_says():
    for name in ("diagonal", "vit_vq"):
        assert len((PAPER / f"{name}.py").read_text().splitlines()) <= 120
    assert len(list(PAPER.glob("*/*.yaml"))) == 2
    json.dumps(describe(diagonal()))
