"""The shape and the optimizer of `nano` learn to find a name among codes, which others do not.

And from answers right behind the name they learn to answer a word later as well, which from such
answers alone they do not (docs/LOG.md). Marked slow: it trains for three minutes.
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
WORD = CODE + 4 * N_NAMES
VOCAB_SIZE = WORD + 1


def sequence(rng: np.random.Generator, n_words: int) -> list[int]:
    """A picture of one to six objects, four codes each; then names, each with its cell.

    `n_words` words stand between a name and its cell.
    """
    n = rng.integers(1, 7)
    names, cells = rng.choice(N_NAMES, n, replace=False), rng.permutation(GRID * GRID)[:n]
    picture = np.full((2 * GRID, 2 * GRID), EMPTY)
    for name, cell in zip(names, cells, strict=True):
        row, column = 2 * (cell // GRID), 2 * (cell % GRID)
        picture[row : row + 2, column : column + 2] = CODE + 4 * name + np.arange(4).reshape(2, 2)
    asked = rng.integers(0, n, N_QUESTIONS)
    words = np.full((N_QUESTIONS, n_words), WORD)
    exchanges = np.column_stack([NAME + names[asked], words, PLACE + cells[asked]])
    return [0, *picture.flatten().tolist(), *exchanges.flatten().tolist()]


def make_batch(rng: np.random.Generator, size: int, n_words: int) -> Batch:
    """Only the cells are to be learned."""
    ids = torch.tensor([sequence(rng, n_words) for _ in range(size)])
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
    for step in range(1100):
        lr = config.lr * min(1.0, (step + 1) / 50)
        batches = [make_batch(rng, 8, n_words) for n_words in (0, 1)]
        train_step(model, optimizer, batches, LossConfig(), lr=lr, grad_clip=1.0, is_code=is_code)
    for n_words in (0, 1):
        fresh = make_batch(rng, 200, n_words)
        with torch.no_grad():
            right = model(fresh.inputs).argmax(-1) == fresh.targets
        assert right[fresh.loss_weights > 0].float().mean() > 0.9  # a guess among them: 0.4
