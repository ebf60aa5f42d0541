"""The model calls: streams' unread ids in, hidden states and logits out."""

from __future__ import annotations

from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from openchameleon.inference.blocks import NULL_BLOCK
from openchameleon.inference.kv_cache import KVPool
from openchameleon.inference.native.step import NativeStep
from openchameleon.inference.scheduler import Read
from openchameleon.model.transformer import Transformer


class Runner:
    """A model and the cache that it reads into."""

    def __init__(self, model: Transformer, pool: KVPool, pad_id: int) -> None:
        self.model, self.pool, self.pad_id = model, pool, pad_id

    @cached_property
    def native(self) -> NativeStep | None:
        """The faster way for single ids, where there is one; made when it is first asked for."""
        return NativeStep.of(self.model)

    def renew(self) -> None:
        """To be called when weights were replaced."""
        self.__dict__.pop("native", None)

    def read(self, reads: list[Read]) -> None:
        """Reads the planned ids, alike numbers of them together; fills in `hidden` at the end."""
        reads = sorted(reads, key=lambda read: read[1])
        for start, stop in pairwise(read_cuts([n for _, n in reads])):
            group = reads[start:stop]
            for (stream, n_new), hidden in zip(group, self._call(group), strict=True):
                stream.n_read += n_new - len(stream.guess)
                stream.hidden = hidden[n_new - 1 - len(stream.guess) : n_new]

    def logits(self, hidden: Tensor, first_id: int, stop_id: int) -> Tensor:
        """Float32 logits (R, stop_id - first_id) of hidden states (R, C)."""
        if self.native is not None:
            return self.native.logits(hidden, first_id, stop_id)
        return self.model.logits(hidden, first_id, stop_id)

    def _call(self, reads: list[Read]) -> Tensor:
        """One model call -> hidden at the new ids of each stream, (B, T, C), padded."""
        new_ids = [[*s.token_ids[s.n_read :], *s.guess][:n] for s, n in reads]
        counts = [n for _, n in reads]
        if max(counts) == 1 and self.native is not None:
            return self._native_call(self.native, reads)
        padded = [ids + [self.pad_id] * (max(counts) - len(ids)) for ids in new_ids]
        device = self.model.output_weight.device
        tables, starts = [s.blocks for s, _ in reads], [s.n_read for s, _ in reads]
        view = self.pool.view(tables, starts, counts, device)
        token_ids = torch.tensor(padded, device=device)
        return self.model.hidden(token_ids, view.positions, view.mask, view)

    def _native_call(self, native: NativeStep, reads: list[Read]) -> Tensor:
        """`_call` for streams that each have one new id."""
        streams = [stream for stream, _ in reads]
        width = max(len(stream.blocks) for stream in streams)
        tables = [s.blocks + [NULL_BLOCK] * (width - len(s.blocks)) for s in streams]
        n_blocks = 1 + max(map(max, tables))
        layers = range(self.model.config.n_layers)
        storage = [self.pool.storage(layer, n_blocks, native.like) for layer in layers]
        token_ids = [stream.token_ids[stream.n_read] for stream in streams]
        positions = [stream.n_read for stream in streams]
        ids, at, blocks = map(torch.tensor, (token_ids, positions, tables))
        return native.hidden(ids, at, blocks, storage)


def read_cuts(counts: list[int]) -> list[int]:
    """Where to cut ascending counts into model calls: 0, ..., len(counts).

    A call is padded to its longest: no row more than doubles, but for two ids.
    """
    cuts = [0]
    for stop, count in enumerate(counts):
        if count > 2 * counts[cuts[-1]] + 2:
            cuts.append(stop)
    return [*cuts, len(counts)] if counts else cuts
