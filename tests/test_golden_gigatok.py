"""GigaTok's and ReToK's recorded outputs, met through vtok.convert.convert."""

import pytest
import torch
import torch.nn.functional as F
from references import assert_close, read

from vtok.convert import convert
from vtok.layers.cnn import from_map


def converted(family: str):
    state, given, want, info = read(family)
    heads = {"encoder_heads": 2, "decoder_heads": 2}  # of the reference's own small size
    model = convert(family, state, info["ctor"] | heads)
    return model, state, given, want, info["ctor"] | heads


def sequence(x: torch.Tensor) -> torch.Tensor:
    """[B, C, 1, L] to [B, L, C]."""
    return x.squeeze(2).transpose(1, 2)


@pytest.mark.parametrize("family", ("gigatok", "retok"))
@torch.no_grad()
def test_outputs(family):
    model, _, given, want, _ = converted(family)
    image, tokens = given["image"], model.spec.layout.length
    network = model.network if family == "retok" else model
    grid = network.grid(image)
    assert_close(grid, want["spatial"])
    vectors = network.vectors(grid)
    assert_close(vectors, sequence(want["features"]))
    found = model.quantizer(vectors)
    assert torch.equal(found.ids.flatten(), want["indices"])
    assert_close(found.z, sequence(want["quant"]))
    assert torch.equal(model.encode(image), found.ids[:, :tokens])
    other = model.quantizer(from_map(given["z"]))
    assert_close(other.z, from_map(want["z_quant"]))
    assert torch.equal(other.ids.flatten(), want["z_indices"].flatten())
    rec, hidden = network.regrid(found.z[:, :tokens])
    assert_close(rec, want["rec_spatial"])
    assert_close(network.alignment(hidden), want["inner_feat"])
    assert_close(model(image).features["alignment"], want["inner_feat"])
    assert_close(network.decoder(grid), want["train_direct"])
    losses = [found.loss["codebook"], found.loss["commitment"], F.mse_loss(rec, grid)]
    assert_close(torch.stack(losses), want["train_losses"])
    network.auxiliary_until = 0.5
    early = model(image, progress=0.4)
    assert_close(early.losses["feature"].view(1), want["train_losses"][2:])
    assert_close(early.features["direct_images"], want["train_direct"])
    assert "feature" not in model(image, progress=0.5).losses
    # the original's codes carry the rounding of its rotation (3e-6), and the norms of the decoder multiply differences
    # of its input some fifty times; in float64 ours adds nothing to them
    exact = model.double()
    assert_close(exact.pixels(sequence(want["quant"])[:, :tokens]), want["image"])
    assert_close(exact(image).images, want["image"])
    assert_close(exact.decode(found.ids[:, :tokens]), want["image"])
    assert_close(exact.decode(given["indices"]), want["image_from_given"])
    if family == "retok":
        assert tokens == 256 and vectors.shape[1] == 480
        each = torch.full((len(image),), 64)
        for keep in (64, each):
            assert_close(exact.decode(given["indices"], keep=keep), want["image_64_tokens"])
            assert_close(exact.decode(found.ids[:, :tokens], keep=keep), want["image_first_64_of_all"])


@pytest.mark.parametrize("family", ("gigatok", "retok"))
def test_every_key_and_argument_counts(family):
    _, state, _, _, config = converted(family)
    for extra in ("quantize.embedding.bias", "s1to2decoder.mask_token", "module.encoder.conv_in.weight"):
        with pytest.raises(ValueError, match=extra):
            convert(family, state | {extra: torch.zeros(1)}, config)
    for key in sorted(state)[::7]:
        with pytest.raises(ValueError):
            convert(family, {k: v for k, v in state.items() if k != key}, config)
    arguments = config["VQVitModelPlusArgs"]
    for wrong in ({"colour": 1}, {"z_channels": 7}, {"use_rope": True}, {"num_latent_tokens": 3}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            convert(family, state, config | {"VQVitModelPlusArgs": arguments | wrong})
