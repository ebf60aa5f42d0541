"""One thread owns the engine; everything else hands it requests and reads their ids as they come.

A job's ids arrive in the event loop in order, in batches of whatever came since they were last
read. A step that crashes fails the jobs that were in the engine, and a new engine takes its place;
those that still wait in line are not touched.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Literal

import torch

from openchameleon.errors import UserError
from openchameleon.inference.engine import Engine
from openchameleon.inference.sequence import FinishReason, Request, Sequence
from openchameleon.serve.metrics import Metrics

log = logging.getLogger(__name__)

Outcome = FinishReason | Literal["refused", "crashed", "stopped"]
"""How a job ends: as a completion does, by the engine's no or its crash, by the server's end."""

LAST_STEP = 10.0  # seconds
MAX_CRASHES = 5  # in a row, with no good step between: then only another process can help


class Job:
    """A request on its way through the worker, as the event loop sees it."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.id = uuid.uuid4().hex
        self.ids: list[int] = []
        self.outcome: Outcome | None = None
        self.refusal = ""  # the engine's sentence, where the outcome is "refused"
        self.n_told = 0  # ids that the engine's thread has handed over
        self.submitted = time.monotonic()
        self._n_read = 0
        self._changed = asyncio.Event()

    def push(self, ids: list[int], outcome: Outcome | None) -> None:
        """New ids, and how it ended if it did. In the event loop."""
        if self.outcome is None:
            self.ids += ids
            self.outcome = outcome
            self._changed.set()

    async def batches(self) -> AsyncIterator[list[int]]:
        """The ids in order, each time all that came since; ends when `outcome` is known."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            ids, self._n_read = self.ids[self._n_read :], len(self.ids)
            if ids:
                yield ids
            if self.outcome is not None and self._n_read == len(self.ids):
                return


class Worker:
    """Runs jobs on an engine in a thread, at most `max_running` at a time and the rest in line.

    `submit` and `cancel` are for the event loop that `start` was called in. make_engine: called in
    the thread, at the start and after a crash.
    """

    def __init__(
        self, make_engine: Callable[[], Engine], max_running: int, metrics: Metrics
    ) -> None:
        self.make_engine, self.max_running, self.metrics = make_engine, max_running, metrics
        self.ready = False
        self.crashes_in_a_row = 0
        self._line: deque[Job] = deque()
        self._running: dict[Sequence, Job] = {}
        self._cancelled: list[tuple[Job, Outcome]] = []
        self._replacement: tuple[Callable[[], Engine], asyncio.Future[None]] | None = None
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._live, name="engine", daemon=True)

    @property
    def dead(self) -> bool:
        """Whether the engine crashed so often that this process should be replaced."""
        return self.crashes_in_a_row >= MAX_CRASHES

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after its step; what is under way ends as "stopped".

        A step that takes longer than a server has to end is left behind.
        """
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join(LAST_STEP)

    def submit(self, request: Request) -> Job:
        """Puts a request in line."""
        job = Job(request)
        self.metrics.prompt_tokens.inc(len(request.token_ids))
        with self._wake:
            self._line.append(job)
            self.metrics.waiting.set(len(self._line))
            self._wake.notify()
        return job

    def cancel(self, job: Job, outcome: Outcome = "aborted") -> None:
        """Ends a job at once for who reads it, and before the next step in the engine."""
        if job.outcome is None:
            job.push([], outcome)
            self._count(outcome)
            with self._wake:
                self._cancelled.append((job, outcome))
                self._wake.notify()

    async def replace(self, make_engine: Callable[[], Engine]) -> None:
        """Puts another engine in the place of this one as soon as nothing runs or is in line.

        Whatever make_engine raises, and then an engine like the one that was there goes on;
        RuntimeError where the thread ends before.
        """
        done = asyncio.get_running_loop().create_future()
        with self._wake:
            self._replacement = (make_engine, done)
            self._wake.notify()
        try:
            await done
        finally:
            del done  # it holds what was raised, which holds this frame

    def cancel_all(self, outcome: Outcome) -> None:
        """`cancel` for everything under way and in line."""
        with self._wake:
            jobs = [*self._line, *self._running.values()]
        for job in jobs:
            self.cancel(job, outcome)

    @torch.inference_mode()
    def _live(self) -> None:
        engine: Engine | None = None
        while self._next_work():
            try:
                if self._replacement_is_due():
                    engine = None  # its memory goes before a new one is made
                    engine = self._replaced()
                engine = engine or self._new_engine(self.make_engine)
                self._take(engine)
                if self._running:
                    self._report(engine.step())
                    self.crashes_in_a_row = 0
            except Exception as error:
                engine = None  # its memory goes before a new one is made
                self._crash(error)
        self._end()

    def _next_work(self) -> bool:
        """Sleeps until there is something to do; False: the end."""
        with self._wake:
            while self.ready and not (
                self._stopping
                or self._line
                or self._running
                or self._cancelled
                or self._replacement
            ):
                self._wake.wait()
            return not self._stopping

    def _new_engine(self, make: Callable[[], Engine]) -> Engine:
        engine = make()
        self.ready = True
        self.metrics.ready.set(1)
        return engine

    def _replacement_is_due(self) -> bool:
        with self._wake:
            return self._replacement is not None and not (self._running or self._line)

    def _replaced(self) -> Engine | None:
        """The engine that was to take this one's place; None where it cannot be made."""
        assert self._replacement is not None, "it is due"
        try:
            engine = self._new_engine(self._replacement[0])
        except Exception as error:
            self._settle(error)
            return None
        self._settle(None)
        return engine

    def _settle(self, error: Exception | None) -> None:
        """Tells who waits for a replacement, if anybody does, how it went."""
        if self._replacement is not None:
            (_, done), self._replacement = self._replacement, None
            self._loop.call_soon_threadsafe(_set, done, error)

    def _take(self, engine: Engine) -> None:
        """Takes out what was cancelled and lets jobs in from the line."""
        with self._wake:
            cancelled, self._cancelled = {job for job, _ in self._cancelled}, []
            self._line = deque(job for job in self._line if job not in cancelled)
            gone = [sequence for sequence, job in self._running.items() if job in cancelled]
            for sequence in gone:
                engine.abort(sequence)
                del self._running[sequence]
            while self._line and len(self._running) < self.max_running:
                self._enter(engine, self._line.popleft())
            self.metrics.waiting.set(len(self._line))
            self.metrics.running.set(len(self._running))

    def _enter(self, engine: Engine, job: Job) -> None:
        try:
            sequence = engine.add(job.request)
        except UserError as error:  # what only the engine knows, such as the size of its cache
            job.refusal = str(error)
            self._tell([(job, [], "refused")])
            return
        except Exception:
            self._tell([(job, [], "crashed")])
            raise
        self._running[sequence] = job
        if sequence.finish_reason is not None:
            self._report([sequence])

    def _report(self, moved: list[Sequence]) -> None:
        """Hands new ids and outcomes to the event loop, all of a step in one call."""
        news: list[tuple[Job, list[int], Outcome | None]] = []
        for sequence in moved:
            if (job := self._running.get(sequence)) is None:
                continue
            ids = sequence.new_ids[job.n_told :]
            job.n_told += len(ids)
            news.append((job, ids, sequence.finish_reason))
            if sequence.finish_reason is not None:
                del self._running[sequence]
        self.metrics.running.set(len(self._running))
        self._tell(news)

    def _tell(self, news: list[tuple[Job, list[int], Outcome | None]]) -> None:
        self._loop.call_soon_threadsafe(self._deliver, news)

    def _deliver(self, news: list[tuple[Job, list[int], Outcome | None]]) -> None:
        """In the event loop."""
        now = time.monotonic()
        for job, ids, outcome in news:
            if job.outcome is not None:  # cancelled meanwhile
                continue
            if ids and not job.ids:
                self.metrics.first_token.observe(now - job.submitted)
            self.metrics.new_tokens.inc(len(ids))
            job.push(ids, outcome)
            if outcome is not None:
                self._count(outcome)

    def _count(self, outcome: Outcome) -> None:
        self.metrics.answers.labels(outcome).inc()
        if outcome == "aborted":
            self.metrics.aborted.inc()

    def _crash(self, error: Exception) -> None:
        """Fails what was in the engine; the next turn of the loop makes a new one."""
        self.ready = False
        self.metrics.ready.set(0)
        self.metrics.restarts.inc()
        self.crashes_in_a_row += 1
        lost = list(self._running.values())
        self._running.clear()
        if self.dead:
            with self._wake:
                lost += self._line
                self._line.clear()
        log.error("The engine crashed; these answers are lost: %s.",
                  ", ".join(job.id for job in lost) or "none", exc_info=error)  # fmt: skip
        self._tell([(job, [], "crashed") for job in lost])
        if self.dead:
            log.error("The engine crashed %d times in a row; replace this process.", MAX_CRASHES)
        time.sleep(min(10.0, 0.05 * 4 ** min(self.crashes_in_a_row - 1, 4)))

    def _end(self) -> None:
        self.ready = False
        self.metrics.ready.set(0)
        left = [*self._running.values(), *self._line]
        self._running.clear()
        self._line.clear()
        if not self._loop.is_closed():
            self._tell([(job, [], "stopped") for job in left])
            self._settle(RuntimeError("The worker has ended."))


def _set(done: asyncio.Future[None], error: Exception | None) -> None:
    if done.done():  # who waited was cancelled
        return
    if error is None:
        done.set_result(None)
    else:
        done.set_exception(error)
