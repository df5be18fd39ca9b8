"""The most resident memory that this process has in a stretch of work, which `ru_maxrss`, a peak of its whole life,
does not tell. Linux keeps the peak in /proc/self/status (VmHWM) and starts it anew where 5 is written to
/proc/self/clear_refs (proc(5)).
"""

from __future__ import annotations

import ctypes
import gc
import os
import re
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
SLACK = 2**20  # bytes: between two readings of a peak that was started anew


class Resident:
    """with Resident() as memory: ...; memory.peak: the most bytes of the whole process inside, weights and libraries
    too, or None where the system does not tell. Memory that was freed before is given back first."""

    peak: int | None = None

    def __enter__(self) -> Resident:
        gc.collect()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None  # glibc's
        if trim is not None:
            trim(0)
        try:
            CLEAR.write_text("5")
            self._known = read("VmHWM") <= read("VmRSS") + SLACK  # some sandboxes take the 5 and do nothing
        except OSError:
            self._known = False
        return self

    def __exit__(self, *_: object) -> None:
        self.peak = read("VmHWM") if self._known else None


def read(name: str) -> int:
    """Bytes of a line of /proc/self/status; OSError where there is none."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"{STATUS} has no {name}")
    return int(found[1]) * 1024
