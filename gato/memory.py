"""The memory of this process: how much it holds, and giving back what it holds without use."""

from __future__ import annotations

import ctypes
import functools
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


def give_back() -> None:
    """Return freed memory to the system, where the C library can (glibc); takes milliseconds.

    Batches are of many sizes, and what they leave lies in pieces between what stays: without this
    a run grows by gigabytes over some thousand steps, though it uses no more than at first.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@functools.cache
def _trim() -> Callable[[int], int] | None:
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library
        return None
    return found
