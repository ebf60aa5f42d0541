"""Server-sent events: lines that come while an answer is written; who stops reading stops it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from starlette.responses import StreamingResponse

from openchameleon.serve.answer import Answer
from openchameleon.serve.clients import ClientGone
from openchameleon.serve.errors import ApiError, dumps
from openchameleon.serve.service import Service

log = logging.getLogger(__name__)

KEEP_ALIVE = 15.0  # seconds without a line, after which proxies may think a stream dead
PATIENCE = 60.0  # seconds for a client to read on, else its place goes to others
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def event(data: Any, name: str | None = None) -> str:
    """One event; its data are JSON in one line."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {dumps(data)}\n\n"


class EventStream(StreamingResponse):
    """Sends the lines; however it ends, the answers behind them are given up.

    last_words: the line that tells the client of an error, where the lines themselves failed.
    """

    def __init__(
        self,
        service: Service,
        answers: Sequence[Answer],
        lines: AsyncIterator[str],
        last_words: Callable[[ApiError], str],
    ) -> None:
        safe = _with_last_words(_alive(lines), last_words)
        super().__init__(safe, media_type="text/event-stream", headers=HEADERS)
        self._service, self._answers = service, answers

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def impatient(message: Any) -> None:
            try:
                await asyncio.wait_for(send(message), PATIENCE)
            except TimeoutError:
                raise ClientGone from None

        try:
            await super().__call__(scope, receive, impatient)
        except ClientGone:
            log.warning("A client did not read its stream for %.0f seconds.", PATIENCE)
        finally:
            self._service.cancel(self._answers)


async def _with_last_words(
    lines: AsyncIterator[str], last_words: Callable[[ApiError], str]
) -> AsyncIterator[str]:
    try:
        async for line in lines:
            yield line
    except ApiError as error:
        yield last_words(error)
    except Exception:
        log.exception("A stream failed.")
        yield last_words(ApiError(500, "server_error", "The server failed on this answer."))


async def _alive(lines: AsyncIterator[str]) -> AsyncIterator[str]:
    """The lines, and a comment whenever none came for a while."""
    line: asyncio.Task[str] | None = None
    try:
        while True:
            line = line or asyncio.ensure_future(anext(lines))
            done, _ = await asyncio.wait({line}, timeout=KEEP_ALIVE)
            if not done:
                yield ": still here\n\n"
                continue
            try:
                yield line.result()
            except StopAsyncIteration:
                return
            line = None
    finally:
        if line is not None:
            line.cancel()
