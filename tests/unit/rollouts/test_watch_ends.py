"""Watching that goes wrong or ends early: its place, its session and its process are free."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from model_asked import make_agent
from starlette.requests import Request

from gato.envs import workers
from gato.envs.workers import Pool, WorkerDiedError, one_thread_each
from gato.rollouts import watch, watching
from gato.rollouts.model_thread import ModelThread
from gato.rollouts.serve_limits import CLEANUP
from gato.rollouts.watching import Asked, Watching, WatchSettings

SOON = 30.0
TASK = "made/arm"


@pytest.fixture
def thread() -> Iterator[ModelThread]:
    agent = make_agent()
    with ModelThread(agent, rows=2, sessions=2) as made:
        made.agent = agent
        yield made


class Told:
    """A channel that keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []
        self.ended = threading.Event()

    def put(self, told: Any, seconds: float) -> bool:
        self.told.append(told)
        return True

    def end(self, told: Any) -> None:
        self.told.append(told)
        self.ended.set()

    def free(self) -> None:
        pass


def asleep(tick: Any) -> Any:
    """Stand for a simulator that takes minutes to start."""
    time.sleep(600)


def start(thread: ModelThread) -> tuple[Watching, Told, threading.Event]:
    told, done = Told(), threading.Event()
    session = thread.open_session(TASK)
    made = Watching(thread, thread.agent, session, Asked(TASK), WatchSettings(), told)
    made.start(done.set)
    return made, told, done


def test_a_simulator_that_only_starts_is_not_waited_for(thread, monkeypatch):
    monkeypatch.setattr(watching, "stage", asleep)
    made, told, done = start(thread)
    end = time.monotonic() + SOON
    while made._pool._workers[0] is None:
        assert time.monotonic() < end
        time.sleep(0.01)
    began = time.monotonic()
    made.stop()
    assert done.wait(SOON)
    assert told.ended.wait(SOON)
    assert time.monotonic() - began < SOON
    assert told.told == [("end", {"reason": "stopped"})]
    assert thread.sessions == 0


def test_one_that_is_stopped_before_its_process_is_there_ends_too(thread, monkeypatch):
    monkeypatch.setattr(watching, "stage", asleep)
    send, held, free = Pool.send, threading.Event(), threading.Event()

    def slow(*args: Any) -> None:
        held.set()
        assert free.wait(SOON)
        send(*args)

    monkeypatch.setattr(Pool, "send", slow)
    made, told, _ = start(thread)
    assert held.wait(SOON)
    made.stop()
    free.set()
    assert told.ended.wait(SOON)
    assert told.told == [("end", {"reason": "stopped"})]


def test_an_end_that_fails_frees_place_and_session_and_is_told(thread, monkeypatch, caplog):
    def close(pool: Pool) -> None:
        raise OSError("no such process")

    monkeypatch.setattr(Watching, "_episode", lambda *args: 1 / 0)
    monkeypatch.setattr(Pool, "close", close)
    _, told, done = start(thread)
    assert done.wait(SOON)
    assert told.ended.wait(SOON)
    assert told.told == [("end", {"reason": "ZeroDivisionError: division by zero"})]
    assert thread.sessions == 0
    assert "did not end as it should" in caplog.text


@pytest.mark.parametrize("broken", ["__init__", "start"])
def test_one_that_cannot_begin_holds_neither_place_nor_session(thread, monkeypatch, broken):
    def fails(*args: Any) -> None:
        raise RuntimeError("can't start new thread")

    async def work() -> None:
        scope: dict[str, Any] = {"type": "http", CLEANUP: []}
        for _ in range(3):
            with pytest.raises(RuntimeError, match="new thread"):
                await watchers.watch(Request(scope, receive))

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b'{"task": "made/arm"}', "more_body": False}

    monkeypatch.setattr(Watching, broken, fails)
    monkeypatch.setattr(
        watch, "known", lambda agent, task: watch.Known(agent.serializer.tasks[task].task)
    )
    watchers = watch.Watchers(thread, thread.agent, WatchSettings(watchers=1))
    asyncio.run(work())
    assert thread.sessions == 0
    assert not watchers._watched


def test_a_pool_is_killed_from_another_thread() -> None:
    pool = Pool(1, asleep)
    pool.send(0, None)
    timer = threading.Timer(0.5, pool.kill)
    timer.start()
    with pytest.raises((RuntimeError, WorkerDiedError)):
        pool.receive()
    timer.join()
    pool.close()
    pool.kill()


def test_the_environment_is_put_back_by_the_last_of_several_threads(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    first, second = one_thread_each(), one_thread_each()
    first.__enter__()
    second.__enter__()
    assert os.environ["OMP_NUM_THREADS"] == os.environ["MKL_NUM_THREADS"] == "1"
    first.__exit__(None, None, None)
    assert os.environ["OMP_NUM_THREADS"] == "1", "the second still starts its process"
    second.__exit__(None, None, None)
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert "MKL_NUM_THREADS" not in os.environ
    assert workers._one_thread_each._inside == 0
