"""Pictures <-> codes: the VQ model with its preprocessing, as one thing to save and load."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from openchameleon import config as config_io
from openchameleon.errors import UserError
from openchameleon.image_io import Fit, square, to_rgb
from openchameleon.vqgan.config import VQConfig
from openchameleon.vqgan.model import VQModel

_BATCH = 16  # pictures through the model at once: bounds memory, enough to fill a device


class ImageTokenizer:
    """P x P pictures as N codes of a codebook; see `VQConfig` for the sizes.

    as_hub: pictures become pixels as the model hub does it (the longer side rounded down, and
    x * 0.0078 - 1, so that white is 0.989), to get its codes; else as the published tokenizer.
    """

    def __init__(self, model: VQModel, config: VQConfig, as_hub: bool = False) -> None:
        self.model = model.eval()
        self.config = config
        self.as_hub = as_hub

    @staticmethod
    def from_weights(weights: Mapping[str, Tensor], config: VQConfig) -> ImageTokenizer:
        """Weights of any float type run as float32; without a decoder it reads pictures only.

        ValueError where they are not those of the config.
        """
        model = VQModel(config)
        if not any(name.startswith("decoder.") for name in weights):
            del model.decoder
        try:
            model.load_state_dict(
                {k: v.float() if v.is_floating_point() else v for k, v in weights.items()}
            )
        except RuntimeError as error:
            raise ValueError(str(error)) from error
        return ImageTokenizer(model, config)

    @property
    def can_decode(self) -> bool:
        """Whether it can turn codes into pictures."""
        return hasattr(self.model, "decoder")

    @property
    def n_codes(self) -> int:
        """N, codes of one picture."""
        return self.config.n_codes_per_image

    @property
    def codebook_size(self) -> int:
        return self.config.n_embed

    @property
    def resolution(self) -> int:
        """P, pixels of a side."""
        return self.config.resolution

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def to(self, device: torch.device | str) -> ImageTokenizer:
        """Moves the model; returns itself."""
        self.model.to(device)
        return self

    def fingerprint(self) -> str:
        """Hex digits that change with the weights, the sizes and the way to pixels."""
        digest = hashlib.sha256(f"{config_io.config_hash(self.config)} {self.as_hub}".encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def preprocess(self, picture: PIL.Image.Image, fit: Fit = "crop") -> Tensor:
        """A picture of any size -> float32 pixels (3, P, P) in [-1, 1]; for `fit` see `square`."""
        fitted = square(to_rgb(picture), self.resolution, fit, floor=self.as_hub)
        pixels = torch.from_numpy(np.array(fitted, dtype=np.float32))
        scaled = pixels * 0.0078 - 1 if self.as_hub else pixels / 255 * 2 - 1
        return scaled.permute(2, 0, 1).contiguous()

    @torch.no_grad()
    def encode(self, pictures: list[PIL.Image.Image], fit: Fit = "crop") -> Tensor:
        """B pictures -> codes (B, N) int64 on the CPU, each picture's in raster order."""
        parts = [torch.empty(0, self.n_codes, dtype=torch.int64)]
        for start in range(0, len(pictures), _BATCH):
            batch = pictures[start : start + _BATCH]
            pixels = torch.stack([self.preprocess(p, fit) for p in batch])
            parts.append(self.model.encode(pixels.to(self.device)).flatten(1).cpu())
        return torch.cat(parts)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> list[PIL.Image.Image]:
        """Codes (B, N) -> B pictures of P x P. ValueError unless they are such codes.

        UserError without a decoder.
        """
        if not self.can_decode:
            raise UserError(
                "This image tokenizer has no decoder, as in Hugging Face's folders: it reads"
                " pictures and cannot write any."
            )
        if codes.ndim != 2 or codes.shape[1] != self.n_codes:
            raise ValueError(f"codes have shape {tuple(codes.shape)}, expected (B, {self.n_codes})")
        if codes.numel() and (codes.min() < 0 or codes.max() >= self.codebook_size):
            raise ValueError(f"a code is outside 0..{self.codebook_size - 1}")
        side = self.config.codes_per_side
        pictures: list[PIL.Image.Image] = []
        for part in codes.long().split(_BATCH):
            pixels = self.model.decode(part.to(self.device).view(-1, side, side))
            pictures += map(_picture, pixels.float().cpu())
        return pictures

    def save(self, folder: str | Path) -> None:
        """Writes `config.json` and `model.safetensors` into the folder, made if missing."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(config_io.to_dict(self.config), indent=2)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")
        weights = {k: v.detach().cpu().contiguous() for k, v in self.model.state_dict().items()}
        file = folder / "model.safetensors"
        save_file(weights, file)
        file.chmod((folder / "config.json").stat().st_mode)  # safetensors creates 0600

    @staticmethod
    def load(folder: str | Path, device: torch.device | str = "cpu") -> ImageTokenizer:
        """Reads what `save` wrote; weights of any float type run as float32.

        UserError if a file is missing, damaged, or of another architecture.
        """
        folder = Path(folder)
        try:
            data = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            weights = load_file(folder / "model.safetensors")
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"{folder} holds no readable image tokenizer: {error}") from error
        config = config_io.from_dict(VQConfig, data)
        try:
            return ImageTokenizer.from_weights(weights, config).to(device)
        except ValueError as error:
            raise UserError(
                f"The weights in {folder} do not belong to its config.json: {error}"
            ) from error


def _picture(pixels: Tensor) -> PIL.Image.Image:
    """Float pixels (3, P, P) -> a picture.

    Rounded, where the published code truncates: rounding undoes `preprocess` exactly, truncation
    darkens by half a level on average.
    """
    levels = ((pixels.clamp(-1, 1) + 1) / 2 * 255).round().to(torch.uint8)
    return PIL.Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())
