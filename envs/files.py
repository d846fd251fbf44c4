"""Writing files so that a kill or a full disk leaves either the old file or the new one."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a file that takes the name `path` when the block ends well, and vanishes otherwise."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_atomically(path: Path, content: bytes) -> None:
    """Replace the file at `path` by `content`."""
    with atomic_file(path) as file:
        file.write(content)


def make_folder(path: Path, what: str) -> None:
    """Make a folder, and those above it, and try whether it can be written: before hours of work.

    Raises:
        ValueError: where it cannot, saying what the folder was for.
    """
    with _told_as_folder(path, what):
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()


def require_place(path: Path, what: str) -> None:
    """Raise ValueError where the folder `path` could not be made or written; none is made."""
    above = (p for p in (path, *path.absolute().parents) if p.exists())
    with _told_as_folder(path, what):
        tempfile.TemporaryFile(dir=next(above)).close()


@contextlib.contextmanager
def _told_as_folder(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"expected {what} that can be written; got {path} ({error.strerror or error}). Choose "
            f"another folder, or change who may write in this one."
        ) from error


def require_writable(path: Path, what: str) -> None:
    """Raise ValueError where the file `path` could not be written; nothing is left behind."""
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise ValueError(
            f"expected {what} as a file in a folder that can be written; got {path} "
            f"({error.strerror or error}). Make its folder, or choose another file."
        ) from error


def array_bytes(array: np.ndarray) -> bytes:
    """Return `array` as the bytes of a .npy file."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def write_synced(path: Path, content: bytes) -> str:
    """Write a new file, wait until it is on disk and return its sha256."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(content).hexdigest()


def sync_folder(path: Path) -> None:
    """Wait until the names inside a folder are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_sha256(path: Path, expected: str) -> None:
    """Raise ValueError where the file at `path` is not the one of that checksum."""
    got = "no file"
    if path.exists():
        with path.open("rb") as file:
            got = hashlib.file_digest(file, "sha256").hexdigest()
    if got != expected:
        raise ValueError(
            f"expected sha256 {expected[:12]} for {path}; got {got[:12]}. "
            f"The store is damaged: make it again."
        )


def lock_folder(path: Path, *, wait: bool) -> int:
    """Return a descriptor that holds the lock of a folder until it is closed.

    Raises:
        ValueError: where another holds it and this may not wait.
    """
    import fcntl  # not on Windows, where stores and tables can be read all the same

    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BaseException as error:
        os.close(descriptor)
        if not isinstance(error, BlockingIOError):
            raise
        raise ValueError(
            f"{path} is being written by another process. Wait for it, or choose another folder."
        ) from error
    return descriptor


def stores_below(path: Path) -> list[Path]:
    """Return the store at `path`, or the stores in it, sorted; hidden folders hold unfinished ones.

    Any folder with a manifest counts, and any with a store's files and none, so that a damaged
    store is told of and not passed over.
    """
    if (path / "manifest.json").is_file():
        return [path]
    found = []
    for name, folders, files in os.walk(path):
        if "manifest.json" in files or _lacks_manifest(folders, files):
            found.append(Path(name))
        folders[:] = [f for f in folders if not f.startswith(".") and not _SHARD.fullmatch(f)]
    return sorted(found)


_SHARD = re.compile(r"shard-\d{5,}-\d{6,}")


def holds_store(path: Path) -> bool:
    """Return whether a store's files lie in a folder, whatever its manifest says."""
    names = os.listdir(path)
    return _lacks_manifest(names, names)


def _lacks_manifest(folders: list[str], files: list[str]) -> bool:
    """Return whether these lie in a store's folder; of a mirror the other side decides."""
    if ".remote.json" in files:
        return False
    return any(map(_SHARD.fullmatch, folders)) or {"records.jsonl", "records.ends.npy"} <= {*files}


@contextlib.contextmanager
def manifest_read(path: Path) -> Iterator[None]:
    """Say that a manifest is damaged where what it should hold is not there, or something else."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        lacking = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(
            f"expected what a store holds in {path / 'manifest.json'}; it is damaged ({lacking}). "
            f"Make the store again."
        ) from error


def store_format(path: Path) -> str:
    """Return the format that the manifest of the store at `path` names.

    Raises:
        ValueError: where there is no manifest, or it is damaged.
    """
    return str(_manifest(path, "").get("format"))


def read_manifest(path: Path, kind: str) -> dict[str, Any]:
    """Return the manifest of the store at `path`.

    Raises:
        ValueError: where there is no manifest, it is damaged, or it is of another format.
    """
    manifest = _manifest(path, f"{kind} ")
    found = manifest.get("format")
    if found != kind:
        raise ValueError(f"expected a store of format {kind!r} at {path}; got {found!r}.")
    return manifest


def _manifest(path: Path, kind: str) -> dict[str, Any]:
    file = path / "manifest.json"
    if not file.is_file():
        if path in stores_below(path):
            raise ValueError(
                f"expected manifest.json in {path}; it is missing, and a store's files lie there. "
                f"The store is damaged: make it again, or remove the folder."
            )
        raise ValueError(f"expected a {kind}store at {path}; it has no manifest.json.")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"expected JSON in {file}; {error}. Make the store again.") from error
    return manifest if isinstance(manifest, dict) else {}
