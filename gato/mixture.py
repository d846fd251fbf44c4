"""The mixture: batch k of a run as a pure function of (seed, k), domains mixed in every batch.

Because nothing is carried from one batch to the next, the state of the data is the integer k, and
a resumed run draws the same batches as one that was never interrupted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gato.corpora import Corpus
from gato.tokenizers.serializer import Serializer
from gato.tokenizers.stream import TokenBatch, TokenSequence, pack

_MEASURED = 128  # sequences drawn once per corpus to know its mean length
_FILL = 0.99  # tokens drawn per token of the batch; what does not fit is dropped
_ROUNDS, _TRIED = 6, 300_000  # rounds of balancing what is drawn, tokens drawn in each


class Mixture:
    """Weighted corpora packed into rows.

    A target weighs ``loss_weight`` x tokens per target of its corpus, so that the loss of a batch,
    the weighted sum over its tokens, is each corpus' mean loss times its share of the tokens:
    however rarely a corpus predicts (once in 30 tokens in a game, every token in a text), it counts
    by its share.
    """

    def __init__(
        self,
        corpora: Sequence[Corpus],
        serializer: Serializer,
        *,
        rows: int,
        row_length: int,
        seed: int = 0,
        parts: int = 1,
    ) -> None:
        """Make a mixture.

        Args:
            corpora: with ``config.weight``, the share of tokens each gets.
            serializer: the one the corpora write with.
            rows: rows per batch.
            row_length: tokens per row.
            seed: chooses every sample of the run.
            parts: pieces of equal size that a batch is drawn in, each a pure function of
                (seed, batch, piece): what several processes share.

        Raises:
            ValueError: where no corpus has a positive weight, or `parts` does not divide `rows`.
        """
        if parts < 1 or rows % parts:
            raise ValueError(f"rows must be a multiple of parts; got {rows} rows in {parts} parts")
        self.corpora = [c for c in corpora if c.config.weight > 0]
        if not self.corpora:
            raise ValueError("a mixture needs at least one corpus of positive weight")
        self.serializer, self.rows, self.row_length, self.seed = serializer, rows, row_length, seed
        self.parts, self.part_rows = parts, rows // parts
        self.names = [c.config.name for c in self.corpora]
        measured = np.array([self._measure(i) for i in range(len(self.corpora))])
        lengths, targets = measured[:, 0], measured[:, 1].mean(1)
        self._cumulative = np.cumsum(self._balance(lengths))
        emphasis = np.array([c.config.loss_weight for c in self.corpora])
        self._target_weight = (emphasis * lengths.mean(1) / targets).astype(np.float32)

    def _measure(self, corpus: int) -> np.ndarray:
        """Return (2, 128): the tokens and the predicted tokens of some of a corpus' sequences."""
        rng = self._rng(corpus, stream=1)
        drawn = [self.corpora[corpus].sample(rng, self.row_length) for _ in range(_MEASURED)]
        targets = [np.count_nonzero(s.target) for s in drawn]
        if not any(targets):
            raise ValueError(f"corpus {self.names[corpus]!r} has nothing to predict")
        return np.array([[len(s) for s in drawn], targets])

    def _balance(self, lengths: np.ndarray) -> np.ndarray:
        """Return how often to draw each corpus, so that its share of the kept tokens is its weight.

        Longest sequences are placed first, so the short ones are dropped more often; trials on the
        measured `lengths` (corpora, 128) say how much more often they must be drawn.
        """
        wanted = np.array([c.config.weight for c in self.corpora])
        wanted = wanted / wanted.sum()
        chance = wanted / lengths.mean(1)
        chance /= chance.sum()
        n, most = len(wanted), self.part_rows * self.row_length
        trials = max(2, min(_TRIED // most, 200))
        for _ in range(_ROUNDS if n > 1 else 0):
            rng, kept = self._rng(0, stream=2), np.zeros(n)
            for _ in range(trials):
                which = rng.choice(n, most // int(lengths.min()) + 1, p=chance)
                drawn = lengths[which, rng.integers(_MEASURED, size=len(which))]
                count = int(np.searchsorted(np.cumsum(drawn), int(most * _FILL))) + 1
                placed = self._place(drawn[:count].tolist())
                for row in placed:
                    for i in row:
                        kept[which[i]] += drawn[i]
            chance *= wanted / np.maximum(kept / kept.sum(), 0.1 * wanted)
            chance /= chance.sum()
        return chance

    def _place(self, lengths: Sequence[int]) -> list[list[int]]:
        """Return which sequences go into each row: longest first, each where it first fits."""
        rows: list[list[int]] = [[] for _ in range(self.part_rows)]
        room = [self.row_length] * self.part_rows
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            row = next((r for r, left in enumerate(room) if left >= lengths[i]), None)
            if row is not None:
                rows[row].append(i)
                room[row] -= lengths[i]
        return rows

    def _rng(self, index: int, stream: int = 0, part: int = 0) -> np.random.Generator:
        counter = [0, part, stream, index]
        return np.random.Generator(np.random.Philox(key=self.seed, counter=counter))

    def sequences(self, index: int, part: int = 0) -> list[tuple[int, TokenSequence]]:
        """Return the (corpus, sequence) pairs of a part of batch `index`, before packing."""
        rng = self._rng(index, part=part)
        budget = int(self.part_rows * self.row_length * _FILL)
        drawn, used = [], 0
        while used < budget:
            which = int(np.searchsorted(self._cumulative, rng.random(), side="right"))
            which = min(which, len(self.corpora) - 1)
            sequence = self.corpora[which].sample(rng, self.row_length)
            drawn.append((which, sequence))
            used += len(sequence)
        return drawn

    def batch(self, index: int) -> TokenBatch:
        """Return batch `index`: the rows of its parts, one part after another."""
        return self._pack([row for part in range(self.parts) for row in self._rows(index, part)])

    def part(self, index: int, part: int) -> TokenBatch:
        """Return rows [part * n, (part + 1) * n) of batch `index`, n being rows / parts."""
        if not 0 <= part < self.parts:
            raise ValueError(f"a part is one of {self.parts}, from 0; got {part}")
        return self._pack(self._rows(index, part))

    def _rows(self, index: int, part: int) -> list[list[tuple[int, TokenSequence]]]:
        """Return the (corpus, sequence) pairs of every row; what does not fit is dropped."""
        drawn = self.sequences(index, part)
        placed = self._place([len(s) for _, s in drawn])
        return [[drawn[i] for i in row] for row in placed]

    def _pack(self, rows: list[list[tuple[int, TokenSequence]]]) -> TokenBatch:
        sequences = [[s for _, s in row] for row in rows]
        corpora = [[c for c, _ in row] for row in rows]
        batch = pack(sequences, self.row_length, self.serializer.control, corpora)
        batch.target_weight = batch.target_weight * self._target_weight[batch.target_corpus]
        return batch
