"""Documents, captions and conversations as token sequences."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gato.contents import digests
from gato.corpus_config import CorpusConfig
from gato.envs.records import RecordStore
from gato.kept import Kept, bytes_of
from gato.selection import check_records, cumulative_shares, divide, pick
from gato.tokenizers.serializer import Serializer
from gato.tokenizers.stream import TokenSequence, concatenate


class RecordCorpus:
    """Documents, captions and conversations."""

    def __init__(
        self,
        config: CorpusConfig,
        stores: list[RecordStore],
        serializer: Serializer,
        *,
        held: bool = False,
    ) -> None:
        """Make the corpus of what is trained on, or with `held` of what is held out.

        Raises:
            ValueError: for a store that is empty, or options that only episodes have.
        """
        check_records(config, stores)
        everything = [np.ones(len(s), bool) for s in stores]
        names = [s.name for s in stores]
        # captions of one picture stay together, or validation would show what was trained on
        groups = [s.groups() for s in stores] if config.validation else None
        chosen = divide(config, everything, names, numbers=groups, held=held)
        self.config, self.serializer, self._all = config, serializer, stores
        self.stores = [s for s, items in zip(stores, chosen, strict=True) if len(items)]
        self.items = [items for items in chosen if len(items)]
        """Per store, the records that are drawn."""
        self._shares = cumulative_shares(config, [len(items) for items in self.items])
        self.kept = Kept()

    def contents(self) -> dict[str, Any]:
        records = sum(map(len, self.items))
        left = sum(map(len, self._all)) - records
        found: dict[str, Any] = {"records": records, "stores": digests(self._all)}
        found |= {"held_out": left} if left else {}
        return found | ({"skipped": list(self.config.skip)} if self.config.skip else {})

    def held_out(self) -> RecordCorpus | None:
        """Return the corpus of what is never trained on; None where nothing is held out."""
        if not self.config.validation:
            return None
        return RecordCorpus(self.config, self._all, self.serializer, held=True)

    def notes(self) -> list[str]:
        """Return nothing: no record is left out."""
        return []

    def sample(self, rng: np.random.Generator, limit: int) -> TokenSequence:
        which = pick(rng, len(self.stores), self._shares)
        items = self.items[which]
        index = int(items[rng.integers(len(items))])
        sequence = self._written(which, index)
        if self.config.pairs > 1:
            sequence = self._pairs(which, sequence, rng, limit)
        if len(sequence) <= limit:
            return sequence
        if sequence.payload:
            return self._beginning(sequence, limit, self.stores[which].path)
        # A long text gives a window of itself; <bos> stands before it as before every example.
        start = int(rng.integers(1, len(sequence) - limit + 2))
        return concatenate([sequence.slice(0, 1), sequence.slice(start, start + limit - 1)])

    def _pairs(
        self, which: int, first: TokenSequence, rng: np.random.Generator, limit: int
    ) -> TokenSequence:
        """Return a sequence and others from the same store behind it, as many as fit in a row.

        Raises:
            ValueError: where one of them has no picture.
        """
        items, examples, used = self.items[which], [first], len(first)
        for index in items[rng.integers(len(items), size=self.config.pairs - 1)]:
            example = self._written(which, int(index))
            if "image" not in example.payload or "image" not in first.payload:
                raise ValueError(
                    f"corpus {self.config.name!r}: pairs={self.config.pairs} joins captions of "
                    f"pictures and questions about them; {self.stores[which].path} holds records "
                    f"without a picture. Leave pairs out."
                )
            used += len(example) - 1
            if used > limit:
                break
            examples.append(example)
        return self.serializer.pairs(examples)

    def _beginning(self, sequence: TokenSequence, limit: int, path: Path) -> TokenSequence:
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
                f"nothing in its first {limit}, a row; it lies in {path}. Train with a longer row."
            )
        return beginning

    def _written(self, which: int, index: int) -> TokenSequence:
        kept: TokenSequence | None = self.kept.get((which, index))
        if kept is not None:
            return kept
        store = self.stores[which]
        try:
            written = self._write(store[index])
        except ValueError as error:
            raise ValueError(
                f"corpus {self.config.name!r}, record {index} of {store.path}: {error}"
            ) from error
        self.kept.put((which, index), written, bytes_of(written))
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
