"""Side by side with an original: what agrees, how turns are timed, the command's self-test. No original is needed."""

import functools
import itertools
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
import torch
import torch.nn.functional as F
from generators import make
from hydra import compose, initialize_config_dir
from runs import CONFIGS
from tape import Tape
from torch import nn
from torch.nn.attention import SDPBackend
from torch.utils.flop_counter import FlopCounterMode

from eval import paths, peers
from eval.peers import SOURCES, Options, Output, exact, pair, shipped, sized
from eval.tokenizer_peers import compare
from eval.versus import CLOCKS, Apart, agree, alternate, evaluate, ran, timer
from scripts.benchmarks import WANTED
from vgen.guidance import ClassifierFree, Constant
from vgen.heads import DrawRule
from vgen.samplers.graphs import GraphSampler
from vtok import counters
from vtok.acceleration import compile_blocks
from vtok.layers.trunk import Trunk
from vtok.noise import sample_seeds


def config(*overrides):
    """With both sides in this process, whose modules and clocks tests replace."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("eval_versus", ["apart=false", *overrides])


def test_outputs_agree_within_the_tolerance_and_ids_exactly():
    values, ids = torch.tensor([1.0, -4.0]), torch.tensor([3, 5])
    near = Output("logits", values, values + torch.tensor([0.0, 2e-4]))
    found = agree([near, Output("tokens", ids, ids.clone())])
    assert found["logits"] == pytest.approx(5e-5, rel=1e-3) and found["tokens"] == 0
    with pytest.raises(ValueError, match=r"logits differ by .* nothing was timed"):
        agree([Output("logits", values, values + 1e-3)])
    assert agree([Output("logits", values, values + 1e-3, 0.001)])["logits"] == pytest.approx(2.5e-4, rel=1e-3)
    with pytest.raises(ValueError, match=r"tokens differ by 5\.00e-01"):
        agree([Output("tokens", ids, torch.tensor([3, 6]))])
    assert agree([Output("tokens", ids, torch.tensor([3, 6]), None)]) == {"tokens": 0.5}
    with pytest.raises(ValueError, match="gives"):
        agree([Output("logits", values, values[:1])])
    with pytest.raises(ValueError, match="differ"):
        agree([Output("logits", values, values * float("nan"))])


class Original(nn.Module):
    """Our own LlamaGen behind the interface of its authors' model."""

    def __init__(self, config):
        super().__init__()
        self.config, self.inner, self.layers = config, make("llamagen"), []

    def forward(self, idx, labels, input_pos=None, targets=None):
        model = self.inner
        h = model(model.arrange(F.pad(idx, (0, 1))), model.conditioner(labels))
        logits = model.head.logits(h)[0]
        return logits, None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def stand_in(monkeypatch):
    """The modules of LlamaGen's checkout; returns a list of the models that were sampled from, greedy or not."""
    calls = []

    def generate(model, labels, count, *, sample_logits, cfg_scale, **_):
        calls.append((model, sample_logits))
        if sample_logits:  # timed: nothing of ours may count
            return torch.zeros(len(labels), count)
        guide, rule = ClassifierFree(Constant(cfg_scale)), DrawRule(temperature=0)
        return peers.draw(model.inner, labels, guide, rule, stop=count)[:, :count]

    def convert(family, state, arguments):
        ours = make("llamagen")
        ours.load_state_dict({name.removeprefix("inner."): value for name, value in state.items()})
        return ours

    gpt = SimpleNamespace(Transformer=Original, ModelArgs=SimpleNamespace, GPT_models={})
    monkeypatch.setitem(sys.modules, "autoregressive.models.gpt", gpt)
    monkeypatch.setitem(sys.modules, "autoregressive.models.generate", SimpleNamespace(generate=generate))
    monkeypatch.setattr(peers, "convert", convert)
    return calls


def llamagen(**options):
    return peers.llamagen(Path(), Options("tiny", 2, 6, **options))


def spoiled(monkeypatch, factor):
    """What is timed gives logits of about `factor` times the right ones."""
    light = peers.light_weights

    def store(model, *given, **options):
        with torch.no_grad():
            model.trunk.norm.weight.mul_(factor)
        light(model, *given, **options)

    monkeypatch.setattr(peers, "light_weights", store)


def test_what_is_timed_is_checked_and_not_only_the_plain_module(monkeypatch):
    stand_in(monkeypatch)
    found = agree(llamagen(packed=None).same())
    assert list(found) == ["logits", "greedy tokens", "timed logits", "timed greedy tokens"]
    light = agree(llamagen(dtype=torch.bfloat16, packed=False).same())
    values, ids = f"timed logits, bfloat16, allowed {peers.LIGHT_TOLERANCE}", "timed greedy tokens that differ"
    assert list(light) == ["logits", "greedy tokens", values, f"{ids}, bfloat16, any share allowed"]
    assert 1e-4 < light[values] < peers.LIGHT_TOLERANCE, "the weights were rounded"
    with monkeypatch.context() as patch:
        spoiled(patch, 1.01)
        assert agree(llamagen(dtype=torch.bfloat16, packed=False).same()), "within the tolerance of rounding"
        with pytest.raises(ValueError, match=r"timed logits differ by .*, allowed is 0\.0001: nothing was timed"):
            agree(llamagen(packed=None).same())
    spoiled(monkeypatch, 1 + 2 * peers.LIGHT_TOLERANCE)
    with pytest.raises(ValueError, match=r"timed logits, bfloat16, allowed .* differ by"):
        agree(llamagen(dtype=torch.bfloat16, packed=False).same())


def test_recorded_steps_are_what_is_checked_where_they_are_timed(monkeypatch):
    stand_in(monkeypatch)
    monkeypatch.setattr(peers, "GraphSampler", functools.partial(GraphSampler, capture=Tape))
    counters.reset()
    assert agree(llamagen(cuda_graphs=True, packed=False).same())["timed greedy tokens"] == 0
    assert counters.read()["graph.replayed"] == 6

    class Wrong(GraphSampler):
        def __call__(self, *given, **options):
            canvas = super().__call__(*given, **options)
            canvas.tokens[0, 2] += 1
            return canvas

    monkeypatch.setattr(peers, "GraphSampler", functools.partial(Wrong, capture=Tape))
    with pytest.raises(ValueError, match=r"timed greedy tokens differ by 8\.33e-02"):  # one of 2 x 6
        agree(llamagen(cuda_graphs=True, packed=False).same())
    light = agree(llamagen(cuda_graphs=True, dtype=torch.bfloat16, packed=False).same())
    assert light["timed greedy tokens that differ, bfloat16, any share allowed"] > 0


def test_recorded_latents_are_held_to_the_plain_steps(monkeypatch):
    model, labels, guide = make("mar"), torch.arange(2), ClassifierFree(Constant(2.0))
    rule, options = DrawRule(solver_steps=2), Options("tiny", 2, None, cuda_graphs=True)
    assert peers.replayed(model, labels, guide, rule, Options("tiny", 2, None)) == []
    monkeypatch.setattr(peers, "GraphSampler", functools.partial(GraphSampler, capture=Tape))
    ((name, difference),) = agree(peers.replayed(model, labels, guide, rule, options)).items()
    assert name == "timed latents of recorded steps, beside the same ones run" and difference < 1e-6
    load = "vgen.samplers.graphs.Recording.load"
    monkeypatch.setattr(load, lambda self, cond, noise, canvas: self.noise.seeds.zero_())  # other seeds than asked for
    with pytest.raises(ValueError, match="timed latents of recorded steps"):
        agree(peers.replayed(model, labels, guide, rule, options))


def test_the_light_copy_of_the_original_is_recorded(monkeypatch):
    stand_in(monkeypatch)
    monkeypatch.setattr(Options, "light", True)  # as on CUDA
    both = llamagen(dtype=torch.bfloat16, packed=False)
    found = agree(both.same())
    assert 1e-4 < found["the original's own logits, bfloat16, any allowed"] < 0.1


def test_the_original_is_compiled_as_its_script_does_and_for_the_timing_alone(monkeypatch):
    calls, asked = stand_in(monkeypatch), []

    def compiled(model, **options):
        asked.append(options)
        return SimpleNamespace(inner=model.inner, compiled=True)

    monkeypatch.setattr(torch, "compile", compiled)
    both = llamagen(compiled_original=True)
    both.same()
    both.parts["sample"][0]()
    assert asked == [{"mode": "reduce-overhead", "fullgraph": True}]
    assert [(getattr(model, "compiled", False), drawn) for model, drawn in calls] == [(False, False), (True, True)]
    llamagen().parts["sample"][0]()
    assert len(asked) == 1 and isinstance(calls[-1][0], Original)


def test_rows_say_what_their_part_ran_with(tmp_path, monkeypatch):
    """On the CPU bfloat16, 8 bits, recordings and a compiled original are for sampling; decoding takes the first."""
    stand_in(monkeypatch)
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    monkeypatch.setattr("eval.versus.pair", lambda peer, folder, options: peers.llamagen(Path(), options))
    out, options = tmp_path / "versus.json", ["peer=llamagen", "dir=.", "size=tiny", "batch=2", "steps=2"]
    options += ["dtype=bfloat16", "packed=false", "least_seconds=0", "compiled_original=true", f"out={out}"]
    sample, train = evaluate(config(*options))
    assert (sample["dtype"], sample["compiled_original"]) == ("bfloat16", True)
    assert [train[k] for k in ("dtype", "compiled_original", "packed", "quant")] == ["float32", False, False, None]
    assert sample["paths"]["weights.bfloat16"] and "weights.bfloat16" not in train["paths"]
    assert "operations" not in sample and train["matmul_rate"] > 0
    ours = peers.llamagen(Path(), Options("tiny", 2, 2)).learning
    batch = {"tokens": torch.zeros(2, ours.layout.length, dtype=torch.int64), "key": sample_seeds(0, 0, 2)}
    with FlopCounterMode(display=False) as counter:
        ours.loss(batch | {"label": torch.zeros(2, dtype=torch.int64)})["loss"].backward()
    assert train["operations"] == pytest.approx(counter.get_total_flops(), rel=0.1)
    evaluate(config(*options[:-2], "parts=[sample]", options[-1]))
    kept = json.loads(out.read_text())["rows"]
    found = [(row["part"], row["compiled_original"]) for row in kept]
    assert found == [("sample", True), ("train", False), ("sample", False)]
    given = {"quant": "int8", "compile": True, "cuda_graphs": True, "compiled_original": True}
    for device, rounded in (("cpu", "float32"), ("cuda", "bfloat16")):
        mine = Options("tiny", 1, None, torch.bfloat16, device=torch.device(device), **given)
        assert ran("sample", mine) == {"dtype": "bfloat16", **given}
        plain = {"quant": None, "compile": False, "cuda_graphs": False, "compiled_original": False}
        assert ran("decode", mine) == {"dtype": "bfloat16"} | plain
        assert ran("encode", mine) == {"dtype": rounded} | plain
        assert ran("train", mine) == {"dtype": rounded} | plain | {"compile": True}


def test_the_tokenizer_that_is_timed_is_checked(monkeypatch):
    ours = tokenizers.make("cnn_vq")
    encode, decode = ours.encode, ours.decode

    def found(dtype=torch.float32):
        return agree(compare(encode, decode, ours, Options("tiny", 2, None, dtype)).same())

    assert list(found()) == ["ids", "images", "timed ids", "timed images"]
    light = f"timed images, bfloat16, allowed {peers.LIGHT_IMAGES}"
    told = found(torch.bfloat16)
    assert list(told) == ["ids", "images", "timed ids", light], "encoding stays in float32 on the CPU"
    assert told[light] > 1e-4

    def store(tokenizer, dtype):
        with torch.no_grad():
            tokenizer.quantizer.codebook.weight.mul_(-1)

    monkeypatch.setattr("eval.tokenizer_peers.light_tokenizer", store)
    with pytest.raises(ValueError, match="timed ids differ"):
        found()


def test_unfused_attention_is_an_error_on_cuda_in_bfloat16_alone(monkeypatch):
    entered = []
    monkeypatch.setattr(paths, "sdpa_kernel", lambda kernels: entered.append(kernels) or exact())
    for device, dtype in (("cpu", torch.bfloat16), ("cuda", torch.float32), ("cuda", torch.bfloat16)):
        assert not entered
        with paths.fused(torch.device(device), dtype):
            pass
    assert SDPBackend.MATH not in entered[0] and SDPBackend.FLASH_ATTENTION in entered[0] and len(entered) == 1


def test_turns_alternate_and_the_ratio_is_the_first_over_the_second():
    """A clock that only the runs move: the first takes 3, 4, .. seconds, the second always 2."""
    now, order, cost = [0.0], [], itertools.count(3)

    def run(name, seconds):
        def go():
            order.append(name)
            now[0] += seconds()

        return go

    device = torch.device("cpu")
    sides = (timer(run(*side), device, lambda: now[0]) for side in (("a", lambda: next(cost)), ("b", lambda: 2)))
    got = alternate(*sides, 8, device)
    ratios = torch.arange(4.0, 12.0, dtype=torch.float64) / 2  # the first run warms up
    assert "".join(order) == "abb" + "abba" * 4
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
        device = torch.device("cpu")
        turns = (timer(run(*side), device, lambda: now[0]) for side in (("a", itertools.repeat(1.0)), ("b", ours)))
        return alternate(*turns, 7, device, least=least)

    row = got(1.2)
    assert row["runs_a_turn"] == 3 and (order.count("a"), order.count("b")) == (1 + 3 * 7, 2 + 3 * 7)
    assert (row["ratio"], row["original_seconds"], row["our_seconds"]) == pytest.approx((2.0, 1.0, 0.5))
    assert got(0.4)["runs_a_turn"] == 1 and order.count("b") == 2 + 7


def test_on_cuda_both_sides_are_warm_and_waited_for(monkeypatch):
    """Two more runs of each before the turns; every run is timed between two waits for the device."""
    order, device = [], torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: order.append(f"-{device.index}-"))
    sides = (timer(lambda side=side: order.append(side), device, itertools.count().__next__) for side in "ab")
    alternate(*sides, 7, device)
    runs = "".join(order)
    assert runs.replace("-1-", "") == "abababb" + "abba" * 3 + "ab"
    assert all(part in ("a", "b", "") for part in runs.split("-1-")), "two runs without a wait between them"


def test_bfloat16_is_the_originals_too_on_cuda_and_ours_alone_on_the_cpu():
    light = Options("tiny", 2, None, torch.bfloat16, device=torch.device("cuda"))
    assert light.light and not Options("tiny", 2, None, torch.bfloat16).light
    assert not Options("tiny", 2, None, torch.float32, device=torch.device("cuda")).light
    seen = []
    for options in (light, Options("tiny", 2, None, torch.bfloat16)):
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
    seconds_of(monkeypatch, 1.0, "abababb")
    (row,) = evaluate(
        config("selftest=true", "device=cuda", "steps=2", "least_seconds=0.05", f"out={tmp_path / 'versus.json'}")
    )
    assert row["ratio"] == pytest.approx(1.0) and row["device"] == torch.cuda.get_device_name()


def seconds_of(monkeypatch, first, warm="abb"):
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


def test_the_original_has_a_process_of_its_own_on_the_cpu(tmp_path):
    """Whose memory is not kept: what it frees above 32 MiB is fresh the next time."""
    out = tmp_path / "versus.json"
    try:
        evaluate(config("apart=null", "selftest=true", "steps=2", "least_seconds=0.02", "threads=1", f"out={out}"))
    except ValueError as error:  # the machine was busy
        assert "a module against itself gives" in str(error)
    (row,) = json.loads(out.read_text())["rows"]
    assert row["apart"] and row["original_seconds"] > 0
    assert row["paths"]["step.cached"] % 2 == 0, "two steps a run, of ours alone"


def test_modules_of_the_original_do_not_hide_ours_in_its_process(monkeypatch, tmp_path, capfd):
    """xAR's checkout has an eval.py, and the parent has imported from there."""
    (tmp_path / "eval.py").write_text("raise SystemExit('the original is not to be run')")
    monkeypatch.syspath_prepend(str(tmp_path))
    apart = Apart("titok", str(tmp_path), Options("tiny", 1, None), 1, "wall")
    with pytest.raises(RuntimeError, match="the original's process ended"):
        apart.timer("sample")(1)
    apart.close()
    assert "is it a whole checkout" in capfd.readouterr().err


def test_an_original_that_fails_in_its_process_ends_the_command(monkeypatch, capfd):
    apart = Apart("llamagen", "nowhere", Options("tiny", 1, None), 1, "wall")
    with pytest.raises(RuntimeError, match="the original's process ended"):
        apart.timer("sample")(1)
    apart.close()
    assert "clone https://" in capfd.readouterr().err


def test_compiled_training_is_held_to_the_gradients_of_the_plain_one(monkeypatch):
    stand_in(monkeypatch)
    monkeypatch.setattr(peers, "compile_blocks", functools.partial(compile_blocks, backend="aot_eager"))
    name = "timed gradients, beside those of blocks as they are"
    assert name not in agree(llamagen(packed=False).taught())
    assert 0 <= agree(llamagen(packed=False, compile=True).taught())[name] < 1e-5

    def wrong(model):
        with torch.no_grad():
            model.trunk.norm.weight.mul_(1.01)

    monkeypatch.setattr(peers, "compile_blocks", wrong)
    with pytest.raises(ValueError, match=r"timed gradients, .* differ by"):
        agree(llamagen(packed=False, compile=True).taught())


def test_training_is_checked_with_its_own_attention_and_without_dropout(monkeypatch):
    """On CUDA that is FlexAttention for blocks, which a module that evaluates does not take."""
    stand_in(monkeypatch)
    monkeypatch.setattr(peers, "compile_blocks", functools.partial(compile_blocks, backend="aot_eager"))
    both, seen, mask = llamagen(packed=False, compile=True), [], Trunk.mask

    def watched(trunk, *given):
        seen.append((trunk.training, any(m.training for m in trunk.blocks.modules())))
        return mask(trunk, *given)

    monkeypatch.setattr(Trunk, "mask", watched)
    agree(both.taught())
    assert seen == [(False, False), (True, False)]
    trunk = Trunk(dim=8, depth=1, heads=2, hidden=8).eval()
    with pytest.raises(KeyError), peers.attending_as_in_training(trunk):
        assert trunk.training
        raise KeyError
    assert not trunk.training


def test_selftest_is_a_flag_too():
    command = [sys.executable, "-m", "eval.versus", "--selftest", "peer=var"]
    ended = subprocess.run(command, cwd=CONFIGS.parent, capture_output=True, text=True)
    assert ended.returncode == 2 and "selftest=true times a small model of ours against itself" in ended.stderr


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
        pair(peer, "nowhere", Options("tiny", 1, None))


def test_mistakes_name_their_key(tmp_path):
    for options, words in [
        (["peer=other", "dir=."], "peer=other"),
        (["turns=3", "selftest=true"], "turns=3"),
        (["batch=0", "selftest=true"], "batch=0"),
        (["clock=sun", "selftest=true"], "clock=sun"),
        (["clock=cpu", "threads=2", "selftest=true"], "threads=1"),
        (["device=tpu", "selftest=true"], "device='tpu'"),
        (["compiled_original=true", "peer=var", "dir=."], "compiled_original=true is for peer=llamagen"),
        (["compiled_original=true", "selftest=true"], "compiled_original=true is for peer=llamagen"),
        (["peer=var", "dir=.", "steps=4"], "steps=4: of no effect for peer=var"),
        (
            ["peer=titok", "dir=.", "packed=false", "compile=true"],
            "packed=False, compile=true: of no effect",
        ),
        ([], "pass peer="),
    ]:
        with pytest.raises(ValueError, match=words):
            evaluate(config(*options, f"out={tmp_path / 'x.json'}"))


def test_a_size_that_the_original_lacks_is_refused():
    size = lambda name: sized(Options(name, 1, None), ("tiny", "rar_b"))  # noqa: E731
    assert size("tiny") == "tiny"
    with pytest.raises(ValueError, match="size=rar_l: choose tiny, rar_b"):
        size("rar_l")


def test_a_row_says_its_size_by_name_so_that_the_page_finds_it():
    assert peers.SIZES.keys() == peers.SOURCES.keys()
    wanted = {peer: size for _, peer, size, *_ in reversed(WANTED)}  # the first of each
    assert wanted == peers.SIZES


def test_a_folder_that_is_no_checkout_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("eval.peers.on_cpu", lambda: None)
    monkeypatch.setattr("sys.path", list(__import__("sys").path))
    with pytest.raises(ValueError, match="whole checkout"):
        pair("llamagen", str(tmp_path), Options("tiny", 1, None))
