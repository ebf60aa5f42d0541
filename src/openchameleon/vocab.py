"""One id space for every modality: special ids, text pieces, and ranges of codes.

Nothing here knows pixels or spelling. A *code range* is a run of ids that a codec writes
(pictures today); each item of a range stands between its begin and end id and has exactly
`codes_per_item` codes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

NEAR = 64  # ids


@dataclass(frozen=True, slots=True)
class CodeRange:
    """Ids `first_id .. first_id + count - 1`, written as `begin_id code*codes_per_item end_id`."""

    name: str
    begin_id: int
    end_id: int
    first_id: int
    count: int
    codes_per_item: int

    @property
    def stop_id(self) -> int:
        return self.first_id + self.count

    @property
    def item_len(self) -> int:
        """Positions one item takes, its begin and end ids included."""
        return self.codes_per_item + 2

    def ids_from_codes(self, codes: list[int]) -> list[int]:
        """Codes (0 .. count-1) -> ids, begin and end included. ValueError if not one item."""
        if len(codes) != self.codes_per_item:
            raise ValueError(f"{self.name}: {len(codes)} codes, an item has {self.codes_per_item}")
        if codes and not (min(codes) >= 0 and max(codes) < self.count):
            raise ValueError(f"{self.name}: a code is outside 0..{self.count - 1}")
        return [self.begin_id, *(self.first_id + code for code in codes), self.end_id]

    def codes_from_ids(self, token_ids: list[int]) -> list[int]:
        """The ids between begin and end -> codes. ValueError for an id of another range."""
        if token_ids and not (min(token_ids) >= self.first_id and max(token_ids) < self.stop_id):
            raise ValueError(f"{self.name}: an id is outside {self.first_id}..{self.stop_id - 1}")
        return [i - self.first_id for i in token_ids]


@dataclass(frozen=True, slots=True)
class Vocab:
    """The layout of `size` ids. Ids named nowhere are reserved and never produced."""

    size: int
    text_start: int
    text_stop: int
    code_ranges: tuple[CodeRange, ...]
    eot_id: int
    bos_id: int = 0
    pad_id: int = 1
    eos_id: int = 2
    unk_id: int = 3

    def __post_init__(self) -> None:
        owner: dict[int, str] = {}
        claims = [
            (f"{n}_id", getattr(self, f"{n}_id")) for n in ("bos", "pad", "eos", "unk", "eot")
        ]
        for r in self.code_ranges:
            claims += [(f"{r.name}.begin_id", r.begin_id), (f"{r.name}.end_id", r.end_id)]
        for name, i in claims:
            if not 0 <= i < self.size:
                raise ValueError(f"{name} = {i} is outside the vocabulary of {self.size} ids")
            if i in owner:
                raise ValueError(f"{name} and {owner[i]} share id {i}")
            owner[i] = name
        spans = sorted(
            [(self.text_start, self.text_stop, "text")]
            + [(r.first_id, r.stop_id, r.name) for r in self.code_ranges]
        )
        for (_, stop, a), (start, _, b) in pairwise(spans):
            if stop > start:
                raise ValueError(f"the ids of {a} and {b} overlap")
        for start, stop, name in spans:
            if start < 0 or stop > self.size:
                raise ValueError(f"{name} ids {start}..{stop - 1} exceed the {self.size} ids")
            for i, other in owner.items():
                if start <= i < stop:
                    raise ValueError(f"{other} = {i} lies among the ids of {name}")

    @property
    def image(self) -> CodeRange:
        """The first code range whose name is "image". KeyError if there is none."""
        return self.code_range("image")

    def code_range(self, name: str) -> CodeRange:
        for r in self.code_ranges:
            if r.name == name:
                return r
        raise KeyError(f"no code range named {name!r}")

    def range_begun_by(self, token_id: int) -> CodeRange | None:
        """The code range that `token_id` opens, or None."""
        for r in self.code_ranges:
            if r.begin_id == token_id:
                return r
        return None

    def is_text(self, token_id: int) -> bool:
        return self.text_start <= token_id < self.text_stop

    def spans_outside_codes(self) -> list[tuple[int, int]]:
        """(first, stop) of ids among which are all that may be written where no code may.

        That is text, eos, and what begins and ends items; what is not far apart goes together.
        """
        controls = [self.eos_id, *(i for r in self.code_ranges for i in (r.begin_id, r.end_id))]
        spans = sorted([(self.text_start, self.text_stop), *((i, i + 1) for i in controls)])
        joined = [spans[0]]
        for first, stop in spans[1:]:
            if first - joined[-1][1] <= NEAR:
                joined[-1] = (joined[-1][0], stop)
            else:
                joined.append((first, stop))
        return joined

    @staticmethod
    def published() -> Vocab:
        """The released vocabulary: 65,536 ids, codes 4..8195, end 8196, begin 8197, turn 8710."""
        image = CodeRange("image", begin_id=8197, end_id=8196, first_id=4, count=8192,
                          codes_per_item=1024)  # fmt: skip
        return Vocab(65536, text_start=16384, text_stop=65536, code_ranges=(image,), eot_id=8710)

    @staticmethod
    def compact(n_codes: int, codes_per_item: int, n_text: int) -> Vocab:
        """The published order without its reserved gap: specials, codes, end, begin, eot, text."""
        end = 4 + n_codes
        image = CodeRange("image", begin_id=end + 1, end_id=end, first_id=4, count=n_codes,
                          codes_per_item=codes_per_item)  # fmt: skip
        start = end + 3
        return Vocab(start + n_text, start, start + n_text, (image,), eot_id=end + 2)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(d: dict[str, Any]) -> Vocab:
        ranges = tuple(CodeRange(**r) for r in d["code_ranges"])
        return Vocab(**{**d, "code_ranges": ranges})
