"""The bookkeeping of the cache's blocks and of the steps, under random schedules."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from openchameleon.inference.blocks import NULL_BLOCK, BlockManager
from openchameleon.inference.lookahead import n_right, next_guess
from openchameleon.inference.params import SamplingParams
from openchameleon.inference.scheduler import Scheduler
from openchameleon.inference.sequence import Sequence, Stream

SIZE = 4


def read(blocks: BlockManager, stream: Stream) -> int:
    """Reads all that is unread, as the engine does; how many ids that were."""
    blocks.share(stream)
    n_new = stream.n_pending
    blocks.grow(stream, n_new)
    stream.n_read += n_new
    blocks.publish(stream)
    return n_new


def check(blocks: BlockManager, streams: list[Stream]) -> None:
    """Every block has as many holders as streams that name it, and none is lost."""
    held = Counter(block for stream in streams for block in stream.blocks)
    assert held == blocks._holders
    assert NULL_BLOCK not in held
    outside = [*blocks._free, *blocks._idle]
    assert len(set(outside)) == len(outside)
    assert set(outside) | set(held) == set(range(1, blocks._next_fresh))
    assert not set(outside) & set(held)
    assert len(held) + blocks.n_available == blocks.n_blocks
    for stream in streams:
        assert len(stream.blocks) == blocks.n_for(stream.n_read)
        assert len(set(stream.blocks)) == len(stream.blocks)


@pytest.mark.parametrize("seed", range(5))
def test_no_block_is_lost_or_given_twice_and_what_is_shared_is_what_was_read(seed: int) -> None:
    """A block remembers what was written to it; whoever shares it must have those ids."""
    rng = random.Random(seed)
    blocks = BlockManager(40, SIZE)
    streams: list[Stream] = []
    content: dict[int, list[int]] = {}
    n_shared = 0
    for _ in range(2000):
        kind = rng.random()
        if kind < 0.3 and blocks.n_available > 8:
            stream = Stream([rng.randrange(2) for _ in range(rng.randrange(1, 24))])
            n_read = read(blocks, stream)
            n_shared += (len(stream.token_ids) - n_read) // SIZE
            for i, block in enumerate(stream.blocks):
                past = stream.token_ids[: (i + 1) * SIZE]
                if i * SIZE >= len(stream.token_ids) - n_read:
                    content[block] = past
                assert content[block] == past
            streams.append(stream)
        elif kind < 0.6 and streams:
            stream = rng.choice(streams)
            if len(stream.token_ids) < 40 and blocks.n_available:
                stream.token_ids.append(rng.randrange(2))
                read(blocks, stream)
                for i, block in enumerate(stream.blocks):
                    content[block] = stream.token_ids[: (i + 1) * SIZE]
        elif streams:
            blocks.release(streams.pop(rng.randrange(len(streams))))
        check(blocks, streams)
    assert n_shared > 100
    for stream in streams:
        blocks.release(stream)
    assert blocks.n_held == 0


def test_known_blocks_survive_their_holders_until_their_place_is_needed() -> None:
    blocks = BlockManager(4, SIZE)
    ids = list(range(9))
    first = Stream(list(ids))
    assert read(blocks, first) == 9
    blocks.release(first)
    again = Stream(list(ids))
    assert read(blocks, again) == 1
    blocks.release(again)
    other = Stream([7] * 16)
    assert read(blocks, other) == 16  # all four places
    blocks.release(other)
    assert read(blocks, Stream(list(ids))) == 9


def test_the_same_ids_after_another_past_are_another_block() -> None:
    blocks = BlockManager(9, SIZE)
    read(blocks, Stream([1] * 4 + [5] * 4 + [0]))
    assert read(blocks, Stream([2] * 4 + [5] * 4 + [0])) == 9
    assert read(blocks, Stream([1] * 4 + [5] * 4 + [9])) == 1


def test_ends_are_given_up_before_beginnings() -> None:
    blocks = BlockManager(4, SIZE)
    long = Stream(list(range(12)))
    read(blocks, long)
    blocks.release(long)
    read(blocks, Stream([50]))
    assert read(blocks, Stream([*range(9)])) == 1


def test_what_is_forgotten_is_read_again_and_what_is_held_is_kept() -> None:
    blocks = BlockManager(9, SIZE)
    held, gone = Stream(list(range(6))), Stream([7] * 9)
    read(blocks, held)
    read(blocks, gone)
    blocks.release(gone)
    blocks.forget()
    check(blocks, [held])
    again = Stream([7] * 9)
    assert read(blocks, again) == 9
    held.token_ids += [1] * 6
    read(blocks, held)
    check(blocks, [held, again])


def sequence(arrival: int, n_ids: int) -> Sequence:
    return Sequence(SamplingParams(), [arrival] * n_ids, [-1, 0, 9, 99, -1], arrival)


def test_the_oldest_is_never_made_to_wait_and_order_is_kept() -> None:
    """A cache for two of eight: each step reads, then writes one id; the oldest gets one each."""
    rng = random.Random(3)
    blocks = BlockManager(10, SIZE)
    scheduler = Scheduler(blocks, max_rows=8, max_prefill=12)
    alive = [sequence(i, rng.randrange(1, 16)) for i in range(8)]
    for s in alive:
        scheduler.add(s)
    ended = []
    for _ in range(400):
        if not alive:
            break
        oldest, n_before = alive[0], len(alive[0].full.token_ids)
        was_read = oldest.full.n_pending == 1
        for stream, n_new in scheduler.schedule():
            stream.n_read += n_new
            blocks.publish(stream)
        arrivals = [s.arrival for s in (*scheduler.running, *scheduler.waiting)]
        assert arrivals == sorted(arrivals)
        for s in [s for s in scheduler.running if s.is_read]:
            s.append([rng.randrange(99)])
            if len(s.full.token_ids) >= 36:
                ended.append(s.arrival)
                scheduler.remove(s)
                alive.remove(s)
        assert not was_read or len(oldest.full.token_ids) == n_before + 1
        check(blocks, [s.full for s in alive])
    assert sorted(ended) == list(range(8))
    assert scheduler.n_preempted > 3
    assert blocks.n_held == 0


def test_a_guess_is_as_long_as_the_last_one_was_good() -> None:
    assert n_right([], [5]) == 0
    assert n_right([5, 6, 7], [5, 6, 9, 1]) == 2
    assert next_guess([5, 6, 9, 1], 2, n_left=30, most=16) == [1, 1, 1, 1, 1]
    assert next_guess([5, 6, 9, 1], 0, n_left=30, most=16) == [6]
    assert next_guess([5, 6, 9, 1], 1, n_left=3, most=16) == [9, 1]
    assert next_guess([5], 0, n_left=1, most=16) == []
    assert next_guess([5], 0, n_left=9, most=-1) == []
