"""Records -> a folder of packed rows, written whole or not at all."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from openchameleon.data.pack import Encoded, pack, save_manifest, write_rows
from openchameleon.data.sources import count_records, named_records
from openchameleon.data.sources.bad import BadRecords
from openchameleon.document import Document, Record, documents_of
from openchameleon.errors import UserError
from openchameleon.files import sync_file, sync_folder
from openchameleon.progress import Progress
from openchameleon.vocab import Vocab

PIXELS_HELD = 64 << 20  # of the pictures of records that wait to be encoded: 192 MiB


class RecordTokenizer(Protocol):
    """What `prepare` asks of a tokenizer: its vocabulary, and ids with their loss mask."""

    @property
    def vocab(self) -> Vocab: ...

    def encode_many(self, records: list[Record], answers_only: bool) -> Sequence[Encoded]: ...


def prepare(
    source: Path | Iterable[Record],
    tokenizer: RecordTokenizer,
    out: Path,
    row_len: int,
    *,
    answers_only: bool = True,
    batch: int = 256,
    n_records: int = 0,
    bad: BadRecords | None = None,
) -> dict[str, Any]:
    """Tokenizes and packs `source` into the new folder `out`; returns its manifest.

    `answers_only`: of a conversation only the assistant's turns are learned. A text longer than
    `row_len` becomes several documents; another record that long is a bad one. `bad` has the say
    over those: by default the first is an error. `n_records` is the total of the progress line
    where `source` is not a path.
    """
    if out.exists():
        raise UserError(f"{out} exists already; remove it or choose another folder.")
    bad = bad or BadRecords()
    if isinstance(source, Path):
        n_records = count_records(source)
        named = named_records(source, "chat", bad)
    else:
        named = ((f"Record {n}", record) for n, record in enumerate(source, 1))
    progress = Progress("prepare", n_records, "records")
    encoded = encode(named, tokenizer, row_len, answers_only, batch, bad, progress)
    with whole(out) as folder:
        manifest = write_rows(pack(encoded, row_len), folder, row_len, tokenizer.vocab)
        if not manifest["n_rows"]:
            raise UserError("There is nothing to prepare: the source has no records.")
        save_manifest(folder, manifest)
    return manifest


@contextmanager
def whole(out: Path) -> Iterator[Path]:
    """A folder to write into, which is `out` at the end; none is left where anything fails."""
    out.parent.mkdir(parents=True, exist_ok=True)
    for stale in out.parent.glob(f"{out.name}.tmp-*"):
        shutil.rmtree(stale)
    temporary = out.with_name(f"{out.name}.tmp-{uuid.uuid4().hex[:8]}")
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.iterdir():
            sync_file(file)
        temporary.rename(out)
        sync_folder(out.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def encode(
    records: Iterable[tuple[str, Record]],
    tokenizer: RecordTokenizer,
    row_len: int,
    answers_only: bool,
    batch: int,
    bad: BadRecords,
    progress: Progress,
) -> Iterator[Encoded]:
    """Documents that fit in a row, at most `batch` of the named records held at a time.

    A text longer than a row becomes several; another such record, or one that the tokenizer
    refuses, is a bad one.
    """
    done = 0
    for chunk in _batches(records, batch):
        encoded = _encoded(chunk, tokenizer, answers_only, bad)
        for (name, record), tokens in zip(chunk, encoded, strict=True):
            if tokens is None:
                continue
            ids, mask = tokens
            if len(ids) <= row_len:
                yield ids, mask
            elif isinstance(record, Document) and not record.images:
                yield from _cut(ids, mask, row_len)
            else:
                bad.refuse(name, _too_long(name, len(ids), row_len))
        done += len(chunk)
        progress.update(done)
    progress.close()


def _batches(
    records: Iterable[tuple[str, Record]], batch: int
) -> Iterator[list[tuple[str, Record]]]:
    """So many named records, fewer where their pictures are large."""
    held: list[tuple[str, Record]] = []
    n_pixels = 0
    for name, record in records:
        held.append((name, record))
        pictures = (p for document in documents_of(record) for p in document.images)
        n_pixels += sum(p.width * p.height for p in pictures)
        if len(held) == batch or n_pixels >= PIXELS_HELD:
            yield held
            held, n_pixels = [], 0
    if held:
        yield held


def _encoded(
    chunk: Sequence[tuple[str, Record]],
    tokenizer: RecordTokenizer,
    answers_only: bool,
    bad: BadRecords,
) -> Sequence[Encoded | None]:
    """The tokens of each record, None for one that the tokenizer refuses."""
    try:
        return tokenizer.encode_many([record for _, record in chunk], answers_only)
    except UserError as error:
        if len(chunk) > 1:  # one of them, and the others shall not suffer
            return [_encoded([one], tokenizer, answers_only, bad)[0] for one in chunk]
        name = chunk[0][0]
        bad.refuse(name, UserError(f"{name}: {error}"))
        return [None]


def _cut(ids: Sequence[int], mask: Sequence[int], row_len: int) -> Iterator[Encoded]:
    """A long text as documents of whole rows and what is left: no token is lost."""
    for start in range(0, len(ids), row_len):
        yield ids[start : start + row_len], mask[start : start + row_len]


def _too_long(name: str, length: int, row_len: int) -> UserError:
    return UserError(
        f"{name} has {length} tokens, a row {row_len}: prepare with longer rows or leave such"
        " records out."
    )
