"""`gato bench rollout`: steps/s of 8 rows with a cache, beside one row without."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from gato.bench_common import ARM, Result, made_up, pace, result
from gato.bench_machine import device
from gato.checkpoint import build_model
from gato.config import TrainConfig
from gato.model import GatoModel
from gato.model_config import quickstart
from gato.tokenizers.serializer import Serializer
from gato.tokenizers.spaces import CodecOptions
from gato.tokenizers.stream import TokenSequence, concatenate, pack
from gato.tokenizers.task_codec import History


def rollout_bench(repeats: int) -> list[Result]:
    """Return decisions/s of 8 rows decided together with a cache, and of one row without."""
    results = []
    for case, window in (("memory of 16 steps", 16), ("memory of one step", 1)):
        serializer = Serializer(CodecOptions(observations="vector"))
        serializer.add_task(replace(ARM, instruction=""), history=History(window=window))
        torch.manual_seed(0)
        model = _model(serializer)
        decisions, rows = 16, 8
        ours, theirs = [], []
        for _ in range(2 * repeats + 1):
            ours.append(_cached(model, serializer, rows, decisions))
            theirs.append(_uncached(model, serializer, decisions, window))
        against = "one row, the whole context computed anew for every token"
        results.append(
            result(f"rollout: arm, 8 rows, {case}", ours[1:], "steps/s", theirs[1:], against)
        )
    return results


def _model(serializer: Serializer) -> GatoModel:
    config = TrainConfig(model=quickstart())
    return build_model(config, serializer).to(device()).eval()


def _observations(rows: int, decisions: int) -> list[np.ndarray]:
    episode = made_up(ARM, rows * decisions)
    observed = np.asarray(episode.observations["observation"])[:-1]
    return list(observed.reshape(decisions, rows, -1))


def _cached(model: GatoModel, serializer: Serializer, rows: int, decisions: int) -> float:
    """Return decisions/s of the policy."""
    from gato.rollouts.policy import Policy

    policy = Policy(model, serializer, [ARM.id] * rows)
    observations = _observations(rows, decisions)

    def work() -> None:
        for observed in observations:
            policy.select_action(list(observed))

    return pace(work, rows * decisions)


@torch.no_grad()
def _uncached(model: GatoModel, serializer: Serializer, decisions: int, window: int) -> float:
    """Return decisions/s of the plain loop: all that is remembered, read anew for every token."""
    from gato.rollouts.grammar import ActionGrammar

    task, head = serializer.task(ARM.id), serializer.head(ARM.id)
    on = model.table.weight.device
    observations = _observations(1, decisions)

    def work() -> None:
        past: list[TokenSequence] = []
        for i, observed in enumerate(observations):
            past = [] if i % window == 0 else past
            past.append(serializer.observation(ARM.id, {"observation": observed[0]}))
            grammar = ActionGrammar(serializer, task)
            while grammar.allowed is not None:
                sequence = concatenate([head, *past])
                batch = pack([[sequence]], len(sequence), serializer.control).to(on)
                logits = model.logits(model(batch)[-1])
                start, stop = grammar.allowed[0]
                grammar.push(start + int(logits[start:stop].argmax()))
                past.append(grammar.last())
            grammar.value()

    return pace(work, decisions)
