"""Corpora: stores on disk as sources of token sequences, each sample a pure function of its rng.

A corpus owns roles and weights: how many steps a window has, how often it is preceded by a prompt,
whether past actions are shown. The serializer owns how a sample is written.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from gato.envs.records import RecordStore
from gato.envs.store import EpisodeStore, open_store
from gato.tokenizers.serializer import SerializedEpisode, Serializer
from gato.tokenizers.stream import TokenSequence, concatenate


@dataclass(frozen=True)
class CorpusConfig:
    """One corpus of a mixture."""

    name: str
    """What it is called in logs."""
    path: str
    """A store, or a folder of stores (one per task), sampled equally."""
    weight: float = 1.0
    """Its share of the tokens of a batch, relative to the other corpora."""
    window: int = 0
    """Steps per episode window; 0 takes as many as fit in a row. The policy's memory is the same
    number of steps, so that what is trained is what is deployed."""
    prompt: float = 0.25
    """Probability that a window is preceded by steps of another episode of the same task."""
    prompt_steps: int = 1
    """Steps of a prompt; half of them are an episode's last steps, half lie anywhere."""
    hide_actions: float = 0.0
    """Probability that a step's action tokens are shown as <masked>; 1 also at rollout."""
    temperature: float = 0.0
    """Temperature of the actions sampled at rollout; 0 takes the likeliest."""
    loss_weight: float = 1.0
    """Weight of the corpus' mean loss, beside its share of the tokens."""

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf or self.window < 0 or self.prompt_steps < 1:
            raise ValueError(
                f"corpus {self.name!r}: weight and window must not be negative and prompt_steps "
                f"must be at least 1; got {self.weight}, {self.window} and {self.prompt_steps}"
            )
        for name in ("prompt", "hide_actions"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"corpus {self.name!r}: {name} is a probability")


class Corpus(Protocol):
    """A source of sequences of at most `limit` tokens."""

    config: CorpusConfig

    def sample(self, rng: np.random.Generator, limit: int) -> TokenSequence:
        """Return one sequence; a pure function of the generator's state."""

    def contents(self) -> dict[str, Any]:
        """Return how much it holds and, of episodes, the range of seeds: kept in checkpoints."""


def open_corpus(config: CorpusConfig, serializer: Serializer) -> Corpus:
    """Return the corpus at ``config.path``, adding its tasks to the serializer where new.

    Raises:
        ValueError: where no store lies there, or it is empty.
    """
    root = Path(config.path)
    folders = (
        [root]
        if (root / "manifest.json").exists()
        else sorted(p.parent for p in root.glob("**/manifest.json"))
    )
    if not folders:
        raise ValueError(
            f"corpus {config.name!r}: expected a store or a folder of stores at {root}; found none"
        )
    stores = [open_store(f) for f in folders]
    records = [s for s in stores if isinstance(s, RecordStore)]
    episodes = [s for s in stores if isinstance(s, EpisodeStore)]
    if records and episodes:
        raise ValueError(
            f"corpus {config.name!r}: expected stores of one kind at {root}; got episodes in "
            f"{episodes[0].path} and records in {records[0].path}"
        )
    if records:
        return RecordCorpus(config, records, serializer)
    return EpisodeCorpus(config, episodes, serializer)


class EpisodeCorpus:
    """Windows of logged episodes, their actions to be predicted."""

    cache_bytes = 256 << 20

    def __init__(
        self, config: CorpusConfig, stores: list[EpisodeStore], serializer: Serializer
    ) -> None:
        empty = [s.spec.id for s in stores if len(s) == 0]
        if empty:
            raise ValueError(f"corpus {config.name!r} holds no episodes for {', '.join(empty)}")
        self.config, self.stores, self.serializer = config, stores, serializer
        self._ends = [np.cumsum(s.lengths) for s in stores]
        self._cache: OrderedDict[tuple[int, int], SerializedEpisode] = OrderedDict()
        self._cached = 0

    def contents(self) -> dict[str, Any]:
        seeds = np.concatenate([s.seeds for s in self.stores])
        return {"episodes": len(seeds), "seeds": [int(seeds.min()), int(seeds.max())]}

    def sample(self, rng: np.random.Generator, limit: int) -> TokenSequence:
        which = int(rng.integers(len(self.stores)))
        store = self.stores[which]
        # one draw over all steps: every logged step is as likely as any other
        ends = self._ends[which]
        step = int(rng.integers(ends[-1]))
        index = int(np.searchsorted(ends, step, side="right"))
        within = step - int(ends[index] - store.lengths[index])
        written = self._serialized(which, index)
        head = written.head
        parts, used = [head], len(head)
        prompted = len(store) > 1 and rng.random() < self.config.prompt
        if prompted:
            other = int(rng.integers(len(store) - 1))
            piece = self._prompt(which, other + (other >= index), rng)
            if used + len(piece) + self._step_tokens(written, within) <= limit:
                parts.append(piece)
                used += len(piece)
        stop = self._stop(written, within, limit - used)
        parts.append(written.window(within, stop))
        sequence = concatenate(parts)
        if self.config.hide_actions > 0:
            sequence = self._hide(sequence, rng)
        return sequence

    def _prompt(self, which: int, index: int, rng: np.random.Generator) -> TokenSequence:
        """Return the prompt steps of an episode: its end or, half the time, anywhere."""
        written = self._serialized(which, index)
        n = min(self.config.prompt_steps, len(written))
        at_end = rng.random() < 0.5
        start = len(written) - n if at_end else int(rng.integers(len(written) - n + 1))
        return written.window(start, start + n)

    def _step_tokens(self, written: SerializedEpisode, step: int) -> int:
        return int(written.starts[step + 1] - written.starts[step])

    def _stop(self, written: SerializedEpisode, start: int, room: int) -> int:
        """Return where a window from `start` ends: at its steps, or where the row is full."""
        last = len(written)
        if self.config.window:
            last = min(last, start + self.config.window)
        fits = int(np.searchsorted(written.starts, written.starts[start] + room, side="right")) - 1
        if fits <= start:
            raise ValueError(
                f"corpus {self.config.name!r}: one step takes {self._step_tokens(written, start)} "
                f"tokens and {max(room, 0)} are left in a row; train with a longer row"
            )
        return min(last, fits)

    def _hide(self, sequence: TokenSequence, rng: np.random.Generator) -> TokenSequence:
        """Return the sequence with whole steps' actions shown as <masked>."""
        actions = sequence.target > 0
        if self.config.hide_actions >= 1:
            return sequence.hide(actions)
        first = actions & ~np.concatenate([[False], actions[:-1]])
        step = np.cumsum(first)
        chosen = rng.random(int(step[-1]) + 1) < self.config.hide_actions
        return sequence.hide(actions & chosen[step])

    def _serialized(self, which: int, index: int) -> SerializedEpisode:
        key = (which, index)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        written = self.serializer.episode(self.stores[which].episode(index))
        self._cache[key] = written
        self._cached += _bytes(written)
        while self._cached > self.cache_bytes and len(self._cache) > 1:
            self._cached -= _bytes(self._cache.popitem(last=False)[1])
        return written


def _bytes(written: SerializedEpisode) -> int:
    rows = sum(v.nbytes for r in written.steps.payload.values() for v in r.values())
    return rows + 11 * len(written.steps)


class RecordCorpus:
    """Documents, captions and conversations."""

    cache_entries = 50_000

    def __init__(
        self, config: CorpusConfig, stores: list[RecordStore], serializer: Serializer
    ) -> None:
        if not all(len(s) for s in stores):
            raise ValueError(f"corpus {config.name!r} at {config.path} holds an empty store")
        self.config, self.stores, self.serializer = config, stores, serializer
        self._cache: OrderedDict[tuple[int, int], TokenSequence] = OrderedDict()

    def contents(self) -> dict[str, Any]:
        return {"records": sum(map(len, self.stores))}

    def sample(self, rng: np.random.Generator, limit: int) -> TokenSequence:
        which = int(rng.integers(len(self.stores)))
        index = int(rng.integers(len(self.stores[which])))
        sequence = self._written(which, index)
        if len(sequence) <= limit:
            return sequence
        if sequence.payload:
            return self._beginning(sequence, limit)
        # A long text gives a window of itself; <bos> stands before it as before every example.
        start = int(rng.integers(1, len(sequence) - limit + 2))
        return concatenate([sequence.slice(0, 1), sequence.slice(start, start + limit - 1)])

    def _beginning(self, sequence: TokenSequence, limit: int) -> TokenSequence:
        """Return as much of a sequence as fits without cutting an image in two."""
        held = np.zeros(len(sequence) + 1, bool)
        for rows in sequence.payload.values():
            held[rows["at"]] = True
        stop = limit
        while stop > 0 and held[stop - 1] and held[stop]:
            stop -= 1
        beginning = sequence.slice(0, stop)
        if not beginning.target.any():
            raise ValueError(
                f"corpus {self.config.name!r}: a record takes {len(sequence)} tokens and predicts "
                f"nothing in its first {limit}, a row; train with a longer row"
            )
        return beginning

    def _written(self, which: int, index: int) -> TokenSequence:
        key = (which, index)
        if key in self._cache:
            return self._cache[key]
        record = self.stores[which][index]
        match record["kind"]:
            case "document":
                written = self.serializer.document(record["text"])
            case "caption":
                written = self.serializer.caption(record["image"], record["text"])
            case "conversation":
                written = self.serializer.conversation(record["messages"])
            case other:
                raise ValueError(f"corpus {self.config.name!r}: unknown kind of record {other!r}")
        self._cache[key] = written
        if len(self._cache) > self.cache_entries:
            self._cache.popitem(last=False)
        return written
