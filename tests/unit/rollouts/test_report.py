"""The page of an evaluation: whole, well-formed, alone, and with the films that there are."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser

import av
import numpy as np
import pytest

from gato.envs.episode import EVALUATION_SEED_START
from gato.rollouts import video
from gato.rollouts.agent import Agent
from gato.rollouts.compare import compare
from gato.rollouts.evaluate import evaluate
from gato.rollouts.report import comparison_report, report
from gato.rollouts.runner import Job, Played
from gato.rollouts.video import Clip, Recorder, clip, film, write_clips

from .conftest import Made
from .test_evaluate import TASKS, Knows, break_at

VOID = {"meta", "link", "br"}


class Drawn(Made):
    """A made-up world with pictures: grey that follows what is left, larger than is shown."""

    render_mode = "rgb_array"

    def render(self) -> np.ndarray:
        return np.full((301, 520, 3), 30 * (self.left % 9), np.uint8)


class Page(HTMLParser):
    """Reads a page strictly: every element is closed, in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def all(self, tag: str) -> Iterator[dict[str, str | None]]:
        return (attributes for name, attributes in self.elements if name == tag)

    @property
    def bars(self) -> list[str | None]:
        return [a["data-task"] for a in self.all("svg") if a.get("class") == "task"]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def require_alone(page: str) -> None:
    """Fail for anything that a browser would fetch."""
    parsed = Page(page)
    for _, attributes in parsed.elements:
        for name in ("src", "href", "poster", "data", "srcset", "action"):
            assert (attributes.get(name) or "data:").startswith("data:"), attributes
    assert not re.search(r"https?:|@import|url\(|//[a-z]", re.sub(r"base64,[^\"]*", "", page))
    assert not list(parsed.all("script"))


@pytest.fixture
def played(suite, agent: Agent) -> tuple[dict, Recorder]:
    suite.make = Drawn
    break_at(suite, EVALUATION_SEED_START + 2)
    recorder = Recorder()
    return evaluate(agent, TASKS, 4, workers=0, recorder=recorder), recorder


def test_the_page_shows_every_task_and_stands_alone(played) -> None:
    result, recorder = played
    result["checkpoint"] = "<script>alert(1)</script> & co"
    clips = film(recorder)
    written = report(result, clips)
    require_alone(written)
    page = Page(written)
    assert page.bars == TASKS
    labels = [a["aria-label"] for a in page.all("svg") if a.get("class") == "task"]
    shown = result["tasks"][TASKS[0]]["expert_normalised"]
    assert f"{100 * shown:.0f}% of expert" in labels[0]
    assert "no score" in labels[2]
    assert [a["data-task"] for a in page.all("video")] == TASKS
    assert "<script>alert(1)</script> & co" in page.text, "shown as text"
    assert written.count('<b class="bad">1</b>') == 3, "each task has a failed episode"
    assert "No intervals: they need 5 episodes of each task or more" in page.text
    assert 'class="band"' not in written
    for word in ("made/worse-v0: the expert (2) is no better", "the arm fell off", "numpy"):
        assert word in page.text
    assert {"lang": "en"} in list(page.all("html"))
    assert all(a.get("aria-label") for a in page.all("svg") if a.get("role") == "img")
    assert "prefers-color-scheme: dark" in written
    assert "@media print" in written


def test_the_page_is_written_where_nothing_can_be_drawn(suite, agent: Agent) -> None:
    recorder = Recorder()
    result = evaluate(agent, TASKS[:1], 2, workers=0, recorder=recorder)
    page = Page(report(result, film(recorder)))
    assert not list(page.all("video"))
    assert "no video: ValueError: the environment of 'made/count-v0' draws no pictures" in page.text
    assert "None: install it" in Page(report(result, (), "install it")).text
    nothing = Page(report(evaluate(agent, TASKS[2:], 2, workers=0)))
    assert nothing.bars == TASKS[2:]


def test_enough_episodes_have_intervals(suite, agent: Agent) -> None:
    written = report(evaluate(agent, TASKS[:2], 5, workers=0))
    assert 'class="band"' in written
    assert "The band is the 95% interval." in written
    assert "No intervals" not in written
    assert 'class="bad"' not in written, "none has failed"


@pytest.mark.parametrize("who", ["model", "expert", "random"])
def test_filming_changes_no_episode_and_shows_that_one(suite, agent: Agent, who: str) -> None:
    suite.make, suite.expert = Drawn, Follows
    player = agent if who == "model" else who
    recorder = Recorder(per_task=2)
    with_video = evaluate(player, TASKS[:2], 6, workers=0, recorder=recorder)
    without = evaluate(player, TASKS[:2], 6, workers=0)
    for result in (with_video, without):
        del result["seconds"], result["speed"]
    assert with_video == without
    clips = film(recorder)
    start = EVALUATION_SEED_START
    assert [(c.task, c.seed) for c in clips] == [(t, start + i) for t in TASKS[:2] for i in (0, 1)]
    for one, played in zip(clips, recorder.episodes, strict=True):
        assert not one.fault
        assert "played again" not in one.about, "the same return"
        with av.open(io.BytesIO(one.webm)) as container:
            frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
        assert frames[0].shape == (one.height, one.width, 3) == (150, 260, 3)
        assert len(frames) == played.length + 1
        left = [3 + one.seed % 6 - step for step in range(played.length + 1)]
        assert [f.mean() for f in frames] == pytest.approx([30 * n for n in left], abs=4)


class Follows(Knows):
    """An expert of the plain made-up worlds."""

    def act(self, env, observation):
        return np.int64(1) if self.spec.measure == "return" else np.zeros(2, np.float32)


def test_a_clip_is_short_whatever_the_episode(suite) -> None:
    assert video._pace(500, 80.0) == (9, 9)  # Meta-World: all of it, in real time
    assert video._pace(64, 1.0) == (1, 6)  # turn by turn: FRAMES of them
    assert video._pace(27_000, 15.0) == (10, 6)  # a game: its first steps, FASTEST
    assert video._pace(1, 80.0) == (1, 20)
    suite.make = Drawn
    job = Job(TASKS[0], 5)
    short = clip(Played(job, score=99.0, length=8, actions=[np.int64(0)] * 8))
    assert "played again, it returned 8" in short.about
    assert clip(Played(job)).fault == "the episode ended before its first step"


def test_a_clip_of_an_episode_that_failed_ends_there(suite, agent: Agent) -> None:
    suite.make = Drawn
    break_at(suite, EVALUATION_SEED_START)
    recorder = Recorder()
    evaluate(agent, TASKS[:1], 1, workers=0, recorder=recorder)
    (one,) = film(recorder)
    assert one.webm
    assert not one.fault


def test_no_graphics_is_said_with_the_backends(suite, monkeypatch) -> None:
    def fails(self):
        raise RuntimeError("Cannot initialize a EGL device display")

    suite.make, suite.PACKAGES = Drawn, ("mujoco",)
    monkeypatch.setattr(Drawn, "render", fails)
    monkeypatch.setattr(video, "explain", lambda error: ValueError(f"{error}; tried egl, osmesa"))
    one = clip(Played(Job(TASKS[0], 5), actions=[np.int64(0)] * 8))
    assert one.webm is None
    assert one.fault.endswith("Cannot initialize a EGL device display; tried egl, osmesa")


def test_a_missing_library_is_named(suite, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match=r'pip install "gato\[video\]"'):
        video.require_av()
    assert "gato[video]" in clip(Played(Job(TASKS[0], 5), actions=[np.int64(0)])).fault


HANGS = """
import time
import gymnasium
from gymnasium.envs.classic_control import CartPoleEnv

class Hangs(CartPoleEnv):
    def render(self):
        time.sleep(60)

gymnasium.register("Hangs-v0", Hangs)
"""


def test_a_renderer_that_hangs_is_ended(tmp_path, monkeypatch) -> None:
    (tmp_path / "hanging_film.py").write_text(HANGS)
    monkeypatch.syspath_prepend(tmp_path)
    job = Job("gym/hanging_film:Hangs-v0", 5)
    recorder = Recorder(episodes=[Played(job, length=1, actions=[np.int64(0)])])
    (one,) = film(recorder, workers=2, timeout=3.0)
    assert one.fault == "worker process was ended: nothing came of it in 3 s"


def test_files_are_named_by_task_and_seed(tmp_path) -> None:
    task = "metaworld/push-v3?camera=corner2&size=80x64"
    clips = [Clip(task, 7, b"film"), Clip("a/b", 1, fault="none")]
    (path,) = write_clips(clips, tmp_path)
    assert path == tmp_path / "metaworld" / "push-v3,camera-corner2,size-80x64-7.webm"
    assert path.read_bytes() == b"film"


def test_the_page_of_a_comparison(played) -> None:
    result, _ = played
    other = {**result, "checkpoint": "<b>other</b>", "versions": {"numpy": "0"}}
    written = comparison_report(compare({"a.json": result, "b.json": other, "c.json": result}))
    require_alone(written)
    page = Page(written)
    assert page.bars == TASKS
    assert len(list(page.all("rect"))) == 3 * 2, "of both tasks with a score"
    assert "<b>other</b>" in page.text
    assert "versions differ in numpy" in page.text
