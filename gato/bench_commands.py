"""`gato bench`: what it is asked for, and what it prints."""

from __future__ import annotations

import argparse
from typing import Any

from gato import bench_records, kernels
from gato.bench import BENCHES, check_names, run
from gato.printing import print_json, print_table
from gato.telling import tell

FAILURE = 1


def bench(chosen: argparse.Namespace) -> int | None:
    """Measure speed; compare it with a record; return an exit code."""
    if "list" in chosen.names:
        if len(chosen.names) > 1 or chosen.save or chosen.compare:
            raise ValueError("gato bench list measures nothing; it takes no option but --json.")
        _list(chosen.json)
        return None
    before = None if chosen.compare is None else bench_records.read(chosen.compare)
    names = chosen.names or ([] if before is None else _known(before["name"].split()))
    check_names(names)
    if chosen.save is not None:
        bench_records.check_place(chosen.save)
    kernels.use(chosen.attention)
    record = run(names, chosen.repeats, tell)
    if chosen.save is not None:
        bench_records.save(record, chosen.save)
    if before is not None:
        record["comparison"] = {
            "with": str(chosen.compare),
            **bench_records.compare(record, before, chosen.tolerance),
        }
    if chosen.json:
        print_json(record)
    else:
        _print(record)
    comparison = record.get("comparison")
    failed = bool(record["failed"])
    if comparison is not None:
        unknown = comparison["noise_unknown"]
        if unknown:
            tell(
                f"cases of which the noise is unknown: {len(unknown)}; they take at least "
                f"{bench_records.FEWEST} repeats now and before to be judged"
            )
        nothing = not comparison["compared"] and not unknown
        if nothing:
            tell(
                f"nothing could be compared with {chosen.compare}: no case is in both, or none can"
            )
        failed = failed or bool(comparison["slower"]) or nothing
    return FAILURE if failed else None


def _known(names: list[str]) -> list[str]:
    """Return the benches of a record that there still are."""
    for name in names:
        if name not in BENCHES:
            tell(f"{name}: a bench of the record that there is no more")
    known = [name for name in names if name in BENCHES]
    if not known:
        raise ValueError(f"expected a record of {', '.join(BENCHES)}; got one of {names}")
    return known


def _list(as_json: bool) -> None:
    rows = [
        {
            "bench": name,
            "seconds": bench.seconds,
            "runs unnamed": bench.always,
            "measures": bench.about,
        }
        for name, bench in BENCHES.items()
    ]
    if as_json:
        print_json(rows)
    else:
        print_table(rows, "seconds: on two CPU cores, with five repeats")


def _print(record: dict[str, Any]) -> None:
    versions = [f"{k} {v}" for k, v in record["versions"].items() if v and v != "not installed"]
    print(record["hardware"])
    print(", ".join(versions))
    print("at its best: " + ", ".join(f"{name} {x:,.4g}" for name, x in record["peaks"].items()))
    if record["results"]:
        print_table([_row(result) for result in record["results"]])
    for name, error in record["failed"].items():
        print(f"{name} failed: {error}")
    if "comparison" in record:
        _print_comparison(record["comparison"])


def _row(result: dict[str, Any]) -> dict[str, Any]:
    value, (low, high) = result["value"], result["spread"]
    return {
        "case": result["case"],
        "value": number(value),
        "unit": result["unit"],
        "spread": f"{low / value - 1:+.0%} {high / value - 1:+.0%}" if value else "-",
        "ratio": f"{result['ratio']:.3g}",
        "beside": f"{number(result['baseline'])}: {result['against']}",
        "of its floor": "-" if "floor" not in result else f"{result['of_floor']:.0%}",
        "floor": "-" if "floor" not in result else _floor(result),
    }


def _floor(result: dict[str, Any]) -> str:
    return f"{number(result['floor'])}: {result['floor_from']}"


def number(value: float) -> str:
    """Return a figure with three digits that count, and thousands set apart."""
    if abs(value) < 1:
        return f"{value:.3g}"
    return f"{value:,.{max(0, 3 - len(str(int(abs(value)))))}f}"


def _print_comparison(comparison: dict[str, Any]) -> None:
    commit = comparison["commit_before"]
    print(f"\ncompared with {comparison['with']}" + (f" at {commit}" if commit else ""))
    if not comparison["same_hardware"]:
        print(
            f"of other hardware ({comparison['hardware_before']}): only ratios are compared, "
            "and may differ without fault"
        )
    if comparison["busy"]:
        print("of a busy machine: only ratios, and what is of CPU time, are compared")
    rows = [
        {
            "case": case["case"],
            "": case["verdict"],
            "by": case.get("by", "-"),
            "before": number(case["before"]) if "before" in case else "-",
            "now": number(case["now"]) if "now" in case else "-",
            "change": f"{case['change']:+.1%}" if "change" in case else "-",
            "by chance": f"{case['chance']:.3f}" if "chance" in case else "-",
        }
        for case in comparison["cases"]
    ]
    if rows:
        print_table(rows)
    slower = comparison["slower"]
    print(f"cases compared: {comparison['compared']} of {len(comparison['cases'])}")
    print(f"slower beyond noise: {', '.join(slower) or 'nothing'}")
