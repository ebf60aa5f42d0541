"""The larger world: 128 x 128 pictures of 64 codes, 225 emoji on 8 backgrounds, for one GPU.

    openchameleon train small

Hardware: one GPU of 24 GB or more. Not run yet: no time and no scores are known.
"""

from __future__ import annotations

from dataclasses import replace

from openchameleon.model.config import PRESETS as MODEL_PRESETS
from openchameleon.recipes import nano
from openchameleon.recipes.config import Recipe, TextConfig
from openchameleon.vqgan.config import PRESETS as VQ_PRESETS


def recipe() -> Recipe:
    base = nano.recipe()
    assert base.bind is not None
    assert base.tune is not None
    bind = replace(
        base.bind,
        train=replace(base.bind.train, steps=2000, batch_size=64, dtype="bfloat16"),
        n_shards=16,
    )
    pretrain = replace(
        base.pretrain,
        train=replace(base.pretrain.train, steps=30_000, batch_size=64, dtype="bfloat16"),
        optim=replace(base.pretrain.optim, lr=1e-3, warmup_steps=1000),
        n_shards=64,
    )
    tune = replace(
        base.tune,
        train=replace(base.tune.train, steps=5000, batch_size=64, dtype="bfloat16"),
        optim=replace(base.tune.optim, lr=2e-4),
        n_shards=16,
    )
    return replace(
        base,
        name="small",
        world="small",
        text=TextConfig(n_text=2048),
        vq=VQ_PRESETS["small"],
        vq_train=replace(
            base.vq_train,
            steps=30_000,
            batch_size=64,
            kmeans_samples=60_000,
            autoencoder_warmup_steps=3000,
            restart_until=24_000,
        ),
        model=replace(MODEL_PRESETS["small"], tie_embeddings=False, embedding_std=1.0),
        bind=bind,
        pretrain=pretrain,
        tune=tune,
        row_len=768,
        workers=8,
    )
