"""The installed package, outside the clone: what it imports, and the README's Python example."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("lightning", "hydra", "wandb", "timm", "torchvision")


def example() -> str:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[0]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder with the wheel installed, built from a copy of the clone's package files."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "vtok", "vgen"):
        (source / name).symlink_to(ROOT / name)
    subprocess.run([*pip, "wheel", str(source), "--no-deps", "--no-build-isolation", "-w", str(folder)], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(folder / "site"), str(wheel)], check=True)
    return folder / "site"


def run(site: Path, code: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=site, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_readme_example_runs_and_imports_nothing_heavy(site):
    code = (
        example()
        + f"""
import sys, vtok, vgen
print(images.dtype, tuple(images.shape), vtok.__file__)
print([name for name in {HEAVY!r} if name in sys.modules])
"""
    )
    shape, heavy = run(site, code).strip().splitlines()
    assert shape.startswith("torch.uint8 (10, 64, 64, 3)") and str(site) in shape
    assert heavy == "[]"
    assert len([line for line in example().splitlines() if line]) == 6


def test_every_exported_name_is_there(site):
    """Every family and quantizer too, listed by dir() before torch is imported, and with its own docstring."""
    code = """
import sys, vtok, vgen
from vgen.models import FAMILIES
both = [(m, n) for m in (vtok, vgen) for n in m.__all__]
assert all(n in dir(m) for m, n in both) and set(FAMILIES) <= {n for _, n in both} and "torch" not in sys.modules
print([n for m, n in both if getattr(m, n).__name__ != n or (getattr(m, n).__doc__ or n).startswith(n)])
"""
    assert run(site, code).strip() == "[]"
    assert all((site / name / "py.typed").is_file() for name in ("vtok", "vgen"))


def test_digits_travel_with_the_package(site):
    assert (site / "vtok" / "data" / "digits.npz").is_file() and (site / "vtok" / "data" / "DIGITS.md").is_file()
    assert not (site / "eval").exists() and not (site / "tests").exists()
