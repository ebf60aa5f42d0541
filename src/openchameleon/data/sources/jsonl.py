"""JSON lines of documents and conversations, their pictures as files beside (see `document`)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from openchameleon.data.sources.entry import Entry, Pairs, decoded
from openchameleon.data.sources.location import beside, opened, picture_at
from openchameleon.document import Record, record_from_json

if TYPE_CHECKING:
    import PIL.Image


def entries(location: str, pairs: Pairs) -> Iterator[Entry]:
    """A record a line that is not empty, named by its number from 1; it says itself what it is."""
    with opened(location) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield Entry(f"{location}:{number}", partial(_record, line, location))


def _record(line: bytes, location: str) -> Record:
    def load_image(name: object) -> PIL.Image.Image:
        if not isinstance(name, str):
            raise ValueError('"image" must be a path')
        return picture_at(beside(location, name))

    try:
        data = json.loads(decoded(line))
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg})") from error
    if not isinstance(data, dict):
        raise ValueError("not a JSON object")
    try:
        return record_from_json(data, load_image)
    except KeyError as error:
        raise ValueError(f"a message lacks {error}") from error
