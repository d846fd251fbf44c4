"""Rows of Hugging Face's `datasets`: a folder of ``save_to_disk``, Parquet or Arrow files, or a
name on the hub, ``hf:owner/name`` or ``hf:owner/name/configuration``, which is streamed.

What a row becomes follows from its columns, as `rows` says. Pictures are decoded here and not by
`datasets`, so that their size is known before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from gato.envs.readers.pictures import note
from gato.envs.readers.reader import BadItem, ReadOptions, Source
from gato.envs.readers.rows import OURS, Make, is_list, plan
from gato.envs.readers.untrusted import check_options, each, files

FORMAT = "hub"
EXTRA = "readers"
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Words in the names of files that say of which split they are, as on the hub."""


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
    data, rows, notes = _load(location, options.split)
    features = data.features or _guess(data, location)
    root = None if _hub_name(location) else Path(location)
    folder = root.parent if root is not None and root.is_file() else root
    fields, make = plan(features, options, folder, location)
    if any(name in fields.values() for name in ("image", "images")):
        notes.append(note(options))
    one_each = not any(is_list(features[n]) for n, ours in fields.items() if ours == "text")
    fields = {name: fields.get(name, "left out") for name in features}
    read = partial(_read, data.decode(False), make, location)
    items = rows if one_each else None
    return Source(FORMAT, location, "records", read, items=items, fields=fields, notes=notes)


def _hub_name(location: str) -> str:
    """Return ``owner/name`` of ``hf:owner/name``; ``hf://`` is an address of single files."""
    name = location.removeprefix("hf:")
    return name if name != location and not name.startswith("//") else ""


def _saved(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _more_than_text(path: Path) -> bool:
    try:
        import pyarrow
        from pyarrow import parquet, types
    except ImportError:
        return False
    try:
        schema = parquet.read_schema(path)
    except (OSError, pyarrow.ArrowException):
        return False
    kinds = [field.type for field in schema]
    binary = any(types.is_binary(k) or types.is_large_binary(k) for k in kinds)
    pictures = any(types.is_struct(k) and k.get_field_index("bytes") >= 0 for k in kinds)
    return binary or pictures or "messages" in schema.names


def _load(location: str, split: str) -> tuple[Any, int | None, list[str]]:
    """Return an iterable data set, its rows where they are known, and notes."""
    import datasets

    path, name = Path(location), _hub_name(location)
    try:
        if name:
            owner, _, rest = name.partition("/")
            repository, _, configuration = rest.partition("/")
            data = datasets.load_dataset(
                f"{owner}/{repository}" if repository else owner,
                configuration or None,
                split=split,
                streaming=True,
            )
            known = (data.info.splits or {}).get(split)
            return data, getattr(known, "num_examples", None), [f"split {split}, streamed"]
        if _saved(path):
            data = datasets.load_from_disk(location)
            if isinstance(data, datasets.DatasetDict):
                if split not in data:
                    raise ValueError(f"splits are {', '.join(data)}; got {split!r}, see --split")
                data = data[split]
            return data.to_iterable_dataset(), len(data), [f"split {split}"]
        tables, kind = files(path, (".parquet",)), "parquet"
        if not tables:
            tables, kind = files(path, (".arrow",)), "arrow"
        chosen = _of_split(tables, split, path)
        given = {"train": [str(p) for p in chosen]}
        data = datasets.load_dataset(kind, data_files=given, split="train", streaming=True)
        rows = _rows(chosen) if kind == "parquet" else None
        return data, rows, [f"{len(chosen)} {kind} files of split {split}"]
    except (OSError, ValueError) as error:
        what = f"{name} on the Hugging Face hub" if name else f"a data set at {location}"
        raise ValueError(f"expected {what}; {error}.") from error


def _of_split(paths: list[Path], split: str, root: Path) -> list[Path]:
    """Return the files of a split; where no name tells of any, all are for training."""
    if not paths:
        raise ValueError("there are no Parquet or Arrow files")
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


def _rows(paths: list[Path]) -> int | None:
    import pyarrow
    from pyarrow import parquet

    try:
        return sum(parquet.read_metadata(p).num_rows for p in paths)
    except (OSError, pyarrow.ArrowException):  # reading will name the file
        return None


def _guess(data: Any, location: str) -> Any:
    """Return the features of data whose source names none, from the first row."""
    import datasets
    import pyarrow

    first = next(iter(data), None)
    if first is None:
        raise ValueError(f"expected rows at {location}; got none.")
    return datasets.Features.from_arrow_schema(pyarrow.Table.from_pylist([first]).schema)


def _read(data: Any, make: Make, location: str) -> Iterator[Mapping[str, Any] | BadItem]:
    yield from each(_numbered(data, location), make)


def _numbered(data: Any, location: str) -> Iterator[tuple[str, Any]]:
    row = 0
    try:
        for value in data:
            yield f"{location}, row {row}", value
            row += 1
    except (OSError, ValueError, RuntimeError) as error:
        where = f"{location}, row {row}"
        yield where, BadItem(where, f"nothing from here on can be read: {error}")
