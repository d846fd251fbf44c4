"""Actions for remote robots and simulators: a session remembers what it has observed.

    GET    /v1/actions/tasks                 what the checkpoint plays, with its spaces
    POST   /v1/actions                       {"task" | "session", "observation"} -> action
    POST   /v1/actions/sessions              {"task", "seed", "temperature"} -> a session
    GET    /v1/actions/sessions              those that are open
    POST   /v1/actions/sessions/{id}/reset   {"seed"}: the next observation begins an episode
    DELETE /v1/actions/sessions/{id}

The first observation of a ``task`` opens a session, and its id comes with the action. No
environment is ever made: the spaces are those that the checkpoint was trained with. All clients
have the same rights: who may ask at all may list, use and close every session.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import gymnasium as gym

from gato.envs.episode import space_to_json
from gato.rollouts.data_uri import Budget
from gato.rollouts.model_thread import Busy, NoSession
from gato.rollouts.serve_json import Fields, strict_json
from gato.rollouts.serve_limits import MAX_SEED, Refused, busy, no_task
from gato.rollouts.serve_values import from_json, to_json
from gato.rollouts.serve_work import Result, Service
from gato.rollouts.sessions import Decision, State

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response


class Sessions:
    """The sessions that were opened here, and their endpoints.

    How far they are, and whether they are still there, the model's thread knows.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._created: dict[str, int] = {}
        """When each was opened, in seconds since 1970."""

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

        states = [(id, self._state(id)) for id in tuple(self._created)]
        data = [self._told(id, state) for id, state in states if state is not None]
        return JSONResponse({"object": "list", "data": data})

    async def open(self, request: Request) -> Response:
        """Open a session."""
        from starlette.responses import JSONResponse

        fields = Fields(await self._service.read(strict_json, await request.body()))
        id = self._opened(fields)
        return JSONResponse(self._told(id, self._named(id)), status_code=201)

    async def act(self, request: Request) -> Response:
        """Take an observation, answer with an action."""
        from starlette.responses import JSONResponse

        body = await request.body()
        fields = Fields(await self._service.read(strict_json, body))
        observation = fields.need("observation")
        if ("session" in fields) == ("task" in fields):
            raise Refused(400, "expected either 'session' or 'task'", param="session")
        new = "task" in fields
        task = self._task(fields) if new else self._named(_id(fields)).task
        # A session is only opened for an observation that can be read.
        space = self._service.agent.serializer.tasks[task].task.observation_space
        seen = await self._service.read(_observed, space, observation, self._service)
        id = self._opened(fields) if new else _id(fields)
        # From here to the answer, what opens a session closes it, or nobody would ever know of it.
        try:
            fields.done()
            deciding = self._asked(lambda: self._service.model.act(id, seen), id)
            action = await self._decided(deciding)
        except BaseException:  # whoever goes away cancels
            if new:
                self._forget(id)
            raise
        told = {"object": "action", "session": id, "step": deciding.step}
        return JSONResponse({**told, "action": to_json(action)})

    async def reset(self, request: Request) -> Response:
        """Begin an episode anew in a session."""
        from starlette.responses import JSONResponse

        body = await request.body()
        fields = Fields(await self._service.read(strict_json, body) if body else {})
        seed = fields.whole("seed", 0, MAX_SEED)
        fields.done()
        id = request.path_params["id"]
        self._named(id)
        self._asked(lambda: self._service.model.reset_session(id, seed), id)
        return JSONResponse(self._told(id, self._named(id)))

    async def close(self, request: Request) -> Response:
        """Close a session."""
        from starlette.responses import JSONResponse

        id = request.path_params["id"]
        self._named(id)
        self._forget(id)
        return JSONResponse({"id": id, "object": "action.session", "deleted": True})

    # ---- what they share ---------------------------------------------------------------------

    def _told(self, id: str, state: State) -> dict[str, Any]:
        return {
            "id": id,
            "object": "action.session",
            "task": state.task,
            "created": self._created[id],
            "steps": state.steps,
            "expires_in": round(state.left, 1),
        }

    def _task(self, fields: Fields) -> str:
        task = fields.need("task")
        known = self._service.agent.tasks
        if not isinstance(task, str) or task not in known:
            raise no_task(task, known)
        return task

    def _state(self, id: str) -> State | None:
        """Return how far a session is; None where it has ended, or was never opened here."""
        if id not in self._created:
            return None
        try:
            return self._service.model.session(id)
        except NoSession:
            del self._created[id]
            return None

    def _named(self, id: str) -> State:
        state = self._state(id)
        if state is None:
            raise _gone()
        return state

    def _opened(self, fields: Fields) -> str:
        task = self._task(fields)
        seed = fields.whole("seed", 0, MAX_SEED) or 0
        temperature = fields.number("temperature", 0.0, 100.0)
        fields.done()
        try:
            id = self._service.model.open_session(task, seed=seed, temperature=temperature)
        except Busy as error:
            raise busy(str(error)) from error
        except ValueError as error:
            raise Refused(400, str(error)) from error
        for other in tuple(self._created):  # those that have ended are forgotten here too
            self._state(other)
        self._created[id] = int(time.time())
        return id

    def _asked(self, function: Callable[[], Result], id: str) -> Result:
        """Return what is asked of an open session, which may be waiting for an action."""
        try:
            return function()
        except NoSession as error:
            raise _gone() from error
        except ValueError as error:
            message = f"session {id} waits for an action already; one at a time"
            raise Refused(409, message, param="session", code="session_busy") from error

    async def _decided(self, deciding: Decision) -> Any:
        try:
            return await self._service.result(lambda: deciding)
        except NoSession as error:  # closed while it waited
            raise _gone() from error

    def _forget(self, id: str) -> None:
        self._created.pop(id, None)
        try:
            self._service.model.close_session(id)
        except (NoSession, RuntimeError):  # it, or the model's thread, has ended: as was wanted
            return


def _id(fields: Fields) -> str:
    id = fields.need("session")
    if not isinstance(id, str):
        raise fields.wrong("session", "a string")
    return id


def _observed(space: gym.Space, value: Any, service: Service) -> Any:
    settings = service.settings
    budget = Budget(settings.images, settings.image_bytes, settings.image_pixels)
    try:
        return from_json(space, value, budget)
    except ValueError as error:
        raise Refused(400, str(error), param="observation") from error


def _gone() -> Refused:
    message = "expected an open session; there is none of that id, or no longer"
    return Refused(404, message, param="session", code="session_not_found")
