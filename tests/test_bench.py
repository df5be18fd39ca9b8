"""The benchmark scripts without a GPU: which rows run, what a killed one leaves, the page, and growth with position."""

import itertools
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra import compose, initialize_config_dir

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts import bench_gpu, benchmarks, scaling  # noqa: E402

CONFIGS = ROOT / "configs"


def settings(folder, **options):
    return {"out": str(folder), "seconds": 100, "row_seconds": 10, "repeats": 1, "only": None, **options}


def result(name):
    row = {"part": "sample", "batch": 1, "images_per_second": 2.0, "ms_per_image": 500.0, "fraction": 0.3}
    return {"rows": [row | {"device": "a GPU", "name": name}]}


def runner(calls, *, slow=(), broken=(), cost=30.0, now=None):
    def start(command, *, cwd, timeout):
        out = Path(command[-1].removeprefix("out="))
        calls.append(out.stem)
        if now is not None:
            now[0] += cost
        if out.stem in slow:
            out.write_text("{half")
            raise subprocess.TimeoutExpired(command, timeout)
        if out.stem not in broken:
            out.write_text(json.dumps(result(out.stem)))
        return SimpleNamespace(returncode=int(out.stem in broken))

    return start


def test_rows_run_in_order_until_the_time_is_up_and_the_next_call_goes_on(tmp_path):
    calls, now, names = [], [0.0], list(bench_gpu.ROWS)
    first = bench_gpu.run(settings(tmp_path), start=runner(calls, now=now), clock=lambda: now[0])
    assert first == names[:4], "rows start at 0, 30, 60 and 90 s of 100"
    bench_gpu.run(settings(tmp_path, seconds=1e9), start=runner(calls, now=now), clock=lambda: now[0])
    assert calls == names and bench_gpu.left(tmp_path, None) == []


def test_slow_and_broken_rows_come_first_in_the_next_call(tmp_path):
    a, b, c, d, e = five = list(bench_gpu.ROWS)[:5]
    calls, now, wanted = [], [0.0], settings(tmp_path, only=five)
    done = bench_gpu.run(wanted, start=runner(calls, slow=[b], broken=[d], now=now), clock=lambda: now[0])
    assert calls == [a, b, c, d] and done == [a, c]
    assert bench_gpu.left(tmp_path, five) == [b, d, e], "e was never tried"
    assert (tmp_path / f"{b}.failed").read_text() == "over 10 s, given up\n"
    bench_gpu.run(wanted, start=runner(calls))
    assert calls[4:] == [b, d, e] and not list(tmp_path.glob("*.failed")) and not bench_gpu.left(tmp_path, five)
    with pytest.raises(ValueError, match="only="):
        bench_gpu.left(tmp_path, ["other"])


@pytest.mark.parametrize("rows", [[], [{"part": "train", "images_per_second": None, "fraction": None}]])
def test_rows_without_numbers_are_no_measurement(tmp_path, rows):
    name = next(iter(bench_gpu.ROWS))

    def start(command, *, cwd, timeout):
        Path(command[-1].removeprefix("out=")).write_text(json.dumps({"rows": rows}))
        return SimpleNamespace(returncode=0)

    assert bench_gpu.run(settings(tmp_path, only=[name]), start=start) == []
    assert bench_gpu.left(tmp_path, [name]) == [name] and not (tmp_path / f"{name}.json").exists()
    (tmp_path / f"{name}.json").write_text(json.dumps({"rows": rows}))  # by an earlier version
    assert bench_gpu.left(tmp_path, [name]) == [name]
    assert f"| {name} | | | | not measured |" in benchmarks.gpu_table(tmp_path)


def test_mar_and_xar_are_measured_at_the_steps_of_the_comparison(tmp_path):
    """16 iterations and 10 solver steps; rows say them, and the page shows them."""
    for name, steps, shown in (("mar_b_sample_1", (16, 100), "16 x 100"), ("xar_b_sample_1", (4, 10), "4 x 10")):
        options = [option for option in bench_gpu.ROWS[name] if option.startswith(("tokenizer=", "model"))]
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            model = compose("eval_throughput", options).model
        assert (model.get("steps", 4), model.solver_steps) == steps
        row = result(name)["rows"][0] | dict(zip(("steps", "solver_steps"), steps))
        (tmp_path / f"{name}.json").write_text(json.dumps({"rows": [row]}))
        assert f"| {name} | sample | {shown} | 1 | 2.00 |" in benchmarks.gpu_table(tmp_path)


def test_every_row_names_configs_that_exist():
    for name, options in bench_gpu.ROWS.items():
        for option in options:
            group, _, choice = option.partition("=")
            if group in ("tokenizer", "model"):
                assert (CONFIGS / group / f"{choice}.yaml").is_file(), (name, option)


def test_page_says_not_measured_where_there_is_no_row(tmp_path):
    row = {"peer": "llamagen", "size": "GPT-B", "part": "sample", "batch": 1, "dtype": "float32", "ratio": 2.5}
    row |= {"ratio_low": 2.25, "ratio_high": 2.75, "original_seconds": 5.0, "our_seconds": 2.0, "setting": "256 tokens"}
    row |= {
        "note": None,
        "device": "a CPU",
        "date": "2026-01-01",
        "clock": "wall",
        "threads": 2,
        "versions": {"torch": "2"},
    }
    name = next(iter(bench_gpu.ROWS))
    (tmp_path / f"{name}.json").write_text(json.dumps(result(name)))
    text = benchmarks.page([row], tmp_path)
    assert "| float32 | >= 2.0 | 2.50 (2.25 to 2.75) | yes | 5.00, 2.00 | 256 tokens | wall, a CPU |" in text
    cells = sum(len(batches) for *_, batches, _ in benchmarks.WANTED)
    assert benchmarks.cpu_table([row]).count("not measured") == cells - 1
    assert benchmarks.cpu_table([row | {"on": "cuda"}]).count("not measured") == cells
    assert benchmarks.gpu_table(tmp_path).count(f"| {name} | sample |  | 1 | 2.00 | 500.0 | 30% |  | a GPU |") == 1


def test_kept_page_is_what_its_rows_give():
    kept = json.loads((ROOT / "docs" / "benchmarks.json").read_text())["rows"]
    lines = (ROOT / "docs" / "benchmarks.md").read_text()
    assert benchmarks.cpu_table(kept) in lines
    grown = json.loads((ROOT / "docs" / "scaling" / "scaling.json").read_text())
    assert benchmarks.growth_table(grown) in lines
    points = [(r["axis"], r[r["axis"]]) for r in grown["rows"]]
    assert points == [(axis, value) for axis, values in scaling.AXES.items() for value in values]
    assert benchmarks.growth_table(None) == "Not measured."


def test_growth_compares_the_last_quarter_with_the_second():
    assert scaling.growth([9.0, 9.0, 1.0, 2.0, 5.0, 5.0, 3.0, 6.0]) == 4.5 / 1.5


def test_light_scaling_writes_its_points(tmp_path):
    rows = scaling.run({"light": True, "threads": 1, "out": str(tmp_path)})
    assert [(r["axis"], r[r["axis"]]) for r in rows] == [(a, v) for a, values in scaling.LIGHT.items() for v in values]
    assert (tmp_path / "scaling.png").stat().st_size > 1000
    by_depth = [r["parameter_bytes"] for r in rows if r["axis"] == "depth"]
    by_batch = [r["cache_bytes"] for r in rows if r["axis"] == "batch"]
    assert by_batch[1] == 4 * by_batch[0] and by_depth[1] > by_depth[0]


def test_kernels_of_a_decode_step_do_not_grow_with_the_position():
    """Counted, not timed: every step runs the same operations, on tensors that differ in the attended keys alone."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from vgen.conditioning import Cond
    from vgen.guidance import guidance
    from vgen.heads import DrawRule
    from vgen.samplers.ancestral import ancestral
    from vtok.noise import SampleNoise, sample_seeds

    class Count(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.calls = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.calls.append(str(function))
            return function(*args, **(kwargs or {}))

    model, marks = scaling.model_of(64, 2).eval(), []
    cond = Cond.cat([model.conditioner(torch.tensor([1])), model.conditioner.null(1)])
    with torch.no_grad(), Count() as count:
        noise = SampleNoise(sample_seeds(0, 0, 1))
        watch = lambda *_: marks.append(len(count.calls))  # noqa: E731
        ancestral(model, cond, noise=noise, guide=guidance(2.0), rule=DrawRule(top_k=20), on_step=watch)
    steps = [count.calls[a:b] for a, b in itertools.pairwise(marks[1:])]
    assert all(step == steps[0] for step in steps[:-1]) and len(steps) == 62
    whole = [call.replace("alias.default", "slice.Tensor") for call in steps[-1]]  # the last slice is the whole cache
    assert whole == [call.replace("alias.default", "slice.Tensor") for call in steps[0]]
