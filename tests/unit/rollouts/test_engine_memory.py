"""How the engine reads: pictures as wholes, and into a memory of shapes that do not change.

On a GPU every memory is such a one; here the same buffers and buckets run without a recording.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import rollout_world as world
from model_asked import SOON, TASKS, Sink, drain, make_agent, prefix_of, same, text

from gato.rollouts import engine, policy
from gato.rollouts.batching import BUCKETS, CHUNK, Memory
from gato.rollouts.engine import Engine, Sampling
from gato.rollouts.model_thread import ModelThread
from gato.rollouts.policy import Policy
from gato.tokenizers.serializer import History
from gato.tokenizers.stream import concatenate


@pytest.fixture
def static(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every memory be one whose shapes do not change."""
    for module in (engine, policy):
        monkeypatch.setattr(module, "Memory", partial(Memory, static=True))


def crowd(made: Engine, agent: Any) -> list[str | None]:
    """Return what forty requests say that come and go; every seventh is cancelled: None."""
    rng = np.random.default_rng(0)
    said: dict[int, str] = {}
    gone: set[int] = set()
    tickets: list[int] = []
    while len(tickets) < 40 or made.running or made.waiting:
        while len(tickets) < 40 and rng.random() < 0.5:
            words = " ".join(rng.choice(world.WORDS, int(rng.integers(1, 60))))
            length = int(rng.integers(1, 30))
            sampling = Sampling(length, float(rng.choice([0.0, 1.0])), seed=len(tickets))
            tickets.append(made.submit(prefix_of(agent, words), sampling))
        for ticket, delta in made.step():
            said[ticket] = said.get(ticket, "") + delta.text
        for ticket in [t for t in tickets[3::7] if t in said and t not in gone]:
            gone.add(ticket)
            made.cancel(ticket)
    assert len(gone) >= 3
    return [None if i % 7 == 3 else said[t] for i, t in enumerate(tickets)]


def test_an_engine_of_fixed_shapes_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    agent = make_agent()
    wanted = crowd(Engine(agent.model, agent.serializer, rows=5), agent)
    monkeypatch.setattr(engine, "Memory", partial(Memory, static=True))
    made = Engine(agent.model, agent.serializer, rows=5)
    assert made.memory.static
    store, shapes = made.memory.cache.store, set()
    graphs = made.memory.graphs

    def watched(x: Any, valid: Any) -> Any:
        shapes.add(tuple(x.shape[:2]))
        return graphs(x, valid)

    made.memory.graphs = watched  # type: ignore[assignment]
    assert crowd(made, agent) == wanted
    assert made.memory.cache.store is store
    assert shapes <= {(5, length) for length in BUCKETS}, "few shapes, so that all are recorded"
    assert (made.memory.lengths == 0).all()
    made.clear()
    assert crowd(made, agent) == wanted


@pytest.mark.usefixtures("static")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_thread_of_fixed_shapes_writes_and_acts_as_each_alone(precision: str) -> None:
    agent, rng = make_agent(), np.random.default_rng(1)
    tasks = [*TASKS, TASKS[0]]
    seen = [[world.observe(task, rng) for task in tasks] for _ in range(4)]
    sampling = [Sampling(20, 1.0, seed=k) for k in range(6)]
    with ModelThread(agent, rows=3, sessions=len(tasks), precision=precision) as thread:
        ids = [thread.open_session(task, seed=i) for i, task in enumerate(tasks)]
        sinks = [Sink() for _ in sampling]
        for sink, how in zip(sinks, sampling, strict=True):
            thread.write(prefix_of(agent, "go to"), how, sink)
        acted = []
        for some in seen:
            futures = [thread.act(id, one) for id, one in zip(ids, some, strict=True)]
            acted.append([f.result(SOON) for f in futures])
        said = [sink.text for sink in sinks]
        assert {sink.last.finish for sink in sinks} <= {"stop", "length"}
    for how, got in zip(sampling, said, strict=True):
        made = Engine(agent.model, agent.serializer, rows=3, precision=precision)
        made.submit(prefix_of(agent, "go to"), how)
        assert text(drain(made)[0]) == got
    policies = [
        Policy(agent.model, agent.serializer, task, seeds=[i], precision=precision)
        for i, task in enumerate(tasks)
    ]
    assert all(p.memory.static for p in policies)
    for some, got in zip(seen, acted, strict=True):
        alone = [p.select_action(one) for p, one in zip(policies, some, strict=True)]
        if precision == "float32":
            assert same(got, alone)
        else:  # products of other shapes round otherwise: the space alone is sure
            for task, action in zip(tasks, got, strict=True):
                assert world.SPECS[task].action_space.contains(action)


def test_pictures_side_by_side_are_read_one_after_another() -> None:
    serializer = world.make_serializer(History())
    model = world.make_model(serializer, context=4096)
    rng = np.random.default_rng(0)
    sizes = [(64, 64), (80, 160), (16, 16), (112, 112), (160, 160), *[(64, 64)] * 20]
    images = [serializer.image(rng.integers(0, 256, (*s, 3), np.uint8)) for s in sizes]
    end = serializer.text("go")
    prefix = concatenate([serializer.control_piece("<bos>"), *images, end])
    made = Engine(model, serializer, rows=2)
    read: list[int] = []
    whole = made.memory.read

    def watched(chunk: Any, **options: Any) -> Any:
        read.append(int(chunk.lengths[0]))
        return whole(chunk, **options)

    made.memory.read = watched  # type: ignore[method-assign]
    made.submit(prefix, Sampling(9, 1.0))
    said = text(drain(made)[0])
    largest = max(map(len, images))
    assert max(read) < CHUNK + largest
    starts = np.cumsum([1, *map(len, images)])
    cuts = np.cumsum(read)
    inside = [c for c in cuts if c < starts[-1] and c not in starts]
    assert not inside, "no picture is cut in two"
    at_once = Engine(model, serializer, rows=1)
    at_once.submit(prefix, Sampling(9, 1.0))
    at_once._waiting[0].part = lambda most: at_once._running[0].left  # type: ignore[method-assign]
    assert text(drain(at_once)[0]) == said
