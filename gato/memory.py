"""The memory of this process: how much it holds, and giving back what it holds without use."""

from __future__ import annotations

import ctypes
import functools
import math
import time
from collections.abc import Callable
from pathlib import Path


def resident() -> float:
    """Return the MB of memory that this process holds; on other systems than Linux, has held."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


SELDOM = 10.0
"""Seconds between two times that memory is given back, where that is asked for ever again."""
_given = {"at": -math.inf}


def give_back(pause: float = 0.0) -> None:
    """Return freed memory to the system, where the C library can (glibc); takes some 10 ms.

    Batches are of many sizes, and what they leave lies in pieces between what stays: without this
    a run grows by gigabytes over some thousand steps, though it uses no more than at first.

    Args:
        pause: do nothing where this was done less than so many seconds ago.
    """
    trim, now = _trim(), time.monotonic()
    if trim is not None and now - _given["at"] >= pause:
        trim(0)
        _given["at"] = now


@functools.cache
def _trim() -> Callable[[int], int] | None:
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library
        return None
    return found
