"""k-means in torch: the codebook's first values are the centres of what the encoder puts out."""

from __future__ import annotations

import torch
from torch import Tensor

from openchameleon.vqgan.quantize import nearest


@torch.no_grad()
def kmeans(vectors: Tensor, n_clusters: int, n_iters: int, seed: int) -> Tensor:
    """Centres (n_clusters, C) of `vectors` (M, C): k-means++ seeding, then Lloyd iterations.

    A centre left without vectors moves to one of the worst-served vectors. ValueError with fewer
    vectors than clusters.
    """
    if len(vectors) < n_clusters:
        raise ValueError(f"{len(vectors)} vectors are too few for {n_clusters} clusters")
    generator = torch.Generator().manual_seed(seed)
    centres = _seed_centres(vectors, n_clusters, generator)
    for _ in range(n_iters):
        index, distance = nearest(vectors, centres)
        counts = torch.bincount(index, minlength=n_clusters)
        sums = torch.zeros_like(centres).index_add_(0, index, vectors)
        centres = sums / counts.clamp(min=1).unsqueeze(1)
        empty = (counts == 0).nonzero().flatten()
        centres[empty] = vectors[distance.topk(len(empty)).indices]
    return centres


def _seed_centres(vectors: Tensor, n_clusters: int, generator: torch.Generator) -> Tensor:
    """k-means++: each next centre drawn with probability as the squared distance to the others.

    Pictures are mostly background: centres drawn uniformly would nearly all be the same.
    """
    lengths = vectors.square().sum(1)

    def distance_to(i: int) -> Tensor:
        return (lengths + lengths[i] - 2 * vectors @ vectors[i]).clamp(min=0)

    chosen = [int(torch.randint(len(vectors), (1,), generator=generator))]
    distance = distance_to(chosen[0])
    while len(chosen) < n_clusters:
        # The floor keeps the draw possible where fewer distinct vectors than clusters exist.
        weights = distance.cpu().double().clamp(min=1e-12).cumsum(0)
        draw = torch.rand((), generator=generator, dtype=torch.float64) * weights[-1]
        chosen.append(min(int(torch.searchsorted(weights, draw)), len(vectors) - 1))
        distance = torch.minimum(distance, distance_to(chosen[-1]))
    return vectors[chosen].clone()
