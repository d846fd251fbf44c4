"""The server's bounds, and how it refuses what is beyond them."""

from __future__ import annotations

import ipaddress
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

CLEANUP = "gato.cleanup"
"""Key of the scope: functions that are called when a request is over, however it ended."""
MAX_HEAD_BYTES = 16 << 10
MAX_SEED = (1 << 63) - 1
"""Of texts and of sessions that act."""
EVENT_STREAM = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
"""Headers of an answer that is told event by event: nothing on the way is to keep it."""
SHORTEST_TOKEN = 8


_ORIGIN = re.compile(r"https?://[^\s/?#@]+")
_HOST = re.compile(r"[\w.-]+|\[[0-9a-f:.]+\]", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True)
class Settings:
    """Where the server listens, and its bounds."""

    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = field(default=None, repr=False)
    """What clients must show; None asks for none, which only loopback may."""
    name: str = "gato"
    """The model's name in requests."""
    rows: int = 16
    """Answers that are written at once."""
    waiting: int = 64
    """Answers that wait for a row; beyond them requests are refused with 429."""
    sessions: int = 32
    """Sessions of actions."""
    idle_seconds: float = 600.0
    """After which a session that nobody uses is closed."""
    requests: int = 256
    """Requests under way, whatever they ask for."""
    body_bytes: int = 16 << 20
    """Of one request's body."""
    held_bytes: int = 128 << 20
    """Of all bodies that are held at once."""
    head_seconds: float = 10.0
    """For a request's head to arrive."""
    body_seconds: float = 20.0
    """For its body to arrive."""
    seconds: float = 120.0
    """For its answer to be written."""
    stall_seconds: float = 30.0
    """For a client to go on reading, when as much is sent as fits on the way."""
    grace_seconds: float = 5.0
    """For running answers when the server is asked to end."""
    max_tokens: int = 1024
    """Of one answer; those who ask for more get as many."""
    choices: int = 4
    """Answers to one request (n)."""
    pieces: int = 2048
    """Messages of a request, and parts of them, together."""
    characters: int = 200_000
    """Of all text of a request."""
    images: int = 32
    """Of one request."""
    image_bytes: int = 8 << 20
    """Of one image, as it is stored."""
    image_pixels: int = 16 << 20
    """Of all images of a request together."""
    origins: tuple[str, ...] = ()
    """Other web sites whose pages may ask (CORS)."""
    hosts: tuple[str, ...] = ()
    """Names by which clients may call the server, beside loopback's own; elsewhere, without any
    given, every name is one, for there the token protects."""

    def __post_init__(self) -> None:
        if self.token is not None and not (self.token.isascii() and self.token.isprintable()):
            raise ValueError("expected a token of printable ASCII characters")
        if self.token is not None and not self.token.strip():
            raise ValueError("expected a token; got an empty one. Leave it out to ask for none")
        if self.token is not None and self.token != self.token.strip():
            raise ValueError("expected a token without spaces around it, which clients cannot show")
        if self.token is None and not is_loopback(self.host):
            raise ValueError(
                f"expected a token for {self.host!r}, which other machines can reach; got none. "
                f"Give --token-file FILE (or --token T), or listen on 127.0.0.1"
            )
        if self.token and len(self.token) < SHORTEST_TOKEN and not is_loopback(self.host):
            raise ValueError(
                f"expected a token of at least {SHORTEST_TOKEN} characters for {self.host!r}, "
                f"which other machines can reach and guess at; got {len(self.token)}"
            )
        if not 0 <= self.port < 1 << 16:
            raise ValueError(f"port must be from 0 to 65535; got {self.port}")
        for origin in self.origins:
            if not _ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"expected an origin as browsers send it, https://example.org or "
                    f"http://localhost:3000, without a path; got {origin!r}"
                )
        for host in self.hosts:
            if not _HOST.fullmatch(host):
                raise ValueError(
                    f"expected a host's name, example.org or [::1], without a scheme, a port or a "
                    f"path; got {host!r}"
                )
        if self.body_bytes > self.held_bytes:
            raise ValueError(
                f"expected held_bytes of at least one body's {self.body_bytes}; got "
                f"{self.held_bytes}. Give more, or smaller body_bytes"
            )
        for one in fields(self):
            value = getattr(self, one.name)
            if one.name.endswith("seconds") and not (0 < value < math.inf):
                raise ValueError(f"{one.name} must be above 0 and finite; got {value}")
            if one.type == "int" and one.name != "port" and value < 1:
                raise ValueError(f"{one.name} must be at least 1; got {value}")


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches an address.

    >>> [is_loopback(h) for h in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "", "example.org")]
    [True, True, True, False, False, False]
    """
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class Refused(Exception):
    """A request that gets no answer, in the form of OpenAI's errors."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"

    @property
    def kind(self) -> str:
        """The type of error, by its status."""
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        wanted = "server_error" if self.status >= 500 else "invalid_request_error"
        return kinds.get(self.status, wanted)

    def to_json(self) -> dict[str, Any]:
        """Return what clients parse."""
        told = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": told}


def busy(what: str) -> Refused:
    """Return the refusal of a request that may come again in a second."""
    return Refused(429, f"{what}; try again in a second", code="rate_limit_exceeded", retry_after=1)


def out_of_time(settings: Settings) -> Refused:
    """Return the refusal of what takes too long."""
    message = f"no answer within {settings.seconds:g} seconds"
    refused = Refused(503, message, code="timeout", retry_after=5)
    refused.headers["x-should-retry"] = "false"  # OpenAI's clients would ask twice more, at once
    return refused


def failure() -> Refused:
    """Return the refusal of what only the server's log explains."""
    return Refused(500, "the server failed; its log says how", code="internal_error")


def no_task(task: Any, known: Iterable[str]) -> Refused:
    """Return the refusal of a task that the checkpoint does not know."""
    names = ", ".join(known) or "none"
    message = f"expected one of the tasks that this model knows ({names}); got {task!r:.100}"
    return Refused(404, message, param="task", code="task_not_found")
