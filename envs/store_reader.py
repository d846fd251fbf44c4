"""Reading an episode store; its folder is drawn in `gato.envs.store`."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import gymnasium as gym
import numpy as np

from gato.envs.check import check_episode
from gato.envs.columns import read_bytes, read_rows
from gato.envs.episode import Episode, TaskSpec, flatten_space
from gato.envs.files import check_sha256, read_manifest
from gato.envs.mirror import remote_store

T = TypeVar("T")
FORMAT = "gato-episodes-1"
EPISODE_COLUMNS = {
    "lengths": np.int64,
    "returns": np.float64,
    "seeds": np.int64,
    "successes": np.int8,
    "instructions": np.int32,
}
STEP_COLUMNS = {"rewards": np.float32, "terminated": np.bool_, "truncated": np.bool_}
TEXTS, STARTS, INFO = "texts.json", "texts.starts.npy", "info.json"


class EpisodeStore:
    """Reads a store; a window of an episode is read without touching the rest.

    `spec` is the task, `settings` how the episodes were made; `lengths`, `returns`, `successes`
    and `seeds` have an entry per episode, `ends` the steps up to each one's end.
    """

    def __init__(self, path: str | Path, skip: Collection[str] = ()) -> None:
        """Open a store.

        Args:
            path: its folder.
            skip: names of shards to leave out, as if they had never been written.

        Raises:
            ValueError: where it is no store, or its index is damaged.
        """
        self.path = Path(path)
        self.manifest = read_manifest(self.path, FORMAT)
        self._remote = remote_store(self.path)
        self.spec = TaskSpec.from_json(self.manifest["spec"])
        self.settings: dict[str, Any] = self.manifest["settings"]
        self.skipped = tuple(sorted(skip))
        self._shards = [s for s in self.manifest["shards"] if s["name"] not in self.skipped]
        self._leaves = leaves_of(self.spec)
        self._first = np.cumsum([0, *(s["episodes"] for s in self._shards)])
        self._steps_before = np.cumsum([0, *(s["steps"] for s in self._shards)])
        if self._remote is not None:
            self._remote.index(self._shards, [f"{name}.npy" for name in EPISODE_COLUMNS])
        self.lengths = self._per_episode("lengths")
        self.returns = self._per_episode("returns")
        self.successes = self._per_episode("successes")
        self.seeds = self._per_episode("seeds")
        self.ends = np.cumsum(self.lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def __repr__(self) -> str:
        steps = int(self.lengths.sum())
        return f"EpisodeStore({self.spec.id!r}, {len(self)} episodes, {steps} steps)"

    def __reduce__(self) -> tuple[type[EpisodeStore], tuple[Path, tuple[str, ...]]]:
        return EpisodeStore, (self.path, self.skipped)

    @property
    def numbers(self) -> np.ndarray:
        """The number of each episode in the whole store, which leaves out no shard."""
        counts = [s["episodes"] for s in self.manifest["shards"]]
        kept = [s["name"] not in self.skipped for s in self.manifest["shards"]]
        return np.flatnonzero(np.repeat(kept, counts))

    def episode(self, i: int) -> Episode:
        """Return episode `i`; it has one observation more than decisions."""
        i = self._index(i)
        shard, row = self._place(i)
        return self._cut(i, 0, int(self.lengths[i]), 1, self._info(shard, row))

    def window(self, i: int, start: int, stop: int, *, outcome: bool = True) -> Episode:
        """Return decisions [start, stop) of episode `i` with as many observations, without info.

        Args:
            i: the episode.
            start: its first decision.
            stop: one after its last.
            outcome: read what came of the decisions, too; without, rewards and flags are 0.
        """
        i = self._index(i)
        if not 0 <= start < stop <= self.lengths[i]:
            raise ValueError(
                f"expected a window in episode {i} of length {self.lengths[i]}; "
                f"got [{start}, {stop})."
            )
        return self._cut(i, start, stop, 0, {}, outcome)

    def column(self, i: int, kind: str, path: str = "") -> np.ndarray | list[str]:
        """Return one column of episode `i`, reading no other.

        Args:
            i: the episode.
            kind: "observations", "actions" or "targets"; or "rewards", "terminated", "truncated".
            path: of the leaf, where `kind` has leaves.
        """
        i = self._index(i)
        stop = int(self.lengths[i]) + (kind == "observations")
        return self._column(i, kind, path, 0, stop)

    def validate(self) -> None:
        """Read everything once.

        Raises:
            ValueError: naming the first file or episode that is not as it was written.
        """
        for shard in self._shards:
            self._reading(shard, lambda s=shard: check_sums(self._folder(s), s["sha256"]))
        for i in range(len(self)):
            check_episode(self.episode(i), self.spec)

    def _cut(
        self,
        i: int,
        start: int,
        stop: int,
        extra: int,
        info: Mapping[str, Any],
        outcome: bool = True,
    ) -> Episode:
        def leaves(kind: str, more: int = 0) -> dict[str, Any]:
            return {p: self._column(i, kind, p, start, stop + more) for p in self._leaves[kind]}

        shard, row = self._place(i)
        entry = self._shards[shard]
        names = self._rows(shard, "instructions", "", row, row + 1)
        success = int(self.successes[i])
        zeros = np.broadcast_to(np.int8(0), (stop - start,))
        steps = {
            name: self._rows_of(i, name, start, stop) if outcome else zeros.astype(dtype)
            for name, dtype in STEP_COLUMNS.items()
        }
        return Episode(
            task=self.spec.id,
            observations=leaves("observations", extra),
            actions=leaves("actions"),
            targets=leaves("targets") if entry["targets"] else None,
            **steps,
            instruction=self._texts(shard, names)[0],
            seed=int(self.seeds[i]),
            success=None if success < 0 else bool(success),
            info=info,
        )

    def _column(self, i: int, kind: str, path: str, start: int, stop: int) -> Any:
        rows = self._rows_of(i, kind, start, stop, path)
        if kind in self._leaves and is_text(self._leaves[kind][path]):
            return self._texts(self._place(i)[0], rows)
        return rows

    def _rows_of(self, i: int, kind: str, start: int, stop: int, path: str = "") -> np.ndarray:
        """Return rows of a column by step, counted from the beginning of episode `i`."""
        shard, row = self._place(i)
        first = int(self.ends[i] - self.lengths[i] - self._steps_before[shard])
        if kind == "observations":
            first += row  # each episode before has one row more
        return self._rows(shard, kind, path, first + start, first + stop)

    def _rows(self, shard: int, kind: str, path: str, start: int, stop: int) -> np.ndarray:
        entry = self._shards[shard]
        dtype, shape = layout(self._leaves, entry, kind, path)
        name = file_name(kind, path)
        alone = name if kind in EPISODE_COLUMNS else ""
        if self._remote is not None:
            self._remote.need(entry, alone)
        file = f"{self.path}/{entry['name']}/{name}"
        with checksum_told(entry, name):
            return self._reading(entry, lambda: read_rows(file, dtype, shape, start, stop), alone)

    def _reading(self, shard: Mapping[str, Any], read: Callable[[], T], name: str = "") -> T:
        """Return what `read` does; once more where the cache has let go of the files meanwhile."""
        try:
            return read()
        except ValueError:
            if self._remote is None or not self._remote.renew(shard, name):
                raise
        return read()

    def _folder(self, shard: Mapping[str, Any]) -> Path:
        """Return the folder of a shard, fetched where the store lies elsewhere."""
        if self._remote is not None:
            self._remote.need(shard)
        return self.path / shard["name"]

    def _place(self, i: int) -> tuple[int, int]:
        """Return the shard of an episode, and which of its episodes it is."""
        shard = int(np.searchsorted(self._first, i, side="right")) - 1
        return shard, i - int(self._first[shard])

    def _texts(self, shard: int, rows: np.ndarray) -> list[str]:
        """Return the strings that a column's indices stand for."""
        entry = self._shards[shard]
        return self._reading(entry, lambda: self._texts_of(entry, rows))

    def _texts_of(self, entry: Mapping[str, Any], rows: np.ndarray) -> list[str]:
        file = Path(f"{self.path}/{entry['name']}/{TEXTS}")
        distinct = set(rows.tolist())
        if STARTS not in entry["sha256"]:
            texts = _json(file, entry["sha256"][TEXTS])
            found = {k: texts[k] for k in distinct}
        else:
            found = {k: self._text(entry, file, k) for k in distinct}
        return [found[k] for k in rows.tolist()]

    def _text(self, entry: Mapping[str, Any], file: Path, k: int) -> str:
        shape = (entry["texts"] + 1,)
        with checksum_told(entry, STARTS):
            start, stop = read_rows(file.with_name(STARTS), np.int64, shape, k, k + 2).tolist()
        with checksum_told(entry, TEXTS):
            return str(_decoded(file, read_bytes(file, start, stop - 2)))  # ", " between two

    def _info(self, shard: int, row: int) -> dict[str, Any]:
        entry = self._shards[shard]
        if INFO not in entry["sha256"]:
            return {}
        sha256 = entry["sha256"][INFO]
        infos = self._reading(entry, lambda: _json(self._folder(entry) / INFO, sha256))
        return dict(infos[row])

    def _per_episode(self, name: str) -> np.ndarray:
        dtype = EPISODE_COLUMNS[name]
        parts = [np.zeros(0, dtype)]
        for k, shard in enumerate(self._shards):
            part = self._rows(k, name, "", 0, shard["episodes"])
            if name == "lengths" and part.sum() != shard["steps"]:
                raise ValueError(
                    f"expected {shard['steps']} steps in all in "
                    f"{self.path / shard['name'] / 'lengths.npy'}; got {part.sum()}. "
                    f"The store is damaged: make it again."
                )
            parts.append(part)
        return np.concatenate(parts)

    def _index(self, i: int) -> int:
        if not -len(self) <= i < len(self):
            raise IndexError(f"expected an episode in [0, {len(self)}); got {i}.")
        return int(i) % len(self)


Leaves = Mapping[str, Mapping[str, gym.Space]]


def leaves_of(spec: TaskSpec) -> dict[str, dict[str, gym.Space]]:
    """Return the leaves of a task by the kind of column that they are written in."""
    actions = flatten_space(spec.action_space, "action")
    observations = flatten_space(spec.observation_space, "observation")
    return {"observations": observations, "actions": actions, "targets": actions}


def check_sums(folder: Path, sums: Mapping[str, str]) -> None:
    """Raise ValueError for the first file of `folder` that is not as it was written."""
    for name, expected in sums.items():
        check_sha256(folder / name, expected)


@contextlib.contextmanager
def checksum_told(shard: Mapping[str, Any], name: str) -> Iterator[None]:
    """Add to the error about a file which one it should be."""
    try:
        yield
    except ValueError as error:
        written = shard["sha256"].get(name, "unknown")
        raise ValueError(f"{error} Its sha256 was {written:.12}.") from None


def columns(
    leaves: Leaves, shard: Mapping[str, Any]
) -> Iterator[tuple[str, str, Any, tuple[int, ...]]]:
    """Yield (kind, path, dtype, shape) of every array of a shard."""
    names = [("", name) for name in (*EPISODE_COLUMNS, *STEP_COLUMNS)]
    kinds = ("observations", "actions", *(["targets"] if shard["targets"] else []))
    for kind, path in itertools.chain(names, ((k, p) for k in kinds for p in leaves[k])):
        dtype, shape = layout(leaves, shard, kind or path, path if kind else "")
        yield kind, path, dtype, shape


def layout(
    leaves: Leaves, shard: Mapping[str, Any], kind: str, path: str
) -> tuple[Any, tuple[int, ...]]:
    """Return the dtype and shape of one array of a shard."""
    if kind in EPISODE_COLUMNS:
        return EPISODE_COLUMNS[kind], (shard["episodes"],)
    if kind in STEP_COLUMNS:
        return STEP_COLUMNS[kind], (shard["steps"],)
    leaf = leaves[kind][path]
    rows = shard["steps"] + (shard["episodes"] if kind == "observations" else 0)
    if is_text(leaf):
        return np.int32, (rows,)
    return leaf.dtype, (rows, *leaf.shape)


def is_text(leaf: gym.Space) -> bool:
    """Return whether a leaf is written as indices into the texts."""
    return isinstance(leaf, gym.spaces.Text)


@lru_cache(maxsize=4096)
def file_name(kind: str, path: str = "") -> str:
    """Return the file of a column."""
    return f"{kind}.{quote(path, safe='')}.npy" if path and kind else f"{kind or path}.npy"


@lru_cache(maxsize=8)
def _json(file: Path, checksum: str) -> Any:
    """Return what a JSON file of a shard holds; its checksum tells contents of one name apart."""
    try:
        return _decoded(file, file.read_bytes())
    except OSError as error:
        raise ValueError(
            f"expected JSON in {file}; {error.strerror}. The store is damaged: make it again."
        ) from error


def _decoded(file: Path, content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError as error:
        raise ValueError(
            f"expected JSON in {file}; {error}. The store is damaged: make it again."
        ) from error
