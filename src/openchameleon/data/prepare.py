"""Records -> a folder of packed rows, written whole or not at all."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from openchameleon.data.pack import Encoded, pack, save_manifest, write_rows
from openchameleon.data.sources import count_records, read_records
from openchameleon.document import Record
from openchameleon.errors import UserError
from openchameleon.progress import Progress
from openchameleon.vocab import Vocab


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
) -> dict[str, Any]:
    """Tokenizes and packs `source` into the new folder `out`; returns its manifest.

    `answers_only`: of a conversation only the assistant's turns are learned. A record longer
    than `row_len` is an error. `n_records` is the total of the progress line where `source` is not
    a path.
    """
    if out.exists():
        raise UserError(f"{out} exists already; remove it or choose another folder.")
    if isinstance(source, Path):
        n_records = count_records(source)
        source = read_records(source)
    progress = Progress("prepare", n_records, "records")
    encoded = _encode(source, tokenizer, answers_only, batch, progress)

    out.parent.mkdir(parents=True, exist_ok=True)
    for stale in out.parent.glob(f"{out.name}.tmp-*"):
        shutil.rmtree(stale)
    temporary = out.with_name(f"{out.name}.tmp-{uuid.uuid4().hex[:8]}")
    temporary.mkdir()
    try:
        manifest = write_rows(pack(encoded, row_len), temporary, row_len, tokenizer.vocab)
        if not manifest["n_rows"]:
            raise UserError("There is nothing to prepare: the source has no records.")
        save_manifest(temporary, manifest)
        temporary.rename(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return manifest


def _encode(
    records: Iterable[Record],
    tokenizer: RecordTokenizer,
    answers_only: bool,
    batch: int,
    progress: Progress,
) -> Iterator[Encoded]:
    """Encodes `batch` records at a time, holding no more of them."""
    remaining = iter(records)
    done = 0
    while chunk := list(islice(remaining, batch)):
        yield from tokenizer.encode_many(chunk, answers_only)
        done += len(chunk)
        progress.update(done)
    progress.close()
