"""Results side by side: what differs by more than chance, and what makes them incomparable."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest

from gato import cli
from gato.rollouts.compare import compare, read_result
from gato.rollouts.statistics import Stratified, of_task


def result(seed: int = 0, shift: float = 0.0, rate: float = 0.5, episodes: int = 40) -> dict:
    """Return the result of an evaluation of three tasks, the last without a normalised score."""
    rng = np.random.default_rng(seed)
    rows = {
        "made/count-v0": ("return", rng.normal(5 + shift, 2, episodes), 0.0, 10.0),
        "made/reach-v0": ("success", rng.random(episodes) < rate, 0.1, 0.9),
        "made/worse-v0": ("return", rng.normal(1 + shift, 1, episodes), 2.0, 2.0),
    }
    tasks = {}
    for name, (measure, scores, low, high) in rows.items():
        by_success = measure == "success"
        row = {
            "measure": measure,
            "returns": scores.astype(float).tolist(),
            "successes": scores.tolist() if by_success else None,
            "seeds": list(range(episodes)),
            "mean_return": float(scores.mean()),
            "success_rate": float(scores.mean()) if by_success else None,
            "random_score": low,
            "expert_score": high,
            "human_score": None,
        }
        tasks[name] = row | of_task(row)
    settings = {"episodes": episodes, "seed": 0, "workers": 2}
    return {"checkpoint": f"run{seed}", "settings": settings, "versions": {}, "summary": {}} | {
        "tasks": tasks
    }


def altered(name: str, **columns: object) -> str:
    """Return JSON of a result with other entries of a task, or without, where they are ``...``."""
    found = result()
    task = found["tasks"][f"made/{name}-v0"] | columns
    found["tasks"][f"made/{name}-v0"] = {k: v for k, v in task.items() if v is not ...}
    return json.dumps(found)


def test_differences_and_whether_chance_explains_them() -> None:
    found = compare({"a": result(0), "b": result(1, 3.0, 0.95), "c": result(2)})
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    count, reach, worse = found["tasks"].values()
    assert count["differences"]["b"]["significant"]
    assert count["differences"]["b"]["difference"] == pytest.approx(0.3, abs=0.12)
    low, high = count["differences"]["b"]["ci95"]
    assert low < count["differences"]["b"]["difference"] < high
    assert not count["differences"]["c"]["significant"]
    assert reach["differences"]["b"]["significant"]
    assert reach["differences"]["b"]["difference"] == pytest.approx(
        reach["scores"]["b"]["expert_normalised"] - reach["scores"]["a"]["expert_normalised"]
    )
    assert worse["normalised"] is False
    assert worse["differences"]["b"]["difference"] == pytest.approx(3.0, abs=1.0), "raw"
    assert found["excluded"] == ["made/worse-v0"]
    assert found["summary"]["b"]["difference"]["significant"]
    assert not found["summary"]["c"]["difference"]["significant"]
    assert "difference" not in found["summary"]["a"]
    rows = [result(1, 3.0, 0.95)["tasks"][t] for t in ("made/count-v0", "made/reach-v0")]
    assert found["summary"]["b"]["episodes_iqm"] == Stratified(rows).trimmed


def test_chance_alone_is_seldom_called_a_difference() -> None:
    called = [
        row["differences"]["b"]["significant"]
        for seed in range(40)
        for row in compare({"a": result(seed), "b": result(100 + seed)})["tasks"].values()
    ]
    assert sum(called) <= 0.12 * len(called)  # of 120, about 6


def test_too_few_episodes_make_no_star(tmp_path: Path, capsys) -> None:
    """However far apart: by chance two returns may lie close together, and far from two others."""
    names = []
    for i, shift in enumerate((0.0, 9.0)):
        names.append(str(tmp_path / f"{i}.json"))
        Path(names[-1]).write_text(json.dumps(result(i, shift, rate=float(i), episodes=3)))
    page = tmp_path / "page.html"
    assert cli.main(["compare", *names, "--report", str(page)]) == cli.DONE
    told = capsys.readouterr().out
    why = "they need 5 episodes of each task or more, and made/count-v0"
    assert f"no intervals: {why}" in told
    assert "*" not in told.replace("* a difference that chance", "")
    assert "(no interval)" in told
    assert f"No intervals: {why}" in page.read_text()
    found = compare({n: read_result(Path(n)) for n in names})
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    for row in found["tasks"].values():
        assert row["differences"][names[1]]["ci95"] is None
        assert row["differences"][names[1]]["significant"] is None
    last = found["summary"][names[1]]
    assert last["difference"]["significant"] is last["mean_ci95"] is None
    assert last["episodes_iqm"] > found["summary"][names[0]]["episodes_iqm"]


def test_what_is_not_the_same_is_told() -> None:
    first, other = result(0), result(1)
    assert compare({"a": first, "b": other})["warnings"] == []
    first["settings"]["max_steps"] = {"made/count-v0": 9, "made/reach-v0": 6, "made/worse-v0": 3}
    other["settings"] = {"episodes": 40, "seed": 3, "workers": 8, "histories": "longer"}
    other["settings"]["max_steps"] = {**first["settings"]["max_steps"], "made/reach-v0": 7}
    other["versions"] = {"numpy": "1.0"}
    other["tasks"]["made/count-v0"]["seeds"] = list(range(100, 140))
    other["tasks"]["made/reach-v0"]["expert_score"] = 0.8
    other["tasks"]["made/worse-v0"]["returns"].pop()
    other["tasks"]["made/reach-v0"]["failures"] = [{"seed": 3, "traceback": "gone"}] * 2
    other["tasks"]["made/more-v0"] = other["tasks"]["made/worse-v0"]
    found = compare({"a": first, "b": other})
    told = " | ".join(found["warnings"])
    for words in (
        "settings differ in seed (a: 0; b: 3)",
        "settings differ in max_steps (a: {'made/reach-v0': 6}; b: {'made/reach-v0': 7})",
        "versions differ in numpy (a: None; b: 1.0)",
        "made/count-v0 was played at other seeds",
        "made/reach-v0 has other reference scores; those of a are used",
        "made/worse-v0 has 40, 39 episodes",
        "made/reach-v0 has 2 failed episodes (b), which count as played",
        "made/more-v0 (b); left out",
    ):
        assert words in told
    assert "workers" not in told, "these decide no score"
    assert "histories" not in told, "these are the policy"
    (reach,) = (found["tasks"]["made/reach-v0"],)
    rate = np.mean(other["tasks"]["made/reach-v0"]["successes"])
    assert reach["scores"]["b"]["expert_normalised"] == pytest.approx((rate - 0.1) / 0.8)


def test_results_without_a_task_in_common_are_refused() -> None:
    other = result(1)
    other["tasks"] = {"made/else-v0": other["tasks"]["made/count-v0"]}
    with pytest.raises(ValueError, match="tasks in common"):
        compare({"a": result(0), "b": other})
    other = deepcopy(result(1))
    other["tasks"]["made/count-v0"]["measure"] = "success"
    with pytest.raises(ValueError, match="measured alike"):
        compare({"a": result(0), "b": other})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "expected JSON"),
        ("[]", "checkpoint, settings, versions, tasks, summary missing"),
        ('{"checkpoint": "x", "settings": {}, "versions": {}, "summary": {}}', "tasks missing"),
        (json.dumps({**result(), "tasks": {"a/b": {"measure": "return"}}}), "returns, successes"),
        (json.dumps({**result(), "tasks": {"a/b": 3}}), "of 'a/b'"),
        (altered("count", mean_return=...), "mean_return missing"),
        (altered("reach", success_rate=...), "success_rate missing"),
        (altered("reach", successes=None), "of 'made/reach-v0' in .*; successes missing"),
        (json.dumps({**result(), "tasks": [3]}), "its tasks are none"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: str, message: str, capsys) -> None:
    file, good = tmp_path / "a.json", tmp_path / "good.json"
    file.write_text(content)
    good.write_text(json.dumps(result()))
    with pytest.raises(ValueError, match=message):
        read_result(file)
    assert cli.main(["compare", str(good), str(file)]) == cli.BAD_INPUT
    assert "gato eval --json FILE" in capsys.readouterr().err


def test_the_command(tmp_path: Path, capsys) -> None:
    names = []
    for i, shift in enumerate((0.0, 3.0)):
        names.append(str(tmp_path / f"{i}.json"))
        Path(names[-1]).write_text(json.dumps(result(i, shift)))
    page = tmp_path / "page.html"
    assert cli.main(["compare", *names, "--report", str(page)]) == cli.DONE
    told = capsys.readouterr().out
    assert "made/count-v0" in told
    assert "*" in told
    assert "<svg" in page.read_text()
    assert cli.main(["compare", *names, "--json"]) == cli.DONE
    assert json.loads(capsys.readouterr().out)["files"] == names
    assert cli.main(["compare", names[0], str(tmp_path / "gone.json")]) == cli.BAD_INPUT
    told = capsys.readouterr().err
    assert "gone.json; it cannot be read (No such file or directory). Give a file that" in told
    assert cli.main(["compare", names[0]]) == cli.BAD_INPUT
    assert cli.main(["compare", names[0], names[0]]) == cli.BAD_INPUT
    assert cli.main(["compare", *names, "--report", "/nowhere/a.html"]) == cli.BAD_INPUT
