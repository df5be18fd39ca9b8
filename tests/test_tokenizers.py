"""What holds for every tokenizer, by looping over the families of tests/tokenizers.py."""

import inspect
from importlib import import_module

import pytest
import torch
from patterns import watched_patterns
from tokenizers import FAMILIES, STOCHASTIC_DECODERS, images, make

from vtok.checkpoint import save_folder
from vtok.config import build, completed, describe, differences
from vtok.layers.trunk import Trunk
from vtok.models import FAMILIES as CLASSES
from vtok.noise import SampleNoise
from vtok.quantize.fsq import FSQ
from vtok.quantize.kl import KL
from vtok.warmstart import warm_start

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
def test_a_family_says_what_it_draws(name):
    model, other = make(name), SampleNoise(KEYS + 1)
    tokens = model.encode(images(), noise=noise())
    assert model.encoder_draws == (not torch.equal(tokens, model.encode(images(), noise=other)))
    assert model.decoder_draws == (
        not torch.equal(model.decode(tokens, noise=noise()), model.decode(tokens, noise=other))
    )


@pytest.mark.parametrize("name", NAMES)
def test_patterns_say_what_the_ranks_say(name, monkeypatch):
    """As for the generators. Families of convolutions alone have no pass to look at."""
    model = make(name).train()
    seen = watched_patterns(monkeypatch)
    model.decode(model.encode(images()), noise=noise())
    model(images(), key=KEYS, progress=0.5)
    assert seen or not any(isinstance(m, Trunk) for m in model.modules())


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
    learned = sum(first.losses.values())
    if first.images is None:  # made in eval mode alone; the flow's loss is the mean of the rows'
        assert torch.equal(first.losses["flow"], second.losses["flow"])
        alone = [model(images()[i : i + 1], key=KEYS[i : i + 1], progress=0.5).losses["flow"] for i in range(3)]
        torch.testing.assert_close(sum(alone) / 3, first.losses["flow"], rtol=1e-4, atol=1e-5)
    else:
        torch.testing.assert_close(first.images, second.images, rtol=1e-4, atol=1e-5)
        alone = model(images()[2:], key=KEYS[2:], progress=0.5)
        torch.testing.assert_close(alone.images, first.images[2:], rtol=1e-4, atol=1e-4)
        learned = learned + first.images.square().mean()
    aligned = sum(f.square().mean() for f in first.features.values())  # projections that only an objective reads
    (learned + aligned).backward()
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


def aged(value):
    """A description as a version wrote it that knew none of the arguments that stand at their defaults."""
    if isinstance(value, list):
        return [aged(part) for part in value]
    if not isinstance(value, dict) or "family" not in value:
        return value
    module, _, name = CLASSES[value["family"]].partition(":")
    own = inspect.signature(getattr(import_module(module), name)).parameters
    usual = {k: list(p.default) if isinstance(p.default, tuple) else p.default for k, p in own.items()}
    return {**value, "arguments": {k: aged(v) for k, v in value["arguments"].items() if v != usual[k]}}


@pytest.mark.parametrize("name", NAMES)
def test_a_description_of_an_earlier_version_is_completed(name):
    description = describe(make(name))
    old = aged(description)
    assert len(str(old)) < len(str(description))
    assert completed(old, CLASSES) == description and completed([{"a": old}], CLASSES) == [{"a": description}]
    assert completed(old, {}) == old  # nobody's family
    assert differences(old, description) != [] == differences(completed(old, CLASSES), description)


def test_differences_are_named_leaf_by_leaf():
    one, other = (describe(make(name, nested={2: 1.0})) for name in ("retok", "retok"))
    other["arguments"]["network"]["arguments"]["quantizer"]["arguments"]["beta"] = 0.5
    other["arguments"]["nested"] = {"2": 1.0, "3": 2.0}
    found = [("tokenizer.network.quantizer.beta", 0.25, 0.5), ("tokenizer.nested.3", None, 2.0)]
    assert differences(one, other, "tokenizer") == found
    other = describe(make("retok", nested="all"))
    other["arguments"]["network"]["arguments"]["quantizer"] = describe(FSQ(levels=(5, 4)))
    assert differences(one, other) == [("network.quantizer", "VQ", "FSQ"), ("nested", {"2": 1.0}, "all")]
    one, other = (describe(make("hita")) for _ in range(2))
    other["arguments"]["quantizer"]["arguments"]["quantizers"][1]["arguments"]["vocab_size"] = 25
    other["arguments"]["quantizer"]["arguments"]["counts"] = [3]
    found = [("quantizer.quantizers[1].vocab_size", 24, 25), ("quantizer.counts", [4], [3])]
    assert differences(one, other) == found


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


def at_size(name: str, size: int, **options):
    """The family built for images of another side, by its configuration: image_size, and scales that end with the
    larger map."""
    stride = make(name).stride

    def changed(value, key=""):
        if key == "image_size":
            return size
        if key == "sides":
            return [*value[:-1], size // stride]
        if isinstance(value, dict):
            return {k: options.get(k, changed(v, k)) for k, v in value.items()}
        return [changed(v) for v in value] if isinstance(value, list) else value

    torch.manual_seed(0)
    return build(changed(describe(make(name))), CLASSES).eval()


@pytest.mark.parametrize("name", NAMES)
def test_another_image_size_is_a_matter_of_the_configuration(name):
    """Any multiple of the stride; ResTok's merges of its grid ask for more, unless stages=1 switches them off."""
    size = 16 + make(name).stride
    model = at_size(name, size, **({"stages": 1} if name == "restok" else {}))
    pictures = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    tokens = model.encode(pictures)
    model.spec.check(tokens)
    assert model.spec.image_size == size and len(tokens) == 2
    decoded = model.decode(tokens, noise=noise(2))
    assert decoded.shape == pictures.shape and bool(decoded.isfinite().all())
    with pytest.raises(ValueError, match=f"image_size={size + 1} must be a multiple of"):
        model.spec_for(size + 1)
    with pytest.raises(ValueError, match=f"image_size={size + 1} must be a multiple of"):
        at_size(name, size + 1)


ONE_SIZE = {"titok", "titok_proxy", "titok_kl", "gigatok", "retok", "var", "flexvar"}  # learned tables, or scales


@pytest.mark.parametrize("name", NAMES)
def test_a_trained_model_takes_another_size_or_says_what_to_do(name):
    model = make(name)
    size = 32 if name == "restok" else 16 + model.stride
    if name not in ONE_SIZE:
        pictures = torch.rand(2, 3, size, size) * 2 - 1
        tokens = model.encode(pictures)
        model.spec_for(size).check(tokens)
        assert model.decode(tokens, size=size, noise=noise(2)).shape == pictures.shape
        size = 16 + model.stride  # which ResTok's merges do not take
        if name != "restok":
            return
    with pytest.raises(ValueError, match=f"image_size.*{size}.*data.image_size.*scripts/reconstruct.py") as caught:
        model.spec_for(size)
    remedy = {"restok": "tokenizer.stages", "var": "sides end with 5", "flexvar": "sides end with 5"}
    assert remedy.get(name, f"train a tokenizer with data.image_size={size}") in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_only_families_of_one_token_a_cell_take_pictures_that_are_no_squares(name):
    model, wide = make(name), torch.rand(1, 3, 16, 32) * 2 - 1
    if model.grows == "any":
        assert model.encode(wide).shape[1] == 2 * model.spec.layout.length
        return
    with pytest.raises(ValueError, match=r"takes square images, got \(16, 32\): decode\(size=\) is one side"):
        model.encode(wide)


def test_flexvar_sees_a_window_as_the_tokenizer_of_that_size_does():
    """The smaller scales and the window's own, in place of the last."""
    small, large = make("flexvar"), at_size("flexvar", 32)
    large.load_state_dict(small.state_dict())
    windows = torch.rand(2, 3, 16, 16) * 2 - 1
    expected, found = small(windows), large(windows)
    assert torch.equal(found.tokens, expected.tokens) and found.losses["scales"] > 0
    torch.testing.assert_close(found.images, expected.images)
    torch.testing.assert_close(found.losses, expected.losses)


@pytest.mark.parametrize("name", ["var", "flexvar"])
def test_weights_go_over_to_other_scales(name, tmp_path):
    """init_from= of the same network for larger images: no weight is new."""
    old, new = make(name), at_size(name, 32)
    save_folder(old, tmp_path)
    found = warm_start(new, tmp_path, CLASSES)
    assert not found.new and not found.resized and not found.unused
    for key, value in new.state_dict().items():
        assert torch.equal(value, old.state_dict()[key]), key


@pytest.mark.parametrize("name", NAMES)
def test_prefixes_out_of_range_are_refused(name):
    model = make(name)
    if not model.prefixes:
        return
    tokens, length = model.encode(images()), model.spec.layout.length
    for keep in (0, length + 1, torch.tensor([1, 0, 1]), torch.tensor([1, length + 1, 1])):
        with pytest.raises(ValueError, match="keep"):
            model.decode(tokens, keep=keep)


@pytest.mark.parametrize("name", ["titok_kl", "restok", "gigatok", "retok", "dar", "detailflow"])
def test_one_dimensional_families_draw_continuous_tokens_in_training(name):
    """Around a KL, training decodes the keyed draws of the posterior, not its mean."""
    description = describe(make(name))
    arguments = description["arguments"]
    arguments = arguments["network"]["arguments"] if "network" in arguments else arguments
    arguments["quantizer"] = describe(KL(channels=6))
    torch.manual_seed(0)
    model = build(description, CLASSES).train()
    found = model(images(), key=KEYS, progress=0.5).tokens
    torch.testing.assert_close(found, model.encode(images(), noise=noise()))
    assert not torch.allclose(found, model.encode(images()), atol=0.1)
