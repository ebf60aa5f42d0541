"""Classifier-free guidance in three streams, of which each sees less of what came before.

    full           everything so far
    image-only     everything but the text: code items, bos
    unconditional  bos and the item that is open now
    logits = u + s_image * (i - u) + s_text * (f - i)

Each stream has positions of its own; all are fed the ids drawn for the full one. They run only
while an item's codes are written.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from openchameleon.vocab import Vocab


def guidance_streams(vocab: Vocab, token_ids: Sequence[int]) -> list[list[int]]:
    """[image-only, unconditional] ids of a row inside an item; one list where they are equal."""
    image_only = without_text(vocab, token_ids)
    unconditional = from_open_item(vocab, token_ids)
    if image_only == unconditional:
        return [unconditional]
    return [image_only, unconditional]


def without_text(vocab: Vocab, token_ids: Sequence[int]) -> list[int]:
    """The ids that are bos or belong to a code range, in order."""
    control = {vocab.bos_id}.union(*({r.begin_id, r.end_id} for r in vocab.code_ranges))
    spans = [range(r.first_id, r.stop_id) for r in vocab.code_ranges]
    return [i for i in token_ids if i in control or any(i in span for span in spans)]


def from_open_item(vocab: Vocab, token_ids: Sequence[int]) -> list[int]:
    """bos, then the ids from the last begin id on."""
    begins = {r.begin_id for r in vocab.code_ranges}
    last = max(position for position, i in enumerate(token_ids) if i in begins)
    return [vocab.bos_id, *token_ids[last:]]


def combine(logits: Tensor, streams: Tensor, scales: Tensor) -> Tensor:
    """Logits of all streams (n_streams, V) -> guided logits (R, V).

    streams: (3, R) rows of full, image-only, unconditional; scales: (2, R) text, image. A row
    that is not guided names its full stream three times, and gets its logits unchanged.
    """
    full, image_only, unconditional = logits[streams[0]], logits[streams[1]], logits[streams[2]]
    text, image = scales[0, :, None], scales[1, :, None]
    return unconditional + image * (image_only - unconditional) + text * (full - image_only)
