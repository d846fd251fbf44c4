"""The mixture: batch k of a run as a pure function of (seed, k), domains mixed in every batch.

Because nothing is carried from one batch to the next, the state of the data is the integer k, and
a resumed run draws the same batches as one that was never interrupted.

Two ways to share a batch. ``random`` draws a corpus for every sequence: shares hold only in the
long run. ``even`` gives every corpus its quota of every part. Think of its sequences as laid end to
end along a line on which every part owns a stretch as long as the quota: a sequence belongs to the
part in whose stretch it begins. The first one begins where the one before, drawn for no one, would
have ended: that place is drawn so that long and short sequences keep their frequencies, and follows
a sequence of low discrepancy from part to part, so that errors cancel. Quotas are as large as rows
can hold of such sequences, and of a part that got too much any sequence is as likely to be left out
as any other: were it left to the rows, they would leave out short ones only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gato.config import TrainConfig
from gato.corpora import Corpus
from gato.matching import Matcher
from gato.tokenizers.serializer import Serializer
from gato.tokenizers.stream import TokenBatch, TokenSequence, pack

_MEASURED = {"random": 128, "even": 512}  # sequences drawn once per corpus to know its lengths
_FILL = 0.99  # tokens drawn per token of the batch; what does not fit is dropped
_ROUNDS = {"random": (6, 300_000, 200), "even": (3, 1_200_000, 400)}
"""Of balancing what is drawn: how many, and the most tokens and parts drawn in each."""
_TOO_MUCH = 1.05  # drawn per token of the rows to see how much of it they hold
_LOOKED_AT = 4  # parts drawn to know how many rows the words of pictures need
_GOLDEN = 0.6180339887498949  # multiples of it, without their whole part, fill [0, 1) evenly


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
        weigh: str = "tokens",
        draw: str = "random",
        contrast: bool = True,
    ) -> None:
        """Make a mixture.

        Args:
            corpora: with ``config.weight``, the share each gets.
            serializer: the one the corpora write with.
            rows: rows per batch.
            row_length: tokens per row.
            seed: chooses every sample of the run.
            parts: pieces of equal size that a batch is drawn in, each a pure function of
                (seed, batch, piece): what several processes share.
            weigh: ``tokens`` or ``samples``: what weights are shares of.
            draw: ``random`` or ``even``: see above.
            contrast: match pictures and words, see `matching.py`, where a corpus asks for it: those
                of one part with one another.

        Raises:
            ValueError: where no corpus has a positive weight, `parts` does not divide `rows`, or a
                corpus has no captions to match.
        """
        if parts < 1 or rows % parts:
            raise ValueError(f"rows must be a multiple of parts; got {rows} rows in {parts} parts")
        self.corpora = [c for c in corpora if c.config.weight > 0]
        if not self.corpora:
            raise ValueError("a mixture needs at least one corpus of positive weight")
        self.serializer, self.rows, self.row_length, self.seed = serializer, rows, row_length, seed
        self.parts, self.part_rows = parts, rows // parts
        self.names = [c.config.name for c in self.corpora]
        self.weigh, self.draw = weigh, draw
        measured = np.array([self._measure(i) for i in range(len(self.corpora))])
        lengths, targets = measured[:, 0], measured[:, 1].mean(1)
        self._fill = _FILL if draw == "random" else self._held(lengths)
        shares = self._balance(lengths)
        self._cumulative = np.cumsum(shares)
        self._quota = shares * self._capacity(lengths)
        self._stretches = [_stretch(costs) for costs in self._costs(lengths)]
        emphasis = np.array([c.config.loss_weight for c in self.corpora])
        self._target_weight = (emphasis * lengths.mean(1) / targets).astype(np.float32)
        self.matcher = self._matcher() if contrast else None

    @classmethod
    def of(cls, config: TrainConfig, corpora: Sequence[Corpus], serializer: Serializer) -> Mixture:
        """Return the mixture that a run trains on."""
        return cls(
            corpora,
            serializer,
            rows=config.rows,
            row_length=config.model.context,
            seed=config.seed,
            parts=config.parts,
            weigh=config.weigh,
            draw=config.draw,
        )

    def _measure(self, corpus: int) -> np.ndarray:
        """Return (2, n): the tokens and the predicted tokens of some of a corpus' sequences."""
        rng = self._rng(corpus, stream=1)
        n = _MEASURED[self.draw]
        drawn = [self.corpora[corpus].sample(rng, self.row_length) for _ in range(n)]
        targets = [s.targets() for s in drawn]
        if not any(targets):
            raise ValueError(f"corpus {self.names[corpus]!r} has nothing to predict")
        return np.array([[len(s) for s in drawn], targets])

    def _matcher(self) -> Matcher | None:
        """Return what matches pictures and words, with room for the words of parts like the first.

        None where no corpus asks for it.
        """
        weights = tuple(c.config.contrast for c in self.corpora)
        if not any(weights):
            return None
        matcher = Matcher(weights, self.serializer.control, self.row_length)
        for i in np.flatnonzero(weights).tolist():
            rng = self._rng(i, stream=1)
            drawn = (
                self.corpora[i].sample(rng, self.row_length) for _ in range(_MEASURED["random"])
            )
            if all(matcher.halves(sequence) is None for sequence in drawn):
                raise ValueError(
                    f"corpus {self.names[i]!r}: contrast={weights[i]} matches pictures and their "
                    f"captions; none is among {_MEASURED['random']} of its records. Leave it out."
                )
        return matcher.with_room(self.rows_of(k, 0) for k in range(_LOOKED_AT))

    def _costs(self, lengths: np.ndarray) -> np.ndarray:
        """Return what sequences of these lengths count in the shares."""
        return lengths if self.weigh == "tokens" else np.ones_like(lengths)

    def _capacity(self, lengths: np.ndarray) -> np.ndarray:
        """Return (corpora,): what a corpus would get of a part if it were alone, in its costs."""
        tokens = self.part_rows * self.row_length * self._fill
        if self.weigh == "tokens":
            return np.full(len(lengths), tokens)
        wanted = np.array([c.config.weight for c in self.corpora])
        mean = float(np.average(lengths.mean(1), weights=wanted))
        return np.full(len(lengths), tokens / mean)

    def _balance(self, lengths: np.ndarray) -> np.ndarray:
        """Return the share of what is drawn by which each corpus gets its weight of what is kept.

        In a ``random`` mixture it is the share of sequences, in an ``even`` one that of the costs.
        Longest sequences are placed first, so the short ones are dropped more often; trials on the
        measured `lengths` (corpora, n) say how much more often they must be drawn.
        """
        wanted = np.array([c.config.weight for c in self.corpora])
        wanted = wanted / wanted.sum()
        costs = self._costs(lengths)
        share = wanted / costs.mean(1) if self.draw == "random" else wanted
        share = share / share.sum()
        n, most = len(wanted), self.part_rows * self.row_length
        rounds, tokens, parts = _ROUNDS[self.draw]
        trials = max(2, min(tokens // most, parts))
        for _ in range(rounds if n > 1 else 0):
            rng, kept, tried = self._rng(0, stream=2), np.zeros(n), np.ones(n)
            for _ in range(trials):
                which, at = self._try(rng, share, lengths)
                drawn, cost = lengths[which, at], costs[which, at]
                np.add.at(tried, which, cost)
                if self.draw == "even":
                    fits = self._trim(rng, drawn)
                    which, drawn, cost = which[fits], drawn[fits], cost[fits]
                for row in self._place(drawn.tolist()):
                    for i in row:
                        kept[which[i]] += cost[i]
            if self.draw == "even":  # quotas are met: what is left out is all to be made up
                share = wanted * tried / np.maximum(kept, 0.1 * tried)
            else:
                share *= wanted / np.maximum(kept / kept.sum(), 0.1 * wanted)
            share /= share.sum()
        return share

    def _held(self, lengths: np.ndarray) -> float:
        """Return the part of the rows that fills where more is drawn than they hold."""
        self._fill = _TOO_MUCH
        wanted = np.array([c.config.weight for c in self.corpora])
        rng, used = self._rng(0, stream=4), 0
        most = self.part_rows * self.row_length
        trials = max(2, min(_ROUNDS["random"][1] // most, 100))
        for _ in range(trials):
            drawn = lengths[self._try(rng, wanted / wanted.sum(), lengths)]
            used += sum(int(drawn[row].sum()) for row in self._place(drawn.tolist()))
        return used / (trials * most)

    def _try(
        self, rng: np.random.Generator, share: np.ndarray, lengths: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return a part drawn from the measured sequences: the corpus and the place of each."""
        n, known = lengths.shape
        if self.draw == "random":
            most = self.part_rows * self.row_length
            which = rng.choice(n, most // int(lengths.min()) + 1, p=share)
            at = rng.integers(known, size=len(which))
            count = int(np.searchsorted(np.cumsum(lengths[which, at]), int(most * _FILL))) + 1
            return which[:count], at[:count]
        quota, costs, found = share * self._capacity(lengths), self._costs(lengths), []
        for i in range(n):
            at = rng.integers(known, size=int(quota[i] / costs[i].min()) + 1)
            begins = np.interp(rng.random(), *_stretch(costs[i])) + np.cumsum(costs[i, at])
            found.append(at[: np.searchsorted(begins - costs[i, at], quota[i])])
        return np.repeat(np.arange(n), [len(at) for at in found]), np.concatenate(found)

    def _trim(self, rng: np.random.Generator, lengths: np.ndarray) -> np.ndarray:
        """Return which sequences to keep so that they fit: any is as likely to go as any other."""
        order = rng.permutation(len(lengths))
        left = lengths.sum() - np.cumsum(lengths[order])  # without the first, the first two, ...
        most = max(self._fill * self.part_rows * self.row_length, lengths.max(initial=0))
        gone = 0 if lengths.sum() <= most else int((left <= most).argmax()) + 1
        return np.sort(order[gone:])

    def _place(self, lengths: Sequence[int]) -> list[list[int]]:
        """Return which sequences go into each row: longest first, each where it first fits."""
        rows: list[list[int]] = [[] for _ in range(self.part_rows)]
        room = np.full(self.part_rows, self.row_length)
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            row = int((room >= lengths[i]).argmax())
            if room[row] >= lengths[i]:
                rows[row].append(i)
                room[row] -= lengths[i]
        return rows

    def _rng(self, index: int, stream: int = 0, part: int = 0) -> np.random.Generator:
        counter = [0, part, stream, index]
        return np.random.Generator(np.random.Philox(key=self.seed, counter=counter))

    def sequences(self, index: int, part: int = 0) -> list[tuple[int, TokenSequence]]:
        """Return the (corpus, sequence) pairs of a part of batch `index`, before packing."""
        rng = self._rng(index, part=part)
        if self.draw == "even":
            return self._even(rng, index * self.parts + part)
        budget = int(self.part_rows * self.row_length * _FILL)
        drawn, used = [], 0
        while used < budget:
            which = int(np.searchsorted(self._cumulative, rng.random(), side="right"))
            which = min(which, len(self.corpora) - 1)
            sequence = self.corpora[which].sample(rng, self.row_length)
            drawn.append((which, sequence))
            used += len(sequence)
        return drawn

    def _even(self, rng: np.random.Generator, part: int) -> list[tuple[int, TokenSequence]]:
        """Return every corpus' quota of the run's part number `part`."""
        drawn = []
        first = self._rng(0, stream=3).random(len(self.corpora))
        for which, corpus in enumerate(self.corpora):
            at = np.interp((first[which] + part * _GOLDEN) % 1.0, *self._stretches[which])
            while at < self._quota[which]:
                sequence = corpus.sample(rng, self.row_length)
                drawn.append((which, sequence))
                at += len(sequence) if self.weigh == "tokens" else 1
        return [drawn[i] for i in self._trim(rng, np.array([len(s) for _, s in drawn]))]

    def batch(self, index: int) -> TokenBatch:
        """Return batch `index`: the rows of its parts, one part after another."""
        return self._pack([row for part in range(self.parts) for row in self.rows_of(index, part)])

    def part(self, index: int, part: int) -> TokenBatch:
        """Return rows [part * n, (part + 1) * n) of batch `index`, n being rows / parts."""
        if not 0 <= part < self.parts:
            raise ValueError(f"a part is one of {self.parts}, from 0; got {part}")
        return self._pack(self.rows_of(index, part))

    def rows_of(self, index: int, part: int) -> list[list[tuple[int, TokenSequence]]]:
        """Return the (corpus, sequence) pairs of every row; what does not fit is dropped."""
        drawn = self.sequences(index, part)
        placed = self._place([len(s) for _, s in drawn])
        return [[drawn[i] for i in row] for row in placed]

    def _pack(self, rows: list[list[tuple[int, TokenSequence]]]) -> TokenBatch:
        sequences = [[s for _, s in row] for row in rows]
        corpora = [[c for c, _ in row] for row in rows]
        matches = None
        if self.matcher is not None:
            words, matches = self.matcher.match(
                rows, self.matcher.rows * len(rows) // self.part_rows
            )
            sequences += words
            corpora += [[0] * len(row) for row in words]
        batch = pack(sequences, self.row_length, self.serializer.control, corpora)
        batch.matches = matches
        batch.target_weight = batch.target_weight * self._target_weight[batch.target_corpus]
        return batch


def _stretch(costs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return points (F, x) of the distribution of what a sequence has left at any place of a line.

    Of sequences laid end to end, the one that lies at a random place has x or less left with
    probability F = mean of min(cost, x) / mean cost, which is linear between the costs.
    """
    points = np.concatenate([[0], np.unique(costs)])
    share = np.minimum(costs[None], points[:, None]).mean(1) / costs.mean()
    return share, points.astype(float)
