"""The table of mistakes for the scripts and for what compares, reports and times: each costs one message, before any
work, and every file that was there stays as it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image
from test_cli_errors import check
from test_cli_errors_reading import ROOT, invoke
from test_pipeline import exported

from vtok.cli import SWITCHES, check_values, own_folder, usual_values

RECONSTRUCT, GALLERY, CODES = "scripts/reconstruct.py", "scripts/gallery.py", "scripts/cache_codes.py"
CONVERT, EXPORT, EDIT, LOADING = "scripts/convert.py", "scripts/export.py", "scripts/edit.py", "scripts/loading.py"
COMPARE, REPORT, SPEED, VERSUS = "eval.compare", "eval.report", "eval.throughput", "eval.versus"
SWEEP, LIKELIHOOD, VTBENCH, JUDGE = "eval.sweep", "eval.likelihood", "eval.vtbench", "scripts/train_judge.py"
KILL, TORTURE, FUZZ, DEMO = (f"scripts/{name}.py" for name in ("kill_eval", "torture", "fuzz", "demo"))
PHOTOS, BENCHMARKS, BENCH, SCALING = (f"scripts/{name}.py" for name in ("photos", "benchmarks", "bench_gpu", "scaling"))

COPY = ("from={model}/tokenizer", "in={good}")
CACHE = ("from={model}/tokenizer", "data=digits")
FILE = ("from={small}", "family=llamagen")
PART = ("from={model}", "image={picture}", "box=[0,0,0.5,0.5]")
SWEPT = ("from={model}", "reference={samples}", "images=4", "out=sweep")
FAST = ("tokenizer=cnn_vq_small", "parts=[encode]")
DIGITS = ("from={model}", "data=digits")
TRAINED = ("folder={classes}", "batch_size=4", "out=judge.safetensors")

# name -> (command, its arguments, what the message must contain); {x} are places made by `places` below
MISTAKES: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "reconstruct: no text": (RECONSTRUCT, (*COPY, "out=[1]"), ("out=[1]: give one text",)),
    "reconstruct: null": (RECONSTRUCT, ("from=null", "in={good}", "out=o"), ("from is not given",)),
    "reconstruct: a word for a switch": (RECONSTRUCT, (*COPY, "out=o", "whole=maybe"), ("whole=maybe: choose true",)),
    "reconstruct: task": (RECONSTRUCT, (*COPY, "out=o", "task_id=x", "num_tasks=2"), ("task_id=x: give a whole",)),
    "reconstruct: device": (RECONSTRUCT, (*COPY, "out=o", "device=cpu:x"), ("device='cpu:x': choose auto",)),
    "reconstruct: a file for a folder": (RECONSTRUCT, (*COPY, "out={text}"), ("out={text}", "is a file, no folder")),
    "reconstruct: pictures of others": (
        RECONSTRUCT,
        ("from={model}/tokenizer", "in={good}", "out={others}"),
        ("{others}/kind/3.png is there", "overwrite=true"),
    ),
    "gallery: ending": (GALLERY, (*COPY, "out={samples}"), ("out={samples}: the ending must be .png",)),
    "gallery: its own original": (
        GALLERY,
        ("from={model}/tokenizer", "in={good}", "out={good}/kind/3.png"),
        ("out={good}/kind/3.png would replace",),
    ),
    "gallery: a number for tokenizers": (GALLERY, ("from=3", "in={good}"), ("from=3: give a list",)),
    "codes: batch": (CODES, (*CACHE, "out=o", "batch_size=x"), ("batch_size=x: give a whole number of at least 1",)),
    "codes: accumulate": (CODES, (*CACHE, "out=o", "accumulate=x"), ("accumulate=x: give a whole number",)),
    "codes: size of the data": (CODES, (*CACHE, "out=o", "data.image_size=x"), ("data.image_size=x: give a whole",)),
    "codes: workers": (CODES, (*CACHE, "out=o", "data.workers=x"), ("data.workers=x: give a whole number",)),
    "codes: limit": (CODES, (*CACHE, "out=o", "data.limit_val=x"), ("data.limit_val=x: give a whole number",)),
    "codes: a run's folder": (CODES, (*CACHE, "out={model}"), ("out={model} holds tokenizer already",)),
    "convert: missing file": (CONVERT, ("from=nowhere.pt", "out=o"), ("from=nowhere.pt does not exist",)),
    "convert: a text for a file": (CONVERT, ("from={text}", "out=o", "family=llamagen"), ("{text}",)),
    "convert: half a file": (CONVERT, ("from={cut}", "out=o", "family=llamagen"), ("{cut}", "damaged or truncated")),
    "convert: no JSON": (CONVERT, (*FILE, "out=o", "config={text}"), ("config={text} is no JSON file",)),
    "convert: a JSON list": (CONVERT, (*FILE, "out=o", "config={list}"), ("config={list} holds no object",)),
    "convert: a file for a folder": (CONVERT, (*FILE, "out={text}/o"), ("out={text}/o", "is a file, no folder")),
    "convert: its own source": (
        CONVERT,
        ("from={weights}/model.safetensors", "family=llamagen", "out={weights}", "overwrite=true"),
        ("out={weights} would replace from={weights}/model.safetensors",),
    ),
    "convert: size": (CONVERT, (*FILE, "out=o", "image_size=x"), ("image_size=x: give a whole number",)),
    "export: weights": (EXPORT, ("from={text}", "out=o", "weights=best"), ("weights='best': choose ema or raw",)),
    "export: a model there": (EXPORT, ("from={text}", "out={model}"), ("{model} holds a model already",)),
    "edit: no seed": (EDIT, (*PART, "seed=null"), ("seed=None: give a whole number",)),
    "edit: no number": (EDIT, (*PART, "temperature=nan"), ("temperature=nan: give a number",)),
    "edit: half a token": (EDIT, (*PART, "top_k=1.5"), ("top_k=1.5: give a whole number",)),
    "edit: box": (EDIT, ("from={model}", "image={picture}", "box=3"), ("box=3: give [left, top, right, bottom]",)),
    "edit: options": (EDIT, (*PART, "class=1", "guidance=2", "schedule_options=3"), ("schedule_options=3: give",)),
    "edit: a schedule without guidance": (
        EDIT,
        (*PART, "class=1", "schedule=linear"),
        ("schedule=linear has no effect without guidance",),
    ),
    "edit: a schedule without a class": (EDIT, (*PART, "schedule=linear"), ("schedule=linear", "needs class=")),
    "edit: scales": (EDIT, (*PART, "keep_scales=2"), ("keep_scales=2: this model's tokens have one scale",)),
    "edit: its own original": (EDIT, (*PART, "out={picture}"), ("out={picture} would replace image={picture}",)),
    "edit: a folder for a file": (EDIT, (*PART, "out={folder}"), ("out={folder} is a folder",)),
    "loading: few": (LOADING, ("folder={good}", "out=o"), ("folder={good} holds 8 images: at least 32",)),
    "loading: count": (LOADING, ("count=8", "out=o"), ("count=8: give a whole number of at least 32",)),
    "loading: seconds": (LOADING, ("seconds=x", "out=o"), ("seconds=x: give a number",)),
    "loading: consumers": (LOADING, ("consumers=[var_d16]", "out=o"), ("give a list of [<model>, <tokenizer>]",)),
    "loading: a model": (LOADING, ("consumers=[[x,kl16]]", "out=o"), ("consumers=[[x,kl16]]: ", "'model/x'")),
    "loading: gpu": (LOADING, ("gpu=x", "out=o"), ("gpu=x: its rate is not known; choose from H100 PCIe",)),
    "loading: a folder of others": (LOADING, ("out={good}",), ("out={good} holds files that are not of this command",)),
    "compare: none": (COMPARE, ("runs=[]",), ("runs=[] names no run",)),
    "compare: a number": (COMPARE, ("runs=3",), ("runs=3: give a list",)),
    "compare: curves": (COMPARE, ("runs={run}", "curves=[x]"), ("curves=x: no run has it; there are train/loss",)),
    "compare: a file for a folder": (COMPARE, ("runs={run}", "out={text}"), ("out={text}", "is a file, no folder")),
    "compare: no metrics": (COMPARE, ("runs={columns}",), ("{columns}/metrics.csv is no metrics.csv",)),
    "compare: protocol": (COMPARE, ("runs={protocol}",), ("{protocol}/eval/fid.json", "misses")),
    "compare: picture": (COMPARE, ("runs={drawn}", "out={here}/o"), ("{drawn}/pictures/reconstructions_0.png",)),
    "report: none": (REPORT, ("runs=[]",), ("runs=[] names no run",)),
    "report: ending": (REPORT, ("runs={run}", "out={model}/config.json"), ("config.json: the ending must be .html",)),
    "report: sweep": (REPORT, ("runs={swept}",), ("{swept}/eval/sweep/sweep.jsonl is no result",)),
    "report: images": (
        REPORT,
        ("runs={run}", "samples={samples}", "data=digits", "extractor=cifar", "train_images=0"),
        ("train_images=0: give a whole number of at least 1",),
    ),
    "report: two sizes": (
        REPORT,
        ("runs={run}", "samples={samples}", "data=digits", "data.image_size=40", "extractor=cifar"),
        ("samples are (32, 32), data (40, 40): set data.image_size",),
    ),
    "throughput: parts": (SPEED, (FAST[0], "parts=encode"), ("parts=encode: give a list",)),
    "throughput: no model": (SPEED, (FAST[0], "parts=[sample]"), ("give model=<name>",)),
    "throughput: batches": (SPEED, (*FAST, "batches=[1.5]"), ("batches=1.5: give a whole number",)),
    "throughput: repeats": (SPEED, (*FAST, "repeats=1.5"), ("repeats=1.5: give a whole number",)),
    "throughput: a JSON of others": (SPEED, (*FAST, "out={list}"), ("out={list} is there and holds no JSON object",)),
    "throughput: no JSON": (SPEED, (*FAST, "out={text}"), ("out={text} is there and holds no JSON object",)),
    "throughput: table": (SPEED, (*FAST, "table={folder}"), ("table={folder} is a folder",)),
    "throughput: plot": (SPEED, (*FAST, "plot=x.abc"), ("plot=x.abc: the ending must be .png",)),
    "throughput: size": (SPEED, (*FAST, "data.image_size=x"), ("data.image_size=x: give a whole number",)),
    "throughput: switch": (SPEED, (*FAST, "packed=maybe"), ("packed=maybe: choose true or false",)),
    "versus: batch": (VERSUS, ("peer=llamagen", "dir={good}", "batch=1.5"), ("batch=1.5: give a whole number",)),
    "versus: seconds": (VERSUS, ("selftest=true", "least_seconds=nan"), ("least_seconds=nan: give a number",)),
    "versus: parts": (VERSUS, ("peer=llamagen", "dir={good}", "parts=[x]"), ("parts=['x']: give a list, of sample",)),
    "versus: both": (VERSUS, ("selftest=true", "peer=var"), ("leave peer=var away",)),
    "versus: a JSON of others": (VERSUS, ("selftest=true", "out={run}/eval/fid.json"), ("holds no JSON with rows",)),
    "sweep: batch": (SWEEP, (*SWEPT[:1], "reference=val", "data=digits", "batch_size=x"), ("batch_size=x: give a",)),
    "sweep: no list": (SWEEP, (*SWEPT, "sweep=3"), ("sweep=3: give lists",)),
    "sweep: no number": (SWEEP, (*SWEPT, "sweep.guidance=[1,nan]"), ("guidance=nan: give a number",)),
    "sweep: a later rule": (SWEEP, (*SWEPT, "sweep.guidance=[1]", "sweep.top_p=[1,2]"), ("0 < top_p <= 1",)),
    "sweep: later weights": (SWEEP, (*SWEPT, "sweep.weights=[ema,best]"), ("weights=best: choose ema or raw",)),
    "sweep: a schedule without guidance": (
        SWEEP,
        (*SWEPT, "sweep.guidance=null", "sweep.schedule=[constant,linear]"),
        ("schedule=linear has no effect without guidance",),
    ),
    "sweep: statistics over images": (
        SWEEP,
        (*SWEPT, "sweep.guidance=[1]", "save_reference={samples}"),
        ("save_reference={samples} is there and would be lost",),
    ),
    "likelihood: batch": (LIKELIHOOD, (*DIGITS, "batch_size=x"), ("batch_size=x: give a whole number",)),
    "likelihood: no images": (LIKELIHOOD, (*DIGITS, "images=null"), ("images=null: give images=<value>",)),
    "likelihood: size": (
        LIKELIHOOD,
        (*DIGITS, "data.image_size=40"),
        ("the generator works at 32 px",),
    ),
    "likelihood: classes": (LIKELIHOOD, DIGITS, ("data has 10 classes, the generator 5",)),
    "likelihood: no group": (LIKELIHOOD, (DIGITS[0], "data=null"), ("data=null is no choice: pass data=<name>",)),
    "likelihood: no JSON": (
        LIKELIHOOD,
        (*DIGITS, "out={picture}"),
        ("out={picture} is there and holds no JSON",),
    ),
    "vtbench: languages": (VTBENCH, ("from={model}/tokenizer", "text={good}", "languages=3"), ("languages=3: give a",)),
    "vtbench: over the pictures": (
        VTBENCH,
        ("from={model}/tokenizer", "detail={good}", "save={good}"),
        ("save={good} is a folder of the pictures",),
    ),
    "judge: epochs": (JUDGE, (*TRAINED, "epochs=x"), ("epochs=x: give a whole number",)),
    "judge: rate": (JUDGE, (*TRAINED, "lr=nan"), ("lr=nan: give a number of at least 0",)),
    "judge: smoothing": (JUDGE, (*TRAINED, "label_smoothing=2"), ("label_smoothing=2: give a number from 0 to 1",)),
    "judge: widths": (JUDGE, (*TRAINED, "widths=[8,8]"), ("widths=[8, 8]: give a list of three",)),
    "judge: batch": (JUDGE, ("folder={classes}", "out=judge.safetensors"), ("batch_size=500: there are 8",)),
    "judge: warmup": (JUDGE, (*TRAINED, "epochs=1", "warmup=1"), ("warmup=1 is all of the 2 steps",)),
    "judge: no test": (
        JUDGE,
        ("folder={half}", "batch_size=4", "out=judge.safetensors"),
        ("{half}/test holds no",),
    ),
    "kill: reference": (KILL, ("from={model}", "reference=nowhere"), ("reference=nowhere does not exist",)),
    "kill: kills": (KILL, ("from={model}", "reference={samples}", "kills=0"), ("kills=0: give a whole number",)),
    "torture: share": (TORTURE, ("write=2",), ("write=2: give a number from 0 to 1",)),
    "torture: shares": (TORTURE, ("write=0.8", "loader=0.7"), ("above 1 together",)),
    "torture: kills": (TORTURE, ("kills=x",), ("kills=x: give a whole number",)),
    "fuzz: a folder of others": (FUZZ, ("out={good}",), ("out={good} holds files that are not of this command",)),
    "fuzz: images": (FUZZ, ("images=-1", "out=o"), ("images=-1: give a whole number of at least 0",)),
    "demo: no images": (DEMO, ("per_class=0",), ("per_class=0: give a whole number of at least 1",)),
    "demo: rule": (DEMO, ("top_p=3",), ("0 < top_p <= 1",)),
    "demo: overrides": (DEMO, ("tokenizer=3",), ("tokenizer=3 is no choice",)),
    "demo: a file for a folder": (DEMO, ("out={text}",), ("out={text}", "is a file, no folder")),
    "photos: kinds": (PHOTOS, ("kinds=[next_token,x]",), ("kinds=['next_token', 'x']: choose from",)),
    "photos: budget": (PHOTOS, ("budget=nan",), ("budget=nan: give a number",)),
    "photos: samples": (PHOTOS, ("samples=x",), ("samples=x: give a whole number",)),
    "photos: drawing": (PHOTOS, ("draw.next_scale.guidance=x",), ("draw.next_scale.guidance=x: give a number",)),
    "benchmarks: no JSON": (BENCHMARKS, ("versus={text}", "out={here}/b.md"), ("versus={text} is no JSON file",)),
    "benchmarks: no rows": (BENCHMARKS, ("scaling={list}", "out={here}/b.md"), ("scaling={list} holds no rows",)),
    "benchmarks: missing": (BENCHMARKS, ("versus=nowhere", "out={here}/b.md"), ("versus=", "nowhere is no JSON file")),
    "bench_gpu: row": (BENCH, ("only=nothing", "out=o"), ("only=['nothing']: choose of",)),
    "bench_gpu: seconds": (BENCH, ("seconds=x", "out=o"), ("seconds=x: give a number",)),
    "bench_gpu: a damaged row": (BENCH, ("out={rows}",), ("{rows}/llamagen_l_sample_1.json is no measurement",)),
    "scaling: threads": (SCALING, ("threads=null", "light=true", "out=o"), ("threads=null: give threads=<value>",)),
    "scaling: a file for a folder": (SCALING, ("light=true", "out={text}"), ("out={text}", "is a file, no folder")),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("places")
    exported(root / "model")
    drawer = np.random.default_rng(0)

    def draw(path: Path, side: int = 40) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(drawer.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(path)

    for i in range(8):
        draw(root / "good" / "kind" / f"{i}.png")
        draw(root / "classes" / ("train", "test")[i % 2] / "ab"[i // 4] / f"{i}.png", 32)
        draw(root / "half" / "train" / "ab"[i // 4] / f"{i}.png", 32)
    for i in range(4):
        draw(root / "classes" / "train" / "ab"[i // 2] / f"more{i}.png", 32)
    draw(root / "others" / "kind" / "3.png")
    draw(root / "picture.png")
    (root / "folder.png").mkdir()
    (root / "folder.md").mkdir()
    (root / "text.json").write_text("no JSON")
    (root / "list.json").write_text("[1, 2]")
    torch.save({"a": torch.zeros(3)}, root / "small.pt")
    (root / "cut.pt").write_bytes((root / "small.pt").read_bytes()[:500])
    (root / "weights").mkdir()
    shutil.copy(root / "model" / "model.safetensors", root / "weights")
    (root / "rows").mkdir()
    (root / "rows" / "llamagen_l_sample_1.json").write_text("{}")
    np.savez(root / "samples.npz", arr_0=drawer.integers(0, 256, (4, 32, 32, 3), dtype=np.uint8), arr_1=np.arange(4))
    for name in ("run", "columns", "protocol", "drawn", "swept"):
        (root / name / "eval" / "sweep").mkdir(parents=True)
        described = {"protocol": {"a": 1}} if name == "protocol" else {}
        (root / name / "eval" / "fid.json").write_text(json.dumps({"metrics": {"FD[cifar]": 1.5}, **described}))
        (root / name / "metrics.csv").write_text("a,b\n1,2\n" if name == "columns" else "step,train/loss\n1,0.5\n")
    (root / "drawn" / "pictures").mkdir()
    (root / "drawn" / "pictures" / "reconstructions_0.png").write_text("no picture")
    (root / "swept" / "eval" / "sweep" / "sweep.jsonl").write_text("no result")
    files = {"picture": "picture.png", "folder": "folder.png", "text": "text.json", "list": "list.json"}
    files |= {"small": "small.pt", "cut": "cut.pt", "samples": "samples.npz"}
    names = ("model", "good", "classes", "half", "others", "weights", "rows")
    names += ("run", "columns", "protocol", "drawn", "swept")
    return {"root": str(root)} | {n: str(root / files.get(n, n)) for n in (*names, *files)}


def files_of(folder: str | Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_costs_three_lines_and_no_file(name, places, tmp_path, monkeypatch, capsys):
    command, arguments, wanted = MISTAKES[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    known, before = places | {"here": str(tmp_path)}, files_of(places["root"])
    with pytest.raises(SystemExit) as stopped:
        invoke(command, [a.format(**known) for a in arguments], monkeypatch)
    check(stopped.value.code, capsys.readouterr().err, [w.format(**known) for w in wanted])
    assert files_of(places["root"]) == before and not files_of(tmp_path)


COMMANDS = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_switch_takes_true_and_false_alone(command):
    """Every key of every command whose default is true or false: bool("false") would be true."""
    usual = usual_values(ROOT / "configs", command)
    given = [f"{name}=x" for name, value in usual.items() if value == "???"]
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = compose(command, overrides=given)
    empty = {"whole": {}, "numbers": {}, "texts": (), "lists": ()}
    check_values(config, usual, **empty)
    for name in [n for n, value in usual.items() if isinstance(value, bool) or n in SWITCHES]:
        kept, config[name] = config[name], "false"
        with pytest.raises(ValueError, match=f"{name}=false: choose true or false"):
            check_values(config, usual, **empty)
        config[name] = kept


def test_a_number_is_a_name_too():
    """out=2024, which Hydra reads as a number."""
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = compose("gallery", overrides=["from=[1,b]", "in=7", "out=2024", "~trust", "~count"])  # two are gone
    usual = usual_values(ROOT / "configs", "gallery")
    check_values(config, usual, whole={"count": 1}, numbers={}, texts=(), lists=("from", "names"))
    assert (config["from"], config["in"], config.out) == (["1", "b"], "7", "2024")


def test_a_folder_is_emptied_by_the_command_that_made_it_alone(tmp_path):
    for place in (tmp_path / "new", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        own_folder("out", place, ".mine")
        (place / "made").write_text("x")
        own_folder("out", place, ".mine")
        assert (place / "made").exists()
        own_folder("out", place, ".mine", empty=True)
        assert [path.name for path in place.iterdir()] == [".mine"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "theirs").write_text("x")
    for mark in (".mine", ".yours"):
        with pytest.raises(ValueError, match="not of this command"):
            own_folder("out", tmp_path / "other", mark, empty=True)
    with pytest.raises(ValueError, match="not of this command"):
        own_folder("out", tmp_path / "new", ".yours", empty=True)
    assert (tmp_path / "other" / "theirs").exists() and (tmp_path / "new" / ".mine").exists()


@pytest.mark.parametrize("arguments", [("ifsq", "--budget", "nan"), ("nested", "--steps", "0"), ("ifsq", "fsq_9")])
def test_mistakes_with_a_study_end_before_it(arguments, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT))
    with pytest.raises(SystemExit) as stopped:
        invoke("scripts/tokenizer_study.py", list(arguments), monkeypatch)
    said = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and (arguments[-1] in said or "at least one step" in said)


@pytest.mark.parametrize("command, arguments", [("full_size", ["nothing"]), ("manifests", [".", "out", "nothing"])])
def test_a_model_that_is_not_there_is_named(command, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    with pytest.raises(SystemExit, match=r"error: .*no .*nothing"):
        invoke(f"scripts/{command}.py", arguments, monkeypatch)
    assert not list(tmp_path.iterdir())
