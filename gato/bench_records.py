"""Records of benches: saved whole or not at all, and compared case by case.

Two records are compared by what a machine's mood changes least: where a case has a baseline that
was measured beside it, by the ratio to that; else by the value. On the same hardware, calm both
times, a case with a baseline is compared by its value too, and the worse verdict is told: a
baseline that runs our code is slowed by what slows ours, and the ratio says nothing of it. A change
is told where the medians differ by more than the tolerance *and* the ranks of the repeats would
seldom come about by chance (Mann-Whitney, exact: below `LEVEL`, for which five repeats beside five
must hardly overlap). Where there are too few repeats for that, it is told from `FEW` times the
tolerance on; of fewer than `FEWEST` on one side nobody knows the noise, and nothing is told, but of
memory, which is measured once. What a busy machine measured without a baseline says nothing, but
for units per core, which are of CPU time. On other hardware ratios are lawfully others: a change is
told, as no fault.

    verdict   slower, faster, same, differs (a ratio, on other hardware), new, missing,
              noise unknown (too few repeats),
              not compared (no baseline, and other hardware or a busy one)
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gato.bench_common import Result
from gato.envs.files import make_folder, require_writable, write_atomically

Record = dict[str, Any]
TOLERANCE = 0.1
LEVEL = 0.02
FEW, FEWEST = 3.0, 3
UNKNOWN = "noise unknown"
TINY = 1e-12
WORST_FIRST = ("slower", UNKNOWN, "same", "faster")


def check_place(path: Path) -> None:
    """Make the folder of a record, and see that it can be written there: before minutes of work.

    Raises:
        ValueError: where it cannot, or where a file lies there that is no record.
    """
    make_folder(path.parent, "a folder for the record")
    require_writable(path, "a record")
    if path.exists():
        try:
            read(path)
        except ValueError as error:
            raise ValueError(f"{error} It is not written over: choose another file.") from error


def save(record: Record, path: Path) -> None:
    """Write a record; killed anywhere, the file is the old one or the new one."""
    write_atomically(path, (json.dumps(record, indent=1) + "\n").encode())


def read(path: Path) -> Record:
    """Return a saved record.

    Raises:
        FileNotFoundError: where there is none.
        ValueError: for a file that is none, saying what it lacks.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"expected a record of gato bench in {path}; got no JSON.") from error
    lacks = _lacks(record)
    if lacks is not None:
        raise ValueError(f"expected a record of gato bench in {path}; {lacks}.")
    assert isinstance(record, dict)
    return record


def _lacks(record: Any) -> str | None:
    if not isinstance(record, dict):
        return f"got {type(record).__name__} instead of an object"
    for key, kind in (("name", str), ("hardware", str), ("versions", dict), ("results", list)):
        if not isinstance(record.get(key), kind):
            return f"it has no {key}" if key not in record else f"its {key} is {record[key]!r}"
    for i, result in enumerate(record["results"]):
        if not isinstance(result, dict) or not isinstance(result.get("case"), str):
            return f"result {i} names no case"
        for key in ("value", "baseline", "ratio"):
            if not _number(result.get(key)):
                return f"{key} of {result['case']!r} is {result.get(key)!r}"
        for key in ("repeats", "ratios"):
            found = result.get(key)
            if found is not None and not (isinstance(found, list) and all(map(_number, found))):
                return f"{key} of {result['case']!r} are {found!r}"
    return None


def _number(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and value >= 0


# ---- comparing -------------------------------------------------------------------------------


def compare(now: Record, before: Record, tolerance: float = TOLERANCE) -> Record:
    """Return what has changed: the cases with their verdicts, and whether the hardware has.

    Only cases of the benches that ran now are looked at.
    """
    alike = now["hardware"] == before["hardware"]
    calm = not (now.get("warning") or before.get("warning"))
    ran = set(now["name"].split())
    old = {r["case"]: r for r in before["results"] if bench_of(r) in ran}
    cases = [
        _compared(result, old[result["case"]], alike, calm, tolerance)
        if result["case"] in old
        else {"case": result["case"], "verdict": "new"}
        for result in now["results"]
    ]
    met = {result["case"] for result in now["results"]}
    cases += [{"case": case, "verdict": "missing"} for case in old if case not in met]
    return {
        "hardware_before": before["hardware"],
        "same_hardware": alike,
        "busy": not calm,
        "commit_before": before["versions"].get("commit"),
        "tolerance": tolerance,
        "cases": cases,
        "compared": sum("by" in c and c["verdict"] != UNKNOWN for c in cases),
        "noise_unknown": [c["case"] for c in cases if c["verdict"] == UNKNOWN],
        "slower": [c["case"] for c in cases if c["verdict"] == "slower"],
    }


def bench_of(result: Result) -> str:
    """Return the bench that a result is of; before it was recorded, its case began with it."""
    return str(result.get("bench") or result["case"].partition(":")[0])


def _compared(now: Result, before: Result, alike: bool, calm: bool, tolerance: float) -> Record:
    found: Record = {"case": now["case"]}
    live = bool(now.get("ratios")) and bool(before.get("ratios"))
    undisturbed = calm or now["unit"].endswith("/core")
    if not live and not (alike and undisturbed):
        return found | {"verdict": "not compared"}
    if before.get("unit") != now["unit"]:
        return found | {"verdict": "not compared", "unit_before": before.get("unit")}
    judged = [_judged(now, before, "ratio", "ratios", tolerance)] if live else []
    if alike and undisturbed:
        judged.append(_judged(now, before, "value", "repeats", tolerance))
    worst = min(judged, key=lambda j: WORST_FIRST.index(j["verdict"]))
    if not alike and worst["verdict"] not in ("same", UNKNOWN):
        worst["verdict"] = "differs"
    return found | worst


def _judged(now: Result, before: Result, by: str, repeats: str, tolerance: float) -> Record:
    """Return the verdict by the ratio or by the value, and what it was found from."""
    after, first = now.get(repeats) or [now[by]], before.get(repeats) or [before[by]]
    chance = chance_of(after, first)
    ranked = 2 / math.comb(len(after) + len(first), len(after)) < LEVEL  # else no ranks would do
    limit = 1 + (tolerance if ranked else FEW * tolerance)
    gain = max(now[by], TINY) / max(before[by], TINY)
    gain = 1 / gain if now.get("better") == "less" else gain
    verdict = "same"
    if max(gain, 1 / gain) > limit and (chance < LEVEL or not ranked):
        verdict = "faster" if gain > 1 else "slower"
    if min(len(after), len(first)) < FEWEST and now["unit"] != "MB":
        verdict = UNKNOWN
    return {
        "verdict": verdict,
        "by": by,
        "before": before[by],
        "now": now[by],
        "change": now[by] / max(before[by], TINY) - 1,
        "chance": chance,
    }


def chance_of(a: Sequence[float], b: Sequence[float]) -> float:
    """Return how often equal distributions would give ranks as unlike as those of `a` and `b`.

    The Mann-Whitney test, exact and two-sided; ties count half.
    """
    above = sum((x > y) + 0.5 * (x == y) for x in a for y in b)
    least = math.floor(min(above, len(a) * len(b) - above) + 0.5)
    ways = _ways(len(a), len(b))
    return min(1.0, 2 * sum(ways[: least + 1]) / math.comb(len(a) + len(b), len(a)))


@functools.cache
def _ways(m: int, n: int) -> tuple[int, ...]:
    """Return, for u = 0 .. m * n, the orders of m and n things in which u pairs are turned."""
    ways = [1] + [0] * (m * n)
    for i in range(1, m + 1):  # the Gaussian binomial coefficient: times (1 - q^(n+i)) / (1 - q^i)
        for u in range(m * n, n + i - 1, -1):
            ways[u] -= ways[u - n - i]
        for u in range(i, m * n + 1):
            ways[u] += ways[u - i]
    return tuple(ways)
