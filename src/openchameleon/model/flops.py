"""Floating-point operations of the transformer, for utilisation and plans: no torch, no clock.

Counted: matrix products (2 operations a weight) and attention's two products. Not counted: the
embedding look-up, norms, activations, softmax, and anything recomputed.
"""

from __future__ import annotations

from openchameleon.model.config import ModelConfig, n_params


def matrix_weights(config: ModelConfig) -> int:
    """Weights that every token is multiplied with: the linear layers and the output head."""
    kv_dim = config.n_kv_heads * config.head_dim
    attention = 2 * config.dim * (config.dim + kv_dim)
    feed_forward = 3 * config.dim * config.ffn_dim
    return config.n_layers * (attention + feed_forward) + config.vocab_size * config.dim


def forward_flops_per_token(config: ModelConfig, n_attended: float) -> float:
    """Operations of one token's forward pass where it attends to `n_attended` positions.

    Decoding at position p attends to p + 1; a causal prefill of T tokens to (T + 1) / 2 on average.
    """
    attention = 4 * config.n_layers * config.dim * n_attended
    return 2 * matrix_weights(config) + attention


def train_flops_per_token(config: ModelConfig, seq_len: int, causal: bool = False) -> float:
    """Operations a token of one training step: forward, and twice that backward.

    By the custom of published utilisations attention counts as full; `causal` counts only the
    half of it that a causal kernel computes.
    """
    n_attended = (seq_len + 1) / 2 if causal else seq_len
    return 3 * forward_flops_per_token(config, n_attended)


def counting_conventions(config: ModelConfig, seq_len: int) -> dict[str, float]:
    """Operations a token of one training step, as published utilisations count them.

    full: `train_flops_per_token`, this project's. causal: with half of attention. 6N: six for each
    parameter, embedding table included, and no attention (Kaplan et al., 2020, arXiv 2001.08361).
    """
    return {
        "full": train_flops_per_token(config, seq_len),
        "causal": train_flops_per_token(config, seq_len, causal=True),
        "6N": 6.0 * n_params(config),
    }
