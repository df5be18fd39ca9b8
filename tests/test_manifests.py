"""Manifests of published checkpoints, written from the originals' classes, convert with no key left over."""

import gzip
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vgen.published import load_entry
from vgen.zoo import ZOO, lines
from vtok.checkpoint import CheckpointError
from vtok.weight_files import without_weights

FOLDER = Path(__file__).parent / "references" / "manifests"
NAMES = sorted(file.name.removesuffix(".json.gz") for file in FOLDER.glob("*.json.gz"))
BUFFERS = ("mask", "freqs", "freqs_cos", "freqs_sin")  # xAR's: checked by their values, which a manifest does not have


def manifest_of(name):
    return json.loads(gzip.decompress((FOLDER / f"{name}.json.gz").read_bytes()))


def converted(entry, state):
    """Our module of a whole checkpoint on the meta device, as `load_entry` makes it of a file."""
    if entry.kind == "generator":
        from vgen.convert import convert
    else:
        from vtok.convert import convert
    state = {k: v for k, v in state.items() if not any(re.fullmatch(dropped, k) for dropped in entry.drop)}
    with without_weights():
        return convert(entry.family, state, entry.config)


@pytest.mark.parametrize("name", NAMES)
def test_no_key_is_left_over_and_the_count_is_as_published(name):
    manifest, entry = manifest_of(name), ZOO[name]
    state = {k: torch.empty(s, dtype=getattr(torch, d), device="meta") for k, (s, d) in manifest["state"].items()}
    if entry.family == "xar":
        state = {k: v for k, v in state.items() if k.rsplit(".", 1)[-1] not in BUFFERS}
    module = converted(entry, state)
    learned = [p for p in module.parameters() if p.requires_grad]  # not a tokenizer's codebook that is adopted (VAR)
    assert all(p.is_meta for p in learned)
    assert sum(p.numel() for p in learned) == manifest["parameters"]
    assert manifest["parameters"] == entry.parameters, f"the original has {manifest['parameters']:,}"


@pytest.mark.parametrize("name", ["llamagen-b-256", "titok-l32", "detailflow-16", "maskgit-titok-l32"])
def test_a_key_too_many_or_too_few_is_an_error(name):
    entry, shapes = ZOO[name], manifest_of(name)["state"]
    state = {k: torch.empty(s, dtype=getattr(torch, d), device="meta") for k, (s, d) in shapes.items()}
    with pytest.raises(ValueError, match=r"unknown keys: another\.weight"):
        converted(entry, {**state, "another.weight": torch.empty(1, device="meta")})
    last = [k for k in state if k.endswith("weight") and not any(re.fullmatch(d, k) for d in entry.drop)][-1]
    with pytest.raises((ValueError, CheckpointError)):
        converted(entry, {k: v for k, v in state.items() if k != last})


def test_every_entry_has_a_manifest_or_says_that_its_keys_are_unverified():
    assert set(NAMES) == {name for name, entry in ZOO.items() if entry.verified}
    # FlexTok's modules are named in the configuration beside its weights, FlowAR's code is not published
    assert {entry.family for entry in ZOO.values() if not entry.verified} == {"flextok", "flowar"}
    text = "\n".join(lines())
    assert text.count("keys unverified") == len(ZOO) - len(NAMES)


@pytest.mark.parametrize("name", [name for name, entry in ZOO.items() if not entry.verified])
def test_loading_what_is_unverified_warns(name, tmp_path):
    file = tmp_path / "weights.pth"
    torch.save({"some.weight": torch.zeros(1)}, file)
    with pytest.warns(UserWarning, match=f"{name}: keys unverified"), pytest.raises(CheckpointError):
        load_entry(ZOO[name], file, accept_license=True)


def test_loading_what_has_a_manifest_does_not_warn(tmp_path, recwarn):
    file = tmp_path / "weights.pth"
    torch.save({"some.weight": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError):
        load_entry(replace(ZOO["llamagen-b-256"], inside="auto"), file)
    assert not [w for w in recwarn if "unverified" in str(w.message)]
