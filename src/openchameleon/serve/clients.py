"""Whether the client who asked is still there: nothing is worked out for nobody."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any, TypeVar

from fastapi import Request as HTTPRequest

T = TypeVar("T")


class ClientGone(Exception):
    """Nobody waits for this answer any more."""


async def unless_gone(http: HTTPRequest, work: asyncio.Future[T]) -> T:
    """The result of `work`, which is cancelled when the client goes: then ClientGone."""
    gone = asyncio.ensure_future(_disconnect(http))
    both: list[asyncio.Future[Any]] = [work, gone]
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientGone
        return await work
    finally:
        for task in both:
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task


async def _disconnect(http: HTTPRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
