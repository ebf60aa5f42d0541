"""A real server in a thread of this process, on a free port."""

from __future__ import annotations

import asyncio
import gc
import http.client
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import openai

from openchameleon.inference.engine import Engine
from openchameleon.pipeline import Chameleon
from openchameleon.serve.server import Server
from openchameleon.serve.service import Service, Settings

PATIENCE = 60.0  # seconds


class Running:
    """A server that answers at `url`."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.server = Server(service, "127.0.0.1", 0)
        self._thread = threading.Thread(target=self.server.run, daemon=True)
        self._thread.start()
        until(lambda: self.server.started)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    @property
    def client(self) -> openai.OpenAI:
        key = self.service.settings.api_key or "none"
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)

    def end(self) -> None:
        """As a SIGTERM does."""
        loop: asyncio.AbstractEventLoop = self.service.loop
        loop.call_soon_threadsafe(self.server.end)

    def join(self) -> None:
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "the server did not end"

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], Any]:
        """(status, headers, body: JSON or text) of one request on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            kind = {"Content-Type": "application/json"} if body is not None else {}
            connection.request(method, path, data, kind | (headers or {}))
            response = connection.getresponse()
            text = response.read().decode()
            found = {key.lower(): value for key, value in response.getheaders()}
        finally:
            connection.close()
        is_json = found.get("content-type", "").startswith("application/json")
        return response.status, found, json.loads(text) if is_json else text

    def metric(self, name: str, **labels: str) -> float:
        value = self.service.metrics.registry.get_sample_value(name, labels)
        return 0.0 if value is None else value


@cache
def leave_the_imported_out() -> None:
    """A server collects garbage before each engine; what all tests have imported is none."""
    gc.collect()
    gc.freeze()


@contextmanager
def serving(
    load: Callable[[], Chameleon],
    ready: bool = True,
    engine: Callable[[Chameleon], Engine] | None = None,
    load_anew: Callable[[], Chameleon] | None = None,
    **settings: Any,
) -> Iterator[Running]:
    """Serves what `load` gives. ready: waits until requests are taken. engine: in place of ours."""
    leave_the_imported_out()
    how = Settings(**{"name": "nano", "drain": 5.0} | settings)
    running = Running(Service(how, load, engine, load_anew))
    try:
        if ready:
            until(lambda: running.service.ready)
        yield running
    finally:
        if running.server.should_exit is False:
            running.end()
            running.end()
        running.join()


def start(*arguments: str, **environment: str) -> tuple[subprocess.Popen[str], int]:
    """The program in a process of its own, and its port."""
    command = [sys.executable, "-m", "openchameleon.cli.main", "serve", "--port", "0", *arguments]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | environment,
    )  # fmt: skip
    assert process.stdout is not None
    line = process.stdout.readline()
    return process, int(line.rsplit(":", 1)[1] if line else 0)


def until(true: Callable[[], Any], seconds: float = PATIENCE) -> None:
    """Waits until it is so."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.002)
