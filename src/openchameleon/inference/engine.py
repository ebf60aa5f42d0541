"""Prompts in, completions out: many sequences of any length and modality in one running batch.

It knows the vocabulary's ranges and nothing of text or pixels. Every step is
schedule (who reads what) -> run (the model reads it) -> append (one id for each sequence that is
read to its end; finished sequences leave).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Generator, Iterable
from itertools import count, groupby

import torch
from torch import Tensor

from openchameleon.errors import UserError
from openchameleon.inference.blocks import BlockManager
from openchameleon.inference.guidance import combine, guidance_streams
from openchameleon.inference.kv_cache import KVPool
from openchameleon.inference.lookahead import n_right, next_guess
from openchameleon.inference.modality import ModalityTable, after_codes
from openchameleon.inference.params import SamplingParams
from openchameleon.inference.runner import Runner
from openchameleon.inference.sampling import RowParams, Sampled, sample
from openchameleon.inference.scheduler import Scheduler
from openchameleon.inference.sequence import Completion, FinishReason, Request, Sequence, Stream
from openchameleon.model.transformer import Transformer
from openchameleon.vocab import Vocab

MAX_BATCH, BLOCK_SIZE = 64, 16
MEMORY_SHARE = 0.5
"""Of the memory that is free when an engine is made, what its cache may grow to by default."""


class Engine:
    """Generates with a model whose dropout is off.

    `add` lets a request in, each `step` moves all of them on, `abort` takes one out at any time;
    `generate` and `stream` are loops over these, and may run beside each other, in threads too:
    a step moves on everybody's requests.
    max_batch: streams read at a time (a guided sequence has up to three). max_prefill: positions
    of prompts read in a step. cache_tokens: positions of all streams that are held at most; None
    is what max_batch rows need, or as much of it as there is memory for. lookahead: codes of a
    picture that are guessed ahead at most (see lookahead.py); fewer where many streams run.
    compiled: the step is compiled by PyTorch (see compiled.py), for a GPU.
    """

    def __init__(
        self,
        model: Transformer,
        vocab: Vocab,
        max_batch: int = MAX_BATCH,
        max_prefill: int = 2048,
        block_size: int = BLOCK_SIZE,
        cache_tokens: int | None = None,
        lookahead: int = 16,
        compiled: bool = False,
    ) -> None:
        if model.config.vocab_size != vocab.size:
            raise ValueError(f"vocab has {vocab.size} ids, the model {model.config.vocab_size}")
        for name, value in (("max_batch", max_batch), ("max_prefill", max_prefill)):
            if value < 1:
                raise ValueError(f"{name} = {value} is not at least 1")
        self.model, self.vocab, self.lookahead = model, vocab, lookahead
        self.table = ModalityTable(vocab, model.output_weight.device)
        if cache_tokens is None:
            cache_tokens = default_cache_tokens(model, max_batch, block_size)
        self.blocks = BlockManager(cache_tokens // block_size, block_size)
        self.scheduler = Scheduler(self.blocks, max_batch, max_prefill)
        pool = KVPool(model.config.n_layers, self.blocks.n_blocks, block_size)
        self.runner = Runner(model, pool, vocab, compiled)
        self._arrivals, self._weights = count(), weights_of(model)
        self._lock = threading.RLock()

    @property
    def busy(self) -> bool:
        """Whether anything is under way. A step that reads prompts only gives nobody an id."""
        return bool(self.scheduler.running or self.scheduler.waiting)

    @property
    def compiled(self) -> bool:
        return self.runner.compiled

    def warm_up(self) -> None:
        """Writes a few ids for nobody: what is compiled at first use is compiled then."""
        request = Request([self.vocab.bos_id], SamplingParams(mode="text", max_tokens=2))
        for n_streams in (1, 3):  # one alone, and any number
            self.generate([request] * n_streams)

    def add(self, request: Request) -> Sequence:
        """Lets a request in, to be moved on by `step`. UserError if it cannot be answered.

        The sequence that comes back may be finished already, where no id fits.
        """
        sequence = self._sequence(request)
        with self._lock:
            if self._weights != (now := weights_of(self.model)):
                self.blocks.forget()  # trained on in between: what was read holds no longer
                self.runner.renew()
                self._weights = now
            if sequence.finish_reason is None:
                self.scheduler.add(sequence)
        return sequence

    @torch.inference_mode()
    def step(self) -> list[Sequence]:
        """Moves on what is under way. The sequences that got an id or came to their end."""
        with self._lock:
            reads = self.scheduler.schedule()
            self.runner.read(reads)
            for stream, _ in reads:
                self.blocks.publish(stream)
            ready = [s for s in self.scheduler.running if s.is_read]
            by_range = sorted(ready, key=lambda s: s.drawing_from)
            for _, group in groupby(by_range, key=lambda s: s.drawing_from):
                self._advance(list(group))
            return ready

    def abort(self, sequence: Sequence) -> None:
        """Takes a sequence out, its blocks at once free for others; a finished one stays so."""
        with self._lock:
            if sequence.finish_reason is None:
                self.scheduler.remove(sequence)
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
        ids, n_given = sequence.full.token_ids, len(sequence.prompt)
        try:
            while True:
                while n_given < len(ids):  # others may move it on while this one is asked nothing
                    yield ids[n_given]
                    n_given += 1
                if sequence.finish_reason is not None:
                    return sequence.finish_reason
                self.step()
        finally:  # whoever reads may go at any id
            self.abort(sequence)

    def _sequence(self, request: Request) -> Sequence:
        """Checks a request against this model and this cache, and makes it a sequence."""
        if self.model.training and self.model.config.dropout:
            raise ValueError("the model's dropout is on; call model.eval() first")
        room = room_for(request, self.model.config.max_seq_len)
        state = self.table.start(request.token_ids, request.params, room)
        sequence = Sequence(request.params, list(request.token_ids), state, next(self._arrivals))
        sequence.guidance = self._guidance_of(sequence)  # the prompt may end inside an item
        n_blocks = sequence.max_rows * self.blocks.n_for(len(request.token_ids) + room)
        if n_blocks > self.blocks.n_blocks:
            size = self.blocks.block_size
            raise UserError(
                f"The request may come to hold {n_blocks * size} tokens in the cache, which has"
                f" room for {self.blocks.n_blocks * size}; allow fewer new tokens, leave guidance"
                " out, or start with a larger cache."
            )
        if self.table.exhausted(torch.tensor([state], device=self.table.device)).item():
            sequence.finish_reason = "length"
        return sequence

    def _advance(self, group: list[Sequence]) -> None:
        """Draws the next ids of sequences that all write text, or all codes of one range."""
        if group[0].drawing_from >= 0:
            self._write_codes(group)
        else:
            self._write_text(group)

    def _write_text(self, group: list[Sequence]) -> None:
        """One id each, of those that the modality table allows."""
        table = self.table
        state = torch.tensor([s.state for s in group], device=table.device)
        logits = self.runner.text_logits(all_hidden(group))
        ids, ok = self._draw(group, logits, table.allowed(state), self._seen(group))
        after = table.advance(state, ids)
        exhausted = table.exhausted(after)
        report = torch.cat([torch.stack([ids, ok.long(), exhausted.long()], 1), after], 1)
        for sequence, (token_id, fine, spent, *state_after) in zip(
            group, report.tolist(), strict=True
        ):
            if not fine:
                self._finish(sequence, "nonfinite_logits")
            elif token_id == self.vocab.eos_id:
                self._finish(sequence, "stop")
            else:
                self._append(sequence, [token_id], state_after)
                if spent:
                    self._finish(sequence, "length")

    def _write_codes(self, group: list[Sequence]) -> None:
        """The next code each, and those after it that were guessed right."""
        # Every code is allowed and nothing else, so only the codes' rows of the head are needed
        # (8,192 of 65,536 in the published vocabulary).
        r = self.vocab.code_ranges[group[0].drawing_from]
        logits = self.runner.logits(all_hidden(group), r.first_id, r.stop_id)
        if any(s.guidance for s in group):
            logits = combine(logits, *guided_rows(group, logits.device))
        ids, ok = self._draw(group, logits)
        rows = torch.stack([ids + r.first_id, ok.long()], 1).tolist()
        start, longest = 0, self._longest_guess()
        for sequence in group:
            stop = start + 1 + len(sequence.guess)
            drawn, fine = [i for i, _ in rows[start:stop]], [ok for _, ok in rows[start:stop]]
            start = stop
            n_codes = n_right(sequence.guess, drawn) + 1
            if not all(fine[:n_codes]):
                self._finish(sequence, "nonfinite_logits")
                continue
            state = after_codes(sequence.state, n_codes)
            guess = next_guess(drawn, n_codes - 1, state[1], longest)
            self._append(sequence, drawn[:n_codes], state)
            sequence.set_guess(guess)

    def _longest_guess(self) -> int:
        """Guesses fill what the running streams leave of a batch."""
        n_streams = sum(len(s.streams) for s in self.scheduler.running)
        return min(self.lookahead, self.scheduler.max_rows // n_streams - 1)

    def _draw(
        self,
        group: list[Sequence],
        logits: Tensor,
        allowed: Tensor | None = None,
        seen: Tensor | None = None,
    ) -> Sampled:
        params = [s.modality for s in group for _ in range(1 + len(s.guess))]
        uniforms = [u for s in group for u in s.next_uniforms(1 + len(s.guess))]
        return sample(logits, allowed, RowParams.of(params, logits.device), uniforms, seen)

    def _seen(self, group: list[Sequence]) -> Tensor | None:
        """The text ids of each so far, bool (R, V); None where nobody has a repetition penalty."""
        if all(s.params.text.repetition_penalty == 1 for s in group):
            return None
        for sequence in group:
            if sequence.seen is None:
                sequence.seen = torch.zeros(self.vocab.size, dtype=torch.bool)
                new = sequence.full.token_ids
            else:
                new = sequence.full.token_ids[-1:]
            sequence.seen[[i for i in new if self.vocab.is_text(i)]] = True
        return torch.stack([s.seen for s in group if s.seen is not None]).to(self.table.device)

    def _append(self, sequence: Sequence, token_ids: list[int], state: list[int]) -> None:
        """Gives a sequence its next ids and the state after them."""
        before = sequence.drawing_from
        sequence.append(token_ids)
        sequence.state = state
        if before != sequence.drawing_from:
            self.scheduler.close(sequence.guidance)
            sequence.guidance = self._guidance_of(sequence)

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        self.scheduler.remove(sequence)
        sequence.finish_reason = reason

    def _guidance_of(self, sequence: Sequence) -> list[Stream]:
        """The guidance streams of a sequence that is about to write codes and wants them."""
        if sequence.params.guidance is None or sequence.drawing_from < 0:
            return []
        ids = guidance_streams(self.vocab, sequence.full.token_ids)
        return [Stream(token_ids) for token_ids in ids]


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


def default_cache_tokens(model: Transformer, max_batch: int, block_size: int) -> int:
    """Room for max_batch rows of the model's context, or for what half of the free memory holds.

    Room for one guided request in any case.
    """
    config, device = model.config, model.output_weight.device
    context = -(-config.max_seq_len // block_size) * block_size
    wanted = max(3, max_batch) * context
    n_bytes = 2 * config.n_layers * config.n_kv_heads * config.head_dim * model.dtype.itemsize
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    elif hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        return wanted
    return max(3 * context, min(wanted, int(MEMORY_SHARE * free) // n_bytes))


def weights_of(model: Transformer) -> int:
    """A number that changes when any weight is written to or replaced."""
    return hash(tuple((id(p), p._version) for p in model.parameters() if not p.is_inference()))


def all_hidden(group: list[Sequence]) -> Tensor:
    """What the head reads (R, C): of each stream of each sequence, a row for each id to draw."""
    found = [stream.hidden for sequence in group for stream in sequence.streams]
    hidden = [states for states in found if states is not None]
    assert len(hidden) == len(found), "a stream is drawn from before it is read"
    return torch.cat(hidden)


def guided_rows(group: list[Sequence], device: torch.device) -> tuple[Tensor, Tensor]:
    """For `combine`: rows of the full, image-only and unconditional streams, (3, R), and scales.

    A sequence without guidance is its own three streams, at scale 1. Each stream has a row for
    each id to draw.
    """
    rows, scales, start = [], [], 0
    for sequence in group:
        n, n_streams = 1 + len(sequence.guess), len(sequence.streams)
        firsts = [start + n * min(i, n_streams - 1) for i in range(3)]
        rows += [[first + j for first in firsts] for j in range(n)]
        scales += [(sequence.params.guidance if sequence.guidance else None) or (1.0, 1.0)] * n
        start += n * n_streams
    return torch.tensor(rows, device=device).T, torch.tensor(scales, device=device).T
