"""What the routes share: the model, its worker, the threads for pictures, and whether it is open.

loading -> ready -> draining
"""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from fastapi import Request as HTTPRequest

from openchameleon.errors import UserError
from openchameleon.inference.engine import Engine
from openchameleon.inference.params import new_seed
from openchameleon.inference.sequence import Request
from openchameleon.pipeline import NOT_FINITE, Chameleon, PromptTooLong
from openchameleon.serve.answer import Answer
from openchameleon.serve.clients import unless_gone
from openchameleon.serve.decoding import N_PROCESSES, Decoders
from openchameleon.serve.errors import ApiError, unavailable
from openchameleon.serve.fetch import Fetcher
from openchameleon.serve.metrics import Metrics
from openchameleon.serve.pictures import Source
from openchameleon.serve.prompts import (
    Given,
    Prompt,
    read_prompt,
    refuse_too_much,
    with_fetched,
)
from openchameleon.serve.threads import left_behind
from openchameleon.serve.worker import Job, Worker

log = logging.getLogger(__name__)

T = TypeVar("T")
RETRY_AFTER = 2  # seconds
ENDING = "The server is ending; send the request to another, or again soon."


@dataclass(frozen=True)
class Settings:
    """How a server behaves.

    max_running: answers being written at a time. max_open: requests let in at a time, those in
    line included; more get 429. drain: seconds that answers may take to end after SIGTERM.
    image_hosts: where pictures may be fetched from, see `Fetcher`; no host, no fetching.
    """

    name: str
    api_key: str | None = None
    max_running: int = 64
    max_open: int = 128
    drain: float = 30.0
    picture_threads: int = 2
    image_hosts: tuple[str, ...] = ()


class Service:
    """One model behind the routes.

    load: gives it; called in a thread of its own. make_engine: what steps it, at the start and
    again after a crash; called in the worker's thread. load_anew: gives it again while it is
    served, as `load` does; None where it can be loaded once only.
    """

    def __init__(
        self,
        settings: Settings,
        load: Callable[[], Chameleon],
        make_engine: Callable[[Chameleon], Engine] | None = None,
        load_anew: Callable[[], Chameleon] | None = None,
    ) -> None:
        self.settings, self._load, self._load_anew = settings, load, load_anew
        self._engine_of = make_engine or new_engine
        self.metrics = Metrics()
        self.worker = Worker(self._make_engine, settings.max_running, self.metrics)
        self.pool = ThreadPoolExecutor(settings.picture_threads, "pictures")
        self.fetcher = Fetcher(settings.image_hosts) if settings.image_hosts else None
        self.decoders = Decoders()
        # Apart from the others, who so never wait for a picture that a decoder is long at.
        self.readers = ThreadPoolExecutor(N_PROCESSES, "readers")
        self.draining = False
        self.n_open = 0
        self.failure: Exception | None = None
        self._chameleon: Chameleon | None = None
        self._reloading: asyncio.Task[None] | None = None
        self._n_preparing = 0
        self._stays = asyncio.Event()  # unset while another model takes the place of this one
        self._stays.set()

    @property
    def ready(self) -> bool:
        """Whether new requests are taken."""
        return self.worker.ready and not self.draining

    @property
    def chameleon(self) -> Chameleon:
        """The model. ApiError 503 while it is loaded."""
        if self._chameleon is None:
            raise unavailable("The model is being loaded; try again soon.")
        return self._chameleon

    @property
    def picture_size(self) -> str:
        """Of what the model draws, as "96x96"; "0x0" for a model of text alone."""
        image = self.chameleon.tokenizer.image
        side = image.resolution if image else 0
        return f"{side}x{side}"

    def require_model(self, name: str | None) -> None:
        """ApiError 404 for a model that is not served here."""
        if name not in (None, self.settings.name):
            raise ApiError(404, "model_not_found", f"There is no model {name[:100]!r} here; it is"
                           f" {self.settings.name!r}.", "model")  # fmt: skip

    async def start(self) -> None:
        """Loads the model and starts the engine. What goes wrong is raised, and kept: `failure`."""
        self.loop = asyncio.get_running_loop()
        try:
            self._chameleon = await left_behind(self._load, "load")
        except Exception as error:
            self.failure = error
            raise
        self.worker.start()

    def stop(self) -> None:
        if self._chameleon is not None:
            self.worker.stop()
        self.decoders.close()
        for pool in (self.readers, self.pool):
            pool.shutdown(cancel_futures=True)

    async def reload(self) -> None:
        """Loads the model anew, and serves it when what is under way with the old one has ended.

        What comes meanwhile waits. ApiError, and the old one goes on: 409 where it cannot be loaded
        again or is being loaded, 422 with what is wrong with the files, 503 at the end.
        """
        if self._load_anew is None:
            raise ApiError(409, "conflict", "This model cannot be loaded anew while it is served:"
                           " several processes share it. Start the server again.")  # fmt: skip
        if self._reloading is not None:
            raise ApiError(409, "conflict", "The model is being loaded anew already.")
        self._reloading = asyncio.create_task(self._replace(self._load_anew))
        await asyncio.shield(self._reloading)  # which is not half done because its client goes

    async def _replace(self, load: Callable[[], Chameleon]) -> None:
        try:
            model = await left_behind(load, "load")
            self._stays.clear()
            while self._n_preparing:
                await asyncio.sleep(0.01)
            await self.worker.replace(lambda: self._make_engine(model))
            self._chameleon = model
        except UserError as error:
            raise ApiError(422, "invalid_model", f"The old model goes on: {error}") from error
        except Exception as error:
            if self.draining:
                raise unavailable(ENDING) from error
            log.exception("The model could not be loaded anew.")
            raise ApiError(500, "server_error", "The model could not be loaded anew, the server's"
                           " log says why; the old one goes on.") from error  # fmt: skip
        finally:
            self._stays.set()
            self._reloading = None  # it would hold what was raised, and with that the model

    def enter(self) -> None:
        """Lets a request in, until `leave`. ApiError 429 where it is full, 503 where closed."""
        if self.draining:
            raise unavailable(ENDING)
        _ = self.chameleon
        if not self.worker.ready:
            raise unavailable("The engine is being restarted; try again soon.")
        if self.n_open >= self.settings.max_open:
            raise ApiError(
                429, "too_many_requests",
                f"The server is busy with {self.n_open} requests; try again soon.",
                headers={"Retry-After": str(RETRY_AFTER)},
            )  # fmt: skip
        self.n_open += 1
        self.metrics.requests.set(self.n_open)

    def leave(self) -> None:
        self.n_open -= 1
        self.metrics.requests.set(self.n_open)

    async def prepare(
        self, given: Iterable[Given], make: Callable[[Chameleon, Prompt], T], param: str
    ) -> T:
        """What `make` makes of the model and of the parts of a conversation, in a thread.

        ApiError for mistakes; of those that no part is to blame for, `param` is the name.
        """
        if not self._stays.is_set():
            await self._stays.wait()
            if self.draining:
                raise unavailable(ENDING)
        parts, model = list(given), self.chameleon
        refuse_too_much(parts, model, param)
        has_pictures = any(isinstance(part.content, Source) for part in parts)
        pool = self.readers if has_pictures else self.pool

        def work() -> T:
            return make(model, read_prompt(parts, model, param, self.decoders.decode))

        self._n_preparing += 1
        try:
            if has_pictures and self.fetcher is not None:
                parts = await with_fetched(parts, self.fetcher)
            return await asyncio.get_running_loop().run_in_executor(pool, work)
        except PromptTooLong as error:
            raise ApiError(400, "context_length_exceeded", str(error), param) from error
        except UserError as error:
            raise ApiError(400, "invalid_request", str(error), param) from error
        finally:
            self._n_preparing -= 1  # and with no wait between, its requests are in line

    def submit(
        self, request: Request, partial_pictures: int = 0, stops: tuple[str, ...] = ()
    ) -> Answer:
        """Puts a request in line; the answer is to be followed, and given up by `cancel`."""
        job = self.worker.submit(request)
        return Answer(job, self.chameleon.tokenizer, self.metrics, partial_pictures, stops)

    def cancel(self, answers: Sequence[Answer]) -> None:
        """Ends what is under way of them, as aborted by the client."""
        for answer in answers:
            self.worker.cancel(answer.job, "stop" if answer.stopped else "aborted")

    async def collect(self, http: HTTPRequest, answers: Sequence[Answer]) -> None:
        """Follows answers to their end, or until the client has gone.

        ApiError as soon as one failed: the others, which nobody would get, end with it.
        """
        try:
            await unless_gone(http, asyncio.gather(*(self._follow(a) for a in answers)))
        finally:
            self.cancel(answers)

    async def _follow(self, answer: Answer) -> None:
        async for _ in answer.pieces(self.pool):
            pass
        if answer.stopped:
            self.cancel([answer])
        if error := failure_of(answer.job):
            raise error

    def _make_engine(self, model: Chameleon | None = None) -> Engine:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return self._engine_of(model or self.chameleon)


def new_engine(model: Chameleon) -> Engine:
    engine = Engine(model.model, model.config.vocab, compiled=model.engine.compiled)
    if engine.compiled:
        engine.warm_up()  # so that nobody waits for it
    return engine


def failure_of(job: Job) -> ApiError | None:
    """The error that a job ended with, or None."""
    if job.outcome == "refused":
        return ApiError(400, "invalid_request", job.refusal)
    if job.outcome == "nonfinite_logits":
        return ApiError(500, "nonfinite_logits", NOT_FINITE)
    if job.outcome == "crashed":
        return ApiError(500, "server_error", f"The engine failed on answer {job.id}; it is being"
                        " restarted: try again.")  # fmt: skip
    if job.outcome == "stopped":
        return unavailable(ENDING)
    return None


def seed_for(seed: int | None) -> int:
    """The seed asked for, or a new one: so that every answer can be had again."""
    return new_seed() if seed is None else seed
