"""Faster and smaller ways to the same numbers: pieces of the cross-entropy, compiled and recomputed blocks, MFU."""

import mmap
import platform
import subprocess
import sys
from dataclasses import replace

import pytest
import tokenizers
import torch
import torch.nn.functional as F
from generators import FAMILIES, also_read, make, map_spec, scale_spec, tokens_of
from runs import CONFIGS, LLAMAGEN, losses, run, tokenizer_folder
from test_generators import LABELS, draw
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vgen.cross_entropy import LightProduct, light, linear_cross_entropy, summed_in_float32
from vgen.generator import Canvas
from vgen.guidance import guidance
from vgen.heads import DrawRule
from vgen.heads_factorised import FactorisedHead
from vgen.models.hita import PartHead
from vtok import counters
from vtok.acceleration import (
    checkpoint_blocks,
    compile_blocks,
    matmul_parameters,
    pairs,
    peak_rate,
    training_operations,
    utilisation,
)
from vtok.layers.attention import attend
from vtok.layers.block import FeedForward
from vtok.layers.trunk import Trunk
from vtok.layout import SequenceLayout, visible
from vtok.noise import sample_seeds
from vtok.quantize.factors import split


def batch_of(model):
    batch = {"tokens": tokens_of(model, 3), "label": torch.tensor([0, 1, 2]), "key": sample_seeds(0, 0, 3)}
    return batch | also_read(model, 3)


def gradients(model, batch):
    model.zero_grad()
    loss = model.loss(batch, progress=0.5)["loss"]
    loss.backward()
    return loss.detach(), {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("most", [1, 40, 100, 10**6])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_pieces_of_the_cross_entropy_have_its_value_and_gradients(monkeypatch, most, bias, smoothing):
    monkeypatch.setattr("vgen.cross_entropy.MOST", most)
    torch.manual_seed(0)
    h, weight = torch.randn(11, 6, dtype=torch.float32, requires_grad=True), torch.randn(20, 6, requires_grad=True)
    offset = torch.randn(20, requires_grad=True) if bias else None
    target, scale = torch.randint(20, (11,)), torch.randn(11)
    leaves = [h, weight] + ([offset] if bias else [])
    want = F.cross_entropy(F.linear(h, weight, offset), target, reduction="none", label_smoothing=smoothing)
    got = linear_cross_entropy(h, weight, offset, target, smoothing=smoothing)
    torch.testing.assert_close(got, want)
    wanted = torch.autograd.grad((want * scale).sum(), leaves)
    for a, b in zip(torch.autograd.grad((got * scale).sum(), leaves), wanted, strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(h, weight, offset, target, smoothing=smoothing), want)


def test_the_light_product_is_that_of_rounded_numbers_summed_in_float32():
    torch.manual_seed(0)
    x, weight = torch.randn(11, 64, requires_grad=True), torch.randn(20, 64, requires_grad=True)
    given = torch.randn(11, 20)
    got = LightProduct.apply(x, weight)
    rounded = [t.detach().bfloat16().double() for t in (x, weight, given)]
    assert got.dtype is torch.float32
    torch.testing.assert_close(got.double(), rounded[0] @ rounded[1].T, rtol=1e-6, atol=1e-5)
    of_x, of_weight = torch.autograd.grad(got, (x, weight), given)
    torch.testing.assert_close(of_x.double(), rounded[2] @ rounded[1], rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(of_weight.double(), rounded[2].T @ rounded[0], rtol=1e-6, atol=1e-5)
    assert LightProduct.apply(x.bfloat16(), weight).equal(got)
    # the call that CUDA gets exists, and gives float32
    a, b = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in ((11, 64), (64, 20)))
    assert torch.mm(a, b, out_dtype=torch.float32).dtype is torch.float32


@pytest.mark.parametrize("most", [40, 10**6])
@pytest.mark.parametrize("bias", [True, False])
def test_training_rounds_what_the_head_multiplies_where_it_is_light(monkeypatch, most, bias):
    """The value and gradients of rounded states and weights; pieces and whole logits agree."""
    monkeypatch.setattr("vgen.cross_entropy.MOST", most)
    monkeypatch.setattr("vgen.cross_entropy.light", lambda h: torch.is_grad_enabled())
    torch.manual_seed(0)
    h, weight = torch.randn(11, 6, requires_grad=True), torch.randn(20, 6, requires_grad=True)
    offset = torch.randn(20, requires_grad=True) if bias else None
    target, leaves = torch.randint(20, (11,)), [h, weight] + ([offset] if bias else [])
    near = [t.detach().bfloat16().float().requires_grad_() for t in (h, weight)]
    want = F.cross_entropy(F.linear(*near, offset), target, reduction="none")
    counters.reset()
    got = linear_cross_entropy(h, weight, offset, target)
    assert counters.read()["head.bfloat16"] == 1 and "head.float32" not in counters.read()
    torch.testing.assert_close(got, want)
    wanted = torch.autograd.grad(want.sum(), near + leaves[2:])
    for a, b in zip(torch.autograd.grad(got.sum(), leaves), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)  # the gradient of the logits is rounded too
    with torch.no_grad():  # a likelihood is not
        exact = F.cross_entropy(F.linear(h, weight, offset), target, reduction="none")
        torch.testing.assert_close(linear_cross_entropy(h, weight, offset, target), exact)


def test_the_product_is_float32_on_the_cpu_and_without_autocast():
    h = torch.randn(3, 4, requires_grad=True)
    assert not light(h) and not light(h.detach())
    with torch.autocast("cpu", torch.bfloat16):
        assert not light(h)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this product is for a CUDA device")
def test_training_under_autocast_rounds_the_heads_product_on_cuda():
    torch.manual_seed(0)
    h, weight = torch.randn(11, 64), torch.randn(200, 64)
    a, b = h.bfloat16(), weight.bfloat16().T
    torch.testing.assert_close(summed_in_float32(a.cuda(), b.cuda()).cpu(), summed_in_float32(a, b))
    target, found = torch.randint(200, (11,)), []
    for device in ("cuda", "cpu"):
        leaves = [t.to(device).requires_grad_() for t in (h, weight)]
        counters.reset()
        with torch.autocast(device, torch.bfloat16):
            loss = linear_cross_entropy(*leaves, None, target.to(device))
        assert counters.read()["head.bfloat16" if device == "cuda" else "head.float32"] == 1
        found.append([x.cpu() for x in (loss, *torch.autograd.grad(loss.sum(), leaves))])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def whole_parts(head, h, target):
    return F.cross_entropy(head.logits(h)[0].transpose(1, 2), target, reduction="none")


def whole_factors(head, h, target):
    parts = split(target, head.factors).unbind(-1)
    logits = head.logits(h, None if head.trunk is None else target)
    return sum(F.cross_entropy(x.transpose(1, 2), ids, reduction="none") for x, ids in zip(logits, parts))


HEADS = {
    "parts": (lambda: PartHead(dim=8, parts=((4, 30), (9, 20))), whole_parts),
    "factors": (lambda: FactorisedHead(dim=8, factors=(4, 5), bias=True), whole_factors),
    "factors in turn": (lambda: FactorisedHead(dim=8, factors=(4, 5), depth=1, heads=2), whole_factors),
}


@pytest.mark.parametrize("most", [1, 60, 10**6])
@pytest.mark.parametrize("name", HEADS)
def test_pieces_of_every_head_have_the_value_and_gradients_of_whole_logits(monkeypatch, name, most):
    monkeypatch.setattr("vgen.cross_entropy.MOST", most)
    torch.manual_seed(0)
    head, whole = HEADS[name][0](), HEADS[name][1]
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    h, scale = torch.randn(3, 13, 8, requires_grad=True), torch.randn(3, 13)
    target, leaves = torch.randint(20, (3, 13)), [h, *head.parameters()]
    want = whole(head, h, target)
    counters.reset()
    got = head.loss(h, target, (1,) * 13)
    ways = {path: times for path, times in counters.read().items() if path.startswith("loss")}
    assert ways == {"loss.whole" if most > 60 else "loss.pieces": 2}
    torch.testing.assert_close(got, want)
    wanted = torch.autograd.grad((want * scale).sum(), leaves)
    for a, b in zip(torch.autograd.grad((got * scale).sum(), leaves), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(head.log_prob(h, target, (1,) * 13), -want)


@pytest.mark.parametrize("most", [1, 200, 10**6])
def test_pieces_of_maskgit_have_the_value_and_gradients_of_whole_logits(monkeypatch, most):
    monkeypatch.setattr("vgen.cross_entropy.MOST", most)
    model = make("maskgit")
    batch = batch_of(model)
    target, hidden = batch["tokens"], model.hide(batch)
    h = model(Canvas(target, model.layout, known=~hidden), model.conditioner(batch["label"]))
    logits = model.head.logits(h)[0].transpose(1, 2)
    weight = torch.where(hidden, 1.0, 0.1)
    smooth = F.cross_entropy(logits, target, reduction="none", label_smoothing=0.1)
    want, leaves = (smooth * weight).sum() / weight.sum(), [p for p in model.parameters() if p.requires_grad]
    plain = F.cross_entropy(logits, target, reduction="none").detach()
    wanted = torch.autograd.grad(want, leaves, allow_unused=True)
    counters.reset()
    got = model.loss(batch)
    assert counters.read() == {"loss.whole" if most > 200 else "loss.pieces": 1, "head.float32": 1}
    torch.testing.assert_close(got["loss"], want)
    torch.testing.assert_close(got["nats"], (plain * hidden).sum(1, keepdim=True) / hidden.sum(1, keepdim=True))
    assert not got["nats"].requires_grad
    for a, b in zip(torch.autograd.grad(got["loss"], leaves, allow_unused=True), wanted, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_no_more_than_one_piece_of_logits_is_kept_for_the_backward_pass(monkeypatch):
    monkeypatch.setattr("vgen.cross_entropy.MOST", 8000)
    kept = []
    h, weight = torch.randn(64, 4, requires_grad=True), torch.randn(1000, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        linear_cross_entropy(h, weight, None, torch.zeros(64, dtype=torch.int64))
    assert max(kept, default=0) < 8000


@pytest.mark.parametrize("name", FAMILIES)
def test_recomputed_blocks_give_the_same_gradients(name):
    plain, light = make(name).train(), make(name).train()
    if not any(isinstance(m, Trunk) for m in light.modules()):
        with pytest.raises(ValueError, match="no transformer blocks"):
            checkpoint_blocks(light)
        return
    assert checkpoint_blocks(light) >= 1
    torch.manual_seed(1)
    loss, want = gradients(plain, batch_of(plain))
    torch.manual_seed(1)
    again, got = gradients(light, batch_of(light))
    torch.testing.assert_close(again, loss)
    for key in want:
        torch.testing.assert_close(got[key], want[key], msg=key)


@pytest.mark.parametrize(
    "name, stacks, place",
    [
        ("restok", 2, "encoder.trunk.blocks.1"),  # walked one by one, between the merges
        ("dar", 3, "flow.blocks.1"),
        ("gigatok", 2, "to_tokens.layers.1"),
        ("retok", 2, "network.to_grid.layers.1"),
    ],
)
def test_blocks_of_tokenizers_run_twice_and_their_gradients_stay(name, stacks, place):
    found, calls = [], []
    for again in (False, True):
        model = tokenizers.make(name).train()
        if again:
            assert checkpoint_blocks(model) == stacks
        model.get_submodule(place).register_forward_pre_hook(lambda module, inputs: calls.append(again))  # noqa: B023
        recon = model(tokenizers.images(), key=torch.tensor([1, 2, 3]))
        (recon.images.square().mean() + sum(recon.losses.values())).backward()
        found.append({k: p.grad for k, p in model.named_parameters() if p.grad is not None})
    assert calls.count(False) == 1 and calls.count(True) == 2
    plain, light = found
    assert plain.keys() == light.keys()
    for key in plain:
        torch.testing.assert_close(light[key], plain[key], msg=key)


@pytest.mark.parametrize("name", ["llamagen", "var"])
def test_compiled_blocks_give_the_same_loss_and_gradients(name):
    """The eager backend: what dynamo captures, without a C++ compiler."""
    options = {} if name == "var" else {"dropout": 0.0, "token_dropout": 0.0}
    plain, fast = make(name, **options).train(), make(name, **options).train()
    if name == "var":
        for model in (plain, fast):
            for block in model.trunk.blocks:
                block.drop_path.rate = 0.0
    torch._dynamo.reset()
    assert compile_blocks(fast, backend="eager") == len(fast.trunk.blocks)
    assert fast.state_dict().keys() == plain.state_dict().keys()
    loss, want = gradients(plain, batch_of(plain))
    again, got = gradients(fast, batch_of(fast))
    torch.testing.assert_close(again, loss)
    for key in want:
        torch.testing.assert_close(got[key], want[key], msg=key)


def test_compiled_blocks_are_whole_with_a_cache_too_and_a_break_is_an_error(monkeypatch):
    plain, fast, seeds = make("llamagen"), make("llamagen"), sample_seeds(0, 0, 3)
    torch._dynamo.reset()
    compile_blocks(fast, backend="eager")
    want, got = (draw(m, LABELS, seeds, guidance(2.0), DrawRule(top_k=9), stop=4).tokens for m in (plain, fast))
    assert torch.equal(got, want)
    run = FeedForward.forward
    monkeypatch.setattr(FeedForward, "forward", lambda self, x: torch._dynamo.graph_break() or run(self, x))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="graph_break"):
        fast.loss(batch_of(fast))


def test_modules_without_blocks_cannot_be_compiled():
    with pytest.raises(ValueError, match="compile=true"):
        compile_blocks(nn.Linear(2, 2))


@pytest.mark.parametrize(
    "layout",
    [
        SequenceLayout.raster(3, 4),
        SequenceLayout.scales((1, 2, 3)),
        SequenceLayout((1,) * 4, tuple((0, 0, i) for i in range(4)), (2, 1, 1, 1), (True, False, False, False)),
    ],
)
def test_pairs_are_the_ones_in_the_mask(layout):
    ranks = layout.ranks()
    assert pairs(layout) == int(visible(ranks, ranks).sum())
    assert torch.equal(layout.ranks(device=torch.device("cpu")), ranks), "made on the device, not copied there"


def test_operations_in_closed_form():
    """LlamaGen: depth (4 D^2 + 3 D H) and V D parameters; L positions; L (L + 1) / 2 pairs."""
    model = make("llamagen")
    depth, width, length, vocabulary = 2, 16, 16, 24
    hidden = model.trunk.blocks[0].ffn.down.in_features
    dense = depth * (4 * width**2 + 3 * width * hidden)
    assert matmul_parameters(model.trunk) == dense
    want = 6 * (dense + vocabulary * width) * length + 12 * width * depth * length * (length + 1) / 2
    assert training_operations(model) == want


def test_operations_are_what_torch_counts_up_to_attention_and_modulation():
    """Forward and backward of the matrix products alone; torch counts attention as if every pair were seen."""
    model = make("llamagen", dropout=0.0, token_dropout=0.0)
    batch, layout = batch_of(model), model.layout
    with FlopCounterMode(display=False) as counter:
        model.loss(batch)["loss"].backward()
    counted = sum(v for k, v in counter.get_flop_counts()["Global"].items() if "attention" not in str(k))
    ours = training_operations(model) - 12 * model.trunk.dim * len(model.trunk.blocks) * pairs(layout)
    assert counted == pytest.approx(3 * ours)


TRUNKS = ["llamagen", "gigatok_adaln", "gigatok_shared", "rar", "var", "var_shared_modulation", "flexvar", "har"]


@pytest.mark.parametrize("name", [*TRUNKS, "hita"])
def test_operations_are_those_that_torch_counts_in_trunk_and_head(name):
    """Projections of condition vectors too: RAR has one a position, the others one an image."""
    model = make(name)
    canvas, cond = model.arrange(tokens_of(model, 3)), model.conditioner(torch.tensor([0, 1, 2]))
    inputs = replace(model.inputs(canvas, cond, 0, model.layout.steps), at={})
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.trunk(inputs)
    found = counter.get_flop_counts()["Global"].items()
    products = sum(v for k, v in found if not any(word in str(k) for word in ("attention", "bmm")))
    head = 2 * 3 * model.head.linear.weight.numel() * model.layout.length
    if name == "hita":  # a token passes the rows of its own part
        head = 2 * 3 * 16 * sum(count * size for count, size in model.head.parts)
    ours = training_operations(model) - 12 * model.trunk.dim * len(model.trunk.blocks) * pairs(model.layout)
    assert products + head == ours, "forward of three images is what forward and backward of one are"


STACKED = ["xar_token", "xar_cell", "xar_scale", "xar_image", "flowar", "flowar_cross", "ecar", "dtm", "artm", "fhtm"]
STACKED += ["orthus", "orthus_linear"]
FACTORISED = ["llamagen_factorised", "llamagen_factorised_depth", "llamagen_factorised_tied"]


@pytest.mark.parametrize("name", ["mar", "mar_flow", "flexvar", *FACTORISED, *STACKED, "maskgit", "maskgit_uvit"])
def test_operations_are_those_of_a_pass_of_the_loss(name, monkeypatch):
    """Thrice the forward pass of the loss of one sample, which has no padding: MAR shows and hides its own number of
    tokens, FlexVAR draws its list, a block flow head passes step after step. Torch counts the products; attention, of
    which it would count pairs that do not see each other, is counted by its masks. What FlexVAR embeds before the trunk
    is left out, 2 % at this width of 16."""
    options = {"dropout": 0.0, "attention_dropout": 0.0} if name.startswith(("mar", "maskgit")) else {}
    if name == "flexvar":
        options = {"spec": map_spec((1, 2, 3, 4, 5)), "sides": (1, 3, 5), "sample_scales": True}
    model, attended, found = make(name, **options).train(), [], []

    def watched(q, k, v, *, mask=None, **rest):
        shape = (len(q), 1, q.shape[2], k.shape[2])
        seen = torch.ones(shape[2:]).tril() if mask == "causal" else torch.ones(()) if mask is None else mask
        attended.append(4 * q.shape[1] * q.shape[3] * int(seen.expand(shape).sum()))
        return attend(q, k, v, mask=mask, **rest)

    monkeypatch.setattr("vtok.layers.attention.attend", watched)
    monkeypatch.setattr("vtok.layers.dit.attend", watched)
    for key in sample_seeds(0, 0, 5).split(1):
        drawer = torch.Generator().manual_seed(int(key) % 100)
        tokens = torch.randint(24, (1, 55), generator=drawer) if name == "flexvar" else tokens_of(model, 1)
        attended.clear()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.loss({"tokens": tokens, "label": torch.tensor([1]), "key": key})
        products = sum(v for k, v in counter.get_flop_counts()["Global"].items() if "attention" not in str(k))
        found.append(training_operations(model, key))
        assert found[-1] == pytest.approx(3 * (products + sum(attended)), rel=0.03 if name == "flexvar" else 1e-12)
        assert name == "flexvar" or attended
    assert (len(set(found)) > 1) == model.drawn_operations
    together = training_operations(model, sample_seeds(0, 0, 5))  # a batch shares its list, and has its own counts
    assert together == pytest.approx(found[0] if name == "flexvar" else sum(found) / 5)


def test_operations_of_what_is_drawn_are_a_mean_where_no_samples_are_given():
    mar, flexvar = make("mar"), make("flexvar", spec=map_spec((1, 2, 3, 4, 5)), sides=(1, 3, 5), sample_scales=True)
    others = sample_seeds(1, 0, 4000)
    assert training_operations(mar) == pytest.approx(training_operations(mar, others), rel=0.01)
    drawn = [training_operations(flexvar, key) for key in others[:300].split(1)]
    assert training_operations(flexvar) == pytest.approx(sum(drawn) / 300, rel=0.05), "a standard error of 2 %"


def test_utilisation_is_the_share_of_the_peak_and_unknown_without_one():
    assert utilisation(100.0, 2e9, 1e12, 2) == pytest.approx(0.1)
    assert utilisation(100.0, None, 1e12, 1) is None and utilisation(100.0, 2e9, None, 1) is None
    assert peak_rate(torch.device("cpu")) is None
    assert training_operations(nn.Linear(1, 1)) is None
    assert training_operations(make("var")) > 0 and len(scale_spec().layout.sizes) == 4


def test_training_command_takes_both_keys(tmp_path, capsys, monkeypatch):
    """The same losses with recomputed and compiled blocks (dynamo's eager backend); MFU where a peak is known."""
    monkeypatch.setattr("vgen.training.compile_blocks", lambda module: compile_blocks(module, backend="eager"))
    monkeypatch.setattr("vtok.callbacks.peak_rate", lambda device: 1e12)
    source = tokenizer_folder(tmp_path / "tokenizer")
    options = (*LLAMAGEN, f"tokenizer_from={source}", "steps=2", "model.dropout=0.0", "val_batches=1")
    rows = []
    for name, keys in {"plain": (), "light": ("checkpointing=true",), "fast": ("compile=true",)}.items():
        run(*options, *keys, f"run_dir={tmp_path / name}")
        rows.append([row["train/loss"] for row in losses(tmp_path / name) if "train/loss" in row])
    assert len(rows[0]) == 2 and rows[0] == rows[1]
    assert [float(x) for x in rows[2]] == pytest.approx([float(x) for x in rows[0]], rel=1e-5)
    said = capsys.readouterr().out
    assert "MFU" in said and "= 6 matmul parameters x positions + 6 modulation parameters x vectors + 12 width" in said
    with pytest.raises(ValueError, match="compile=true"):
        run("data=fake", "tokenizer=llamagen_vq16", "data.image_size=16", "compile=true", f"run_dir={tmp_path / 'x'}")


@pytest.mark.parametrize("there", [True, False])
def test_bf16_without_its_instructions_is_told_to_be_slow(tmp_path, capsys, monkeypatch, there):
    monkeypatch.setattr("vgen.training.cpu_has_bf16", lambda: there)
    tiny = ("data=fake", "tokenizer=llamagen_vq16", "data.image_size=16", "tokenizer.channels=8", "trainer=cpu")
    tiny += ("tokenizer.groups=4", "objective.perceptual_weight=0", "steps=1", "batch_size=2", "save=false")
    run(*tiny, "precision=bf16-mixed", "val_batches=1", "picture_every=null", f"run_dir={tmp_path / 'run'}")
    said = capsys.readouterr().out
    assert ("no bf16 instructions" in said and "precision=32-true" in said) != there


FAULTS = """
import resource, sys, torch
torch.set_num_threads(1)
if sys.argv[1] == "kept":
    from vtok.acceleration import keep_memory
    assert keep_memory()

def write():
    for tensor in [torch.empty(2**24) for _ in range(int(sys.argv[2]))]:
        tensor.fill_(1.0)

for _ in range(3):
    write()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(int(sys.argv[3])):
    write()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_memory_that_was_freed_is_used_again():
    """Tensors of 64 MiB, one at a time and 2.1 GiB of them at once: pages that the system had to hand out."""

    def faults(way, count, rounds):
        command = [sys.executable, "-c", FAULTS, way, str(count), str(rounds)]
        return int(subprocess.run(command, capture_output=True, check=True, cwd=CONFIGS.parent).stdout)

    assert 4 * faults("kept", 1, 32) < faults("plain", 1, 32), "but for pieces that alignment may cost"
    assert 2 * faults("kept", 34, 1) < 34 * 2**26 / mmap.PAGESIZE
