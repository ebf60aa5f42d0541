"""The paper's 7B (arXiv 2405.09818, sections 2.2 and 2.3, Table 1), on streams of one's own.

    openchameleon train pretrain_7b tokenizer=TOKENIZERS streams.text=ROWS streams.pairs=ROWS ..

`TOKENIZERS` is a folder of tokenizers and each `ROWS` one that `prepare` wrote with them, in rows
of 4,096 tokens (docs/training.md).

Not run here. The paper: 1,024 A100 of 80 GB, 856,481 GPU-hours (34.9 days if nothing stops), for
9.2T tokens, which is 2,984 tokens a second and GPU; a loss near 2.8 after 600,000 steps (read off
its Figure 6).

What the paper leaves open is ours: the weights within the first mixture, here those of its tokens;
the streams of the second; at which rate the learning rate decays "to 0", here to a hundredth.
"""

from __future__ import annotations

from openchameleon.model.config import PRESETS
from openchameleon.recipes.config import Pretraining
from openchameleon.train.loop import TrainConfig
from openchameleon.train.optim import OptimConfig

TOKENS = 9.2e12
"""Of the whole training: 2.1 epochs of the 4.4T of Table 1."""


def steps_for(batch_size: int, row_len: int) -> int:
    """The steps in which batches of so many rows show `TOKENS`."""
    return round(TOKENS / (batch_size * row_len))


def recipe() -> Pretraining:
    model, batch_size = PRESETS["7b"], 2048
    return Pretraining(
        name="pretrain_7b",
        tokenizer="tokenizers",
        model=model,
        train=TrainConfig(
            steps=steps_for(batch_size, model.max_seq_len),
            batch_size=batch_size,
            micro_batch_size=1,
            dtype="bfloat16",
            compile=True,
            save_every=1000,
        ),
        optim=OptimConfig(
            lr=1e-4,
            betas=(0.9, 0.95),
            eps=1e-5,
            weight_decay=0.1,
            warmup_steps=4000,
            decay="exponential",
            min_lr_ratio=0.01,
            grad_clip=1.0,
        ),
        streams={
            name: f"rows/{name}"
            for name in ("text", "pairs", "interleaved", "better", "instructions")
        },
        first={"text": 2.9, "pairs": 1.5, "interleaved": 0.4},
    )
