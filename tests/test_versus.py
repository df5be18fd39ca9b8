"""Side by side with an original: what agrees, how turns are timed, the command's self-test. No original is needed."""

import itertools
import json

import pytest
import torch
from hydra import compose, initialize_config_dir
from runs import CONFIGS

from eval.peers import SOURCES, Options, exact, pair, shipped, sized
from eval.versus import CLOCKS, agree, alternate, evaluate


def config(*overrides):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("eval_versus", list(overrides))


def test_outputs_agree_within_the_tolerance_and_ids_exactly():
    values, ids = torch.tensor([1.0, -4.0]), torch.tensor([3, 5])
    found = agree([("logits", values, values + torch.tensor([0.0, 2e-4])), ("tokens", ids, ids.clone())])
    assert found["logits"] == pytest.approx(5e-5, rel=1e-3) and found["tokens"] == 0
    with pytest.raises(ValueError, match=r"logits differ by .* nothing was timed"):
        agree([("logits", values, values + 1e-3)])
    with pytest.raises(ValueError, match=r"tokens differ by 5\.00e-01"):
        agree([("tokens", ids, torch.tensor([3, 6]))])
    with pytest.raises(ValueError, match="gives"):
        agree([("logits", values, values[:1])])
    with pytest.raises(ValueError, match="differ"):
        agree([("logits", values, values * float("nan"))])


def test_turns_alternate_and_the_ratio_is_the_first_over_the_second():
    """A clock that only the runs move: the first takes 3, 4, .. seconds, the second always 2."""
    now, order, cost = [0.0], [], itertools.count(3)

    def run(name, seconds):
        def go():
            order.append(name)
            now[0] += seconds()

        return go

    got = alternate(run("a", lambda: next(cost)), run("b", lambda: 2), 8, torch.device("cpu"), clock=lambda: now[0])
    ratios = torch.arange(4.0, 12.0, dtype=torch.float64) / 2  # the first run warms up
    assert "".join(order) == "ab" + "abba" * 4
    assert got["ratio"] == pytest.approx(float(ratios.mean()))  # evenly spaced: the median is the mean
    assert [got["ratio_low"], got["ratio_high"]] == pytest.approx([2.35, 5.15])  # 0.7 and 6.3 of the way from 2 by 0.5
    assert got["original_seconds"] == pytest.approx(7.5) and got["our_seconds"] == pytest.approx(2)
    assert got["runs_a_turn"] == 1


def test_short_runs_are_repeated_as_often_on_both_sides():
    """How often is not told by the first run of ours, which may compile."""
    now, order = [0.0], []

    def run(name, seconds):
        def go():
            order.append(name)
            now[0] += next(seconds)

        return go

    def got(least):
        order.clear()
        ours = itertools.chain([9.0], itertools.repeat(0.5))
        turns = run("a", itertools.repeat(1.0)), run("b", ours)
        return alternate(*turns, 7, torch.device("cpu"), clock=lambda: now[0], least=least)

    row = got(1.2)
    assert row["runs_a_turn"] == 3 and (order.count("a"), order.count("b")) == (1 + 3 * 7, 2 + 3 * 7)
    assert (row["ratio"], row["original_seconds"], row["our_seconds"]) == pytest.approx((2.0, 1.0, 0.5))
    assert got(0.9)["runs_a_turn"] == 1 and order.count("b") == 1 + 7  # long enough, were it 9 seconds or a tenth


def test_on_cuda_both_sides_are_warm_and_waited_for(monkeypatch):
    """Two more runs of each before the turns; every run is timed between two waits for the device."""
    order, device = [], torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: order.append(f"-{device.index}-"))
    alternate(lambda: order.append("a"), lambda: order.append("b"), 7, device, clock=itertools.count().__next__)
    runs = "".join(order)
    assert runs.replace("-1-", "") == "ababab" + "abba" * 3 + "ab"
    assert all(part in ("a", "b", "") for part in runs.split("-1-")), "two runs without a wait between them"


def test_bfloat16_is_the_originals_too_on_cuda_and_ours_alone_on_the_cpu():
    light = Options(None, 2, None, torch.bfloat16, device=torch.device("cuda"))
    assert light.light and not Options(None, 2, None, torch.bfloat16).light
    assert not Options(None, 2, None, torch.float32, device=torch.device("cuda")).light
    seen = []
    for options in (light, Options(None, 2, None, torch.bfloat16)):
        kind = options.device.type
        shipped(lambda kind=kind: seen.append(torch.is_autocast_enabled(kind)), options)()
    assert seen == [torch.cuda.is_available(), False]


def test_checks_are_exact_and_leave_the_settings_as_they_were():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    with exact():
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("highest", False)
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_selftest_runs_on_cuda(tmp_path, monkeypatch):
    seconds_of(monkeypatch, 1.0, "ababab")
    (row,) = evaluate(
        config("selftest=true", "device=cuda", "steps=2", "least_seconds=0.05", f"out={tmp_path / 'versus.json'}")
    )
    assert row["ratio"] == pytest.approx(1.0) and row["device"] == torch.cuda.get_device_name()


def seconds_of(monkeypatch, first, warm="ab"):
    """A clock by which a run of the first side takes that long, and one of the second a second."""
    readings = itertools.chain.from_iterable((0.0, first if side == "a" else 1.0) for side in warm + "abba" * 4)
    monkeypatch.setitem(CLOCKS, "wall", lambda: next(readings))


@pytest.mark.parametrize("first", [0.94, 1.06])
def test_selftest_fails_outside_its_range(tmp_path, monkeypatch, first):
    seconds_of(monkeypatch, first)
    out = tmp_path / "versus.json"
    with pytest.raises(ValueError, match=f"selftest: a module against itself gives {first:.3f}, not 0.95 to 1.05"):
        evaluate(config("selftest=true", "steps=2", "least_seconds=0.05", f"out={out}"))
    assert json.loads(out.read_text())["rows"][0]["ratio"] == pytest.approx(first)


def test_selftest_command_writes_one_row_and_keeps_others(tmp_path, monkeypatch):
    out = tmp_path / "versus.json"
    out.write_text(json.dumps({"rows": [dict.fromkeys(("peer", "size", "part", "batch", "dtype", "threads"), "x")
                                        | {"device": "x", "setting": "x", "clock": "x"}]}))  # fmt: skip
    options = ["selftest=true", "steps=2", "least_seconds=0.05", f"out={out}"]
    for first in (0.96, 1.04):
        seconds_of(monkeypatch, first)
        (row,) = evaluate(config(*options))
    rows = json.loads(out.read_text())["rows"]
    assert [r["peer"] for r in rows] == ["x", "itself"]
    assert row["turns"] == 7 and row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
    assert row["ratio"] == pytest.approx(1.04)


@pytest.mark.parametrize("peer", SOURCES)
def test_without_the_original_the_message_says_what_to_clone(peer):
    with pytest.raises(ValueError, match=f"clone https://{SOURCES[peer]}"):
        pair(peer, "nowhere", Options(None, 1, None))


def test_mistakes_name_their_key(tmp_path):
    for options, words in [
        (["peer=other", "dir=."], "peer=other"),
        (["turns=3", "selftest=true"], "turns=3"),
        (["batch=0", "selftest=true"], "batch=0"),
        (["clock=sun", "selftest=true"], "clock=sun"),
        (["clock=cpu", "threads=2", "selftest=true"], "threads=1"),
        (["device=tpu", "selftest=true"], "device='tpu'"),
        ([], "pass peer="),
    ]:
        with pytest.raises(ValueError, match=words):
            evaluate(config(*options, f"out={tmp_path / 'x.json'}"))


def test_a_size_that_the_original_lacks_is_refused():
    size = lambda name: sized(Options(name, 1, None), ("tiny", "rar_b"), "rar_b")  # noqa: E731
    assert (size(None), size("tiny")) == ("rar_b", "tiny")
    with pytest.raises(ValueError, match="size=rar_l: choose tiny, rar_b"):
        size("rar_l")


def test_a_folder_that_is_no_checkout_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("eval.peers.on_cpu", lambda: None)
    monkeypatch.setattr("sys.path", list(__import__("sys").path))
    with pytest.raises(ValueError, match="whole checkout"):
        pair("llamagen", str(tmp_path), Options(None, 1, None))
