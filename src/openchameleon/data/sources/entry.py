"""A record that is not read yet, and how a picture and its caption become one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Literal, NamedTuple

from openchameleon.document import (
    Conversation,
    Document,
    Image,
    Message,
    Record,
    Segment,
    Text,
    documents_of,
)
from openchameleon.errors import UserError

if TYPE_CHECKING:
    import PIL.Image

Pairs = Literal["chat", "documents"]
"""What a picture with its caption is: a question and its answer, or a plain document."""


class Entry(NamedTuple):
    """Where a record is, as an error names it, and what reads it."""

    name: str
    load: Callable[[], Record]


def loaded(entry: Entry) -> Record:
    """The record. UserError names the one that cannot be used, and says why."""
    try:
        record = entry.load()
        _check(record)
    except (UserError, OSError, ValueError, TypeError) as error:
        named = entry.name in str(error)
        raise UserError(str(error) if named else f"{entry.name}: {error}") from error
    return record


def _check(record: Record) -> None:
    """ValueError unless there is something to learn from it."""
    for segment in (segment for document in documents_of(record) for segment in document):
        if isinstance(segment, Text) and not isinstance(segment.text, str):
            raise ValueError('"text" must be a string')
    if isinstance(record, Conversation) and [m.role for m in record.messages[-1:]] != ["assistant"]:
        raise ValueError("a conversation must end with the assistant's turn")


def pair(key: str, caption: str, picture: PIL.Image.Image, pairs: Pairs) -> Record:
    """A picture with its caption, in an order that is drawn by a hash of `key`.

    Half of the pictures come first and half of the captions, the same ones in every run (paper,
    section 2.2); in a conversation what comes second is the answer.
    """
    segments: list[Segment] = [Text(caption), Image(picture)]
    if hashlib.sha256(key.encode()).digest()[0] % 2:
        segments.reverse()
    if pairs == "documents":
        return Document(segments)
    asked, answer = (Document([segment]) for segment in segments)
    return Conversation([Message("user", asked), Message("assistant", answer)])


def decoded(data: bytes) -> str:
    """Bytes as text. ValueError where there is none, or not in UTF-8."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError("not UTF-8 text") from error
    if not text.strip():
        raise ValueError("empty")
    return text


def to_the_break(name: str, entries: Iterator[Entry]) -> Iterator[Entry]:
    """The entries of a file and, where it cannot be read on, one more that says so."""
    n = 0
    try:
        for entry in entries:
            yield entry
            n += 1
    except (OSError, EOFError, ValueError) as broken:
        reason = f"{name} cannot be read on after {n} records: {broken}"

        def fail() -> Record:
            raise UserError(reason)

        yield Entry(name, fail)
