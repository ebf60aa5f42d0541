"""Who holds which block of the cache: counts and ids in plain Python, no tensors.

A block holds the keys and values of `block_size` positions. A full block is known by what was
read up to its end, so that another stream that begins alike takes it over instead of reading
again; it stays known when its last holder has gone, until its place is needed.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict

from openchameleon.inference.sequence import Stream

NULL_BLOCK = 0
"""Belongs to nobody: what stands for positions that are not there."""

Key = tuple[int, tuple[int, ...]]
"""The serial of the block before (0: none) and the ids of this one: its whole past, exactly."""


class BlockManager:
    """Blocks 1 .. n_blocks, each free, held by one or more streams, or idle with known content."""

    def __init__(self, n_blocks: int, block_size: int) -> None:
        self.n_blocks, self.block_size = n_blocks, block_size
        self._free: list[int] = []  # a heap: low ids first, so that streams get runs of blocks
        self._next_fresh = 1
        self._holders: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # the longest unused first
        self._block_of: dict[Key, int] = {}
        self._known: dict[int, tuple[Key, int]] = {}  # block -> its key and its own serial
        self._last_serial = 0

    @property
    def n_held(self) -> int:
        return len(self._holders)

    @property
    def n_available(self) -> int:
        """Blocks that `grow` can still give, known content given up where need be."""
        return self.n_blocks - len(self._holders)

    def n_for(self, n_positions: int) -> int:
        """Blocks that so many positions take."""
        return -(-n_positions // self.block_size)

    def n_missing(self, stream: Stream, n_new: int) -> int:
        """Blocks the stream lacks to read n_new more ids."""
        return max(0, self.n_for(stream.n_read + n_new) - len(stream.blocks))

    def next_key(self, stream: Stream) -> Key | None:
        """What the stream's next whole block would be known by; None where there is none.

        Its last id is always left to be read: only reading gives what the next id is drawn from.
        """
        start, size = stream.n_read, self.block_size
        if start % size or start + size >= len(stream.token_ids):
            return None
        return stream.serial, tuple(stream.token_ids[start : start + size])

    def share(self, stream: Stream) -> None:
        """Gives the stream the known blocks that continue what it has read."""
        while (key := self.next_key(stream)) is not None and key in self._block_of:
            block = self._block_of[key]
            self._hold(block)
            stream.blocks.append(block)
            stream.n_read += self.block_size
            stream.serial = self._known[block][1]
            stream.n_published += 1

    def grow(self, stream: Stream, n_new: int) -> None:
        """Gives the stream the blocks it lacks to read n_new more ids; they must be available."""
        for _ in range(self.n_missing(stream, n_new)):
            block = self._take()
            self._hold(block)
            stream.blocks.append(block)

    def publish(self, stream: Stream) -> None:
        """Makes the blocks that the stream has filled known to others."""
        size = self.block_size
        while (stream.n_published + 1) * size <= stream.n_read:
            start = stream.n_published * size
            key = (stream.serial, tuple(stream.token_ids[start : start + size]))
            if key not in self._block_of:
                self._last_serial += 1
                block = stream.blocks[stream.n_published]
                self._block_of[key] = block
                self._known[block] = (key, self._last_serial)
            stream.serial = self._known[self._block_of[key]][1]
            stream.n_published += 1

    def release(self, stream: Stream) -> None:
        """Takes all blocks from the stream, which has then read nothing."""
        for block in reversed(stream.blocks):  # ends are given up before beginnings
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            del self._holders[block]
            if block in self._known:
                self._idle[block] = None
            else:
                heapq.heappush(self._free, block)
        stream.blocks, stream.n_read, stream.n_published, stream.serial = [], 0, 0, 0

    def forget(self) -> None:
        """Makes nothing known any more; who holds blocks keeps them."""
        for block in self._idle:
            heapq.heappush(self._free, block)
        self._idle.clear()
        self._block_of.clear()
        self._known.clear()

    def _hold(self, block: int) -> None:
        self._idle.pop(block, None)
        self._holders[block] = self._holders.get(block, 0) + 1

    def _take(self) -> int:
        """A block that nobody holds. Half of the places in use may be idle before new ones are."""
        if self._free:
            return heapq.heappop(self._free)
        if self._next_fresh <= self.n_blocks and 2 * len(self._idle) < self._next_fresh:
            self._next_fresh += 1
            return self._next_fresh - 1
        block, _ = self._idle.popitem(last=False)
        key, _ = self._known.pop(block)
        del self._block_of[key]  # what followed it can no longer be found: serials are not reused
        return block
