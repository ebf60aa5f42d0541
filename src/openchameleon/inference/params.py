"""What a caller may ask of generation: frozen, checked values. Knows no tensors."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import Literal

Mode = Literal["interleaved", "text", "image"]


def new_seed() -> int:
    """A seed that nobody chose, short enough to be typed again."""
    return random.SystemRandom().randrange(2**31)


def _require(ok: bool, name: str, value: object, legal: str) -> None:
    if not ok:
        raise ValueError(f"{name} = {value!r} is not {legal}")


@dataclass(frozen=True, slots=True)
class ModalityParams:
    """How ids of one modality are drawn. ValueError names the field and its legal range.

    temperature 0 takes the likeliest id; top_k 0 and top_p 1 switch those filters off;
    repetition_penalty 1 is none (only text may have one, see `SamplingParams`).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        t, k, p, r = self.temperature, self.top_k, self.top_p, self.repetition_penalty
        _require(0 <= t < math.inf, "temperature", t, "a finite number >= 0")
        _require(0 <= k < 2**31, "top_k", k, "a whole number in 0 .. 2**31 - 1 (0 = off)")
        _require(0 < p <= 1, "top_p", p, "in (0, 1]")
        _require(0 < r < math.inf, "repetition_penalty", r, "a finite number > 0 (1 = none)")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """One request's wishes. ValueError names the field and its legal range.

    `image` holds for the codes of every code range, `text` for everything else.
    guidance_*: None for both = off; with one given, the other counts as 1. Guidance at scale 1
    runs its extra streams and changes nothing.
    max_tokens: new ids, the closing eos included; None = as many as the context has room for.
    seed: same seed, same draws, whatever else is in the batch; None = a new one each time.
    max_images: items opened at most; None = 1 in mode "image", no limit in mode "interleaved".
    """

    text: ModalityParams = field(default_factory=ModalityParams)
    image: ModalityParams = field(default_factory=ModalityParams)
    guidance_text: float | None = None
    guidance_image: float | None = None
    max_tokens: int | None = None
    seed: int | None = None
    mode: Mode = "interleaved"
    max_images: int | None = None

    def __post_init__(self) -> None:
        # Flat areas of a picture repeat their code: a penalty would forbid them.
        penalty = self.image.repetition_penalty
        _require(penalty == 1, "image.repetition_penalty", penalty, "1 (it applies to text only)")
        for name, scale in (("text", self.guidance_text), ("image", self.guidance_image)):
            ok = scale is None or 0 <= scale < math.inf
            _require(ok, f"guidance_{name}", scale, "a finite number >= 0, or None")
        n, seed, mode, images = self.max_tokens, self.seed, self.mode, self.max_images
        _require(n is None or n >= 1, "max_tokens", n, "a whole number >= 1, or None")
        _require(seed is None or 0 <= seed < 2**63, "seed", seed, "in 0 .. 2**63 - 1, or None")
        known = ("interleaved", "text", "image")
        _require(mode in known, "mode", mode, f"one of {', '.join(known)}")
        least = 1 if mode == "image" else 0
        _require(images is None or images >= least, "max_images", images,
                 f"a whole number >= {least} in mode {mode!r}, or None")  # fmt: skip

    @property
    def guidance(self) -> tuple[float, float] | None:
        """(text scale, image scale), or None where guidance is off."""
        text, image = self.guidance_text, self.guidance_image
        if text is None and image is None:
            return None
        return (1.0 if text is None else text, 1.0 if image is None else image)
