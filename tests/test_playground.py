"""The page that draws: the same pictures as sample.py, the command that it shows, its mistakes, and the page itself."""

import shlex
import socket
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from pairs import CLASSES, PAIRS, pair, pair_folder
from PIL import Image

from vgen.heads import DrawRule
from vgen.models.llamagen import LlamaGen
from vgen.pipeline import Pipeline
from vgen.sampling import sample
from vtok.checkpoint import save_folder

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.playground import check, draw, load, main, override, page, require_gradio, takes  # noqa: E402


def composed(name: str, *overrides: str) -> dict:
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return OmegaConf.to_container(compose(name, overrides=list(overrides)))


def config(source: Path, *overrides: str) -> dict:
    return composed("playground", *shlex.split(override("from", str(source))), "device=cpu", *overrides)


ASKED = {
    "llamagen": {"classes": 2, "num_images": 3, "guidance": 2.5, "temperature": 0.9, "top_k": 7, "top_p": 0.8},
    "var": {"classes": 1, "num_images": 2, "seed": -1, "guidance": 1.5, "top_k": None, "preview": True},
    "mar": {"classes": None, "num_images": 5, "seed": 10**30, "temperature": 0.8, "solver_steps": 3},
}  # fmt: skip


@pytest.mark.parametrize("name", ASKED)
def test_the_command_that_is_shown_draws_the_same_pictures(name, tmp_path, monkeypatch):
    """Of a folder whose name needs quotes, with a schedule of the guidance and in chunks, which the line must say."""
    monkeypatch.chdir(tmp_path)
    source = pair_folder(name, tmp_path / "it's, a=run")
    words = ("guidance=1.5", "schedule=linear", "schedule_options={start: 1.0}", "chunk=2", f"trust={[]}")
    given = config(source, *words)
    drawn = draw(load(given), given, ASKED[name])
    program, *words = shlex.split(drawn.command)[1:]
    assert program == "sample.py" and words[-1] == "out=samples.png"
    again = composed("sample", *words[:-1], "out=samples.npz")
    sample(again)
    data = np.load("samples.npz")
    np.testing.assert_array_equal(data["arr_0"], drawn.images)
    assert data["arr_1"].tolist() == {"llamagen": [2] * 3, "var": [1] * 2, "mar": [0, 1, 2, 3, 0]}[name]
    assert (again["schedule"], again["chunk"], again["top_k"]) == ("linear", 2, ASKED[name].get("top_k"))
    assert len(np.unique(drawn.images, axis=0)) == len(drawn.images)  # every image has a seed of its own
    if name == "var":
        np.testing.assert_array_equal(np.asarray(Image.open("strip.png")), np.asarray(drawn.strip))
    else:
        assert drawn.strip is None


def test_the_command_leaves_out_what_sample_does_by_itself(tmp_path):
    given = config("zoo:var-d16") | {"device": "auto"}
    source = pair_folder("llamagen", tmp_path / "run")
    drawn = draw(load(config(source)), given | {"from": str(source)}, {"classes": 3})
    assert drawn.command == f"python sample.py from={source} 'classes=[3]' num_images=4 seed=0 out=samples.png"


@pytest.mark.parametrize("value", ["zoo:var-d16", "a b", "it's", "a,b", "a=b", "12", "null", "[x]", "{y}", "a:b/c.ckpt",
                                   ["m.n", "it's"], {"low": 0.2, "high": 1}, None, True, 1e-05, -3])  # fmt: skip
def test_overrides_come_back_through_shell_and_hydra(value):
    (word,) = shlex.split(override("from", value))
    assert composed("sample", word)["from"] == value


@pytest.mark.parametrize("name", PAIRS)
def test_the_page_asks_for_what_the_model_has(name):
    """By its own check of the rule."""
    generator, tokenizer = pair(name)
    names = takes(Pipeline(generator, tokenizer))
    for key, value in {"temperature": 0.5, "top_k": 3, "top_p": 0.5, "solver_steps": 10}.items():
        try:
            generator.check_rule(DrawRule(**{key: value}))
        except ValueError:
            assert key not in names
        else:
            assert key in names
    assert names[:2] == ["classes", "guidance"]
    coarse = ("var", "flexvar", "har", "detailflow", "dar", "retok", "flextok", "flowar", "ecar", "xar_scale")
    assert ("preview" in names) == (name in coarse)


def unconditional(folder: Path) -> Path:
    _, tokenizer = pair("llamagen")
    save_folder(LlamaGen(tokenizer.spec, 0, depth=1, width=16, heads=2, multiple_of=8), folder)
    save_folder(tokenizer, folder / "tokenizer")
    return folder


def test_an_unconditional_model_has_no_class_and_no_guidance(tmp_path):
    given = config(unconditional(tmp_path))
    pipeline = load(given)
    assert takes(pipeline) == ["temperature", "top_k", "top_p"]
    assert "classes" not in draw(pipeline, given, {"num_images": 1}).command
    for asked, words in (({"classes": 0}, "unconditional"), ({"guidance": 2.0}, "unconditional")):
        with pytest.raises(ValueError, match=words):
            draw(pipeline, given, asked)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"num_images": 5}, r"num_images=5: this page draws 4 at most \(images_at_most=\)"),
        ({"num_images": 0}, "num_images=0: give a whole number of at least 1"),
        ({"seed": 1.5}, "seed=1.5: give a whole number"),
        ({"classes": CLASSES}, f"unknown class {CLASSES}"),
        ({"classes": "<b>"}, "unknown class '<b>'"),
        ({"guidance": "two"}, "guidance=two: give a number"),
        ({"temperature": -1}, "temperature must be >= 0"),
        ({"top_p": 0}, "0 < top_p <= 1"),
        ({"solver_steps": 3}, "leave them out"),
        ({"preview": True}, "decodes whole images only"),
    ],
)
def test_what_does_not_fit_is_a_message(asked, words, tmp_path):
    given = config(pair_folder("llamagen", tmp_path), "images_at_most=4")
    with pytest.raises(ValueError, match=words):
        draw(load(given), given, asked)


def test_mistakes_of_the_command_are_named_before_the_model_is_read(monkeypatch, capsys):
    """Also that gradio is missing, or older than the release that closed what was open."""
    gradio = types.SimpleNamespace(__version__="6.16.0")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for module, words, said in (
            (None, (), "pip install '.[demo]'"),
            (types.SimpleNamespace(__version__="6.9.1"), (), "gradio 6.9.1 is older than 6.16: pip install '.[demo]'"),
            (gradio, (f"port={port}",), f"host=127.0.0.1 port={port} cannot be listened at"),
            (gradio, ("port=0",), "port=0: give a whole number of at least 1"),
            (gradio, ("port=70000",), "port=70000 cannot be listened at"),
            (gradio, ("num_images=17",), "num_images=17 is above images_at_most=16"),
            (gradio, ("top_k=x",), "top_k=x: give a whole number"),
        ):
            monkeypatch.setitem(sys.modules, "gradio", module)
            monkeypatch.setattr(sys, "argv", ["playground.py", "from=nowhere", *words])
            with pytest.raises(SystemExit) as stopped:
                main()
            printed = capsys.readouterr()
            assert stopped.value.code == 2 and said in printed.err and len(printed.err.splitlines()) == 1
    monkeypatch.setitem(sys.modules, "gradio", gradio)
    assert require_gradio() is gradio
    check(composed("playground", "from=nowhere", f"port={port}"))  # free again


def test_settings_that_do_not_fit_the_model_stop_the_command(tmp_path):
    with pytest.raises(ValueError, match="leave them out"):
        load(config(pair_folder("llamagen", tmp_path), "solver_steps=3"))
    with pytest.raises(ValueError, match="leave steps away"):
        load(config(tmp_path, "steps=3"))


def test_the_command_serves_this_machine_alone_unless_told(tmp_path, monkeypatch, capsys):
    launched, source = [], pair_folder("llamagen", tmp_path)
    served = types.SimpleNamespace(launch=lambda **options: launched.append(options))
    monkeypatch.setitem(sys.modules, "gradio", types.SimpleNamespace(__version__="6.16.0"))
    monkeypatch.setattr("scripts.playground.page", lambda pipeline, config: served)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for words in ((), ("host=0.0.0.0",)):
        monkeypatch.setattr(sys, "argv", ["playground.py", f"from={source}", "device=cpu", f"port={port}", *words])
        main()
        assert ("no password" in capsys.readouterr().out) == bool(words)
    assert [options["server_name"] for options in launched] == ["127.0.0.1", "0.0.0.0"]
    for options in launched:
        assert options["server_port"] == port and options["max_file_size"] == 1
        assert not any(options[key] for key in ("share", "mcp_server", "enable_monitoring", "ssr_mode"))


def test_the_page_draws_and_shows_mistakes(tmp_path):
    """Through a server on this machine and gradio's own client."""
    pytest.importorskip("gradio", reason="the extra demo is not installed")
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    source = pair_folder("var", tmp_path)
    given = config(source)
    pipeline = load(given)
    blocks = page(pipeline, given)
    try:
        _, url, public = blocks.launch(server_name="127.0.0.1", share=False, prevent_thread_lock=True, quiet=True)
        assert public is None and url.startswith("http://127.0.0.1:")
        client = Client(url, verbose=False, download_files=str(tmp_path / "got"))
        asked = {"classes": 2, "num_images": 3, "seed": 1, "guidance": 2.0, "temperature": 1.0, "top_k": 5}
        asked |= {"top_p": 1.0, "preview": True}
        images, strip, line = client.predict(*asked.values(), api_name="/draw")
        with pytest.raises(AppError, match="0 &lt; top_p &lt;= 1"):
            client.predict(*(asked | {"top_p": 0.0}).values(), api_name="/draw")
    finally:
        blocks.close()
    want = draw(pipeline, given, asked)
    assert line == want.command
    got = [np.asarray(Image.open(item["image"]).convert("RGB")) for item in images]
    np.testing.assert_array_equal(got, want.images)
    np.testing.assert_array_equal(np.asarray(Image.open(strip).convert("RGB")), np.asarray(want.strip))
