"""The embedded model: 96 x 96 pictures of 36 codes, on a laptop.

    openchameleon train nano

Hardware: two CPU cores. Time and expected scores: docs/nano.md.
"""

from __future__ import annotations

from openchameleon.inference.params import ModalityParams, SamplingParams
from openchameleon.model.config import ModelConfig
from openchameleon.recipes.config import Recipe, StageConfig, TextConfig
from openchameleon.train.loop import TrainConfig
from openchameleon.train.optim import OptimConfig
from openchameleon.train.step import LossConfig
from openchameleon.train.vq_step import VQTrainConfig
from openchameleon.vqgan.config import PRESETS as VQ_PRESETS
from openchameleon.world.sample import MIXTURE

# Instructions only, as people will give them, and many questions to a picture: an answer is two
# tokens among a hundred, and finding a name in a picture is learned last.
TUNE = {
    "draw": 0.2,
    "unconditional": 0.02,
    "caption": 0.1,
    "question": 0.06,
    "quiz": 0.3,
    "story_turn": 0.16,
    "program_draw": 0.04,
    "program_read": 0.05,
    "talk": 0.04,
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
        model=ModelConfig(
            dim=256,
            n_layers=6,
            n_heads=8,
            n_kv_heads=8,
            vocab_size=1,  # filled in from the tokenizers
            max_seq_len=512,
            ffn_dim=704,
            norm_placement="input",
            tie_embeddings=True,
        ),
        row_len=384,
        pretrain=StageConfig(
            train=TrainConfig(
                steps=4500, batch_size=5, log_every=50, save_every=250, eval_every=1000
            ),
            optim=OptimConfig(lr=2e-3, warmup_steps=200, decay="cosine", min_lr_ratio=0.2),
            mixture=MIXTURE,
            n_shards=8,
            shard_size=14_000,
        ),
        tune=StageConfig(
            train=TrainConfig(
                steps=1200,
                batch_size=5,
                loss=LossConfig(code_weight=0.25),
                log_every=50,
                save_every=250,
                eval_every=600,
            ),
            optim=OptimConfig(lr=8e-4, warmup_steps=50, decay="cosine", min_lr_ratio=0.02),
            mixture=TUNE,
            n_shards=2,
            shard_size=12_000,
        ),
        sampling=SamplingParams(
            text=ModalityParams(temperature=0.3), image=ModalityParams(temperature=0.1)
        ),
    )
