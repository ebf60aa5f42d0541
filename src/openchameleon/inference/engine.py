"""Prompts in, completions out: many sequences of any length and modality in one running batch.

It knows the vocabulary's ranges and nothing of text or pixels. Every step is
schedule (waiting sequences enter) -> run (the model reads each stream's pending ids)
-> append (one id per sequence; finished sequences leave).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from openchameleon.errors import UserError
from openchameleon.inference.guidance import combine, guidance_streams
from openchameleon.inference.kv_cache import KVCache
from openchameleon.inference.modality import ModalityTable
from openchameleon.inference.sampling import RowParams, sample
from openchameleon.inference.sequence import (
    Completion,
    FinishReason,
    Request,
    Sequence,
    Stream,
)
from openchameleon.model.transformer import Transformer
from openchameleon.vocab import Vocab


class Engine:
    """Generates with a model whose dropout is off; for one thread.

    `add` lets a request in, each `step` moves all of them on, `abort` takes one out at any time;
    `generate` and `stream` are loops over these, and may run beside each other.
    max_batch: rows of the cache in use at a time (a guided sequence takes up to three).
    max_prefill: prompt positions, padding included, read in one model call.
    """

    def __init__(
        self, model: Transformer, vocab: Vocab, max_batch: int = 64, max_prefill: int = 8192
    ) -> None:
        if model.config.vocab_size != vocab.size:
            raise ValueError(f"vocab has {vocab.size} ids, the model {model.config.vocab_size}")
        if max_batch < 1:
            raise ValueError(f"max_batch = {max_batch} is not at least 1")
        self.model, self.vocab = model, vocab
        self.max_batch, self.max_prefill = max_batch, max_prefill
        self.table = ModalityTable(vocab, model.output_weight.device)
        self.batch = Batch(self)

    def add(self, request: Request) -> Sequence:
        """Lets a request in, to be moved on by `step`. UserError if it cannot be answered.

        The sequence that comes back may be finished already, where no id fits.
        """
        sequence = self._sequence(request)
        if sequence.finish_reason is None:
            self.batch.waiting.append(sequence)
        return sequence

    def step(self) -> list[Sequence]:
        """Moves on what is under way. The sequences that got an id or came to their end."""
        return self.batch.step()

    def abort(self, sequence: Sequence) -> None:
        """Takes a sequence out, its rows at once free for others; one that is finished stays so."""
        if sequence.finish_reason is None:
            self.batch.remove(sequence)
            sequence.finish_reason = "aborted"

    def generate(self, requests: Iterable[Request]) -> list[Completion]:
        """One completion per request, in order. UserError for a prompt that cannot be answered."""
        sequences: list[Sequence] = []
        try:
            sequences += (self.add(request) for request in requests)
            while any(sequence.finish_reason is None for sequence in sequences):
                self.step()
        finally:
            for sequence in sequences:
                self.abort(sequence)
        return [sequence.completion() for sequence in sequences]

    def stream(self, request: Request) -> Generator[int, None, FinishReason]:
        """`generate` for one request, id by id; the generator returns the finish reason."""
        self._sequence(request)  # here, so that errors come at the call
        return self._stream(request)

    def _stream(self, request: Request) -> Generator[int, None, FinishReason]:
        sequence = self.add(request)
        n_given = len(sequence.prompt)
        try:
            while True:
                yield from sequence.full.token_ids[n_given:]
                n_given = len(sequence.full.token_ids)
                if sequence.finish_reason is not None:
                    return sequence.finish_reason
                self.step()
        finally:  # whoever reads may go at any id
            self.abort(sequence)

    def _sequence(self, request: Request) -> Sequence:
        """Checks a request against this model and makes it a sequence."""
        if self.model.training and self.model.config.dropout:
            raise ValueError("the model's dropout is on; call model.eval() first")
        room = room_for(request, self.model.config.max_seq_len)
        state = self.table.start(request.token_ids, request.params, room)
        sequence = Sequence(request.params, list(request.token_ids), state)
        if self.table.exhausted(torch.tensor([state], device=self.table.device)).item():
            sequence.finish_reason = "length"
        return sequence


def room_for(request: Request, max_seq_len: int) -> int:
    """New ids that fit, the closing eos included. UserError for an empty or too long prompt."""
    n_prompt, max_tokens = len(request.token_ids), request.params.max_tokens
    if not n_prompt:
        raise UserError(
            "The prompt is empty; give at least one token (a document begins with bos)."
        )
    if n_prompt > max_seq_len:
        raise UserError(
            f"The prompt has {n_prompt} tokens, the model's context {max_seq_len}; shorten it."
        )
    left = max_seq_len - n_prompt
    return left if max_tokens is None else min(left, max_tokens)


@dataclass(frozen=True, slots=True)
class Rows:
    """The running sequences as tensors; made anew when one enters, leaves or changes modality."""

    state: Tensor  # (R, 5)
    streams: Tensor  # (3, R): rows of the full, image-only and unconditional streams
    scales: Tensor | None  # (2, R): text and image guidance; None where nobody is guided
    params: RowParams
    seen: Tensor | None  # (R, V): text ids so far; None where nobody has a repetition penalty

    @staticmethod
    def of(running: list[Sequence], table: ModalityTable) -> Rows:
        device, vocab = table.device, table.vocab
        triples = [(s.full, *(s.guidance or [s.full])) for s in running]
        streams = [(t[0].row, t[1].row, t[-1].row) for t in triples]
        scales = [(s.params.guidance if s.guidance else None) or (1.0, 1.0) for s in running]
        params = [s.modality for s in running]
        seen = None
        if any(p.repetition_penalty != 1 for p in params):
            seen = torch.zeros(len(running), vocab.size, dtype=torch.bool)
            for row, sequence in zip(seen, running, strict=True):
                row[[i for i in sequence.full.token_ids if vocab.is_text(i)]] = True
            seen = seen.to(device)
        return Rows(
            torch.tensor([s.state for s in running], device=device),
            torch.tensor(streams, device=device).T,
            torch.tensor(scales, device=device).T if any(s.guidance for s in running) else None,
            RowParams.of(params, device),
            seen,
        )


class Batch:
    """The sequences under way, the cache of their streams, and the step that moves them on.

    `streams[i]` owns row i of the cache. Streams that are not read yet stand at the end.
    """

    def __init__(self, engine: Engine) -> None:
        self.model, self.table = engine.model, engine.table
        self.max_batch, self.max_prefill = engine.max_batch, engine.max_prefill
        config, weight = self.model.config, self.model.output_weight
        self.cache = KVCache(
            config.n_layers, config.n_kv_heads, config.head_dim, config.max_seq_len,
            weight.dtype, weight.device,
        )  # fmt: skip
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.streams: list[Stream] = []
        self.unread: list[Stream] = []
        self.rows: Rows | None = None

    @torch.inference_mode()
    def step(self) -> list[Sequence]:
        """One id for every running sequence; returns these."""
        self._schedule()
        if not (moved := self.running):
            return []
        if self.rows is None:
            self.rows = Rows.of(self.running, self.table)
        hidden = self._run()
        ids, ok = self._draw(hidden, self.rows)
        self._append(ids, ok, self.rows)
        return moved

    def remove(self, sequence: Sequence) -> None:
        """Takes an unfinished sequence out."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
            return
        streams = [sequence.full, *sequence.guidance]
        self._drop([stream for stream in streams if stream not in self.unread])
        self.unread = [stream for stream in self.unread if stream not in streams]
        self.running = [s for s in self.running if s is not sequence]
        self.rows = None

    def _schedule(self) -> None:
        """Lets waiting sequences in while their rows fit, and gives unread streams their rows."""
        used = sum(s.max_rows for s in self.running)
        while self.waiting and (
            not self.running or used + self.waiting[0].max_rows <= self.max_batch
        ):
            sequence = self.waiting.popleft()
            used += sequence.max_rows
            self.running.append(sequence)
            self.unread.append(sequence.full)
            self._open_guidance(sequence)
            self.rows = None
        self.unread.sort(key=lambda stream: len(stream.token_ids))  # alike lengths pad little
        for row, stream in enumerate(self.unread, len(self.streams)):
            stream.row = row
        self.cache.add_rows(len(self.unread))
        self.streams += self.unread
        self.unread = []

    def _run(self) -> Tensor:
        """The model over every stream's pending ids -> hidden at the last of each, (rows, C)."""
        lengths = self.cache.lengths
        n_read = sum(length > 0 for length in lengths)
        cuts = [0] if n_read else []
        pending = [len(stream.token_ids) for stream in self.streams[n_read:]]
        cuts += [n_read + cut for cut in prefill_cuts(pending, self.max_prefill)]
        return torch.cat([self._read(start, stop) for start, stop in pairwise(cuts)])

    def _read(self, start: int, stop: int) -> Tensor:
        """One model call over the pending ids of rows start .. stop-1 -> (stop - start, C)."""
        pending = [
            stream.token_ids[length:]
            for stream, length in zip(
                self.streams[start:stop], self.cache.lengths[start:stop], strict=True
            )
        ]
        counts = [len(ids) for ids in pending]
        pad = self.table.vocab.pad_id
        padded = [ids + [pad] * (max(counts) - len(ids)) for ids in pending]
        view = self.cache.extend(start, counts)
        token_ids = torch.tensor(padded, device=view.positions.device)
        hidden = self.model.hidden(token_ids, view.positions, view.mask, view)
        return hidden[torch.arange(stop - start), torch.tensor(counts) - 1]

    def _draw(self, hidden: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """Hidden of every stream -> the ids of the running sequences, (R,), and their `ok`."""
        weight, allowed, seen, first_id = self.model.output_weight, None, rows.seen, 0
        drawing_from = {s.drawing_from for s in self.running}
        if len(drawing_from) == 1 and -1 not in drawing_from:
            # All are inside one range, where every code is allowed and nothing else: only the
            # codes' rows of the head are needed (8,192 of 65,536 in the published vocabulary).
            r = self.table.vocab.code_ranges[drawing_from.pop()]
            weight, first_id, seen = weight[r.first_id : r.stop_id], r.first_id, None
        else:
            allowed = self.table.allowed(rows.state)
        logits = F.linear(hidden, weight).float()
        if rows.scales is None:
            logits = logits[rows.streams[0]]
        else:
            logits = combine(logits, rows.streams, rows.scales)
        generators = [s.generator for s in self.running]
        ids, ok = sample(logits, allowed, rows.params, generators, seen)
        return ids + first_id, ok

    def _append(self, ids: Tensor, ok: Tensor, rows: Rows) -> None:
        """Gives each sequence its id and its next state; lets the finished go."""
        state = self.table.advance(rows.state, ids)
        exhausted = self.table.exhausted(state)
        report = torch.cat([torch.stack([ids, ok.long(), exhausted.long()], 1), state], 1).tolist()
        if rows.seen is not None:
            rows.seen[torch.arange(len(report)), ids] |= self.table.is_text[ids]
        changed = False
        for sequence, (i, fine, spent, *next_state) in zip(self.running, report, strict=True):
            before, sequence.state = sequence.drawing_from, next_state
            sequence.finish_reason = self._finish_reason(i, fine, spent)
            if fine and i != self.table.vocab.eos_id:
                sequence.append(i)
            if sequence.finish_reason is not None:
                self._drop([sequence.full, *sequence.guidance])
                changed = True
            elif before != sequence.drawing_from:
                self._drop(sequence.guidance)
                self._open_guidance(sequence)
                changed = True
        if changed:
            self.running = [s for s in self.running if s.finish_reason is None]
        self.rows = None if changed else replace(rows, state=state)

    def _finish_reason(self, token_id: int, fine: bool, exhausted: bool) -> FinishReason | None:
        if not fine:
            return "nonfinite_logits"
        if token_id == self.table.vocab.eos_id:
            return "stop"
        return "length" if exhausted else None

    def _open_guidance(self, sequence: Sequence) -> None:
        """Starts the guidance streams of a sequence that is about to write codes and wants them."""
        sequence.guidance = []
        if sequence.params.guidance is not None and sequence.drawing_from >= 0:
            ids = guidance_streams(self.table.vocab, sequence.full.token_ids)
            sequence.guidance = [Stream(token_ids) for token_ids in ids]
            self.unread += sequence.guidance

    def _drop(self, streams: list[Stream]) -> None:
        """Frees the streams' rows; the last row moves into each gap, in the cache and here."""
        for stream in streams:
            self.cache.remove_row(stream.row)
            last = self.streams.pop()
            if last is not stream:
                last.row = stream.row
                self.streams[stream.row] = last


def prefill_cuts(lengths: list[int], max_positions: int) -> list[int]:
    """Where to cut ascending lengths into batches: 0, ..., len(lengths).

    In a batch, padded to its longest, no row more than doubles and the whole has at most
    max_positions positions, if it has more than one row.
    """
    cuts = [0]
    for stop, length in enumerate(lengths):
        start = cuts[-1]
        too_many = (stop + 1 - start) * length > max_positions
        if stop > start and (too_many or length > 2 * lengths[start]):
            cuts.append(stop)
    return [*cuts, len(lengths)] if lengths else cuts
