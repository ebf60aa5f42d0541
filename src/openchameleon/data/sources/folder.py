"""A plain folder of real files: pictures with captions beside them, text, and source code.

`cat.png` has its caption in `cat.txt`; every other text is a document by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

from openchameleon.data.sources.entry import Entry, Pairs, decoded, pair
from openchameleon.data.sources.location import opened, picture_at
from openchameleon.document import Document, Record, Text
from openchameleon.image_io import SUFFIXES

CAPTION = ".txt"
TEXT_SUFFIXES = frozenset({".txt", ".md", ".rst"})
CODE_SUFFIXES = frozenset({
    ".c", ".cc", ".cpp", ".cs", ".css", ".cu", ".go", ".h", ".hpp", ".html", ".java", ".jl", ".js",
    ".kt", ".lua", ".php", ".pl", ".py", ".r", ".rb", ".rs", ".scala", ".sh", ".sql", ".swift",
    ".ts",
})  # fmt: skip
RECORD_SUFFIXES = SUFFIXES | TEXT_SUFFIXES | CODE_SUFFIXES
"""How the names of the files end that a plain folder is read for."""


def record_names(files: Iterable[str]) -> list[str]:
    """Those of a folder's files that are records: all that are read, but for captions."""
    names = [name for name in files if suffix(name) in RECORD_SUFFIXES]
    captions = {_caption_of(name) for name in names if suffix(name) in SUFFIXES}
    return [name for name in names if name not in captions]


def files_of(name: str) -> list[str]:
    """The files that a record is read from, a caption among them that may not be there."""
    return [name, _caption_of(name)] if suffix(name) in SUFFIXES else [name]


def entries(folder: str, names: Iterable[str], pairs: Pairs) -> Iterator[Entry]:
    """One record a name, in the order given."""
    for name in names:
        read = _captioned if suffix(name) in SUFFIXES else _text
        yield Entry(f"{folder}/{name}", partial(read, folder, name, pairs))


def suffix(name: str) -> str:
    """How a file's name ends, in lower case: ".png"."""
    stem, dot, end = name.rpartition("/")[2].rpartition(".")
    return (dot + end).lower() if stem else ""


def _caption_of(name: str) -> str:
    return name.rpartition(".")[0] + CAPTION


def _captioned(folder: str, name: str, pairs: Pairs) -> Record:
    caption = _caption_of(name)
    try:
        text = _read(f"{folder}/{caption}").strip()
    except FileNotFoundError as error:
        beside = caption.rpartition("/")[2]
        raise ValueError(f"{folder}/{name} has no caption: write it in {beside}.") from error
    except ValueError as error:
        raise ValueError(f"the caption of {folder}/{name} is {error}") from error
    return pair(name, text, picture_at(f"{folder}/{name}"), pairs)


def _text(folder: str, name: str, pairs: Pairs) -> Record:
    return Document([Text(_read(f"{folder}/{name}"))])


def _read(location: str) -> str:
    with opened(location) as file:
        return decoded(file.read())
