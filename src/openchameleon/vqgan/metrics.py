"""How good a reconstruction is (PSNR, SSIM) and how well a codebook is used."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def psnr(a: Tensor, b: Tensor, peak: float = 2.0) -> Tensor:
    """Peak signal-to-noise ratio of each pair, in dB, (B,); at most 100. Default: [-1, 1]."""
    error = (a - b).square().flatten(1).mean(1)
    return (10 * torch.log10(peak**2 / error)).clamp(max=100.0)


def ssim(a: Tensor, b: Tensor, peak: float = 2.0) -> Tensor:
    """Structural similarity of each pair of (B, C, H, W), (B,), 1 = equal. Differentiable.

    Wang et al. 2004: 11 x 11 Gaussian window, sigma 1.5, k = (0.01, 0.03), no padding; a picture
    smaller than the window gets the largest odd window that fits.
    """
    size = min(11, *a.shape[-2:])
    window = _gaussian(size - 1 + size % 2, a)
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    moments = torch.cat([a, b, a * a, b * b, a * b], dim=1)
    mean_a, mean_b, aa, bb, ab = _blur(moments, window).chunk(5, dim=1)
    var_a, var_b, cov = aa - mean_a**2, bb - mean_b**2, ab - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * cov + c2) / (var_a + var_b + c2)
    return (luminance * structure).flatten(1).mean(1)


def code_counts(codes: Tensor, n_embed: int) -> Tensor:
    """How often each of `n_embed` codes occurs, (n_embed,) int64."""
    return torch.bincount(codes.flatten(), minlength=n_embed)


def codebook_usage(counts: Tensor) -> float:
    """The part of the codebook that occurs at all, in [0, 1]."""
    return (counts > 0).float().mean().item()


def codebook_perplexity(counts: Tensor) -> float:
    """2 to the entropy in bits of the codes: from 1 to the size of the codebook. 0 if empty."""
    if not counts.any():
        return 0.0
    p = counts.double() / counts.sum()
    return torch.exp(-torch.special.xlogy(p, p).sum()).item()


def _gaussian(size: int, like: Tensor) -> Tensor:
    x = torch.arange(size, dtype=like.dtype, device=like.device) - (size - 1) / 2
    window = torch.exp(-x.square() / (2 * 1.5**2))
    return window / window.sum()


def _blur(x: Tensor, window: Tensor) -> Tensor:
    """Each channel filtered by the window, rows then columns, without padding."""
    channels = x.shape[1]
    rows = window.view(1, 1, 1, -1).expand(channels, 1, 1, -1)
    x = F.conv2d(x, rows, groups=channels)
    return F.conv2d(x, rows.transpose(2, 3), groups=channels)
