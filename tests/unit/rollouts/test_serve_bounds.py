"""How much the server takes, how long it waits, and how it ends."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import uvicorn
from serve_world import make_agent
from serving import ASKED, CHAT, LONG, NARROW, ask, connect, figure, head, received, serving, until
from uvicorn.server import ServerState

from gato.rollouts import serve
from gato.rollouts.agent import Agent
from gato.rollouts.serve_limits import Settings


@pytest.fixture(scope="module")
def agent(text_model: bytes) -> Agent:
    return make_agent(text_model)


@pytest.fixture(scope="module")
def address(agent: Agent) -> Iterator[str]:
    with serving(agent, max_tokens=1_000_000) as address:  # what is long lasts on any machine
        yield address


@pytest.fixture(scope="module")
def narrow(agent: Agent) -> Iterator[str]:
    """Return the address of a server with small bounds."""
    with serving(agent, **NARROW) as address:
        yield address


def test_large_bodies_are_refused_however_they_come(narrow):
    body = json.dumps({**ASKED, "user": "x" * 60_000}).encode()
    status, _, told = ask(narrow, CHAT, body)
    assert (status, told["error"]["code"]) == (413, "body_too_large")
    with connect(narrow) as connection:  # only announced, never sent
        connection.sendall(head(narrow, CHAT, 10**15))
        assert received(connection)[0] == 413
    with connect(narrow) as connection:
        connection.sendall(head(narrow, CHAT, None, Transfer_Encoding="chunked"))
        for _ in range(60):
            connection.sendall(b"400\r\n" + b" " * 1024 + b"\r\n")
        connection.sendall(b"0\r\n\r\n")
        assert received(connection)[0] == 413


def test_long_text_is_refused(narrow):
    long = {**ASKED, "messages": [{"role": "user", "content": "x" * 3000}]}
    assert ask(narrow, CHAT, long)[2]["error"]["code"] == "string_above_max_length"


def test_many_messages_are_refused(address):
    empty = {"role": "user", "content": ""}
    parts = {"role": "user", "content": [{"type": "text", "text": ""}] * 1500}
    for messages in ([empty] * 3000, [parts, parts]):
        told = ask(address, CHAT, {**ASKED, "messages": messages})[2]
        assert "messages and parts" in told["error"]["message"]


def test_large_heads_are_refused(address):
    with connect(address) as connection:
        connection.sendall(head(address, "/health", None, "GET", X_Long="x" * 40_000))
        assert received(connection)[0] == 431
    with connect(address) as connection:  # in parts, so that it is never seen as a whole
        connection.sendall(b"GET /health HTTP/1.1\r\nX-Long: ")
        for _ in range(17):
            connection.sendall(b"x" * 1000)
            time.sleep(0.005)
        assert received(connection)[0] == 400
    many = {f"x-{i}": "1" for i in range(120)}
    with connect(address) as connection:
        connection.sendall(head(address, "/health", None, "GET", **many))
        assert received(connection)[0] == 431


def test_slow_bodies_and_slow_heads_end(narrow):
    with connect(narrow) as connection:
        connection.sendall(head(narrow, CHAT, 100) + b'{"model"')
        status, _, told = received(connection)
        assert (status, told["error"]["code"]) == (408, "body_too_slow")
    with connect(narrow) as connection:
        began = time.monotonic()
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: loc")
        assert received(connection)[0] == 408
        assert time.monotonic() - began < 5
    with connect(narrow) as connection:  # who has said nothing hears nothing
        assert received(connection)[0] == 0
    with connect(narrow) as connection:  # the second request of a connection
        connection.sendall(head(narrow, "/health", None, "GET"))
        seen = b""
        while not seen.endswith(b'"ok"}'):
            seen += connection.recv(9999)
        began = time.monotonic()
        connection.sendall(b"GET /health HTT")
        assert received(connection)[0] == 408
        assert time.monotonic() - began < 4  # less than it may stay open without a word
    assert ask(narrow, CHAT, ASKED)[0] == 200


def test_what_takes_too_long_is_ended_and_says_so(narrow):
    status, headers, told = ask(narrow, CHAT, LONG)
    assert (status, told["error"]["code"], headers["retry-after"]) == (503, "timeout", "5")
    status, _, events = ask(narrow, CHAT, {**LONG, "stream": True})
    assert status == 200
    assert b'"code": "timeout"' in events or b'"code":"timeout"' in events
    assert until(lambda: figure(narrow, "gato_running_rows") == 0)


def streaming(address: str) -> socket.socket:
    """Return a connection to a stream that goes on, its first bytes read."""
    connection = connect(address)
    body = json.dumps({**LONG, "stream": True}).encode()
    connection.sendall(head(address, CHAT, len(body)) + body)
    assert connection.recv(1000).startswith(b"HTTP/1.1 200")
    return connection


def test_too_many_at_once_are_told_to_come_again(narrow):
    first = streaming(narrow)  # has the only row
    second = connect(narrow)
    body = json.dumps(LONG).encode()
    second.sendall(head(narrow, CHAT, len(body)) + body)
    assert until(lambda: figure(narrow, "gato_waiting_rows") == 1)
    status, headers, told = ask(narrow, CHAT, ASKED)
    assert (status, headers["retry-after"]) == (429, "1")
    assert told["error"]["type"] == "rate_limit_error"
    with openai.OpenAI(base_url=f"{narrow}/v1", api_key="x", max_retries=0) as client:
        with pytest.raises(openai.RateLimitError):
            client.chat.completions.create(**ASKED)
    first.close()
    second.close()
    assert until(lambda: ask(narrow, CHAT, ASKED)[0] == 200)


def test_only_so_many_requests_are_under_way(narrow):
    slow = [connect(narrow) for _ in range(6)]
    for connection in slow:
        connection.sendall(head(narrow, CHAT, 100))
    assert until(lambda: ask(narrow, "/v1/models", method="GET")[0] == 429, 0.4)
    assert ask(narrow, "/health", method="GET")[0] == 200
    assert ask(narrow, "/", method="GET")[0] == 200
    for connection in slow:
        connection.close()
    assert until(lambda: ask(narrow, "/v1/models", method="GET")[0] == 200)


@pytest.mark.parametrize("announced", [{"Content_Length": "10"}, {"Transfer_Encoding": "chunked"}])
@pytest.mark.parametrize("method", ["GET", "POST", "HEAD"])
@pytest.mark.parametrize("path", ["/health", "/", "/page/app.js"])
def test_strangers_take_no_places(agent, announced, method, path):
    with serving(agent, token="secret-0123", requests=2, body_seconds=5.0) as address:
        right = {"Authorization": "Bearer secret-0123"}
        strangers = [connect(address) for _ in range(8)]
        for connection in strangers:  # a body is announced and does not come
            connection.sendall(head(address, path, None, method, **announced))
        assert ask(address, "/v1/models", method="GET", **right)[0] == 200
        for connection in strangers:
            connection.close()
        status, _, told = ask(address, path, b"{}", method)
        assert status == 400
        assert method == "HEAD" or told["error"]["code"] == "unexpected_body"


async def page(scope: Any, receive: Any, send: Any) -> None:
    """Answer with less than a connection usually holds back without a word."""
    headers = [(b"content-length", b"40000")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": bytes(40_000)})


@pytest.mark.parametrize(("pause", "cut"), [(10.0, True), (0.05, False)])
def test_a_client_that_does_not_read_is_cut_off(pause, cut):
    async def left_open() -> tuple[int, bool]:
        loop, state = asyncio.get_running_loop(), ServerState()
        config = uvicorn.Config(page, log_config=None, timeout_keep_alive=60)
        config.load()
        made = serve.patient(Settings(stall_seconds=0.5))
        with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as client:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            client.setblocking(False)
            server = await loop.create_server(lambda: made(config, state, {}), sock=listener)
            await loop.sock_connect(client, listener.getsockname())
            await loop.sock_sendall(client, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            end = loop.time() + 1.5
            got = 0
            while loop.time() < end:
                await asyncio.sleep(min(pause, end - loop.time()))
                got += len(await loop.sock_recv(client, 3000)) if pause < 1.0 else 0
            open_ = bool(state.connections)
            for connection in [*state.connections]:
                connection.transport.abort()
            server.close()
            await asyncio.sleep(0.05)
        return got, open_

    got, is_open = asyncio.run(left_open())
    assert is_open != cut
    assert cut or got > 5000


def test_there_are_fewer_connections_than_files(monkeypatch):
    resource = pytest.importorskip("resource")
    for files, most in ((1024, 512), (resource.RLIM_INFINITY, 1024), (1 << 20, 1024)):
        monkeypatch.setattr(resource, "getrlimit", lambda which, files=files: (files, files))
        assert serve._most_connections() == most


def test_requests_that_no_connection_is_left_for_are_told_of(monkeypatch, caplog):
    monkeypatch.setattr(serve, "_most_connections", lambda: 100)
    serve.patient(Settings())
    assert not caplog.text
    serve.patient(Settings(requests=300))
    assert "expected room for 300 requests at once; got 100 connections" in caplog.text


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_row(address, stream):
    if stream:
        connection = streaming(address)
    else:
        connection = connect(address)
        body = json.dumps(LONG).encode()
        connection.sendall(head(address, CHAT, len(body)) + body)
    assert until(lambda: figure(address, "gato_running_rows") == 1)
    connection.close()
    assert until(lambda: figure(address, "gato_running_rows") == 0, 3.0)
    name = f'gato_requests_total{{route="{CHAT}",status="{200 if stream else 499}"}}'
    assert figure(address, name) >= 1


# ---- the process -----------------------------------------------------------------------------

PROCESS = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from serve_world import make_agent
from gato.rollouts import serve
from gato.rollouts.serve_limits import Settings
agent = make_agent(Path(sys.argv[2]).read_bytes())
serve.run(agent, Settings(port=0, name="tiny", grace_seconds=3), lambda a: print(a, flush=True))
print("ended", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_after_the_running_answers(tmp_path, text_model, number):
    (tmp_path / "text.model").write_bytes(text_model)
    support = str(Path(__file__).parents[2] / "support")
    process = subprocess.Popen(
        [sys.executable, "-c", PROCESS, support, str(tmp_path / "text.model")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    try:
        address = process.stdout.readline().strip()
        connection = connect(address)
        body = json.dumps({**ASKED, "max_tokens": 200, "stream": True}).encode()
        connection.sendall(head(address, CHAT, len(body), Connection="close") + body)
        assert connection.recv(100, socket.MSG_PEEK).startswith(b"HTTP/1.1 200")
        os.kill(process.pid, number)
        _, _, events = received(connection)
        connection.close()
        assert b"[DONE]" in events
        assert events.count(b'"content"') > 50
        out, err = process.communicate(timeout=20)
        assert (out.strip(), process.returncode) == ("ended", 0), err
    finally:
        process.kill()
        process.communicate()


def test_a_taken_port_is_one_sentence(agent, address):
    with pytest.raises(OSError, match="in use"), serving(agent, port=int(address.rsplit(":")[-1])):
        pass
