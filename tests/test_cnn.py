"""The convolutional autoencoder and the tokenizers built on it."""

from __future__ import annotations

import re
from contextlib import ExitStack, nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fake_cuda import autocast_on_cuda, fake_cuda
from omegaconf import OmegaConf
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from vtok.checkpoint import CheckpointError, load_folder, save_folder
from vtok.config import build, describe, instantiate
from vtok.data.transforms import to_uint8
from vtok.layers import group_norm
from vtok.layers.cnn import Attention2d, Decoder, Downsample, Encoder, Upsample, from_map, to_map
from vtok.layers.group_norm import Norm
from vtok.layout import SequenceLayout
from vtok.models import FAMILIES
from vtok.models.cnn import CNNTokenizer
from vtok.models.var import VARTokenizer
from vtok.quantize.fsq import FSQ
from vtok.quantize.residual import MultiScaleVQ
from vtok.quantize.vq import VQ
from vtok.tokenizer import Tokenizer, TokenSpec

CONFIGS = sorted((Path(__file__).parents[1] / "configs" / "tokenizer").glob("*.yaml"))
SMALL = dict(channels=8, multipliers=[1, 2], blocks=1, groups=4)


def tokenizer(name: str, **options):
    torch.manual_seed(0)
    if name == "var":
        quantizer = MultiScaleVQ(vocab_size=32, channels=4, sides=[1, 2, 4, 8])
        nn.init.normal_(quantizer.codebook.weight)
        return VARTokenizer(image_size=16, quantizer=quantizer, z_channels=None, projection=3, **(SMALL | options))
    quantizer = VQ(vocab_size=32, channels=4) if name == "vq" else FSQ(levels=[4, 3, 3])
    return CNNTokenizer(image_size=16, quantizer=quantizer, z_channels=6, **(SMALL | options))


NAMES = ("vq", "fsq", "var")


def images(count: int = 2, size: int = 16) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# --- layers ----------------------------------------------------------------------------------------------------------


def test_downsample_pads_right_and_bottom():
    layer = Downsample(1)
    nn.init.ones_(layer.conv.weight)
    nn.init.zeros_(layer.conv.bias)
    assert layer(torch.ones(1, 1, 4, 4))[0, 0].tolist() == [[9, 6], [6, 4]]


def test_upsample_repeats_pixels():
    layer = Upsample(1)
    nn.init.zeros_(layer.conv.bias)
    nn.init.zeros_(layer.conv.weight)
    layer.conv.weight.data[0, 0, 1, 1] = 1
    x = torch.randn(1, 1, 3, 2)
    assert torch.equal(layer(x), x.repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_attention_is_a_softmax_over_positions():
    layer = Attention2d(8, 4).double()
    x = torch.randn(2, 8, 3, 5, dtype=torch.float64)
    q, k, v = layer.qkv(layer.norm(x)).flatten(2).split(8, dim=1)
    weights = (torch.einsum("bci,bcj->bij", q, k) / 8**0.5).softmax(-1)
    want = x + layer.out(torch.einsum("bij,bcj->bci", weights, v).view_as(x))
    torch.testing.assert_close(layer(x), want)


def test_every_norm_has_the_small_epsilon():
    for module in (Encoder(out_channels=4, channels=32), Decoder(in_channels=4, channels=32)):
        norms = [m for m in module.modules() if isinstance(m, nn.GroupNorm)]
        assert norms and all(m.eps == 1e-6 and m.num_groups == 32 for m in norms)


@pytest.mark.parametrize("attention", (True, False))
@pytest.mark.parametrize("mid_attention", (True, False))
def test_attention_stands_at_the_last_level_and_in_the_middle(attention, mid_attention):
    options = dict(channels=8, multipliers=[1, 2, 3], groups=4, attention=attention, mid_attention=mid_attention)
    encoder = Encoder(out_channels=5, blocks=2, **options)
    decoder = Decoder(in_channels=5, blocks=3, **options)
    for module, blocks, last in ((encoder, 2, 2), (decoder, 3, 0)):
        places = {name for name, m in module.named_modules() if isinstance(m, Attention2d)}
        want = {f"levels.{last}.attention.{i}" for i in range(blocks)} if attention else set()
        assert places == want | ({"mid.1"} if mid_attention else set())
        assert len(module.mid) == 2 + mid_attention
    features = encoder(torch.randn(2, 3, 12, 8))
    assert features.shape == (2, 5, 3, 2) and decoder(features).shape == (2, 3, 12, 8)


def test_a_shift_of_the_stride_shifts_the_features():
    # away from the border a network without attention is a convolution with stride 4, up to the norms' statistics:
    # without them it is one exactly, which wrong padding or a wrong order of levels breaks
    module = Encoder(out_channels=2, channels=4, multipliers=[1, 1, 1], groups=1, attention=False, mid_attention=False)
    for name, child in list(module.named_modules()):
        if isinstance(child, nn.GroupNorm):
            parent = module.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], nn.Identity())
    x = torch.randn(1, 3, 128, 128)
    moved = torch.roll(x, (4, 8), (2, 3))
    torch.testing.assert_close(module(moved)[..., 14:18, 15:19], module(x)[..., 13:17, 13:17], rtol=1e-4, atol=1e-6)


def test_options_of_maskgits_vqgan():
    """Averages of 2 x 2 between the levels, and a block that loses its input where the width changes."""
    encoder = Encoder(out_channels=4, **SMALL, downsample="average", shortcut="branch", bias=False)
    x = torch.randn(1, 8, 4, 6)
    want = x.unflatten(3, (3, 2)).unflatten(2, (2, 2)).mean((3, 5))
    torch.testing.assert_close(encoder.levels[0].resample(x), want)
    block, same = encoder.levels[1].blocks[0], encoder.levels[0].blocks[0]
    nn.init.zeros_(block.conv2.weight)
    nn.init.zeros_(same.conv2.weight)
    assert not block(x).any() and torch.equal(same(x), x)


@pytest.mark.parametrize(
    "options, word",
    (
        ({"groups": 3}, "groups"),
        ({"multipliers": []}, "multipliers"),
        ({"downsample": "max"}, "downsample='max': choose asymmetric, symmetric or average"),
        ({"shortcut": "both"}, "shortcut='both': choose input or branch"),
    ),
)
def test_wrong_options_are_named(options, word):
    with pytest.raises(ValueError, match=word):
        Encoder(out_channels=4, channels=8, **({"groups": 4} | options))


def test_maps_and_tokens_are_inverse():
    x = torch.randn(2, 5, 3, 4)
    assert torch.equal(to_map(from_map(x), 3), x)
    assert torch.equal(to_map(from_map(x).flatten(1, 2), 3), x)


# --- tokenizers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, said",
    (
        (lambda x: x.permute(0, 2, 3, 1), r"expected float \[B, 3, H, W\] in \[-1, 1\]"),
        (lambda x: to_uint8(x).permute(0, 3, 1, 2), "torch.uint8, expected float"),
        (lambda x: to_uint8(x).permute(0, 3, 1, 2).float(), r"images reach 25\d, .* images / 127.5 - 1 from 0..255"),
        (lambda x: x.numpy(), "images are a ndarray, expected a float tensor"),
        (lambda x: x[..., :15], "must be multiples of the stride 2"),
    ),
)
def test_images_that_are_none_are_named(change, said):
    with pytest.raises(ValueError, match=said):
        tokenizer("vq").encode(change(images()))


def test_a_tokenizer_is_loaded_by_its_class(tmp_path):
    """Tokenizer.load of a folder, a checkpoint's mistakes, and the way to published ones."""
    made = tokenizer("vq").eval()
    save_folder(made, tmp_path / "vq")
    for cls in (Tokenizer, CNNTokenizer):
        found = cls.load(tmp_path / "vq")
        assert not found.training and torch.equal(found.encode(images()), made.encode(images()))
    (tmp_path / "run" / "tokenizer").mkdir(parents=True)
    for cls, path, said in (
        (VARTokenizer, tmp_path / "vq", "vq holds a CNNTokenizer, expected a VARTokenizer"),
        (Tokenizer, tmp_path / "run", "run holds a generator: give its tokenizer, .*run/tokenizer"),
        (Tokenizer, "zoo:llamagen-vq16", r"`python scripts/convert.py from=zoo:llamagen-vq16 out=<folder>` makes it"),
        (Tokenizer, "hf:me/mine", "`hf download me/mine --local-dir <folder>` makes it"),
        (Tokenizer, tmp_path / "none", "none does not exist: give a run directory"),
    ):
        with pytest.raises(CheckpointError, match=said):
            cls.load(path)


@pytest.mark.parametrize("name", NAMES)
def test_encode_then_decode_is_forward(name):
    module = tokenizer(name).eval()
    recon = module(images())
    tokens = module.encode(images())
    module.spec.check(tokens)
    assert torch.equal(tokens, recon.tokens)
    torch.testing.assert_close(module.decode(tokens), recon.images, rtol=1e-5, atol=1e-5)
    assert torch.equal(module.embed(tokens), module.quantizer.lookup(tokens))


@pytest.mark.parametrize("name", NAMES)
def test_training_reaches_every_parameter(name):
    module = tokenizer(name).train()
    recon = module(images())
    (recon.images.square().mean() + sum(recon.losses.values())).backward()
    unused = {n for n, p in module.named_parameters() if p.grad is None or not p.grad.any()}
    if name == "var":  # four scales: the table uses all four convolutions
        assert module.quantizer.shared == (0, 1, 2, 3)
    assert not unused
    assert module.last_layer is module.decoder.conv_out.weight


@pytest.mark.parametrize("name", NAMES)
def test_a_few_steps_fit_one_batch(name):
    module = tokenizer(name, attention=False).train()
    optimizer = torch.optim.Adam(module.parameters(), 3e-3)
    batch, errors = images(2), []
    for _ in range(60):
        recon = module(batch)
        errors.append((recon.images - batch).square().mean())
        optimizer.zero_grad()
        (errors[-1] + sum(recon.losses.values())).backward()
        optimizer.step()
    assert errors[-1] < 0.5 * errors[0]


@pytest.mark.parametrize("name", NAMES)
def test_a_tokenizer_survives_a_folder(name, tmp_path):
    module = tokenizer(name).eval()
    save_folder(module, tmp_path)
    again = load_folder(tmp_path, FAMILIES)
    assert describe(again) == describe(module) and again.spec == module.spec
    assert TokenSpec.from_config(again.spec.to_config()) == module.spec
    assert torch.equal(again.encode(images()), module.encode(images()))


def test_specs_say_what_is_emitted():
    vq, fsq, var = (tokenizer(name).spec for name in NAMES)
    assert vq.layout == fsq.layout == SequenceLayout.raster(8, 8) and vq.bits == 64 * 5
    assert (fsq.parts[0].vocab_size, fsq.parts[0].channels) == (36, 3)
    assert var.layout == SequenceLayout.scales((1, 2, 4, 8)) and var.layout.length == 85
    rebuilt = build(var.quantizer, FAMILIES)
    assert isinstance(rebuilt, MultiScaleVQ) and rebuilt.sides == (1, 2, 4, 8)


def test_other_image_sizes():
    module = tokenizer("vq").eval()
    tokens = module.encode(images(size=24))
    module.spec_for(24).check(tokens)
    torch.testing.assert_close(module.decode(tokens, size=24), module(images(size=24)).images, rtol=1e-5, atol=1e-6)
    wide = torch.rand(1, 3, 8, 16)
    assert module.encode(wide).shape == (1, 32)
    assert module(wide).images.shape == wide.shape
    for call, word in (
        (lambda: module.encode(images(size=15)), "stride"),
        (lambda: module.spec_for(15), "image_size"),
        (lambda: module.decode(tokens), "tokens"),
        (lambda: module.decode(tokens, keep=4, size=24), "keep"),
        (lambda: module.encode(images(), layout=SequenceLayout.line(64)), "layout"),
        (lambda: tokenizer("var").spec_for(32), "sides"),
        (lambda: tokenizer("var").encode(images(), layout=SequenceLayout.line(85)), "layout"),
    ):
        with pytest.raises(ValueError, match=word):
            call()


def test_var_decodes_prefixes_of_scales():
    module = tokenizer("var").eval()
    tokens = module.encode(images())
    codes, q = module.embed(tokens), module.quantizer
    for k, end in enumerate(q.bounds[1:], start=1):
        total = sum(q._contribution(codes[:, q.bounds[i] : q.bounds[i + 1]], i) for i in range(k))
        want = module.decoder(module.project_out(total))
        torch.testing.assert_close(module.decode(tokens, keep=end), want, rtol=1e-5, atol=1e-6)
        later = tokens.clone()
        later[:, end:] = 0
        assert torch.equal(module.decode(later, keep=end), module.decode(tokens, keep=end))
    with pytest.raises(ValueError, match="end of a scale"):
        module.decode(tokens, keep=2)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_weights_keep_a_float32_bottleneck(name):
    module = tokenizer(name).eval()
    want = module.encode(images(4))
    module.encoder.bfloat16(), module.decoder.bfloat16(), module.project_in.bfloat16(), module.project_out.bfloat16()
    got = module.encode(images(4))
    assert (got == want).float().mean() > 0.7
    assert module.decode(got).dtype == torch.bfloat16 and module.embed(got).dtype == torch.float32


# --- published sizes and the config files ----------------------------------------------------------------------------


def test_published_parameter_counts():
    with torch.device("meta"):
        vq16 = CNNTokenizer(image_size=256, quantizer=VQ(vocab_size=16384, channels=8))
        vq8 = CNNTokenizer(image_size=256, multipliers=[1, 2, 2, 4], quantizer=VQ(vocab_size=16384, channels=8))
        scales = MultiScaleVQ(vocab_size=4096, channels=32, sides=[1, 2, 3, 4, 5, 6, 8, 10, 13, 16])
        var = VARTokenizer(image_size=256, quantizer=scales, channels=160, z_channels=None, projection=3)
    assert [parameters(m) for m in (vq16, vq16.encoder, vq16.decoder)] == [71_883_403, 29_298_176, 42_449_795]
    assert parameters(vq8) == 70_109_835 and vq8.stride == 8 and vq16.stride == 16
    assert [parameters(m) for m in (var, var.encoder, var.decoder)] == [108_948_355, 44_107_872, 64_653_923]
    assert var.spec.layout.length == 680


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_build_as_their_headers_say(path):
    header = " ".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    size, count = re.search(r"(\d+) px ->", header), re.search(r"([\d,]+) parameters", header)
    assert size and count, f"{path}: the header states `N parameters` and `S px -> tokens`"
    config = OmegaConf.create({"data": {"image_size": int(size[1])}, "tokenizer": OmegaConf.load(path)})
    with torch.device("meta"):
        module = instantiate(config.tokenizer)
    assert parameters(module) == int(count[1].replace(",", ""))
    with torch.device("meta"):
        again = build(describe(module), FAMILIES)
    assert again.spec == module.spec


SMALL_CONFIGS = [path for path in CONFIGS if path.stem.endswith("_small")]
SIDES = {"sides": [1, 2, 4, 10]}
OTHER = {"restok_small": {"stages": 1}, "var_small": SIDES, "flexvar_small": SIDES}


@pytest.mark.parametrize("path", SMALL_CONFIGS, ids=lambda path: path.stem)
def test_small_configs_build_for_another_image_size(path):
    """data.image_size=40 in place of 32: a multiple of every stride, but no power of two times it."""
    config = OmegaConf.create({"data": {"image_size": 40}, "tokenizer": OmegaConf.load(path)})
    for key, value in OTHER.get(path.stem, {}).items():
        (config.tokenizer if key in config.tokenizer else config.tokenizer.quantizer)[key] = value
    with torch.device("meta"):
        assert instantiate(config.tokenizer).spec.image_size == 40


class Dtypes(TorchDispatchMode):
    """The dtypes in which norms, activations and upsampling give their results, by operation."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name in ("native_group_norm", "silu", "upsample_nearest2d"):
            first = result[0] if isinstance(result, tuple) else result
            self.seen.setdefault(name, set()).add(first.dtype)
        return result


@pytest.mark.parametrize("graded", [False, True], ids=["no gradients", "gradients"])
def test_maps_stay_bfloat16_between_convolutions_on_cuda_where_no_gradient_is_wanted(graded):
    """Autocast alone takes norms and upsampling in float32 there, and the activations behind them."""
    module, wanted = Decoder(in_channels=4, **SMALL), {torch.float32 if graded else torch.bfloat16}
    grads = nullcontext() if graded else torch.no_grad()
    with ExitStack() as stack:
        stack.enter_context(autocast_on_cuda())
        batch = stack.enter_context(fake_cuda(module, {"x": torch.zeros(2, 4, 8, 8)}))
        dtypes, _ = map(stack.enter_context, (Dtypes(), grads))
        with torch.autocast("cuda", torch.bfloat16):
            out = module(batch["x"])
    assert out.is_cuda and out.dtype is torch.bfloat16
    assert dtypes.seen == dict.fromkeys(("native_group_norm", "silu", "upsample_nearest2d"), wanted)


def test_a_bfloat16_norm_is_that_of_float32_numbers_rounded(monkeypatch):
    torch.manual_seed(0)
    layer, x = Norm(4, 8, eps=1e-6), (3 + 2 * torch.randn(2, 8, 16, 16)).bfloat16()
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    want = F.group_norm(x.double(), 4, layer.weight.double(), layer.bias.double(), 1e-6)
    monkeypatch.setattr(group_norm, "is_light", lambda x: True)
    with torch.no_grad():
        got = layer(x)
    assert got.dtype is torch.bfloat16
    torch.testing.assert_close(got.double(), want, rtol=2**-6, atol=2**-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this norm is for a CUDA device")
def test_a_bfloat16_norm_on_cuda_is_that_of_float32_numbers_rounded():
    """Channels-last too, as convolutions give it, and far from zero, where rough statistics would show."""
    torch.manual_seed(0)
    layer, x = Norm(32, 128, eps=1e-6).cuda(), (8 + torch.randn(2, 128, 64, 64, device="cuda")).bfloat16()
    want = F.group_norm(x.double(), 32, layer.weight.double(), layer.bias.double(), 1e-6)
    for form in (torch.contiguous_format, torch.channels_last):
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            got = layer(x.to(memory_format=form))
        assert got.dtype is torch.bfloat16 and got.is_contiguous(memory_format=form)
        torch.testing.assert_close(got.double(), want, rtol=2**-6, atol=2**-6)
