"""What a model reads and writes, as plain data: text and pictures in order, and turns of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import PIL.Image

Role = Literal["user", "assistant"]


@dataclass(frozen=True, slots=True)
class Text:
    """A run of text, exactly as given: no stripping, no special spellings."""

    text: str


@dataclass(frozen=True, slots=True, eq=False)
class Image:
    """A picture: an upright RGB `PIL.Image.Image` of any size."""

    pil: PIL.Image.Image


Segment = Text | Image


@dataclass(frozen=True, slots=True, eq=False)
class Document:
    """Text and pictures in order."""

    segments: tuple[Segment, ...]

    def __init__(self, segments: Iterable[Segment | str] = ()) -> None:
        if isinstance(segments, str):
            raise TypeError("a document is made of a list of segments, not of a str")
        parts = tuple(Text(s) if isinstance(s, str) else s for s in segments)
        for part in parts:
            if not isinstance(part, (Text, Image)):
                raise TypeError(f"a segment is Text or Image, not {type(part).__name__}")
        object.__setattr__(self, "segments", parts)

    def __iter__(self) -> Iterator[Segment]:
        return iter(self.segments)

    def __len__(self) -> int:
        return len(self.segments)

    @property
    def text(self) -> str:
        """All text of the document joined, the pictures left out."""
        return "".join(s.text for s in self.segments if isinstance(s, Text))

    @property
    def images(self) -> list[PIL.Image.Image]:
        """The pictures in order."""
        return [s.pil for s in self.segments if isinstance(s, Image)]


@dataclass(frozen=True, slots=True, eq=False)
class Message:
    """One turn of a conversation."""

    role: Role
    document: Document


@dataclass(frozen=True, slots=True, eq=False)
class Conversation:
    """Turns, alternating from the user's first."""

    messages: tuple[Message, ...]

    def __init__(self, messages: Iterable[Message]) -> None:
        turns = tuple(messages)
        for i, turn in enumerate(turns):
            expected = ("user", "assistant")[i % 2]
            if turn.role != expected:
                raise ValueError(f"turn {i} is {turn.role!r}, expected {expected!r}")
        object.__setattr__(self, "messages", turns)

    @staticmethod
    def ask(document: Document) -> Conversation:
        return Conversation([Message("user", document)])


# One JSON line a record: {"segments": [{"text": ...} | {"image": PATH}, ...]} or
# {"messages": [{"role": ..., "segments": [...]}, ...]}; PATH is relative to the JSONL file.
Record = Document | Conversation


def documents_of(record: Record) -> list[Document]:
    """The record itself, or the document of each of its turns."""
    return [record] if isinstance(record, Document) else [m.document for m in record.messages]


def record_to_json(record: Record, save_image: Callable[[PIL.Image.Image], str]) -> dict[str, Any]:
    """A record as JSON data; `save_image` stores a picture and returns the path to write."""

    def segments(document: Document) -> list[dict[str, str]]:
        return [
            {"text": s.text} if isinstance(s, Text) else {"image": save_image(s.pil)}
            for s in document
        ]

    if isinstance(record, Document):
        return {"segments": segments(record)}
    turns = record.messages
    return {"messages": [{"role": t.role, "segments": segments(t.document)} for t in turns]}


def record_from_json(data: dict[str, Any], load_image: Callable[[str], PIL.Image.Image]) -> Record:
    """The inverse of `record_to_json`. ValueError says what a malformed record lacks."""

    def document(segments: Any) -> Document:
        if not isinstance(segments, list):
            raise ValueError('"segments" must be a list')
        parts: list[Segment] = []
        for s in segments:
            if not isinstance(s, dict) or len(s.keys() & {"text", "image"}) != 1:
                raise ValueError('a segment must have exactly one of "text" and "image"')
            parts.append(Text(s["text"]) if "text" in s else Image(load_image(s["image"])))
        return Document(parts)

    if "segments" in data:
        return document(data["segments"])
    if "messages" in data:
        turns = [Message(m["role"], document(m["segments"])) for m in data["messages"]]
        return Conversation(turns)
    raise ValueError('a record has "segments" or "messages"')


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """`(line number from 1, object)` of each non-empty line. ValueError names file and line."""
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                data = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: not JSON ({error.msg})") from error
            if not isinstance(data, dict):
                raise ValueError(f"{path}:{number}: not a JSON object")
            yield number, data
