"""tokenizer_sides: the weights of a tokenizer with scales on another list of them, for the training of a generator."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from runs import GENERATOR, TOKENIZER, run, tokenizer_folder
from tokenizers import CNN, images, make

from vgen.conditioning import Cond
from vgen.guidance import Unguided
from vgen.heads import DrawRule
from vgen.models import FAMILIES
from vgen.pipeline import Pipeline
from vtok.checkpoint import load_module, read_config, save_folder
from vtok.data.codes import on_sides
from vtok.layout import SequenceLayout
from vtok.models.var import VARTokenizer
from vtok.noise import SampleNoise, sample_seeds
from vtok.quantize.residual import MultiScaleVQ

THIN = ("model=flexvar_small", "model.depth=1", "model.width=16", "model.heads=2")


@torch.no_grad()
def test_flexvars_scales_are_the_nearest_codes_of_the_averaged_map():
    """By hand, for every side up to the grid's; those of the tokenizer's own list are the tokens that it gives."""
    tokenizer, shown = make("flexvar"), images()
    other = on_sides(tokenizer, [1, 2, 3, 4])
    assert other.spec.layout == SequenceLayout.scales((1, 2, 3, 4)) and other.spec.image_size == 16
    found, own = other.encode(shown), tokenizer.encode(shown)
    assert torch.equal(found[:, :5], own[:, :5]) and torch.equal(found[:, 14:], own[:, 5:])
    grid = tokenizer.features(shown).movedim(-1, 1).double()
    table = F.normalize(tokenizer.quantizer.codebook.weight.double(), dim=-1)
    third = F.interpolate(grid, size=3, mode="area").flatten(2).transpose(1, 2)
    assert torch.equal(found[:, 5:14], (F.normalize(third, dim=-1) @ table.T).argmax(-1))
    assert len(found[:, 5:14].unique()) > 3
    assert torch.equal(other.decode(found), tokenizer.decode(own)), "the last scale alone makes the image"


@torch.no_grad()
def test_vars_scales_take_the_convolution_of_their_share():
    """Twice the grid, as VAR-d36 reads its tokenizer: residuals and shared convolutions by hand, the one whose of
    1/6 and 5/6 is nearest to k / (K - 1) (arXiv 2404.02905)."""
    tokenizer = make("var")
    other = on_sides(tokenizer, [1, 2, 5, 8])
    assert (other.spec.image_size, other.spec.layout.length, other.training) == (32, 94, False)
    assert not any(p.requires_grad for p in other.parameters())
    shown = F.interpolate(images(), 32, mode="nearest") * torch.linspace(0.2, 1, 32)
    found, quantizer = other.encode(shown), tokenizer.quantizer
    rest, table = tokenizer.features(shown).movedim(-1, 1).double(), quantizer.codebook.weight.double()
    for (a, b), side, phi in zip(((0, 1), (1, 5), (5, 30), (30, 94)), (1, 2, 5, 8), (0, 0, 1, 1)):
        pooled = F.interpolate(rest, size=side, mode="area").flatten(2).transpose(1, 2)
        ids = torch.cdist(pooled, table).argmin(-1)
        assert torch.equal(found[:, a:b], ids)
        made = table[ids].transpose(1, 2).unflatten(2, (side, side))
        made = F.interpolate(made, size=8, mode="bicubic") if side < 8 else made
        weight, bias = (part.double() for part in (quantizer.phi[phi].weight, quantizer.phi[phi].bias))
        rest = rest - 0.5 * made - 0.5 * F.conv2d(made, weight, bias, padding=1)


def trained(folder: Path, *options: str) -> Path:
    if not (folder / "tokenizer").is_dir():
        save_folder(make("flexvar"), folder / "tokenizer")
    base = (*GENERATOR, *THIN, "+model.sides=[1,2,4]", "steps=2", "val_every=2")
    run(*base, f"tokenizer_from={folder / 'tokenizer'}", f"run_dir={folder / 'run'}", *options)
    return folder / "run"


def test_a_generator_trains_and_samples_on_other_scales(tmp_path, capsys):
    """The run keeps the tokenizer as it was read; lists of training come from all scales, the model writes its own."""
    place = trained(tmp_path, "tokenizer_sides=[1,2,3,4]")
    assert read_config(place / "tokenizer")["arguments"]["quantizer"]["arguments"]["sides"] == [1, 2, 3, 4]
    model = load_module(place, FAMILIES, "raw")
    assert (model.known_sides, model.own_sides) == ((1, 2, 3, 4), (1, 2, 4))
    assert {side for key in sample_seeds(0, 0, 64) for side in model.draw_sides(key[None])} == {1, 2, 3, 4}
    pipeline, seeds = Pipeline.load(place), sample_seeds(0, 0, 2)
    drawn = pipeline(torch.tensor([0, 1]), seeds)
    assert drawn.shape == (2, 16, 16, 3)
    cond = Cond.cat([pipeline.generator.conditioner(torch.tensor([0, 1]))])
    canvas = pipeline.generator.sampler(
        pipeline.generator, cond, noise=SampleNoise(seeds), guide=Unguided(), rule=DrawRule()
    )
    assert canvas.layout.sizes == (1, 4, 16)
    capsys.readouterr()
    trained(tmp_path, "tokenizer_sides=[1,2,3,4]", "resume=last", "stop_after=2")
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"spec|sides"):
        trained(tmp_path, "resume=last", "stop_after=2")


@pytest.mark.parametrize(
    "given, words",
    [
        ("[1,4,2]", r"tokenizer_sides=\[1, 4, 2\]: give growing whole numbers"),
        ("[]", "give growing whole numbers"),
        ("[0,4]", "give growing whole numbers"),
        ("[1,2.5,4]", "give growing whole numbers"),
        ("4", r"tokenizer_sides=4: give a list"),
        ("[1,2,8]", r"image_size=16 does not fit quantizer.sides\[-1\]=8"),
    ],
)
def test_lists_that_cannot_be_encoded_are_refused(given, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        trained(tmp_path, f"tokenizer_sides={given}")


def test_what_has_no_scales_to_choose_refuses_the_key(tmp_path):
    folder = tokenizer_folder(tmp_path / "tokenizer")
    plain = (*GENERATOR, "model=llamagen_tiny", "tokenizer_sides=[1,2,4]", f"run_dir={tmp_path / 'run'}")
    with pytest.raises(ValueError, match=r"tokenizer_sides=\[1, 2, 4\]: CNNTokenizer has no scales; leave it null"):
        run(*plain, f"tokenizer_from={folder}")
    with pytest.raises(ValueError, match="tokenizer_sides encodes images, data=codes has none"):
        run("data=codes", "data.folder=none", *THIN, "tokenizer_sides=[1,2,4]", f"run_dir={tmp_path / 'run'}")
    with pytest.raises(ValueError, match="tokenizer_sides= is for the training of a generator"):
        run(*TOKENIZER, "tokenizer_sides=[1,2,4]", f"run_dir={tmp_path / 'run'}")


def test_weights_of_a_scale_each_belong_to_a_number_of_scales():
    quantizer = MultiScaleVQ(vocab_size=32, channels=6, sides=(1, 2, 4), phi=0)
    tokenizer = VARTokenizer(image_size=16, quantizer=quantizer, z_channels=None, projection=3, **CNN)
    assert on_sides(tokenizer, [1, 3, 4]).spec.layout.length == 26
    with pytest.raises(ValueError, match="weights for each of its 3 scales"):
        on_sides(tokenizer, [1, 2, 3, 4])
