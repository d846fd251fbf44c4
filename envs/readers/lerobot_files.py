"""The files of a LeRobot dataset: tables read with care, tables and videos written."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from gato.envs.files import write_atomically
from gato.envs.readers.lerobot_columns import Column
from gato.envs.readers.video import VideoWriter

CHUNK = 1000
DATA_MB, VIDEO_MB = 100, 200
"""Sizes after which another file is begun; LeRobot's own."""
DATA = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"


def read_table(path: Path, columns: list[str] | None, name: str) -> Any:
    """Return a Parquet file as a table.

    Raises:
        ValueError: where it is damaged or lacks a column, naming both.
    """
    import pyarrow.parquet as parquet

    try:
        file = parquet.ParquetFile(path)
        missing = sorted(set(columns or ()) - set(file.schema_arrow.names))
        if not missing:
            return file.read(columns=columns)
    except (ValueError, OSError) as error:
        raise ValueError(f"expected a Parquet file in {name}; {error}") from error
    raise ValueError(f"expected a column {missing[0]!r} in {name}; got none.")


def file_name(template: str, **values: Any) -> str:
    """Return the name of a file that ``meta/info.json`` describes.

    Raises:
        ValueError: for more than names in braces, perhaps with a number of digits: a format may
            ask for gigabytes of blanks, or for what lies behind a value.
    """
    plain = re.sub(r"\{[a-z_]+(:0[1-9]d)?\}", "", template)
    try:
        if "{" in plain or "}" in plain:
            raise ValueError(plain)
        return template.format(**values)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise ValueError(
            f"expected names of files in meta/info.json; got {template!r:.200}."
        ) from error


def as_array(column: Any, feature: str) -> np.ndarray:
    """Return a column of numbers, or of lists of equally many, as an array."""
    try:
        return np.array(column.to_pylist() if column.num_chunks == 0 else _dense(column))
    except (ValueError, TypeError) as error:
        raise ValueError(f"expected {feature!r} of one shape in all frames; {error}") from error


def _dense(column: Any) -> np.ndarray:
    import pyarrow as pa

    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = array.chunk(0)
    shape = [len(array)]
    while True:
        if isinstance(array, pa.ExtensionArray):
            array = array.storage
        if not pa.types.is_nested(array.type):
            break
        lengths = array.value_lengths().to_numpy(zero_copy_only=False)
        if array.null_count or len(set(lengths.tolist())) > 1:
            raise ValueError(f"lengths differ: {sorted(set(lengths.tolist()))[:4]}")
        shape.append(int(lengths[0]))
        array = array.flatten()
    if array.null_count:
        raise ValueError("some are missing")
    return array.to_numpy(zero_copy_only=False).reshape(shape)


class Tables:
    """Parquet files of frames, a row group per episode."""

    def __init__(self, out: Path) -> None:
        self.out, self.number, self.writer = out, 0, None
        self.path = out

    def append(
        self, columns: Mapping[str, Any], features: Mapping[str, Mapping[str, Any]]
    ) -> tuple[int, int]:
        """Write the frames of one episode and return the chunk and file they are in."""
        import pyarrow as pa
        import pyarrow.parquet as parquet

        if self.writer is not None and self.path.stat().st_size > DATA_MB << 20:
            self.close()
            self.number += 1
        chunk, file = divmod(self.number, CHUNK)
        arrays = {k: _arrow(v) for k, v in columns.items()}
        table = pa.Table.from_pydict(arrays)
        if self.writer is None:
            self.path = self.out / DATA.format(chunk_index=chunk, file_index=file)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.writer = parquet.ParquetWriter(self.path, table.schema)
        self.writer.write_table(table)
        return chunk, file

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
            self.writer = None


class Videos:
    """Files of one feature's frames, several episodes in each."""

    def __init__(self, out: Path, column: Column, fps: Fraction, codec: str) -> None:
        self.out, self.column, self.fps, self.codec = out, column, fps, codec
        self.number = 0
        self.writer: VideoWriter | None = None
        self.format = ""

    def append(self, frames: Sequence[np.ndarray]) -> dict[str, Any]:
        """Write an episode's frames and return where they are, as LeRobot's table says it."""
        if self.writer is not None and self.writer.path.stat().st_size > VIDEO_MB << 20:
            self.close()
            self.number += 1
        chunk, file = divmod(self.number, CHUNK)
        name = self.column.feature
        if self.writer is None:
            path = self.out / VIDEO.format(video_key=name, chunk_index=chunk, file_index=file)
            self.writer = VideoWriter(path, self.fps, self.codec, self.column.space.shape or ())
            self.format = self.writer.format
        first = self.writer.frames
        for i, frame in enumerate(frames):
            self.writer.append(frame, starts=i == 0)
        return {
            f"videos/{name}/chunk_index": chunk,
            f"videos/{name}/file_index": file,
            f"videos/{name}/from_timestamp": float(first / self.fps),
            f"videos/{name}/to_timestamp": float(self.writer.frames / self.fps),
        }

    def about(self) -> dict[str, Any]:
        height, width, channels = self.column.space.shape or (0, 0, 3)
        return {
            "video.height": height,
            "video.width": width,
            "video.codec": "h264",
            "video.pix_fmt": "gbrp" if self.format == "rgb24" else self.format,
            "video.is_depth_map": False,
            "video.fps": float(self.fps),
            "video.channels": channels,
            "has_audio": False,
        }

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
            self.writer = None


def _arrow(values: Any) -> Any:
    """Return a column of frames as Arrow has it: lists of one length as such."""
    import pyarrow as pa

    if isinstance(values, list):
        picture = values and isinstance(values[0], dict)
        kind = pa.struct({"bytes": pa.binary(), "path": pa.string()}) if picture else pa.string()
        return pa.array(values, kind)
    array = pa.array(np.ascontiguousarray(values).reshape(-1))
    shape = values.shape[1:]
    if shape in ((), (1,)):  # LeRobot's one number is no list
        return array
    for size in reversed(shape[1:]):  # an array of two axes or more: nested lists
        array = pa.ListArray.from_arrays(np.arange(0, len(array) + 1, size, np.int32), array)
    if len(shape) == 1:
        return pa.FixedSizeListArray.from_arrays(array, shape[0])
    return pa.ListArray.from_arrays(np.arange(0, len(array) + 1, shape[0], np.int32), array)


def write_tasks(path: Path, tasks: Sequence[str]) -> None:
    """Write task strings as pandas writes a table whose index they are: LeRobot reads it so."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    def column(name: str, kind: str, of: str) -> dict[str, Any]:
        names = {"name": name, "field_name": name}
        return {**names, "pandas_type": kind, "numpy_type": of, "metadata": None}

    about = {
        "index_columns": ["task"],
        "column_indexes": [column("", "unicode", "object") | {"name": None, "field_name": None}],
        "columns": [column("task_index", "int64", "int64"), column("task", "unicode", "object")],
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": "2.0.0",
    }
    numbers = pa.array(range(len(tasks)), pa.int64())
    table = pa.table({"task_index": numbers, "task": pa.array(tasks, pa.string())})
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table.replace_schema_metadata({b"pandas": json.dumps(about)}), path)


def write_json(path: Path, data: Any) -> None:
    """Write a description; numbers that JSON does not know are refused."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(data, indent=1, allow_nan=False).encode())
