"""How many tokens data will yield: a few items written, the rest in proportion."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

import numpy as np

from gato.envs.episode import Episode, TaskSpec
from gato.envs.mirror import remote_store
from gato.envs.readers.reader import BadItem, Source
from gato.envs.store import EpisodeStore, RecordStore
from gato.tokenizers.serializer import Serializer
from gato.tokenizers.spaces import CodecOptions
from gato.tokenizers.text import MODEL_FILE, train_text_model

EPISODES, RECORDS = 4, 64
"""Items that are written."""
TEXT_PIECES = 2048
"""Of the text model that is trained on their text, where it has so many."""


class Estimate:
    """Estimates at Gato's own codecs: a token per number, a token per patch.

    Groups of numbers in one token (`CodecOptions.observations` ``vector``) yield fewer.
    """

    def store(self, store: EpisodeStore | RecordStore) -> int | None:
        """Return the tokens of all of a store; None of an empty one."""
        if not len(store):
            return None
        n = RECORDS if isinstance(store, RecordStore) else EPISODES
        some = [int(i) for i in np.unique(np.linspace(0, len(store) - 1, n).astype(int))]
        if isinstance(store, RecordStore):
            return _records([store[i] for i in some], len(store))
        if remote_store(store.path) is not None:  # whose shards come whole: one will do
            some = list(range(min(EPISODES, store.manifest["shards"][0]["episodes"])))
        tasks = {store.spec.id: store.spec}
        steps = int(store.lengths.sum())
        return _episodes([store.episode(i) for i in some], tasks, steps)

    def source(self, source: Source) -> tuple[int | None, list[str]]:
        """Return the tokens of all that a source will yield, and what stood against it.

        None where the source does not know how much it holds.
        """
        if source.parts:
            return self._parts(source)
        n = RECORDS if source.kind == "records" else EPISODES
        items = list(islice(source.read(), n))
        bad = [f"{i.where}: {i.reason}" for i in items if isinstance(i, BadItem)]
        faults = list(dict.fromkeys(bad))  # a picture with five captions is bad once
        good: list[Any] = [item for item in items if not isinstance(item, BadItem)]
        limit = source.options.limit
        if not good:
            return None, faults
        if source.kind == "records":
            count = source.items
            if count is None:
                return None, faults
            return _records(good, min(count, limit or count)), faults
        steps = source.steps
        if steps is not None and limit and source.items:
            steps = round(steps * min(1.0, limit / source.items))
        elif steps is None and source.items is not None:
            mean = sum(map(len, good)) / len(good)
            steps = round(mean * min(source.items, limit or source.items))
        if steps is None:
            return None, faults
        try:
            return _episodes(good, source.tasks, steps), faults
        except (TypeError, ValueError) as error:  # no codec: nothing of it can be trained on
            return None, [*faults, str(error)]

    def _parts(self, source: Source) -> tuple[int | None, list[str]]:
        told = [self.source(part) for part in source.parts]
        faults = [fault for _, found in told for fault in found]
        totals = [tokens for tokens, _ in told if tokens is not None]
        if len(totals) < len(told):
            return None, faults
        limit, items = source.options.limit, source.items
        share = min(1.0, limit / items) if limit and items else 1.0
        return round(sum(totals) * share), faults


def _records(records: Sequence[Any], count: int) -> int:
    serializer = _serializer(t for record in records for t in _texts(record))
    write: dict[str, Callable[[Any], Any]] = {
        "document": lambda r: serializer.document(r["text"]),
        "caption": lambda r: serializer.caption(r["image"], r["text"]),
        "pairs": lambda r: serializer.captions((p["image"], p["text"]) for p in r["pairs"]),
        "conversation": lambda r: serializer.conversation(r["messages"]),
    }
    tokens = sum(len(write[record["kind"]](record)) for record in records)
    return round(tokens / len(records) * count)


def _episodes(episodes: Sequence[Episode], tasks: dict[str, TaskSpec], steps: int) -> int:
    serializer = _serializer(t for e in episodes for t in _words(e, tasks[e.task]))
    for task in dict.fromkeys(e.task for e in episodes):
        serializer.add_task(tasks[task])
    tokens = sum(len(serializer.episode(e).steps) for e in episodes)
    return round(tokens / sum(map(len, episodes)) * steps)


def _words(episode: Episode, spec: TaskSpec) -> Iterable[str]:
    yield episode.instruction or spec.instruction or spec.id
    for column in (*episode.observations.values(), *episode.actions.values()):
        if not isinstance(column, np.ndarray):
            yield from dict.fromkeys(column)


def _texts(record: Any) -> Iterable[str]:
    if "text" in record:
        yield record["text"]
    yield from (pair["text"] for pair in record.get("pairs", ()))
    for message in record.get("messages", ()):
        yield from (part["text"] for part in message["content"] if part["type"] == "text")


def _serializer(texts: Iterable[str]) -> Serializer:
    some = [text for text in texts if text.strip()] or ["-"]
    return Serializer(CodecOptions(), {"text": {MODEL_FILE: train_text_model(some, TEXT_PIECES)}})
