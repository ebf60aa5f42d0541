"""Encoded documents -> fixed rows that cut none of them, and the folder such rows are kept in.

tokens.npy     (n_rows, row_len) uint16 or uint32; padding holds the pad id
doc_ids.npy    (n_rows, row_len) uint16: 1, 2, .. along a row, 0 is padding
loss_mask.npy  (n_rows, row_len) uint8: 1 where the token is to be learned, as a target
manifest.json  counts, the vocabulary's hash, and the sha256 of each file

Several such folders in `shards/` of another, whose manifest lists them, are read as one.
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from openchameleon.config import config_hash
from openchameleon.errors import UserError
from openchameleon.files import sha256_of
from openchameleon.vocab import Vocab

FORMAT = 1
MANIFEST = "manifest.json"
SHARDS = "shards"
ARRAYS = ("tokens", "doc_ids", "loss_mask")
COUNTS = ("n_rows", "n_documents", "n_tokens", "n_learned_tokens")
MAPPED = 24  # files of an array that are mapped at a time: a process may hold few open

Encoded = tuple[Sequence[int], Sequence[int]]
"""Token ids, and as many loss mask entries."""


def pack(items: Iterable[Encoded], row_len: int, buffer: int = 8192) -> Iterator[list[Encoded]]:
    """Rows, each a list of whole documents of together at most `row_len` tokens.

    Best fit, longest first, within each `buffer` documents: a document goes to the row where it
    leaves the least room. UserError names the length of one that fits in no row.
    """
    held: list[Encoded] = []
    for n, (ids, mask) in enumerate(items, 1):
        if not 0 < len(ids) == len(mask):
            raise ValueError(f"document {n} has {len(ids)} ids and {len(mask)} mask entries")
        if len(ids) > row_len:
            raise UserError(
                f"Document {n} has {len(ids)} tokens, a row {row_len}: "
                "prepare with longer rows or leave such documents out."
            )
        held.append((ids, mask))
        if len(held) == buffer:
            yield from _best_fit(held, row_len)
            held = []
    yield from _best_fit(held, row_len)


def _best_fit(documents: list[Encoded], row_len: int) -> list[list[Encoded]]:
    rows: list[list[Encoded]] = []
    rows_by_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # the keys of rows_by_room, ascending
    for document in sorted(documents, key=lambda d: -len(d[0])):
        length = len(document[0])
        at = bisect.bisect_left(rooms, length)
        if at == len(rooms):
            room, row = row_len, len(rows)
            rows.append([])
        else:
            room = rooms[at]
            row = rows_by_room[room].pop()
            if not rows_by_room[room]:
                del rows_by_room[room], rooms[at]
        rows[row].append(document)
        left = room - length
        if left not in rows_by_room:
            rows_by_room[left] = []
            bisect.insort(rooms, left)
        rows_by_room[left].append(row)
    return rows


def write_rows(
    rows: Iterable[list[Encoded]], folder: Path, row_len: int, vocab: Vocab
) -> dict[str, Any]:
    """Writes the arrays into an existing empty folder, row by row; returns the manifest to save."""
    token_type = np.uint16 if vocab.size <= 1 << 16 else np.uint32
    n_documents = n_tokens = n_learned = 0
    with ExitStack() as files:
        types = (token_type, np.uint16, np.uint8)
        tokens_file, doc_ids_file, mask_file = (
            files.enter_context(_NpyWriter(folder / f"{name}.npy", row_len, dtype))
            for name, dtype in zip(ARRAYS, types, strict=True)
        )
        for row in rows:
            lengths = [len(ids) for ids, _ in row]
            used = sum(lengths)
            tokens = np.full(row_len, vocab.pad_id, token_type)
            tokens[:used] = np.concatenate([ids for ids, _ in row])
            doc_ids = np.zeros(row_len, np.uint16)
            doc_ids[:used] = np.repeat(np.arange(1, len(row) + 1), lengths)
            mask = np.zeros(row_len, np.uint8)
            mask[:used] = np.concatenate([m for _, m in row])
            tokens_file.append(tokens)
            doc_ids_file.append(doc_ids)
            mask_file.append(mask)
            n_documents, n_tokens = n_documents + len(row), n_tokens + used
            n_learned += int(mask.sum())
    n_rows = tokens_file.n_rows
    return {
        "format": FORMAT,
        "row_len": row_len,
        "n_rows": n_rows,
        "n_documents": n_documents,
        "n_tokens": n_tokens,
        "n_learned_tokens": n_learned,
        "fill": round(n_tokens / max(n_rows * row_len, 1), 4),
        "vocab_size": vocab.size,
        "pad_id": vocab.pad_id,
        "vocab": config_hash(vocab.to_dict()),
        "code_ranges": [asdict(r) for r in vocab.code_ranges],
        "bytes": {name: (folder / f"{name}.npy").stat().st_size for name in ARRAYS},
        "sha256": {name: sha256_of(folder / f"{name}.npy") for name in ARRAYS},
    }


def save_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Makes a folder of arrays one that `Rows.open` reads."""
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def joined_manifest(folder: Path, names: Sequence[str]) -> dict[str, Any]:
    """The manifest of `folder` whose shards, of one vocabulary and row length, are `names`."""
    paths = [folder / SHARDS / name / MANIFEST for name in names]
    parts = [_read_manifest(path) for path in paths]
    counts = {key: sum(part[key] for part in parts) for key in COUNTS}
    alike = ("format", "row_len", "vocab_size", "pad_id", "vocab", "code_ranges")
    return {
        **{key: parts[0][key] for key in alike},
        **counts,
        "fill": round(counts["n_tokens"] / max(counts["n_rows"] * parts[0]["row_len"], 1), 4),
        "sha256": {name: config_hash([part["sha256"][name] for part in parts]) for name in ARRAYS},
        SHARDS: [
            {"name": name, "n_rows": part["n_rows"], "sha256": sha256_of(path)}
            for name, part, path in zip(names, parts, paths, strict=True)
        ],
    }


class Stacked:
    """The rows of an array that lies in several files, numbered through; mapped as asked for."""

    def __init__(self, files: Sequence[Path], lengths: Sequence[int]) -> None:
        self._files, self._ends = files, list(accumulate(lengths))
        self._map = lru_cache(MAPPED)(partial(np.load, mmap_mode="r", allow_pickle=False))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, row: int) -> np.ndarray:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        file = bisect.bisect_right(self._ends, row)
        return self._map(self._files[file])[row - (self._ends[file - 1] if file else 0)]


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """A folder of rows, its arrays mapped into memory; of several shards as of one."""

    tokens: np.ndarray | Stacked
    doc_ids: np.ndarray | Stacked
    loss_mask: np.ndarray | Stacked
    manifest: dict[str, Any]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def row_len(self) -> int:
        return self.manifest["row_len"]

    @staticmethod
    def open(folder: Path, verify: bool = True) -> Rows:
        """Maps the arrays; `verify` also reads each for its sha256. UserError names the file."""
        manifest = _read_manifest(folder / MANIFEST)
        if SHARDS not in manifest:
            return Rows(**_open_arrays(folder, manifest, verify), manifest=manifest)
        parts = [folder / SHARDS / shard["name"] for shard in manifest[SHARDS]]
        for part, shard in zip(parts, manifest[SHARDS], strict=True):
            part_manifest = _read_manifest(part / MANIFEST)
            if sha256_of(part / MANIFEST) != shard["sha256"]:
                raise UserError(f"{part / MANIFEST} differs from what was written: {_AGAIN}.")
            _open_arrays(part, part_manifest, verify)
        lengths = [shard["n_rows"] for shard in manifest[SHARDS]]
        arrays = {name: Stacked([p / f"{name}.npy" for p in parts], lengths) for name in ARRAYS}
        return Rows(**arrays, manifest=manifest)


_AGAIN = "remove the folder it is in, and prepare it again"


def _read_manifest(path: Path) -> dict[str, Any]:
    """UserError where there is none, or it is none of prepared rows."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["format"]
        if not all(name in manifest["sha256"] for name in ARRAYS):
            raise ValueError("a file without its sum")
        _ = manifest["n_rows"], manifest["row_len"]
    except FileNotFoundError as error:
        raise UserError(f"{path.parent} holds no prepared rows: {MANIFEST} is missing.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not the manifest of prepared rows.") from error
    if version != FORMAT:
        raise UserError(f"{path} has format {version}, this version reads {FORMAT}.")
    return manifest


def _open_arrays(folder: Path, manifest: dict[str, Any], verify: bool) -> dict[str, np.ndarray]:
    """The arrays of one folder, found to be what its manifest says."""
    shape = (manifest["n_rows"], manifest["row_len"])
    arrays = {}
    for name in ARRAYS:
        file = folder / f"{name}.npy"
        try:
            array = np.load(file, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{file} cannot be read: {error}. Prepare it again.") from error
        if array.shape != shape:
            raise UserError(f"{file} has shape {array.shape}, its manifest says {shape}.")
        if verify and sha256_of(file) != manifest["sha256"][name]:
            raise UserError(f"{file} differs from what was written: {_AGAIN}.")
        arrays[name] = array
    return arrays


class _NpyWriter:
    """An .npy file of rows appended one by one; the header, of fixed length, is written last."""

    def __init__(self, path: Path, row_len: int, dtype: npt.DTypeLike) -> None:
        self.row_len, self.dtype, self.n_rows = row_len, np.dtype(dtype), 0
        self._file = path.open("wb")
        self._write_header()
        self._header_len = self._file.tell()

    def _write_header(self) -> None:
        descr = np.lib.format.dtype_to_descr(self.dtype)
        header = {"descr": descr, "fortran_order": False, "shape": (self.n_rows, self.row_len)}
        np.lib.format.write_array_header_1_0(self._file, header)

    def append(self, row: np.ndarray) -> None:
        self._file.write(row.tobytes())
        self.n_rows += 1

    def __enter__(self) -> _NpyWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._file as file:
            file.seek(0)
            self._write_header()
            # numpy pads the header so that the first axis can grow in place
            assert file.tell() == self._header_len, f"{file.tell()} != {self._header_len}"
