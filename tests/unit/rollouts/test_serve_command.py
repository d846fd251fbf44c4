"""The command line of the server."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest

import gato
from gato import cli
from gato.rollouts import serve, serve_metrics
from gato.rollouts.serve_limits import Settings


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """Return the settings of servers that would have been started."""
    found: list[Settings] = []

    def run(agent: Any, settings: Settings, ready: Any) -> None:
        found.append(settings)
        ready("http://127.0.0.1:1")

    monkeypatch.setattr(serve, "run", run)
    monkeypatch.setattr(gato, "load", lambda path: types.SimpleNamespace(path=path))
    return found


def test_options_become_settings(started, capsys):
    given = ["--port", "0", "--rows", "3", "--timeout", "9", "--body-mb", "2", "--max-tokens", "7"]
    assert cli.main(["serve", "runs/arm/model", *given, "--allow-origin", "https://a.b"]) == 0
    (settings,) = started
    assert (settings.name, settings.host, settings.token) == ("arm", "127.0.0.1", None)
    assert (settings.port, settings.rows, settings.seconds, settings.max_tokens) == (0, 3, 9.0, 7)
    assert (settings.body_bytes, settings.image_bytes) == (2 << 20, 2 << 20)
    assert settings.origins == ("https://a.b",)
    told = capsys.readouterr()
    assert not told.out
    assert "serving arm at http://127.0.0.1:1" in told.err
    assert "plain HTTP" not in told.err
    assert cli.main(["serve", "x", "--host", "0.0.0.0", "--token", "a-secret"]) == 0
    assert "plain HTTP shows the token" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--timeout", "0"], "above 0"),
        (["--timeout", "-1"], "above 0"),
        (["--timeout", "nan"], "above 0"),
        (["--timeout", "inf"], "finite"),
        (["--port", "70000"], "from 0 to 65535"),
        (["--token", " a "], "without spaces"),
        (["--host", "0.0.0.0", "--token", "short"], "at least 8 characters"),
        (["--allow-origin", "foo"], "expected an origin as browsers send it"),
        (["--allow-origin", "https://example.org/"], "without a path"),
        (
            ["--allow-host", "box.lan:8000"],
            "without a scheme, a port or a path; got 'box.lan:8000'",
        ),
        (["--allow-host", "https://box.lan"], "expected a host's name"),
        (["--allow-host", "box.lan/"], "expected a host's name"),
        (["--allow-host", "fe80::1"], "example.org or [::1]"),
        (["--allow-host", ""], "expected a host's name"),
    ],
)
def test_bounds_that_are_none_are_refused(started, capsys, given, told):
    assert cli.main(["serve", "x", *given]) == cli.BAD_INPUT
    assert told in capsys.readouterr().err
    assert not started


def test_what_many_or_large_requests_need_is_there(started):
    assert cli.main(["serve", "x"]) == 0
    assert started[-1] == Settings(name="x")
    assert cli.main(["serve", "x", "--rows", "20", "--waiting", "1000", "--body-mb", "200"]) == 0
    settings = started[-1]
    assert settings.requests > 1020
    assert settings.held_bytes >= 2 * settings.body_bytes == 400 << 20
    assert settings.image_bytes == 100 << 20
    with pytest.raises(ValueError, match="expected held_bytes of at least one body's 9; got 8"):
        Settings(body_bytes=9, held_bytes=8)


def test_settings_do_not_show_the_token():
    assert "a-secret" not in repr(Settings(token="a-secret"))
    for name in ("body_bytes", "image_pixels", "stall_seconds", "grace_seconds"):
        with pytest.raises(ValueError, match=name):
            Settings(**{name: 0})


def test_a_token_comes_from_a_file_and_one_that_others_read_is_told(started, tmp_path, capsys):
    file = tmp_path / "token"
    file.write_text("a-secret\n")
    file.chmod(0o644)
    line = ["serve", "x", "--host", "0.0.0.0", "--token-file", str(file)]
    assert cli.main(line) == 0
    assert started[-1].token == "a-secret"
    assert "chmod 600" in capsys.readouterr().err
    file.chmod(0o600)
    assert cli.main(line) == 0
    assert "chmod" not in capsys.readouterr().err
    file.write_text("")
    assert cli.main(line) == cli.BAD_INPUT
    assert cli.main([*line, "--token", "b"]) == cli.BAD_INPUT
    assert cli.main(["serve", "x", "--token-file", str(tmp_path / "none")]) == cli.BAD_INPUT
    assert len(started) == 2


def test_the_help_says_that_a_token_can_be_seen(capsys):
    with pytest.raises(SystemExit):
        cli.main(["serve", "--help"])
    assert "can see it" in " ".join(capsys.readouterr().out.split())


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ValueError, match=r"gato\[serve\]"):
        serve_metrics.Meter()


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("runs/arm", "arm"),
        ("runs/quickstart/model", "quickstart"),
        ("runs/quickstart/model/step-00000100", "quickstart"),
        ("runs/arm/best", "arm"),
        ("/", "gato"),
    ],
)
def test_a_model_is_called_by_its_run(folder, name):
    from gato.serve_commands import model_name

    assert model_name(Path(folder)) == name
