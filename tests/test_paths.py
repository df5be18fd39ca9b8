"""Counters of the paths taken, and benchmarks that fail where a path they ask for was not taken."""

import platform

import pytest
import tokenizers
import torch
from fake_cuda import autocast_on_cuda, fake_cuda
from generators import FAMILIES, also_read, latent_spec, make, map_spec, tokens_of, xar
from test_generators import LABELS, draw

from eval import paths
from vgen.guidance import guidance
from vgen.heads import DrawRule
from vtok import counters
from vtok.acceleration import compile_blocks
from vtok.decoding import decode_images, encode_images
from vtok.layers import linear
from vtok.layers.dropout import dropout
from vtok.noise import SampleNoise, sample_seeds
from vtok.tokenizer import TokenSpec

KEY = sample_seeds(0, 0, 3)


def counted(run):
    counters.reset()
    run()
    return counters.read()


def sampled(model, scale, **options):
    rule = DrawRule(top_k=9) if model.spec.discrete else DrawRule()
    return counted(lambda: draw(model, LABELS, sample_seeds(0, 0, 3), guidance(scale), rule, **options))


def batch_of(model, **other):
    return {"tokens": tokens_of(model, 3), "label": LABELS, "key": KEY} | also_read(model, 3) | other


def trained(model, **other):
    return counted(lambda: model.train().loss(batch_of(model, **other), progress=0.5))


def gradients(model):
    """Of a training step, by parameter."""
    model.zero_grad()
    counters.reset()
    torch.manual_seed(0)  # of dropout
    model.train().loss(batch_of(model), progress=0.5)["loss"].backward()
    return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_takes_the_paths_that_are_asked_for(name):
    model = make(name)
    for scale in (1.0, 2.0):
        counts = sampled(model, scale)
        asked = paths.sampling(model, dtype=torch.float32, guided=scale != 1)
        asked.check(counts, "sample")
        assert counts["rows.guided" if scale != 1 else "rows.single"] == model.layout.steps
    counts = trained(model)
    paths.training(model, key=KEY, progress=0.5, device=torch.device("cpu")).check(counts, "train")


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build has no oneDNN products")
@pytest.mark.skipif(linear.open_blas() is None, reason="this numpy has another library than OpenBLAS")
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_trains_with_the_products_of_other_libraries(name, monkeypatch):
    """On a processor that has them, of sizes that are worth it: the same gradients."""
    model = make(name)
    plain = gradients(model)
    for where in (linear, paths):
        monkeypatch.setattr(where, "slow_mkl", lambda: True)
        monkeypatch.setattr(where, "ROWS", 1)
    for least in ("WIDE", "ALONE", "SHARED"):
        monkeypatch.setattr(linear, least, 1)
    found = gradients(model)
    counts = counters.read()
    asked = paths.training(model, key=KEY, progress=0.5, device=torch.device("cpu"))
    asked.check(counts, "train")
    assert {"linear.wide", "linear.gradients"} <= asked.taken
    for key, want in plain.items():
        torch.testing.assert_close(found[key], want, rtol=1e-3, atol=1e-4 * float(want.abs().max()) + 1e-6)


def test_counts_are_those_of_the_layers_and_steps():
    """Two blocks, sixteen tokens: a pass a step, a rotation a block."""
    counts = sampled(make("llamagen"), 2.0)
    assert counts == {
        "attention.full": 16,
        "attention.turned": 32,
        "rows.guided": 16,
        "step.cached": 16,
        "weights.float32": 16,
    }
    counters.reset()
    assert counters.read() == {}


def test_fallbacks_fail_and_say_which():
    model = make("llamagen")
    asked = paths.sampling(model, dtype=torch.float32, guided=True)
    with pytest.raises(
        ValueError, match=r"sample fell back.*not taken: step\.cached; taken instead: .*step\.recomputed"
    ):
        asked.check(sampled(model, 2.0, cached=False), "sample")
    with pytest.raises(ValueError, match=r"not taken: rows\.guided; taken instead: rows\.single"):
        asked.check(sampled(model, 1.0), "sample")
    light = paths.sampling(model, dtype=torch.bfloat16, guided=True)
    with pytest.raises(ValueError, match=r"not taken: weights\.bfloat16; taken instead: weights\.float32"):
        light.check(sampled(model, 2.0), "sample")
    model.trunk.to(torch.bfloat16)
    light.check(sampled(model, 2.0), "sample")
    wanted = {"cuda_graphs": "graph.replayed", "packed": "linear.packed"}
    for option, path in wanted.items():
        with pytest.raises(ValueError, match=f"not taken: {path}"):
            paths.sampling(model, dtype=torch.bfloat16, guided=True, **{option: True}).check(
                sampled(model, 2.0), "sample"
            )
    with pytest.raises(ValueError, match=r"not taken: weights\.int8; taken instead: weights\.bfloat16"):
        paths.sampling(model, dtype=torch.bfloat16, guided=True, quant="int8").check(sampled(model, 2.0), "sample")
    asked = paths.training(make("var"), key=KEY, progress=0.5, device=torch.device("cuda"))
    with pytest.raises(
        ValueError, match=r"train fell back.*not taken: attention\.blocks; taken instead: attention\.mask"
    ):
        asked.check(trained(make("var")), "train")


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_xar_with_attention_dropout_trains_on_cuda_without_a_mask(rate):
    """Fake tensors: no GPU is needed. Without dropout FlexAttention is asked for, which only a GPU has."""
    model = xar("cell", 4, latent_spec(8, 8), attention_dropout=rate)
    asked = paths.training(model, key=KEY, progress=0.5, device=torch.device("cuda"))
    wanted = "attention.prefixes" if rate else "attention.blocks"
    assert wanted in asked.taken and "attention.mask" in asked.never
    with pytest.raises(ValueError, match=r"taken instead: attention\.mask"):
        asked.check({"attention.mask": 1}, "train")
    if rate:
        batch = {"tokens": tokens_of(model, 3), "label": LABELS, "key": KEY}
        with fake_cuda(model, batch) as batch:
            asked.check(counted(lambda: model.train().loss(batch)), "train")


@pytest.mark.parametrize("name", sorted(tokenizers.FAMILIES.keys() - {"dar"}))
def test_tokenizers_in_bfloat16_on_cuda_take_the_paths_that_are_asked_for(name, monkeypatch):
    """Fake tensors: no GPU is needed. How their convolutions lie only a GPU tells, and ids have no values to check;
    D-AR's decoder reads its schedule from the device."""
    monkeypatch.setattr(TokenSpec, "check", lambda self, tokens: None)
    model, images = tokenizers.make(name).eval(), tokenizers.images(2)
    batch = {"images": images, "tokens": model.encode(images), "seeds": sample_seeds(0, 0, 2)}
    with autocast_on_cuda(), fake_cuda(model, batch) as batch:
        noise = SampleNoise(batch["seeds"])
        for part, run, given in (("encode", encode_images, "images"), ("decode", decode_images, "tokens")):
            asked = getattr(paths, f"{part[:-1]}ing")(model, dtype=torch.bfloat16)
            asked.never.discard(f"{part}.channels_first")
            counts = counted(lambda: run(model, batch[given], dtype=torch.bfloat16, noise=noise))  # noqa: B023
            asked.check(counts, part)
            if "norm.bfloat16" in counts:
                with pytest.raises(ValueError, match=r"taken instead: norm\.float32"):
                    asked.check(counts | {"norm.float32": 1}, part)


def test_compiled_and_recomputed_blocks_are_counted():
    model = make("llamagen", dropout=0.0, token_dropout=0.0, checkpointing=True)
    torch._dynamo.reset()
    compile_blocks(model, backend="eager")
    counts = trained(model)
    assert counts["block.compiled"] == counts["block.recomputed"] == 1 and "block.plain" not in counts
    paths.training(model, key=KEY, progress=0.5, device=torch.device("cpu"), compiled=True).check(counts, "train")
    with torch.compiler.set_stance("force_eager"), pytest.raises(ValueError, match=r"taken instead: block\.plain"):
        paths.training(model, key=KEY, progress=0.5, device=torch.device("cpu"), compiled=True).check(
            trained(model), "train"
        )
    with pytest.raises(ValueError, match=r"not taken: block\.compiled"):
        paths.training(model, key=KEY, progress=0.5, device=torch.device("cpu"), compiled=True).check(
            trained(make("llamagen")), "train"
        )


def test_dropout_in_training_is_counted_and_asked_for():
    """RAR drops weights of attention and hidden values; on the CPU by ways of ours, and PyTorch's is a fallback."""
    model = make("rar")
    asked = paths.training(model, key=KEY, progress=0.5, device=torch.device("cpu"))
    assert {"attention.dropped", "dropout.shared"} <= asked.taken
    counts = trained(model)
    assert counts["attention.dropped"] == len(model.trunk.blocks)
    asked.check(counts, "train")
    for path in ("attention.dropped", "dropout.shared"):
        with pytest.raises(ValueError, match=f"not taken: {path}"):
            asked.check({key: n for key, n in counts.items() if key != path}, "train")
    off = counted(lambda: dropout(torch.ones(4), 0.5, training=False)) | counted(lambda: dropout(torch.ones(4), 0.0))
    assert off == {} and counted(lambda: dropout(torch.ones(4), 0.5)) == {"dropout.shared": 1}
    with pytest.raises(ValueError, match=r"taken instead: dropout\.plain"):
        asked.check(counts | {"dropout.plain": 1}, "train")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_a_benchmark_on_the_cpu_keeps_its_memory_or_fails(monkeypatch):
    counters.count("step.cached")
    begun = paths.begin(torch.device("cpu"))
    assert counters.read() == {"memory.kept": 1}
    begun.check(counters.read(), "train")
    assert paths.begin(torch.device("cuda")) == paths.Asked() and counters.read() == {}
    monkeypatch.setattr("vtok.acceleration.ctypes.CDLL", lambda name: object())  # a C library without mallopt
    with pytest.raises(ValueError, match=r"not taken: memory\.kept"):
        paths.begin(torch.device("cpu")).check(counters.read(), "train")


def test_counting_makes_compiled_code_no_slower():
    """A count inside compiled code would be a guard that changes at every call: none may be traced."""
    calls = []

    def backend(graph, inputs):
        calls.append(graph)
        return graph.forward

    def step(x):
        counters.count("attention.turned")
        return x + 1

    torch._dynamo.reset()
    fast = torch.compile(step, backend=backend)
    counters.reset()
    for _ in range(3):
        fast(torch.ones(2))
    assert len(calls) == 1 and counters.read() == {}


def test_pieces_of_the_loss_are_asked_for_where_the_logits_are_many(monkeypatch):
    """Those of a softmax each: Hita's two parts, of which one is large, and sub-codes."""
    many = {"llamagen": 16 * 24, "maskgit": 16 * 24, "hita": 9 * 24, "llamagen_factorised": 16 * 6}
    for name, numbers in many.items():
        model = make(name)
        whole = paths.training(model, key=KEY, progress=0.5, device=torch.device("cpu"))
        assert "loss.whole" in whole.taken and "loss.pieces" in whole.never
        with monkeypatch.context() as patch:
            patch.setattr("vgen.cross_entropy.MOST", 3 * numbers - 1)
            asked = paths.training(model, key=KEY, progress=0.5, device=torch.device("cpu"))
            assert ("loss.whole" in asked.taken) == (name in ("hita", "llamagen_factorised"))
            counts = trained(model)
            asked.check(counts, "train")
        with pytest.raises(ValueError, match=r"taken instead: loss\.pieces"):
            whole.check(counts, "train")
        with pytest.raises(ValueError, match=r"not taken: loss\.pieces"):
            asked.check(trained(model), "train")


def test_pieces_are_those_of_the_scales_that_are_trained(monkeypatch):
    """FlexVAR draws its list from the samples' keys, VAR may still train its first scales alone."""
    flexvar = make("flexvar", spec=map_spec((1, 2, 3, 4, 5)), sides=(1, 3, 5), sample_scales=True)
    var = make("var", progressive_until=0.9, progressive_first=1)
    monkeypatch.setattr("vgen.cross_entropy.MOST", 3 * 24 * 20)
    lengths = set()
    for model, keys in ((flexvar, [KEY + n for n in range(24)]), (var, [KEY])):
        tokens = torch.randint(24, (3, model.spec.layout.length))
        for key in keys:
            counts = trained(model, tokens=tokens, key=key)
            paths.training(model, key=key, progress=0.5, device=torch.device("cpu")).check(counts, "train")
            lengths.add((type(model).__name__, model.trained_length(key, 0.5) <= 20))
    assert lengths == {("FlexVAR", True), ("FlexVAR", False), ("VAR", True)} and var.layout.length > 20
