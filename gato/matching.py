"""The pairs of a batch that the contrastive head learns from: pictures, and the words about them.

    <bos> img img img img <sep> text .. <eos>     shown: the state of <sep>, which knows no words
    <bos> text .. <eos>                           said: the state of <eos>, which knows no picture

What is shown costs nothing more, for captions stand in the batch already. Each different text of
them is written once more, alone, in rows behind the others; what does not fit there is left out,
with its pictures. Of a picture that stands there with several texts only the first counts: each is
true of it, and would be pushed away for the others' sake. Nothing else of the batch changes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gato.tokenizers.stream import Matches, TokenSequence, concatenate

ROOM = 1.15
"""Room above the most that was needed by the batches that were looked at."""

Row = Sequence[tuple[int, TokenSequence]]
"""Sequences of a row, each with the number of its corpus."""


@dataclass(frozen=True)
class Matcher:
    """Finds pairs in rows and writes their words."""

    weights: tuple[float, ...]
    """Per corpus, of its pairs' loss; 0 for none."""
    control: Mapping[str, int]
    """The ids of control tokens."""
    row_length: int
    rows: int = 0
    """Rows for words."""

    def halves(self, sequence: TokenSequence) -> tuple[int, TokenSequence] | None:
        """Return where a caption's <sep> stands, and its words alone; None for all else."""
        separators = np.flatnonzero(sequence.ids == self.control["<sep>"])
        whole = sequence.ids[-1] == self.control["<eos>"]  # its end was not cut off
        if len(separators) != 1 or not sequence.payload or not whole:
            return None
        at = int(separators[0])
        if any((rows["at"] > at).any() for rows in sequence.payload.values()):
            return None
        said = concatenate([sequence.slice(0, 1), sequence.slice(at + 1, len(sequence))])
        said.target = np.zeros(len(said), np.float32)
        return at, said

    def needed(self, rows: Iterable[Row]) -> int:
        """Return the tokens that the different texts of these rows take."""
        found = (self.halves(s) for row in rows for which, s in row if self.weights[which])
        texts = {half[1].ids.tobytes(): len(half[1]) for half in found if half is not None}
        return sum(texts.values())

    def with_room(self, samples: Iterable[Iterable[Row]]) -> Matcher:
        """Return this with rows for the words of parts like these."""
        most = max(self.needed(rows) for rows in samples)
        rows = max(1, math.ceil(most * ROOM / self.row_length))
        return Matcher(self.weights, self.control, self.row_length, rows)

    def match(
        self, rows: Sequence[Row], room: int | None = None
    ) -> tuple[list[list[TokenSequence]], Matches | None]:
        """Return rows of words, and the pairs they make with what these rows show, if any.

        Args:
            rows: of the batch; the words stand behind them.
            room: rows for words, where not as many as usual.
        """
        n = self.row_length
        words: list[list[TokenSequence]] = [[] for _ in range(self.rows if room is None else room)]
        used = [0] * len(words)
        ends: list[int] = []  # of each text, where it ends
        known: dict[bytes, int] = {}
        told: dict[bytes, bytes] = {}  # the text of each picture
        pairs: list[tuple[int, int, int]] = []
        for i, row in enumerate(rows):
            start = i * n
            for corpus, sequence in row:
                half = self.halves(sequence) if self.weights[corpus] else None
                if half is not None:
                    at, said = half
                    key, picture = said.ids.tobytes(), _picture(sequence)
                    if key not in known and picture not in told:
                        place = next((r for r, u in enumerate(used) if u + len(said) <= n), None)
                        if place is not None:
                            words[place].append(said)
                            used[place] += len(said)
                            known[key] = len(ends)
                            ends.append((len(rows) + place) * n + used[place] - 1)
                    if key in known and told.setdefault(picture, key) == key:
                        pairs.append((start + at, known[key], corpus))
                start += len(sequence)
        if not pairs:
            return words, None
        shown_at, which, corpora = np.array(pairs, np.int64).T
        weight = np.array(self.weights, np.float32)[corpora]
        return words, Matches(shown_at, np.array(ends, np.int64), which, weight, corpora)


def _picture(sequence: TokenSequence) -> bytes:
    """Return what a caption shows: equal for equal pictures alone."""
    return b"".join(
        f"{kind} {name} {array.dtype} {array.shape}".encode() + array.tobytes()
        for kind, rows in sorted(sequence.payload.items())
        for name, array in ((name, np.asarray(values)) for name, values in sorted(rows.items()))
    )
