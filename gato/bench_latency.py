"""`gato bench latency`: milliseconds from one observation to one action, for a robot that waits.

One row, batches of one, the observation and action spaces of Meta-World and no simulator; weights
are random, which costs the same. The memory is what the preset plays with: one step of the
quickstart model, 1024 tokens of Gato's. The median and the rate stand beside 20 Hz, the 99th
percentile beside the median, and the time of the CPU, which other processes do not lengthen, beside
that of the products with the weights alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from gato.bench_common import ARM, Result, made_up, result, wait
from gato.bench_machine import device, floor_seconds
from gato.checkpoint import build_model
from gato.model import GatoModel
from gato.presets import preset, untaught
from gato.tokenizers.serializer import Serializer
from gato.tokenizers.task_codec import History

ASKED_HZ = 20.0
PRODUCTS = "the products with the weights alone"


@dataclass(frozen=True)
class Case:
    """A model that decides alone."""

    preset: str
    history: History
    warmup: int
    """Decisions until the memory is as full as it gets."""
    decisions: int
    """In every repeat."""


CASES = (Case("quickstart", History(window=1), 5, 200), Case("gato_79m", History(), 25, 10))
DTYPES = (torch.float32, torch.bfloat16)


def latency_bench(repeats: int) -> list[Result]:
    """Return milliseconds and decisions per second; see the head of this file."""
    on = device()
    return [
        row for case in CASES for dtype in DTYPES for row in _measured(case, dtype, on, repeats)
    ]


def _measured(case: Case, dtype: torch.dtype, on: torch.device, repeats: int) -> list[Result]:
    from gato.rollouts.policy import Policy

    serializer, model = _made(case, on)
    policy, observed = Policy(model, serializer, ARM.id, precision=str(dtype)[6:]), _observations()
    for _ in range(case.warmup):
        policy.select_action(next(observed))
    reads = _reads(policy, next(observed))
    linear = [m for m in model.blocks.modules() if isinstance(m, nn.Linear)]
    weights = [m.weight.detach().to(dtype) for m in linear]
    products = _products(weights, reads, dtype, on)
    products()
    halves, tails, busy, alone = [], [], [], []
    for _ in range(repeats):
        taken = np.array([_milliseconds(policy, next(observed)) for _ in range(case.decisions)])
        halves.append(float(np.median(taken[:, 0])))
        tails.append(float(np.percentile(taken[:, 0], 99)))
        busy.append(float(taken[:, 1].mean()))
        alone.append(_cpu_milliseconds(products, on, 20))
    size = sum(w.numel() for w in weights)
    least = [floor_seconds(on, dtype, 2.0 * size * n, size * dtype.itemsize) for n in reads]
    floor: dict[str, Any] = {
        "floor": 1e3 * sum(least),
        "floor_from": f"{' + '.join(map(str, reads))} tokens through {size / 1e6:.3g}M weights",
        "better": "less",
    }
    name = f"latency: {case.preset}, {str(dtype)[6:]}"
    rates = [1e3 / ms for ms in halves]
    return [
        result(f"{name}, p50", halves, "ms", 1e3 / ASKED_HZ, "what 20 Hz leaves", **floor),
        result(f"{name}, p99", tails, "ms", halves, "p50", better="less"),
        result(f"{name}, rate", rates, "Hz", ASKED_HZ, "what is asked"),
        result(f"{name}, CPU time", busy, "ms", alone, PRODUCTS, **floor),
    ]


def _made(case: Case, on: torch.device) -> tuple[Serializer, GatoModel]:
    """Return a preset's serializer, which knows the arm, and its model."""
    config = preset(case.preset)
    serializer = untaught(config)
    serializer.add_task(replace(ARM, instruction=""), history=case.history)
    torch.manual_seed(0)
    return serializer, build_model(config, serializer).to(on).eval()


def _observations() -> Iterator[Any]:
    """Yield observations without end, all different."""
    seed = 0
    while True:
        yield from np.asarray(made_up(ARM, 200, seed).observations["observation"])
        seed += 1


def _milliseconds(policy: Any, observation: Any) -> tuple[float, float]:
    """Return how long one decision takes, and how long it keeps the CPU busy."""
    begun, busy = time.perf_counter(), time.process_time()
    policy.select_action(observation)  # ends with the action on the host
    return 1e3 * (time.perf_counter() - begun), 1e3 * (time.process_time() - busy)


def _reads(policy: Any, observation: Any) -> list[int]:
    """Return how many tokens each forward of one decision reads."""
    found: list[int] = []
    read = policy.memory.read

    def counted(chunk: Any, **options: Any) -> Any:
        found.append(int(chunk.lengths.sum()))
        return read(chunk, **options)

    policy.memory.read = counted
    try:
        policy.select_action(observation)
    finally:
        del policy.memory.read
    return found


def _products(
    weights: Sequence[torch.Tensor], reads: Sequence[int], dtype: torch.dtype, on: torch.device
) -> Callable[[], None]:
    """Return what multiplies as many tokens as a decision reads by every weight."""
    widths = {w.shape[1] for w in weights}
    inputs = [{w: torch.randn(n, w, device=on).to(dtype) for w in widths} for n in reads]

    @torch.inference_mode()
    def work() -> None:
        for given in inputs:
            for weight in weights:
                F.linear(given[weight.shape[1]], weight)

    return work


def _cpu_milliseconds(work: Callable[[], None], on: torch.device, times: int) -> float:
    wait(on)
    busy = time.process_time()
    for _ in range(times):
        work()
    wait(on)
    return 1e3 * (time.process_time() - busy) / times
