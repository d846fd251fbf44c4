"""The model behind the server: its thread, a few threads that read requests, and the counters.

```text
event loop     | bytes -> ...                           -> JSON, server-sent events
pool           |          JSON, pictures, tokens ->
model's thread |                                    ids
```
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from gato.rollouts.agent import Agent
from gato.rollouts.engine import Delta, Sampling
from gato.rollouts.model_thread import Busy, ModelThread, NoSession, Ticket
from gato.rollouts.serve_limits import Refused, Settings, busy, failure, out_of_time
from gato.rollouts.serve_metrics import Meter
from gato.tokenizers.stream import TokenSequence

Result = TypeVar("Result")


class Service:
    """What the endpoints share."""

    def __init__(self, agent: Agent, settings: Settings) -> None:
        self.meter = Meter()
        self.agent, self.settings = agent, settings
        self.created = int(time.time())
        self.lasting: list[Callable[[], None]] = []
        """What ends that which would go on as long as its client listens."""
        self.model = ModelThread(
            agent,
            rows=settings.rows,
            waiting=settings.waiting,
            sessions=settings.sessions,
            idle_seconds=settings.idle_seconds,
        )
        self._pool = ThreadPoolExecutor(2, "gato-requests")
        model = self.model
        self.meter.watch("running_rows", "Texts being written.", lambda: model.running)
        self.meter.watch("waiting_rows", "Texts that wait for a row.", lambda: model.waiting)
        self.meter.watch("sessions", "Open sessions of actions.", lambda: model.sessions)

    async def read(self, function: Callable[..., Result], *args: Any) -> Result:
        """Return what `function` makes of a request, worked out beside the event loop.

        Raises:
            Refused: with status 400 where it raises ValueError.
        """
        loop = asyncio.get_running_loop()
        given = [args]
        try:
            return await loop.run_in_executor(self._pool, lambda: function(*given[0]))
        except ValueError as error:
            raise Refused(400, str(error)) from error
        finally:  # the pool keeps what nobody waits for in its queue; not its body
            given.clear()

    async def result(self, future: Callable[[], Future[Result]]) -> Result:
        """Return what the model's thread makes of something.

        Raises:
            Refused: where too many wait, it is wrong, or it takes too long.
            NoSession: where the model's thread has none.
        """
        try:
            async with asyncio.timeout(self.settings.seconds):
                # what has not begun when the client goes, or its time is over, is never done
                return await asyncio.wrap_future(future())
        except TimeoutError as error:
            raise out_of_time(self.settings) from error
        except Busy as error:
            raise busy(str(error)) from error
        except NoSession:
            raise
        except ValueError as error:
            raise Refused(400, str(error)) from error

    def check_model(self, name: str) -> None:
        """Raise `Refused` for the name of another model."""
        own = self.settings.name
        if name != own:
            message = f"expected the model {own!r}; got {name[:100]!r}"
            raise Refused(404, message, param="model", code="model_not_found")

    def end_lasting(self) -> None:
        """End what the server would wait for otherwise when it is to end."""
        for end in self.lasting:
            end()

    def close(self) -> None:
        """End the threads."""
        self.end_lasting()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.model.close()


class Writing:
    """The texts of one request while they are written."""

    def __init__(
        self, service: Service, prefix: TokenSequence, samplings: Sequence[Sampling]
    ) -> None:
        """Ask for one text per sampling.

        Raises:
            Refused: where too many wait, or the model cannot read the prefix.
        """
        self._service = service
        self._loop = asyncio.get_running_loop()
        self._end = self._loop.time() + service.settings.seconds
        self._queue: asyncio.Queue[tuple[int, Delta]] = asyncio.Queue()
        self._open: dict[int, Ticket] = {}
        self.read, self.written = len(prefix), 0
        self._counted = False
        try:
            for i, sampling in enumerate(samplings):
                self._open[i] = service.model.write(prefix, sampling, self._sink(i))
        except BaseException as error:
            self.close()
            if isinstance(error, Busy):
                raise busy(str(error)) from error
            if isinstance(error, ValueError):
                raise Refused(400, str(error), param="messages") from error
            raise

    def _sink(self, i: int) -> Callable[[Delta], None]:
        def sink(delta: Delta) -> None:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (i, delta))

        return sink

    async def deltas(self, alive: float = math.inf) -> AsyncIterator[tuple[int, Delta]]:
        """Yield (which text, what is new of it) until all have ended.

        Args:
            alive: seconds after which nothing new is told, too.

        Raises:
            Refused: where the model fails or its time is over.
        """
        while self._open:
            await asyncio.sleep(0)  # others have their turn, however many deltas have come
            now = self._loop.time()
            if now >= self._end:
                self.close()
                raise out_of_time(self._service.settings)
            try:
                # `wait_for` of Python 3.11 forgets that it was cancelled where a delta has come
                async with asyncio.timeout_at(min(self._end, now + alive)):
                    i, delta = await self._queue.get()
            except TimeoutError:
                yield next(iter(self._open)), Delta("", 0)
                continue
            self.written += delta.tokens
            if delta.finish is not None:
                del self._open[i]
            if delta.finish == "error":
                self.close()
                raise failure()  # what a request may get wrong has been found before
            if not self._open:
                self.close()
            yield i, delta

    def close(self) -> None:
        """Forget the texts that have not ended; their rows are free at the next step."""
        for ticket in self._open.values():
            self._service.model.cancel(ticket)
        self._open = {}
        if not self._counted:  # whether they ended well, or the client did not wait
            self._counted = True
            self._service.meter.tokens(self.read, self.written)
