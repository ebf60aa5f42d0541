"""The other processes of a model on this host: started beside this one, watched, and let go.

They stand outside its terminal: Ctrl-C and SIGTERM are for the first process alone.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SECONDS_TO_END = 10


@contextmanager
def companions(n_processes: int, arguments: dict[str, Any]) -> Iterator[None]:
    """Makes this process the first of so many, as `torchrun` would; each other is a `follower`.

    One that ends before it is let go ends this process too, with exit code 1 and a sentence: what
    they compute together cannot be gone on with.
    """
    own = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(n_processes),
           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}  # fmt: skip
    before = {name: os.environ.get(name) for name in own}
    os.environ |= own
    command = [sys.executable, "-m", "openchameleon.serve.follower", json.dumps(arguments)]
    started = {
        rank: subprocess.Popen(
            command,
            env=os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        for rank in range(1, n_processes)
    }
    let_go = threading.Event()
    threading.Thread(target=_watch, args=(started, let_go), daemon=True).start()
    try:
        yield
    finally:
        let_go.set()
        for process in started.values():
            try:
                process.wait(SECONDS_TO_END)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def end_with_parent() -> None:
    """Ends this process, whatever it waits for, soon after the one that started it has gone."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _watch(started: dict[int, subprocess.Popen[bytes]], let_go: threading.Event) -> None:
    while not let_go.wait(0.5):
        for rank, process in started.items():
            if process.poll() is not None and not let_go.is_set():
                print(
                    f"openchameleon: process {rank} of {len(started) + 1} has ended with code"
                    f" {process.returncode}, and the others cannot go on; start anew.",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(1)  # this process may wait for the lost one, and then hears no exception


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
        return port
