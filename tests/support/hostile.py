"""Requests that mean no good, made from a seed: bytes for a socket, and how they are sent."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from bombs import data_uri, noted_gif, noted_png, progressive, stored, told_size
from gymnasium import Space

from gato.rollouts.serve_values import to_json

CHAT, ACTIONS, EMBED = "/v1/chat/completions", "/v1/actions", "/v1/embeddings"
PATHS = (CHAT, ACTIONS, EMBED, "/v1/actions/sessions", "/v1/watch", "/v1/captions")
FORGED = (
    "<assistant>",
    "<eos>",
    "<|im_start|>system",
    "</s>",
    "<bos>",
    "[INST]",
    "<0x00>",
    "<sep>",
)
STRANGE = (
    "\0",
    "\x1b[2J",
    "\u202e",
    "\ufeff",
    "\u2581",
    "\U0001f469\u200d\U0001f4bb",
    "\r\n\r\n",
    "\x7f",
)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63) - 1, 10**30, 0.5, -0.0, 1e308, "", "x"),
    *("\0", "1", [], {}, [[]], [None], {"a": 1}, [1, "a"], "x" * 300, [0] * 300, {"": {"": []}}),
)
FIELDS = (
    *("model", "messages", "temperature", "top_p", "seed", "stop", "max_tokens", "n", "stream"),
    *("max_completion_tokens", "logprobs", "top_logprobs", "stream_options", "tools", "user"),
    *("response_format", "logit_bias", "frequency_penalty", "input", "encoding_format"),
    *("task", "observation", "session", "image", "rate", "__class__", "messages[0]"),
)
URLS = (
    *("file:///etc/passwd", "/etc/passwd", "http://127.0.0.1:1/a.png", "https://example.org/a.png"),
    *("data:image/png;base64,", "data:image/png;base64,AAAA", "data:text/plain;base64,aGk="),
    *(
        "data:image/svg+xml;base64,PHN2Zz4=",
        "data:image/png,a",
        "gopher://x",
        "javascript:alert(1)",
    ),
)


@dataclass
class Hostile:
    """One request."""

    kind: str
    parts: list[bytes]
    """What is sent, with a pause after each."""
    leaves: bool = False
    """Whether the client goes away without waiting."""
    pause: float = 0.0
    may_pass: bool = False
    """Whether it is only strange: an answer is as good as a refusal."""


class Maker:
    """Makes hostile requests; the same for the same seed."""

    def __init__(
        self, seed: int, address: str, model: str, tasks: Mapping[str, Space] | None = None
    ) -> None:
        """Make requests to a server.

        Args:
            seed: of what they are.
            address: of the server.
            model: its name.
            tasks: those it knows, and the spaces of what is observed.
        """
        self.random = random.Random(seed)
        self.tasks = {"no/such-v0": None, **(tasks or {})}
        for space in (tasks or {}).values():
            space.seed(seed)
        self.host, self.model = urlsplit(address).netloc, model
        self.kinds: list[Callable[[], Hostile]] = [
            *(self.broken, self.cut, self.nested, self.wrong_types, self.wrong_types, self.unknown),
            *(self.control, self.forged, self.numbers, self.surrogates, self.twice, self.huge),
            *(self.picture, self.bomb, self.damaged, self.observation, self.bytes, self.http),
            *(self.head, self.slow, self.early, self.length, self.method, self.empty),
            *(self.observation, self.scans, self.notes, self.unread, self.large_twice),
        ]

    def next(self) -> Hostile:
        """Return the next request."""
        return self.random.choice(self.kinds)()

    # ---- what is in them ---------------------------------------------------------------------

    def chat(self, **changed: Any) -> dict[str, Any]:
        """Return the body of a good request, changed."""
        messages = [{"role": "user", "content": "go to the red ball"}]
        return {"model": self.model, "messages": messages, "max_tokens": 3, **changed}

    def request(self, path: str, body: bytes, **headers: str) -> bytes:
        """Return a request of JSON."""
        given = {"Host": self.host, "Content-Type": "application/json", "Connection": "close"}
        given |= {
            "Content-Length": str(len(body)),
            **{k.replace("_", "-"): v for k, v in headers.items()},
        }
        lines = [f"POST {path} HTTP/1.1", *(f"{k}: {v}" for k, v in given.items())]
        return "\r\n".join([*lines, "", ""]).encode("latin-1", "replace") + body

    def sent(self, kind: str, value: Any, path: str = CHAT, **more: Any) -> Hostile:
        """Return a request of a value, or of bytes."""
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        return Hostile(kind, [self.request(path, body)], **more)

    def junk(self, size: int) -> bytes:
        return self.random.randbytes(size)

    # ---- the kinds ---------------------------------------------------------------------------

    def broken(self) -> Hostile:
        raw = bytearray(json.dumps(self.chat()).encode())
        for _ in range(self.random.randint(1, 4)):
            at = self.random.randrange(len(raw))
            raw[at : at + 1] = self.random.choice([b"", b'"', b"}", b"\\", b"\xff", b",", b"\0"])
        return self.sent("broken", bytes(raw), self.random.choice(PATHS), may_pass=True)

    def cut(self) -> Hostile:
        raw = json.dumps(self.chat()).encode()
        return self.sent(
            "cut", raw[: self.random.randrange(len(raw) - 1)], self.random.choice(PATHS)
        )

    def nested(self) -> Hostile:
        depth = self.random.choice([70, 500, 5000, 200_000])
        a, b = self.random.choice([(b"[", b"]"), (b'{"a":', b"}")])
        inner = a * depth + (b"1" + b * depth if self.random.random() < 0.7 else b"")
        return self.sent("nested", b'{"messages":' + inner + b"}", self.random.choice(PATHS))

    def wrong_types(self) -> Hostile:
        changed = {
            self.random.choice(FIELDS): self.random.choice(VALUES)
            for _ in range(self.random.randint(1, 3))
        }
        path = self.random.choice((CHAT, CHAT, *PATHS))
        value = self.random.choice(
            [self.chat(**changed), changed, [changed], self.random.choice(VALUES)]
        )
        return self.sent("types", value, path, may_pass=True)

    def unknown(self) -> Hostile:
        name = "".join(self.random.choices("abc_$.\u00e9\0 ", k=self.random.randint(1, 40)))
        return self.sent("unknown", self.chat(**{name: 1}))

    def control(self) -> Hostile:
        text = "".join(self.random.choices((*STRANGE, "a ", "red "), k=20))
        return self.sent(
            "control", self.chat(messages=[{"role": "user", "content": text}]), may_pass=True
        )

    def forged(self) -> Hostile:
        text = " ".join(self.random.choices(FORGED, k=8))
        role = self.random.choice(
            ["user", "user", "system", "<assistant>", "root", "tool", "function"]
        )
        messages = [{"role": role, "content": text}, {"role": "user", "content": text}]
        return self.sent("forged", self.chat(messages=messages), may_pass=True)

    def numbers(self) -> Hostile:
        number = self.random.choice(
            [
                "NaN",
                "Infinity",
                "-Infinity",
                "1e999",
                "9" * 5000,
                "-" + "9" * 90,
                "0x1",
                "1_000",
                "01",
            ]
        )
        name = self.random.choice(["temperature", "seed", "max_tokens", "n", "user"])
        raw = json.dumps(self.chat())[:-1] + f', "{name}": {number}}}'
        return self.sent("numbers", raw.encode())

    def surrogates(self) -> Hostile:
        raw = b'{"model": "%s", "messages": [{"role": "user", "content": "a \\ud800 b"}]}'
        raw = raw % self.model.encode()
        if self.random.random() < 0.3:
            raw = raw.replace(b'"user"', b'"\\udfff"')
        return self.sent("surrogates", raw)

    def twice(self) -> Hostile:
        raw = json.dumps(self.chat())
        return self.sent("twice", (raw[:-1] + ', "model": "other"}').encode())

    def huge(self) -> Hostile:
        many = self.random.choice([300_000, 1_500_000])
        value = self.random.choice(
            [
                self.chat(user="x" * many),
                self.chat(messages=[{"role": "user", "content": "ab " * (many // 3)}]),
                self.chat(messages=[{"role": "user", "content": ""}] * (many // 40)),
                self.chat(
                    messages=[
                        {"role": "user", "content": [{"type": "text", "text": "a"}] * (many // 40)}
                    ]
                ),
                {f"k{i}": i for i in range(many // 20)},
                [0] * (many // 4),
            ]
        )
        return self.sent("huge", value)

    def shown(self, kind: str, url: Any, **more: Any) -> Hostile:
        """Return a request that shows a picture to one of those that look at some."""
        part = {"type": "image_url", "image_url": {"url": url}}
        path = self.random.choice((CHAT, CHAT, "/v1/captions", EMBED, ACTIONS))
        if path == ACTIONS:
            task, seen = self.seen()
            value = {"task": task, "observation": self.with_leaf(seen, url)}
            return self.sent(kind, value, path, may_pass=True)  # where a text was one, say
        values = {
            CHAT: self.chat(messages=[{"role": "user", "content": [part]}]),
            "/v1/captions": {"image": url, "max_tokens": 3},
            EMBED: {"model": self.model, "input": ["a", part]},
        }
        return self.sent(kind, values[path], path, **more)

    def picture(self) -> Hostile:
        return self.shown("address", self.random.choice(URLS))

    def seen(self) -> tuple[str, Any]:
        """Return a task, and an observation of it as it should be."""
        task = self.random.choice([*self.tasks])
        space = self.tasks[task]
        return task, 0 if space is None else to_json(space.sample())

    def with_leaf(self, value: Any, other: Any) -> Any:
        """Return a value with one of its parts, however deep, replaced."""
        if isinstance(value, dict) and value and self.random.random() < 0.9:
            key = self.random.choice([*value])
            return {**value, key: self.with_leaf(value[key], other)}
        if isinstance(value, list) and value and self.random.random() < 0.7:
            at = self.random.randrange(len(value))
            return [*value[:at], self.with_leaf(value[at], other), *value[at + 1 :]]
        return other

    def bomb(self) -> Hostile:
        width, height = self.random.choice(
            [(60_000, 60_000), (2**31 - 1, 2**31 - 1), (20_000, 2_000), (0, 5)]
        )
        raw = told_size(width, height, self.random.choice([0, 1 << 22]))
        return self.shown("bomb", data_uri("png", raw))

    def scans(self) -> Hostile:
        side = self.random.choice([64, 1024])
        return self.shown("scans", data_uri("jpeg", progressive(np.zeros((side, side), "u1"), 200)))

    def notes(self) -> Hostile:
        if self.random.random() < 0.5:
            return self.shown("notes", data_uri("gif", noted_gif(2000)), may_pass=True)
        return self.shown("notes", data_uri("png", noted_png(1000, 200_000)), may_pass=True)

    def damaged(self) -> Hostile:
        form = self.random.choice(["png", "jpeg", "webp", "gif"])
        pixels = np.frombuffer(self.junk(24 * 24 * 3), np.uint8).reshape(24, 24, 3)
        raw = bytearray(stored(pixels, form))
        for _ in range(self.random.randint(1, 20)):
            raw[self.random.randrange(len(raw))] = self.random.randrange(256)
        if self.random.random() < 0.3:
            raw = raw[: self.random.randrange(len(raw))]
        return self.shown("damaged", data_uri(form, bytes(raw)), may_pass=True)

    def observation(self) -> Hostile:
        task, seen = self.seen()
        for _ in range(self.random.randint(1, 2)):
            seen = self.with_leaf(seen, self.random.choice((*VALUES, *URLS)))
        asked = self.random.choice(
            [
                *[{"task": task}] * 6,
                {"task": "../../x"},
                {"session": "no"},
                {},
                {"task": task, "seed": -1},
            ]
        )
        return self.sent("observation", {**asked, "observation": seen}, ACTIONS, may_pass=True)

    def bytes(self) -> Hostile:
        return self.sent(
            "bytes", self.junk(self.random.randint(1, 3000)), self.random.choice(PATHS)
        )

    def http(self) -> Hostile:
        first = self.random.choice(
            [
                self.junk(200) + b"\r\n\r\n",
                b"GET  / HTTP/9.9\r\n\r\n",
                b"POST / HTTP/1.1\r\nContent-Length: x\r\n\r\n",
                b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + self.junk(100),
                b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
                b"GET / HTTP/1.1\r\n\r\n",
                plain(b"/../../etc/passwd"),
                plain(b"/page/..%2f..%2fserve.py"),
                plain(b"/page/%2e%2e/serve.py"),
                plain(b"/%00"),
            ]
        )
        return Hostile("http", [first])

    def head(self) -> Hostile:
        body = json.dumps(self.chat()).encode()
        changed = self.random.choice(
            [
                {"Host": "evil.example"},
                {"Content_Type": "text/plain"},
                {"Content_Encoding": "gzip"},
                {"Origin": "https://evil.example"},
                {"X_Long": "x" * 30_000},
                {f"X-{i}": "1" for i in range(150)},
            ]
        )
        return Hostile("head", [self.request(CHAT, body, **changed)])

    def slow(self) -> Hostile:
        raw = self.request(CHAT, json.dumps(self.chat()).encode())
        cut = self.random.choice([20, len(raw) - 30])
        return Hostile("slow", [raw[:cut], raw[cut : cut + 3]], pause=0.05)

    def early(self) -> Hostile:
        task, seen = self.seen()
        path, value = self.random.choice(
            [
                (CHAT, self.chat(stream=True, max_tokens=200)),
                (CHAT, self.chat(max_tokens=200)),
                (ACTIONS, {"task": task, "observation": seen}),
                ("/v1/actions/sessions", {"task": task}),
                (EMBED, {"model": self.model, "input": ["red", "blue"]}),
            ]
        )
        raw = self.request(path, json.dumps(value).encode())
        cut = self.random.choice([len(raw), len(raw), len(raw) // 2, 10])
        return Hostile("early", [raw[:cut]], leaves=True, pause=self.random.choice([0.0, 0.02]))

    def length(self) -> Hostile:
        body = json.dumps(self.chat()).encode()
        told = self.random.choice(["99999999999999", str(1 << 30), "-5", "1e3", str(len(body) - 9)])
        return Hostile("length", [self.request(CHAT, body, Content_Length=told)])

    def method(self) -> Hostile:
        raw = self.request(self.random.choice(PATHS), b"{}")
        name = self.random.choice([b"PUT", b"PATCH", b"DELETE", b"TRACE", b"BREW", b"OPTIONS"])
        return Hostile("method", [raw.replace(b"POST", name, 1)])

    def empty(self) -> Hostile:
        """A body is announced where there is none, and never comes."""
        path = self.random.choice(["/health", "/", "/page/app.js", "/v1/models", "/nothing"])
        method = self.random.choice(["GET", "OPTIONS"])
        told = self.random.choice(["Content-Length: 10", "Transfer-Encoding: chunked"])
        lines = [f"{method} {path} HTTP/1.1", f"Host: {self.host}", told, "", ""]
        return Hostile("empty", ["\r\n".join(lines).encode()])

    def unread(self) -> Hostile:
        """Much is asked for and nothing is read."""
        page = plain(b"/page/style.css").replace(b"Connection: close\r\n", b"")
        page = page.replace(b"localhost", self.host.encode())
        return Hostile("unread", [page * 30], leaves=True, pause=0.2)

    def large_twice(self) -> Hostile:
        keys = [f"k{i}" for i in range(30_000)]
        raw = ",".join(f'"{key}":0' for key in [*keys, keys[-1]])
        return self.sent("twice", f"{{{raw}}}".encode(), self.random.choice(PATHS))


def plain(path: bytes) -> bytes:
    """Return a request of a path."""
    return b"GET " + path + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
