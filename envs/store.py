"""Episode stores: episodes of one task on disk, by column, memory-mapped.

A store is a folder that numpy alone can read:

```
manifest.json                  spec, settings, versions, and the shards with their checksums
shard-00000-000041/            shard 0, which holds 41 episodes
  lengths.npy returns.npy seeds.npy successes.npy instructions.npy     an entry per episode
  rewards.npy terminated.npy truncated.npy                             an entry per step
  actions.<path>.npy targets.<path>.npy                                an entry per step
  observations.<path>.npy                                              one more per episode
  texts.json                   distinct strings; columns of text are int32 indices into them
  info.json                    a dict per episode, where any has one
```

A shard counts once the manifest, replaced atomically, names it: a writer killed at any instant
leaves a store of complete shards. Shards follow from the sequence of episodes alone, because a
writer that opens a store continues its last, short shard.

Convention: successes are 1, 0, and -1 where the task defines no success; rewards are float32; the
"/" of a path is "%2F" in a file name.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import weakref
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import gymnasium as gym
import numpy as np

from gato.envs.check import check_episode, check_goes_on
from gato.envs.episode import Episode, TaskSpec, flatten_space
from gato.envs.files import (
    array_bytes,
    check_sha256,
    load_array,
    lock_folder,
    read_manifest,
    store_format,
    sync_folder,
    write_atomically,
    write_synced,
)
from gato.envs.records import FORMAT as RECORDS
from gato.envs.records import RecordStore, RecordWriter

__all__ = ["EpisodeStore", "EpisodeWriter", "RecordStore", "RecordWriter", "open_store"]

FORMAT = "gato-episodes-1"
SHARD_BYTES = 32 << 20
_EPISODE = ("lengths", "returns", "seeds", "successes", "instructions")
_STEP = ("rewards", "terminated", "truncated")


class EpisodeWriter:
    """Appends episodes of one task to a store; opening an existing store goes on with it.

    One at a time: until `close`, others that would write to the same store are refused.

    Args:
        path: the store's folder.
        spec: the task; episodes must fit its spaces.
        shard_steps: steps after which a shard is closed; by default about 32 MiB worth.
        settings: how the episodes are made; a store goes on only under the settings it began with.
        versions: of the packages that make them, kept in the manifest; a store goes on only under
            those it began with, but for python's and numpy's.
    """

    def __init__(
        self,
        path: str | Path,
        spec: TaskSpec,
        shard_steps: int | None = None,
        *,
        settings: Mapping[str, Any] | None = None,
        versions: Mapping[str, str] | None = None,
    ) -> None:
        self.path, self.spec = Path(path), spec
        self._shard_steps = shard_steps or _default_shard_steps(spec)
        self._pending: list[Episode] = []
        self._dirty = False
        self._manifest: dict[str, Any] = {
            "format": FORMAT,
            "spec": spec.to_json(),
            "settings": json.loads(json.dumps({**(settings or {})})),
            "versions": {"numpy": np.__version__, **(versions or {})},
            "shards": [],
        }
        self.path.mkdir(parents=True, exist_ok=True)
        self._unlock = weakref.finalize(self, os.close, lock_folder(self.path, wait=False))
        try:
            if (self.path / "manifest.json").exists():
                self._go_on()
            else:
                self._write_manifest()
            self._sweep()
        except BaseException:
            self._unlock()
            raise

    def __len__(self) -> int:
        """Return the number of episodes so far, written or pending."""
        closed = (s["episodes"] for s in self._manifest["shards"] if not s["open"])
        return sum(closed) + len(self._pending)

    @property
    def last_seed(self) -> int:
        """The seed of the last episode so far."""
        if self._pending:
            return self._pending[-1].seed
        return int(EpisodeStore(self.path).seeds[-1])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def append(self, episode: Episode) -> None:
        """Add an episode; it is on disk after the next `flush`, `close` or full shard.

        Raises:
            ValueError: for an episode that does not fit the spec, or holds a number that is not
                finite or an action outside its space; nothing is added then.
        """
        check_episode(episode, self.spec)
        if self._pending and (self._pending[0].targets is None) != (episode.targets is None):
            raise ValueError(f"expected targets in all episodes of {self.path} or in none.")
        self._pending.append(episode)
        self._dirty = True
        if sum(map(len, self._pending)) >= self._shard_steps:
            self._write(is_open=False)
            self._pending = []

    def flush(self) -> None:
        """Write what is pending, so that a kill from here on loses none of it."""
        if self._dirty:
            self._write(is_open=True)

    def close(self) -> None:
        """Write what is pending; the store may be opened again to go on."""
        try:
            self.flush()
        finally:
            self._unlock()

    def _write(self, *, is_open: bool) -> None:
        closed = [s for s in self._manifest["shards"] if not s["open"]]
        entry = _write_shard(self.path, len(closed), self._pending, self.spec)
        self._manifest["shards"] = [*closed, {**entry, "open": is_open}]
        self._write_manifest()
        self._dirty = False
        self._sweep()

    def _go_on(self) -> None:
        old, new = read_manifest(self.path, FORMAT), self._manifest
        check_goes_on(self.path, old, new)
        self._manifest = old
        if old["shards"] and old["shards"][-1]["open"]:
            store = EpisodeStore(self.path)
            first = len(store) - old["shards"][-1]["episodes"]
            self._pending = [store.episode(i) for i in range(first, len(store))]

    def _write_manifest(self) -> None:
        text = json.dumps(self._manifest, indent=1, allow_nan=False)
        write_atomically(self.path / "manifest.json", text.encode())

    def _sweep(self) -> None:
        """Remove what the manifest does not name: half-written shards and those that grew."""
        named = {s["name"] for s in self._manifest["shards"]}
        for folder in self.path.glob("*shard-*"):
            if folder.name not in named:
                shutil.rmtree(folder)
        for file in self.path.glob(".manifest.json.*"):
            file.unlink()


class EpisodeStore:
    """Reads a store; a window of an episode is read without touching the rest.

    `spec` is the task, `settings` how the episodes were made; `lengths`, `returns`, `successes`
    and `seeds` have an entry per episode.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest = read_manifest(self.path, FORMAT)
        self.spec = TaskSpec.from_json(self.manifest["spec"])
        self.settings: dict[str, Any] = self.manifest["settings"]
        self._shards = self.manifest["shards"]
        self._text_paths = _text_paths(self.spec)
        self._first = np.cumsum([0, *(s["episodes"] for s in self._shards)])
        self.lengths = self._per_episode("lengths", np.int64)
        self.returns = self._per_episode("returns", np.float64)
        self.successes = self._per_episode("successes", np.int8)
        self.seeds = self._per_episode("seeds", np.int64)
        starts = np.cumsum([0, *self.lengths])
        shard_of = np.searchsorted(self._first, np.arange(len(self)), side="right") - 1
        self._start = starts[:-1] - starts[self._first[shard_of]]  # of an episode in its shard
        self._open = lru_cache(maxsize=64)(self._open_shard)

    def __len__(self) -> int:
        return len(self.lengths)

    def __repr__(self) -> str:
        steps = int(self.lengths.sum())
        return f"EpisodeStore({self.spec.id!r}, {len(self)} episodes, {steps} steps)"

    def __reduce__(self) -> tuple[type[EpisodeStore], tuple[Path]]:
        return EpisodeStore, (self.path,)

    def episode(self, i: int) -> Episode:
        """Return episode `i`; it has one observation more than decisions."""
        i = self._index(i)
        return self._cut(i, 0, int(self.lengths[i]), 1)

    def window(self, i: int, start: int, stop: int) -> Episode:
        """Return decisions [start, stop) of episode `i` with as many observations."""
        i = self._index(i)
        if not 0 <= start < stop <= self.lengths[i]:
            raise ValueError(
                f"expected a window in episode {i} of length {self.lengths[i]}; "
                f"got [{start}, {stop})."
            )
        return self._cut(i, start, stop, 0)

    def validate(self) -> None:
        """Read everything once.

        Raises:
            ValueError: naming the first file or episode that is not as it was written.
        """
        for shard in self._shards:
            for name, expected in shard["sha256"].items():
                check_sha256(self.path / shard["name"] / name, expected)
        for i in range(len(self)):
            check_episode(self.episode(i), self.spec)

    def _cut(self, i: int, start: int, stop: int, extra: int) -> Episode:
        shard = int(np.searchsorted(self._first, i, side="right")) - 1
        columns, texts, info = self._open(shard)
        row = i - int(self._first[shard])
        a, b = int(self._start[i]) + start, int(self._start[i]) + stop
        observations = {
            path: values[a + row : b + row + extra]  # each episode before has one row more
            for path, values in columns["observations"].items()
        }
        for path in self._text_paths:
            observations[path] = [texts[k] for k in observations[path]]
        success = int(self.successes[i])
        return Episode(
            task=self.spec.id,
            observations=observations,
            actions={path: values[a:b] for path, values in columns["actions"].items()},
            targets={path: values[a:b] for path, values in columns["targets"].items()} or None,
            **{name: columns[""][name][a:b] for name in _STEP},
            instruction=texts[int(columns[""]["instructions"][row])],
            seed=int(self.seeds[i]),
            success=None if success < 0 else bool(success),
            info=info[row] if info else {},
        )

    def _open_shard(self, shard: int) -> tuple[dict[str, dict[str, np.ndarray]], list, list]:
        entry = self._shards[shard]
        folder = self.path / entry["name"]
        columns: dict[str, dict[str, np.ndarray]] = {
            kind: {path: load_array(folder / _file(kind, path), mmap=True) for path in paths}
            for kind, paths in _columns(self.spec, entry["targets"]).items()
        }
        texts, info = (
            json.loads((folder / name).read_text(encoding="utf-8"))
            if name in entry["sha256"]
            else []
            for name in ("texts.json", "info.json")
        )
        return columns, texts, info

    def _per_episode(self, name: str, dtype: type) -> np.ndarray:
        parts = [np.zeros(0, dtype)]
        for shard in self._shards:
            file = self.path / shard["name"] / f"{name}.npy"
            part = load_array(file)
            steps = part.sum() if name == "lengths" and part.dtype.kind == "i" else shard["steps"]
            if part.shape != (shard["episodes"],) or part.dtype != dtype or steps != shard["steps"]:
                raise ValueError(
                    f"expected {shard['episodes']} {np.dtype(dtype)} in {file}, of {shard['steps']}"
                    f" steps in all; got {part.dtype} {part.shape}. The store is damaged: make it "
                    f"again."
                )
            parts.append(part)
        return np.concatenate(parts)

    def _index(self, i: int) -> int:
        if not -len(self) <= i < len(self):
            raise IndexError(f"expected an episode in [0, {len(self)}); got {i}.")
        return int(i) % len(self)


def open_store(path: str | Path) -> EpisodeStore | RecordStore:
    """Return the store at `path`, of episodes or of records, as its manifest says.

    Raises:
        ValueError: where there is none, or it is damaged.
    """
    records = store_format(Path(path)) == RECORDS
    return RecordStore(path) if records else EpisodeStore(path)


def _write_shard(
    root: Path, number: int, episodes: Sequence[Episode], spec: TaskSpec
) -> dict[str, Any]:
    """Write one shard and return its entry in the manifest."""
    name = f"shard-{number:05d}-{len(episodes):06d}"
    targets = episodes[0].targets is not None
    texts: dict[str, int] = {}
    contents = {
        _file(kind, path): array_bytes(_column(kind, path, episodes, spec, texts))
        for kind, paths in _columns(spec, targets).items()
        for path in paths
    }
    contents["texts.json"] = json.dumps(list(texts), ensure_ascii=False).encode()
    if any(e.info for e in episodes):
        contents["info.json"] = json.dumps([dict(e.info) for e in episodes]).encode()
    temporary = root / f".{name}.{os.getpid()}.tmp"
    temporary.mkdir()
    try:
        sums = {n: write_synced(temporary / n, content) for n, content in contents.items()}
        sync_folder(temporary)
        temporary.replace(root / name)
        sync_folder(root)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    steps = sum(map(len, episodes))
    return {"name": name, "episodes": len(episodes), "steps": steps, "targets": targets} | {
        "sha256": sums
    }


def _column(
    kind: str, path: str, episodes: Sequence[Episode], spec: TaskSpec, texts: dict[str, int]
) -> np.ndarray:
    """Return one column of a shard; strings are entered into `texts` and become indices."""

    def index(text: str) -> int:
        return texts.setdefault(text, len(texts))

    if kind:
        if kind == "observations" and path in _text_paths(spec):
            rows = [index(text) for e in episodes for text in e.observations[path]]
            return np.array(rows, np.int32)
        space = spec.observation_space if kind == "observations" else spec.action_space
        leaf = flatten_space(space, "observation" if kind == "observations" else "action")[path]
        return np.concatenate([getattr(e, kind)[path] for e in episodes]).astype(leaf.dtype)
    match path:
        case "lengths":
            return np.array([len(e) for e in episodes], np.int64)
        case "returns":
            return np.array([e.score for e in episodes], np.float64)
        case "seeds":
            return np.array([e.seed for e in episodes], np.int64)
        case "successes":
            return np.array([-1 if e.success is None else e.success for e in episodes], np.int8)
        case "instructions":
            return np.array([index(e.instruction) for e in episodes], np.int32)
    dtype = np.float32 if path == "rewards" else np.bool_
    return np.concatenate([getattr(e, path) for e in episodes]).astype(dtype)


def _columns(spec: TaskSpec, targets: bool) -> dict[str, list[str]]:
    actions = list(flatten_space(spec.action_space, "action"))
    return {
        "": [*_EPISODE, *_STEP],
        "observations": list(flatten_space(spec.observation_space, "observation")),
        "actions": actions,
        "targets": actions if targets else [],
    }


def _file(kind: str, path: str) -> str:
    return f"{kind}.{quote(path, safe='')}.npy" if kind else f"{path}.npy"


def _text_paths(spec: TaskSpec) -> list[str]:
    leaves = flatten_space(spec.observation_space, "observation")
    return [path for path, leaf in leaves.items() if isinstance(leaf, gym.spaces.Text)]


def _default_shard_steps(spec: TaskSpec) -> int:
    leaves = flatten_space(spec.observation_space, "observation").values()
    per_step = sum(4 if leaf.shape is None else _bytes(leaf) for leaf in leaves)
    return min(max(SHARD_BYTES // max(per_step, 1), 256), 1 << 16)


def _bytes(leaf: gym.Space) -> int:
    size = math.prod(leaf.shape or ())
    return size * (np.dtype(leaf.dtype).itemsize if leaf.dtype is not str else 4)
