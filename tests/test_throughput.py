"""`python -m eval.throughput`: its counts against closed forms, and the command from end to end on tiny modules."""

import json
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from generators import CLASSES, make, scale_spec, tokens_of
from hydra import compose, initialize_config_dir
from runs import CONFIGS
from test_generators import draw
from torch import nn

from eval import paths
from eval.resident import CLEAR
from eval.shares import kind_of, shares
from eval.throughput import Job, bandwidth, counted, evaluate, table, trainer, training_cost, weight_bytes
from vgen.guidance import guidance
from vgen.heads import DrawRule
from vgen.models.repa import LlamaGenREPA
from vgen.models.var import VAR
from vtok import counters
from vtok.acceleration import training_operations
from vtok.decoding import encode_images
from vtok.layers.packed import packable
from vtok.models.cnn import CNNTokenizer
from vtok.noise import sample_seeds

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


def test_operations_and_bytes_of_a_linear_model():
    """Rows B, K to M to N: 2 B K M + 2 B M N operations a pass, and all weights read; one that is called twice more by
    itself is read twice more, and one that is never called does not count."""
    model, x = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)), torch.zeros(4, 5)
    first, second = 5 * 7, 7 * 3
    assert counted(lambda: model(x), model) == (2 * 4 * (first + second), 4 * (first + 7 + second + 3))

    def more():
        model(x)
        model[0](model[0](x)[:, :5])

    assert counted(more, model) == (2 * 4 * (3 * first + second), 4 * (3 * (first + 7) + second + 3))
    assert counted(lambda: model[1](torch.zeros(4, 7)), model) == (2 * 4 * second, 4 * (second + 3))


def test_bandwidth_is_bytes_over_seconds_and_of_many_passes_where_one_is_short(monkeypatch):
    """Half a second each, of the passes that the sum was asked for: one on the CPU, 16 of a GiB on a GPU."""
    asked = []
    array = SimpleNamespace(numel=lambda: 2**20, sum=lambda: asked.append(1))
    monkeypatch.setattr("eval.throughput.torch.ones", lambda *_, **__: array)
    monkeypatch.setattr("eval.throughput.seconds", lambda run, *_: (run(), [0.5, 0.75])[1])
    for device, passes in (("cpu", 1), ("cuda", 16)):
        asked.clear()
        assert bandwidth(torch.device(device)) == passes * 2**22 / 0.5 and len(asked) == passes


def sampled(model, guide=1.0, **options):
    return lambda: draw(model, torch.zeros(2, dtype=torch.int64), sample_seeds(0, 0, 2), guidance(guide), **options)


@pytest.mark.parametrize("name", ["llamagen", "var", "rar"])
def test_a_sampling_step_reads_the_weights_once(name):
    """VAR's condition is the same at every step, so that the weights that project it are read once in all."""
    model = make(name)
    got = counted(sampled(model), model.trunk)
    once = [*(block.modulation for block in model.trunk.blocks), model.trunk.final] if name == "var" else []
    saved = sum(map(weight_bytes, once))
    assert got[1] == model.layout.steps * (weight_bytes(model.trunk) - saved) + saved
    assert counted(sampled(model, 2.0), model.trunk)[1] == got[1], "null rows read none more"


def test_sampling_with_a_flow_reads_them_at_every_solver_step_and_for_every_finished_entity():
    """xAR: four entities of 4 Euler-Maruyama steps; the first three are then read as context. MAR: its trunk once a
    step, its head's blocks at every diffusion step of each."""
    xar, mar = make("xar_cell"), make("mar")
    passes = xar.layout.steps * 4 + xar.layout.steps - 1
    operations, read = counted(sampled(xar), xar.trunk)
    assert read == passes * weight_bytes(xar.trunk)
    for module, calls in ((mar.trunk["encoder"], 5), (mar.head.mlp.blocks[0], 5 * 4)):
        assert counted(sampled(mar), module)[1] == calls * weight_bytes(module)
    few = counted(sampled(xar, rule=DrawRule(solver_steps=2)), xar.trunk)
    assert few[1] == (2 * xar.layout.steps + xar.layout.steps - 1) * weight_bytes(xar.trunk) and few[0] < operations


def test_weights_of_training_alone_are_not_read_by_sampling():
    """REPA's projector, which nothing calls, beside a head whose weights its owner reads."""
    model = make("llamagen_repa")
    sampling = weight_bytes(model) - weight_bytes(model.projector)
    assert counted(sampled(model), model)[1] == model.layout.steps * sampling < model.layout.steps * weight_bytes(model)


def test_training_is_counted_as_in_mfu_and_on_the_cpu_where_there_is_no_closed_form(monkeypatch):
    """VAR has one, and MAR by what the samples show: nothing is run for them, so that PyTorch's counter never meets a
    compiled kernel. MaskGIT has none."""
    batch = {"label": torch.tensor([0, 1, 2]), "key": sample_seeds(0, 0, 3)}
    var, mar, maskgit = make("var"), make("mar"), make("maskgit", dropout=0.0)
    with monkeypatch.context() as patch:
        patch.setattr("eval.throughput.counted", None)
        assert training_cost(var, batch) == (3 * training_operations(var), 3 * weight_bytes(var))
        each = [training_operations(mar, key) for key in batch["key"].split(1)]
        assert training_cost(mar, batch) == (pytest.approx(sum(each)), 3 * weight_bytes(mar)) and len(set(each)) > 1
    batch["tokens"] = tokens_of(maskgit, 3)
    got, _ = training_cost(maskgit, batch)
    assert got == counted(trainer(maskgit, lambda: batch), maskgit)[0] > 0
    assert got == 3 * training_cost(maskgit, {k: v[:1] for k, v in batch.items()})[0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention's backward pass needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
def test_var_trains_on_block_masks_on_cuda(compiled):
    device = torch.device("cuda")
    model = VAR(scale_spec(), CLASSES, depth=2, width=64, heads=2).to(device)
    batch = {"tokens": tokens_of(model, 3), "label": torch.tensor([0, 1, 2]), "key": sample_seeds(0, 0, 3)}
    batch = {name: value.to(device) for name, value in batch.items()}
    assert training_cost(model, batch)[0] == 3 * training_operations(model)
    step = trainer(model, lambda: batch, dtype=torch.bfloat16, compiled=compiled)
    counters.reset()
    step()
    paths.training(model, key=batch["key"], progress=0.5, device=device, compiled=compiled).check(
        counters.read(), "train"
    )


def test_autocast_spans_the_loss_alone(monkeypatch):
    """As in training: neither the backward pass nor the update runs under it."""
    inside, model = {}, make("llamagen")
    batch = {"tokens": tokens_of(model, 2), "label": torch.tensor([0, 1]), "key": sample_seeds(0, 0, 2)}
    step = trainer(model, lambda: batch, dtype=torch.bfloat16)

    def watched(owner, name):
        run = getattr(owner, name)

        def call(*args, **kwargs):
            inside[name] = torch.is_autocast_enabled("cpu")
            return run(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    watched(torch.Tensor, "backward")
    watched(torch.optim.AdamW, "step")
    watched(type(model), "loss")
    step()
    assert inside == {"loss": True, "backward": False, "step": False}


def test_weights_that_a_pass_reads_leave_lookup_tables_out():
    model = nn.ModuleDict({"table": nn.Embedding(100, 8), "linear": nn.Linear(8, 6)})
    assert weight_bytes(model) == 4 * (8 * 6 + 6)
    assert weight_bytes(model.to(torch.bfloat16)) == 2 * (8 * 6 + 6)


@pytest.mark.skipif(not CLEAR.exists(), reason="needs Linux's /proc/self/clear_refs")
def test_peak_memory_on_the_cpu_is_of_each_part(tmp_path, monkeypatch):
    """Encoding that writes 96 MiB more has 96 MiB more; what comes after it does not keep the peak."""
    monkeypatch.setattr("eval.throughput.matmul_rate", lambda *_: 1e9)
    monkeypatch.setattr("eval.throughput.bandwidth", lambda *_: 1e9)
    size, markdown, run = 96 * 2**20, tmp_path / "t.md", encode_images
    common = (f"out={tmp_path / 't.json'}", f"table={markdown}", "parts=[encode,decode]")
    _, plain = evaluate(config(*common)), evaluate(config(*common))  # the first finds what a process needs once
    more = lambda *given, **options: (torch.ones(size // 4), run(*given, **options))[1]  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr("eval.throughput.encode_images", more)
        found = evaluate(config(*common))
    slack = 24 * 2**20
    encode, decode = (b["peak_memory_bytes"] - a["peak_memory_bytes"] for a, b in zip(plain, found))
    assert abs(encode - size) < slack and abs(decode) < slack
    assert {row["peak_memory_of"] for row in plain} == {"resident, of the process"}
    text = markdown.read_text()
    assert "| peak memory, GiB |" in text and f"| {found[0]['peak_memory_bytes'] / 2**30:.2f} |" in text
    monkeypatch.setattr("eval.resident.CLEAR", tmp_path / "forbidden" / "clear_refs")
    (row,) = evaluate(config(f"out={tmp_path / 'u.json'}", f"table={markdown}", "parts=[decode]"))
    assert (row["peak_memory_bytes"], row["peak_memory_of"]) == (None, "not measured")
    assert "| not measured |" in markdown.read_text()


def test_command_measures_every_part_and_keeps_earlier_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("eval.throughput.matmul_rate", lambda *_: 1e9)
    monkeypatch.setattr("eval.throughput.bandwidth", lambda *_: 1e9)
    out, markdown, picture = tmp_path / "t.json", tmp_path / "t.md", tmp_path / "t.png"
    rows = evaluate(config("model=llamagen_tiny", f"out={out}", f"table={markdown}", f"plot={picture}"))
    assert [row["part"] for row in rows] == ["encode", "decode", "sample", "train"]
    assert [(row["steps"], row["solver_steps"]) for row in rows if row["part"] == "sample"] == [(16, None)]
    assert [row["mfu"] for row in rows] == [None] * 4, "no peak of a CPU is known"
    for row in rows:
        assert row["ms_per_image"] == pytest.approx(1000 / row["images_per_second"])
        assert row["fraction"] == pytest.approx(row["roofline_ms_per_image"] / row["ms_per_image"])
        assert row["matmul_operations_per_image"] > 0
        assert row["paths"]
    encode, decode, sample, train = rows
    encoded = {path: times for path, times in encode["paths"].items() if path != "memory.kept"}  # glibc's alone
    assert encoded == {"encode.channels_last": 2, "encode.float32": 2}
    assert decode["paths"]["decode.float32"] == 2 and sample["paths"]["rows.guided"] == 2 * 16
    assert train["paths"]["loss.whole"] == 2 and "step.recomputed" not in sample["paths"]
    assert train["parameters"] == sample["parameters"] != decode["parameters"]
    again = evaluate(config(f"out={out}", "parts=[decode]"))
    more = evaluate(config(f"out={out}", "parts=[decode]", "batches=[1]"))
    kept = json.loads(out.read_text())["rows"]
    assert len(again) == len(more) == 1 and len(kept) == 4 + 1, "the same settings replace their row, others stay"
    evaluate(config(f"out={out}", "parts=[decode]", "batches=[1]"))
    assert len(json.loads(out.read_text())["rows"]) == len(kept)
    old = [{k: v for k, v in row.items() if k not in ("steps", "solver_steps", "quant", "packed")} for row in kept]
    drawn = next(row for row in old if row["part"] == "sample")
    out.write_text(json.dumps({"rows": [*old, drawn | {"quant": "int8"}, drawn | {"steps": 15}]}))
    evaluate(config("model=llamagen_tiny", f"out={out}", "parts=[sample]"))
    told = [(row["part"], row.get("quant"), row.get("steps")) for row in json.loads(out.read_text())["rows"]]
    others = [(row["part"], None, None) for row in old if row["part"] != "sample"]
    assert told == [*others, ("sample", "int8", None), ("sample", None, 15), ("sample", None, 16)]
    assert markdown.read_text().count("\n") == 2 + 4 and picture.stat().st_size > 1000
    assert table(kept).splitlines()[0].count("|") == table(kept).splitlines()[2].count("|")


def test_shares_of_a_run_that_does_one_thing():
    a, q = torch.ones(512, 512), torch.ones(1, 2, 256, 64)
    picture, kernel = torch.ones(1, 16, 64, 64), torch.ones(32, 16, 3, 3)
    runs = {
        "products": lambda: a @ a,
        "attention": lambda: nn.functional.scaled_dot_product_attention(q, q, q),
        "convolutions": lambda: nn.functional.conv2d(picture, kernel),
        "other": a.sin,
    }
    for kind, run in runs.items():
        with torch.inference_mode():
            run()
            found = shares(run, a.device)
        assert found["shares"][kind] > 0.6 and sum(found["shares"].values()) == pytest.approx(1)
        assert found["seconds"] > 0 and ("aten::sin" in found["largest"]) == (kind == "other")
    assert kind_of("## Call CompiledFxGraph abc ##") == kind_of("triton_poi_fused_add_0") == "compiled"
    assert kind_of("mkldnn::_linear_pointwise") == kind_of("ProductBackward") == "products"


def test_profile_says_what_the_time_goes_into(tmp_path, monkeypatch, capsys):
    common = ("model=llamagen_tiny", "parts=[decode,train]", f"out={tmp_path / 't.json'}", "profile=true")
    decode, train = evaluate(config(*common))
    assert decode["profile"]["shares"]["convolutions"] > 0 and train["profile"]["shares"]["products"] > 0
    assert decode["paths"]["decode.float32"] == 2, "the profiled run is not counted"
    assert capsys.readouterr().out.count("profile: ") == 2
    with pytest.raises(ValueError, match="pass cuda_graphs=false"):
        evaluate(config(*common, "cuda_graphs=true"))


def test_mistakes_name_their_key(tmp_path):
    for option in ("parts=[encode,fly]", "batches=[]", "batches=[0]", "repeats=0"):
        with pytest.raises(ValueError, match=option.partition("=")[0]):
            evaluate(config(option, f"out={tmp_path / 'x.json'}"))


def test_a_family_that_learns_from_a_teacher_is_timed_on_random_patches(tmp_path, monkeypatch):
    seen, loss = [], LlamaGenREPA.loss
    monkeypatch.setattr(LlamaGenREPA, "loss", lambda self, batch, **o: seen.append(batch) or loss(self, batch, **o))
    model = ("model=llamagen_repa_small", "model.depth=2", "model.width=16", "model.heads=2", "model.block=1")
    (row,) = evaluate(config(*model, "parts=[train]", f"out={tmp_path / 'x.json'}"))
    assert {batch["patches"].shape for batch in seen} == {(2, 16, 64)} and row["images_per_second"] > 0


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


def test_attention_of_the_timed_part_alone_is_held_to_fused_kernels(tmp_path, monkeypatch):
    seen, inside = [], [0]
    monkeypatch.setattr("eval.throughput.matmul_rate", lambda *_: 1e9)
    monkeypatch.setattr("eval.throughput.bandwidth", lambda *_: 1e9)

    @contextmanager
    def fused(device, dtype):
        assert (device.type, dtype) == ("cpu", torch.bfloat16)
        inside[0] = 1
        yield
        inside[0] = 0

    monkeypatch.setattr(paths, "fused", fused)
    cost = lambda: (seen.append(("cost", *inside)), (1.0, 1.0))[1]  # noqa: E731
    job = Job(lambda: seen.append(("run", *inside)), cost, nn.Linear(1, 1), paths.Asked())
    monkeypatch.setattr("eval.throughput.jobs", lambda *_: {"sample": job})
    evaluate(config("model=llamagen_tiny", "parts=[sample]", "dtype=bfloat16", f"out={tmp_path / 'x.json'}"))
    assert seen == [("cost", 0), ("run", 1), ("run", 1)], "a run to warm up, and the timed one"


def test_only_what_is_timed_counts(tmp_path, monkeypatch):
    """The plain run that operations are counted on takes the slow path; the timed one must not pass for it."""
    monkeypatch.setattr("eval.throughput.matmul_rate", lambda *_: 1e9)
    monkeypatch.setattr("eval.throughput.bandwidth", lambda *_: 1e9)
    job = Job(lambda: None, lambda: (counters.count("step.cached"), (1.0, 1.0))[1], nn.Linear(1, 1), paths.Asked())
    monkeypatch.setattr("eval.throughput.jobs", lambda *_: {"sample": job})
    (row,) = evaluate(config("model=llamagen_tiny", "parts=[sample]", f"out={tmp_path / 'x.json'}"))
    assert row["paths"].keys() <= {"memory.kept"}
    job.asked.taken.add("step.cached")
    with pytest.raises(ValueError, match=r"sample at batch 2 fell back.*not taken: step\.cached"):
        evaluate(config("model=llamagen_tiny", "parts=[sample]", f"out={tmp_path / 'x.json'}"))


def test_training_rows_in_bf16_say_their_mfu_where_the_peak_is_known(tmp_path, monkeypatch):
    for name in ("matmul_rate", "bandwidth"):
        monkeypatch.setattr(f"eval.throughput.{name}", lambda *_: 1e9)
    monkeypatch.setattr("eval.throughput.peak_rate", lambda device: 1e12)
    common = ("model=llamagen_tiny", f"out={tmp_path / 't.json'}")
    sample, train = evaluate(config(*common, "parts=[sample,train]", "dtype=bfloat16"))
    assert sample["mfu"] is None
    assert train["mfu"] == pytest.approx(train["images_per_second"] * train["matmul_operations_per_image"] / 1e12)
    assert evaluate(config(*common, "parts=[train]"))[0]["mfu"] is None, "the peak is that of bf16"


@pytest.mark.parametrize("ahead", [False, True])
def test_online_training_takes_a_steps_operations_and_longer(ahead, tmp_path, monkeypatch):
    for name in ("matmul_rate", "bandwidth"):
        monkeypatch.setattr(f"eval.throughput.{name}", lambda *_: 1e9)
    asked = []
    monkeypatch.setattr("eval.paths.Asked.check", lambda self, counts, part: asked.append((part, self.taken)))
    encoded = []
    encode = CNNTokenizer.encode
    monkeypatch.setattr(CNNTokenizer, "encode", lambda self, *a, **k: encoded.append(1) or encode(self, *a, **k))
    common = ("model=llamagen_tiny", f"out={tmp_path / 't.json'}", f"encode_ahead={ahead}", "repeats=3")
    train, online = evaluate(config(*common, "parts=[train,online]", "batches=[2]"))
    assert online["matmul_operations_per_image"] == train["matmul_operations_per_image"] > 0
    assert len(encoded) == 1 + 4, "once for the tokens of `train`, once for each step of `online`"
    assert not any("tokens.ahead" in taken for _, taken in asked), "there is no second stream on the CPU"
    assert [("encode.float32" in taken) for _, taken in asked] == [False, True]
    assert online["paths"]["encode.channels_last"] == 4


def test_a_fallback_is_no_measurement(tmp_path, monkeypatch):
    monkeypatch.setattr("eval.throughput.matmul_rate", lambda *_: 1e9)
    monkeypatch.setattr("eval.throughput.bandwidth", lambda *_: 1e9)
    monkeypatch.setattr("vgen.generator.Generator.cache", lambda *_, **__: None)
    out = tmp_path / "x.json"
    with pytest.raises(ValueError, match=r"sample at batch 2 fell back.*step\.recomputed"):
        evaluate(config("model=llamagen_tiny", "parts=[sample]", f"out={out}"))
    assert not out.exists()
    with monkeypatch.context() as patch:  # weights of convolutions as they were made
        patch.setattr("eval.throughput.channels_last", lambda tokenizer: 0)
        with pytest.raises(ValueError, match=r"encode at batch 2 fell back.*encode\.channels_first"):
            evaluate(config("parts=[encode]", "packed=false", f"out={out}"))
    assert not out.exists()
    with pytest.raises(ValueError, match="cuda_graphs=true needs device=cuda"):
        evaluate(config("model=llamagen_tiny", "parts=[sample]", "cuda_graphs=true", f"out={out}"))
    with pytest.raises(ValueError, match="exclude each other"):
        evaluate(config("model=llamagen_tiny", "parts=[sample]", "packed=true", "quant=int8", f"out={out}"))
