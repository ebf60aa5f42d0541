"""The process: uvicorn around the app, and an end in order when a signal asks for it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import Callable, Iterator

import uvicorn

from openchameleon.errors import UserError
from openchameleon.inference.engine import Engine
from openchameleon.pipeline import Chameleon
from openchameleon.serve.app import create_app
from openchameleon.serve.service import Service, Settings

log = logging.getLogger(__name__)
SIGNALS = (signal.SIGTERM, signal.SIGINT)
LAST_WORDS = 2.0  # seconds in which streams that were cut send their last event


def serve(
    settings: Settings,
    load: Callable[[], Chameleon],
    host: str,
    port: int,
    make_engine: Callable[[Chameleon], Engine] | None = None,
    load_anew: Callable[[], Chameleon] | None = None,
) -> None:
    """Serves until a signal; arguments as of `Service`.

    UserError where the model cannot be loaded or the address is taken.
    """
    service = Service(settings, load, make_engine, load_anew)
    server = Server(service, host, port)
    try:
        server.run()
    except SystemExit as error:  # uvicorn's way to say that it could not start
        raise UserError(
            f"Cannot listen on {host}:{port}: is it taken? Give another --port."
        ) from error
    if service.failure is not None:
        raise service.failure


class Server(uvicorn.Server):
    """Uvicorn that on SIGTERM goes on answering, `/ready` with 503, until its answers have ended.

    A second signal, or `drain` seconds, ends the answers with an error event.
    """

    def __init__(self, service: Service, host: str, port: int) -> None:
        self.service = service
        config = uvicorn.Config(
            create_app(service), host=host, port=port, log_level="warning", access_log=False,
            server_header=False, timeout_graceful_shutdown=LAST_WORDS,  # type: ignore[arg-type]
        )  # fmt: skip
        super().__init__(config)
        self._ending: asyncio.Task[None] | None = None
        self._hurry = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """In place of uvicorn's, which closes the door at once and then dies of the signal."""
        loop = asyncio.get_running_loop()
        try:
            for number in SIGNALS:
                loop.add_signal_handler(number, self.end)
        except (ValueError, RuntimeError):  # not the main thread: who runs us calls `end`
            pass
        yield

    def end(self) -> None:
        """The first call lets answers end, the second ends them. In the event loop."""
        if self._ending is not None:
            self._hurry.set()
            return
        self.service.draining = True
        self.service.metrics.ready.set(0)
        self._ending = asyncio.create_task(self._drain())

    async def on_tick(self, counter: int) -> bool:
        if self.service.failure is not None:
            return True
        return await super().on_tick(counter)

    async def _drain(self) -> None:
        until = time.monotonic() + self.service.settings.drain
        while self.service.n_open and time.monotonic() < until and not self._hurry.is_set():
            await asyncio.sleep(0.05)
        self.service.worker.cancel_all("stopped")
        until = time.monotonic() + LAST_WORDS
        while self.service.n_open and time.monotonic() < until:
            await asyncio.sleep(0.02)
        self.should_exit = True

    def _log_started_message(self, listeners: object) -> None:
        """One line that says where."""
        address, port = self.servers[0].sockets[0].getsockname()[:2]
        host = f"[{address}]" if ":" in address else address
        print(f"Serving {self.service.settings.name} at http://{host}:{port}", flush=True)
