"""A small model of a folder of files of one's own: captioned pictures, texts, source code.

    openchameleon train files data=FOLDER --out runs/mine

From files to a BPE, an image tokenizer, packed rows, a model, and a page of what it writes
(`runs/mine/sample/sample.md`).

Hardware: one CPU core. Time: under 8 minutes for 4 MB of files. Losses after it, and what the page
shows: docs/training.md.
"""

from __future__ import annotations

from openchameleon.data.sources.bad import BadPolicy
from openchameleon.inference.params import ModalityParams, SamplingParams
from openchameleon.model.config import ModelConfig, ffn_dim_for
from openchameleon.recipes.config import Recipe, StageConfig, TextConfig
from openchameleon.train.loop import TrainConfig
from openchameleon.train.optim import OptimConfig
from openchameleon.train.vq_step import VQTrainConfig
from openchameleon.vqgan.config import VQConfig


def recipe() -> Recipe:
    return Recipe(
        name="files",
        world=None,
        bad=BadPolicy("skip", limit=0.1),
        picture_share=0.5,
        text=TextConfig(n_text=2048),
        vq=VQConfig(
            ch=32,
            ch_mult=(1, 2),
            n_res_blocks=1,
            z_channels=32,
            embed_dim=16,
            n_embed=1024,
            resolution=64,
            stem=4,
            mid_attention=False,
        ),
        vq_train=VQTrainConfig(
            steps=600,
            batch_size=16,
            lr=1e-3,
            warmup=50,
            betas=(0.9, 0.95),
            autoencoder_warmup_steps=150,
            kmeans_samples=16_000,
            restart_every=50,
            restart_until=500,
            save_every=100,
        ),
        model=ModelConfig(
            dim=128,
            n_layers=4,
            n_heads=4,
            n_kv_heads=4,
            vocab_size=3079,
            max_seq_len=512,
            ffn_dim=ffn_dim_for(128),
            norm_placement="output",
            embedding_std=1.0,
        ),
        row_len=512,
        pretrain=StageConfig(
            train=TrainConfig(steps=500, batch_size=4, log_every=10, save_every=100),
            optim=OptimConfig(
                lr=4e-3, matrices="muon", warmup_steps=50, decay="cosine", min_lr_ratio=0.05
            ),
            mixture={},
            n_shards=1,
            shard_size=0,
            answers_only=False,
        ),
        sampling=SamplingParams(
            text=ModalityParams(temperature=0.7), image=ModalityParams(temperature=0.7)
        ),
    )
