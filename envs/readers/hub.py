"""Rows of Hugging Face's `datasets`: a folder of ``save_to_disk``, Parquet or Arrow files, or a
name on the hub, ``hf:owner/name`` or ``hf:owner/name/configuration``, which is streamed.

What a row becomes follows from its columns, as `rows` says. Pictures are decoded here and not by
`datasets`, so that their size is known before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gato.envs.readers import arrow
from gato.envs.readers.json_stream import parse_json
from gato.envs.readers.pictures import note
from gato.envs.readers.reader import BadItem, ReadOptions, Source
from gato.envs.readers.rows import OURS, is_list, plan
from gato.envs.readers.untrusted import below, check_options, each, files

FORMAT = "hub"
EXTRA = "readers"
IGNORES = ("clip_actions",)
BESIDE = True
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Words in the names of files that say of which split they are, as on the hub."""


@dataclass
class Table:
    """Rows, wherever they come from."""

    features: Mapping[str, Any]
    read: Callable[[list[str]], Iterator[tuple[str, Any]]]
    """From the columns wanted to (where, row or BadItem)."""
    rows: int | None
    note: str


def recognises(location: str) -> bool:
    """Return whether it is ``hf:...``, a saved data set, Arrow, or Parquet of more than text."""
    if _hub_name(location):
        return True
    path = Path(location)
    if _saved(path) or files(path, (".arrow",), glance=True):
        return True
    tables = files(path, (".parquet",), glance=True)
    return bool(tables) and _more_than_text(tables[0])


def open_source(location: str, options: ReadOptions) -> Source:
    """Return the rows of one split as records."""
    check_options(options, FORMAT, OURS, splits=True)
    table = _load(location, options.split)
    root = None if _hub_name(location) else Path(location)
    folder = root.parent if root is not None and root.is_file() else root
    used, make = plan(table.features, options, folder, location, _repository(location))
    notes = [table.note]
    if {"image", "images"} & set(used.values()):
        notes.append(note(options))
    elif options.image_size is not None:
        notes.append("no column of pictures: --image-size changes nothing")
    if root is None:
        notes.append("runs import it once, and do not ask whether it has changed since")
    several = any(is_list(table.features[n]) for n, ours in used.items() if ours == "text")
    return Source(
        FORMAT,
        location,
        "records",
        lambda: each(table.read(list(used)), make),
        items=None if several else table.rows,
        fields={name: used.get(name, "left out") for name in table.features},
        notes=notes,
    )


def _hub_name(location: str) -> str:
    """Return ``owner/name`` of ``hf:owner/name``; ``hf://`` is an address of single files."""
    name = location.removeprefix("hf:")
    return name if name != location and not name.startswith("//") else ""


def _repository(location: str) -> str:
    """Return ``owner/name``, or the name alone where there is no owner, without configuration."""
    return "/".join(_hub_name(location).split("/")[:2])


def _saved(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _more_than_text(path: Path) -> bool:
    try:
        from pyarrow import types

        schema = arrow.schema(path)
    except (ImportError, ValueError):
        return False
    kinds = [field.type for field in schema]
    binary = any(types.is_binary(k) or types.is_large_binary(k) for k in kinds)
    pictures = any(types.is_struct(k) and k.get_field_index("bytes") >= 0 for k in kinds)
    return binary or pictures or "messages" in schema.names


def _load(location: str, split: str) -> Table:
    """Return what lies at a location."""
    path, name = Path(location), _hub_name(location)
    try:
        if name:
            return _streamed(location, split)
        if _saved(path):
            return _tables(_saved_files(path, split), f"split {split}")
        found = files(path, (".parquet",)) or files(path, (".arrow",))
        chosen = _of_split(found, split, path)
        return _tables(chosen, f"files of split {split}: {len(chosen)}")
    except ImportError:
        raise
    except Exception as error:  # damaged data end the library in every way there is
        what = f"{name} on the Hugging Face hub" if name else f"a data set at {location}"
        raise ValueError(f"expected {what}; {_said(error)}.") from error


def _streamed(location: str, split: str) -> Table:
    import datasets

    name, called = _hub_name(location), _repository(location)
    configuration = name.removeprefix(called).removeprefix("/")
    data = datasets.load_dataset(called, configuration or None, split=split, streaming=True)
    known = (data.info.splits or {}).get(split)
    rows = getattr(known, "num_examples", None)
    features = data.features or _guess(data)
    read = partial(_numbered, data.decode(False) if data.features else data, f"hf:{name}")
    return Table(features, read, rows, f"split {split}, streamed")


def _saved_files(path: Path, split: str) -> list[Path]:
    """Return the files of what ``save_to_disk`` wrote."""
    if (path / "dataset_dict.json").is_file():
        splits = parse_json((path / "dataset_dict.json").read_bytes())["splits"]
        if split not in splits:
            raise ValueError(f"splits are {', '.join(splits)}; got {split!r}, see --split")
        path /= split
        state = parse_json((path / "state.json").read_bytes())
    else:
        state = parse_json((path / "state.json").read_bytes())
        if split not in ("train", state.get("_split")):
            raise ValueError(f"it is of split {state.get('_split')}; got {split!r}, see --split")
    if state.get("_indices_data_files"):
        raise ValueError("it is a choice of rows of other files; save it with datasets 2 or later")
    return [below(path, file["filename"], "_data_files") for file in state["_data_files"]]


def _tables(paths: list[Path], note: str) -> Table:
    import datasets

    if not paths:
        raise ValueError("there are no Parquet or Arrow files")
    features = datasets.Features.from_arrow_schema(arrow.schema(paths[0]))
    try:
        rows = sum(map(arrow.count, paths))
    except ValueError:  # reading will tell
        rows = None

    def read(columns: list[str]) -> Iterator[tuple[str, Any]]:
        for path in paths:
            yield from arrow.values(path, columns)

    return Table(features, read, rows, note)


def _of_split(paths: list[Path], split: str, root: Path) -> list[Path]:
    """Return the files of a split; where no name tells of any, all are for training."""
    if not paths:
        return []
    words = {word: name for name, several in SPLITS.items() for word in several}
    found: dict[str, list[Path]] = {}
    for path in paths:
        inside = path.relative_to(root) if path != root else Path(path.name)
        spelt = inside.as_posix().lower()
        for mark in "/-_.":
            spelt = spelt.replace(mark, " ")
        which = next((words[w] for w in spelt.split() if w in words), "")
        found.setdefault(which, []).append(path)
    if set(found) == {""}:
        found = {"train": found[""]}
    chosen = found.get(words.get(split, split), [])
    if not chosen:
        raise ValueError(f"splits are {', '.join(filter(None, found))}; got {split!r}, see --split")
    return chosen


def _guess(data: Any) -> Any:
    """Return the features of data whose source names none, from the first row."""
    import datasets
    import pyarrow

    first = next(iter(data), None)
    if first is None:
        raise ValueError("it has no rows")
    return datasets.Features.from_arrow_schema(pyarrow.Table.from_pylist([first]).schema)


def _numbered(data: Any, location: str, columns: list[str]) -> Iterator[tuple[str, Any]]:
    row = 0
    try:
        for value in data:
            yield f"{location}, row {row}", {name: value[name] for name in columns}
            row += 1
    except ImportError:
        raise
    except Exception as error:
        where = f"{location}, row {row}"
        yield where, BadItem(where, f"nothing from here on can be read: {_said(error)}")


def _said(error: Exception) -> str:
    """Return what an error says; of one that says only a name, also what kind it is."""
    plain = isinstance(error, OSError | ValueError) and str(error)
    return (str(error) if plain else f"{type(error).__name__}: {error}").rstrip(".")
