"""The pass before a training: what only a pass shows is said before an older run is touched, and it leaves no trace."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import TOKENIZER, digest, run
from test_objective_runs import OPTIONS
from tokenizers import images, make, titok_proxy
from torch.utils.flop_counter import FlopCounterMode

from vtok import rng
from vtok.acceleration import compile_blocks
from vtok.losses.discriminators import PatchGAN, StyleGANDiscriminator
from vtok.losses.gan import GAN
from vtok.losses.objective import TokenizerObjective
from vtok.losses.transformer_discriminator import TransformerDiscriminator

HITA = (
    *(item for item in TOKENIZER if not item.startswith(("tokenizer", "+tokenizer", "objective"))),
    "data.image_size=32",
    "tokenizer=hita_small",
    "+tokenizer.side={_target_: vtok.models.hita_side.DinoTokens, weights_path: nowhere}",
    "tokenizer.side_channels=1024",
)


@pytest.fixture
def older(tmp_path) -> Path:
    """A directory with what a run leaves that `overwrite=true` deletes."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step_9.ckpt").write_text("weights")
    (tmp_path / "metrics.csv").write_text("step\n9\n")
    return tmp_path


@pytest.mark.parametrize(
    "overrides, said",
    (
        ((*TOKENIZER, "+objective.own_weights={comitment: 1}"), "comitment"),
        ((*TOKENIZER, "objective.gan.discriminator.layers=3"), r"\(16, 16\).*from 24.*discriminator\.layers"),
        ((*TOKENIZER, "data.window=8", "objective.gan.discriminator.layers=2"), r"\(8, 8\).*from 12"),
        (HITA, r"vit_large_patch14_reg4_dinov2\.lvd142m\.safetensors .* in nowhere"),
    ),
)
def test_a_mistake_that_a_pass_shows_costs_no_older_run(overrides, said, older):
    with pytest.raises(ValueError, match=said):
        run(*overrides, f"run_dir={older}", "overwrite=true", "steps=9")
    assert {str(p.relative_to(older)) for p in older.rglob("*") if p.is_file()} == {
        "checkpoints/step_9.ckpt",
        "metrics.csv",
    }


def test_a_gan_that_never_starts_is_not_asked(tmp_path):
    run(*TOKENIZER, "objective.gan.discriminator.layers=3", f"run_dir={tmp_path}", "steps=2", "val_every=2")
    with pytest.raises(ValueError, match=r"discriminator\.layers"):
        run(*TOKENIZER, "objective.gan.discriminator.layers=3", f"run_dir={tmp_path / 'b'}", "steps=3")


def test_it_leaves_no_trace(tmp_path, monkeypatch):
    """Moving codebooks, restarts, batch statistics, LeCam's means and dropout's draws: all as before; and they do move
    in such a pass, so that this says something."""
    seen = []

    class Enough(Exception):
        pass

    def watched(self, tokenizer, images, **rest):
        def everything() -> dict[str, str]:
            found = {k: digest(v) for m in (tokenizer, self) for k, v in (*m.named_parameters(), *m.named_buffers())}
            return found | {"rng": digest(rng.get_state())}

        seen.append(everything())
        rehearse(self, tokenizer, images, **rest)
        seen.append(everything())
        assert all(p.grad is None for m in (tokenizer, self) for p in m.parameters())
        recon = self.reconstruct(tokenizer, images)
        self.gan.train_loss(images, recon.images, None)
        seen.append(everything())
        raise Enough

    rehearse = TokenizerObjective.rehearse
    monkeypatch.setattr(TokenizerObjective, "rehearse", watched)
    with pytest.raises(Enough):
        run(*OPTIONS, f"run_dir={tmp_path}")
    assert seen[0] == seen[1]
    moved = {name for name, value in seen[0].items() if seen[2][name] != value}
    assert {"rng", "quantizer.codebook.counts"} <= moved
    assert any("running_mean" in n for n in moved) and any("lecam" in n for n in moved)


@pytest.mark.parametrize("options", ({}, {"perceptual": True}, {"gan": GAN(discriminator=PatchGAN(layers=1, width=4))}))
@pytest.mark.parametrize("family", ("flextok_vae", "titok_proxy"))
def test_losses_of_images_without_a_gradient_are_refused(family, options):
    tokenizer = make(family) if family == "flextok_vae" else titok_proxy(stage="proxy")
    objective = TokenizerObjective(pixel_weight=float(not options), perceptual_weight=0.0, gan=options.get("gan"))
    if "perceptual" in options:  # its files are not at hand; the check is of the weight
        objective.perceptual_weight = 1.0
    named = "gan" if "gan" in options else "perceptual_weight" if options else "pixel_weight"
    with pytest.raises(ValueError, match=rf"carry no gradient.*nothing learns from objective\.{named}:"):
        objective.rehearse(tokenizer.train(), images(2), steps=10**6)
    TokenizerObjective(pixel_weight=0.0, perceptual_weight=0.0).rehearse(tokenizer, images(2), steps=10**6)
    TokenizerObjective(perceptual_weight=0.0).rehearse(make("flextok"), images(2), steps=1)  # pixels: a gradient


class OfImages(torch.nn.Module):
    """A term that reads images."""

    of_images = True

    def forward(self, recon, images, **rest):
        return {"seen": recon.images.mean()}


@pytest.mark.parametrize("family", ("flextok_vae", "titok_proxy"))
def test_images_without_a_gradient_are_made_in_eval_mode_alone(family):
    """A training pass takes the products of one in eval mode without the decoder's. The objective's loss, logs and
    gradients are those with images of weight 0; what would read images is refused in the loop too."""
    tokenizer = make(family) if family == "flextok_vae" else titok_proxy(stage="proxy").eval()
    work = {}
    for name in ("eval", "train"):
        with FlopCounterMode(display=False) as counter:
            recon = tokenizer.train(name == "train")(images(2), key=torch.tensor([3, 4]))
        work[name] = counter.get_total_flops()
        assert (recon.images is None) == (name == "train")
    with FlopCounterMode(display=False) as counter:
        if family == "flextok_vae":
            tokenizer.images(torch.zeros(2, tokenizer.channels, *(side // 4 for side in images(2).shape[2:])))
        else:
            tokenizer.head.render(recon.features["proxy_logits"], tokenizer.side)
    assert work["eval"] - work["train"] == counter.get_total_flops() > 0

    objective = TokenizerObjective(pixel_weight=0.0, perceptual_weight=0.0)
    found = []
    for shown in (None, images(2)):
        recon = tokenizer(images(2), key=torch.tensor([3, 4]))
        loss, logs = objective.generator_loss(replace(recon, images=shown), images(2), None, 0)
        for value in recon.features.values():
            loss = loss + value.square().mean()
        tokenizer.zero_grad()
        loss.backward()
        found.append(digest([logs, *(p.grad for p in tokenizer.parameters() if p.grad is not None)]))
    assert found[0] == found[1]
    objective = TokenizerObjective(pixel_weight=0.0, perceptual_weight=0.0, terms={"seen": OfImages()})
    with pytest.raises(ValueError, match=r"nothing learns from objective\.terms\.seen:.*to null"):
        objective.rehearse(tokenizer, images(2), steps=9)
    with pytest.raises(ValueError, match=r"nothing learns from objective\.terms\.seen:.*to null"):
        objective.generator_loss(tokenizer(images(2)), images(2), None, 5)


@pytest.mark.parametrize("layers, side", ((1, 6), (3, 24), (4, 48)))
def test_the_smallest_side_of_patchgan_is_the_smallest_that_runs(layers, side):
    network = PatchGAN(width=2, layers=layers)
    assert network(torch.zeros(2, 3, side, side)).numel()
    with pytest.raises(RuntimeError, match="Kernel size"):  # what torch says of a side less
        network.layers(torch.zeros(2, 3, side - 1, side - 1))
    with pytest.raises(ValueError, match=rf"from {side}: lower objective\.gan\.discriminator\.layers"):
        network(torch.zeros(2, 3, side - 1, side - 1))


@pytest.mark.parametrize(
    "discriminator, key",
    (
        (StyleGANDiscriminator(image_size=32, width=2), "image_size"),
        (TransformerDiscriminator(patch=24, width=8, depth=1, heads=1), "patch"),
    ),
)
def test_other_discriminators_name_their_key(discriminator, key):
    objective = TokenizerObjective(perceptual_weight=0.0, gan=GAN(discriminator=discriminator, start=5))
    with pytest.raises(ValueError, match=rf"\(16, 16\).*objective\.gan\.discriminator\.{key}"):
        objective.rehearse(make("cnn_vq").train(), images(2), steps=6)
    objective.rehearse(make("cnn_vq").train(), images(2), steps=5)


def test_compiled_blocks_are_not_compiled_for_it():
    tokenizer = make("titok").train()

    def backend(graph, inputs):
        raise AssertionError("compiled")

    compile_blocks(tokenizer, backend=backend)
    TokenizerObjective(perceptual_weight=0.0).rehearse(tokenizer, images(2), steps=1)
    with pytest.raises(Exception, match="compiled"):
        tokenizer(images(2))
