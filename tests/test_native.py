"""The native step against the transformer it stands for; how it is built, and what if it is not."""

from __future__ import annotations

import dataclasses
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from openchameleon.inference.engine import Engine
from openchameleon.inference.native.build import find_compiler
from openchameleon.inference.native.pages import LARGE, large_spans, use_large_pages
from openchameleon.inference.native.step import SWITCH, NativeStep, library
from openchameleon.inference.params import ModalityParams, SamplingParams
from openchameleon.inference.sequence import Request
from openchameleon.inference.stored import store_weights
from openchameleon.model.config import ModelConfig, RopeScaling
from openchameleon.model.transformer import Transformer
from openchameleon.vocab import Vocab

BASE = ModelConfig(
    dim=48, n_layers=3, n_heads=6, n_kv_heads=6, vocab_size=131, max_seq_len=80, ffn_dim=72
)
VARIANTS: dict[str, dict[str, Any]] = {
    "input": {},
    "output": {"norm_placement": "output"},
    "no qk-norm": {"qk_norm": False},
    "groups": {"qk_norm_groups": 3},
    "grouped queries": {"n_kv_heads": 2, "norm_placement": "output"},
    "one kv head": {"n_kv_heads": 1},
    "both": {"n_kv_heads": 2, "qk_norm_groups": 2},
    "tied": {"tie_embeddings": True},
    "scaled rope": {"rope_scaling": RopeScaling(8.0, 1.0, 4.0, 16)},
    "odd sizes": {"dim": 54, "n_heads": 9, "n_kv_heads": 3, "ffn_dim": 41, "vocab_size": 67},
    "wide heads": {"dim": 200, "n_heads": 2, "n_kv_heads": 2, "ffn_dim": 133},
}

needs_library = pytest.mark.skipif(library() is None, reason="no C compiler, or switched off")


def model_of(seed: int = 0, **changes: Any) -> Transformer:
    """Random weights, norms included: none of them is the identity."""
    model = Transformer(dataclasses.replace(BASE, **changes)).eval().requires_grad_(False)
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def native_of(model: Transformer) -> NativeStep:
    native = NativeStep.of(model)
    assert native is not None
    return native


class Pool:
    """Blocks of keys and values in an order of chance, full of what nobody may read."""

    def __init__(self, config: ModelConfig, n_rows: int, length: int, block_size: int) -> None:
        width = -(-length // block_size)
        self.tables = 1 + torch.randperm(n_rows * width).reshape(n_rows, width)
        shape = (n_rows * width + 1, block_size, config.n_kv_heads, config.head_dim)
        layers = range(config.n_layers)
        self.storage = [
            (torch.full(shape, torch.nan), torch.full(shape, torch.nan)) for _ in layers
        ]


def decoded(model: Transformer, token_ids: Tensor, block_size: int) -> Tensor:
    """Hidden states (R, T, C), a step for each position."""
    native, (n_rows, length) = native_of(model), token_ids.shape
    pool = Pool(model.config, n_rows, length, block_size)
    hidden = [
        native.hidden(token_ids[:, t].clone(), torch.full((n_rows,), t), pool.tables, pool.storage)
        for t in range(length)
    ]
    return torch.stack(hidden, 1)


def some_ids(model: Transformer, n_rows: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(n_rows)
    return torch.randint(model.config.vocab_size, (n_rows, length), generator=generator)


@needs_library
@pytest.mark.parametrize("variant", VARIANTS)
def test_each_architecture_equals_the_transformer(variant: str) -> None:
    model = model_of(**VARIANTS[variant])
    token_ids = some_ids(model, 3, 37)
    hidden = decoded(model, token_ids, block_size=16)
    torch.testing.assert_close(hidden, model.hidden(token_ids), atol=1e-4, rtol=1e-4)
    logits = native_of(model).logits(hidden.flatten(0, 1))
    torch.testing.assert_close(logits, model(token_ids).flatten(0, 1), atol=1e-4, rtol=1e-4)


@needs_library
@pytest.mark.parametrize("n_rows", [1, 2, 3, 8, 13, 17, 64])
@pytest.mark.parametrize("block_size", [2, 5, 16])
def test_any_number_of_rows_and_any_block_equal_the_transformer(
    n_rows: int, block_size: int
) -> None:
    model = model_of(norm_placement="output")
    token_ids = some_ids(model, n_rows, 2 * block_size + 1)
    hidden = decoded(model, token_ids, block_size)
    torch.testing.assert_close(hidden, model.hidden(token_ids), atol=1e-4, rtol=1e-4)


@needs_library
def test_rows_may_be_neighbours_in_one_stream_at_any_position() -> None:
    model = model_of(n_kv_heads=2)
    token_ids, native = some_ids(model, 2, 41), native_of(model)
    pool = Pool(model.config, 2, 41, block_size=4)
    rows = [(stream, p) for stream, stop in ((0, 41), (1, 19)) for p in range(stop)]
    got = []
    for cut in (rows[:7] + rows[41:42], rows[7:41] + rows[42:50], rows[50:]):
        streams, positions = torch.tensor(cut).T.contiguous()
        got.append(native.hidden(
            token_ids[streams, positions], positions, pool.tables[streams], pool.storage
        ))  # fmt: skip
    order = rows[:7] + rows[41:42] + rows[7:41] + rows[42:]
    wanted = model.hidden(token_ids)[tuple(torch.tensor(order).T)]
    torch.testing.assert_close(torch.cat(got), wanted, atol=1e-4, rtol=1e-4)


@needs_library
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_a_row_has_the_same_bits_alone_and_among_others(kind: Any) -> None:
    model = model_of(norm_placement="output")
    if kind != "float32":
        store_weights(model, kind)
    token_ids = some_ids(model, 64, 9)
    among = decoded(model, token_ids, 4)
    for n_rows in (1, 2, 3, 5, 8, 40):
        assert torch.equal(decoded(model, token_ids[:n_rows], 4), among[:n_rows])
    n_threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            assert torch.equal(decoded(model, token_ids, 4), among)
            assert torch.equal(decoded(model, token_ids[:1], 4), among[:1])
    finally:
        torch.set_num_threads(n_threads)


def rounded(x: Tensor) -> Tensor:
    """Activations as they meet int8 weights: 512 neighbours in steps of 1/32767 of the largest."""
    spans = [
        (span / step).round() * step
        for span in x.split(512, -1)
        for step in [(span.abs().amax(-1, keepdim=True) / 32767).clamp(min=1e-30)]
    ]
    return torch.cat(spans, -1)


@needs_library
@pytest.mark.parametrize("variant", ["input", "tied", "odd sizes", "wide heads"])
def test_bfloat16_weights_give_what_they_give_in_pytorch(variant: str) -> None:
    model = model_of(**VARIANTS[variant])
    token_ids = some_ids(model, 17, 12)
    before = model(token_ids)
    store_weights(model, "bfloat16")
    hidden, wanted = decoded(model, token_ids, 5), model.hidden(token_ids)
    torch.testing.assert_close(hidden, wanted, atol=1e-4, rtol=1e-4)
    logits = native_of(model).logits(hidden.flatten(0, 1))
    torch.testing.assert_close(logits, model.logits(wanted).flatten(0, 1), atol=1e-4, rtol=1e-4)
    assert 1e-4 < error(model.logits(wanted), before) < 0.05  # it is rounded, and not by much


@needs_library
@pytest.mark.parametrize("variant", ["input", "tied", "odd sizes", "wide heads", "long rows"])
def test_int8_weights_give_what_they_give_in_pytorch_for_rounded_activations(variant: str) -> None:
    model = model_of(**VARIANTS.get(variant, {"ffn_dim": 1100, "n_layers": 2}))
    token_ids = some_ids(model, 17, 12)
    before = model(token_ids)
    store_weights(model, "int8")
    hidden, plain = decoded(model, token_ids, 5), model.hidden(token_ids)
    logits = native_of(model).logits(hidden.flatten(0, 1))
    wanted = model.logits(rounded(hidden)).flatten(0, 1)
    torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-5)
    lost = error(model.logits(plain), before)
    assert 1e-3 < lost < 0.05
    assert error(hidden, plain) < lost / 100  # rounding activations is nothing beside weights'


def error(got: Tensor, wanted: Tensor) -> Tensor:
    return (got - wanted).norm() / wanted.norm()


@needs_library
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_part_of_the_head_is_part_of_the_logits(kind: Any) -> None:
    model = model_of(tie_embeddings=True)
    if kind != "float32":
        store_weights(model, kind)
    hidden = torch.randn(19, model.config.dim, generator=torch.Generator().manual_seed(0))
    native = native_of(model)
    whole = native.logits(hidden)
    for first, stop in ((0, 131), (5, 6), (3, 120), (64, 64)):
        assert torch.equal(native.logits(hidden, first, stop), whole[:, first:stop])
        some = native.logits(hidden, first, stop, torch.full_like(whole, 7.0))
        assert torch.equal(some[:, first:stop], whole[:, first:stop])
        assert (some == 7).sum() == (19 * (131 - stop + first))
        given = rounded(hidden) if kind == "int8" else hidden
        torch.testing.assert_close(model.logits(given, first, stop), whole[:, first:stop])


@needs_library
@pytest.mark.parametrize("kind", ["float32", "int8"])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_stay_in_their_row(kind: Any, wrong: float) -> None:
    model = model_of(norm_placement="output")
    if kind == "int8":
        store_weights(model, "int8")
    model.tok_embeddings.weight[7] = wrong
    token_ids = torch.tensor([[3, 3, 3], [5, 7, 5], [3, 3, 3]])
    hidden = decoded(model, token_ids, 2)
    assert hidden[1, 1:].isnan().all()
    assert hidden[[0, 2]].isfinite().all()
    assert hidden[1, 0].isfinite().all()


@needs_library
def test_what_has_no_place_is_refused_before_anything_is_written() -> None:
    model = model_of()
    native, pool = native_of(model), Pool(model.config, 1, 8, 4)

    def call(token_id: int, position: int, table: list[int]) -> None:
        native.hidden(
            torch.tensor([token_id]), torch.tensor([position]), torch.tensor([table]), pool.storage
        )

    call(0, 0, [1, 2])
    for token_id, position, table in (
        (-1, 0, [1, 2]), (131, 0, [1, 2]), (0, -1, [1, 2]), (0, 8, [1, 2]), (0, 80, [1] * 30),
        (0, 0, [3, 2]), (0, 4, [1, -1]),
    ):  # fmt: skip
        with pytest.raises(AssertionError, match="has no place"):
            call(token_id, position, table)


@needs_library
@pytest.mark.parametrize("tied", [False, True])
def test_greedy_answers_are_the_same_with_and_without(
    tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocab = Vocab.compact(24, 9, 80)
    model = model_of(vocab_size=vocab.size, tie_embeddings=tied, max_seq_len=200)
    model.output_weight.mul_(20)  # else all logits are nearly alike and every choice a tie
    zero = ModalityParams(0.0)
    greedy = SamplingParams(zero, zero, guidance_text=2.0, max_tokens=150)
    requests = [Request([vocab.bos_id, vocab.text_start + i], greedy) for i in range(3)]
    answers = Engine(model, vocab).generate(requests)
    monkeypatch.setenv(SWITCH, "0")
    assert Engine(model, vocab).generate(requests) == answers
    assert sum(len(answer.token_ids) for answer in answers) > 300


@needs_library
@pytest.mark.parametrize(("kind", "longest"), [("float32", 64), ("int8", 128)])
def test_longer_prompts_are_read_by_pytorch_and_answered_alike(
    kind: Any, longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocab = Vocab.compact(24, 9, 80)
    model = model_of(vocab_size=vocab.size, max_seq_len=200)
    model.output_weight.mul_(20)
    if kind == "int8":
        store_weights(model, "int8")
    n_rows: list[int] = []
    hidden = NativeStep.hidden

    def counted(self: NativeStep, token_ids: Tensor, *rest: Any) -> Tensor:
        n_rows.append(len(token_ids))
        return hidden(self, token_ids, *rest)

    monkeypatch.setattr(NativeStep, "hidden", counted)
    zero = ModalityParams(0.0)
    greedy = SamplingParams(zero, zero, mode="text", max_tokens=2)
    texts = torch.arange(longest + 1) % 60 + vocab.text_start
    for n_ids, wanted in ((longest, [longest, 1]), (longest + 1, [1])):
        n_rows.clear()
        request = Request(texts[:n_ids].tolist(), greedy)
        (answer,) = Engine(model, vocab).generate([request])
        assert n_rows == wanted
        with monkeypatch.context() as plain:
            plain.setenv(SWITCH, "0")
            assert Engine(model, vocab).generate([request]) == [answer]


@needs_library
def test_replaced_weights_are_used_by_the_next_request() -> None:
    vocab = Vocab.compact(24, 9, 80)
    model, other = (model_of(seed, vocab_size=vocab.size) for seed in (0, 1))
    greedy = SamplingParams(ModalityParams(0.0), ModalityParams(0.0), max_tokens=30)
    request = Request([vocab.bos_id, vocab.text_start], greedy)
    engine, wanted = Engine(model, vocab), Engine(other, vocab).generate([request])
    assert engine.generate([request]) != wanted
    model.load_state_dict(other.state_dict(), assign=True)
    assert engine.generate([request]) == wanted


def test_large_pages_are_asked_for_where_tensors_fill_them_alone_or_together() -> None:
    room = torch.zeros(40 << 20, dtype=torch.uint8)
    at = room.data_ptr()
    first = -(-at // LARGE) * LARGE
    assert list(large_spans([room])) == [(first, (at + len(room)) // LARGE * LARGE)]
    assert list(large_spans([room, room[5:9]])) == list(large_spans([room]))
    assert not list(large_spans([torch.zeros(100), torch.empty(0), torch.empty(9, device="meta")]))


@pytest.mark.skipif(sys.platform != "linux", reason="large pages are asked for on Linux")
def test_weights_in_large_pages_are_the_same_at_the_same_place() -> None:
    weights = torch.arange(6 << 20)
    before, place = weights.clone(), weights.data_ptr()
    thread = use_large_pages([weights])
    assert thread is not None
    thread.join()
    assert weights.data_ptr() == place
    assert torch.equal(weights, before)
    assert use_large_pages([torch.zeros(100)]) is None


def test_it_is_left_alone_where_it_cannot_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    assert NativeStep.of(model_of().to(torch.bfloat16)) is None  # activations are not float32
    assert NativeStep.of(model_of().to("meta")) is None
    watched = model_of()
    watched.layers[1].attention.wo.register_forward_hook(lambda *_: None)
    assert NativeStep.of(watched) is None
    monkeypatch.setenv(SWITCH, "0")
    assert NativeStep.of(model_of()) is None


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache, and no library loaded yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    library.cache_clear()
    yield tmp_path
    library.cache_clear()


def program(path: Path, lines: str) -> str:
    path.write_text(f"#!/bin/sh\n{lines}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ("echo 'no such machine' >&2; exit 3", "ended with 3: no such machine"),
        ("exit 1", "ended with 1: it said nothing"),
        ("exit 0", "cannot be written or loaded"),
        ('for last; do :; done; echo junk > "$last"', "cannot be written or loaded"),
    ],
)
def test_a_broken_compiler_is_told_once_and_pytorch_does_the_work(
    lines: str,
    reason: str,
    fresh: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("CC", program(fresh / "mycc", lines))
    model, vocab = model_of(vocab_size=67), Vocab.compact(24, 9, 36)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            greedy = SamplingParams(ModalityParams(0.0), max_tokens=4)
            engine = Engine(model, Vocab.compact(24, 9, 67 - vocab.text_start))
            assert engine.generate([Request([0, 60], greedy)])
    (record,) = caplog.records
    assert "Decoding runs in PyTorch" in record.message
    assert reason in record.message
    assert not list(fresh.rglob("build-*"))


@pytest.mark.parametrize("wished", [None, "no-such-compiler"])
def test_without_a_compiler_pytorch_does_the_work(
    wished: str | None,
    fresh: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("PATH", str(fresh))
    if wished is None:
        monkeypatch.delenv("CC", raising=False)
    else:
        monkeypatch.setenv("CC", wished)
    assert NativeStep.of(model_of()) is None
    assert (wished or "no C compiler") in caplog.text


@needs_library
def test_a_cache_that_cannot_be_written_is_told(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (fresh / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(fresh / "file"))
    monkeypatch.setattr(sys, "platform", "linux")
    assert library() is None
    assert "cannot be written" in caplog.text


@needs_library
def test_a_compiler_without_openmp_will_do(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse = 'for a; do [ "$a" = -fopenmp ] && exit 1; done'
    monkeypatch.setenv("CC", program(fresh / "plain", f'{refuse}\nexec {find_compiler()} "$@"'))
    n_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        test_each_architecture_equals_the_transformer("grouped queries")
        torch.set_num_threads(2)
        model = model_of()
        assert NativeStep.of(model) is None  # PyTorch has more threads
        store_weights(model, "int8")
        native_of(model)
    finally:
        torch.set_num_threads(n_threads)


@needs_library
def test_processes_that_build_at_once_all_get_the_library(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", program(fresh / "quick", f'exec {find_compiler()} "$@" -O0'))
    code = "from openchameleon.inference.native.step import library; print(library() is not None)"
    workers = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [worker.communicate()[0] for worker in workers] == ["True\n"] * 2
    assert len(list(fresh.rglob("*.so"))) == 1
    assert not list(fresh.rglob("build-*"))
    library.cache_clear()
    before = [path.stat() for path in fresh.rglob("*.so")]
    assert library() is not None
    assert [path.stat() for path in fresh.rglob("*.so")] == before  # not built again
