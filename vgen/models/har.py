"""HAR, ResTok's hierarchical autoregressive generator: a whole level of 1D tokens a step (arXiv 2601.03955).

Levels double, 1, 1, 2, 4, ..., L / 2. The first `first` tokens are written one by one; then every level at once, read
from the level before and as many learned special tokens, so L = 128 takes 9 steps of 1, 1, 1, 1, 4, 8, 16, 32, 64.
LlamaGen's trunk with rope along the sequence, the class included. The published table has L - 1 special tokens, of
which L / 2 - 1 are read; so has ours.
"""

from __future__ import annotations

from collections.abc import Sequence

from vgen.models.grouped import Grouped, Plan, require_line
from vtok.layout import SequenceLayout
from vtok.tokenizer import TokenSpec


class HAR(Grouped):
    """Published: L 24 x 1024, 16 heads, 128 tokens of 8,192 codes, 326,263,808 parameters.

    first: 4 where None. group and start are not used. spec: a power of two of one-dimensional tokens.
    """

    @classmethod
    def plan(cls, spec: TokenSpec, *, group: int | Sequence[int] | None, first: int | None, start: str) -> Plan:
        if group is not None or start != "hybrid":
            raise ValueError("HAR's levels double: it takes `first`, neither `group` nor `start`")
        length, first = spec.layout.length, 4 if first is None else first
        if not 1 <= first <= length:
            raise ValueError(f"first={first}: one by one, at least 1 and at most all {length} tokens are written")
        sizes = [1] * first
        while sum(sizes) < length:
            sizes.append(sum(sizes))
        if sum(sizes) != length:
            raise ValueError(f"first={first} doubled does not give the {length} tokens of an image: {sizes}")
        return Plan(SequenceLayout(tuple(sizes), spec.layout.coords), specials=length - 1)

    @classmethod
    def accepts(cls, spec: TokenSpec) -> None:
        super().accepts(spec)
        require_line(spec, "HAR")
        length = spec.layout.length
        if length < 4 or length & (length - 1):
            raise ValueError(f"HAR's levels double, so it needs a power of two of tokens, these are {length}")
