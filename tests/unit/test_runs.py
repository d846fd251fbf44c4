"""A list of runs tells from files alone what every run is doing, and what is wrong with files."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gato import cli
from gato.runs import describe, find_runs, row, write_state


def write_lines(run: Path, *lines: dict) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def line(step: int, moment: float, loss: float = 1.0) -> dict:
    return {"step": step, "losses": {"arm": loss}, "tokens_per_second": 50.0, "time": moment}


def checkpoint(run: Path, step: int) -> None:
    folder = run / f"step-{step:08d}"
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (folder / name).touch()
    (run / "latest").write_text(folder.name)


@pytest.fixture
def dead_pid() -> int:
    """Return the number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def rewrite(run: Path, **changes: object) -> None:
    state = json.loads((run / "state.json").read_text())
    (run / "state.json").write_text(json.dumps(state | changes))


@pytest.mark.parametrize("state", ["stopped", "finished", "failed"])
def test_a_run_that_ended_says_how(tmp_path, state):
    write_state(tmp_path, state, 40, 100, "SIGTERM" if state == "stopped" else None)
    checkpoint(tmp_path, 40)
    write_lines(tmp_path, line(20, 1.0), line(40, 2.0, loss=0.5))
    found = describe(tmp_path)
    assert found["state"] == state
    assert found["reason"] == ("SIGTERM" if state == "stopped" else None)
    assert (found["step"], found["steps"], found["checkpoint"]) == (40, 100, "step-00000040")
    assert found["losses"] == {"arm": 0.5}
    assert found["tokens_per_second"] == 50.0
    assert found["seconds_left"] is None
    assert found["faults"] == []


def test_a_living_process_runs_and_its_time_left_follows_from_its_last_lines(tmp_path):
    began = write_state(tmp_path, "running", 0, 100)["updated"]
    assert describe(tmp_path)["seconds_left"] is None  # it has not told anything yet
    write_lines(tmp_path, line(20, began + 10.0))
    assert describe(tmp_path)["seconds_left"] == pytest.approx(80 * 0.5)
    write_lines(tmp_path, line(40, began + 30.0))  # a step takes twice as long now
    found = describe(tmp_path)
    assert (found["state"], found["step"]) == ("running", 40)
    assert found["seconds_left"] == pytest.approx(60 * 1.0)


def test_the_pace_of_an_earlier_process_does_not_count(tmp_path):
    write_lines(tmp_path, line(20, 1e6), line(40, 2e6))
    write_state(tmp_path, "running", 40, 100)
    assert describe(tmp_path)["seconds_left"] is None


SLEEPER = """
import pathlib, sys, time
from gato.runs import write_state
write_state(pathlib.Path(sys.argv[1]), "running", 0, 10)
time.sleep(60)
"""


def test_a_killed_process_has_died(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", SLEEPER, str(tmp_path)])
    while not (tmp_path / "state.json").exists():
        assert child.poll() is None
        time.sleep(0.01)
    assert describe(tmp_path)["state"] == "running"
    child.kill()
    child.wait()
    found = describe(tmp_path)
    assert found["state"] == "died"
    assert str(child.pid) in found["reason"]


def test_another_process_of_the_same_number_is_not_the_run(tmp_path, dead_pid):
    write_state(tmp_path, "running", 0, 10)
    rewrite(tmp_path, pid_began=1)  # this process is there, and began later
    assert describe(tmp_path)["state"] == "died"
    rewrite(tmp_path, pid=dead_pid, pid_began=None)
    assert describe(tmp_path)["state"] == "died"


def test_a_run_on_another_host_is_elsewhere(tmp_path, dead_pid):
    write_state(tmp_path, "running", 0, 10)
    rewrite(tmp_path, host="faraway", pid=dead_pid)
    found = describe(tmp_path)
    assert found["state"] == "elsewhere"
    assert "faraway" in found["reason"]


def test_the_best_validation_and_the_last_evaluation_are_found(tmp_path):
    write_state(tmp_path, "finished", 30, 30)
    for step, loss in ((10, 3.0), (20, 1.5), (30, 2.0)):
        held = {"arm": {"loss": loss, "perplexity": 9.0, "targets": 5}}
        write_lines(
            tmp_path,
            line(step, step),
            {"step": step, "validation": held, "validation_loss": loss, "time": step},
            {"step": step, "evaluation": {"toy/arm-v0": loss / 10}, "time": step},
        )
    found = describe(tmp_path)
    assert found["best_validation"] == {"step": 20, "loss": 1.5}
    assert found["validation"]["loss"] == 2.0
    assert found["validation"]["corpora"]["arm"]["targets"] == 5
    assert found["evaluation"] == {"step": 30, "scores": {"toy/arm-v0": 0.2}}


DAMAGE = {
    "not json": ("state.json", "{", "state.json is damaged"),
    "a list": ("state.json", "[]", "another format"),
    "no state": ("state.json", '{"format": 1, "state": "asleep"}', "'asleep', which is no state"),
    "no pid": ("state.json", '{"format": 1, "state": "running", "step": 1}', "steps is None"),
    "bytes": ("state.json", "\udcff", "state.json is damaged"),
    "half lines": ("metrics.jsonl", '{"step": 1\n7\n{"losses": {}}\n', "3 lines are damaged"),
    "latest": ("latest", "../../etc", "no checkpoint of the run"),
    "no weights": ("latest", "step-00000007", "step-00000007 has no config.json"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_run_is_listed_with_what_is_wrong(tmp_path, name):
    file, content, told = DAMAGE[name]
    run = tmp_path / "run"
    write_state(run, "stopped", 4, 10)
    (run / "step-00000007").mkdir()
    (run / file).write_bytes(content.encode(errors="surrogateescape"))
    found = describe(run)
    assert any(told in fault for fault in found["faults"]), found["faults"]
    assert found["state"] == ("unknown" if file == "state.json" else "stopped")
    assert cli.main(["runs", str(tmp_path)]) == cli.DONE


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)


def among(*names: str) -> st.SearchStrategy[dict]:
    """Return dicts that have some of these keys, with whatever values."""
    return st.fixed_dictionaries({}, optional={name: ANY for name in names})


@given(
    state=ANY | among("step", "steps", "updated", "host", "pid", "pid_began", "reason"),
    name=st.sampled_from(["running", "stopped"]) | ANY,
    line=ANY | among("step", "losses", "validation", "validation_loss", "evaluation", "time"),
)
def test_whatever_files_hold_runs_are_listed(tmp_path_factory, state, name, line):
    run = tmp_path_factory.mktemp("any")
    state = state | {"format": 1, "state": name} if isinstance(state, dict) else state
    (run / "state.json").write_text(json.dumps(state))
    (run / "metrics.jsonl").write_text(json.dumps(line) + "\n" + "[" * 100_000 + "\n")
    found = describe(run)
    assert any(fault.startswith("metrics.jsonl: ") for fault in found["faults"])
    row(found)
    json.dumps(found)


def test_a_line_that_is_being_written_is_no_damage(tmp_path):
    write_state(tmp_path, "running", 0, 10)
    write_lines(tmp_path, line(1, 1.0))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    found = describe(tmp_path)
    assert (found["step"], found["faults"]) == (1, [])


def test_folders_are_searched_but_not_those_of_runs_and_stores(tmp_path):
    for name in ("b/model", "a", "a/step-00000001", "store/inside", ".hidden"):
        write_state(tmp_path / name, "stopped", 0, 1)
    (tmp_path / "store" / "manifest.json").touch()
    (tmp_path / "b" / "data").mkdir()
    assert [str(r.relative_to(tmp_path)) for r in find_runs(tmp_path)] == ["a", "b/model"]
    assert list(find_runs(tmp_path / "a")) == [tmp_path / "a"]
    with pytest.raises(ValueError, match="expected a folder of runs; there is none at"):
        list(find_runs(tmp_path / "nowhere"))


def test_the_command_prints_a_table_or_json(tmp_path, capsys):
    write_state(tmp_path / "one", "failed", 7, 10, "the loss of step 7 is nan")
    write_lines(tmp_path / "one", line(7, 1.0, loss=2.5))
    assert cli.main(["runs", str(tmp_path)]) == cli.DONE
    said = capsys.readouterr().out
    assert "failed" in said
    assert "the loss of step 7 is nan" in said
    assert "arm 2.5" in said
    assert cli.main(["runs", str(tmp_path), "--json"]) == cli.DONE
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["state"], found["step"], found["steps"]) == ("failed", 7, 10)


def test_no_runs_and_no_folder_are_told(tmp_path, capsys):
    assert cli.main(["runs", str(tmp_path)]) == cli.DONE
    assert "no runs" in capsys.readouterr().err
    assert cli.main(["runs", str(tmp_path / "nowhere")]) == cli.BAD_INPUT
