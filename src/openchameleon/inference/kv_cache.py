"""Keys and values of past positions: one row per stream, slot index = position. Knows no ids."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Rows 0 .. n_rows-1, kept without gaps; per layer two tensors (rows, K, S, D).

    Storage grows by doubling, in rows and in slots, and does not shrink. `lengths[row]` counts
    the slots of a row that hold its past.
    """

    def __init__(
        self,
        n_layers: int,
        n_kv_heads: int,
        head_dim: int,
        max_seq_len: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.max_seq_len = max_seq_len
        self.lengths: list[int] = []
        empty = torch.empty(0, n_kv_heads, 0, head_dim, dtype=dtype, device=device)
        self.keys = [empty] * n_layers
        self.values = [empty] * n_layers

    @property
    def n_rows(self) -> int:
        return len(self.lengths)

    def add_rows(self, n: int) -> None:
        """Appends n empty rows."""
        self.lengths += [0] * n
        self._reserve(self.n_rows, 0)

    def copy_row(self, source: int, target: int) -> None:
        """Makes `target` a copy of `source`."""
        for tensor in (*self.keys, *self.values):
            tensor[target] = tensor[source]
        self.lengths[target] = self.lengths[source]

    def remove_row(self, row: int) -> None:
        """Frees `row`; the last row takes its place."""
        last = self.n_rows - 1
        if row != last:
            self.copy_row(last, row)
        # Unused slots must be finite: a masked slot has weight 0, and 0 * NaN is NaN, so that
        # one broken stream would break the next one in its row.
        for tensor in (*self.keys, *self.values):
            tensor[last] = 0
        self.lengths.pop()

    def extend(self, start: int, counts: list[int]) -> CacheView:
        """Opens the next counts[i] slots of each row start + i, and counts them as written.

        The one model call that gets the view must write them. Counts may differ: rows are padded
        on the right to the largest. What a model writes for padding lands in slots past the
        row's length; no real query sees a slot beyond its own position, and the row's later ids
        overwrite these slots before they could be seen, so padding needs no mask of its own.
        """
        rows = slice(start, start + len(counts))
        lengths, n_new = self.lengths[rows], max(counts)
        n_slots = max(lengths) + n_new
        assert n_slots <= self.max_seq_len, f"{n_slots} slots, the model has {self.max_seq_len}"
        self._reserve(self.n_rows, n_slots)
        self.lengths[rows] = [n + c for n, c in zip(lengths, counts, strict=True)]
        return CacheView(self, rows, lengths, n_new, n_slots)

    def _reserve(self, n_rows: int, n_slots: int) -> None:
        """Grows the storage to hold n_rows rows of n_slots slots."""
        rows, n_kv_heads, slots, head_dim = self.keys[0].shape
        if n_rows <= rows and n_slots <= slots:
            return
        if n_rows > rows:
            n_rows = max(n_rows, 2 * rows)
        if n_slots > slots:
            n_slots = min(max(n_slots, 2 * slots), self.max_seq_len)
        shape = (max(n_rows, rows), n_kv_heads, max(n_slots, slots), head_dim)
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):  # one at a time: the peak is one layer higher
                tensors[layer] = old.new_zeros(shape)
                tensors[layer][:rows, :, :slots] = old


class CacheView:
    """Some rows of a cache during one model call. Follows the model's cache protocol.

    positions: (B, T) int64, where the new ids stand. mask: (B, 1, T, S) bool, True = visible, or
    None where plain causal attention over what `update` returns says the same.
    """

    def __init__(
        self, cache: KVCache, rows: slice, lengths: list[int], n_new: int, n_slots: int
    ) -> None:
        device = cache.keys[0].device
        self.cache, self.rows, self.n_slots = cache, rows, n_slots
        self.positions = (torch.tensor(lengths)[:, None] + torch.arange(n_new)).to(device)
        self._row_index = torch.arange(rows.start, rows.stop, device=device)[:, None]
        self.mask: Tensor | None = None
        if len(set(lengths)) > 1 or (lengths[0] > 0 and n_new > 1):
            slots = torch.arange(n_slots, device=device)
            self.mask = slots <= self.positions[:, None, :, None]

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes k, v (B, K, T, D) at `positions`; returns all slots so far, (B, K, S, D)."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys[self._row_index, :, self.positions] = k.transpose(1, 2)
        values[self._row_index, :, self.positions] = v.transpose(1, 2)
        return keys[self.rows, :, : self.n_slots], values[self.rows, :, : self.n_slots]
