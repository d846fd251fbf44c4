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
    ) -> None:
        """Make a mixture.

        Args:
            corpora: with ``config.weight``, the share of tokens each gets.
            serializer: the one the corpora write with.
            rows: rows per batch.
            row_length: tokens per row.
            seed: chooses every sample of the run.

        Raises:
            ValueError: where no corpus has a positive weight.
        """
        self.corpora = [c for c in corpora if c.config.weight > 0]
        if not self.corpora:
            raise ValueError("a mixture needs at least one corpus of positive weight")
        self.serializer, self.rows, self.row_length, self.seed = serializer, rows, row_length, seed
        self.names = [c.config.name for c in self.corpora]
        measured = np.array([self._measure(i) for i in range(len(self.corpora))])
        lengths, targets = measured.T
        shares = np.array([c.config.weight for c in self.corpora]) / lengths
        self._cumulative = np.cumsum(shares / shares.sum())
        emphasis = np.array([c.config.loss_weight for c in self.corpora])
        self._target_weight = (emphasis * lengths / targets).astype(np.float32)

    def _measure(self, corpus: int) -> tuple[float, float]:
        """Return the mean tokens and the mean predicted tokens of a corpus' sequences."""
        rng = self._rng(corpus, stream=1)
        drawn = [self.corpora[corpus].sample(rng, self.row_length) for _ in range(_MEASURED)]
        targets = float(np.mean([np.count_nonzero(s.target) for s in drawn]))
        if targets == 0:
            raise ValueError(f"corpus {self.names[corpus]!r} has nothing to predict")
        return float(np.mean([len(s) for s in drawn])), targets

    def _rng(self, index: int, stream: int = 0) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 0, stream, index]))

    def sequences(self, index: int) -> list[tuple[int, TokenSequence]]:
        """Return the (corpus, sequence) pairs of batch `index`, before packing."""
        rng = self._rng(index)
        budget = int(self.rows * self.row_length * _FILL)
        drawn, used = [], 0
        while used < budget:
            which = int(np.searchsorted(self._cumulative, rng.random(), side="right"))
            which = min(which, len(self.corpora) - 1)
            sequence = self.corpora[which].sample(rng, self.row_length)
            drawn.append((which, sequence))
            used += len(sequence)
        return drawn

    def batch(self, index: int) -> TokenBatch:
        """Return batch `index`; longest sequences are placed first, each where it first fits."""
        drawn = self.sequences(index)
        order = sorted(range(len(drawn)), key=lambda i: -len(drawn[i][1]))
        rows: list[list[TokenSequence]] = [[] for _ in range(self.rows)]
        corpora: list[list[int]] = [[] for _ in range(self.rows)]
        room = np.full(self.rows, self.row_length)
        for i in order:
            which, sequence = drawn[i]
            fitting = np.flatnonzero(room >= len(sequence))
            if len(fitting) == 0:
                continue
            row = int(fitting[0])
            rows[row].append(sequence)
            corpora[row].append(which)
            room[row] -= len(sequence)
        batch = pack(rows, self.row_length, self.serializer.control, corpora)
        batch.target_weight = batch.target_weight * self._target_weight[batch.target_corpus]
        return batch
