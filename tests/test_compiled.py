"""The step in fixed shapes against the transformer; in one test compiled, on a CPU."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import test_native
import torch
from test_cli import refusal
from test_native import VARIANTS, model_of, some_ids
from torch import Tensor

from openchameleon.errors import UserError
from openchameleon.inference import compiled
from openchameleon.inference.blocks import NULL_BLOCK
from openchameleon.inference.compiled import CompiledStep, padded
from openchameleon.inference.engine import Engine
from openchameleon.inference.kv_cache import WASTE_SLOT
from openchameleon.inference.params import ModalityParams, SamplingParams
from openchameleon.inference.sequence import Request
from openchameleon.inference.stored import store_weights
from openchameleon.model.transformer import Transformer
from openchameleon.pipeline import Chameleon
from openchameleon.serve.service import new_engine
from openchameleon.vocab import Vocab

VOCAB = Vocab.compact(48, 4, 76)  # 131 ids, as the models of test_native have
GREEDY = ModalityParams(temperature=0.0)


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What would be compiled runs as it is. What was asked to be compiled."""
    asked: list[Any] = []

    def keep(function: Any, **options: Any) -> Any:
        asked.append(function)
        return function

    monkeypatch.setattr(torch, "compile", keep)
    return asked


class Pool(test_native.Pool):
    """Full of what nobody may read but for the null block's zeros."""

    def __init__(self, model: Transformer, n_rows: int, length: int, block_size: int) -> None:
        super().__init__(model.config, n_rows, length, block_size)
        for keys, values in self.storage:
            keys[NULL_BLOCK] = values[NULL_BLOCK] = 0.0


def decoded(model: Transformer, step: CompiledStep, token_ids: Tensor, block_size: int) -> Tensor:
    """Hidden states (R, T, C), a step for each position."""
    n_rows, length = token_ids.shape
    pool = Pool(model, n_rows, length, block_size)
    hidden = [
        step.hidden(token_ids[:, t], torch.full((n_rows,), t), pool.tables, pool.storage)
        for t in range(length)
    ]
    return torch.stack(hidden, 1)


def equals_the_transformer(
    model: Transformer, step: CompiledStep, n_rows: int, block_size: int
) -> None:
    token_ids = some_ids(model, n_rows, 19)
    hidden = decoded(model, step, token_ids, block_size)
    torch.testing.assert_close(hidden, model.hidden(token_ids), atol=1e-4, rtol=1e-4)
    wanted = model(token_ids).flatten(0, 1)
    logits = step.logits(hidden.flatten(0, 1), 5, 60)
    torch.testing.assert_close(logits, wanted[:, 5:60], atol=1e-4, rtol=1e-4)
    out = torch.zeros(len(wanted), model.config.vocab_size)
    assert step.logits(hidden.flatten(0, 1), 5, 60, out) is out
    assert torch.equal(out[:, 5:60], logits)
    assert not out[:, :5].any()
    assert not out[:, 60:].any()


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("variant", VARIANTS)
def test_each_architecture_equals_the_transformer(variant: str) -> None:
    model = model_of(**VARIANTS[variant])
    equals_the_transformer(model, CompiledStep(model), n_rows=3, block_size=16)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("n_rows", [1, 2, 5, 17])
@pytest.mark.parametrize("block_size", [2, 5])
def test_any_number_of_rows_and_any_block_equal_the_transformer(
    n_rows: int, block_size: int
) -> None:
    model = model_of(norm_placement="output")
    equals_the_transformer(model, CompiledStep(model), n_rows, block_size)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("kind", ["int8", "bfloat16"])
def test_weights_held_in_fewer_bytes_equal_the_plain_way(kind: Any) -> None:
    model = model_of(tie_embeddings=True)
    store_weights(model, kind)
    equals_the_transformer(model, CompiledStep(model), n_rows=3, block_size=4)


@pytest.mark.usefixtures("uncompiled")
def test_rows_may_be_neighbours_in_one_stream() -> None:
    model = model_of(n_kv_heads=2)
    token_ids, pool = some_ids(model, 1, 23), Pool(model, 1, 23, block_size=4)
    step = CompiledStep(model)
    got = [
        step.hidden(
            token_ids[0, first:stop], torch.arange(first, stop),
            pool.tables.expand(stop - first, -1), pool.storage,
        )
        for first, stop in ((0, 7), (7, 8), (8, 23))
    ]  # fmt: skip
    torch.testing.assert_close(torch.cat(got), model.hidden(token_ids)[0], atol=1e-4, rtol=1e-4)


def test_rows_and_blocks_are_padded_to_powers_of_two_with_what_nobody_reads() -> None:
    ids, positions, tables = torch.tensor([7, 8, 9]), torch.tensor([3, 4, 80]), torch.ones(3, 6)
    rows = padded(ids, positions, tables.long())
    assert rows.shape == (4, 2 + 8)
    assert rows[:3, :2].tolist() == [[7, 3], [8, 4], [9, 80]]
    assert rows[:3, 2:].tolist() == [[1] * 6 + [NULL_BLOCK] * 2] * 3
    assert rows[3].tolist() == [0, WASTE_SLOT] + [NULL_BLOCK] * 8
    assert padded(ids[:1], positions[:1], tables[:1, :1].long()).shape == (1, 2 + 4)


@pytest.mark.parametrize("guidance", [None, 2.0])
def test_an_engine_writes_the_same_ids_with_it(
    guidance: float | None, uncompiled: list[Any]
) -> None:
    model = model_of()
    model.output.weight.data *= 25  # else all logits are nearly alike and every choice a tie
    modes: list[Any] = ["text", "image", "interleaved", "image", "text"]
    requests = [
        Request(
            [VOCAB.bos_id, *range(VOCAB.text_start, VOCAB.text_start + 3 * i)],
            SamplingParams(GREEDY, GREEDY, mode=mode, max_tokens=30, guidance_text=guidance),
        )
        for i, mode in enumerate(modes)
    ]
    plain = Engine(model, VOCAB).generate(requests)
    assert not uncompiled
    engine = Engine(model, VOCAB, compiled=True)
    assert engine.generate(requests) == plain
    assert len(uncompiled) == 1
    assert engine.blocks.n_held == 0


def test_a_server_s_engine_is_warm_before_anybody_asks(uncompiled: list[Any]) -> None:
    model = model_of()
    chameleon: Any = SimpleNamespace(
        model=model, config=SimpleNamespace(vocab=VOCAB), engine=Engine(model, VOCAB, compiled=True)
    )
    engine = new_engine(chameleon)
    assert engine.compiled
    assert len(uncompiled) == 1
    assert not engine.busy
    assert engine.blocks.n_held == 0


def test_compiling_is_refused_where_it_is_not_for(
    model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="Compiling is for a CUDA GPU, and this is cpu"):
        Chameleon.from_pretrained(model_folder, device="cpu", compiled=True)
    assert "--tensor" in refusal(capsys, "serve", "--compile", "--tensor", "2")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_what_pytorch_compiles_equals_the_transformer_in_two_graphs() -> None:
    torch._dynamo.reset()
    model = model_of(norm_placement="output", n_kv_heads=2)
    step = CompiledStep(model)
    sizes = [(1, 5), (2, 2), (1, 19), (3, 5), (8, 16), (17, 16), (5, 2)]  # with some as kv heads
    for n_rows, block_size in sizes:
        token_ids = some_ids(model, n_rows, 19)
        hidden = decoded(model, step, token_ids, block_size)
        torch.testing.assert_close(hidden, model.hidden(token_ids), atol=1e-4, rtol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@pytest.mark.slow
def test_a_process_may_come_to_serve_many_shapes_of_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    for width in range(30, 35):  # PyTorch's own limit is met at the fifth
        model = model_of(n_layers=1, ffn_dim=width)
        for n_rows in (1, 3):
            equals_the_transformer(model, CompiledStep(model), n_rows, block_size=16)


class FakeGraph:
    """Like a CUDA graph it knows what it reads and writes by its place, and returns one tensor."""

    made: list[FakeGraph]

    def __init__(self, function: Callable[[Tensor], Tensor], given: Tensor, pool: Any) -> None:
        self.function, self.shape, self.shares = function, given.shape, pool
        self.result, self.pool = function(given), pool or object()
        self.made.append(self)

    def replay(self, given: Tensor) -> Tensor:
        assert given.shape == self.shape
        return self.result.copy_(self.function(given))


@pytest.fixture
def graphs(uncompiled: list[Any], monkeypatch: pytest.MonkeyPatch) -> list[FakeGraph]:
    """All that were captured, for an engine whose steps are replayed."""
    monkeypatch.setattr(FakeGraph, "made", [], raising=False)
    monkeypatch.setattr(compiled, "Graph", FakeGraph)
    return FakeGraph.made


def replaying(model: Transformer) -> CompiledStep:
    step = CompiledStep(model)
    step.replays = True
    return step


def test_each_shape_is_captured_once_and_shares_the_memory_of_the_others(
    graphs: list[FakeGraph],
) -> None:
    model = model_of()
    step = replaying(model)
    token_ids = some_ids(model, 5, 19)
    pool = Pool(model, 5, 19, block_size=4)
    for t in range(19):
        for rows in (slice(0, 1), slice(1, 4), slice(4, 5)):
            ids, tables = token_ids[rows, t], pool.tables[rows]
            hidden = step.hidden(ids, torch.full((len(ids),), t), tables, pool.storage)
            wanted = model.hidden(token_ids[rows, : t + 1])[:, -1]
            torch.testing.assert_close(hidden, wanted, atol=1e-4, rtol=1e-4)
    assert [graph.shape for graph in graphs] == [(1, 2 + 8), (4, 2 + 8)]
    assert graphs[1].shares is graphs[0].pool


@pytest.mark.parametrize("moved", [(0, 0), (-1, 1)])
def test_graphs_are_captured_anew_when_any_part_of_the_cache_has_moved(
    moved: tuple[int, int], graphs: list[FakeGraph]
) -> None:
    model = model_of()
    step, token_ids = replaying(model), some_ids(model, 1, 9)
    pool = Pool(model, 1, 9, block_size=4)
    layer, which = moved
    hidden = []
    for t in range(9):
        if t == 5:
            tensors = list(pool.storage[layer])
            tensors[which], old = tensors[which].clone(), tensors[which]
            pool.storage[layer] = (tensors[0], tensors[1])
            old.fill_(torch.nan)
        positions = torch.tensor([t])
        hidden.append(step.hidden(token_ids[:, t], positions, pool.tables, pool.storage))
    torch.testing.assert_close(torch.stack(hidden, 1), model.hidden(token_ids),
                               atol=1e-4, rtol=1e-4)  # fmt: skip
    assert [graph.shares for graph in graphs] == [None, None]  # nothing of those that went


def test_an_engine_that_replays_writes_the_same_ids_while_its_cache_grows(
    graphs: list[FakeGraph],
) -> None:
    model = model_of()
    model.output.weight.data *= 25
    requests = [
        Request([VOCAB.bos_id], SamplingParams(GREEDY, GREEDY, mode="image", max_tokens=n))
        for n in (10, 30, 60)
    ]
    engine = Engine(model, VOCAB, compiled=True, block_size=2)
    assert isinstance(engine.runner.step, CompiledStep)
    engine.runner.step.replays = True
    assert engine.generate(requests) == Engine(model, VOCAB).generate(requests)
    assert len({graph.shape for graph in graphs}) < len(graphs)


def test_prompts_that_come_together_are_read_in_calls_of_bounded_memory(
    graphs: list[FakeGraph],
) -> None:
    engine = Engine(model_of(), VOCAB, compiled=True)
    assert isinstance(engine.runner.step, CompiledStep)
    engine.runner.step.replays = True
    params = SamplingParams(mode="text", max_tokens=1)
    texts = range(VOCAB.text_start, VOCAB.text_start + 30)
    engine.generate([Request([VOCAB.bos_id, i, *texts], params) for i in texts])
    assert max(graph.shape[0] for graph in graphs) == CompiledStep.max_rows
