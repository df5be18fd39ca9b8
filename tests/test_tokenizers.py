"""What holds for every tokenizer, by looping over the families of tests/tokenizers.py."""

import pytest
import torch
from tokenizers import FAMILIES, STOCHASTIC_DECODERS, images, make

from vtok.config import build, describe
from vtok.models import FAMILIES as CLASSES
from vtok.noise import SampleNoise

NAMES = sorted(FAMILIES)
KEYS = torch.tensor([11, 22, 33])


def noise(rows: int = 3) -> SampleNoise:
    return SampleNoise(KEYS[:rows])


@pytest.mark.parametrize("name", NAMES)
def test_tokens_meet_their_spec_and_decode_to_images(name):
    model = make(name)
    tokens = model.encode(images())
    model.spec.check(tokens)
    assert len(tokens) == 3 and model.spec.image_size == 16
    decoded = model.decode(tokens, noise=noise())
    assert decoded.shape == images().shape and bool(decoded.isfinite().all())
    assert torch.equal(decoded, model.decode(tokens, noise=noise()))


@pytest.mark.parametrize("name", NAMES)
def test_rows_do_not_depend_on_their_batch(name):
    model = make(name)
    tokens = model.encode(images())
    alone = model.encode(images()[1:2])
    same = (alone == tokens[1:2]) if model.spec.discrete else (alone - tokens[1:2]).abs() < 1e-5
    assert float(same.float().mean()) > 0.99
    together = model.decode(tokens, noise=noise())[1:2]
    torch.testing.assert_close(model.decode(tokens[1:2], noise=SampleNoise(KEYS[1:2])), together, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_training_pass_has_keyed_draws_and_gradients_everywhere(name):
    """Two passes with the same keys agree; a row alone draws what it drew in the batch; no parameter is left out."""
    model = make(name).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    first, second = (model(images(), key=KEYS, progress=0.5) for _ in range(2))
    assert torch.equal(first.tokens, second.tokens)
    torch.testing.assert_close(first.images, second.images, rtol=1e-4, atol=1e-5)
    alone = model(images()[2:], key=KEYS[2:], progress=0.5)
    torch.testing.assert_close(alone.images, first.images[2:], rtol=1e-4, atol=1e-4)
    aligned = sum(f.square().mean() for f in first.features.values())  # projections that only an objective reads
    (first.images.square().mean() + sum(first.losses.values()) + aligned).backward()
    missing = [k for k, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing, f"no gradient: {missing}"
    assert model.last_layer.grad is not None and model.last_layer.requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_a_description_rebuilds_the_tokenizer(name):
    model = make(name)
    again = build(describe(model), CLASSES).eval()
    again.load_state_dict(model.state_dict())
    tokens = model.encode(images())
    assert torch.equal(again.encode(images()), tokens)
    assert torch.equal(again.decode(tokens, noise=noise()), model.decode(tokens, noise=noise()))
    assert again.spec == model.spec


@pytest.mark.parametrize("name", NAMES)
def test_codes_are_looked_up_bitwise(name):
    model = make(name)
    if not model.spec.discrete:
        tokens = model.encode(images())
        assert torch.equal(model.embed(tokens), tokens)
        return
    found = model.quantizer(model.features(images()))
    assert torch.equal(model.quantizer.lookup(found.ids), found.codes)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in STOCHASTIC_DECODERS])
def test_training_pass_in_eval_mode_is_encode_then_decode(name):
    model = make(name)
    with torch.no_grad():
        recon = model(images())
    torch.testing.assert_close(model.decode(model.encode(images())), recon.images, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_prefixes_of_tokens(name):
    model = make(name)
    tokens, length = model.encode(images()), model.spec.layout.length
    if not model.prefixes:
        with pytest.raises(ValueError, match="keep"):
            model.decode(tokens, keep=1)
        return
    whole = model.decode(tokens, noise=noise())
    torch.testing.assert_close(model.decode(tokens, keep=length, noise=noise()), whole, rtol=1e-4, atol=1e-5)
    part = model.decode(tokens, keep=1, noise=noise())
    changed = tokens.clone()
    changed[:, 1:] = tokens.flip(0)[:, 1:]
    torch.testing.assert_close(model.decode(changed, keep=1, noise=noise()), part, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(part, whole, atol=1e-3)
