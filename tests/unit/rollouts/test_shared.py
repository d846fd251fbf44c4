"""Observations through shared memory are those that would have been sent, and leave nothing."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from gato.rollouts import shared
from gato.rollouts.hosts import Hosts
from gato.rollouts.players import HostPolicy
from gato.rollouts.runner import Job, run
from gato.rollouts.shared import SharedMemory, There, room

HERE = Path(__file__).parent
FRAMED = "gym/framed:Framed-v0"
SHM = Path("/dev/shm")
"""Where memory that has a name is listed on Linux."""
SPACES = {
    "frames": spaces.Box(0, 255, (64, 64, 3), np.uint8),
    "numbers": spaces.Box(-np.inf, np.inf, (39,), np.float32),
    "doubles": spaces.Box(-1.0, 1.0, (3, 5), np.float64),
    "flags": spaces.MultiBinary(7),
    "whole numbers": spaces.MultiDiscrete([3, 4, 5]),
    "one number": spaces.Box(0, 9, (), np.float32),
    "an integer": spaces.Discrete(5),
    "words": spaces.Text(9),
    "all of it": spaces.Dict(
        {
            "a": spaces.Tuple([spaces.Box(0, 1, (3,), np.float32), spaces.Text(4)]),
            "b": spaces.Dict({"c": spaces.Box(0, 255, (9, 9), np.uint8), "d": spaces.Discrete(2)}),
        }
    ),
}


def same(a: Any, b: Any) -> bool:
    """Return whether two observations are one, to the type of each part."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    return bool(a == b)


@pytest.mark.parametrize("name", SPACES)
def test_what_is_put_is_what_comes(name: str) -> None:
    space = SPACES[name]
    space.seed(0)
    memory = SharedMemory({slot: room([space]) for slot in range(3)})
    seen = [space.sample() for _ in range(3)]
    told = [memory.put(slot, observation) for slot, observation in enumerate(seen)]
    came = [memory.get(pickle.loads(pickle.dumps(part))) for part in told]
    assert all(map(same, came, seen)), "none was overwritten by its neighbour's"
    if name == "frames":
        assert len(pickle.dumps(told)) < 300


def test_what_came_stays_as_it_was() -> None:
    memory = SharedMemory({0: 1000})
    came = memory.get(memory.put(0, np.arange(9.0)))
    memory.put(0, np.zeros(9))
    assert came.tolist() == list(range(9))


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((12, 12), np.uint8),
        np.array(["red", "a ball"], object),
        np.array(["red"]),
        np.float32(3),
    ],
    ids=["larger than its room", "objects", "strings", "a scalar"],
)
def test_what_finds_no_room_travels_as_it_is(array: Any) -> None:
    memory = SharedMemory({0: room([spaces.Box(0, 255, (10, 10), np.uint8)]), 1: 128})
    for slot in (0, "unknown"):
        assert memory.put(slot, array) is array
    memory.put(1, np.full(128, 7, np.uint8))
    two = memory.put(0, {"small": np.arange(10), "large": np.zeros(100)})
    assert type(two["small"]) is There
    assert type(two["large"]) is np.ndarray
    assert memory.get((There(128, (128,), "|u1"),))[0].tolist() == [7] * 128, "its neighbour's"


def test_any_order_of_bytes_and_of_axes() -> None:
    memory = SharedMemory({0: 1000})
    for array in (np.arange(12, dtype=">i4"), np.arange(12.0).reshape(3, 4).T, np.arange(20)[::3]):
        came = memory.get(memory.put(0, array))
        assert came.dtype == array.dtype
        assert (came == array).all()


def test_memory_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """A world of huge pictures takes no more than it did without shared memory."""
    monkeypatch.setattr(shared, "MOST", 2000)
    memory = SharedMemory(dict.fromkeys(range(3), 800))
    assert len(memory._memory) <= 2000
    for slot, expected in enumerate((There, There, np.ndarray)):
        picture = np.full(800, slot, np.uint8)
        told = memory.put(slot, picture)
        assert type(told) is expected
        assert (memory.get(told) == picture).all()


def test_room_is_for_the_largest() -> None:
    assert room([]) == 0
    assert room([spaces.Text(9), spaces.Discrete(3)]) == 0
    assert room(SPACES.values()) == 64 * 64 * 3
    assert room([SPACES["all of it"]]) == 64 + 128, "parts begin at multiples of 64 bytes"


# ---- through worker processes ----------------------------------------------------------------


@pytest.fixture
def framed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process and its workers import `framed`."""
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.setenv("PYTHONPATH", str(HERE))


class Watching(HostPolicy):
    """Leaves every action to chance and keeps what it is shown."""

    def __init__(self, seen: dict[tuple[str, int], list[Any]], seeds: list[int]) -> None:
        super().__init__("random")
        self.seen, self.seeds = seen, seeds

    def reset(self, mask: np.ndarray, *, seeds: Any, tasks: Any) -> None:
        for row, seed in seeds.items():
            self.seeds[row] = seed

    def keep(self, rows: Any) -> None:
        self.seeds = [self.seeds[row] for row in rows]

    def select_action(self, observations: Any, active: np.ndarray) -> Any:
        for row in np.flatnonzero(active):
            self.seen.setdefault(self.seeds[row], []).append(observations[row])
        return super().select_action(observations, active)


def watched(workers: int) -> tuple[dict[Any, list[Any]], list[float]]:
    """Return what a policy was shown, by row seed, and the scores."""
    seen: dict[Any, list[Any]] = {}
    jobs = [Job(task, seed) for seed in range(7) for task in (FRAMED, "gym/CartPole-v1")]
    played = run(
        lambda tasks, seeds: Watching(seen, list(seeds)), jobs, workers=workers, max_batch=6
    )
    assert [p.error for p in played] == [None] * len(jobs)
    return seen, [p.score for p in played]


@pytest.mark.usefixtures("framed")
def test_workers_show_what_one_process_shows() -> None:
    """Pictures, numbers and words in one evaluation with four numbers of another task."""
    alone, scores = watched(0)
    there, the_same = watched(2)
    assert scores == the_same
    assert alone.keys() == there.keys()
    for key in alone:
        assert len(alone[key]) == len(there[key])
        assert all(map(same, alone[key], there[key])), key


@pytest.mark.usefixtures("framed")
@pytest.mark.parametrize("through_memory", [True, False])
def test_a_worker_goes_on_while_nobody_reads(through_memory: bool) -> None:
    """Six frames are more than its pipe holds, which is why they do not go there."""
    slots = range(6)
    size = room([SPACES["frames"], spaces.Box(0, 255, (210, 160, 3), np.uint8)]) + 1000
    hosts = Hosts(1, timeout=60.0, rooms=dict.fromkeys(slots, size if through_memory else 0))
    try:
        hosts.send(0, "all", [("reset", slot, FRAMED, slot) for slot in slots])
        assert len(hosts.receive()[0].replies) == 6  # type: ignore[union-attr]
        worker = hosts._pool._workers[0]
        assert worker is not None
        before = worker.ticks.value
        hosts.send(0, "half", [("step", slot, 0) for slot in slots])
        hosts.send(0, "other", [("step", slot, 0) for slot in slots])
        patience = time.monotonic() + (20.0 if through_memory else 1.0)
        while worker.ticks.value < before + 12 and time.monotonic() < patience:
            time.sleep(0.02)
        assert (worker.ticks.value == before + 12) is through_memory
    finally:
        hosts.close()


SCRIPT = f"""
import signal, sys, time
from gato.rollouts.hosts import Hosts
from gato.envs import registry
from gato.rollouts.shared import room
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    size = room([registry.spec("{FRAMED}").observation_space])
    hosts = Hosts(2, rooms={{(g, i): size for g in range(2) for i in range(4)}})
    for g in range(2):
        hosts.send(g, g, [("reset", (g, i), "{FRAMED}", i) for i in range(4)])
    answered = []
    while len(answered) < 2:
        answered += hosts.receive()
    print("ready", *(w.process.pid for w in hosts._pool._workers), flush=True)
    if sys.argv[1] == "raise":
        raise RuntimeError("something else")
    time.sleep(60)
"""


@pytest.mark.usefixtures("framed")
@pytest.mark.parametrize("end", ["raise", signal.SIGINT, signal.SIGKILL, "workers are killed"])
def test_nothing_is_left_however_it_ends(tmp_path: Path, end: Any) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    before = set(os.listdir(SHM))
    process = subprocess.Popen(
        [sys.executable, str(script), str(end)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    first, *workers = process.stdout.readline().split()
    assert first == "ready", process.communicate()
    maps = Path(f"/proc/{process.pid}/maps").read_text()
    assert "(deleted)" in "".join(line for line in maps.splitlines() if "pym-" in line)
    if end == "workers are killed":
        for worker in workers:
            os.kill(int(worker), signal.SIGKILL)
        process.terminate()
    elif end != "raise":
        process.send_signal(end)
    _, told = process.communicate(timeout=30)
    assert "resource_tracker" not in told
    assert "leaked" not in told
    patience = time.monotonic() + 20
    while any(Path(f"/proc/{w}").exists() for w in workers) and time.monotonic() < patience:
        time.sleep(0.02)
    assert not [w for w in workers if Path(f"/proc/{w}").exists()]
    mine = {name for name in set(os.listdir(SHM)) - before if name.startswith(("pym-", "psm_"))}
    assert not mine
