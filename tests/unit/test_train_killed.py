"""A run that is killed again and again, anywhere, ends bit for bit as one that nobody touched.

``pytest tests/unit/test_train_killed.py --kills 50 --kills-seed 1`` kills more, and elsewhere.
"""

from __future__ import annotations

import collections
import json
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import training_processes as processes

from gato.checkpoint import load_tensors
from gato.config import TrainConfig
from gato.run_folder import resolve
from gato.train import train

STEPS = 36
SIGNALS = (*[signal.SIGKILL] * 3, signal.SIGTERM, signal.SIGINT)


def lines(run: Path) -> list[tuple[int, dict[str, float]]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["losses"]) for line in found]


def assert_same_end(whole: Path, killed: Path) -> None:
    """Assert that two runs end alike, bit for bit, and that nothing half-written is left."""
    assert lines(whole) == lines(killed)
    assert [step for step, _ in lines(killed)] == list(range(1, STEPS + 1))
    for name in ("model.safetensors", "ema.safetensors", "training/optimizer.safetensors"):
        a, b = (load_tensors(resolve(run) / name) for run in (whole, killed))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert json.loads((killed / "state.json").read_text())["state"] == "finished"
    names = {p.name for p in killed.iterdir()}
    before, last = sorted(name for name in names if name.startswith("step-"))
    assert last == f"step-{STEPS:08d}"
    # saved as planned, or by a signal after that
    assert before in {f"step-{step:08d}" for step in range(STEPS - 3, STEPS)}
    assert names == {"latest", "metrics.jsonl", "state.json", before, last}


def kill_once(
    rng: random.Random, config: TrainConfig, run: Path, options: dict[str, Any]
) -> tuple[str, str] | None:
    """Start the run, kill it at some moment; return where that met it and how, None for nowhere."""
    number = rng.choice(SIGNALS)
    # either at an operation on its files, of which a save has about 25, or at any time
    operation = rng.randint(1, 150) if rng.random() < 0.6 else 0
    options = {**options, "workers": int(rng.random() < 0.1)}  # data made in this process, or ahead
    path = run.parent / "whereabouts"
    path.unlink(missing_ok=True)
    at = processes.Whereabouts(path)
    arguments = (config, run, path, number, operation, options)
    child = processes.CONTEXT.Process(target=processes.doomed, args=arguments)
    child.start()
    if not operation:
        while not at.get() and child.is_alive():
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 1.5))
        at.mark()
        if child.is_alive():
            os.kill(child.pid, number)
    child.join(60)
    assert child.exitcode is not None
    if number == signal.SIGKILL:
        return (at.marked(), "SIGKILL") if child.exitcode == -number else None
    assert child.exitcode == 0  # saved, and ended as it should
    state = json.loads((run / "state.json").read_text())
    if state["state"] == "finished":
        return None
    assert (state["state"], state["reason"]) == ("stopped", number.name)
    assert resolve(run).name == f"step-{state['step']:08d}"
    return at.marked(), number.name


def test_kills_anywhere_change_nothing(tiny, tmp_path, pytestconfig):
    kills, seed = pytestconfig.getoption("--kills"), pytestconfig.getoption("--kills-seed")
    config = replace(tiny, steps=STEPS, save_every=3, ema=0.9)
    train(config, tmp_path / "whole", device="cpu")
    text_model = (resolve(tmp_path / "whole") / "text.model").read_bytes()
    rng, runs, met = random.Random(seed), 0, []
    while len(met) < kills:
        run = tmp_path / f"killed-{runs}"
        found = kill_once(rng, config, run, {"text_model": text_model})
        if found:
            met.append(found)
            if (run / "latest").exists():
                resolve(run)
        else:  # it came to its end first: another run
            assert_same_end(tmp_path / "whole", run)
            runs += 1
    train(config, tmp_path / f"killed-{runs}", device="cpu", text_model=text_model)
    assert_same_end(tmp_path / "whole", tmp_path / f"killed-{runs}")
    where = collections.Counter(f"{name} {phase.split(':')[0]}" for phase, name in met)
    print(f"\n{len(met)} kills, seed {seed}, {runs + 1} runs:", dict(where))
    print("\n".join(sorted({f"{name} {phase}" for phase, name in met})))
