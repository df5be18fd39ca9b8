"""A page in the browser that draws from a generator, with the command that draws the same pictures.

    pip install '.[demo]'
    python scripts/playground.py from=outputs/digits_llamagen

It listens on this machine alone, takes no files, makes no public link and sends nothing to anybody; one press of the
button is computed at a time, and only a few wait.
"""

from __future__ import annotations

import html
import shlex
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from vtok.cli import check_numbers, check_whole_number, entry  # noqa: E402

GRADIO = (6, 16)  # as in pyproject.toml; older ones have known holes
WAITING = 8  # presses of the button that wait, at most
KEPT = 3600  # seconds for which gradio keeps the files of the pictures that it shows
STRIP = "strip.png"  # of the command, with previews


@dataclass(frozen=True)
class Drawn:
    """images: uint8 [N, H, W, 3]; strip: a PIL picture of the steps, or None; command: a line for the shell."""

    images: Any
    strip: Any
    command: str


def override(name: str, value: Any) -> str:
    """name=value as Hydra reads it, quoted for the shell."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    def text(value: Any) -> str:
        if isinstance(value, Mapping):
            return "{" + ",".join(f"{k}:{text(v)}" for k, v in value.items()) + "}"
        if isinstance(value, (list, tuple)):
            return "[" + ",".join(map(text, value)) + "]"
        if value is None or isinstance(value, bool):
            return {None: "null", True: "true", False: "false"}[value]
        if not isinstance(value, str):
            return repr(value)
        try:
            plain = OverridesParser.create().parse_override(f"x=[{value}]").value() == [value]
        except HydraException:
            plain = False
        return value if plain else "'" + value.replace("'", "\\'") + "'"

    return shlex.quote(f"{name}={text(value)}")


def command(config: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """The line of sample.py for what is asked: keys of configs/sample.yaml, and those of the playground's config that
    both have, where they are not sample.py's defaults. What is None is left out."""
    from omegaconf import OmegaConf

    defaults = OmegaConf.to_container(OmegaConf.load(ROOT / "configs" / "sample.yaml"))
    shared = {k: v for k, v in config.items() if k in defaults and k not in asked and v != defaults[k]}
    words = {k: v for k, v in (shared | dict(asked)).items() if v is not None}
    return " ".join(["python sample.py", *(override(k, v) for k, v in words.items()), "out=samples.png"])


def load(config: Mapping[str, Any]) -> Any:
    """The pipeline to draw from; ValueError for settings of the config that do not fit it."""
    from vgen.sampling import load_pipeline, resolve_device, rule_and_guidance, settings

    device, drawn = resolve_device(config["device"]), settings(config)
    rule, guide = rule_and_guidance(drawn)
    pipeline = load_pipeline(config, device)
    pipeline.check(guide, rule)
    if drawn["steps"] is not None:
        pipeline.generator.set_steps(int(drawn["steps"]))
    return pipeline


def takes(pipeline: Any) -> list[str]:
    """Which keys of sample.py the page asks for, beside num_images and seed: those that this model has."""
    from vgen.previews import preview_ends

    names = ["classes", "guidance"] if pipeline.generator.num_classes else []
    names += ["temperature", *(("top_k", "top_p") if pipeline.generator.spec.discrete else ("solver_steps",))]
    try:
        preview_ends(pipeline.generator, pipeline.tokenizer)
    except ValueError:
        return names
    return [*names, "preview"]


def draw(pipeline: Any, config: Mapping[str, Any], asked: Mapping[str, Any]) -> Drawn:
    """What `python sample.py` draws with the keys `asked`, of which classes is one index or None for all in turn, and
    preview true or false. A value of None is as if not given. Raises ValueError for what does not fit the model."""
    from vgen.previews import Previews
    from vgen.sampling import plan, rule_and_guidance, settings
    from vtok.noise import sample_seeds

    given = {k: v for k, v in asked.items() if v is not None and k != "preview"}
    wanted = dict(config) | {"classes": None} | given
    check_numbers(wanted)
    count, most, generator = wanted["num_images"], config["images_at_most"], pipeline.generator
    if count > most:
        raise ValueError(f"num_images={count}: this page draws {most} at most (images_at_most=)")
    rule, guide = rule_and_guidance(settings(wanted))
    labels = plan(wanted["classes"], 1, count, generator.num_classes, pipeline.class_names, grid=False)
    seeds = sample_seeds(wanted["seed"], 0, count)
    preview = Previews(pipeline, STRIP, seeds) if asked.get("preview") else None
    images = pipeline(labels, seeds, guidance=guide, rule=rule, on_tokens=preview).numpy()
    words = {"classes": None, "num_images": count, "seed": wanted["seed"]} | given
    if "classes" in given:
        words["classes"] = [given["classes"]]
    if preview is not None:
        words["preview"] = STRIP
    return Drawn(images, None if preview is None else preview.strip(images), command(config, words))


def require_gradio() -> Any:
    """The module gradio; ValueError where it is missing or too old."""
    try:
        import gradio
    except ImportError as error:
        raise ValueError(f"the playground needs gradio ({error}): pip install '.[demo]'") from None
    if tuple(int(part) for part in gradio.__version__.split(".")[:2]) < GRADIO:
        least = ".".join(map(str, GRADIO))
        raise ValueError(f"gradio {gradio.__version__} is older than {least}: pip install '.[demo]'")
    return gradio


def page(pipeline: Any, config: Mapping[str, Any]) -> Any:
    """The gradio.Blocks; its one event, /draw, takes num_images, seed and what `takes` names, in the page's order."""
    from vgen.sampling import settings

    gr, start, names = require_gradio(), settings(config), takes(pipeline)
    known, called, most = pipeline.generator.num_classes, pipeline.class_names, config["images_at_most"]
    classes = [(f"{i}: {called[i]}" if i < len(called) else f"{i}", i) for i in range(known)]
    make = {
        "classes": lambda: gr.Dropdown(classes, value=0, label="class"),
        "num_images": lambda: gr.Slider(1, most, value=config["num_images"], step=1, label="images"),
        "seed": lambda: gr.Number(config["seed"], precision=0, label="seed"),
        "guidance": lambda: gr.Number(start["guidance"], label="guidance (1 = off)"),
        "temperature": lambda: gr.Number(start["temperature"], label="temperature"),
        "top_k": lambda: gr.Number(start["top_k"], precision=0, label="top-k (0 = off)"),
        "top_p": lambda: gr.Number(start["top_p"], label="top-p (1 = off)"),
        "solver_steps": lambda: gr.Number(
            start["solver_steps"], precision=0, label="solver steps (empty = the model's)"
        ),
        "preview": lambda: gr.Checkbox(False, label="show the steps"),
    }
    with gr.Blocks(title="vtok + vgen", analytics_enabled=False, delete_cache=(KEPT, KEPT)) as blocks:
        with gr.Row():
            with gr.Column(scale=1):
                inputs = {name: make[name]() for name in make if name in ("num_images", "seed", *names)}
                button = gr.Button("draw", variant="primary")
            with gr.Column(scale=3):
                gallery = gr.Gallery(label="images", format="png", columns=4, interactive=False)
                steps = {"label": "steps (tokens so far)", "visible": "preview" in names}
                strip = gr.Image(format="png", interactive=False, **steps)
                line = gr.Code(label="the same pictures", language="shell", interactive=False, wrap_lines=True)

        def answer(*values: Any) -> tuple[list, Any, str]:
            try:
                drawn = draw(pipeline, config, dict(zip(inputs, values)))
            except ValueError as error:  # the page shows it as HTML
                raise gr.Error(html.escape(str(error), quote=False), print_exception=False) from None
            return list(drawn.images), drawn.strip, drawn.command

        button.click(answer, list(inputs.values()), [gallery, strip, line], api_name="draw")
    return blocks.queue(max_size=WAITING, default_concurrency_limit=1)


def check(config: Mapping[str, Any]) -> None:
    """Raise ValueError where a number of the page is none, or where nothing can listen at host and port."""
    check_numbers(config)
    for name in ("images_at_most", "num_images", "port"):
        check_whole_number(name, config[name], 1)
    if config["num_images"] > config["images_at_most"]:
        raise ValueError(f"num_images={config['num_images']} is above images_at_most={config['images_at_most']}")
    try:
        socket.create_server((str(config["host"]), config["port"])).close()
    except (OSError, OverflowError) as error:
        where = f"host={config['host']} port={config['port']}"
        raise ValueError(f"{where} cannot be listened at ({error}); give another") from None


@entry("playground", ROOT / "configs")
def main(config: Any) -> None:
    require_gradio()
    check(config)
    from omegaconf import OmegaConf

    plain = OmegaConf.to_container(config, throw_on_missing=True)
    blocks = page(load(plain), plain)
    if config.host not in ("127.0.0.1", "localhost"):
        print(f"host={config.host}: whoever reaches this machine can draw; there is no password", flush=True)
    blocks.launch(
        server_name=config.host,
        server_port=config.port,
        share=False,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        max_file_size=1,  # nothing on the page takes a file
    )


if __name__ == "__main__":
    main()
