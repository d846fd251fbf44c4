"""Documents, captions and conversations as token sequences.

A long text gives windows of itself. What has pictures and is longer than a row gives its beginning;
where that predicts nothing, as a large picture before its caption, another record is drawn in its
place. How often either happens is counted, and the first time told.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from gato.contents import digests
from gato.corpus_config import CorpusConfig, without_effect
from gato.envs.records import RecordStore
from gato.kept import Kept, bytes_of
from gato.selection import check_records, cumulative_shares, divide, pick
from gato.telling import tell
from gato.tokenizers.serializer import Serializer
from gato.tokenizers.stream import TokenSequence, concatenate

_DRAWS = 64  # of records that predict nothing in a row, until one that does is looked for


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
        self.met: Counter[str] = Counter()
        """How many records were drawn in this process, how many of them ``cut`` or ``left out``."""

    def contents(self) -> dict[str, Any]:
        records = sum(map(len, self.items))
        left = sum(map(len, self._all)) - records
        stores = digests(self._all)
        sizes = dict(zip(stores, map(len, self._all), strict=True))
        found: dict[str, Any] = {"records": records, "stores": stores, "sizes": sizes}
        found |= {"held_out": left} if left else {}
        return found | ({"skipped": list(self.config.skip)} if self.config.skip else {})

    def held_out(self) -> RecordCorpus | None:
        """Return the corpus of what is never trained on; None where nothing is held out."""
        if not self.config.validation:
            return None
        return RecordCorpus(self.config, self._all, self.serializer, held=True)

    def notes(self) -> list[str]:
        """Return how many records drawn were longer than a row, and what has no effect."""
        return without_effect(self.config, episodes=False) + [
            f"corpus {self.config.name!r}: {self.met[what]} of {self.met['drawn']} records drawn "
            f"are longer than a row and {what}"
            for what in ("cut", "left out")
            if self.met[what]
        ]

    def sample(self, rng: np.random.Generator, limit: int) -> TokenSequence:
        for which, place in self._candidates(rng):
            sequence = self._sample(which, place, rng, limit)
            if sequence is not None:
                return sequence
        raise ValueError(
            f"corpus {self.config.name!r}: each of its {sum(map(len, self.items))} records takes "
            f"more tokens than a row and predicts nothing in its first {limit}; they lie in "
            f"{self.stores[0].path}. Train with a longer row."
        )

    def _candidates(self, rng: np.random.Generator) -> Iterator[tuple[int, int]]:
        """Yield (store, place) of records that are drawn; in the end all, in a circle."""
        for _ in range(_DRAWS):
            which = pick(rng, len(self.stores), self._shares)
            place = int(rng.integers(len(self.items[which])))
            yield which, place
        stores = len(self.stores)
        for store in [*range(which, stores), *range(which)]:
            first = place if store == which else 0
            yield from ((store, p) for p in range(first, len(self.items[store])))
        yield from ((which, p) for p in range(place))

    def _sample(
        self, which: int, place: int, rng: np.random.Generator, limit: int
    ) -> TokenSequence | None:
        """Return a sequence that begins with one record; None where it would predict nothing."""
        index = int(self.items[which][place])
        sequence = self._written(which, index)
        self.met["drawn"] += 1
        if self.config.pairs > 1:
            sequence = self._pairs(which, sequence, rng, limit)
        if len(sequence) <= limit:
            return sequence
        if sequence.payload:
            beginning = self._beginning(sequence, limit)
            self._count("left out" if beginning is None else "cut", which, index, sequence, limit)
            return beginning
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

    def _count(
        self, what: str, which: int, index: int, sequence: TokenSequence, limit: int
    ) -> None:
        """Count a record that is longer than a row; tell of the first."""
        self.met[what] += 1
        if self.met[what] > 1 or os.environ.get("RANK", "0") != "0":
            return
        why = (
            "its end is cut off"
            if what == "cut"
            else "it is left out: its first row predicts nothing"
        )
        tell(
            f"corpus {self.config.name!r}: record {index} of {self.stores[which].path} takes "
            f"{len(sequence)} tokens, a row {limit}; {why}, and so with others like it. A longer "
            f"row would show them whole."
        )

    def _beginning(self, sequence: TokenSequence, limit: int) -> TokenSequence | None:
        """Return as much of a sequence as fits without cutting an image in two.

        None where that predicts nothing.
        """
        held = np.zeros(len(sequence) + 1, bool)
        for rows in sequence.payload.values():
            held[rows["at"]] = True
        stop = limit
        while stop > 0 and held[stop - 1] and held[stop]:
            stop -= 1
        beginning = sequence.slice(0, stop)
        return beginning if beginning.target.any() else None

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
            case "pairs":
                return self.serializer.captions((p["image"], p["text"]) for p in record["pairs"])
            case "conversation":
                return self.serializer.conversation(record["messages"])
            case other:
                raise ValueError(f"unknown kind of record {other!r}")
