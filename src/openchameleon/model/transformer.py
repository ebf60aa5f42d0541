"""The transformer: token ids in, float32 logits out. It knows an integer vocabulary, no modality.

Chameleon's additions to the Llama block are two (paper, section 2.3): a LayerNorm on queries and
keys, and the choice of normalising what enters or what leaves a branch. Sharding, activation
checkpointing, compilation and dtype are applied from outside. Parameter names are the published
checkpoint's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openchameleon.model.config import ModelConfig
from openchameleon.model.rope import apply_rope, rope_tables

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

OUTPUT_STD = 0.02

Mask: TypeAlias = "Tensor | BlockMask | None"


class KVCacheLike(Protocol):
    """Where attention keeps keys and values between calls."""

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores k, v (B, K, T, D) of `layer`; returns all to attend to, (B, K, S, D) each."""
        ...


@runtime_checkable
class HeadLike(Protocol):
    """An output head whose weights are held in a form of its own (inference/stored.py)."""

    def rows(self, x: Tensor, first: int, stop: int | None) -> Tensor:
        """The outputs first .. stop-1 of x (..., C)."""
        ...


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).type_as(x)


class HeadNorm(nn.Module):
    """LayerNorm of each head, in float32; one weight and bias for each group of adjacent heads.

    Groups, not heads, are the parameters: the released 34B holds one norm for each of its four
    tensor-parallel shards, and heads of a group must not drift apart in fine-tuning. A
    process that has only part `part` of `n_parts` of the heads takes the norms of those.
    """

    def __init__(self, n_groups: int, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_groups, head_dim))
        self.bias = nn.Parameter(torch.zeros(n_groups, head_dim))
        self.part, self.n_parts = 0, 1

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self._of_part(self.weight), self._of_part(self.bias)
        normed = F.layer_norm(x.float(), weight.shape[-1:], eps=1e-5)  # (B, T, H, D)
        grouped = normed.unflatten(-2, (len(weight), -1))
        scaled = grouped * weight.float()[:, None] + bias.float()[:, None]
        return scaled.flatten(-3, -2).type_as(x)

    def _of_part(self, groups: Tensor) -> Tensor:
        first = self.part * len(groups) // self.n_parts
        return groups[first : first + max(1, len(groups) // self.n_parts)]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """Attention of q (B, H, T, D) to k, v (B, K, S, D), H a multiple of K; (B, H, T, D).

    A `BlockMask` is worked through block by block (FlexAttention), and what it leaves out costs
    nothing: the way for long rows on a GPU. On a CPU that way has no gradient.
    """
    n_new, n_all = q.shape[2], k.shape[2]
    if mask is None and n_new not in (1, n_all):
        raise ValueError(f"{n_new} new positions over {n_all} cached ones need a mask.")
    grouped = q.shape[1] != k.shape[1]
    if mask is None or isinstance(mask, Tensor):
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None and n_new > 1, enable_gqa=grouped
        )
    from torch.nn.attention.flex_attention import flex_attention

    flex: Any = flex_attention
    if q.is_cuda:
        flex = _compiled(flex)
    out: Tensor = flex(q, k, v, block_mask=mask, enable_gqa=grouped)
    return out


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


class Attention(nn.Module):
    """Causal multi-head attention with grouped keys and values, QK-norm and rotary positions."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        kv_dim = config.n_kv_heads * config.head_dim
        self.wq = nn.Linear(config.dim, config.dim, bias=False)
        self.wk = nn.Linear(config.dim, kv_dim, bias=False)
        self.wv = nn.Linear(config.dim, kv_dim, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)
        if config.qk_norm:
            self.q_normalization: nn.Module = HeadNorm(config.qk_norm_groups, config.head_dim)
            self.k_normalization: nn.Module = HeadNorm(config.qk_norm_groups, config.head_dim)
        else:
            self.q_normalization = nn.Identity()
            self.k_normalization = nn.Identity()

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Mask,
        cache: KVCacheLike | None,
    ) -> Tensor:
        # The number of heads is read off the projections: a tensor-parallel rank holds a part.
        q = self.wq(x).unflatten(-1, (-1, self.head_dim))  # (B, T, H, D)
        k = self.wk(x).unflatten(-1, (-1, self.head_dim))  # (B, T, K, D)
        v = self.wv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q = apply_rope(self.q_normalization(q), *rope).transpose(1, 2)  # (B, H, T, D)
        k = apply_rope(self.k_normalization(k), *rope).transpose(1, 2)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        out = attend(q, k, v, mask)
        return self.wo(out.transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, ffn_dim, bias=False)
        self.w2 = nn.Linear(ffn_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, ffn_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """One layer. "input": x + f(norm(x)); "output": x + norm(f(x)); dropout on what is added."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention = Attention(config, layer)
        self.feed_forward = FeedForward(config.dim, config.ffn_dim)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.norm_input = config.norm_placement == "input"
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Mask,
        cache: KVCacheLike | None,
    ) -> Tensor:
        if self.norm_input:
            x = x + self.dropout(self.attention(self.attention_norm(x), rope, mask, cache))
            return x + self.dropout(self.feed_forward(self.ffn_norm(x)))
        x = x + self.dropout(self.attention_norm(self.attention(x, rope, mask, cache)))
        return x + self.dropout(self.ffn_norm(self.feed_forward(x)))


class Transformer(nn.Module):
    """The whole model. Weights are PyTorch's defaults until `init_weights` or a checkpoint."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        if not config.tie_embeddings:
            self.output = nn.Linear(config.dim, config.vocab_size, bias=False)

    @property
    def output_weight(self) -> Tensor:
        """The output head (V, C): its own, or the embedding table where they are tied."""
        return (self.tok_embeddings if self.config.tie_embeddings else self.output).weight

    @property
    def dtype(self) -> torch.dtype:
        """The type of activations: of what `hidden` returns, and of keys and values."""
        return self.norm.weight.dtype

    def hidden(
        self,
        token_ids: Tensor,
        positions: Tensor | None = None,
        mask: Mask = None,
        cache: KVCacheLike | None = None,
    ) -> Tensor:
        """What the output head reads: (B, T, C), after the final norm.

        token_ids: (B, T) int64. positions: (B, T) int64, counted from 0 in each sequence;
        None means 0..T-1. mask: bool (B, 1, T, S), True where a position may be attended to, or a
        `BlockMask` of PyTorch's FlexAttention;
        None means causal, and with a cache is allowed for the first tokens or for one token,
        which sees all the cache returns.
        """
        if positions is None:
            positions = torch.arange(token_ids.shape[1], device=token_ids.device)[None]
        rope = rope_tables(positions, self.config)
        x = self.tok_embeddings(token_ids)
        for layer in self.layers:
            x = layer(x, rope, mask, cache)
        return self.norm(x)

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor | None = None,
        mask: Mask = None,
        cache: KVCacheLike | None = None,
    ) -> Tensor:
        """Float32 logits (B, T, V); arguments as in `hidden`."""
        return self.logits(self.hidden(token_ids, positions, mask, cache))

    def logits(self, hidden: Tensor, first: int = 0, stop: int | None = None) -> Tensor:
        """Float32 logits (..., n) of ids first .. stop-1, by default all, from hidden (..., C)."""
        head = getattr(self, "output", self.tok_embeddings)
        if isinstance(head, HeadLike):
            return head.rows(hidden, first, stop).float()
        weight = self.output_weight
        if first or stop is not None:
            weight = weight[first:stop]
        return F.linear(hidden, weight).float()

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fills every parameter with `initial_weight`, whatever it held."""
        for name, parameter in self.named_parameters():
            parameter.copy_(initial_weight(self.config, name, parameter.shape, seed))


def initial_weight(config: ModelConfig, name: str, shape: torch.Size, seed: int) -> Tensor:
    """The first value of parameter `name`, float32 on the CPU: a function of (seed, name) alone.

    Neither the order of creation nor sharding nor the number of ranks can change it.

    | parameter                | value                                            |
    |--------------------------|--------------------------------------------------|
    | norm weights, biases     | 1, 0; but a norm that ends a branch ("output"):  |
    |                          | 1 / sqrt(2 n_layers)                             |
    | tok_embeddings           | normal, std `embedding_std`                      |
    | output                   | normal, std 0.02                                 |
    | wq wk wv w1 w3           | normal, std 1 / sqrt(fan_in)                     |
    | wo w2                    | normal, std 1 / sqrt(fan_in) / sqrt(2 n_layers)  |

    The factor 1 / sqrt(2 n_layers) keeps the residual stream from growing with depth.
    """
    owner, kind = name.split(".")[-2:]
    branch_scale = (2 * config.n_layers) ** -0.5
    if kind == "bias":
        return torch.zeros(shape)
    if owner in ("attention_norm", "ffn_norm") and config.norm_placement == "output":
        return torch.full(shape, branch_scale)
    if "norm" in owner:
        return torch.ones(shape)
    std = {"tok_embeddings": config.embedding_std, "output": OUTPUT_STD}.get(
        owner, shape[1] ** -0.5
    )
    if owner in ("wo", "w2"):
        std *= branch_scale
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(shape).normal_(0.0, std, generator=generator)
