"""Layer by layer against an original's code: the first layer whose output differs is named.

    python -m eval.parity family=llamagen peer=<checkout of the original> [tolerance=1e-4] [size=tiny]

The original is imported from the user's checkout, gets random weights, and is converted; both then run on the same
inputs (eval/peers.py), with a hook on every layer that the table below pairs. Calls of a layer are compared with those
of its partner. The layer whose call was the first to differ is named: later ones, and all that a sampler then draws,
follow from it. What has no layer of its own on our side (a table that is added, an embedding that is indexed) shows in
the next layer.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

CALLS = 64  # of every layer that are looked at


def second_stack(match: re.Match[str], theirs: nn.Module) -> str:
    """xAR's second stack follows the first in our one trunk."""
    return f"trunk.blocks.{len(theirs.encoder_blocks) + int(match[1])}"


def second_part(name: str) -> Callable[[re.Match[str], nn.Module], str]:
    return lambda match, theirs: f"{second_stack(match, theirs)}.{name}"


Target = str | Callable[[re.Match[str], nn.Module], str]
# original's module (a regular expression for its whole name) -> ours, a module or a method of one
LAYERS: dict[str, list[tuple[str, Target]]] = {
    "llamagen": [
        (r"cls_embedding\.embedding_table", "conditioner.table"),
        (r"tok_embeddings", "tokens"),
        (r"layers\.(\d+)\.attention_norm", r"trunk.blocks.\1.norm1"),
        (r"layers\.(\d+)\.ffn_norm", r"trunk.blocks.\1.norm2"),
        (r"layers\.(\d+)\.attention", r"trunk.blocks.\1.attention"),
        (r"layers\.(\d+)\.feed_forward", r"trunk.blocks.\1.ffn"),
        (r"layers\.(\d+)", r"trunk.blocks.\1"),
        (r"norm", "trunk.norm"),
        (r"output", "head.logits"),
    ],
    "var": [
        (r"class_emb", "conditioner.table"),
        (r"blocks\.(\d+)\.ada_lin", r"trunk.blocks.\1.modulation"),
        (r"blocks\.(\d+)\.attn", r"trunk.blocks.\1.attention"),
        (r"blocks\.(\d+)\.ffn", r"trunk.blocks.\1.ffn"),
        (r"blocks\.(\d+)", r"trunk.blocks.\1"),
        (r"head_nm\.ada_lin", "trunk.final"),
        (r"head_nm", "trunk"),
        (r"head", "head.logits"),
    ],
    "rar": [
        (r"blocks\.(\d+)\.norm([12])", r"trunk.blocks.\1.norm\2"),
        (r"blocks\.(\d+)\.attn", r"trunk.blocks.\1.attention"),
        (r"blocks\.(\d+)\.mlp", r"trunk.blocks.\1.ffn"),
        (r"blocks\.(\d+)", r"trunk.blocks.\1"),
        (r"lm_head", "head.logits"),
    ],
    "xar": [
        (r"time_embed", "time"),
        (r"z_proj", "stacks.project"),
        (r"z_proj_ln", "stacks.enter_norm"),
        (r"encoder_blocks\.(\d+)\.ada_lin", r"trunk.blocks.\1.modulation"),
        (r"encoder_blocks\.(\d+)\.norm([12])", r"trunk.blocks.\1.norm\2"),
        (r"encoder_blocks\.(\d+)\.attn", r"trunk.blocks.\1.attention"),
        (r"encoder_blocks\.(\d+)\.mlp", r"trunk.blocks.\1.ffn"),
        (r"encoder_blocks\.(\d+)", r"trunk.blocks.\1"),
        (r"encoder_norm", "stacks.middle_norm"),
        (r"decoder_embed", "stacks.middle"),
        (r"decoder_blocks\.(\d+)\.ada_lin", second_part("modulation")),
        (r"decoder_blocks\.(\d+)\.norm1", second_part("norm1")),
        (r"decoder_blocks\.(\d+)\.norm2", second_part("norm2")),
        (r"decoder_blocks\.(\d+)\.attn", second_part("attention")),
        (r"decoder_blocks\.(\d+)\.mlp", second_part("ffn")),
        (r"decoder_blocks\.(\d+)", second_stack),
        (r"decoder_norm", "trunk.norm"),
        (r"pred", "head"),
    ],
    "mar": [
        (r"class_emb", "conditioner.table"),
        (r"(encoder|decoder)_blocks\.(\d+)\.norm([12])", r"trunk.\1.blocks.\2.norm\3"),
        (r"(encoder|decoder)_blocks\.(\d+)\.attn", r"trunk.\1.blocks.\2.attention"),
        (r"(encoder|decoder)_blocks\.(\d+)\.mlp", r"trunk.\1.blocks.\2.ffn"),
        (r"(encoder|decoder)_blocks\.(\d+)", r"trunk.\1.blocks.\2"),
        (r"(encoder|decoder)_norm", r"trunk.\1.norm"),
        (r"decoder_embed", "decoder_embedding"),
        (r"diffloss\.net\.input_proj", "head.mlp.input"),
        (r"diffloss\.net\.time_embed", "head.mlp.time"),
        (r"diffloss\.net\.cond_embed", "head.mlp.condition"),
        (r"diffloss\.net\.res_blocks\.(\d+)\.adaLN_modulation", r"head.mlp.blocks.\1.modulation"),
        (r"diffloss\.net\.res_blocks\.(\d+)\.in_ln", r"head.mlp.blocks.\1.norm"),
        (r"diffloss\.net\.res_blocks\.(\d+)\.mlp\.0", r"head.mlp.blocks.\1.up"),
        (r"diffloss\.net\.res_blocks\.(\d+)\.mlp\.2", r"head.mlp.blocks.\1.down"),
        (r"diffloss\.net\.res_blocks\.(\d+)", r"head.mlp.blocks.\1"),
        (r"diffloss\.net\.final_layer\.adaLN_modulation", "head.mlp.modulation"),
        (r"diffloss\.net\.final_layer\.norm_final", "head.mlp.norm"),
        (r"diffloss\.net\.final_layer\.linear", "head.mlp.output"),
    ],
}


@dataclass(frozen=True)
class Row:
    """One layer's comparison. errors: of every call, (when it ended, largest difference over largest value); shapes:
    where they differ."""

    theirs: str
    ours: str
    errors: tuple[tuple[float, float], ...]
    shapes: str = ""
    began: float = math.inf

    @property
    def calls(self) -> int:
        return len(self.errors)

    @property
    def error(self) -> float:
        return max((error for _, error in self.errors), default=0.0)

    def fails(self, tolerance: float) -> float:
        """When the first call ended that is not within the tolerance (infinity: a result of all calls), -1 for none."""
        if self.shapes:
            return self.began
        return min((moment for moment, error in self.errors if not error <= tolerance), default=-1.0)


class Recorder:
    """Outputs of chosen modules or methods, call by call: (moment, float32 copy); `order` is that of first calls."""

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        self.outputs: dict[str, list[tuple[int, Tensor]]] = {name: [] for name in names}
        self.order: list[str] = []
        self.moment, self.undo = 0, []
        found = dict(module.named_modules())
        for name in names:
            if name in found:
                hook = lambda m, i, output, name=name: self.keep(name, output)  # noqa: E731
                self.undo.append(found[name].register_forward_hook(hook).remove)
            else:
                self.wrap(found[name.rpartition(".")[0]], name)

    def wrap(self, owner: nn.Module, name: str) -> None:
        method = name.rpartition(".")[2]
        run = getattr(owner, method)

        def recorded(*arguments: Any, **options: Any) -> Any:
            output = run(*arguments, **options)
            self.keep(name, output)
            return output

        setattr(owner, method, recorded)
        self.undo.append(lambda: delattr(owner, method))

    def keep(self, name: str, output: Any) -> None:
        tensor = output[0] if isinstance(output, (tuple, list)) else output
        self.moment += 1
        if not self.outputs[name]:
            self.order.append(name)
        if len(self.outputs[name]) < CALLS:
            self.outputs[name].append((self.moment, tensor.detach().float().clone()))

    def remove(self) -> None:
        for undo in self.undo:
            undo()


def partners(theirs: nn.Module, ours: nn.Module, table: Sequence[tuple[str, Target]]) -> dict[str, str]:
    """{original's module name: ours} of all modules that the table names on both sides."""
    known, found = dict(ours.named_modules()), {}
    for name, _ in theirs.named_modules():
        for pattern, target in table:
            match = re.fullmatch(pattern, name)
            if match is None:
                continue
            partner = match.expand(target) if isinstance(target, str) else target(match, theirs)
            owner, _, method = partner.rpartition(".")
            if partner in known or callable(getattr(known.get(owner), method, None)):
                found[name] = partner
            break
    return found


def difference(want: Tensor, got: Tensor) -> float:
    """Largest difference over largest value; the same number of values in another shape."""
    scale = float(want.abs().max()) or 1.0
    error = float((want.flatten() - got.flatten()).abs().max()) / scale
    return math.inf if math.isnan(error) else error


def compare(theirs: Recorder, ours: Recorder, pairs: dict[str, str]) -> list[Row]:
    """Rows in the order in which the original's layers first ran.

    The two sides may sample and score in another order, or one makes two passes of what is one for the other: a call is
    compared with that of the same size that is nearest to it.
    """
    rows = []
    for name in theirs.order:
        calls, left = theirs.outputs[name], [got for _, got in ours.outputs[pairs[name]]]
        errors = []
        for moment, want in calls:
            found = [(difference(want, got), i) for i, got in enumerate(left) if got.numel() == want.numel()]
            if found:
                error, at = min(found)
                errors.append((moment, error))
                del left[at]
        shapes = ""
        if not errors:
            shapes = f"{[tuple(t.shape) for _, t in calls[:2]]} against {[tuple(t.shape) for t in left[:2]]}"
        rows.append(Row(name, pairs[name], tuple(errors), shapes, calls[0][0]))
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
        rows.append(Row(name, "(result)", ((math.inf, difference(want, got)),)))
    return rows


def first_difference(rows: Sequence[Row], tolerance: float) -> Row | None:
    """The row whose call was the first that is not within the tolerance."""
    wrong = [row for row in rows if row.fails(tolerance) >= 0]
    return min(wrong, key=lambda row: row.fails(tolerance), default=None)


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
