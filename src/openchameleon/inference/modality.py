"""Modality as data: a few integers per row say which ids may come next. Knows no model.

A row's state is five integers, and a batch's state an int64 tensor (R, 5) with the columns
    open_range   index of the code range the row is inside of, -1 outside
    codes_left   codes still to come before the end id
    items_left   items that may still be opened
    room         new ids that may still be written, the closing eos included
    forced       index of the only range that may come (mode "image"), -1 for free choice
An item is opened only where all of it and an eos fit into `room`, so it is never cut.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from openchameleon.errors import UserError
from openchameleon.inference.params import SamplingParams
from openchameleon.vocab import Vocab

# Rows of the table; those of range r follow: its codes at FIRST_RANGE + 2r, its end id after them.
FREE, ONLY_BEGIN, ONLY_EOS, FIRST_RANGE = range(4)


class ModalityTable:
    """The masks of a vocabulary on a device, and the step from one state to the next."""

    def __init__(self, vocab: Vocab, device: torch.device | str = "cpu") -> None:
        self.vocab, self.device = vocab, torch.device(device)
        ranges = vocab.code_ranges
        table = torch.zeros(FIRST_RANGE + 2 * len(ranges), vocab.size, dtype=torch.bool)
        table[FREE, vocab.text_start : vocab.text_stop] = True
        table[FREE, vocab.eos_id] = True
        table[ONLY_EOS, vocab.eos_id] = True
        begun = torch.full((vocab.size,), -1)
        for i, r in enumerate(ranges):
            table[FIRST_RANGE + 2 * i, r.first_id : r.stop_id] = True
            table[FIRST_RANGE + 2 * i + 1, r.end_id] = True
            begun[r.begin_id] = i
        self._table = table.to(device)
        self.is_text = torch.zeros(vocab.size, dtype=torch.bool, device=device)
        self.is_text[vocab.text_start : vocab.text_stop] = True
        self._range_begun = begun.to(device)
        # Index -1 ("no range") reads the zero at the end.
        self._n_codes = torch.tensor([*(r.codes_per_item for r in ranges), 0], device=device)
        self._item_len = torch.tensor([*(r.item_len for r in ranges), 0], device=device)
        self._begin_ids = torch.tensor([r.begin_id for r in ranges], dtype=torch.int64).to(device)
        self._range_index = torch.arange(len(ranges), device=device)

    def start(self, prompt: Sequence[int], params: SamplingParams, room: int) -> list[int]:
        """The state of a row after its prompt. UserError for a prompt or mode that cannot be."""
        open_range, codes_left = scan_prompt(self.vocab, prompt)
        forced = -1
        # No limit: more than `room` ids can open, and the one the prompt may have open.
        items_left = room + 1 if params.max_images is None else params.max_images
        if params.mode == "text":
            items_left = 0
        elif params.mode != "interleaved":
            names = [r.name for r in self.vocab.code_ranges]
            if params.mode not in names:
                raise UserError(f"This model writes no {params.mode}s; ask for mode text.")
            forced = names.index(params.mode)
            items_left = params.max_images or 1
        if open_range >= 0:
            name = self.vocab.code_ranges[open_range].name
            if items_left == 0 or forced not in (-1, open_range):
                raise UserError(
                    f"The prompt ends inside an item of {name!r}, which mode {params.mode!r} with "
                    f"these limits must not write; close the item or allow it."
                )
            items_left -= 1
        return [open_range, codes_left, items_left, room, forced]

    def allowed(self, state: Tensor) -> Tensor:
        """State (R, 5) -> bool (R, V): the ids that may come next."""
        open_range, codes_left, items_left, _, forced = state.unbind(1)
        outside = open_range < 0
        inside_row = FIRST_RANGE + 2 * open_range + (codes_left == 0).long()
        forced_row = torch.where(items_left > 0, ONLY_BEGIN, ONLY_EOS)
        outside_row = torch.where(forced < 0, FREE, forced_row)
        allowed = self._table[torch.where(outside, outside_row, inside_row)]
        allowed[:, self._begin_ids] = self._may_begin(state)
        return allowed

    def advance(self, state: Tensor, ids: Tensor) -> Tensor:
        """State (R, 5) and the allowed ids (R,) that were written -> the next state (R, 5)."""
        open_range, codes_left, items_left, room, forced = state.unbind(1)
        outside = open_range < 0
        begun = self._range_begun[ids]
        still_open = torch.where(codes_left == 0, -1, open_range)
        next_open = torch.where(outside, begun, still_open)
        next_left = torch.where(outside, self._n_codes[begun], (codes_left - 1).clamp(min=0))
        next_items = items_left - (outside & (begun >= 0)).long()
        return torch.stack([next_open, next_left, next_items, room - 1, forced], 1)

    def exhausted(self, state: Tensor) -> Tensor:
        """State (R, 5) -> bool (R,): no room is left for what would have to come next."""
        open_range, codes_left, items_left, room, forced = state.unbind(1)
        must_begin = (forced >= 0) & (items_left > 0)
        needed = torch.where(must_begin, self._item_len[forced] + 1, 1)
        needed = torch.where(open_range >= 0, codes_left + 2, needed)
        return room < needed

    def _may_begin(self, state: Tensor) -> Tensor:
        """State (R, 5) -> bool (R, n_ranges): a whole item, and an eos, still fit and may come."""
        open_range, _, items_left, room, forced = state[:, :, None].unbind(1)
        fits = (open_range < 0) & (items_left > 0) & (room > self._item_len[:-1])
        return fits & ((forced < 0) | (forced == self._range_index))


def after_codes(state: list[int], n: int) -> list[int]:
    """The state of a row after n more codes of its open range: `advance` without tensors."""
    open_range, codes_left, items_left, room, forced = state
    return [open_range, codes_left - n, items_left, room - n, forced]


def scan_prompt(vocab: Vocab, prompt: Sequence[int]) -> tuple[int, int]:
    """(open range or -1, codes left) after the prompt; UserError where an item is malformed."""
    begins = {r.begin_id: i for i, r in enumerate(vocab.code_ranges)}
    ends = {r.end_id for r in vocab.code_ranges}
    open_range, left = -1, 0
    for position, i in enumerate(prompt):
        if not 0 <= i < vocab.size:
            raise UserError(
                f"Id {i} at position {position} of the prompt is outside the vocabulary of "
                f"{vocab.size} ids; was it made with another tokenizer?"
            )
        if open_range < 0:
            stray = i in ends or any(r.first_id <= i < r.stop_id for r in vocab.code_ranges)
            open_range = begins.get(i, -1)
            left = vocab.code_ranges[open_range].codes_per_item if open_range >= 0 else 0
        else:
            r = vocab.code_ranges[open_range]
            stray = not (r.first_id <= i < r.stop_id if left else i == r.end_id)
            open_range, left = (open_range, left - 1) if left else (-1, 0)
        if stray:
            raise UserError(
                f"Id {i} at position {position} of the prompt breaks an item: codes stand only "
                f"between a begin and an end id, and in their exact number."
            )
    return open_range, left
