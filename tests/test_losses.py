"""The chunked loss against the plain one, and what it holds in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from openchameleon.train.losses import chunked_loss


def example(
    m: int, c: int, v: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(m)
    hidden = torch.randn(m, c, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    head = torch.randn(v, c, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    weights = torch.rand(m, generator=g) * (torch.rand(m, generator=g) > 0.3)
    return hidden, head, torch.randint(v, (m,), generator=g), weights


def plain_loss(
    hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor, z_loss: float
) -> tuple[Tensor, Tensor, Tensor]:
    logits = hidden @ head.T
    ce, log_z = F.cross_entropy(logits, targets, reduction="none"), logits.logsumexp(1)
    return (weights * (ce + z_loss * log_z**2)).sum(), ce, log_z


@pytest.mark.parametrize("chunk", [1, 5, 13, 100])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_chunked_loss_and_gradients_equal_the_plain_ones(chunk: int, z_loss: float) -> None:
    inputs = example(13, 6, 11)
    hidden, head, targets, weights = inputs
    expected, ce, log_z = plain_loss(hidden, head, targets, weights.double(), z_loss)
    expected_grads = torch.autograd.grad(expected / 7, [hidden, head])
    sums = chunked_loss(hidden, head, targets, weights, z_loss, chunk)
    grads = torch.autograd.grad(sums.loss_sum / 7, [hidden, head])
    used = weights > 0
    torch.testing.assert_close(sums.loss_sum, expected)
    torch.testing.assert_close(sums.ce, torch.where(used, ce, 0.0))
    torch.testing.assert_close(sums.log_z, torch.where(used, log_z, 0.0))
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad)
    assert not sums.ce.requires_grad
    assert not sums.log_z.requires_grad


def test_a_second_backward_is_refused() -> None:
    hidden, head, targets, weights = example(5, 3, 7)
    loss = chunked_loss(hidden, head, targets, weights, 0.1, 2).loss_sum
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        loss.backward()


def test_a_tied_head_receives_both_gradients() -> None:
    _, table, targets, weights = example(9, 4, 8)
    read = torch.arange(9) % 8
    sums = chunked_loss(table[read].tanh(), table, targets, weights, 1e-2, 4)
    (grad,) = torch.autograd.grad(sums.loss_sum, table)
    plain, _, _ = plain_loss(table[read].tanh(), table, targets, weights.double(), 1e-2)
    torch.testing.assert_close(grad, torch.autograd.grad(plain, table)[0])


def test_targets_of_weight_zero_are_never_read() -> None:
    hidden, head, targets, weights = example(9, 4, 8)
    expected = chunked_loss(hidden, head, targets, weights, 1e-2, 4).loss_sum
    ignored = torch.where(weights > 0, targets, -100)
    torch.testing.assert_close(
        chunked_loss(hidden, head, ignored, weights, 1e-2, 4).loss_sum, expected
    )


def test_no_targets_at_all_give_zero_and_zero_gradients() -> None:
    hidden, head, targets, weights = example(9, 4, 8)
    sums = chunked_loss(hidden, head, targets, torch.zeros_like(weights), 1e-2, 4)
    sums.loss_sum.backward()
    assert sums.loss_sum.item() == 0
    assert not hidden.grad.any()
    assert not head.grad.any()


def test_bfloat16_loss_is_summed_in_float32() -> None:
    hidden, head, targets, weights = example(64, 16, 32, torch.bfloat16)
    sums = chunked_loss(hidden, head, targets, weights, 1e-2, 8)
    sums.loss_sum.backward()
    assert (sums.loss_sum.dtype, sums.ce.dtype) == (torch.float32, torch.float32)
    assert (hidden.grad.dtype, head.grad.dtype) == (torch.bfloat16, torch.bfloat16)
    h, w = (x.detach().double().requires_grad_() for x in (hidden, head))
    expected, _, _ = plain_loss(h, w, targets, weights.double(), 1e-2)
    expected.backward()
    torch.testing.assert_close(sums.loss_sum.double(), expected, rtol=5e-3, atol=0)
    error = (head.grad - w.grad).norm() / w.grad.norm()
    assert error < 0.02


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_input_gets_no_gradient(frozen: int) -> None:
    inputs = list(example(9, 4, 8))
    inputs[frozen] = inputs[frozen].detach()
    chunked_loss(*inputs, z_loss=0.0, chunk=4).loss_sum.backward()
    assert inputs[frozen].grad is None
    assert inputs[1 - frozen].grad.any()


def test_no_gradients_are_made_without_grad_mode() -> None:
    inputs = example(9, 4, 8)
    with torch.no_grad(), _LargestTensor() as seen:
        loss = chunked_loss(*inputs, z_loss=0.0, chunk=1).loss_sum
    assert not loss.requires_grad
    assert seen.n_written < 4 * 8 - 1 + 9  # nothing of the head's size was written


class _LargestTensor(TorchDispatchMode):
    """Records the most elements of any tensor that an operation newly writes."""

    def __init__(self) -> None:
        super().__init__()
        self.n_written = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {t.data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and t.data_ptr() not in known:
                self.n_written = max(self.n_written, t.numel())
        return result


def test_the_whole_logits_are_never_held() -> None:
    m, c, v, chunk = 256, 4, 512, 16
    hidden, head, targets, weights = example(m, c, v, torch.float32)
    with _LargestTensor() as seen:
        plain_loss(hidden, head, targets, weights, 1e-2)[0].backward()
    assert seen.n_written == m * v
    with _LargestTensor() as seen:
        chunked_loss(hidden, head, targets, weights, 1e-2, chunk).loss_sum.backward()
    assert 0 < seen.n_written <= chunk * v


def test_an_empty_chunk_is_refused() -> None:
    with pytest.raises(ValueError, match="chunk"):
        chunked_loss(*example(2, 2, 2), z_loss=0.0, chunk=0)
