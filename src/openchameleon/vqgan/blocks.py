"""The image tokenizer's layers: residual block, attention, resampling, and their two norms."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn


class PositionNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, h, w), at each position alone.

    GroupNorm takes its statistics over the whole picture and so carries information between
    patches; this one does not.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def make_norm(channels: int, kernel: int) -> nn.Module:
    """The published GroupNorm (32 groups where they divide), or its local form for kernel 1."""
    if kernel == 1:
        return PositionNorm(channels, eps=1e-6)
    return nn.GroupNorm(math.gcd(32, channels), channels, eps=1e-6)


def make_conv(c_in: int, c_out: int, kernel: int) -> nn.Conv2d:
    """A convolution that keeps the picture's size."""
    return nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2)


class ResBlock(nn.Module):
    """x + conv(dropout(swish(norm(conv(swish(norm(x))))))); 1x1 shortcut if channels change."""

    def __init__(self, c_in: int, c_out: int, kernel: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = make_norm(c_in, kernel)
        self.conv1 = make_conv(c_in, c_out, kernel)
        self.norm2 = make_norm(c_out, kernel)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = make_conv(c_out, c_out, kernel)
        self.nin_shortcut = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """x + single-head self-attention over all positions of norm(x)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = make_norm(channels, kernel=3)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (to(h).flatten(2).transpose(1, 2) for to in (self.q, self.k, self.v))  # (B,hw,C)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return x + self.proj_out(h.reshape(x.shape))


class Downsample(nn.Module):
    """Halves both sides: pad right and bottom, 3x3 stride 2; for kernel 1 a 2x2 stride 2."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.pad = kernel == 3
        self.conv = nn.Conv2d(channels, channels, 3 if self.pad else 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.pad else x)


class Upsample(nn.Module):
    """Doubles both sides: nearest, then 3x3; for kernel 1 a 2x2 stride 2 transposed convolution.

    (After a nearest upsampling a 1x1 kernel could not tell the four new positions apart.)
    """

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.nearest = kernel == 3
        self.conv = (
            make_conv(channels, channels, 3)
            if self.nearest
            else nn.ConvTranspose2d(channels, channels, 2, stride=2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0) if self.nearest else x)


class Middle(nn.Module):
    """Residual block, attention (or nothing), residual block, at the lowest resolution."""

    def __init__(self, channels: int, kernel: int, dropout: float, attention: bool) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels, kernel, dropout)
        self.attn_1 = AttnBlock(channels) if attention else nn.Identity()
        self.block_2 = ResBlock(channels, channels, kernel, dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """The residual blocks of one resolution, each with its attention where the level has any."""

    def __init__(
        self, c_in: int, c_out: int, n_blocks: int, kernel: int, dropout: float, attention: bool
    ) -> None:
        super().__init__()
        widths = [c_in] + [c_out] * (n_blocks - 1)
        self.block = nn.ModuleList([ResBlock(c, c_out, kernel, dropout) for c in widths])
        self.attn = nn.ModuleList([AttnBlock(c_out) for _ in widths if attention])
        # Named as the published checkpoint has them; the encoder sets one, the decoder the other.
        self.downsample: nn.Module = nn.Identity()
        self.upsample: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        return self.upsample(self.downsample(x))
