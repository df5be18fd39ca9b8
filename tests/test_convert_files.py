"""Published files: what wraps the weights, what is refused and in which words, and how much memory loading takes."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from references import read
from safetensors.torch import save_file

from scripts.convert import convert as convert_command
from vgen.models import FAMILIES
from vgen.pipeline import Pipeline
from vgen.published import convert_file
from vtok.checkpoint import CheckpointError, save_folder
from vtok.config import build, describe
from vtok.models.cnn import CNNTokenizer
from vtok.models.var import VARTokenizer
from vtok.quantize.residual import MultiScaleVQ
from vtok.quantize.vq import VQ
from vtok.weight_files import choose, read_weights, strip_prefixes

ROOT = Path(__file__).resolve().parents[1]
STATE = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.int64)}
OTHER = {"a.weight": torch.zeros(2, 3), "b": torch.zeros(2, dtype=torch.int64)}


def same(got, want=STATE):
    return set(got) == set(want) and all(torch.equal(got[k], want[k]) for k in want)


def prefixed(*prefixes):
    return {"".join(prefixes) + k: v for k, v in STATE.items()}


@pytest.mark.parametrize(
    "data",
    [
        STATE,
        {"model": STATE},
        {"state_dict": STATE, "epoch": 3, "callbacks": {"x": 1}, "pytorch-lightning_version": "2.6"},
        {"model": OTHER, "ema": STATE, "optimizer": {"state": {}, "param_groups": []}, "steps": 9},
        {"model": OTHER, "model_ema": STATE, "epoch": 1, "scaler": {"scale": 1.0}},
        {"trainer": {"var_wo_ddp": STATE}, "epoch": 2},
        {"state_dict": {"gen_model": OTHER, "dics_model": OTHER}, "ema_state_dict": prefixed("module."), "epoch": 2},
        {"model": {"args": {"x": 1}, "sd": OTHER, "ema_sd": STATE}},
        {"model": prefixed("module.")},
        prefixed("_orig_mod."),
        {"model": prefixed("module.", "_orig_mod.")},
        {"model": STATE, "args": argparse.Namespace(lr=1e-4, results_dir="x")},
    ],
)
@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_wrappers_and_prefixes(tmp_path, data, ending):
    path = tmp_path / f"file{ending}"
    if ending == ".safetensors":
        if not all(isinstance(v, torch.Tensor) for v in data.values()):
            pytest.skip("safetensors holds flat tables only")
        save_file(data, path)
    else:
        torch.save(data, path)
    assert same(read_weights(path))


def test_the_old_format_of_torch_is_read(tmp_path):
    torch.save({"model": STATE}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert same(read_weights(tmp_path / "old.pt"))


def test_which_weights():
    both = {"model": OTHER, "ema": STATE, "best": STATE}
    assert same(choose(both, "raw", "x"), OTHER) and same(choose(both, "ema", "x")) and same(choose(both, "best", "x"))
    wrapped = {"model": {"sd": OTHER, "ema_sd": STATE}}
    assert same(choose(wrapped, "ema", "x")) and same(choose(wrapped, "raw", "x"), OTHER)
    assert same(choose(STATE, "raw", "x"))
    with pytest.raises(CheckpointError, match="holds no 'ema' weights; it has model"):
        choose({"model": STATE}, "ema", "x")
    with pytest.raises(CheckpointError, match="holds no weights; it has numbers"):
        choose({"a": torch.ones(1), "numbers": [1, 2]}, "auto", "x")
    inner = {"blocks.0._orig_mod.w": STATE["b"], "_orig_mod.v": STATE["b"]}
    assert set(strip_prefixes(inner)) == {"blocks.0.w", "v"}


class Bomb:
    """A pickle that would write a file when it is loaded without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path):
    mark = tmp_path / "ran"
    for i, data in enumerate([{"model": STATE, "extra": Bomb(mark)}, Bomb(mark)]):
        torch.save(data, tmp_path / f"{i}.pt")
        with pytest.raises(CheckpointError, match=r"holds more than weights.*nothing in it was run.*only its tensors"):
            read_weights(tmp_path / f"{i}.pt")
    assert not mark.exists()


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_files_that_are_no_weights(tmp_path, ending):
    path = tmp_path / f"file{ending}"
    with pytest.raises(CheckpointError, match="does not exist"):
        read_weights(path)
    large = {"a": torch.ones(10_000)}
    save_file(large, path) if ending == ".safetensors" else torch.save(large, path)
    whole = path.read_bytes()
    for part in (len(whole) // 2, 3, 0):
        path.write_bytes(whole[:part])
        with pytest.raises(CheckpointError, match=r"damaged or truncated|or is damaged"):
            read_weights(path)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(CheckpointError, match="Git LFS pointer"):
        read_weights(path)
    path.write_text("<!DOCTYPE html><html></html>")
    with pytest.raises(CheckpointError, match="web page"):
        read_weights(path)


def test_wrong_family_missing_keys_and_wrong_shape(tmp_path):
    state, _, _, info = read("llamagen_gpt")
    file = tmp_path / "gpt.pt"
    with pytest.raises(CheckpointError, match=r"gpt.pt: .*another model's file|gpt.pt: .*unknown"):
        convert_file(
            "generator", "rar", state, {"RAR_config": {"model": {"generator": {"num_attention_heads": 2}}}}, file
        )
    short = {k: v for k, v in state.items() if k != "norm.weight"}
    with pytest.raises(CheckpointError, match=r"1 keys missing .*norm.weight"):
        convert_file("generator", "llamagen", short, info["ctor"], file)
    wrong = {**state, "norm.weight": torch.ones(3)}
    with pytest.raises(CheckpointError, match=r"is \(3,\), expected \(64,\)"):
        convert_file("generator", "llamagen", wrong, info["ctor"], file)
    with pytest.raises(CheckpointError, match="1 unknown keys: surprise"):
        convert_file("generator", "llamagen", {**state, "surprise": torch.ones(1)}, info["ctor"], file)


def test_half_precision_files_become_float32_of_their_own(tmp_path):
    state, _, _, info = read("llamagen_gpt")
    file = tmp_path / "gpt.safetensors"
    save_file({k: v.to(torch.bfloat16) for k, v in state.items()}, file)
    module = convert_file("generator", "llamagen", read_weights(file), info["ctor"], file)
    assert {t.dtype for t in module.parameters()} == {torch.float32}
    assert torch.equal(module.trunk.norm.weight, state["norm.weight"].bfloat16().float())
    with torch.no_grad():
        module.trunk.norm.weight.add_(1)
    assert torch.equal(read_weights(file)["norm.weight"], state["norm.weight"].bfloat16())


def own_tokenizer(quantizer, size, **options):
    """Of stride 2, where the converters of generators suppose 16."""
    cls = VARTokenizer if isinstance(quantizer, MultiScaleVQ) else CNNTokenizer
    shape = dict(channels=8, multipliers=[1, 2], blocks=1, groups=4, attention=False, mid_attention=False)
    return cls(image_size=size, quantizer=quantizer, z_channels=None, **shape, **options).eval()


def converted(folder, family, tokenizer, **changes):
    """scripts/convert.py of folder/gpt.pt with that tokenizer; the Pipeline of what it wrote."""
    save_folder(tokenizer, folder / "tokenizer")
    config = OmegaConf.load(ROOT / "configs" / "convert.yaml")
    given = dict(family=family, kind="generator", config=str(folder / "gpt.json"), out=str(folder / "out"))
    given |= {"from": str(folder / "gpt.pt"), "tokenizer_from": str(folder / "tokenizer")}
    return Pipeline.load(convert_command(OmegaConf.merge(config, given, changes)))


def test_a_generator_is_converted_onto_a_tokenizer_of_its_own(tmp_path):
    """A file of LlamaGen tells neither the stride nor the width of codes; the logits are those of the file alone."""
    state, _, _, info = read("llamagen_gpt")
    torch.save({"model": state}, tmp_path / "gpt.pt")
    (tmp_path / "gpt.json").write_text(json.dumps(info["ctor"]))
    alone = convert_file("generator", "llamagen", state, info["ctor"], tmp_path / "gpt.pt")
    torch.manual_seed(0)
    pipeline = converted(tmp_path, "llamagen", own_tokenizer(VQ(vocab_size=64, channels=5), 32))  # at 8 px 16 tokens
    spec = pipeline.generator.spec
    assert (spec.image_size, spec.parts[0].channels) == (8, 5)
    assert pipeline(torch.tensor([3, 7]), torch.tensor([0, 1])).shape == (2, 8, 8, 3)
    tokens = torch.randint(64, (2, 16))
    ours, theirs = (
        m.log_prob(m.arrange(tokens), m.conditioner(torch.tensor([3, 7]))) for m in (pipeline.generator, alone)
    )
    assert torch.equal(ours, theirs)
    wrong = own_tokenizer(VQ(vocab_size=32, channels=5), 8)
    said = "emits 16 tokens of 32 codes, 5 wide, in 16 steps, the generator writes 16 tokens of 64 codes"
    with pytest.raises(ValueError, match=said):
        converted(tmp_path, "llamagen", wrong, overwrite=True)


def test_a_var_file_without_its_codebook_takes_the_tokenizers(tmp_path):
    """As a training of VAR's writes it, if the quantizer is left out; without one nothing is written."""
    state, _, _, info = read("var")
    whole = convert_file("generator", "var", state, info["ctor"], tmp_path / "gpt.pt")
    torch.save({k: v for k, v in state.items() if "quant" not in k}, tmp_path / "gpt.pt")
    (tmp_path / "gpt.json").write_text(json.dumps(info["ctor"]))
    quantizer = build(describe(whole.quantizer), FAMILIES)
    quantizer.load_state_dict(whole.quantizer.state_dict())
    tokenizer = own_tokenizer(quantizer, 2 * whole.spec.quantizer["arguments"]["sides"][-1], projection=3)
    with pytest.raises(ValueError, match="lacks the codebook that it reads: pass tokenizer_from="):
        converted(tmp_path, "var", tokenizer, tokenizer_from=None)
    pipeline = converted(tmp_path, "var", tokenizer)
    assert pipeline.generator.spec.image_size == tokenizer.spec.image_size
    ours, theirs = pipeline.generator.state_dict(), whole.state_dict()
    assert set(ours) == set(theirs) and all(torch.equal(ours[k], theirs[k]) for k in ours)


MEMORY = """
import sys, torch
sys.path.insert(0, "tests")
from test_convert_files import llamagen_state
from vgen.published import convert_file
from vtok.weight_files import read_weights

def status(name):
    return [int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(name)][0] * 1024

config = {"Transformer_ModelArgs": {"n_head": 16, "block_size": 256, "multiple_of": 32}}
convert_file("generator", "llamagen", llamagen_state(64, 1, 192), config, "warm-up")  # what torch imports on first use
open("/proc/self/clear_refs", "w").write("5")  # the peak so far is forgotten
before = status("VmRSS")
module = convert_file("generator", "llamagen", read_weights(sys.argv[1], sys.argv[2]), config, sys.argv[1])
print((status("VmHWM") - before) / sum(4 * p.numel() for p in module.parameters()))
"""


def llamagen_state(width: int, depth: int, hidden: int) -> dict[str, torch.Tensor]:
    """Zeros and ones under LlamaGen's names."""
    state = {"cls_embedding.embedding_table.weight": torch.zeros(11, width), "norm.weight": torch.ones(width)}
    state |= {k: torch.zeros(1000, width) for k in ("tok_embeddings.weight", "output.weight")}
    for i in range(depth):
        at = f"layers.{i}."
        state |= {f"{at}{k}.weight": torch.ones(width) for k in ("attention_norm", "ffn_norm")}
        state |= {f"{at}attention.wqkv.weight": torch.zeros(3 * width, width)}
        state |= {f"{at}attention.wo.weight": torch.zeros(width, width)}
        state |= {f"{at}feed_forward.{k}.weight": torch.zeros(hidden, width) for k in ("w1", "w3")}
        state |= {f"{at}feed_forward.w2.weight": torch.zeros(width, hidden)}
    return state


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_peak_memory_of_loading_is_at_most_1_3_times_the_tensors(tmp_path, ending):
    state = llamagen_state(1024, 4, 2752)
    path = tmp_path / f"file{ending}"
    if ending == ".pt":
        torch.save({"model": {"module." + k: v for k, v in state.items()}, "ema": state, "steps": 1}, path)
    else:
        save_file(state, path)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", MEMORY, str(path), "ema" if ending == ".pt" else "auto"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) <= 1.3, done.stdout


def test_a_folder_whose_weights_were_changed_is_refused(tmp_path):
    """The hash in config.json names the weights: one changed byte in them is an error, not another model."""
    from safetensors.torch import load_file, save_file
    from tokenizers import make

    from vtok.checkpoint import CheckpointError, load_folder, save_folder
    from vtok.models import FAMILIES

    folder = save_folder(make("cnn_vq"), tmp_path / "folder")
    assert load_folder(folder, FAMILIES).spec.image_size == 16
    state = load_file(folder / "model.safetensors")
    name = sorted(state)[0]
    state[name].view(-1)[0] += 1
    save_file(state, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="hash"):
        load_folder(folder, FAMILIES)
