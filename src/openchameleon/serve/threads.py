"""Threads that a program does not wait for when it ends, unlike those of asyncio's pools."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


async def left_behind(work: Callable[[], T], name: str) -> T:
    """What `work` returns or raises. Whoever waits may be cancelled: the thread goes on alone."""
    done: Future[T] = Future()
    done.set_running_or_notify_cancel()  # from here on the thread alone settles it

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return await asyncio.wrap_future(done)
