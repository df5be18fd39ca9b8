"""`python -m eval.compare`: results of several runs in one table, their curves in one plot, their pictures in one grid.

    python -m eval.compare runs=[outputs/a,outputs/b] out=outputs/comparison

A run directory gives its eval/*.json, metrics.csv and newest picture; a JSON file of eval.fid, eval.reconstruction or
eval.likelihood stands for itself. Numbers that were not obtained as the first one of their column are marked, and a
footnote says what differs: they are not comparable.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.fid import CONFIGS
from eval.protocol import Protocol
from vtok.checkpoint import write_atomic
from vtok.cli import check_place, entry

MARKS = "*†‡§¶#"


@dataclass
class Run:
    """What one place holds. metrics: name -> (value, protocol or None); curves: name -> [(step, value)]."""

    name: str
    metrics: dict[str, tuple[float | int, Protocol | None]] = field(default_factory=dict)
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    picture: Path | None = None
    commands: list[str] = field(default_factory=list)


def read_run(place: str | Path) -> Run:
    """A run directory, a folder of results, or one JSON file. ValueError where there is nothing."""
    path = Path(place)
    if not path.exists():
        raise ValueError(f"runs: {path} does not exist")
    run = Run(path.stem if path.is_file() else path.name)
    for file in [path] if path.is_file() else sorted([*path.glob("*.json"), *path.glob("eval/*.json")]):
        take_results(run, file)
    if path.is_dir():
        if (path / "metrics.csv").is_file():
            run.curves = read_curves(path / "metrics.csv")
        pictures = sorted((path / "pictures").glob("*_[0-9]*.png"))
        run.picture = pictures[-1] if pictures else None
    if not (run.metrics or run.curves or run.picture):
        raise ValueError(f"{path} holds no results: no eval/*.json, metrics.csv or pictures")
    return run


def read_runs(places: list[str]) -> list[Run]:
    if not places:
        raise ValueError("runs=[] names no run: give run directories, folders of results, or JSON files")
    runs = [read_run(place) for place in places]
    name_apart(runs, [Path(place) for place in places])
    return runs


def name_apart(runs: list[Run], places: list[Path]) -> None:
    """Name the jobs of a sweep, whose folders are numbers, by the overrides that not all jobs given here have; all runs
    by their places where two names would be the same."""
    jobs: dict[Path, list[tuple[Run, list[str]]]] = {}
    for run, place in zip(runs, places):
        if run.name.isdigit() and (place / "overrides.txt").is_file():
            given = (place / "overrides.txt").read_text().splitlines()
            jobs.setdefault(place.resolve().parent, []).append((run, given))
    for sweep, siblings in jobs.items():
        for run, given in siblings:
            own = [word for word in given if any(word not in other for _, other in siblings)]
            run.name = " ".join(own) or f"{sweep.name}/{run.name}"
    if len({run.name for run in runs}) < len(runs):
        for run, place in zip(runs, places):
            run.name = str(place)


def take_results(run: Run, file: Path) -> None:
    """Numbers of a JSON file that an evaluation wrote; any other JSON file is left alone."""
    try:
        data = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error})") from None
    if not isinstance(data, dict) or not isinstance(data.get("metrics"), dict):
        return
    described = data.get("protocol")
    try:
        protocol = Protocol.from_json(described) if described else None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: {error}; measure it again, or leave it out of runs") from None
    run.commands += [data["command"]] if "command" in data else []
    for name, value in data["metrics"].items():
        if isinstance(value, dict):
            value = value.get("mean")
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            run.metrics[name] = (value, protocol)


def read_curves(file: Path) -> dict[str, list[tuple[int, float]]]:
    """Columns of metrics.csv by name, each [(step, value)]."""
    curves: dict[str, list[tuple[int, float]]] = {}
    try:
        with open(file, newline="") as source:
            for row in csv.DictReader(source):
                for name, text in row.items():
                    if name and name not in ("step", "epoch") and text:
                        curves.setdefault(name, []).append((int(float(row["step"])), float(text)))
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{file} is no metrics.csv of a training ({error}); leave its run out of runs") from None
    return curves


def marked(runs: list[Run], metric: str) -> tuple[list[str], list[str]]:
    """(a cell for every run, footnotes) of a metric; numbers under another protocol than the first get a mark."""
    first: Protocol | None = None
    notes: dict[str, str] = {}
    cells = []
    for run in runs:
        if metric not in run.metrics:
            cells.append("")
            continue
        value, protocol = run.metrics[metric]
        mark = ""
        if protocol is not None and first is None:
            first = protocol
        elif protocol is not None and (differs := protocol.differs(first)):
            said = ", ".join(f"{k} {shown(protocol, k)}, not {shown(first, k)}" for k in differs)
            mark = notes.setdefault(said, MARKS[min(len(notes), len(MARKS) - 1)])
        cells.append((str(value) if isinstance(value, int) else f"{value:.4f}") + mark)
    return cells, [f"{mark} not comparable with the first {metric}: {said}" for said, mark in notes.items()]


def shown(protocol: Protocol, key: str) -> str:
    value = str(getattr(protocol, key))
    return f"{value[:12]}..." if len(value) > 40 and " " not in value else value


def table(runs: list[Run]) -> tuple[list[list[str]], list[str]]:
    """Rows of text, the first with names of metrics, and footnotes."""
    names = list(dict.fromkeys(name for run in runs for name in run.metrics))
    columns, notes = [], []
    for name in names:
        cells, said = marked(runs, name)
        columns.append([name, *cells])
        notes += said
    return [list(row) for row in zip(["run", *(run.name for run in runs)], *columns)], notes


def as_text(rows: list[list[str]], notes: list[str]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    body = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join([*body, *notes])


def plot_curves(runs: list[Run], path: Path, names: list[str] | None = None) -> bool:
    """One panel a metric, one line a run; names: which (null: losses and what validation measures). Whether any."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    known = sorted({name for run in runs for name in run.curves})
    wanted = names or [n for n in known if n == "train/loss" or (n.startswith("val/") and not n.endswith("_raw"))]
    wanted = [n for n in wanted if n in known and "step_" not in n][:9]
    if not wanted:
        return False
    columns = min(3, len(wanted))
    rows = -(-len(wanted) // columns)
    size = (4 * columns, 2.7 * rows)
    figure, axes = pyplot.subplots(rows, columns, figsize=size, dpi=110, layout="constrained", squeeze=False)
    for place, name in zip(axes.flat, wanted):
        for number, run in enumerate(runs):
            if name in run.curves:  # one colour a run, in every panel
                points, marker = run.curves[name], "." if len(run.curves[name]) < 9 else ""
                place.plot(*zip(*points), label=run.name, color=f"C{number}", linewidth=1, marker=marker)
        place.set_title(name, fontsize=9)
        place.tick_params(labelsize=7)
    for place in list(axes.flat)[len(wanted) :]:
        place.set_visible(False)
    for place in axes.flat[: len(wanted)]:
        if len(runs) > 1:
            place.legend(fontsize=7)
    write_atomic(path, lambda file: figure.savefig(file, format="png"))
    pyplot.close(figure)
    return True


def grid_of(found: list[tuple[str, Any]], path: Path) -> bool:
    """Pictures (name, PIL image) below each other, each under its name. Whether there are any."""
    from PIL import Image, ImageDraw

    if not found:
        return False
    bar = 16
    sheet = Image.new("RGB", (max(p.width for _, p in found), sum(p.height + bar for _, p in found)), "white")
    pen, top = ImageDraw.Draw(sheet), 0
    for name, picture in found:
        pen.text((4, top + 2), name, fill="black")
        sheet.paste(picture, (0, top + bar))
        top += picture.height + bar
    write_atomic(path, lambda file: sheet.save(file, "PNG"))
    return True


def compare(places: list[str], out: Path, curves: list[str] | None = None) -> Mapping[str, Any]:
    """Print the table; write table.txt, curves.png and grid.png to `out`; returns rows and notes."""
    from vtok.data.files import read_image

    check_place("out", out, folder=True)
    runs = read_runs(places)
    known = sorted({name for run in runs for name in run.curves})
    if unknown := sorted(set(curves or ()) - set(known)):
        raise ValueError(f"curves={unknown[0]}: no run has it; there are {', '.join(known) or 'none'}")
    # the newest of each run; one that cannot be read shows before anything is written
    pictures = [(run.name, read_image(run.picture)) for run in runs if run.picture]
    rows, notes = table(runs)
    text = as_text(rows, notes)
    print(text)
    write_atomic(out / "table.txt", lambda file: file.write((text + "\n").encode()))
    written = ["table.txt"]
    written += ["curves.png"] if plot_curves(runs, out / "curves.png", curves) else []
    written += ["grid.png"] if grid_of(pictures, out / "grid.png") else []
    print(f"wrote {', '.join(written)} to {out}")
    return {"rows": rows, "notes": notes}


@entry("eval_compare", CONFIGS, lists=("runs", "curves"))
def main(config: Any) -> None:
    places = [config.runs] if isinstance(config.runs, str) else list(config.runs)
    curves = [config.curves] if isinstance(config.curves, str) else config.curves
    compare(places, Path(config.out), list(curves) if curves else None)


if __name__ == "__main__":
    main()
