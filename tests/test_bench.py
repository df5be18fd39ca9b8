"""The benchmark scripts without a GPU: which rows run, what a killed one leaves, the page, and growth with position."""

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra import compose, initialize_config_dir

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts import bench_gpu, benchmarks, loading, scaling  # noqa: E402

CONFIGS = ROOT / "configs"


def settings(folder, **options):
    given = {"out": str(folder), "seconds": 100, "row_seconds": 10, "most_seconds": 25, "repeats": 1}
    return given | {"only": None, "peers": None} | options


def result(name):
    row = {"part": "sample", "batch": 1, "images_per_second": 2.0, "ms_per_image": 500.0, "fraction": 0.3}
    row |= {"device": "a GPU", "name": name, "peak_memory_bytes": 3 * 2**29}
    return {"rows": [row], "date": "2026-01-02", "versions": {"torch": "2.9"}}


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


def test_a_row_has_what_is_left_of_the_call_up_to_a_most(tmp_path):
    """Rows start at 0, 40 and 80 s of a call that ends at 110; one that starts at 120 would have had less than 10."""
    given, now = [], [0.0]

    def start(command, *, cwd, timeout):
        given.append(timeout)
        now[0] += 40
        raise subprocess.TimeoutExpired(command, timeout)

    names = list(bench_gpu.ROWS)[:4]
    options = settings(tmp_path, most_seconds=60, only=names)
    assert bench_gpu.run(options, start=start, clock=lambda: now[0]) == []
    assert given == [60, 60, 30] and (tmp_path / f"{names[2]}.failed").read_text() == "over 30 s, given up\n"
    with pytest.raises(ValueError, match=r"most_seconds=5 is below row_seconds=10, which every row has"):
        bench_gpu.check_times(settings(tmp_path, most_seconds=5))


def test_slow_and_broken_rows_come_first_in_the_next_call(tmp_path):
    a, b, c, d, e = five = list(bench_gpu.ROWS)[:5]
    calls, now, wanted = [], [0.0], settings(tmp_path, only=five)
    done = bench_gpu.run(wanted, start=runner(calls, slow=[b], broken=[d], now=now), clock=lambda: now[0])
    assert calls == [a, b, c, d] and done == [a, c]
    assert bench_gpu.left(tmp_path, five) == [d, e, b], "e was never tried, b had all the time that a row may have"
    assert (tmp_path / f"{b}.failed").read_text() == "over 25 s, the most that a row has, given up\n"
    (tmp_path / f"{b}.failed").write_text("over 12 s, given up\n")
    assert bench_gpu.left(tmp_path, five) == [b, d, e], "b had what a call had left"
    bench_gpu.run(wanted, start=runner(calls))
    assert calls[4:] == [b, d, e] and not list(tmp_path.glob("*.failed")) and not bench_gpu.left(tmp_path, five)
    for _ in range(2):
        (tmp_path / f"{b}.json").unlink(missing_ok=True)
        bench_gpu.run(settings(tmp_path, only=[b]), start=runner([], broken=[b]))
    (tmp_path / f"{e}.json").unlink()
    assert bench_gpu.left(tmp_path, five) == [e, b], "what failed twice waits for all others"
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
        (tmp_path / f"{name}.json").write_text(json.dumps(result(name) | {"rows": [row]}))
        assert f"| {name} | sample | {shown} | 1 | 2.00 |" in benchmarks.gpu_table(tmp_path)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("there, online", [(True, False), (False, True), (False, False)])
def test_make_bench_gpu_measures_where_torchao_cannot_be_had(tmp_path, there, online):
    """Without a network too, as on many GPU machines: an interpreter that only says what it is asked."""
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    fails = {"import torchao": there, "pip install": online}
    cases = "".join(f'case "$*" in *"{words}"*) exit {int(not fine)};; esac\n' for words, fine in fails.items())
    python.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n{cases}')
    python.chmod(0o755)
    (tmp_path / "ready").touch()
    command = ["make", "-s", "bench-gpu", f"VENV={tmp_path}", "PEERS=clones"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    asked = (tmp_path / "asked").read_text()
    assert "scripts/bench_gpu.py peers=clones\nscripts/benchmarks.py\n" in asked
    assert ("pip install" in asked) == (not there)
    assert ("note: torchao was not installed" in said) == (not there and not online)


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
    name, short = next(iter(bench_gpu.ROWS)), {"fraction": 0.29}
    (tmp_path / f"{name}.json").write_text(json.dumps(result(name)))
    text = benchmarks.page([row], tmp_path)
    line = "| float32 | >= 2.0 | 2.50 (2.25 to 2.75) | yes |  | 5.00, 2.00 | 256 tokens | wall, a CPU, one process |"
    assert line in text
    assert "wall, a CPU, two processes |" in benchmarks.page([row | {"apart": True}], tmp_path)
    known = row | {"original_seconds": 3.0, "operations": 2e11, "matmul_rate": 1e11}  # two seconds of products
    assert benchmarks.at_most(known) == "1.50" and "| 1.50 |" in benchmarks.page([known], tmp_path)
    assert benchmarks.at_most(known | {"paths": {"linear.gradients": 2}}) == ""  # not products at that rate
    cells = sum(len(batches) for *_, batches, _ in benchmarks.WANTED)
    cells += sum(part == "sample" for *_, part, _, _ in benchmarks.WANTED)  # in bf16, one image at a time
    assert benchmarks.cpu_table([row]).count("not measured") == cells - 1
    assert benchmarks.cpu_table([row, row | {"dtype": "bfloat16"}]).count("not measured") == cells - 2
    assert benchmarks.cpu_table([row | {"on": "cuda"}]).count("not measured") == cells
    goal = ">= 30% of the roofline"
    line = f"| {name} | sample |  | 1 | 2.00 | 500.0 | 30% |  | a GPU | {goal} | yes | 1.5 | 2026-01-02 | 2.9 |"
    assert benchmarks.gpu_table(tmp_path).splitlines().count(line) == 1
    (tmp_path / f"{name}.json").write_text(json.dumps(result(name) | {"rows": [result(name)["rows"][0] | short]}))
    assert f"| {goal} | no |" in benchmarks.gpu_table(tmp_path)


def test_a_range_that_ends_just_below_the_goal_does_not_look_as_if_it_reached_it():
    row = {"ratio": 1.17, "ratio_low": 1.0968, "ratio_high": 1.28}
    assert benchmarks.span(row, 1.1) == "1.17 (1.097 to 1.28)"
    assert benchmarks.span(row, 1.0) == benchmarks.span(row, 1.2) == "1.17 (1.10 to 1.28)"


def test_goals_are_of_rows_that_exist():
    assert benchmarks.GOALS.keys() <= bench_gpu.ROWS.keys() and len(benchmarks.GOALS) == 10


def compared(peer, size, part, batch, **more):
    row = {"peer": peer, "size": size, "part": part, "batch": batch, "dtype": "float32", "ratio": 3.5}
    row |= {"ratio_low": 3.0, "ratio_high": 4.0, "original_seconds": 0.35, "our_seconds": 0.1, "setting": "256 tokens"}
    row |= {"note": None, "device": "a GPU", "date": "2026-01-02", "clock": "wall", "quant": None}
    return row | {"versions": {"torch": "2.9"}, "compiled_original": False} | more


def test_bf16_is_wanted_four_times_as_fast_in_sampling_alone():
    for part, wanted in (("sample", 4.0), ("decode", 1.1)):
        peer, size = ("llamagen", "GPT-B") if part == "sample" else ("llamagen_vq", "VQ-16")
        table = benchmarks.cpu_table([compared(peer, size, part, 1, dtype="bfloat16")])
        reached = "no" if part == "sample" else "yes"
        assert f"| 1 | bfloat16 | >= {wanted} | 3.50 (3.00 to 4.00) | {reached} |" in table


def test_ratios_on_a_gpu_have_cells_of_their_own(tmp_path):
    """From the kept rows and the files of bench_gpu; of LlamaGen's sampling only those of the compiled original."""
    light = {"on": "cuda", "dtype": "bfloat16"}
    kept = {"rows": [compared("var", "d16", "train", 32, **light)]}
    (tmp_path / "versus_var_d16_train_32.json").write_text(json.dumps(kept))
    own = compared("llamagen", "GPT-L", "sample", 1, compiled_original=True, **light)
    changes = ({"on": "cpu"}, {"dtype": "float32"}, {"compiled_original": False}, {"quant": "int8"})
    others = [own | change for change in changes]
    table = benchmarks.gpu_versus_table([own, *others], tmp_path)
    cells = "3.50 (3.00 to 4.00) | yes | 350.0, 100.0 | 256 tokens | a GPU | 2026-01-02 | 2.9 |"
    for name, wanted in (("versus_llamagen_l_sample_1", 3.0), ("versus_var_d16_train_32", 1.3)):
        assert table.splitlines().count(f"| {name} | >= {wanted} | {cells}") == 1
    assert table.count("not measured") == len(bench_gpu.VERSUS) - 2
    assert benchmarks.gpu_versus_table(others, tmp_path).count("not measured") == len(bench_gpu.VERSUS) - 1
    assert table in benchmarks.page([own, *others], tmp_path)


def test_comparisons_run_where_there_are_clones_behind_the_most_wanted_rows(tmp_path):
    plain = list(bench_gpu.ROWS)
    assert bench_gpu.left(tmp_path, None) == plain and not set(plain) & set(bench_gpu.VERSUS)
    with pytest.raises(ValueError, match=r"only=.*pass peers="):
        bench_gpu.left(tmp_path, ["versus_var_d16_sample_1"])
    with pytest.raises(ValueError, match=r"peers=.*no clone in it is named 1d-tokenizer, LlamaGen, VAR, mar, xAR"):
        bench_gpu.left(tmp_path, None, str(tmp_path))
    (tmp_path / "VAR").mkdir()
    names = bench_gpu.left(tmp_path, None, str(tmp_path))
    var = [name for name, (peer, *_) in bench_gpu.VERSUS.items() if peer in ("var", "var_vqvae")]
    assert names == [*plain[:9], *var, *plain[9:]] and len(var) == 5
    assert bench_gpu.command("versus_var_d16_train_32", tmp_path / "x", 5, str(tmp_path))[2:] == [
        "eval.versus", "peer=var", f"dir={tmp_path / 'VAR'}", "size=d16", "parts=[train]", "batch=32",
        "least_seconds=0.2", "cuda_graphs=False", "compile=True", "compiled_original=False",
        "device=cuda", "dtype=bfloat16", f"out={tmp_path / 'x'}",
    ]  # fmt: skip
    sampling = bench_gpu.command("versus_llamagen_l_sample_8", tmp_path / "x", 5, str(tmp_path))
    assert {"cuda_graphs=True", "compile=True", "compiled_original=True", "batch=8"} <= set(sampling)
    sampling = bench_gpu.command("versus_var_d16_sample_8", tmp_path / "x", 5, str(tmp_path))
    assert {"cuda_graphs=True", "compile=False", "compiled_original=False"} <= set(sampling)
    calls = []
    bench_gpu.run(settings(tmp_path, peers=str(tmp_path), only=[var[0], plain[0]]), start=runner(calls))
    assert calls == [plain[0], var[0]]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        for name in ("versus_llamagen_l_sample_1", "versus_titok_l32_decode_8"):
            compose("eval_versus", bench_gpu.command(name, tmp_path / "x", 5, str(tmp_path))[3:])
        bounds = compose("bench_gpu")
    assert 3 * (bounds.seconds + bounds.row_seconds) <= 25 * 60, "what its docstring promises"


def test_kept_page_is_what_its_rows_give():
    kept = json.loads((ROOT / "docs" / "benchmarks.json").read_text())["rows"]
    lines = (ROOT / "docs" / "benchmarks.md").read_text()
    assert benchmarks.cpu_table(kept) in lines
    profiles = json.loads((ROOT / "docs" / "profiles.json").read_text())["rows"]
    assert benchmarks.profile_commands() in lines and benchmarks.profile_table(profiles) in lines
    grown = json.loads((ROOT / "docs" / "scaling" / "scaling.json").read_text())
    assert benchmarks.growth_table(grown) in lines
    points = [(r["axis"], r[r["axis"]]) for r in grown["rows"]]
    assert points == [(axis, value) for axis, values in scaling.AXES.items() for value in values]
    assert benchmarks.growth_table(None) == "Not measured."


def test_a_profile_is_that_of_the_command_above_it():
    """Every command composes to the settings by which its row is found; a command without a row says so."""
    rows = []
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        for number, text in enumerate(benchmarks.profile_commands().splitlines()):
            choices = dict(part.split("=", 1) for part in text.split()[3:])
            chosen = compose("eval_throughput", text.split()[3:])
            assert chosen.profile and len(chosen.parts) == len(chosen.batches) == 1
            profile = {"seconds": number + 0.5, "shares": {"products": 0.75, "other": 0.25}, "largest": {}}
            row = {"tokenizer": choices["tokenizer"], "model": choices["model"], "dtype": chosen.dtype}
            rows.append(
                row | {"part": chosen.parts[0], "batch": chosen.batches[0], "profile": profile, "device": "a CPU"}
            )
    table = benchmarks.profile_table([*rows[1:], rows[0] | {"profile": None}])
    assert table.count("not measured") == 1 and [f"{n}.5 s in operations" in table for n in range(len(rows))] == [
        False
    ] + [True] * (len(rows) - 1)
    assert (
        "| train, mar_b | 2 | float32 | 7.5 s in operations: products 75%, other 25% (of the others ) | a CPU |"
        in table
    )


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


def test_what_training_consumes_and_the_cores_that_feed_it():
    """LlamaGen-B: at each of 256 positions 6 times the weights of 12 blocks, 4 x 768 x 768 + 3 x 768 x 2048 each, and
    of the head, 768 x 16384; and 12 x 768 operations a block for each position that another one sees."""
    with initialize_config_dir(str(CONFIGS), version_base=None):
        given = {"gpu": "H200", "mfu": 0.5, "gpus": 8, "consumers": [["llamagen_b", "llamagen_vq16"]]}
        consumed = loading.consumption(SimpleNamespace(**given))
        slower = loading.consumption(SimpleNamespace(**given | {"mfu": 0.25}))
    blocks = 12 * (4 * 768**2 + 3 * 768 * 2048)
    by_hand = 6 * 256 * (blocks + 768 * 16384) + 12 * 12 * 768 * 256 * 257 / 2
    assert consumed["llamagen_b"] == pytest.approx(0.5 * 989e12 / by_hand, rel=0.01)
    assert slower["llamagen_b"] == pytest.approx(consumed["llamagen_b"] / 2)
    config = SimpleNamespace(**given)
    table = loading.needed({"files": [100.0, 50.0], "codes": [1e6, 2e6]}, {"a": 3000.0}, config).splitlines()
    assert table[0] == "cores that keep one H200 fed at 50% MFU, and 8 of them"
    assert table[-1] == "| a | 3,000 | 30, 240 | 0.0015, 0.012 |"
