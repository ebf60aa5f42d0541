"""The FastAPI app: routes, errors and the page around one `Service`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.staticfiles import StaticFiles

from openchameleon import __version__
from openchameleon.serve import admin, chat, images, responses
from openchameleon.serve.clients import ClientGone
from openchameleon.serve.errors import ApiError, Json, bad_field
from openchameleon.serve.gate import Gate
from openchameleon.serve.metrics import CONTENT_TYPE
from openchameleon.serve.replies import ErrorBody
from openchameleon.serve.service import Service

PAGE = Path(__file__).parent / "page"
CONTENT_SECURITY = (
    "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none';"
    " form-action 'none'; frame-ancestors 'none'"
)
PAGE_HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def create_app(service: Service) -> FastAPI:
    """The app; the model is loaded when it starts, and requests get 503 until it is there."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(service.start())
        yield
        loading.cancel()
        with suppress(asyncio.CancelledError, Exception):  # a failure to load is kept by `service`
            await loading
        service.stop()

    app = FastAPI(
        title="OpenChameleon", version=__version__, lifespan=lifespan, docs_url=None,
        redoc_url=None, responses={"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}},
    )  # fmt: skip
    app.state.service = service
    for endpoint in (responses, chat, images, admin):
        app.include_router(endpoint.router)
    _add_status(app, service)
    _add_page(app)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(ClientGone, _client_gone)
    app.add_exception_handler(Exception, _unexpected)
    app.add_middleware(Gate, service=service)
    return app


def _add_status(app: FastAPI, service: Service) -> None:
    started = int(time.time())

    @app.get("/health")
    def health() -> Response:
        """200 while the process is worth keeping, whether or not it takes requests now."""
        dead = service.worker.dead or service.failure is not None
        return Json({"status": "dead" if dead else "alive"}, 503 if dead else 200)

    @app.get("/ready")
    def ready() -> Response:
        """200 where new requests are taken; 503 while loading, restarting or ending."""
        return Json({"ready": service.ready}, 200 if service.ready else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    def metrics() -> Response:
        """Counters and times in Prometheus' text format."""
        return PlainTextResponse(service.metrics.text(), media_type=CONTENT_TYPE)

    def described() -> dict[str, Any]:
        config = service.chameleon.config
        return {
            "id": service.settings.name,
            "object": "model",
            "created": started,
            "owned_by": "openchameleon",
            "outputs": list(config.outputs),
            "context_length": config.model.max_seq_len,
            "picture_size": service.picture_size,
            "examples": list(config.examples),
        }

    @app.get("/v1/models")
    def models() -> Response:
        """The one model that is served."""
        return Json({"object": "list", "data": [described()]})

    @app.get("/v1/models/{name:path}")
    def model(name: str) -> Response:
        """The model, by its name."""
        service.require_model(name)
        return Json(described())


def _add_page(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    def index() -> Response:
        return FileResponse(PAGE / "index.html", headers=PAGE_HEADERS)

    @app.get("/docs", include_in_schema=False)
    def docs() -> Response:
        return FileResponse(PAGE / "docs.html", headers=PAGE_HEADERS)

    app.mount("/page", PageFiles(directory=PAGE))


class PageFiles(StaticFiles):
    """The page's files, under its content security policy."""

    async def get_response(self, path: str, scope: Any) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(PAGE_HEADERS)
        return response


async def _http_error(request: Request, error: Any) -> Response:
    if not isinstance(error, ApiError):
        what = {404: "There is nothing at this address.",
                405: "This address does not take that method."}  # fmt: skip
        message = what.get(error.status_code, str(error.detail))
        code = {404: "not_found", 405: "method_not_allowed"}.get(
            error.status_code, "invalid_request"
        )
        error = ApiError(error.status_code, code, message, headers=error.headers)
    return _json(request, error)


async def _validation_error(request: Request, error: Any) -> Response:
    return _json(request, bad_field(error.errors(), error.body))


async def _client_gone(request: Request, error: Any) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _unexpected(request: Request, error: Any) -> Response:
    return _json(request, ApiError(500, "server_error", "The server failed on this request."))


def _json(request: Request, error: ApiError) -> Response:
    return Json(error.body(request.state.request_id), error.status_code, error.headers)
