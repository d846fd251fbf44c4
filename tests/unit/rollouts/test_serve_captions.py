"""Captions over HTTP are those of the agent; what is no picture is refused; the page is there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import serve_world
from serve_world import make_agent, picture, uri
from serving import ask, serving

from gato.rollouts.agent import Agent
from gato.rollouts.messages import fitting

TOKEN = "let-me-in"


@pytest.fixture(scope="module")
def agent(text_model: bytes) -> Agent:
    return make_agent(text_model)


@pytest.fixture(scope="module")
def address(agent: Agent) -> Iterator[str]:
    with serving(agent, token=TOKEN) as address:
        yield address


def captioned(address: str, value: object, **headers: str) -> tuple[int, dict, object]:
    return ask(address, "/v1/captions", value, Authorization=f"Bearer {TOKEN}", **headers)


@pytest.mark.parametrize("size", [(16, 16), (40, 24), (300, 500)])
def test_a_caption_is_what_the_agent_says(address, agent, size):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    status, _, told = captioned(address, {"image": uri(image), "max_tokens": 7})
    assert status == 200
    assert told["text"] == agent.caption(fitting(image), max_tokens=7)
    assert told["model"] == "tiny"
    assert told["usage"]["completion_tokens"] == 7


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({}, "'image'"),
        ({"image": "file:///etc/passwd"}, "data URI"),
        ({"image": "http://localhost/x.png"}, "data URI"),
        ({"image": "data:image/png;base64,AAAA"}, "formats"),
        ({"image": 3}, "data URI"),
        ({"image": "", "max_tokens": 0}, "max_tokens"),
        ({"image": uri(picture(0)), "prompt": "x"}, "prompt"),
    ],
)
def test_what_is_no_picture_is_refused(address, value, words):
    status, _, told = captioned(address, value)
    assert status == 400
    assert words in told["error"]["message"]


def test_a_picture_that_is_not_remembered_is_refused_as_the_agent_does(text_model, monkeypatch):
    monkeypatch.setattr(serve_world, "TINY", replace(serve_world.TINY, context=64))
    small, large = make_agent(text_model), picture(0, 128, 128)
    with pytest.raises(ValueError, match="remembers 64 tokens and this takes 66") as refused:
        small.caption(large)
    with serving(small) as address:
        status, _, told = ask(address, "/v1/captions", {"image": uri(large)})
        assert (status, told["error"]["code"]) == (400, "context_length_exceeded")
        assert (told["error"]["param"], told["error"]["message"]) == ("image", str(refused.value))
        assert ask(address, "/v1/captions", {"image": uri(picture(0)), "max_tokens": 1})[0] == 200


def test_the_page_is_there_without_a_token_and_nothing_else_is(address):
    for path, kind in (("/", "text/html"), ("/page/app.js", "text/javascript")):
        status, headers, _ = ask(address, path, method="GET")
        assert status == 200
        assert headers["content-type"].startswith(kind)
        assert headers["content-security-policy"].startswith("default-src 'none'")
    for path in ("/v1/tasks", "/v1/models"):
        assert ask(address, path, method="GET")[0] == 401
    assert ask(address, "/v1/watch", {"task": "x"})[0] == 401
    status, _, told = ask(address, "/v1/tasks", method="GET", Authorization=f"Bearer {TOKEN}")
    assert (status, told["object"]) == (200, "list")
