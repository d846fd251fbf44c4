"""Whether the server lives and says so, what it counts, and that it ends without delay."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from contextlib import suppress
from typing import Any

import pytest
from model_asked import SOON
from serve_world import make_agent
from serving import ask, connect, figure, head, serving, until

from gato.rollouts import serve, watch
from gato.rollouts.agent import Agent
from gato.rollouts.serve_guard import Guard
from gato.rollouts.serve_limits import CLEANUP, Settings
from gato.rollouts.serve_metrics import Meter


@pytest.fixture(scope="module")
def agent(text_model: bytes) -> Agent:
    return make_agent(text_model)


def test_health_tells_of_a_model_that_is_gone(agent, monkeypatch):
    made, whole = [], serve.app
    monkeypatch.setattr(serve, "app", lambda *args: made.append(whole(*args)) or made[0])
    with serving(agent) as address:
        assert ask(address, "/health", method="GET")[0] == 200
        made[0].service.model.close()
        status, _, told = ask(address, "/health", method="GET")
        assert (status, told["error"]["code"]) == (503, "model_dead")


def test_a_server_that_cannot_be_made_leaves_no_thread(agent, monkeypatch):
    def fails(*args: Any) -> None:
        raise OSError("no page")

    monkeypatch.setattr(serve.serve_page, "router", fails)
    with pytest.raises(OSError, match="no page"):
        serve.app(agent)
    assert not any(t.name == "gato-model" for t in threading.enumerate())


class Shown:
    """An episode that goes on as long as somebody watches."""

    def __init__(self, *args: Any) -> None:
        self.channel = args[-1]
        self.stopped = threading.Event()

    def start(self, done: Any) -> None:
        def run() -> None:
            assert self.stopped.wait(SOON)
            done()
            self.channel.end(("end", {"reason": "stopped"}))

        threading.Thread(target=run).start()

    def stop(self) -> None:
        self.stopped.set()


def test_who_watches_is_not_waited_for_at_the_end_and_not_timed(agent, monkeypatch):
    monkeypatch.setattr(watch, "Watching", Shown)
    monkeypatch.setattr(
        watch, "known", lambda agent, task: watch.Known(agent.serializer.tasks[task].task)
    )
    body = json.dumps({"task": agent.tasks[0]}).encode()
    route = 'route="/v1/watch"'
    with serving(agent, grace_seconds=20.0) as address:
        with connect(address) as connection:
            connection.sendall(head(address, "/v1/watch", len(body)) + body)
            assert connection.recv(99).startswith(b"HTTP/1.1 200")
        assert until(lambda: figure(address, f'gato_requests_total{{{route},status="200"}}') == 1)
        assert figure(address, f"gato_request_seconds_count{{{route}}}") == 0
        assert ask(address, "/v1/watch", {"task": 7})[0] == 404
        assert ask(address, "/v1/watch/x", {"paused": True})[0] == 404
        last = connect(address)
        last.sendall(head(address, "/v1/watch", len(body)) + body)
        assert last.recv(99).startswith(b"HTTP/1.1 200")
        began = time.monotonic()
    assert time.monotonic() - began < 10.0
    last.close()


def test_what_tidies_up_is_called_whatever_the_others_do(caplog):
    called = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        scope[CLEANUP] += [lambda: 1 / 0, lambda: called.append(1)]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def receive() -> Any:
        return await asyncio.get_running_loop().create_future()

    sent, page = asyncio.run(guarded(app, receive))
    assert sent[0]["status"] == 200
    assert called == [1]
    assert "division by zero" in caplog.text
    assert 'gato_requests_total{route="other",status="200"} 1.0' in page


async def guarded(app: Any, receive: Any) -> tuple[list[Any], str]:
    """Return what is sent of one request, and the figures afterwards."""
    meter, sent = Meter(), []
    scope = {"type": "http", "method": "GET", "path": "/", "query_string": b""}
    scope["headers"] = [(b"host", b"localhost")]

    async def send(message: Any) -> None:
        sent.append(message)

    await Guard(app, Settings(), meter)(scope, receive, send)
    return sent, meter.page()[0].decode()


@pytest.mark.parametrize("lost", [0, 1])
def test_work_that_loses_a_cancellation_ends_all_the_same(lost):
    ended = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        scope[CLEANUP].append(lambda: ended.append("tidied"))
        for _ in range(lost):
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(SOON)
        await asyncio.sleep(SOON)

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    began = time.monotonic()
    sent, page = asyncio.run(guarded(app, receive))
    assert not sent
    assert ended == ["tidied"]
    assert 'gato_requests_total{route="other",status="499"} 1.0' in page
    assert time.monotonic() - began < SOON / 3


def test_pages_of_others_are_counted_apart_from_hosts(agent):
    with serving(agent) as address:
        ask(address, "/v1/models", method="POST", Origin="http://evil.example")
        ask(address, "/health", method="GET", Host="evil.example")
        assert figure(address, 'gato_rejected_total{reason="origin"}') == 1
        assert figure(address, 'gato_rejected_total{reason="host"}') == 1


def test_parts_of_an_answer_do_not_wait_for_one_another() -> None:
    with serve._listen(Settings(port=0)) as listener:
        with socket.create_connection(listener.getsockname()):
            taken, _ = listener.accept()
            with taken:
                assert taken.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
