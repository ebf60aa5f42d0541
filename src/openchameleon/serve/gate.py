"""What every request passes before a route sees it: a number, the key, the line, and a byte limit.

Plain ASGI, so that it spans a streamed answer to its end.
"""

from __future__ import annotations

import asyncio
import hmac
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from openchameleon.serve import limits
from openchameleon.serve.errors import REQUEST_ID, ApiError, Json, unavailable
from openchameleon.serve.service import ENDING, Service

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = ("/", "/docs", "/health", "/ready")
OPEN_FOLDER = "/page/"


class Gate:
    """Around the whole app: counts, refuses, and lets in."""

    def __init__(self, app: App, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        request_id = f"req_{uuid.uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = request_id
        status = 499  # nothing was answered: the client has gone

        async def numbered(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", []), (REQUEST_ID.encode(), request_id.encode())
                ]  # fmt: skip
            await send(message)

        try:
            await self._let_in(scope, receive, numbered)
        except ApiError as error:
            await _refusal(error, request_id)(scope, receive, numbered)
        except asyncio.CancelledError:  # the time to end is over
            if status != 499 or not self.service.draining:
                raise
            await _refusal(unavailable(ENDING), request_id)(scope, receive, numbered)
        finally:
            path = getattr(scope.get("route"), "path", "other")
            self.service.metrics.http.labels(path, str(status)).inc()

    async def _let_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._check_key(scope)
        if scope["method"] != "POST":
            return await self.app(scope, receive, send)
        self.service.enter()
        try:
            await self.app(scope, _limited(scope, receive), send)
        finally:
            self.service.leave()

    def _check_key(self, scope: Scope) -> None:
        key, path = self.service.settings.api_key, scope["path"]
        if key is None or path in OPEN_PATHS or path.startswith(OPEN_FOLDER):
            return
        given = _header(scope, b"authorization")
        if not hmac.compare_digest(given, b"Bearer " + key.encode()):
            raise ApiError(401, "invalid_api_key", "This server wants its API key, as the header"
                           " Authorization: Bearer KEY.",
                           headers={"WWW-Authenticate": "Bearer"})  # fmt: skip


def _refusal(error: ApiError, request_id: str) -> Json:
    return Json(error.body(request_id), error.status_code, error.headers)


def _limited(scope: Scope, receive: Receive) -> Receive:
    """`receive` for a body of limited size and time. ApiError 413 and 408."""
    if int(_header(scope, b"content-length") or 0) > limits.MAX_BODY:
        raise _too_large()
    n_bytes, done = 0, False
    deadline = time.monotonic() + limits.BODY_TIMEOUT

    async def limited() -> MutableMapping[str, Any]:
        nonlocal n_bytes, done
        if done:
            return await receive()
        try:
            message = await asyncio.wait_for(receive(), deadline - time.monotonic())
        except TimeoutError:
            raise ApiError(408, "timeout", "The request's body did not come in"
                           f" {limits.BODY_TIMEOUT:.0f} seconds.",
                           headers={"Connection": "close"}) from None  # fmt: skip
        n_bytes += len(message.get("body", b""))
        done = not message.get("more_body", False)
        if n_bytes > limits.MAX_BODY:
            raise _too_large()
        return message

    return limited


def _too_large() -> ApiError:
    return ApiError(
        413, "request_too_large", f"The request has over {limits.MAX_BODY >> 20} MiB.",
        headers={"Connection": "close"},
    )  # fmt: skip


def _header(scope: Scope, name: bytes) -> bytes:
    return next((value for key, value in scope["headers"] if key == name), b"")
