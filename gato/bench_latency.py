"""`gato bench latency`: milliseconds from one observation to one action, for a robot that waits.

One row, batches of one, the observation and action spaces of Meta-World and no simulator; weights
are random, which costs the same. Memory and actions are the preset's: the quickstart model
remembers one step and decides an action's ids from one state, as its recipe has it for Meta-World;
Gato's remembers 1024 tokens and writes one id after another. The median and the rate stand beside
20 Hz, the 99th percentile beside the median, and the time of the CPU, which other processes do not
lengthen, beside that of the products with the weights alone.
"""

from __future__ import annotations

import itertools
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
from gato.fitting import history_of
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


(_ARM,) = (c for c in preset("quickstart").corpora if c.name == "metaworld")
CASES = (Case("quickstart", history_of(_ARM), 5, 200), Case("gato_79m", History(), 25, 10))
DTYPES = (torch.float32, torch.bfloat16)
Pass = tuple[int, str, list[torch.Tensor]]
"""How many go through products with these weights: tokens through blocks, or states."""


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
    weights = _matrices(model.blocks, dtype)
    passes = [(n, "token", weights) for n in _reads(policy, next(observed))]
    if model.joint is not None:  # which computes in the model's own precision
        passes.append((model.joint.slots, "state", _matrices(model.joint, torch.float32)))
    products = _products([(n, w) for n, _, w in passes], on)
    products()
    halves, tails, busy, alone = [], [], [], []
    for _ in range(repeats):
        taken = np.array([_milliseconds(policy, next(observed)) for _ in range(case.decisions)])
        halves.append(float(np.median(taken[:, 0])))
        tails.append(float(np.percentile(taken[:, 0], 99)))
        busy.append(float(taken[:, 1].mean()))
        alone.append(_cpu_milliseconds(products, on, 20))
    floor: dict[str, Any] = {
        "floor": 1e3 * sum(_floor(n, w, on) for n, _, w in passes),
        "floor_from": _told(passes),
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


def _matrices(module: nn.Module, dtype: torch.dtype) -> list[torch.Tensor]:
    return [m.weight.detach().to(dtype) for m in module.modules() if isinstance(m, nn.Linear)]


def _floor(n: int, weights: Sequence[torch.Tensor], on: torch.device) -> float:
    size, dtype = sum(w.numel() for w in weights), weights[0].dtype
    return floor_seconds(on, dtype, 2.0 * size * n, size * dtype.itemsize)


def _told(passes: Sequence[Pass]) -> str:
    """Return what goes through how many weights in words."""
    told = []
    for weights, group in itertools.groupby(passes, lambda one: one[2]):
        some = list(group)
        counts, size = [n for n, _, _ in some], sum(w.numel() for w in weights)
        what = some[0][1] + "s" * (sum(counts) > 1)
        told.append(f"{' + '.join(map(str, counts))} {what} through {size / 1e6:.3g}M weights")
    return ", ".join(told)


def _products(
    passes: Sequence[tuple[int, Sequence[torch.Tensor]]], on: torch.device
) -> Callable[[], None]:
    """Return what multiplies as many tokens as a decision reads by every weight."""
    inputs = []
    for n, weights in passes:
        widths, dtype = {w.shape[1] for w in weights}, weights[0].dtype
        inputs.append(({w: torch.randn(n, w, device=on).to(dtype) for w in widths}, weights))

    @torch.inference_mode()
    def work() -> None:
        for given, weights in inputs:
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
