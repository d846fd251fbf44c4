"""Watching: the order of events, what ends it, what may be asked for, and that nothing is left."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import multiprocessing
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gato.checkpoint import build_model
from gato.config import TrainConfig
from gato.envs import gym as gym_suite
from gato.envs import registry
from gato.model_config import ModelConfig
from gato.rollouts import watch
from gato.rollouts.agent import Agent
from gato.rollouts.model_thread import ModelThread
from gato.rollouts.serve_limits import CLEANUP, Refused
from gato.rollouts.token_view import TokenView
from gato.rollouts.watching import WatchSettings
from gato.tokenizers.describe import describe
from gato.tokenizers.serializer import Serializer
from gato.tokenizers.task_codec import History
from gato.tokenizers.text import MODEL_FILE

TINY = ModelConfig(layers=1, width=16, heads=2, head_dim=8, ffn_width=32, context=64, qk_norm=True)
FAST = WatchSettings(watchers=1, frames_per_second=1000.0, steps_per_second=500.0)
KINDS = ("Drawn", "Undrawn", "Failing", "Slow")
TASKS = {kind: f"gym/watched:Watched{kind}-v0" for kind in KINDS}


@pytest.fixture(scope="module", autouse=True)
def _module() -> Iterator[None]:
    """Let the worlds be imported, here and in worker processes."""
    here = str(Path(__file__).parent)
    sys.path.insert(0, here)
    before = dict(gym_suite._modules)
    gym_suite.import_module("watched")
    yield
    sys.path.remove(here)
    gym_suite._modules.clear()
    gym_suite._modules.update(before)


def tiny(text_model: bytes, **history: Any) -> Agent:
    """Return an agent of random weights that knows the worlds, and one that nobody can start."""
    serializer = Serializer(None, {"text": {MODEL_FILE: text_model}})
    for task in TASKS.values():
        serializer.add_task(registry.spec(task), history=History(**history))
    foreign = replace(registry.spec(TASKS["Drawn"]), id="gym/not_imported:Evil-v0")
    serializer.add_task(foreign, history=History())
    torch.manual_seed(0)
    model = build_model(TrainConfig(TINY), serializer).eval()
    checkpoint = SimpleNamespace(
        path="nowhere", model=model, serializer=serializer, data={}, averaged=False
    )
    return Agent(checkpoint)


@pytest.fixture(scope="module")
def agent(text_model: bytes) -> Agent:
    return tiny(text_model)


@pytest.fixture(scope="module")
def model_thread(agent: Agent) -> Iterator[ModelThread]:
    thread = ModelThread(agent, rows=2, sessions=3)
    yield thread
    thread.close()


def make_app(thread: ModelThread, agent: Agent, settings: WatchSettings = FAST) -> Any:
    """Return an application of these routes alone."""
    from fastapi import FastAPI
    from starlette.responses import JSONResponse

    async def refuse(request: Any, refused: Any) -> JSONResponse:
        return JSONResponse(refused.to_json(), refused.status, refused.headers)

    app = FastAPI()
    app.add_exception_handler(Refused, refuse)
    app.include_router(watch.router(thread, agent, settings))
    return app


class Answer:
    """What an application sends, as it comes."""

    def __init__(self) -> None:
        self.status, self.headers = 0, {}
        self.parts: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.gone = asyncio.Event()

    async def events(self) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        rest = b""
        while (part := await asyncio.wait_for(self.parts.get(), 60)) is not None:
            rest += part
            *blocks, rest = rest.split(b"\n\n")
            for block in blocks:
                if not block.startswith(b":"):
                    kind, data = block.decode().split("\n", 1)
                    yield kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))

    async def json(self) -> Any:
        parts = []
        while (part := await self.parts.get()) is not None:
            parts.append(part)
        return json.loads(b"".join(parts))


@asynccontextmanager
async def ask(app: Any, method: str, path: str, body: Any = None) -> AsyncIterator[Answer]:
    """Ask an application as a client that goes away at the end."""
    answer = Answer()
    raw = [b"" if body is None else json.dumps(body).encode()]

    async def receive() -> dict[str, Any]:
        if raw:
            return {"type": "http.request", "body": raw.pop(), "more_body": False}
        await answer.gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            answer.status = message["status"]
            answer.headers = {k.decode(): v.decode() for k, v in message["headers"]}
        else:
            answer.parts.put_nowait(message.get("body", b""))
            if not message.get("more_body"):
                answer.parts.put_nowait(None)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "scheme": "http",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
        "server": ("127.0.0.1", 80),
        "client": ("127.0.0.1", 1),
        CLEANUP: [],
    }
    work = asyncio.ensure_future(app(scope, receive, send))
    try:
        while not answer.status and not work.done():
            await asyncio.sleep(0.005)
        yield answer
    finally:
        answer.gone.set()
        try:
            await work
        finally:
            for clean in scope[CLEANUP]:
                clean()


async def get(app: Any, method: str, path: str, body: Any = None) -> tuple[int, Any, Any]:
    """Return status, body and headers of a short answer."""
    async with ask(app, method, path, body) as answer:
        return answer.status, await answer.json(), answer.headers


Told = list[tuple[str, dict[str, Any]]]


async def told_until(answer: Answer, enough: Callable[[Told], bool]) -> Told:
    """Return the events up to the one with which it is enough, or the end."""
    found: Told = []
    async for event in answer.events():
        found.append(event)
        if enough(found):
            break
    return found


def count(kind: str, n: int) -> Callable[[Told], bool]:
    return lambda told: sum(k == kind for k, _ in told) >= n


def watching() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "watching"]


async def nothing_is_left(seconds: float = 10.0) -> None:
    """Wait until no worker process and no thread that watches is there."""
    end = time.monotonic() + seconds
    while multiprocessing.active_children() or watching():
        assert time.monotonic() < end, (multiprocessing.active_children(), watching())
        await asyncio.sleep(0.02)


def run(work: Awaitable[None]) -> None:
    asyncio.run(work)


# ---- events ----------------------------------------------------------------------------------


def test_episodes_follow_each_other_with_frames_tokens_and_scores(model_thread, agent):
    async def work() -> None:
        app = make_app(model_thread, agent)
        body = {"task": TASKS["Drawn"], "seed": 7, "rate": 400}
        async with ask(app, "POST", "/v1/watch", body) as answer:
            assert answer.status == 200
            assert answer.headers["content-type"].startswith("text/event-stream")
            told = await told_until(answer, count("episode", 2))
        kinds = [kind for kind, _ in told]
        assert kinds == ["start", "episode", "step", "step", "step", "episode"]
        start, first, *steps, second = [data for _, data in told]
        assert start["id"]
        assert (start["task"], start["measure"]) == (TASKS["Drawn"], "return")
        assert (first["episode"], first["seed"]) == (1, 7)
        assert (second["episode"], second["seed"]) == (2, 8)
        assert first["actions"] == ["left", "right", "wait"]
        assert [s["step"] for s in steps] == [1, 2, 3]
        assert [s["return"] for s in steps] == [1.0, 2.0, 3.0]
        assert [s["ended"] for s in steps] == [False, False, True]
        assert [s["success"] for s in steps] == [False, False, True]
        shades = [shade(data["frame"]) for data in (first, *steps)]
        assert np.abs(np.array(shades) - [0, 80, 160, 240]).max() <= 3
        await nothing_is_left()

    run(work())


def shade(uri: str) -> float:
    """Return the mean brightness of a frame."""
    head, body = uri.split(",")
    assert head == "data:image/jpeg;base64"
    picture = Image.open(io.BytesIO(base64.b64decode(body)))
    assert picture.size == (48, 64)
    return float(np.asarray(picture).mean())


@pytest.mark.parametrize("history", [{}, {"hide_actions": True, "joint": 2}])
def test_tokens_are_those_of_the_episode_one_after_another(text_model, history):
    knows = tiny(text_model, **history)
    view = TokenView(knows.serializer, TASKS["Drawn"])
    observation = {
        "place": np.array([0.5, -0.25], np.float32),
        "picture": np.full((16, 16, 3), 9, np.uint8),
    }
    tokens = view.step(observation, np.int64(2))
    read = knows.serializer.observation(
        TASKS["Drawn"], {"place": observation["place"], "picture": observation["picture"]}
    )
    seen = [t for t in tokens if not t["target"]]
    assert [(t["modality"], t["value"]) for t in seen] == [
        (t["modality"], t["value"]) for t in describe(knows.serializer, read)
    ]
    written = [t for t in tokens if t["target"]]
    assert [t["value"] for t in written] == [2]
    assert view.head() == describe(knows.serializer, knows.serializer.head(TASKS["Drawn"]))


def test_the_actions_told_are_those_of_a_policy(model_thread, agent):
    async def work() -> None:
        app = make_app(model_thread, agent)
        body = {"task": TASKS["Drawn"], "seed": 3, "rate": 400}
        async with ask(app, "POST", "/v1/watch", body) as answer:
            told = await told_until(answer, count("step", 3))
        actions = [data["action"] for kind, data in told if kind == "step"]
        positions = [t["position"] for k, d in told if k != "start" for t in d["tokens"]]
        assert positions == list(range(len(positions)))
        policy = agent.policy(TASKS["Drawn"], seeds=[3])
        env = registry.make(TASKS["Drawn"])
        observation, _ = env.reset(seed=3)
        expected = []
        for _ in range(3):
            expected.append(int(policy.select_action(observation)))
            observation, *_ = env.step(expected[-1])
        assert actions == expected
        await nothing_is_left()

    run(work())


def test_what_draws_nothing_shows_what_it_observes(model_thread, agent):
    async def work() -> None:
        body = {"task": TASKS["Undrawn"], "rate": 400}
        app = make_app(model_thread, agent)
        async with ask(app, "POST", "/v1/watch", body) as answer:
            told = await told_until(answer, count("step", 3))
        first = told[1][1]
        assert "draws no pictures" in first["fault"]
        picture = Image.open(io.BytesIO(base64.b64decode(first["frame"].split(",")[1])))
        assert picture.size == (16, 16)
        await nothing_is_left()

    run(work())


def test_frames_are_fewer_than_steps_where_steps_are_quick(model_thread, agent):
    async def work() -> None:
        app = make_app(model_thread, agent, replace(FAST, frames_per_second=0.1))
        async with ask(app, "POST", "/v1/watch", {"task": TASKS["Drawn"], "rate": 400}) as answer:
            told = await told_until(answer, count("step", 3))
        drawn = [data["frame"] is not None for kind, data in told if kind == "step"]
        assert drawn == [True, False, True]  # the first in ten seconds, and how it ended
        await nothing_is_left()

    run(work())


# ---- what ends it ----------------------------------------------------------------------------


def test_a_client_that_goes_away_ends_the_process_and_frees_its_place(model_thread, agent):
    async def work() -> None:
        app = make_app(model_thread, agent)
        body = {"task": TASKS["Slow"], "rate": 400}
        async with ask(app, "POST", "/v1/watch", body) as answer:
            await told_until(answer, count("step", 1))
            assert len(multiprocessing.active_children()) == 1
        await nothing_is_left()
        # sessions too: three is all that the model's thread has
        for _ in range(4):
            async with ask(app, "POST", "/v1/watch", body) as answer:
                assert answer.status == 200
            await nothing_is_left()

    run(work())


def test_a_failing_environment_ends_it_with_its_words(model_thread, agent):
    async def work() -> None:
        body = {"task": TASKS["Failing"], "rate": 400}
        async with ask(make_app(model_thread, agent), "POST", "/v1/watch", body) as answer:
            told = await told_until(answer, lambda told: False)
        assert [kind for kind, _ in told] == ["start", "episode", "step", "end"]
        assert "the floor gave way" in told[-1][1]["reason"]
        await nothing_is_left()

    run(work())


@pytest.mark.parametrize(
    ("bound", "paused", "reason"),
    [("idle_seconds", True, "paused for 0.3"), ("most_seconds", False, "watched for 0.3")],
)
def test_it_ends_where_nobody_goes_on_and_after_its_time(
    model_thread, agent, bound, paused, reason
):
    async def work() -> None:
        app = make_app(model_thread, agent, replace(FAST, **{bound: 0.3}))
        body = {"task": TASKS["Drawn"], "rate": 0.5, "paused": paused}
        async with ask(app, "POST", "/v1/watch", body) as answer:
            told = await told_until(answer, lambda told: False)
        assert told[-1][0] == "end"
        assert reason in told[-1][1]["reason"]
        await nothing_is_left()

    run(work())


def test_a_client_that_reads_nothing_is_gone_after_a_while(agent, model_thread, monkeypatch):
    async def work() -> None:
        channel = watch.Channel()
        for k in range(8):
            assert channel.put(("step", {"k": k}), 0.0)
        began = time.monotonic()
        assert not await asyncio.to_thread(channel.put, ("step", {}), 0.2)
        assert time.monotonic() - began >= 0.2
        assert (await channel.get(1.0)) == ("step", {"k": 0})
        assert channel.put(("step", {"k": 8}), 0.0)

    run(work())


# ---- going on --------------------------------------------------------------------------------


def test_it_pauses_steps_and_restarts(model_thread, agent):
    async def work() -> None:
        app = make_app(model_thread, agent)
        body = {"task": TASKS["Drawn"], "paused": True}
        async with ask(app, "POST", "/v1/watch", body) as answer:
            events = answer.events()
            id = (await anext(events))[1]["id"]
            assert (await anext(events))[0] == "episode"

            async def change(**wanted: Any) -> Any:
                status, body, _ = await get(app, "POST", f"/v1/watch/{id}", wanted)
                assert status == 200, body
                return body

            await asyncio.sleep(0.2)
            assert answer.parts.empty()
            assert (await change(steps=2))["paused"]
            assert [(await anext(events))[1]["step"] for _ in range(2)] == [1, 2]
            await asyncio.sleep(0.2)
            assert answer.parts.empty()
            await change(restart=41)
            kind, begun = await anext(events)
            assert (kind, begun["seed"]) == ("episode", 41)
            assert (await change(paused=False, rate=300)) == {
                "task": TASKS["Drawn"],
                "paused": False,
                "rate": 300.0,
            }
            assert [(await anext(events))[1]["step"] for _ in range(3)] == [1, 2, 3]
        await nothing_is_left()
        status, _, _ = await get(app, "POST", f"/v1/watch/{id}", {"paused": True})
        assert status == 404

    run(work())


def test_the_rate_is_kept(model_thread, agent):
    async def work() -> None:
        body = {"task": TASKS["Drawn"], "rate": 10}
        async with ask(make_app(model_thread, agent), "POST", "/v1/watch", body) as answer:
            events, times = answer.events(), []
            async for kind, _ in events:
                if kind in ("episode", "step"):
                    times.append(time.monotonic())
                if len(times) == 4:
                    break
        assert np.diff(times).min() > 0.05
        assert 0.27 < times[-1] - times[0] < 5.0
        await nothing_is_left()

    run(work())


# ---- what may be asked for -------------------------------------------------------------------


def test_tasks_are_those_of_the_checkpoint_with_their_scores(model_thread, agent):
    async def work() -> None:
        status, body, _ = await get(make_app(model_thread, agent), "GET", "/v1/tasks")
        assert status == 200
        tasks = {task["id"]: task for task in body["data"]}
        assert set(tasks) == set(agent.tasks)
        drawn = tasks[TASKS["Drawn"]]
        assert drawn["installed"] is True
        assert {"measure", "random_score", "expert_score", "score_source"} <= drawn.keys()
        assert drawn["rate"] == 20.0
        foreign = tasks["gym/not_imported:Evil-v0"]
        assert not foreign["installed"]
        assert "--import not_imported" in foreign["fault"]
        assert body["watch"]["watchers"] == FAST.watchers

    run(work())


def test_one_more_than_may_watch_is_told_to_come_again(model_thread, agent):
    async def work() -> None:
        app = make_app(model_thread, agent)
        body = {"task": TASKS["Drawn"], "paused": True}
        async with ask(app, "POST", "/v1/watch", body) as answer:
            await told_until(answer, count("episode", 1))
            status, told, headers = await get(app, "POST", "/v1/watch", body)
            assert status == 429
            assert told["error"]["type"] == "rate_limit_error"
            assert headers["retry-after"] == "1"
        await nothing_is_left()
        async with ask(app, "POST", "/v1/watch", body) as answer:
            assert answer.status == 200
        await nothing_is_left()

    run(work())


def test_sessions_of_others_count_as_well(agent, model_thread):
    async def work() -> None:
        held = [model_thread.open_session(TASKS["Drawn"]) for _ in range(3)]
        try:
            app = make_app(model_thread, agent)
            status, *_ = await get(app, "POST", "/v1/watch", {"task": TASKS["Drawn"]})
            assert status == 429
        finally:
            for session in held:
                model_thread.close_session(session)
        assert not multiprocessing.active_children()

    run(work())


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"task": "atari/Pong-v5"}, 404, "expected one of the tasks"),
        ({"task": "gym/os:Evil-v0"}, 404, "expected one of the tasks"),
        ({"task": "gym/not_imported:Evil-v0"}, 400, "--import not_imported"),
        ({"task": ["a"]}, 404, "expected one of the tasks"),
        ({}, 400, "task"),
        ([], 400, "expected an object"),
        ({"task": TASKS["Drawn"], "seed": -1}, 400, "seed"),
        ({"task": TASKS["Drawn"], "seed": True}, 400, "seed"),
        ({"task": TASKS["Drawn"], "rate": 0}, 400, "rate"),
        ({"task": TASKS["Drawn"], "rate": 1e9}, 400, "rate"),
        ({"task": TASKS["Drawn"], "temperature": "warm"}, 400, "temperature"),
        ({"task": TASKS["Drawn"], "temperatur": 1}, 400, "temperatur"),
    ],
)
def test_what_is_wrong_is_refused_and_starts_nothing(model_thread, agent, body, status, words):
    async def work() -> None:
        found, told, _ = await get(make_app(model_thread, agent), "POST", "/v1/watch", body)
        assert found == status
        assert words in told["error"]["message"]
        assert not multiprocessing.active_children()
        assert "not_imported" not in sys.modules

    run(work())


def test_what_is_wrong_changes_nothing(model_thread, agent):
    async def work() -> None:
        app = make_app(model_thread, agent)
        body = {"task": TASKS["Drawn"], "paused": True}
        async with ask(app, "POST", "/v1/watch", body) as answer:
            id = (await told_until(answer, count("start", 1)))[0][1]["id"]
            for wanted in ({"paused": 1}, {"rate": "fast"}, {"steps": 0}, {"stop": True}):
                status, *_ = await get(app, "POST", f"/v1/watch/{id}", wanted)
                assert status == 400, wanted
            status, told, _ = await get(app, "POST", f"/v1/watch/{id}", {})
            assert (status, told["paused"], told["rate"]) == (200, True, 20.0)
        await nothing_is_left()

    run(work())
