"""`gato bench serializer`: tokens/s of one core, beside what is asked of it."""

from __future__ import annotations

import time
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch

from gato.bench_common import ARM, ASKED, GAME, Result, made_up, result, seconds
from gato.bench_machine import bandwidth
from gato.tokenizers.serializer import Serializer
from gato.tokenizers.spaces import CodecOptions

CPU = torch.device("cpu")
AGAINST = "what is asked, enough to feed training"


def serializer_bench(repeats: int) -> list[Result]:
    """Return tokens/s of writing whole episodes, one token per number and 16 x 16 patches."""
    results = []
    for task, what in ((ARM, "robot arm, 39 numbers"), (GAME, "game, frames of 80 x 80")):
        serializer = Serializer(CodecOptions(scales="mu_law"))
        serializer.add_task(replace(task, instruction=""))
        episodes = [replace(made_up(task, 200, seed=i), instruction="") for i in range(4)]

        def work(serializer: Serializer = serializer, episodes: Any = episodes) -> list[Any]:
            return [serializer.episode(e).steps for e in episodes]

        made = work()
        tokens, moved = sum(map(len, made)), float(sum(map(_bytes, [*episodes, *made])))
        size = f"{moved / tokens:.0f} bytes read or written a token"
        floor = tokens / moved * bandwidth(CPU, moved) / torch.get_num_threads()  # of one core
        rates = [tokens / seconds(work, clock=time.process_time) for _ in range(2 * repeats)]
        asked = ASKED[task.id]
        case = f"serializer: {what}"
        results.append(
            result(case, rates, "tokens/s/core", asked, AGAINST, floor=floor, floor_from=size)
        )
    return results


def _bytes(value: Any) -> int:
    """Return the bytes of the arrays in an episode, or in what was written of it."""
    if isinstance(value, np.ndarray):
        return value.nbytes
    if is_dataclass(value):
        return sum(_bytes(getattr(value, field.name)) for field in fields(value))
    return sum(map(_bytes, value.values())) if isinstance(value, dict) else 0
