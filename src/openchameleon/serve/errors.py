"""What goes wrong, as clients of this API read it: OpenAI's error object, one sentence, no traces.

{"error": {"message": ..., "type": ..., "param": ..., "code": ..., "request_id": ...}}
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

REQUEST_ID = "x-request-id"
TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error",
         429: "rate_limit_error"}  # fmt: skip


class ApiError(HTTPException):
    """An answer other than 200. `param` is the path of the field that is to blame, if one is."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.code, self.message, self.param = code, message, param

    def body(self, request_id: str | None = None) -> dict[str, Any]:
        """The JSON object that a client gets."""
        kind = "server_error" if self.status_code >= 500 else "invalid_request_error"
        error = {
            "message": self.message,
            "type": TYPES.get(self.status_code, kind),
            "param": self.param,
            "code": self.code,
            "request_id": request_id,
        }
        return {"error": error}


class Json(JSONResponse):
    """JSON in ASCII: a lone surrogate that a client sent is escaped, where UTF-8 has no bytes."""

    def render(self, content: Any) -> bytes:
        return dumps(content).encode()


def dumps(content: Any) -> str:
    """Compact JSON in ASCII. ValueError for numbers that JSON has no spelling for."""
    return json.dumps(content, allow_nan=False, separators=(",", ":"))


def unavailable(message: str, seconds: int = 5) -> ApiError:
    """503: not now, but the same request may be answered later, or by another replica."""
    headers = {"Retry-After": str(seconds)}
    return ApiError(503, "unavailable", message, headers=headers)


def bad_field(errors: Sequence[Mapping[str, Any]], body: Any) -> ApiError:
    """Pydantic's complaints -> the one that is most to the point, with the path of its field."""
    located = [(field_path(error["loc"], body), error) for error in errors]
    path, error = max(located, key=lambda pair: pair[0].count(".") + pair[0].count("["))
    if error["type"] == "extra_forbidden":
        return ApiError(422, "unknown_parameter", f"Unknown field {path!r}; leave it out.", path)
    if error["type"] == "missing" and not path:
        return ApiError(422, "missing_body", "The request has no JSON body.")
    code = "missing_parameter" if error["type"] == "missing" else "invalid_value"
    where = f"{path}: " if path else ""
    return ApiError(422, code, f"{where}{error['msg']}.", path or None)


def field_path(loc: Sequence[int | str], body: Any) -> str:
    """("body", "input", "list[...]", 0, "text") -> "input[0].text": the steps that the body has.

    Pydantic's locations also name the branches of unions, which mean nothing to a client.
    """
    path, node = "", body
    steps = list(loc[1:])
    for i, step in enumerate(steps):
        if isinstance(step, int) and isinstance(node, list) and step < len(node):
            path, node = f"{path}[{step}]", node[step]
        elif isinstance(node, dict) and (step in node or i == len(steps) - 1):
            path, node = f"{path}.{step}" if path else str(step), node.get(step)
    return path[:200]
