"""The formats by name: which module reads or writes each, and which of them a location is in."""

from __future__ import annotations

import difflib
import importlib
import itertools
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from gato.envs.files import lock_folder
from gato.envs.readers.reader import ReadOptions, Source
from gato.envs.registry import folder_of
from gato.envs.remote import fetch, is_remote
from gato.envs.store import EpisodeStore

READERS: dict[str, str] = {
    "lerobot": "gato.envs.readers.lerobot",
    "minari": "gato.envs.readers.minari",
    "jat": "gato.envs.readers.jat",
    "webdataset": "gato.envs.readers.webdataset",
    "coco": "gato.envs.readers.coco",
    "vqa": "gato.envs.readers.vqa",
    "chat": "gato.envs.readers.chat",
    "hub": "gato.envs.readers.hub",
    "text": "gato.envs.readers.text",  # stays last: many a folder of other data has a README
}
"""Module by format. They are asked in this order whether they recognise a location: what knows its
own data by a file that no other format has comes before what looks at the ends of names."""

WRITERS: dict[str, str] = {
    "minari": "gato.envs.readers.minari_writer",
    "lerobot": "gato.envs.readers.lerobot_writer",
}
"""A writer is a module with FORMAT, EXTRA and ``export(store, out: Path, progress)``, which writes
the episodes of one store as one data set into the new folder `out`."""

Progress = Callable[[int, int | None], None]
"""Called with the items done and, where it is known, of how many."""


def open_source(
    location: str | Path, format: str = "auto", options: ReadOptions | None = None
) -> Source:
    """Return what lies at a location, in whatever format, ready to be read.

    Args:
        location: a path, or what else the format takes: a name on a hub, an address.
        format: one of `READERS`, or ``auto`` for the first that recognises the location.
        options: what the user asks of the reader.

    Raises:
        ValueError: for an unknown format, a location that no reader recognises, a package that is
            not installed, or data that cannot be mapped.
    """
    location, options = str(location), options or ReadOptions()
    if options.limit < 0:
        raise ValueError(f"expected a limit of items, 0 for all; got {options.limit}.")
    name, place = _read_at(location, format)
    reader = _module(READERS, name)
    _check_options(reader, options)
    try:
        source: Source = reader.open_source(place, options)
    except ImportError as error:
        raise _missing(reader, location, error) from error
    return replace(
        source,
        location=location,
        options=options,
        read=lambda: _read(reader, source, options.limit),
    )


def _check_options(reader: ModuleType, options: ReadOptions) -> None:
    """Raise ValueError for an option that a reader would ignore: all would be read as by default.

    A run on ``--split test`` of data without splits would train on everything.
    """
    for name in getattr(reader, "IGNORES", ()):
        given, usual = getattr(options, name), getattr(ReadOptions(), name)
        if given != usual:
            hint = " Its data come in no splits: name those to read." if name == "split" else ""
            raise ValueError(
                f"--{name.replace('_', '-')} means nothing to format {reader.FORMAT!r}; got "
                f"{given!r:.200}. Leave it out.{hint}"
            )


def _read_at(location: str, format: str) -> tuple[str, str]:
    """Return the format of a location and where it is read: an address is fetched first.

    A reader with ADDRESSES fetches what it needs itself.
    """
    if not is_remote(location):
        return recognise(location) if format == "auto" else format, location
    name = recognised(location) if format == "auto" else format
    if name is None or not getattr(_module(READERS, name), "ADDRESSES", False):
        location = str(fetch(location))
    return name or recognise(location), location


def recognised(location: str) -> str | None:
    """Return the name of the first format that a location looks like, if any."""
    return next((n for n in READERS if _module(READERS, n).recognises(location)), None)


def recognise(location: str) -> str:
    """Return the name of the first format that a location looks like.

    Raises:
        ValueError: where it looks like none.
    """
    name = recognised(location)
    if name is not None:
        return name
    where = Path(location)
    missing = "" if "://" in location or where.exists() else "; there is no such file or folder"
    raise ValueError(
        f"expected a store, or data of a format of {', '.join(READERS)}, at {location}{missing}. "
        f"If it is one of these, name it: --format."
    )


def place(location: str, format: str) -> str:
    """Return where on this machine the data lie that a location names; itself where it is a path.

    A reader with locations that are no paths may say so in a function ``place(location)``.
    """
    find = getattr(_module(READERS, format), "place", None) if format != "auto" else None
    return str((find and find(location)) or location)


def has_files_beside(format: str) -> bool:
    """Return whether a single file of this format may name others, that lie beside it."""
    return format != "auto" and bool(getattr(_module(READERS, format), "BESIDE", False))


def export(
    stores: Sequence[EpisodeStore],
    format: str,
    out: Path,
    progress: Progress | None = None,
    **options: Any,
) -> list[Path]:
    """Write stores as data sets of another format, and return their folders.

    One store becomes `out`; several become ``out/<suite>/<name>`` each, in the folder's own order.
    A data set appears under its name only when it is complete. Options are those of the writer.

    Raises:
        ValueError: for an unknown format, a package that is not installed, a folder that is there
            already, or a store that the format cannot hold.
    """
    writer = _module(WRITERS, format)
    names = [folder_of(s.spec.id) for s in stores]
    folders = [out] if len(stores) == 1 else [out / name for name in names]
    for folder, store in zip(folders, stores, strict=True):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"expected a new folder for {store.path}; {folder} is there already.")
    if len(set(folders)) < len(folders):
        twice = next(n for n in names if names.count(n) > 1)
        raise ValueError(f"expected one store of a task; got several of {twice}. Export each.")
    for folder, store in zip(folders, stores, strict=True):
        temporary = folder.with_name(f".{folder.name}.exporting")
        temporary.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(temporary, wait=False)
        try:
            empty(temporary)  # what a killed export has left
            writer.export(store, temporary / "data", progress, **options)
            (temporary / "data").replace(folder)
        except ImportError as error:
            raise _missing(writer, str(store.path), error) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            os.close(lock)
    return folders


def empty(folder: Path) -> None:
    """Remove everything inside a folder."""
    for inside in folder.iterdir():
        if inside.is_dir() and not inside.is_symlink():
            shutil.rmtree(inside)
        else:
            inside.unlink()


def _read(reader: ModuleType, source: Source, limit: int) -> Iterator[Any]:
    try:
        yield from itertools.islice(source.read(), limit or None)
    except ImportError as error:
        raise _missing(reader, source.location, error) from error


def _module(table: dict[str, str], name: str) -> ModuleType:
    if name not in table:
        close = difflib.get_close_matches(name, table, n=1, cutoff=0.4)
        hint = f" (closest: {close[0]})" if close else ""
        raise ValueError(f"expected a format of {', '.join(table)}; got {name!r}{hint}.")
    return importlib.import_module(table[name])


def _missing(module: ModuleType, location: str, error: ImportError) -> ValueError:
    extra = f' Install it: pip install "gato[{module.EXTRA}]"' if module.EXTRA else ""
    return ValueError(
        f"{location}: format {module.FORMAT!r} needs a package that does not import "
        f"({error}).{extra}"
    )
