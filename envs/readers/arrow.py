"""Tables in Parquet and Arrow files, read a few rows at a time."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gato.envs.readers.reader import BadItem

SUFFIXES = (".parquet", ".arrow")
_BATCH_BYTES, _MOST_ROWS = 4 << 20, 256  # of a Parquet file, read at once
_SPLITS = "train|test|validation|valid|val|dev"
_LOOKED_AT = 500  # entries of a folder, to tell what it holds


def tables(location: Path, split: str, *, glance: bool = False) -> list[Path]:
    """Return the files of a split at a location, sorted; those named after no split are of any.

    A split is told by a file's name (``train-00000-of-00002.parquet``) or its folder's.
    """
    if location.is_file():
        return [location] if location.suffix in SUFFIXES else []
    if not location.is_dir():
        return []
    names = location.rglob("*")
    entries = itertools.islice(names, _LOOKED_AT) if glance else names
    found = sorted(f for f in entries if f.suffix in SUFFIXES and f.is_file())
    found = [f for f in found if not any(p.startswith(".") for p in f.relative_to(location).parts)]
    return [f for f in found if _split(f, location) in ("", split)]


def _split(file: Path, root: Path) -> str:
    told = re.match(rf"({_SPLITS})[-._]", file.name)
    folders = file.relative_to(root).parent.parts if root.is_dir() else ()
    return told[1] if told else next((f for f in reversed(folders) if _is_split(f)), "")


def _is_split(folder: str) -> bool:
    return re.fullmatch(_SPLITS, folder) is not None


def name_of(file: Path, root: Path) -> str:
    """Return what a file's table is called: as the nearest folder that is no split, or itself.

    >>> name_of(Path("jat/metaworld-assembly/train-00000-of-00001.parquet"), Path("jat"))
    'metaworld-assembly'
    """
    if not root.is_dir() and not re.match(rf"({_SPLITS}|data)[-._]", file.name):
        return file.stem
    folders = (folder.name for folder in (file.resolve().parent, *file.resolve().parents))
    return next(n for n in folders if not _is_split(n) and n != "data")


def column_names(file: Path) -> list[str]:
    """Return the names of a file's columns; raises as `schema` does."""
    return list(schema(file).names)


def schema(file: Path) -> Any:
    """Return the Arrow schema of a file.

    Raises:
        ValueError: where the file cannot be read, naming it.
    """
    import pyarrow.parquet as parquet

    try:
        if file.suffix == ".parquet":
            return parquet.read_schema(file)
        with _arrow(file) as reader:
            return reader.schema
    except (OSError, ValueError) as error:  # pyarrow's errors are among these
        raise ValueError(f"expected a table in {file}; {_short(error)}") from error


def rows(file: Path, columns: Sequence[str]) -> Iterator[Mapping[str, Any]]:
    """Yield rows: each a mapping from name to an Arrow array of one value.

    Raises:
        ValueError: where the file cannot be read any further, naming it.
    """
    try:
        for batch in _batches(file, list(columns)):
            for i in range(batch.num_rows):
                yield {name: batch.column(name).slice(i, 1) for name in columns}
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read any further: {_short(error)}") from error


def values(file: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any] | BadItem]]:
    """Yield (where, row) of rows as plain Python values, and a BadItem for what cannot be read."""
    number = 0
    try:
        missing = set(columns) - set(column_names(file))
        if missing:
            raise ValueError(f"expected a column {min(missing)!r}")
        for row in rows(file, columns):
            where = f"{file}, row {number}"
            number += 1
            try:
                yield where, {name: row[name][0].as_py() for name in columns}
            except ValueError as error:  # a string that is no UTF-8
                yield where, BadItem(where, f"expected UTF-8; {error}")
    except ValueError as error:
        where = f"{file}, row {number}"
        yield where, BadItem(where, f"nothing from here on can be read: {error}")


def _batches(file: Path, columns: list[str]) -> Iterator[Any]:
    """Yield record batches, of Parquet of about `_BATCH_BYTES` as they are stored."""
    import pyarrow.parquet as parquet

    if file.suffix == ".parquet":
        with parquet.ParquetFile(file) as table:
            at_once = _BATCH_BYTES * table.metadata.num_rows // max(file.stat().st_size, 1)
            yield from table.iter_batches(min(max(at_once, 1), _MOST_ROWS), columns=columns)
        return
    for batch in _arrow_batches(file):
        chosen = batch.select(columns)
        chosen.validate(full=True)  # or damaged offsets would be followed out of the file
        yield chosen


def _arrow_batches(file: Path) -> Iterator[Any]:
    with _arrow(file) as reader:
        if hasattr(reader, "num_record_batches"):
            for i in range(reader.num_record_batches):
                yield reader.get_batch(i)
        else:
            yield from reader


def count(file: Path) -> int:
    """Return the rows of a file, without reading them.

    Raises:
        ValueError: where the file cannot be read, naming it.
    """
    import pyarrow.parquet as parquet

    try:
        if file.suffix == ".parquet":
            return int(parquet.read_metadata(file).num_rows)
        return sum(batch.num_rows for batch in _arrow_batches(file))
    except (OSError, ValueError) as error:
        raise ValueError(f"expected a table in {file}; {_short(error)}") from error


def _arrow(file: Path) -> Any:
    """Return a reader of Arrow's stream format, which `datasets` writes, or of its file format."""
    import pyarrow as pa

    mapped = pa.memory_map(str(file))
    try:
        return pa.ipc.open_stream(mapped)
    except pa.ArrowInvalid:
        return pa.ipc.open_file(mapped)


def array(values: Any) -> np.ndarray:
    """Return nested lists of numbers of one Arrow array as an array.

    Raises:
        ValueError: for missing values, or lists of different lengths.
    """
    import pyarrow as pa

    shape = [len(values)]
    while True:
        kind = values.type
        if isinstance(kind, pa.BaseExtensionType):
            values = values.storage
            continue
        if values.null_count:
            raise ValueError(f"{values.null_count} values are missing")
        if pa.types.is_fixed_size_list(kind):
            width = kind.list_size
        elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
            lengths = values.value_lengths().to_numpy(zero_copy_only=False)
            width = int(lengths[0]) if len(lengths) else 0
            if (lengths != width).any():
                step = int(np.flatnonzero(lengths != width)[0])
                raise ValueError(f"{width} numbers at step 0 and {lengths[step]} at step {step}")
        else:
            break
        values = values.flatten()
        shape.append(width)
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise ValueError(f"expected numbers; got {kind}")
    return values.to_numpy(zero_copy_only=False).reshape(shape)


def highest(values: Any) -> int:
    """Return the greatest of nested integers, at least 0."""
    import pyarrow as pa
    import pyarrow.compute as compute

    while pa.types.is_nested(values.type):
        values = values.flatten()
    if not pa.types.is_integer(values.type):
        raise ValueError(f"expected integers; got {values.type}")
    return max(compute.max(values).as_py() or 0, 0)


def inner(column: Any) -> Any:
    """Return the list that the only row of a column holds, as an Arrow array.

    Raises:
        ValueError: where it holds none.
    """
    import pyarrow as pa

    while isinstance(column.type, pa.BaseExtensionType):
        column = column.storage
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
        if not pa.types.is_fixed_size_list(column.type):
            raise ValueError(f"expected a list of steps; got {column.type}")
    if column.null_count:
        raise ValueError("the value is missing")
    return column.flatten()


def _short(error: Exception) -> str:
    return str(error).split("\n")[0][:300] or type(error).__name__
