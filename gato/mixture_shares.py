"""What a mixture is made of, and what its batches turn out to hold."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from gato.config import TrainConfig
from gato.corpora import open_corpus
from gato.fitting import make_serializer
from gato.mixture import Mixture
from gato.mixture_file import CorpusNote, missing
from gato.tokenizers.serializer import Serializer


def corpora_rows(config: TrainConfig, notes: Mapping[str, CorpusNote]) -> list[dict[str, Any]]:
    """Return a row per corpus: its share, whether it is there, and what is told of it."""
    total = sum(c.weight for c in config.corpora) or 1.0
    lacking = {c.name for c in missing(config.corpora)}
    rows = []
    for corpus in config.corpora:
        note = notes.get(corpus.name, CorpusNote())
        row = {"corpus": corpus.name, "share": corpus.weight / total, "path": corpus.path}
        row |= {"there": corpus.name not in lacking, **vars(note)}
        rows.append(row)
    return rows


def measure(config: TrainConfig, tokens: int, known: Serializer | None = None) -> dict[str, Any]:
    """Return what the first batches of a run hold, of so many tokens without padding.

    Args:
        config: the run.
        tokens: at least so many are drawn.
        known: what the weights read and write that the run begins with.
    """
    serializer = make_serializer(config, known=known)
    corpora = [open_corpus(c, serializer) for c in config.corpora]
    mixture = Mixture.of(config, corpora, serializer)
    begun = time.perf_counter()
    found, batches = realised(mixture, tokens)
    seconds = time.perf_counter() - begun
    weights = np.array([c.config.weight for c in mixture.corpora])
    counted = found[0] if config.weigh == "tokens" else found[1]
    rows = []
    for i, name in enumerate(mixture.names):
        wanted, got = weights[i] / weights.sum(), counted[i] / counted.sum()
        row = {"corpus": name, "wanted": wanted, "drawn": got, "off": got / wanted - 1}
        rows.append(row | {"tokens": int(found[0, i]), "sequences": int(found[1, i])})
    drawn = int(found[0].sum())
    return {
        "seed": config.seed,
        "tokens": drawn,
        "batches": batches,
        "fill": drawn / (batches * config.rows * config.model.context),
        "tokens_per_second": drawn / seconds,
        "corpora": rows,
        "notes": [note for corpus in corpora for note in corpus.notes()],
    }


def realised(mixture: Mixture, tokens: int) -> tuple[np.ndarray, int]:
    """Return (2, corpora), the tokens and sequences of each, of the first batches; and how many.

    Args:
        mixture: what draws.
        tokens: batches are drawn until they hold so many.
    """
    found, batches = np.zeros((2, len(mixture.names)), np.int64), 0
    while found[0].sum() < tokens:
        for part in range(mixture.parts):
            for row in mixture.rows_of(batches, part):
                for corpus, sequence in row:
                    found[:, corpus] += len(sequence), 1
        batches += 1
    return found, batches
