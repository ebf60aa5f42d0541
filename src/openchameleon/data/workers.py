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
from typing import TypeVar

from openchameleon.errors import UserError

J = TypeVar("J")
R = TypeVar("R")


def in_processes(function: Callable[[J], R], jobs: Sequence[J], n: int) -> Iterator[R]:
    """The result of each job, in order, worked out by `n` processes of one thread each.

    The first error ends them all. UserError where the system kills one.
    """
    others = set(active_children())
    # Not forked: torch's threads do not survive a fork.
    pool = ProcessPoolExecutor(n, get_context("spawn"), end_with, (os.getpid(),))
    try:
        yield from pool.map(function, jobs)
    except BaseException as error:
        for worker in set(active_children()) - others:
            worker.terminate()
        if isinstance(error, BrokenProcessPool):
            raise UserError(
                "A worker process was killed, as the system does where memory runs out; the same"
                " command goes on, with fewer --workers if it happens again."
            ) from error
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def end_with(parent: int) -> None:
    """Sets up a worker: one thread, since they share the cores, and no life after its parent's.

    One that goes on after a kill would write beside the workers of the run that takes over.
    """
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the parent ends its workers

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
