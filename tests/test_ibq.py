"""Index backpropagation: against its equation written out with one-hot tables."""

from __future__ import annotations

import pytest
import torch

import vtok.quantize.ibq as module
from vtok.convert import convert
from vtok.models.cnn import CNNTokenizer
from vtok.quantize.entropy import EPS
from vtok.quantize.ibq import IBQ


def reference(z: torch.Tensor, table: torch.Tensor, quantizer: IBQ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ids, z_q, total loss) of vectors [N, C], as the paper's equations read."""
    logits = z @ table.T
    soft = logits.softmax(-1)
    hard = torch.nn.functional.one_hot(logits.argmax(-1), len(table)).to(soft.dtype)
    quantized = (hard - soft.detach() + soft) @ table
    chosen = hard @ table
    loss = (quantized - z).square().mean() + (chosen.detach() - z).square().mean()
    loss = loss + quantizer.beta * (chosen - z.detach()).square().mean()
    shares = (logits / quantizer.temperature).softmax(-1)
    sample = -torch.special.xlogy(shares, shares).sum(-1).mean()
    mean = shares.mean(0)
    batch = -(mean * torch.log(mean + EPS)).sum()
    weights = quantizer.sample_weight, quantizer.batch_weight
    return logits.argmax(-1), quantized, loss + quantizer.entropy_weight * (weights[0] * sample - weights[1] * batch)


@pytest.mark.parametrize("rows", (None, 1, 5))
@pytest.mark.parametrize("entropy", (0.0, 0.05))
def test_values_and_gradients_are_the_papers(rows, entropy, monkeypatch):
    """In one part, row by row, and in parts with a rest: chunked equals unchunked."""
    torch.manual_seed(0)
    arguments = dict(sample_weight=0.7, batch_weight=1.3, temperature=0.5)
    quantizer = IBQ(vocab_size=11, channels=4, entropy_weight=entropy, **arguments)
    if rows:
        monkeypatch.setattr(module, "BUDGET", rows * 11)
    z = torch.randn(2, 3, 4, requires_grad=True)
    found = quantizer(z)
    ids, quantized, loss = reference(z.flatten(0, 1), quantizer.codebook, quantizer)
    assert torch.equal(found.ids.flatten(), ids) and torch.equal(quantizer.indices(z).flatten(), ids)
    torch.testing.assert_close(found.z.flatten(0, 1), quantized, rtol=1e-6, atol=1e-6)
    assert torch.equal(found.codes, quantizer.lookup(found.ids))
    total = sum(found.loss.values())
    torch.testing.assert_close(total, loss, rtol=1e-6, atol=1e-6)
    weight = torch.randn(6, 4)
    ours = torch.autograd.grad(total + (weight * found.z.flatten(0, 1)).sum(), (z, quantizer.codebook))
    theirs = torch.autograd.grad(loss + (weight * quantized).sum(), (z, quantizer.codebook))
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_gradient_reaches_every_code():
    torch.manual_seed(0)
    quantizer = IBQ(vocab_size=50, channels=4, entropy_weight=0.0)
    found = quantizer(0.1 * torch.randn(1, 3, 4))
    found.z.square().sum().backward()
    chosen = set(found.ids.flatten().tolist())
    assert len(chosen) <= 3 and bool((quantizer.codebook.grad.abs().sum(1) > 0).all())


def test_the_largest_product_is_not_the_nearest_code():
    quantizer = IBQ(vocab_size=2, channels=2)
    with torch.no_grad():
        quantizer.codebook.copy_(torch.tensor([[1.0, 0.0], [9.0, 9.0]]))
    assert quantizer.indices(torch.tensor([[[1.0, 0.0]]])).item() == 1


def test_mistakes_are_named():
    for wrong in ({"vocab_size": 0}, {"channels": 0}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            IBQ(**(dict(vocab_size=4, channels=2) | wrong))
    with pytest.raises(ValueError, match="channels"):
        IBQ(vocab_size=4, channels=2)(torch.randn(1, 2, 3))


def published(vocab_size: int) -> CNNTokenizer:
    return CNNTokenizer(
        image_size=256, quantizer=IBQ(vocab_size=vocab_size, channels=256), blocks=4, decoder_blocks=5, mid_blocks=2
    )


@pytest.mark.parametrize("vocab_size", (1024, 8192, 16384, 262144))
def test_published_sizes(vocab_size):
    with torch.device("meta"):
        tokenizer = published(vocab_size)
    counts = [sum(p.numel() for p in part.parameters()) for part in (tokenizer.encoder, tokenizer.decoder, tokenizer)]
    assert counts == [46_752_256, 59_903_875, 46_752_256 + 59_903_875 + 2 * (256 * 256 + 256) + 256 * vocab_size]


def original(tokenizer: CNNTokenizer) -> dict[str, torch.Tensor]:
    """Its state under the original's names, q, k and v apart."""
    last, state = len(tokenizer.encoder.levels) - 1, {}
    fixed = {"project_in": "quant_conv", "project_out": "post_quant_conv"}
    for key, value in tokenizer.state_dict().items():
        half, *rest = key.split(".")
        if half in fixed:
            state[f"{fixed[half]}.{rest[0]}"] = value
            continue
        if key == "quantizer.codebook":
            state["quantize.embedding.weight"] = value
            continue
        if rest[0] == "levels":
            index = int(rest[1]) if half == "encoder" else last - int(rest[1])
            kinds = {
                "blocks": "block",
                "attention": "attn",
                "resample": f"{'down' if half == 'encoder' else 'up'}sample",
            }
            rest = ["down" if half == "encoder" else "up", str(index), kinds[rest[2]], *rest[3:]]
        elif rest[0] == "mid":
            rest = ["mid", {"0": "block_1", "1": "attn_1", "2": "block_2"}[rest[1]], *rest[2:]]
        if rest[-2] == "qkv":
            for name, part in zip("qkv", value.chunk(3)):
                state[".".join([half, *rest[:-2], name, rest[-1]])] = part
            continue
        rest[-2] = {"shortcut": "nin_shortcut", "out": "proj_out"}.get(rest[-2], rest[-2])
        state[".".join([half, *rest])] = value
    return state


def test_original_files_convert():
    torch.manual_seed(0)
    shape = dict(channels=32, multipliers=[1, 2], blocks=1, z_channels=8)
    tokenizer = CNNTokenizer(image_size=16, quantizer=IBQ(vocab_size=20, channels=4), **shape).eval()
    state = original(tokenizer)
    assert "encoder.down.1.attn.0.k.weight" in state and "decoder.mid.attn_1.proj_out.bias" in state
    file = state | {"model_ema." + k.replace(".", ""): v for k, v in state.items()} | {"loss.y": torch.ones(1)}
    network = {"ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1, "z_channels": 8, "attn_resolutions": [8]}
    loss = {"params": {"entropy_loss_weight": 0.2}}
    config = {"IBQ": {"ddconfig": network, "lossconfig": loss, "n_embed": 20, "embed_dim": 4}, "image_size": 16}
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    for source in (state, file):
        again = convert("ibq", source, config)
        assert again.quantizer.entropy_weight == 0.2
        assert torch.equal(again.encode(images), tokenizer.encode(images))
        assert torch.equal(again(images).images, tokenizer(images).images)
    for key in state:
        with pytest.raises(ValueError):
            convert("ibq", {k: v for k, v in state.items() if k != key}, config)
    for wrong in ({"n_embed": 21}, {"l2_normalize": True}, {"colour": 1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            convert("ibq", state, config | {"IBQ": config["IBQ"] | wrong})
