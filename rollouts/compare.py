"""Results of several evaluations side by side: what differs, and whether by more than chance.

The others are compared with the first. All are normalised by the reference scores of the first,
so that a difference is one of the policies. With too few episodes a difference has no interval, and
is never called significant.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gato.rollouts.metrics import AGGREGATES, COLUMNS, difference, divided
from gato.rollouts.statistics import (
    Stratified,
    difference_interval,
    excluded,
    normalised,
    of_task,
    percentiles,
    too_few,
)

Result = Mapping[str, Any]
REQUIRED = ("checkpoint", "settings", "versions", "tasks", "summary")
REFERENCES = ("random_score", "expert_score")
OF_A_TASK = ("measure", "returns", "successes", "mean_return", "success_rate", *REFERENCES)
NO_MATTER = ("workers", "max_batch", "device", "histories", "experts")
"""Settings of how fast episodes are played, and of the policies themselves."""


def read_result(path: Path) -> dict[str, Any]:
    """Return what `gato eval --json FILE` wrote.

    Raises:
        ValueError: for any other file, saying what is missing.
    """
    advice = "Give a file that `gato eval --json FILE` wrote."
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        why = error.strerror or error
        raise ValueError(
            f"expected the result of an evaluation in {path}; it cannot be read ({why}). {advice}"
        ) from error
    except ValueError as error:  # also of its encoding
        raise ValueError(f"expected JSON in {path}; {error}. {advice}") from error
    missing = [k for k in REQUIRED if not isinstance(found, dict) or k not in found]
    if missing or not isinstance(found["tasks"], dict):
        what = f"{', '.join(missing)} missing" if missing else "its tasks are none"
        raise ValueError(f"expected the result of an evaluation in {path}; {what}. {advice}")
    for name, task in found["tasks"].items():
        if isinstance(task, dict) and "kind" in task:
            _check_language(name, task, path, advice)
            continue
        missing = [k for k in OF_A_TASK if not isinstance(task, dict) or k not in task]
        if not missing:
            by_success = task["measure"] == "success"
            needed = ("successes", "success_rate") if by_success else ("mean_return",)
            missing = [k for k in needed if task[k] is None]
        if missing or not task["returns"]:
            what = f"{', '.join(missing)} missing" if missing else "there are none"
            raise ValueError(f"expected the episodes of {name!r} in {path}; {what}. {advice}")
    return dict(found)


def _check_language(name: str, task: Mapping[str, Any], path: Path, advice: str) -> None:
    """Raise ValueError for a language task that lacks what it is compared by."""
    metrics, records = task.get("metrics"), task.get("records")
    groups = task.get("groups", [])
    if isinstance(metrics, dict) and isinstance(records, list) and isinstance(groups, list):
        good = len(groups) in (0, len(records)) and all(isinstance(g, int) for g in groups)
        if good and all(_whole(metric, len(records)) for metric in metrics.values()):
            return
    raise ValueError(
        f"expected metrics, with their statistics per record, of {name!r} in {path}; they are "
        f"missing or damaged. {advice}"
    )


def _whole(metric: Any, count: int) -> bool:
    """Return whether a metric of `count` records, or some of them, has what it is compared by."""
    needed = {"value", "ci95", "of", "per_record"}
    if not isinstance(metric, dict) or not needed <= metric.keys():
        return False
    try:
        rows = np.asarray(metric["per_record"], float)
    except (TypeError, ValueError):
        return False
    value = metric["value"]
    known = isinstance(metric["of"], str) and metric["of"] in AGGREGATES
    if not known or not (value is None or isinstance(value, int | float)):
        return False
    if rows.ndim != 2 or rows.shape[1] != COLUMNS.get(metric["of"], 2):
        return not len(rows)
    named = metric.get("records")
    if named is None:
        return len(rows) <= count
    fitting = isinstance(named, list) and len(named) == len(rows)
    return fitting and all(isinstance(n, int) and 0 <= n < count for n in named)


def compare(results: Mapping[str, Result], seed: int = 0) -> dict[str, Any]:
    """Return results side by side, as JSON-able data; the aggregates are over the tasks of all.

    Args:
        results: at least two, by the name each is shown under.
        seed: of the bootstrap.
    """
    names = list(results)
    first, others = names[0], names[1:]
    both = [t for t in results[first]["tasks"] if all(t in results[n]["tasks"] for n in others)]
    if not both:
        raise ValueError("expected results with tasks in common; these have none.")
    read = divided({t: results[first]["tasks"][t] for t in both})[1]
    shared = [t for t in both if t not in read]
    warnings = _warnings(results, shared, list(read))
    rows = {n: {t: _like(results[n], results[first], t, seed) for t in shared} for n in names}
    known = [t for t in shared if excluded(rows[first][t]) is None]
    drawn = {
        n: Stratified([rows[n][t] for t in known], seed + i) for i, n in enumerate(names) if known
    }
    return {
        "files": names,
        "checkpoints": {n: results[n]["checkpoint"] for n in names},
        "warnings": warnings,
        "tasks": {t: _task({n: rows[n][t] for n in names}, seed) for t in shared},
        "language": {t: _read({n: results[n]["tasks"][t] for n in names}, seed) for t in read},
        "summary": {n: _aggregates(drawn[n], drawn[first]) for n in drawn},
        "excluded": [t for t in shared if t not in known],
        "no_intervals": too_few({f"{t} ({n})": rows[n][t] for t in shared for n in names}),
    }


def _like(result: Result, first: Result, task: str, seed: int) -> dict[str, Any]:
    """Return a task's result with the references of the first, and what follows from them."""
    mine = result["tasks"][task]
    theirs = {"human_score": None} | {k: first["tasks"][task][k] for k in REFERENCES}
    if mine["measure"] != first["tasks"][task]["measure"]:
        raise ValueError(
            f"expected {task!r} measured alike in all results; got {mine['measure']!r} and "
            f"{first['tasks'][task]['measure']!r}."
        )
    row = {**mine, **theirs}
    return row | of_task(row, seed)


def _task(rows: Mapping[str, Mapping[str, Any]], seed: int) -> dict[str, Any]:
    first, *others = rows
    base = rows[first]
    known = excluded(base) is None
    result: dict[str, Any] = {"normalised": known, "scores": {}, "differences": {}}
    for name, row in rows.items():
        key = "success_rate" if row["measure"] == "success" else "mean_return"
        kept = ("expert_normalised", "expert_normalised_ci95")
        result["scores"][name] = {"score": row[key], **{k: row[k] for k in kept}}
    for name in others:
        ends = difference_interval(base, rows[name], seed)
        scores = result["scores"]
        difference = scores[name]["score"] - scores[first]["score"]
        sure = None if ends is None else not ends[0] <= 0.0 <= ends[1]
        if known:  # a difference knows no zero point, only the unit
            difference, *ends_ = (
                normalised(x, 0.0, base["expert_score"] - base["random_score"])
                for x in (difference, *(ends or ()))
            )
            ends = ends_ or None
        result["differences"][name] = {"difference": difference, "ci95": ends, "significant": sure}
    return result


def _aggregates(drawn: Stratified, first: Stratified) -> dict[str, Any]:
    found = {
        "episodes_iqm": drawn.trimmed,
        "episodes_iqm_ci95": drawn.interval(drawn.drawn_trimmed),
        "mean": float(drawn.means.mean()),
        "mean_ci95": drawn.interval(drawn.drawn_means.mean(1)),
        "tasks": len(drawn.means),
        "tasks_at_50_percent": int((drawn.means >= 0.5).sum()),
        "tasks_at_100_percent": int((drawn.means >= 1.0).sum()),
    }
    if drawn is not first:
        sure = drawn.sure and first.sure
        ends = percentiles(drawn.drawn_trimmed - first.drawn_trimmed) if sure else None
        found["difference"] = {
            "difference": drawn.trimmed - first.trimmed,
            "ci95": ends,
            "significant": None if ends is None else not ends[0] <= 0.0 <= ends[1],
        }
    return found


def _read(rows: Mapping[str, Result], seed: int) -> dict[str, Any]:
    """Return a language task side by side; the same records are drawn for both where they are."""
    first, *others = rows
    base = rows[first]
    kept = ("value", "ci95", "of")
    names = [m for m in base["metrics"] if all(m in rows[n]["metrics"] for n in others)]
    same = ("records", "groups")
    paired = {n: all(rows[n].get(k, []) == base.get(k, []) for k in same) for n in others}
    return {
        "paired": all(paired.values()),
        "pairs": paired,
        "scores": {
            m: {n: {k: row["metrics"][m][k] for k in kept} for n, row in rows.items()}
            for m in names
        },
        "differences": {
            m: {
                n: {
                    "of": base["metrics"][m]["of"],
                    **difference(
                        base["metrics"][m],
                        rows[n]["metrics"][m],
                        paired[n] and _of_same(base["metrics"][m], rows[n]["metrics"][m]),
                        seed,
                        (base.get("groups", ()), rows[n].get("groups", ())),
                    ),
                }
                for n in others
            }
            for m in names
        },
    }


def _of_same(first: Result, second: Result) -> bool:
    """Return whether two metrics are of the same ones of the same records."""
    some = first.get("records") == second.get("records")
    return some and len(first["per_record"]) == len(second["per_record"])


def _warnings(
    results: Mapping[str, Result], shared: Sequence[str], read: Sequence[str]
) -> list[str]:
    """Return, in sentences, what besides the policy may make a difference."""
    told = []
    names = list(results)
    for part in ("settings", "versions"):
        keys = {k: None for n in names for k in results[n][part]}
        for key in keys:
            values = _differing([_of(results[n][part], key, shared) for n in names])
            if key not in NO_MATTER and values:
                shown = "; ".join(f"{n}: {v}" for n, v in zip(names, values, strict=True))
                told.append(f"{part} differ in {key} ({shown})")
    for task in shared:
        rows = [results[n]["tasks"][task] for n in names]
        counts = [len(row["returns"]) for row in rows]
        if len(set(counts)) > 1:
            told.append(f"{task} has {', '.join(map(str, counts))} episodes")
        elif any(row.get("seeds") != rows[0].get("seeds") for row in rows):
            told.append(f"{task} was played at other seeds")
        for name, row in zip(names, rows, strict=True):
            if failed := len(row.get("failures", ())):
                told.append(f"{task} has {failed} failed episodes ({name}), which count as played")
        if any(row[k] != rows[0][k] for row in rows for k in REFERENCES):
            told.append(f"{task} has other reference scores; those of {names[0]} are used")
    for task in read:
        records = [results[n]["tasks"][task]["records"] for n in names]
        if any(r != records[0] for r in records):
            told.append(f"{task} was asked about other records")
        kept = set.intersection(*(set(results[n]["tasks"][task]["metrics"]) for n in names))
        for name in names:
            if more := [m for m in results[name]["tasks"][task]["metrics"] if m not in kept]:
                told.append(f"only some results have {', '.join(more)} of {task} ({name})")
    for name in names:
        alone = [t for t in results[name]["tasks"] if t not in (*shared, *read)]
        if alone:
            told.append(f"only some results have {', '.join(alone)} ({name}); left out")
    return told


def _differing(values: list[Any]) -> list[Any]:
    """Return values that are not all the same, of mappings what is not; else none."""
    first = values[0]
    if all(v == first for v in values):
        return []
    if not all(isinstance(v, Mapping) for v in values):
        return values
    keys = {k: None for v in values for k in v if any(w.get(k) != v[k] for w in values)}
    return [{k: v.get(k) for k in keys} for v in values]


def _of(part: Mapping[str, Any], key: str, shared: Sequence[str]) -> Any:
    """Return a setting; of one that is listed by task, what the shared tasks have."""
    value = part.get(key)
    if isinstance(value, Mapping) and set(value) & set(shared):
        return {t: value.get(t) for t in shared}
    return value
