"""A run killed at random moments ends bit for bit as one that nobody touched."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import torch

from gato.checkpoint import load_tensors
from gato.train import train


def lines(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_three_sigkills_change_nothing(tiny, tmp_path):
    config = replace(tiny, steps=60, save_every=4)
    train(config, tmp_path / "whole", device="cpu")
    context = multiprocessing.get_context("forkserver")  # its children need not import torch anew
    context.set_forkserver_preload(["gato.train"])
    run = tmp_path / "killed"
    kills = 0
    for moment in sorted(random.sample(range(1, 45), 3)):
        child = context.Process(target=train, args=(config, run), kwargs={"device": "cpu"})
        child.start()
        deadline = time.monotonic() + 60
        while lines(run) < moment and child.is_alive() and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(random.uniform(0, 0.03))  # in a step, in a save, in a line of metrics
        if child.is_alive():
            os.kill(child.pid, signal.SIGKILL)
            kills += 1
        child.join()
    assert kills == 3
    train(config, run, device="cpu")
    logged = [
        [(m["step"], m["losses"]) for m in map(json.loads, path.read_text().splitlines())]
        for path in (tmp_path / "whole" / "metrics.jsonl", run / "metrics.jsonl")
    ]
    assert logged[0] == logged[1]
    assert [step for step, _ in logged[0]] == list(range(1, 61))
    for name in ("model.safetensors", "training/optimizer.safetensors"):
        ends = [r / (r / "latest").read_text() / name for r in (tmp_path / "whole", run)]
        a, b = (load_tensors(end) for end in ends)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert not list(run.glob(".step-*"))  # nothing half-written is left
    assert len(list(run.glob("step-*"))) == 2
