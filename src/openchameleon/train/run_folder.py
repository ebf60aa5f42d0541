"""A run's folder: whose it is, who writes to it now, and what asks its process to stop."""

from __future__ import annotations

import json
import os
import platform
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from openchameleon.errors import UserError


def claim(folder: Path, identity: Mapping[str, Any]) -> None:
    """Writes down what the run is, as JSON data; UserError where the folder holds another."""
    path = folder / "run.json"
    if not path.exists():
        temporary = path.with_name("run.json.tmp")
        temporary.write_text(json.dumps(identity, indent=1), encoding="utf-8")
        os.replace(temporary, path)
    elif changes := differences(json.loads(path.read_text(encoding="utf-8")), identity):
        raise UserError(
            f"{folder} holds a run of another config: {'; '.join(changes)}. "
            "Give back these values, or name a new folder."
        )


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`"a.b was 1, is 2"` for each value that differs in nested JSON data."""
    old, new = dict(_leaves(before)), dict(_leaves(now))
    return [
        f"{key} was {old.get(key, 'absent')}, is {new.get(key, 'absent')}"
        for key in old | new
        if old.get(key) != new.get(key)
    ]


def _leaves(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def environment(device: torch.device) -> dict[str, Any]:
    """What the last bits of a result depend on besides the config."""
    return {
        "device": device.type,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }


def warn_if_elsewhere(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Says on standard error where the environment of a run that goes on is another one."""
    known = {key: before[key] for key in before.keys() & now.keys()}
    if changes := differences(known, {key: now[key] for key in known}):
        print(
            f"warning: this run was begun elsewhere ({'; '.join(changes)}): it goes on, but "
            "not bit for bit as it would have there.",
            file=sys.stderr,
        )


def stopped_text(signal_name: str, step: int) -> str:
    """What a stopped run says: of `Stopped`, for the user to read."""
    return f"Stopped by {signal_name} after step {step}, which is saved; the same command goes on."


@contextmanager
def stop_signals() -> Iterator[list[str]]:
    """A list that receives the name of the first SIGINT or SIGTERM; the second one acts as ever."""
    received: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread can have handlers
        return
    previous = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: object) -> None:
        received.append(signal.Signals(number).name)
        print("finishing this step, then saving; once more stops at once", file=sys.stderr)
        restore()

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    for number in previous:
        signal.signal(number, handle)
    try:
        yield received
    finally:
        restore()
