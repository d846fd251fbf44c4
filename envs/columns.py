"""Rows of a .npy file, read without mapping it, and what a file of certain rows must look like.

A mapped file costs time and address space for each of many shards, counts as resident memory once
it is read, and ends the process where it is cut short meanwhile; a read costs the same however
many shards there are, and fails with an error that names the file.
"""

from __future__ import annotations

import io
import math
import os
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

_BEGINNING = 128  # bytes in which numpy's header of all but odd arrays fits


def read_rows(
    path: str | Path, dtype: Any, shape: tuple[int, ...], start: int = 0, stop: int | None = None
) -> np.ndarray:
    """Return rows [start, stop) of the array of that dtype and shape in a file, read-only.

    Raises:
        ValueError: where the file is missing or does not hold such an array, naming it.
    """
    dtype, stop = np.dtype(dtype), shape[0] if stop is None else stop
    try:
        with io.FileIO(path) as file:
            offset = _check_header(path, file, dtype, shape)
            out = np.empty((stop - start, *shape[1:]), dtype)
            if out.size:
                row = math.prod(shape[1:]) * dtype.itemsize
                _fill(path, file, offset + start * row, memoryview(out).cast("B"))
    except OSError as error:
        damaged(path, "it is missing" if isinstance(error, FileNotFoundError) else str(error))
    out.flags.writeable = False
    return out


def read_bytes(path: str | Path, start: int, stop: int) -> bytes:
    """Return bytes [start, stop) of a file.

    Raises:
        ValueError: where the file is missing or ends before, naming it.
    """
    content = bytearray(stop - start)
    try:
        with io.FileIO(path) as file:
            _fill(path, file, start, memoryview(content))
    except OSError as error:
        damaged(path, "it is missing" if isinstance(error, FileNotFoundError) else str(error))
    return bytes(content)


def array_in(path: str | Path) -> tuple[np.dtype, tuple[int, ...]]:
    """Return the dtype and shape that a file's header tells.

    Raises:
        ValueError: where the file is missing or begins otherwise, naming it.
    """
    try:
        with io.FileIO(path) as file:
            shape, dtype = _read_header(path, file)[:2]
    except OSError as error:
        damaged(path, "it is missing" if isinstance(error, FileNotFoundError) else str(error))
    return dtype, shape


def check_array(path: Path, dtype: Any, shape: tuple[int, ...]) -> None:
    """Raise ValueError where a file cannot hold such an array: by its header and its size."""
    dtype = np.dtype(dtype)
    try:
        with io.FileIO(path) as file:
            offset = _check_header(path, file, dtype, shape)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        damaged(path, "it is missing" if isinstance(error, FileNotFoundError) else str(error))
    expected = offset + math.prod(shape) * dtype.itemsize
    if size != expected:
        damaged(path, f"it has {size} bytes in place of {expected}")


def damaged(path: str | Path, reason: str) -> NoReturn:
    """Raise the error that a damaged file of a store ends in."""
    raise ValueError(
        f"expected an array in {path}; {reason}. The store is damaged: make it again."
    ) from None


def _check_header(
    path: str | Path, file: io.FileIO, dtype: np.dtype, shape: tuple[int, ...]
) -> int:
    """Return where the rows begin."""
    got_shape, got_dtype, offset = _read_header(path, file)
    if got_shape != shape or got_dtype != dtype:
        damaged(path, f"got {got_dtype} {got_shape} in place of {dtype} {shape}")
    return offset


def _read_header(path: str | Path, file: io.FileIO) -> tuple[tuple[int, ...], np.dtype, int]:
    """Return shape, dtype and where the rows begin."""
    beginning = file.read(_BEGINNING) or b""
    length = int.from_bytes(beginning[8:10], "little") + 10
    if length > _BEGINNING:
        beginning += file.read(length - _BEGINNING) or b""
    found = _header(beginning[:length])
    if found is None:
        damaged(path, "it does not begin as one")
    return *found, length


@lru_cache(maxsize=4096)
def _header(beginning: bytes) -> tuple[tuple[int, ...], np.dtype] | None:
    """Return the shape and dtype that a header tells."""
    file = io.BytesIO(beginning)
    try:
        if np.lib.format.read_magic(file) != (1, 0):
            return None
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    except ValueError:
        return None
    return None if fortran and len(shape) > 1 else (shape, dtype)


def _fill(path: str | Path, file: io.FileIO, offset: int, view: memoryview) -> None:
    file.seek(offset)
    while view:
        got = file.readinto(view)
        if not got:
            damaged(path, f"it ends {len(view)} bytes too early")
        view = view[got:]
