"""Loading what the zoo names: find the file (given, in a folder, or on the hub), read it, convert it.

weights= may name the file or a folder that holds it; without it, files on the Hugging Face hub are downloaded by its
own client. A file that is elsewhere, or a machine without a network, gets a message that says which file to put where.
"""

from __future__ import annotations

import contextlib
import difflib
import math
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vgen.generator import Generator
from vgen.models import FAMILIES
from vgen.zoo import GENERATORS, ZOO, GeneratorEntry
from vtok.checkpoint import CheckpointError, load_strict
from vtok.config import build, describe
from vtok.tokenizer import Tokenizer, TokenSpec
from vtok.weight_files import read_weights, settle, without_weights
from vtok.zoo import TOKENIZERS, Entry

PREFIX, HUB = "zoo:", "hf:"
LOCAL_FOLDER = Path("pretrained")


@dataclass(frozen=True)
class Loaded:
    """A converted module with the entry and the file that it came from."""

    module: Any
    entry: Entry
    file: Path


def entry_of(name: str, table: Mapping[str, Entry] = ZOO) -> Entry:
    """The zoo's entry `name`, with or without "zoo:". Raises ValueError with the nearest names."""
    name = str(name).removeprefix(PREFIX).lower()
    if name not in table:
        near = difflib.get_close_matches(name, table, n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(near)}? " if near else ""
        raise ValueError(f"the zoo has no {name!r}: {hint}`python -m vgen.zoo` lists all {len(table)}")
    return table[name]


def locate(entry: Entry, given: str | os.PathLike | None = None, *, accept_license: bool = False) -> Path:
    """The entry's file on this machine. given: the file, or a folder that holds it; None looks in pretrained/, then
    asks the hub. Raises CheckpointError with the file's name and where to put it."""
    if entry.research_only and not accept_license:
        raise ValueError(f"{entry.name} is for research only ({entry.licence}): read it, then pass accept_license=true")
    if given is not None and Path(given).is_file():
        return Path(given)
    if given is not None and not Path(given).is_dir():
        raise CheckpointError(f"weights={given} does not exist: give {Path(entry.file).name} or a folder that holds it")
    folder = LOCAL_FOLDER if given is None else Path(given)
    repository = entry.repo.split("/")[-1] if entry.repo else entry.name
    tried = [folder / part / entry.file for part in (entry.name, repository, "")]
    tried += [folder / part / Path(entry.file).name for part in (entry.name, repository, "")]
    for path in tried:
        if path.is_file():
            return path
    if given is not None:
        raise CheckpointError(f"{folder} holds no {tried[0].relative_to(folder)} and no {Path(entry.file).name}")
    if entry.repo is None:
        raise CheckpointError(
            f"{entry.file} of {entry.name} is not on the hub ({entry.origin}): "
            f"get it, put it at {tried[0]}, or pass weights=<file>"
        )
    return _download(entry, tried[0])


def _download(entry: Entry, place: Path) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(huggingface_hub.hf_hub_download(entry.repo, entry.file))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        size = "" if entry.parameters is None else f", about {4 * entry.parameters / 1e9:.1f} GB in float32"
        raise CheckpointError(
            f"{entry.file} of huggingface.co/{entry.repo}{size} could not be downloaded ({type(error).__name__}): "
            f"fetch it on a machine with a network, put it at {place}, or pass weights=<file>"
        ) from None


def load_entry(
    entry: Entry,
    given: str | os.PathLike | None = None,
    *,
    inside: str | None = None,
    config: Mapping[str, Any] | None = None,
    accept_license: bool = False,
) -> Loaded:
    """Find, read and convert. inside: which of the file's weights, where not the entry's own choice; config: changes to
    the entry's (of a generator's tokenizer)."""
    file = locate(entry, given, accept_license=accept_license)
    if not entry.verified:
        warnings.warn(
            f"{entry.name}: keys unverified, no class of the original was at hand; {entry.note}", stacklevel=2
        )
    state = read_weights(file, inside or entry.inside)
    state = {key: value for key, value in state.items() if not any(re.fullmatch(p, key) for p in entry.drop)}
    return Loaded(convert_file(entry.kind, entry.family, state, merged(entry.config, config or {}), file), entry, file)


def convert_file(kind: str, family: str, state: Mapping[str, Tensor], config: Mapping[str, Any], file: Path) -> Any:
    """Our module of a state dict that was read from `file`. kind: tokenizer or generator."""
    if kind == "generator":
        from vgen.convert import convert
    else:
        from vtok.convert import convert
    try:
        with without_weights():
            module = convert(family, state, config)
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from None
    return settle(module, state, file)


def merged(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """config with the sections of `changes` merged into it."""
    found = dict(config)
    for key, value in changes.items():
        found[key] = merged(found.get(key, {}), value) if isinstance(value, Mapping) else value
    return found


def on_tokens_of(generator: Generator, tokenizer: Tokenizer) -> Generator:
    """A generator converted from its file alone, on the tokens of `tokenizer`, whose widths of codes, image size and
    quantizer no such file tells. ValueError where number, order or vocabularies of the tokens differ, or the widths of
    latents, which its weights have learned."""
    own = generator.spec

    def kind(spec: TokenSpec) -> tuple:
        return spec.layout, [(p.count, p.vocab_size, p.vocab_size is None and p.channels) for p in spec.parts]

    spec = tokenizer.spec
    if kind(spec) != kind(own):
        with contextlib.suppress(ValueError):  # it has one size: then the comparison below decides
            spec = tokenizer.spec_for(math.isqrt(own.layout.length) * tokenizer.stride)
    if kind(spec) != kind(own):
        order = " in another order" if str(spec) == str(own) else ""
        raise ValueError(f"tokenizer_from emits {tokenizer.spec}, the generator writes {own}{order}: pass its own")
    generator.accepts(spec)
    said = describe(generator)
    with without_weights():
        fitted = build({**said, "arguments": {**said["arguments"], "spec": spec.to_config()}}, FAMILIES)
    state = generator.state_dict()
    if any(key.startswith("quantizer.") for key in state):  # of which `adopt` takes over all
        state = {key: value for key, value in state.items() if not key.startswith("quantizer.")}
        state |= {f"quantizer.{key}": value.clone() for key, value in tokenizer.quantizer.state_dict().items()}
    load_strict(fitted, state, "the generator")
    fitted.adopt(tokenizer)
    return fitted.eval()


def load_generator(
    name: str,
    weights: str | os.PathLike | None = None,
    tokenizer: str | os.PathLike | None = None,
    *,
    inside: str | None = None,
    accept_license: bool = False,
) -> tuple[Loaded, Loaded]:
    """A generator of the zoo and its tokenizer.

    weights: file or folder of the generator; its folder is also where the tokenizer's file is looked for first.
    tokenizer: file or folder of the tokenizer's weights, if elsewhere.
    """
    entry = entry_of(name)
    if not isinstance(entry, GeneratorEntry):
        raise ValueError(f"{entry.name} is a tokenizer; sample from one of {', '.join(list(GENERATORS)[:4])}, ...")
    decoder = TOKENIZERS[entry.tokenizer]
    beside = tokenizer
    if tokenizer is None and weights is not None:
        folder = Path(weights) if Path(weights).is_dir() else Path(weights).parent
        try:
            beside = locate(decoder, folder, accept_license=accept_license)
        except CheckpointError:
            beside = None  # then pretrained/ or the hub, whose message says more
    generator = load_entry(entry, weights, inside=inside, accept_license=accept_license)
    shown = load_entry(decoder, beside, config=entry.tokenizer_config, accept_license=accept_license)
    generator.module.adopt(shown.module)
    return generator, shown
