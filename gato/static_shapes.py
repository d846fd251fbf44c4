"""Batches padded to fixed numbers of documents, targets and payload rows, for compiled models.

A compiled model is made anew for every shape that it meets, which takes seconds to minutes; so all
batches of a run get one shape. What is padded on counts for nothing: its targets weigh 0 and belong
to no corpus, and its payload rows are added to a row past the last token, which is then dropped.

Numbers are measured on the run's first batches, rounded up with room to spare, and grow where a
batch needs more, which is told: the model is then compiled once more. Several processes take the
largest of theirs, once they have measured and whenever they save. A checkpoint keeps them.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from gato.telling import tell
from gato.tokenizers.stream import TokenBatch

MEASURED = 8
"""Batches that the numbers are measured on."""
ROOM = 1.15
"""Room above the most that was seen."""
STEP = 128
"""Numbers are multiples of so many: kernels like it."""
IMAGES = 8
"""Rows of images are multiples of so many images of a size, as these are embedded."""

Key = tuple[Any, ...]
"""``("documents",)``, ``("targets", joint modality or None)`` or ``("rows", modality, size)``."""


class Capacities:
    """The shape of every batch of a run."""

    def __init__(self, corpora: int, say: Callable[[str], None] = tell) -> None:
        """Make capacities that have seen nothing yet.

        Args:
            corpora: the number that padding's targets get as their corpus: no corpus has it.
            say: told where capacities grow.
        """
        self.corpora, self._say = corpora, say
        self.sizes: dict[Key, int] = {}
        self._examples: dict[Key, dict[str, np.ndarray]] = {}  # a row of each size
        self._ids: dict[int, int] = {}  # of joint targets by their modality: one that is allowed

    def measure(self, batches: Iterable[TokenBatch]) -> None:
        """Make room for batches like these."""
        most: dict[Key, int] = {}
        for batch in batches:
            self._remember(batch)
            for key, n in _needs(batch).items():
                most[key] = max(n, most.get(key, 0))
        for key, n in most.items():
            self.sizes[key] = max(self.sizes.get(key, 0), _rounded(n, key))

    def pad(self, batch: TokenBatch, pin: bool = False) -> TokenBatch:
        """Return the batch as tensors on the CPU, padded; in pinned memory where `pin` is set."""
        needs = _needs(batch)
        short = {k: n for k, n in needs.items() if n > self.sizes.get(k, 0)}
        if short:
            self.measure([batch])
            told = ", ".join(f"{' '.join(map(str, k))} {self.sizes[k]}" for k in short)
            self._say(f"a batch is larger than those before; from now on there is room for {told}")
        columns = self._columns(batch, pin)
        payload = {name: self._rows(batch, name, pin) for name in self._modalities()}
        joint = tuple((k[1], n) for k, n in self._targets() if k[1] is not None)
        whole: dict[str, Any] = {
            name: _filled([(getattr(batch, name), len(batch.inputs))], 0, pin)
            for name in ("inputs", "local", "position", "document")
        }
        n = len(batch.inputs)
        bounds = [(batch.cu_seqlens[: needs["documents",]], self.sizes["documents",])]
        cu_seqlens = _filled(bounds, n, pin)
        whole |= {**columns, "cu_seqlens": cu_seqlens}
        return replace(batch, **whole, payload=payload, joint=joint, spare=1)

    def state(self) -> dict[str, Any]:
        """Return what a run that goes on takes its shapes from, for JSON."""
        return {
            "sizes": [[key, size] for key, size in self.sizes.items()],
            "examples": [
                [key, {field: _to_json(value) for field, value in row.items()}]
                for key, row in self._examples.items()
            ],
            "ids": list(self._ids.items()),
        }

    def load(self, *states: Mapping[str, Any]) -> None:
        """Be what these were taken of, with room for the largest batch of any."""
        self.sizes, self._examples, self._ids = {}, {}, {}
        for state in states:
            for found, size in state["sizes"]:
                key = _key(found)
                self.sizes[key] = max(size, self.sizes.get(key, 0))
            for found, row in state["examples"]:
                if (key := _key(found)) not in self._examples:
                    self._examples[key] = {f: _from_json(value) for f, value in row.items()}
            for kind, token in state["ids"]:
                self._ids.setdefault(kind, token)

    def _targets(self) -> list[tuple[Key, int]]:
        """Return the kinds of targets in the order they stand in, and how many of each."""
        found = [(k, n) for k, n in self.sizes.items() if k[0] == "targets"]
        return sorted(found, key=lambda item: -1 if item[0][1] is None else item[0][1])

    def _columns(self, batch: TokenBatch, pin: bool) -> dict[str, torch.Tensor]:
        has = {("targets", kind): n for kind, n in _kinds(batch)}
        starts = dict(zip(has, np.cumsum([0, *has.values()]).tolist(), strict=False))
        columns: dict[str, list[Any]] = {}
        for key, size in self._targets():
            start, n = starts.get(key, 0), has.get(key, 0)
            blank = {
                "target_at": 1,
                "target_ids": 0 if key[1] is None else self._ids[key[1]],
                "target_weight": 0,
                "target_corpus": self.corpora,
                "target_modality": key[1] or 0,
                "target_slot": 0 if key[1] is None else 1,
            }
            for name, value in blank.items():
                part = getattr(batch, name)[start : start + n]
                columns.setdefault(name, []).append((part, size, value))
        return {
            name: _filled([(p, s) for p, s, _ in parts], [v for *_, v in parts], pin)
            for name, parts in columns.items()
        }

    def _modalities(self) -> list[str]:
        return sorted({k[1] for k in self.sizes if k[0] == "rows"})

    def _rows(self, batch: TokenBatch, name: str, pin: bool) -> dict[str, Any]:
        """Return a modality's payload: its rows by their size, each with padding after it.

        In place of ``host_size`` stand numbers that are the same for all batches, so that a graph
        is compiled for them: ``host_groups``, (rows, columns, rows of payload) of each size.
        """
        rows = batch.payload.get(name)
        groups = {} if rows is None else _by_size(rows)
        keys = sorted(k for k in self.sizes if k[:2] == ("rows", name))
        found: dict[str, Any] = {}
        for field in self._examples[keys[0]]:
            if field == "host_size":
                found["host_groups"] = tuple((*key[2], self.sizes[key]) for key in keys)
                continue
            parts, fills = [], []
            for key in keys:
                example = self._examples[key][field]
                chosen = groups.get(key[2])
                none = np.empty((0, *example.shape), example.dtype)
                part = none if rows is None or chosen is None else rows[field][chosen]
                parts.append((part, self.sizes[key]))
                fills.append(len(batch.inputs) if field == "at" else example)
            on_host = field.startswith("host_")
            filled = _filled(parts, fills, pin and not on_host)
            found[field] = filled.numpy() if on_host else filled
        return found

    def _remember(self, batch: TokenBatch) -> None:
        """Keep a row of each size and an id of each kind of joint target, to pad with.

        Zeros would not do: there is no image of no rows and no columns.
        """
        for name, rows in batch.payload.items():
            for size, places in _by_size(rows).items():
                key = ("rows", name, size)
                if key not in self._examples:
                    self._examples[key] = {k: _finite(v[places[0]]) for k, v in rows.items()}
        start = 0
        for kind, n in _kinds(batch):
            if kind is not None and n:
                self._ids[kind] = int(batch.target_ids[start])
            start += n


def _to_json(value: np.ndarray) -> list[Any]:
    return [value.dtype.str, value.shape, base64.b64encode(value.tobytes()).decode()]


def _from_json(found: Sequence[Any]) -> np.ndarray:
    dtype, shape, content = found
    return np.frombuffer(base64.b64decode(content), dtype).reshape(shape)


def _key(found: Sequence[Any]) -> Key:
    return tuple(tuple(part) if isinstance(part, list) else part for part in found)


def _finite(row: Any) -> np.ndarray:
    row = np.asarray(row)
    return np.nan_to_num(row) if np.issubdtype(row.dtype, np.floating) else row


def _kinds(batch: TokenBatch) -> list[tuple[int | None, int]]:
    """Return the kinds of targets in the order they stand in: None for those of the stream."""
    return [(None, len(batch.target_at) - sum(n for _, n in batch.joint)), *batch.joint]


def _needs(batch: TokenBatch) -> dict[Key, int]:
    """Return how much room a batch takes."""
    n = len(batch.inputs)
    needs: dict[Key, int] = {("documents",): int(np.searchsorted(batch.cu_seqlens, n)) + 1}
    needs |= {("targets", kind): count for kind, count in _kinds(batch)}
    for name, rows in batch.payload.items():
        for size, places in _by_size(rows).items():
            needs["rows", name, size] = len(places)
    return needs


def _by_size(rows: Mapping[str, Any]) -> dict[tuple[int, ...], np.ndarray]:
    """Return where the rows of each size stand; rows without a size all have the same, ()."""
    if "host_size" not in rows:
        return {(): np.arange(len(rows["at"]))}
    sizes = np.asarray(rows["host_size"])
    known = np.unique(sizes, axis=0)
    return {tuple(size.tolist()): np.flatnonzero((sizes == size).all(1)) for size in known}


def _rounded(n: int, key: Key) -> int:
    """Return `n` with room to spare: whole images, so that no rest is left to be filled up."""
    block = IMAGES * math.prod(key[2]) if key[0] == "rows" and key[2] else STEP
    return block * math.ceil(max(n, 1) * ROOM / block)


def _filled(parts: Sequence[tuple[np.ndarray, int]], fill: Any, pin: bool) -> torch.Tensor:
    """Return the parts one after another, each filled up to its size with its `fill`."""
    fills = fill if isinstance(fill, list) else [fill] * len(parts)
    first = torch.from_numpy(np.ascontiguousarray(parts[0][0]))
    total = sum(size for _, size in parts)
    out = torch.empty((total, *first.shape[1:]), dtype=first.dtype, pin_memory=pin)
    view, at = out.numpy(), 0
    for (part, size), value in zip(parts, fills, strict=True):
        view[at : at + len(part)] = part
        view[at + len(part) : at + size] = value
        at += size
    return out
