"""Documents, captions and conversations as token sequences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from gato.corpus_config import CorpusConfig
from gato.envs.records import RecordStore
from gato.kept import Kept, bytes_of
from gato.tokenizers.serializer import Serializer
from gato.tokenizers.stream import TokenSequence, concatenate


class RecordCorpus:
    """Documents, captions and conversations."""

    def __init__(
        self, config: CorpusConfig, stores: list[RecordStore], serializer: Serializer
    ) -> None:
        if not all(len(s) for s in stores):
            raise ValueError(f"corpus {config.name!r} at {config.path} holds an empty store")
        self.config, self.stores, self.serializer = config, stores, serializer
        self._kept = Kept()

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
        kept: TokenSequence | None = self._kept.get((which, index))
        if kept is not None:
            return kept
        store = self.stores[which]
        try:
            written = self._write(store[index])
        except ValueError as error:
            raise ValueError(
                f"corpus {self.config.name!r}, record {index} of {store.path}: {error}"
            ) from error
        self._kept.put((which, index), written, bytes_of(written))
        return written

    def _write(self, record: Mapping[str, Any]) -> TokenSequence:
        match record["kind"]:
            case "document":
                return self.serializer.document(record["text"])
            case "caption":
                return self.serializer.caption(record["image"], record["text"])
            case "conversation":
                return self.serializer.conversation(record["messages"])
            case other:
                raise ValueError(f"unknown kind of record {other!r}")
