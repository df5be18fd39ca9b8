"""TiTok: the two heads, the three stages, text, the published files."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from tokenizers import images, make, titok

from vtok.checkpoint import save_folder
from vtok.config import describe, instantiate
from vtok.convert import convert
from vtok.losses.discriminators import MaskBitDiscriminator
from vtok.losses.proxy import ProxyCodes
from vtok.models.maskgit_vqgan import MaskGITVQGAN
from vtok.models.titok import ProxyHead
from vtok.optim import Recipe
from vtok.quantize.vq import VQ

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
CNN = dict(channels=8, multipliers=(1, 1, 2), blocks=1, groups=4)


def teacher() -> MaskGITVQGAN:
    torch.manual_seed(3)
    quantizer = VQ(vocab_size=16, channels=6, l2_norm=False)
    torch.nn.init.normal_(quantizer.codebook.weight)
    return MaskGITVQGAN(image_size=16, quantizer=quantizer, **CNN).eval()


def proxy(stage: str, **options):
    head = ProxyHead(dim=32, codes=16, width=6, **CNN, **options)
    return titok(stage=stage, head=head)


def changed(model: torch.nn.Module, loss: torch.Tensor) -> set[str]:
    """Top-level names of the parameters that the loss moves."""
    model.zero_grad()
    loss.backward()
    return {k.split(".")[0] for k, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}


def test_a_one_hot_proxy_distribution_decodes_the_teachers_codes():
    """With logits that are certain of the teacher's ids, the head's image is the teacher's reconstruction."""
    vqgan, model = teacher(), proxy("joint")
    model.head.codes.weight.data.copy_(vqgan.quantizer.codebook.weight)
    model.head.cnn.load_state_dict(vqgan.decoder.state_dict())
    ids = vqgan.encode(images())
    image = model.head.render(F.one_hot(ids, 16).float() * 1e3, 4) * 2 - 1
    torch.testing.assert_close(image, vqgan.decode(ids), rtol=1e-4, atol=1e-5)


def test_stages_train_what_they_say():
    term = ProxyCodes(teacher=teacher())
    first = proxy("proxy").train()
    recon = first(images())
    assert recon.images is None
    # the oracle: cross-entropy by hand
    ids = teacher().encode(images())
    log_shares = recon.features["proxy_logits"].log_softmax(-1)
    by_hand = -log_shares.gather(-1, ids.unsqueeze(-1)).mean()
    loss = term(recon, images())["proxy"]
    torch.testing.assert_close(loss, by_hand)
    assert changed(first, loss + sum(recon.losses.values())) == {"encoder", "decoder", "head", "quantizer"}
    assert all(p.grad is None for p in [*first.head.cnn.parameters(), *first.head.codes.parameters()])
    assert not list(term.parameters()) and not term.state_dict()

    second = proxy("decoder").train()
    second.load_state_dict(first.state_dict())  # the stages share their names
    recon = second(images())
    assert not recon.losses and torch.equal(recon.tokens, second.encode(images()))
    assert changed(second, recon.images.square().mean()) == {"decoder", "head"}
    assert second.last_layer.grad is not None and second.head.codes.weight.grad is not None
    # the same weights, so the same image as a joint pass
    joint = proxy("joint").eval()
    joint.load_state_dict(first.state_dict())
    torch.testing.assert_close(joint(images()).images, recon.images, rtol=1e-4, atol=1e-5)


def test_the_second_stage_does_not_start_on_random_codes():
    for model, first in ((proxy("decoder"), "proxy"), (titok(stage="decoder"), "joint")):
        with pytest.raises(ValueError, match=rf"stage=decoder .* init_from=<run of tokenizer\.stage={first}>"):
            model.fresh_start()
    assert proxy("joint").fresh_start() is None and titok().fresh_start() is None


def test_the_first_stage_does_not_start_on_a_random_decoder():
    with pytest.raises(ValueError, match=r"stage=proxy .* random .* tokenizer\.head\.weights=<run .*init_from="):
        proxy("proxy").fresh_start()


@pytest.mark.parametrize("prefixes", (("module.", "ema."), ("module.",)))
def test_a_teacher_is_a_run_of_either_weights(prefixes, tmp_path):
    """Averaged weights where there are some; here the raw ones are others."""
    vqgan, plain = teacher(), teacher()
    plain.last_layer.data.add_(1.0)
    plain.quantizer.codebook.weight.data.neg_()
    nets = dict(zip(prefixes, (plain, vqgan)))
    held = {prefix + name: value for prefix, net in nets.items() for name, value in net.state_dict().items()}
    torch.save({"state_dict": held, "module": {**describe(vqgan), "kind": "tokenizer"}}, tmp_path / "step_1.ckpt")
    wanted = nets[prefixes[-1]]
    model = proxy("proxy", weights=str(tmp_path / "step_1.ckpt"))
    assert torch.equal(model.last_layer, wanted.last_layer) and model.fresh_start() is None
    assert torch.equal(
        ProxyCodes(teacher=str(tmp_path / "step_1.ckpt"))(model(images()), images())["proxy"],
        ProxyCodes(teacher=wanted)(model(images()), images())["proxy"],
    )


def test_proxy_weights_come_from_a_checkpoint_once(tmp_path):
    vqgan = teacher()
    save_folder(vqgan, tmp_path / "teacher")
    model = proxy("proxy", weights=str(tmp_path / "teacher"))
    assert torch.equal(model.head.codes.weight, vqgan.quantizer.codebook.weight)
    assert torch.equal(model.last_layer, vqgan.last_layer)
    assert model.head.arguments["weights"] is None
    same = ProxyCodes(teacher=str(tmp_path / "teacher"))
    recon = model(images())
    assert torch.equal(same(recon, images())["proxy"], ProxyCodes(teacher=vqgan)(recon, images())["proxy"])


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="ProxyHead"):
        titok(stage="proxy")
    with pytest.raises(ValueError, match="stage"):
        titok(stage="second")
    with pytest.raises(ValueError, match=r"head\.dim"):
        titok(decoder=(64, 1, 4))
    with pytest.raises(ValueError, match="image_size"):
        titok().encode(torch.zeros(1, 3, 20, 20))
    with pytest.raises(ValueError, match="text"):
        titok().pixels(torch.zeros(1, 6, 5), text=torch.zeros(1, 3, 7))
    with pytest.raises(ValueError, match="proxy_logits"):
        ProxyCodes(teacher=teacher())(titok()(images()), images())


def test_legacy_reshape_mixes_the_latents():
    """One latent changed before the projection: one token changes, or, reshaped, those that its channels land in."""
    for legacy, count in ((False, 1), (True, 6)):
        model = make("titok", legacy_reshape=legacy)
        encoder = model.encoder
        h = torch.randn(1, 6, 32)
        other = h.clone()
        other[:, -1] += 1
        found = []
        for x in (h, other):
            encoder.trunk.forward = lambda inputs, x=x: x
            found.append(model.features(images()[:1]))
        moved = (found[0] - found[1]).abs().amax(-1)[0] > 1e-6
        assert int(moved.sum()) == count, legacy
        if not legacy:
            assert bool(moved[-1])


def test_text_beside_the_latents():
    model = titok(text=[3, 7])
    torch.manual_seed(0)
    text, z = torch.randn(2, 3, 7), torch.randn(2, 6, 5)
    plain, told = model.pixels(z), model.pixels(z, text=text)
    assert not torch.allclose(plain, told, atol=1e-5)
    torch.testing.assert_close(model.pixels(z[1:], text=text[1:]), told[1:], rtol=1e-4, atol=1e-5)
    recon = model.train()(images()[:2], text=text)
    moved = changed(model, recon.images.square().mean())
    assert model.decoder.text.weight.grad.any() and moved == {"encoder", "decoder", "head"}


SIZES = {"s": (512, 8), "b": (768, 12), "l": (1024, 24)}


def original(encoder: str, decoder: str, tokens: int, codes: tuple | None, kind: str) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of a published file. codes: (K, d), or None with 16 channels; kind: legacy, patches or text."""
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, out: int, wide: int, *kernel: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, wide, *kernel), (out,)

    def norm(name: str, wide: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (wide,)

    for half, size in (("encoder", encoder), ("decoder", decoder)):
        wide, depth = SIZES[size]
        shapes[f"{half}.class_embedding"] = (1, wide)
        shapes[f"{half}.positional_embedding"] = (257, wide)
        shapes[f"{half}.latent_token_positional_embedding"] = (tokens, wide)
        norm(f"{half}.ln_pre", wide)
        norm(f"{half}.ln_post", wide)
        for i in range(depth):
            name = f"{half}.transformer.{i}"
            norm(f"{name}.ln_1", wide)
            norm(f"{name}.ln_2", wide)
            shapes[f"{name}.attn.in_proj_weight"], shapes[f"{name}.attn.in_proj_bias"] = (3 * wide, wide), (3 * wide,)
            linear(f"{name}.attn.out_proj", wide, wide)
            linear(f"{name}.mlp.c_fc", 4 * wide, wide)
            linear(f"{name}.mlp.c_proj", wide, 4 * wide)
    wide = SIZES[encoder][0]
    shapes["latent_tokens"] = (tokens, wide)
    linear("encoder.patch_embed", wide, 3, 16, 16)
    linear("encoder.conv_out", codes[1] if codes else 32, wide, 1, 1)
    wide = SIZES[decoder][0]
    shapes["decoder.mask_token"] = (1, 1, wide)
    linear("decoder.decoder_embed", wide, codes[1] if codes else 16)
    if codes:
        shapes["quantize.embedding.weight"] = codes
    if kind != "legacy":
        linear("decoder.ffn.0", 768, wide, 1, 1)
        linear("decoder.conv_out", 3, 3, 3, 3)
    else:
        linear("decoder.ffn.0", 2 * wide, wide, 1, 1)
        linear("decoder.ffn.2", 1024, 2 * wide, 1, 1)
        shapes["pixel_quantize.embedding.weight"] = (1024, 256)
        shapes |= pixel_decoder()
    if kind == "text":
        linear("decoder.text_guidance_proj", wide, 768)
        shapes["decoder.text_guidance_positional_embedding"] = (77, wide)
    return shapes


def pixel_decoder() -> dict[str, tuple[int, ...]]:
    shapes = {"conv_in.weight": (512, 256, 3, 3), "conv_in.bias": (512,)}
    shapes |= {"norm_out.weight": (128,), "norm_out.bias": (128,), "conv_out.weight": (3, 128, 3, 3)}
    shapes["conv_out.bias"] = (3,)
    starts, widths = (128, 256, 256, 512, 512), (128, 128, 256, 256, 512)
    blocks = [(f"mid.{j}", 512, 512) for j in range(2)]
    for level, (start, wide) in enumerate(zip(starts, widths)):
        start = 128 if level == 0 else start
        blocks += [(f"up.{level}.block.{j}", wide if j else start, wide) for j in range(2)]
        if level:
            shapes[f"up.{level}.upsample_conv.weight"] = (wide, wide, 3, 3)
            shapes[f"up.{level}.upsample_conv.bias"] = (wide,)
    for name, start, wide in blocks:
        shapes |= {f"{name}.conv1.weight": (wide, start, 3, 3), f"{name}.conv2.weight": (wide, wide, 3, 3)}
        shapes |= {f"{name}.norm1.{k}": (start,) for k in ("weight", "bias")}
        shapes |= {f"{name}.norm2.{k}": (wide,) for k in ("weight", "bias")}
        if start != wide:
            shapes[f"{name}.nin_shortcut.weight"] = (wide, wide, 1, 1)
    return {f"pixel_decoder.{name}": shape for name, shape in shapes.items()}


PATCHES = {"finetune_decoder": False, "is_legacy": False}


@pytest.mark.parametrize(
    "layout, config, count",
    (
        (("s", "s", 128, (4096, 12), "legacy"), {"use_l2_norm": True}, 83_674_639),
        (("b", "b", 64, (4096, 12), "legacy"), {"use_l2_norm": True}, 204_814_095),
        (("l", "l", 32, (4096, 12), "legacy"), {"use_l2_norm": True}, 641_054_735),
        (("b", "l", 64, (8192, 64), "patches"), PATCHES, 390_016_148),
        (("b", "l", 128, (8192, 64), "patches"), PATCHES, 390_179_988),
        (("s", "l", 256, (8192, 64), "patches"), PATCHES, 330_260_884),
        (("l", "l", 32, None, "patches"), PATCHES | {"quantize_mode": "vae", "token_size": 16}, 606_879_604),
        (("b", "l", 64, None, "patches"), PATCHES | {"quantize_mode": "vae", "token_size": 16}, 389_418_100),
        (("b", "l", 128, None, "patches"), PATCHES | {"quantize_mode": "vae", "token_size": 16}, 389_581_940),
        (("b", "l", 128, (8192, 64), "text"), PATCHES | {"clustering_vq": True}, 391_046_292),
    ),
)
def test_published_files_convert(layout, config, count):
    state = {key: torch.empty(shape, device="meta") for key, shape in original(*layout).items()}
    with torch.device("meta"):
        module = convert("titok", state, {"TiTok_config": {"model": {"vq_model": config}}})
    assert sum(p.numel() for p in module.parameters()) == count
    assert module.spec.image_size == 256 and module.spec.layout.length == layout[2]
    assert (module.decoder.text is not None) == (layout[4] == "text")


@pytest.mark.parametrize("name", ("titok", "titok_stage2", "titok_onestage", "titok_vae", "restok"))
def test_recipes_compose_and_build(name):
    """Everything but the pretrained networks, whose files are not at hand."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("train", overrides=[f"experiment={name}_imagenet256"])
    assert config.name == f"{name}_imagenet256" and config.batch_size == 256
    assert config.data.crop == ("random" if name == "restok" else "short")
    with torch.device("meta"):
        model = instantiate(config.tokenizer, _convert_="all")
        recipe = {key: config[key] for key in ("optimizer", "schedule", "steps", "clip", "ema")}
        Recipe(**OmegaConf.to_container(OmegaConf.create(recipe)))
    frozen = {k.split(".")[0] for k, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"titok": {"head"}, "titok_stage2": {"encoder", "quantizer"}}.get(name, set())
    targets = [term["_target_"] for term in config.objective.terms.values()]
    if config.objective.gan is not None:
        targets.append(config.objective.gan.discriminator["_target_"])
        gan = OmegaConf.to_container(config.objective.gan)
        gan["discriminator"] = MaskBitDiscriminator(width=32)
        instantiate(gan, _convert_="all")
    for target in targets:
        module, _, attribute = target.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), target
