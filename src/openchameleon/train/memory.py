"""Bytes that a GPU holds while it trains, part by part, from shapes alone: no torch, no clock.

The rules are FSDP2's with mixed precision: weights, gradients and AdamW's moments are float32 and
cut into shards; gathered weights, products and activations are bfloat16; norms run in float32. A
GPU alone casts by autocast: it holds a bfloat16 copy of all weights, and a float32 residual stream.
Letters: C width, F width of the feed-forward, H heads, K key heads, D head width, V ids.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Literal

from openchameleon.errors import UserError
from openchameleon.model.config import ModelConfig, n_params

FLOAT32, BFLOAT16 = 4, 2


@dataclass(frozen=True, slots=True)
class Layout:
    """How one training lies on its GPUs, which are replicas x fsdp x tp.

    fsdp: parts that weights, gradients and optimizer are cut into. tp: GPUs that share each layer's
    products, each with the whole residual stream. micro_batch: rows that they work through at a
    time. checkpointing: "layers" keeps each layer's input and computes the rest again for backward.
    """

    gpus: int
    fsdp: int
    tp: int = 1
    micro_batch: int = 1
    checkpointing: Literal["none", "layers"] = "none"

    def __post_init__(self) -> None:
        for name in ("gpus", "fsdp", "tp", "micro_batch"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.gpus % (self.fsdp * self.tp):
            raise UserError(
                f"{self.gpus} GPUs are no multiple of fsdp {self.fsdp} x tp {self.tp}; "
                "leave --fsdp out and the rest of the GPUs share the weights."
            )


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one GPU at the peak of a step; no part is counted twice.

    weights, gradients, optimizer: this GPU's shards. gathered: weights of two layers and of the
    tables as they are computed with, and the gradients of one layer on their way to the shards; on
    a GPU alone the copy of all weights. activations: what backward needs of forward. logits: one
    chunk's, and the loss's gradients.
    """

    weights: float
    gradients: float
    optimizer: float
    gathered: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        return sum(astuple(self))


def memory_of(config: ModelConfig, layout: Layout, row_len: int, chunk: int) -> Memory:
    """What one GPU holds. chunk: rows of logits at a time, as in `LossConfig`.

    Tensor parallelism divides the layers, FSDP everything. With M parameters on this GPU after
    both: 4 M of weights, as much of gradients, 8 M of AdamW's two moments (Muon has one for its
    matrices). Norms, a ten-thousandth of all, are counted as if the layers' were divided too.
    """
    tables = (1 if config.tie_embeddings else 2) * config.vocab_size * config.dim
    layers, alone = n_params(config) - tables - config.dim, layout.gpus == 1
    shard = FLOAT32 * (layers / layout.tp + tables + config.dim) / layout.fsdp
    layer = layers / config.n_layers / layout.tp
    in_use, on_the_way = BFLOAT16 * (2 * layer + tables), (BFLOAT16 + FLOAT32) * layer
    copy = BFLOAT16 * (layers + config.vocab_size * config.dim)
    n_tokens, recompute = layout.micro_batch * row_len, layout.checkpointing == "layers"
    a_token = activation_bytes(config, layout.tp, recompute, alone=alone)
    return Memory(
        weights=shard,
        gradients=shard,
        optimizer=2 * shard,
        gathered=copy if alone else in_use + on_the_way,
        activations=n_tokens * a_token,
        logits=loss_bytes(config, n_tokens, chunk),
    )


def activation_bytes(
    config: ModelConfig,
    tp: int = 1,
    recompute: bool = False,
    itemsize: int = BFLOAT16,
    alone: bool = False,
) -> float:
    """Bytes a token that the forward pass keeps for backward, as autograd saves them.

    With b = `itemsize` of the activations, in each layer:

    | two norms: what enters, in float32, and what leaves   | 2 (4 + b) C           |
    | queries and keys, rotated; values; attention's output | 2 b (C + K D) / tp    |
    | with QK-norm: queries and keys before and behind it   | 8 (C + K D) / tp      |
    | SwiGLU: both products, silu, what enters w2           | 4 b F / tp            |
    | dropout: its two masks                                | 2 C                   |
    | statistics of norms and softmax                       | 8 + (12 H + 8 K) / tp |

    and above them the ids, the rotary tables, and the last norm. `alone`: autocast converts what
    leaves a norm once for each matrix that reads it, 3 b C more. With `recompute` each layer keeps
    its input, b C (4 C alone), and one at a time has all. Document masks as FlexAttention's blocks
    are nothing beside it; a dense mask would add b T a layer.
    """
    kv_dim = config.n_kv_heads * config.head_dim
    norms = (2 * FLOAT32 + (5 if alone else 2) * itemsize) * config.dim
    attention = (2 * itemsize + 2 * FLOAT32 * config.qk_norm) * (config.dim + kv_dim)
    feed_forward = 4 * itemsize * config.ffn_dim
    statistics = (4 + 8 * config.qk_norm) * config.n_heads + 8 * config.qk_norm * config.n_kv_heads
    dropout = 2 * config.dim if config.dropout else 0
    layer = norms + dropout + 8 + (attention + feed_forward + statistics) / tp
    above = 8 + 4 * config.head_dim + (FLOAT32 + itemsize) * config.dim
    if recompute:
        return config.n_layers * (FLOAT32 if alone else itemsize) * config.dim + layer + above
    return config.n_layers * layer + above


def loss_bytes(config: ModelConfig, n_tokens: int, chunk: int, itemsize: int = BFLOAT16) -> float:
    """What `chunked_loss` adds at its peak, beside its inputs.

    8 bytes for each of chunk x V logits (float32, and the exponentials or the product's result
    beside them), the head's gradient in float32 and in the activations' dtype, and the gradient of
    what the head reads.
    """
    logits = 2 * FLOAT32 * min(chunk, n_tokens) * config.vocab_size
    head = (FLOAT32 + itemsize) * config.vocab_size * config.dim
    return logits + head + itemsize * n_tokens * config.dim
