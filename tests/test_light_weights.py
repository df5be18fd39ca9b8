"""Weights stored for sampling: packed ones give the same numbers, 8-bit ones nearly, and how nearly is measured."""

import copy
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from fake_cuda import Arrivals, fake_cuda
from generators import make, tokens_of
from test_generators import LABELS, draw
from test_pipeline import exported, settings
from tokenizers import FAMILIES, images
from tokenizers import make as make_tokenizer
from torch import nn
from torch._dynamo.utils import counters as compiled

from eval import paths
from eval.peers import Options
from eval.throughput import counted
from eval.versus import asked
from vgen.guidance import guidance
from vgen.heads import CategoricalHead, DrawRule
from vgen.pipeline import Pipeline
from vgen.sampling import sample
from vtok import counters
from vtok.acceleration import compile_blocks, light_weights
from vtok.checkpoint import save_folder
from vtok.decoding import channels_last, decode_images, encode_images, light_tokenizer
from vtok.layers.packed import (
    PLAIN,
    HalfLinear,
    HalfLinearOnCuda,
    PackedLinear,
    can_halve,
    float32_linear,
    linears,
    pack_linears,
    packable,
)
from vtok.low_bit import quantize_weights
from vtok.models.cnn import CNNTokenizer
from vtok.noise import sample_seeds
from vtok.quantize.vq import VQ


def needs_packing(dtype):
    """Skips where the processor has no packed products of this dtype."""
    if not packable(torch.zeros(1, dtype=dtype)):
        pytest.skip(f"this processor has no packed products in {dtype}")


def needs_torchao():
    """Skips where the extra `quant` is not installed."""
    pytest.importorskip("torchao", reason="torchao, the extra `quant`, is not installed")


def drawn(model, greedy):
    """A rule for the model's tokens."""
    if greedy:
        return DrawRule(temperature=0)
    return DrawRule(top_k=9) if model.spec.discrete else DrawRule()


@pytest.mark.parametrize("name", ["llamagen", "var", "rar", "xar_cell", "mar"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("greedy", [False, True], ids=["sampled", "greedy"])
def test_packed_weights_draw_the_same_tokens(name, dtype, greedy):
    """Joint biases (VAR's q and v) and plain ones; the sums may run in another order, hence values within rounding.
    Heads of one position a step have their weights in float16 beside a bfloat16 trunk: the tokens of weights so
    rounded."""
    needs_packing(dtype)
    plain = make(name).requires_grad_(False)
    light_weights(plain, dtype, packed=False)
    fast = copy.deepcopy(plain)
    before = [m for m in fast.modules() if type(m) in PLAIN]
    light_weights(fast, dtype, packed=True)
    after = [m for m in fast.modules() if isinstance(m, (PackedLinear, HalfLinear))]
    assert len(after) == len(before) > 0 and not any(type(m) in PLAIN for m in fast.modules())
    rule, halved = drawn(plain, greedy), isinstance(getattr(fast.head, "linear", None), HalfLinear)
    assert halved == (dtype == torch.bfloat16 and name in ("llamagen", "rar") and can_halve())
    if halved:
        weight = plain.head.linear.weight
        weight.copy_(weight.half())
    counters.reset()
    got, want = (draw(m, LABELS, sample_seeds(0, 0, 3), guidance(2.0), rule).tokens for m in (fast, plain))
    if plain.spec.discrete:
        assert torch.equal(got, want)
    else:
        # an untrained chain of denoising steps magnifies rounding by hundreds
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 if dtype == torch.float32 else 0.02)
    taken, asked = counters.read(), paths.sampling(fast, dtype=dtype, guided=True, packed=True)
    assert taken.get("linear.half", 0) == halved * plain.layout.steps and ("linear.half" in asked.taken) == halved
    asked.check(taken, "sample")


@pytest.mark.parametrize("name", ["llamagen", "var", "rar", "har", "xar_cell", "mar", "llamagen_factorised_depth"])
def test_compiled_steps_draw_the_same_tokens_in_few_graphs(name, monkeypatch):
    """Dynamo's eager backend: what it captures. A graph holds whatever the position, the layer and the rows are, so
    that null rows may end on the way, and serves argmax too."""
    monkeypatch.setattr("vtok.acceleration.compile_blocks", lambda module: compile_blocks(module, backend="eager"))
    plain = make(name).requires_grad_(False)
    fast = copy.deepcopy(plain)
    torch._dynamo.reset()
    light_weights(fast, torch.float32, packed=False, compiled=True)
    guide, found = guidance(3.0, "interval", high=0.5), []
    before = compiled["stats"]["unique_graphs"]
    counters.reset()
    for greedy in (False, True):
        rule = drawn(plain, greedy)
        got, want = (draw(m, LABELS, sample_seeds(0, 0, 3), guide, rule).tokens for m in (fast, plain))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        found.append(got)
    assert not torch.equal(*found)
    taken = counters.read()
    assert taken.pop("rows.single"), "guidance ends"
    assert taken["block.compiled"] and "block.plain" not in taken
    assert compiled["stats"]["unique_graphs"] - before <= 8, "of a trunk, and of the head's"
    paths.sampling(fast, dtype=torch.float32, guided=True, compiled=True).check(taken, "sample")
    with pytest.raises(ValueError, match=r"not taken: block\.compiled"):
        paths.sampling(plain, dtype=torch.float32, guided=True, compiled=True).check(
            {k: n for k, n in taken.items() if k != "block.compiled"}, "sample"
        )


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="a C++ compiler is needed")
@pytest.mark.parametrize("packed", [True, False])
def test_the_sampling_command_compiles(packed, tmp_path, capsys):
    """PyTorch's own backend, packed weights inside: the picture of the plain path."""
    if packed:
        needs_packing(torch.float32)
    source = exported(tmp_path / "model")
    chosen = {"classes": [3], "per_class": 2, "guidance": 2.0, "chunk": 2, "packed": packed}
    for fast in (False, True):
        torch._dynamo.reset()
        counters.reset()
        sample(settings(source, tmp_path / f"{fast}.npz", **chosen, compile=fast))
        assert ("the first steps take" in capsys.readouterr().out) == fast
        assert bool(counters.read().get("block.compiled")) == fast and not counters.read().get("block.plain")
    plain, quick = (np.load(tmp_path / f"{name}.npz")["arr_0"] for name in (False, True))
    assert np.abs(plain.astype(int) - quick).max() <= 1
    assert json.loads((tmp_path / "True.metadata.json").read_text())["compile"] is True


def test_compiling_on_the_cpu_without_a_compiler_says_so(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler: install"):
        light_weights(make("llamagen"), torch.float32, packed=False, compiled=True)


@pytest.mark.parametrize(
    ("name", "dtype", "kept"),
    [
        ("llamagen", torch.bfloat16, torch.float32),  # one position a step
        ("llamagen", torch.float32, torch.float32),
        ("llamagen", torch.float64, torch.float64),
        ("rar", torch.bfloat16, torch.float32),  # its first step reads a start too
        ("var", torch.bfloat16, torch.bfloat16),
    ],
)
def test_keys_and_values_of_single_positions_are_float32_on_the_cpu(name, dtype, kept):
    """And what is read from them is what a pass without them computes, up to the rounding of the weights' dtype."""
    model = make(name).requires_grad_(False)
    light_weights(model, dtype, packed=False)
    canvas, cond = model.arrange(tokens_of(model, 3)), model.conditioner(LABELS)
    cache, found = model.cache(3), []
    assert cache.keys.dtype == cache.values.dtype == kept
    for k in range(model.layout.steps):
        found.append(model(canvas, cond, k, k + 1, cache))
        cache.commit(model.layout.reads[k])
    assert found[0].dtype == dtype
    close = {"rtol": 0.1, "atol": 0.1} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(torch.cat(found, 1), model(canvas, cond), **close)


@pytest.mark.parametrize("rows", [1, 2, 64])
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_layer_is_its_linear_layer(rows, bias):
    needs_packing(torch.float32)
    torch.manual_seed(0)
    linear = nn.Linear(48, 80, bias=bias)
    packed = PackedLinear(linear.weight, linear.bias, rows=2)
    x = torch.randn(rows, 3, 48)
    torch.testing.assert_close(packed(x), linear(x))
    assert packed.weight.dtype == torch.float32 and not list(packed.parameters()) and not packed.state_dict()


@pytest.mark.parametrize("bias", [True, False])
def test_a_halved_layer_rounds_its_weights_to_11_bits_and_nothing_else(bias):
    """By float64: of weights in float16 what float32 sums leave; of the layer's own 2 ** -11 a weight at most."""
    if not can_halve():
        pytest.skip("this build of PyTorch has no FBGEMM")
    torch.manual_seed(0)
    linear, x = nn.Linear(768, 900, bias=bias), torch.randn(2, 3, 768)
    with torch.no_grad():
        linear.weight[7, 5] = 1e6
    with pytest.warns(UserWarning, match="out of range"):
        half = HalfLinear(linear.weight, linear.bias)
    assert half.weight.shape == linear.weight.shape and not list(half.parameters()) and not half.state_dict()
    offset = 0 if linear.bias is None else linear.bias.detach().double()
    weight, got = linear.weight.detach().double(), copy.deepcopy(half)(x).detach()
    assert got.dtype == torch.float32
    rounded = weight.clamp(max=65504).half().double()
    torch.testing.assert_close(got.double(), x.double() @ rounded.T + offset, rtol=1e-5, atol=1e-5)
    off = (got - (x.double() @ weight.T + offset)).abs()[..., 8:]
    bound = 2**-11 * (x.double().abs() @ weight.abs().T)[..., 8:] + 1e-5
    assert 0 < float((off / bound).max()) < 1


@pytest.mark.parametrize("bias", [True, False])
def test_a_halved_layer_for_cuda_rounds_its_weights_to_11_bits_and_no_bfloat16_state(bias):
    torch.manual_seed(0)
    linear, x = nn.Linear(768, 900, bias=bias), torch.randn(2, 3, 768).bfloat16()
    with torch.no_grad():
        linear.weight[7, 5] = 1e6
    half, offset = HalfLinearOnCuda(linear.weight, linear.bias), 0 if linear.bias is None else linear.bias.double()
    assert not list(half.parameters()) and not half.state_dict()
    got = float32_linear(half, x)
    rounded = linear.weight.detach().double().clamp(max=65504).half().double()
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), x.double() @ rounded.T + offset, rtol=1e-5, atol=1e-5)
    with fake_cuda(half, {"x": x}) as batch, Arrivals():
        got = float32_linear(half, batch["x"])
        assert got.is_cuda and got.dtype == torch.float32 and got.shape == (2, 3, 900)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this product is for a CUDA device")
def test_a_halved_layer_on_cuda_is_what_it_is_on_the_cpu():
    torch.manual_seed(0)
    linear, x = nn.Linear(768, 900), torch.randn(2, 3, 768).bfloat16()
    half = HalfLinearOnCuda(linear.weight, linear.bias)
    want = float32_linear(half, x)
    torch.testing.assert_close(float32_linear(half.cuda(), x.cuda()).cpu(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llamagen", "var", "rar", "maskgit", "xar_cell"])
def test_on_cuda_a_softmax_head_beside_a_bfloat16_trunk_has_its_weights_in_float16(name, monkeypatch):
    """The CPU plays CUDA: which weights are kept so, and the tokens of weights that are rounded so."""
    monkeypatch.setattr("vtok.acceleration._on_cuda", lambda module: True)
    monkeypatch.setattr("vtok.acceleration.can_pack", lambda module: False)
    kinds = []
    for dtype, packed in ((torch.float32, None), (torch.bfloat16, False), (torch.bfloat16, None)):
        fast = make(name).requires_grad_(False)
        light_weights(fast, dtype, packed=packed)
        kinds.append(type(getattr(fast.head, "linear", None)))
    softmax = isinstance(fast.head, CategoricalHead)
    assert (kinds[2] is HalfLinearOnCuda) == softmax and HalfLinearOnCuda not in kinds[:2]
    assert sum(isinstance(m, HalfLinearOnCuda) for m in fast.modules()) == softmax
    if not softmax:
        return
    plain = make(name).requires_grad_(False)
    light_weights(plain, torch.bfloat16, packed=False)
    plain.head.linear.weight.copy_(plain.head.linear.weight.half())
    for rule in (DrawRule(top_k=9), DrawRule(temperature=0)):
        counters.reset()
        got = draw(fast, LABELS, sample_seeds(0, 0, 3), guidance(2.0), rule).tokens
        taken, asked = counters.read(), paths.sampling(fast, dtype=torch.bfloat16, guided=True)
        assert torch.equal(got, draw(plain, LABELS, sample_seeds(0, 0, 3), guidance(2.0), rule).tokens)
        assert taken["linear.half"] == fast.layout.steps and "linear.half" in asked.taken
        asked.check(taken, "sample")
    run = lambda m: draw(m, LABELS, sample_seeds(0, 0, 3), guidance(2.0), DrawRule())  # noqa: E731
    (operations, read), before = counted(lambda: run(fast), fast), counted(lambda: run(plain), plain)
    weights = plain.head.linear.weight.numel()
    assert operations == before[0] and read == before[1] - 2 * weights * fast.layout.steps, "two bytes a weight"


def test_a_halved_head_is_counted_in_the_roofline_and_is_not_saved(tmp_path):
    """Two bytes a weight, and the operations of its product, once a step."""
    needs_packing(torch.bfloat16)
    model = make("llamagen").requires_grad_(False)
    run = lambda: draw(model, LABELS, sample_seeds(0, 0, 3), guidance(2.0), DrawRule())  # noqa: E731
    light_weights(model, torch.bfloat16, packed=False)
    plain = counted(run, model)
    light_weights(model, torch.bfloat16, packed=True)
    if not can_halve():
        pytest.skip("this build of PyTorch has no FBGEMM")
    weights, steps = model.head.linear.weight.numel(), model.layout.steps
    operations, read = counted(run, model)
    assert operations == plain[0] and read == plain[1] - 2 * weights * steps
    with pytest.raises(ValueError, match="packed for sampling, which are not saved"):
        save_folder(model, tmp_path / "model")


def test_what_cannot_be_packed_says_so():
    with pytest.raises(ValueError, match=r"packed=true: no packed products for torch\.float64"):
        pack_linears(nn.Sequential(nn.Linear(2, 2)).double())
    with pytest.raises(ValueError, match="exclude each other"):
        light_weights(nn.Linear(2, 2), torch.float32, quant="int8", packed=True)


@pytest.mark.parametrize("kind", ["int8", "float8"])
def test_eight_bit_weights_move_the_logits_little(kind):
    """A tiny model of 16 channels: an int8 weight is off by half a 127th of its row's largest at most, a float8 one by
    a 16th of itself, so that logits stay within a few percent of the largest, as with bf16, and the distribution of a
    token within 0.01 nats."""
    needs_torchao()
    model = make("llamagen").requires_grad_(False)
    light = copy.deepcopy(model)
    assert quantize_weights(light.trunk, kind) == 8
    canvas, cond = model.arrange(tokens_of(model, 3)), model.conditioner(LABELS)
    want, got = (m.head.logits(m(canvas, cond))[0] for m in (model, light))
    off = float((got - want).abs().max() / want.abs().max())
    divergence = (want.softmax(-1) * (want.log_softmax(-1) - got.log_softmax(-1))).sum(-1)
    print(f"{kind}: logits off by {off:.3%} of the largest, {float(divergence.mean()):.5f} nats a token")
    assert 0 < off < 0.05 and 0 <= float(divergence.mean()) < 0.01
    same = draw(light, LABELS, sample_seeds(0, 0, 3), guidance(2.0), DrawRule()).tokens
    plain = draw(model, LABELS, sample_seeds(0, 0, 3), guidance(2.0), DrawRule()).tokens
    assert float((same == plain).double().mean()) > 0.5, "noise is keyed: most tokens win their race all the same"


def eight_bits(kind):
    """A weight [8, 64] with a column of zeros, as it was and as a product reads it in 8 bits."""
    needs_torchao()
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(64, 8, bias=False))
    with torch.no_grad():
        layer[0].weight[:, 5] = 0
    weight = layer[0].weight.detach().clone()
    quantize_weights(layer, kind)
    return weight, layer(torch.eye(64)).T


def test_eight_bit_weights_are_the_rounded_ones():
    """Half a step s = max |w| / 127 of the row at most, symmetric: zero stays zero."""
    weight, read = eight_bits("int8")
    scale = weight.abs().amax(1, keepdim=True) / 127
    assert float(((read - weight).abs() / scale).max()) < 0.51
    assert not read[:, 5].any() and float(((read - weight).abs() / scale).max()) > 0.3


def test_eight_bit_floats_are_the_nearest():
    """The largest of a row is 448 s, the largest that e4m3 has; between powers of two lie eight floats, so that none is
    off by more than a 16th of itself; below 2^-6 s they are 2^-9 s apart. Zero stays zero."""
    weight, read = eight_bits("float8")
    scale = weight.abs().amax(1, keepdim=True) / 448
    allowed = torch.maximum(weight.abs() / 16, scale * 2**-10) * 1.001
    assert bool(((read - weight).abs() <= allowed).all()) and not read[:, 5].any()
    assert float(((read - weight).abs() / weight.abs().clamp(min=1e-9)).max()) > 0.04
    step = 2.0 ** ((read / scale).abs().clamp(min=2**-6).log2().floor() - 3)
    apart = read / scale / step
    torch.testing.assert_close(apart, apart.round(), rtol=0, atol=1e-3)


def test_low_bit_mistakes_name_their_key(monkeypatch):
    with pytest.raises(ValueError, match="quant='int3': choose"):
        quantize_weights(nn.Linear(2, 2), "int3")
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ValueError, match="quant=int8 needs torchao, which is not installed"):
        quantize_weights(nn.Sequential(nn.Linear(2, 2)), "int8")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_eight_bit_floats_move_the_logits_little_on_cuda():
    needs_torchao()
    model = make("llamagen").requires_grad_(False).cuda()
    model.trunk.to(torch.bfloat16)
    light = copy.deepcopy(model)
    quantize_weights(light.trunk, "float8")
    canvas, cond = model.arrange(tokens_of(model, 3).cuda()), model.conditioner(LABELS.cuda())
    want, got = (m.head.logits(m(canvas, cond))[0] for m in (model, light))
    assert float((got - want).abs().max() / want.abs().max()) < 0.1


def small_tokenizer():
    torch.manual_seed(0)
    sizes = {"channels": 8, "multipliers": (1, 1, 1, 1), "blocks": 1, "groups": 4, "z_channels": 8}
    return CNNTokenizer(image_size=32, quantizer=VQ(vocab_size=24, channels=6), **sizes).eval()


def test_channels_last_images_are_the_same_and_bfloat16_ones_close():
    tokenizer, tokens = small_tokenizer(), torch.randint(24, (5, 16))
    plain = tokenizer.decode(tokens)
    assert channels_last(tokenizer) > 5
    torch.testing.assert_close(decode_images(tokenizer, tokens), plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(decode_images(tokenizer, tokens, at_once=2), plain, rtol=1e-4, atol=1e-5)
    light = decode_images(tokenizer, tokens, dtype=torch.bfloat16)
    assert light.dtype == torch.float32
    assert float((light - plain).abs().max() / plain.abs().max()) < 0.05  # eight bits of mantissa, a dozen layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("part", ["encode", "decode"])
def test_channels_last_is_counted_where_all_results_are_and_one_that_is_not_fails(part, dtype):
    tokenizer, name = small_tokenizer(), str(dtype).removeprefix("torch.")
    run, given, side = {
        "encode": (encode_images, torch.rand(2, 3, 32, 32) * 2 - 1, tokenizer.encoder),
        "decode": (decode_images, torch.randint(24, (2, 16)), tokenizer.decoder),
    }[part]
    wanted = getattr(paths, f"{part[:-1]}ing")(tokenizer, dtype=dtype)

    def counted(dtype=dtype):
        counters.reset()
        run(tokenizer, given, dtype=dtype)
        return counters.read()

    if part == "encode":  # codes come as channels-last maps, and the convolutions after them follow
        with pytest.raises(ValueError, match=r"taken instead: encode\.channels_first"):
            wanted.check(counted(), part)
    channels_last(tokenizer)
    assert counted() == {f"{part}.{name}": 1, f"{part}.channels_last": 1}
    wanted.check(counted(), part)
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    with pytest.raises(ValueError, match=rf"not taken: {part}\.{name}"):
        wanted.check(counted(other), part)
    last = side.conv_out  # its weights say channels-last, as those of all others do; its result does not
    forward = last.forward
    last.forward = lambda x: forward(x).contiguous()
    with pytest.raises(ValueError, match=rf"{part} fell back.*taken instead: {part}\.channels_first"):
        wanted.check(counted(), part)
    assert f"{part}.channels_last" not in counted()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_light_tokenizer_gives_the_ids_and_images_of_the_plain_one_by_the_paths_asked_for(name):
    needs_packing(torch.float32)
    plain, x, options = make_tokenizer(name).eval(), images(3), Options("tiny", 3, None)
    fast = copy.deepcopy(plain)
    light_tokenizer(fast, torch.float32)
    packed = sum(isinstance(m, PackedLinear) for m in fast.modules())
    assert packed == len(linears(plain)) and not linears(fast)
    tokens = plain.encode(x)
    for part, run, given, want in (
        ("encode", encode_images, x, tokens),
        ("decode", decode_images, tokens, plain.decode(tokens)),
    ):
        counters.reset()
        got = run(fast, given)
        if want.is_floating_point():
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(got, want)
        taken, wanted = counters.read(), asked({}, fast, part, options)
        wanted.check(taken, part)
        assert ("linear.packed" in taken) == ("linear.packed" in wanted.taken), "whatever can be packed was"
        if "linear.packed" in taken:
            with pytest.raises(ValueError, match=r"not taken: linear\.packed"):
                wanted.check({path: n for path, n in taken.items() if path != "linear.packed"}, part)


def test_pipeline_decodes_apart_from_the_generator_and_says_what_does_not_fit():
    parts = make("llamagen"), small_tokenizer()
    labels, seeds = torch.arange(6) % 5, sample_seeds(0, 0, 6)
    want = Pipeline(*parts, chunk=4)(labels, seeds, guidance=2.0)
    got = Pipeline(*parts, chunk=4, decode_chunk=2)(labels, seeds, guidance=2.0)
    assert int((got.int() - want.int()).abs().max()) <= 1  # another batch: the last bit of a convolution
    light = Pipeline(*parts, chunk=4, decoder_dtype=torch.bfloat16)(labels, seeds, guidance=2.0)
    assert float((light.float() - want.float()).abs().mean()) < 2
    uneven = Pipeline(*parts, chunk=4, decode_chunk=3)(labels, seeds, guidance=2.0)
    assert int((uneven.int() - want.int()).abs().max()) <= 1
    with pytest.raises(ValueError, match="cuda_graphs=true needs device=cuda"):
        Pipeline(*parts, cuda_graphs=True)


def test_eight_bits_are_told_to_be_smaller_and_not_faster(tmp_path, capsys, monkeypatch):
    """Unless they are compiled, which is what reads them in one kernel."""
    needs_torchao()
    monkeypatch.setattr("vtok.acceleration.compile_blocks", lambda module: compile_blocks(module, backend="eager"))
    source, chosen = exported(tmp_path / "model"), {"classes": [3], "per_class": 1, "guidance": 1.0, "chunk": 1}
    for quant, fast in ((None, False), ("int8", False), ("int8", True)):
        torch._dynamo.reset()
        sample(settings(source, tmp_path / f"{quant}.npz", **chosen, packed=False, quant=quant, compile=fast))
        said = "quant=int8 halves the memory of the weights, not the time" in capsys.readouterr().out
        assert said == (quant is not None and not fast)


def test_sampling_command_takes_the_keys_and_records_them(tmp_path):
    needs_packing(torch.float32)
    source = exported(tmp_path / "model")
    chosen = {"classes": [3], "per_class": 4, "guidance": 2.0, "chunk": 4}
    sample(settings(source, tmp_path / "plain.npz", **chosen, packed=False))
    sample(settings(source, tmp_path / "packed.npz", **chosen, packed=True, decode_chunk=4))
    plain, packed = (np.load(tmp_path / f"{name}.npz")["arr_0"] for name in ("plain", "packed"))
    assert np.abs(plain.astype(int) - packed).max() <= 1  # equal tokens; products summed in another order
    record = json.loads((tmp_path / "packed.metadata.json").read_text())
    assert record["packed"] is True and record["quant"] is None and record["decode_chunk"] == 4
    for changes, words in [
        ({"cuda_graphs": True}, "cuda_graphs=true needs device=cuda"),
        ({"quant": "int3"}, "quant='int3'"),
        ({"decoder_dtype": "int4"}, "choose float32"),
    ]:
        with pytest.raises(ValueError, match=words):
            sample(settings(source, tmp_path / "x.npz", **chosen, **changes))
