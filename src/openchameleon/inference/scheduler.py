"""Who is read next: requests wait, run, give way and leave. Plain objects, no tensors.

In a step every running stream with one unread id reads it, and its guess; longer ones, prompts,
share a budget of positions, so that a long prompt never holds up the others for more than one
step. The oldest always gets its blocks: where none are left, the youngest gives its own back and
waits, to be read again later.
"""

from __future__ import annotations

from bisect import insort
from collections import deque

from openchameleon.inference.blocks import BlockManager, Key
from openchameleon.inference.sequence import Sequence, Stream

Read = tuple[Stream, int]
"""A stream, and how many of its unread ids are read in this step, its guess included."""


class Scheduler:
    """The sequences under way, `running` and `waiting` both in the order in which they came.

    max_rows: streams read in one step. max_prefill: positions of prompts read in one step.
    """

    def __init__(self, blocks: BlockManager, max_rows: int, max_prefill: int) -> None:
        self.blocks, self.max_rows, self.max_prefill = blocks, max_rows, max_prefill
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.n_preempted = 0

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it stands; its blocks are free at once."""
        if sequence in self.running:
            self.running.remove(sequence)
            self.close(sequence.streams)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def close(self, streams: list[Stream]) -> None:
        for stream in streams:
            self.blocks.release(stream)

    def schedule(self) -> list[Read]:
        """What the model is to read now; the streams have their blocks."""
        step = Step(self)
        for sequence in list(self.running):
            if sequence in self.running:  # else it gave way to an older one
                step.plan(sequence)
        while self.waiting and step.may_enter(self.waiting[0]):
            sequence = self.waiting.popleft()
            insort(self.running, sequence, key=lambda s: s.arrival)
            step.plan(sequence)
        return step.reads

    def preempt_youngest(self) -> None:
        """Takes the blocks of the youngest; it waits, before those that have not begun."""
        victim = self.running.pop()
        victim.set_guess([])
        self.close(victim.streams)
        self.waiting.appendleft(victim)
        self.n_preempted += 1


class Step:
    """The plan of one step while it is made."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler, self.blocks = scheduler, scheduler.blocks
        self.budget = scheduler.max_prefill
        self.reads: list[Read] = []
        self._being_read: set[Key] = set()
        self._n_preempted = scheduler.n_preempted

    def may_enter(self, sequence: Sequence) -> bool:
        """Whether rows, blocks and budget are left for a sequence that waits."""
        running = self.scheduler.running
        if not running:
            return True
        if self.budget < 1 or self.scheduler.n_preempted > self._n_preempted:
            return False
        n_rows = sum(s.max_rows for s in running) + sequence.max_rows
        n_blocks = sum(self.blocks.n_for(len(s.token_ids) + 1) for s in sequence.streams)
        return n_rows <= self.scheduler.max_rows and n_blocks <= self.blocks.n_available

    def plan(self, sequence: Sequence) -> None:
        """Plans what each stream of a running sequence reads."""
        n_missing = sum(self.blocks.n_missing(s, 1 + len(s.guess)) for s in sequence.streams)
        if sequence.guess and n_missing > self.blocks.n_available:
            sequence.set_guess([])  # nobody gives way for a guess
        for stream in sequence.streams:
            if stream.n_pending > 1:
                self.blocks.share(stream)
            key = self.blocks.next_key(stream)
            if key in self._being_read:
                continue  # in the next step it takes that block over
            n_new = min(stream.n_pending, 1 if stream.n_pending == 1 else self.budget)
            n_new += len(stream.guess)
            n_new = self._make_room(sequence, stream, n_new)
            if n_new:
                self.reads.append((stream, n_new))
                self.budget -= n_new if stream.n_pending > 1 else 0
                if key is not None and n_new >= self.blocks.block_size:
                    self._being_read.add(key)

    def _make_room(self, sequence: Sequence, stream: Stream, n_new: int) -> int:
        """Gives the stream blocks for n_new ids, or for as many as there is room for."""
        while self.blocks.n_missing(stream, n_new) > self.blocks.n_available:
            if self.scheduler.running[-1] is sequence:
                n_blocks = len(stream.blocks) + self.blocks.n_available
                n_new = n_blocks * self.blocks.block_size - stream.n_read
                break
            self.scheduler.preempt_youngest()
        self.blocks.grow(stream, n_new)
        return n_new
