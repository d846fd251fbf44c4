"""Clients that go away before their answer: what they asked for is undone, or never done."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from model_asked import SOON, Gate
from serve_world import ARM, make_agent, picture, uri
from serving import CHAT, LONG, ask, connect, figure, head, serving, until

from gato.rollouts import serve, serve_embeddings
from gato.rollouts.agent import Agent
from gato.rollouts.policy import Policy
from gato.rollouts.serve_work import Service

ACTIONS, SESSIONS, EMBEDDINGS = "/v1/actions", "/v1/actions/sessions", "/v1/embeddings"
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
