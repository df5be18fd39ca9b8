"""The zoo: what its tables promise, loading and sampling by name, conversion to a folder, and the hub's mixin."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from references import read
from runs import LLAMAGEN, run, tokenizer_folder

from vgen import published
from vgen.guidance import guidance
from vgen.heads import DrawRule
from vgen.published import entry_of, load_entry, locate
from vgen.sampling import PLAIN, sample
from vgen.sampling import settings as resolve
from vgen.zoo import GENERATORS, ZOO, lines
from vtok import counters
from vtok.checkpoint import CheckpointError, file_hash, read_config
from vtok.layers.packed import packable
from vtok.loggers import read_rows
from vtok.zoo import TOKENIZERS

ROOT = Path(__file__).resolve().parents[1]


def test_every_entry_is_complete_and_its_settings_can_be_drawn_with():
    from vgen.convert import CONVERTERS as GENERATOR_CONVERTERS
    from vtok.convert import CONVERTERS as TOKENIZER_CONVERTERS

    assert len(ZOO) == len(TOKENIZERS) + len(GENERATORS), "a name stands for two models"
    for entry in ZOO.values():
        known = GENERATOR_CONVERTERS if entry.kind == "generator" else TOKENIZER_CONVERTERS
        assert entry.family in known and entry.file and entry.licence and (entry.repo or entry.origin), entry.name
    for entry in GENERATORS.values():
        assert entry.tokenizer in TOKENIZERS and entry.fid, entry.name
        assert entry.evaluator or not entry.verified, f"{entry.name}: an FID without its evaluator"
        assert (entry.resize is not None) == (entry.image_size in (336, 384)), entry.name
        if entry.sampling:
            assert set(entry.sampling) <= set(PLAIN), entry.name
            drawn = PLAIN | dict(entry.sampling)
            guidance(drawn["guidance"], drawn["schedule"], **drawn["schedule_options"])
            DrawRule(drawn["temperature"], drawn["top_k"], drawn["top_p"], (), drawn["solver_steps"], drawn["solver"])
    assert set(TOKENIZER_CONVERTERS) == {entry.family for entry in TOKENIZERS.values()}


def test_the_list_names_sizes_licences_and_evaluators():
    text = "\n".join(lines())
    for words in ("var-d16", "310 M", "licence: MIT", "FID 3.55 (ADM TensorFlow evaluator; README)", "keys unverified"):
        assert words in text
    assert "384 px resized to 256 (bicubic)" in text and "asks for accept_license=true" in text


def test_names_licences_and_places(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"no 'var-d17': did you mean var-d16"):
        entry_of("zoo:var-d17")
    with pytest.raises(ValueError, match=r"research only .*accept_license=true"):
        locate(entry_of("flextok-d12-d12-in1k"))
    with pytest.raises(CheckpointError, match=r"kl16.ckpt of kl16 is not on the hub \(Dropbox.*put it at pretrained"):
        locate(entry_of("kl16"))
    with pytest.raises(CheckpointError, match=r"holds no .*var_d16.pth"):
        locate(entry_of("var-d16"), tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        locate(entry_of("var-d16"), tmp_path / "nowhere.pth")
    for place in ("var_d16.pth", "var-d16/var_d16.pth"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).touch()
        assert locate(entry_of("var-d16"), tmp_path) == tmp_path / place


def test_without_a_network_the_message_says_what_to_fetch(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    for error in (OfflineModeIsEnabled("offline"), LocalEntryNotFoundError("none"), ConnectionError("no route")):

        def fail(*args, error=error):
            raise error

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
        words = (
            r"var_d16.pth of huggingface.co/FoundationVision/var, about 1.2 GB .*put it at pretrained/var-d16/var_d16"
        )
        with pytest.raises(CheckpointError, match=words):
            locate(entry_of("zoo:var-d16"))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, file: f"/cache/{repo}/{file}")
    assert locate(entry_of("zoo:var-d16")) == Path("/cache/FoundationVision/var/var_d16.pth")


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The recorded VAR in place of the published one, its two files in a folder."""
    state, _, _, info = read("var")
    pictures, _, _, vqvae = read("var_vqvae")
    quantizer = {k.removeprefix("vae."): v for k, v in state.items() if k.startswith("vae.quantize")}
    alone = {k.removeprefix("var."): v for k, v in state.items() if k.startswith("var.")}
    folder = tmp_path / "files"
    folder.mkdir()
    torch.save({"trainer": {"var_wo_ddp": {"module." + k: v for k, v in alone.items()}}, "epoch": 1}, folder / "v.pth")
    torch.save({**pictures, **{k: v for k, v in quantizer.items() if k in pictures}}, folder / "vae.pth")
    vae = replace(TOKENIZERS["var-vqvae"], file="vae.pth", config=vqvae["ctor"])
    var = replace(GENERATORS["var-d16"], file="v.pth", config=info["ctor"], tokenizer_config={})
    monkeypatch.setitem(published.TOKENIZERS, "var-vqvae", vae)
    for table in (ZOO, GENERATORS):
        monkeypatch.setitem(table, "var-d16", var)
    return folder, {k: v for k, v in quantizer.items() if k.endswith("embedding.weight")}


def config_of(name, **changes):
    from omegaconf import OmegaConf

    config = OmegaConf.load(ROOT / "configs" / f"{name}.yaml")
    del config["hydra"], config["defaults"]
    return OmegaConf.merge(config, changes)


def test_sampling_by_name_conversion_and_sampling_from_the_folder_agree(tiny, tmp_path, capsys, monkeypatch):
    folder, codebook = tiny
    fixed = {"classes": [1, 2], "per_class": 1, "chunk": 2, "device": "cpu"}
    sample(
        config_of("sample", **{"from": "zoo:var-d16", "weights": str(folder), "out": str(tmp_path / "a.npz")}, **fixed)
    )
    said = capsys.readouterr().out
    assert "guidance=2.5, schedule=linear" in said and "top_k=900, top_p=0.96 (the paper's settings)" in said
    record = json.loads((tmp_path / "a.metadata.json").read_text())
    assert record["guidance"] == 2.5 and record["top_p"] == 0.96 and record["evaluation"]["fid"] == 3.55
    from scripts.convert import convert

    out = tmp_path / "converted"
    convert(config_of("convert", **{"from": "zoo:var-d16", "weights": str(folder), "out": str(out)}))
    assert read_config(out)["converted_from"]["zoo"] == "var-d16"
    sample(config_of("sample", **{"from": str(out), "out": str(tmp_path / "b.npz")}, **fixed))
    assert "guidance=2.5" in capsys.readouterr().out
    assert json.loads((tmp_path / "b.metadata.json").read_text())["evaluation"]["fid"] == 3.55
    monkeypatch.setattr("vgen.hub.snapshot_download", lambda name, **options: str(out))
    sample(config_of("sample", **{"from": "hf:somebody/var", "out": str(tmp_path / "c.npz")}, **fixed))
    assert "guidance=2.5" in capsys.readouterr().out, "the papers' settings hold for folders on the hub too"
    assert json.loads((tmp_path / "c.metadata.json").read_text())["evaluation"]["name"] == "var-d16"
    a, b = (np.load(tmp_path / f"{name}.npz")["arr_0"] for name in "ab")
    assert np.array_equal(a, b)
    loaded = load_entry(published.TOKENIZERS["var-vqvae"], folder)
    assert torch.equal(loaded.module.quantizer.codebook.weight, codebook["quantize.embedding.weight"])
    with pytest.raises(ValueError, match="holds a model already"):
        convert(config_of("convert", **{"from": "zoo:var-d16", "weights": str(folder), "out": str(out)}))


def test_what_the_user_says_replaces_the_papers_settings(capsys):
    mine = resolve({"from": "zoo:rar-b", "guidance": 3.0, "temperature": None})
    assert mine["guidance"] == 3.0 and mine["schedule_options"] == {"power": 2.75} and mine["temperature"] == 1.0
    assert "yours: guidance" in capsys.readouterr().out
    with pytest.raises(ValueError, match="schedule=linear has no effect without guidance"):
        resolve({"from": "nowhere", "schedule": "linear"})
    with pytest.raises(ValueError, match=r"schedule_options=.*has no effect without guidance"):
        resolve({"from": "nowhere", "schedule_options": {"low": 0.2}, "schedule": "interval"})
    risen = resolve({"from": "nowhere", "schedule": "linear", "schedule_options": {"start": 1.2}})  # from 1.2 to 1
    assert risen["schedule_options"] == {"start": 1.2} and resolve({"from": "nowhere", "schedule": "constant"})
    assert resolve({"from": "nowhere", "guidance": 1, "schedule": "linear"})["schedule"] == "linear"  # off, as said
    plain = resolve({"from": "zoo:rar-b", "schedule": "constant"})
    assert plain["schedule_options"] == {} and plain["guidance"] == 16.0
    off = resolve({"from": "zoo:rar-b", "guidance": 1.0})  # 1 is off; the paper's schedule would guide all the same
    assert (off["guidance"], off["schedule"], off["schedule_options"]) == (1.0, "constant", {})
    power = resolve({"from": "zoo:rar-b", "guidance": 1.0, "schedule_options": {"power": 1.0}})
    assert power["schedule"] == GENERATORS["rar-b"].sampling["schedule"] and power["schedule_options"] == {"power": 1.0}
    capsys.readouterr()
    resolve({"from": "zoo:hita-v-b-300"})
    assert "no settings of this model are published" in capsys.readouterr().out
    assert resolve({"from": "outputs/run", "guidance": 2.0}) == PLAIN | {"guidance": 2.0}


def test_gigatok_and_retok_guide_the_first_token_fully():
    """Token j stands at j / 255 of the steps; guided are token 0 and those from 0.18 on."""
    from vgen.guidance import Progress

    entries = [entry for entry in GENERATORS.values() if entry.family in ("gigatok", "retok")]
    assert {entry.tokenizer.partition("-")[0] for entry in entries} == {"gigatok", "retok"}
    for entry in entries:
        scale = entry.sampling["guidance"]
        schedule = guidance(scale, entry.sampling["schedule"], **entry.sampling["schedule_options"]).schedule
        scales = [schedule(Progress(k, 256)) for k in range(256)]
        assert scales[0] == scale and set(scales[1:46]) == {1.0} and set(scales[46:]) == {scale}


def test_har_is_guided_from_a_quarter_of_its_steps_on():
    """1, 1, then full: k / 8 of nine steps, from 0.25 on."""
    from vgen.guidance import Progress

    entry = GENERATORS["har-l"]
    schedule = guidance(3.75, entry.sampling["schedule"], **entry.sampling["schedule_options"]).schedule
    assert [schedule(Progress(k, 9)) for k in range(9)] == [1.0, 1.0] + [3.75] * 7


def test_the_hub_mixin_saves_loads_and_uploads(tmp_path, monkeypatch):
    import huggingface_hub
    from test_pipeline import LABELS, SEEDS, exported

    from vgen.hub import HubPipeline
    from vgen.pipeline import Pipeline

    pipeline = Pipeline.load(exported(tmp_path / "model"), chunk=4)
    shared = HubPipeline(
        pipeline.generator, pipeline.tokenizer, chunk=4, class_names=pipeline.class_names, card={"training hours": "2"}
    )
    shared.save_pretrained(tmp_path / "saved")
    twin = HubPipeline.from_pretrained(tmp_path / "saved", chunk=4, packed=False)
    assert torch.equal(twin(LABELS, SEEDS), pipeline(LABELS, SEEDS)) and twin.class_names == pipeline.class_names
    twin.save_pretrained(tmp_path / "again")
    assert file_hash(tmp_path / "again" / "model.safetensors") == file_hash(tmp_path / "saved" / "model.safetensors")
    if packable(torch.zeros(2, 2)):
        quick, taken = HubPipeline.from_pretrained(tmp_path / "saved"), counters.read().get("linear.packed", 0)
        assert (quick(LABELS, SEEDS).int() - twin(LABELS, SEEDS).int()).abs().max() <= 1
        assert counters.read()["linear.packed"] > taken and quick.chunk_of(1) == 1
        with pytest.raises(ValueError, match=r"LlamaGen has weights packed for sampling.* packed=False"):
            quick.save_pretrained(tmp_path / "empty")
        assert not (tmp_path / "empty" / "model.safetensors").exists()
    card = (tmp_path / "saved" / "README.md").read_text()
    assert type(pipeline.generator).__name__ in card and "- training hours: 2" in card and "library_name" in card
    sent = {}

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, **options):
            return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

        def upload_folder(self, *, repo_id, folder_path, **options):
            sent[repo_id] = sorted(str(p.relative_to(folder_path)) for p in Path(folder_path).rglob("*") if p.is_file())
            return "done"

    monkeypatch.setattr(huggingface_hub.hub_mixin, "HfApi", Api)
    assert shared.push_to_hub("somebody/model") == "done"
    want = ["README.md", "config.json", "model.safetensors", "tokenizer/config.json", "tokenizer/model.safetensors"]
    assert sent == {"somebody/model": want}
    monkeypatch.setattr("vgen.hub.snapshot_download", lambda name, **options: str(tmp_path / "saved"))
    assert torch.equal(Pipeline.load("hf:somebody/model", chunk=4)(LABELS, SEEDS), pipeline(LABELS, SEEDS))
    with pytest.raises(ValueError, match="no repository of the hub"):
        Pipeline.load("hf:nonsense")


def test_a_run_is_exported_alike_by_both_commands(tmp_path):
    """scripts/export.py and scripts/convert.py from a run, or from its checkpoint: the same bytes."""
    from scripts.convert import convert
    from scripts.export import export

    tokenizer = tokenizer_folder(tmp_path / "tokenizer")
    run(*LLAMAGEN, f"tokenizer_from={tokenizer}", "steps=1", f"run_dir={tmp_path / 'run'}")
    export(tmp_path / "run", tmp_path / "a")
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    for name, source in (("b", tmp_path / "run"), ("c", checkpoint)):
        convert(config_of("convert", **{"from": str(source), "out": str(tmp_path / name)}))
    found = [{p.relative_to(tmp_path / n): p.read_bytes() for p in (tmp_path / n).rglob("*.*")} for n in "abc"]
    assert found[0] == found[1] == found[2] and len(found[0]) == 5  # weights and config, of both, and the card
    card = (tmp_path / "a" / "README.md").read_text()
    (row,) = (r for r in read_rows(tmp_path / "run" / "metrics.csv") if "val/loss" in r)
    assert f"- held-out loss: {float(row['val/loss']):.4g} at step 1" in card and str(tmp_path) not in card
    assert "- data: Fake\n" in card and "- training: 1 of 1 steps of 8 images, learning rate 0.001, 32-true" in card
    assert read_config(tmp_path / "a")["kind"] == "generator" and read_config(tmp_path / "a")["weights"] == "ema"
    with pytest.raises(ValueError, match="exported folder already"):
        convert(config_of("convert", **{"from": str(tmp_path / "a"), "out": str(tmp_path / "d")}))
