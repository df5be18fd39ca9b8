"""`python sample.py` draws for every family, shows the steps of coarse-to-fine ones, and `scripts/edit.py` edits."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from pairs import PAIRS, pair, pair_folder
from PIL import Image

from vgen.conditioning import Cond
from vgen.editing import region
from vgen.guidance import ClassifierFree, Unguided
from vgen.heads import DrawRule
from vgen.models import FAMILIES as TABLE
from vgen.models.llamagen import LlamaGen
from vgen.models.rar import RAR
from vgen.pipeline import Pipeline
from vgen.previews import Previews, preview_ends, previews
from vgen.samplers.ancestral import ancestral
from vgen.sampling import sample
from vtok import counters
from vtok.checkpoint import save_folder
from vtok.data.transforms import to_float, to_uint8
from vtok.layers.packed import packable
from vtok.layout import SequenceLayout
from vtok.models import FAMILIES as TOKENIZERS
from vtok.noise import SampleNoise, sample_seeds
from vtok.tokenizer import Part, TokenSpec

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.edit import DRAWING, cropped, edit, kept_pixels  # noqa: E402

# pairs whose steps are pictures, with the tokens that each shown step ends
COARSE = {"var": [1, 5, 21], "flexvar": [1, 5, 21], "har": [1, 2, 4, 8], "detailflow": [1, 2, 4, 6, 8]}
COARSE |= {key: [1, 2, 3, 4, 5, 6, 7, 8] for key in ("dar", "retok", "flextok")}
MAPS = {key: [1, 5, 21] for key in ("flowar", "ecar", "xar_scale")}  # one latent map at growing resolution


def config(name: str, **options):
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        found = compose(name)
    for key, value in {"device": "cpu", **options}.items():
        found[key] = value
    return found


def test_every_family_has_a_pair():
    kinds = {type(pair(name)[0]).__name__ for name in PAIRS}
    assert kinds == set(TABLE) - set(TOKENIZERS)


@pytest.mark.parametrize("name", PAIRS)
def test_sample_draws_for_every_family(name, tmp_path):
    folder, out = pair_folder(name, tmp_path / "run"), tmp_path / "images.npz"
    options = {"preview": str(tmp_path / "strip.png")} if name in COARSE | MAPS else {}
    guidance = {} if name == "maskgit" else {"guidance": 2.0}
    sample(config("sample", **{"from": str(folder), "out": str(out), "classes": [2], "per_class": 2, "chunk": 2},
                  **guidance, **options))  # fmt: skip
    images = np.load(out)["arr_0"]
    assert images.shape == (2, 16, 16, 3) and images.dtype == np.uint8
    assert (images[0] != images[1]).any(), "two seeds give two images"
    if name in COARSE | MAPS:  # the last column of the strip is the image
        strip = np.asarray(Image.open(tmp_path / "strip.png"))[14:]
        cell = 4 * 16 + 2
        assert strip.shape == (2 * cell, len((COARSE | MAPS)[name]) * cell, 3)
        for row in range(2):
            last = strip[row * cell : row * cell + 64, -cell:-2]
            np.testing.assert_array_equal(last[::4, ::4], images[row])


IDS = [({"solver": "heun"}, "leave them out"), ({"solver_steps": 3}, "leave them out")]
FLOWS = [({"solver": "rk"}, "choose euler"), ({"top_k": 3}, "continuous")]
FLOWS += [({"solver": "euler_maruyama", "solver_steps": 1}, "too few")]
MISTAKES = dict.fromkeys(("llamagen", "llamagen_factorised", "hita", "var", "maskgit"), IDS)
MISTAKES |= dict.fromkeys(("xar", "flowar", "mar_flow", "dtm", "artm"), FLOWS)
MISTAKES["mar"] = [({"solver": "heun"}, "leave solver away"), ({"solver_steps": 5000}, "1 .. 1000"), FLOWS[1]]
MISTAKES["ecar"] = [({"solver": "euler_maruyama"}, "choose euler"), FLOWS[1]]


@pytest.mark.parametrize("name", MISTAKES)
def test_what_a_model_has_not_is_said_before_an_older_folder_is_emptied(name, tmp_path):
    folder, out = pair_folder(name, tmp_path / "run"), tmp_path / "images"
    options = {"from": str(folder), "out": str(out), "num_images": 2}
    sample(config("sample", **options))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for given, words in MISTAKES[name]:
        with pytest.raises(ValueError, match=words):
            sample(config("sample", **options, **given))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before and len(before) == 3


def test_guidance_of_an_unconditional_model_is_refused_before_an_older_folder_is_emptied(tmp_path):
    _, tokenizer = pair("llamagen")
    free = LlamaGen(tokenizer.spec, 0, depth=1, width=16, heads=2, multiple_of=8)
    save_folder(free, tmp_path / "run")
    save_folder(tokenizer, tmp_path / "run" / "tokenizer")
    options = {"from": str(tmp_path / "run"), "out": str(tmp_path / "images"), "num_images": 2}
    sample(config("sample", **options))
    with pytest.raises(ValueError, match="unconditional"):
        sample(config("sample", **options, guidance=2.0))
    assert len(list((tmp_path / "images").glob("*.png"))) == 2


@pytest.mark.parametrize("name", COARSE)
def test_previews_end_in_the_image_and_show_the_tokens_so_far(name):
    pipeline = Pipeline(*pair(name))
    assert preview_ends(pipeline.generator, pipeline.tokenizer) == COARSE[name]
    seeds, written = sample_seeds(0, 0, 2), []
    tokens = pipeline.tokens(
        torch.tensor([0, 1]), seeds, guide=Unguided(), rule=DrawRule(),
        on_step=lambda canvas, progress: written.append(pipeline.generator.restore(canvas).clone()),
    )  # fmt: skip
    frames = previews(pipeline, tokens)
    assert torch.equal(frames[:, -1], to_uint8(pipeline.tokenizer.decode(tokens)))
    for k, end in enumerate(COARSE[name]):  # the canvas as the sampler had it after that step
        assert torch.equal(frames[:, k], to_uint8(pipeline.tokenizer.decode(written[k], keep=end)))
    assert (frames[:, 0] != frames[:, -1]).any()


@pytest.mark.parametrize("name", MAPS)
def test_maps_of_growing_resolution_are_shown_at_that_of_the_image(name, tmp_path):
    """After each step, the map that the sampler had written then, enlarged by hand and decoded."""
    pipeline, seeds, maps = Pipeline(*pair(name), chunk=2), sample_seeds(0, 0, 2), []

    def keep(canvas, progress):
        a, b = canvas.layout.written(progress.step, progress.step + 1)
        maps.append(canvas.tokens[:, a:b].clone().transpose(1, 2).unflatten(2, (2**progress.step,) * 2))

    pipeline.tokens(torch.tensor([0, 1]), seeds, guide=Unguided(), rule=DrawRule(), on_step=keep)
    shown = Previews(pipeline, tmp_path / "strip.png", seeds)
    assert shown.ends == MAPS[name]
    images = pipeline(torch.tensor([0, 1]), seeds, on_tokens=shown)
    frames = torch.from_numpy(shown.frames(images.numpy()))
    assert torch.equal(frames[:, -1], images)
    for frame, coarse in zip(frames.unbind(1), maps):
        full = torch.nn.functional.interpolate(coarse, (4, 4), mode="bicubic") if coarse.shape[-1] < 4 else coarse
        assert torch.equal(frame, to_uint8(pipeline.tokenizer.decode(full.flatten(2).transpose(1, 2))))
    assert (frames[:, 0] != frames[:, -1]).any()


def test_levels_of_one_resolution_are_no_previews():
    """DTM writes whole maps too, but each as large as the image: only growing sides are coarse to fine."""
    with pytest.raises(ValueError, match="whole images"):
        preview_ends(*pair("dtm"))


def test_a_long_sequence_is_shown_in_sixteen_pictures():
    _, tokenizer = pair("dar")
    spec = TokenSpec(SequenceLayout.line(64), (Part(64, 32, 6),), 16)
    generator = LlamaGen(spec, 4, depth=1, width=16, heads=2, multiple_of=8, position="rope_1d")
    ends = preview_ends(generator, tokenizer)
    assert len(ends) == 16 and ends[0] == 1 and ends[-1] == 64 and ends == sorted(set(ends))


@pytest.mark.parametrize("name, words", [("llamagen", "whole images"), ("maskgit", "whole images"), ("mar", "whole")])
def test_families_whose_steps_are_no_pictures_say_so(name, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        Previews(Pipeline(*pair(name)), tmp_path / "strip.png")


def test_tokens_one_by_one_of_a_tokenizer_with_scales_are_shown_where_a_scale_ends():
    _, tokenizer = pair("var")
    pipeline = Pipeline(RAR(tokenizer.spec, 4, depth=1, width=16, heads=2), tokenizer)
    assert preview_ends(pipeline.generator, tokenizer) == [1, 5, 21]
    tokens = pipeline.tokens(torch.tensor([0, 1]), sample_seeds(0, 0, 2), guide=Unguided(), rule=DrawRule())
    for frame, end in zip(previews(pipeline, tokens).unbind(1), (1, 5, 21)):
        assert torch.equal(frame, to_uint8(tokenizer.decode(tokens, keep=end)))


def test_images_are_written_before_their_preview(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(Previews, "write", full)
    folder, out = pair_folder("var", tmp_path / "run"), tmp_path / "images.npz"
    with pytest.raises(OSError, match="no space"):
        sample(config("sample", **{"from": str(folder), "out": str(out), "preview": "strip.png", "num_images": 2}))
    assert np.load(out)["arr_0"].shape == (2, 16, 16, 3)


def test_a_preview_is_a_strip_or_an_animation(tmp_path):
    pipeline = Pipeline(*pair("var"))
    with pytest.raises(ValueError, match=r"\.png"):
        Previews(pipeline, tmp_path / "strip.jpg")
    shown = Previews(pipeline, tmp_path / "steps.gif")
    images = pipeline(torch.tensor([0, 1, 2]), sample_seeds(0, 0, 3), on_tokens=shown).numpy()
    shown.write(images)
    with Image.open(tmp_path / "steps.gif") as animation:
        assert animation.n_frames == 3
    np.testing.assert_array_equal(shown.frames(images)[:, -1], images)


@pytest.mark.parametrize("sides, greedy", [([1, 3, 6, 7], [3, 6, 7]), ([1, 2], []), ([1, 2, 3, 4], [3])])
def test_flexvar_draws_on_lists_of_scales_of_your_own(sides, greedy, tmp_path, capsys):
    """Sides that its tokens lack, and lists that end early: the pictures of the canvas of that layout. The model's own
    are 1, 2, 4: others by argmax, and larger ones under the whole scale of linear guidance, as the original has it."""
    size = 4 * sides[-1]
    folder, out = pair_folder("flexvar", tmp_path / "run"), tmp_path / "images.npz"
    options = {"classes": [1], "per_class": 2, "chunk": 2, "sides": sides, "packed": False}
    options |= {"preview": str(tmp_path / "strip.png"), "guidance": 3, "schedule": "linear"}
    sample(config("sample", **{"from": str(folder), "out": str(out), **options}))
    (generator, tokenizer), layout = pair("flexvar"), SequenceLayout.scales(sides)
    cond = Cond.cat([generator.conditioner(torch.tensor([1, 1])), generator.conditioner.null(2)])
    noise, last = SampleNoise(sample_seeds(0, 0, 2)), len(sides) - 1
    canvas = ancestral(
        generator,
        cond,
        noise=noise,
        guide=ClassifierFree(lambda now: 3.0 if sides[now.step] > 4 else 1 + 2 * now.step / last),
        rule=lambda now: DrawRule(temperature=0) if sides[now.step] in greedy else DrawRule(),
        canvas=generator.blank(2, layout),
    )
    want = to_uint8(tokenizer.decode(canvas.tokens, layout=layout)).numpy()
    assert want.shape == (2, size, size, 3)
    np.testing.assert_array_equal(np.load(out)["arr_0"], want)
    record = json.loads((tmp_path / "images.metadata.json").read_text())
    assert (record["sides"], record.get("greedy_sides", [])) == (sides, greedy)
    assert greedy or "greedy_sides" not in record  # a folder begun before the key goes on
    assert (f"sides {greedy} are none of the model's own" in capsys.readouterr().out) == bool(greedy)
    zoom = max(1, 64 // size)
    assert Image.open(tmp_path / "strip.png").size[0] == len(sides) * (size * zoom + 2)


@pytest.mark.parametrize(
    "name, sides, words",
    [
        *(("flexvar", sides, "start with 1, grow") for sides in ([1], [2, 4], [1, 2, 2], [1, 4, 2], [1, 40], [1, 2.5])),
        *((name, [1, 2, 4], "leave sides away") for name in ("var", "llamagen", "mar", "har")),
    ],
)
def test_lists_of_scales_that_cannot_be_drawn_are_refused(name, sides, words):
    with pytest.raises(ValueError, match=rf"sides=\[{sides[0]}.*{words}"):
        Pipeline(*pair(name)).set_sides(sides)


def test_tokens_of_the_tokenizers_scales_do_not_lie_on_others():
    generator, tokenizer = pair("flexvar")
    pipeline = Pipeline(generator, tokenizer)
    pipeline.set_sides([1, 3, 6])
    with pytest.raises(ValueError, match=r"sides=\[3, 6\] are none of the tokenizer's .*set_sides"):
        pipeline.generator.arrange(torch.zeros(1, tokenizer.spec.layout.length, dtype=torch.int64))


@pytest.fixture(scope="module")
def photograph(tmp_path_factory):
    """A picture of 40 x 24 with a mask that draws the right half anew."""
    folder = tmp_path_factory.mktemp("edit")
    drawer = np.random.default_rng(0)
    Image.fromarray(drawer.integers(0, 256, (24, 40, 3), dtype=np.uint8)).save(folder / "image.png")
    mask = np.zeros((24, 40), dtype=np.uint8)
    mask[:, 20:] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    return folder


@pytest.mark.parametrize("name", ["var", "xar", "mar", "llamagen", "maskgit_grid"])
def test_the_edit_command_keeps_the_black_part(name, photograph, tmp_path):
    folder, out = pair_folder(name, tmp_path / "run"), tmp_path / "edit.png"
    options = {"from": str(folder), "image": str(photograph / "image.png"), "mask": str(photograph / "mask.png")}
    options |= {"out": str(out), "class": "cat", "composite": True, "count": 2}
    counters.reset()
    edit(config("edit", **options))
    assert bool(counters.read().get("linear.packed")) == packable(torch.zeros(2, 2))
    original, edited = cropped(options["image"], 16), np.asarray(Image.open(out))
    np.testing.assert_array_equal(edited[:, :8], original[:, :8])
    assert (edited[:, 8:] != original[:, 8:]).any()
    assert (np.asarray(Image.open(tmp_path / "edit_1.png"))[:, 8:] != edited[:, 8:]).any()
    sheet = Image.open(tmp_path / "edit_sheet.png")
    assert sheet.size == (4 * 66, 14 + 2 * 66)
    sheet = np.asarray(sheet)[14:]
    np.testing.assert_array_equal(sheet[:64:4, :64:4], original)
    np.testing.assert_array_equal(sheet[:64:4, 66:98:4], original[:, :8])  # the mask tints the other half
    assert (tmp_path / "edit.metadata.json").is_file()


@pytest.mark.parametrize("name", ["var", "ecar", "maskgit_grid"])
def test_outpainting_keeps_the_box_and_draws_the_rest(name, photograph, tmp_path):
    """As inpaint with a mask that is white outside of the box."""
    folder, frame = pair_folder(name, tmp_path / "run"), np.full((24, 40), 255, dtype=np.uint8)
    frame[:, 8:20] = 0  # of the cropped middle, columns 8 .. 31: the left half
    Image.fromarray(frame).save(tmp_path / "frame.png")
    common = {"from": str(folder), "image": str(photograph / "image.png"), "composite": True}
    found = []
    for task, given in (("outpaint", {"box": [0, 0, 0.5, 1]}), ("inpaint", {"mask": str(tmp_path / "frame.png")})):
        out = tmp_path / f"{task}.png"
        edit(config("edit", **common, **given, task=task, out=str(out)))
        found.append(np.asarray(Image.open(out)))
    original = cropped(common["image"], 16)
    np.testing.assert_array_equal(found[0][:, :8], original[:, :8])
    assert (found[0][:, 8:] != original[:, 8:]).any()
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("name", ["var", "rar", "mar"])
def test_the_region_of_a_class_edit_is_drawn_as_that_class(name, photograph, tmp_path):
    """By name or number: the kept tokens and those drawn under that class. Another class gives another picture."""
    folder, common = pair_folder(name, tmp_path / "run"), {"image": str(photograph / "image.png"), "task": "class"}
    found = {}
    for which in ("cat", 2, "dog"):
        out = tmp_path / f"{which}.png"
        edit(config("edit", **{"from": str(folder), "class": which, "out": str(out), "box": [0.5, 0, 1, 1]}, **common))
        found[which] = np.asarray(Image.open(out))
    np.testing.assert_array_equal(found["cat"], found[2])
    assert (found["dog"] != found["cat"]).any()
    pipeline, noise = Pipeline.load(folder, packed=None), SampleNoise(sample_seeds(0, 0, 1))
    tokens = pipeline.tokenizer.encode(to_float(cropped(common["image"], 16))[None])
    keep = torch.arange(16).expand(16, -1) < 8
    canvas = region(pipeline.generator, tokens, noise, keep)
    known, before = canvas.known, canvas.tokens.clone()
    generator = pipeline.generator
    cond = generator.conditioner(torch.tensor([2]))
    done = generator.sampler(generator, cond, noise=noise, guide=Unguided(), rule=DrawRule(), canvas=canvas)
    assert torch.equal(done.tokens[known], before[known])
    want = to_uint8(pipeline.tokenizer.decode(generator.restore(done)))[0].numpy()
    np.testing.assert_array_equal(found["cat"], want)


def test_photograph_and_mask_are_edited_upright(tmp_path):
    """A photograph that its camera stored lying, and the mask drawn on it as a viewer shows it."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    upright, mask = Image.fromarray(pixels), np.zeros((24, 40), dtype=np.uint8)
    mask[:, 20:] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    places = {name: str(tmp_path / f"{name}.png") for name in ("upright", "image", "mask")}
    upright.save(places["upright"])
    upright.rotate(90, expand=True).save(places["image"], exif=exif)
    Image.fromarray(mask).save(places["mask"])
    np.testing.assert_array_equal(cropped(places["image"], 16), cropped(places["upright"], 16))
    kept = kept_pixels(places, 16)
    assert kept[:, :8].all() and not kept[:, 8:].any()
    Image.fromarray(mask.T).save(tmp_path / "tall.png")
    tall = {"image": places["image"], "mask": str(tmp_path / "tall.png")}
    with pytest.raises(ValueError, match=r"is \(24, 40\), the image \(40, 24\)"):
        edit(config("edit", **{"from": "nowhere", **tall}))


@pytest.mark.parametrize("name", ["image", "mask", "style"])
def test_a_missing_picture_is_named_before_a_model_is_loaded(name, photograph):
    given = {"image": str(photograph / "image.png"), "mask": str(photograph / "mask.png")}
    given = {"task": "style", "image": given["image"], "style": "x"} if name == "style" else given
    with pytest.raises(ValueError, match=r"cannot read image gone\.png"):
        edit(config("edit", **{"from": "nowhere", **given, name: "gone.png"}))


def test_an_edit_that_draws_nothing_says_so(photograph, tmp_path):
    Image.fromarray(np.zeros((24, 40), dtype=np.uint8)).save(tmp_path / "black.png")
    common = {"from": str(pair_folder("llamagen", tmp_path / "run")), "image": str(photograph / "image.png")}
    wrong = [({"mask": str(tmp_path / "black.png")}, "black.png leaves no pixel of 16 x 16")]
    wrong += [({"box": [0.5, 0.5, 0.51, 0.51]}, r"box=\[0.5.* leaves no pixel")]
    wrong += [({"box": [0, 0, 1, 1], "task": "outpaint"}, "leaves no pixel .*: outpaint draws what is outside")]
    wrong += [({"box": [0.5, 0.5, 0.5625, 0.5625]}, "no token has half of its cell")]  # one pixel of a cell of 4 x 4
    for options, words in wrong:
        with pytest.raises(ValueError, match=words):
            edit(config("edit", **common, **options))


def test_a_class_for_a_model_without_classes_is_refused(photograph, tmp_path):
    _, tokenizer = pair("llamagen")
    save_folder(LlamaGen(tokenizer.spec, 0, depth=1, width=16, heads=2, multiple_of=8), tmp_path / "run")
    save_folder(tokenizer, tmp_path / "run" / "tokenizer")
    given = {"from": str(tmp_path / "run"), "image": str(photograph / "image.png"), "box": [0, 0, 0.5, 1], "class": 1}
    with pytest.raises(ValueError, match="class=1: this model is unconditional"):
        edit(config("edit", **given))


@pytest.mark.parametrize("key", ["steps", "solver_steps"])
def test_an_edit_of_no_steps_is_refused(key, photograph):
    given = {"from": "nowhere", "image": str(photograph / "image.png"), "box": [0, 0, 0.5, 1], key: 0}
    with pytest.raises(ValueError, match=f"^{key}=0: at least one step"):
        edit(config("edit", **given))


@pytest.mark.parametrize("name", ["dar", "flextok"])
def test_decoders_that_draw_have_the_noise_of_each_image(name):
    """Twice the same tokens are two pictures, each that of its own seed whatever stands beside it."""
    pipeline, seeds = Pipeline(*pair(name), chunk=2, decode_chunk=1), sample_seeds(5, 0, 2)
    tokens = pipeline.tokens(torch.tensor([0]), seeds[:1], guide=Unguided(), rule=DrawRule()).repeat(2, 1)
    made = pipeline.decode(tokens, seeds)
    assert (made[0] != made[1]).any() and torch.equal(made[1:], pipeline.decode(tokens[1:], seeds[1:]))
    assert torch.equal(made[:1], pipeline.tokenizer.decode(tokens[:1], noise=SampleNoise(seeds[:1])))
    drawn = pipeline(torch.zeros(2, dtype=torch.int64), seeds, rule=DrawRule(temperature=0))
    assert (drawn[0] != drawn[1]).any()


def test_prefixes_and_styles_are_reused(photograph, tmp_path):
    image = str(photograph / "image.png")
    folder = pair_folder("dar", tmp_path / "dar")
    common = {"image": image, "out": str(tmp_path / "edit.png")}
    edit(config("edit", **{"from": str(folder), "task": "prefix", "keep": 8}, **common))
    pipeline = Pipeline.load(folder, packed=None)
    tokens = pipeline.tokenizer.encode(to_float(cropped(image, 16))[None])
    noise = SampleNoise(sample_seeds(0, 0, 1))  # of D-AR's walk: the image's own
    copy = to_uint8(pipeline.tokenizer.decode(tokens, noise=noise))[0].numpy()
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "edit.png")), copy)  # all 8 tokens are kept
    hita = pair_folder("hita", tmp_path / "hita")
    edit(config("edit", **{"from": str(hita), "task": "style", "style": image}, **common))
    pipeline = Pipeline.load(hita, packed=None)
    tokens = pipeline.tokenizer.encode(to_float(cropped(image, 16))[None])
    copy = to_uint8(pipeline.tokenizer.decode(tokens))[0].numpy()
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "edit.png")), copy)  # an image in its own style


@pytest.mark.parametrize(
    "options, words",
    [
        ({"task": "erase"}, "task='erase'"),
        ({}, "mask="),
        ({"box": [0, 0, 1, 1], "mask": "m.png"}, "one of them"),
        ({"task": "class", "box": [0, 0, 1, 1]}, "needs class="),
        ({"task": "prefix"}, "needs keep="),
        ({"task": "prefix", "keep": 3, "box": [0, 0, 1, 1]}, "box= belongs"),
        ({"task": "style", "style": "a.png", "count": 2}, "count="),
        ({"box": [0, 0, 1, 1], "guidance": 2.0}, "guidance needs class="),
        ({"box": [0, 0, 1, 1], "count": 0}, "count=0"),
        ({"box": [0, 0, 1, 1], "out": "a.jpg"}, "out=a.jpg"),
        ({"box": [0, 0, 1, 1], "count": 1.5}, "count=1.5: give a whole number"),
        ({"box": [0, 0, 1, 1], "keep_scales": -1}, "keep_scales=-1: give a whole number"),
        ({"box": [0, 0, 1, 1], "keep_scales": "all"}, "keep_scales=all: give a whole number"),
        ({"task": "prefix", "keep": -1}, "keep=-1: give a whole number"),
        ({"task": "prefix", "keep": 3, "keep_scales": 1}, "keep_scales= belongs"),
        ({"task": "style", "style": "a.png", "keep_scales": 1}, "keep_scales= belongs"),
        *(({"task": "style", "style": "a.png", key: 1}, f"^{key}= belongs") for key in DRAWING),
        ({"box": [0.5, 0, 0.5, 1]}, r"box=\[0.5, 0, 0.5, 1\]: give"),
        ({"box": [0, 0, "a", 1]}, r"box=\[0, 0, 'a', 1\]: give"),
        ({"box": [0, 0, 1]}, r"box=\[0, 0, 1\]: give"),
    ],
)
def test_mistakes_of_the_edit_command_name_the_key(options, words):
    with pytest.raises(ValueError, match=words):
        edit(config("edit", **{"from": "nowhere", "image": "a.png", **options}))
