"""The one exception a user is meant to read: a sentence saying what was wrong and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """What the user can mend. The command line prints its text alone and ends with `exit_code`."""

    exit_code = 2


class CheckpointError(UserError):
    """A checkpoint that cannot be read: the sentence names the file and, where there is one, the
    tensor.
    """

    exit_code = 3


class Diverged(UserError):
    """A training that cannot go on as it is."""

    exit_code = 42


class Stopped(Exception):
    """A signal ended a long work at a point from which the same command goes on; its text says so.

    The command line prints it and exits with 130.
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the closest known name, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""
