"""Files of published size with random weights, written as the originals write them: load, sample, and save as ours.

    python scripts/full_size.py [zoo name ...]        or: make full-size

Names, shapes and dtypes come from tests/references/manifests, so no original is needed. For each model the peak memory
of loading is measured in a process of its own, over what is in use after imports, against the bytes of the tensors that
stay; the limit is 1.3. Takes minutes and up to 4 GB, hence not part of the test suite.
"""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

MANIFESTS = ROOT / "tests" / "references" / "manifests"
# name -> how its file wraps the weights
MODELS = {
    "llamagen-b-256": "model",
    "var-d16": "flat",
    "rar-b": "flat",
    "xar-b": "flat",
    "mar-b": "ema",
    "titok-l32": "flat",
}
STEPS: dict[str, dict[str, Any]] = {"mar-b": {"steps": 16, "solver_steps": 25}, "xar-b": {"solver_steps": 10}}
LIMIT = 1.3


def _manifest(name: str) -> dict[str, Any]:
    return json.loads(gzip.decompress((MANIFESTS / f"{name}.json.gz").read_bytes()))


def _checked_by_value(name: str, key: str) -> bool:
    """Tables of xAR that the converter compares with ours: left out, since random ones would be refused."""
    return name.startswith("xar") and (key == "mask" or ".rope." in key)


def write(name: str, path: Path) -> None:
    """The file of a zoo entry: seeded normal weights, ones for norms, in the wrappers of the original."""
    import torch
    from safetensors.torch import save_file

    rng, state = torch.Generator().manual_seed(0), {}
    for key, (size, kind) in _manifest(name)["state"].items():
        if _checked_by_value(name, key):
            continue
        dtype = getattr(torch, kind)
        if not dtype.is_floating_point:
            state[key] = torch.zeros(size, dtype=dtype)
        elif key.endswith("weight") and len(size) == 1:
            state[key] = torch.ones(size, dtype=dtype)
        else:
            state[key] = torch.empty(size, dtype=dtype).normal_(0, 0.02, generator=rng)
    path.parent.mkdir(parents=True, exist_ok=True)
    wrapper = MODELS.get(name, "flat")
    if path.suffix == ".safetensors":
        save_file(state, path)
    elif wrapper == "ema":
        torch.save({"model": {}, "model_ema": state, "epoch": 399, "optimizer": {"state": {}}}, path)
    elif wrapper == "model":
        torch.save({"model": {f"module._orig_mod.{k}": v for k, v in state.items()}, "steps": 1}, path)
    else:
        torch.save(state, path)


def memory(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes, from Linux's /proc."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def measure(name: str, folder: Path) -> None:
    """Load one file; print its share of peak memory as JSON."""
    import torch

    from vgen.convert import convert as convert_generator
    from vgen.published import entry_of, load_entry
    from vtok.convert import convert as convert_tokenizer
    from vtok.weight_files import without_weights

    entry = entry_of(name)
    shapes = {k: v for k, (v, _) in _manifest(name)["state"].items() if not _checked_by_value(name, k)}
    with without_weights():  # once without memory, for all that is imported on the way
        made = convert_generator if entry.kind == "generator" else convert_tokenizer
        made(entry.family, {k: torch.empty(size, device="meta") for k, size in shapes.items()}, entry.config)
    torch.cat([torch.ones(2), torch.ones(2)]).float()
    Path("/proc/self/clear_refs").write_text("5")
    before, start = memory("VmRSS"), time.perf_counter()
    module = load_entry(entry, folder).module
    used = sum(t.nbytes for t in [*module.parameters(), *module.buffers()])
    share = (memory("VmHWM") - before) / used
    print(json.dumps({"share": share, "megabytes": used / 2**20, "seconds": time.perf_counter() - start}))


def run(name: str, folder: Path) -> None:
    """Write, load and measure, sample (a generator) or decode and encode (a tokenizer), and round-trip."""
    import torch

    from scripts.convert import convert
    from vgen.guidance import guidance
    from vgen.heads import DrawRule
    from vgen.models import FAMILIES
    from vgen.published import entry_of, load_entry
    from vgen.sampling import PLAIN
    from vtok.checkpoint import load_module

    entry = entry_of(name)
    file = folder / name / entry.file
    write(name, file)
    command = [sys.executable, __file__, "--measure", name, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"{name}: {found['megabytes']:.0f} MiB, peak of loading {found['share']:.2f} times that", flush=True)
    if found["share"] > LIMIT:
        raise SystemExit(f"{name}: more than {LIMIT} times the tensors")
    module, start = load_entry(entry, folder).module, time.perf_counter()
    with torch.inference_mode():
        if entry.kind == "generator":
            drawn = PLAIN | dict(entry.sampling or {}) | STEPS.get(name, {})
            if name.startswith("var"):
                torch.nn.init.normal_(module.quantizer.codebook.weight)
                for phi in module.quantizer.phi:
                    torch.nn.init.zeros_(phi.bias)
                    torch.nn.init.normal_(phi.weight, std=0.02)
            if drawn["steps"]:
                module.set_steps(drawn["steps"])
            guide = guidance(drawn["guidance"], drawn["schedule"], **drawn["schedule_options"])
            rule = DrawRule(drawn["temperature"], drawn["top_k"], drawn["top_p"], (), drawn["solver_steps"])
            tokens = sample(module, guide, rule)
        else:
            tokens = module.encode(torch.zeros(1, 3, module.spec.image_size, module.spec.image_size))
            module.decode(tokens)
    if tokens.is_floating_point() and not tokens.isfinite().all():
        raise SystemExit(f"{name}: the sample is not finite")
    print(f"{name}: {tuple(tokens.shape)} tokens in {time.perf_counter() - start:.0f} s", flush=True)
    out = folder / "ours"
    nothing = {"family": None, "kind": "tokenizer", "config": None, "inside": None, "accept_license": False}
    if entry.kind == "tokenizer":
        convert({"from": f"zoo:{name}", "weights": folder, "out": out, "overwrite": True, **nothing})
    else:
        from vtok.checkpoint import save_folder

        save_folder(module, out)
    again = load_module(out, FAMILIES)
    same = all(torch.equal(a, b) for a, b in zip(module.state_dict().values(), again.state_dict().values()))
    if not same:
        raise SystemExit(f"{name}: the folder does not hold the same weights")
    print(f"{name}: round trip equal", flush=True)


def sample(module: Any, guide: Any, rule: Any) -> Any:
    """Tokens of one image of class 207."""
    import torch

    from vgen.conditioning import Cond
    from vtok.noise import SampleNoise, sample_seeds

    labels = torch.tensor([207])
    streams = [module.conditioner(labels)] + [module.conditioner.null(1)] * (guide.streams - 1)
    noise = SampleNoise(sample_seeds(0, 0, 1))
    return module.restore(module.sampler(module, Cond.cat(streams), noise=noise, guide=guide, rule=rule))


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        measure(sys.argv[2], Path(sys.argv[3]))
        return
    known = sorted(file.name.removesuffix(".json.gz") for file in MANIFESTS.glob("*.json.gz"))
    if unknown := [name for name in sys.argv[1:] if name not in known]:
        raise SystemExit(f"error: no model {unknown[0]} in {MANIFESTS.relative_to(ROOT)}: choose of {', '.join(known)}")
    for name in sys.argv[1:] or MODELS:
        with tempfile.TemporaryDirectory() as folder:
            run(name, Path(folder))


if __name__ == "__main__":
    main()
