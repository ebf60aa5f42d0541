"""Rotary position embedding on adjacent pairs (x[2i], x[2i+1]), as the published weights expect."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from openchameleon.model.config import ModelConfig, RopeScaling


def rope_tables(positions: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines, float32 (B, T, 1, D/2), of integer `positions` (B, T).

    Computed from the positions given, so that each row of a batch may stand elsewhere.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=positions.device)
    frequencies = config.rope_theta ** (-exponents / config.head_dim)
    if config.rope_scaling is not None:
        frequencies = _scaled(frequencies, config.rope_scaling)
    angles = positions[:, :, None, None].float() * frequencies
    return angles.cos(), angles.sin()


def _scaled(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_max_seq_len * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates each adjacent pair of `x` (B, T, H, D) in float32; returns the dtype of `x`."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return rotated.flatten(-2).type_as(x)
