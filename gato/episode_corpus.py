"""Windows of logged episodes as token sequences, their actions to be predicted.

Only the steps of a window are read and written, so that a sample costs the same from a store of
any size, out of episodes of any length; short episodes are kept whole while there is room.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gato.corpus_config import CorpusConfig
from gato.envs.store import EpisodeStore
from gato.kept import Kept, bytes_of
from gato.tokenizers.serializer import SerializedEpisode, Serializer
from gato.tokenizers.stream import TokenSequence, concatenate


class EpisodeCorpus:
    """Windows of logged episodes, their actions to be predicted."""

    def __init__(
        self, config: CorpusConfig, stores: list[EpisodeStore], serializer: Serializer
    ) -> None:
        empty = [s.spec.id for s in stores if len(s) == 0]
        if empty:
            raise ValueError(f"corpus {config.name!r} holds no episodes for {', '.join(empty)}")
        self.config, self.stores, self.serializer = config, stores, serializer
        self._ends = [np.cumsum(s.lengths) for s in stores]
        self._kept = Kept()
        self._tokens: dict[int, int] = {}  # by store: of a step written last
        self._step_bytes: dict[int, float] = {}  # by store: of a step once it is written

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
        written, at = self._written(which, index, within, limit)
        head = written.head
        parts, used = [head], len(head)
        prompted = len(store) > 1 and rng.random() < self.config.prompt
        if prompted:
            other = int(rng.integers(len(store) - 1))
            piece = self._prompt(which, other + (other >= index), rng)
            if used + len(piece) + self._step_tokens(written, at) <= limit:
                parts.append(piece)
                used += len(piece)
        stop = self._stop(written, at, limit - used)
        parts.append(written.window(at, stop))
        sequence = concatenate(parts)
        if self.config.hide_actions > 0:
            sequence = self._hide(sequence, rng)
        return sequence

    def _prompt(self, which: int, index: int, rng: np.random.Generator) -> TokenSequence:
        """Return the prompt steps of an episode: its end or, half the time, anywhere."""
        length = int(self.stores[which].lengths[index])
        n = min(self.config.prompt_steps, length)
        at_end = rng.random() < 0.5
        start = length - n if at_end else int(rng.integers(length - n + 1))
        kept = self._kept.get((which, index))
        if kept is not None:
            return kept.window(start, start + n)
        return self._write(which, index, start, start + n).window(0, n)

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

    def _written(
        self, which: int, index: int, start: int, room: int
    ) -> tuple[SerializedEpisode, int]:
        """Return at least the steps that fit in `room` tokens from `start`, and where it lies."""
        kept = self._kept.get((which, index))
        if kept is not None:
            return kept, start
        length = int(self.stores[which].lengths[index])
        if self._kept.takes(self._step_bytes.get(which, math.inf) * length):
            whole = self._write(which, index, 0, length)
            self._kept.put((which, index), whole, _bytes(whole))
            return whole, start
        last = min(length, start + self.config.window) if self.config.window else length
        even = self._even(which)
        pieces: list[SerializedEpisode] = []
        while start < last:
            tokens = self._tokens.get(which, room)  # nothing is known yet: begin with one step
            ahead = max(1, room // tokens + (not even))
            pieces.append(self._write(which, index, start, min(last, start + ahead)))
            start += len(pieces[-1])
            room -= int(pieces[-1].starts[-1])
            if room < (self._tokens[which] if even else 0):
                break
        return _join(pieces), 0

    def _even(self, which: int) -> bool:
        """Return whether all steps of a store take equally many tokens."""
        task = self.serializer.task(self.stores[which].spec.id)
        return all(modality != "text" for _, modality, _ in (*task.observation, *task.action))

    def _write(self, which: int, index: int, start: int, stop: int) -> SerializedEpisode:
        store = self.stores[which]
        try:
            written = self.serializer.episode(store.window(index, start, stop))
        except ValueError as error:
            raise ValueError(
                f"corpus {self.config.name!r}, episode {index} of {store.path}: {error}"
            ) from error
        self._tokens[which] = self._step_tokens(written, len(written) - 1)
        self._step_bytes[which] = _bytes(written) / len(written)
        return written


def _join(pieces: list[SerializedEpisode]) -> SerializedEpisode:
    """Return the steps of all pieces, each going on where the one before ends."""
    if len(pieces) == 1:
        return pieces[0]
    lengths = np.concatenate([np.diff(p.starts) for p in pieces])
    return SerializedEpisode(
        pieces[0].head,
        concatenate([p.steps for p in pieces]),
        np.cumsum([0, *lengths]),
        np.concatenate([p.actions for p in pieces]),
    )


def _bytes(written: SerializedEpisode) -> int:
    own = written.starts.nbytes + written.actions.nbytes
    return bytes_of(written.head) + bytes_of(written.steps) + own
