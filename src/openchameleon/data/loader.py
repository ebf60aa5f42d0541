"""Packed rows -> batches, in an order that is a pure function of (seed, epoch, index).

There is no state: `batch(step)` can be asked for any step, so that a resumed run needs only its
step, and any number of ranks see slices of the same global batch.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from openchameleon.config import config_hash
from openchameleon.data.check import fault_of
from openchameleon.data.pack import Rows
from openchameleon.errors import UserError


@dataclass(frozen=True, slots=True)
class Batch:
    """What one training step sees; every tensor is (B, T).

    `targets[b, t]` is the id after `inputs[b, t]` in the same document; where there is none, or
    where it is not to be learned, `loss_weights` is 0 (and the target, the pad id, is unused).
    `positions` restart at 0 in each document; `doc_ids` are 1, 2, .. along a row, 0 is padding.
    """

    inputs: Tensor
    targets: Tensor
    loss_weights: Tensor
    positions: Tensor
    doc_ids: Tensor

    @property
    def n_tokens(self) -> int:
        """Positions that hold a token rather than padding."""
        return int((self.doc_ids > 0).sum())

    def split(self, n_rows: int) -> list[Batch]:
        """Micro-batches of at most `n_rows` rows, in order."""
        parts = (getattr(self, f.name).split(n_rows) for f in dataclasses.fields(self))
        return [Batch(*tensors) for tensors in zip(*parts, strict=True)]

    def to(self, device: torch.device | str) -> Batch:
        tensors = {f.name: getattr(self, f.name).to(device) for f in dataclasses.fields(self)}
        return Batch(**tensors)


class Loader(Protocol):
    """What training asks of its data: a batch for any step, and what its order depends on."""

    @property
    def batch_size(self) -> int: ...
    def describe(self) -> dict[str, object]: ...
    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch: ...


class RowLoader:
    """Batches mixed from streams of packed rows: no row twice within a stream's epoch.

    `streams` maps a name to (rows or their folder, weight): a stream's share of the rows of a batch
    is its weight's share (in 1024ths). `start` is the number of rows of each stream that an earlier
    stage has used, as `rows_used` counts them, so that a change of weights repeats none.
    """

    def __init__(
        self,
        streams: Mapping[str, tuple[Path | Rows, float]],
        batch_size: int,
        seed: int,
        start: Mapping[str, int] | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size = {batch_size}")
        self.batch_size, self.seed = batch_size, seed
        self.start = {name: (start or {}).get(name, 0) for name in streams}
        self.weights = {name: weight for name, (_, weight) in streams.items()}
        self.rows = {
            name: rows if isinstance(rows, Rows) else Rows.open(rows)
            for name, (rows, _) in streams.items()
        }
        require_alike(self.rows)
        self._names = list(streams)
        self._cycle = _interleave([self.weights[name] for name in self._names])
        # _before[i, s]: how many of the first i entries of the cycle are of stream s
        one_hot = self._cycle[:, None] == np.arange(len(self._names))
        self._before = np.vstack([np.zeros_like(one_hot[:1], int), one_hot.cumsum(axis=0)])

    @property
    def row_len(self) -> int:
        return self.rows[self._names[0]].row_len

    def describe(self) -> dict[str, object]:
        """What the order of samples depends on, as JSON data: a run's data is this."""
        return {
            "seed": self.seed,
            "batch_size": self.batch_size,
            "start": self.start,
            "weights": self.weights,
            "rows": {n: config_hash(rows.manifest["sha256"]) for n, rows in self.rows.items()},
        }

    def rows_used(self, step: int) -> dict[str, int]:
        """How many rows of each stream the steps before `step` have read, `start` included."""
        used = self._used_before(step * self.batch_size)
        return dict(zip(self._names, used, strict=True))

    def sample_ids(self, step: int, rank: int = 0, world: int = 1) -> list[tuple[str, int]]:
        """The (stream, row) of each row of the batch; ranks have consecutive parts of it."""
        if self.batch_size % world:
            legal = [n for n in range(1, self.batch_size + 1) if self.batch_size % n == 0]
            raise UserError(
                f"A batch of {self.batch_size} rows cannot be divided among {world} processes; "
                f"use {', '.join(map(str, legal))}."
            )
        share = self.batch_size // world
        first = step * self.batch_size + rank * share
        return [self._sample(index) for index in range(first, first + share)]

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """The batch of a step (from 0), on the CPU; (B / world, row_len) on each rank."""
        samples = self.sample_ids(step, rank, world)
        tokens, doc_ids, mask = (
            np.stack([getattr(self.rows[name], array)[row] for name, row in samples])
            for array in ("tokens", "doc_ids", "loss_mask")
        )
        manifest = self.rows[self._names[0]].manifest  # the streams agree on their vocabulary
        if fault := fault_of(tokens, doc_ids, manifest):
            name, row = samples[fault[0]]
            raise UserError(f"Row {row} of {name!r} {fault[1]}.")
        return make_batch(tokens, doc_ids, mask, manifest["pad_id"])

    def _used_before(self, index: int) -> list[int]:
        cycles, rest = divmod(index, len(self._cycle))
        counts = cycles * self._before[-1] + self._before[rest]
        return [self.start[n] + int(c) for n, c in zip(self._names, counts, strict=True)]

    def _sample(self, index: int) -> tuple[str, int]:
        stream = int(self._cycle[index % len(self._cycle)])
        name = self._names[stream]
        n_rows = len(self.rows[name])
        epoch, at = divmod(self._used_before(index)[stream], n_rows)
        return name, permuted(at, n_rows, f"{self.seed}/{name}/{epoch}")


def require_alike(streams: Mapping[str, Rows]) -> None:
    """UserError unless every stream has rows, and all of one length and one vocabulary."""
    first, *others = streams
    for name, rows in streams.items():
        if not len(rows):
            raise UserError(f"The stream {name!r} holds no rows.")
    for key in ("row_len", "vocab"):
        expected = streams[first].manifest[key]
        for name in others:
            if (found := streams[name].manifest[key]) != expected:
                raise UserError(
                    f"The stream {name!r} was prepared with {key} {found}, "
                    f"{first!r} with {expected}; prepare them alike."
                )


def make_batch(
    tokens: np.ndarray, doc_ids: np.ndarray, loss_mask: np.ndarray, pad_id: int
) -> Batch:
    """A `Batch` from rows as they are stored, each (B, T)."""
    same_document = np.zeros(tokens.shape, bool)
    same_document[:, :-1] = (doc_ids[:, 1:] == doc_ids[:, :-1]) & (doc_ids[:, 1:] > 0)
    following = np.roll(tokens, -1, axis=1)
    weights = np.roll(loss_mask, -1, axis=1) * same_document
    at = np.arange(tokens.shape[1])
    starts = np.ones(tokens.shape, bool)
    starts[:, 1:] = doc_ids[:, 1:] != doc_ids[:, :-1]
    positions = at - np.maximum.accumulate(np.where(starts, at, 0), axis=1)
    return Batch(
        inputs=torch.from_numpy(tokens.astype(np.int64)),
        targets=torch.from_numpy(np.where(same_document, following, pad_id).astype(np.int64)),
        loss_weights=torch.from_numpy(weights.astype(np.float32)),
        positions=torch.from_numpy(positions.astype(np.int64)),
        doc_ids=torch.from_numpy(doc_ids.astype(np.int64)),
    )


def permuted(index: int, n: int, key: str) -> int:
    """Where a permutation of 0 .. n-1 chosen by `key` sends `index`, without making the rest of it.

    A balanced Feistel network over the next power of four, walked until it lands below n
    (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
    """
    digest = hashlib.sha256(key.encode()).digest()
    round_keys = [int.from_bytes(digest[i : i + 4], "little") for i in range(0, 32, 4)]
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for round_key in round_keys:
            left, right = right, left ^ (_mix(right ^ round_key << 32) & mask)
        index = left << half | right
        if index < n:
            return index


def _mix(x: int) -> int:
    """The finalizer of splitmix64 (Steele et al., 2014): an input bit moves all output bits."""
    word = (1 << 64) - 1
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & word
    x = (x ^ x >> 27) * 0x94D049BB133111EB & word
    return x ^ x >> 31


def _interleave(weights: list[float], length: int = 1024) -> np.ndarray:
    """Stream indices in a cycle where each stream has its share of entries, spread evenly."""
    if not weights or min(weights) <= 0:
        raise ValueError(f"weights {weights}: each stream needs one above 0")
    shares = np.array(weights) / sum(weights) * length
    counts = np.maximum(np.floor(shares), 1).astype(int)
    by_remainder = np.argsort(counts - shares, kind="stable")
    counts[by_remainder[: max(0, length - counts.sum())]] += 1
    places = [((j + 0.5) / n, s) for s, n in enumerate(counts) for j in range(n)]
    return np.array([stream for _, stream in sorted(places)])
