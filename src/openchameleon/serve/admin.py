"""POST /admin/reload: who runs the server has it read its model anew. Only where there is a key."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi import Request as HTTPRequest
from starlette.responses import Response as HTTPResponse

from openchameleon.serve.errors import ApiError, Json
from openchameleon.serve.service import Service

router = APIRouter(include_in_schema=False)  # no part of what clients are offered


@router.post("/admin/reload")
async def reload(http: HTTPRequest) -> HTTPResponse:
    """Answers when the new model is served, or says why the old one goes on."""
    service: Service = http.app.state.service
    if service.settings.api_key is None:
        raise ApiError(403, "forbidden", "A server without an API key does not load models anew:"
                       " start it with --api-key.")  # fmt: skip
    await service.reload()
    return Json({"object": "model", "id": service.settings.name})
