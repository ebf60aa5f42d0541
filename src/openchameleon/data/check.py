"""Whether rows hold what a model can read: ids of the vocabulary, and pictures that are whole."""

from __future__ import annotations

from typing import Any

import numpy as np


def fault_of(
    tokens: np.ndarray, doc_ids: np.ndarray, manifest: dict[str, Any]
) -> tuple[int, str] | None:
    """The first row of (B, T) at fault and what is wrong with it, or None.

    Every id is below `vocab_size`, and each item of the manifest's code ranges is a begin id,
    exactly its codes and an end id, in one document; no code or end id stands anywhere else.
    """
    size = manifest["vocab_size"]
    outside = (tokens >= size).any(axis=1)
    if outside.any():
        row = int(outside.argmax())
        return row, f"holds id {tokens[row].max()} of a {size}-id space"
    for r in manifest.get("code_ranges", ()):  # rows of before these were written down have none
        wrong = _broken_items(tokens, doc_ids, **r)
        if wrong.any():
            row = int(wrong.any(axis=1).argmax())
            return row, (
                f"breaks the {r['name']} at token {int(wrong[row].argmax())}: one is id"
                f" {r['begin_id']}, {r['codes_per_item']} codes, id {r['end_id']}"
            )
    return None


def _broken_items(
    tokens: np.ndarray,
    doc_ids: np.ndarray,
    *,
    name: str,
    begin_id: int,
    end_id: int,
    first_id: int,
    count: int,
    codes_per_item: int,
) -> np.ndarray:
    """Where the tokens (B, T) differ from what the begin ids before them ask for."""
    length = codes_per_item + 1  # from a begin to its end
    begin, end = tokens == begin_id, tokens == end_id
    due = np.zeros_like(end)
    due[:, length:] = begin[:, :-length] & (doc_ids[:, :-length] == doc_ids[:, length:])
    endless = begin.copy()
    endless[:, :-length] &= ~due[:, length:]
    n_open = begin.cumsum(axis=1) - due.cumsum(axis=1)  # a begin counts from itself on
    is_code = (tokens >= first_id) & (tokens < first_id + count)
    misplaced = is_code != ((n_open > 0) & ~begin)
    return endless | misplaced | (end != due) | (n_open > 1)
