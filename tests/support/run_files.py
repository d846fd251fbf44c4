"""What tests read from the folder of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from gato.checkpoint import load_tensors
from gato.run_folder import resolve


def lines(run: Path, kind: str) -> dict[int, Any]:
    """Return what the log says of a kind, by step; every step once."""
    read = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [(line["step"], line[kind]) for line in read if kind in line]
    assert len(dict(found)) == len(found)
    return dict(found)


def state(run: Path) -> dict[str, Any]:
    return json.loads((run / "state.json").read_text())


def checkpoints(run: Path) -> list[int]:
    return sorted(int(p.name.removeprefix("step-")) for p in run.glob("step-*"))


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_tensors(resolve(run) / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
