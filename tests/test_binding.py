"""The shape and the optimizer of `nano` learn to find a name among codes, which others do not.

Marked slow: it trains for about a minute.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from openchameleon.data.loader import Batch
from openchameleon.model.config import PRESETS
from openchameleon.model.transformer import Transformer
from openchameleon.recipes.nano import recipe
from openchameleon.train.optim import make_optimizer
from openchameleon.train.step import LossConfig, train_step

N_NAMES, N_QUESTIONS, GRID = 144, 10, 3
NAME = 10
PLACE = NAME + N_NAMES
EMPTY = PLACE + GRID * GRID
CODE = EMPTY + 1
VOCAB_SIZE = CODE + 4 * N_NAMES


def sequence(rng: np.random.Generator) -> list[int]:
    """A picture of one to six objects, four codes each; then names, each with its cell."""
    n = rng.integers(1, 7)
    names, cells = rng.choice(N_NAMES, n, replace=False), rng.permutation(GRID * GRID)[:n]
    picture = np.full((2 * GRID, 2 * GRID), EMPTY)
    for name, cell in zip(names, cells, strict=True):
        row, column = 2 * (cell // GRID), 2 * (cell % GRID)
        picture[row : row + 2, column : column + 2] = CODE + 4 * name + np.arange(4).reshape(2, 2)
    asked = rng.integers(0, n, N_QUESTIONS)
    pairs = np.stack([NAME + names[asked], PLACE + cells[asked]], axis=1)
    return [0, *picture.flatten().tolist(), *pairs.flatten().tolist()]


def make_batch(rng: np.random.Generator, size: int) -> Batch:
    """Only the cells are to be learned."""
    ids = torch.tensor([sequence(rng) for _ in range(size)])
    inputs, targets = ids[:, :-1], ids[:, 1:]
    is_cell = (targets >= PLACE) & (targets < EMPTY)
    positions = torch.arange(inputs.shape[1]).expand_as(inputs)
    return Batch(inputs, targets, is_cell.float(), positions, torch.ones_like(inputs))


@pytest.mark.slow
def test_nano_learns_to_find_a_name_among_codes() -> None:
    shape = replace(
        PRESETS["nano"], dim=128, n_layers=4, n_heads=4, n_kv_heads=4, ffn_dim=336,
        vocab_size=VOCAB_SIZE,
    )  # fmt: skip
    model, config = Transformer(shape), recipe().pretrain.optim
    model.init_weights(seed=0)
    optimizer, rng = make_optimizer(model, config), np.random.default_rng(0)
    is_code = torch.arange(VOCAB_SIZE) >= EMPTY
    for step in range(500):
        lr = config.lr * min(1.0, (step + 1) / 50)
        batch = make_batch(rng, 16)
        train_step(model, optimizer, [batch], LossConfig(), lr=lr, grad_clip=1.0, is_code=is_code)
    fresh = make_batch(rng, 200)
    with torch.no_grad():
        right = model(fresh.inputs).argmax(-1) == fresh.targets
    assert right[fresh.loss_weights > 0].float().mean() > 0.9  # a guess among the objects: 0.4
