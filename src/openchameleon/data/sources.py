"""Folders and files -> records, one at a time. Knows no tokens.

Read are: a folder with `records.jsonl` (as `world sample` writes it), such a file itself, and a
plain folder of pictures that each have a caption beside them (`cat.png`, `cat.txt`). A picture with
its caption is a conversation, as people will have it with the model: one of the two is the answer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openchameleon.document import (
    Conversation,
    Document,
    Image,
    Message,
    Record,
    Segment,
    Text,
    documents_of,
    read_jsonl,
    record_from_json,
)
from openchameleon.errors import UserError
from openchameleon.image_io import SUFFIXES, open_image

if TYPE_CHECKING:
    import PIL.Image

RECORDS = "records.jsonl"


def read_records(path: Path) -> Iterator[Record]:
    """The records of a folder or file, in order. UserError names the file and line at fault."""
    jsonl = _jsonl_of(path)
    return _read_jsonl_records(jsonl) if jsonl else _read_captioned(path)


def count_records(path: Path) -> int:
    """How many records `read_records` will yield if none is at fault."""
    if jsonl := _jsonl_of(path):
        with jsonl.open("rb") as lines:
            return sum(1 for line in lines if line.strip())
    return len(_pictures(path))


def file_stamps(files: Iterable[Path], folder: Path) -> list[object]:
    """Name under `folder`, size and time of each file: changes with what there is to learn from."""
    stats = ((file, file.stat()) for file in files)
    return [[str(f.relative_to(folder)), stat.st_size, stat.st_mtime_ns] for f, stat in stats]


def _jsonl_of(path: Path) -> Path | None:
    """The JSONL file meant by `path`, or None for a folder of captioned pictures."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"There is no folder or file {path}.")
    return path / RECORDS if (path / RECORDS).is_file() else None


def _read_jsonl_records(path: Path) -> Iterator[Record]:
    def load_image(name: Any) -> PIL.Image.Image:
        if not isinstance(name, str):
            raise ValueError('"image" must be a path')
        return open_image(path.parent / name)

    try:
        for number, data in read_jsonl(path):
            try:
                record = record_from_json(data, load_image)
                _check(record)
            except KeyError as error:
                raise UserError(f"{path}:{number}: a message lacks {error}.") from error
            except (ValueError, TypeError, UserError) as error:
                raise UserError(f"{path}:{number}: {error}") from error
            yield record
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text.") from error
    except ValueError as error:  # not JSON
        raise UserError(f"{error}") from error


def _check(record: Record) -> None:
    """ValueError unless there is something to learn from it."""
    for segment in (segment for document in documents_of(record) for segment in document):
        if isinstance(segment, Text) and not isinstance(segment.text, str):
            raise ValueError('"text" must be a string')
    if isinstance(record, Conversation) and [m.role for m in record.messages[-1:]] != ["assistant"]:
        raise ValueError("a conversation must end with the assistant's turn")


def _read_captioned(folder: Path) -> Iterator[Record]:
    pictures = _pictures(folder)
    if not pictures:
        raise UserError(
            f"{folder} holds neither {RECORDS} nor pictures ({', '.join(sorted(SUFFIXES))})."
        )
    for picture in pictures:
        caption = picture.with_suffix(".txt")
        try:
            text = caption.read_text(encoding="utf-8").strip()
        except FileNotFoundError as error:
            raise UserError(f"{picture} has no caption: write it in {caption.name}.") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{caption} is not UTF-8 text.") from error
        pair: list[Segment] = [Text(text), Image(open_image(picture))]
        # half of the pictures teach drawing and half describing, the same ones in every run
        if hashlib.sha256(picture.relative_to(folder).as_posix().encode()).digest()[0] % 2:
            pair.reverse()
        asked, answer = (Document([segment]) for segment in pair)
        yield Conversation([Message("user", asked), Message("assistant", answer)])


def _pictures(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
