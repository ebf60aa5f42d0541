"""The image tokenizer's network: pixels -> codes -> pixels. Knows nothing of files or of text.

Written from the Chameleon paper (arXiv 2405.09818, section 2.1) and VQGAN (arXiv 2012.09841);
parameter names are those of the published checkpoint.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from openchameleon.vqgan.blocks import (
    Downsample,
    Level,
    Middle,
    Upsample,
    make_conv,
    make_norm,
)
from openchameleon.vqgan.config import VQConfig
from openchameleon.vqgan.quantize import VectorQuantizer


class VQOutput(NamedTuple):
    reconstruction: Tensor  # (B, 3, P, P), about [-1, 1], unclamped
    codes: Tensor  # (B, h, w) int64
    vq_loss: Tensor  # scalar


class Encoder(nn.Module):
    """(B, 3, P, P) -> (B, z_channels, h, w)."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        kernel, widths = config.encoder_kernel, [config.ch * m for m in config.ch_mult]
        n_blocks = config.n_res_blocks
        self.stem = config.stem
        self.conv_in = make_conv(3 * config.stem**2, config.ch, kernel)
        self.down = nn.ModuleList()
        for i, width in enumerate(widths):
            c_in = widths[i - 1] if i > 0 else config.ch
            attention = _has_attention(config, i, kernel)
            level = Level(c_in, width, n_blocks, kernel, config.dropout, attention)
            if i < len(widths) - 1:
                level.downsample = Downsample(width, kernel)
            self.down.append(level)
        attention = config.mid_attention and kernel == 3
        self.mid = Middle(widths[-1], kernel, config.dropout, attention)
        self.norm_out = make_norm(widths[-1], kernel)
        self.conv_out = make_conv(widths[-1], config.z_channels, kernel)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.conv_in(F.pixel_unshuffle(pixels, self.stem))
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """(B, z_channels, h, w) -> (B, 3, P, P). `up` is stored by level: up.0 = full resolution."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        kernel, widths = config.decoder_kernel, [config.ch * m for m in config.ch_mult]
        n_blocks = config.n_res_blocks + 1
        self.stem = config.stem
        self.conv_in = make_conv(config.z_channels, widths[-1], kernel)
        attention = config.mid_attention and kernel == 3
        self.mid = Middle(widths[-1], kernel, config.dropout, attention)
        self.up = nn.ModuleList()
        for i, width in enumerate(widths):
            c_in = widths[min(i + 1, len(widths) - 1)]
            attention = _has_attention(config, i, kernel)
            level = Level(c_in, width, n_blocks, kernel, config.dropout, attention)
            if i > 0:
                level.upsample = Upsample(width, kernel)
            self.up.append(level)
        self.norm_out = make_norm(widths[0], kernel)
        self.conv_out = make_conv(widths[0], 3 * config.stem**2, kernel)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(x))), self.stem)


class VQModel(nn.Module):
    """Encoder, quantiser and decoder. Fully convolutional: any multiple of `down_factor` goes."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.embed_dim, 1)
        self.quantize = VectorQuantizer(config.n_embed, config.embed_dim, config.beta)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)
        self.decoder = Decoder(config)

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, P, P) in [-1, 1] -> codes (B, h, w) int64, raster order. ValueError on sizes."""
        return self.quantize.codes(self.encode_vectors(pixels))

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, h, w) int64 -> pixels (B, 3, P, P), about [-1, 1], unclamped."""
        return self.decode_vectors(self.quantize.vectors(codes))

    def forward(self, pixels: Tensor) -> VQOutput:
        z_q, codes, vq_loss = self.quantize(self.encode_vectors(pixels))
        return VQOutput(self.decode_vectors(z_q), codes, vq_loss)

    def encode_vectors(self, pixels: Tensor) -> Tensor:
        """(B, 3, P, P) in [-1, 1] -> what is quantised, (B, embed_dim, h, w)."""
        factor = self.config.down_factor
        if pixels.dim() != 4 or pixels.shape[1] != 3 or any(s % factor for s in pixels.shape[2:]):
            raise ValueError(
                f"pixels must be (B, 3, height, width) with sides in multiples of {factor}, "
                f"not {tuple(pixels.shape)}"
            )
        return self.quant_conv(self.encoder(pixels))

    def decode_vectors(self, z: Tensor) -> Tensor:
        """(B, embed_dim, h, w), quantised or not -> pixels (B, 3, P, P)."""
        return self.decoder(self.post_quant_conv(z))

    @property
    def last_weight(self) -> Tensor:
        """The last layer's weight, where the adversarial loss is balanced against the others."""
        return self.decoder.conv_out.weight


def _has_attention(config: VQConfig, level: int, kernel: int) -> bool:
    side = config.resolution // config.stem // 2**level
    return kernel == 3 and side in config.attn_resolutions
