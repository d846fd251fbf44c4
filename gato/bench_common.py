"""What the benches share: two made-up tasks, what a result is, how a pace is measured."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from gymnasium import spaces

from gato.envs.episode import Episode, TaskSpec

Result = dict[str, Any]

ARM = TaskSpec(
    id="bench/arm",
    observation_space=spaces.Box(-np.inf, np.inf, (39,), np.float32),
    action_space=spaces.Box(-1, 1, (4,), np.float32),
    max_steps=500,
    control_hz=80.0,
    instruction="push the puck to the goal",
)
GAME = TaskSpec(
    id="bench/game",
    observation_space=spaces.Box(0, 255, (80, 80, 3), np.uint8),
    action_space=spaces.Discrete(18),
    max_steps=500,
    control_hz=15.0,
)
ASKED = {"bench/arm": 1e6, "bench/game": 4e5}
"""Tokens a second that one core must write (Meta-World and Atari in all but the simulator)."""


def result(
    case: str,
    values: float | Sequence[float],
    unit: str,
    baselines: float | Sequence[float],
    against: str,
    *,
    floor: float | None = None,
    floor_from: str = "",
    better: str = "more",
) -> Result:
    """Return one line of what is printed, as `gato bench --json` names its parts.

    Args:
        case: what was measured; the name by which records are compared.
        values: of every repeat.
        unit: of the values, the baseline and the floor.
        baselines: of every repeat, measured in turns with `values`, whose ratios are then taken
            pair by pair; or one figure that is not measured here, such as one asked for.
        against: what the baseline is.
        floor: the value if nothing cost time but the operations or bytes that the work cannot do
            without, at this machine's measured peak; None where nothing is known of it.
        floor_from: how the floor was worked out.
        better: "more" or "less".
    """
    ours, theirs = _list(values), _list(baselines)
    live = not isinstance(baselines, int | float)
    pairs = theirs if live and len(theirs) == len(ours) else [statistics.median(theirs)] * len(ours)
    ratios = [a / b for a, b in zip(ours, pairs, strict=True)]
    value = statistics.median(ours)
    made: Result = {
        "case": case,
        "value": value,
        "unit": unit,
        "baseline": statistics.median(theirs),
        "ratio": statistics.median(ratios),
        "against": against,
        "better": better,
        "spread": [min(ours), max(ours)],
        "repeats": ours,
        "ratios": ratios if live else None,
    }
    if floor is not None:
        of_floor = value / floor if better == "more" else floor / value
        made |= {"floor": floor, "of_floor": of_floor, "floor_from": floor_from}
    return made


def _list(values: float | Sequence[float]) -> list[float]:
    return [float(values)] if isinstance(values, int | float) else [float(v) for v in values]


def seconds(
    work: Callable[[], Any],
    device: torch.device | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Return how long one call of `work` takes, on a GPU until the GPU has done it.

    `clock` is read where there is no GPU: `time.process_time` does not count what other processes
    take, and is right where one thread does all the work.
    """
    if device is None or device.type != "cuda":
        begun = clock()
        work()
        return clock() - begun
    begin, end = (torch.Event(device=device, enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def pace(work: Callable[[], Any], amount: float, device: torch.device | None = None) -> float:
    """Return `amount` per second of one call of `work`."""
    return amount / seconds(work, device)


def in_turns(
    repeats: int,
    *works: Callable[[], Any],
    device: torch.device | None = None,
    warmup: int = 1,
    calls: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> list[list[float]]:
    """Return the seconds of every repeat of each work, measured in turns after a warm-up.

    What slows the machine for a while then slows all of them. A repeat is `calls` calls, whose
    mean is its time.
    """
    times: list[list[float]] = [[] for _ in works]
    for i in range(warmup + repeats):
        for work, taken in zip(works, times, strict=True):
            one = seconds(_again(work, calls), device, clock) / calls
            if i >= warmup:
                taken.append(one)
    return times


def calls_that_last(
    work: Callable[[], Any], device: torch.device | None = None, least: float = 0.03
) -> int:
    """Return how many calls of `work` take `least` seconds: no clock's tick, no launch decides."""
    work()
    return max(1, math.ceil(least / max(seconds(work, device), 1e-6)))


def _again(work: Callable[[], Any], calls: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(calls):
            work()

    return run


def made_up(task: TaskSpec, steps: int, seed: int = 0) -> Episode:
    """Return an episode of noise in the task's spaces."""
    rng = np.random.default_rng(seed)

    def column(space: Any, n: int) -> np.ndarray:
        if isinstance(space, spaces.Discrete):
            return rng.integers(space.n, size=n)
        if space.dtype == np.uint8:
            return rng.integers(0, 256, (n, *space.shape), np.uint8)
        return np.clip(rng.normal(size=(n, *space.shape)), -1, 1).astype(np.float32)

    no = np.zeros(steps, bool)
    return Episode(
        task=task.id,
        observations={"observation": column(task.observation_space, steps + 1)},
        actions={"action": column(task.action_space, steps)},
        rewards=np.zeros(steps, np.float32),
        terminated=no,
        truncated=no,
        instruction=task.instruction,
        seed=seed,
    )


def wait(device: torch.device) -> None:
    """Return once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
