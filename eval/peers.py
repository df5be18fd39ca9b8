"""Original implementations beside ours: how each is built, asked for outputs, sampled and trained, from its checkout.

Nothing of the originals is here. Their modules are imported from the folder that the user names, get random weights,
and are converted by vgen.convert; from then on both sides hold the same numbers. Code that insists on CUDA runs on the
CPU through the stand-ins of `on_cpu`. On CUDA in bfloat16 the originals run as their own scripts do: LlamaGen with its
weights in it, the others under autocast, and so does training on both sides.

What is timed on our side is checked too: the module with its weights as they are stored for sampling, by the sampler
that is timed, which may replay recorded steps.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgen.conditioning import Cond
from vgen.convert import convert
from vgen.guidance import ClassifierFree, Constant, Cosine, Count, Guidance, Linear
from vgen.heads import DrawRule
from vgen.masking import masked_layout
from vgen.samplers.graphs import GraphSampler
from vtok.acceleration import compile_blocks, light_weights
from vtok.layers.trunk import Trunk
from vtok.low_bit import LowBit
from vtok.noise import SampleNoise, sample_seeds

Run = Callable[[], Any]
CPU = torch.device("cpu")
PROGRESS = 0.0  # share of training done, in our training steps
# Of max|ours - original| / max|original|; where both sides compute in float32:
TOLERANCE = 1e-4
# and of logits and states where ours rounds. Measured: 0.008 (bfloat16) and 0.010 (int8) at most on the two blocks of
# size=tiny, 0.014 on GPT-B's twelve. Independent errors add up as the root of the depth: 0.035 for 24 blocks.
LIGHT_TOLERANCE = 0.05
# So too of images, the largest of 200 thousand pixels behind a deep decoder of random weights. Measured in bfloat16:
# 0.031 of VQ-16, 0.042 of TiTok-L, 0.070 of VAR's VQVAE; twice that.
LIGHT_IMAGES = 0.15


@dataclass(frozen=True)
class Options:
    """What is timed. size: the original's name of it, or tiny; steps: of sampling, None for the peer's own. dtype,
    packed, quant: how our trunk's weights are stored for sampling (vtok/acceleration.py). device: of both sides.
    compile: our blocks sample and train through torch.compile. cuda_graphs: our sampling is recorded once and replayed.
    compiled_original: the original's model samples through torch.compile, as its own script does (LlamaGen)."""

    size: str
    batch: int
    steps: int | None
    dtype: torch.dtype = torch.float32
    packed: bool | None = None
    quant: LowBit | None = None
    device: torch.device = CPU
    compile: bool = False
    cuda_graphs: bool = False
    compiled_original: bool = False

    @property
    def light(self) -> bool:
        """Whether the originals and training run in `dtype` too: on the CPU they stay in float32."""
        return self.device.type == "cuda" and self.dtype != torch.float32

    def dtype_of(self, part: str) -> torch.dtype:
        """What our side of this part runs in: on the CPU `dtype` is for sampling and decoding alone."""
        return self.dtype if self.light or part in ("sample", "decode") else torch.float32

    def rounded(self, part: str) -> str | None:
        """How our weights or products are rounded in this part: "bfloat16", "bfloat16 int8"; None: float32 as it is."""
        dtype, quant = self.dtype_of(part), self.quant if part == "sample" else None
        told = [] if dtype == torch.float32 else [str(dtype).removeprefix("torch.")]
        return " ".join([*told, *([quant] if quant else [])]) or None

    def precision(self) -> torch.autocast:
        """What the originals sample, and both sides compute their losses, under."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.light)

    def labels(self) -> Tensor:
        return torch.arange(self.batch, device=self.device)

    def keys(self) -> Tensor:
        """Of our training samples."""
        return sample_seeds(0, 0, self.batch).to(self.device)


class Output(NamedTuple):
    """An output of both sides, ids or values. allowed: the largest difference of values, where ids must be equal; None:
    any, it is only recorded."""

    name: str
    theirs: Tensor
    ours: Tensor
    allowed: float | None = TOLERANCE


def timed(name: str, theirs: Tensor, ours: Tensor, rounded: str | None, light: float = LIGHT_TOLERANCE) -> Output:
    """An output of our side as it is timed. rounded: see Options; then values may differ by `light` and ids in any
    share, and the name says so."""
    if rounded is None:
        return Output(f"timed {name}", theirs, ours)
    if ours.is_floating_point():
        return Output(f"timed {name}, {rounded}, allowed {light}", theirs, ours, light)
    return Output(f"timed {name} that differ, {rounded}, any share allowed", theirs, ours, None)


@dataclass
class Pair:
    """Both sides of a comparison. same: the outputs of the check before any timing; parts: name -> (run of the
    original, run of ours); ours: our module as it is timed; setting: what sampling means here; taught: the outputs of
    the check before training is timed; learning: our module as its training is timed."""

    same: Callable[[], list[Output]]
    parts: dict[str, tuple[Run, Run]]
    ours: nn.Module
    setting: str
    taught: Callable[[], list[Output]] = list
    learning: nn.Module | None = None


SIZES = {  # of size=null
    "llamagen": "GPT-B",
    "llamagen_vq": "VQ-16",
    "var": "d16",
    "var_vqvae": "vae_ch160v4096z32",
    "rar": "rar_b",
    "titok": "titok_l32",
    "xar": "xar_base",
    "mar": "mar_base",
}
SOURCES = {
    "llamagen": "github.com/FoundationVision/LlamaGen",
    "llamagen_vq": "github.com/FoundationVision/LlamaGen",
    "var": "github.com/FoundationVision/VAR",
    "var_vqvae": "github.com/FoundationVision/VAR",
    "rar": "github.com/bytedance/1d-tokenizer",
    "titok": "github.com/bytedance/1d-tokenizer",
    "xar": "github.com/OliverRensu/xAR",
    "mar": "github.com/LTH14/mar",
}


def pair(peer: str, folder: str | None, options: Options) -> Pair:
    """Import the original from `folder` and build both sides. ValueError where there is nothing to import."""
    if peer not in SOURCES:
        raise ValueError(f"peer={peer}: choose {', '.join(SOURCES)}")
    if folder is None or not Path(folder).is_dir():
        raise ValueError(
            f"dir={folder}: no such folder; clone https://{SOURCES[peer]} and pass dir=<the clone> "
            "(this project holds none of its code)"
        )
    sys.path.insert(0, str(Path(folder).resolve()))
    if options.device.type == "cpu":
        on_cpu()
    elif importlib.util.find_spec("flash_attn") is None:
        own_flash()
    torch.manual_seed(0)
    from eval.tokenizer_peers import BUILDERS as TOKENIZERS

    try:
        return (BUILDERS | TOKENIZERS)[peer](Path(folder).resolve(), options)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"dir={folder}: {error}; is it a whole checkout of {SOURCES[peer]}, and is what it needs installed?"
        ) from None


def sized(options: Options, known: Collection[str]) -> str:
    """The size that was asked for. ValueError where the original has no such size."""
    if options.size not in known:
        raise ValueError(f"size={options.size}: choose {', '.join(known)}")
    return options.size


# --- originals on the CPU ---------------------------------------------------------------------------------------------


def on_cpu() -> None:
    """Stand-ins for CUDA-only calls, in this process, with a GPU in the machine or without."""
    torch.Tensor.cuda = lambda self, *a, **k: self
    nn.Module.cuda = lambda self, *a, **k: self
    torch.cuda.amp.autocast = lambda *a, **k: _Nothing()
    torch.backends.cuda.sdp_kernel = lambda *a, **k: contextlib.nullcontext()
    own_flash()


def own_flash() -> None:
    """PyTorch's attention in the place of the package flash_attn, which is not installed."""
    flash = types.ModuleType("flash_attn")
    flash.flash_attn_func = _flash
    flash.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
    sys.modules.setdefault("flash_attn", flash)


class _Nothing(contextlib.ContextDecorator, contextlib.nullcontext):
    """autocast's place: a context, and a decorator."""


def _flash(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal=False):
    """flash_attn_func [B, l, N, E] by PyTorch's own attention."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, None, dropout_p, causal, scale=softmax_scale).transpose(1, 2)


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def exact() -> Iterator[None]:
    """Products and convolutions of the check in float32: CUDA's may be TF32, which keeps ten bits of each factor."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


@contextlib.contextmanager
def resets_kept() -> Iterator[None]:
    """Building VAR's models switches reset_parameters off for the whole process; here only for this block."""
    before = {kind: kind.reset_parameters for kind in (nn.Linear, nn.LayerNorm, nn.Conv2d, nn.Conv1d)}
    try:
        yield
    finally:
        for kind, reset in before.items():
            kind.reset_parameters = reset


def best(probabilities: Tensor, num_samples: int = 1, **_: Any) -> Tensor:
    """torch.multinomial's place in greedy runs."""
    return probabilities.argmax(-1, keepdim=True)


@torch.no_grad()
def fill(module: nn.Module, std: float = 0.02) -> nn.Module:
    """Random weights, norms near one: no path may be closed, as it is at the start of training."""
    norms = {f"{n}.weight" for n, m in module.named_modules() if "norm" in type(m).__name__.lower()}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue  # fixed tables
        parameter.normal_(1.0 if name in norms else 0.0, std)
    return module.eval()


# --- ours -------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def draw(
    model: Any,
    labels: Tensor,
    guide: Guidance,
    rule: DrawRule,
    noise: Any = None,
    sampler: Any = None,
    **options: Any,
) -> Tensor:
    """Tokens in our order, by the family's own sampler unless another one is given."""
    streams = [model.conditioner(labels)] + [model.conditioner.null(len(labels))] * (guide.streams - 1)
    noise = SampleNoise(sample_seeds(0, 0, len(labels)).to(labels.device)) if noise is None else noise
    write = model.sampler if sampler is None else sampler
    canvas = write(model, Cond.cat(streams), noise=noise, guide=guide, rule=rule, **options)
    return model.restore(canvas)


def recorder(model: Any, options: Options) -> GraphSampler | None:
    """The sampler that is timed, where it is not the family's own."""
    return GraphSampler(model) if options.cuda_graphs else None


def drawn(model: Any, labels: Tensor, guide: Guidance, rule: DrawRule, options: Options, **more: Any) -> Run:
    """Our sampling as it is timed."""
    sampler = recorder(model, options)
    return lambda: draw(model, labels, guide, rule, sampler=sampler, **more)


def shipped(run: Run, options: Options) -> Run:
    """The original's sampling as it is timed."""

    def call() -> Any:
        with options.precision():
            return run()

    return call


def learn(model: nn.Module, loss: Callable[[], Tensor], options: Options) -> Run:
    """Forward and backward pass in training mode."""

    def step() -> None:
        model.train()
        model.zero_grad(set_to_none=True)
        with options.precision():
            found = loss()
        found.backward()
        model.eval()

    return step


def trained(model: Any, tokens: Tensor, labels: Tensor, options: Options) -> Run:
    """Our training step; model: as `learner` gives it."""
    return learn(model, our_loss(model, tokens, labels, options), options)


def our_loss(model: Any, tokens: Tensor, labels: Tensor, options: Options) -> Callable[[], Tensor]:
    batch = {"tokens": tokens, "label": labels, "key": options.keys()}
    return lambda: model.loss(batch, progress=PROGRESS)["loss"]


def learner(model: Any, options: Options) -> Any:
    """The model as it is timed in training; a copy where its blocks are compiled."""
    if options.compile:
        model = copy.deepcopy(model)
        compile_blocks(model)
    return model


def taught(ours: Any, timed: Any, tokens: Tensor, labels: Tensor, options: Options) -> list[Output]:
    """Gradients of our loss, without dropout, by the plain module and by the one whose training is timed, with the
    kernels of attention that training has (on CUDA others than evaluation)."""
    if timed is ours and options.device.type == "cpu":
        return []
    found = []
    for model, attention in ((ours, contextlib.nullcontext()), (timed, attending_as_in_training(timed))):
        with attention:
            loss = our_loss(model, tokens, labels, options)()
        weights = [p for p in model.parameters() if p.requires_grad]
        given = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
        found.append(torch.cat([g.flatten() for g in given]))
    return [Output("timed gradients, beside those of blocks as they are", *found)]


@contextlib.contextmanager
def attending_as_in_training(model: nn.Module) -> Iterator[None]:
    """Inside, trunks choose their masks as in training, though the model evaluates: nothing is dropped or drawn."""
    trunks = [m for m in model.modules() if isinstance(m, Trunk)]
    before = [trunk.training for trunk in trunks]
    for trunk in trunks:
        trunk.training = True  # not those inside
    try:
        yield
    finally:
        for trunk, was in zip(trunks, before):
            trunk.training = was


def cast(model: Any, options: Options) -> Any:
    """The trunk's weights as the options say, as Pipeline.load does it; a copy where that changes them."""
    if options.dtype == torch.float32 and options.packed is False and options.quant is None and not options.compile:
        return model
    model = copy.deepcopy(model)
    light_weights(model, options.dtype, packed=options.packed, quant=options.quant, compiled=options.compile)
    return model


@torch.no_grad()
def forced(model: Any, tokens: Tensor, labels: Tensor) -> Tensor:
    """Teacher-forced logits."""
    return model.head.logits(model(model.arrange(tokens), model.conditioner(labels)))[0]


def predicted(
    logits: Tensor,
    greedy: Tensor,
    ours: Any,
    fast: Any,
    tokens: Tensor,
    labels: Tensor,
    guide: Guidance,
    options: Options,
    **more: Any,
) -> list[Output]:
    """The original's logits and greedy tokens [B, n] beside those of our plain module, and of `fast`, which is timed,
    by the sampler that is timed."""
    rule, rounded, n = DrawRule(temperature=0), options.rounded("sample"), greedy.shape[1]
    mine = draw(ours, labels, guide, rule, **more)[:, :n]
    quick = draw(fast, labels, guide, rule, sampler=recorder(fast, options), **more)[:, :n]
    return [
        Output("logits", logits, forced(ours, tokens, labels)),
        Output("greedy tokens", greedy, mine),
        timed("logits", logits, forced(fast, tokens, labels), rounded),
        timed("greedy tokens", greedy, quick, rounded),
    ]


def replayed(fast: Any, labels: Tensor, guide: Guidance, rule: DrawRule, options: Options) -> list[Output]:
    """Latents of recorded steps beside those of the same steps run one by one: a recording makes its own noise, so that
    the original's cannot be put in. The rule is another than the timed one, which is recorded anew."""
    if not options.cuda_graphs:
        return []
    plain, again = (draw(fast, labels, guide, rule, sampler=sampler) for sampler in (None, recorder(fast, options)))
    return [timed("latents of recorded steps, beside the same ones run", plain, again, options.rounded("sample"))]


# --- the peers --------------------------------------------------------------------------------------------------------


def llamagen(folder: Path, options: Options) -> Pair:
    gpt = importlib.import_module("autoregressive.models.gpt")
    sampling = importlib.import_module("autoregressive.models.generate")
    common = {"vocab_size": 16384, "block_size": 256}
    size = sized(options, ("tiny", *gpt.GPT_models))
    if size == "tiny":
        theirs = gpt.Transformer(gpt.ModelArgs(n_layer=2, n_head=2, dim=64, vocab_size=64, block_size=16))
    else:
        theirs = gpt.GPT_models[size](**common)
    fill(theirs)
    ours = convert("llamagen", theirs.state_dict(), {"Transformer_ModelArgs": vars(theirs.config)})
    for side in (theirs, ours):
        side.to(options.device)
    length, labels = ours.layout.length, options.labels()
    tokens = torch.randint(ours.spec.parts[0].vocab_size, (options.batch, length)).to(options.device)
    steps, guide, fast = options.steps or length, ClassifierFree(Constant(4.0)), cast(ours, options)
    learning = learner(ours, options)
    settings = {"cfg_scale": 4.0, "cfg_interval": -1, "temperature": 1.0, "top_p": 1.0}
    quick = copy.deepcopy(theirs).to(options.dtype) if options.light else theirs  # its cache has its weights' dtype
    shown = quick
    if options.compiled_original:  # as its sampling script's --compile
        shown = torch.compile(quick, mode="reduce-overhead", fullgraph=True)

    def plain(model: Any, **also: Tensor) -> Any:
        for layer in model.layers:
            layer.attention.kv_cache = None  # sampling leaves one
        return model(tokens[:, :-1], labels, **also)

    @torch.no_grad()
    def same() -> list[Output]:
        few, every = min(steps, 32), torch.arange(length, device=tokens.device)
        logits = plain(theirs, input_pos=every)[0]
        greedy = sampling.generate(theirs, labels, few, top_k=0, sample_logits=False, **settings).long()
        found = predicted(logits, greedy, ours, fast, tokens, labels, guide, options, stop=few)
        if quick is not theirs:
            told = f"the original's own logits, {options.rounded('sample')}, any allowed"
            found.append(Output(told, logits, plain(quick, input_pos=every)[0], None))
        return found

    parts = {
        "sample": (
            lambda: sampling.generate(shown, labels, steps, top_k=2000, sample_logits=True, **settings),
            drawn(fast, labels, guide, DrawRule(top_k=2000), options, stop=steps),
        ),
        "train": (
            learn(theirs, lambda: plain(theirs, targets=tokens)[1], options),
            trained(learning, tokens, labels, options),
        ),
    }
    setting = f"{steps} tokens, guidance 4, top_k 2000, without decoding"
    return Pair(same, parts, fast, setting, lambda: taught(ours, learning, tokens, labels, options), learning)


def var(folder: Path, options: Options) -> Pair:
    models, module = importlib.import_module("models"), importlib.import_module("models.var")
    size = sized(options, ("tiny", "d16", "d20", "d24", "d30"))
    depth = 2 if size == "tiny" else int(size.removeprefix("d"))
    small = {"V": 64, "Cvae": 8, "ch": 32, "patch_nums": (1, 2, 3, 4), "num_classes": 10} if depth == 2 else {}
    with resets_kept():
        vae, theirs = models.build_vae_var(device="cpu", depth=depth, **small)
    fill(vae.requires_grad_(True)).requires_grad_(False)
    fill(theirs)
    state = {f"var.{k}": v for k, v in theirs.state_dict().items()}
    state |= {f"vae.{k}": v for k, v in vae.state_dict().items() if k.startswith("quantize.")}
    sides = list(theirs.patch_nums)
    arguments = {"VAR": {"patch_nums": sides, "cond_drop_rate": theirs.cond_drop_rate}, "VQVAE": {}}
    ours = convert("var", state, arguments)
    for side in (vae, theirs, ours):
        side.to(options.device)
    theirs.rng = torch.Generator(device=options.device)  # it takes CUDA wherever there is one
    fast, learning, labels = cast(ours, options), learner(ours, options), options.labels()
    tokens = torch.randint(ours.spec.parts[0].vocab_size, (options.batch, ours.layout.length)).to(options.device)
    with exact():
        maps = vae.quantize.idxBl_to_var_input([t.contiguous() for t in tokens.split([s * s for s in sides], dim=1)])
    vae.fhat_to_img = lambda f: f.clone()  # sampling excludes decoding
    guide, draws = ClassifierFree(Linear(5.0)), module.sample_with_top_k_top_p_  # the original's cfg = 4 is 1 + 4

    def sample(top_k: int, top_p: float) -> Tensor:
        with torch.inference_mode():
            return theirs.autoregressive_infer_cfg(
                B=options.batch, label_B=labels, cfg=4, top_k=top_k, top_p=top_p, g_seed=0
            )

    def same() -> list[Output]:
        seen: list[Tensor] = []

        def record(*a: Any, **k: Any) -> Tensor:
            seen.append(draws(*a, **k))
            return seen[-1]

        with torch.no_grad(), replaced(theirs, "cond_drop_rate", 0.0):
            logits = theirs(labels, maps)
        with replaced(module, "sample_with_top_k_top_p_", record):
            sample(1, 0.0)
        greedy = torch.cat([s[:, :, 0] for s in seen], dim=1)
        return predicted(logits, greedy, ours, fast, tokens, labels, guide, options)

    def loss() -> Tensor:
        return F.cross_entropy(theirs(labels, maps).flatten(0, 1), tokens.flatten())

    rule = DrawRule(top_k=min(900, ours.spec.parts[0].vocab_size), top_p=0.95)
    parts = {
        "sample": (shipped(lambda: sample(rule.top_k, 0.95), options), drawn(fast, labels, guide, rule, options)),
        "train": (learn(theirs, loss, options), trained(learning, tokens, labels, options)),
    }
    setting = "ten scales, cfg 4, top_k 900, top_p 0.95, without decoding"
    return Pair(same, parts, fast, setting, lambda: taught(ours, learning, tokens, labels, options), learning)


def rar(folder: Path, options: Options) -> Pair:
    config = importlib.import_module("omegaconf").OmegaConf.load(folder / "configs/training/generator/rar.yaml")
    module, g = importlib.import_module("modeling.rar"), config.model.generator
    if sized(options, ("tiny", "rar_b")) == "tiny":
        g.hidden_size, g.num_hidden_layers, g.num_attention_heads, g.intermediate_size = 32, 2, 2, 64
        g.image_seq_len, config.model.vq_model.codebook_size = 16, 64
    theirs = fill(module.RAR(config))
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_seq_len")
    arguments = {"generator": {name: g[name] for name in names}}
    ours = convert("rar", theirs.state_dict(), {"RAR_config": {"model": arguments}})
    for side in (theirs, ours):
        side.to(options.device)
    fast, learning, labels = cast(ours, options), learner(ours, options), options.labels()
    vocabulary = ours.spec.parts[0].vocab_size
    tokens = torch.randint(vocabulary, (options.batch, ours.layout.length)).to(options.device)
    guide = ClassifierFree(Cosine(float(g.guidance_scale), float(g.guidance_scale_pow)))
    settings = {k: g[k] for k in ("guidance_scale", "randomize_temperature", "guidance_scale_pow")}

    def sample() -> Tensor:
        theirs.set_random_ratio(0.0)
        with torch.inference_mode():
            return theirs.generate(condition=labels, kv_cache=True, **settings)

    def logits() -> Tensor:
        theirs.set_random_ratio(0.0)
        condition = theirs.preprocess_condition(labels, cond_drop_prob=0.0)
        return theirs(tokens, condition, return_labels=True)[0][:, :-1]

    def same() -> list[Output]:
        with replaced(torch, "multinomial", best):
            greedy = sample()
        with torch.no_grad():
            return predicted(logits(), greedy, ours, fast, tokens, labels, guide, options)

    def loss() -> Tensor:
        theirs.set_random_ratio(1.0)  # as ours at the start of training: every sample in its own order
        got, want = theirs(tokens, theirs.preprocess_condition(labels, cond_drop_prob=0.1), return_labels=True)
        return F.cross_entropy(got[:, :-1].flatten(0, 1), want.flatten())

    rule = DrawRule(temperature=float(g.randomize_temperature))
    parts = {
        "sample": (shipped(sample, options), drawn(fast, labels, guide, rule, options)),
        "train": (learn(theirs, loss, options), trained(learning, tokens, labels, options)),
    }
    setting = f"{ours.layout.length} tokens, guidance of rar.yaml, without decoding"
    return Pair(same, parts, fast, setting, lambda: taught(ours, learning, tokens, labels, options), learning)


class Tape:
    """Normal numbers read from left to right, on our side in the place of keyed noise and on theirs of torch.randn."""

    def __init__(self, numbers: Tensor, rows: int) -> None:
        self.numbers, self.seeds, self.at = numbers, torch.zeros(rows, dtype=torch.int64, device=numbers.device), 0

    def take(self, *shape: int) -> Tensor:
        count = int(torch.Size(shape).numel())
        self.at += count
        return self.numbers[self.at - count : self.at].view(shape)

    def normal(self, position: Tensor, channels: int, stream: int = 0) -> Tensor:
        return self.take(len(self.seeds), len(position), channels)


def xar(folder: Path, options: Options) -> Pair:
    module = importlib.import_module("models.xar")
    stack = {"embed_dim": 32, "depth": 2, "num_heads": 2}
    tiny = {f"{side}_{k}": v for side in ("encoder", "decoder") for k, v in stack.items()}
    drops = {"attn_dropout": 0.1, "proj_dropout": 0.1}  # of its training command, and ours
    size = sized(options, ("tiny", *(name for name in vars(module) if name.startswith("xar_"))))
    theirs = fill(module.xAR(**tiny, **drops) if size == "tiny" else getattr(module, size)(**drops))
    heads = theirs.encoder_blocks[0].attn.num_heads
    arguments = {"encoder_num_heads": heads, "decoder_num_heads": heads}
    ours = convert("xar", theirs.state_dict(), {"xAR": arguments})
    for side in (theirs, ours):
        side.to(options.device)
    fast, learning = cast(ours, options), learner(ours, options)
    labels, steps = options.labels(), options.steps or 10
    latents = torch.randn(options.batch, ours.channels, 16, 16).to(options.device)
    tokens, guide = latents.flatten(2).transpose(1, 2), ClassifierFree(Linear(2.7))

    def sample(count: int) -> Tensor:
        with torch.no_grad():
            return theirs.sample_tokens(num_steps=count, cfg=2.7, label=labels)

    def same() -> list[Output]:
        numbers = torch.randn(3 * options.batch * ours.layout.length * ours.channels).to(options.device)
        tape = Tape(numbers, options.batch)
        like = lambda x, **_: tape.take(*x.shape).to(x.dtype)  # noqa: E731
        with replaced(torch, "randn", lambda shape, **_: tape.take(*shape)), replaced(torch, "randn_like", like):
            want = sample(3).flatten(2).transpose(1, 2)
        rule, name = DrawRule(solver="euler_maruyama", solver_steps=3), "latents on one tape of noise"
        mine, quick = (draw(m, labels, guide, rule, noise=Tape(numbers, options.batch)) for m in (ours, fast))
        found = [Output(name, want, mine), timed(name, want, quick, options.rounded("sample"))]
        return found + replayed(fast, labels, guide, rule, options)

    rule = DrawRule(solver="euler_maruyama", solver_steps=steps)
    parts = {
        "sample": (shipped(lambda: sample(steps), options), drawn(fast, labels, guide, rule, options)),
    }
    if options.batch > 1:  # its training takes a batch of one for no batch at all
        theirs_loss = learn(theirs, lambda: theirs(latents, labels), options)
        parts["train"] = (theirs_loss, trained(learning, tokens, labels, options))
    setting = f"4 cells x {steps} Euler-Maruyama steps, guidance 2.7, without decoding"
    return Pair(same, parts, fast, setting, lambda: taught(ours, learning, tokens, labels, options), learning)


def mar(folder: Path, options: Options) -> Pair:
    module, steps = importlib.import_module("models.mar"), options.steps or 16
    stack = {"embed_dim": 32, "depth": 2, "num_heads": 2}
    tiny = {f"{side}_{k}": v for side in ("encoder", "decoder") for k, v in stack.items()}
    tiny["norm_layer"] = functools.partial(nn.LayerNorm, eps=1e-6)  # of all published sizes, not the default
    tiny |= {"img_size": 64, "buffer_size": 4, "diffloss_d": 2, "diffloss_w": 32, "num_sampling_steps": "5"}
    large = {"diffloss_d": 6, "diffloss_w": 1024, "diffusion_batch_mul": 4, "num_sampling_steps": "100"}
    named = sized(options, ("tiny", *(name for name in vars(module) if name.startswith("mar_"))))
    theirs = fill(module.MAR(**tiny) if named == "tiny" else getattr(module, named)(**large))
    given = tiny if named == "tiny" else large
    given = {k: v for k, v in given.items() if not k.startswith(("encoder", "decoder", "norm"))}
    heads = {f"{side}_num_heads": theirs.encoder_blocks[0].attn.num_heads for side in ("encoder", "decoder")}
    ours = convert("mar", theirs.state_dict(), {"MAR": given | heads})
    for net in (theirs, ours):
        net.to(options.device)
    fast, learning = cast(ours, options), learner(ours, options)
    labels, length = options.labels(), ours.layout.length
    fast.layout = masked_layout(fast.spec.layout, steps, "cosine")
    side, channels = int(length**0.5), ours.head.channels
    latents = torch.randn(options.batch, channels, side, side).to(options.device)
    tokens = latents.flatten(2).transpose(1, 2)
    guide = ClassifierFree(Count(2.9, tokens=length))

    @torch.no_grad()
    def same() -> list[Output]:
        known = length // 4
        cells = torch.rand(options.batch, length).argsort(1)[:, :known].sort(1).values.to(options.device)
        mask = torch.ones(options.batch, length, device=options.device).scatter(1, cells, 0.0)
        classes = theirs.class_emb(labels)
        states = theirs.forward_mae_decoder(theirs.forward_mae_encoder(tokens, mask, classes), mask)
        seen = tokens.gather(1, cells.unsqueeze(-1).expand(-1, -1, channels))
        x, t = tokens.flatten(0, 1), torch.randint(1000, (options.batch * length,)).to(options.device)
        net = theirs.diffloss.net(x, t, states.flatten(0, 1))
        mine, quick = (m.states(seen, cells, m.conditioner(labels)) for m in (ours, fast))
        heads = [m.head.mlp(x, t / 1000, h.flatten(0, 1)) for m, h in ((ours, mine), (fast, quick))]
        rounded = options.rounded("sample")
        plain = [Output("states", states, mine), Output("head", net, heads[0])]
        light = [timed("states", states, quick, rounded), timed("head", net, heads[1], rounded)]
        return plain + light + replayed(fast, labels, guide, DrawRule(solver_steps=3), options)

    def sample() -> Tensor:
        with torch.no_grad():
            return theirs.sample_tokens(
                bsz=options.batch, num_iter=steps, cfg=2.9, cfg_schedule="linear", labels=labels, temperature=1.0
            )

    parts = {
        "sample": (shipped(sample, options), drawn(fast, labels, guide, DrawRule(), options)),
        "train": (learn(theirs, lambda: theirs(latents, labels), options), trained(learning, tokens, labels, options)),
    }
    setting = f"{steps} iterations of 100 diffusion steps, guidance 2.9, without decoding"
    return Pair(same, parts, fast, setting, lambda: taught(ours, learning, tokens, labels, options), learning)


BUILDERS = {"llamagen": llamagen, "var": var, "rar": rar, "xar": xar, "mar": mar}
