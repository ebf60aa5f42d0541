"""The engine against the slow reference, and against models that prefer what is forbidden."""

from __future__ import annotations

import dataclasses
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from openchameleon.errors import UserError
from openchameleon.inference.engine import Engine
from openchameleon.inference.kv_cache import KVPool
from openchameleon.inference.modality import scan_prompt
from openchameleon.inference.native.step import SWITCH
from openchameleon.inference.params import ModalityParams, SamplingParams
from openchameleon.inference.reference import generate_reference, reference_logits
from openchameleon.inference.runner import read_cuts, step_cuts
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
    dtype = torch.float32

    def __init__(self, favourites: list[int], max_seq_len: int = 48) -> None:
        self.config = dataclasses.replace(CONFIG, max_seq_len=max_seq_len)
        self.output_weight = torch.eye(VOCAB.size)
        self.preference = torch.zeros(VOCAB.size)
        for rank, i in enumerate(favourites):
            self.preference[i] = 1e4 - rank

    def parameters(self) -> list[Tensor]:
        return [self.preference]

    def hidden(self, token_ids: Tensor, *_: Any) -> Tensor:
        return self.preference.expand(*token_ids.shape, -1)

    def logits(self, hidden: Tensor, first: int, stop: int) -> Tensor:
        return hidden[:, first:stop]


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


@pytest.mark.parametrize("block_size", [2, 3, 16])
def test_cached_decode_equals_full_forward(block_size: int) -> None:
    """In blocks that lie anywhere, that others have used before, prompts read in two parts."""
    lengths, n_more = [3, 9, 1, 6], 7
    ids = torch.randint(TEXT, VOCAB.size, (4, 20), generator=torch.Generator().manual_seed(0))
    order = random.Random(block_size).sample(range(1, 61), 60)
    n_each = -(-20 // block_size)
    tables = [order[i * n_each : (i + 1) * n_each] for i in range(4)]
    pool, cpu = KVPool(2, 60, block_size), torch.device("cpu")
    for layer in range(2):  # what a block held before is never seen
        keys, values = pool.storage(layer, 61, torch.zeros(2, 8))
        keys[1:] = values[1:] = torch.nan

    def read(starts: list[int], counts: list[int]) -> Tensor:
        used = [
            t[: -(-(s + c) // block_size)] for t, s, c in zip(tables, starts, counts, strict=True)
        ]
        view = pool.view(used, starts, counts, cpu)
        at = (torch.tensor(starts)[:, None] + torch.arange(max(counts))).clamp(max=19)
        return MODEL(ids.gather(1, at), view.positions, view.mask, view)

    with torch.inference_mode():
        full = MODEL(ids)
        first = [(n + 1) // 2 for n in lengths]
        read([0] * 4, first)
        read(first, [max(1, n - f) for n, f in zip(lengths, first, strict=True)])
        for step in range(n_more):
            starts = [n + step for n in lengths]
            wanted = full[torch.arange(4), torch.tensor(starts)]
            assert (read(starts, [1] * 4)[:, 0] - wanted).abs().max() < 1e-4


def test_a_lone_row_in_consecutive_blocks_is_read_where_it_lies() -> None:
    pool, cpu = KVPool(1, 8, 4), torch.device("cpu")
    new = torch.randn(1, 2, 6, 8, generator=torch.Generator().manual_seed(1))
    for table in ([3, 4], [4, 3]):
        pool.view([table], [0], [5], cpu).update(0, new[:, :, :5], new[:, :, :5])
        keys, _ = pool.view([table], [5], [1], cpu).update(0, new[:, :, 5:], new[:, :, 5:])
        assert torch.equal(keys, new)
        is_view = keys.untyped_storage().data_ptr() == pool.storage(0, 1, new)[0].data_ptr()
        assert is_view == (table == [3, 4])


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

    monkeypatch.setenv(SWITCH, "0")  # PyTorch's calls are counted
    monkeypatch.setattr(MODEL, "hidden", counted)
    ones = greedy(mode="image", guidance_text=1.0, guidance_image=1.0)
    Engine(MODEL, VOCAB, lookahead=0).generate([Request([BOS, TEXT], ones)])
    assert n_rows == [1, 2, 2, 2, 2, 1, 1]  # begin; its guidance too; three codes; end; eos
    n_rows.clear()
    Engine(MODEL, VOCAB, lookahead=0).generate([Request([BOS, *PICTURE, TEXT], ones)])
    assert n_rows == [1, 2, 1, 3, 3, 3, 1, 1]


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


def test_only_the_rows_of_the_head_that_may_be_written_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes: list[int] = []
    ((first, stop),) = VOCAB.spans_outside_codes()
    n_others = stop - first
    linear = torch.nn.functional.linear

    def counted(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        if weight.shape[1] == CONFIG.dim and weight.shape[0] in (n_others, IMAGE.count):
            sizes.append(weight.shape[0])
        return linear(x, weight, *rest)

    model = Transformer(dataclasses.replace(CONFIG, n_kv_heads=4)).eval()  # no 16-row projection
    monkeypatch.setenv(SWITCH, "0")  # PyTorch's calls are counted
    monkeypatch.setattr(torch.nn.functional, "linear", counted)
    engine = Engine(model, VOCAB, lookahead=0)
    engine.generate([Request([BOS], greedy(mode="image"))] * 2)
    assert sizes == [n_others, *[IMAGE.count] * IMAGE.codes_per_item, n_others, n_others]


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


def test_model_calls_bound_their_padding() -> None:
    assert read_cuts([]) == [0]
    assert read_cuts([5]) == [0, 1]
    assert read_cuts([1, 1, 2, 3, 4, 5, 40]) == [0, 5, 6, 7]


def test_calls_of_the_faster_step_bound_their_rows() -> None:
    assert step_cuts([], 256) == [0]
    assert step_cuts([7], 4) == [0, 1]
    assert step_cuts([1] * 250 + [6, 1, 30], 256) == [0, 251, 253]
    assert step_cuts([1] * 70 + [30, 32], 64) == [0, 64, 71, 72]


@pytest.mark.parametrize(("lookahead", "block_size"), [(0, 16), (1, 2), (3, 3)])
def test_guessing_ahead_changes_no_answer(
    lookahead: int, block_size: int, alone: list[Completion]
) -> None:
    requests = mixed_requests()
    got = Engine(MODEL, VOCAB, 9, lookahead=lookahead, block_size=block_size).generate(requests)
    assert_same(requests, got, alone)


@pytest.mark.parametrize("lookahead", [0, 3])
def test_a_picture_whose_codes_do_not_depend_on_each_other_takes_fewer_steps(
    lookahead: int,
) -> None:
    engine = Engine(FakeModel([IMAGE.first_id + 5]), VOCAB, lookahead=lookahead)
    engine.add(Request([BOS], greedy(mode="image")))
    n_steps = 0
    while engine.busy:
        engine.step()
        n_steps += 1
    # begin; a code; the next with one that was guessed, or one by one; the last; end; eos
    assert n_steps == (7 if lookahead == 0 else 6)


@pytest.mark.parametrize("max_prefill", [1, 3, 7])
def test_prompts_read_in_parts_are_answered_alike(
    max_prefill: int, alone: list[Completion]
) -> None:
    got = Engine(MODEL, VOCAB, 5, max_prefill, block_size=4).generate(mixed_requests())
    assert_same(mixed_requests(), got, alone)


def test_a_long_prompt_does_not_hold_up_the_others() -> None:
    engine = Engine(MODEL, VOCAB, max_prefill=4, lookahead=0)
    short = engine.add(Request([BOS], greedy(mode="image", max_images=3)))
    engine.step()
    engine.add(Request([BOS, *[TEXT] * 30]))
    for n_ids in range(2, 8):
        engine.step()
        assert len(short.new_ids) == n_ids


@pytest.mark.parametrize("seed", range(3))
def test_a_cache_too_small_for_all_makes_the_youngest_wait_and_loses_nothing(
    seed: int, alone: list[Completion]
) -> None:
    engine = Engine(MODEL, VOCAB, max_prefill=9, block_size=4, cache_tokens=3 * 48)
    requests = mixed_requests()
    random.Random(seed).shuffle(order := list(range(len(requests))))
    got = engine.generate([requests[i] for i in order])
    assert_same([requests[i] for i in order], got, [alone[i] for i in order])
    assert engine.scheduler.n_preempted > 5
    assert engine.blocks.n_held == 0


def test_a_request_that_could_never_fit_the_cache_is_refused() -> None:
    engine = Engine(MODEL, VOCAB, block_size=4, cache_tokens=48)
    assert engine.generate([Request([BOS, TEXT], greedy())])
    with pytest.raises(UserError, match=r"144 tokens in the cache, .* 48"):
        engine.add(Request([BOS, TEXT], greedy(guidance_text=2.0)))


def test_a_prompt_that_begins_alike_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    n_read: list[int] = []
    hidden = MODEL.hidden

    def counted(token_ids: Tensor, *rest: Any) -> Tensor:
        n_read.append(token_ids.numel())
        return hidden(token_ids, *rest)

    monkeypatch.setenv(SWITCH, "0")  # PyTorch's calls are counted
    monkeypatch.setattr(MODEL, "hidden", counted)
    engine = Engine(MODEL, VOCAB, block_size=4)
    prompt = [BOS, *(TEXT + i for i in range(20))]
    one = [Request(prompt, greedy(max_tokens=1))]
    wanted = engine.generate(one)
    assert n_read == [21]
    n_read.clear()
    assert engine.generate(one) == wanted
    assert engine.generate([Request([*prompt[:9], TEXT], greedy(max_tokens=1))])
    assert n_read == [1, 2]
    n_read.clear()
    other = Request([BOS, TEXT + 9, *prompt[2:]], greedy(max_tokens=1))
    together = engine.generate([other] * 3)  # at once: the first reads, the others wait a step
    assert n_read == [21, 2]
    assert together == [together[0]] * 3


def test_an_answer_is_known_to_the_turn_that_follows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(MODEL, VOCAB, block_size=4)
    first = engine.generate([Request([BOS, TEXT], greedy(max_tokens=14))])[0].token_ids
    turn = engine.add(Request([BOS, TEXT, *first, VOCAB.eot_id, TEXT], greedy(max_tokens=1)))
    engine.scheduler.schedule()
    assert turn.full.n_read == (1 + len(first)) // 4 * 4


@pytest.mark.parametrize("n_aborts", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_after_random_requests_and_aborts_every_block_is_free(n_aborts: int) -> None:
    rng = random.Random(0)
    engine = Engine(MODEL, VOCAB, 6, max_prefill=8, block_size=4, cache_tokens=160)
    kinds, under_way, n_aborted = mixed_requests(), [], 0
    while n_aborted < n_aborts:
        if rng.random() < 0.6:
            under_way.append(engine.add(rng.choice(kinds)))
        for sequence in rng.sample(under_way, rng.randrange(len(under_way) + 1) // 2):
            n_aborted += sequence.finish_reason is None
            engine.abort(sequence)
        engine.step()
        under_way = [s for s in under_way if s.finish_reason is None]
    survivors = under_way
    while engine.busy:
        engine.step()
    assert all(s.finish_reason in ("stop", "length") for s in survivors)
    assert engine.blocks.n_held == 0
    assert engine.blocks.n_available == engine.blocks.n_blocks


def test_a_stream_that_is_left_gives_its_blocks_back() -> None:
    engine = Engine(MODEL, VOCAB)
    stream = engine.stream(Request([BOS], greedy(mode="image")))
    next(stream)
    assert engine.blocks.n_held == 1
    stream.close()
    assert engine.blocks.n_held == 0
    assert not engine.busy


def test_streams_beside_each_other_get_their_own_answers() -> None:
    requests = mixed_requests()[:6]
    engine = Engine(MODEL, VOCAB)
    streams = [engine.stream(r) for r in requests]
    got: list[list[int]] = [[] for _ in requests]
    open_ones = set(range(6))
    while open_ones:
        for i in sorted(open_ones):
            try:
                got[i].append(next(streams[i]))
            except StopIteration:
                open_ones.discard(i)
    wanted = [Engine(MODEL, VOCAB).generate([r])[0].token_ids for r in requests]
    assert got == wanted


def test_weights_that_change_between_requests_are_noticed() -> None:
    model = tiny_model()
    engine, request = Engine(model, VOCAB, block_size=2), Request([BOS, *[TEXT] * 9], greedy())
    before = engine.generate([request])
    with torch.no_grad():
        model.layers[0].attention.wv.weight.mul_(-3)  # type: ignore[union-attr, operator]
    after = engine.generate([request])
    assert after == Engine(model, VOCAB).generate([request])
    assert after != before


def test_threads_share_an_engine_and_get_their_own_answers(alone: list[Completion]) -> None:
    engine = Engine(MODEL, VOCAB, block_size=4)
    requests = mixed_requests()
    with ThreadPoolExecutor(4) as pool:
        got = [c for (c,) in pool.map(lambda r: engine.generate([r]), requests)]
    assert_same(requests, got, alone)
    assert engine.blocks.n_held == 0
