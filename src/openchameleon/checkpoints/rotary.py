"""The two layouts of rotary pairs inside a head, and the way between them.

Ours and Meta's turn neighbours (0, 1), (2, 3), ..; Hugging Face's turns (0, D/2), (1, D/2 + 1), ..
The same function of other rows: rows of the query and key projections, and of the vectors of the
QK-norm, are permuted. Exact in both directions.
"""

from __future__ import annotations

from torch import Tensor


def halves_from_pairs(rows: Tensor, head_dim: int) -> Tensor:
    """(heads * D, ...) with neighbours as pairs -> the same rows with halves as pairs."""
    pairs = rows.unflatten(0, (-1, head_dim // 2, 2))
    return pairs.transpose(1, 2).reshape(rows.shape)


def pairs_from_halves(rows: Tensor, head_dim: int) -> Tensor:
    """The inverse of `halves_from_pairs`."""
    halves = rows.unflatten(0, (-1, 2, head_dim // 2))
    return halves.transpose(1, 2).reshape(rows.shape)
