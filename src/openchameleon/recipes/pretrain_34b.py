"""The paper's 34B (arXiv 2405.09818, sections 2.2 and 2.3, Table 1), on streams of one's own.

    openchameleon train pretrain_34b tokenizer=TOKENIZERS streams.text=ROWS streams.pairs=ROWS ..

As `pretrain_7b`, but for the shape, with norms behind the branches and grouped queries, no dropout,
and batches of 3,072 rows.

Not run here. The paper: 3,072 A100 of 80 GB, 4,282,407 GPU-hours (58.1 days if nothing stops), for
9.2T tokens, which is 597 tokens a second and GPU; a loss below the 7B's throughout (its Figure 6).
"""

from __future__ import annotations

from dataclasses import replace

from openchameleon.model.config import PRESETS
from openchameleon.recipes import pretrain_7b
from openchameleon.recipes.config import Pretraining


def recipe() -> Pretraining:
    base, model, batch_size = pretrain_7b.recipe(), PRESETS["34b"], 3072
    steps = pretrain_7b.steps_for(batch_size, model.max_seq_len)
    return replace(
        base,
        name="pretrain_34b",
        model=model,
        train=replace(base.train, steps=steps, batch_size=batch_size),
    )
