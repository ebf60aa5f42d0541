"""WebDataset: a tar whose neighbouring members of one key are a record, read as it streams.

The key is a member's path up to the first dot of its name; `a/1.jpg` with `a/1.txt` is a pair, a
`.txt` alone is a text. A `.json` has its text in "caption" or "text".
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from functools import partial
from itertools import groupby

from openchameleon.data.sources.entry import Entry, Pairs, decoded, pair
from openchameleon.data.sources.location import opened
from openchameleon.document import Document, Record, Text
from openchameleon.image_io import MAX_BYTES, SUFFIXES, open_image

CAPTION_KEYS = ("caption", "text")


def entries(location: str, pairs: Pairs) -> Iterator[Entry]:
    """A record a key, named `tar/key`. ValueError or OSError where the tar breaks off."""
    with opened(location) as file:
        try:
            for key, members in groupby(_members(file), lambda member: member[0]):
                parts = {suffix: data for _, suffix, data in members}
                yield Entry(f"{location}/{key}", partial(_record, key, parts, pairs))
        except tarfile.TarError as error:
            raise ValueError(str(error)) from error


class _Header(tarfile.TarInfo):
    """Tells a damaged header from the block of zeros at the end, which tarfile takes it for."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error


def _members(file: object) -> Iterator[tuple[str, str, bytes]]:
    """`(key, suffix, content)` of the files of a tar, one more byte than may be at most."""
    with tarfile.open(fileobj=file, mode="r|*", tarinfo=_Header) as tar:  # type: ignore[call-overload]
        for member in tar:
            folder, slash, name = member.name.rpartition("/")
            stem, dot, end = name.partition(".")
            if member.isfile() and stem:
                content = tar.extractfile(member)
                yield folder + slash + stem, (dot + end).lower(), content.read(MAX_BYTES + 1)


def _record(key: str, parts: dict[str, bytes], pairs: Pairs) -> Record:
    text = _caption(parts)
    pictures = [data for suffix, data in parts.items() if suffix in SUFFIXES]
    if len(pictures) > 1:
        raise ValueError(f"{len(pictures)} pictures have one key")
    if not pictures:
        return Document([Text(text)])
    return pair(key, text.strip(), open_image(pictures[0]), pairs)


def _caption(parts: dict[str, bytes]) -> str:
    if ".txt" in parts:
        return decoded(parts[".txt"])
    if ".json" not in parts:
        raise ValueError(f"there is no .txt or .json beside {', '.join(sorted(parts))}")
    data = json.loads(decoded(parts[".json"]))
    fields = data if isinstance(data, dict) else {}
    text = next((fields[k] for k in CAPTION_KEYS if isinstance(fields.get(k), str)), "")
    if not text.strip():
        raise ValueError(f"its .json has no text in {' or '.join(CAPTION_KEYS)}")
    return text
