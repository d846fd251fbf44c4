"""Records of benches: what is beyond noise is told, what is not is not, damage is named."""

from __future__ import annotations

import json
import math
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gato import bench, bench_records, cli
from gato.bench_common import Result, result
from gato.bench_records import chance_of, compare, read

HERE, THERE = "a machine", "another machine"


def record(*results: Result, hardware: str = HERE, **changes: Any) -> dict[str, Any]:
    """Return a record of the bench `made`."""
    return {
        "name": "made",
        "hardware": hardware,
        "versions": {"commit": "abc"},
        "results": list(results),
        **changes,
    }


def live(ratios: list[float], case: str = "made: it", **options: Any) -> Result:
    """Return a result whose baseline was measured beside it, on a machine whose pace wanders."""
    theirs = [100.0 + i % 3 for i in range(len(ratios))]
    ours = [a * b for a, b in zip(ratios, theirs, strict=True)]
    return result(case, ours, "things/s", theirs, "the plain way", **options)


def fixed(values: list[float], case: str = "made: it", **options: Any) -> Result:
    """Return a result beside a figure that is not measured."""
    return result(case, values, "things/s", 10.0, "what is asked", **options)


def verdict(now: Result, before: Result, **options: Any) -> str:
    """Return what is said of the only case of two records."""
    (case,) = compare(record(now), record(before), **options)["cases"]
    return case["verdict"]


STEADY = [5.0, 5.02, 4.99, 5.01, 4.98]
NOISY = [5.0, 6.1, 4.1, 5.5, 4.5]


def times(values: list[float], factor: float) -> list[float]:
    """Return the values times a factor, in another order."""
    return [v * factor for v in reversed(values)]


@pytest.mark.parametrize("made", [live, fixed])
def test_a_regression_beyond_noise_is_told(made):
    assert verdict(made(times(STEADY, 0.8)), made(STEADY)) == "slower"
    assert verdict(made(times(STEADY, 1.3)), made(STEADY)) == "faster"
    assert verdict(made(STEADY), made(STEADY)) == "same"


def test_what_may_be_chance_is_not_told():
    assert verdict(live(times(NOISY, 0.88)), live(NOISY)) == "same"  # beyond the tolerance
    assert verdict(live(times(STEADY, 0.95)), live(STEADY)) == "same"  # within it
    assert verdict(live(times(STEADY, 0.95)), live(STEADY), tolerance=0.03) == "slower"


def halved(before: Result) -> Result:
    """Return a result in which both sides run at half the pace."""
    theirs = [v / r / 2 for v, r in zip(before["repeats"], before["ratios"], strict=True)]
    return result("made: it", [v / 2 for v in before["repeats"]], "things/s", theirs, "it")


def test_what_slows_the_baseline_too_is_told_on_a_calm_machine():
    before = live(STEADY)
    now = halved(before)
    assert now["ratio"] == before["ratio"]
    (case,) = compare(record(now), record(before))["cases"]
    assert (case["verdict"], case["by"], case["change"]) == ("slower", "value", -0.5)
    assert verdict(before, now) == "same"  # the ratio, which is the worse verdict
    assert verdict(live(times(STEADY, 0.8)), before) == "slower"
    (case,) = compare(record(live(times(STEADY, 0.8))), record(before))["cases"]
    assert case["by"] == "ratio"


def test_a_slower_machine_is_no_regression_where_the_baseline_is_slower_too():
    before = live(STEADY)
    for changes in ({"hardware": THERE}, {"warning": "the machine is busy"}):
        (case,) = compare(record(halved(before), **changes), record(before))["cases"]
        assert (case["verdict"], case["by"]) == ("same", "ratio")


def test_less_is_better_where_the_result_says_so():
    made = {"better": "less"}
    assert verdict(live(times(STEADY, 1.3), **made), live(STEADY, **made)) == "slower"
    assert verdict(live(times(STEADY, 0.7), **made), live(STEADY, **made)) == "faster"


def test_too_few_repeats_take_a_larger_change():
    before = [5.0, 5.1, 4.9]  # three beside three overlap by chance once in ten
    assert verdict(fixed(times(before, 0.8)), fixed(before)) == "same"
    assert verdict(fixed(times(before, 0.6)), fixed(before)) == "slower"


@pytest.mark.parametrize("made", [live, fixed])
@pytest.mark.parametrize(("now", "before"), [(1, 5), (2, 5), (5, 2), (1, 1), (2, 2)])
def test_of_one_or_two_repeats_the_noise_is_unknown(made, now, before):
    for factor in (0.2, 1.0, 5.0):
        repeats = [v * factor for v in STEADY[:now]]
        found = compare(record(made(repeats)), record(made(STEADY[:before])))
        (case,) = found["cases"]
        assert case["verdict"] == "noise unknown"
        assert case["change"] == pytest.approx(factor - 1, abs=0.02)
        assert (found["compared"], found["slower"]) == (0, [])
        assert found["noise_unknown"] == ["made: it"]
    memory = {"unit": "MB", "better": "less"}
    assert verdict(fixed([90.0]) | memory, fixed([60.0]) | memory) == "slower"


def test_on_a_busy_machine_a_bare_value_is_compared_only_where_it_is_of_cpu_time():
    def per_core(values: list[float]) -> Result:
        return fixed(values) | {"unit": "things/s/core"}

    for made, said in ((fixed, "not compared"), (per_core, "slower"), (live, "slower")):
        for busy in range(2):
            pair = [record(made(times(STEADY, 0.8))), record(made(STEADY))]
            pair[busy]["warning"] = "the machine is busy"
            assert compare(*pair)["cases"][0]["verdict"] == said


def test_of_other_hardware_only_ratios_are_compared():
    before = record(live(STEADY), fixed(STEADY, "made: bare"), hardware=THERE)
    now = record(live(times(STEADY, 0.5)), fixed(times(STEADY, 0.5), "made: bare"))
    found = compare(now, before)
    assert not found["same_hardware"]
    assert found["hardware_before"] == THERE
    assert [c["verdict"] for c in found["cases"]] == ["differs", "not compared"]
    assert found["slower"] == []
    assert found["compared"] == 1
    assert compare(record(live(STEADY)), before)["cases"][0]["verdict"] == "same"


def test_cases_that_are_new_or_missing_are_named():
    before = record(live(STEADY, "made: old"), live(STEADY, "other: not run now"))
    found = compare(record(live(STEADY, "made: new")), before)
    assert [(c["case"], c["verdict"]) for c in found["cases"]] == [
        ("made: new", "new"),
        ("made: old", "missing"),
    ]
    assert found["slower"] == []


def test_another_unit_is_not_compared():
    now = result("made: it", STEADY, "GB/s", STEADY, "it")
    assert verdict(now, live(STEADY)) == "not compared"


def test_a_record_without_repeats_is_compared_by_its_medians():
    before = live(STEADY)
    del before["repeats"], before["ratios"]
    now = fixed(times(STEADY, 0.5))
    now["value"] = before["value"] / 2
    assert verdict(now, before) == "noise unknown"


def test_chance_is_the_share_of_orders_at_least_as_unlike():
    rng = np.random.default_rng(0)
    for m, n in ((3, 4), (5, 5), (1, 6)):
        values = rng.permutation(m + n).astype(float)
        a, b = values[:m], values[m:]

        def unlike(a: np.ndarray, b: np.ndarray) -> float:
            above = (a[:, None] > b).sum()
            return min(above, a.size * b.size - above)

        orders = []
        for chosen in combinations(range(m + n), m):
            mask = np.isin(np.arange(m + n), chosen)
            orders.append(unlike(values[mask], values[~mask]))
        share = np.mean(np.array(orders) <= unlike(a, b))
        assert chance_of(list(a), list(b)) == pytest.approx(min(1.0, share), abs=1e-12)
    assert chance_of([1.0] * 5, [1.0] * 5) == 1.0
    assert chance_of(STEADY, times(STEADY, 2)) == pytest.approx(2 / math.comb(10, 5))


# ---- files -----------------------------------------------------------------------------------


def test_a_record_is_read_as_it_was_saved(tmp_path: Path):
    made = record(live(STEADY))
    bench_records.save(made, tmp_path / "record.json")
    assert read(tmp_path / "record.json") == made
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"]


def _without(key: str) -> dict[str, Any]:
    return {k: v for k, v in record(live(STEADY)).items() if k != key}


DAMAGED = {
    "got no JSON": '{"name": "made", "resu',
    "got list": "[]",
    "no results": json.dumps(_without("results")),
    "no hardware": json.dumps(_without("hardware")),
    "results is 3": json.dumps(record() | {"results": 3}),
    "names no case": json.dumps(record({"value": 1.0})),
    "value of 'made: it' is 'fast'": json.dumps(record(live(STEADY) | {"value": "fast"})),
    "ratio of 'made: it' is nan": json.dumps(record(live(STEADY) | {"ratio": math.nan})),
    "repeats of 'made: it'": json.dumps(record(live(STEADY) | {"repeats": [1, None]})),
}


@pytest.mark.parametrize("told", DAMAGED)
def test_a_damaged_record_is_refused_before_anything_runs(told, tmp_path, monkeypatch, capsys):
    def run(*arguments: object) -> None:
        raise AssertionError("it ran")

    monkeypatch.setattr("gato.bench_commands.run", run)
    file = tmp_path / "record.json"
    file.write_text(DAMAGED[told])
    for option in ("--compare", "--save"):
        assert cli.main(["bench", "serializer", option, str(file)]) == cli.BAD_INPUT
        said = capsys.readouterr()
        assert told in said.err
        assert str(file) in said.err
        assert file.read_text() == DAMAGED[told]
    assert cli.main(["bench", "--compare", str(tmp_path / "none")]) == cli.BAD_INPUT
    assert cli.main(["bench", "--save", str(tmp_path)]) == cli.BAD_INPUT


# ---- the command -----------------------------------------------------------------------------


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Let there be a bench `made`, which measures what is in this list."""
    values = list(STEADY)
    monkeypatch.setattr(bench, "BENCHES", {"made": bench.Bench("what is made up", 0)})
    monkeypatch.setattr("gato.bench_commands.BENCHES", bench.BENCHES)
    monkeypatch.setattr(bench.bench_machine, "peaks", lambda device: {"matmul GFLOP/s": 100.0})
    monkeypatch.setattr(
        bench.Bench, "run", staticmethod(lambda name, repeats: [live(values[:repeats], floor=900)])
    )
    return values


def test_the_exit_code_tells_of_a_regression(made, tmp_path, capsys):
    file = tmp_path / "new" / "record.json"
    assert cli.main(["bench", "made", "--save", str(file)]) == cli.DONE
    assert cli.main(["bench", "--compare", str(file)]) == cli.DONE
    assert "slower beyond noise: nothing" in capsys.readouterr().out
    made[:] = times(STEADY, 0.5)
    assert cli.main(["bench", "--compare", str(file), "--save", str(file)]) == cli.FAILURE
    said = capsys.readouterr().out
    assert "slower beyond noise: made: it" in said
    assert "-50" in said
    assert cli.main(["bench", "--compare", str(file), "--json"]) == cli.DONE  # it was saved
    found = json.loads(capsys.readouterr().out)
    assert found["comparison"]["cases"][0]["verdict"] == "same"
    made[:] = times(STEADY, 0.45)
    arguments = ["bench", "--compare", str(file), "--tolerance", "0.2"]
    assert cli.main(arguments) == cli.DONE


def test_other_hardware_differs_without_fault_and_is_counted(made, tmp_path, capsys):
    file = tmp_path / "record.json"
    bench_records.save(record(live(times(STEADY, 2)), hardware=THERE), file)
    assert cli.main(["bench", "--compare", str(file)]) == cli.DONE
    said = capsys.readouterr().out
    assert "differs" in said
    assert "cases compared: 1 of 1" in said
    assert "slower beyond noise: nothing" in said


@pytest.mark.parametrize("old", [fixed(STEADY), live(STEADY, "made: another")])
def test_where_nothing_could_be_compared_the_exit_code_says_so(made, old, tmp_path, capsys):
    file = tmp_path / "record.json"
    bench_records.save(record(old, hardware=THERE), file)
    assert cli.main(["bench", "--compare", str(file)]) == cli.FAILURE
    said = capsys.readouterr()
    assert f"nothing could be compared with {file}" in said.err
    assert "cases compared: 0 of" in said.out


def test_one_repeat_is_no_regression_and_the_command_says_why(made, tmp_path, capsys):
    file = tmp_path / "record.json"
    assert cli.main(["bench", "made", "--save", str(file)]) == cli.DONE
    made[:] = times(STEADY, 0.5)
    assert cli.main(["bench", "--compare", str(file), "--repeats", "2"]) == cli.DONE
    said = capsys.readouterr()
    assert "noise is unknown: 1; they take at least 3 repeats now and before" in said.err
    assert "noise unknown" in said.out
    assert "cases compared: 0 of 1" in said.out
    assert "slower beyond noise: nothing" in said.out


def test_what_is_printed_has_spread_floor_and_baseline(made, capsys):
    assert cli.main(["bench", "--repeats", "4", "--json"]) == cli.DONE
    found = json.loads(capsys.readouterr().out)
    assert found.keys() >= {"name", "hardware", "versions", "results", "machine", "peaks"}
    (one,) = found["results"]
    assert len(one["repeats"]) == 4
    assert one["of_floor"] == pytest.approx(one["value"] / 900)
    assert cli.main(["bench"]) == cli.DONE
    said = capsys.readouterr().out
    assert all(part in said for part in ("made: it", "the plain way", "900", "matmul GFLOP/s 100"))


def test_a_bench_that_fails_is_named_and_the_others_run(made, monkeypatch, capsys, tmp_path):
    def run(name: str, repeats: int) -> list[Result]:
        if name == "broken":
            raise RuntimeError("out of memory")
        return [live(STEADY)]

    monkeypatch.setitem(bench.BENCHES, "broken", bench.Bench("nothing", 0))
    monkeypatch.setattr(bench.Bench, "run", staticmethod(run))
    file = tmp_path / "record.json"
    assert cli.main(["bench", "broken", "made", "--save", str(file)]) == cli.FAILURE
    assert "broken failed: RuntimeError: out of memory" in capsys.readouterr().out
    assert [r["case"] for r in read(file)["results"]] == ["made: it"]
    assert cli.main(["bench", "broken"]) == cli.FAILURE
    assert capsys.readouterr().err.endswith("gato: out of memory\n")


def test_a_bench_that_there_is_no_more_is_told(made, tmp_path, capsys):
    file = tmp_path / "record.json"
    bench_records.save(record(live(STEADY), name="gone made"), file)
    assert cli.main(["bench", "--compare", str(file)]) == cli.DONE
    assert "gone: a bench of the record that there is no more" in capsys.readouterr().err
    bench_records.save(record(name="gone"), file)
    assert cli.main(["bench", "--compare", str(file)]) == cli.BAD_INPUT
    assert "expected a record of made" in capsys.readouterr().err


def test_the_list_measures_nothing(tmp_path, capsys):
    for more in (["serializer"], ["--save", str(tmp_path / "record.json")]):
        assert cli.main(["bench", "list", *more]) == cli.BAD_INPUT
        assert "measures nothing" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_benches_are_listed(capsys):
    assert cli.main(["bench", "list", "--json"]) == cli.DONE
    listed = json.loads(capsys.readouterr().out)
    assert {"serializer", "attention", "train", "rollout", "latency", "data"} <= {
        b["bench"] for b in listed
    }
    assert all(b["seconds"] > 0 for b in listed)
