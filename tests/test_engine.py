"""The engine against the slow reference, and against models that prefer what is forbidden."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from openchameleon.errors import UserError
from openchameleon.inference.engine import Engine, prefill_cuts
from openchameleon.inference.kv_cache import KVCache
from openchameleon.inference.modality import scan_prompt
from openchameleon.inference.params import ModalityParams, SamplingParams
from openchameleon.inference.reference import generate_reference, reference_logits
from openchameleon.inference.sequence import Completion, Request
from openchameleon.model.config import ModelConfig
from openchameleon.model.transformer import Transformer
from openchameleon.vocab import Vocab

VOCAB = Vocab.compact(16, 4, 40)
IMAGE = VOCAB.image
TEXT = VOCAB.text_start
BOS, EOS = VOCAB.bos_id, VOCAB.eos_id
PICTURE = IMAGE.ids_from_codes([3, 0, 15, 7])
GREEDY = ModalityParams(temperature=0.0)
CONFIG = ModelConfig(
    dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=VOCAB.size, max_seq_len=48, ffn_dim=64
)


def tiny_model(seed: int = 0) -> Transformer:
    model = Transformer(CONFIG).eval()
    model.init_weights(seed)
    with torch.no_grad():
        model.output.weight *= 25  # else all logits are nearly alike and every choice a tie
    return model


MODEL = tiny_model()


class FakeModel:
    """Writes its favourites wherever they are allowed, in their order."""

    training = False

    def __init__(self, favourites: list[int], max_seq_len: int = 48) -> None:
        self.config = dataclasses.replace(CONFIG, max_seq_len=max_seq_len)
        self.output_weight = torch.eye(VOCAB.size)
        self.preference = torch.zeros(VOCAB.size)
        for rank, i in enumerate(favourites):
            self.preference[i] = 1e4 - rank

    def hidden(self, token_ids: Tensor, *_: Any) -> Tensor:
        return self.preference.expand(*token_ids.shape, -1)


def greedy(**fields: Any) -> SamplingParams:
    return SamplingParams(text=GREEDY, image=GREEDY, **fields)


def prompts() -> list[list[int]]:
    """Of many lengths: text, after a picture, and inside one, with and without codes."""
    text = [TEXT + 3 * i % 40 for i in range(12)]
    return [
        [BOS, TEXT],
        [BOS, *text],
        [BOS, *PICTURE, *text[:3]],
        [BOS, *text[:2], *PICTURE, TEXT, *PICTURE, VOCAB.eot_id],
        [BOS, *text[:4], IMAGE.begin_id],
        [BOS, *PICTURE, TEXT, IMAGE.begin_id, IMAGE.first_id + 2],
        [IMAGE.begin_id],
    ]


def mixed_requests() -> list[Request]:
    """Every prompt under parameters of every kind."""
    kinds = [
        greedy(max_tokens=14),
        SamplingParams(seed=1, max_tokens=20),
        SamplingParams(ModalityParams(0.8, top_p=0.9), GREEDY, seed=2, mode="image", max_images=2),
        SamplingParams(ModalityParams(0.0, repetition_penalty=1.5), seed=3, max_tokens=16),
        SamplingParams(guidance_text=3.0, guidance_image=1.2, seed=4, mode="image"),
        greedy(guidance_text=2.0, max_tokens=18),
        SamplingParams(ModalityParams(1.2, top_k=9), ModalityParams(top_k=3), seed=5),
    ]
    return [Request(prompt, params) for prompt in prompts() for params in kinds]


def is_tie(request: Request, a: Completion, b: Completion, tolerance: float = 1e-4) -> bool:
    """Whether two different greedy answers part where the two best ids are nearly equal."""
    x, y = a.token_ids, b.token_ids
    at = next((i for i, (p, q) in enumerate(zip(x, y, strict=False)) if p != q), None)
    if at is None:  # one is longer: they part where the shorter wrote eos
        at = min(len(x), len(y))
    ids = [*request.token_ids, *x[:at]]
    logits = reference_logits(MODEL, VOCAB, ids, request.params)  # type: ignore[arg-type]
    chosen = [logits[ids[at] if at < len(ids) else EOS] for ids in (x, y)]
    return bool(abs(chosen[0] - chosen[1]) < tolerance)


def assert_same(requests: list[Request], got: list[Completion], wanted: list[Completion]) -> None:
    """Equal answers; at most a hundredth may part, and only at ties."""
    apart = [t for t in zip(requests, got, wanted, strict=True) if t[1] != t[2]]
    for request, a, b in apart:
        assert is_tie(request, a, b), f"{request}: {a} is not {b}"
    assert len(apart) <= len(requests) // 100


def assert_whole_pictures(request: Request, completion: Completion) -> int:
    """Checks that every item of prompt and answer is closed; returns how many the answer has."""
    ids = [*request.token_ids, *completion.token_ids]
    assert scan_prompt(VOCAB, ids) == (-1, 0)
    return completion.token_ids.count(IMAGE.end_id)


def test_a_mixed_batch_equals_the_reference() -> None:
    requests = mixed_requests()
    got = Engine(MODEL, VOCAB).generate(requests)
    wanted = [generate_reference(MODEL, VOCAB, r) for r in requests]
    assert_same(requests, got, wanted)
    assert sum(c.token_ids.count(IMAGE.begin_id) for c in got) > 10
    assert {c.finish_reason for c in got} == {"stop", "length"}


@pytest.fixture(scope="module")
def alone() -> list[Completion]:
    """The answers to `mixed_requests`, each in a batch of its own."""
    return Engine(MODEL, VOCAB, max_batch=1).generate(mixed_requests())


@pytest.mark.parametrize("max_batch", [2, 5, 64])
def test_an_answer_does_not_depend_on_its_neighbours(
    max_batch: int, alone: list[Completion]
) -> None:
    requests = mixed_requests()
    random.Random(max_batch).shuffle(order := list(range(len(requests))))
    got = Engine(MODEL, VOCAB, max_batch).generate([requests[i] for i in order])
    assert_same([requests[i] for i in order], got, [alone[i] for i in order])


def test_streaming_equals_generating() -> None:
    engine = Engine(MODEL, VOCAB)
    for request in mixed_requests()[::5]:
        stream, ids = engine.stream(request), []
        while True:
            try:
                ids.append(next(stream))
            except StopIteration as stop:
                streamed = Completion(ids, stop.value)
                break
        assert_same([request], [streamed], engine.generate([request]))


def test_cached_decode_equals_full_forward() -> None:
    lengths, n_more = [3, 9, 1, 6], 7
    ids = torch.randint(TEXT, VOCAB.size, (4, 20), generator=torch.Generator().manual_seed(0))
    cache = KVCache(2, 2, 8, 48, torch.float32, torch.device("cpu"))
    with torch.inference_mode():
        full = MODEL(ids)
        cache.add_rows(4)
        view = cache.extend(0, lengths)
        padded = ids[:, :9].clone()
        for row, n in enumerate(lengths):
            padded[row, n:] = 1
        MODEL(padded, view.positions, view.mask, view)
        for step in range(n_more):
            at = torch.tensor(lengths)[:, None] + step
            view = cache.extend(0, [1] * 4)
            logits = MODEL(ids.gather(1, at), view.positions, view.mask, view)
            wanted = full[torch.arange(4), at[:, 0]]
            assert (logits[:, 0] - wanted).abs().max() < 1e-4


def test_the_last_row_moves_into_a_gap_and_nothing_of_the_removed_one_stays() -> None:
    cache = KVCache(2, 2, 8, 48, torch.float32, torch.device("cpu"))
    cache.add_rows(3)
    view = cache.extend(0, [2, 2, 2])
    written = torch.randn(3, 2, 2, 8, generator=torch.Generator().manual_seed(1))
    written[0] = written[1] = torch.nan
    for layer in range(2):
        view.update(layer, written, written)
    cache.remove_row(0)
    cache.remove_row(1)
    assert cache.lengths == [2]
    for tensor in (*cache.keys, *cache.values):
        assert tensor.isfinite().all()
        assert torch.equal(tensor[0, :, :2], written[2])


def test_guidance_at_scale_1_equals_none() -> None:
    for prompt in prompts()[4:6]:
        plain = reference_logits(MODEL, VOCAB, prompt, SamplingParams())
        ones = SamplingParams(guidance_text=1.0, guidance_image=1.0)
        guided = reference_logits(MODEL, VOCAB, prompt, ones)
        assert (guided - plain).abs().max() < 1e-4
        far = reference_logits(MODEL, VOCAB, prompt, SamplingParams(guidance_text=3.0))
        assert (far - plain).abs().max() > 0.1
    pairs = [
        [Request(p, greedy(mode="image", guidance_text=scale, guidance_image=scale))]
        for p in prompts()
        for scale in (1.0, None)
    ]
    answers = [Engine(MODEL, VOCAB).generate(pair)[0] for pair in pairs]
    assert_same([p[0] for p in pairs[1::2]], answers[::2], answers[1::2])


def test_guidance_runs_its_streams_and_only_inside_a_picture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    n_rows: list[int] = []
    hidden = MODEL.hidden

    def counted(token_ids: Tensor, *rest: Any) -> Tensor:
        n_rows.append(token_ids.shape[0])
        return hidden(token_ids, *rest)

    monkeypatch.setattr(MODEL, "hidden", counted)
    ones = greedy(mode="image", guidance_text=1.0, guidance_image=1.0)
    Engine(MODEL, VOCAB).generate([Request([BOS, TEXT], ones)])
    assert n_rows == [1, 1, 1, 2, 2, 2, 1, 1]  # begin; two prefills; three codes; end; eos
    n_rows.clear()
    Engine(MODEL, VOCAB).generate([Request([BOS, *PICTURE, TEXT], ones)])
    assert n_rows == [1, 1, 1, 1, 3, 3, 3, 1, 1]


@pytest.mark.parametrize("seed", range(6))
def test_pictures_are_whole_for_random_models(seed: int) -> None:
    rng = random.Random(seed)
    requests = [
        Request(
            rng.choice(prompts()[:4]),
            SamplingParams(
                ModalityParams(2.0), seed=rng.randrange(10**6), max_tokens=rng.randrange(1, 40),
                mode=rng.choice(["interleaved", "image"]), max_images=rng.choice([None, 1, 3]),
            ),
        )
        for _ in range(30)
    ]  # fmt: skip
    answers = Engine(tiny_model(seed), VOCAB, 16).generate(requests)
    n_pictures = [assert_whole_pictures(r, a) for r, a in zip(requests, answers, strict=True)]
    assert sum(n_pictures) > 5
    for request, answer in zip(requests, answers, strict=True):
        assert len(answer.token_ids) <= (request.params.max_tokens or 0)


@pytest.mark.parametrize("room", range(1, 20))
def test_a_model_that_only_wants_to_begin_pictures_draws_whole_ones_that_fit(room: int) -> None:
    for engine, request in (
        (Engine(FakeModel([IMAGE.begin_id]), VOCAB), Request([BOS], greedy(max_tokens=room))),
        (Engine(FakeModel([IMAGE.begin_id], 1 + room), VOCAB), Request([BOS], greedy())),
    ):
        answer = engine.generate([request])[0]
        assert assert_whole_pictures(request, answer) == (room - 1) // IMAGE.item_len


def test_a_model_that_only_wants_text_still_draws_exact_pictures() -> None:
    engine = Engine(FakeModel([TEXT + 5, EOS, IMAGE.begin_id, IMAGE.end_id, 1, 3]), VOCAB)
    for n in (1, 2, 3):
        request = Request([BOS, TEXT], greedy(mode="image", max_images=n))
        answer = engine.generate([request])[0]
        assert assert_whole_pictures(request, answer) == n
        assert len(answer.token_ids) == n * IMAGE.item_len
        assert answer.finish_reason == "stop"
    opened = Request([BOS, IMAGE.begin_id, IMAGE.first_id], greedy(mode="image"))
    assert len(engine.generate([opened])[0].token_ids) == 3 + 1


def test_mode_text_writes_text_only() -> None:
    request = Request([BOS], greedy(mode="text", max_tokens=9))
    answer = Engine(FakeModel([IMAGE.begin_id, 4, VOCAB.eot_id, TEXT]), VOCAB).generate([request])
    assert answer == [Completion([TEXT] * 9, "length")]


def test_mode_image_without_room_for_one_ends_with_length_and_nothing() -> None:
    request = Request([BOS], SamplingParams(mode="image", max_tokens=IMAGE.item_len))
    engine = Engine(MODEL, VOCAB)
    assert engine.generate([request]) == [Completion([], "length")]
    assert list(engine.stream(request)) == []


def test_eos_ends_an_answer_and_is_not_part_of_it() -> None:
    answer = Engine(FakeModel([EOS]), VOCAB).generate([Request([BOS])])
    assert answer == [Completion([], "stop")]


def test_a_broken_row_fails_alone_even_when_its_place_in_the_cache_is_used_again() -> None:
    model = tiny_model(1)
    bad = VOCAB.size - 1
    with torch.no_grad():
        model.tok_embeddings.weight[bad] = torch.nan
    good = [Request(p, greedy(mode="image", max_images=3)) for p in ([BOS, TEXT], [BOS] * 9) * 4]
    # Its last slot lies past the ids of the next in its row, and within those of a neighbour.
    broken = Request([BOS, *[TEXT] * 10, bad], greedy(max_tokens=9))
    wanted = [Engine(model, VOCAB).generate([r])[0] for r in good]
    got = Engine(model, VOCAB, 2).generate([r for g in good for r in (g, broken)])
    assert got[::2] == wanted
    assert got[1::2] == [Completion([], "nonfinite_logits")] * len(good)


def test_a_seed_reproduces_and_another_differs() -> None:
    engine = Engine(MODEL, VOCAB)

    def answer(seed: int | None) -> list[int]:
        return engine.generate([Request([BOS], SamplingParams(seed=seed, mode="image"))])[
            0
        ].token_ids

    assert answer(7) == answer(7)
    assert len({tuple(answer(seed)) for seed in range(8)}) > 4
    assert len({tuple(answer(None)) for _ in range(8)}) > 4


def test_inside_pictures_only_the_codes_rows_of_the_head_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes: list[int] = []
    linear = torch.nn.functional.linear

    def counted(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        if weight.shape[1] == CONFIG.dim and weight.shape[0] in (VOCAB.size, IMAGE.count):
            sizes.append(weight.shape[0])
        return linear(x, weight, *rest)

    model = Transformer(dataclasses.replace(CONFIG, n_kv_heads=4)).eval()  # no 16-row projection
    monkeypatch.setattr(torch.nn.functional, "linear", counted)
    Engine(model, VOCAB).generate([Request([BOS], greedy(mode="image"))] * 2)
    assert sizes == [VOCAB.size, *[IMAGE.count] * IMAGE.codes_per_item, VOCAB.size, VOCAB.size]


def test_prompts_that_cannot_be_answered_are_user_errors() -> None:
    engine = Engine(MODEL, VOCAB)
    with pytest.raises(UserError, match="empty"):
        engine.generate([Request([])])
    with pytest.raises(UserError, match=r"49 tokens.*context 48"):
        engine.stream(Request([TEXT] * 49))
    assert engine.generate([Request([TEXT] * 48)]) == [Completion([], "length")]
    assert len(engine.generate([Request([TEXT] * 47, greedy(mode="text"))])[0].token_ids) <= 1


def test_api_misuse_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="63"):
        Engine(MODEL, Vocab.compact(16, 4, 41))
    with pytest.raises(ValueError, match="max_batch = 0"):
        Engine(MODEL, VOCAB, max_batch=0)
    noisy = Transformer(dataclasses.replace(CONFIG, dropout=0.1))
    with pytest.raises(ValueError, match=r"model.eval\(\)"):
        Engine(noisy, VOCAB).generate([Request([BOS])])


def test_prefill_batches_bound_their_positions_and_their_padding() -> None:
    assert prefill_cuts([], 100) == [0]
    assert prefill_cuts([5], 3) == [0, 1]
    assert prefill_cuts([2, 2, 3, 4, 5, 40], 100) == [0, 4, 5, 6]
    assert prefill_cuts([10, 10, 10, 10, 10], 20) == [0, 2, 4, 5]
