"""`gato bench serializer`: tokens/s of one core, beside what is asked of it."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from gato.bench_common import ARM, ASKED, GAME, Result, made_up, result
from gato.tokenizers.serializer import Serializer
from gato.tokenizers.spaces import CodecOptions

AGAINST = "what is asked, enough to feed training"


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
        rates = []
        for _ in range(2 * repeats):
            begun = time.process_time()
            work()
            rates.append(tokens / (time.process_time() - begun))
        asked = ASKED[task.id]
        results.append(result(f"serializer: {what}", rates, "tokens/s/core", asked, AGAINST))
    return results
