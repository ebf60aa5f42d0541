"""Cross-entropy and z-loss in one pass over chunks of rows, never holding the whole logits.

With a vocabulary of 65,536 the logits and their gradient are the largest tensors of a training
step. Here each chunk's logits give the loss and at once the gradients of both inputs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class LossSums(NamedTuple):
    """loss_sum: differentiable scalar. ce, log_z: (M,) float32, detached, 0 at weight 0."""

    loss_sum: Tensor
    ce: Tensor
    log_z: Tensor


def chunked_loss(
    hidden: Tensor,
    output_weight: Tensor,
    targets: Tensor,
    weights: Tensor,
    z_loss: float,
    chunk: int,
) -> LossSums:
    """Sum over rows of weights * (cross-entropy + z_loss * log_z^2); paper, section 2.3.

    hidden: (M, C). output_weight: (V, C). targets: (M,) int64. weights: (M,) float >= 0; rows
    of weight 0 cost nothing and their targets are not read. chunk: rows at a time, so that the
    extra memory is of order chunk * V. Products run in the dtype of `hidden`, the rest in
    float32 (float64 for float64 input). Allows one backward pass.
    """
    if chunk < 1:
        raise ValueError(f"chunk = {chunk} must be at least 1.")
    return LossSums(
        *_ChunkedLoss.apply(
            hidden, output_weight, targets, weights, z_loss, chunk, torch.is_grad_enabled()
        )
    )


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        output_weight: Tensor,
        targets: Tensor,
        weights: Tensor,
        z_loss: float,
        chunk: int,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        precise = torch.promote_types(hidden.dtype, torch.float32)
        head = output_weight.to(hidden.dtype)
        ce = torch.zeros(len(hidden), dtype=precise, device=hidden.device)
        log_z = torch.zeros_like(ce)
        loss_sum = ce.new_zeros(())
        need_hidden, need_head = (grad_enabled and n for n in ctx.needs_input_grad[:2])
        grad_hidden = torch.zeros_like(hidden) if need_hidden else None
        grad_head = torch.zeros_like(head, dtype=precise) if need_head else None

        for rows in weights.nonzero().squeeze(1).split(chunk):
            x, target, weight = hidden[rows], targets[rows, None], weights[rows].to(precise)
            logits = (x @ head.T).to(precise)  # (chunk, V)
            row_log_z = logits.logsumexp(dim=1)
            row_ce = row_log_z - logits.gather(1, target).squeeze(1)
            loss_sum += (weight * (row_ce + z_loss * row_log_z**2)).sum()
            ce[rows], log_z[rows] = row_ce, row_log_z
            if grad_hidden is None and grad_head is None:
                continue
            # d/dlogits = weight * ((1 + 2 z log_z) * softmax - one_hot), in the logits' memory.
            grad = logits.sub_(row_log_z[:, None]).exp_()
            grad *= (weight * (1 + 2 * z_loss * row_log_z))[:, None]
            grad.scatter_add_(1, target, -weight[:, None])
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad @ head
            if grad_head is not None:
                grad_head += grad.T @ x

        ctx.gradients = (grad_hidden, grad_head)
        ctx.head_dtype = output_weight.dtype
        ctx.mark_non_differentiable(ce, log_z)
        return loss_sum, ce, log_z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        # Scaled in place: a second (V, C) tensor would be the step's peak.
        if ctx.gradients is None:
            raise RuntimeError("chunked_loss allows one backward pass: its gradients are consumed.")
        grad_hidden, grad_head = ctx.gradients
        ctx.gradients = None
        if grad_hidden is not None:
            grad_hidden.mul_(grad_loss)
        if grad_head is not None:
            grad_head = grad_head.mul_(grad_loss).to(ctx.head_dtype)
        return grad_hidden, grad_head, None, None, None, None, None
