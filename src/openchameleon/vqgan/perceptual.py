"""Perceptual distances between pictures, with and without pretrained weights from disk.

`multiscale` needs no weights and is the default; features learned on photographs (`vgg_lpips`,
`hf`) give visibly better pictures where the user has such weights. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openchameleon.errors import UserError
from openchameleon.vqgan.metrics import ssim

PerceptualKind = Literal["none", "multiscale", "vgg_lpips", "hf"]


def make_perceptual(kind: PerceptualKind, path: str = "", heads: str = "") -> nn.Module | None:
    """The distance `(a, b) -> scalar` on (B, 3, P, P) in [-1, 1], frozen; None for `none`.

    `path`: for `vgg_lpips` a VGG16 state dict in torchvision's naming, `heads` the LPIPS linear
    heads (.safetensors, or .pt/.pth, read with `weights_only`); for `hf` a transformers folder.
    """
    if kind == "none":
        return None
    if kind == "multiscale":
        return Multiscale()
    if kind == "vgg_lpips":
        module: nn.Module = LPIPS(_load(path, "path"), _load(heads, "heads"))
    elif kind == "hf":
        module = HFFeatures(path)
    else:
        raise ValueError(f"unknown perceptual kind {kind!r}")
    return module.eval().requires_grad_(False)


class Multiscale(nn.Module):
    """L1, 1 - SSIM and the L1 of both gradients, averaged over an image pyramid by halves.

    A weighted sum over scales and not MS-SSIM's product, whose gradient is unbounded where one
    scale is still uncorrelated, as it is when training starts.
    """

    n_levels = 4
    smallest_side = 8

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        total, level = a.new_zeros(()), 0
        while level < self.n_levels and (level == 0 or min(a.shape[-2:]) >= self.smallest_side):
            total = total + (a - b).abs().mean() + 1 - ssim(a, b).mean()
            for dim in (-1, -2):
                if a.shape[dim] > 1:
                    total = total + (a.diff(dim=dim) - b.diff(dim=dim)).abs().mean()
            a, b, level = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2), level + 1
        return total / level


class VGG16Features(nn.Module):
    """VGG16's convolutions; returns the five maps before each pooling (relu1_2 ... relu5_3)."""

    widths = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))

    def __init__(self) -> None:
        super().__init__()
        # A Sequential with pooling and ReLU in it, for the indices of torchvision's names.
        layers: list[nn.Module] = []
        self.taps: list[int] = []
        c_in = 3
        for stage in self.widths:
            for c_out in stage:
                layers += [nn.Conv2d(c_in, c_out, 3, padding=1), nn.ReLU()]
                c_in = c_out
            self.taps.append(len(layers) - 1)
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.taps:
                maps.append(x)
        return maps


class LPIPS(nn.Module):
    """Learned perceptual distance (arXiv 1801.03924): weighted squares of unit VGG16 features."""

    shift: Tensor
    scale: Tensor

    def __init__(self, vgg: Mapping[str, Tensor], heads: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.vgg = VGG16Features()
        self.heads = nn.ParameterList([torch.empty(1, s[-1], 1, 1) for s in VGG16Features.widths])
        try:
            convolutions = {k: v for k, v in vgg.items() if k.startswith("features.")}
            self.vgg.load_state_dict(convolutions)
            for i, head in enumerate(self.heads):
                head.data.copy_(heads[f"lin{i}.model.1.weight"])
        except (KeyError, RuntimeError) as error:
            raise UserError(
                "The files are not a torchvision VGG16 (features.0.weight, ...) with LPIPS heads "
                f"(lin0.model.1.weight, ...): {error}"
            ) from error
        # LPIPS's own constants for pictures in [-1, 1].
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        total = a.new_zeros(())
        for fa, fb, head in zip(self._maps(a), self._maps(b), self.heads, strict=True):
            difference = F.normalize(fa, dim=1, eps=1e-10) - F.normalize(fb, dim=1, eps=1e-10)
            total = total + (difference.square() * head).sum(1).mean()
        return total

    def _maps(self, x: Tensor) -> list[Tensor]:
        return self.vgg((x - self.shift) / self.scale)


class HFFeatures(nn.Module):
    """1 - cosine of the hidden states of any transformers vision backbone, averaged over layers."""

    mean: Tensor
    std: Tensor

    def __init__(self, path: str) -> None:
        super().__init__()
        if not Path(path).is_dir():
            raise UserError(f"perceptual_path {path!r} is not a folder with a transformers model.")
        try:
            from transformers import AutoModel
        except ImportError as error:
            raise UserError(
                "perceptual=hf needs transformers: pip install 'openchameleon[hf]'."
            ) from error
        self.backbone = AutoModel.from_pretrained(path, local_files_only=True)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        total, states_a, states_b = a.new_zeros(()), self._states(a), self._states(b)
        for sa, sb in zip(states_a, states_b, strict=True):
            channels = -1 if sa.dim() == 3 else 1  # (B, T, C) of a ViT, (B, C, h, w) of a convnet
            total = total + 1 - F.cosine_similarity(sa, sb, dim=channels).mean()
        return total / len(states_a)

    def _states(self, x: Tensor) -> tuple[Tensor, ...]:
        pixels = ((x + 1) / 2 - self.mean) / self.std
        return self.backbone(pixel_values=pixels, output_hidden_states=True).hidden_states


def _load(path: str, field: str) -> Mapping[str, Tensor]:
    if not Path(path).is_file():
        raise UserError(f"perceptual_{field} {path!r} is not a file; vgg_lpips needs its weights.")
    if path.endswith(".safetensors"):
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)
