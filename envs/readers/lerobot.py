"""LeRobot datasets, version 3.0: tables of frames in Parquet, and videos; many episodes a file.

```
meta/info.json  meta/stats.json  meta/tasks.parquet
meta/episodes/chunk-000/file-000.parquet     a row per episode: which frames, of which files
data/chunk-000/file-000.parquet              a row per frame: numbers, text, PNG or JPEG bytes
videos/<feature>/chunk-000/file-000.mp4      frames at a steady rate, found by their time
meta/gato/                                   only where `lerobot_writer` wrote the dataset
```

Convention: a frame is an observation and the action taken there, so an episode of T frames has T
actions and T observations, and what the last action led to is not known. Here the last observation
is repeated: no action is lost, and no observation that was made up is ever a model's input, because
training reads the observations that have an action. An episode whose task changes on its way
becomes one episode per task; then only the last of them ends in a repeated observation. What
`gato data export` has written keeps the last observation, seeds, spaces and flags in ``meta/gato``,
and is read back as it was.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
from gymnasium import spaces

from gato.envs.check import check_episode
from gato.envs.episode import Episode, TaskSpec
from gato.envs.readers import lerobot_kept
from gato.envs.readers.lerobot_columns import Column, Columns, foreign_columns
from gato.envs.readers.lerobot_files import as_array, file_name, read_table
from gato.envs.readers.lerobot_info import episode_rows, of_split, read_info
from gato.envs.readers.pictures import open_image
from gato.envs.readers.reader import BadItem, ReadOptions, Source, fit_image
from gato.envs.readers.video import frames_at, require_av
from gato.envs.remote import Folder, open_folder

FORMAT = "lerobot"
EXTRA = "readers"
ADDRESSES = True
_DAMAGE = (AttributeError, TypeError, LookupError)
"""What comes of objects that are lists, and the like, where nothing more is said of them."""


def recognises(location: str) -> bool:
    """Return whether a folder holds the description that every LeRobot dataset has."""
    folder = open_folder(location)
    if not folder.exists("meta/info.json"):
        return False
    try:
        info = json.loads(folder.file("meta/info.json").read_bytes())
    except ValueError:
        return False
    return isinstance(info, dict) and "codebase_version" in info


def open_source(location: str, options: ReadOptions) -> Source:
    """Return what a dataset holds.

    Raises:
        ValueError: for another version, a feature that cannot be mapped, or damaged metadata.
    """
    try:
        dataset = Dataset(location, options)
    except _DAMAGE as error:
        raise ValueError(
            f"expected a LeRobot dataset at {location}; what its folder meta says is damaged "
            f"({type(error).__name__}: {error!s:.200}). Fetch it again."
        ) from error
    if any(column.kind == "video" for column in dataset.columns.leaves):
        require_av()
    rows, fps = dataset.rows, float(dataset.info["fps"])
    steps = sum(int(row["length"]) for row in rows)
    source = Source(
        format=FORMAT,
        location=location,
        kind="episodes",
        read=lambda: dataset.read(source),
        tasks={dataset.spec.id: dataset.spec},
        items=sum(1 if options.instruction else max(1, len(row["tasks"])) for row in rows),
        steps=steps,
        hours=steps / fps / 3600,
        fields=dataset.columns.fields,
        notes=dataset.notes,
    )
    if dataset.kept:
        source.made = {dataset.spec.id: dataset.kept.made}
    return source


class Dataset:
    """A dataset in a folder, near or far: its description, and its episodes one by one."""

    def __init__(self, location: str, options: ReadOptions) -> None:
        self.folder: Folder = open_folder(location)
        self.options, self.notes = options, list[str]()
        self.info = read_info(self.folder, location)
        rows = episode_rows(self.folder, self.info)
        self.rows = of_split(rows, self.info, options.split, location)
        self.table = lru_cache(maxsize=1)(self._table)
        self.kept = lerobot_kept.open_kept(self.folder, self.rows)
        if self.kept and not self.kept.whole:
            self.notes.append(self.kept.why)
            self.kept = None
        if self.kept:
            self.columns = self._restored(self.kept)
            if options.columns or options.clip_actions:
                self.notes.append("exported by gato: --columns and --clip-actions change nothing")
            self.spec = self._spec_kept(self.kept.spec)
        else:
            self.columns = foreign_columns(self.info["features"], options, self._bounds)
            self.spec = self._spec(location)
            self._say()

    def read(self, source: Source) -> Iterator[Episode | BadItem]:
        """Yield the episodes; what cannot be read is a BadItem."""
        for row in self.rows:
            where = f"{source.location}, episode {row['episode_index']}"
            try:
                for episode in self._episodes(row, source):
                    check_episode(episode, self.spec)
                    yield episode
            except (ValueError, OSError) as error:
                yield BadItem(where, str(error))
            except _DAMAGE as error:
                yield BadItem(where, f"damaged: {type(error).__name__}: {error}")

    # what there is

    @property
    @lru_cache(maxsize=1)  # noqa: B019 - a dataset lives as long as its source
    def tasks(self) -> dict[int, str]:
        """LeRobot's task strings by their index."""
        table = read_table(self.folder.file("meta/tasks.parquet"), None, "meta/tasks.parquet")
        texts = [n for n in ("task", "__index_level_0__") if n in table.column_names]
        if not texts or "task_index" not in table.column_names:
            raise ValueError(
                f"expected columns task_index and task in meta/tasks.parquet; got "
                f"{', '.join(table.column_names)}."
            )
        numbers, words = (table[name].to_pylist() for name in ("task_index", texts[0]))
        return dict(zip(numbers, map(str, words), strict=True))

    def _bounds(self, feature: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the least and greatest values of a feature over all episodes."""
        if self.folder.exists("meta/stats.json"):
            stats = json.loads(self.folder.file("meta/stats.json").read_bytes()).get(feature, {})
            found = [np.array(stats.get(key), np.float64) for key in ("min", "max")]
            if all(np.isfinite(bound).all() and bound.size for bound in found):
                return found[0], found[1]
        lows, highs = [], []
        for row in self._files():
            column = self.table(*row).column(feature)
            values = as_array(column, feature).astype(np.float64)
            lows.append(values.min(0))
            highs.append(values.max(0))
        return np.min(lows, 0), np.max(highs, 0)

    def _files(self) -> list[tuple[int, int]]:
        return sorted({(int(r["data/chunk_index"]), int(r["data/file_index"])) for r in self.rows})

    def _spec(self, location: str) -> TaskSpec:
        name = location.rstrip("/").split("/")[-1] or "dataset"
        texts = set(self.tasks.values())
        if not self.rows:
            raise ValueError(f"expected episodes in {location}; it has none.")
        return TaskSpec(
            id=self.options.task or f"lerobot/{name}",
            observation_space=self.columns.space("observations", "observation"),
            action_space=self.columns.space("actions", "action"),
            max_steps=max(int(row["length"]) for row in self.rows),
            control_hz=float(self.info["fps"]),
            instruction=self.options.instruction or (texts.pop() if len(texts) == 1 else ""),
            measure="success" if "success" in self.columns.flags else "return",
        )

    def _restored(self, kept: lerobot_kept.Kept) -> Columns:
        """Return the columns of a dataset of ours, pictures resized where that is asked for."""
        columns = Columns(list(kept.columns), dict(lerobot_kept.FLAGS), fields=dict(kept.fields))
        if self.options.image_size:
            columns.leaves = [self._resized(c) for c in columns.leaves]
            self.notes.append("pictures were brought to another size: not what was exported")
        return columns

    def _resized(self, column: Column) -> Column:
        if column.kind not in ("image", "video"):
            return column
        width, height = self.options.image_size or (0, 0)
        space = spaces.Box(0, 255, (height, width, 3), np.uint8)
        return replace(column, space=space, size=(width, height))

    def _spec_kept(self, spec: TaskSpec) -> TaskSpec:
        spec = replace(spec, id=self.options.task or spec.id)
        if self.options.image_size:
            observed = self.columns.space("observations", "observation")
            spec = replace(spec, observation_space=observed)
        return spec

    def _say(self) -> None:
        """Note what a user should know of a dataset that is not ours."""
        self.notes.append("the observation after the last action is not in LeRobot: repeated")
        if "reward" not in self.columns.flags:
            self.notes.append("no next.reward: rewards are 0")
        if "success" not in self.columns.flags:
            self.notes.append("no next.success: whether episodes succeed is not known")
        left = [name for name, told in self.columns.fields.items() if told.startswith("left out")]
        if left:
            self.notes.append(f"left out: {', '.join(left)}")
        small = {c.feature: c.size for c in self.columns.leaves if c.size}
        for feature, (width, height) in small.items():
            self.notes.append(f"{feature}: pictures of {width}x{height}")

    # one episode

    def _table(self, chunk: int, file: int) -> Any:
        """Return the rows of a file, of the columns that are read."""
        name = file_name(self.info["data_path"], chunk_index=chunk, file_index=file)
        if not hasattr(self, "columns"):  # before the columns are known: their bounds are asked for
            return read_table(self.folder.file(name), None, name)
        wanted = {c.feature for c in self.columns.leaves if c.kind != "video"}
        wanted |= {*self.columns.flags.values(), "timestamp", "episode_index", "task_index"}
        wanted |= {self.columns.instruction} - {""}
        return read_table(self.folder.file(name), sorted(wanted), name)

    def _episodes(self, row: Mapping[str, Any], source: Source) -> Iterator[Episode]:
        number, length = int(row["episode_index"]), int(row["length"])
        table = self.table(int(row["data/chunk_index"]), int(row["data/file_index"]))
        at = np.flatnonzero(table["episode_index"].to_numpy() == number)
        if len(at) != length or not length or at[-1] - at[0] != length - 1:
            raise ValueError(
                f"expected {length} frames, one after another; got {len(at)}. The dataset is "
                f"damaged: fetch it again."
            )
        table = table.slice(int(at[0]), length)
        times = table["timestamp"].to_numpy()
        if not np.isfinite(times).all() or (np.diff(times) <= 0).any():
            raise ValueError("expected timestamps that rise from frame to frame; got others.")
        columns: dict[str, dict[str, Any]] = {"observations": {}, "actions": {}, "targets": {}}
        for column in self.columns.leaves:
            columns[column.role][column.path] = self._values(column, row, table, times)
        flags = {k: as_array(table[v], v).reshape(length) for k, v in self.columns.flags.items()}
        if self.kept:
            episode = self.kept.episode(self.spec, row, columns, self.columns.leaves, flags)
            said = self.options.instruction
            yield replace(episode, instruction=said) if said else episode
            return
        if self.options.clip_actions:
            _clip(columns["actions"], self.columns.of("actions"), source)
        texts = self._instructions(table)
        ends = [i for i in range(1, length) if texts[i] != texts[i - 1]]
        for first, stop in zip([0, *ends], [*ends, length], strict=True):
            yield self._piece(number, columns, flags, texts[first], first, stop, length)

    def _values(self, column: Column, row: Mapping[str, Any], table: Any, times: np.ndarray) -> Any:
        """Return one leaf of an episode, an entry per frame."""
        if column.kind == "video":
            head = f"videos/{column.feature}/"
            name = file_name(
                str(self.info.get("video_path")),
                video_key=column.feature,
                chunk_index=int(row[head + "chunk_index"]),
                file_index=int(row[head + "file_index"]),
            )
            # float32 in the table; the grid of the frame rate is what was meant
            fps, start = float(self.info["fps"]), float(row[head + "from_timestamp"])
            grid = np.rint(times.astype(np.float64) * fps) / fps
            near = np.where(np.abs(grid - times) < 1e-3, grid, times.astype(np.float64))
            found = frames_at(self.folder.file(name), (start + near).tolist(), 0.6 / fps)
            return _stacked(found, column)
        values = table[column.feature]
        if column.kind == "image":
            return _stacked((self._picture(v) for v in values.to_pylist()), column)
        if column.kind == "text":
            return [str(text) for text in values.to_pylist()]
        numbers = as_array(values, column.feature)
        shape = (len(numbers), *column.space.shape)
        if numbers.size != np.prod(shape):
            raise ValueError(
                f"expected {column.feature!r} of shape {list(column.space.shape)}; got "
                f"{list(numbers.shape[1:])}."
            )
        return numbers.reshape(shape).astype(column.space.dtype)

    def _picture(self, value: Any) -> np.ndarray:
        value = value if isinstance(value, dict) else {"bytes": value}
        if value.get("bytes") is not None:
            return open_image(value["bytes"])
        if not value.get("path"):
            raise ValueError("expected a picture as bytes or as a path; got neither.")
        return open_image(self.folder.file(value["path"]))

    def _instructions(self, table: Any) -> list[str]:
        """Return the task of every frame in words."""
        if self.options.instruction:
            return [self.options.instruction] * len(table)
        if self.columns.instruction:
            return [str(text) for text in table[self.columns.instruction].to_pylist()]
        numbers = table["task_index"].to_pylist()
        unknown = set(numbers) - set(self.tasks)
        if unknown:
            raise ValueError(f"expected task {min(unknown)} in meta/tasks.parquet; got none.")
        return [self.tasks[number] for number in numbers]

    def _piece(
        self,
        number: int,
        columns: Mapping[str, Mapping[str, Any]],
        flags: Mapping[str, np.ndarray],
        instruction: str,
        first: int,
        stop: int,
        length: int,
    ) -> Episode:
        """Return frames [first, stop) of an episode with the observation that follows them."""
        steps = slice(first, stop)
        observations = {
            path: values[first : stop + 1] if stop < length else _repeated(values[steps])
            for path, values in columns["observations"].items()
        }
        no = np.zeros(stop - first, bool)
        success = flags.get("success")
        won = None if success is None else bool(success[steps].any())
        if stop < length and not won:
            won = None  # LeRobot tells of the whole episode
        ended = flags.get("terminated", flags.get("done"))
        terminated = no if ended is None else ended[steps].astype(bool)
        if ended is None and won and stop == length:
            terminated = no.copy()
            terminated[-1] = True
        truncated = flags["truncated"][steps].astype(bool) if "truncated" in flags else no.copy()
        truncated[-1] |= not terminated[-1]  # here the data end, whatever else they say
        rewards = flags["reward"][steps] if "reward" in flags else no
        return Episode(
            task=self.spec.id,
            observations=observations,
            actions={path: values[steps] for path, values in columns["actions"].items()},
            rewards=rewards.astype(np.float32),
            terminated=terminated,
            truncated=truncated,
            instruction=instruction,
            seed=number,
            success=won,
        )


def _stacked(pictures: Iterator[np.ndarray], column: Column) -> np.ndarray:
    """Return pictures as one array, each brought to the column's size where it has one."""
    fitted = [p if column.size is None else fit_image(p, column.size) for p in pictures]
    wrong = next((p.shape for p in fitted if p.shape != column.space.shape), None)
    if wrong:
        raise ValueError(
            f"expected {column.feature!r} of shape {list(column.space.shape)}; got {list(wrong)}."
        )
    return np.stack(fitted)


def _clip(actions: dict[str, Any], columns: list[Column], source: Source) -> None:
    for column in columns:
        if isinstance(column.space, spaces.Box):
            raw = actions[column.path]
            actions[column.path] = np.clip(raw, column.space.low, column.space.high)
            changed = int((actions[column.path] != raw).sum())
            if changed:
                source.counts["numbers of actions clipped"] += changed


def _repeated(values: Any) -> Any:
    if isinstance(values, list):
        return [*values, values[-1]]
    return np.concatenate([values, values[-1:]])
