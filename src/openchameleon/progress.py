"""Progress on anything longer than two seconds: done, rate and time left, on standard error."""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


class Progress:
    """One line, redrawn in place on a terminal, printed every 30 s elsewhere; silent under 2 s.

    total: 0 where it is not known.
    """

    def __init__(
        self, label: str, total: int, unit: str = "", done: int = 0, silent: bool = False
    ) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = self._start_done = done
        self._start = self._shown = time.monotonic()
        self._note = ""
        self._tty = sys.stderr.isatty()
        self._wrote = False
        # A worker's line would be drawn over its parent's, which counts the workers' results.
        self._silent = silent or multiprocessing.parent_process() is not None

    def update(self, done: int, note: str = "") -> None:
        """Sets the number done (absolute) and shows it if it is time to."""
        self.done, self._note = done, note or self._note
        now = time.monotonic()
        interval = (0.2 if self._tty else 30.0) if self._wrote else 2.0
        if now - self._shown >= interval and not self._silent:
            self._write(now)

    def close(self) -> None:
        """Writes the last state, if any was ever shown."""
        if self._wrote:
            self._write(time.monotonic())
            if self._tty:
                sys.stderr.write("\n")

    def _write(self, now: float) -> None:
        self._shown, self._wrote = now, True
        rate = (self.done - self._start_done) / max(now - self._start, 1e-9)
        left = (self.total - self.done) / rate if rate > 0 else float("inf")
        known = f" | {_clock(left)} left" if self.total else ""
        of = f"/{self.total}" if self.total else ""
        line = f"{self.label}: {self.done}{of} {self.unit} | {rate:.3g}/s{known} {self._note}"
        sys.stderr.write(f"\r\x1b[2K{line}" if self._tty else f"{line}\n")
        sys.stderr.flush()


def track(items: Iterable[T], label: str, total: int, unit: str = "") -> Iterator[T]:
    """Yields `items`, showing progress."""
    progress = Progress(label, total, unit)
    for n, item in enumerate(items, 1):
        yield item
        progress.update(n)
    progress.close()


def _clock(seconds: float) -> str:
    if seconds == float("inf"):
        return "?"
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"
