"""A mixture that changes on its way: loaders of the same rows, one phase of a run after the other.

The paper trains 80% on one mixture, then halves its weights and mixes better data in (section
2.2). A phase goes on in each stream where the one before stopped, so that none repeats a row.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from openchameleon.data.loader import Batch, RowLoader, require_alike
from openchameleon.data.pack import Rows


@dataclass(frozen=True, slots=True)
class Phase:
    """From step `begin` on, the weight of each stream, by name; a stream not named rests."""

    begin: int
    weights: Mapping[str, float]


class PhasedLoader:
    """A `RowLoader` whose weights change: no row twice within a stream's epoch, over all phases.

    Still a pure function of the step, for any number of ranks. ValueError unless the phases begin
    at step 0 and each after the one before; UserError where the streams do not belong together.
    """

    def __init__(
        self, streams: Mapping[str, Path], phases: Sequence[Phase], batch_size: int, seed: int
    ) -> None:
        self._begins = [phase.begin for phase in phases]
        if self._begins[:1] != [0] or self._begins != sorted(set(self._begins)):
            raise ValueError(f"phases begin at {self._begins}: the first at 0, each after the last")
        self.batch_size = batch_size
        self.rows = {name: Rows.open(folder) for name, folder in streams.items()}
        require_alike(self.rows)
        self._loaders: list[RowLoader] = []
        self._used: list[dict[str, int]] = []  # rows of each stream, when each phase begins
        used = dict.fromkeys(streams, 0)
        for phase, end in zip(phases, [*self._begins[1:], self._begins[-1]], strict=True):
            mixture = {name: (self.rows[name], weight) for name, weight in phase.weights.items()}
            loader = RowLoader(mixture, batch_size, seed, start=used)
            self._loaders.append(loader)
            self._used.append(used)
            used = used | loader.rows_used(end - phase.begin)

    @property
    def row_len(self) -> int:
        return self._loaders[0].row_len

    def describe(self) -> dict[str, object]:
        """What the order of samples depends on, as JSON data: each phase by its first step."""
        loaders = zip(self._begins, self._loaders, strict=True)
        return {f"from step {begin}": loader.describe() for begin, loader in loaders}

    def rows_used(self, step: int) -> dict[str, int]:
        """How many rows of each stream the steps before `step` have read."""
        i, within = self._phase_of(step)
        return self._used[i] | self._loaders[i].rows_used(within)

    def sample_ids(self, step: int, rank: int = 0, world: int = 1) -> list[tuple[str, int]]:
        """The (stream, row) of each row of the batch; ranks have consecutive parts of it."""
        i, within = self._phase_of(step)
        return self._loaders[i].sample_ids(within, rank, world)

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """The batch of a step (from 0), on the CPU; (B / world, row_len) on each rank."""
        i, within = self._phase_of(step)
        return self._loaders[i].batch(within, rank, world)

    def _phase_of(self, step: int) -> tuple[int, int]:
        """Which phase a step lies in, and which step of the phase it is."""
        i = bisect.bisect_right(self._begins, step) - 1
        return i, step - self._begins[i]
