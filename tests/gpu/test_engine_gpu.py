"""On a GPU the engine writes through recorded graphs, and no text depends on its neighbours."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import rollout_world as world
from model_asked import HISTORIES, SOON, TASKS, Sink, prefix_of

from gato.rollouts import engine, policy
from gato.rollouts.agent import Agent
from gato.rollouts.batching import BUCKETS, Memory
from gato.rollouts.engine import Engine, Sampling
from gato.rollouts.model_thread import ModelThread
from gato.tokenizers.serializer import History


@pytest.fixture
def agent(device: str, monkeypatch: pytest.MonkeyPatch) -> Agent:
    """Return an agent of random weights on the device, whose memories have fixed shapes."""
    for module in (engine, policy):
        monkeypatch.setattr(module, "Memory", partial(Memory, static=True))
    return make_agent(device)


def make_agent(device: str) -> Agent:
    serializer = world.make_serializer(History())
    for task, history in HISTORIES.items():
        serializer.add_task(world.SPECS[task], history=history)
    model = world.make_model(serializer).to(device)
    return Agent(SimpleNamespace(path="nowhere", model=model, serializer=serializer))


def write(made: Engine, agent: Agent, requests: list[tuple[str, Sampling]]) -> list[Any]:
    """Return (text, log-probabilities) of each request, all of them at once."""
    tickets = [made.submit(prefix_of(agent, words), how) for words, how in requests]
    said = {ticket: ("", []) for ticket in tickets}
    while made.running or made.waiting:
        for ticket, delta in made.step():
            before, told = said[ticket]
            told += [t.logprob for t in delta.logprobs]
            said[ticket] = before + delta.text, told
    return [said[ticket] for ticket in tickets]


def test_neighbours_and_recordings_change_nothing(device: str, agent: Agent) -> None:
    made = Engine(agent.model, agent.serializer, rows=6, precision="float32")
    assert made.memory.graphs.capture == (device == "cuda")
    rng = np.random.default_rng(0)
    requests = [
        (
            " ".join(rng.choice(world.WORDS, int(rng.integers(1, 50)))),
            Sampling(int(rng.integers(5, 30)), 0.0, top_logprobs=0),
        )
        for _ in range(20)
    ]
    together = write(made, agent, requests)
    alone = [write(made, agent, [request])[0] for request in requests]
    for (text, told), (own, own_told) in zip(together, alone, strict=True):
        assert text == own
        np.testing.assert_allclose(told, own_told, atol=1e-4)
    if device == "cuda":
        assert {shape[1] for shape in made.memory.graphs.recorded} <= set(BUCKETS)
        slow = Engine(agent.model, agent.serializer, rows=6, precision="float32")
        slow.memory.graphs.capture = False
        assert [text for text, _ in write(slow, agent, requests)] == [t for t, _ in together]
        cpu = make_agent("cpu")
        twin = write(Engine(cpu.model, cpu.serializer, rows=6), cpu, requests)
        for (_, told), (_, wanted) in zip(together, twin, strict=True):
            assert abs(told[0] - wanted[0]) < 1e-2


@pytest.mark.parametrize("precision", [None, "float32"])
def test_a_thread_writes_acts_and_goes_on_after_who_left(
    device: str, agent: Agent, precision: str | None
) -> None:
    rng = np.random.default_rng(1)
    with ModelThread(agent, rows=3, sessions=4, precision=precision) as thread:
        ids = {task: thread.open_session(task) for task in TASKS}
        sinks = [Sink() for _ in range(8)]
        tickets = [thread.write(prefix_of(agent, "go"), Sampling(30), sink) for sink in sinks]
        thread.cancel(tickets[1])
        for _ in range(6):
            asked = [thread.act(id, world.observe(task, rng)) for task, id in ids.items()]
            for task, future in zip(ids, asked, strict=True):
                assert world.SPECS[task].action_space.contains(future.result(SOON))
        said = {sink.text for i, sink in enumerate(sinks) if i != 1}
        assert thread.alive
        if precision == "float32":
            assert len(said) == 1
        for id in ids.values():
            thread.reset_session(id)
            thread.close_session(id)
        assert thread.sessions == 0
