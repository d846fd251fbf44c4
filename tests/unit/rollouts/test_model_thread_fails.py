"""A model that breaks: who was in its hands is told, and what comes next finds it in order."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import rollout_world as world
from model_asked import SOON, Gate, Sink, alone, make_agent, prefix_of

from gato.rollouts import sessions
from gato.rollouts.agent import Agent
from gato.rollouts.engine import Sampling
from gato.rollouts.model_thread import ModelThread, NoSession


@pytest.fixture(scope="module")
def agent() -> Agent:
    return make_agent()


@pytest.fixture
def thread(agent: Agent) -> Iterator[ModelThread]:
    with ModelThread(agent, rows=4, waiting=6, sessions=5) as made:
        yield made


def observation(task: str = "made/arm") -> Any:
    return world.observe(task, np.random.default_rng(0))


def once(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, error: Exception) -> None:
    """Let a method fail at its first call from now."""
    whole, broken = getattr(owner, name), iter([error])

    def method(*args: Any, **options: Any) -> Any:
        for wrong in broken:
            raise wrong
        return whole(*args, **options)

    monkeypatch.setattr(owner, name, method)


def begun(thread: ModelThread, agent: Agent) -> tuple[Any, Sink]:
    """Return a text without end that is being written."""
    first, sink = threading.Event(), Sink()
    ticket = thread.write(
        prefix_of(agent, "go"), Sampling(10**9), lambda delta: (sink(delta), first.set())
    )
    assert first.wait(SOON)
    return ticket, sink


def test_a_cancel_that_fails_ends_what_runs_and_not_the_thread(
    agent: Agent, thread: ModelThread, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    (ticket, gone), (_, other) = begun(thread, agent), begun(thread, agent)
    with Gate(thread):
        once(monkeypatch, thread._engine.memory, "move", MemoryError("no more of it"))
        thread.cancel(ticket)
        call, waits = thread.call(int), Sink()
        thread.write(prefix_of(agent, "open"), Sampling(5), waits)
    for sink in (other, waits):
        assert isinstance(sink.last.error, MemoryError)
    with pytest.raises(MemoryError):
        call.result(SOON)
    assert not any(delta.finish for delta in gone.deltas)
    assert thread.alive
    assert "no more of it" in caplog.text, "the log says where it failed"
    assert caplog.records[0].exc_info
    again = Sink()
    thread.write(prefix_of(agent, "open"), Sampling(5), again)
    assert again.text == alone(agent, "open", max_tokens=5)


def test_a_cancel_does_not_hold_up_who_asks(
    agent: Agent, thread: ModelThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticket, _ = begun(thread, agent)
    reached, free = threading.Event(), threading.Event()
    cancel = thread._engine.cancel

    def slow(number: int) -> None:
        reached.set()
        assert free.wait(SOON)
        cancel(number)

    monkeypatch.setattr(thread._engine, "cancel", slow)
    thread.cancel(ticket)
    assert reached.wait(SOON)
    assert thread._changed.acquire(timeout=SOON / 10), "others may ask while the device works"
    thread._changed.release()
    free.set()


def test_a_thread_that_cannot_go_on_tells_all_and_is_not_alive(
    agent: Agent, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    with ModelThread(agent, rows=1, waiting=3) as thread:
        assert thread.alive
        _, runs = begun(thread, agent)
        with Gate(thread):
            for name in ("step", "clear"):
                once(monkeypatch, thread._engine, name, RuntimeError("device lost"))
            waits, id = Sink(), thread.open_session("made/arm")
            thread.write(prefix_of(agent, "go"), Sampling(5), waits)
            calls = [thread.call(int) for _ in range(2)]
        assert runs.last.finish == "error"
        assert waits.last.finish == "error"
        for call in calls:
            with pytest.raises(RuntimeError, match="device lost"):
                call.result(SOON)
        thread._thread.join(SOON)
        assert not thread.alive
        for ask in (lambda: thread.call(int), lambda: thread.act(id, observation())):
            with pytest.raises(RuntimeError, match="has ended: RuntimeError: device lost"):
                ask()
    assert "nothing more can be asked" in caplog.text


def test_no_memory_for_sessions_is_told_to_them_alone(
    agent: Agent, thread: ModelThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [thread.open_session("made/arm") for _ in range(2)]
    once(monkeypatch, sessions, "Policy", MemoryError("32 rows do not fit"))
    text = Sink()
    with Gate(thread):
        thread.write(prefix_of(agent, "go"), Sampling(9), text)
        futures = [thread.act(id, observation()) for id in ids]
    for future in futures:
        with pytest.raises(MemoryError, match="32 rows"):
            future.result(SOON)
    assert text.text == alone(agent, "go", max_tokens=9)
    with pytest.raises(NoSession, match="was lost: MemoryError"):
        thread.act(ids[0], observation())
    assert thread.sessions == 0
    id = thread.open_session("made/arm")
    assert thread.act(id, observation()).result(SOON) is not None


def test_what_breaks_between_sessions_loses_none_of_who_waits(
    agent: Agent, thread: ModelThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    id = thread.open_session("made/arm")
    _, runs = begun(thread, agent)
    with Gate(thread):
        whole = thread._sessions.decide

        def broken(asked: list[Any]) -> None:
            if asked:
                raise AssertionError("a fault of ours")
            whole(asked)

        monkeypatch.setattr(thread._sessions, "decide", broken)
        future = thread.act(id, observation())
    with pytest.raises(AssertionError):
        future.result(SOON)
    assert isinstance(runs.last.error, AssertionError)
    assert thread.sessions == 0, "its slot is free"
    again = Sink()
    thread.write(prefix_of(agent, "go"), Sampling(9), again)
    assert again.text == alone(agent, "go", max_tokens=9), "nothing of the old goes on"
