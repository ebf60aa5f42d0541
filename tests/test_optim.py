"""The learning rate, the parameter groups, and the training step."""

from __future__ import annotations

import dataclasses
import itertools
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from openchameleon.data.loader import Batch
from openchameleon.model.config import ModelConfig
from openchameleon.model.transformer import Transformer
from openchameleon.train.optim import OptimConfig, lr_at, make_optimizer
from openchameleon.train.parallel import World
from openchameleon.train.step import (
    LossConfig,
    StepMetrics,
    document_mask,
    train_step,
)

CONFIG = ModelConfig(
    dim=32,
    n_layers=2,
    n_heads=2,
    n_kv_heads=1,
    vocab_size=24,
    max_seq_len=16,
    ffn_dim=48,
    norm_placement="output",
)
IS_CODE = torch.arange(24) < 10
EPS = 1e-2  # large: the first step of Adam is else the sign of the gradient, rounding and all


def make_batch(n_rows: int = 4, length: int = 12) -> Batch:
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(24, (n_rows, length + 1), generator=g)
    cut = torch.tensor([4, 12, 7, 9][:n_rows])[:, None]
    at = torch.arange(length)[None]
    second = at >= cut
    return Batch(
        inputs=ids[:, :-1],
        targets=ids[:, 1:],
        loss_weights=torch.rand(n_rows, length, generator=g) * (at != cut - 1),
        positions=torch.where(second, at - cut, at),
        doc_ids=1 + second.long(),
    )


def make_model(**changes: Any) -> Transformer:
    model = Transformer(dataclasses.replace(CONFIG, **changes))
    model.init_weights(seed=0)
    return model


def one_step(
    model: Transformer, batches: list[Batch], code_weight: float = 1.0, **changes: Any
) -> StepMetrics:
    optimizer = make_optimizer(model, OptimConfig(eps=EPS))
    loss = LossConfig(z_loss=1e-3, chunk=7, code_weight=code_weight)
    kwargs: dict[str, Any] = {"lr": 1e-2, "grad_clip": 1.0, "is_code": IS_CODE, **changes}
    return train_step(model, optimizer, batches, loss, **kwargs)


def weights_of(model: Transformer) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("decay", ["cosine", "exponential", "linear"])
def test_the_rate_warms_up_to_its_peak_and_decays_to_its_floor(decay: Any) -> None:
    config = OptimConfig(lr=2.0, warmup_steps=10, decay=decay, min_lr_ratio=0.05)
    rates = [lr_at(step, 100, config) for step in range(101)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == rates[10] == pytest.approx(2.0)
    assert rates[100] == lr_at(500, 100, config) == pytest.approx(0.1)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))


def test_decays_have_their_shapes_halfway() -> None:
    def halfway(decay: Any) -> float:
        config = OptimConfig(lr=1.0, warmup_steps=0, decay=decay, min_lr_ratio=0.04)
        return lr_at(50, 100, config)

    assert halfway("cosine") == pytest.approx(0.52)
    assert halfway("linear") == pytest.approx(0.52)
    assert halfway("exponential") == pytest.approx(0.2)
    assert halfway("constant") == 1.0


@pytest.mark.parametrize(
    "changes",
    [
        {"lr": 0.0},
        {"grad_clip": 0.0},
        {"warmup_steps": -1},
        {"matrices": "shampoo"},
        {"min_lr_ratio": 1.5},
        {"decay": "exponential", "min_lr_ratio": 0.0},
    ],
)
def test_impossible_optimisation_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(reversed(changes))):
        OptimConfig(**changes)


@pytest.mark.parametrize("tied", [False, True])
def test_weight_decay_reaches_the_matrices_of_linear_layers_alone(tied: bool) -> None:
    model = make_model(tie_embeddings=tied)
    model.layers[0].attention.wq.weight.requires_grad_(False)
    decayed, spared = make_optimizer(model, OptimConfig(weight_decay=0.1)).param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    linear = ("wq", "wk", "wv", "wo", "w1", "w2", "w3", "output")
    expected = {n for n in names.values() if n.split(".")[-2] in linear}
    found = {names[id(p)] for p in decayed["params"]}
    assert found == expected - {"layers.0.attention.wq.weight"}
    assert {names[id(p)] for p in spared["params"]} == set(names.values()) - expected


@pytest.mark.parametrize("tied", [False, True])
def test_muon_moves_the_matrices_of_the_layers_alone(tied: bool) -> None:
    model = make_model(tie_embeddings=tied)
    moved, others = make_optimizer(model, OptimConfig(matrices="muon")).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    expected = {n for n in names.values() if n.startswith("layers") and "norm" not in n}
    assert {names[id(p)] for p in moved["params"]} == expected
    assert {names[id(p)] for p in others["params"]} == set(names.values()) - expected
    assert others["weight_decay"] == 0.0


def test_a_step_of_muon_is_as_long_as_one_of_adamw() -> None:
    """Both change a matrix by about 0.2 lr a weight, so that one learning rate serves both."""
    models = [make_model(), make_model()]
    before = models[0].layers[0].feed_forward.w1.weight.detach().clone()
    sizes = []
    for model, matrices in zip(models, ("adamw", "muon"), strict=True):
        optimizer = make_optimizer(model, OptimConfig(matrices=matrices, weight_decay=0.0))
        batch, loss = make_batch(), LossConfig()
        for _ in range(20):
            train_step(model, optimizer, [batch], loss, lr=1e-3, grad_clip=1.0, is_code=IS_CODE)
        sizes.append((model.layers[0].feed_forward.w1.weight - before).std().item())
    assert 0.3 < sizes[0] / sizes[1] < 4


def test_a_step_equals_the_plain_computation() -> None:
    model, plain, batch = make_model(), make_model(), make_batch()
    metrics = one_step(model, [batch], grad_clip=0.1)

    logits = plain(batch.inputs, batch.positions, document_mask(batch.doc_ids)).flatten(0, 1)
    weights, targets = batch.loss_weights.flatten(), batch.targets.flatten()
    ce = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    log_z = logits.logsumexp(1)
    loss = (weights * (ce + 1e-3 * log_z**2)).sum() / weights.sum()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
    optimizer = make_optimizer(plain, OptimConfig(lr=1e-2, eps=EPS))
    optimizer.step()

    code = IS_CODE[targets]
    ce_mean = (weights * ce)[code].sum() / weights[code].sum()
    assert metrics.loss == pytest.approx(loss.item(), rel=1e-5)
    assert metrics.code_loss == pytest.approx(ce_mean.item(), rel=1e-5)
    assert metrics.grad_norm == pytest.approx(norm.item(), rel=1e-4)
    assert metrics.log_z_max == pytest.approx(log_z[weights > 0].abs().max().item(), rel=1e-5)
    assert metrics.n_tokens == 48
    torch.testing.assert_close(weights_of(model), weights_of(plain), rtol=1e-4, atol=1e-5)


def test_micro_batches_equal_one_batch() -> None:
    whole, parts, batch = make_model(), make_model(), make_batch()
    one, other = one_step(whole, [batch]), one_step(parts, batch.split(1))
    torch.testing.assert_close(weights_of(parts), weights_of(whole), rtol=1e-4, atol=1e-5)
    for name, value in dataclasses.asdict(one).items():
        assert getattr(other, name) == pytest.approx(value, rel=1e-4), name


def test_averaging_over_ranks_equals_one_batch() -> None:
    """Two ranks as threads: the mean of their gradients is the gradient of the whole batch."""
    barrier, slots = threading.Barrier(2, timeout=60), [torch.empty(0)] * 2
    models, halves = [make_model(), make_model()], make_batch().split(2)

    def run(rank: int) -> StepMetrics:
        class Thread(World):
            def mean(self, value: Tensor) -> Tensor:
                slots[rank] = value
                barrier.wait()
                result = (slots[0] + slots[1]) / 2
                barrier.wait()
                return result

        world = Thread(torch.device("cpu"), rank, size=2)
        return one_step(models[rank], [halves[rank]], grad_clip=math.inf, world=world)

    with ThreadPoolExecutor(2) as pool:
        metrics = list(pool.map(run, range(2)))
    whole = make_model()
    expected = one_step(whole, [make_batch()], grad_clip=math.inf)
    for name in ("loss", "text_loss", "code_loss"):
        for rank in range(2):
            assert getattr(metrics[rank], name) == pytest.approx(getattr(expected, name), rel=1e-5)
    for first, second, parameter in zip(
        *(m.parameters() for m in models), whole.parameters(), strict=True
    ):
        mean_grad = (first.grad + second.grad) / 2
        torch.testing.assert_close(mean_grad, parameter.grad, rtol=1e-3, atol=1e-6)


def test_text_and_code_losses_are_none_where_there_are_no_such_targets() -> None:
    nothing = torch.zeros(24, dtype=torch.bool)
    only_text = one_step(make_model(), [make_batch()], is_code=nothing)
    only_codes = one_step(make_model(), [make_batch()], is_code=~nothing)
    assert only_text.code_loss is None
    assert only_codes.text_loss is None
    assert only_text.text_loss == only_codes.code_loss


def test_a_loss_that_is_not_finite_stops_before_the_update() -> None:
    model = make_model()
    with torch.no_grad():
        model.norm.weight[3] = math.inf
    before = weights_of(model)
    with pytest.raises(FloatingPointError, match="gradient norm"):
        one_step(model, [make_batch()])
    assert torch.equal(weights_of(model), before)


def test_a_batch_without_targets_stops_before_the_update() -> None:
    model, batch = make_model(), make_batch()
    empty = dataclasses.replace(batch, loss_weights=torch.zeros_like(batch.loss_weights))
    before = weights_of(model)
    with pytest.raises(FloatingPointError, match="loss nan"):
        one_step(model, [empty])
    assert torch.equal(weights_of(model), before)


def test_documents_are_masked_from_each_other_causally() -> None:
    mask = document_mask(torch.tensor([[1, 1, 2, 2, 0]]))
    assert mask is not None
    expected = [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 0, 1],
    ]
    assert mask.tolist() == [[[[bool(x) for x in row] for row in expected]]]
    assert document_mask(torch.tensor([[1, 1, 0], [1, 1, 1]])) is None
    assert document_mask(torch.tensor([[0, 1, 1]])) is not None


@pytest.mark.parametrize("matrices", ["adamw", "muon"])
def test_a_few_steps_learn_a_batch_by_heart(matrices: Literal["adamw", "muon"]) -> None:
    model, batch = make_model(tie_embeddings=True), make_batch()
    optimizer = make_optimizer(model, OptimConfig(matrices=matrices))
    losses = [
        train_step(
            model, optimizer, [batch], LossConfig(), lr=1e-2, grad_clip=1.0, is_code=IS_CODE
        ).loss
        for _ in range(60)
    ]
    assert losses[0] == pytest.approx(math.log(24), abs=0.3)
    assert losses[-1] < 0.3


def test_codes_of_weight_zero_teach_nothing_and_text_counts_as_before() -> None:
    batch = make_batch()
    silent = dataclasses.replace(batch, loss_weights=batch.loss_weights * ~IS_CODE[batch.targets])
    weighed, masked, plain = make_model(), make_model(), make_model()
    metrics = one_step(weighed, [batch], code_weight=0.0)
    one_step(masked, [silent])
    one_step(plain, [batch])
    assert torch.equal(weights_of(weighed), weights_of(masked))
    assert not torch.equal(weights_of(weighed), weights_of(plain))
    assert metrics.code_loss is None
    assert metrics.text_loss is not None
