"""Reading text in pictures with a program of the user's, and error rates of what was read.

Nothing here is installed by the project: `tesseract` needs the program of that name (Debian's tesseract-ocr) on PATH,
`easyocr` needs easyocr and its models, and "module:function" names a function of yours from a picture, uint8 [H, W, 3],
to its text.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import shutil
import subprocess
import unicodedata
from collections.abc import Callable, Hashable, Sequence

import numpy as np

Reader = Callable[[np.ndarray], str]
MISSING = (
    "no OCR was found: install the tesseract program (tesseract-ocr), or easyocr with its models,\n"
    "or pass ocr=module:function (uint8 [H, W, 3] to a string); ocr=none measures pixels only"
)


def find_reader(wanted: str, languages: Sequence[str]) -> tuple[str, Reader] | None:
    """(name, reader). wanted: auto (None where there is none), none, tesseract, easyocr, or module:function."""
    if wanted == "none":
        return None
    if ":" in wanted:
        module, _, name = wanted.partition(":")
        if importlib.util.find_spec(module.split(".")[0]) is None:
            raise ValueError(f"ocr={wanted}: there is no module {module}; put its folder on PYTHONPATH")
        found = getattr(importlib.import_module(module), name, None)
        if not callable(found):
            raise ValueError(f"ocr={wanted}: {module} has no function {name}")
        return wanted, found
    if wanted not in ("auto", "tesseract", "easyocr"):
        raise ValueError(f"ocr={wanted}: choose auto, none, tesseract, easyocr or module:function")
    there = {
        "tesseract": shutil.which("tesseract") is not None,
        "easyocr": importlib.util.find_spec("easyocr") is not None,
    }
    for name, make in (("tesseract", _tesseract), ("easyocr", _easyocr)):
        if there[name] and wanted in ("auto", name):
            return name, make(languages)
    if wanted != "auto":
        raise ValueError(f"ocr={wanted} is not installed: {MISSING}")
    return None


def _tesseract(languages: Sequence[str]) -> Reader:
    """The program itself, a process a picture; its page segmentation is the default one (3: automatic)."""
    from PIL import Image

    command = ["tesseract", "stdin", "stdout", *(["-l", "+".join(languages)] if languages else [])]
    known = _run_tesseract(["tesseract", "--list-langs"]).splitlines()[1:]
    unknown = [name for name in languages if name not in known]
    if unknown:
        raise ValueError(
            f"languages={','.join(unknown)}: tesseract has {', '.join(known) or 'none'}; install their data"
        )

    def read(picture: np.ndarray) -> str:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "PNG")
        return _run_tesseract(command, buffer.getvalue())

    return read


def _run_tesseract(command: Sequence[str], given: bytes = b"") -> str:
    done = subprocess.run(command, input=given, capture_output=True)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()
        raise ValueError(f"{' '.join(command)} failed with exit code {done.returncode}: {said}")
    return done.stdout.decode("utf-8")


def _easyocr(languages: Sequence[str]) -> Reader:
    import easyocr

    reader = easyocr.Reader(list(languages) or ["en"], verbose=False)
    return lambda picture: " ".join(reader.readtext(picture, detail=0, paragraph=True))


def plain(text: str) -> str:
    """Composed characters (NFC), every run of white space one space."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def edits(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """Levenshtein distance: the fewest insertions, deletions and substitutions from a to b."""
    known: dict[Hashable, int] = {}
    x, y = (np.array([known.setdefault(item, len(known)) for item in side], dtype=np.int64) for side in (a, b))
    place = np.arange(len(y) + 1)
    row = place.copy()
    for i, item in enumerate(x):
        best = np.empty_like(row)
        best[0] = i + 1
        best[1:] = np.minimum(row[1:] + 1, row[:-1] + (y != item))
        row = np.minimum.accumulate(best - place) + place  # insertions: the best start to the left, plus the way
    return int(row[-1])


class ErrorRates:
    """Character and word error rates of a set: all edits over all characters (words) of the true texts.

    They may exceed 1. Word rates say little about scripts without spaces.
    """

    def __init__(self) -> None:
        self.wrong = {"cer": 0, "wer": 0}
        self.length = {"cer": 0, "wer": 0}

    def add(self, truth: str, read: str) -> None:
        truth, read = plain(truth), plain(read)
        for name, a, b in (("cer", truth, read), ("wer", truth.split(), read.split())):
            self.wrong[name] += edits(a, b)
            self.length[name] += len(a)

    def result(self) -> dict[str, float]:
        if not self.length["cer"]:
            raise ValueError("the true texts are empty: fill the .txt files beside the pictures of text=")
        return {name: self.wrong[name] / self.length[name] for name in self.wrong}
