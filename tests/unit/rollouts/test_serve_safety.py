"""Whom the server keeps out: strangers, other names, other sites."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from serve_world import make_agent
from serving import ASKED, CHAT, ask, serving

from gato import cli
from gato.rollouts.agent import Agent
from gato.rollouts.serve_limits import Settings


@pytest.fixture(scope="module")
def agent(text_model: bytes) -> Agent:
    return make_agent(text_model)


@pytest.fixture(scope="module")
def address(agent: Agent) -> Iterator[str]:
    with serving(agent) as address:
        yield address


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


def test_other_sites_are_told_why_they_are_refused(agent):
    good = {"Origin": "https://good.example"}
    with serving(agent, token="secret-0123", origins=("https://good.example",)) as address:
        own = "authorization,content-type,x-stainless-os,x-stainless-retry-count"
        preflight = {
            **good,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": own,
        }
        status, headers, _ = ask(address, CHAT, method="OPTIONS", **preflight)
        assert status == 200
        assert own in headers["access-control-allow-headers"].replace(" ", "").lower()
        right = {"Authorization": "Bearer secret-0123"}
        for value, status, more in (
            (ASKED, 401, {}),
            (ASKED, 415, {**right, "Content_Type": "text/plain"}),
            (b"{}" * (9 << 20), 413, right),
            (ASKED, 200, right),
        ):
            got, headers, _ = ask(address, CHAT, value, **good, **more)
            assert (got, headers["access-control-allow-origin"]) == (status, good["Origin"])
            told = headers["access-control-expose-headers"].lower()
            assert {"retry-after", "x-request-id"} <= set(told.replace(" ", "").split(","))


def test_every_answer_carries_the_headers_of_security(address):
    for method, path in (("GET", "/health"), ("GET", "/nothing"), ("PUT", CHAT)):
        _, headers, _ = ask(address, path, method=method)
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert "default-src 'self'" in headers["content-security-policy"]
        assert "server" not in headers


def test_load_balancers_may_ask_for_the_head_alone(address):
    for path in ("/health", "/", "/metrics", "/v1/models"):
        status, headers, body = ask(address, path, method="HEAD")
        assert (status, body) == (200, b"")
        assert int(headers["content-length"]) > 0
