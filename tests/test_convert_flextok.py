"""FlexTok's files, in keys and shapes as its code implies: no reference available for whole models."""

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from runs import run, state
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.convert import convert as convert_command  # noqa: E402
from vtok.checkpoint import load_folder  # noqa: E402
from vtok.convert import convert  # noqa: E402
from vtok.convert.flextok import convert_vae  # noqa: E402
from vtok.layers.attention import attend_naive  # noqa: E402
from vtok.layers.flex import sincos  # noqa: E402
from vtok.models import FAMILIES  # noqa: E402

WIDTH, HEAD, TOKENS, LATENT, PATCH = 16, 8, 4, 3, 2
ENC, DEC = "encoder.module_dict.", "decoder.module_dict."
CONFIG = {"FlexTok": {"levels": [5, 4, 3], "image_size": 16, "head_dim": HEAD, "scaling_factor": 0.5}}


def linear(state: dict, name: str, rows: int, columns: int, bias: bool = True) -> None:
    state[f"{name}.weight"] = 0.1 * torch.randn(rows, columns)
    if bias:
        state[f"{name}.bias"] = 0.1 * torch.randn(rows)


def flextok_state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    state: dict[str, torch.Tensor] = {}
    hidden = int(8 * WIDTH / 3)
    for half, modulated in ((ENC, False), (DEC, True)):
        linear(state, f"{half}patches.patch_proj", WIDTH, LATENT * PATCH**2)
        state[f"{half}grid.posembs"] = sincos(4, 4, WIDTH, torch.device("cpu")).T.view(1, WIDTH, 4, 4)
        for i in range(2):
            at = f"{half}trunk.blocks.{i}"
            for name in ("wq", "wk", "wv", "proj"):
                linear(state, f"{at}.attn.{name}", WIDTH, WIDTH, False)
            for name, rows, columns in (("fc1", hidden, WIDTH), ("fc2", WIDTH, hidden), ("fc3", hidden, WIDTH)):
                linear(state, f"{at}.mlp.{name}", rows, columns, False)
            if modulated:
                linear(state, f"{at}.adaLN_modulation.1", 12 * WIDTH, WIDTH)
    state[f"{ENC}enc_register_module.registers"] = torch.randn(TOKENS, WIDTH)
    linear(state, f"{ENC}to_latents.proj", 3, WIDTH)
    linear(state, f"{DEC}from_latents.proj", WIDTH, 3)
    state[f"{DEC}dec_nested_dropout.dropout_mask_token"] = torch.randn(WIDTH)
    state[f"{DEC}dec_null.nullcond"] = torch.randn(WIDTH)
    state[f"{DEC}dec_register_posembs.posembs"] = torch.randn(1, 1, WIDTH, TOKENS)
    linear(state, f"{DEC}time.mlp.0", WIDTH, 256)
    linear(state, f"{DEC}time.mlp.2", WIDTH, WIDTH)
    linear(state, f"{DEC}to_patches.adaLN_modulation.1", 2 * WIDTH, WIDTH)
    linear(state, f"{DEC}to_patches.proj", LATENT * PATCH**2, WIDTH)
    return state


def norm(x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:])


@torch.no_grad()
def test_a_decoder_from_the_originals_tensors():
    """Velocity of the converted module against the original's equations on its own tensors."""
    state = flextok_state()
    config = {"FlexTok": {k: v for k, v in CONFIG["FlexTok"].items() if k != "image_size"} | {"image_size": 8}}
    module = convert("flextok", state, config)  # without a VAE the latents are 8 x 8 pixels
    x, t, registers = torch.randn(2, 3, 8, 8), torch.tensor([0.3, 0.8]), torch.randn(2, TOKENS, WIDTH)
    got = module.velocity(x, t, registers)[0]

    turn = t[:, None] * 1000 * torch.exp(-torch.log(torch.tensor(256.0)) * torch.arange(128) / 128)
    h = torch.cat([turn.cos(), turn.sin()], 1) @ state[f"{DEC}time.mlp.0.weight"].T + state[f"{DEC}time.mlp.0.bias"]
    time = F.silu(F.silu(h) @ state[f"{DEC}time.mlp.2.weight"].T + state[f"{DEC}time.mlp.2.bias"])
    patches = x.permute(0, 2, 3, 1).reshape(2, 4, 2, 4, 2, 3).permute(0, 1, 3, 2, 4, 5).reshape(2, 16, 12)
    y = patches @ state[f"{DEC}patches.patch_proj.weight"].T + state[f"{DEC}patches.patch_proj.bias"]
    y = torch.cat([y + state[f"{DEC}grid.posembs"].flatten(2).transpose(1, 2), registers], 1)
    for i in range(2):
        part = {k.split(f"blocks.{i}.")[1]: v for k, v in state.items() if k.startswith(f"{DEC}trunk.blocks.{i}.")}
        rows = (time @ part["adaLN_modulation.1.weight"].T + part["adaLN_modulation.1.bias"]).view(2, 2, 6 * WIDTH)
        rows = torch.cat([rows[:, :1].expand(-1, 16, -1), rows[:, 1:].expand(-1, TOKENS, -1)], 1)
        gate1, gate2, shift1, scale1, shift2, scale2 = rows.chunk(6, -1)
        h = norm(y) * (1 + scale1) + shift1
        q, k, v = ((h @ part[f"attn.w{n}.weight"].T).view(2, -1, 2, HEAD).transpose(1, 2) for n in "qkv")
        mixed = attend_naive(norm(q), norm(k), v, scale=8 / HEAD).transpose(1, 2).flatten(2)
        y = y + gate1 * (mixed @ part["attn.proj.weight"].T)
        h = norm(y) * (1 + scale2) + shift2
        inner = F.silu(h @ part["mlp.fc1.weight"].T) * (h @ part["mlp.fc3.weight"].T)
        y = y + gate2 * (inner @ part["mlp.fc2.weight"].T)
    at = f"{DEC}to_patches."
    rows = time @ state[f"{at}adaLN_modulation.1.weight"].T + state[f"{at}adaLN_modulation.1.bias"]
    shift, scale = rows[:, None].chunk(2, -1)
    out = (norm(y[:, :16]) * (1 + scale) + shift) @ state[f"{at}proj.weight"].T + state[f"{at}proj.bias"]
    want = out.view(2, 4, 4, 2, 2, 3).permute(0, 5, 1, 3, 2, 4).reshape(2, 3, 8, 8)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    z = torch.randn(2, TOKENS, 3)
    want = z @ state[f"{DEC}from_latents.proj.weight"].T + state[f"{DEC}from_latents.proj.bias"]
    want[:, 1:] = state[f"{DEC}dec_nested_dropout.dropout_mask_token"]
    want += state[f"{DEC}dec_register_posembs.posembs"][0, 0].T
    torch.testing.assert_close(module.condition(z, 1), want)


def test_every_key_counts():
    state = flextok_state()
    config = {"FlexTok": CONFIG["FlexTok"] | {"image_size": 8}}
    with pytest.raises(ValueError, match="unknown keys"):
        convert("flextok", state | {f"{DEC}extra.thing": torch.zeros(1)}, config)
    for key in state:
        if not key.endswith("grid.posembs"):
            with pytest.raises(ValueError):
                convert("flextok", {k: v for k, v in state.items() if k != key}, config)
    with pytest.raises(ValueError, match="sines"):
        convert("flextok", state | {f"{ENC}grid.posembs": torch.zeros(1, WIDTH, 4, 4)}, config)
    with pytest.raises(ValueError, match="colour"):
        convert("flextok", state, {"FlexTok": {"colour": 1}})


def vae_state(widths: tuple[int, ...], latent: int, *, old: bool = False) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}

    def conv(name: str, rows: int, columns: int, kernel: int = 3) -> None:
        state[f"{name}.weight"] = 0.1 * torch.randn(rows, columns, kernel, kernel)
        state[f"{name}.bias"] = 0.1 * torch.randn(rows)

    def group(name: str, width: int) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = 1 + 0.1 * torch.randn(width), 0.1 * torch.randn(width)

    def block(name: str, width: int, wide: int) -> None:
        group(f"{name}.norm1", width)
        conv(f"{name}.conv1", wide, width)
        group(f"{name}.norm2", wide)
        conv(f"{name}.conv2", wide, wide)
        if width != wide:
            conv(f"{name}.conv_shortcut", wide, width, 1)

    for half, blocks, order in (("encoder", 2, widths), ("decoder", 3, widths[::-1])):
        encoder, width = half == "encoder", order[0]
        conv(f"{half}.conv_in", width, 3 if encoder else latent)
        for i, wide in enumerate(order):
            at = f"{half}.{'down' if encoder else 'up'}_blocks.{i}"
            for j in range(blocks):
                block(f"{at}.resnets.{j}", width, wide)
                width = wide
            if i < len(order) - 1:
                conv(f"{at}.{'downsamplers' if encoder else 'upsamplers'}.0.conv", wide, wide)
        middle = widths[-1]
        block(f"{half}.mid_block.resnets.0", middle, middle)
        block(f"{half}.mid_block.resnets.1", middle, middle)
        at = f"{half}.mid_block.attentions.0"
        group(f"{at}.group_norm", middle)
        for name in ("query", "key", "value", "proj_attn") if old else ("to_q", "to_k", "to_v", "to_out.0"):
            linear(state, f"{at}.{name}", middle, middle)
        group(f"{half}.conv_norm_out", width)
        conv(f"{half}.conv_out", 2 * latent if encoder else 3, width)
    conv("quant_conv", 2 * latent, 2 * latent, 1)
    conv("post_quant_conv", latent, latent, 1)
    return state


@torch.no_grad()
@pytest.mark.parametrize("old", (False, True))
def test_a_vae_of_diffusers(old):
    torch.manual_seed(1)
    state = vae_state((8, 16), 4, old=old)
    module = convert_vae(state, scale=0.5, image_size=16)
    assert module.stride == 2 and module.spec.parts[0].channels == 4
    at = "encoder.mid_block.attentions.0."
    x = torch.randn(1, 16, 3, 3)
    h = F.group_norm(x, 8, state[f"{at}group_norm.weight"], state[f"{at}group_norm.bias"], 1e-6)
    h = h.flatten(2).transpose(1, 2)
    names = ("query", "key", "value", "proj_attn") if old else ("to_q", "to_k", "to_v", "to_out.0")
    q, k, v = (h @ state[f"{at}{n}.weight"].T + state[f"{at}{n}.bias"] for n in names[:3])
    mixed = attend_naive(q, k, v, scale=16**-0.5) @ state[f"{at}{names[3]}.weight"].T + state[f"{at}{names[3]}.bias"]
    want = x + mixed.transpose(1, 2).view_as(x)
    torch.testing.assert_close(module.encoder.mid[1](x), want, rtol=1e-4, atol=1e-4)
    image = torch.rand(1, 3, 16, 16) * 2 - 1
    assert torch.equal(module.encode(image), module.quantizer.tokens(module.features(image)))
    with pytest.raises(ValueError, match="unknown keys"):
        convert_vae(state | {"loss.logvar": torch.zeros(1)}, scale=1.0)


def test_a_whole_file():
    state = flextok_state() | {f"vae.vae.{k}": v for k, v in vae_state((8, 16), LATENT).items()}
    module = convert("flextok", state, CONFIG)
    assert module.stride == 4 and module.vae.quantizer.scale == 0.5
    assert module.decode(torch.zeros(1, TOKENS).long(), keep=2, steps=1).shape == (1, 3, 16, 16)


def test_the_published_vae_has_the_stated_size():
    with torch.device("meta"):
        state = vae_state((128, 256, 512, 512), 16)
    assert sum(v.numel() for v in state.values()) == 83_821_011


VAE = (
    "{_target_: vtok.models.cnn.CNNTokenizer, image_size: 32, channels: 8, multipliers: [1, 2], blocks: 2, "
    "z_channels: null, attention: false, groups: 8, "
    "quantizer: {_target_: vtok.quantize.kl.KL, channels: 4, scale: 0.5}}"
)
TRAINING = ("data=fake", "data.image_size=32", "data.train_images=8", "data.val_images=4", "tokenizer=flextok_small")
TRAINING += ("batch_size=4", "steps=1", "ema=null", "picture_every=null", "bar=false", "trainer=cpu")


def converted(folder: Path, **options: object) -> Path:
    """scripts/convert.py on the VAE's file."""
    given = {"from": folder / "vae.safetensors", "family": "flextok_vae", "out": folder / "start"} | options
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = compose("convert", overrides=["image_size=32", *(f"{k}={v}" for k, v in given.items())])
    return convert_command(config)


def test_a_training_starts_from_a_trained_vae_or_not_at_all(tmp_path, capsys):
    torch.manual_seed(1)
    file = vae_state((8, 16), 4)
    save_file(file, tmp_path / "vae.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", "scaling_factor": 0.5}))
    with pytest.raises(ValueError, match=r"start=<one of configs/tokenizer/flextok_\*>, got cnn_vq_small"):
        converted(tmp_path, start="cnn_vq_small", config=tmp_path / "config.json")
    with pytest.raises(ValueError, match="scaling_factor"):
        converted(tmp_path, start="flextok_small")
    folder = converted(tmp_path, start="flextok_small", config=tmp_path / "config.json")
    assert f"init_from={folder} tokenizer.vae.quantizer.scale=0.5" in capsys.readouterr().out
    module, vae = load_folder(folder, FAMILIES), convert_vae(file, scale=0.5, image_size=32)
    assert module.vae.quantizer.scale == 0.5 and module.stride == 8
    assert all(torch.equal(module.vae.state_dict()[k], v) for k, v in vae.state_dict().items())

    with pytest.raises(ValueError, match=r"untrained.*flextok_vae_c4.*scripts/convert\.py"):
        run(*TRAINING, f"tokenizer.vae={VAE}", f"run_dir={tmp_path / 'none'}")
    assert not (tmp_path / "none").exists()
    own = (*TRAINING, "objective.pixel_weight=0", f"tokenizer.vae={VAE}", f"run_dir={tmp_path / 'run'}")
    run(*own, f"init_from={folder}")
    kept = state(tmp_path / "run")["state_dict"]
    assert all(torch.equal(kept[f"module.vae.{k}"], v) for k, v in vae.state_dict().items())
    run(*own, "resume=last")  # a run has its own
    run(*TRAINING, f"run_dir={tmp_path / 'pixels'}")  # without a VAE there is nothing to train before
