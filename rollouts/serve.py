"""A checkpoint as a server: OpenAI's endpoints, actions, a web page, health and figures.

```text
connection (`Patient`) -> Guard -> routes -> Service -> model's thread
  slow heads               who, how much        one engine, all sessions
```
"""

import logging
import signal
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from gato.rollouts import serve_captions, serve_embeddings, serve_openai, serve_page, watch
from gato.rollouts.agent import Agent
from gato.rollouts.serve_actions import Sessions
from gato.rollouts.serve_guard import Guard
from gato.rollouts.serve_limits import MAX_HEAD_BYTES, Refused, Settings, failure
from gato.rollouts.serve_metrics import missing
from gato.rollouts.serve_work import Service

if TYPE_CHECKING:
    from fastapi import FastAPI

log = logging.getLogger("gato.serve")

MAX_CONNECTIONS = 1024
"""Or half of the files that the process may open, if these are fewer."""
SLOWEST = 1 << 10
"""Bytes that a client has to read in a second, over some seconds, while answers wait for it."""
TOO_SLOW = (
    b"HTTP/1.1 408 Request Timeout\r\nContent-Type: text/plain\r\nContent-Length: 35\r\n"
    b"Connection: close\r\n\r\nThe head of the request is too slow"
)
Endpoint = Callable[[Service, Any], Awaitable[Any]]


class Server(Guard):
    """The whole server as an ASGI application, and what works behind it."""

    def __init__(self, inner: Any, service: Service) -> None:
        super().__init__(inner, service.settings, service.meter)
        self.service = service
        self._open = _told_to_other_sites(super().__call__, service.settings)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request."""
        await self._open(scope, receive, send)


def _told_to_other_sites(guarded: Any, settings: Settings) -> Any:
    """Return an application that lets pages of the sites in the settings ask (CORS).

    It stands before `Guard`, so that they are told of refusals too.
    """
    if not settings.origins:
        return guarded
    from starlette.middleware.cors import CORSMiddleware

    return CORSMiddleware(
        guarded,
        allow_origins=list(settings.origins),
        allow_methods=["GET", "POST", "DELETE"],
        allow_headers=["*"],  # clients tell their names and versions in some of their own
        expose_headers=[serve_openai.DROPPED_HEADER, "Retry-After", "X-Request-Id"],
    )


def app(agent: Agent, settings: Settings | None = None) -> Server:
    """Return the server of a checkpoint as an ASGI application.

    Its model runs in a thread of its own until ``app.service.close()``.

    Raises:
        ValueError: where FastAPI or prometheus-client is not installed.
    """
    try:
        import fastapi
        from starlette.exceptions import HTTPException
    except ImportError as error:
        raise missing(error) from error
    settings = settings or Settings()
    service = Service(agent, settings)
    inner = fastapi.FastAPI(title="gato", docs_url=None, redoc_url=None, openapi_url=None)
    inner.add_exception_handler(Refused, _refusal)
    inner.add_exception_handler(HTTPException, _http_error)
    inner.add_exception_handler(Exception, _failure)
    try:
        _add_routes(inner, service)
        return Server(inner, service)
    except BaseException:
        service.close()
        raise


def _add_routes(inner: "FastAPI", service: Service) -> None:
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response

    def add(method: str, path: str, endpoint: Endpoint) -> None:
        async def handle(request: Request) -> Response:
            answer: Response = await endpoint(service, request)
            return answer

        methods = ["GET", "HEAD"] if method == "GET" else [method]
        inner.add_api_route(path, handle, methods=methods, response_model=None)

    async def health(service: Service, request: Request) -> Response:
        if not service.model.alive:
            raise Refused(503, "the model has failed; the server's log says how", code="model_dead")
        return JSONResponse({"status": "ok"})

    async def metrics(service: Service, request: Request) -> Response:
        page, kind = service.meter.page()
        return Response(page, media_type=kind)

    add("GET", "/health", health)
    add("GET", "/metrics", metrics)
    add("GET", "/v1/models", serve_openai.models)
    add("GET", "/v1/models/{name:path}", serve_openai.model)
    add("POST", "/v1/chat/completions", serve_openai.chat)
    add("POST", "/v1/embeddings", serve_embeddings.embeddings)
    add("POST", "/v1/captions", serve_captions.caption)
    sessions = Sessions(service)
    for method, path, endpoint in (
        ("GET", "/tasks", sessions.tasks),
        ("POST", "", sessions.act),
        ("GET", "/sessions", sessions.list),
        ("POST", "/sessions", sessions.open),
        ("POST", "/sessions/{id}/reset", sessions.reset),
        ("DELETE", "/sessions/{id}", sessions.close),
    ):
        add(method, f"/v1/actions{path}", _alone(endpoint))
    watchers = watch.Watchers(service.model, service.agent)
    service.lasting.append(watchers.stop)
    for method, path, endpoint in watchers.endpoints:
        add(method, path, _alone(endpoint))
    inner.include_router(serve_page.router())


def _alone(endpoint: Callable[[Any], Awaitable[Any]]) -> Endpoint:
    async def handle(service: Service, request: Any) -> Any:
        return await endpoint(request)

    return handle


async def _refusal(request: Any, refused: Any) -> Any:
    from starlette.responses import JSONResponse

    return JSONResponse(refused.to_json(), status_code=refused.status, headers=refused.headers)


async def _http_error(request: Any, error: Any) -> Any:
    told = {404: "there is nothing at this address", 405: "this address takes other methods"}
    message = told.get(error.status_code, str(error.detail))
    refused = Refused(error.status_code, message)
    refused.headers |= dict(error.headers or {})
    return await _refusal(request, refused)


async def _failure(request: Any, error: Exception) -> Any:
    # Starlette raises it again afterwards, and `Guard` writes it to the log.
    return await _refusal(request, failure())


# ---- the process -----------------------------------------------------------------------------


def run(
    agent: Agent,
    settings: Settings,
    ready: Callable[[str], None] = lambda address: None,
    stop: threading.Event | None = None,
) -> None:
    """Serve until SIGTERM or Ctrl-C; running answers then get a few seconds.

    Args:
        agent: a loaded checkpoint.
        settings: where, and its bounds.
        ready: called with the address once it is open.
        stop: ends the server where it is set, for one in a thread that signals do not reach.

    Raises:
        ValueError: where uvicorn is not installed.
        OSError: where the address is taken, or is none of this machine's.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise missing(error) from error
    listener = _listen(settings)
    try:
        application = app(agent, settings)
    except BaseException:
        listener.close()
        raise
    config = uvicorn.Config(
        application,
        http=patient(settings),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        timeout_graceful_shutdown=int(max(settings.grace_seconds, 1)),
    )
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # `Guard` says what matters

    class Ending(uvicorn.Server):
        async def shutdown(self, sockets: Any = None) -> None:
            application.service.end_lasting()  # an hour's watching is not waited for
            await super().shutdown(sockets)

    server = Ending(config)
    host, port = listener.getsockname()[:2]
    ended = threading.Event()
    if stop is not None:
        watcher = threading.Thread(target=_watch, args=(stop, ended, server), daemon=True)
        watcher.start()
    ready(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")
    try:
        with _signals_end_quietly():
            server.run(sockets=[listener])
    finally:
        ended.set()
        if stop is not None:
            stop.set()
            watcher.join()
        listener.close()
        application.service.close()


def _watch(stop: threading.Event, ended: threading.Event, server: Any) -> None:
    stop.wait()
    if not ended.is_set():
        server.should_exit = True


def _listen(settings: Settings) -> socket.socket:
    host = settings.host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, settings.port), family=family, backlog=512)
    # Its connections inherit this: else the second part of an answer waits 40 ms for the client to
    # acknowledge the first. asyncio sets it by itself only where the socket names its protocol.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


@contextmanager
def _signals_end_quietly() -> Iterator[None]:
    """Let a server that ended after a signal end as it was asked to, not by that signal again."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda *_: None) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _most_connections() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return MAX_CONNECTIONS
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    unbounded = files == resource.RLIM_INFINITY
    return MAX_CONNECTIONS if unbounded else min(MAX_CONNECTIONS, max(files // 2, 1))


def patient(settings: Settings) -> type:
    """Return uvicorn's protocol with bounds of connections, and of the time for a head to come."""
    import h11
    from uvicorn.protocols.http.h11_impl import H11Protocol

    most = _most_connections()
    if settings.requests > max(most, Settings.requests):  # somebody has asked for more
        told = "expected room for %d requests at once; got %d connections (see ulimit -n)"
        log.warning(told, settings.requests, most)

    class Patient(H11Protocol):
        """Ends connections whose next request does not begin in time, or who do not read."""

        _timer: Any = None
        _stall: Any = None
        _unsent = 0

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > most:
                transport.abort()
                return
            transport.set_write_buffer_limits(high=0)  # hear of all that is not read at once
            self._wait_for_head()

        def data_received(self, data: bytes) -> None:
            try:
                super().data_received(data)
            except h11.LocalProtocolError:  # the answer to what broke the rules of HTTP
                self.transport.close()
            if self.conn.their_state is not h11.IDLE:
                self._stop_waiting()
            elif self._timer is None:
                self._wait_for_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            self.resume_writing()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._expect_reading()

        def _expect_reading(self) -> None:
            self._unsent = self.transport.get_write_buffer_size()
            self._stall = self.loop.call_later(settings.stall_seconds, self._has_read)

        def _has_read(self) -> None:
            read = self._unsent - self.transport.get_write_buffer_size()
            if read >= SLOWEST * settings.stall_seconds:
                self._expect_reading()
            else:  # closing alone would wait for the client to read what is left
                self.transport.abort()

        def resume_writing(self) -> None:
            if self._stall is not None:
                self._stall.cancel()
                self._stall = None
            super().resume_writing()

        def _wait_for_head(self) -> None:
            self._timer = self.loop.call_later(settings.head_seconds, self._too_slow)

        def _stop_waiting(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _too_slow(self) -> None:
            self._timer = None
            if self.conn.trailing_data[0]:  # a part of a head; who has said nothing hears nothing
                self.transport.write(TOO_SLOW)
            self.transport.close()

    return Patient
