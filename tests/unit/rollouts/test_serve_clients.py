"""What the clients that are there send and expect, beside what OpenAI's own does."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator

import openai
import pytest
from serve_world import make_agent, picture, uri
from serving import ASKED, CHAT, LONG, ask, connect, figure, head, received, serving, until

from gato.rollouts import serve_openai
from gato.rollouts.agent import Agent
from gato.rollouts.data_uri import Budget
from gato.rollouts.engine import Engine

SHORT = {k: v for k, v in ASKED.items() if k != "max_tokens"}


@pytest.fixture(scope="module")
def agent(text_model: bytes) -> Agent:
    return make_agent(text_model)


@pytest.fixture(scope="module")
def address(agent: Agent) -> Iterator[str]:
    with serving(agent) as address:
        yield address


def told(address: str, **changed: object) -> dict:
    """Return what is told of a request that is refused."""
    status, _, answer = ask(address, CHAT, {**ASKED, **changed})
    assert status == 400
    return answer["error"]


# ---- how long, of what -----------------------------------------------------------------------


def test_an_answer_without_a_bound_takes_what_the_memory_leaves(agent, address):
    memory = agent.model.config.memory
    usage = ask(address, CHAT, SHORT)[2]["usage"]  # the likeliest goes round in circles
    assert usage["total_tokens"] == memory
    words = {"role": "user", "content": "red " * (memory // 5)}
    usage = ask(address, CHAT, {**SHORT, "messages": [words]})[2]["usage"]
    assert usage["prompt_tokens"] > 0.6 * memory
    assert usage["completion_tokens"] == memory // 2
    with serving(agent, max_tokens=7) as other:
        assert ask(other, CHAT, SHORT)[2]["usage"]["completion_tokens"] == 7


def test_late_system_messages_are_read_first(address):
    system, user = {"role": "system", "content": "open the door"}, ASKED["messages"][0]
    said = {"role": "assistant", "content": "blue"}
    right = ask(address, CHAT, {**ASKED, "messages": [system, user, said, user]})[2]
    for messages in ([user, said, system, user], [user, said, user, system]):
        found = ask(address, CHAT, {**ASKED, "messages": messages})[2]
        assert found["choices"] == right["choices"]
        assert found["usage"] == right["usage"]


def test_an_answer_is_not_gone_on_with(address):
    said = {"role": "assistant", "content": "blue"}
    error = told(address, messages=[*ASKED["messages"], said])
    assert error["param"] == "messages"
    assert "ask for more in a message of the user's" in error["message"]


def test_a_prompt_too_long_has_the_code_that_clients_trim_on(address):
    error = told(address, messages=[{"role": "user", "content": "red " * 500}])
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")


# ---- fields ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [("verbosity", "medium"), ("reasoning_effort", "medium"), ("top_k", 0), ("top_k", -1)],
)
def test_usual_defaults_are_let_be(address, name, value):
    assert ask(address, CHAT, {**ASKED, name: value})[0] == 200


@pytest.mark.parametrize("name", ["repetition_penalty", "frequency_penalty", "top_k", "min_p"])
def test_true_and_false_are_no_numbers(address, name):
    for value in (True, False):
        assert told(address, **{name: value})["param"] == name


def test_pictures_are_decoded_last(address, monkeypatch):
    decoded: list[int] = []
    before = Budget.picture
    monkeypatch.setattr(Budget, "picture", lambda *a: decoded.append(1) or before(*a))
    part = {"type": "image_url", "image_url": {"url": uri(picture(0))}}
    shown = {**ASKED, "messages": [{"role": "user", "content": [part]}]}
    for changed in ({"model": "gpt-4o"}, {"temperature": 9}, {"guess": 1}, {"tools": [1]}):
        assert ask(address, CHAT, {**shown, **changed})[0] in (400, 404)
    assert not decoded
    assert ask(address, CHAT, shown)[0] == 200
    assert decoded


def test_tokens_of_other_models_are_refused_by_name(address):
    for given in ([[1, 2, 3]], [1, 2, 3]):
        error = ask(address, "/v1/embeddings", {"model": "tiny", "input": given})[2]["error"]
        assert "check_embedding_ctx_length=False" in error["message"]
    error = ask(address, "/v1/embeddings", {"model": "tiny", "input": ["a"] * 2049})[2]["error"]
    assert "1 to 2048" in error["message"]


# ---- when it takes long, and when it fails ---------------------------------------------------


def test_a_stream_that_waits_for_a_row_says_that_it_lives(agent, monkeypatch):
    monkeypatch.setattr(serve_openai, "ALIVE_SECONDS", 0.2)
    with serving(agent, rows=1, seconds=2.0, max_tokens=1_000_000) as address:
        body = json.dumps(LONG).encode()
        with connect(address) as first, connect(address) as second:
            first.sendall(head(address, CHAT, len(body)) + body)
            assert until(lambda: figure(address, "gato_running_rows") == 1)
            body = json.dumps({**ASKED, "stream": True}).encode()
            second.sendall(head(address, CHAT, len(body), Connection="close") + body)
            time.sleep(1.0)
            first.close()
            _, _, events = received(second)
    assert events.count(b": still here\n\n") >= 3
    assert events.count(b'"finish_reason":"length"') == 1
    chunks = [line for line in events.split(b"\n") if line.startswith(b"data: {")]
    assert all(json.loads(chunk[6:])["choices"] for chunk in chunks)


def test_openais_client_does_not_ask_again_when_time_is_over(agent):
    with serving(agent, seconds=0.5, max_tokens=1_000_000) as address:
        with openai.OpenAI(base_url=f"{address}/v1", api_key="x", max_retries=2) as client:
            with pytest.raises(openai.InternalServerError, match="within"):
                client.chat.completions.create(**LONG)
        name = f'gato_requests_total{{route="{CHAT}",status="503"}}'
        assert figure(address, name) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_why_the_model_failed_stands_in_the_log_alone(agent, monkeypatch, caplog, stream):
    def step(self: Engine) -> list:
        raise ValueError("a tensor of shape 3")

    caplog.set_level(logging.ERROR, "gato.serve")
    with serving(agent) as address:
        assert ask(address, CHAT, ASKED)[0] == 200
        monkeypatch.setattr(Engine, "step", step)
        status, _, answer = ask(address, CHAT, {**ASKED, "stream": stream, "n": 3})
        assert status == (200 if stream else 500)
        assert "its log says how" in str(answer)
        assert "shape" not in str(answer)
        monkeypatch.undo()
        assert ask(address, CHAT, ASKED)[0] == 200
    (record,) = [r for r in caplog.records if r.name == "gato.serve"]
    assert "a tensor of shape 3" in caplog.text
    assert record.exc_info


def test_our_own_mistakes_are_no_fault_of_the_clients(agent, monkeypatch, caplog):
    def text(*args: object) -> None:
        raise TypeError("secret internals")

    with serving(agent) as address:
        monkeypatch.setattr(agent.serializer, "conversation", text)
        status, _, answer = ask(address, CHAT, ASKED)
    assert (status, answer["error"]["code"]) == (500, "internal_error")
    assert "secret" not in str(answer)
    assert "secret internals" in caplog.text
