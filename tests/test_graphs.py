"""Sampling from recorded steps: the same tokens as the plain path, and steps that never wait for the device.

On the CPU the recording is played by tests/tape.py, which holds to a CUDA graph's rules; with a GPU, by real graphs.
"""

import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from generators import CLASSES, make
from tape import Tape, Watch
from test_generators import LABELS, draw

from vgen.conditioning import Cond
from vgen.guidance import guidance
from vgen.heads import DrawRule
from vgen.samplers.ancestral import ancestral, write_step
from vgen.samplers.graphs import CudaCapture, GraphSampler
from vtok import counters
from vtok.noise import SampleNoise, sample_seeds

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.scaling import model_of

RECORDED = ["llamagen", "gigatok_adaln", "rar", "var", "flexvar", "hita", "har", "detailflow", "nbp_rows", "par"]
RECORDED += [
    "llamagen_factorised_depth",
    "xar_cell",
    "xar_scale",
    "flowar",
    "ecar",
    "dtm",
    "artm",
    "fhtm",
    "orthus",
    "mar",
    "mar_flow",
]
RULES = {"greedy": DrawRule(temperature=0), "sampled": DrawRule(top_k=9)}


def conditions(model, labels, guide):
    streams = [model.conditioner(labels)] + [model.conditioner.null(len(labels))] * (guide.streams - 1)
    return Cond.cat(streams)


def replayed(sampler, model, labels, seeds, guide, rule, **options):
    return sampler(model, conditions(model, labels, guide), noise=SampleNoise(seeds), guide=guide, rule=rule, **options)


@pytest.mark.parametrize("name", RECORDED)
def test_replays_draw_the_tokens_of_the_plain_path(name):
    """Recorded with other labels and seeds than are drawn: only what is overwritten may decide."""
    model = make(name)
    sampler, guide = GraphSampler(model, capture=Tape), guidance(3.0, "linear")
    rule = DrawRule(top_k=9) if model.spec.discrete else DrawRule()
    counters.reset()
    for labels, start in ((LABELS.flip(0), 0), (LABELS, 40)):
        seeds = sample_seeds(5, start, start + len(labels))
        got = replayed(sampler, model, labels, seeds, guide, rule)
        want = draw(model, labels, seeds, guide, rule)
        if model.spec.discrete:
            assert torch.equal(got.tokens, want.tokens)
        else:
            torch.testing.assert_close(got.tokens, want.tokens)
    taken = counters.read()
    assert taken["graph.captured"] == model.layout.steps and taken["graph.replayed"] == 2 * model.layout.steps


def test_another_setting_is_recorded_anew_and_results_are_copies():
    model, seeds = make("llamagen"), sample_seeds(0, 0, 3)
    sampler = GraphSampler(model, capture=Tape)
    first = replayed(sampler, model, LABELS, seeds, guidance(2.0), RULES["greedy"]).tokens
    kept, recording = first.clone(), sampler.recording
    replayed(sampler, model, LABELS, sample_seeds(1, 0, 3), guidance(2.0), RULES["greedy"])
    assert sampler.recording is recording and torch.equal(first, kept)
    for guide, rule in (
        (guidance(1.0), RULES["greedy"]),
        (guidance(1.0), RULES["sampled"]),
        (guidance(4.0), DrawRule()),
    ):
        got = replayed(sampler, model, LABELS, seeds, guide, rule).tokens
        assert torch.equal(got, draw(model, LABELS, seeds, guide, rule).tokens)
    seen = []
    options = {"stop": 3, "on_step": lambda canvas, progress: seen.append((progress.step, canvas.tokens.clone()))}
    got = replayed(sampler, model, LABELS[:2], seeds[:2], guidance(2.0), DrawRule(), **options)
    want = draw(model, LABELS[:2], seeds[:2], guidance(2.0), DrawRule(), stop=3)
    assert torch.equal(got.tokens, want.tokens) and [step for step, _ in seen] == [0, 1, 2]
    assert torch.equal(seen[1][1][:, :2], want.tokens[:, :2]) and not seen[1][1][:, 2:].any()


def test_known_tokens_are_kept_by_replays():
    model, seeds, guide = make("llamagen"), sample_seeds(0, 0, 3), guidance(2.0)
    sampler = GraphSampler(model, capture=Tape)
    for salt in (1, 2):
        canvases = []
        for _ in range(2):
            canvas = model.blank(3)
            canvas.known = torch.rand(3, 16, generator=torch.Generator().manual_seed(salt)) < 0.4
            canvas.tokens[canvas.known] = salt
            canvases.append(canvas)
        got = replayed(sampler, model, LABELS, seeds, guide, DrawRule(), canvas=canvases[0])
        want = draw(model, LABELS, seeds, guide, DrawRule(), canvas=canvases[1])
        assert torch.equal(got.tokens, want.tokens) and (got.tokens[canvases[0].known] == salt).all()


def test_what_cannot_be_recorded_says_so():
    with pytest.raises(ValueError, match="cuda_graphs=true: MaskGIT"):
        GraphSampler(make("maskgit"), capture=Tape)
    with pytest.raises(ValueError, match="needs device=cuda, not cpu"):
        GraphSampler(make("llamagen"))
    model = make("llamagen")
    cond = conditions(model, LABELS, guidance(1.0))
    cond.at = {0: lambda h, place: h}
    with pytest.raises(ValueError, match=r"cond\.at"):
        GraphSampler(model, capture=Tape)(model, cond, noise=SampleNoise(sample_seeds(0, 0, 3)))


def test_capturing_happens_on_the_models_device_whichever_is_the_current_one(monkeypatch):
    """torch.cuda played by a process whose current device is cuda:0: everything made and run belongs to cuda:1."""
    now, made = [0], []

    @contextmanager
    def switched(device):
        before, now[0] = now[0], device.index
        yield
        now[0] = before

    def stream(device=None):
        made.append(now[0] if device is None else device.index)
        return SimpleNamespace(wait_stream=lambda other: None)

    def graph():
        made.append(now[0])
        return SimpleNamespace(pool=lambda: "pool", replay=lambda: None)

    begun = []
    monkeypatch.setattr(torch.cuda, "device", switched)
    monkeypatch.setattr(torch.cuda, "Stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda g, pool, stream: begun.append((pool, stream)) or nullcontext())
    capture = CudaCapture(torch.device("cuda", 1))
    capture.warm(lambda: made.append(now[0]))
    for _ in range(2):
        capture(lambda: made.append(now[0]))
    assert set(made) == {1} and len(made) == 2 + 1 + 2 * 2 and now == [0]
    assert begun == [(None, capture.stream), ("pool", capture.stream)]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_cuda_graphs_of_a_model_that_is_not_on_the_current_device():
    model, seeds = make("llamagen").to("cuda:1"), sample_seeds(5, 0, 3).to("cuda:1")
    labels, guide = LABELS.to("cuda:1"), guidance(3.0)
    want = draw(model, labels, seeds, guide, RULES["sampled"]).tokens
    assert torch.equal(replayed(GraphSampler(model), model, labels, seeds, guide, RULES["sampled"]).tokens, want)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")
@pytest.mark.parametrize("name", RECORDED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_cuda_graphs_draw_the_tokens_of_the_plain_path(name, dtype):
    model = make(name).cuda()
    model.trunk.to(dtype)
    sampler, guide = GraphSampler(model), guidance(3.0, "linear")
    rule = DrawRule(top_k=9) if model.spec.discrete else DrawRule()
    for start in (0, 40):
        labels, seeds = (LABELS.cuda() + start) % CLASSES, sample_seeds(5, start, start + 3).cuda()
        got = replayed(sampler, model, labels, seeds, guide, rule)
        assert torch.equal(got.tokens, draw(model, labels, seeds, guide, rule).tokens)


@pytest.mark.parametrize("name", ["llamagen", "rar", "hita", "gigatok_shared"])
def test_a_step_makes_no_tensor_as_large_as_the_cache(name):
    """Tensors that a step of one position makes anew, against keys of all layers and places (twice as wide a batch and
    image would change nothing: both scale with the rows, the cache alone with the places)."""
    model = make(name)
    made: list[int] = []
    cond, noise = conditions(model, LABELS, guidance(2.0)), SampleNoise(sample_seeds(0, 0, 3))
    canvas, cache = model.begin(noise), model.cache(6)
    options = {"cache": cache, "noise": noise, "guide": guidance(2.0), "rule": DrawRule(top_k=9)}

    def seen(function, args, kwargs, result):
        made.extend(r.numel() for r in fresh(result, args))

    with torch.no_grad():
        for k in range(model.layout.steps):
            made.clear()
            with Watch(seen) if k else nullcontext():  # the first places constants on the device
                write_step(model, canvas, cond, k, **options)
            assert max(made, default=0) < cache.keys.numel()


def fresh(result, args):
    """Tensors of a result that lie in memory of none of the arguments."""
    stores = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
    found = result if isinstance(result, (tuple, list)) else [result]
    return [r for r in found if isinstance(r, torch.Tensor) and r.untyped_storage().data_ptr() not in stores]


def test_a_long_sequence_allocates_nothing_that_grows_but_scores():
    """144 places: everything that a late step makes is as large as what the tenth makes."""
    model = model_of(144, 1).eval()
    sizes: dict[int, list[int]] = {}
    marks = []
    cond = conditions(model, LABELS[:1], guidance(2.0))

    def seen(function, args, kwargs, result):
        sizes.setdefault(len(marks), []).extend(r.numel() for r in fresh(result, args))

    run = {"noise": SampleNoise(sample_seeds(0, 0, 1)), "guide": guidance(2.0), "rule": DrawRule(top_k=20)}
    ancestral(model, cond, stop=1, **run)
    with torch.no_grad(), Watch(seen):
        ancestral(model, cond, on_step=lambda *_: marks.append(0), **run)
    assert sizes[10] == sizes[70] == sizes[142]
