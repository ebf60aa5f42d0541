"""The warning signs are what they are said to be, and measuring them changes nothing."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from openchameleon.config import override
from openchameleon.data.loader import Batch, make_batch
from openchameleon.model.config import ModelConfig
from openchameleon.model.rope import apply_rope, rope_tables
from openchameleon.model.transformer import Transformer
from openchameleon.recipes import nano
from openchameleon.train.monitor import ALARM, Alarm, _attention_max, watched
from openchameleon.train.optim import OptimConfig, make_optimizer
from openchameleon.train.step import LossConfig, document_mask, train_step

MODEL = ModelConfig(dim=16, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=40, max_seq_len=12,
                    ffn_dim=24, embedding_std=1.0)  # fmt: skip
IS_CODE = torch.arange(40) < 20


def make_model(config: ModelConfig = MODEL) -> Transformer:
    model = Transformer(config)
    model.init_weights(seed=0)
    with torch.no_grad():
        model.output.weight *= 20  # so that a layer's logits and gradients are not all alike
    return model


def batch_of(n_rows: int = 6) -> Batch:
    """Rows of two documents and padding, some of whose tokens are not learned."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 40, (n_rows, 12)).astype(np.uint16)
    doc_ids = np.tile(np.repeat([1, 2, 0], [5, 6, 1]), (n_rows, 1)).astype(np.uint16)
    return make_batch(tokens, doc_ids, rng.integers(0, 2, tokens.shape).astype(np.uint8), 0)


def step(
    model: Transformer, batches: Sequence[Batch], watch: bool = True, lr: float = 1e-2
) -> dict[str, float]:
    """A training step; returns what was measured of it."""
    optimizer = make_optimizer(model, OptimConfig())
    take = {"lr": lr, "grad_clip": 0.5, "is_code": IS_CODE}
    if not watch:
        train_step(model, optimizer, batches, LossConfig(), **take)  # type: ignore[arg-type]
        return {}
    with watched(model, batches) as signs:
        train_step(model, optimizer, batches, LossConfig(), **take)  # type: ignore[arg-type]
    return signs


@torch.no_grad()
def test_the_numbers_equal_direct_computation() -> None:
    model, batch = make_model(), batch_of()
    before = copy.deepcopy(model)
    with torch.enable_grad():
        signs = step(model, [batch])

    mask = document_mask(batch.doc_ids)
    assert mask is not None
    logits = before(batch.inputs, batch.positions, mask)[batch.loss_weights > 0]
    expected = {"logit_max": logits.max(), "log_z": logits.logsumexp(1).mean()}

    rope = rope_tables(batch.positions, MODEL)
    x, x_before = before.tok_embeddings(batch.inputs), dict(before.named_parameters())
    total, attention_max = torch.zeros(()), []
    for i, layer in enumerate(before.layers):
        a, h = layer.attention, layer.attention_norm(x)
        q, k = (
            apply_rope(norm(w(h).unflatten(-1, (-1, 4))), *rope)
            for norm, w in ((a.q_normalization, a.wq), (a.k_normalization, a.wk))
        )
        pairs = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(2, dim=2)) / 2.0
        attention_max.append(pairs.masked_fill(~mask, -math.inf).max())
        x = layer(x, rope, mask, None)
        own = dict(model.layers[i].named_parameters(prefix=f"layers.{i}"))
        update = sum((p - x_before[n]).square().sum() for n, p in own.items())
        grad = sum(p.grad.square().sum() for p in own.values() if p.grad is not None)
        expected |= {
            f"layer/{i}/output_norm": x.norm(dim=-1).mean(),
            f"layer/{i}/attention_logit_max": attention_max[-1],
            f"layer/{i}/update_norm": torch.as_tensor(update).sqrt(),
            f"layer/{i}/grad_norm": torch.as_tensor(grad).sqrt(),
        }
    for name, p in model.named_parameters():
        total += (p - x_before[name]).square().sum()
    expected |= {
        "output_norm": expected["layer/2/output_norm"],
        "attention_logit_max": max(attention_max),
        "update_norm": total.sqrt(),
    }
    assert signs.keys() == expected.keys()
    for name, value in expected.items():
        assert signs[name] == pytest.approx(float(value), rel=1e-4), name


@pytest.mark.parametrize("qk_norm", [True, False])
def test_micro_batches_are_measured_as_one_batch(qk_norm: bool) -> None:
    config = dataclasses.replace(MODEL, qk_norm=qk_norm)
    whole = step(make_model(config), [batch_of()])
    cut = step(make_model(config), batch_of().split(4))
    assert whole.keys() == cut.keys()
    for name, value in whole.items():
        assert cut[name] == pytest.approx(value, rel=1e-3), name


def test_attention_without_a_mask_is_measured_as_causal() -> None:
    q, k = torch.randn(2, 9, 4, 8), torch.randn(2, 9, 2, 8)
    k[:, -1] *= 100  # seen by the last position alone
    q[:, -1] = 0.0
    causal = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril()
    found = _attention_max(q, k, None)
    assert torch.equal(found, _attention_max(q, k, causal))
    assert found < _attention_max(q, k, torch.ones_like(causal)) / 10


def test_monitored_and_unmonitored_training_give_the_same_bits() -> None:
    config = dataclasses.replace(MODEL, dropout=0.3)
    weights = []
    for watch in (True, False):
        model = make_model(config)
        torch.manual_seed(1)
        for _ in range(3):
            step(model, batch_of().split(4), watch)
        weights.append(model.state_dict())
        assert not any(m._forward_hooks for m in model.modules())
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name


def test_a_compiled_model_is_measured_too() -> None:
    model, reference = make_model(), make_model()
    model.hidden = torch.compile(model.hidden, backend="eager")  # type: ignore[method-assign]
    for _ in range(2):  # compiled without hooks
        step(model, [batch_of()], watch=False)
        step(reference, [batch_of()], watch=False)
    found, expected = step(model, [batch_of()]), step(reference, [batch_of()])
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-3), name


def test_a_step_that_fails_leaves_no_hook_and_no_number() -> None:
    model, batch = make_model(), batch_of()
    bad = dataclasses.replace(batch, loss_weights=batch.loss_weights * math.nan)
    with pytest.raises(FloatingPointError), watched(model, [bad]) as signs:
        train_step(model, make_optimizer(model, OptimConfig()), [bad], LossConfig(), lr=1e-2,
                   grad_clip=1.0, is_code=IS_CODE)  # fmt: skip
    assert signs == {}
    assert not any(m._forward_hooks for m in model.modules())


def told(values: Sequence[float], name: str = "output_norm", resumed_at: int = 0) -> list[int]:
    """The indices at which a series is an alarm, the log of the first ones having been read."""
    lines: list[dict[str, float | None]] = []
    alarm, found = Alarm(), []
    for i, value in enumerate(values):
        if i and i == resumed_at:
            alarm = Alarm(lines)
        lines.append({"step": i, name: value if math.isfinite(value) else None})
        if grown := alarm.hear({name: value}):
            lines.append({"step": i, **{ALARM + k: v for k, v in grown.items()}})
            found.append(i)
    return found


def noisy(values: Sequence[float]) -> list[float]:
    rng = np.random.default_rng(0)
    return [value * math.exp(rng.normal(0.0, 0.1)) for value in values]


SOUND = noisy([10 * (1 + i) ** 0.3 for i in range(100)])
GROWING = noisy([20.0] * 50 + [20 * 1.05**i for i in range(50)])


def test_sustained_growth_is_an_alarm_once_and_a_sound_run_is_none() -> None:
    assert told(SOUND) == []
    (at,) = told(GROWING)
    assert 55 < at < 80
    assert told([*SOUND[:60], 900.0, 1e9, *SOUND[60:]]) == []  # two outliers are no growth
    (at,) = told([*SOUND[:60], *[math.inf] * 5])
    assert at == 62


@pytest.mark.parametrize("resumed_at", [10, 60, 99])
def test_the_alarm_is_the_same_in_a_run_that_was_resumed(resumed_at: int) -> None:
    for values in (SOUND, GROWING, [*GROWING[:70], math.nan, *GROWING[70:]]):
        assert told(values, resumed_at=resumed_at) == told(values)


def test_small_logits_may_grow() -> None:
    logits = [2.0] * 30 + [40.0] * 30
    assert told(logits, "attention_logit_max") == []
    assert told([10 * x for x in logits], "attention_logit_max") == [32]
    assert told([-10 * x for x in logits], "log_z") == [32]  # a drift downwards is one too


@pytest.mark.parametrize(
    ("assignment", "read"),
    [
        ("model.qk_norm=false", lambda r: not r.model.qk_norm),
        ("model.dropout=0.1", lambda r: r.model.dropout == 0.1),
        ("model.norm_placement=input", lambda r: r.model.norm_placement == "input"),
        ("pretrain.train.loss.z_loss=0", lambda r: r.pretrain.train.loss.z_loss == 0.0),
        ("pretrain.train.monitor_every=7", lambda r: r.pretrain.train.monitor_every == 7),
    ],
)
def test_each_remedy_is_a_switch_of_a_recipe(assignment: str, read) -> None:  # type: ignore[no-untyped-def]
    assert not read(nano.recipe())
    assert read(override(nano.recipe(), [assignment]))
