"""Vector quantisation: the nearest codebook row, passed straight through. Knows no pixels."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def nearest(vectors: Tensor, codebook: Tensor, chunk: int = 8192) -> tuple[Tensor, Tensor]:
    """For each row of `vectors` (M, C): index of and squared distance to its nearest row.

    `codebook` is (N, C). Works on `chunk` rows at a time, so that the (M, N) table is never held.
    """
    lengths = codebook.square().sum(1)
    indices, distances = [], []
    for part in vectors.split(chunk):
        # |v - e|^2 less the |v|^2 that all entries share.
        low, index = (lengths - 2 * part @ codebook.T).min(dim=1)
        indices.append(index)
        distances.append((low + part.square().sum(1)).clamp(min=0))
    return torch.cat(indices), torch.cat(distances)


class VectorQuantizer(nn.Module):
    """`n_embed` codes of width `embed_dim`, compared by squared L2, un-normalised.

    The loss is the published one: mean (sg[z_q] - z)^2 + beta * mean (z_q - sg[z])^2; `beta`
    stands on the codebook term (VQ-VAE, arXiv 1711.00937, eq. 3 has it on the other).
    """

    def __init__(self, n_embed: int, embed_dim: int, beta: float) -> None:
        super().__init__()
        self.beta = beta
        self.embedding = nn.Embedding(n_embed, embed_dim)
        nn.init.uniform_(self.embedding.weight, -1 / n_embed, 1 / n_embed)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, C, h, w) -> z_q of that shape, whose gradient is z's; codes (B, h, w); loss."""
        codes = self.codes(z)
        z_q = self.vectors(codes)
        loss = (z_q.detach() - z).square().mean() + self.beta * (z_q - z.detach()).square().mean()
        return z + (z_q - z).detach(), codes, loss

    @torch.no_grad()
    def codes(self, z: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, h, w) int64. In float32, whatever autocast is on: ties are close."""
        rows = z.movedim(1, -1)
        with torch.autocast(z.device.type, enabled=False):
            index, _ = nearest(rows.flatten(0, 2).float(), self.embedding.weight.float())
        return index.view(rows.shape[:-1])

    def vectors(self, codes: Tensor) -> Tensor:
        """(B, h, w) int64 -> (B, C, h, w)."""
        return self.embedding(codes).movedim(-1, 1)

    @torch.no_grad()
    def restart(self, indices: Tensor, vectors: Tensor) -> None:
        """Overwrites the codebook's rows `indices` (M,) with `vectors` (M, C)."""
        if indices.shape[0] != vectors.shape[0]:
            raise ValueError(f"{indices.shape[0]} rows to restart, {vectors.shape[0]} vectors")
        self.embedding.weight[indices] = vectors.to(self.embedding.weight.dtype)
