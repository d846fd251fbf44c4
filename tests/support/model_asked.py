"""Who asks a model's thread: sinks that wait, a gate that holds it up, what a text is alone."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import rollout_world as world

from gato.rollouts.agent import Agent
from gato.rollouts.engine import Delta, Engine
from gato.rollouts.generate import stream
from gato.rollouts.model_thread import ModelThread
from gato.tokenizers.serializer import History
from gato.tokenizers.stream import TokenSequence

SOON = 30.0
TASKS = list(world.SPECS)
HISTORIES = {
    "made/arm": History(window=1),
    "made/grid": History(hide_actions=True),
    "made/game": History(window=3, joint=2),
    "made/talk": History(),
}


def make_agent() -> Agent:
    """Return an agent that plays `TASKS`, each with another history."""
    serializer = world.make_serializer(History())
    for task, history in HISTORIES.items():
        serializer.add_task(world.SPECS[task], history=history)
    model = world.make_model(serializer)
    return Agent(SimpleNamespace(path="nowhere", model=model, serializer=serializer))


def drain(made: Engine) -> dict[int, list[Delta]]:
    """Return the deltas of every ticket until nothing runs."""
    deltas: dict[int, list[Delta]] = {}
    while made.running or made.waiting:
        for ticket, delta in made.step():
            deltas.setdefault(ticket, []).append(delta)
    return deltas


def text(deltas: list[Delta]) -> str:
    """Return what they say together."""
    return "".join(d.text for d in deltas)


class Sink:
    """Keeps what a text says, and waits for its end."""

    def __init__(self) -> None:
        self.deltas: list[Delta] = []
        self.ended = threading.Event()

    def __call__(self, delta: Delta) -> None:
        assert not self.ended.is_set(), "nothing comes after the last"
        self.deltas.append(delta)
        if delta.finish is not None:
            self.ended.set()

    @property
    def text(self) -> str:
        assert self.ended.wait(SOON)
        return text(self.deltas)

    @property
    def last(self) -> Delta:
        assert self.ended.wait(SOON)
        return self.deltas[-1]


class Gate:
    """Holds the model's thread up until it is opened, so that what waits is known."""

    def __init__(self, thread: ModelThread) -> None:
        self._open, self._reached = threading.Event(), threading.Event()
        self.future = thread.call(self._wait)
        assert self._reached.wait(SOON)

    def _wait(self) -> None:
        self._reached.set()
        assert self._open.wait(SOON)

    def __enter__(self) -> Gate:
        return self

    def __exit__(self, *error: object) -> None:
        self._open.set()


def prefix_of(agent: Agent, words: str) -> TokenSequence:
    """Return the beginning of a document."""
    document = agent.serializer.document(words)
    return document.slice(0, len(document) - 1)


def alone(agent: Agent, words: str, **settings: Any) -> str:
    """Return how the document goes on where nothing else is written."""
    return "".join(stream(agent.model, agent.serializer, prefix_of(agent, words), **settings))


def same(a: Any, b: Any) -> bool:
    """Return whether two things are equal, arrays within them too."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(np.array_equal(a, b))
