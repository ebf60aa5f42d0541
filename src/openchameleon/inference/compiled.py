"""The step of few new ids in fixed shapes, compiled by PyTorch; on a GPU replayed as a CUDA graph.

What the native step is to a CPU. Without it each of some twenty small kernels a layer is launched
from Python, which takes a GPU longer than to run them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from openchameleon.inference.blocks import NULL_BLOCK
from openchameleon.inference.kv_cache import WASTE_SLOT, ZERO_SLOT
from openchameleon.model.transformer import Transformer

Storage = Sequence[tuple[Tensor, Tensor]]
"""Keys and values of each layer, (blocks, block_size, K, D)."""

LEAST_WIDTH = 4  # blocks
MAX_COMPILED = 200
"""Compilations in a process: two for each shape of model that it comes to serve. PyTorch refuses
the ninth by itself."""


class CompiledStep:
    """One model's step, for one thread at a time; `hidden` and `logits` as of `NativeStep`.

    Rows and blocks are padded to powers of two, so that few shapes are met. What is compiled holds
    for all of them; each is captured once as a graph when it first comes, and anew when the
    cache has grown. The first step takes minutes, more for more layers.
    """

    longest = 32  # new ids of a stream that are read so
    max_rows = 64  # of a call: graphs keep the memory for each row's whole past

    def __init__(self, model: Transformer) -> None:
        config = model.config
        self.model, self.device = model, model.output_weight.device
        self.like = torch.empty(
            config.n_kv_heads, config.head_dim, dtype=model.dtype, device=self.device
        )
        self._compiled: Callable[..., Tensor] = torch.compile(
            step_hidden, dynamic=True, fullgraph=True
        )
        self.replays = self.device.type == "cuda"
        self._graphs: dict[torch.Size, Graph] = {}
        self._captured_at: list[int] = []
        # A graph reads weights where they lay, also when others were put in their place.
        self._kept = [t.detach() for t in (*model.parameters(), *model.buffers())]

    def hidden(
        self, token_ids: Tensor, positions: Tensor, tables: Tensor, storage: Storage
    ) -> Tensor:
        """What the output head reads, (R, C), of R new ids; writes their keys and values.

        token_ids, positions: int64 (R,). tables: int64 (R, W), the blocks of each row's stream.
        """
        rows = padded(token_ids, positions, tables)
        if self.replays:
            hidden = self._graph(rows.shape, storage).replay(rows)
        else:
            hidden = self._hidden(rows.to(self.device), storage)
        return hidden[: len(token_ids)].clone()  # the next replay writes where this one did

    def logits(
        self, hidden: Tensor, first: int = 0, stop: int | None = None, out: Tensor | None = None
    ) -> Tensor:
        """Float32 logits of ids first .. stop-1, from hidden states (R, C): (R, stop - first).

        Or those columns of `out`, float32 (R, ids), which comes back.
        """
        logits = self.model.logits(hidden, first, stop)  # two kernels: nothing to be compiled
        if out is None:
            return logits
        out[:, first:stop] = logits
        return out

    def _hidden(self, rows: Tensor, storage: Storage) -> Tensor:
        """The step as it is compiled: for any sizes, also where two are alike in the first call."""
        from torch.fx.experimental import _config

        shapes: Any = _config
        limit = torch._dynamo.config.patch(recompile_limit=MAX_COMPILED)
        with limit, shapes.patch(use_duck_shape=False):
            return self._compiled(self.model, rows, storage)

    def _graph(self, shape: torch.Size, storage: Storage) -> Graph:
        """The step for rows of that shape as a graph, which knows the cache by its addresses."""
        tensors = [*chain(*storage)]
        place = [*(t.data_ptr() for t in tensors), *map(len, tensors)]
        if place != self._captured_at:
            self._graphs, self._captured_at = {}, place
        if shape not in self._graphs:
            pool = next((graph.pool for graph in self._graphs.values()), None)
            rows = nothing(shape).to(self.device)
            self._graphs[shape] = Graph(lambda rows: self._hidden(rows, storage), rows, pool)
        return self._graphs[shape]


class Graph:
    """A function of one tensor as a CUDA graph. Not run yet: no GPU was at hand.

    given: on the GPU; what is replayed is for its shape. pool: of another graph, to share its
    memory; what either has returned last must be read before the other is replayed.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], given: Tensor, pool: Any) -> None:
        self.given, device = given, given.device
        stream = capture_stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        # Both contexts also for what `torch.cuda.graph` does not put back when a capture fails.
        with torch.cuda.device(device), torch.cuda.stream(stream):
            for _ in range(3):  # kernels are compiled and chosen before they are captured
                function(given)
            self._graph = torch.cuda.CUDAGraph()
            # Other threads of a server use the GPU meanwhile, for pictures.
            with torch.cuda.graph(self._graph, pool, stream, capture_error_mode="thread_local"):
                self.result = function(given)
        torch.cuda.current_stream(device).wait_stream(stream)
        self.pool = self._graph.pool()

    def replay(self, given: Tensor) -> Tensor:
        self.given.copy_(given)
        self._graph.replay()
        return self.result


@cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all graphs of a GPU: matrix products keep memory for each stream they met."""
    return torch.cuda.Stream(device)


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
