"""Where environments run: worker processes, or this one. Both take and return the same messages.

    to a host     (group, [("reset", slot, task, seed) | ("step", slot, action), ...])
    from a host   (group, [Reply, ...])   in the same order

An action may be `Acts`: the host then asks an expert, who may look inside the simulator.

A slot is a place for one environment; a host keeps environments that are not in use for the next
slot that wants their task, since starting one may cost a second.
"""

from __future__ import annotations

import signal
import traceback
from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

import gymnasium as gym
import numpy as np

from gato.envs import registry
from gato.envs.score import RandomExpert
from gato.envs.workers import one_thread_each

Command = tuple[Any, ...]
Slot = Hashable


@dataclass
class Reply:
    """What one environment said."""

    slot: Slot
    observation: Any = None
    reward: float = 0.0
    ended: bool = False
    success: bool | None = None
    error: str | None = None
    """The traceback where the environment raised; the episode is over."""


@dataclass(frozen=True)
class Acts:
    """Stands for the action of one who acts where the environment is."""

    kind: str
    """``random``, or an expert as in `registry.make_expert`."""


class UnavailableError(ValueError):
    """An environment cannot be started at all; the message says what to install or do."""


class Host:
    """The environments of some slots, in this process."""

    def __init__(self) -> None:
        self._used: dict[Slot, tuple[str, gym.Env]] = {}
        self._seen: dict[Slot, tuple[int, Any]] = {}
        """Of each slot, its seed and last observation."""
        self._actors: dict[Slot, registry.Expert] = {}
        self._spare: dict[str, list[gym.Env]] = {}

    def run(self, commands: Sequence[Command]) -> list[Reply]:
        """Carry out commands in order."""
        return [self._one(*command) for command in commands]

    def _one(self, what: str, slot: Slot, *arguments: Any) -> Reply:
        try:
            return (
                self._reset(slot, *arguments) if what == "reset" else self._step(slot, *arguments)
            )
        except UnavailableError:
            raise
        except Exception:  # whatever a simulator raises ends its episode, not the evaluation
            self._used.pop(slot, None)
            return Reply(slot, ended=True, success=False, error=traceback.format_exc())

    def _reset(self, slot: Slot, task: str, seed: int) -> Reply:
        held, env = self._used.pop(slot, (None, None))
        if held != task:
            if held is not None and env is not None:
                self._spare.setdefault(held, []).append(env)
            env = self._spare[task].pop() if self._spare.get(task) else self._make(task)
        assert env is not None
        self._used[slot] = (task, env)
        observation, _ = env.reset(seed=seed)
        _require_finite(observation)
        self._seen[slot] = seed, observation
        self._actors.pop(slot, None)
        return Reply(slot, observation)

    def _make(self, task: str) -> gym.Env:
        try:
            return registry.make(task)
        except ValueError as error:
            raise UnavailableError(str(error)) from error

    def _step(self, slot: Slot, action: Any) -> Reply:
        env = self._used[slot][1]
        if isinstance(action, Acts):
            action = self._asked(slot, action.kind)
        observation, reward, terminated, truncated, info = env.step(action)
        _require_finite(observation)
        self._seen[slot] = self._seen[slot][0], observation
        success = info.get("success")
        return Reply(
            slot,
            observation,
            float(reward),
            bool(terminated or truncated),
            None if success is None else bool(success),
        )

    def _asked(self, slot: Slot, kind: str) -> Any:
        """Return the action of whom the slot's episode began with, or begins with now."""
        task, env = self._used[slot]
        seed, observation = self._seen[slot]
        if slot not in self._actors:
            actor = _random(task) if kind == "random" else registry.make_expert(task, kind)
            actor.reset(env, seed)
            self._actors[slot] = actor
        return self._actors[slot].act(env, observation)


def _random(task: str) -> RandomExpert:
    """Return a random actor with draws of its own: slots would share those of the task's space."""
    spec = registry.spec(task)
    return RandomExpert(replace(spec, action_space=deepcopy(spec.action_space)))


def _require_finite(observation: Any) -> None:
    """Raise ValueError for numbers that no model can read: the simulation has diverged."""
    if isinstance(observation, Mapping):
        observation = tuple(observation.values())
    if isinstance(observation, tuple):
        for part in observation:
            _require_finite(part)
    elif isinstance(observation, np.ndarray) and observation.dtype.kind == "f":
        if not np.isfinite(observation).all():
            raise ValueError("the environment returned an observation with NaN or infinity")


class Hosts:
    """Several hosts working side by side while the model decodes."""

    def __init__(self, workers: int) -> None:
        """Start the hosts; one worker is a host in this process."""
        self.count = workers
        self._local = Host() if workers == 1 else None
        self._done: deque[tuple[Any, list[Reply]]] = deque()
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        if workers > 1:
            context = get_context("spawn")
            with one_thread_each():
                for _ in range(workers):
                    ours, theirs = context.Pipe()
                    process = context.Process(target=_serve, args=(theirs,), daemon=True)
                    process.start()
                    theirs.close()
                    self._pipes.append(ours)
                    self._processes.append(process)

    def send(self, host: int, group: Any, commands: Sequence[Command]) -> None:
        """Let a host carry out commands; the answer carries the group's name."""
        if self._local is not None:
            self._done.append((group, self._local.run(commands)))
            return
        try:
            self._pipes[host].send((group, list(commands)))
        except OSError as error:
            raise self._ended(host) from error

    def receive(self) -> list[tuple[Any, list[Reply]]]:
        """Return the answers that are there, at least one.

        Raises:
            ValueError: where an environment cannot be started at all.
            RuntimeError: where a worker process ended.
        """
        if self._local is not None:
            return [self._done.popleft()]
        answers = []
        ready = wait(self._pipes)
        for host, pipe in enumerate(self._pipes):
            if pipe not in ready:
                continue
            try:
                answers.append(pipe.recv())
            except (EOFError, OSError) as error:
                raise self._ended(host) from error
        for _, answer in answers:
            if isinstance(answer, str):
                raise UnavailableError(answer)
        return answers

    def _ended(self, host: int) -> RuntimeError:
        self._processes[host].join(1.0)
        return RuntimeError(
            f"a worker process ended (exit code {self._processes[host].exitcode}): a simulator "
            "crashed, memory ran out, or the calling script starts work outside "
            "`if __name__ == '__main__':`. Try workers=1 to see where."
        )

    def close(self) -> None:
        """End the worker processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(2.0)
            if process.is_alive():
                process.terminate()
                process.join()


def _serve(pipe: Connection) -> None:
    """Be a host until the other end closes, which it also does where its process is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    host = Host()
    while True:
        try:
            group, commands = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            answer: Any = host.run(commands)
        except UnavailableError as error:
            answer = str(error)
        try:
            pipe.send((group, answer))
        except OSError:
            return
