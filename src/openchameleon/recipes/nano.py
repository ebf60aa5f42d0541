"""The embedded model: 96 x 96 pictures of 36 codes, on a laptop.

    openchameleon train nano

Hardware: two CPU cores. Time and expected scores: docs/nano.md.
"""

from __future__ import annotations

from openchameleon.inference.params import ModalityParams, SamplingParams
from openchameleon.model.config import PRESETS as MODEL_PRESETS
from openchameleon.recipes.config import Recipe, StageConfig, TextConfig
from openchameleon.train.loop import TrainConfig
from openchameleon.train.optim import OptimConfig
from openchameleon.train.step import LossConfig
from openchameleon.train.vq_step import VQTrainConfig
from openchameleon.vqgan.config import PRESETS as VQ_PRESETS
from openchameleon.world.sample import MIXTURE

# The world's mixture with more of what takes tens of thousands of examples: to find what is named,
# and to draw what a sentence leaves of the picture before it (docs/LOG.md).
PRETRAIN = MIXTURE | {
    "draw": 0.18,
    "draw_pair": 0.05,
    "caption": 0.08,
    "inventory": 0.12,
    "quiz": 0.13,
    "drill": 0.22,
    "changes": 0.15,
}

# Instructions, nearly all of it, as people will give them, and more of what is learned last: to
# find and count what is named, and to tell a story whose pictures carry on.
TUNE = {
    "draw": 0.23,
    "unconditional": 0.02,
    "caption": 0.09,
    "question": 0.06,
    "quiz": 0.12,
    "drill": 0.16,
    "changes": 0.03,
    "story_turn": 0.13,
    "program_draw": 0.03,
    "program_read": 0.03,
    "talk": 0.05,
    "dialog": 0.05,
}


def recipe() -> Recipe:
    return Recipe(
        name="nano",
        world="nano",
        text=TextConfig(n_text=1400),
        vq=VQ_PRESETS["nano"],
        vq_train=VQTrainConfig(
            steps=4500,
            batch_size=16,
            lr=1e-3,
            lr_min_ratio=0.03,
            warmup=50,
            betas=(0.9, 0.95),
            foreground_weight=4.0,
            perceptual="none",
            autoencoder_warmup_steps=600,
            kmeans_samples=25_000,
            kmeans_iters=8,
            restart_every=100,
            restart_until=3600,
            save_every=250,
        ),
        model=MODEL_PRESETS["nano"],
        row_len=384,
        bind=StageConfig(
            train=TrainConfig(
                steps=1000,
                batch_size=5,
                loss=LossConfig(code_weight=0.1),
                log_every=50,
                save_every=100,
            ),
            optim=OptimConfig(lr=4e-3, matrices="muon", warmup_steps=50, decay="constant"),
            mixture={"inventory": 1.0},
            n_shards=2,
            shard_size=11_000,
            foreign_share=0.1,
        ),
        pretrain=StageConfig(
            train=TrainConfig(
                steps=3000, batch_size=5, log_every=50, save_every=250, eval_every=1000
            ),
            optim=OptimConfig(
                lr=4e-3, matrices="muon", warmup_steps=50, decay="cosine", min_lr_ratio=0.3
            ),
            mixture=PRETRAIN,
            n_shards=5,
            shard_size=12_000,
            foreign_share=0.2,
        ),
        tune=StageConfig(
            train=TrainConfig(
                steps=2900,
                batch_size=5,
                loss=LossConfig(code_weight=0.5),
                log_every=50,
                save_every=250,
                eval_every=1000,
            ),
            optim=OptimConfig(
                lr=4e-3, matrices="muon", warmup_steps=50, decay="cosine", min_lr_ratio=0.02
            ),
            mixture=TUNE,
            n_shards=4,
            shard_size=13_500,
        ),
        sampling=SamplingParams(
            text=ModalityParams(temperature=0.3), image=ModalityParams(temperature=0.1)
        ),
        examples=(
            "Draw a cat at the top left and a pizza at the bottom right.",
            "Tell a story about a rocket.",
            "Draw a dog at the top.",
            "What can you do?",
        ),
    )
