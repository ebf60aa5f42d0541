"""The transformer's shape: every number the model needs, the presets, and a parameter count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

NormPlacement = Literal["input", "output"]


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Rotary frequencies for a longer context than the first one, as Llama 3.1 has them.

    A pair that turns less than `low_freq_factor` times in `original_max_seq_len` positions turns
    `factor` times more slowly; one that turns more than `high_freq_factor` times stays as it is;
    between them the two are blended.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_seq_len: int

    def __post_init__(self) -> None:
        if self.factor <= 0 or self.original_max_seq_len < 1:
            raise ValueError(
                f"factor = {self.factor} and original_max_seq_len = {self.original_max_seq_len}"
                " must be above 0."
            )
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor = {self.low_freq_factor} must lie between 0 and"
                f" high_freq_factor = {self.high_freq_factor}."
            )


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape of one `Transformer`. Raises ValueError where the numbers do not fit together.

    dim: width of the residual stream. ffn_dim: width inside the SwiGLU, see `ffn_dim_for`.
    n_kv_heads: fewer than `n_heads` is grouped-query attention.
    max_seq_len: the context it is trained for; the model itself has no limit.
    rope_scaling: None for plain rotary positions, which all published models have.
    qk_norm_groups: number of separate query and key norms, each shared by a run of heads.
    norm_placement: "input" normalises what enters a branch (the published 7B), "output" what
    leaves it (the 34B, which trains stably without dropout; section 2.3 of the paper).
    dropout: probability, after attention and after the feed-forward.
    tie_embeddings: the output head is the embedding table.
    embedding_std: of the embedding table's first values. 1 makes an id as loud as what the layers
    add to it, which small models learn from much faster; not for a tied table.
    """

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    max_seq_len: int
    ffn_dim: int
    rope_theta: float = 1e4
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    qk_norm: bool = True
    qk_norm_groups: int = 1
    norm_placement: NormPlacement = "input"
    dropout: float = 0.0
    tie_embeddings: bool = False
    embedding_std: float = 0.02

    def __post_init__(self) -> None:
        for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1.")
        if self.ffn_dim < 1:
            raise ValueError(f"ffn_dim = {self.ffn_dim} must be at least 1.")
        if self.dim % self.n_heads or self.head_dim % 2:
            raise ValueError(
                f"dim = {self.dim} over n_heads = {self.n_heads} must give an even head width."
            )
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"n_heads = {self.n_heads} must be a multiple of n_kv_heads = {self.n_kv_heads}."
            )
        if self.qk_norm_groups < 1 or self.n_kv_heads % self.qk_norm_groups:
            raise ValueError(
                f"qk_norm_groups = {self.qk_norm_groups} must divide "
                f"n_kv_heads = {self.n_kv_heads}."
            )
        if self.norm_placement not in ("input", "output"):
            raise ValueError(f"norm_placement = {self.norm_placement!r} must be input or output.")
        if self.tie_embeddings and self.embedding_std > 0.1:
            raise ValueError(
                f"embedding_std = {self.embedding_std} is too large for a tied table, which is the "
                "output head too: 0.02 is usual."
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout = {self.dropout} must lie in [0, 1).")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.dim // self.n_heads


def ffn_dim_for(dim: int, multiple_of: int = 256, multiplier: float | None = None) -> int:
    """Llama's SwiGLU width: 8/3 of `dim`, times `multiplier`, rounded up to `multiple_of`."""
    ffn_dim = int(8 * dim / 3)
    if multiplier is not None:
        ffn_dim = int(multiplier * ffn_dim)
    return -(-ffn_dim // multiple_of) * multiple_of


def n_params(config: ModelConfig) -> int:
    """Number of parameters, in closed form."""
    kv_dim = config.n_kv_heads * config.head_dim
    attention = 2 * config.dim * config.dim + 2 * config.dim * kv_dim
    qk_norms = 4 * config.qk_norm_groups * config.head_dim if config.qk_norm else 0
    feed_forward = 3 * config.dim * config.ffn_dim
    norms = 2 * config.dim
    tables = (1 if config.tie_embeddings else 2) * config.vocab_size * config.dim
    layer = attention + qk_norms + feed_forward + norms
    return config.n_layers * layer + config.dim + tables


PRESETS: dict[str, ModelConfig] = {
    "nano": ModelConfig(
        dim=192,
        n_layers=6,
        n_heads=6,
        n_kv_heads=6,
        vocab_size=5503,
        max_seq_len=512,
        ffn_dim=ffn_dim_for(192),
        norm_placement="output",
        embedding_std=1.0,
    ),
    "small": ModelConfig(
        dim=512,
        n_layers=8,
        n_heads=8,
        n_kv_heads=8,
        vocab_size=65_536,
        max_seq_len=2048,
        ffn_dim=ffn_dim_for(512),
        norm_placement="output",
        tie_embeddings=True,
    ),
    "7b": ModelConfig(
        dim=4096,
        n_layers=32,
        n_heads=32,
        n_kv_heads=32,
        vocab_size=65_536,
        max_seq_len=4096,
        ffn_dim=ffn_dim_for(4096),
        dropout=0.1,
    ),
    "34b": ModelConfig(
        dim=8192,
        n_layers=48,
        n_heads=64,
        n_kv_heads=8,
        vocab_size=65_536,
        max_seq_len=4096,
        ffn_dim=ffn_dim_for(8192),
        qk_norm_groups=4,
        norm_placement="output",
    ),
}
"""The paper's two shapes (Table 1; the 34B's heads and layers are inferred) and two of ours."""
