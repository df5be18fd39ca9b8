"""Manifests of published checkpoints, written from the originals' classes, convert with no key left over."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from vgen.published import entry_of
from vgen.zoo import ZOO
from vtok.weight_files import without_weights

FOLDER = Path(__file__).parent / "references" / "manifests"
FILES = sorted(FOLDER.glob("*.json.gz"))
BUFFERS = ("mask", "freqs", "freqs_cos", "freqs_sin")  # checked by their values, which a manifest does not have


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name.removesuffix(".json.gz"))
def test_no_key_is_left_over_and_the_count_is_as_published(file):
    manifest = json.loads(gzip.decompress(file.read_bytes()))
    entry = entry_of(manifest["name"])
    kinds = {k: getattr(torch, kind) for k, (_, kind) in manifest["state"].items()}
    state = {k: torch.empty(size, dtype=kinds[k], device="meta") for k, (size, _) in manifest["state"].items()}
    if entry.family == "xar":
        state = {k: v for k, v in state.items() if k.rsplit(".", 1)[-1] not in BUFFERS}
    if entry.kind == "generator":
        from vgen.convert import convert
    else:
        from vtok.convert import convert
    with without_weights():
        module = convert(entry.family, state, entry.config)
    assert all(p.is_meta for p in module.parameters() if p.requires_grad)
    if entry.parameters is not None:
        assert manifest["parameters"] == entry.parameters, f"the original has {manifest['parameters']:,}"


def test_there_is_a_manifest_of_every_family_whose_class_is_public():
    if not FILES:
        pytest.skip("no manifests here")
    have = {ZOO[file.name.removesuffix(".json.gz")].family for file in FILES}
    # FlexTok's modules are named in files beside its weights, FlowAR's code and iFSQ's weights are not published
    assert {entry.family for entry in ZOO.values()} - have <= {"flextok", "flowar", "ifsq", "detailflow"}
