"""Weights held in fewer bytes than they are computed with: int8 with a scale a row, or bfloat16.

Applied from outside to a loaded model, for generating: decoding is bound by the bytes of the
weights. Activations keep their type here; for int8 the native step rounds them too (step.c). Norms
are not touched, nor is the embedding table by int8.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openchameleon.model.transformer import HeadNorm, RMSNorm, Transformer

StoredAs = Literal["int8", "bfloat16"]


class StoredLinear(nn.Module):
    """A linear layer without bias: weight (out, in), int8 or bfloat16; scale (out,) or None.

    This is the plain way, for long inputs and as the reference: widened for each call. For one
    new id of a stream on a CPU the native step reads the weights as they are.
    """

    weight: Tensor
    scale: Tensor | None

    def __init__(self, weight: Tensor, scale: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.rows(x, 0, None)

    def rows(self, x: Tensor, first: int, stop: int | None) -> Tensor:
        """The outputs first .. stop-1 alone."""
        y = F.linear(x, self.weight[first:stop].to(x.dtype))
        return y if self.scale is None else y * self.scale[first:stop].to(x.dtype)


class StoredEmbedding(nn.Module):
    """An embedding table (ids, C) held in another type than it gives; it may be the head too."""

    weight: Tensor

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.dtype = dtype

    def forward(self, token_ids: Tensor) -> Tensor:
        return F.embedding(token_ids, self.weight).to(self.dtype)

    def rows(self, x: Tensor, first: int, stop: int | None) -> Tensor:
        """The products with the rows of ids first .. stop-1."""
        return F.linear(x, self.weight[first:stop].to(x.dtype))


def int8_of(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(weight, scale): int8 (out, in) and float32 (out,), of which the product is nearest.

    Symmetric: the largest weight of a row is 127. A row that is not finite has such a scale.
    """
    weight = weight.float()
    scale = weight.abs().amax(1) / 127
    steps = torch.where(scale > 0, scale, 1.0)
    return (weight / steps[:, None]).round().nan_to_num().to(torch.int8), scale


def store_weights(model: Transformer, kind: StoredAs, dtype: torch.dtype | None = None) -> None:
    """Holds the linear layers and the head of a model as `kind` from now on; it cannot learn.

    The rest computes in `dtype`, None for the type it has. A head that is tied to the embedding
    table becomes int8 apart from it.
    """
    dtype = model.norm.weight.dtype if dtype is None else dtype
    table = model.tok_embeddings.weight.data
    if kind == "int8" and model.config.tie_embeddings:
        model.add_module("output", StoredLinear(*int8_of(table)))
    for module in list(model.modules()):
        if isinstance(module, RMSNorm | HeadNorm):
            module.to(dtype)
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                weight = child.weight.data
                stored = int8_of(weight) if kind == "int8" else (weight.to(torch.bfloat16),)
                setattr(module, name, StoredLinear(*stored))
    held = table.to(torch.bfloat16) if kind == "bfloat16" else table
    model.add_module("tok_embeddings", StoredEmbedding(held, dtype))
