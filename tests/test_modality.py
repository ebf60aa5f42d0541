"""The modality table against a rule that reads the whole sequence anew at every step."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openchameleon.errors import UserError
from openchameleon.inference.modality import ModalityTable, scan_prompt
from openchameleon.inference.params import SamplingParams
from openchameleon.inference.reference import allowed_ids
from openchameleon.vocab import CodeRange, Vocab

IMAGE = CodeRange("image", begin_id=4, end_id=5, first_id=6, count=4, codes_per_item=3)
AUDIO = CodeRange("audio", begin_id=10, end_id=11, first_id=12, count=3, codes_per_item=1)
TWO_RANGES = Vocab(30, text_start=20, text_stop=30, code_ranges=(IMAGE, AUDIO), eot_id=18)
TEXT_ONLY = Vocab(30, text_start=20, text_stop=30, code_ranges=(), eot_id=18)
CLOSED = [0, 21, 18]
CLOSED_ITEM = [0, *IMAGE.ids_from_codes([0, 3, 2]), 18]
OPEN_ITEM = [0, 21, IMAGE.begin_id, 7]
ALL_CODES = [0, IMAGE.begin_id, 7, 7, 7]


def random_row(rng: random.Random) -> tuple[list[int], SamplingParams, int]:
    mode = rng.choice(["interleaved", "text", "image"])
    max_images = rng.choice([None, 1, 2, 3])
    prompts = [CLOSED, CLOSED_ITEM] + ([] if mode == "text" else [OPEN_ITEM, ALL_CODES])
    params = SamplingParams(mode=mode, max_images=max_images)
    return rng.choice(prompts), params, rng.randrange(0, 25)


def pick(rng: random.Random, allowed: set[int]) -> int:
    """A random allowed id, begin ids more often than their share."""
    begins = sorted(allowed & {IMAGE.begin_id, AUDIO.begin_id})
    return rng.choice(begins if begins and rng.random() < 0.3 else sorted(allowed))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(0, 2**32))
def test_table_equals_the_slow_rule_for_rows_of_different_modalities(seed: int) -> None:
    rng = random.Random(seed)
    table = ModalityTable(TWO_RANGES)
    rows = [random_row(rng) for _ in range(5)]
    state = torch.tensor([table.start(*row) for row in rows])
    written: list[list[int]] = [[] for _ in rows]
    done = [False] * len(rows)
    while True:
        allowed, exhausted = table.allowed(state), table.exhausted(state).tolist()
        ids = []
        for i, (prompt, params, room) in enumerate(rows):
            expected = allowed_ids(TWO_RANGES, prompt, written[i], params, room)
            if not done[i]:
                assert exhausted[i] == (not expected)
                done[i] = exhausted[i]
            if not done[i]:
                assert set(allowed[i].nonzero().flatten().tolist()) == expected
            ids.append(TWO_RANGES.eos_id if done[i] else pick(rng, expected))
            done[i] = done[i] or ids[i] == TWO_RANGES.eos_id
            written[i].append(ids[i])
        if all(done):
            return
        state = table.advance(state, torch.tensor(ids))


def test_controls_that_nobody_may_write_are_never_allowed() -> None:
    table = ModalityTable(TWO_RANGES)
    starts = [table.start(CLOSED, SamplingParams(mode=m), 20) for m in ("interleaved", "text")]
    allowed = table.allowed(torch.tensor(starts))
    assert not allowed[:, [0, 1, 3, TWO_RANGES.eot_id]].any()


@pytest.mark.parametrize("room", range(8))
def test_an_item_is_opened_only_with_room_for_all_of_it_and_eos(room: int) -> None:
    table = ModalityTable(TWO_RANGES)
    state = torch.tensor([table.start(CLOSED, SamplingParams(), room)])
    assert table.allowed(state)[0, IMAGE.begin_id].item() == (room >= 3 + 2 + 1)
    assert table.allowed(state)[0, AUDIO.begin_id].item() == (room >= 1 + 2 + 1)


def test_mode_image_without_room_is_exhausted_at_once() -> None:
    table = ModalityTable(TWO_RANGES)
    rows = [table.start(CLOSED, SamplingParams(mode="image"), room) for room in (5, 6)]
    assert table.exhausted(torch.tensor(rows)).tolist() == [True, False]


def test_a_vocabulary_without_ranges_writes_text_and_refuses_mode_image() -> None:
    table = ModalityTable(TEXT_ONLY)
    state = torch.tensor([table.start(CLOSED, SamplingParams(), 3)])
    state = table.advance(state, torch.tensor([25]))
    assert set(table.allowed(state)[0].nonzero().flatten().tolist()) == {2, *range(20, 30)}
    with pytest.raises(UserError, match="writes no images"):
        table.start(CLOSED, SamplingParams(mode="image"), 20)


def test_mode_text_refuses_to_go_on_with_an_open_picture() -> None:
    with pytest.raises(UserError, match="ends inside"):
        ModalityTable(TWO_RANGES).start(OPEN_ITEM, SamplingParams(mode="text"), 20)
    with pytest.raises(UserError, match="ends inside"):
        ModalityTable(TWO_RANGES).start(OPEN_ITEM, SamplingParams(max_images=0), 20)


@pytest.mark.parametrize(
    ("prompt", "position"),
    [
        ([0, 7], 1),
        ([0, 5], 1),
        ([0, 4, 7, 21], 3),
        ([0, 4, 7, 7, 5], 4),
        ([0, 4, 7, 7, 7, 7], 5),
        ([0, 4, 12], 2),
        ([0, 30], 1),
        ([-1], 0),
    ],
)
def test_a_malformed_prompt_is_a_user_error_naming_the_position(
    prompt: list[int], position: int
) -> None:
    with pytest.raises(UserError, match=f"position {position} "):
        scan_prompt(TWO_RANGES, prompt)
