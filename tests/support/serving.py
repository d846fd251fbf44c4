"""A server in a thread of the test's process, and plain sockets that talk to it."""

from __future__ import annotations

import json
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from gato.rollouts import serve
from gato.rollouts.agent import Agent
from gato.rollouts.serve_limits import Settings

CHAT = "/v1/chat/completions"
ASKED = {"model": "tiny", "messages": [{"role": "user", "content": "red"}], "max_tokens": 2}
LONG = {**ASKED, "max_tokens": 10_000}  # the likeliest of random weights goes round in circles
NARROW: dict[str, Any] = {
    "rows": 1,
    "waiting": 1,
    "requests": 6,
    "body_bytes": 40_000,
    "body_seconds": 0.5,
    "head_seconds": 0.5,
    "seconds": 2.0,
    "max_tokens": 1_000_000,
    "characters": 2000,
    "images": 2,
    "image_bytes": 20_000,
    "image_pixels": 64 * 64,
}
"""Settings of a server with small bounds."""


@contextmanager
def serving(agent: Agent, **settings: Any) -> Iterator[str]:
    """Yield the address of a server of `agent`, which ends with the context."""
    told: queue.Queue[Any] = queue.Queue()
    stop = threading.Event()

    def run() -> None:
        try:
            chosen = Settings(**{"port": 0, "name": "tiny", **settings})
            serve.run(agent, chosen, told.put, stop)
        except BaseException as error:
            told.put(error)

    thread = threading.Thread(target=run, name="server")
    thread.start()
    address = told.get(timeout=60)
    if isinstance(address, BaseException):
        raise address
    try:
        yield address
    finally:
        stop.set()
        thread.join(30)
        assert not thread.is_alive(), "the server does not end"


def connect(address: str, timeout: float = 20.0) -> socket.socket:
    """Return a connection to the server."""
    at = urlsplit(address)
    assert at.hostname is not None
    return socket.create_connection((at.hostname, at.port), timeout)


def head(
    address: str, path: str, length: int | None, method: str = "POST", **headers: str
) -> bytes:
    """Return the head of a request of JSON."""
    given = {"Host": urlsplit(address).netloc, "Content-Type": "application/json"}
    if length is not None:
        given["Content-Length"] = str(length)
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"{method} {path} HTTP/1.1", *(f"{k}: {v}" for k, v in given.items() if v)]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def ask(
    address: str, path: str, value: Any = None, method: str = "POST", **headers: str
) -> tuple[int, dict[str, str], Any]:
    """Return status, headers and body of one request; a body of JSON is parsed."""
    body = (
        value if isinstance(value, bytes) else b"" if value is None else json.dumps(value).encode()
    )
    with connect(address) as connection:
        given = head(address, path, len(body), method, **{"Connection": "close", **headers})
        connection.sendall(given + body)
        return received(connection)


def received(connection: socket.socket) -> tuple[int, dict[str, str], Any]:
    """Return status, headers and body of what the server sends until it closes."""
    raw = b""
    try:
        while part := connection.recv(1 << 16):
            raw += part
    except ConnectionResetError:
        pass
    if not raw:
        return 0, {}, None
    top, _, body = raw.partition(b"\r\n\r\n")
    first, *lines = top.decode("latin-1").split("\r\n")
    headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
    if headers.get("content-type", "").startswith("application/json") and body:
        return int(first.split()[1]), headers, json.loads(body)
    return int(first.split()[1]), headers, body


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
