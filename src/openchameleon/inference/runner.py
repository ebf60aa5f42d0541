"""The model calls: streams' unread ids in, hidden states and logits out."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from itertools import chain, pairwise

import torch
from torch import Tensor

from openchameleon.inference.blocks import NULL_BLOCK
from openchameleon.inference.compiled import CompiledStep
from openchameleon.inference.kv_cache import KVPool
from openchameleon.inference.native.step import NativeStep
from openchameleon.inference.scheduler import Read
from openchameleon.model.transformer import Transformer
from openchameleon.vocab import Vocab


class Runner:
    """A model and the cache that it reads into.

    compiled: few new ids are read by `CompiledStep`.
    """

    def __init__(self, model: Transformer, pool: KVPool, vocab: Vocab, compiled: bool) -> None:
        self.model, self.pool, self.vocab, self.compiled = model, pool, vocab, compiled
        self.text_spans = vocab.spans_outside_codes()

    @cached_property
    def step(self) -> NativeStep | CompiledStep | None:
        """The faster way for few new ids, where there is one; made when it is first asked for."""
        return CompiledStep(self.model) if self.compiled else NativeStep.of(self.model)

    def renew(self) -> None:
        """To be called when weights were replaced."""
        self.__dict__.pop("step", None)

    def read(self, reads: list[Read]) -> None:
        """Reads the planned ids, alike numbers of them together; fills in `hidden` at the end."""
        reads = sorted(reads, key=lambda read: read[1])
        n_short = 0
        if self.step is not None:
            n_short = sum(n <= self.step.longest for _, n in reads)
            counts = [n for _, n in reads[:n_short]]
            for start, stop in pairwise(step_cuts(counts, self.step.max_rows)):
                group = reads[start:stop]
                self._fill(group, self._call_step(self.step, group))
        reads = reads[n_short:]
        for start, stop in pairwise(read_cuts([n for _, n in reads])):
            group = reads[start:stop]
            self._fill(group, self._call(group))

    def _fill(self, group: list[Read], hidden: Iterable[Tensor]) -> None:
        """hidden: of each stream at its new ids, (T, C) with T at least their number."""
        for (stream, n_new), states in zip(group, hidden, strict=True):
            stream.n_read += n_new - len(stream.guess)
            stream.hidden = states[n_new - 1 - len(stream.guess) : n_new]

    def logits(self, hidden: Tensor, first_id: int, stop_id: int) -> Tensor:
        """Float32 logits (R, stop_id - first_id) of hidden states (R, C)."""
        if self.step is not None:
            return self.step.logits(hidden, first_id, stop_id)
        return self.model.logits(hidden, first_id, stop_id)

    def text_logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits (R, V) of the ids that may stand outside of codes; others may be 0."""
        out = torch.zeros(len(hidden), self.vocab.size, device=hidden.device)
        for first, stop in self.text_spans:
            if self.step is not None:
                self.step.logits(hidden, first, stop, out)
            else:
                out[:, first:stop] = self.model.logits(hidden, first, stop)
        return out

    def _call(self, reads: list[Read]) -> Tensor:
        """One model call -> hidden at the new ids of each stream, (B, T, C), padded."""
        ids, counts = new_ids(reads), [n for _, n in reads]
        padded = [row + [self.vocab.pad_id] * (max(counts) - len(row)) for row in ids]
        device = self.model.output_weight.device
        tables, starts = [s.blocks for s, _ in reads], [s.n_read for s, _ in reads]
        view = self.pool.view(tables, starts, counts, device)
        token_ids = torch.tensor(padded, device=device)
        return self.model.hidden(token_ids, view.positions, view.mask, view)

    def _call_step(self, step: NativeStep | CompiledStep, reads: list[Read]) -> tuple[Tensor, ...]:
        """The faster step over all new ids, each a row of its own -> hidden of each stream."""
        counts = [n for _, n in reads]
        width = max(len(stream.blocks) for stream, _ in reads)
        tables = [s.blocks + [NULL_BLOCK] * (width - len(s.blocks)) for s, _ in reads]
        n_blocks = 1 + max(map(max, tables))
        layers = range(self.model.config.n_layers)
        storage = [self.pool.storage(layer, n_blocks, step.like) for layer in layers]
        hidden = step.hidden(
            torch.tensor([*chain(*new_ids(reads))]),
            torch.tensor([*chain(*(range(s.n_read, s.n_read + n) for s, n in reads))]),
            torch.tensor(tables).repeat_interleave(torch.tensor(counts), 0),
            storage,
        )
        return hidden.split(counts)


def new_ids(reads: list[Read]) -> list[list[int]]:
    """What each stream reads now, guesses included."""
    return [[*s.token_ids[s.n_read :], *s.guess][:n] for s, n in reads]


def step_cuts(counts: list[int], max_rows: int) -> list[int]:
    """Where to cut counts into its calls of at most max_rows ids: 0, ..., len(counts)."""
    cuts, n_rows = [0], 0
    for stop, count in enumerate(counts):
        if n_rows + count > max_rows and n_rows:
            cuts.append(stop)
            n_rows = 0
        n_rows += count
    return [*cuts, len(counts)] if counts else cuts


def read_cuts(counts: list[int]) -> list[int]:
    """Where to cut ascending counts into model calls: 0, ..., len(counts).

    A call is padded to its longest: no row more than doubles, but for two ids.
    """
    cuts = [0]
    for stop, count in enumerate(counts):
        if count > 2 * counts[cuts[-1]] + 2:
            cuts.append(stop)
    return [*cuts, len(counts)] if counts else cuts
