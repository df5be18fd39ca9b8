"""Layer by layer against an original's code: the first layer whose output differs is named.

    python -m eval.parity family=llamagen peer=<checkout of the original> [tolerance=1e-4] [size=tiny]

The original is imported from the user's checkout, gets random weights, and is converted; both then run on the same
inputs (eval/peers.py), with a hook on every layer that the table below pairs. Calls of a layer are compared with those
of its partner, layers in the order in which they first ran: the first line that fails is where to look.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

CALLS = 64  # of every layer that are looked at
# original's module (a regular expression for its whole name) -> ours
LAYERS: dict[str, list[tuple[str, str]]] = {
    "llamagen": [
        (r"layers\.(\d+)\.attention_norm", r"trunk.blocks.\1.norm1"),
        (r"layers\.(\d+)\.ffn_norm", r"trunk.blocks.\1.norm2"),
        (r"layers\.(\d+)\.attention", r"trunk.blocks.\1.attention"),
        (r"layers\.(\d+)\.feed_forward", r"trunk.blocks.\1.ffn"),
        (r"layers\.(\d+)", r"trunk.blocks.\1"),
        (r"norm", "trunk.norm"),
    ],
    "var": [
        (r"blocks\.(\d+)\.attn", r"trunk.blocks.\1.attention"),
        (r"blocks\.(\d+)\.ffn", r"trunk.blocks.\1.ffn"),
        (r"blocks\.(\d+)", r"trunk.blocks.\1"),
    ],
    "rar": [
        (r"blocks\.(\d+)\.norm1", r"trunk.blocks.\1.norm1"),
        (r"blocks\.(\d+)\.attn", r"trunk.blocks.\1.attention"),
        (r"blocks\.(\d+)\.mlp", r"trunk.blocks.\1.ffn"),
        (r"blocks\.(\d+)", r"trunk.blocks.\1"),
    ],
    "xar": [
        (r"z_proj", "stacks.project"),
        (r"encoder_blocks\.(\d+)\.mlp", r"trunk.blocks.\1.ffn"),
        (r"encoder_blocks\.(\d+)", r"trunk.blocks.\1"),
        (r"decoder_embed", "stacks.middle"),
        (r"decoder_norm", "trunk.norm"),
    ],
    "mar": [
        (r"(encoder|decoder)_blocks\.(\d+)\.attn", r"trunk.\1.blocks.\2.attention"),
        (r"(encoder|decoder)_blocks\.(\d+)\.mlp", r"trunk.\1.blocks.\2.ffn"),
        (r"(encoder|decoder)_blocks\.(\d+)", r"trunk.\1.blocks.\2"),
        (r"(encoder|decoder)_norm", r"trunk.\1.norm"),
    ],
}


@dataclass(frozen=True)
class Row:
    """One layer's comparison. error: largest difference over largest value of all calls; shapes: where they differ."""

    theirs: str
    ours: str
    calls: int
    error: float
    shapes: str = ""


class Recorder:
    """Outputs of chosen modules, call by call, as float32 copies; `order` is that of their first calls."""

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        self.outputs: dict[str, list[Tensor]] = {name: [] for name in names}
        self.order: list[str] = []
        found = dict(module.named_modules())
        self.handles = [found[name].register_forward_hook(self._hook(name)) for name in names if name in found]

    def _hook(self, name: str) -> Any:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, (tuple, list)) else output
            if not self.outputs[name]:
                self.order.append(name)
            if len(self.outputs[name]) < CALLS:
                self.outputs[name].append(tensor.detach().float().clone())

        return keep

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def partners(theirs: nn.Module, ours: nn.Module, table: Sequence[tuple[str, str]]) -> dict[str, str]:
    """{original's module name: ours} of all modules that the table names on both sides."""
    known, found = dict(ours.named_modules()), {}
    for name, _ in theirs.named_modules():
        for pattern, target in table:
            match = re.fullmatch(pattern, name)
            if match and match.expand(target) in known:
                found[name] = match.expand(target)
                break
    return found


def compare(theirs: Recorder, ours: Recorder, pairs: dict[str, str]) -> list[Row]:
    """Rows in the order in which the original's layers first ran."""
    rows = []
    for name in theirs.order:
        a, left = theirs.outputs[name], list(ours.outputs[pairs[name]])
        count, worst = 0, 0.0
        for want in a:  # the two sides may sample and score in another order: sizes tell which calls belong together
            at = next((i for i, got in enumerate(left) if got.numel() == want.numel()), None)
            if at is not None:
                got, count, scale = left.pop(at), count + 1, float(want.abs().max()) or 1.0
                worst = max(worst, float((want.flatten() - got.flatten()).abs().max()) / scale)
        shapes = "" if count else f"{[tuple(t.shape) for t in a[:2]]} against {[tuple(t.shape) for t in left[:2]]}"
        rows.append(Row(name, pairs[name], count, worst, shapes))
    return rows


def parity(family: str, peer: str | None, *, tolerance: float = 1e-4, size: str = "tiny") -> list[Row]:
    """Both sides on the same inputs; rows of all layers. ValueError where the checkout is not there."""
    import eval.peers as peers

    if family not in LAYERS:
        raise ValueError(f"family={family}: choose {', '.join(LAYERS)}")
    built: list[nn.Module] = []
    fill = peers.fill

    def remember(module: nn.Module, *arguments: Any) -> nn.Module:
        built.append(fill(module, *arguments))
        return built[-1]

    with peers.replaced(peers, "fill", remember):
        pair = peers.pair(family, peer, peers.Options(size, 2, None))
    original = built[-1]  # VAR fills its tokenizer first
    pairs = partners(original, pair.ours, LAYERS[family])
    left, right = Recorder(original, list(pairs)), Recorder(pair.ours, list(pairs.values()))
    try:
        results = pair.same()
    finally:
        left.remove()
        right.remove()
    rows = compare(left, right, pairs)
    for name, want, got in results:
        want, got = want.double(), got.double()
        scale = float(want.abs().max()) or 1.0
        rows.append(Row(name, "(result)", 1, float((want - got).abs().max()) / scale))
    return rows


def first_difference(rows: Sequence[Row], tolerance: float) -> Row | None:
    return next((row for row in rows if row.shapes or not row.error <= tolerance), None)


def main(arguments: Sequence[str]) -> int:
    given = dict(part.partition("=")[::2] for part in arguments)
    unknown = set(given) - {"family", "peer", "tolerance", "size"}
    if unknown or "family" not in given:
        print(f"error: {'unknown ' + ', '.join(sorted(unknown)) if unknown else 'family= is missing'}\n{__doc__}")
        return 2
    tolerance = float(given.get("tolerance", 1e-4))
    try:
        rows = parity(given["family"], given.get("peer"), tolerance=tolerance, size=given.get("size", "tiny"))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for row in rows:
        print(f"{row.error:9.2e}  {row.calls:2} calls  {row.theirs}  {row.ours}  {row.shapes}".rstrip())
    wrong = first_difference(rows, tolerance)
    if wrong is None:
        print(f"all {len(rows)} agree within {tolerance:g}")
        return 0
    print(f"first difference: {wrong.theirs} ({wrong.ours}), {wrong.shapes or f'{wrong.error:.2e} > {tolerance:g}'}")
    return 1


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(main(sys.argv[1:]))
