"""What the server keeps out: strangers, addresses, bombs, the slow and the endless."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest
import uvicorn
from PIL import Image
from serve_world import make_agent, picture, uri
from serving import ask, connect, head, received, serving
from uvicorn.server import ServerState

from gato import cli
from gato.rollouts import serve
from gato.rollouts.agent import Agent
from gato.rollouts.serve_limits import Settings

CHAT = "/v1/chat/completions"
ASKED = {"model": "tiny", "messages": [{"role": "user", "content": "red"}], "max_tokens": 2}
LONG = {**ASKED, "max_tokens": 10_000}  # the likeliest of random weights goes round in circles


@pytest.fixture(scope="module")
def agent(text_model: bytes) -> Agent:
    return make_agent(text_model)


@pytest.fixture(scope="module")
def address(agent: Agent) -> Iterator[str]:
    with serving(agent) as address:
        yield address


@pytest.fixture(scope="module")
def narrow(agent: Agent) -> Iterator[str]:
    """Return the address of a server with small bounds."""
    with serving(
        agent,
        rows=1,
        waiting=1,
        requests=6,
        body_bytes=40_000,
        body_seconds=0.5,
        head_seconds=0.5,
        seconds=2.0,
        max_tokens=1_000_000,
        characters=2000,
        images=2,
        image_bytes=20_000,
        image_pixels=64 * 64,
    ) as address:
        yield address


def figure(address: str, name: str) -> float:
    """Return one of the server's figures."""
    page = ask(address, "/metrics", method="GET")[2].decode()
    lines = dict(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
    return float(lines.get(name, 0))


def until(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Return whether something comes true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


# ---- who may ask -----------------------------------------------------------------------------


def test_a_public_address_needs_a_token(tmp_path, capsys):
    for host in ("0.0.0.0", "::", "", "192.168.0.7", "example.org"):
        with pytest.raises(ValueError, match="expected a token"):
            Settings(host=host)
        assert cli.main(["serve", str(tmp_path), "--host", host]) == cli.BAD_INPUT
        assert "--token-file" in capsys.readouterr().err
    assert Settings(host="0.0.0.0", token="a secret").token == "a secret"
    assert cli.main(["serve", str(tmp_path), "--token", ""]) == cli.BAD_INPUT
    assert Settings().host == "127.0.0.1"


@pytest.fixture(scope="module")
def guarded(agent: Agent) -> Iterator[str]:
    with serving(agent, token="secret-0123", host="0.0.0.0") as address:
        yield address.replace("0.0.0.0", "127.0.0.1")


def test_a_token_is_asked_for_everywhere_but_on_the_page_and_of_health(guarded):
    paths = ["/v1/models", "/metrics", "/v1/tasks", "/v1/actions/sessions", "/v1/nothing"]
    for path in paths:
        status, headers, told = ask(guarded, path, method="GET")
        assert (status, told["error"]["code"]) == (401, "invalid_api_key")
        assert headers["www-authenticate"] == "Bearer"
    assert ask(guarded, CHAT, ASKED)[0] == 401
    assert ask(guarded, "/health", method="GET")[0] == 200
    for wrong in ("secret-0123", "Bearer secret-0124", "Bearer", "Bearer secret-01234", "Bearer é"):
        assert ask(guarded, "/v1/models", method="GET", Authorization=wrong)[0] == 401
    right = ask(guarded, "/v1/models", method="GET", Authorization="Bearer secret-0123")
    assert right[0] == 200


def test_the_client_maps_a_wrong_token(guarded):
    with openai.OpenAI(base_url=f"{guarded}/v1", api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError):
            client.models.list()
    with openai.OpenAI(base_url=f"{guarded}/v1", api_key="secret-0123") as client:
        assert client.models.list().data


def test_a_name_that_points_here_is_no_name_of_ours(address):
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost.", ""):
        status, _, told = ask(address, "/health", method="GET", Host=host or "x y")
        assert (status, told["error"]["code"]) == (403, "bad_host")
    port = address.rpartition(":")[2]
    for host in ("localhost", f"localhost:{port}", f"127.0.0.1:{port}", "[::1]:80", "LocalHost"):
        assert ask(address, "/health", method="GET", Host=host)[0] == 200


def test_other_names_can_be_given(agent):
    with serving(agent, hosts=("box.lan",)) as address:
        for host, status in (("box.lan:9", 200), ("localhost", 200), ("evil.example", 403)):
            assert ask(address, "/health", method="GET", Host=host)[0] == status


def test_pages_of_other_sites_cannot_ask(address, agent):
    evil = {"Origin": "https://evil.example"}
    assert ask(address, CHAT, ASKED, **evil)[2]["error"]["code"] == "bad_origin"
    assert ask(address, CHAT, ASKED, Content_Type="text/plain")[0] == 415
    assert ask(address, CHAT, ASKED, Content_Encoding="gzip")[0] == 415
    preflight = {**evil, "Access-Control-Request-Method": "POST"}
    status, headers, _ = ask(address, CHAT, method="OPTIONS", **preflight)
    assert status in (403, 405)
    assert "access-control-allow-origin" not in headers
    assert ask(address, CHAT, ASKED, Origin=address)[0] == 200
    with serving(agent, origins=("https://good.example",)) as other:
        good = {"Origin": "https://good.example"}
        status, headers, _ = ask(other, CHAT, ASKED, **good)
        assert (status, headers["access-control-allow-origin"]) == (200, "https://good.example")
        preflight = {**good, "Access-Control-Request-Method": "POST"}
        assert ask(other, CHAT, method="OPTIONS", **preflight)[0] == 200
        assert ask(other, CHAT, ASKED, **evil)[0] == 403


def test_every_answer_carries_the_headers_of_security(address):
    for method, path in (("GET", "/health"), ("GET", "/nothing"), ("PUT", CHAT)):
        _, headers, _ = ask(address, path, method=method)
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert "default-src 'self'" in headers["content-security-policy"]
        assert "server" not in headers


# ---- pictures --------------------------------------------------------------------------------


def shown(url: object) -> dict:
    part = {"type": "image_url", "image_url": {"url": url}}
    return {**ASKED, "messages": [{"role": "user", "content": [part]}]}


class Opened:
    """Files, connections and programs that the process opens while it is watched."""

    on = False
    seen: list[tuple[str, str]] = []  # noqa: RUF012
    hooked = False

    @classmethod
    def hook(cls, event: str, args: tuple) -> None:
        watched = ("open", "socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.exec")
        if (
            cls.on
            and event in watched
            and threading.current_thread() is not threading.main_thread()
        ):
            cls.seen.append((event, repr(args)[:200]))


@pytest.fixture
def opened(address: str) -> Iterator[list[tuple[str, str]]]:
    """Return what the server's threads open during a test."""
    if not Opened.hooked:
        sys.addaudithook(Opened.hook)  # which can never be taken away
        Opened.hooked = True
    ask(address, CHAT, shown(uri(picture(0))))  # what is imported late is imported now
    Opened.seen.clear()
    Opened.on = True
    yield Opened.seen
    Opened.on = False


ADDRESSES = [
    *("file:///etc/passwd", "/etc/passwd", "../../etc/passwd", "http://127.0.0.1:9/x.png"),
    *("https://example.org/x.png", "ftp://example.org/x", "\\\\host\\share", "s3://bucket/x"),
    *(
        "data:text/html;base64,PGI+",
        "data:image/png,rawbytes",
        "data:image/svg+xml;base64,PHN2Zz4=",
    ),
    *("data:image/png;base64,file:///etc/passwd", "DATA:image/png;base64,", "data:,", "", "x" * 99),
    *(None, 7, ["data:image/png;base64,AAAA"], {"url": "x"}, "data:image/png;base64,\u00e9"),
]


@pytest.mark.parametrize("url", ADDRESSES, ids=[f"{i}" for i in range(len(ADDRESSES))])
def test_no_path_and_no_address_is_ever_opened(address, opened, url):
    status, _, told = ask(address, CHAT, shown(url))
    assert status == 400
    assert told["error"]["message"]
    assert not opened


def test_the_hook_sees_what_is_opened(address, opened):
    threading.Thread(target=lambda: Path("/etc/passwd").read_bytes()).start()
    assert until(lambda: any("passwd" in args for _, args in opened))


def bomb(width: int, height: int) -> str:
    """Return a tiny PNG that says it is huge."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        sums = zlib.crc32(kind + data).to_bytes(4, "big")
        return len(data).to_bytes(4, "big") + kind + data + sums

    size = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    pixels = zlib.compress(bytes(10_000))
    raw = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size + b"\x08\x02\x00\x00\x00")
    raw += chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(raw).decode()


@pytest.mark.parametrize(("width", "height"), [(60_000, 60_000), (30_000, 1000), (2**31 - 1, 1)])
def test_bombs_are_refused_by_their_headers(address, width, height):
    began = time.monotonic()
    status, _, told = ask(address, CHAT, shown(bomb(width, height)))
    assert (status, told["error"]["code"]) == (400, "invalid_image")
    assert time.monotonic() - began < 2.0


def test_pictures_have_bounds_together(narrow):
    small, large = uri(picture(0, 32, 32)), uri(picture(0, 128, 32))
    assert ask(narrow, CHAT, shown(small))[0] == 200
    assert (
        "pixels" in ask(narrow, CHAT, shown(uri(picture(0, 65, 64), "jpeg")))[2]["error"]["message"]
    )

    def many(*urls: str) -> dict:
        parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        return {**ASKED, "messages": [{"role": "user", "content": [p]} for p in parts]}

    assert ask(narrow, CHAT, many(small, small))[0] == 200
    assert "images" in ask(narrow, CHAT, many(small, small, small))[2]["error"]["message"]
    grey = Image.new("L", (64, 64))
    file = io.BytesIO()
    grey.save(file, "png")
    whole = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    assert "more pixels" in ask(narrow, CHAT, many(whole, small))[2]["error"]["message"]
    assert "bytes" in ask(narrow, CHAT, shown(large + "A" * 20_000))[2]["error"]["message"]


# ---- how much --------------------------------------------------------------------------------


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
    assert until(lambda: ask(narrow, "/health", method="GET")[0] == 429, 0.4)
    for connection in slow:
        connection.close()
    assert until(lambda: ask(narrow, "/health", method="GET")[0] == 200)


class Wire(asyncio.Transport):
    """A connection that only remembers whether it was cut."""

    cut = False

    def abort(self) -> None:
        self.cut = True

    def get_extra_info(self, name: str, default: object = None) -> object:
        return ("127.0.0.1", 1) if name in ("peername", "sockname") else default


@pytest.mark.parametrize("reads_on", [True, False])
def test_a_client_that_does_not_read_is_cut_off(reads_on):
    async def stall() -> bool:
        config = uvicorn.Config(lambda scope: None, log_config=None)
        settings = Settings(stall_seconds=0.1)
        connection, wire = serve.patient(settings)(config, ServerState(), {}), Wire()
        connection.connection_made(wire)
        connection.pause_writing()  # as much is sent as fits on the way
        await asyncio.sleep(0.02)
        if reads_on:
            connection.resume_writing()
        await asyncio.sleep(0.2)
        return wire.cut

    assert asyncio.run(stall()) == (not reads_on)


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
