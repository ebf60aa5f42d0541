"""Folders and files -> records, one at a time, in one order. Knows no tokens.

A source is cut into shards, each a file or some files of a plain folder; a module of this package
for each kind of them says how it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from openchameleon.data.sources import folder, jsonl, parquet, webdataset
from openchameleon.data.sources.bad import BadRecords
from openchameleon.data.sources.entry import Entry, Pairs, to_the_break
from openchameleon.data.sources.location import is_file, is_folder, names_below, stamp
from openchameleon.document import Record
from openchameleon.errors import UserError

RECORDS = "records.jsonl"
Kind = Literal["folder", "jsonl", "webdataset", "parquet"]
FILES: dict[Kind, tuple[Callable[[str, Pairs], Iterator[Entry]], tuple[str, ...]]] = {
    "jsonl": (jsonl.entries, (".jsonl",)),
    "webdataset": (webdataset.entries, (".tar", ".tar.gz", ".tgz")),
    "parquet": (parquet.entries, (".parquet",)),
}
"""Kind -> what reads a file of it, and how its name ends; a folder's files are read together."""
TABLES: tuple[Kind, ...] = ("webdataset", "parquet")
"""Kinds that a folder is of where it has such a file."""


@dataclass(frozen=True, slots=True)
class Shard:
    """What is read as one: the file at `location`, or of that folder the files `names`."""

    kind: Kind
    location: str
    names: tuple[str, ...] = ()

    def stamps(self) -> list[object]:
        """Name, size and time of each file: changes with what there is to learn from."""
        if not self.names:
            return [self.location, *stamp(self.location)]
        files = [file for name in self.names for file in folder.files_of(name)]
        return [[file, *stamp(f"{self.location}/{file}")] for file in files]


def shards_of(location: str, kind: Kind | None = None, files_a_shard: int = 1000) -> list[Shard]:
    """The shards of a source in their order. UserError where there is nothing to read.

    kind: what the source is; by default what its name, or what lies in the folder itself, says.
    files_a_shard: how many files of a plain folder are read as one.
    """
    location = location.rstrip("/") or "/"
    if is_file(location):
        return [_file_shard(location, kind or _kind_of(location))]
    if not is_folder(location):
        raise UserError(f"There is no folder or file {location}.")
    if kind in (None, "jsonl") and is_file(f"{location}/{RECORDS}"):
        return [Shard("jsonl", f"{location}/{RECORDS}")]
    below = names_below(location)
    found = kind or _kind_of_folder(below)
    if found == "folder":
        return _folder_shards(location, below, files_a_shard)
    ends = FILES[found][1]
    names = [name for name in below if name.lower().endswith(ends)]
    if not names:
        raise UserError(f"{location} holds no {' or '.join(ends)} files.")
    return [Shard(found, f"{location}/{name}") for name in names]


def _file_shard(location: str, kind: Kind) -> Shard:
    if kind == "folder":
        parent, slash, name = location.rpartition("/")
        return Shard("folder", parent or slash or ".", (name,))
    return Shard(kind, location)


def _kind_of(name: str) -> Kind:
    """What a file is by its name; one that says nothing is JSON lines."""
    if folder.suffix(name) in folder.RECORD_SUFFIXES:
        return "folder"
    for kind in TABLES:
        if name.lower().endswith(FILES[kind][1]):
            return kind
    return "jsonl"


def _kind_of_folder(below: list[str]) -> Kind:
    """Tables lie side by side in the folder itself; a tar deep in a tree of sources is none."""
    kinds = (_kind_of(name) for name in below if "/" not in name)
    return next((kind for kind in kinds if kind in TABLES), "folder")


def _folder_shards(location: str, below: list[str], files_a_shard: int) -> list[Shard]:
    names = folder.record_names(below)
    if not names:
        raise UserError(
            f"{location} holds neither {RECORDS} nor pictures, texts or code"
            f" ({', '.join(sorted(folder.RECORD_SUFFIXES))})."
        )
    starts = range(0, len(names), files_a_shard)
    return [Shard("folder", location, tuple(names[i : i + files_a_shard])) for i in starts]


def entries(shard: Shard, pairs: Pairs) -> Iterator[Entry]:
    """The records of a shard, not read yet; where a file breaks off, the last one says so."""
    if shard.kind == "folder":
        return folder.entries(shard.location, shard.names, pairs)
    return to_the_break(shard.location, FILES[shard.kind][0](shard.location, pairs))


def read_records(
    source: Path | str, pairs: Pairs = "chat", bad: BadRecords | None = None
) -> Iterator[Record]:
    """The records of a folder or file, in order. UserError names the record at fault.

    pairs: what a picture with its caption is. bad: has the say over records at fault.
    """
    named = named_records(source, pairs, bad or BadRecords())
    return (record for _, record in named)


def named_records(
    source: Path | str, pairs: Pairs, bad: BadRecords
) -> Iterator[tuple[str, Record]]:
    """`read_records` with where each record is, as an error names it."""
    shards = shards_of(str(source))
    return bad.load(entry for shard in shards for entry in entries(shard, pairs))


def count_records(source: Path | str) -> int:
    """How many records `read_records` will yield if none is at fault."""
    return sum(1 for shard in shards_of(str(source)) for _ in entries(shard, "chat"))


def data_files(path: Path) -> list[Path]:
    """Every file of a folder that may be read as data, captions too, in order."""
    suffixes = folder.RECORD_SUFFIXES | {".jsonl"}
    return [path / name for name in names_below(str(path)) if folder.suffix(name) in suffixes]


def file_stamps(files: Iterable[Path], folder: Path) -> list[object]:
    """Name under `folder`, size and time of each file: changes with what there is to learn from."""
    return [[str(file.relative_to(folder)), *stamp(str(file))] for file in files]
