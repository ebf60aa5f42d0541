"""Keys and values of past positions in blocks: slot s of block b is row b * block_size + s.

Which stream holds which block is the `BlockManager`'s affair; here are tensors only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from openchameleon.inference.blocks import NULL_BLOCK

# Both in the null block: the one is read where a row has no position, and is never written; the
# other is written for padding, and is never read.
ZERO_SLOT, WASTE_SLOT = 0, 1


class KVPool:
    """Per layer two tensors (blocks, block_size, K, D), as large as the blocks in use ask for.

    They are made when a layer first writes, in the shape and type of what it writes: a process
    that holds a part of the heads has a pool of these. n_blocks: what they may grow to, besides
    the null block.
    """

    def __init__(self, n_layers: int, n_blocks: int, block_size: int) -> None:
        if block_size < 2:
            raise ValueError(f"block_size = {block_size} is not at least 2")
        self.n_blocks, self.block_size = n_blocks, block_size
        self.keys: list[Tensor | None] = [None] * n_layers
        self.values: list[Tensor | None] = [None] * n_layers

    def storage(self, layer: int, n_blocks: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, with room for blocks 0 .. n_blocks - 1.

        like: anything of shape (..., K, D), type and device of what is to be written.
        """
        for tensors in (self.keys, self.values):
            old = tensors[layer]
            if old is None or len(old) < n_blocks:
                n_old = 0 if old is None else len(old)
                n_new = max(n_blocks, min(2 * n_old, self.n_blocks + 1))
                tensors[layer] = grown = like.new_zeros(n_new, self.block_size, *like.shape[-2:])
                if old is not None:
                    grown[:n_old] = old
        keys, values = self.keys[layer], self.values[layer]
        assert keys is not None, "it was just made"
        assert values is not None, "it was just made"
        return keys, values

    def view(self, tables: Sequence[Sequence[int]], starts: Sequence[int],
             counts: Sequence[int], device: torch.device) -> KVView:  # fmt: skip
        """The cache of some rows for one model call, which reads counts[i] new ids of each.

        tables[i]: the row's blocks, with room for starts[i] + counts[i] positions, of which the
        first starts[i] are written. Rows are padded on the right to the largest count.
        """
        return KVView(self, tables, starts, counts, device)


class KVView:
    """Some rows of a pool during one model call. Follows the model's cache protocol.

    positions: (B, T) int64, where the new ids stand. mask: (B, 1, T, S) bool, True = visible, or
    None where plain causal attention over what `update` returns says the same. No row sees what
    another has written, nor what a block held before.
    """

    def __init__(
        self,
        pool: KVPool,
        tables: Sequence[Sequence[int]],
        starts: Sequence[int],
        counts: Sequence[int],
        device: torch.device,
    ) -> None:
        self.pool, size = pool, pool.block_size
        n_new, n_past = max(counts), max(starts)
        n_slots = max(s + c for s, c in zip(starts, counts, strict=True))
        first, stop = torch.tensor([starts, [s + c for s, c in zip(starts, counts, strict=True)]])
        positions = first[:, None] + torch.arange(n_new)
        n_blocks = max(map(len, tables))
        table = torch.tensor([[*t, *[NULL_BLOCK] * (n_blocks - len(t))] for t in tables])
        self.n_blocks = int(table.max()) + 1
        slots = (table[:, :, None] * size + torch.arange(size)).flatten(1)[:, :n_slots]
        is_padding = positions >= stop[:, None]
        written = slots.gather(1, positions.clamp(max=slots.shape[1] - 1))
        self._write = written.masked_fill(is_padding, WASTE_SLOT).to(device)
        self.positions = positions.to(device)
        self.mask: Tensor | None = None
        self._read: Tensor | slice | None = None
        if n_past == 0:  # nothing but the new: plain causal attention, the padding sees itself
            return
        all_slots = torch.arange(n_slots)
        at = int(slots[0, 0])
        if len(tables) == 1 and torch.equal(slots[0], at + all_slots):
            self._read = slice(at, at + n_slots)  # without a copy
        else:
            self._read = slots.masked_fill(all_slots >= stop[:, None], ZERO_SLOT).to(device)
        if n_new > 1 or len(set(starts)) > 1:
            self.mask = (all_slots <= positions[:, None, :, None]).to(device)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes k, v (B, K, T, D) at `positions`; returns all slots so far, (B, K, S, D)."""
        k_new, v_new = k.transpose(1, 2), v.transpose(1, 2)
        keys, values = self.pool.storage(layer, self.n_blocks, k_new)
        keys, values = keys.flatten(0, 1), values.flatten(0, 1)
        keys[self._write], values[self._write] = k_new, v_new
        if self._read is None:
            return k, v
        if isinstance(self._read, slice):
            k, v = keys[self._read][None], values[self._read][None]
        else:
            k, v = keys[self._read], values[self._read]
        return k.transpose(1, 2), v.transpose(1, 2)
