"""Texts compared by the pieces they share: BLEU and chrF by sacrebleu, and CIDEr-D.

BLEU and chrF belong to a whole set of texts; they are kept as the counts of each text, which are
added up. sacrebleu (the extra ``metrics``) tokenizes and counts.

CIDEr-D (Vedantam et al. 2015, arXiv 1411.5726) weighs runs of one to four words by how seldom they
are among the pictures' true captions: per length, the cosine between caption and truth, without
reward for repeating a run, times a penalty for another length; the mean of the four, times 10.
A caption equal to its only reference scores 10, or less where it has fewer than four words: 7.5
where it has three. COCO's evaluation cuts words with a Java program; here words are lower-case
letters, digits and apostrophes.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

LONGEST = 4
"""Words in a run."""
SIGMA = 6.0
"""Of the penalty for another length, in words."""
SCALE = 10.0
Run = tuple[str, ...]


def has_sacrebleu() -> bool:
    """Return whether sacrebleu is there."""
    try:
        import sacrebleu  # noqa: F401
    except ImportError:
        return False
    return True


def counted_by() -> dict[str, str]:
    """Return the version of sacrebleu where it is there."""
    return {"sacrebleu": version("sacrebleu")} if has_sacrebleu() else {}


def require_sacrebleu() -> None:
    """Raise ValueError where sacrebleu is missing, naming the extra that brings it."""
    if not has_sacrebleu():
        raise ValueError(
            "BLEU and chrF need sacrebleu, which does not import. Install it: pip install "
            '"gato[metrics]"'
        )


@functools.cache
def _metric(name: str) -> Any:
    require_sacrebleu()
    from sacrebleu.metrics import BLEU, CHRF  # type: ignore[attr-defined]

    # Of texts that are all shorter than four words BLEU would be 0 whatever they say; with this
    # its longest runs are as long as the texts, and nothing else changes.
    return BLEU(effective_order=True) if name == "bleu" else CHRF()


def overlap_rows(name: str, said: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """Return (N, S) counts of texts and their references, for ``bleu`` or ``chrf``."""
    most = max(len(r) for r in references)
    # sacrebleu wants as many lists as a text has references at most, and no reference empty
    streams = [[r[i] or " " if i < len(r) else None for r in references] for i in range(most)]
    return np.array(_metric(name)._extract_corpus_statistics(list(said), streams), float)


def overlap_of(name: str, sums: np.ndarray) -> np.ndarray:
    """Return (R,) BLEU or chrF, 0 to 100, of (R, S) summed counts."""
    metric = _metric(name)
    rows = np.rint(sums).astype(np.int64).tolist()
    return np.array([metric._compute_score_from_stats(row).score for row in rows])


def cider_d(said: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """Return (N,) CIDEr-D of captions, each with one or more references.

    Not a number for fewer than two captions: all runs of words would be equally common.
    """
    if len(said) != len(references) or not all(references):
        raise ValueError(
            f"expected one or more references for each of {len(said)} captions; got "
            f"{len(references)}, the fewest {min(map(len, references), default=0)}."
        )
    if len(said) < 2:
        return np.full(len(said), np.nan)
    counted = [[_runs(text) for text in texts] for texts in references]
    seen = Counter(run for texts in counted for run in {r for t in texts for r in t})
    weights = {run: float(np.log(len(said)) - np.log(count)) for run, count in seen.items()}
    unseen = float(np.log(len(said)))
    return np.array(
        [
            np.mean([_alike(_runs(text), truth, weights, unseen) for truth in texts])
            for text, texts in zip(said, counted, strict=True)
        ]
    )


def words(text: str) -> list[str]:
    """Return the words that CIDEr-D compares.

    >>> words("A red ball, and the agent's key.")
    ['a', 'red', 'ball', 'and', 'the', "agent's", 'key']
    """
    return re.findall(r"\w+(?:'\w+)*", text.lower())


def _runs(text: str) -> Counter[Run]:
    return Counter(_runs_of(words(text)))


def _runs_of(found: Sequence[str]) -> Iterator[Run]:
    for length in range(1, LONGEST + 1):
        for start in range(len(found) - length + 1):
            yield tuple(found[start : start + length])


def _alike(
    said: Counter[Run], truth: Counter[Run], weights: dict[Run, float], unseen: float
) -> float:
    """Return CIDEr-D of one caption and one reference."""
    products, said_norm, truth_norm = np.zeros((3, LONGEST))
    for run, count in truth.items():
        truth_norm[len(run) - 1] += (count * weights[run]) ** 2
    for run, count in said.items():
        weight = weights.get(run, unseen)
        said_norm[len(run) - 1] += (count * weight) ** 2
        # clipped: saying a run more often than the truth does earns nothing
        products[len(run) - 1] += min(count, truth[run]) * truth[run] * weight**2
    norms = np.sqrt(said_norm * truth_norm)
    cosines = np.divide(products, norms, out=np.zeros(LONGEST), where=norms > 0)
    # Convention: a text's length is its runs of two words, as in COCO's evaluation.
    lengths = [sum(n for run, n in text.items() if len(run) == 2) for text in (said, truth)]
    penalty = np.exp(-((lengths[0] - lengths[1]) ** 2) / (2 * SIGMA**2))
    return float(SCALE * penalty * cosines.mean())
