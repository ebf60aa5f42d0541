"""Logits -> ids, for rows that each have their own parameters and their own randomness.

Order: mask, repetition penalty, temperature, top-k, top-p, draw (as in the published system,
with top-k added). A row's result depends on that row alone: filters keep every id down to a
threshold, and the draw inverts the cumulative distribution in id order at one uniform number
that is the row's own.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from openchameleon.inference.params import ModalityParams

SHORT_SORT, GROUP = 1024, 256


@dataclass(frozen=True, slots=True)
class RowParams:
    """The parameters of R rows as tensors (R,).

    drawn: whether any row has a temperature. n_sorted: likeliest ids that decide the filters, 0 =
    none.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    repetition_penalty: Tensor
    drawn: bool
    n_sorted: int

    @staticmethod
    def of(rows: Sequence[ModalityParams], device: torch.device | str = "cpu") -> RowParams:
        sampled = [p for p in rows if p.temperature > 0]
        filtered = [p.top_k or sys.maxsize for p in sampled if p.top_k or p.top_p < 1]
        return RowParams(
            torch.tensor([p.temperature for p in rows], device=device),
            torch.tensor([p.top_k or sys.maxsize for p in rows], device=device),
            torch.tensor([p.top_p for p in rows], device=device),
            torch.tensor([p.repetition_penalty for p in rows], device=device),
            drawn=bool(sampled),
            n_sorted=max(filtered, default=0),
        )


class Sampled(NamedTuple):
    """ids (R,) int64, and ok (R,) bool: False where a row's allowed logits were not finite."""

    ids: Tensor
    ok: Tensor


def sample(
    logits: Tensor,
    allowed: Tensor | None,
    params: RowParams,
    uniforms: Sequence[float],
    seen: Tensor | None = None,
) -> Sampled:
    """One id per row from float32 logits (R, V).

    allowed: bool (R, V), None = every id. seen: bool (R, V), the ids the repetition penalty
    applies to. uniforms: for each row the number in [0, 1) that it is drawn at; a greedy one has no
    use for it.
    A row that is not ok (a non-finite logit among its allowed ids, or none allowed) gets an
    arbitrary id and leaves the others untouched.
    """
    scores = logits if allowed is None else torch.where(allowed, logits, -torch.inf)
    ok = finite_rows(logits, scores, allowed)
    if seen is not None:
        penalty = params.repetition_penalty[:, None]
        penalised = torch.where(scores > 0, scores / penalty, scores * penalty)
        scores = torch.where(seen, penalised, scores)
    likeliest = first_largest(scores)
    if not params.drawn:
        return Sampled(likeliest, ok)
    hot = params.temperature > 0
    # The maximum goes first, so that no temperature, however small, overflows.
    scores = scores - scores.amax(-1, keepdim=True)
    scores = scores / torch.where(hot, params.temperature, 1.0)[:, None]
    if params.n_sorted:
        scores = scores.masked_fill(scores < _threshold(scores, params), -torch.inf)
    ids = draw(scores.softmax(-1), torch.tensor(uniforms, device=logits.device), likeliest)
    return Sampled(torch.where(hot, ids, likeliest), ok)


def finite_rows(logits: Tensor, scores: Tensor, allowed: Tensor | None) -> Tensor:
    """Whether some ids of each row are allowed, and all their logits are finite: bool (R,)."""
    ok = scores.amax(-1).isfinite()
    if logits.sum(-1).isfinite().all():  # then each of them is: ten times quicker than to look
        return ok
    return ok & (logits.isfinite() if allowed is None else logits.isfinite() | ~allowed).all(-1)


def first_largest(scores: Tensor) -> Tensor:
    """`scores.argmax(-1)`, of (R, V): in two stages, which is several times quicker on a CPU."""
    if rest := scores.shape[-1] % GROUP:  # only then: it copies all of it
        scores = F.pad(scores, (0, GROUP - rest), value=-torch.inf)
    groups = scores.unflatten(-1, (-1, GROUP))
    first = groups.amax(-1).argmax(-1)
    return first * GROUP + groups[torch.arange(len(scores), device=scores.device), first].argmax(-1)


def draw(probs: Tensor, uniforms: Tensor, fallback: Tensor) -> Tensor:
    """Inverts each row's distribution (R, V) at its number in [0, 1); never an id of probability 0.

    fallback (R,): ids for rows where rounding leads to such an id (a parallel cumulative sum
    need not be monotone in floating point).
    """
    cdf = probs.cumsum(-1)
    target = uniforms[:, None] * cdf[:, -1:]
    ids = torch.searchsorted(cdf, target, right=True).clamp(max=probs.shape[-1] - 1)
    return torch.where(probs.gather(1, ids) > 0, ids, fallback[:, None]).squeeze(1)


def _threshold(scores: Tensor, params: RowParams) -> Tensor:
    """The least score (R, 1) that top-k, then top-p, keep; ids that tie with it are kept too."""
    n_ids = scores.shape[-1]
    n_sorted = min(params.n_sorted, n_ids)
    top_k, top_p = params.top_k[:, None], params.top_p[:, None]
    limited = top_k < n_ids
    all_mass = scores.logsumexp(-1, keepdim=True)
    # Top-p rarely reaches past the likeliest thousand, and a full sort is ten times dearer.
    for n_best in (min(SHORT_SORT, n_sorted), n_sorted):
        best = scores.topk(n_best).values
        best = best.masked_fill(torch.arange(n_best, device=scores.device) >= top_k, -torch.inf)
        mass = torch.where(limited, best.logsumexp(-1, keepdim=True), all_mass)
        upto = (best - mass).exp().cumsum(-1)
        reaches = (upto[:, -1:] >= top_p) | (top_p >= 1)
        if n_best == n_sorted or torch.where(limited, top_k <= n_best, reaches).all():
            break
    before = upto.roll(1, -1)
    before[:, 0] = 0.0
    keep = ((before < top_p) | (top_p >= 1)) & best.isfinite()
    least = best.masked_fill(~keep, torch.inf).amin(-1, keepdim=True)
    # A row without filters may reach beyond the sorted part: it keeps everything.
    return least.masked_fill(~limited & (top_p >= 1), -torch.inf)
