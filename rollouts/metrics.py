"""What measures of language share: figures with intervals, kept so that two can be compared.

A metric is kept as its statistics per record, from whose sums over the records its value follows:
of a share, how many were right and how many were asked; of BLEU, the counts of matching words. So
intervals are a bootstrap over records (of what is asked about one record, all is drawn together; so
are records that belong together, as frames of one game or questions about one picture), and two
results on the same records are compared by drawing the same records for both.

A few records drawn anew look too sure. So where each is right or wrong, on its own, the interval is
Wilson's, as of rates of success, and of the difference to other records Newcombe's; whether one on
the same records is significant an exact sign test says, of those that came out differently.

Convention: intervals cover 95%, are percentiles of `RESAMPLES` draws but for the above, and there
is none for fewer than `FEWEST` records. Where all came out alike, drawing them anew would make one
of no width: of any share it is Wilson's then, of anything else there is none.

Legend: N records, S statistics of one, R resamples.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gato.rollouts.overlap import overlap_of
from gato.rollouts.statistics import (
    BLOCK,
    FEWEST,
    RESAMPLES,
    newcombe,
    percentiles,
    sign_test,
    wilson,
)

Record = Mapping[str, Any]
"""An example of language, as `gato.envs.records` describes it."""
SAMPLES = 12
"""Examples that a result shows."""
ALPHA = 0.05
"""A difference that chance explains less often is significant."""


@dataclass(frozen=True)
class Options:
    """What an evaluation asks of every measure."""

    seed: int = 0
    """Of the bootstrap, and of whatever else is drawn."""
    max_tokens: int = 64
    """The most tokens of an answer; longer true answers raise it."""
    choices: tuple[str, ...] = ()
    """Answers to choose among, where the records name none themselves."""
    groups: tuple[int, ...] = ()
    """For each record the number of those that it belongs to; nothing where each is on its own."""


@dataclass(frozen=True)
class Figure:
    """A metric before it is summed up."""

    rows: Any
    """(N, S) statistics, one row per record; (N,) is one number per record, whose mean is taken."""
    of: str = "share"
    """How sums over records become the value: one of `AGGREGATES`."""
    records: Sequence[int] | None = None
    """Which record each row is of, where not every record has one."""


def truths(record: Record) -> list[str]:
    """Return the true texts of a caption, each once: its own, and ``meta["references"]``."""
    more = (record.get("meta") or {}).get("references", ())
    return list(dict.fromkeys([record["text"], *more]))


def divided(tasks: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a result's tasks of control and those of language, which name their kind."""
    language = {name: row for name, row in tasks.items() if "kind" in row}
    return {name: row for name, row in tasks.items() if name not in language}, language


def measured(
    figures: Mapping[str, Figure],
    samples: Sequence[Mapping[str, Any]],
    options: Options,
    **more: Any,
) -> dict[str, Any]:
    """Return the result of a measure.

    Args:
        figures: metrics by name; all are of the same records.
        samples: some of what was asked, each with ``asked``, ``said``, ``wanted`` (a list of texts)
            and ``right``; with ``image`` where a picture was shown, which is taken out of JSON and
            stands on the page.
        options: of the evaluation.
        more: further entries of the result.
    """
    count = max((len(f.rows) for f in figures.values()), default=0)
    told = {name: summed_up(f, options.seed, options.groups) for name, f in figures.items()}
    return {"count": count, "metrics": told, **more, "samples": [dict(s) for s in samples]}


def summed_up(figure: Figure, seed: int = 0, groups: Sequence[int] = ()) -> dict[str, Any]:
    """Return a metric's value and interval, and the statistics that they follow from.

    Args:
        figure: the metric.
        seed: of the bootstrap.
        groups: of all records: those of one number are drawn together.
    """
    rows = np.asarray(figure.rows, float)
    if rows.ndim == 1:
        rows = np.stack([rows, np.ones_like(rows)], 1)  # (N, 2)
    value = float(AGGREGATES[figure.of](rows.sum(0, keepdims=True))[0])
    told = {
        "value": value if math.isfinite(value) else None,
        "ci95": _interval(_together(rows, groups, figure.records), figure.of, value, seed),
        "of": figure.of,
        "per_record": [[_plain(x) for x in row] for row in rows.tolist()],
    }
    if figure.records is not None and list(figure.records) != list(range(len(rows))):
        told["records"] = [int(number) for number in figure.records]
    return told


def difference(
    first: Mapping[str, Any],
    second: Mapping[str, Any],
    paired: bool,
    seed: int = 0,
    groups: tuple[Sequence[int], Sequence[int]] = ((), ()),
) -> dict[str, Any]:
    """Return the second value of a metric minus the first, with interval and significance.

    Args:
        first: as `summed_up` returns it.
        second: alike.
        paired: both are of the same records in the same order, which are drawn for both at once.
        seed: of the draws.
        groups: of the records of both; see `summed_up`.
    """
    result: dict[str, Any] = {"difference": None, "ci95": None, "significant": None}
    if first["value"] is None or second["value"] is None:
        return result
    result["difference"] = second["value"] - first["value"]
    a, b = (
        _together(np.asarray(f["per_record"], float), g, f.get("records"))
        for f, g in zip((first, second), groups, strict=True)
    )
    if min(len(a), len(b)) < FEWEST:
        return result
    counted = _counted(a, first["of"]) and _counted(b, second["of"])
    if counted and not paired:
        ends = newcombe(a[:, 0], b[:, 0])
        return result | {"ci95": ends, "significant": not ends[0] <= 0.0 <= ends[1]}
    drawn = _drawn(b, second["of"], seed if paired else seed + 1) - _drawn(a, first["of"], seed)
    drawn = drawn[np.isfinite(drawn)]
    if not len(drawn):
        return result
    ends = percentiles(drawn)
    if counted:
        better, worse = (int((x[:, 0] > y[:, 0]).sum()) for x, y in ((b, a), (a, b)))
        if sign_test(better, worse) < ALPHA:
            return result | {"ci95": ends, "significant": True}
        ends = [min(ends[0], 0.0), max(ends[1], 0.0)]
    return result | {"ci95": ends, "significant": not ends[0] <= 0.0 <= ends[1]}


def _counted(rows: np.ndarray, of: str) -> bool:
    """Return whether rows are of a share, each of one thing that is right or wrong."""
    right, asked = rows[:, 0], rows[:, 1]
    return of == "share" and bool((asked == 1).all() and ((right == 0) | (right == 1)).all())


def _together(
    rows: np.ndarray, groups: Sequence[int], records: Sequence[int] | None = None
) -> np.ndarray:
    """Return the sums of rows that belong together; row by row the records are as `Figure` says."""
    if not len(groups):
        return rows
    of_rows = np.asarray(groups)[np.arange(len(rows)) if records is None else list(records)]
    found, numbers = np.unique(of_rows, return_inverse=True)
    sums = np.zeros((len(found), rows.shape[1]))
    np.add.at(sums, numbers, rows)
    return sums


def _plain(number: float) -> int | float | None:
    """Return a number as JSON has it: counts whole, and nothing for what is no number."""
    if not math.isfinite(number):
        return None
    return int(number) if number.is_integer() else number


def _interval(rows: np.ndarray, of: str, value: float, seed: int) -> list[float] | None:
    if len(rows) < FEWEST or not math.isfinite(value):
        return None
    if not _counted(rows, of):
        drawn = _drawn(rows, of, seed)
        drawn = drawn[np.isfinite(drawn)]
        if not len(drawn):
            return None
        if float(np.ptp(drawn)) >= 1e-12 * max(1.0, abs(value)):
            return percentiles(drawn)
        if of != "share":
            return None
    low, high = wilson(value * len(rows), len(rows))
    return [low, min(high, 1.0)]


def _drawn(rows: np.ndarray, of: str, seed: int) -> np.ndarray:
    """Return (R,) values of as many records as there are, drawn with replacement.

    Of as many records and the same seed, the same ones are drawn.
    """
    rng, records = np.random.default_rng(seed), len(rows)
    block = max(1, BLOCK // records)
    values = []
    for start in range(0, RESAMPLES, block):
        draws = min(block, RESAMPLES - start)
        times = rng.multinomial(records, np.full(records, 1.0 / records), draws)  # (R, N)
        values.append(AGGREGATES[of](times @ rows))
    return np.concatenate(values)


def _ratio(sums: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(sums[:, 0] / sums[:, 1])


AGGREGATES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "share": _ratio,  # of what was asked, from 0 to 1: a sum, and of how many
    "ratio": _ratio,  # of anything else
    "exponential": lambda sums: np.exp(_ratio(sums)),  # perplexity, of nats and tokens
    "bleu": functools.partial(overlap_of, "bleu"),
    "chrf": functools.partial(overlap_of, "chrf"),
}
"""From (R, S) sums of statistics to (R,) values."""
COLUMNS = {"bleu": 10, "chrf": 18}
"""Statistics of a record, where they are not two."""
