"""Records that cannot be used: the first one stops the work, or they are left out up to a limit."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from openchameleon.data.sources.entry import Entry, loaded
from openchameleon.document import Record
from openchameleon.errors import UserError

FEW = 10
"""So many bad records are never too many."""


@dataclass(frozen=True, slots=True)
class BadPolicy:
    """on_bad: what the first bad record does; limit: the share of records that may be skipped."""

    on_bad: Literal["raise", "skip"] = "raise"
    limit: float = 0.001

    def __post_init__(self) -> None:
        if not 0 <= self.limit <= 1:
            raise ValueError(f"limit = {self.limit} is no share of records, which is 0 to 1.")

    def check(self, n_bad: int, n_records: int, where: str) -> None:
        """UserError where so many of the records of `where` are more than may be."""
        if n_bad > max(FEW, self.limit * n_records):
            raise UserError(
                f"{n_bad} of the first {n_records} records of {where} cannot be used, over the"
                f" limit of {self.limit:.2%}: mend them, or allow more."
            )


class BadRecords:
    """Counts the records of a shard and leaves the bad ones out, as the policy has it.

    listing: a file that gets a JSON line {"shard", "record", "reason"} for each bad record.
    """

    def __init__(
        self,
        policy: BadPolicy = BadPolicy(),
        shard: str = "the source",
        listing: Path | None = None,
    ) -> None:
        self.policy, self.shard, self.listing = policy, shard, listing
        self.n_records = self.n_bad = 0

    def load(self, entries: Iterable[Entry]) -> Iterator[tuple[str, Record]]:
        """`(name, record)` of each entry that can be read, in their order. UserError."""
        for entry in entries:
            self.n_records += 1
            try:
                record = loaded(entry)
            except UserError as error:
                self.refuse(entry.name, error)
            else:
                yield entry.name, record

    def refuse(self, name: str, error: UserError) -> None:
        """Lists a record that cannot be used; UserError where none or no more of them may be."""
        if self.policy.on_bad == "raise":
            raise error
        self.n_bad += 1
        if self.listing is not None:
            line = {"shard": self.shard, "record": name, "reason": str(error)}
            with self.listing.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        try:
            self.policy.check(self.n_bad, self.n_records, self.shard)
        except UserError as over:
            raise UserError(f"{over} The last: {error}") from error
