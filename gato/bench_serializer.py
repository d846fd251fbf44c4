"""`gato bench serializer`: tokens/s of one core, beside the floor that the design asks for."""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import Any

from gato.bench_common import ARM, FLOORS, GAME, Result, made_up, pace, result
from gato.tokenizers.serializer import Serializer
from gato.tokenizers.spaces import CodecOptions


def serializer_bench(repeats: int) -> list[Result]:
    """Return tokens/s of writing whole episodes, one token per number and 16 x 16 patches."""
    results = []
    for task, what in ((ARM, "robot arm, 39 numbers"), (GAME, "game, frames of 80 x 80")):
        serializer = Serializer(CodecOptions(scales="mu_law"))
        serializer.add_task(replace(task, instruction=""))
        episodes = [replace(made_up(task, 200, seed=i), instruction="") for i in range(4)]

        def work(serializer: Serializer = serializer, episodes: Any = episodes) -> int:
            return sum(len(serializer.episode(e).steps) for e in episodes)

        tokens = work()
        value = statistics.median(pace(work, tokens) for _ in range(2 * repeats))
        floor = FLOORS[task.id]
        results.append(result(f"serializer: {what}", value, "tokens/s/core", floor, "the floor"))
    return results
