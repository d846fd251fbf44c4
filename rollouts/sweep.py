"""A sweep over tasks: does each keep what its spec promises, and does the stream carry it?

A task is started, played by chance for a few steps at one seed, at another, and at the first one
again, in the same environment and in a new one. What it showed must lie in its spaces, be finite
and be the same for the same seed, and must not change afterwards. The episode is then written as
tokens; the actions read back from them are compared with those executed, and played.

Each task runs in a worker process, so that one that ends its process costs its own row alone.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import gymnasium as gym
import numpy as np

from gato.envs import registry
from gato.envs.check import check_episode, outside
from gato.envs.episode import Episode, TaskSpec, flatten_space, flatten_value
from gato.envs.play import play
from gato.envs.score import RandomExpert
from gato.envs.workers import Pool, WorkerDiedError, deal
from gato.rollouts.grammar import ActionGrammar
from gato.tokenizers.scalars import BINS
from gato.tokenizers.serializer import Serializer
from gato.tokenizers.spaces import CodecOptions
from gato.tokenizers.text import MODEL_FILE, train_text_model

STEPS = 20
SEED, OTHER_SEED = 7, 8
SECONDS = 300.0
"""Silence after which a task's process counts as hung."""
TEXT_PIECES = 320
"""The 256 bytes and a few pieces: any text is written, none is written well."""


class FaultError(Exception):
    """A task does not keep a promise; the message says which."""


@dataclass(frozen=True)
class Row:
    """What the sweep found of one task."""

    id: str
    ok: bool
    seconds: float
    fault: str = ""
    """What failed, in one line."""
    detail: str = ""
    """The traceback, where something was raised."""

    def to_json(self) -> dict[str, Any]:
        """Return the row; what went wrong only where something did."""
        return {name: value for name, value in asdict(self).items() if value != ""}


def to_json(rows: Sequence[Row]) -> str:
    """Return JSON of versions, counts by suite, and the rows, one a line."""
    suites = summary(rows)
    head = json.dumps({"versions": registry.versions(*suites), "suites": suites})
    lines = ",\n".join(json.dumps(row.to_json()) for row in rows)
    return f'{head[:-1]}, "tasks": [\n{lines}\n]}}'


def summary(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Return by suite how many tasks are in order, how many are not, and the seconds they took."""
    suites = sorted({row.id.split("/")[0] for row in rows})
    by = {suite: [row for row in rows if row.id.split("/")[0] == suite] for suite in suites}
    return {
        suite: {
            "ok": sum(row.ok for row in found),
            "failed": sum(not row.ok for row in found),
            "seconds": round(sum(row.seconds for row in found), 1),
        }
        for suite, found in by.items()
    }


def sweep(
    task_ids: Sequence[str], workers: int = 1, progress: Callable[[Row], None] | None = None
) -> list[Row]:
    """Return a row per task, in the order given; `progress` is called with each as it comes.

    Args:
        task_ids: tasks.
        workers: processes; 0 checks in this one, which a task may then end or hang.
        progress: see above.
    """
    rows: dict[str, Row] = {}
    for task_id, answer, seconds in deal(Pool(workers, _checker, timeout=SECONDS), task_ids):
        died = isinstance(answer, WorkerDiedError)
        rows[task_id] = Row(task_id, False, round(seconds, 2), str(answer)) if died else answer
        if progress:
            progress(rows[task_id])
    return [rows[task_id] for task_id in task_ids]


def _checker(tick: Callable[[], None]) -> Callable[[str], Row]:
    return check


def check(task_id: str) -> Row:
    """Return what is found of one task, in this process."""
    start, fault, detail = time.monotonic(), "", ""
    try:
        _check(registry.spec(task_id))
    except FaultError as error:
        fault = str(error)
    except Exception as error:  # whatever a simulator raises is its row's fault, not the sweep's
        fault = f"{type(error).__name__}: {' '.join(str(error).split())}"
        detail = traceback.format_exc()
    return Row(task_id, not fault, round(time.monotonic() - start, 2), fault, detail)


def _check(spec: TaskSpec) -> None:
    used, fresh = Watched(registry.make(spec.id), spec), Watched(registry.make(spec.id), spec)
    try:
        first = _played(used, spec, SEED)
        check_episode(first, spec)
        _played(used, spec, OTHER_SEED)
        _require_same(first, _played(used, spec, SEED), "again, after another episode")
        _require_same(first, _played(fresh, spec, SEED), "in a new environment")
        actions = decoded_actions(first, spec)
        fresh.reset(seed=SEED)
        for action in actions:
            if any(fresh.step(action)[2:4]):
                break
        used.require_unchanged()
        fresh.require_unchanged()
    finally:
        used.close()
        fresh.close()


class Watched(gym.Wrapper):
    """An environment whose observations are checked as they come, and kept twice."""

    def __init__(self, env: gym.Env, spec: TaskSpec) -> None:
        super().__init__(env)
        for role in ("observation_space", "action_space"):
            ours, theirs = getattr(spec, role), getattr(env, role)
            if ours != theirs:
                raise FaultError(f"{role} is {theirs} and not its spec's {ours}")
        self._kept: list[tuple[Any, Any]] = []

    def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        """Start an episode."""
        observation, info = self.env.reset(**options)
        self._keep(observation, "reset")
        return observation, info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Act, and check what comes of it."""
        before = deepcopy(action)
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._keep(observation, "step")
        if not _equal(action, before):
            raise FaultError(f"a step changes its action, from {before} to {action}")
        if not np.isscalar(reward) or not np.isfinite(reward):
            raise FaultError(f"the reward is {reward!r}")
        return observation, float(reward), terminated, truncated, info

    def require_unchanged(self) -> None:
        """Raise where an observation is no longer what it was when it was returned."""
        for k, (returned, copy) in enumerate(self._kept):
            if not _equal(returned, copy):
                raise FaultError(f"observation {k} changes after it was returned")

    def _keep(self, observation: Any, when: str) -> None:
        space = self.observation_space
        if not space.contains(observation):
            raise FaultError(
                f"an observation of {when} is outside its space: {outside(space, observation)}"
            )
        self._kept.append((observation, deepcopy(observation)))


def _played(env: Watched, spec: TaskSpec, seed: int) -> Episode:
    return play(gym.wrappers.TimeLimit(env, STEPS), RandomExpert(spec), spec, seed, noise=0.0)


def _require_same(first: Episode, second: Episode, when: str) -> None:
    a, b = _columns(first), _columns(second)
    for name in a:
        if not _equal(a[name], b[name]):
            raise FaultError(f"seed {first.seed} gives other {name} {when}")


def _columns(episode: Episode) -> dict[str, Any]:
    observed = {f"observations {path!r}": v for path, v in episode.observations.items()}
    actions = {f"actions {path!r}": v for path, v in episode.actions.items()}
    ends = {name: getattr(episode, name) for name in ("rewards", "terminated", "truncated")}
    return {**observed, **actions, **ends, "success": episode.success}


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(np.array_equal(a, b))


def decoded_actions(episode: Episode, spec: TaskSpec) -> list[Any]:
    """Return the actions of an episode as read back from its tokens.

    Raises:
        FaultError: where one is outside its space or not what was written: within half a bin for
            real numbers, exactly else.
    """
    serializer = Serializer(
        CodecOptions(observations="scalar", scales="mu_law"), {"text": {MODEL_FILE: _text_model()}}
    )
    task = serializer.add_task(spec)
    written = serializer.episode(episode)
    decoded = []
    for t in range(len(written)):
        step = slice(written.starts[t], written.starts[t + 1])
        grammar = ActionGrammar(serializer, task)
        for token in written.steps.ids[step][written.actions[step]]:
            grammar.push(int(token))
        action = grammar.value()
        if not spec.action_space.contains(action):
            raise FaultError(f"the tokens of action {t} read back as {action}, outside its space")
        flat = flatten_value(spec.action_space, action, "action")
        for path, leaf in flatten_space(spec.action_space, "action").items():
            executed = episode.actions[path][t]
            if not _near(leaf, flat[path], executed):
                raise FaultError(f"action {t}, {path!r}: {executed} reads back as {flat[path]}")
        decoded.append(action)
    return decoded


def _near(leaf: gym.Space, decoded: Any, executed: Any) -> bool:
    if isinstance(leaf, gym.spaces.Box):
        half = (leaf.high.astype(np.float64) - leaf.low) / BINS / 2
        slack = 1e-6 * np.maximum(np.abs(leaf.low), np.abs(leaf.high))  # rounding in float32
        return bool((np.abs(np.asarray(decoded, np.float64) - executed) <= half + slack).all())
    return bool(np.array_equal(decoded, executed))


@cache
def _text_model() -> bytes:
    """Return a text model that reads every text, if not in few tokens."""
    texts = [registry.spec(task_id).instruction for task_id in registry.task_ids()]
    return train_text_model([text for text in texts if text], TEXT_PIECES)
