"""How an import's stores take their places: whole or not at all.

They are made in a hidden folder beside their destination and take its name at the end. Where they
replace older ones store by store, what is still to be done is on disk, and the next import to that
place, of whatever kind, does it first.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gato.envs.files import lock_folder, stores_below, write_atomically
from gato.envs.readers import formats

ORIGIN = "import.json"
"""In every store: where it comes from, and what was left out."""
MADE, PLAN = "stores", "plan.json"
"""In the hidden folder: the new stores, and how they take their places."""


@contextlib.contextmanager
def staged(out: Path, *, wait: bool) -> Iterator[Path]:
    """Yield an empty folder beside `out` that nobody else writes to; it vanishes at the end.

    Where an import was killed while its stores took their places, they do so first.
    """
    folder = out.with_name(f".{out.name}.importing")
    lock = _lock(folder, wait)
    try:
        _finish(folder, out)
        formats.empty(folder)  # what a killed import has left
        yield folder
    finally:
        try:
            _finish(folder, out)  # an interrupt may come at any time
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)


def _lock(folder: Path, wait: bool) -> int:
    """Return a lock of a folder that is made for it, and that its last holder may be removing."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            lock = lock_folder(folder, wait=wait)
            try:
                if os.fstat(lock).st_ino == folder.stat().st_ino:
                    return lock
            except FileNotFoundError:
                pass
            os.close(lock)


def publish(
    folder: Path, made: Path, out: Path, stores: list[Path], origin: Mapping[str, Any]
) -> list[Path]:
    """Let the stores take their places, and return these.

    Several cannot do so at once. What is to be done is written down first, so that whoever comes
    after a kill does the rest (see `_finish`).
    """
    places = [out / store.relative_to(made) for store in stores]
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        made.replace(out)
        return places
    for place in places:
        check_place(place, origin)
    plan = {
        "stores": [store.relative_to(made).as_posix() for store in stores],
        "stale": [place.relative_to(out).as_posix() for place in _stale(out, places, origin)],
    }
    write_atomically(folder / PLAN, json.dumps(plan).encode())
    _finish(folder, out)
    return places


def _stale(out: Path, places: list[Path], origin: Mapping[str, Any]) -> list[Path]:
    """Return stores of the same import whose tasks its source no longer has."""
    near = {p for place in places for p in (place, *place.parents)}
    return [p for p in stores_below(out) if p not in near and _is_of(p, origin)]


def _finish(folder: Path, out: Path) -> None:
    """Do what is left to do of a plan, if there is one; the new stores are whole by then."""
    if not (folder / PLAN).exists():
        return
    plan = json.loads((folder / PLAN).read_bytes())
    for number, name in enumerate(plan["stores"]):
        store, place = folder / MADE / name, out / name
        if store.exists():  # it is not in its place yet
            if place.exists():
                place.replace(folder / f"old-{number}")
            place.parent.mkdir(parents=True, exist_ok=True)
            store.replace(place)
    for number, name in enumerate(plan["stale"]):
        if (out / name).exists():
            (out / name).replace(folder / f"stale-{number}")
    (folder / PLAN).unlink()


def check_place(place: Path, origin: Mapping[str, Any]) -> None:
    """Refuse a place where anything lies but an import of the same."""
    empty = not place.exists() or (place.is_dir() and not any(place.iterdir()))
    if empty or _is_of(place, origin):
        return
    raise ValueError(
        f"expected nothing at {place}, or what was imported from {origin['location']} in the same "
        f"way; something else is there. Choose another --out."
    )


def _is_of(store: Path, origin: Mapping[str, Any]) -> bool:
    """Return whether a store was imported from there, in that way."""
    try:
        was = json.loads((store / ORIGIN).read_text(encoding="utf-8"))
        return all(was.get(key) == value for key, value in _plain(origin).items())
    except (OSError, ValueError, AttributeError):
        return False


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))
