"""The image tokenizer's shape: one frozen dataclass and its presets. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class VQConfig:
    """Shape of a `VQModel`; the defaults are the published 512 x 512 tokenizer.

    `stem` folds each stem x stem block of pixels into channels before the first convolution
    (1 = published). A side whose kernel is 1 is strictly local: its norms, resampling and
    convolutions mix nothing between positions and it has no attention, so that with
    `encoder_kernel=1` a code is a function of its own patch of `down_factor` x `down_factor`
    pixels. `mid_attention` and `attn_resolutions` hold for the sides whose kernel is 3.
    ValueError where the numbers do not fit together.
    """

    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    n_res_blocks: int = 2
    z_channels: int = 256
    embed_dim: int = 256
    n_embed: int = 8192
    resolution: int = 512
    attn_resolutions: tuple[int, ...] = ()
    dropout: float = 0.0
    beta: float = 0.25
    stem: int = 1
    encoder_kernel: Literal[1, 3] = 3
    decoder_kernel: Literal[1, 3] = 3
    mid_attention: bool = True

    def __post_init__(self) -> None:
        counts = (self.ch, self.n_res_blocks, self.z_channels, self.embed_dim, self.n_embed)
        if min(*counts, self.stem, self.resolution, *self.ch_mult, len(self.ch_mult)) < 1:
            raise ValueError(f"every size of an image tokenizer must be at least 1: {self}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout = {self.dropout} must lie in [0, 1)")
        if self.encoder_kernel not in (1, 3) or self.decoder_kernel not in (1, 3):
            raise ValueError("encoder_kernel and decoder_kernel must be 1 or 3")
        if self.resolution % self.down_factor:
            raise ValueError(
                f"resolution {self.resolution} is not a multiple of the down factor "
                f"{self.down_factor} (stem {self.stem} x 2^{len(self.ch_mult) - 1})"
            )

    @property
    def down_factor(self) -> int:
        """Pixels per code, along one side."""
        return self.stem * 2 ** (len(self.ch_mult) - 1)

    @property
    def codes_per_side(self) -> int:
        return self.resolution // self.down_factor

    @property
    def n_codes_per_image(self) -> int:
        return self.codes_per_side**2


PRESETS: dict[str, VQConfig] = {
    "published": VQConfig(),
    # Patch-local codes keep an object's codes the same wherever it stands: a small
    # transformer binds names to codes far sooner when they do not change with the context.
    "nano": VQConfig(
        ch=384,
        ch_mult=(1,),
        n_res_blocks=1,
        n_embed=4096,
        resolution=96,
        stem=16,
        encoder_kernel=1,
        decoder_kernel=1,
        mid_attention=False,
    ),
    "small": VQConfig(
        ch=512,
        ch_mult=(1,),
        n_res_blocks=1,
        resolution=128,
        stem=16,
        encoder_kernel=1,
        decoder_kernel=1,
        mid_attention=False,
    ),
}
