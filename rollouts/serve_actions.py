"""Actions for remote robots and simulators: a session remembers what it has observed.

    GET    /v1/actions/tasks                 what the checkpoint plays, with its spaces
    POST   /v1/actions                       {"task" | "session", "observation"} -> action
    POST   /v1/actions/sessions              {"task", "seed", "temperature"} -> a session
    GET    /v1/actions/sessions              those that are open
    POST   /v1/actions/sessions/{id}/reset   {"seed"}: the next observation begins an episode
    DELETE /v1/actions/sessions/{id}

The first observation of a ``task`` opens a session, and its id comes with the action. No
environment is ever made: the spaces are those that the checkpoint was trained with.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gymnasium as gym

from gato.envs.episode import space_to_json
from gato.rollouts.data_uri import Budget
from gato.rollouts.model_thread import Busy, NoSession
from gato.rollouts.serve_json import Fields, strict_json
from gato.rollouts.serve_limits import Refused, busy
from gato.rollouts.serve_values import from_json, to_json
from gato.rollouts.serve_work import Result, Service

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

MAX_SEED = (1 << 63) - 1


@dataclass
class Session:
    """A robot somewhere, and how far it is."""

    id: str
    task: str
    used: float
    """When it was last asked something, on the clock that only runs forward."""
    created: int
    steps: int = 0
    """Actions since its episode began."""
    waits: bool = False
    """Whether it waits for an action."""


class Sessions:
    """The open sessions and their endpoints."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._known: dict[str, Session] = {}

    # ---- endpoints ---------------------------------------------------------------------------

    async def tasks(self, request: Request) -> Response:
        """List the tasks of the checkpoint."""
        from starlette.responses import JSONResponse

        codecs = self._service.agent.serializer.tasks.values()
        data = [
            {
                "id": codec.task.id,
                "object": "task",
                "instruction": codec.task.instruction,
                "control_hz": codec.task.control_hz,
                "observation_space": space_to_json(codec.task.observation_space),
                "action_space": space_to_json(codec.task.action_space),
            }
            for codec in codecs
        ]
        return JSONResponse({"object": "list", "data": data})

    async def list(self, request: Request) -> Response:
        """List the open sessions."""
        from starlette.responses import JSONResponse

        await self._expire()
        return JSONResponse(
            {"object": "list", "data": [self._told(s) for s in self._known.values()]}
        )

    async def open(self, request: Request) -> Response:
        """Open a session."""
        from starlette.responses import JSONResponse

        fields = Fields(await self._service.read(strict_json, await request.body()))
        session = await self._opened(fields)
        return JSONResponse(self._told(session), status_code=201)

    async def act(self, request: Request) -> Response:
        """Take an observation, answer with an action."""
        from starlette.responses import JSONResponse

        body = await request.body()
        fields = Fields(await self._service.read(strict_json, body))
        observation = fields.need("observation")
        if ("session" in fields) == ("task" in fields):
            raise Refused(400, "expected either 'session' or 'task'", param="session")
        task = self._task(fields) if "task" in fields else self._one(fields).task
        # A session is only opened for an observation that can be read.
        space = self._service.agent.serializer.tasks[task].task.observation_space
        seen = await self._service.read(_observed, space, observation, self._service)
        new = "task" in fields
        session = await self._opened(fields) if new else self._one(fields)
        fields.done()
        try:
            action = await self._acted(session, seen)
        except Refused:
            if new:
                await self._forget(session)
            raise
        told = {"object": "action", "session": session.id, "step": session.steps}
        return JSONResponse({**told, "action": to_json(action)})

    async def reset(self, request: Request) -> Response:
        """Begin an episode anew in a session."""
        from starlette.responses import JSONResponse

        body = await request.body()
        fields = Fields(await self._service.read(strict_json, body) if body else {})
        seed = fields.whole("seed", 0, MAX_SEED)
        fields.done()
        session = self._named(request.path_params["id"])
        if session.waits:
            raise _waiting(session)
        await self._ask(lambda: self._service.model.reset_session(session.id, seed))
        session.steps, session.used = 0, time.monotonic()
        return JSONResponse(self._told(session))

    async def close(self, request: Request) -> Response:
        """Close a session."""
        from starlette.responses import JSONResponse

        session = self._named(request.path_params["id"])
        await self._forget(session)
        return JSONResponse({"id": session.id, "object": "action.session", "deleted": True})

    # ---- what they share ---------------------------------------------------------------------

    def _told(self, session: Session) -> dict[str, Any]:
        idle = self._service.settings.idle_seconds - (time.monotonic() - session.used)
        return {
            "id": session.id,
            "object": "action.session",
            "task": session.task,
            "created": session.created,
            "steps": session.steps,
            "expires_in": round(max(idle, 0.0), 1),
        }

    def _task(self, fields: Fields) -> str:
        task = fields.need("task")
        known = self._service.agent.tasks
        if not isinstance(task, str) or task not in known:
            message = f"expected one of the tasks that this model knows ({', '.join(known)})"
            raise Refused(404, f"{message}; got {task!r:.100}", param="task", code="task_not_found")
        return task

    def _one(self, fields: Fields) -> Session:
        name = fields.need("session")
        if not isinstance(name, str):
            raise fields.wrong("session", "a string")
        return self._named(name)

    def _named(self, name: str) -> Session:
        if name not in self._known:
            message = "expected an open session; there is none of that id, or no longer"
            raise Refused(404, message, param="session", code="session_not_found")
        return self._known[name]

    async def _opened(self, fields: Fields) -> Session:
        task = self._task(fields)
        seed = fields.whole("seed", 0, MAX_SEED) or 0
        temperature = fields.number("temperature", 0.0, 100.0)
        fields.done()
        await self._expire()
        model = self._service.model
        id = await self._ask(lambda: model.open_session(task, seed=seed, temperature=temperature))
        session = Session(id, task, time.monotonic(), int(time.time()))
        self._known[id] = session
        return session

    async def _acted(self, session: Session, observation: Any) -> Any:
        if session.waits:
            raise _waiting(session)
        service = self._service
        try:
            future = service.model.act(session.id, observation)
        except NoSession as error:
            self._known.pop(session.id, None)
            raise _gone() from error
        except ValueError as error:
            raise _waiting(session) from error
        session.waits, session.used = True, time.monotonic()
        loop = asyncio.get_running_loop()

        def decided(_: Any) -> None:  # also where the client has not waited for it
            session.waits, session.used = False, time.monotonic()

        future.add_done_callback(lambda f: loop.call_soon_threadsafe(decided, f))
        try:
            action = await service.result(lambda: future)
        except NoSession as error:
            self._known.pop(session.id, None)
            raise _gone() from error
        session.waits = False
        session.steps += 1
        return action

    async def _ask(self, function: Callable[[], Result]) -> Result:
        """Return what the model's thread answers, which may be busy for a moment."""
        try:
            return await asyncio.to_thread(function)
        except Busy as error:
            raise busy(str(error)) from error
        except NoSession as error:
            raise _gone() from error
        except ValueError as error:
            raise Refused(400, str(error)) from error

    async def _forget(self, session: Session) -> None:
        self._known.pop(session.id, None)
        try:
            await self._ask(lambda: self._service.model.close_session(session.id))
        except Refused as refused:
            if refused.status != 404:  # gone already: what was wanted
                raise

    async def _expire(self) -> None:
        """Close sessions that nobody has used for long; they hold memory of the model."""
        last = time.monotonic() - self._service.settings.idle_seconds
        for session in [s for s in self._known.values() if s.used < last and not s.waits]:
            await self._forget(session)


def _observed(space: gym.Space, value: Any, service: Service) -> Any:
    settings = service.settings
    budget = Budget(settings.images, settings.image_bytes, settings.image_pixels)
    try:
        return from_json(space, value, budget)
    except ValueError as error:
        raise Refused(400, str(error), param="observation") from error


def _waiting(session: Session) -> Refused:
    message = f"session {session.id} waits for an action already; one at a time"
    return Refused(409, message, param="session", code="session_busy")


def _gone() -> Refused:
    message = "the session has been closed"
    return Refused(404, message, param="session", code="session_not_found")
