"""What a run has made already: each output has a file beside it with the hash of what made it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

from openchameleon.errors import UserError


def mark_of(path: Path) -> Path:
    """The file beside `path` that says what made it."""
    return path.with_name(path.name + ".made-by")


def is_done(path: Path, mark: str) -> bool:
    """Whether the output is there, made by `mark`. UserError if another config made it."""
    file = mark_of(path)
    if not path.exists():
        file.unlink(missing_ok=True)  # what is made now may be cut off half-way
    if not file.exists():
        return False
    if file.read_text() != mark:
        raise UserError(
            f"{path} was made with another config; remove it to make it again, or give another "
            "--out."
        )
    return True


def make_once(path: Path, mark: str, make: Callable[[], object]) -> None:
    """Makes `path` unless it is made; says so."""
    if is_done(path, mark):
        print(f"{path}: done before", file=sys.stderr)
        return
    start = time.monotonic()
    make()
    mark_of(path).write_text(mark)
    print(f"{path}: done in {time.monotonic() - start:.0f} s", file=sys.stderr)
