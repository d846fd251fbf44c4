"""Windows of logged episodes as token sequences, their actions to be predicted."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np

from gato.corpus_config import CorpusConfig
from gato.envs.store import EpisodeStore
from gato.tokenizers.serializer import SerializedEpisode, Serializer
from gato.tokenizers.stream import TokenSequence, concatenate


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
