"""Which records to leave out because an earlier one says the same: found in all shards at once.

Each shard is scanned by itself, for a key of what each of its records holds; then one process
decides, and the first of equal records stays. Texts that are nearly equal are found by datatrove.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from openchameleon.data.sources.bad import BadRecords
from openchameleon.data.sources.entry import Entry
from openchameleon.document import Record, Text, documents_of
from openchameleon.image_io import to_rgb

Dedup = Literal["none", "exact", "near"]
FOLDER = "duplicates"
NO_KEY = bytes(16)


def scan(
    out: Path, i: int, entries: Iterable[Entry], bad: BadRecords, dedup: Dedup, n_shards: int
) -> None:
    """Writes the keys of shard i, and for near ones the signatures of its texts."""
    folder = out / FOLDER
    folder.mkdir(exist_ok=True)
    keys: list[bytes] = []
    texts = _texts(entries, bad, keys)
    if dedup == "near":
        from openchameleon.data.near import write_signatures

        write_signatures(folder, i, n_shards, texts)
    else:
        for _ in texts:
            pass
    table = np.frombuffer(b"".join(keys), np.uint64).reshape(-1, 2)
    temporary = folder / f"{i:05d}.keys.tmp.npy"
    np.save(temporary, table)
    os.replace(temporary, _keys(out, i))


def _texts(entries: Iterable[Entry], bad: BadRecords, keys: list[bytes]) -> Iterator[str]:
    """The text of each record that is text alone, else ""; appends the key of each as it goes."""
    for entry in entries:
        found = [record for _, record in bad.load([entry])]
        keys.append(key_of(found[0]) if found else NO_KEY)
        documents = documents_of(found[0]) if found else []
        has_picture = any(document.images for document in documents)
        yield "" if has_picture else "\n".join(document.text for document in documents)


def key_of(record: Record) -> bytes:
    """Sixteen bytes, equal for records of the same texts and pixels in the same order.

    Of a picture and its caption either may be first.
    """
    segments = [segment for document in documents_of(record) for segment in document]
    parts = [
        hashlib.sha256(
            b"t" + s.text.encode("utf-8", "surrogatepass")
            if isinstance(s, Text)
            else f"i{s.pil.width} {s.pil.height} ".encode() + to_rgb(s.pil).tobytes()
        ).digest()
        for s in segments
    ]
    if len(segments) == 2 and {type(s) for s in segments} != {Text}:
        parts.sort()
    return hashlib.sha256(b"".join(parts)).digest()[:16]


def is_scanned(out: Path, i: int) -> bool:
    return _keys(out, i).exists()


def decide(out: Path, n_shards: int, dedup: Dedup) -> None:
    """Writes for each shard the numbers of the records to leave out."""
    tables = [np.load(_keys(out, i)) for i in range(n_shards)]
    table = np.concatenate(tables)
    _, first, which = np.unique(table, axis=0, return_index=True, return_inverse=True)
    repeated = first[which.reshape(-1)] != np.arange(len(table))
    repeated &= table.any(axis=1)  # a bad record has no key
    bounds = np.cumsum([0, *(len(t) for t in tables)])
    if dedup == "near":
        from openchameleon.data.near import clusters

        # Equal texts are in one cluster, whose first record stays.
        for cluster in clusters(out / FOLDER, n_shards):
            members = sorted(bounds[shard] + number for shard, number in cluster)
            repeated[members[0]], repeated[members[1:]] = False, True
    for i in range(n_shards):
        np.save(_drop(out, i), np.flatnonzero(repeated[bounds[i] : bounds[i + 1]]))
    _decided(out).touch()


def is_decided(out: Path) -> bool:
    return _decided(out).exists()


def dropped(out: Path, i: int) -> frozenset[int]:
    """The numbers, from 0, of the records of shard i to leave out."""
    return frozenset(np.load(_drop(out, i)).tolist())


def _keys(out: Path, i: int) -> Path:
    return out / FOLDER / f"{i:05d}.keys.npy"


def _drop(out: Path, i: int) -> Path:
    return out / FOLDER / f"{i:05d}.drop.npy"


def _decided(out: Path) -> Path:
    return out / FOLDER / "decided"
