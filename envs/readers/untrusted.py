"""Files, paths and text from data that nobody has checked.

Reasons name no item, so that an import can count what it leaves out by reason; where an item
stands is told beside it.
"""

from __future__ import annotations

import codecs
import gzip
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from gato.envs.readers.reader import MAX_NUMBERS, BadItem, ReadOptions

READ_ERRORS = (OSError, EOFError, zlib.error)
"""What reading a file, compressed or not, may raise."""
_LOOKED_AT = 2000  # entries of a folder, to tell what it holds


def plain_suffix(path: Path) -> str:
    """Return how a file's name ends, ``.gz`` left out: ``.jsonl`` of ``a.JSONL.gz``."""
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def files(location: str | Path, suffixes: Iterable[str], *, glance: bool = False) -> list[Path]:
    """Return the files with one of these suffixes: of a folder and all below it, or the one named.

    Hidden files and folders are passed over; ``.gz`` may follow a suffix.

    Args:
        location: a folder or a file.
        suffixes: in lower case.
        glance: look at some of a large folder only.
    """
    path, endings = Path(location), tuple(suffixes)
    if not path.is_dir():
        return [path] if path.is_file() and plain_suffix(path) in endings else []
    found: list[Path] = []
    seen = 0
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        inside = [Path(folder, n) for n in names if not n.startswith(".")]
        found += [p for p in inside if plain_suffix(p) in endings]
        seen += len(names) + len(folders)
        if glance and seen > _LOOKED_AT:
            break
    return sorted(found)


def size_of(paths: Iterable[Path]) -> int:
    """Return the bytes of files; of those that are missing none."""
    return sum(p.stat().st_size for p in paths if p.is_file())


def below(folder: Path, name: Any, field: str = "the picture's path") -> Path:
    """Return the file `name` of a folder, links followed.

    A folder of Hugging Face's cache holds links to the data set's own blobs; these may be followed.

    Raises:
        ValueError: where that lies outside the folder, or no file is there; it names the field.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"expected a file's name as {field}; got {type(name).__name__}")
    try:
        root = folder.resolve()
        path = (root / name).resolve()
        roots = [root, *(d / "blobs" for d in root.parents if _is_cached(d, root))]
        inside, there = any(path.is_relative_to(r) for r in roots), path.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL inside, a loop of links
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{field} can be no file's: {reason}") from error
    if not inside:
        raise ValueError(
            f"{field} leads out of the data's folder. If it is a link, copy the data with what "
            f"it leads to: cp -rL"
        )
    if not there:
        raise ValueError(f"{field} names no file")
    return path


def _is_cached(above: Path, folder: Path) -> bool:
    """Return whether a folder is a snapshot, or in one, of the data set that `above` caches."""
    return above.name.startswith("datasets--") and folder.is_relative_to(above / "snapshots")


def open_bytes(path: Path) -> BinaryIO:
    """Return a file to read from, unpacked where it is called ``.gz``.

    Raises:
        OSError: also where it is no plain file; reading a pipe would wait for ever.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}")
    if path.suffix.lower() == ".gz":
        return gzip.open(path)  # type: ignore[return-value]
    return path.open("rb")


def decoded(raw: bytes) -> str:
    """Return UTF-8 as text, a byte order mark left out; raises ValueError for anything else."""
    refuse_utf_16(raw)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"expected UTF-8; {error.reason}") from error


def refuse_utf_16(beginning: bytes) -> None:
    """Raise ValueError where a text begins as UTF-16 does."""
    if beginning.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError("expected UTF-8; got UTF-16. Convert it, for example with iconv")


def checked_text(value: Any, field: str) -> str:
    """Return `value` if it is text with words in it that can be written as UTF-8.

    Raises:
        ValueError: naming the field.
    """
    if not isinstance(value, str):
        raise ValueError(f"expected text as {field!r}; got {type(value).__name__}")
    if not value.strip():
        raise ValueError(f"expected text as {field!r}; got none")
    if "\0" in value:
        raise ValueError(f"expected text as {field!r}; got binary data")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"expected Unicode as {field!r}; {error.reason}") from error
    return value


def checked_fields(value: Any, *names: str) -> Mapping[str, Any]:
    """Return `value` if it is an object with these fields; raises ValueError otherwise."""
    if not isinstance(value, dict):
        raise ValueError(f"expected an object; got {type(value).__name__}")
    for name in names:
        if name not in value:
            raise ValueError(f"expected a field {name!r}; got {', '.join(map(str, value))[:200]}")
    return value


def check_spaces(told: Any, where: str) -> None:
    """Check spaces as JSON tells of them, before they are made: a few bytes may ask for gigabytes.

    Raises:
        ValueError: for spaces of more than `MAX_NUMBERS` numbers together.
    """
    numbers, waiting = 0, [told]
    while waiting:
        inside = waiting.pop()
        if isinstance(inside, dict):
            sizes = inside.get("shape", inside.get("n"))
            sizes = sizes if isinstance(sizes, list) else [sizes]
            if inside.get("type") != "Discrete" and all(isinstance(n, int) for n in sizes):
                numbers += abs(math.prod(sizes))
            waiting += inside.values()
        elif isinstance(inside, list) and inside and not isinstance(inside[0], int | float):
            waiting += inside
    if numbers > MAX_NUMBERS:
        raise ValueError(
            f"expected spaces of at most {MAX_NUMBERS:,} numbers in {where}; got {numbers:,}."
        )


def check_options(options: ReadOptions, format: str, columns: Iterable[str], splits: bool) -> None:
    """Raise ValueError for options that a format of records cannot follow."""
    columns = tuple(columns)
    unknown = sorted(set(options.columns) - set(columns))
    if unknown:
        known = f"of {', '.join(columns)}" if columns else "of none"
        raise ValueError(f"expected columns {known} for {format}; got {unknown[0]!r}.")
    if not splits and options.split != "train":
        raise ValueError(
            f"{format} data come in no splits; got split {options.split!r}. Name the files of it."
        )
    for name in ("task", "instruction"):
        if getattr(options, name):
            raise ValueError(f"{name} is of episodes; {format} data hold none. Leave it out.")


def each(
    items: Iterable[tuple[str, Any]], make: Callable[[Any], Iterable[Mapping[str, Any]]]
) -> Iterator[Mapping[str, Any] | BadItem]:
    """Yield the records that `make` makes of values, and a BadItem where it raises ValueError."""
    for where, value in items:
        if isinstance(value, BadItem):
            yield value
            continue
        try:
            yield from make(value)
        except ValueError as error:
            yield BadItem(where, str(error))
