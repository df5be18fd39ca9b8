"""`python -m eval.throughput`: its counts against closed forms, and the command from end to end on tiny modules."""

import dataclasses
import json

import pytest
import torch
from hydra import compose, initialize_config_dir
from runs import CONFIGS
from torch import nn

from eval import paths
from eval.throughput import Job, evaluate, floor, table, weight_bytes
from vtok import counters
from vtok.layers.packed import packable

TINY = (
    "data.image_size=16",
    "tokenizer=llamagen_vq16",
    "tokenizer.channels=8",
    "tokenizer.multipliers=[1,2,2]",
    "tokenizer.blocks=1",
    "tokenizer.z_channels=8",
    "tokenizer.attention=false",
    "tokenizer.mid_attention=false",
    "tokenizer.groups=4",
    "tokenizer.quantizer.vocab_size=32",
    "tokenizer.quantizer.channels=4",
    "num_classes=3",
    "batches=[2]",
    "repeats=1",
    "device=cpu",
)


def config(*overrides):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("eval_throughput", [*TINY, *overrides])


def test_operations_and_floor_of_a_linear_model():
    """Rows B, K to M to N: 2 B K M + 2 B M N operations; the floor is the slower of arithmetic and reading."""
    model, x = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)), torch.zeros(4, 5)
    want = 2 * 4 * 5 * 7 + 2 * 4 * 7 * 3
    assert floor(lambda: model(x), 100.0, rate=10.0, speed=1e9) == (want, pytest.approx(want / 10))
    assert floor(lambda: model(x), 100.0, rate=1e9, speed=2.0) == (want, pytest.approx(50))


def test_weights_that_a_pass_reads_leave_lookup_tables_out():
    model = nn.ModuleDict({"table": nn.Embedding(100, 8), "linear": nn.Linear(8, 6)})
    assert weight_bytes(model) == 4 * (8 * 6 + 6)
    assert weight_bytes(model.to(torch.bfloat16)) == 2 * (8 * 6 + 6)


def test_command_measures_every_part_and_keeps_earlier_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("eval.throughput.matmul_rate", lambda *_: 1e9)
    monkeypatch.setattr("eval.throughput.bandwidth", lambda *_: 1e9)
    out, markdown, picture = tmp_path / "t.json", tmp_path / "t.md", tmp_path / "t.png"
    rows = evaluate(config("model=llamagen_tiny", f"out={out}", f"table={markdown}", f"plot={picture}"))
    assert [row["part"] for row in rows] == ["encode", "decode", "sample", "train"]
    for row in rows:
        assert row["ms_per_image"] == pytest.approx(1000 / row["images_per_second"])
        assert row["fraction"] == pytest.approx(row["roofline_ms_per_image"] / row["ms_per_image"])
        assert row["matmul_operations_per_image"] > 0
        assert row["paths"] or row["part"] == "encode"
    decode, sample, train = rows[1:]
    assert decode["paths"]["decode.float32"] == 2 and sample["paths"]["rows.guided"] == 2 * 16
    assert train["paths"]["loss.whole"] == 2 and "step.recomputed" not in sample["paths"]
    assert train["parameters"] == sample["parameters"] != decode["parameters"]
    again = evaluate(config(f"out={out}", "parts=[decode]"))
    more = evaluate(config(f"out={out}", "parts=[decode]", "batches=[1]"))
    kept = json.loads(out.read_text())["rows"]
    assert len(again) == len(more) == 1 and len(kept) == 4 + 1, "the same settings replace their row, others stay"
    evaluate(config(f"out={out}", "parts=[decode]", "batches=[1]"))
    assert len(json.loads(out.read_text())["rows"]) == len(kept)
    assert markdown.read_text().count("\n") == 2 + 4 and picture.stat().st_size > 1000
    assert table(kept).splitlines()[0].count("|") == table(kept).splitlines()[2].count("|")


def test_mistakes_name_their_key(tmp_path):
    for option in ("parts=[encode,fly]", "batches=[]", "batches=[0]", "repeats=0"):
        with pytest.raises(ValueError, match="parts must be of"):
            evaluate(config(option, f"out={tmp_path / 'x.json'}"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packed_weights_are_counted_as_plain_ones_and_their_path_is_asked_for(dtype, tmp_path, monkeypatch):
    if not packable(torch.zeros(1, dtype=getattr(torch, dtype))):
        pytest.skip(f"this processor has no packed products in {dtype}")
    monkeypatch.setattr("eval.throughput.matmul_rate", lambda *_: 1e12)
    monkeypatch.setattr("eval.throughput.bandwidth", lambda *_: 1e12)
    common = ("model=llamagen_tiny", f"dtype={dtype}", "parts=[decode,sample]", f"out={tmp_path / 't.json'}")
    plain, packed = evaluate(config(*common, "packed=false")), evaluate(config(*common))
    assert packed[0]["paths"].get("decode.bfloat16", 0) == (2 if dtype == "bfloat16" else 0)
    assert packed[1]["paths"]["linear.packed"] > 0 == plain[1]["paths"].get("linear.packed", 0)
    for name in ("parameters", "matmul_operations_per_image", "roofline_ms_per_image"):
        assert packed[1][name] == pytest.approx(plain[1][name])
    assert len(json.loads((tmp_path / "t.json").read_text())["rows"]) == 4, "other settings are other rows"


def test_only_what_is_timed_counts(tmp_path, monkeypatch):
    """The plain run that operations are counted on takes the slow path; the timed one must not pass for it."""
    monkeypatch.setattr("eval.throughput.matmul_rate", lambda *_: 1e9)
    monkeypatch.setattr("eval.throughput.bandwidth", lambda *_: 1e9)
    run, made = Job(lambda: None, nn.Linear(1, 1), 1, False, paths.Asked({"step.cached"})), []
    plain = dataclasses.replace(run, plain=lambda: made.append(counters.count("step.cached")))
    monkeypatch.setattr("eval.throughput.jobs", lambda *_: {"sample": plain})
    with pytest.raises(ValueError, match=r"sample at batch 2 fell back.*not taken: step\.cached"):
        evaluate(config("parts=[sample]", f"out={tmp_path / 'x.json'}"))
    assert made == [None]


def test_a_fallback_is_no_measurement(tmp_path, monkeypatch):
    monkeypatch.setattr("eval.throughput.matmul_rate", lambda *_: 1e9)
    monkeypatch.setattr("eval.throughput.bandwidth", lambda *_: 1e9)
    monkeypatch.setattr("vgen.generator.Generator.cache", lambda *_, **__: None)
    out = tmp_path / "x.json"
    with pytest.raises(ValueError, match=r"sample at batch 2 fell back.*step\.recomputed"):
        evaluate(config("model=llamagen_tiny", "parts=[sample]", f"out={out}"))
    assert not out.exists()
    with pytest.raises(ValueError, match="cuda_graphs=true needs device=cuda"):
        evaluate(config("model=llamagen_tiny", "parts=[sample]", "cuda_graphs=true", f"out={out}"))
    with pytest.raises(ValueError, match="exclude each other"):
        evaluate(config("model=llamagen_tiny", "parts=[sample]", "packed=true", "quant=int8", f"out={out}"))
