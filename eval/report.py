"""`python -m eval.report`: everything measured about some runs as one HTML page that needs nothing beside itself.

    python -m eval.report runs=[outputs/a,outputs/b] out=outputs/report.html
    python -m eval.report runs=[outputs/a] samples=samples.npz data=cifar10 out=outputs/report.html

The table of eval.compare with its marks, each protocol, curves, sweeps, pictures, reconstructions, the nearest training
images of samples (`samples` and `data` given), and the commands. Pictures are data URIs; there is no script, no font
and no address of another server in the page.
"""

from __future__ import annotations

import base64
import html
import io
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eval.compare import Run, plot_curves, read_runs, table
from eval.features import Extractor, make_extractor
from eval.fid import CONFIGS
from eval.measure import measure
from eval.sources import Images, from_data, open_images
from eval.sweep import lines, plot
from vtok.checkpoint import write_atomic
from vtok.cli import check_place, entry

ROOM = 1100  # pixels of a picture that fit the width below: 16 pictures of 32 px a row, twice their size
STYLE = """
:root { color-scheme: light; --ink: #1c2024; --soft: #60646c; --line: #dfe2e6; --back: #f7f8f9; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 72rem; color: var(--ink); background: #fff;
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; } h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; }
p, li { max-width: 46rem; } .soft, figcaption { color: var(--soft); font-size: .88rem; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1rem; } a { color: #0b5fa5; }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .45rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; } tr:last-child td { border-bottom: 0; }
thead th { background: var(--back); font-weight: 600; }
figure { margin: 1rem 0; }
figure img { max-width: 100%; height: auto; border: 1px solid var(--line); border-radius: 4px; }
.pixels { image-rendering: pixelated; }
pre { overflow-x: auto; background: var(--back); border: 1px solid var(--line); border-radius: 6px; padding: .7rem;
  font-size: .84rem; } details { margin: .5rem 0; } summary { cursor: pointer; }
dl { display: grid; grid-template-columns: minmax(8rem, max-content) 1fr; gap: .15rem 1rem; font-size: .88rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 34rem) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .4rem; } h1 { font-size: 1.4rem; } }
"""


def image_tag(data: bytes, text: str, *, pixels: bool = False) -> str:
    """<figure> with a PNG as a data URI."""
    code = base64.b64encode(data).decode()
    kind = ' class="pixels"' if pixels else ""
    alt = html.escape(text, quote=True)
    return (
        f'<figure><img{kind} alt="{alt}" src="data:image/png;base64,{code}">'
        f"<figcaption>{html.escape(text)}</figcaption></figure>"
    )


def png(pixels: np.ndarray) -> bytes:
    """uint8 [H, W, 3] as PNG, enlarged by the largest whole factor that the page has room for."""
    from PIL import Image

    factor = max(1, ROOM // pixels.shape[1])
    buffer = io.BytesIO()
    Image.fromarray(pixels.repeat(factor, 0).repeat(factor, 1)).save(buffer, "PNG")
    return buffer.getvalue()


def picture_tag(path: Path, text: str) -> str:
    """A stored picture, enlarged as the others are."""
    from vtok.data.files import read_image

    return image_tag(png(np.asarray(read_image(path))), text, pixels=True)


def results_section(runs: list[Run]) -> str:
    rows, notes = table(runs)
    if len(rows[0]) < 2:
        return "<p>No results of eval.fid, eval.reconstruction or eval.likelihood were found.</p>"
    # one line a metric: pages are narrow, and there are more metrics than runs
    turned = [list(column) for column in zip(*rows)]
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in ["metric", *turned[0][1:]])
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(c) or '&ndash;'}</td>" for c in row) + "</tr>" for row in turned[1:]
    )
    said = "".join(f'<p class="soft">{html.escape(note)}</p>' for note in notes)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{said}'


def protocols_section(runs: list[Run]) -> str:
    parts = []
    for run in runs:
        seen: dict[str, list[str]] = {}
        for metric, (_, protocol) in run.metrics.items():
            if protocol is not None:
                seen.setdefault(json.dumps(protocol.to_json(), sort_keys=True), []).append(metric)
        for text, metrics in seen.items():
            fields = {k: v for k, v in json.loads(text).items() if v is not None}
            fields["versions"] = ", ".join(f"{k} {v}" for k, v in fields["versions"].items())
            items = "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(str(v))}</dd>" for k, v in fields.items())
            shown = metrics if len(metrics) < 4 else [*metrics[:3], "..."]
            title = f"{run.name}: {', '.join(shown)}; protocol {fields['name']}, {fields['images']} images"
            parts.append(f"<details open><summary>{html.escape(title)}</summary><dl>{items}</dl></details>")
    return "".join(parts)


def sweeps_section(places: list[str]) -> str:
    parts = []
    for place in places:
        for file in sorted(Path(place).glob("eval/*/sweep.jsonl")) if Path(place).is_dir() else []:
            try:
                found = [json.loads(line) for line in file.read_text().splitlines()]
                text = html.escape("\n".join(lines(found)))
            except (ValueError, LookupError, TypeError) as error:
                raise ValueError(f"{file} is no result of eval.sweep ({error!r}); remove it, or run it again") from None
            with tempfile.TemporaryDirectory() as folder:
                plot(found, Path(folder) / "sweep.png")
                picture = (Path(folder) / "sweep.png").read_bytes()
            parts.append(image_tag(picture, f"{Path(place).name}: {file.parent.name}") + f"<pre>{text}</pre>")
    return "".join(parts)


def curves_section(runs: list[Run]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "curves.png"
        return image_tag(path.read_bytes(), "training and validation, by step") if plot_curves(runs, path) else ""


def pictures_section(runs: list[Run], samples: Images | None, count: int = 64) -> str:
    from vtok.callbacks import grid

    parts = []
    if samples is not None:
        first = torch.cat(list(samples.part(count, 0, min(count, samples.count)))).numpy()
        text = f"the first {len(first)} images of {Path(samples.name).name}, not chosen"
        parts.append(image_tag(png(grid(first, 8 if len(first) < 32 else 16)), text, pixels=True))
    for run in runs:
        if run.picture is not None and not run.picture.name.startswith("reconstructions"):
            parts.append(picture_tag(run.picture, f"{run.name}: {run.picture.stem}"))
    return "".join(parts)


def reconstructions_section(runs: list[Run]) -> str:
    found = [r for r in runs if r.picture is not None and r.picture.name.startswith("reconstructions")]
    text = "{}: {}, each original above its reconstruction"
    return "".join(picture_tag(r.picture, text.format(r.name, r.picture.stem)) for r in found)


def neighbours_section(samples: Images, train: Images, extractor: Extractor, count: int = 16, nearest: int = 3) -> str:
    """Samples in the first row, below each its nearest training images by the extractor's features."""
    from vtok.callbacks import grid

    chosen = np.linspace(0, samples.count - 1, min(count, samples.count)).round().astype(int).tolist()
    wanted, first = torch.cat([next(iter(part_of(samples, i))) for i in chosen]), next(iter(part_of(train, 0)))
    if first.shape[1:] != wanted.shape[1:]:
        raise ValueError(f"samples are {tuple(wanted.shape[1:3])}, data {tuple(first.shape[1:3])}: set data.image_size")
    features = extractor(wanted).features.double().cpu()
    cloud = np.empty((train.count, extractor.dim), np.float32)
    measure(train, extractor, batch_size=64, keep=cloud, text="training images")
    order = torch.cdist(features, torch.from_numpy(cloud).double()).argsort(dim=1)[:, :nearest]
    shown = [torch.cat([next(iter(part_of(train, int(i)))) for i in order[:, rank]]) for rank in range(nearest)]
    rows = [image.numpy() for image in (wanted, *shown)]
    text = (
        f"first row: samples evenly spaced over the file; below each its {nearest} nearest of {train.count} training "
        f"images by the features of {extractor.name}"
    )
    return image_tag(png(grid(np.concatenate(rows), len(chosen))), text, pixels=True)


def part_of(images: Images, index: int) -> Iterator[torch.Tensor]:
    """The one image `index`; through its chunk where images come in chunks."""
    first = index // images.unit * images.unit
    for batch in images.part(images.unit, first, min(first + images.unit, images.count)):
        yield batch[index - first : index - first + 1]


def page(title: str, sections: dict[str, str]) -> str:
    """The HTML. Sections without content are left out."""
    kept = {name: text for name, text in sections.items() if text}
    links = "".join(f'<a href="#{name.split()[0].lower()}">{name}</a>' for name in kept)
    body = "".join(
        f'<section id="{name.split()[0].lower()}"><h2>{name}</h2>{text}</section>' for name, text in kept.items()
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>"
        f'<h1>{html.escape(title)}</h1><nav class="soft">{links}</nav>{body}</body></html>\n'
    )


def report(
    places: list[str], out: Path, *, title: str, samples: Images | None, train: Images | None, extractor: Any | None
) -> str:
    """Write the page; returns it."""
    runs = read_runs(places)
    commands = "\n".join(dict.fromkeys(c for run in runs for c in run.commands))
    near = neighbours_section(samples, train, extractor) if samples and train and extractor else ""
    text = page(
        title,
        {
            "Results": results_section(runs),
            "Sweeps": sweeps_section(places),
            "Curves": curves_section(runs),
            "Pictures": pictures_section(runs, samples),
            "Nearest training images": near,
            "Reconstructions": reconstructions_section(runs),
            "Protocols": protocols_section(runs),
            "Commands": f"<pre>{html.escape(commands)}</pre>" if commands else "",
        },
    )
    write_atomic(out, lambda file: file.write(text.encode()))
    print(f"wrote {out} ({len(text) / 2**20:.1f} MB)")
    return text


@entry("eval_report", CONFIGS, texts=("title",), lists=("runs",))
def main(config: Any) -> None:
    from vgen.sampling import resolve_device
    from vtok.config import instantiate

    places = [config.runs] if isinstance(config.runs, str) else list(config.runs)
    check_place("out", config.out, endings=(".html", ".htm"))
    read_runs(places)  # mistakes in them come before the features
    samples = open_images(config.samples) if config.samples else None
    train = from_data(instantiate(config.data), "train", config.train_images) if config.data else None
    if train is not None and samples is None:
        raise ValueError("data= is for the nearest training images of samples: give samples=<npz or folder> too")
    extractor = None
    if train is not None:
        device = resolve_device(config.device)
        extractor = make_extractor(config.extractor, weights_path=config.weights_path, device=device)
    report(places, Path(config.out), title=config.title, samples=samples, train=train, extractor=extractor)


if __name__ == "__main__":
    main()
