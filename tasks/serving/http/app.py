"""An HTTP server with OpenAI's interface for all budgets of a family: `model` in a request names a budget."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator

import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.datastructures import Headers
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from elastic_core.errors import UserError
from tasks.serving.engine import Engine
from tasks.serving.family import Budget
from tasks.serving.http.answers import Answer, usage
from tasks.serving.http.bodies import Chat, Completion
from tasks.serving.http.reading import FAILURES, Reading, chunks
from tasks.serving.http.service import Refused, Service

LARGEST_BODY = 16 * 2**20  # bytes
# Seconds at the end of a server: for requests that run to end by themselves, and then for their last words to be sent.
# Docker kills a container after 10.
GRACE, SENDING = 3, 5


def _response(error: Refused) -> Response:
    headers = {"Retry-After": "1"} if error.status in (429, 503) else {}
    return JSONResponse(error.content, error.status, headers)


class Guard:
    """Refuses requests without the key, and bodies that are too large, before they are read."""

    def __init__(self, app, key: str | None):
        self._app, self._key = app, key

    async def __call__(self, scope, receive, send) -> None:
        refused = self._reason(scope) if scope["type"] == "http" else None
        await (self._app if refused is None else _response(refused))(scope, receive, send)

    def _reason(self, scope) -> Refused | None:
        headers = Headers(scope=scope)
        given = headers.get("authorization", "").removeprefix("Bearer ").encode()
        needs_key = self._key is not None and scope["path"].startswith("/v1/")
        if needs_key and not hmac.compare_digest(given, self._key.encode()):
            return Refused(401, "the API key is missing or wrong", "invalid_api_key")
        if "transfer-encoding" in headers:
            return Refused(411, "the body has no length; send Content-Length")
        if int(headers.get("content-length", 0)) > LARGEST_BODY:
            return Refused(413, f"the body is larger than {LARGEST_BODY:,} bytes")
        return None


class LastWord:
    """Answers requests that uvicorn cancels at the end of a server, such as those with a body that does not come."""

    def __init__(self, app):
        self._app = app

    async def __call__(self, scope, receive, send) -> None:
        has_begun = False

        async def watched(message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except asyncio.CancelledError:
            if scope["type"] != "http":
                raise
            if not has_begun:
                await _response(Refused(*FAILURES["stopped"], code="stopped"))(scope, receive, send)


class Events(StreamingResponse):
    """An answer in chunks. It closes its reading also where the client has gone before the first chunk."""

    def __init__(self, reading: Reading, events: AsyncIterator[str]):
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._reading = reading

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._reading.close()


async def _respond(service: Service, request: Request, body: Chat | Completion) -> Response:
    jobs = await run_in_threadpool(service.prepare, body)
    logprobs = body.num_logprobs is not None
    answer = Answer(isinstance(body, Chat), body.model, service.tokens, logprobs)
    reading = Reading(service.engine, jobs, "chat" if answer.chat else "text")
    if body.stream:
        return Events(reading, chunks(reading, answer, body, logprobs))
    try:
        if not await _read_all(request, reading):
            return Response(status_code=499)  # nobody reads it
        return JSONResponse(answer.whole(reading.texts, usage(reading.texts, body.n)))
    finally:
        reading.close()


async def _read_all(request: Request, reading: Reading) -> bool:
    """Wait for the end of all texts. False: the client has gone."""

    async def texts() -> None:
        async for _ in reading.pieces():
            pass

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.create_task(texts()), asyncio.create_task(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            return False
        tasks[0].result()  # raises Refused
        return True
    finally:
        for task in tasks:
            task.cancel()


def create_app(service: Service, key: str | None = None) -> FastAPI:
    """The application. It starts the engine and stops it. `key`: what clients have to send; None: nothing."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        try:
            yield
        finally:
            await run_in_threadpool(service.engine.stop)

    app = FastAPI(lifespan=lifespan, openapi_url=None)
    app.add_middleware(Guard, key=key)
    app.add_middleware(LastWord)
    _add_errors(app)
    _add_routes(app, service)
    return app


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        return _response(error)

    @app.exception_handler(torch.OutOfMemoryError)  # in the preparation of a request; the engine handles its own
    async def out_of_memory(request: Request, error: torch.OutOfMemoryError) -> Response:
        return _response(Refused(*FAILURES["memory"], code="memory"))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"][1:]))
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            message = "is not supported by this server"
        return _response(Refused(400, f"{where}: {message}" if where else message, param=where or None))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        return _response(Refused(error.status_code, str(error.detail)))


def _add_routes(app: FastAPI, service: Service) -> None:
    def described(name: str, budget: Budget) -> dict:
        entry = {"id": name, "object": "model", "created": service.started, "owned_by": "elastic"}
        return entry | {"num_parameters": budget.num_parameters, "max_model_len": service.engine.limits.context}

    @app.get("/health")
    async def health() -> Response:
        if not service.engine.is_running:
            raise Refused(503, "the engine does not run")
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=service.metrics.content_type)

    @app.get("/v1/models")
    async def models() -> Response:
        budgets = service.family.budgets.items()
        return JSONResponse({"object": "list", "data": [described(name, budget) for name, budget in budgets]})

    @app.get("/v1/models/{name}")
    async def model(name: str) -> Response:
        return JSONResponse(described(name, await run_in_threadpool(service.budget, name)))

    @app.post("/v1/chat/completions")
    async def chat(request: Request, body: Chat) -> Response:
        return await _respond(service, request, body)

    @app.post("/v1/completions")
    async def completions(request: Request, body: Completion) -> Response:
        return await _respond(service, request, body)


def bind(host: str, port: int) -> socket.socket:
    """A socket at this address, which does not listen yet. Raises UserError if the address is taken or not allowed."""
    found = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
    except (OSError, OverflowError) as error:
        found.close()
        raise UserError(f"--host {host} --port {port}: {error}; name a free port (0 finds one)") from None
    return found


class Server(uvicorn.Server):
    """Stops the engine before uvicorn cancels the requests, so that they end with an error in OpenAI's form."""

    def __init__(self, config: uvicorn.Config, engine: Engine):
        super().__init__(config)
        self._engine = engine

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        stopping = asyncio.create_task(self._stop_engine())
        await super().shutdown(sockets)  # takes no new connections, and waits for the requests
        await stopping

    async def _stop_engine(self) -> None:
        end = time.monotonic() + GRACE
        while self.server_state.tasks and not self.force_exit and time.monotonic() < end:
            await asyncio.sleep(0.05)
        await run_in_threadpool(self._engine.stop)


def new_server(app: FastAPI, engine: Engine) -> Server:
    """A server of `create_app`'s application, with its engine, for `bind`'s socket: `run(sockets=[…])`.

    Neither paths nor headers are logged.
    """
    limit = GRACE + SENDING
    return Server(uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=limit), engine)


@contextlib.contextmanager
def running(app: FastAPI, engine: Engine, address: socket.socket) -> Iterator[str]:
    """Serve `app` at `bind`'s socket in a thread, while the block runs. Gives the server's URL."""
    server = new_server(app, engine)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [address]}, name="elastic-server")
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        yield "http://{}:{}".format(*address.getsockname())
    finally:
        server.should_exit = True
        thread.join()
