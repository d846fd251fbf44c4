"""Where environments run: worker processes, or this one. Both take and return the same messages.

    to a host     (group, [("reset", slot, task, seed) | ("step", slot, action), ...])
    from a host   Answer(group, [Reply, ...], seconds)   replies in the same order

What a worker process observes goes through shared memory where it can (see `shared`).

An action may be `players.Acts`: the host then asks an expert, who may look inside the simulator.

A slot is a place for one environment; a host keeps `SPARE` environments that are not in use for
the next slot that wants their task, since starting one may cost a second. Where a worker process
dies, its environments are gone; it is told which slot's command it was at.
"""

from __future__ import annotations

import contextlib
import time
import traceback
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np

from gato.envs import cameras, registry
from gato.envs.check import Inside
from gato.envs.workers import Pool, WorkerDiedError
from gato.rollouts.players import Acts, make_actor
from gato.rollouts.shared import SharedMemory

SPARE = 8
"""Most environments that a host keeps without using them: a simulator may hold 100 MB."""

AT_ONCE = 64
"""Environments in use at once, unless told otherwise: a row of 64 is decoded in less than half the
time of one of 10, and so many robots hold 1.5 GB."""
DRAWING_AT_ONCE = 20
"""Where some draw: an environment with a camera may hold 160 MB."""

Command = tuple[Any, ...]
Slot = Hashable


@dataclass
class Reply:
    """What one environment said."""

    slot: Slot
    observation: Any = None
    """None where the episode has ended."""
    reward: float = 0.0
    ended: bool = False
    success: bool | None = None
    error: str | None = None
    """The traceback where the environment raised; the episode is over."""
    acted: Any = None
    """What was done in place of `Acts`."""


def most_at_once(task_ids: Iterable[str]) -> int:
    """Return how many environments to have in use at once."""
    return DRAWING_AT_ONCE if any(cameras.split(task)[1] for task in task_ids) else AT_ONCE


class Answer(NamedTuple):
    """What became of the commands that one message held."""

    group: Any
    replies: list[Reply]
    seconds: float
    """That carrying them out took."""


@dataclass(frozen=True)
class Death:
    """A worker process ended, and with it all that it held."""

    host: int
    reason: str
    culprit: Slot | None
    """The slot whose command was being carried out."""
    unanswered: frozenset[Any]
    """The groups that it owed an answer."""


class UnavailableError(ValueError):
    """An environment cannot be started at all; the message says what to install or do."""


class Host:
    """The environments of some slots, in this process."""

    def __init__(
        self, tick: Callable[[], None] = lambda: None, shared: SharedMemory | None = None
    ) -> None:
        """Start without environments; `tick` is called after each command.

        Args:
            tick: see above.
            shared: where observations are put, if anywhere.
        """
        self._tick = tick
        self._put = shared.put if shared is not None else lambda slot, observation: observation
        self._used: dict[Slot, tuple[str, gym.Env]] = {}
        self._spaces: dict[str, Inside] = {}
        """By task."""
        self._seen: dict[Slot, tuple[int, Any]] = {}
        """Of each slot, its seed and last observation."""
        self._actors: dict[Slot, registry.Expert] = {}
        self._spare: deque[tuple[str, gym.Env]] = deque()
        """Not in use, each with its task; the oldest first."""

    def answer(self, message: tuple[Any, Sequence[Command]]) -> Answer:
        """Carry out a group's commands."""
        began = time.perf_counter()
        replies = self.run(message[1])
        return Answer(message[0], replies, time.perf_counter() - began)

    def run(self, commands: Sequence[Command]) -> list[Reply]:
        """Carry out commands in order."""
        replies = []
        for command in commands:
            replies.append(self._one(*command))
            self._tick()
        return replies

    def environment(self, slot: Slot) -> gym.Env:
        """Return the environment in a slot that was reset, to be looked at."""
        return self._used[slot][1]

    def close(self) -> None:
        """Close the environments."""
        for _, env in [*self._used.values(), *self._spare]:
            _close(env)
        self._used, self._spare = {}, deque()

    def _one(self, what: str, slot: Slot, *arguments: Any) -> Reply:
        try:
            return (
                self._reset(slot, *arguments) if what == "reset" else self._step(slot, *arguments)
            )
        except UnavailableError:
            raise
        except (Exception, SystemExit):  # it ends a simulator's episode, not the evaluation
            told = traceback.format_exc()
            _, env = self._used.pop(slot, (None, None))
            if env is not None:
                _close(env)
            return Reply(slot, ended=True, success=False, error=told)

    def _reset(self, slot: Slot, task: str, seed: int) -> Reply:
        held, env = self._used.pop(slot, (None, None))
        if held != task:
            if held is not None and env is not None:
                self._spare.append((held, env))
            env = self._take_spare(task)
            env = self._make(task) if env is None else env
            while len(self._spare) > SPARE:
                _close(self._spare.popleft()[1])
        assert env is not None
        self._used[slot] = (task, env)
        observation, _ = env.reset(seed=seed)
        require_finite(observation, "observation")
        self._inside(slot).require(observation, "reset")
        self._seen[slot] = seed, observation
        self._actors.pop(slot, None)
        return Reply(slot, self._put(slot, observation))

    def _inside(self, slot: Slot) -> Inside:
        task, env = self._used[slot]
        if task not in self._spaces:
            self._spaces[task] = Inside(env.observation_space)
        return self._spaces[task]

    def _take_spare(self, task: str) -> gym.Env | None:
        for i, (held, env) in enumerate(self._spare):
            if held == task:
                del self._spare[i]
                return env
        return None

    def _make(self, task: str) -> gym.Env:
        try:
            return registry.make(task)
        except ValueError as error:
            raise UnavailableError(str(error)) from error

    def _step(self, slot: Slot, action: Any) -> Reply:
        env = self._used[slot][1]
        acted = None
        if isinstance(action, Acts):
            action = acted = self._asked(slot, action.kind)
        observation, reward, terminated, truncated, info = env.step(action)
        require_finite(observation, "observation")
        require_finite(np.asarray(reward, float), "reward")
        self._inside(slot).require(observation, "a step")
        self._seen[slot] = self._seen[slot][0], observation
        success, ended = info.get("success"), bool(terminated or truncated)
        return Reply(
            slot,
            None if ended else self._put(slot, observation),  # nobody acts on the last one
            float(reward),
            ended,
            None if success is None else bool(success),
            acted=acted,
        )

    def _asked(self, slot: Slot, kind: str) -> Any:
        """Return the action of whom the slot's episode began with, or begins with now."""
        task, env = self._used[slot]
        seed, observation = self._seen[slot]
        if slot not in self._actors:
            actor = make_actor(task, kind)
            actor.reset(env, seed)
            self._actors[slot] = actor
        return self._actors[slot].act(env, observation)


def _close(env: gym.Env) -> None:
    with contextlib.suppress(Exception):  # nothing is asked of it any more, and it may have thrown
        env.close()


def require_finite(value: Any, name: str) -> None:
    """Raise ValueError for numbers that no model can read: the simulation has diverged."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            require_finite(part, f"{name}/{key}")
    elif isinstance(value, tuple):
        for i, part in enumerate(value):
            require_finite(part, f"{name}/{i}")
    elif isinstance(value, np.ndarray | np.floating) and value.dtype.kind == "f":
        bad = ~np.isfinite(value)
        if bad.any():
            at = [int(k) for k in np.argwhere(bad)[0]]
            got = np.asarray(value)[tuple(at)]
            raise ValueError(
                f"expected finite numbers of the environment; got {got} in {name}"
                f"{f' at {at}' if at else ''} (NaN and infinity cannot be read by a model)"
            )


class Hosts:
    """Several hosts working side by side while the model decodes."""

    def __init__(
        self,
        workers: int,
        timeout: float | None = None,
        rooms: Mapping[Slot, int] | None = None,
    ) -> None:
        """Make the hosts.

        Args:
            workers: how many processes; with 0, one host is this process.
            timeout: seconds that one command may take before its worker process is ended.
            rooms: bytes that an observation of a slot may take in shared memory.
        """
        self._here = Host()
        self._shared = SharedMemory(rooms) if workers and rooms else None
        make = partial(_serve, self._shared) if workers else lambda tick: self._here.answer
        self._pool = Pool(workers, make, timeout=timeout)
        self.count = count = self._pool.count
        self._asked: list[deque[tuple[Any, Sequence[Command]]]] = [deque() for _ in range(count)]
        self._ticks = [0] * count
        """Of the answers that each process has given."""

    def send(self, host: int, group: Any, commands: Sequence[Command]) -> None:
        """Let a host carry out commands; the answer carries the group's name."""
        self._asked[host].append((group, commands))
        self._pool.send(host, (group, list(commands)))

    def receive(self) -> list[Answer | Death]:
        """Return the answers and deaths that are there, at least one.

        Raises:
            ValueError: where an environment cannot be started at all.
            RuntimeError: where worker processes end before they can be asked anything.
        """
        return [self._told(host, answer) for host, answer in self._pool.receive()]

    def _told(self, host: int, answer: Answer | WorkerDiedError) -> Answer | Death:
        asked = self._asked[host]
        if not isinstance(answer, WorkerDiedError):
            _, commands = asked.popleft()
            self._ticks[host] += len(commands)
            if self._shared is not None:
                for reply in answer.replies:
                    reply.observation = self._shared.get(reply.observation)
            return answer
        slots = [command[1] for _, commands in asked for command in commands]
        # a process that can be asked has ticked, and then once per command
        at = answer.ticks - self._ticks[host]
        culprit = slots[at] if at < len(slots) else None
        unanswered = frozenset(group for group, _ in asked)
        asked.clear()
        self._ticks[host] = 0
        return Death(host, str(answer), culprit, unanswered)

    def close(self) -> None:
        """End the worker processes."""
        self._pool.close()
        self._here.close()


def _serve(
    shared: SharedMemory | None, tick: Callable[[], None]
) -> Callable[[tuple[Any, list[Command]]], Answer]:
    """Return what answers a worker's messages."""
    return Host(tick, shared).answer
