"""A store of episodes as a LeRobot dataset, version 3.0, that LeRobot's own library reads.

Every step becomes a frame: its observation, its action, and what came of it (`next.reward`,
`next.done`, `next.success`; also `next.terminated` and `next.truncated`). Pictures become MP4
videos, with a loss that is measured and told, or without any (`images`). What LeRobot has no column
for is kept beside it, see `lerobot_kept`, so that reading the dataset here gives the store back.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from gato.envs.episode import Episode
from gato.envs.files import write_atomically
from gato.envs.readers import lerobot_kept
from gato.envs.readers.lerobot_columns import Column, our_columns
from gato.envs.readers.lerobot_stats import Statistics
from gato.envs.readers.video import CODECS, VideoWriter, frames_at
from gato.envs.store import EpisodeStore

FORMAT = "lerobot"
EXTRA = "readers"
IMAGES = ("video", "lossless", "png")
"""How pictures are kept: H.264 with a small loss, H.264 in RGB without any, PNG in Parquet."""
CHUNK = 1000
DATA_MB, VIDEO_MB = 100, 200
"""Sizes after which another file is begun; LeRobot's own."""
DATA = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
MEASURED = 16
"""Episodes whose videos are read again to measure the loss."""
CLOCK = {
    "timestamp": "float32",
    "frame_index": "int64",
    "episode_index": "int64",
    "index": "int64",
    "task_index": "int64",
}
FLAGS = {
    "next.reward": "float32",
    "next.done": "bool",
    "next.terminated": "bool",
    "next.truncated": "bool",
    "next.success": "bool",
}


def export(
    store: EpisodeStore,
    out: Path,
    progress: Callable[[int, int | None], None] | None = None,
    *,
    images: str = "video",
) -> dict[str, Any]:
    """Write the episodes of a store as a dataset into the new folder `out`.

    Returns what its `lerobot_kept.STORE` says of the pictures: by feature, the mean and the
    greatest difference of a value in 0..255, and the peak signal-to-noise ratio in decibels.

    Raises:
        ValueError: for an empty store, or one that LeRobot cannot hold, saying why.
    """
    if images not in IMAGES:
        raise ValueError(f"expected images as one of {', '.join(IMAGES)}; got {images!r}.")
    if not len(store):
        raise ValueError(f"expected episodes in {store.path}; it is empty.")
    writer = _Writer(store, out, images)
    for number in range(len(store)):
        writer.append(number, store.episode(number))
        if progress:
            progress(number + 1, len(store))
    return writer.finish()


def loss_of(folder: Path) -> str:
    """Return in words how much the pictures of an exported dataset differ from the store's."""
    loss = json.loads((folder / lerobot_kept.STORE).read_bytes())["loss"]
    return "; ".join(
        f"{name}: {told['mean']:.2f} of 255 in the mean, {told['psnr_db']} dB"
        for name, told in loss.items()
        if told["greatest"]
    )


class _Writer:
    def __init__(self, store: EpisodeStore, out: Path, images: str) -> None:
        self.store, self.out, self.images = store, out, images
        self.targets = store.episode(0).targets is not None
        kind: Any = "image" if images == "png" else "video"
        self.columns = our_columns(store.spec, kind, self.targets)
        self.fps = Fraction(store.spec.control_hz).limit_denominator(1000)
        self.videos = {
            c.feature: _Videos(out, c, self.fps, "h264" if images == "video" else images)
            for c in self.columns
            if c.kind == "video"
        }
        self.data = _Tables(out)
        self.statistics = Statistics()
        self.tasks: dict[str, int] = {}
        self.rows: list[dict[str, Any]] = []
        self.kept: list[dict[str, Any]] = []
        self.frames = 0

    def append(self, number: int, episode: Episode) -> None:
        """Write one episode."""
        if (episode.targets is not None) != self.targets:
            raise ValueError(f"expected targets in all episodes of {self.store.path} or in none.")
        length = len(episode)
        # LeRobot's policies are conditioned on the task's words: an empty string tells them nothing
        task = self.tasks.setdefault(episode.instruction or episode.task, len(self.tasks))
        columns = self._columns(number, task, episode)
        chunk, file = self.data.append(columns, self._features())
        row = {
            "episode_index": number,
            "tasks": [episode.instruction or episode.task],
            "length": length,
            "data/chunk_index": chunk,
            "data/file_index": file,
            "dataset_from_index": self.frames,
            "dataset_to_index": self.frames + length,
            "meta/episodes/chunk_index": 0,
            "meta/episodes/file_index": 0,
        }
        for column in self.columns:
            if column.feature in self.videos:
                row |= self.videos[column.feature].append(episode.observations[column.path][:-1])
        pictures = {
            c.feature: np.asarray(getattr(episode, c.role)[c.path][:length])
            for c in self.columns
            if c.kind in ("image", "video")
        }
        numbers = {k: v for k, v in columns.items() if isinstance(v, np.ndarray)}
        row |= self.statistics.append(numbers, pictures)
        self.rows.append(row)
        self.frames += length
        self._keep(number, episode)

    def finish(self) -> dict[str, Any]:
        """Write what describes the episodes, and return what was lost of the pictures."""
        self.data.close()
        for video in self.videos.values():
            video.close()
        self._write_kept()
        loss = self._loss()
        meta = self.out / "meta"
        self._write_episodes(meta)
        _write_tasks(meta / "tasks.parquet", list(self.tasks))
        _write_json(meta / "stats.json", self.statistics.whole())
        _write_json(meta / "info.json", self._info())
        codec = {"images": self.images, **CODECS.get(self.images.replace("video", "h264"), {})}
        kept = {
            "format": lerobot_kept.FORMAT,
            "spec": self.store.spec.to_json(),
            "settings": self.store.settings,
            "versions": self.store.manifest["versions"],
            "columns": [
                {k: getattr(c, k) for k in ("role", "path", "feature", "kind")}
                for c in self.columns
            ],
            "codec": codec,
            "loss": loss,
            "episodes": lerobot_kept.digest(self.rows),
        }
        _write_json(self.out / lerobot_kept.STORE, kept)
        return loss

    def _features(self) -> dict[str, dict[str, Any]]:
        """Return LeRobot's description of every feature."""
        features: dict[str, dict[str, Any]] = {}
        for c in self.columns:
            shape = list(c.space.shape or ()) or [1]
            about: dict[str, Any] = {"dtype": c.kind, "shape": shape, "names": None}
            if c.kind == "array":
                about["dtype"] = str(np.dtype(c.space.dtype))
            elif c.kind == "text":
                about |= {"dtype": "string", "shape": [1]}
            else:
                about["names"] = ["height", "width", "channels"]
            if c.kind == "video":
                about["info"] = self.videos[c.feature].about()
            features[c.feature] = about
        for name, dtype in {**FLAGS, **CLOCK}.items():
            features[name] = {"dtype": dtype, "shape": [1], "names": None}
        return features

    def _columns(self, number: int, task: int, episode: Episode) -> dict[str, Any]:
        """Return the frames of an episode, an entry per feature that the tables hold."""
        length = len(episode)
        columns: dict[str, Any] = {}
        for c in self.columns:
            values = getattr(episode, c.role)[c.path][:length]
            if c.kind == "text":
                columns[c.feature] = list(values)
            elif c.kind == "image":
                columns[c.feature] = [{"bytes": lerobot_kept.png(v), "path": None} for v in values]
            elif c.kind == "array":
                columns[c.feature] = np.asarray(values, np.dtype(c.space.dtype))
        success = np.zeros(length, bool)
        success[-1] = bool(episode.success)
        done = episode.terminated | episode.truncated
        frame = np.arange(length)
        values_of = {
            "next.reward": episode.rewards,
            "next.done": done,
            "next.terminated": episode.terminated,
            "next.truncated": episode.truncated,
            "next.success": success,
            "timestamp": frame / float(self.fps),
            "frame_index": frame,
            "episode_index": np.full(length, number),
            "index": self.frames + frame,
            "task_index": np.full(length, task),
        }
        for name, dtype in {**FLAGS, **CLOCK}.items():
            columns[name] = np.asarray(values_of[name]).astype(dtype)
        return columns

    def _keep(self, number: int, episode: Episode) -> None:
        self.kept.append(lerobot_kept.row_of(number, episode, self.columns))
        if len(self.kept) == lerobot_kept.PER_FILE:
            self._write_kept()

    def _write_kept(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as parquet

        if not self.kept:
            return
        path = self.out / lerobot_kept.EPISODES.format(
            self.kept[0]["episode_index"] // lerobot_kept.PER_FILE
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pa.Table.from_pylist(self.kept), path)
        self.kept = []

    def _write_episodes(self, meta: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as parquet

        path = meta / "episodes" / "chunk-000" / "file-000.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pa.Table.from_pylist(self.rows), path)

    def _info(self) -> dict[str, Any]:
        whole = self.fps.denominator == 1
        return {
            "codebase_version": "v3.0",
            "robot_type": self.store.spec.suite,
            "total_episodes": len(self.rows),
            "total_frames": self.frames,
            "total_tasks": len(self.tasks),
            "chunks_size": CHUNK,
            "data_files_size_in_mb": DATA_MB,
            "video_files_size_in_mb": VIDEO_MB,
            "fps": int(self.fps) if whole else float(self.fps),
            "splits": {"train": f"0:{len(self.rows)}"},
            "data_path": DATA,
            "video_path": VIDEO if self.videos else None,
            "features": self._features(),
        }

    def _loss(self) -> dict[str, Any]:
        """Read some videos again and return by feature how far they are from the pictures."""
        chosen = np.linspace(0, len(self.rows) - 1, min(len(self.rows), MEASURED)).astype(int)
        loss = {}
        for column in self.columns:
            if column.kind != "video":
                continue
            total, greatest, squares, values, frames = 0.0, 0, 0.0, 0, 0
            for number in dict.fromkeys(chosen.tolist()):
                wanted = self.store.episode(number).observations[column.path][:-1]
                for a, b in zip(wanted, self._again(column, number), strict=True):
                    difference = np.abs(a.astype(np.int16) - b.astype(np.int16))
                    total += float(difference.sum())
                    squares += float((difference.astype(np.float64) ** 2).sum())
                    greatest = max(greatest, int(difference.max()))
                    values, frames = values + a.size, frames + 1
            if self.images == "lossless" and greatest:
                raise RuntimeError(f"{column.feature}: lossless video differs by {greatest}")
            decibels = 10 * np.log10(255**2 * values / squares) if squares else None
            loss[column.feature] = {
                "mean": total / values,
                "greatest": greatest,
                "psnr_db": None if decibels is None else round(float(decibels), 2),
                "frames": frames,
            }
        return loss

    def _again(self, column: Column, number: int) -> Iterator[np.ndarray]:
        row, head = self.rows[number], f"videos/{column.feature}/"
        path = self.out / VIDEO.format(
            video_key=column.feature,
            chunk_index=row[head + "chunk_index"],
            file_index=row[head + "file_index"],
        )
        first = row[head + "from_timestamp"]
        times = [first + i / float(self.fps) for i in range(row["length"])]
        return frames_at(path, times, 0.5 / float(self.fps))


class _Tables:
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


class _Videos:
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


def _write_tasks(path: Path, tasks: Sequence[str]) -> None:
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


def _write_json(path: Path, data: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(data, indent=1, allow_nan=False).encode())
