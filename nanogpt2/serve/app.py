"""The Starlette application: the routes, and what is checked before any of them.

A browser may be led to 127.0.0.1 by a name of another site's (DNS rebinding), so on the loopback
address only its own names are allowed as Host. No answer has a CORS header. The access log names
no text: method, path, status, tokens, seconds.
"""

import asyncio
import hmac
import time
from collections.abc import Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanogpt2 import terminal
from nanogpt2.serve import openai, page
from nanogpt2.serve.house import House
from nanogpt2.serve.web import RefusalError, refusal_of
from nanogpt2.serve.worker import QueueFullError, ReaderLeftError, StoppingError

# seconds after which a client that takes nothing is cut off
STALLED_SECONDS = 30
OWN_NAMES = ("127.0.0.1", "localhost")
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
PAGE = "/"
ENDPOINTS = {
    PAGE: page.page,
    "/api/models": page.models,
    "/api/generate": page.generate,
    "/api/beams": page.beams,
    "/api/inspect": page.inspect,
    "/api/compare": page.compare,
    "/api/score": page.score,
    "/v1/models": openai.models,
    "/v1/models/{name:path}": openai.model,
    "/v1/completions": openai.completions,
    "/v1/chat/completions": openai.chat,
}
GETS = (page.page, page.models, openai.models, openai.model)


def application(
    house: House, api_key: str | None, is_local: bool, cut_off: Callable[[Any], None]
) -> ASGIApp:
    """Return the whole application.

    is_local: only this machine can connect. cut_off: closes the connection of a scope's client at
    once.
    """
    routes = [
        Route(path, endpoint, methods=["GET"] if endpoint in GETS else ["POST"])
        for path, endpoint in ENDPOINTS.items()
    ]
    known = (RefusalError, QueueFullError, StoppingError, ValueError, FloatingPointError)
    # of Exception, Starlette sends the answer and raises the error again, for Guard to report
    handlers: Any = {HTTPException: _http_error} | dict.fromkeys((*known, Exception), _error)
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False
    app.state.house = house
    return Guard(app, api_key, is_local, cut_off)


async def _error(request: Request, error: Exception) -> Response:
    return refusal_of(error).response()


async def _http_error(request: Request, error: HTTPException) -> Response:
    said = {404: "is not a path of this server", 405: f"does not take {request.method[:20]}"}
    message = f"{request.url.path[:60]!r} {said.get(error.status_code, error.detail)}"
    headers = dict(error.headers or {})
    return RefusalError(error.status_code, message, headers=headers).response()


class Guard:
    """Checks each request's Host and key, cuts off stalled readers, logs, and catches the rest."""

    def __init__(
        self,
        app: ASGIApp,
        api_key: str | None,
        is_local: bool,
        cut_off: Callable[[Any], None],
    ) -> None:
        self._app, self._is_local, self._cut_off = app, is_local, cut_off
        self._key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            return
        scope["state"] = {"counts": None}
        begin, status = time.monotonic(), 0

        async def checked_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            try:
                async with asyncio.timeout(STALLED_SECONDS):
                    await send(message)
            except TimeoutError:
                self._cut_off(scope)
                raise ReaderLeftError from None

        try:
            if (refused := self._refused(scope)) is not None:
                await refused.response()(scope, receive, checked_send)
            else:
                await self._app(scope, receive, checked_send)
        except (ReaderLeftError, asyncio.CancelledError):
            # a second SIGINT cancels all requests
            status = 499  # as nginx says that the client left
            self._cut_off(scope)
            # uvicorn has to see the end of the connection, or it reports an error
            await asyncio.sleep(0)
        except Exception as error:
            terminal.note(f"error: {type(error).__name__}: {' '.join(str(error).split())[:160]}")
            if not status:
                status = 500
                await refusal_of(RuntimeError()).response()(scope, receive, send)
        _log(scope, status, time.monotonic() - begin)

    def _refused(self, scope: Scope) -> RefusalError | None:
        """Return the refusal of a request that must not go on."""
        headers = dict(scope["headers"])
        if self._is_local:
            host = headers.get(b"host", b"").decode("latin-1")
            if host.partition(":")[0].lower() not in OWN_NAMES:
                return RefusalError(403, f"Host must be localhost, not {host[:60]!r}")
        if self._key is not None and scope["path"] != PAGE:
            # the scheme's name has no case (RFC 9110, 11.1)
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(given, self._key):
                message = "the key is missing or wrong: send Authorization: Bearer KEY"
                wanted = {"WWW-Authenticate": "Bearer"}
                return RefusalError(401, message, code="invalid_api_key", headers=wanted)
        return None


def _log(scope: Scope, status: int, seconds: float) -> None:
    counts = scope["state"]["counts"]
    count = f", {counts.prompt_tokens} + {counts.new_tokens} tokens" if counts else ""
    # other methods and paths are the client's own words
    method = scope["method"] if scope["method"] in METHODS else "(another method)"
    path = scope["path"] if scope["path"] in ENDPOINTS else "(another path)"
    terminal.note(f"{method} {path} {status} {seconds:.2f} s{count}")
