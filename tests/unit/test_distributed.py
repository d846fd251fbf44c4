"""Two processes over gloo end where one does that computes the same parts."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import training_processes as processes
from run_files import lines

from gato.checkpoint import load_checkpoint, load_tensors
from gato.distributed import World
from gato.execution import Execution
from gato.run_folder import resolve
from gato.train import train

FILES = ("model.safetensors", "ema.safetensors", "training/optimizer.safetensors")


@pytest.fixture
def parted(tiny):
    """Return a run in two parts: often one lacks a kind of data that the other has."""
    return replace(tiny, steps=12, save_every=6, parts=2, ema=0.9)


def drawn(path: Path) -> list[str]:
    return path.read_text().splitlines()


def losses(run: Path) -> dict[int, dict[str, float]]:
    return lines(run, "losses")


def difference(first: Path, second: Path) -> float:
    """Return the largest difference of weights, averages and optimizer states."""
    largest = 0.0
    for name in FILES:
        a, b = (load_tensors(resolve(run) / name) for run in (first, second))
        assert a.keys() == b.keys()
        largest = max(largest, *(float((a[k] - b[k]).abs().max()) for k in a))
    return largest


@pytest.fixture(scope="module")
def alone_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("alone")


@pytest.fixture
def alone(alone_folder: Path, parted) -> Path:
    """Return the run of one process that computes both parts."""
    run = alone_folder / "run"
    if not run.exists():
        with processes.record_batches(alone_folder / "run.drawn"):
            train(parted, run, device="cpu")
    return run


def test_two_processes_equal_one(alone, parted, tmp_path):
    assert processes.train_ranks(2, replace(parted, parts=1), tmp_path / "two") == [0, 0]
    assert load_checkpoint(tmp_path / "two").config == parted  # as many parts as processes
    assert difference(alone, tmp_path / "two") == 0.0
    one, two = losses(alone), losses(tmp_path / "two")
    assert list(one) == list(two) == list(range(1, 13))
    for step, line in one.items():
        assert two[step] == pytest.approx(line, rel=1e-12)
    shares = [drawn(tmp_path / f"two-{rank}.drawn") for rank in (0, 1)]
    assert not set(shares[0]) & set(shares[1])
    assert sorted(shares[0] + shares[1]) == sorted(drawn(alone.with_suffix(".drawn")))
    assert len(set(shares[0] + shares[1])) == 2 * parted.steps


def test_parts_that_lack_a_kind_of_data_are_among_them(parted, tmp_path):
    """What makes the equality above mean something: gradients that only one process has."""
    from gato.fitting import make_serializer
    from gato.train import Trainer

    trainer = Trainer(parted, tmp_path, torch.device("cpu"), make_serializer(parted))
    kinds = [
        [set(trainer.mixture.part(k, p).payload) for p in range(2)] for k in range(parted.steps)
    ]
    assert any(a != b for a, b in kinds)


def test_more_parts_than_processes_equal_one_but_for_the_order_of_sums(tiny, tmp_path):
    config = replace(tiny, steps=6, parts=4, ema=0.9)
    train(config, tmp_path / "one", device="cpu")
    assert processes.train_ranks(2, config, tmp_path / "two") == [0, 0]
    assert difference(tmp_path / "one", tmp_path / "two") < 2e-5  # of weights moved by 6e-2


def test_a_run_goes_on_with_another_number_of_processes(alone, parted, tmp_path):
    run = tmp_path / "two"
    children = processes.start_ranks(2, parted, run)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if (run / "metrics.jsonl").exists() and len(losses(run)) >= 3:
            break
        time.sleep(0.002)
    os.kill(children[1].pid, signal.SIGTERM)  # one of them is told, both stop
    assert processes.exit_codes(children) == [0, 0]
    step = load_checkpoint(run).step
    assert 3 <= step < 12
    state = json.loads((run / "state.json").read_text())
    assert (state["state"], state["step"]) == ("stopped", step)
    train(replace(parted, parts=1), run, device="cpu")  # one, of a run in two parts
    assert difference(alone, run) == 0.0
    assert losses(run).keys() == losses(alone).keys()


def capacities(run: Path) -> dict[str, int]:
    """Return the shape of all batches as a run's newest checkpoint keeps it."""
    counters = json.loads((resolve(run) / "training" / "counters.json").read_text())
    return {json.dumps(key): size for key, size in counters["capacities"]["sizes"]}


def test_static_shapes_are_those_of_the_largest_part_and_are_kept(parted, tmp_path):
    static = Execution(static=True)
    train(parted, tmp_path / "one", device="cpu", execution=static)
    assert processes.train_ranks(2, parted, tmp_path / "two", execution=static) == [0, 0]
    assert capacities(tmp_path / "two") == capacities(tmp_path / "one")
    assert difference(tmp_path / "one", tmp_path / "two") == 0.0
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "two", again)
    (again / "latest").write_text("step-00000006")
    counters = again / "step-00000006" / "training" / "counters.json"
    kept = json.loads(counters.read_text())
    key, size = kept["capacities"]["sizes"][0]
    kept["capacities"]["sizes"][0] = [key, size + 128]  # which nobody would measure
    counters.write_text(json.dumps(kept))
    assert processes.train_ranks(2, parted, again, execution=static) == [0, 0]
    assert capacities(again)[json.dumps(key)] == size + 128
    assert difference(tmp_path / "one", again) == 0.0


def test_every_process_hears_what_all_tell(tmp_path):
    assert World().from_all("alone") == ["alone"]
    assert processes.ranks(3, processes.hear, tmp_path) == [0, 0, 0]
    heard = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    assert heard == [["", "é", "éé"]] * 3


def test_measurements_are_shared_and_evaluations_are_done_once(parted, tmp_path):
    corpora = tuple(replace(c, validation=0.4) for c in parted.corpora)
    config = replace(parted, corpora=corpora, steps=4, validate_every=2, validate_batches=3)
    config = replace(config, eval_tasks=("toy/arm-v0",), eval_every=2, keep_best=True)
    train(config, tmp_path / "one", device="cpu", evaluate=processes.score)
    assert processes.train_ranks(2, config, tmp_path / "two", evaluate=processes.score) == [0, 0]
    one, two = (lines(tmp_path / name, "validation_loss") for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-12)
    assert list(two) == [2, 4]
    assert drawn(tmp_path / "two" / "played") == ["step-00000002", "step-00000004"]
    assert resolve(tmp_path / "two" / "best").name == "step-00000004"


def test_parts_that_cannot_be_shared_are_refused():
    assert [World(rank, 2).share(4) for rank in (0, 1)] == [range(2), range(2, 4)]
    assert World().share(3) == range(3)
    with pytest.raises(ValueError, match="divides the run's 3 parts; got 2"):
        World(0, 2).share(3)


def test_a_value_that_is_no_number_stops_all_of_them(parted, tmp_path):
    run = tmp_path / "two"
    assert processes.train_ranks(2, parted, run, spoilt=(1, 2)) == [1, 1]
    said = [(tmp_path / f"two-{rank}.txt").read_text() for rank in (0, 1)]
    assert all(s.startswith("NonFiniteLossError: the loss of step 2 is nan; look at") for s in said)
    assert said[0] == said[1]
    kept = run / "bad-batch-00000002"
    assert {p.name for p in kept.iterdir()} == {
        "about.json",
        "part-0.npz",
        "about-1.json",
        "part-1.npz",
    }
    assert not np.isfinite(np.load(kept / "part-1.npz")["nll"]).all()
    assert np.isfinite(np.load(kept / "part-0.npz")["nll"]).all()
    assert json.loads((run / "state.json").read_text())["state"] == "failed"


def test_what_fails_in_the_first_process_ends_the_others(parted, tmp_path):
    codes = processes.train_ranks(2, parted, tmp_path / "two", text_model=b"no text model")
    assert codes == [1, 1]
    said = [(tmp_path / f"two-{rank}.txt").read_text() for rank in (0, 1)]
    assert said[0].startswith("ValueError")
    assert said[1].startswith("OtherProcessError: process 0 of the run failed")
    assert not (tmp_path / "two").exists()


def test_a_process_that_is_killed_ends_the_others(alone, parted, tmp_path):
    run = tmp_path / "two"
    children = processes.start_ranks(2, replace(parted, save_every=2), run)
    deadline = time.monotonic() + 60
    while not (run / "latest").exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    children[1].kill()
    assert processes.exit_codes(children) == [1, -signal.SIGKILL]
    assert json.loads((run / "state.json").read_text())["state"] == "failed"
    assert processes.train_ranks(2, parted, run) == [0, 0]
    assert difference(alone, run) == 0.0


def test_one_process_needs_no_other():
    world = World()
    tensor = torch.ones(2)
    assert world.sum(tensor) is tensor
    assert world.any([True, False]) == [True, False]
    assert world.from_first(lambda: "said") == "said"


def test_torchrun_trains_from_the_command_line(stores, tmp_path):
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
        *("-m", "gato.cli", "train", "quickstart", "--out", str(tmp_path / "run"), "--json"),
        *("--data", f"words={stores / 'words'}", "--steps", "2", "--rows", "2"),
        *("--text-pieces", "300", "--model.layers", "1", "--model.context", "64"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["step"] == 2  # printed once
    assert load_checkpoint(tmp_path / "run").config.parts == 2
