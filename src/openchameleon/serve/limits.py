"""What a client may ask for: limits that hold before memory is spent, and JSON read strictly."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from openchameleon.serve.errors import ApiError

MAX_BODY = 20 << 20  # bytes
BODY_TIMEOUT = 60.0  # seconds in which a body must have come
MAX_PICTURES = 8  # in a request
MAX_PIXELS = 16 << 20  # of one picture
MAX_TOTAL_PIXELS = 32 << 20  # of all pictures of a request
MAX_ANSWERS = 8  # n
MAX_TOKENS = 1 << 20  # that may be asked for; the model's context is the other limit
MAX_STOPS, MAX_STOP_LENGTH = 4, 256
MAX_PARTIAL_PICTURES = 64
MAX_CHARS_PER_TOKEN = 64  # text of more characters than this a token of context is not even encoded


class StrictRequest(Request):
    """A request whose JSON has no key twice, no NaN, and no depth that exhausts a parser."""

    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            self._json = parse_json(await self.body())
        return self._json


class StrictRoute(APIRoute):
    """A route that reads its body as a `StrictRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def strictly(request: Request) -> Response:
            return await handler(StrictRequest(request.scope, request.receive))

        return strictly


def parse_json(data: bytes) -> Any:
    """JSON by the letter of its standard. ApiError says what is wrong with it."""
    try:
        return json.loads(data, object_pairs_hook=_no_key_twice, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise ApiError(
            400, "invalid_json", f"The body is not JSON: {error.msg}, {place}."
        ) from None
    except RecursionError:
        raise ApiError(400, "invalid_json", "The body's JSON is nested too deeply.") from None
    except ValueError:  # bytes that are no UTF-8; a number of thousands of digits
        message = "The body is not JSON: it has bytes or numbers that cannot be read."
        raise ApiError(400, "invalid_json", message) from None


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for i, key in enumerate(keys) if key in keys[:i])[:100]
        raise ApiError(400, "invalid_json", f"The key {twice!r} stands twice in one object.", twice)
    return found


def _no_constant(name: str) -> Any:
    raise ApiError(400, "invalid_json", f"The body is not JSON: {name} is no number of it.")
