"""A store of episodes as a LeRobot dataset, version 3.0, that LeRobot's own library reads.

Every step becomes a frame: its observation, its action, and what came of it (`next.reward`,
`next.done`, `next.success`; also `next.terminated` and `next.truncated`). Pictures become MP4
videos, with a loss that is measured and told, or without any (`images`). What LeRobot has no column
for is kept beside it, see `lerobot_kept`, so that reading the dataset here gives the store back.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from gato.envs.episode import Episode
from gato.envs.readers import lerobot_kept
from gato.envs.readers.lerobot_columns import Column, our_columns
from gato.envs.readers.lerobot_files import (
    CHUNK,
    DATA,
    DATA_MB,
    VIDEO,
    VIDEO_MB,
    Tables,
    Videos,
    write_json,
    write_tasks,
)
from gato.envs.readers.lerobot_stats import Statistics
from gato.envs.readers.video import CODECS, frames_at
from gato.envs.store import EpisodeStore

FORMAT = "lerobot"
EXTRA = "readers"
IMAGES = ("video", "lossless", "png")
"""How pictures are kept: H.264 with a small loss, H.264 in RGB without any, PNG in Parquet."""
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
            c.feature: Videos(out, c, self.fps, "h264" if images == "video" else images)
            for c in self.columns
            if c.kind == "video"
        }
        self.data = Tables(out)
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
        write_tasks(meta / "tasks.parquet", list(self.tasks))
        write_json(meta / "stats.json", self.statistics.whole())
        write_json(meta / "info.json", self._info())
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
        write_json(self.out / lerobot_kept.STORE, kept)
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
