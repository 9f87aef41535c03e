"""HTTP for the endpoints: a JSON body read and checked, an error as an answer, a job's events sent.

An error has OpenAI's form: {"error": {"message", "type", "param", "code"}}. This file does not know
models.
"""

import asyncio
import json
import math
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any, Protocol

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from typing_extensions import override

from nanogpt2.config.flags import show
from nanogpt2.memory import is_out_of_memory, out_of_memory_line
from nanogpt2.serve.worker import Job, QueueFullError, ReaderLeftError, StoppingError, Worker

MOST_BYTES = 2**20  # of a body
BODY_SECONDS = 30  # in which a body must arrive
MISSING = object()


class RefusalError(Exception):
    """An error to answer with."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers

    def as_json(self) -> dict[str, Any]:
        """Return OpenAI's form of an error."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        message = " ".join(str(self).split())
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """Return the answer."""
        return json_response(self.as_json(), self.status, self.headers)


def refusal_of(error: Exception) -> RefusalError:
    """Turn what a job raised into an answer."""
    if isinstance(error, RefusalError):
        return error
    if isinstance(error, QueueFullError):
        headers = {"Retry-After": str(error.seconds)}
        return RefusalError(429, str(error), code="queue_full", headers=headers)
    if isinstance(error, StoppingError):
        return RefusalError(503, "the server is stopping", headers={"Retry-After": "10"})
    if is_out_of_memory(error):
        return RefusalError(503, out_of_memory_line(error))
    # options may leave nothing to draw only later in a text
    is_request = isinstance(error, ValueError) or str(error).startswith("do_sample must")
    if isinstance(error, FloatingPointError) and not is_request:
        return RefusalError(500, str(error))
    if is_request:
        # the text starts with an option's name
        name = str(error).partition(" ")[0]
        return RefusalError(400, str(error), param=name if name.isidentifier() else None)
    return RefusalError(500, "the server failed; its own output says why")


def encoded(value: Any) -> bytes:
    """Return JSON in one line of UTF-8."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def finite(value: float) -> float | None:
    """Return a number that JSON can write: None for infinities and NaN."""
    return value if math.isfinite(value) else None


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return a JSON answer; value: bytes are JSON already."""
    data = value if isinstance(value, bytes) else encoded(value)
    return Response(data, status, headers, media_type="application/json")


async def read_json(request: Request) -> dict[str, Any]:
    """Read a body: one JSON object. Raises RefusalError."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # a page of another site may send other types without asking
        raise RefusalError(415, f"Content-Type must be application/json, not {show(kind)}")
    data = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                data += chunk
                if len(data) > MOST_BYTES:
                    headers = {"Connection": "close"}
                    message = f"the body must have {MOST_BYTES:,} bytes at most"
                    raise RefusalError(413, message, headers=headers)
    except TimeoutError:
        message = f"the body must arrive in {BODY_SECONDS} seconds"
        raise RefusalError(408, message, headers={"Connection": "close"}) from None
    except ClientDisconnect:
        raise ReaderLeftError from None
    try:
        value = json.loads(data, parse_constant=_no_constant)
        # JSON's \ud800 is half a character
        encoded(value)
    except (ValueError, RecursionError):
        raise RefusalError(400, "the body must be JSON in UTF-8") from None
    if not isinstance(value, dict):
        raise RefusalError(400, f"the body must be a JSON object, not {show(value)}")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(name)


class Fields:
    """The fields of a body, taken out one by one; a null counts as left out."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.rest = dict(values)

    def take(self, name: str, default: Any = None) -> Any:
        """Return any value."""
        value = self.rest.pop(name, None)
        return default if value is None else value

    def whole(self, name: str, default: int | None, low: int, high: int) -> int | None:
        """Return a whole number. Raises RefusalError for another value."""
        value = self.take(name, default)
        if value is not default and not (type(value) is int and low <= value <= high):
            kind = f"a whole number from {low} to {high}"
            raise RefusalError(400, f"{name} must be {kind}, not {show(value)}", name)
        return value

    def switch(self, name: str) -> bool:
        """Return true or false, by default False. Raises RefusalError for another value."""
        value = self.take(name, False)
        if not isinstance(value, bool):
            raise RefusalError(400, f"{name} must be true or false, not {show(value)}", name)
        return value

    def table(self, name: str) -> dict[str, Any]:
        """Return an object, by default empty. Raises RefusalError for another value."""
        value = self.take(name, {})
        if not isinstance(value, dict):
            raise RefusalError(400, f"{name} must be an object, not {show(value)}", name)
        return value

    def end(self) -> None:
        """Raise RefusalError where a field is left."""
        if self.rest:
            name = next(iter(self.rest))
            raise RefusalError(400, f"{show(name)} is not a field of this request", name[:60])


@asynccontextmanager
async def running(
    worker: Worker, receive: Receive, work: Callable[[], Iterator[Any]]
) -> AsyncIterator[Job]:
    """Queue some work for a client; when the client leaves, so does the job."""
    job = worker.submit(work)
    # the body is read, so that the next message says that the client left
    left = asyncio.ensure_future(receive())
    left.add_done_callback(lambda _: job.leave())
    try:
        yield job
    finally:
        # also after an error here, such as a reader that takes nothing
        job.leave()
        worker.done()
        left.cancel()
        with suppress(asyncio.CancelledError):
            await left


class Counted(Protocol):
    """Counts tokens for the access log."""

    prompt_tokens: int
    new_tokens: int


def log_tokens(request: Request, counts: Counted) -> None:
    """Let the access log say how many tokens were read and written in the end."""
    request.scope["state"]["counts"] = counts


async def stream(data: AsyncGenerator[bytes]) -> Response:
    """Return an event stream of the data but the first item, before which an error has a status."""
    await anext(data)
    return EventStream(data)


class EventStream(Response):
    """Server-sent events: `data: ...` for each of the data, as they come."""

    media_type = "text/event-stream"

    def __init__(self, data: AsyncGenerator[bytes]) -> None:
        super().__init__(headers={"Cache-Control": "no-store"})
        del self.headers["content-length"]
        self._data = data

    @override
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._send(send)
        finally:
            await self._data.aclose()

    async def _send(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        async for data in self._data:
            body = b"data: " + data + b"\n\n"
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
