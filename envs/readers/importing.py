"""Foreign data into stores of our own: every item checked, nothing half written or left out unsaid.

An import is there whole or not at all (see `publishing`); one that was interrupted begins anew and
gives the same bytes. Every store says in its ``import.json`` where it comes from and what was left
out.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gato.envs.check import check_episode
from gato.envs.episode import Episode, TaskSpec
from gato.envs.files import holds_store, store_format, stores_below, write_atomically
from gato.envs.readers import formats
from gato.envs.readers.formats import Progress
from gato.envs.readers.pictures import SUFFIXES
from gato.envs.readers.publishing import MADE, ORIGIN, check_place, publish, staged
from gato.envs.readers.reader import BadItem, ReadOptions, Source
from gato.envs.readers.untrusted import plain_suffix
from gato.envs.records import RecordWriter, check_record
from gato.envs.registry import folder_of
from gato.envs.remote import cache_folder, fingerprint, is_remote
from gato.envs.store import EpisodeWriter

OPEN_WRITERS = 8
"""Stores that are written at once; each holds what is pending of a shard in memory."""
_LOOKED_AT = 200_000  # entries of folders beside a file
CACHE_FORM = 3
"""Raised where the same data become other stores than before, so that caches are made anew."""


@dataclass
class Summary:
    """What an import did."""

    stores: list[Path] = field(default_factory=list)
    kept: int = 0
    steps: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    """Items left out, by reason."""
    first: dict[str, str] = field(default_factory=dict)
    """Where each reason was met first."""
    counts: Counter[str] = field(default_factory=Counter)
    """What was changed: clipped actions, resized pictures."""
    notes: list[str] = field(default_factory=list)

    def skip(self, bad: BadItem) -> None:
        """Count an item that is left out."""
        self.skipped[bad.reason] += 1
        self.first.setdefault(bad.reason, bad.where)

    def to_json(self) -> dict[str, Any]:
        skipped = [
            {"reason": reason, "items": n, "first": self.first[reason]}
            for reason, n in self.skipped.items()
        ]
        return {
            "kept": self.kept,
            "steps": self.steps,
            "skipped": skipped,
            "counts": dict(self.counts),
            "notes": self.notes,
        }


def import_source(
    source: Source,
    out: str | Path,
    *,
    skip_bad: bool = False,
    progress: Progress | None = None,
) -> Summary:
    """Store everything that a source yields.

    Episodes fill one store per task under ``out/<suite>/<name>``, as `collect` does; records fill
    one store at `out`. A store that was imported from the same place in the same way is replaced;
    where its task is no longer there, it is removed.

    Args:
        source: what `formats.open_source` has found.
        out: folder of the stores.
        skip_bad: count items that cannot be read or stored and leave them out.
        progress: called after every item.

    Raises:
        ValueError: for the first bad item unless `skip_bad`, for a source without a good one, and
            where something else lies at the destination.
    """
    out = Path(out)
    with staged(out, wait=False) as folder:
        return _fill(source, folder, out, skip_bad, progress)


def check_source(source: Source, progress: Progress | None = None) -> Summary:
    """Read and check everything that a source yields, and store nothing."""

    def check(item: Any) -> None:
        if source.kind == "records":
            check_record(item)
        else:
            check_episode(item, _spec(source, item))

    summary = Summary()
    for item in _good(source, summary, True, progress, check):
        summary.steps += len(item) if source.kind == "episodes" else 0
    summary.counts, summary.notes = Counter(source.counts), list(source.notes)
    return summary


def cached(
    location: str | Path,
    options: ReadOptions | None = None,
    *,
    format: str = "auto",
    skip_bad: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Return a folder of stores with what lies at a location, imported where it is not yet.

    It lies in ``$GATO_CACHE``, or ``~/.cache/gato``, under a name that follows from the location,
    the sizes and times of its files, and the options; it may be deleted at any time. Whether data
    on a hub (``hf:owner/name``) have changed is not asked: they are imported once, and again where
    the folder that this returns is deleted.

    Raises:
        ValueError: see `formats.open_source` and `import_source`.
    """
    location, options = str(location), options or ReadOptions()
    if format == "auto" and not is_remote(location):
        format = formats.recognise(location)
    asked = {"format": format, "options": asdict(options), "skip_bad": skip_bad}
    found: dict[str, Any] = {"form": CACHE_FORM, "location": _whole(location)}
    place = formats.place(location, format)
    found["files"] = _fingerprint(place)
    if formats.has_files_beside(format) and Path(place).is_file():
        found["beside"] = _beside(Path(place))
    key = hashlib.sha256(json.dumps({**asked, **found}, sort_keys=True).encode()).hexdigest()
    name = Path(location.rstrip("/")).name or "data"
    folder = cache_folder() / "imports" / f"{name}-{key[:16]}"
    if not folder.exists():
        with staged(folder, wait=True) as made:
            if not folder.exists():  # nobody has made it while we waited
                source = formats.open_source(location, format, options)
                _fill(source, made, folder, skip_bad, progress)
    return folder


def origin(folder: Path) -> dict[str, Any]:
    """Return what an import has said of the stores in a folder: see `Summary.to_json`."""
    told: dict[str, Any] = json.loads((stores_below(folder)[0] / ORIGIN).read_text("utf-8"))
    return told


def is_store(path: Path) -> bool:
    """Return whether stores of our own lie at `path`, whole or damaged."""
    found = stores_below(path)
    # a manifest at the top is a store's: where it says something else, opening the store says so
    return found == [path] or any(_ours(folder) for folder in found)


def _ours(folder: Path) -> bool:
    try:
        return store_format(folder).startswith("gato-") or holds_store(folder)
    except ValueError:  # a damaged manifest: opening the store will say so
        return True


def _fill(
    source: Source, folder: Path, out: Path, skip_bad: bool, progress: Progress | None
) -> Summary:
    """Write the stores into `folder`, and let them take their place at `out`."""
    origin = {
        "format": source.format,
        "location": _whole(source.location),
        "options": asdict(source.options),
        "skip_bad": skip_bad,
    }
    summary, made = Summary(), folder / MADE
    made.mkdir()
    for task in source.tasks if source.kind == "episodes" else ():
        check_place(out / _folder(task), origin)
    if source.kind == "records":
        check_place(out, origin)
        writer = RecordWriter(made, Path(source.location.rstrip("/")).name or source.format)
        with writer:
            for record in _good(source, summary, skip_bad, progress, writer.append):
                del record
        stores = [made]
    else:
        with contextlib.closing(_Stores(source, made)) as sink:
            for episode in _good(source, summary, skip_bad, progress, sink.append):
                summary.steps += len(episode)
        stores = list(sink.folders.values())
    if not summary.kept:
        said = next(iter(summary.first.items()), None)
        why = f" The first, {said[1]}: {said[0]}" if said else ""
        raise ValueError(
            f"expected {source.kind} that can be stored at {source.location}; got none of "
            f"{sum(summary.skipped.values())}.{why}"
        )
    summary.counts, summary.notes = Counter(source.counts), list(source.notes)
    for store in stores:
        text = json.dumps({**origin, **summary.to_json()}, indent=1)
        write_atomically(store / ORIGIN, text.encode())
    summary.stores = publish(folder, made, out, stores, origin)
    return summary


def _good(
    source: Source, summary: Summary, skip_bad: bool, progress: Progress | None, append: Any
) -> Iterator[Any]:
    """Append every item, yielding what was; a bad one is raised or counted."""
    limit = source.options.limit
    total = min(source.items, limit or source.items) if source.items is not None else limit or None
    for number, item in enumerate(source.read()):
        bad = item if isinstance(item, BadItem) else None
        if bad is None:
            try:
                append(item)
            except ValueError as error:
                bad = BadItem(f"{source.location}, item {number}", str(error))
        if bad is None:
            summary.kept += 1
            yield item
        elif skip_bad:
            summary.skip(bad)
        else:
            raise ValueError(
                f"{bad.where}: {bad.reason.rstrip('.')}. Leave such items out: --skip-bad"
            )
        if progress:
            progress(number + 1, total)


class _Stores:
    """One writer per task, of which the latest few are open."""

    def __init__(self, source: Source, root: Path) -> None:
        self._source, self._root = source, root
        self._open: OrderedDict[str, EpisodeWriter] = OrderedDict()
        self.folders: dict[str, Path] = {}

    def append(self, episode: Episode) -> None:
        spec = _spec(self._source, episode)
        self._writer(spec).append(episode)

    def close(self) -> None:
        for task in list(self._open):
            self._open.pop(task).close()
        for task, folder in list(self.folders.items()):
            if not json.loads((folder / "manifest.json").read_text())["shards"]:
                del self.folders[task]  # none of its episodes was good
                shutil.rmtree(folder)

    def _writer(self, spec: TaskSpec) -> EpisodeWriter:
        task = spec.id
        if task not in self._open:
            if len(self._open) == OPEN_WRITERS:
                self._open.popitem(last=False)[1].close()
            made: Mapping[str, Any] = self._source.made.get(task, {})
            folder = self.folders.setdefault(task, self._root / _folder(task))
            self._open[task] = EpisodeWriter(
                folder,
                spec,
                settings=made.get("settings", {"imported": self._source.format}),
                versions=made.get("versions"),
            )
        self._open.move_to_end(task)
        return self._open[task]


def _folder(task: str) -> str:
    """Return where a task's store lies below the others; the data may have named the task.

    Raises:
        ValueError: for a name that leads out of there.
    """
    folder = folder_of(task)
    if not all(part.strip(".") for part in folder.split("/")) or "\0" in folder:
        raise ValueError(f"expected a task's id, as suite/name; got {task!r}. Give one: --task")
    return folder


def _spec(source: Source, episode: Episode) -> TaskSpec:
    if episode.task not in source.tasks:
        known = ", ".join(sorted(source.tasks))
        raise ValueError(f"expected an episode of {known}; got one of {episode.task!r}.")
    return source.tasks[episode.task]


def _whole(location: str) -> str:
    """Return a location that means the same from any folder."""
    path = Path(location)
    return str(path.resolve()) if not is_remote(location) and path.exists() else location


def _fingerprint(location: str) -> list[list[Any]]:
    """Return name, size and time of every file at a location; nothing where it is no path."""
    if is_remote(location):
        return [] if "{" in location else fingerprint(location)  # many shards named by a pattern
    root = Path(location)
    if not root.exists():
        return []
    files = sorted(p for p in root.rglob("*") if p.is_file()) if root.is_dir() else [root]
    stats = [(file.relative_to(root).as_posix(), file.stat()) for file in files]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def _beside(file: Path) -> list[list[Any]]:
    """Return name, size and time of the JSON beside a file, and of the pictures near it.

    These are looked for as the readers do: in its folder, and in the one that this lies in. Of
    folders with more than `_LOOKED_AT` entries the others are not watched.
    """
    folder, seen = file.absolute().parent, 0
    found = [p for p in folder.iterdir() if plain_suffix(p) == ".json"]
    for root in (folder, folder.parent):
        for inside, folders, names in os.walk(root):
            folders[:] = sorted(n for n in folders if not n.startswith("."))
            found += [Path(inside, n) for n in names if n.lower().endswith(SUFFIXES)]
            if root != folder and folder.name in folders and Path(inside) == root:
                folders.remove(folder.name)
            seen += len(folders) + len(names)
            if seen > _LOOKED_AT:
                break
    told = sorted((os.path.relpath(p, folder), p.stat()) for p in found[:_LOOKED_AT] if p.is_file())
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in told]
