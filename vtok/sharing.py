"""What may leave the machine: records without the places of files, which tell user names and how a cluster is built."""

from __future__ import annotations

import re
from typing import Any

# an absolute path at the start of a value or behind = , ( [ { a blank or a quote
_PLACE = re.compile(r"""(^|[=\s\[({,'"])((?:~|[A-Za-z]:)?[\\/][^\s,\])}'"]+)""")


def without_places(value: Any) -> Any:
    """Plain data with every absolute path in its strings cut to the last part; relative paths stay."""
    if isinstance(value, dict):
        return {k: without_places(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_places(v) for v in value]
    if isinstance(value, str):
        return _PLACE.sub(lambda m: m[1] + re.split(r"[\\/]", m[2].rstrip("\\/"))[-1], value)
    return value
