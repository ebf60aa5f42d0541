"""Where a recipe's pictures, texts and samples come from: the world, or a folder of one's own."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
import torch
from torch import Tensor

from openchameleon.data.sources import data_files, file_stamps, named_records
from openchameleon.data.sources.bad import BadRecords
from openchameleon.document import Record, Text, documents_of
from openchameleon.errors import UserError
from openchameleon.image_io import square
from openchameleon.recipes.config import STAGES, Recipe, StageConfig
from openchameleon.tokenizer.mixed import fitted
from openchameleon.train.image_tokenizer import Pictures
from openchameleon.world.foreign import render_foreign
from openchameleon.world.render import render
from openchameleon.world.sample import (
    MIXTURE,
    all_texts,
    sample_records,
    write_samples,
)
from openchameleon.world.splits import WORLD_VERSION, dense_scene

NAME_REPEATS = 60


def fingerprint(recipe: Recipe) -> list[object]:
    """Changes with what there is to learn from: the world's scenes, or a folder's files.

    Of a folder's, those that are read as data count, by name, size and time.
    """
    if not recipe.data:
        return [recipe.preset.name, WORLD_VERSION]
    folder = data_folder(recipe.data)
    return file_stamps(data_files(folder), folder)


def data_folder(data: str) -> Path:
    """Where the data lie: the folder itself, or the one that a records' file is in."""
    return Path(data).parent if Path(data).is_file() else Path(data)


def named(recipe: Recipe, bad: BadRecords | None = None) -> Iterator[tuple[str, Record]]:
    """The records of the data folder that can be used, in their order, by their names in it."""
    assert recipe.data is not None
    folder = f"{data_folder(recipe.data)}/"
    bad = bad or BadRecords(recipe.bad, recipe.data)
    for name, record in named_records(recipe.data, "chat", bad):
        yield name.removeprefix(folder), record


def of_kind(recipe: Recipe, bad: BadRecords, pictured: bool) -> Iterator[Record]:
    """Those with pictures, or those without."""
    return (record for _, record in named(recipe, bad) if _has_pictures(record) == pictured)


def has_both_kinds(recipe: Recipe) -> bool:
    """Whether there are records with pictures and records without."""
    seen = set()
    for _, record in named(recipe):
        seen.add(_has_pictures(record))
        if len(seen) == 2:
            return True
    return False


def _has_pictures(record: Record) -> bool:
    return any(document.images for document in documents_of(record))


def picture_source(recipe: Recipe) -> Pictures:
    """What the image tokenizer learns from: a pure function (step, batch size) -> uint8 batch."""
    return _folder_pictures(recipe) if recipe.data else _world_pictures(recipe)


def _world_pictures(recipe: Recipe) -> Pictures:
    preset = recipe.preset

    def batch(step: int, batch_size: int) -> Tensor:
        images = []
        for index in range(step * batch_size, (step + 1) * batch_size):
            scene = dense_scene(recipe.seed * 10**9 + index, preset)
            rng = Random(f"{recipe.seed}/{index}")
            foreign = rng.random() < recipe.foreign_pictures
            picture = render_foreign(scene, preset, rng) if foreign else render(scene, preset)
            images.append(np.asarray(picture))
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)

    return batch


def _folder_pictures(recipe: Recipe) -> Pictures:
    side = recipe.vq.resolution
    pictures = [
        np.asarray(square(pil, side, fit))
        for _, record in named(recipe)
        for document, fit in fitted(record)
        for pil in document.images
    ]
    if not pictures:
        raise UserError(f"{recipe.data} holds no pictures to train an image tokenizer on.")
    stack = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)

    def batch(step: int, batch_size: int) -> Tensor:
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
        return stack[torch.randint(len(stack), (batch_size,), generator=generator)]

    return batch


def foreground(pictures: Tensor) -> Tensor:
    """(B, 3, P, P) uint8 -> (B, 1, P, P): 1 where a pixel is not of the picture's main colour.

    The main colour is the median of the border: most of a picture is background, and all that
    matters is not.
    """
    border = torch.cat(
        [pictures[..., 0, :], pictures[..., -1, :], pictures[..., 0], pictures[..., -1]], dim=-1
    )
    main = border.float().median(dim=-1).values[..., None, None]
    return ((pictures.float() - main).abs().amax(1, keepdim=True) > 12).float()


def texts(recipe: Recipe) -> Iterator[str]:
    """The texts that the BPE learns from."""
    if recipe.data:
        for _, record in named(recipe):
            yield from _texts(record)
        return
    preset = recipe.preset
    # Names alone as well, often: a name should be one piece, whatever stands before it.
    for name in preset.emoji:
        yield from [name, f" {name}"] * NAME_REPEATS
    yield from all_texts(preset, MIXTURE, recipe.text.n_samples, recipe.seed)


def write_shard(recipe: Recipe, name: str, stage: StageConfig, shard: int, folder: Path) -> None:
    """One shard of a stage's samples, as `world sample` writes them; begun anew if half there."""
    shutil.rmtree(folder, ignore_errors=True)
    preset = recipe.preset
    seed = (recipe.seed * len(STAGES) + STAGES.index(name)) * 4096 + shard
    samples = sample_records(
        preset,
        "train",
        stage.mixture,
        stage.shard_size,
        seed,
        foreign_share=stage.foreign_share,
    )
    write_samples(folder, samples, stage.shard_size, preset)


def _texts(record: Record) -> list[str]:
    return [s.text for d in documents_of(record) for s in d if isinstance(s, Text)]
