"""`gato bench suites`: tasks of four suites decided in one batch, beside the plain loop.

    suites        steps/s of 16 rows over 4 suites   beside one row at a time, no cache: all that
                                                     is remembered, read anew for every id
    suites_long   steps/s of steps 4,000 to 5,000    beside steps 500 to 1,500, in turns; memory

The tasks are made up, with the spaces of Atari, BabyAI, Meta-World and dm_control. Greedy actions
are compared on the way: with the plain loop's until the memory is full, and then with those of one
full forward over all of the episode under a sliding window, which is what a ring of keys computes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from gymnasium import spaces

from gato.bench_common import Result, result
from gato.bench_machine import device
from gato.checkpoint import build_model
from gato.envs.episode import ANY_TEXT, TaskSpec, flatten_value
from gato.memory import resident
from gato.model import GatoModel
from gato.model_config import ModelConfig
from gato.presets import preset
from gato.tokenizers.serializer import Serializer
from gato.tokenizers.stream import TokenSequence, concatenate, pack
from gato.tokenizers.task_codec import History
from gato.tokenizers.text import MODEL_FILE, train_text_model

MISSIONS = (
    "go to the red ball",
    "put the blue key next to the green box",
    "open the door on your left",
    "pick up a grey ball",
)


def _box(*shape: int) -> spaces.Box:
    return spaces.Box(-np.inf, np.inf, shape, np.float32)


def _spec(name: str, seen: spaces.Space, done: spaces.Space, text: str = "") -> TaskSpec:
    return TaskSpec(f"suite/{name}", seen, done, 10_000, 20.0, instruction=text)


SUITES = {
    spec.id: spec
    for spec in (
        _spec("atari", spaces.Box(0, 255, (64, 64, 3), np.uint8), spaces.Discrete(18)),
        _spec(
            "babyai",
            spaces.Dict(
                {
                    "direction": spaces.Discrete(4),
                    "grid": spaces.MultiDiscrete(np.full((7, 7, 3), [11, 6, 4])),
                    "mission": ANY_TEXT(),
                }
            ),
            spaces.Discrete(7),
        ),
        _spec("metaworld", _box(39), spaces.Box(-1, 1, (4,), np.float32), "push the puck"),
        _spec(
            "dm_control",
            spaces.Dict({"height": _box(1), "orientations": _box(14), "velocity": _box(9)}),
            spaces.Box(-1, 1, (6,), np.float32),
        ),
    )
}
MODELS = {
    "quickstart": replace(preset("quickstart").model, window=256),
    "10M": ModelConfig(
        layers=8,
        width=320,
        heads=5,
        head_dim=64,
        ffn_width=1706,
        context=512,
        window=512,
        qk_norm=True,
    ),
}

BLOCK = 100
"""Steps whose pace is one repeat of `suites_long`, which has ten."""


def make(config: ModelConfig, device: torch.device | str = "cpu") -> tuple[GatoModel, Serializer]:
    """Return a model in which no weight is zero, and a serializer that knows the four tasks."""
    words, rng = " ".join((*MISSIONS, "push the puck")).split(), np.random.default_rng(0)
    text = train_text_model([" ".join(rng.choice(words, 6)) for _ in range(400)], 400)
    run = replace(preset("quickstart"), model=config)
    serializer = Serializer(run.codec, {"text": {MODEL_FILE: text}})
    for spec in SUITES.values():
        serializer.add_task(spec, history=History())
    torch.manual_seed(0)
    model = build_model(run, serializer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model.to(device).eval(), serializer


def observe(task: str, rng: np.random.Generator, mission: str) -> Any:
    """Return an observation of noise."""
    space = SUITES[task].observation_space
    if isinstance(space, spaces.Dict):
        return {
            key: mission if isinstance(leaf, spaces.Text) else _noise(leaf, rng)
            for key, leaf in space.spaces.items()
        }
    return _noise(space, rng)


def _noise(space: spaces.Space, rng: np.random.Generator) -> Any:
    match space:
        case spaces.Discrete():
            return rng.integers(space.n)
        case spaces.MultiDiscrete():
            return rng.integers(0, space.nvec)
        case spaces.Box(dtype=np.uint8):
            return rng.integers(0, 256, space.shape, np.uint8)
    return rng.normal(size=space.shape).astype(np.float32)


def episodes(tasks: Sequence[str], steps: int, seed: int = 0) -> list[list[Any]]:
    """Return what each row observes at each step; a mission lasts for the episode."""
    rng = np.random.default_rng(seed)
    missions = [MISSIONS[i % len(MISSIONS)] for i in range(len(tasks))]
    return [
        [observe(t, rng, m) for t, m in zip(tasks, missions, strict=True)] for _ in range(steps)
    ]


class Plain:
    """One row without a cache: for every id, all that is remembered is read anew."""

    def __init__(
        self, model: GatoModel, serializer: Serializer, task: str, *, cut: bool = True
    ) -> None:
        """Begin an episode.

        Args:
            model: the policy's.
            serializer: the policy's.
            task: one of the model's tasks.
            cut: whether to read only as many of the last tokens as the model's memory holds; else
                the whole episode is read under the model's sliding window.
        """
        self.model, self.serializer = model, serializer
        self.task, self.cut = serializer.task(task), cut
        self.past: list[TokenSequence] = [serializer.head(task)]

    def __len__(self) -> int:
        return sum(map(len, self.past))

    def see(self, observation: Any) -> None:
        """Take what the environment shows."""
        task = self.task.task
        flat = flatten_value(task.observation_space, observation, "observation")
        self.past.append(self.serializer.observation(task.id, flat))

    def follow(self, action: Any) -> None:
        """Take the action that another has decided."""
        grammar = self._grammar()
        flat = flatten_value(self.task.task.action_space, action, "action")
        for path, name, spec in self.task.action:
            written = self.serializer.modalities[name].encode(np.asarray(flat[path])[None], spec)
            for token in (written.ids[0] + self.serializer.offset[name]).tolist():
                grammar.push(token)
                self.past.append(grammar.last())

    @torch.no_grad()
    def decide(self) -> Any:
        """Return the likeliest action, and remember it."""
        grammar, device = self._grammar(), self.model.table.weight.device
        while grammar.allowed is not None:
            tokens = concatenate(self._remembered())
            batch = pack([[tokens]], len(tokens), self.serializer.control).to(device)
            logits = self.model.logits(self.model(batch)[-1])
            start, stop = grammar.allowed[0]
            grammar.push(start + int(logits[start:stop].argmax()))
            self.past.append(grammar.last())
        return grammar.value()

    def _remembered(self) -> list[TokenSequence]:
        """Return what is read: the last whole observations and ids that the memory holds."""
        first, total = 0, len(self)
        while self.cut and total > self.model.config.memory:
            total -= len(self.past[first])
            first += 1
        return self.past[first:]

    def _grammar(self) -> Any:
        from gato.rollouts.grammar import ActionGrammar

        return ActionGrammar(self.serializer, self.task)


def suites_bench(repeats: int) -> list[Result]:
    """Return steps/s of 16 rows over four suites, and of the plain loop over the same tasks."""
    on = device()
    against = "one row at a time, without a cache: all that is remembered, read for every id"
    results = []
    for name, config in MODELS.items():
        model, serializer = make(config, on)
        pairs = [compared(model, serializer, 4, 64, 13) for _ in range(repeats)]
        ours, theirs = ([pair[i] for pair in pairs] for i in range(2))
        case = f"rollout: 16 rows of 4 suites, {name}, memory of {config.memory} tokens"
        results.append(result(case, ours, "steps/s", theirs, against))
    return results


def compared(
    model: GatoModel, serializer: Serializer, copies: int, steps: int, every: int
) -> tuple[float, float]:
    """Return steps/s of one batch and of the plain loop, which is run at every `every`-th step.

    Raises:
        RuntimeError: where the actions are not the same.
    """
    from gato.rollouts.policy import Policy

    tasks = [t for t in SUITES for _ in range(copies)]
    policy = Policy(model, serializer, tasks, temperature=0.0, precision="float32")
    plain = {i: Plain(model, serializer, tasks[i]) for i in range(0, len(tasks), copies)}
    taken, spent, decided = 0.0, 0.0, 0
    for step, seen in enumerate(episodes(tasks, steps)):
        begun = time.perf_counter()
        actions = policy.select_action(seen)
        taken += time.perf_counter() - begun
        for i, row in plain.items():
            row.see(seen[i])
            if step % every != every - 1:
                row.follow(actions[i])
                continue
            begun = time.perf_counter()
            action = row.decide()
            spent, decided = spent + time.perf_counter() - begun, decided + 1
            full = len(row) > model.config.memory
            if full:  # the ring remembers more than what can be read anew
                row.past = row.past[: -_ids(serializer, tasks[i])]
                row.follow(actions[i])
            elif not np.array_equal(action, actions[i]):
                raise RuntimeError(
                    f"{tasks[i]}, step {step}: {action} alone, {actions[i]} among {len(tasks)}"
                )
    return len(tasks) * steps / taken, decided / spent


def _ids(serializer: Serializer, task: str) -> int:
    """Return how many ids an action of the task takes."""
    from gato.rollouts.grammar import action_count

    return action_count(serializer, serializer.task(task)) or 0


def suites_long_bench(repeats: int, late: int = 4000, early: int = 500) -> list[Result]:
    """Return steps/s late in an episode beside those early in another, step by step in turns."""
    from gato.rollouts.policy import Policy

    model, serializer = make(MODELS["quickstart"], device())
    tasks = list(SUITES)
    policies = [Policy(model, serializer, tasks, temperature=0.0) for _ in range(2)]
    seen = episodes(tasks, 50)
    for policy, steps in zip(policies, (late, early), strict=True):
        for step in range(steps):
            policy.select_action(seen[step % len(seen)])
    before = resident()
    paces: list[list[float]] = [[], []]
    for _ in range(10):
        spent = [0.0, 0.0]
        for step in range(BLOCK):
            for i, policy in enumerate(policies):
                begun = time.perf_counter()
                policy.select_action(seen[step % len(seen)])
                spent[i] += time.perf_counter() - begun
        for values, seconds in zip(paces, spent, strict=True):
            values.append(BLOCK * len(tasks) / seconds)
    after = resident()
    more = 10 * BLOCK
    case = f"rollout: 4 rows, steps {late} to {late + more}"
    return [
        result(case, paces[0], "steps/s", paces[1], f"steps {early} to {early + more}"),
        result(f"{case}, memory", after, "MB", before, f"{more} steps before", better="less"),
    ]
