"""The step of few new ids in fixed shapes, compiled by PyTorch; on a GPU replayed as a CUDA graph.

What the native step is to a CPU. Without it each of some twenty small kernels a layer is launched
from Python, which takes a GPU longer than to run them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from openchameleon.inference.blocks import NULL_BLOCK
from openchameleon.inference.kv_cache import WASTE_SLOT, ZERO_SLOT
from openchameleon.model.transformer import Transformer

Storage = Sequence[tuple[Tensor, Tensor]]
"""Keys and values of each layer, (blocks, block_size, K, D)."""

LEAST_WIDTH = 4  # blocks


class CompiledStep:
    """One model's step, for one thread at a time; `hidden` and `logits` as of `NativeStep`.

    Rows and blocks are padded to powers of two, so that few shapes are met. What is compiled holds
    for all of them; each is captured once as a graph when it first comes, and anew when the
    cache has grown. The first step takes a minute or more.
    """

    def __init__(self, model: Transformer) -> None:
        config = model.config
        self.model, self.device = model, model.output_weight.device
        self.like = torch.empty(
            config.n_kv_heads, config.head_dim, dtype=model.dtype, device=self.device
        )
        compiled: Callable[..., Any] = torch.compile(step_hidden, dynamic=True, fullgraph=True)
        self._hidden = compiled
        self._logits: Callable[..., Any] = torch.compile(model.logits, dynamic=True, fullgraph=True)
        self._graphs: dict[torch.Size, Graph] = {}
        self._captured_at = 0

    def hidden(
        self, token_ids: Tensor, positions: Tensor, tables: Tensor, storage: Storage
    ) -> Tensor:
        """What the output head reads, (R, C), of R new ids; writes their keys and values.

        token_ids, positions: int64 (R,). tables: int64 (R, W), the blocks of each row's stream.
        """
        rows = padded(token_ids, positions, tables)
        hidden = self._replayed(rows, storage) if self.device.type == "cuda" else (
            self._hidden(self.model, rows.to(self.device), storage)
        )  # fmt: skip
        return hidden[: len(token_ids)].clone()  # the next replay writes where this one did

    def logits(
        self, hidden: Tensor, first: int = 0, stop: int | None = None, out: Tensor | None = None
    ) -> Tensor:
        """Float32 logits of ids first .. stop-1, from hidden states (R, C): (R, stop - first).

        Or those columns of `out`, float32 (R, ids), which comes back.
        """
        logits: Tensor = self._logits(hidden, first, stop)
        if out is None:
            return logits
        out[:, first:stop] = logits
        return out

    def _replayed(self, rows: Tensor, storage: Storage) -> Tensor:
        place = storage[0][0].data_ptr()
        if place != self._captured_at:
            self._graphs, self._captured_at = {}, place
        graph = self._graphs.get(rows.shape)
        if graph is None:
            pools = [other.pool for other in self._graphs.values()]
            graph = self._graphs[rows.shape] = Graph(
                lambda rows: self._hidden(self.model, rows, storage),
                nothing(rows.shape).to(self.device),
                pools[0] if pools else None,
            )
        return graph.replay(rows)


class Graph:
    """A function of one tensor as a CUDA graph. Not run yet: no GPU was at hand."""

    def __init__(self, function: Callable[[Tensor], Tensor], given: Tensor, pool: Any) -> None:
        self.given, self._graph = given, torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # kernels are compiled and chosen before they are captured
            for _ in range(3):
                function(given)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(self._graph, pool=pool):
            self.result = function(given)
        self.pool = self._graph.pool()

    def replay(self, given: Tensor) -> Tensor:
        self.given.copy_(given)
        self._graph.replay()
        return self.result


def padded(token_ids: Tensor, positions: Tensor, tables: Tensor) -> Tensor:
    """One tensor (P, 2 + Q) of ids, positions and blocks; P and Q are powers of two."""
    n_rows, width = tables.shape
    rows = nothing((power_of_two(n_rows), 2 + max(LEAST_WIDTH, power_of_two(width))))
    rows[:n_rows, 0], rows[:n_rows, 1], rows[:n_rows, 2 : 2 + width] = token_ids, positions, tables
    return rows


def nothing(shape: Sequence[int]) -> Tensor:
    """Rows that write where nobody reads."""
    rows = torch.full(tuple(shape), NULL_BLOCK)
    rows[:, 0], rows[:, 1] = 0, WASTE_SLOT  # of the null block
    return rows


def power_of_two(n: int) -> int:
    """The least that is not below n."""
    return 1 << (n - 1).bit_length()


def step_hidden(model: Transformer, rows: Tensor, storage: Storage) -> Tensor:
    """Hidden states (R, C) of rows of (id, position, blocks), each one new id of some stream."""
    token_ids, positions = rows[:, :1], rows[:, 1:2]
    view = RowView(positions, rows[:, 2:], storage)
    return model.hidden(token_ids, positions, view.mask, view)[:, 0]


class RowView:
    """The cache of rows with one new id each. Follows the model's cache protocol.

    Rows may be neighbours in one stream: all are written before any is read. What a row must not
    see is read from the zero slot: there may be anything, NaN too, and 0 times NaN is NaN.
    """

    def __init__(self, positions: Tensor, tables: Tensor, storage: Storage) -> None:
        self.storage, block_size = storage, storage[0][0].shape[1]
        places = torch.arange(tables.shape[1] * block_size, device=tables.device)
        visible = places <= positions
        slots = (tables[:, :, None] * block_size + places[:block_size]).flatten(1)
        self._written = slots.gather(1, positions)[:, 0]
        self._read = torch.where(visible, slots, ZERO_SLOT)
        self.mask = visible[:, None, None]

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes k, v (R, K, 1, D); returns all slots of each row, (R, K, S, D)."""
        slot = k.shape[1::2]  # of which the compiler knows that it is always the same
        keys, values = (tensor.view(-1, *slot) for tensor in self.storage[layer])
        keys[self._written], values[self._written] = k[:, :, 0], v[:, :, 0]
        return keys[self._read].transpose(1, 2), values[self._read].transpose(1, 2)
