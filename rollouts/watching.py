"""One agent playing for one who watches: a thread that asks the model and a simulator in turn.

    model thread   decides        . . . decides        . . .
    this thread      step, tokens, event, wait for the beat, ...
    its process      simulates, draws . . .

It ends when the client is gone, when nobody goes on for too long, or when it fails; then its
process is ended and its session closed before the last event is told.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from gato.envs.episode import flatten_value
from gato.envs.workers import Pool, WorkerDiedError, last_words
from gato.rollouts.agent import Agent
from gato.rollouts.model_thread import ModelThread, NoSession
from gato.rollouts.stage import Message, Scene, stage
from gato.rollouts.token_view import SHOWN, TokenView

log = logging.getLogger("gato.serve")

UNREAD = 8
"""Events that may wait for a client; then the episode waits too."""
BETWEEN_SECONDS = 1.5
"""Between an episode's end and the next."""
MAX_SEED = (1 << 32) - 1


@dataclass(frozen=True)
class WatchSettings:
    """Bounds of watching."""

    watchers: int = 2
    """At once; each has a process with a simulator."""
    frames_per_second: float = 15.0
    """Most pictures that are drawn and sent."""
    steps_per_second: float = 60.0
    """Most steps."""
    idle_seconds: float = 300.0
    """Paused for so long, it ends."""
    stall_seconds: float = 30.0
    """A client that reads nothing for so long is gone."""
    most_seconds: float = 3600.0
    """It ends after so long in any case."""
    step_seconds: float = 60.0
    """That one step of a simulator, or one decision, may take."""


@dataclass(frozen=True)
class Asked:
    """What is to be played, and how."""

    task: str
    seed: int = 0
    """Of the first episode; the next has the next."""
    temperature: float | None = None
    rate: float = 15.0
    """Steps a second."""
    paused: bool = False


Told = tuple[str, dict[str, Any]]
"""An event's name and data."""


class Channel:
    """Events on their way from a thread to the event loop in which it was made."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Told | None] = asyncio.Queue()
        self._room = threading.Semaphore(UNREAD)

    def put(self, told: Told, seconds: float) -> bool:
        """Tell an event, waiting for room; return whether there was any in time."""
        return self._room.acquire(timeout=seconds) and self._tell(told)

    def end(self, told: Told) -> None:
        """Tell the last event; whether there is room makes no difference to it."""
        self._tell(told)
        self._tell(None)

    def free(self) -> None:
        """Make room for one who waits for it, whether or not anything was read."""
        self._room.release()

    def _tell(self, told: Told | None) -> bool:
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, told)
        except RuntimeError:  # the loop has ended, and with it who would read
            return False
        return True

    async def get(self, seconds: float) -> Told | None:
        """Return the next event; None at the end.

        Raises:
            TimeoutError: where there is none in time.
        """
        async with asyncio.timeout(seconds):
            told = await self._queue.get()
        self._room.release()
        return told


class _Over(Exception):
    """It ends, for the reason given."""


class Watching:
    """Plays a task until it is stopped."""

    def __init__(
        self,
        model_thread: ModelThread,
        agent: Agent,
        session: str,
        asked: Asked,
        settings: WatchSettings,
        channel: Channel,
    ) -> None:
        """Make one that has not begun.

        Args:
            model_thread: decides.
            agent: whose checkpoint it is.
            session: of the model thread, closed at the end.
            asked: what is played.
            settings: bounds.
            channel: where events are told.
        """
        self._model, self._session, self._asked = model_thread, session, asked
        self._settings, self._channel = settings, channel
        self._tokens = TokenView(agent.serializer, asked.task)
        self._space = agent.serializer.task(asked.task).task.action_space
        self._changed = threading.Condition()
        self._stopped = False
        self._paused, self._rate, self._steps = asked.paused, asked.rate, 0
        self._restart: int | None = None
        self._due = 0.0
        """When the next step is to be taken."""
        self._drawn = 0.0
        """When a picture was asked for last."""
        self._limit = time.monotonic() + settings.most_seconds
        self._pool = Pool(1, stage, timeout=settings.step_seconds)

    # ---- from the event loop -----------------------------------------------------------------

    def start(self, done: Callable[[], Any]) -> None:
        """Begin to play; `done` is called when everything has ended."""
        threading.Thread(target=self._run, args=[done], name="watching", daemon=True).start()

    def stop(self) -> None:
        """End soon, whatever the simulator is doing: one that only starts may take minutes."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._pool.kill()
        self._channel.free()

    def change(
        self,
        paused: bool | None = None,
        rate: float | None = None,
        steps: int | None = None,
        restart: int | None = None,
    ) -> None:
        """Change how it goes on; what is None stays.

        Args:
            paused: whether it waits.
            rate: steps a second.
            steps: to be taken at once, although it is paused.
            restart: the seed of an episode that begins now.
        """
        with self._changed:
            self._paused = self._paused if paused is None else paused
            self._rate = rate or self._rate
            self._steps += steps or 0
            self._restart = self._restart if restart is None else restart
            self._due = min(self._due, time.monotonic() + 1 / self._rate)
            self._changed.notify()

    def state(self) -> dict[str, Any]:
        """Return how it goes on."""
        with self._changed:
            return {"task": self._asked.task, "paused": self._paused, "rate": self._rate}

    # ---- in its thread -----------------------------------------------------------------------

    def _run(self, done: Callable[[], Any]) -> None:
        reason = ""
        try:
            seed = self._asked.seed
            for number in itertools.count(1):
                self._episode(number, seed)
                seed = self._next_seed(seed)
        except _Over as over:
            reason = str(over)
        except Exception as error:
            reason = self._reason(error)
        finally:
            try:
                self._close()
            except Exception:
                log.exception("a watched episode did not end as it should")
            finally:
                done()
                self._channel.end(("end", {"reason": reason}))

    def _reason(self, error: Exception) -> str:
        """Return why it ends, where that was not meant."""
        if self._stopped:  # and its process with it
            return "stopped"
        if isinstance(error, TimeoutError):
            return f"no action came within {self._settings.step_seconds:g} seconds"
        if isinstance(error, ValueError | WorkerDiedError):
            return str(error)
        log.error("watching %s failed", self._asked.task, exc_info=error)
        return f"{type(error).__name__}: {error}"

    def _close(self) -> None:
        try:
            self._pool.close()
        finally:
            try:
                self._model.close_session(self._session)
            except (NoSession, RuntimeError):  # idle for too long, or the model's thread has ended
                log.info("the session of a watched episode was closed before it")

    def _next_seed(self, seed: int) -> int:
        with self._changed:
            restart, self._restart = self._restart, None
        return (seed + 1) % (MAX_SEED + 1) if restart is None else restart

    def _episode(self, number: int, seed: int) -> None:
        """Play one episode to its end, or until another is to begin."""
        if number > 1:
            self._model.reset_session(self._session, seed=seed)
        scene = self._ask(("reset", self._asked.task, seed))
        head = self._tokens.head()
        began = {"episode": number, "seed": seed, "frame": _uri(scene.picture), "tokens": head}
        self._tell("episode", {**began, "actions": scene.names, "fault": scene.fault})
        with self._changed:
            self._due = time.monotonic() + 1 / self._rate
        at, step, total = len(head), 0, 0.0
        while not scene.reply.ended:
            if not self._await_turn():
                return
            observation, began_at = scene.reply.observation, time.perf_counter()
            deciding = self._model.act(self._session, observation)
            action = deciding.result(timeout=self._settings.step_seconds)
            decided = time.perf_counter() - began_at
            scene = self._ask(("step", action, self._frame_is_due()))
            tokens = self._tokens.step(observation, action)
            step, total = step + 1, total + scene.reply.reward
            told = {
                "step": step,
                "frame": _uri(scene.picture),
                "tokens": [{**t, "position": t["position"] + at} for t in tokens[:SHOWN]],
                "tokens_left_out": max(len(tokens) - SHOWN, 0),
                "action": self._plain(action),
                "reward": scene.reply.reward,
                "return": total,
                "success": scene.reply.success,
                "ended": scene.reply.ended,
                "milliseconds": round(1000 * decided, 2),
            }
            at += 1 + max((t["position"] for t in tokens), default=-1)
            self._tell("step", told)
        with self._changed:
            self._due = time.monotonic() + max(BETWEEN_SECONDS, 1 / self._rate)
        self._await_turn()

    def _ask(self, message: Message) -> Scene:
        """Return what the simulator's process answers."""
        self._pool.send(0, message)
        with self._changed:
            if self._stopped:  # while there was no process yet that could be killed
                raise _Over("stopped")
        answer: Scene | WorkerDiedError = self._pool.receive()[0][1]
        if isinstance(answer, WorkerDiedError):
            raise answer
        if answer.reply.error is not None:
            raise _Over(f"the environment failed: {last_words(answer.reply.error)}")
        return answer

    def _await_turn(self) -> bool:
        """Wait for the next step's time; return False where another episode is to begin instead.

        Raises:
            _Over: where there is to be no next step.
        """
        idle = time.monotonic() + self._settings.idle_seconds
        with self._changed:
            while True:
                now = time.monotonic()
                if self._stopped:
                    raise _Over("stopped")
                if now >= self._limit:
                    raise _Over(f"it was watched for {self._settings.most_seconds:g} seconds")
                if self._restart is not None:
                    return False
                if self._steps:
                    self._steps -= 1
                    return True
                if not self._paused and now >= self._due:
                    self._due = max(self._due + 1 / self._rate, now)  # nothing is caught up with
                    return True
                if self._paused and now >= idle:
                    raise _Over(f"paused for {self._settings.idle_seconds:g} seconds")
                self._changed.wait((idle if self._paused else self._due) - now)

    def _frame_is_due(self) -> bool:
        """Return whether a picture is wanted of the next step; a paused one's always is."""
        now = time.monotonic()
        with self._changed:
            wanted = self._paused
        # A step comes a little early or late: nine tenths of the time between pictures will do.
        if wanted or now - self._drawn >= 0.9 / self._settings.frames_per_second:
            self._drawn = now
            return True
        return False

    def _tell(self, kind: str, data: dict[str, Any]) -> None:
        with self._changed:
            if self._stopped:
                raise _Over("stopped")
        if not self._channel.put((kind, data), self._settings.stall_seconds):
            raise _Over(f"nothing was read for {self._settings.stall_seconds:g} seconds")

    def _plain(self, action: Any) -> Any:
        """Return an action as JSON: a number, a list, or an object of them by path."""
        flat = flatten_value(self._space, action, "action")
        plain = {path: np.asarray(value).tolist() for path, value in flat.items()}
        return plain["action"] if list(plain) == ["action"] else plain


def _uri(picture: bytes | None) -> str | None:
    if picture is None:
        return None
    return "data:image/jpeg;base64," + base64.b64encode(picture).decode()
