"""Writing an episode store; its folder is drawn in `gato.envs.store`."""

from __future__ import annotations

import json
import math
import os
import shutil
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import gymnasium as gym
import numpy as np

from gato.envs.check import check_episode, check_goes_on
from gato.envs.episode import Episode, TaskSpec, flatten_space
from gato.envs.files import (
    array_bytes,
    lock_folder,
    read_manifest,
    sync_folder,
    write_atomically,
    write_synced,
)
from gato.envs.store_reader import (
    FORMAT,
    INFO,
    STARTS,
    TEXTS,
    EpisodeStore,
    columns,
    file_name,
    is_text,
    leaves_of,
)

SHARD_BYTES = 32 << 20
TEXT_BYTES = 4096
"""Of a shard's texts, above which it is written where each begins, so that they are read singly."""


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
        self._shard_steps = shard_steps or default_shard_steps(spec)
        self._pending: list[Episode] = []
        self._steps = 0  # of what is pending
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
        self._steps += len(episode)
        self._dirty = True
        if self._steps >= self._shard_steps:
            self._write(is_open=False)
            self._pending, self._steps = [], 0

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
            self._steps = sum(map(len, self._pending))

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


def _write_shard(
    root: Path, number: int, episodes: Sequence[Episode], spec: TaskSpec
) -> dict[str, Any]:
    """Write one shard and return its entry in the manifest."""
    name = f"shard-{number:05d}-{len(episodes):06d}"
    entry = {
        "name": name,
        "episodes": len(episodes),
        "steps": sum(map(len, episodes)),
        "targets": episodes[0].targets is not None,
    }
    leaves = leaves_of(spec)
    texts: dict[str, int] = {}
    contents: dict[str, bytes] = {}
    for kind, path, dtype, _ in columns(leaves, entry):
        column = _column(kind, path, episodes, leaves, texts).astype(dtype)
        contents[file_name(kind, path)] = array_bytes(column)
    contents |= _texts(entry, list(texts))
    if any(e.info for e in episodes):
        contents[INFO] = json.dumps([dict(e.info) for e in episodes]).encode()
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
    return entry | {"sha256": sums}


def _texts(entry: dict[str, Any], texts: list[str]) -> dict[str, bytes]:
    """Return the files of a shard's strings; their number is entered where they are many."""
    written = [json.dumps(text, ensure_ascii=False).encode() for text in texts]
    content = b"[" + b", ".join(written) + b"]"
    if len(content) <= TEXT_BYTES:
        return {TEXTS: content}
    entry["texts"] = len(texts)
    starts = 1 + np.cumsum([0, *(len(text) + 2 for text in written)])
    return {TEXTS: content, STARTS: array_bytes(starts.astype(np.int64))}


def _column(
    kind: str,
    path: str,
    episodes: Sequence[Episode],
    leaves: Mapping[str, Mapping[str, gym.Space]],
    texts: dict[str, int],
) -> np.ndarray:
    """Return one column of a shard; strings are entered into `texts` and become indices."""

    def index(text: str) -> int:
        return texts.setdefault(text, len(texts))

    if kind:
        if is_text(leaves[kind][path]):
            return np.array([index(text) for e in episodes for text in getattr(e, kind)[path]])
        return np.concatenate([getattr(e, kind)[path] for e in episodes])
    match path:
        case "lengths":
            return np.array([len(e) for e in episodes])
        case "returns":
            return np.array([e.score for e in episodes])
        case "seeds":
            return np.array([e.seed for e in episodes])
        case "successes":
            return np.array([-1 if e.success is None else e.success for e in episodes])
        case "instructions":
            return np.array([index(e.instruction) for e in episodes])
    return np.concatenate([getattr(e, path) for e in episodes])


def default_shard_steps(spec: TaskSpec) -> int:
    """Return after how many steps a shard is closed: about `SHARD_BYTES`, within limits."""
    leaves = flatten_space(spec.observation_space, "observation").values()
    per_step = sum(4 if leaf.shape is None else _bytes(leaf) for leaf in leaves)
    return min(max(SHARD_BYTES // max(per_step, 1), 256), 1 << 16)


def _bytes(leaf: gym.Space) -> int:
    size = math.prod(leaf.shape or ())
    return size * (np.dtype(leaf.dtype).itemsize if leaf.dtype is not str else 4)
