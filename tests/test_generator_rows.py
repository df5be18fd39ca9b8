"""The rows of docs/generators.md: every family has one, its tokens fit, its options exist."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra import compose, initialize_config_dir

from vgen.models import FAMILIES as CLASSES
from vgen.sampling import PLAIN
from vgen.training import build_module
from vtok.config import instantiate
from vtok.models import FAMILIES as TOKENIZERS

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.generator_table import FAMILIES, PAGE, ROWS_AT, SHARED, page, tokenizer_options  # noqa: E402
from scripts.tables import rows  # noqa: E402


def built(name):
    """The generator of a row."""
    row = FAMILIES[name]
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        shown = compose("train", overrides=["data=cifar10", "trainer=cpu", *tokenizer_options(row.tokenizer)])
        config = compose("train", overrides=["data=cifar10", "trainer=cpu", *SHARED, *row.train])
        compose("sample", overrides=["from=run", *row.draw])
    tokenizer = instantiate(shown.tokenizer, _convert_="all")
    data = SimpleNamespace(spec=tokenizer.spec, num_classes=10, tokenizer=tokenizer, class_names=[])
    return build_module(config, data, ()).module


@pytest.mark.parametrize("name", FAMILIES)
def test_a_rows_tokens_fit_and_its_status_is_that_of_its_config(name):
    model = built(name)
    file = next(word for word in FAMILIES[name].train if word.startswith("model=")).partition("=")[2]
    header = (ROOT / "configs" / "model" / f"{file}.yaml").read_text().lower()
    assert ("status: unofficial" in header) == (FAMILIES[name].status == "unofficial")
    for word in FAMILIES[name].draw:
        key, _, value = word.partition("=")
        assert key in PLAIN
        if key == "steps":
            model.set_steps(int(value))


def test_every_family_has_a_row():
    wanted = {path.rpartition(":")[2] for name, path in CLASSES.items() if name not in TOKENIZERS}
    found = set()
    for row in FAMILIES.values():
        file = next(word for word in row.train if word.startswith("model=")).partition("=")[2]
        text = (ROOT / "configs" / "model" / f"{file}.yaml").read_text()
        found.add(text.split("_target_:")[1].split()[0].rpartition(".")[2])
    assert found == wanted


def test_the_page_shows_every_row_with_its_command():
    found, text = rows(ROWS_AT), PAGE.read_text()
    assert found and text == page(found)
    for row in found:
        assert sum(row["command"] in line and f"/{row['family']}.png" in line for line in text.splitlines()) == 1
