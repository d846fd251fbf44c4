"""Imports: whole or not there, the same bytes whatever interrupts them, nothing left out unsaid."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from PIL import Image

from gato import cli
from gato.data_commands import require_task, with_imports
from gato.envs.episode import Episode, TaskSpec
from gato.envs.files import stores_below
from gato.envs.readers import formats, importing
from gato.envs.readers.reader import BadItem, ReadOptions, Source
from gato.envs.store import EpisodeStore, open_store

TASKS = ("toy/one", "toy/two")
STEPS = 5


def spec(task: str) -> TaskSpec:
    """Return a task of two numbers."""
    box = spaces.Box(-1, 1, (2,), np.float32)
    return TaskSpec(task, box, box, max_steps=STEPS, control_hz=10.0, instruction=f"do {task}")


def episode(number: int, task: str = "", width: int = 2) -> Episode:
    """Return a random episode."""
    rng = np.random.default_rng(number)
    ends = np.arange(STEPS) == STEPS - 1
    return Episode(
        task=task or TASKS[number % len(TASKS)],
        observations={"observation": rng.uniform(-1, 1, (STEPS + 1, 2)).astype(np.float32)},
        actions={"action": rng.uniform(-1, 1, (STEPS, width)).astype(np.float32)},
        rewards=np.ones(STEPS, np.float32),
        terminated=ends,
        truncated=np.zeros(STEPS, bool),
        seed=number,
    )


def source(items: list[Any], location: str = "somewhere", tasks: tuple[str, ...] = TASKS) -> Source:
    """Return a source of these items."""
    return Source(
        "toy",
        location,
        "episodes",
        lambda: iter(items),
        {t: spec(t) for t in tasks},
        len(items) if isinstance(items, list) else None,
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Register a reader of folders with a file ``toy``; return what it gives and has done."""
    state: dict[str, Any] = {"items": [episode(i) for i in range(6)], "opened": 0}

    def opened(location: str, options: ReadOptions) -> Source:
        state["opened"] += 1
        return source(state["items"], location)

    reader = SimpleNamespace(
        FORMAT="toy",
        EXTRA="readers",
        recognises=lambda location: (Path(location) / "toy").exists(),
        open_source=opened,
    )
    monkeypatch.setitem(sys.modules, "toy_reader_of_tests", reader)
    monkeypatch.setitem(formats.READERS, "toy", "toy_reader_of_tests")
    return state


def test_a_store_per_task_as_collect_lays_them_out(tmp_path):
    summary = importing.import_source(source([episode(i) for i in range(7)]), tmp_path / "out")
    assert summary.stores == [tmp_path / "out" / "toy" / "one", tmp_path / "out" / "toy" / "two"]
    assert (summary.kept, summary.steps) == (7, 7 * STEPS)
    assert [len(EpisodeStore(s)) for s in summary.stores] == [4, 3]
    assert EpisodeStore(summary.stores[1]).seeds.tolist() == [1, 3, 5]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_many_tasks_in_turn_are_written_with_few_open(tmp_path, monkeypatch):
    monkeypatch.setattr(importing, "OPEN_WRITERS", 2)
    tasks = tuple(f"toy/{i}" for i in range(5))
    items = [episode(i, tasks[i % 5]) for i in range(15)]
    importing.import_source(source(items, tasks=tasks), tmp_path / "few")
    monkeypatch.setattr(importing, "OPEN_WRITERS", 8)
    importing.import_source(source(items, tasks=tasks), tmp_path / "many")
    assert contents(tmp_path / "few") == contents(tmp_path / "many")


def test_the_first_bad_item_is_named_and_nothing_is_left(tmp_path):
    bad = BadItem("a file, line 3", "it is blue")
    with pytest.raises(ValueError, match=r"a file, line 3: it is blue\. Leave such items out: --"):
        importing.import_source(source([episode(0), bad]), tmp_path / "out")
    with pytest.raises(ValueError, match=r"item 1: expected 'action' of shape \(5, 2\).*\(5, 3\)"):
        importing.import_source(source([episode(0), episode(1, width=3)]), tmp_path / "out")
    with pytest.raises(ValueError, match="expected an episode of toy/one; got one of 'toy/two'"):
        importing.import_source(source([episode(0), episode(1)], tasks=TASKS[:1]), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_bad_items_are_counted_by_reason_with_the_first_place(tmp_path):
    items = [BadItem("line 1", "blue"), episode(0), BadItem("line 3", "blue"), BadItem("x", "red")]
    summary = importing.import_source(source(items), tmp_path / "out", skip_bad=True)
    told = summary.to_json()
    assert told["skipped"] == [
        {"reason": "blue", "items": 2, "first": "line 1"},
        {"reason": "red", "items": 1, "first": "x"},
    ]
    assert summary.stores == [tmp_path / "out" / "toy" / "one"]  # of the other task nothing came
    kept = json.loads((summary.stores[0] / importing.ORIGIN).read_text())
    assert kept["skipped"] == told["skipped"]
    assert kept["format"] == "toy"
    with pytest.raises(ValueError, match=r"got none of 1. The first, x: red"):
        importing.import_source(source(items[-1:]), tmp_path / "none", skip_bad=True)


def test_a_limit_stops_reading(toy, tmp_path):
    def endless() -> Iterator[Any]:
        number = 0
        while True:
            yield episode(number)
            number += 1

    toy["items"] = endless()
    (tmp_path / "toy").touch()
    opened = formats.open_source(tmp_path, options=ReadOptions(limit=4))
    done: list[tuple[int, int | None]] = []
    summary = importing.import_source(
        opened, tmp_path / "out", progress=lambda n, of: done.append((n, of))
    )
    assert summary.kept == 4
    assert done == [(n, 4) for n in range(1, 5)]


def test_the_same_import_again_replaces_and_another_is_refused(tmp_path):
    importing.import_source(source([episode(0)]), tmp_path / "out")
    importing.import_source(source([episode(0), episode(2)]), tmp_path / "out")
    assert len(EpisodeStore(tmp_path / "out" / "toy" / "one")) == 2
    beside = source([episode(1)], "another place", tasks=TASKS[1:])
    importing.import_source(beside, tmp_path / "out")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="something else is there"):
        importing.import_source(source([episode(0)], "elsewhere"), tmp_path / "out")
    assert contents(tmp_path) == before
    (tmp_path / "mine" / "toy" / "one").mkdir(parents=True)
    (tmp_path / "mine" / "toy" / "one" / "notes.txt").write_text("precious")
    with pytest.raises(ValueError, match="expected nothing at"):
        importing.import_source(source([episode(0)]), tmp_path / "mine")
    assert (tmp_path / "mine" / "toy" / "one" / "notes.txt").read_text() == "precious"


@pytest.mark.parametrize("task", ["../../evil", "toy/../../evil", "/etc/evil", "toy//x", ""])
def test_a_task_named_by_the_data_does_not_lead_out_of_the_folder(tmp_path, task):
    with pytest.raises(ValueError, match="expected a task's id"):
        importing.import_source(
            source([episode(0, task or "toy/one")], tasks=(task,)), tmp_path / "a" / "out"
        )
    assert contents(tmp_path) == {}


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import test_importing as t
from pathlib import Path
from gato.envs.readers import importing
when = {when!r}
def kill(*_): os.kill(os.getpid(), signal.SIGKILL)
if when == "publish":
    importing.publish = kill
elif when == "half":
    real, Path.replace = Path.replace, lambda a, b: (real(a, b), "old" in str(b) and kill())[0]
progress = lambda n, of: n == when and kill()
importing.import_source(t.source([t.episode(i) for i in range(8)]), {out!r}, progress=progress)
"""


@pytest.mark.parametrize("when", [5, "publish", "half"])
def test_a_killed_import_leaves_no_half_store_and_is_made_anew(tmp_path, when):
    out = tmp_path / "stores" / "out"
    if when == "half":  # killed while a store is replaced
        importing.import_source(source([episode(i) for i in range(2)]), out)
    tests = str(Path(__file__).parent)
    script = KILLED.format(tests=tests, when=when, out=str(out))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    left = stores_below(tmp_path / "stores")
    assert [len(open_store(folder)) for folder in left] == ([1] if when == "half" else [])
    items = [episode(i) for i in range(8)]
    importing.import_source(source(items), out)
    importing.import_source(source(items), tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")
    assert sorted(p.name for p in (tmp_path / "stores").iterdir()) == ["out"]


def test_what_the_source_no_longer_has_goes(tmp_path):
    out = tmp_path / "out"
    beside = source([episode(0, "toy/else")], "another place", tasks=("toy/else",))
    importing.import_source(beside, out)
    importing.import_source(source([episode(i) for i in range(4)]), out)
    assert sorted(p.name for p in (out / "toy").iterdir()) == ["else", "one", "two"]
    importing.import_source(source([episode(0)], tasks=TASKS[:1]), out)
    assert sorted(p.name for p in (out / "toy").iterdir()) == ["else", "one"]


REPLACED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import test_importing as t
from pathlib import Path
from gato.envs.readers import importing
left, real, publish = {call!r}, Path.replace, importing.publish
def replace(a, b):
    global left
    left -= 1
    if left == 0:
        if {interrupt!r}:
            raise KeyboardInterrupt
        os.kill(os.getpid(), signal.SIGKILL)
    return real(a, b)
def published(*told):
    Path.replace = replace
    return publish(*told)
importing.publish = published
importing.import_source(t.source(t.newer(), tasks=t.NEWER), {out!r})
"""
NEWER = ("toy/one", "toy/two", "toy/new")


def newer() -> list[Episode]:
    return [*(episode(i) for i in range(8)), episode(9, "toy/new")]


@pytest.mark.parametrize("interrupt", [False, True])
@pytest.mark.parametrize("call", range(1, 8))
def test_stores_that_are_replaced_are_old_or_new_whenever_it_is_killed(tmp_path, call, interrupt):
    """The calls: the plan; two stores away and the new ones there; a new one; a stale one."""
    out, tasks = tmp_path / "stores" / "out", (*TASKS, "toy/gone")
    older = [*(episode(i) for i in range(2)), episode(2, "toy/gone")]
    for place in (out, tmp_path / "old"):
        importing.import_source(source(older, tasks=tasks), place)
    importing.import_source(source(newer(), tasks=NEWER), tmp_path / "new")
    tests = str(Path(__file__).parent)
    script = REPLACED.format(tests=tests, call=call, out=str(out), interrupt=interrupt)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60)
    assert done.returncode == -(signal.SIGINT if interrupt else signal.SIGKILL), done.stderr
    if not interrupt:
        with pytest.raises(ValueError, match="something else is there"):
            importing.import_source(source([episode(0)], "elsewhere"), out)
    wanted = tmp_path / ("old" if call == 1 else "new")
    assert contents(out) == contents(wanted)
    assert [p.name for p in (tmp_path / "stores").iterdir()] == ["out"]


def test_an_interrupt_cleans_up(tmp_path):
    def stop(number: int, of: int | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        importing.import_source(source([episode(0)]), tmp_path / "out", progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_two_imports_to_one_place(tmp_path):
    def second(number: int, of: int | None) -> None:
        with pytest.raises(ValueError, match="is being written by another process"):
            importing.import_source(source([episode(0)]), tmp_path / "out")

    importing.import_source(source([episode(0)]), tmp_path / "out", progress=second)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep the cache inside the test."""
    monkeypatch.setenv("GATO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_cache_is_filled_once_and_anew_when_the_data_change(toy, cache, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "toy").write_text("1")
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(importing.cached(data))) for _ in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert len(found) == 3
    assert toy["opened"] == 1
    assert found[0].is_relative_to(cache)
    assert importing.cached(data, ReadOptions(limit=2)) != found[0]
    os.utime(data / "toy", ns=(1, 1))
    assert importing.cached(data) != found[0]
    assert toy["opened"] == 3
    assert [p.name[0] for p in (cache / "imports").iterdir()] == ["d"] * 3  # nothing unfinished


@pytest.mark.parametrize("form", ["chat", "coco", "vqa"])
def test_pictures_beside_a_file_are_watched(form, cache, tmp_path):
    root = tmp_path / "deep" / "data"
    text = root / "annotations" / ("captions_a.json" if form == "coco" else "a.json")
    picture = root / ("annotations/a.png" if form == "chat" else "pictures/train/a.png")
    for file in (text, picture, root / "other" / "notes.txt"):
        file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), "red").save(picture)
    if form == "chat":
        said = [{"type": "image_url", "image_url": {"url": "a.png"}}]
        talk = [{"role": "user", "content": said}, {"role": "assistant", "content": "red"}]
        text.write_text(json.dumps([{"messages": talk}]))
    elif form == "coco":
        picture = picture.rename(root / "a.png")
        told = {"images": [{"id": 1, "file_name": "a.png"}]}
        text.write_text(json.dumps({**told, "annotations": [{"image_id": 1, "caption": "red"}]}))
    else:
        picture = picture.rename(root / "annotations" / "a.png")
        text.write_text(json.dumps([{"image": "a.png", "question": "what?", "answer": "red"}]))
    first = importing.cached(text)
    assert importing.cached(text) == first
    (root / "other" / "notes.txt").write_text("no picture")
    assert importing.cached(text) == first
    Image.new("RGB", (16, 16), "blue").save(picture)
    os.utime(picture, ns=(5, 5))
    second = importing.cached(text)
    assert second != first
    (text.parent / "answers.json").write_text("{}")
    assert importing.cached(text) != second


def test_training_takes_data_of_another_format(toy, cache, tmp_path, capsys, monkeypatch):
    data = tmp_path / "data"
    data.mkdir()
    (data / "toy").touch()
    command = ["train", "quickstart", "--data", f"mine={data}", "--out", str(tmp_path / "run")]
    small = ["--model.layers", "1", "--model.width", "32", "--model.heads", "2"]
    small += ["--model.head_dim", "16", "--model.ffn_width", "64", "--model.context", "96"]
    small += ["--rows", "2", "--text_pieces", "280", "--steps", "2"]
    assert cli.main([*command, *small]) == 0, capsys.readouterr().err
    config = json.loads((tmp_path / "run" / "step-00000002" / "config.json").read_text())
    assert str(cache) in json.dumps(config)
    toy["items"][2] = episode(2, width=3)  # its action space has changed
    (data / "toy").write_text("changed")
    assert cli.main([*command[:-1], str(tmp_path / "other"), *small]) == cli.BAD_INPUT
    assert "item 2: expected 'action' of shape (5, 2)" in capsys.readouterr().err
    assert cli.main([*command[:-1], str(tmp_path / "other"), *small, "--skip-bad"]) == 0
    assert f"{data}: left out 1: expected 'action' of shape (5, 2)" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")  # of several processes the first says it
    with_imports([str(data)], skip_bad=True)
    assert "left out" not in capsys.readouterr().err
    monkeypatch.setenv("RANK", "0")
    with_imports([str(data)], skip_bad=True)
    assert "left out" in capsys.readouterr().err
    assert cli.main(["train", "quickstart", "--data", "a=/nowhere"]) == cli.BAD_INPUT
    assert "/nowhere" in capsys.readouterr().err


def test_formats_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"a format of .*got 'minary' \(closest: minari\)"):
        formats.open_source(tmp_path, "minary")
    with pytest.raises(ValueError, match=r"closest: lerobot"):
        formats.export([], "lerobo", tmp_path / "out")
    with pytest.raises(ValueError, match="If it is one of these, name it: --format"):
        formats.open_source(tmp_path)
    with pytest.raises(ValueError, match="expected a limit"):
        formats.open_source(tmp_path, options=ReadOptions(limit=-1))


@pytest.mark.parametrize("name", formats.READERS)
def test_every_reader_keeps_its_promise(name, tmp_path):
    reader = formats._module(formats.READERS, name)
    assert name == reader.FORMAT
    assert isinstance(reader.EXTRA, str)
    assert reader.recognises(str(tmp_path)) is False
    assert reader.recognises(str(tmp_path / "nothing")) is False
    with pytest.raises((ValueError, OSError)):
        list(formats.open_source(tmp_path / "nothing", name).read())


@pytest.mark.parametrize("name", list(formats.READERS))
@pytest.mark.parametrize(
    ("option", "given"),
    [("split", "test"), ("columns", {"a": "b"}), ("image_size", (16, 16)), ("clip_actions", True)],
)
def test_an_option_that_a_reader_ignores_is_refused(name, option, given, tmp_path, monkeypatch):
    told: dict[str, Any] = {}
    reader = importlib.import_module(formats.READERS[name])
    monkeypatch.setattr(reader, "open_source", lambda place, options: told.update(at=place) or 1)
    options = ReadOptions(**{option: given})
    if option in getattr(reader, "IGNORES", ()):
        wanted = f"--{option.replace('_', '-')} means nothing to format '{name}'"
        with pytest.raises(ValueError, match=wanted):
            formats.open_source(tmp_path, name, options)
        assert not told
    else:
        with pytest.raises(TypeError):  # it was asked, and gave no source
            formats.open_source(tmp_path, name, options)
        assert told


@pytest.mark.parametrize("late", [False, True])
def test_a_missing_package_names_the_extra(toy, tmp_path, late):
    def fails() -> Iterator[Any]:
        raise ImportError("No module named 'toyread'")
        yield

    def opened(location: str, options: ReadOptions) -> Source:
        if late:
            return Source("toy", location, "episodes", fails)
        raise ImportError("No module named 'toyread'")

    sys.modules["toy_reader_of_tests"].open_source = opened
    with pytest.raises(ValueError, match=r'toyread.*pip install "gato\[readers\]"'):
        list(formats.open_source(tmp_path, "toy").read())


def test_the_commands_tell_what_they_did(toy, tmp_path, capsys):
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    (data / "toy").touch()
    toy["items"][3] = BadItem("line 4", "it is blue")
    assert cli.main(["data", "validate", str(data)]) == cli.BAD_INPUT
    assert "1 of 6 items; line 4: it is blue" in capsys.readouterr().err
    command = ["data", "import", str(data), "--out", str(out)]
    assert cli.main(command) == cli.BAD_INPUT
    assert "line 4: it is blue" in capsys.readouterr().err
    assert cli.main([*command, "--skip-bad"]) == 0
    said = capsys.readouterr().out
    assert "left out 1: it is blue (first: line 4)" in said
    assert str(out / "toy" / "one") in said
    assert cli.main(["data", "info", str(data), str(out), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    stores, foreign = rows[:2], rows[2]
    assert foreign["items"] == 6
    assert foreign["notes"] == ["line 4: it is blue"]
    assert foreign["tasks"]["toy/one"]["actions"] == {"action": "float32 (2,) in [-1, 1]"}
    # two numbers seen, a separator and two numbers done: 5 tokens a step
    assert [row["tokens"] for row in stores] == [3 * STEPS * 5, 2 * STEPS * 5]
    assert [row["hours"] for row in stores] == [3 * STEPS / 36000, 2 * STEPS / 36000]
    assert foreign["tokens"] == 6 * STEPS * 5
    assert stores[0]["tasks"] == {"toy/one": foreign["tasks"]["toy/one"]}
    assert cli.main(["data", "info", str(data)]) == 0
    assert "toy/two: do toy/two" in capsys.readouterr().out
    assert cli.main(["data"]) == 0
    assert "import" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--image-size", "32"], "argument --image-size: expected WIDTHxHEIGHT"),
        (["--columns", "text"], "expected OURS=THEIRS,...; got text"),
        (["--limit", "-1"], "expected a whole number, 0 or more"),
    ],
)
def test_bad_options_are_one_sentence(tmp_path, capsys, given, told):
    command = ["data", "import", str(tmp_path), "--out", str(tmp_path / "out"), *given]
    assert cli.main(command) == cli.BAD_INPUT
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(("task", "fits"), [("gym/Pendulum-v1", False), ("toy/mine", True)])
def test_data_under_the_id_of_a_task_have_its_spaces(task, fits):
    if fits:
        require_task(spec(task))
        return
    with pytest.raises(ValueError, match=r"observations of 'gym/Pendulum-v1'.*\(3,\).*\(2,\)"):
        require_task(spec(task))
