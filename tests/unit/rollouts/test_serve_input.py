"""Bodies and pictures that cost more than they look: judged before they are read."""

from __future__ import annotations

import json
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from bombs import data_uri, noted_gif, noted_png, progressive, stored, told_size
from gymnasium import spaces
from serve_world import make_agent, picture, uri
from serving import ASKED, CHAT, NARROW, ask, serving, until

from gato.rollouts import watch
from gato.rollouts.agent import Agent
from gato.rollouts.data_uri import MOST_SCANS, Budget
from gato.rollouts.serve_json import MAX_VALUES, strict_json
from gato.rollouts.serve_limits import Refused
from gato.rollouts.serve_values import from_json


def object_of(keys: list[str]) -> bytes:
    """Return an object with so many members."""
    return ("{" + ",".join(f"{json.dumps(key)}:0" for key in keys) + "}").encode()


@pytest.mark.parametrize("again", [0, 19_999])
def test_a_key_twice_is_found_in_one_pass(again):
    keys = [f"k{i}" for i in range(20_000)]
    began = time.perf_counter()
    with pytest.raises(Refused, match=f"got 'k{again}' twice"):
        strict_json(object_of([*keys, keys[again]]))
    assert time.perf_counter() - began < 2.0  # eight and more, where each key looks at all
    assert len(strict_json(object_of(keys))) == 20_000


@pytest.mark.parametrize("one", [b"{}", b"[]", b"0"])
def test_as_many_values_as_would_fill_the_memory_are_not_made(one):
    raw = b"[" + b",".join([one] * (5 << 20)) + b"]"
    began = time.perf_counter()
    with pytest.raises(Refused, match=f"at most {MAX_VALUES} values"):
        strict_json(raw)
    assert time.perf_counter() - began < 1.5
    assert len(strict_json(b"[" + b",".join([one] * 1000) + b"]")) == 1000


def jpeg(scans: int) -> str:
    return data_uri("jpeg", progressive(picture(0, 64, 64), scans))


def test_a_jpeg_of_many_scans_is_refused_and_one_of_some_costs_more():
    plain = jpeg(0)
    seen = Budget(1, 1 << 20, 64 * 64).picture(plain)
    assert seen.shape == (64, 64, 3)
    more = jpeg(20)
    assert Budget(1, 1 << 20, 2 * 64 * 64).picture(more).shape == (64, 64, 3)
    with pytest.raises(ValueError, match="more pixels"):
        Budget(1, 1 << 20, 2 * 64 * 64 - 1).picture(more)
    with pytest.raises(ValueError, match=f"at most {MOST_SCANS} scans; got"):
        Budget(1, 1 << 20, 1 << 30).picture(jpeg(100))
    grey = data_uri("jpeg", stored(np.zeros((64, 64), np.uint8), "jpeg"))
    assert Budget(1, 1 << 20, 64 * 64).picture(grey).shape == (64, 64, 3)
    assert Budget(1, 1 << 20, 64 * 64).picture(uri(picture(1, 64, 64))).shape == (64, 64, 3)


def test_notes_beside_a_picture_cost_no_more_than_their_bytes():
    """Pillow 10 to 12 took 4 GB for the first, and the square of its length for the second."""
    for form, one in (("png", noted_png(2000, 1 << 21)), ("gif", noted_gif(16 << 10))):
        began = time.perf_counter()
        assert Budget(1, 8 << 20, 256).picture(data_uri(form, one)).shape == (16, 16, 3)
        assert time.perf_counter() - began < 1.5


def test_texts_among_numbers_take_no_room():
    space = spaces.Box(0, 1, (4,), np.float32)
    tracemalloc.start()
    with pytest.raises(ValueError, match="something else among them"):
        from_json(space, ["x" * 100_000, *[""] * 300], Budget(1, 1, 1))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 1 << 20  # 120 MB, where each has the room of the longest


def test_numbers_that_json_has_not_are_null_in_events():
    told = watch.event("step", {"reward": float("nan"), "tokens": [{"x": float("inf")}, 0.5]})
    assert told == b'event: step\ndata: {"reward": null, "tokens": [{"x": null}, 0.5]}\n\n'


# ---- pictures of a server --------------------------------------------------------------------


@pytest.fixture(scope="module")
def agent(text_model: bytes) -> Agent:
    return make_agent(text_model, contrast=0.5)


@pytest.fixture(scope="module")
def address(agent: Agent) -> Iterator[str]:
    with serving(agent) as address:
        yield address


@pytest.fixture(scope="module")
def narrow(agent: Agent) -> Iterator[str]:
    """Return the address of a server with small bounds."""
    with serving(agent, **NARROW) as address:
        yield address


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


@pytest.fixture(scope="module")
def warm(address: str) -> None:
    """Have imported what is imported late."""
    for path in ASKING:
        assert ask(address, path, asking(path, uri(picture(0, 32, 16))))[0] == 200


@pytest.fixture
def opened(warm: None) -> Iterator[list[tuple[str, str]]]:
    """Return what the server's threads open during a test."""
    if not Opened.hooked:
        sys.addaudithook(Opened.hook)  # which can never be taken away
        Opened.hooked = True
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


def asking(path: str, url: object) -> dict:
    """Return a request that shows a picture to an endpoint."""
    part = {"type": "image_url", "image_url": {"url": url}}
    room = {"camera": url, "grid": [0, 1], "mission": "", "turned": 0}
    return {
        CHAT: shown(url),
        "/v1/captions": {"image": url},
        "/v1/embeddings": {"model": "tiny", "input": [part]},
        "/v1/actions": {"task": "made/room-v0", "observation": room},
    }[path]


ASKING = (CHAT, "/v1/captions", "/v1/embeddings", "/v1/actions")


@pytest.mark.parametrize("path", ASKING)
@pytest.mark.parametrize("url", ADDRESSES, ids=[f"{i}" for i in range(len(ADDRESSES))])
def test_no_path_and_no_address_is_ever_opened(address, opened, url, path):
    status, _, told = ask(address, path, asking(path, url))
    assert status == 400
    assert told["error"]["message"]
    assert not opened


@pytest.mark.parametrize("path", ASKING)
def test_pictures_in_requests_are_seen(address, opened, path):
    assert ask(address, path, asking(path, uri(picture(0, 32, 16))))[0] == 200
    assert not opened


def test_the_hook_sees_what_is_opened(address, opened):
    threading.Thread(target=lambda: Path("/etc/passwd").read_bytes()).start()
    assert until(lambda: any("passwd" in args for _, args in opened))


@pytest.mark.parametrize(("width", "height"), [(60_000, 60_000), (30_000, 1000), (2**31 - 1, 1)])
def test_bombs_are_refused_by_their_headers(address, width, height):
    began = time.monotonic()
    status, _, told = ask(address, CHAT, shown(data_uri("png", told_size(width, height))))
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
    whole = data_uri("png", stored(np.zeros((64, 64), np.uint8), "png"))
    assert "more pixels" in ask(narrow, CHAT, many(whole, small))[2]["error"]["message"]
    assert "bytes" in ask(narrow, CHAT, shown(large + "A" * 20_000))[2]["error"]["message"]


def test_large_bodies_are_not_read_where_everything_waits(address):
    raw = json.dumps({"task": "made/arm-v0", "seed": 0, "x": ["y"] * 9000}).encode()
    status, _, told = ask(address, "/v1/watch", raw)
    assert (status, told["error"]["code"]) == (413, "body_too_large")
