"""The image tokenizer's pixel and adversarial losses, and the weight that balances them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pixel_loss(
    reconstruction: Tensor, target: Tensor, l1: float, l2: float, weight: Tensor | None = None
) -> Tensor:
    """mean of weight * (l1 |d| + l2 d^2) over (B, 3, P, P); `weight` is (B, 1, P, P) or None.

    The weight map is where emphasis on faces or salient regions goes (Make-A-Scene, arXiv
    2203.13131, whose tokenizer the published one follows). ValueError on its shape.
    """
    difference = reconstruction - target
    error = l1 * difference.abs() + l2 * difference.square()
    if weight is None:
        return error.mean()
    batch, _, *sides = target.shape
    if list(weight.shape) != [batch, 1, *sides]:
        raise ValueError(f"weight map is {tuple(weight.shape)}, not {(batch, 1, *sides)}")
    return (weight * error).mean()


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Hinge: half of mean relu(1 - real) + mean relu(1 + fake)."""
    return (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()) / 2


def generator_loss(fake_logits: Tensor) -> Tensor:
    return -fake_logits.mean()


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_weight: Tensor) -> Tensor:
    """|grad of reconstruction| / (|grad of adversarial| + 1e-4) at the last layer, in [0, 1e4].

    VQGAN (arXiv 2012.09841, eq. 7). Both arguments are scalar losses whose graph is kept; the
    result has no gradient.
    """
    (wanted,) = torch.autograd.grad(reconstruction, last_weight, retain_graph=True)
    (given,) = torch.autograd.grad(adversarial, last_weight, retain_graph=True)
    return (wanted.norm() / (given.norm() + 1e-4)).clamp(0.0, 1e4).detach()
