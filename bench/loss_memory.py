"""What the chunked loss and its gradients hold in memory at its peak, against the naive loss."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from common import once, parser, report
from torch import Tensor

from openchameleon.train.losses import chunked_loss
from openchameleon.train.step import LossConfig

N_ROWS, DIM = 4096, 512


def main() -> None:
    args = parser(__doc__).parse_args()
    vocab_size, z_loss = 8192 if args.quick else 65_536, LossConfig().z_loss
    torch.manual_seed(0)
    hidden = torch.randn(N_ROWS, DIM, requires_grad=True)
    head = torch.randn(vocab_size, DIM).mul_(0.02).requires_grad_()
    targets, weights = torch.arange(N_ROWS), torch.ones(N_ROWS)

    def naive() -> tuple[Tensor, ...]:
        logits = hidden @ head.T
        ce = F.cross_entropy(logits, targets, reduction="sum")
        return torch.autograd.grad(ce + z_loss * logits.logsumexp(1).square().sum(), (hidden, head))

    def chunked(chunk: int) -> tuple[Tensor, ...]:
        sums = chunked_loss(hidden, head, targets, weights, z_loss, chunk)
        return torch.autograd.grad(sums.loss_sum, (hidden, head))

    # Both must return the gradients of hidden and head; the rest is what a loss can save.
    gradients = 4 * (hidden.numel() + head.numel()) / 2**30
    theirs = once(naive)["peak_gib"]
    for chunk in (LossConfig().chunk, 64):
        ours = once(partial(chunked, chunk))["peak_gib"]
        report(
            "loss_memory",
            args.out,
            {"rows": N_ROWS, "dim": DIM, "vocab": vocab_size, "chunk": chunk},
            chunked_gib=ours,
            naive_gib=theirs,
            gradients_gib=gradients,
            ratio=ours / theirs,
            ratio_beyond_gradients=(ours - gradients) / (theirs - gradients),
        )


if __name__ == "__main__":
    main()
