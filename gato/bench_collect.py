"""`gato bench collect`: episodes/s of two workers, from the command to complete stores."""

from __future__ import annotations

import tempfile

from gato.bench_common import Result, pace, result

COLLECTED = {
    "metaworld/reach-v3": 100,
    "metaworld/push-v3": 100,
    "metaworld/door-open-v3": 100,
    "babyai/GoToLocal-v0": 100,
    "babyai/GoToRedBallGrey-v0": 100,
    "atari/Boxing-v5": 12,
}
"""Tasks of three simulators and their episodes: about half a minute's work of one core."""


def collect_bench(repeats: int) -> list[Result]:
    """Return episodes/s of two worker processes, their start and the writing included."""
    ours, theirs = [], []
    for _ in range(min(repeats, 2)):
        theirs.append(_collected(1))
        ours.append(_collected(2))
    case = "collect: Meta-World, BabyAI and Atari, 2 workers"
    return [result(case, ours, "episodes/s", theirs, "the same episodes by one process")]


def _collected(workers: int) -> float:
    """Return episodes/s of so many workers."""
    from gato.envs.collect import collect

    with tempfile.TemporaryDirectory() as folder:

        def work() -> None:
            for episodes in sorted(set(COLLECTED.values())):
                tasks = [task for task, n in COLLECTED.items() if n == episodes]
                collect(tasks, episodes, folder, noise=0.1, workers=workers, min_fraction=0.4)

        return pace(work, sum(COLLECTED.values()))
