"""What the server lets in: who may ask, how much, for how long, and how many at once.

`Guard` stands before everything else. It judges a request by its head, reads its body within
bounds of bytes and seconds, and ends its work when the client is gone or its time is over.

```text
head: Host, token, Origin, type, length -> body: bytes, seconds -> the application -> answer
         400 401 403 413 415 429 431          408 413 429                             503
```
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Protocol

from gato.rollouts.serve_limits import (
    CLEANUP,
    MAX_HEAD_BYTES,
    Refused,
    Settings,
    busy,
    failure,
    is_loopback,
    out_of_time,
)

log = logging.getLogger("gato.serve")

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = ("/health", "/", "/favicon.ico")
OPEN_BELOW = "/page/"
"""Paths without a token: whether the server lives, and the web page, which asks for the token."""
LASTING = "/v1/watch"
"""The path where an answer may last as long as its client listens."""
MAX_HEADERS = 100
GONE = 499
"""Status under which requests are counted whose client went away."""

POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
SECURITY = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"content-security-policy", POLICY.encode()),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)
"""Headers of every answer that does not set its own."""


class Gone(Exception):
    """The client went away before its request was complete."""


class Counts(Protocol):
    """What `Guard` tells of every request."""

    def request(self, route: str, status: int, seconds: float | None) -> None:
        """Count an answered request, and how long it took if that is known."""

    def refused(self, reason: str) -> None:
        """Count a request that was refused before its body was understood."""


class _Answer:
    """What is sent, and how far it is."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status = 0
        self.complete = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [*message.get("headers", ())]
            known = {name.lower() for name, _ in headers}
            headers += [(name, value) for name, value in SECURITY if name not in known]
            headers.append((b"x-request-id", secrets.token_hex(8).encode()))
            message = {**message, "headers": headers}
        elif not message.get("more_body"):
            self.complete = True
        await self._send(message)

    async def refuse(self, refused: Refused, *, close: bool) -> None:
        """Send a refusal, unless an answer has begun."""
        if self.status:
            return
        body = json.dumps(refused.to_json()).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        headers |= refused.headers | ({"Connection": "close"} if close else {})
        pairs = [(k.lower().encode(), v.encode()) for k, v in headers.items()]
        await self.send({"type": "http.response.start", "status": refused.status, "headers": pairs})
        await self.send({"type": "http.response.body", "body": body})


class Guard:
    """An ASGI application before another; see the module."""

    def __init__(self, app: App, settings: Settings, counts: Counts) -> None:
        self.app, self.settings, self.counts = app, settings, counts
        self.running = 0
        """Requests under way."""
        self.held = 0
        """Bytes of their bodies."""
        loopback = ("localhost", "127.0.0.1", "[::1]", settings.host)
        own = loopback if is_loopback(settings.host) else ()
        self._hosts = (*own, *(name.lower() for name in settings.hosts))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, answer = time.perf_counter(), _Answer(send)
        scope[CLEANUP] = []
        try:
            await self._handle(scope, receive, answer)
        except Gone:
            answer.status = answer.status or GONE
        except Refused as refused:
            await answer.refuse(refused, close=True)
        except Exception:
            log.exception("%s %r failed", scope["method"], scope["path"])
            await answer.refuse(failure(), close=True)
        finally:
            for clean in scope[CLEANUP]:
                try:
                    clean()
                except Exception:  # the others are called all the same, and the request counted
                    log.exception("tidying up after %s %r failed", scope["method"], scope["path"])
            route = getattr(scope.get("route"), "path", "other")
            # how long somebody listened says nothing of how long requests take
            seconds = None if scope["path"] == LASTING else time.perf_counter() - began
            self.counts.request(route, answer.status or GONE, seconds)

    async def _handle(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        try:
            if self._check(scope):
                await self._run(scope, b"", receive, answer)
                return
            if self.running >= self.settings.requests:
                raise busy(f"{self.running} requests are under way")
        except Refused as refused:
            self.counts.refused(_reason(refused))
            await self._drain(scope, receive)
            raise
        self.running += 1
        parts: list[bytes] = []
        try:
            try:
                await self._read(receive, parts)
            except Refused as refused:
                self.counts.refused(_reason(refused))
                if refused.status != 408:
                    await self._drain(scope, receive)
                raise
            parts[:] = [b"".join(parts)]  # counted as long as it is held, and not held twice
            await self._run(scope, parts[0], receive, answer)
        finally:
            self.running -= 1
            self.held -= sum(map(len, parts))

    # ---- the head ----------------------------------------------------------------------------

    def _check(self, scope: Scope) -> bool:
        """Raise `Refused` for a head that says enough.

        Returns:
            Whether the request is one that anybody may make: it has no body and takes no place.
        """
        pairs = scope["headers"]
        if len(pairs) > MAX_HEADERS:
            raise Refused(431, f"expected at most {MAX_HEADERS} headers; got {len(pairs)}")
        size = sum(len(name) + len(value) for name, value in pairs)
        if size + len(scope["path"]) + len(scope["query_string"]) > MAX_HEAD_BYTES:
            raise Refused(431, f"expected headers of at most {MAX_HEAD_BYTES} bytes; got {size}")
        headers: dict[bytes, bytes] = dict(pairs)
        self._check_host([value for name, value in pairs if name == b"host"])
        method, path = scope["method"], scope["path"]
        is_open = path in OPEN or path.startswith(OPEN_BELOW)
        if not is_open:
            self._check_token([value for name, value in pairs if name == b"authorization"])
        if method not in ("GET", "HEAD"):
            self._check_origin(headers)
        if is_open or method in ("GET", "HEAD", "OPTIONS"):
            self._check_empty(headers)
        else:
            self._check_kind(headers)
        return is_open

    def _check_host(self, given: list[bytes]) -> None:
        # A page of another site may have its name point here (DNS rebinding): it says that name.
        name = given[0].decode("latin-1").lower() if len(given) == 1 else ""
        bare = name if name.endswith("]") else name.rpartition(":")[0] or name
        if len(given) != 1 or (self._hosts and bare not in self._hosts):
            hosts = ", ".join(dict.fromkeys(self._hosts)) or "one name"
            raise Refused(403, f"expected a Host of {hosts}; got {name[:100]!r}", code="bad_host")

    def _check_token(self, given: list[bytes]) -> None:
        if self.settings.token is None:
            return
        scheme, _, token = (given[0] if len(given) == 1 else b"").partition(b" ")
        right = hmac.compare_digest(token.strip(), self.settings.token.encode())
        if not (right and scheme.lower() == b"bearer"):
            told = "another token" if given else "no token"
            message = f"expected the server's token as 'Authorization: Bearer TOKEN'; got {told}"
            raise Refused(401, message, code="invalid_api_key")

    def _check_origin(self, headers: dict[bytes, bytes]) -> None:
        origin = headers.get(b"origin", b"").decode("latin-1")
        host = headers.get(b"host", b"").decode("latin-1")
        own = ("", f"http://{host}", f"https://{host}", *self.settings.origins)
        if origin not in own:
            message = f"expected a request of this server's page; got one of {origin[:100]!r}"
            raise Refused(403, message, code="bad_origin")

    def _check_empty(self, headers: dict[bytes, bytes]) -> None:
        if not _is_empty(headers):
            raise Refused(400, "expected no body here; leave it out", code="unexpected_body")

    def _check_kind(self, headers: dict[bytes, bytes]) -> None:
        if _is_empty(headers):
            return
        kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        if kind != b"application/json":
            told = kind.decode("latin-1")[:100] or "none"
            message = f"expected Content-Type application/json; got {told}"
            raise Refused(415, message, code="unsupported_media_type")
        if headers.get(b"content-encoding", b"identity").lower() != b"identity":
            message = "expected a body that is not compressed (no Content-Encoding)"
            raise Refused(415, message, code="unsupported_media_type")
        length = headers.get(b"content-length", b"")
        if length.isdigit() and (len(length) > 15 or int(length) > self.settings.body_bytes):
            raise self._too_large()

    def _too_large(self) -> Refused:
        most = self.settings.body_bytes
        return Refused(413, f"expected a body of at most {most} bytes", code="body_too_large")

    # ---- the body ----------------------------------------------------------------------------

    async def _read(self, receive: Receive, parts: list[bytes]) -> None:
        """Append the parts of the body to `parts`, and count them as held."""
        size, more = 0, True
        try:
            async with asyncio.timeout(self.settings.body_seconds):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Gone
                    part, more = message.get("body", b""), message.get("more_body", False)
                    size += len(part)
                    if size > self.settings.body_bytes:
                        raise self._too_large()
                    if self.held + len(part) > self.settings.held_bytes:
                        raise busy("too many bytes of requests are under way")
                    parts.append(part)
                    self.held += len(part)
        except TimeoutError as error:
            most = self.settings.body_seconds
            message_ = f"expected the body within {most:g} seconds"
            raise Refused(408, message_, code="body_too_slow") from error

    async def _drain(self, scope: Scope, receive: Receive) -> None:
        """Read on for a moment without keeping anything, so that a client sees the refusal.

        A connection that is closed while its client is still sending is reset, and the answer lost.
        """
        headers = dict(scope["headers"])
        if b"expect" in headers:  # it has not begun to send
            return
        size, more = 0, True
        try:
            async with asyncio.timeout(min(2.0, self.settings.body_seconds)):
                while more and size <= 4 * self.settings.body_bytes:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return
                    size += len(message.get("body", b""))
                    more = message.get("more_body", False)
        except TimeoutError:
            return

    # ---- the answer --------------------------------------------------------------------------

    async def _run(self, scope: Scope, body: bytes, receive: Receive, answer: _Answer) -> None:
        """Run the application until it has answered, its client is gone or its time is over."""
        given: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def once() -> Message:
            if given:
                return given.pop()
            message: Message = await asyncio.get_running_loop().create_future()  # never
            return message

        # The work itself keeps to `seconds` and says so; this is for what does not.
        most = None if scope["path"] == LASTING else self.settings.seconds + 5.0
        work = asyncio.ensure_future(self.app(scope, once, answer.send))
        gone = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({work, gone}, timeout=most, return_when=asyncio.FIRST_COMPLETED)
            if not work.done() and answer.complete:  # what is left is tidying up
                await asyncio.wait({work}, timeout=1.0)
            if work.done():
                work.result()
            elif gone.done():
                raise Gone
            else:
                raise out_of_time(self.settings)
        finally:
            left = {work, gone}
            while left:  # a library may lose a cancellation; then another comes
                for task in left:
                    task.cancel()
                _, left = await asyncio.wait(left, timeout=0.5)
            await asyncio.gather(work, gone, return_exceptions=True)  # what they raised is known


async def _gone(receive: Receive) -> None:
    # Whoever sends a second request before the answer to the first (HTTP pipelining; no client in
    # use does) is only seen to be gone once that is written: no more is read of it until then.
    while (await receive())["type"] != "http.disconnect":
        pass


def _is_empty(headers: dict[bytes, bytes]) -> bool:
    none = headers.get(b"content-length", b"") in (b"", b"0")
    return none and b"transfer-encoding" not in headers


def _reason(refused: Refused) -> str:
    if refused.code == "bad_origin":
        return "origin"
    return {
        400: "body",
        401: "token",
        403: "host",
        408: "slow",
        413: "large",
        415: "type",
        429: "busy",
        431: "headers",
    }[refused.status]
