"""Clients that go away before their answer: what they asked for is undone, or never done."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from model_asked import SOON, Gate
from serve_world import ARM, make_agent, picture, uri
from serving import CHAT, LONG, ask, connect, figure, head, serving, until

from gato.rollouts import serve, serve_embeddings
from gato.rollouts.agent import Agent
from gato.rollouts.engine import Delta, Sampling
from gato.rollouts.model_thread import Busy, ModelThread
from gato.rollouts.policy import Policy
from gato.rollouts.serve_limits import Settings
from gato.rollouts.serve_work import Service, Writing

ACTIONS, SESSIONS, EMBEDDINGS = "/v1/actions", "/v1/actions/sessions", "/v1/embeddings"
CAPTIONS = "/v1/captions"
SEEN = {"task": ARM.id, "observation": [0.0, 1.0, 2.0]}


@pytest.fixture(scope="module")
def agent(text_model: bytes) -> Agent:
    return make_agent(text_model, contrast=0.5)


@pytest.fixture
def start(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return what starts a server and yields its address and what works behind it."""
    whole = serve.app

    @contextmanager
    def started(**settings: Any) -> Iterator[tuple[str, Service]]:
        made = []
        monkeypatch.setattr(serve, "app", lambda *args: made.append(whole(*args)) or made[0])
        with serving(agent, **settings) as address:
            yield address, made[0].service

    return started


def leave(address: str, path: str, value: Any, there: Callable[[], bool]) -> None:
    """Send a request, and go once `there`."""
    body = json.dumps(value).encode()
    before = figure(address, gone(path))
    with connect(address) as connection:
        connection.sendall(head(address, path, len(body)) + body)
        assert until(there)
    assert until(lambda: figure(address, gone(path)) == before + 1)


def gone(path: str) -> str:
    return f'gato_requests_total{{route="{path}",status="499"}}'


def test_who_leaves_before_the_first_action_leaves_no_session(start):
    with start(sessions=2) as (address, service):
        with Gate(service.model):
            for _ in range(5):
                leave(address, ACTIONS, SEEN, lambda: figure(address, "gato_sessions") == 1)
                assert until(lambda: figure(address, "gato_sessions") == 0)
        status, _, told = ask(address, ACTIONS, SEEN)
        assert (status, told["step"]) == (200, 1)


def test_a_model_that_fails_leaves_no_session(start, monkeypatch):
    with start(sessions=1) as (address, _), monkeypatch.context() as patch:
        patch.setattr(Policy, "select_action", lambda *args: 1 / 0)
        for _ in range(3):
            status, _, told = ask(address, ACTIONS, SEEN)
            assert (status, told["error"]["code"]) == (500, "internal_error")
        assert ask(address, SESSIONS, method="GET")[2]["data"] == []
        patch.undo()
        assert ask(address, ACTIONS, SEEN)[0] == 200


def test_an_action_that_comes_too_late_is_a_step(start, monkeypatch):
    whole, reached, free = Policy.select_action, threading.Event(), threading.Event()

    def slow(*args: Any) -> Any:
        reached.set()
        assert free.wait(SOON)
        return whole(*args)

    with start(seconds=0.5) as (address, service), monkeypatch.context() as patch:
        id = ask(address, SESSIONS, {"task": ARM.id})[2]["id"]
        asked = {"session": id, "observation": SEEN["observation"]}
        with Gate(service.model):  # it has not begun when its time is over: it is never seen
            assert ask(address, ACTIONS, asked)[0] == 503
        patch.setattr(Policy, "select_action", slow)
        assert ask(address, ACTIONS, asked)[0] == 503
        assert reached.is_set()
        status, _, told = ask(address, ACTIONS, asked)
        assert (status, told["error"]["code"]) == (409, "session_busy")
        free.set()
        patch.undo()
        told = {}
        assert until(lambda: told.update(ask(address, ACTIONS, asked)[2]) or "step" in told)
        assert told["step"] == 2
        assert ask(address, SESSIONS, method="GET")[2]["data"][0]["steps"] == 2


def test_abandoned_embeddings_are_never_computed(start, monkeypatch):
    done = []
    whole = serve_embeddings.embed

    def counted(*args: Any) -> Any:
        done.append(threading.current_thread().name)
        return whole(*args)

    monkeypatch.setattr(serve_embeddings, "embed", counted)
    asked = {"model": "tiny", "input": ["red"]}
    with start() as (address, service):
        model = service.model
        with Gate(model):
            for number in range(1, 4):
                leave(address, EMBEDDINGS, asked, lambda n=number: len(model._calls) == n)
        assert ask(address, EMBEDDINGS, asked)[0] == 200
        assert done == ["gato-model"], "of who has stayed alone"


def test_many_embeddings_are_read_in_parts_between_others(start, agent, monkeypatch):
    sizes: list[int] = []
    whole = serve_embeddings.embed

    def counted(agent: Agent, part: list[Any], side: str) -> Any:
        sizes.append(sum(map(len, part)))
        return whole(agent, part, side)

    monkeypatch.setattr(serve_embeddings, "embed", counted)
    rng = np.random.default_rng(0)
    words = ["go", "open", "the door", "a red ball"]
    texts = [" ".join(rng.choice(words, int(n))) for n in rng.integers(1, 12, 250)]
    image = {"type": "image_url", "image_url": {"url": uri(picture(1))}}
    with start() as (address, _):
        given = [*texts[:100], image, *texts[100:]]
        status, _, told = ask(address, EMBEDDINGS, {"model": "tiny", "input": given})
        assert status == 200
        assert max(sizes) <= serve_embeddings.PART_TOKENS
        assert len(sizes) >= 3
        rows = np.array([row["embedding"] for row in told["data"]])
        np.testing.assert_allclose(np.delete(rows, 100, 0), agent.embed_texts(texts), atol=1e-5)
        np.testing.assert_allclose(rows[100:101], agent.embed_images([picture(1)]), atol=1e-5)
        long = {"model": "tiny", "input": "red ball " * 500}
        count = len(sizes)
        status, _, told = ask(address, EMBEDDINGS, long)
        assert (status, "remembers 128 tokens" in told["error"]["message"]) == (400, True)
        assert len(sizes) == count, "what cannot be read does not reach the model"


def test_tokens_are_counted_of_who_left_too(start):
    with start(max_tokens=1_000_000) as (address, service):
        running = lambda: service.model.running == 1  # noqa: E731
        leave(address, CHAT, LONG, lambda: running() and service.model._engine.memory.lengths.any())
        assert until(lambda: figure(address, 'gato_tokens_total{direction="in"}') > 0)


def test_many_who_leave_at_any_moment_leave_nothing(start):
    rng = random.Random(1)
    shown = {"image": uri(picture(1)), "max_tokens": 1_000_000}
    with start(rows=8, waiting=16, max_tokens=1_000_000) as (address, service):
        for seed in range(50):
            long = {**LONG, "max_tokens": 1_000_000, "n": rng.choice([1, 4, 4]), "seed": seed}
            asked = {
                CHAT: {**long, "stream": rng.random() < 0.2},
                CAPTIONS: shown,
                EMBEDDINGS: {"model": "tiny", "input": ["red"] * 20},
            }
            path = rng.choice([CHAT, CHAT, CHAT, CAPTIONS, EMBEDDINGS])
            body = json.dumps(asked[path]).encode()
            with connect(address) as connection:
                connection.sendall(head(address, path, len(body)) + body)
                time.sleep(rng.uniform(0.0, 0.025))
        model = service.model
        assert until(lambda: (model.running, model.waiting, len(model._calls)) == (0, 0, 0), 2.0)
        assert ask(address, CHAT, {**LONG, "max_tokens": 2})[0] == 200


@pytest.mark.parametrize("come", [1, 100])
def test_a_cancellation_is_never_lost_to_a_delta(come):
    """Whatever comes first of the two, and however many deltas have come already."""
    nobody = SimpleNamespace(write=lambda *asked: None, cancel=lambda ticket: None)
    meter = SimpleNamespace(tokens=lambda *counts: None)
    service: Any = SimpleNamespace(settings=Settings(), model=nobody, meter=meter)

    async def leave_after(turns: int) -> bool:
        writing = Writing(service, [], [Sampling(9)])
        tell = writing._sink(0)

        async def listen() -> None:
            async for _ in writing.deltas():
                pass

        listening = asyncio.ensure_future(listen())
        for _ in range(5):
            await asyncio.sleep(0)
        for _ in range(come):
            tell(Delta("a", 1))
        for _ in range(turns):
            await asyncio.sleep(0)
        listening.cancel()
        await asyncio.wait({listening}, timeout=0.1)
        ended = listening.cancelled()
        tell(Delta("", 0, (), "stop"))
        with suppress(asyncio.CancelledError):
            await listening
        return ended and writing.written <= turns

    assert [asyncio.run(leave_after(turns)) for turns in range(8)] == [True] * 8


def test_a_body_that_nobody_waits_for_is_not_kept(agent):
    class Body:
        """One that can be seen to be gone."""

        __len__ = lambda self: 2  # noqa: E731

    free, service = threading.Event(), Service(agent, Settings())

    async def left() -> list[Any]:
        held = [asyncio.ensure_future(service.read(free.wait, SOON)) for _ in range(2)]
        body = Body()
        known = weakref.ref(body)
        reading = asyncio.ensure_future(service.read(len, body))
        del body
        await asyncio.sleep(0)
        reading.cancel()
        await asyncio.wait({reading})
        del reading
        gc.collect()
        alive = known()
        free.set()
        await asyncio.wait(held)
        return [alive, await service.read(len, b"{}")]

    try:
        assert asyncio.run(left()) == [None, 2]
    finally:
        free.set()
        service.close()


def test_calls_of_who_has_gone_take_no_places(agent):
    with ModelThread(agent, waiting=2) as thread, Gate(thread) as held:
        for _ in range(5):
            assert thread.call(int).cancel()
        kept = [thread.call(int), thread.call(int)]
        with pytest.raises(Busy, match="2 calls wait"):
            thread.call(int)
        held.__exit__()
        assert [future.result(SOON) for future in kept] == [0, 0]
