"""Windows of logged episodes as token sequences, their actions to be predicted.

Only the steps of a window are read and written, so that a sample costs the same from a store of
any size, out of episodes of any length; short episodes are kept whole while there is room.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gato.contents import digests, evaluation_seeds
from gato.corpus_config import CorpusConfig, without_effect
from gato.envs.store import EpisodeStore
from gato.kept import Kept, bytes_of
from gato.selection import check_stores, cumulative_shares, divide, good_episodes, pick
from gato.tokenizers.serializer import Serializer
from gato.tokenizers.steps import SerializedEpisode
from gato.tokenizers.stream import TokenSequence, concatenate
from gato.tokenizers.task_codec import to_come


class EpisodeCorpus:
    """Windows of logged episodes, their actions to be predicted."""

    def __init__(
        self,
        config: CorpusConfig,
        stores: list[EpisodeStore],
        serializer: Serializer,
        *,
        held: bool = False,
    ) -> None:
        """Make the corpus of what is trained on, or with `held` of what is held out.

        Raises:
            ValueError: for a store that is empty, of which filters leave nothing, or that shows
                another task under the name of one before it.
        """
        check_stores(config, stores)
        good = [good_episodes(config, s) for s in stores]
        names, numbers = [s.spec.id for s in stores], [s.numbers for s in stores]
        chosen = divide(config, [g for g, _ in good], names, numbers=numbers, held=held)
        self.config, self.serializer = config, serializer
        self._all, self._filtered = stores, good
        self.stores = [s for s, items in zip(stores, chosen, strict=True) if len(items)]
        self.items = [items for items in chosen if len(items)]
        """Per store, the episodes that are drawn."""
        self._ends = [np.cumsum(s.lengths[i]) for s, i in zip(self.stores, self.items, strict=True)]
        self._shares = cumulative_shares(config, [int(ends[-1]) for ends in self._ends])
        self.kept = Kept()
        self._tokens: dict[int, int] = {}  # by store: of a step written last
        self._step_bytes: dict[int, float] = {}  # by store: of its first step written

    def contents(self) -> dict[str, Any]:
        seeds = np.concatenate([s.seeds[i] for s, i in zip(self.stores, self.items, strict=True)])
        found: dict[str, Any] = {
            "episodes": len(seeds),
            "seeds": [int(seeds.min()), int(seeds.max())],
        }
        found |= {"evaluation_seeds": evaluation_seeds(seeds), "stores": digests(self._all)}
        good = sum(int(kept.sum()) for kept, _ in self._filtered)
        left_out = sum(map(len, self._all)) - good
        counts = {"left_out": left_out, "held_out": good - len(seeds)}
        counted = {name: count for name, count in counts.items() if count}
        skipped = {"skipped": list(self.config.skip)} if self.config.skip else {}
        return found | counted | skipped

    def held_out(self) -> EpisodeCorpus | None:
        """Return the corpus of what is never trained on; None where nothing is held out."""
        if not self.config.validation:
            return None
        return EpisodeCorpus(self.config, self._all, self.serializer, held=True)

    def notes(self) -> list[str]:
        """Return which episodes are left out and why, and which settings have no effect."""
        return without_effect(self.config, episodes=True) + [
            f"corpus {self.config.name!r}: {np.count_nonzero(~kept)} of {len(store)} episodes of "
            f"{store.spec.id!r} are left out; asked for: {rule}"
            for store, (kept, rule) in zip(self._all, self._filtered, strict=True)
            if not kept.all()
        ]

    def sample(self, rng: np.random.Generator, limit: int) -> TokenSequence:
        which = pick(rng, len(self.stores), self._shares)
        store, items = self.stores[which], self.items[which]
        place, within = self._place(rng, which)
        index = int(items[place])
        written, at = self._written(which, index, within, limit)
        head = written.head
        parts, used = [head], len(head)
        prompted = len(items) > 1 and rng.random() < self.config.prompt
        if prompted:
            other = int(rng.integers(len(items) - 1))
            piece = self._prompt(which, int(items[other + (other >= place)]), rng)
            if used + len(piece) + self._step_tokens(written, at) <= limit:
                parts.append(piece)
                used += len(piece)
        stop = self._stop(written, at, limit - used, store)
        if self.config.start == 1.0:
            self._require_whole(which, index, written, stop - at, limit)
        parts.append(written.window(at, stop))
        sequence = concatenate(parts)
        if self.config.hide_actions > 0:
            sequence = self._hide(sequence, rng)
        return sequence

    def _place(self, rng: np.random.Generator, which: int) -> tuple[int, int]:
        """Return the place of an episode among a store's items, and the step to begin at."""
        if self.config.start and rng.random() < self.config.start:
            return int(rng.integers(len(self.items[which]))), 0
        # one draw over all steps: every logged step is as likely as any other
        ends = self._ends[which]
        step = int(rng.integers(ends[-1]))
        place = int(np.searchsorted(ends, step, side="right"))
        length = int(self.stores[which].lengths[self.items[which][place]])
        return place, step - int(ends[place] - length)

    def _require_whole(
        self, which: int, index: int, written: SerializedEpisode, steps: int, limit: int
    ) -> None:
        """Raise ValueError where steps behind a row's end would never be trained on."""
        store = self.stores[which]
        if steps == store.lengths[index] and self._even(which):  # the first tells it for all
            index = int(self.items[which][store.lengths[self.items[which]].argmax()])
            steps = (limit - len(written.head)) // self._step_tokens(written, 0)
        length = int(store.lengths[index])
        if steps < length:
            raise ValueError(
                f"corpus {self.config.name!r}: start = 1 is for rows that hold whole episodes, and "
                f"of the {length} steps of episode {index} of {store.path} only {steps} fit in a "
                f"row of {limit} tokens; take a longer model.context, or a lower start"
            )

    def _prompt(self, which: int, index: int, rng: np.random.Generator) -> TokenSequence:
        """Return the prompt steps of an episode: its end or, half the time, anywhere."""
        length = int(self.stores[which].lengths[index])
        n = min(self.config.prompt_steps, length)
        at_end = rng.random() < 0.5
        start = length - n if at_end else int(rng.integers(length - n + 1))
        kept = self.kept.get((which, index))
        if kept is not None:
            return kept.window(start, start + n)
        return self._write(which, index, start, start + n).window(0, n)

    def _step_tokens(self, written: SerializedEpisode, step: int) -> int:
        return int(written.starts[step + 1] - written.starts[step])

    def _stop(self, written: SerializedEpisode, start: int, room: int, store: EpisodeStore) -> int:
        """Return where a window from `start` ends: at its steps, or where the row is full."""
        last = len(written)
        if self.config.window:
            last = min(last, start + self.config.window)
        fits = int(np.searchsorted(written.starts, written.starts[start] + room, side="right")) - 1
        if fits <= start:
            raise ValueError(
                f"corpus {self.config.name!r}: one step takes {self._step_tokens(written, start)} "
                f"tokens and {max(room, 0)} are left in a row; {store.path} needs a longer row"
            )
        return min(last, fits)

    def _hide(self, sequence: TokenSequence, rng: np.random.Generator) -> TokenSequence:
        """Return the sequence with whole steps' actions shown as <masked>."""
        actions = self.serializer.actions_in(sequence)
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
        kept = self.kept.get((which, index))
        if kept is not None:
            return kept, start
        length = int(self.stores[which].lengths[index])
        if self.kept.takes(self._step_bytes.get(which, math.inf) * length):
            whole = self._write(which, index, 0, length)
            self.kept.put((which, index), whole, _bytes(whole))
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
            returns = self._returns(store, index)
            window = None if returns is None else returns[start:stop]
            ahead = max(0, self.serializer.task(store.spec.id).history.joint - 1)
            last = min(stop + ahead, int(store.lengths[index]))
            steps = store.window(index, start, last, outcome=False)
            written = self.serializer.episode(steps, window, stop - start)
        except ValueError as error:
            raise ValueError(
                f"corpus {self.config.name!r}, episode {index} of {store.path}: {error}"
            ) from error
        self._tokens[which] = self._step_tokens(written, len(written) - 1)
        if which not in self._step_bytes:
            self._step_bytes[which] = _bytes(written) / len(written)
        return written

    def _returns(self, store: EpisodeStore, index: int) -> np.ndarray | None:
        """Return the returns to come (T,) of a whole episode, where the task asks for them."""
        if self.serializer.task(store.spec.id).history.returns is None:
            return None
        return to_come(np.asarray(store.column(index, "rewards")))


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
