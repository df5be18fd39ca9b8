"""The rules on the code itself: one class for each shared part, no copies between model files."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.families import (  # noqa: E402
    broken,
    classes,
    code_lines,
    configurations,
    copies,
    imported,
    model_files,
    second_classes,
)


def test_shared_parts_are_one_class_and_model_files_hold_no_copies():
    assert broken() == []


def test_attention_has_one_door():
    files = [path for folder in ("vtok", "vgen") for path in (ROOT / folder).rglob("*.py")]
    kernels = ("scaled_dot_product_attention", "flex_attention(", "MultiheadAttention(")
    called = {p.relative_to(ROOT).as_posix() for p in files for line in p.read_text().splitlines()
              if any(kernel in line for kernel in kernels)}  # fmt: skip
    assert called == {"vtok/layers/attention.py"}


def test_a_second_class_is_found_by_the_end_of_its_name():
    known = classes()
    assert second_classes(known) == []
    for name in ("MyEncoder", "_FastDecoder", "VideoTrunk", "SparseBlock", "HingeDiscriminator", "SmallPatchGAN"):
        (found,) = second_classes({**known, name: ["vtok/models/mine.py"]})
        assert found.startswith(f"vtok/models/mine.py {name}: ")
    (found,) = second_classes({**known, "ResidualBlock": [*known["ResidualBlock"], "vgen/models/mine.py"]})
    assert found.startswith("vgen/models/mine.py ResidualBlock: ")
    (found,) = second_classes({name: places for name, places in known.items() if name != "SkipTrunk"})
    assert found == "OTHERS names vgen/models/maskgit.py SkipTrunk, which is not there"
    assert second_classes({**known, "Encoding": ["vtok/models/mine.py"]}) == []


def test_copies_are_found_across_comments_and_docstrings_but_not_below_the_length():
    body = [f"value_{i} = {i}" for i in range(12)]
    plain = "\n".join(body)
    disguised = '"""Another file."""\n\n' + "\n\n    # a comment\n".join(body[:11]) + "\n" + body[11]
    disguised = disguised.replace("\n    #", "\n#")
    assert copies({"a.py": plain, "b.py": disguised}) == [("a.py", 1, "b.py", 3)]
    assert copies({"a.py": plain, "b.py": "\n".join(body[:11])}) == []
    assert copies({"a.py": plain + "\n" + plain}) == []  # a file may repeat itself: a reader sees both


def test_lines_and_imports_are_read_from_the_code():
    text = '"""Header\nof two lines."""\n\nimport torch\nfrom vtok.flow import times\n\n# why\nx = 1\n'
    assert [line for _, line in code_lines(text)] == ["import torch", "from vtok.flow import times", "x = 1"]
    assert imported(text) == ["vtok.flow"]
    assert "vtok/models/cnn.py" in model_files()


def test_families_of_one_network_are_told_by_what_their_configurations_put_in():
    """Every configuration stands under one model file, which holds the class that it builds."""
    found = configurations()
    cnn = found["vtok/models/cnn.py"]
    assert cnn[("vtok.quantize.ibq.IBQ",)] == ["ibq_1024", "ibq_16384", "ibq_262144", "ibq_8192", "ibq_small"]
    assert {"kl16", "kl_small"} == set(cnn[("vtok.quantize.kl.KL",)])
    assert found["vtok/models/flextok.py"][("vtok.quantize.fsq.FSQ",)] == ["flextok_small"]  # the others have a VAE too
    named = [name for parts in found.values() for names in parts.values() for name in names]
    there = [p.stem for group in ("tokenizer", "model") for p in (ROOT / "configs" / group).glob("*.yaml")]
    assert sorted(named) == sorted(there) and set(found) <= set(model_files())
