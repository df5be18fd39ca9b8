"""Pipeline and sampling command: sameness, saving and loading, what is written, and its mistakes."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from generators import CLASSES, make
from PIL import Image

from vgen.guidance import guidance
from vgen.heads import DrawRule
from vgen.models.llamagen import LlamaGen
from vgen.pipeline import Pipeline, chunk_for
from vgen.sampling import labelled_grid, plan, resolve_device, sample
from vtok.checkpoint import CheckpointError, file_hash, save_folder
from vtok.data.transforms import to_uint8
from vtok.layers.trunk import Trunk
from vtok.layout import SequenceLayout
from vtok.models.cnn import CNNTokenizer
from vtok.models.var import VARTokenizer
from vtok.noise import sample_seeds
from vtok.quantize.residual import MultiScaleVQ
from vtok.quantize.vq import VQ

NAMES = ["ant", "bee", "cat", "dog", "eel"]
SMALL = {"channels": 8, "multipliers": (1, 1, 1, 1), "blocks": 1, "groups": 4}


def parts(name: str):
    """A generator of tests/generators.py with a tokenizer of its spec, at 32 px."""
    generator = make(name)
    torch.manual_seed(0)
    if name == "var":
        quantizer = MultiScaleVQ(vocab_size=24, channels=6, sides=(1, 2, 3, 4), phi=2)
        tokenizer = VARTokenizer(image_size=32, quantizer=quantizer, z_channels=None, projection=3, **SMALL)
        generator.adopt(tokenizer)
    else:
        tokenizer = CNNTokenizer(image_size=32, quantizer=VQ(vocab_size=24, channels=6), z_channels=8, **SMALL)
    return generator, tokenizer.eval()


@pytest.fixture(params=["llamagen", "var"])
def pipeline(request):
    return Pipeline(*parts(request.param), chunk=4, class_names=NAMES)


LABELS, SEEDS = torch.arange(10) % CLASSES, sample_seeds(0, 0, 10)


def test_images_are_the_same_for_any_number_of_them(pipeline):
    whole = pipeline(LABELS, SEEDS, guidance=2.0)
    assert whole.shape == (10, 32, 32, 3) and whole.dtype == torch.uint8
    for count in (1, 4, 7):
        assert torch.equal(pipeline(LABELS[:count], SEEDS[:count], guidance=2.0), whole[:count])
    later = pipeline(LABELS[4:8], SEEDS[4:8], guidance=2.0)  # another rank's chunk
    assert torch.equal(later, whole[4:8])


def test_the_number_of_images_of_a_job_decides_on_its_chunk():
    """By trying all of them: the fewest chunks of at most 64, then the fewest images."""
    sizes = (1, 2, 4, *range(8, 65, 8))
    for count in (*range(1, 400), 1000, 49_999, 50_000):
        want = min(sizes, key=lambda size: (-(-count // size), -(-count // size) * size))
        assert chunk_for(count) == want
    assert [chunk_for(count) for count in (1, 3, 5, 10, 40, 65, 80, 50_000)] == [1, 4, 8, 16, 40, 40, 40, 64]


def test_a_job_computes_few_images_that_it_does_not_need(pipeline):
    """Rows of the transformer, two an image under guidance: one image is one, 80 are 80."""
    lone, rows = Pipeline(pipeline.generator, pipeline.tokenizer), []
    hook = lone.generator.trunk.register_forward_pre_hook(lambda module, given: rows.append(len(given[0].x)))
    image = lone(LABELS[:1], SEEDS[:1], guidance=2.0)
    steps = len(rows)
    assert set(rows) == {2} and steps == lone.generator.layout.steps
    rows.clear()
    labels, seeds = torch.arange(80) % CLASSES, sample_seeds(0, 0, 80)
    many = lone(labels, seeds, guidance=2.0)
    assert set(rows) == {80} and sum(rows) == 2 * 80 * steps
    hook.remove()
    parts = [lone(labels[i : i + 40], seeds[i : i + 40], guidance=2.0, chunk=40) for i in (0, 40)]
    same = Pipeline(lone.generator, lone.tokenizer, chunk=40)
    assert torch.equal(many, torch.cat(parts)) and torch.equal(many[:3], same(labels[:3], seeds[:3], guidance=2.0))
    assert torch.equal(image, Pipeline(lone.generator, lone.tokenizer, chunk=1)(LABELS[:1], SEEDS[:1], guidance=2.0))


def test_across_chunk_sizes_the_tokens_are_the_same_in_float32(pipeline):
    whole = pipeline.tokens(LABELS, SEEDS, guide=guidance(2.0), rule=DrawRule())
    for rows in (slice(0, 1), slice(3, 5)):
        assert torch.equal(
            pipeline.tokens(LABELS[rows], SEEDS[rows], guide=guidance(2.0), rule=DrawRule()), whole[rows]
        )


def test_pixels_round_to_the_nearest_level():
    levels = torch.arange(256) / 127.5 - 1
    grid = levels.view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal(to_uint8(grid)[0, ..., 0].flatten(), torch.arange(256, dtype=torch.uint8))
    assert torch.equal(to_uint8(grid + 0.4 / 127.5)[0, ..., 0].flatten(), torch.arange(256, dtype=torch.uint8))
    assert to_uint8(torch.full((1, 3, 8, 8), 9.0)).unique().tolist() == [255]


def test_mistakes_are_named(pipeline):
    with pytest.raises(ValueError, match=r"classes span 0\.\.6"):
        pipeline(torch.tensor([0, 6]), SEEDS[:2])
    with pytest.raises(ValueError, match="labels and seeds"):
        pipeline(LABELS, SEEDS[:3])
    for labels, seeds, said in (
        ([3, 7], SEEDS[:2], "labels must be an int64 tensor .* got list"),
        (3, 0, "labels must be an int64 tensor .* got int"),
        (LABELS, SEEDS.float(), "seeds must be an int64 tensor .* got a tensor of torch.float32"),
        (LABELS, 0, "seeds must be an int64 tensor .* got int"),
    ):
        with pytest.raises(ValueError, match=said):
            pipeline(labels, seeds)
    with pytest.raises(ValueError, match="guidance='2' must be a number or a Guidance"):
        pipeline(LABELS, SEEDS, guidance="2")
    generator, _ = parts("var")
    _, tokenizer = parts("llamagen")
    said = "emits 16 tokens of 24 codes, 6 wide, in 16 steps, .* 30 tokens of 24 codes, 6 wide, in 4 steps; pass the"
    with pytest.raises(ValueError, match=said):
        Pipeline(generator, tokenizer)


def test_a_generator_of_another_size_draws_at_its_own():
    """Its tokens are those of the tokenizer at that size, and so are its pictures."""
    _, tokenizer = parts("llamagen")
    torch.manual_seed(0)
    generator = LlamaGen(tokenizer.spec_for(64), CLASSES, depth=1, width=16, heads=2, multiple_of=8)
    pipeline = Pipeline(generator, tokenizer, chunk=4)
    images = pipeline(LABELS[:3], SEEDS[:3])
    tokens = pipeline.tokens(LABELS[:3], SEEDS[:3], guide=guidance(1.0), rule=DrawRule())
    assert images.shape == (3, 64, 64, 3)
    assert torch.equal(images, to_uint8(tokenizer.decode(tokens, size=64)))


def test_a_tokenizer_whose_tokens_lie_otherwise_is_refused():
    """As many tokens of as many codes: only the order tells them apart."""
    generator, tokenizer = parts("llamagen")
    line = replace(generator.spec, layout=SequenceLayout.levels((1,) * generator.spec.layout.length))
    other = LlamaGen(line, CLASSES, depth=1, width=16, heads=2, multiple_of=8, position="rope_1d")
    with pytest.raises(ValueError, match="in another order; pass the tokenizer of that run"):
        Pipeline(other, tokenizer)


def exported(folder, name="llamagen"):
    generator, tokenizer = parts(name)
    save_folder(generator, folder, kind="generator", class_names=NAMES)
    save_folder(tokenizer, folder / "tokenizer", kind="tokenizer")
    return folder


def test_folders_load_and_give_the_same_pictures(tmp_path, pipeline):
    save_folder(pipeline.generator, tmp_path, class_names=NAMES)
    save_folder(pipeline.tokenizer, tmp_path / "tokenizer")
    twin = Pipeline.load(tmp_path, chunk=4)
    assert twin.class_names == NAMES
    assert torch.equal(twin(LABELS, SEEDS, guidance=2.0), pipeline(LABELS, SEEDS, guidance=2.0))


def test_bf16_trunk_keeps_most_tokens(tmp_path):
    exact, rough = (Pipeline.load(exported(tmp_path), dtype=t, chunk=64) for t in (torch.float32, torch.bfloat16))
    assert rough.generator.trunk.blocks[0].ffn.up.weight.dtype == torch.bfloat16
    assert rough.generator.head.linear.weight.dtype == torch.float32
    labels, seeds = torch.arange(64) % CLASSES, sample_seeds(0, 0, 64)
    a, b = (p.tokens(labels, seeds, guide=guidance(1.0), rule=DrawRule()) for p in (exact, rough))
    assert (a[:, 0] == b[:, 0]).float().mean() > 0.95  # later tokens follow other prefixes


def settings(source, out, **changes):
    from omegaconf import OmegaConf

    config = OmegaConf.load(__file__.replace("tests/test_pipeline.py", "configs/sample.yaml"))
    del config["hydra"]
    return OmegaConf.merge(config, {"from": str(source), "out": str(out), "device": "cpu"}, changes)


def test_grid_npz_and_folder_hold_the_same_images(tmp_path):
    source = exported(tmp_path / "model")
    chosen = {"classes": [3, "bee"], "per_class": 3, "guidance": 2.0, "chunk": 4}
    sample(settings(source, tmp_path / "a.npz", **chosen))
    sample(settings(source, tmp_path / "a.png", **chosen))
    sample(settings(source, tmp_path / "folder", **chosen))
    data = np.load(tmp_path / "a.npz")
    assert data["arr_0"].shape == (6, 32, 32, 3) and data["arr_1"].tolist() == [3, 3, 3, 1, 1, 1]
    files = sorted((tmp_path / "folder").glob("*.png"))
    assert [f.name for f in files][:1] == ["000000_class0003.png"] and len(files) == 6
    for image, file in zip(data["arr_0"], files):
        assert np.array_equal(image, np.asarray(Image.open(file)))
    grid = np.asarray(Image.open(tmp_path / "a.png"))
    zoomed = data["arr_0"][0].repeat(2, 0).repeat(2, 1)
    margin = 12 + 6 * 3
    assert np.array_equal(grid[:64, margin : margin + 64], zoomed)
    record = json.loads((tmp_path / "a.metadata.json").read_text())
    assert record["classes"] == [3, 3, 3, 1, 1, 1] and record["chunk"] == 4 and record["guidance"] == 2.0
    assert len(record["checkpoint_sha256"]) == 64
    assert record["tokenizer_sha256"] == file_hash(source / "tokenizer" / "model.safetensors")
    dotted = tmp_path / "cfg1.5"  # no ending: a folder
    sample(settings(source, dotted, **chosen))
    assert sorted(f.name for f in dotted.glob("*.png")) == [f.name for f in files]
    other = tmp_path / "other"
    _, tokenizer = parts("llamagen")
    tokenizer.last_layer.data.mul_(1.5)
    save_folder(tokenizer, other, kind="tokenizer")
    with pytest.raises(ValueError, match="another tokenizer_sha256"):
        sample(settings(source, dotted, **chosen, tokenizer_from=str(other), overwrite=False))


def test_a_folder_begun_in_chunks_of_64_is_finished_in_them(tmp_path, capsys):
    """As versions wrote it that had no other default: nothing that is there is made again."""
    source, out = exported(tmp_path / "model"), tmp_path / "folder"
    sample(settings(source, out, per_class=1, chunk=64))
    wanted = {p.name: p.read_bytes() for p in sorted(out.glob("*.png"))}
    lost = list(wanted)[2]
    (out / lost).unlink()
    rows = []
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, given: rows.append(len(given[0].x)) if type(module) is Trunk else None
    )
    with pytest.raises(ValueError, match=r"made with another chunk \(64, now 8\)"):
        sample(settings(source, out, per_class=1, chunk=8, overwrite=False))
    sample(settings(source, out, per_class=1))
    hook.remove()
    assert set(rows) == {64} and {p.name: p.read_bytes() for p in out.glob("*.png")} == wanted
    assert json.loads((out / "metadata.json").read_text())["chunk"] == 64
    assert "removed" not in capsys.readouterr().out
    sample(settings(source, out, per_class=1, seed=1))  # another job: images are drawn anew, in chunks of its own
    said = f"note: removed {len(wanted)} images of {out}, made with another seed (0, now 1)\n"
    assert said in capsys.readouterr().out
    assert json.loads((out / "metadata.json").read_text())["chunk"] == 8
    assert all((out / name).read_bytes() != png for name, png in wanted.items())


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"classes": [7]}, "unknown class 7"),
        ({"classes": ["cow"]}, "unknown class 'cow': choose 0..4 or a name"),
        ({"per_class": 0}, "per_class=0: give a whole number of at least 1"),
        ({"num_images": 2.5}, "num_images=2.5: give a whole number"),
        ({"seed": 1.5}, "seed=1.5: give a whole number"),
        ({"guidance": "high"}, "guidance=high: give a number"),
        ({"schedule": "sine"}, "choose constant"),
        ({"top_p": 3}, "top_p"),
        ({"steps": 0}, "steps=0: give a whole number of at least 1"),
        ({"solver_steps": 0}, "solver_steps=0: give a whole number of at least 1"),
        ({"device": "tpu"}, "choose auto, cpu"),
        ({"dtype": "int4"}, "choose float32"),
        ({"weights": "best"}, "choose ema or raw"),
        ({"chunk": 0}, "chunk=0: give a whole number of at least 1"),
        ({"decode_chunk": 0}, "decode_chunk=0: give a whole number of at least 1"),
        ({"out": "x.jpg"}, "give <name>.png"),
        ({"out": "folder", "preview": "strip.png"}, "preview= goes with"),
        ({"out": "x.png", "preview": "./x.png"}, "preview=x.png is out= too"),
    ],
)
def test_sampling_mistakes_are_named(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        sample(settings(exported(tmp_path), **{"out": tmp_path / "x.png", **changes}))


def test_a_picture_of_the_steps_is_not_replaced_unasked(tmp_path):
    strip = tmp_path / "strip.png"
    strip.write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"strip\.png exists; pass overwrite=true"):
        sample(settings("nowhere", tmp_path / "x.png", preview=str(strip), overwrite=False))


def test_a_grid_has_the_images_of_a_class_together():
    """Sixteen images of ten classes, drawn round-robin: image i in the row of its class, in the order drawn."""
    labels = [i % 10 for i in range(16)]
    images = np.stack([np.full((64, 64, 3), 10 * i, dtype=np.uint8) for i in range(16)])
    grid = np.asarray(labelled_grid(images, labels))
    margin = 12 + 6
    assert grid.shape == (10 * 66, margin + 2 * 66, 3)
    for i, label in enumerate(labels):
        row, column = 66 * label, margin + 66 * (i // 10)
        assert (grid[row : row + 64, column : column + 64] == 10 * i).all()


def test_folders_that_do_not_load(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        Pipeline.load(tmp_path / "nowhere")
    source = exported(tmp_path / "model")
    with pytest.raises(CheckpointError, match="holds a tokenizer"):
        Pipeline.load(source / "tokenizer")
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="damaged or truncated"):
        Pipeline.load(source)
    weights.unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        Pipeline.load(source)


def test_the_gpu_of_a_process(monkeypatch):
    """torchrun starts four processes on a machine and numbers them; a number in the name is the caller's choice."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert {str(resolve_device(name)) for name in ("auto", "cuda")} == {"cuda:0"}
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert {str(resolve_device(name)) for name in ("auto", "cuda")} == {"cuda:3"}
    assert str(resolve_device("cuda:1")) == "cuda:1" and str(resolve_device("cpu")) == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="torch sees no cuda device here"):
        resolve_device("cuda")


def test_plans():
    assert plan(None, 2, None, 3, [], grid=False).tolist() == [0, 0, 1, 1, 2, 2]
    assert plan(None, 2, 5, 3, [], grid=False).tolist() == [0, 1, 2, 0, 1]
    assert plan(None, 1, None, 1000, [], grid=True).tolist() == list(range(10))
    assert plan(4, 1, None, 5, NAMES, grid=True).tolist() == [4]
    assert plan(None, 3, None, 0, [], grid=True).tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="unconditional"):
        plan([1], 3, None, 0, [], grid=True)
