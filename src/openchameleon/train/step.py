"""One training step, whole: pretraining and fine-tuning differ in their batches only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from openchameleon.data.loader import Batch
from openchameleon.model.transformer import Mask, Transformer
from openchameleon.train.guard import Guard, GuardConfig
from openchameleon.train.losses import chunked_loss
from openchameleon.train.optim import Optimizer
from openchameleon.train.parallel import World, add_up_norms, alone, clip_gradients

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True, slots=True)
class LossConfig:
    """z_loss: factor of log^2 Z (the paper's 1e-5). chunk: rows of logits held at a time.

    mask_documents: keep the documents packed into one row from attending to each other.
    code_weight: what a code counts beside a text token (the paper's 1). Codes outnumber words by
    far, and most of them are background: fine-tuning for short answers may want them to count less.
    """

    z_loss: float = 1e-5
    chunk: int = 512
    mask_documents: bool = True
    code_weight: float = 1.0


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """What one step saw; losses in nats a target, weighted by `loss_weights`.

    loss: cross-entropy and z-loss. text_loss, code_loss: cross-entropy where the target is text
    or an image code; None where the step had no such target. grad_norm: before clipping.
    log_z_max: the largest |log Z|, whose growth warns of divergence.
    n_tokens: positions that held a token.
    """

    loss: float
    text_loss: float | None
    code_loss: float | None
    grad_norm: float
    log_z_max: float
    n_tokens: int


def train_step(
    model: Transformer,
    optimizer: Optimizer,
    batches: Sequence[Batch],
    config: LossConfig,
    *,
    lr: float,
    grad_clip: float,
    is_code: Tensor,
    world: World | None = None,
    guard: Guard | None = None,
) -> StepMetrics:
    """Updates `model` by one step on `batches`, micro-batches of one batch on the model's device.

    The result does not depend on how a batch is cut into micro-batches or shared among ranks: each
    target counts by its weight over the weight of all. is_code: (V,) bool. world: the processes
    that `batches` is a part for, whose gradients are averaged; all get the same metrics. guard:
    judges each step; without one a step must be finite. Raises StepLeftOut on all processes, with
    the weights as they were.
    """
    world = world or alone()
    batches = [weighed(batch, config.code_weight, is_code) for batch in batches]
    optimizer.zero_grad()
    total = world.mean(torch.stack([b.loss_weights.sum() for b in batches]).sum())
    sums, log_z_max = torch.zeros(5, device=total.device), torch.zeros((), device=total.device)
    n_tokens = torch.tensor(sum(b.n_tokens for b in batches), device=total.device)
    for batch in batches:
        loss_sum, parts, log_z = batch_loss(model, batch, config, is_code)
        (loss_sum / total).backward()
        sums += torch.stack([loss_sum.detach(), *parts])
        log_z_max = torch.maximum(log_z_max, log_z.abs().max())

    add_up_norms(model, world)
    norm = clip_gradients(list(model.parameters()), grad_clip)
    loss_sum, text_sum, text_weight, code_sum, code_weight = world.mean(sums).tolist()
    metrics = StepMetrics(
        loss=loss_sum / (text_weight + code_weight or math.nan),
        text_loss=text_sum / text_weight if text_weight else None,
        code_loss=code_sum / code_weight if code_weight else None,
        grad_norm=float(norm),
        log_z_max=float(world.largest(log_z_max)),
        n_tokens=round(float(world.mean(n_tokens.double())) * world.data_size),
    )
    (guard or Guard(GuardConfig())).judge(metrics.loss, metrics.grad_norm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    return metrics


def weighed(batch: Batch, code_weight: float, is_code: Tensor) -> Batch:
    """The batch with the weights of its codes multiplied by `code_weight`."""
    if code_weight == 1.0:
        return batch
    factors = torch.where(is_code[batch.targets], code_weight, 1.0)
    return replace(batch, loss_weights=batch.loss_weights * factors)


def batch_loss(
    model: Transformer, batch: Batch, config: LossConfig, is_code: Tensor
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Loss of one micro-batch as sums, to be divided by the weight of all targets.

    Returns the differentiable sum; detached [text cross-entropy, text weight, code cross-entropy,
    code weight]; and log Z of each position, 0 where nothing is learned.
    """
    mask = attention_mask(batch.doc_ids) if config.mask_documents else None
    hidden = model.hidden(batch.inputs, batch.positions, mask)
    targets, weights = batch.targets.flatten(), batch.loss_weights.flatten()
    sums = chunked_loss(
        hidden.flatten(0, 1), model.output_weight, targets, weights, config.z_loss, config.chunk
    )
    code = is_code[targets]
    weighted = weights * sums.ce
    parts = [t[where].sum() for where in (~code, code) for t in (weighted, weights)]
    return sums.loss_sum, parts, sums.log_z


def document_mask(doc_ids: Tensor) -> Tensor | None:
    """Causal attention within each document: bool (B, 1, T, T) from `doc_ids` (B, T).

    None, which means causal and is faster, where each row starts with its only document: padding
    (0) behind it can see it, but is seen by nothing and learns nothing.
    """
    if ((doc_ids == doc_ids[:, :1]) | (doc_ids == 0)).all():
        return None
    same = doc_ids[:, None, :, None] == doc_ids[:, None, None, :]
    return same.tril()


def attention_mask(doc_ids: Tensor) -> Mask:
    """`document_mask` in the form that is fastest where `doc_ids` is."""
    mask = document_mask(doc_ids)
    return mask if mask is None or not doc_ids.is_cuda else document_blocks(doc_ids)


def document_blocks(doc_ids: Tensor) -> BlockMask:
    """`document_mask` as the blocks that FlexAttention works through."""
    from torch.nn.attention.flex_attention import create_block_mask

    def may_see(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (doc_ids[b, q] == doc_ids[b, k]) & (k <= q)

    rows, length = doc_ids.shape
    return create_block_mask(may_see, rows, None, length, length, device=doc_ids.device)
