"""PatchGAN: one real-or-fake logit for each overlapping patch of a picture."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """(B, 3, P, P) in [-1, 1] -> logits (B, 1, p, p), positive = real.

    pix2pix (arXiv 1611.07004): `n_layers` halvings by 4 x 4 convolutions, two more at stride 1,
    batch norm on all but the first and last, leaky ReLU 0.2, weights from N(0, 0.02). With three
    layers a logit sees 70 x 70 pixels.
    """

    smallest_side = 24  # of a picture that three layers leave one logit of

    def __init__(self, ch: int = 64, n_layers: int = 3) -> None:
        super().__init__()
        widths = [ch * min(2**i, 8) for i in range(n_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(3, ch, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i, (c_in, c_out) in enumerate(pairwise(widths), start=1):
            stride = 2 if i < n_layers else 1
            layers += [
                nn.Conv2d(c_in, c_out, 4, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(c_out),
                nn.LeakyReLU(0.2),
            ]
        layers.append(nn.Conv2d(widths[-1], 1, 4, stride=1, padding=1))
        self.layers = nn.Sequential(*layers)
        self.apply(_initialise)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.layers(pixels)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
