"""Live episodes over HTTP: the agent plays, and who watches sees the frames and the tokens.

    GET  /v1/tasks        the tasks of the checkpoint, with their scores
    POST /v1/watch        plays one, episode after episode, as server-sent events:

        start     {id, task, instruction, measure, random_score, expert_score, ...}
        episode   {episode, seed, frame, tokens, actions}       before its first step
        step      {step, frame, tokens, action, reward, return, success, ended, ...}
        end       {reason}

    POST /v1/watch/{id}   {"paused", "rate", "steps", "restart"}: of one that is being watched

The simulator runs in a process of its own, which ends with the stream. Only tasks are played that
the checkpoint knows and the registry has.
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gato.envs import gym, registry
from gato.envs.episode import TaskSpec
from gato.rollouts.agent import Agent
from gato.rollouts.model_thread import Busy, ModelThread
from gato.rollouts.sampling import check_sampling
from gato.rollouts.serve_json import Fields, strict_json
from gato.rollouts.serve_limits import CLEANUP, EVENT_STREAM, Refused, busy, no_task
from gato.rollouts.watching import MAX_SEED, Asked, Channel, Watching, WatchSettings

if TYPE_CHECKING:
    from fastapi import APIRouter
    from starlette.requests import Request
    from starlette.responses import Response

Endpoint = Callable[["Request"], Awaitable["Response"]]
RATES = (5.0, 30.0)
"""Steps a second that a task is shown at, unless told otherwise: its own, between these."""
ALIVE_SECONDS = 10.0
"""Silence after which a comment is sent, so that nothing on the way closes the stream."""
MAX_BYTES = 1 << 14
"""Of a request's body; it names a task and a few numbers."""


def router(
    model_thread: ModelThread, agent: Agent, settings: WatchSettings | None = None
) -> APIRouter:
    """Return the routes of the module, to be included in an application.

    It has to turn `Refused` into an answer, to keep out who may not ask, and to call what is
    under `CLEANUP` when a request is over.

    Args:
        model_thread: decides.
        agent: whose checkpoint it is.
        settings: bounds.
    """
    from fastapi import APIRouter

    routes = APIRouter()
    for method, path, endpoint in Watchers(model_thread, agent, settings).endpoints:
        routes.add_route(path, endpoint, [method])
    return routes


@dataclass(frozen=True)
class Known:
    """A task of the checkpoint, and whether it can be watched here."""

    spec: TaskSpec
    fault: str = ""
    """Why it cannot."""

    def to_json(self) -> dict[str, Any]:
        """Return what clients are told."""
        spec = self.spec
        scores = ("measure", "random_score", "expert_score", "human_score", "score_source")
        about = ("id", "suite", "instruction", "max_steps", "control_hz", *scores)
        told = {name: getattr(spec, name) for name in about}
        return told | {"rate": rate_of(spec), "installed": not self.fault, "fault": self.fault}


def known(agent: Agent, task_id: str) -> Known:
    """Return a task of the checkpoint; its scores are those of the registry."""
    spec = agent.serializer.tasks[task_id].task
    try:
        gym.require_imported([task_id])
        if spec.suite != gym.SUITE:  # to find one of those starts it
            spec = registry.spec(task_id)
        missing = [n for n, v in registry.versions(spec.suite).items() if v == "not installed"]
    except ValueError as error:
        return Known(spec, str(error))
    fault = f"{spec.suite!r} needs {', '.join(missing)}, which is not installed here"
    return Known(spec, fault if missing else "")


def rate_of(spec: TaskSpec) -> float:
    """Return how many steps of a task are shown a second, unless told otherwise."""
    least, most = RATES
    return round(min(max(spec.control_hz, least), most), 2)


class Watchers:
    """Who is watching, and what they may ask for."""

    def __init__(
        self, model_thread: ModelThread, agent: Agent, settings: WatchSettings | None = None
    ) -> None:
        self._thread, self._agent = model_thread, agent
        self.settings = settings or WatchSettings()
        self._tasks = {task: known(agent, task) for task in agent.tasks}
        self._watched: dict[str, Watching] = {}
        """By id; one is there until its simulator's process has ended."""

    @property
    def endpoints(self) -> tuple[tuple[str, str, Endpoint], ...]:
        """What is to be added to an application: (method, path, endpoint)."""
        return (
            ("GET", "/v1/tasks", self.tasks),
            ("POST", "/v1/watch", self.watch),
            ("POST", "/v1/watch/{id}", self.change),
        )

    def stop(self) -> None:
        """End all that is being watched."""
        for watching in list(self._watched.values()):
            watching.stop()

    # ---- requests ----------------------------------------------------------------------------

    async def tasks(self, request: Request) -> Response:
        """Answer with the tasks of the checkpoint."""
        from starlette.responses import JSONResponse

        limits = self.settings
        return JSONResponse(
            {
                "object": "list",
                "data": [task.to_json() for task in self._tasks.values()],
                "watch": {
                    "watchers": limits.watchers,
                    "frames_per_second": limits.frames_per_second,
                    "steps_per_second": limits.steps_per_second,
                },
            }
        )

    async def watch(self, request: Request) -> Response:
        """Play a task as long as the client listens."""
        from starlette.responses import StreamingResponse

        asked = self._asked(await _fields(request))
        if len(self._watched) >= self.settings.watchers:
            raise busy(f"{self.settings.watchers} episodes are being watched already")
        try:
            session = self._thread.open_session(
                asked.task, seed=asked.seed, temperature=asked.temperature
            )
        except Busy as error:
            raise busy(str(error)) from error
        id, channel = secrets.token_urlsafe(12), Channel()
        try:
            watching = Watching(self._thread, self._agent, session, asked, self.settings, channel)
            self._watched[id] = watching
            watching.start(lambda: self._watched.pop(id, None))
        except BaseException:  # no thread can be had, say
            self._watched.pop(id, None)
            self._thread.close_session(session)
            raise
        request.scope[CLEANUP].append(watching.stop)
        about = self._tasks[asked.task].to_json()
        start = {**about, "id": id, "task": asked.task, "rate": asked.rate}
        return StreamingResponse(
            _events(channel, start), media_type="text/event-stream", headers=EVENT_STREAM
        )

    async def change(self, request: Request) -> Response:
        """Pause, go on, step, restart or change the speed of one that is being watched."""
        from starlette.responses import JSONResponse

        watching = self._watched.get(request.path_params["id"])
        if watching is None:
            raise Refused(
                404, "expected an episode that is being watched; there is none of that id"
            )
        fields = await _fields(request)
        rate = self._rate(fields)
        steps = fields.whole("steps", 1, 100)
        restart = fields.whole("restart", 0, MAX_SEED)
        paused = fields.flag("paused") if "paused" in fields else None
        fields.done()
        watching.change(paused=paused, rate=rate, steps=steps, restart=restart)
        return JSONResponse(watching.state())

    # ---- what they ask for -------------------------------------------------------------------

    def _asked(self, fields: Fields) -> Asked:
        task = fields.need("task")
        if not isinstance(task, str) or task not in self._tasks:
            raise no_task(task, self._tasks)
        found = self._tasks[task]
        if found.fault:
            raise Refused(400, f"{task!r} cannot be played here: {found.fault}", param="task")
        seed = fields.whole("seed", 0, MAX_SEED)
        temperature = fields.number("temperature", 0.0, 100.0)
        rate = self._rate(fields) or rate_of(found.spec)
        paused = fields.flag("paused")
        fields.done()
        try:
            if temperature is not None:
                check_sampling(temperature)
        except ValueError as error:
            raise Refused(400, str(error), param="temperature") from error
        return Asked(
            task, seed or 0, temperature, min(rate, self.settings.steps_per_second), paused
        )

    def _rate(self, fields: Fields) -> float | None:
        return fields.number("rate", 0.1, self.settings.steps_per_second)


async def _fields(request: Request) -> Fields:
    """Return the fields of a body, read where everything else waits: it has to be small."""
    body = await request.body()
    if len(body) > MAX_BYTES:
        message = f"expected a body of at most {MAX_BYTES} bytes here"
        raise Refused(413, message, code="body_too_large")
    return Fields(strict_json(body))


async def _events(channel: Channel, start: Mapping[str, Any]) -> AsyncIterator[bytes]:
    yield event("start", start)
    while True:
        try:
            told = await channel.get(ALIVE_SECONDS)
        except TimeoutError:
            yield b": still here\n\n"
            continue
        if told is None:
            return
        yield event(*told)


def event(kind: str, data: Mapping[str, Any]) -> bytes:
    """Return a server-sent event; numbers that JSON has not (NaN, infinity) are null in it."""
    try:
        told = json.dumps(data, ensure_ascii=False, allow_nan=False)
    except ValueError:
        told = json.dumps(_finite(data), ensure_ascii=False, allow_nan=False)
    return f"event: {kind}\ndata: {told}\n\n".encode()


def _finite(value: Any) -> Any:
    match value:
        case Mapping():
            return {key: _finite(one) for key, one in value.items()}
        case list() | tuple():
            return [_finite(one) for one in value]
        case float() if not math.isfinite(value):
            return None
    return value
