"""What prepared rows are made of: counts that are added up over shards."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from openchameleon.data.pack import Encoded
from openchameleon.document import Conversation, Record, documents_of
from openchameleon.vocab import Vocab

LENGTHS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)  # tokens of a document
SIDES = (64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 4096)  # pixels of the shorter side
ASPECTS = (1.05, 1.2, 1.4, 1.6, 1.9, 2.4, 3, 4, 8)  # of the longer side to the shorter
FILLS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)  # share of a row that holds tokens
"""Upper ends of the bins, but for the last one, which has none; an end lies in the bin below."""


def _bins(ends: Sequence[float]) -> list[int]:
    return [0] * (len(ends) + 1)


@dataclass(slots=True)
class Statistics:
    """Counts by name, or by the bins above; `records` are those of the source that were used."""

    records: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=lambda: _bins(LENGTHS))
    sides: list[int] = field(default_factory=lambda: _bins(SIDES))
    aspects: list[int] = field(default_factory=lambda: _bins(ASPECTS))
    fills: list[int] = field(default_factory=lambda: _bins(FILLS))

    def add_record(self, record: Record) -> None:
        """Counts what a record is, and the sizes of its pictures."""
        documents = documents_of(record)
        pictures = [p for document in documents for p in document.images]
        for picture in pictures:
            short, long = sorted(picture.size)
            self.sides[bisect.bisect_left(SIDES, short)] += 1
            self.aspects[bisect.bisect_left(ASPECTS, long / short)] += 1
        if isinstance(record, Conversation):
            kind = "conversation"
        elif not pictures:
            kind = "text"
        else:
            kind = "pair" if len(pictures) == 1 and len(documents[0]) == 2 else "interleaved"
        self.records[kind] = self.records.get(kind, 0) + 1

    def add_document(self, ids: Sequence[int], vocab: Vocab) -> None:
        """Counts the tokens of an encoded document by what they are."""
        tokens = np.asarray(ids)
        self.lengths[bisect.bisect_left(LENGTHS, len(ids))] += 1
        counts = Counter(
            text=int(((tokens >= vocab.text_start) & (tokens < vocab.text_stop)).sum())
        )
        for r in vocab.code_ranges:
            counts[r.name] = int((tokens == r.begin_id).sum()) * r.item_len
        counts["control"] = len(ids) - counts.total()
        self.tokens = dict(Counter(self.tokens) + counts)

    def add_row(self, used: int, row_len: int) -> None:
        self.fills[bisect.bisect_left(FILLS, used / row_len)] += 1

    def of_records(self, records: Iterable[tuple[str, Record]]) -> Iterator[tuple[str, Record]]:
        """The named records, counted as they pass."""
        for name, record in records:
            self.add_record(record)
            yield name, record

    def of_rows(self, rows: Iterable[list[Encoded]], row_len: int, vocab: Vocab
    ) -> Iterator[list[Encoded]]:  # fmt: skip
        """The rows, they and their documents counted as they pass."""
        for row in rows:
            self.add_row(sum(len(ids) for ids, _ in row), row_len)
            for ids, _ in row:
                self.add_document(ids, vocab)
            yield row

    def to_dict(self) -> dict[str, dict[str, int] | list[int]]:
        return asdict(self)


def total(parts: Iterable[dict[str, dict[str, int] | list[int]]]) -> Statistics:
    """The sum of what `Statistics.to_dict` gave."""
    whole = Statistics()
    for part in parts:
        for key, counts in part.items():
            so_far = getattr(whole, key)
            if isinstance(counts, dict):
                setattr(whole, key, dict(Counter(so_far) + Counter(counts)))
            else:
                setattr(whole, key, [a + b for a, b in zip(so_far, counts, strict=True)])
    return whole
