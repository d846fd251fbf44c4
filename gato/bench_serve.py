"""`gato bench serve`: ids/s of 16 texts written at the same time, beside one after the other.

All go through the thread that owns the model, as they do behind `gato serve`. The model is the
quickstart's with random weights, which cost the same and write on until they are told to stop; how
long a text becomes is drawn, so that rows are left and taken at different times. Who asks is one
thread more, so that nothing of HTTP is in it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from gato.bench_common import Result, result
from gato.bench_machine import device, floor_seconds
from gato.checkpoint import build_model
from gato.presets import preset
from gato.tokenizers.serializer import Serializer
from gato.tokenizers.stream import TokenSequence, concatenate
from gato.tokenizers.text import MODEL_FILE, train_text_model

ROWS = 16
ONE = "one text at a time"
LENGTHS = (24, 72)
"""Ids of a text, from and to."""
READING, WRITING = 6, 16
"""Steps until all prefixes are read, and steps that are then measured."""


def serve_bench(repeats: int) -> list[Result]:
    """Return ids/s; see the head of this file."""
    return measured(*made(), repeats)


def made() -> tuple[Any, list[TokenSequence]]:
    """Return what stands for an agent, with random weights, and what is asked of it."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh"), int(rng.integers(2, 8)))) for _ in range(900)]
    lines = [" ".join(rng.choice(words, 8)) for _ in range(2000)]
    config = preset("quickstart")
    text = train_text_model(lines, config.text_pieces)
    serializer = Serializer(config.codec, {"text": {MODEL_FILE: text}})
    torch.manual_seed(0)
    model = build_model(config, serializer).to(device()).eval()
    return SimpleNamespace(model=model, serializer=serializer), asked(serializer, lines)


def asked(serializer: Serializer, lines: Sequence[str]) -> list[TokenSequence]:
    """Return a conversation of one message for each of 64 lines."""
    end = serializer.control_piece("<assistant>")
    talks = [serializer.conversation([{"role": "user", "content": line}]) for line in lines[:64]]
    return [concatenate([talk, end]) for talk in talks]


def measured(agent: Any, prefixes: Sequence[TokenSequence], repeats: int) -> list[Result]:
    """Return the results of an agent that goes on from 64 prefixes."""
    from gato.rollouts.model_thread import ModelThread

    one, many, queued, seconds = [], [], [], []
    with ModelThread(agent, rows=ROWS, waiting=len(prefixes)) as thread:
        for repeat in range(repeats + 1):
            some = prefixes[:ROWS]
            one.append(_pace(thread, some[repeat % 4 :: 4], 1))
            many.append(_pace(thread, some, ROWS))
            queued.append(_pace(thread, prefixes, len(prefixes)))
            seconds.append(_step(agent, some))
    size = sum(m.weight.numel() for m in agent.model.blocks.modules() if isinstance(m, nn.Linear))
    weight = agent.model.table.weight
    size += sum(b - a for a, b in _spans(agent)) * weight.shape[1]
    on, kind = weight.device, weight.dtype
    floor = ROWS / floor_seconds(on, kind, 2.0 * size * ROWS, size * kind.itemsize)
    told = f"{ROWS} ids through {size / 1e6:.3g}M weights"
    whole, model = zip(*seconds[1:], strict=True)
    return [
        result(
            f"serve: {ROWS} texts", many[1:], "ids/s", one[1:], ONE, floor=floor, floor_from=told
        ),
        result(f"serve: {len(prefixes)} over {ROWS} rows", queued[1:], "ids/s", one[1:], ONE),
        result(f"serve: step of {ROWS} rows", whole, "ms", model, "the model alone", better="less"),
    ]


def _spans(agent: Any) -> Sequence[tuple[int, int]]:
    from gato.rollouts.sampling import text_spans

    return text_spans(agent.serializer)


def _sampling(number: int) -> Any:
    from gato.rollouts.engine import Sampling

    rng = np.random.default_rng(number)
    return Sampling(int(rng.integers(*LENGTHS)), 1.0, 0.95, number)


def _pace(thread: Any, prefixes: Sequence[TokenSequence], at_once: int) -> float:
    """Return ids/s of texts, so many of them at the same time."""
    free, count = threading.Semaphore(at_once), [0]

    def sink(delta: Any) -> None:
        count[0] += delta.tokens
        if delta.finish is not None:
            assert delta.error is None
            free.release()

    begun = time.perf_counter()
    for number, prefix in enumerate(prefixes):
        free.acquire()
        thread.write(prefix, _sampling(number), sink)
    for _ in range(at_once):
        free.acquire()
    return count[0] / (time.perf_counter() - begun)


def _step(agent: Any, prefixes: Sequence[TokenSequence]) -> tuple[float, float]:
    """Return milliseconds of a step in which all rows write, and of the model's share of it."""
    from gato.rollouts.engine import Engine

    engine, spent = Engine(agent.model, agent.serializer, len(prefixes)), [0.0]

    def timed(work: Any) -> Any:
        def run(*args: Any, **options: Any) -> Any:
            begun = time.perf_counter()
            found = work(*args, **options)
            spent[0] += time.perf_counter() - begun
            return found

        return run

    engine.memory.read = timed(engine.memory.read)  # type: ignore[method-assign]
    engine._choose = timed(engine._choose)  # type: ignore[method-assign]
    for number, prefix in enumerate(prefixes):
        engine.submit(prefix, _sampling(number))
    for _ in range(READING):
        engine.step()
    spent[0], begun = 0.0, time.perf_counter()
    for _ in range(WRITING):
        engine.step()
    whole = time.perf_counter() - begun
    return 1e3 * whole / WRITING, 1e3 * spent[0] / WRITING
