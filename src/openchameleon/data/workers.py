"""Work spread over processes of this machine, which end with it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context
from typing import Any, TypeVar

from openchameleon.errors import UserError

J = TypeVar("J")
R = TypeVar("R")

SILENCE = 120.0
"""Seconds without a sign of life, of which there are five a second, after which a worker hangs."""


def in_processes(function: Callable[[J], R], jobs: Sequence[J], n: int) -> Iterator[R]:
    """The result of each job, in order, worked out by `n` processes of one thread each.

    The first error ends them all. UserError where the system kills one, or one hangs.
    """
    others = set(active_children())
    context = get_context("spawn")  # not forked: torch's threads do not survive a fork
    beats = context.Array("d", 1 << 16, lock=False)
    pool = ProcessPoolExecutor(n, context, end_with, (os.getpid(), beats))
    hanging, done = threading.Event(), threading.Event()

    def listen() -> None:
        awake_since = heard = time.monotonic()
        while not done.wait(1.0):
            now = time.monotonic()
            if now - heard > 10:  # all were stopped together, as by ctrl-Z
                awake_since = now
            heard = now
            for worker in set(active_children()) - others:
                last = beats[_place(worker.pid)]
                if last and now - max(last, awake_since) > SILENCE:
                    hanging.set()
                    worker.kill()

    threading.Thread(target=listen, daemon=True).start()
    try:
        yield from pool.map(function, jobs)
    except BaseException as error:
        for worker in set(active_children()) - others:
            worker.terminate()
        if isinstance(error, BrokenProcessPool):
            why = (
                f"gave no sign of life for {SILENCE:.0f} s and was ended"
                if hanging.is_set()
                else "was killed, as the system does where memory runs out"
            )
            raise UserError(
                f"A worker process {why}; the same command goes on, with fewer --workers if it"
                " happens again."
            ) from error
        raise
    finally:
        done.set()
        pool.shutdown(cancel_futures=True)


def _place(pid: int | None) -> int:
    return (pid or 0) % (1 << 16)


def end_with(parent: int, beats: Any = None) -> None:
    """Sets up a worker: one thread, since they share the cores, and no life after its parent's.

    One that goes on after a kill would write beside the workers of the run that takes over. In
    `beats` it writes the time, as a sign of life.
    """
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the parent ends its workers

    def watch() -> None:
        while os.getppid() == parent:
            if beats is not None:
                beats[_place(os.getpid())] = time.monotonic()  # one clock for all processes
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
