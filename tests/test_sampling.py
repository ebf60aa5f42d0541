"""Sampling against one row of plain Python arithmetic at a time."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from openchameleon.inference.params import ModalityParams, SamplingParams
from openchameleon.inference.sampling import SHORT_SORT, RowParams, draw, first_largest, sample

PARAMS = [
    ModalityParams(),
    ModalityParams(temperature=0.0),
    ModalityParams(temperature=0.6, top_k=3),
    ModalityParams(temperature=1.7, top_p=0.6),
    ModalityParams(top_k=7, top_p=0.8, repetition_penalty=1.4),
    ModalityParams(top_k=1000),
    ModalityParams(temperature=0.0, repetition_penalty=3.0),
]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def slow_row(
    logits: list[float], allowed: list[bool], seen: list[bool], p: ModalityParams, uniform: float
) -> tuple[int, float]:
    """(id, how far `uniform` lies from the nearest boundary between ids) for one row."""
    scores = {i: x for i, x in enumerate(logits) if allowed[i]}
    for i in scores:
        if seen[i]:
            r = p.repetition_penalty
            scores[i] = scores[i] / r if scores[i] > 0 else scores[i] * r
    if p.temperature == 0:
        return max(scores, key=lambda i: (scores[i], -i)), 1.0
    ranked = sorted(scores, key=lambda i: -scores[i])[: p.top_k or None]
    weights = {i: math.exp((scores[i] - scores[ranked[0]]) / p.temperature) for i in ranked}
    kept, mass, total = [], 0.0, sum(weights.values())
    for i in ranked:
        if kept and mass >= p.top_p * total and p.top_p < 1:
            break
        kept.append(i)
        mass += weights[i]
    edges, below = [], 0.0
    for i in sorted(kept):
        below += weights[i] / mass
        edges.append((below, i))
    chosen = next(i for edge, i in edges if uniform < edge or i == edges[-1][1])
    return chosen, min(abs(edge - uniform) for edge, _ in edges)


def assert_equals_slow_rule(
    logits: Tensor, allowed: Tensor, seen: Tensor, params: list[ModalityParams], seed: int
) -> None:
    uniforms = torch.rand(len(params), generator=generator(seed)).tolist()
    ids, ok = sample(logits, allowed, RowParams.of(params), uniforms, seen)
    assert ok.all()
    for i, p in enumerate(params):
        expected, distance = slow_row(
            logits[i].tolist(), allowed[i].tolist(), seen[i].tolist(), p, uniforms[i]
        )
        assert ids[i].item() == expected or distance < 1e-5


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 2**32))
def test_sample_equals_the_slow_rule_row_by_row(seed: int) -> None:
    rng = generator(seed)
    n, v = len(PARAMS), 12
    logits = 2 * torch.randn(n, v, generator=rng)
    allowed = torch.rand(n, v, generator=rng) < 0.7
    allowed[:, 0] = True
    seen = torch.rand(n, v, generator=rng) < 0.5
    assert_equals_slow_rule(logits, allowed, seen, PARAMS, seed)


@pytest.mark.parametrize(
    "params",
    [
        [ModalityParams(top_p=0.3)],
        [ModalityParams(top_p=0.95)],
        [ModalityParams(top_k=SHORT_SORT + 300)],
        [ModalityParams(top_k=SHORT_SORT + 300, top_p=0.9)],
        [ModalityParams(), ModalityParams(top_p=0.2), ModalityParams(top_k=9)],
        [ModalityParams(top_k=1500, top_p=0.7), ModalityParams(top_p=0.8), ModalityParams()],
    ],
)
def test_filters_that_reach_past_the_short_sort_are_exact(params: list[ModalityParams]) -> None:
    rng, n, v = generator(2), len(params), 3 * SHORT_SORT
    none = torch.zeros(n, v, dtype=torch.bool)
    for seed in range(4):
        logits = 0.3 * torch.randn(n, v, generator=rng)
        assert_equals_slow_rule(logits, ~none, none, params, seed)


def test_a_row_is_the_same_alone_and_among_neighbours() -> None:
    logits = torch.randn(len(PARAMS), 50, generator=generator(0))
    uniforms = torch.rand(len(PARAMS), generator=generator(1)).tolist()
    together = sample(logits, None, RowParams.of(PARAMS), uniforms).ids
    alone = [
        sample(logits[i : i + 1], None, RowParams.of([p]), [uniforms[i]]).ids.item()
        for i, p in enumerate(PARAMS)
    ]
    assert together.tolist() == alone


def test_a_forbidden_id_is_never_drawn_even_past_the_last_sum() -> None:
    probs = torch.tensor([[0.0, 0.0, 0.3, 0.0, 0.7, 0.0]])
    for uniform, expected in ((0.0, 2), (0.29, 2), (0.31, 4), (1 - 2**-24, 4), (1.0, 2)):
        assert draw(probs, torch.tensor([uniform]), torch.tensor([2])).item() == expected


def test_draw_follows_the_probabilities() -> None:
    probs = torch.tensor([[0.1, 0.0, 0.25, 0.65]])
    uniforms = (torch.arange(1000) + 0.5) / 1000
    ids = draw(probs.expand(1000, 4), uniforms, torch.zeros(1000, dtype=torch.int64))
    assert torch.bincount(ids, minlength=4).tolist() == [100, 0, 250, 650]


@pytest.mark.parametrize("n_ids", [1, 12, 255, 256, 257, 1000])
def test_the_first_of_the_largest_is_found_in_any_number_of_ids(n_ids: int) -> None:
    scores = torch.randint(5, (40, n_ids), generator=generator(n_ids)).float()  # full of ties
    scores[0] = -torch.inf
    assert first_largest(scores).tolist() == scores.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [1e-30, 1e-38, 1e-300])
def test_the_tiniest_temperature_is_greedy(temperature: float) -> None:
    logits = 1e4 * torch.randn(4, 30, generator=generator(1))
    params = RowParams.of([ModalityParams(temperature, top_p=0.9)] * 4)
    ids, ok = sample(logits, None, params, [0.1, 0.4, 0.6, 0.9])
    assert ok.all()
    assert ids.tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_nonfinite_logit_fails_its_own_row_only(bad: float) -> None:
    logits = torch.randn(3, 20, generator=generator(5))
    params = RowParams.of([ModalityParams(top_k=4, top_p=0.9)] * 3)

    def run(logits: Tensor, allowed: Tensor | None = None) -> tuple[list[int], list[bool]]:
        ids, ok = sample(logits, allowed, params, [0.2, 0.5, 0.8])
        return ids.tolist(), ok.tolist()

    clean, _ = run(logits)
    broken = logits.clone()
    broken[1, 7] = bad
    ids, ok = run(broken)
    assert ok == [True, False, True]
    assert (ids[0], ids[2]) == (clean[0], clean[2])
    allowed = torch.ones(3, 20, dtype=torch.bool)
    allowed[:, 7] = False
    assert run(broken, allowed)[1] == [True, True, True]
    allowed[2] = False
    assert run(broken, allowed)[1] == [True, True, False]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -1.0}, "temperature = -1.0"),
        ({"temperature": math.nan}, "temperature = nan"),
        ({"temperature": math.inf}, "temperature = inf"),
        ({"top_k": -1}, "top_k = -1"),
        ({"top_p": 0.0}, r"top_p = 0.0 is not in \(0, 1\]"),
        ({"top_p": 2.0}, "top_p = 2.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty = 0.0"),
    ],
)
def test_modality_params_refuse_what_is_illegal(fields: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModalityParams(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image": ModalityParams(repetition_penalty=1.2)}, "image.repetition_penalty = 1.2"),
        ({"guidance_text": -0.1}, "guidance_text = -0.1"),
        ({"guidance_image": math.nan}, "guidance_image = nan"),
        ({"max_tokens": 0}, "max_tokens = 0"),
        ({"seed": -1}, "seed = -1"),
        ({"mode": "audio"}, "mode = 'audio'"),
        ({"max_images": -1}, "max_images = -1"),
        ({"mode": "image", "max_images": 0}, "max_images = 0"),
    ],
)
def test_sampling_params_refuse_what_is_illegal(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**fields)  # type: ignore[arg-type]
