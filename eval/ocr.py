"""Reading text in pictures with a program of the user's, and error rates of what was read.

Nothing here is installed by the project: `tesseract` needs pytesseract and the tesseract program, `easyocr` needs
easyocr and its models, and "module:function" names a function of yours from a picture, uint8 [H, W, 3], to its text.
"""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import unicodedata
from collections.abc import Callable, Hashable, Sequence

import numpy as np

Reader = Callable[[np.ndarray], str]
MISSING = (
    "no OCR was found: install pytesseract and the tesseract program, or easyocr with its models,\n"
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
    there = {"tesseract": importlib.util.find_spec("pytesseract") is not None and shutil.which("tesseract") is not None}
    there["easyocr"] = importlib.util.find_spec("easyocr") is not None
    for name, make in (("tesseract", _tesseract), ("easyocr", _easyocr)):
        if there[name] and wanted in ("auto", name):
            return name, make(languages)
    if wanted != "auto":
        raise ValueError(f"ocr={wanted} is not installed: {MISSING}")
    return None


def _tesseract(languages: Sequence[str]) -> Reader:
    import pytesseract
    from PIL import Image

    return lambda picture: pytesseract.image_to_string(Image.fromarray(picture), lang="+".join(languages) or None)


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
