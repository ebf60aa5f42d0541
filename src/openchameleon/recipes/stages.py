"""A recipe's stages: BPE, image tokenizer, prepare and train (bind, pretrain, tune), model folder.

Each stage writes one folder or file of the run and marks it with the hash of what made it: a
stage whose mark is right is skipped, so the same command goes on wherever it was cut off.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openchameleon.config import config_hash, to_dict
from openchameleon.data.loader import RowLoader
from openchameleon.data.prepare import prepare
from openchameleon.data.sources import count_records
from openchameleon.data.sources.bad import BadRecords
from openchameleon.data.workers import in_processes
from openchameleon.errors import UserError
from openchameleon.evaluation.world import quick_scores
from openchameleon.files import locked
from openchameleon.model.config import ModelConfig
from openchameleon.model.transformer import Transformer
from openchameleon.pipeline import Chameleon, FolderConfig
from openchameleon.progress import track
from openchameleon.recipes import pictures
from openchameleon.recipes.config import Recipe, StageConfig
from openchameleon.recipes.marks import is_done, make_once, mark_of
from openchameleon.recipes.sample import write_sample
from openchameleon.tokenizer.image import ImageTokenizer
from openchameleon.tokenizer.mixed import MixedTokenizer
from openchameleon.tokenizer.text import load_text_tokenizer, train_text_tokenizer
from openchameleon.train.checkpoint import checkpoint_hash, load_checkpoint
from openchameleon.train.image_tokenizer import run_hash, train_image_tokenizer
from openchameleon.train.loop import fit
from openchameleon.train.metrics import plot_metrics
from openchameleon.vocab import Vocab
from openchameleon.world.sample import MIXTURE, TEXTS_VERSION

TEXT, IMAGE, MODEL, SAMPLE = "tokenizer.model", "image_tokenizer", "model", "sample"


def run_recipe(recipe: Recipe, out: Path) -> Path:
    """Runs what is not done yet of `recipe` in the folder `out`; returns the model folder.

    UserError where `out` holds the stages of another config, is in use, or lies among the data, or
    where torchrun has started several processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            f"The recipe {recipe.name!r} trains its tokenizers too, which one process does: run it"
            " without torchrun. A pretraining on prepared streams, such as pretrain_7b, takes many."
        )
    if recipe.data and out.resolve().is_relative_to(pictures.data_folder(recipe.data).resolve()):
        raise UserError(f"--out {out} lies inside the data folder {recipe.data}; name another.")
    with locked(out):
        model = _run_stages(seeded(recipe), out)
        (out / "recipe.json").write_text(json.dumps(to_dict(recipe), indent=2) + "\n")
        return model


def _run_stages(recipe: Recipe, out: Path) -> Path:
    """`run_recipe` of a seeded recipe, in a folder that is locked."""
    source = (pictures.fingerprint(recipe), recipe.seed)
    codes = (recipe.vq.n_embed, recipe.vq.n_codes_per_image)
    text = config_hash(recipe.text, MIXTURE, TEXTS_VERSION, *codes, *source)
    image = config_hash(run_hash(recipe.vq, recipe.vq_train), recipe.foreign_pictures, *source)
    make_once(out / TEXT, text, lambda: train_text(recipe, out / TEXT))
    make_once(out / IMAGE, image, lambda: train_image(recipe, out, image))
    tokenizers = config_hash(text, image, recipe.row_len, recipe.picture_first)
    before: Path | None = None
    for name, stage in recipe.stages().items():
        prepare_streams = prepare_data if recipe.data else prepare_rows
        rows = prepare_streams(recipe, name, stage, out, tokenizers)
        before = train_stage(recipe, name, stage, out, rows, before)
    assert before is not None
    tokenizer = load_tokenizer(recipe, out)
    model = Transformer(model_config(recipe))
    load_weights(model, before)
    chameleon = Chameleon(folder_config(recipe), model, tokenizer)
    chameleon.save(out / MODEL, dtype="bfloat16")
    if recipe.data:
        shown, mark = pictures.named(recipe), checkpoint_hash(before)
        make_once(out / SAMPLE, mark, lambda: write_sample(chameleon, shown, out / SAMPLE))
    return out / MODEL


def seeded(recipe: Recipe) -> Recipe:
    """The recipe with its seed added to those of its parts, so that one number changes all."""
    seed = recipe.seed

    def stage(config: StageConfig) -> StageConfig:
        return replace(config, train=replace(config.train, seed=config.train.seed + seed))

    stages: dict[str, Any] = {name: stage(run) for name, run in recipe.stages().items()}
    vq_train = replace(recipe.vq_train, seed=recipe.vq_train.seed + seed)
    return replace(recipe, vq_train=vq_train, **stages)


def device() -> str:
    """Where the training runs: the GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def code_ids(vocab: Vocab) -> Tensor:
    """(V,) bool: which ids are codes."""
    ids = torch.zeros(vocab.size, dtype=torch.bool)
    for codes in vocab.code_ranges:
        ids[codes.first_id : codes.stop_id] = True
    return ids


def vocab_of(recipe: Recipe) -> Vocab:
    """The id space that the two tokenizers share."""
    return Vocab.compact(recipe.vq.n_embed, recipe.vq.n_codes_per_image, recipe.text.n_text)


def model_config(recipe: Recipe) -> ModelConfig:
    """The recipe's model with the size of its vocabulary filled in."""
    return replace(recipe.model, vocab_size=vocab_of(recipe).size)


def folder_config(recipe: Recipe) -> FolderConfig:
    """`config.json` of the model that the recipe makes."""
    shape = model_config(recipe)
    return FolderConfig(
        recipe.name,
        vocab_of(recipe),
        shape,
        sampling=recipe.sampling,
        picture_first=recipe.picture_first,
        examples=() if recipe.data else recipe.examples,
    )


def train_text(recipe: Recipe, path: Path) -> None:
    """Trains the BPE on the texts of the source."""
    texts = pictures.texts(recipe)
    vq = recipe.vq
    train_text_tokenizer(texts, recipe.text.n_text, vq.n_embed, vq.n_codes_per_image).save(path)


def train_image(recipe: Recipe, out: Path, mark: str) -> None:
    """Trains the image tokenizer, going on from its last checkpoint of the same `mark`."""
    model = train_image_tokenizer(
        recipe.vq,
        recipe.vq_train,
        pictures.picture_source(recipe),
        pictures.foreground,
        out / "runs" / IMAGE,
        device(),
        data=mark,
    )
    ImageTokenizer(model, recipe.vq).save(out / IMAGE)


def load_tokenizer(recipe: Recipe, out: Path) -> MixedTokenizer:
    """Both tokenizers of a run, as one."""
    text, image = load_text_tokenizer(out / TEXT), ImageTokenizer.load(out / IMAGE)
    return MixedTokenizer(vocab_of(recipe), text, image, recipe.picture_first)


def prepare_data(
    recipe: Recipe, name: str, stage: StageConfig, out: Path, tokenizers: str
) -> dict[Path, float]:
    """Packed rows of the data folder, with their weights.

    `picture_share` makes two streams: of the records with pictures, and of those without.
    """
    mark = config_hash(
        tokenizers, name, pictures.fingerprint(recipe), recipe.seed, stage.answers_only
    )
    share = recipe.picture_share
    parts: dict[str, tuple[bool | None, float]] = {"000": (None, 1.0)}
    if share is not None and pictures.has_both_kinds(recipe):
        parts = {"pictures": (True, share), "texts": (False, 1 - share)}
    rows = {}
    for part, (pictured, weight) in parts.items():
        folder = out / "rows" / f"{name}-{part}"
        rows[folder] = weight
        if not is_done(folder, mark):
            _prepare_part(recipe, stage, out, folder, pictured)
            mark_of(folder).write_text(mark)
    return rows


def _prepare_part(
    recipe: Recipe, stage: StageConfig, out: Path, rows: Path, pictured: bool | None
) -> None:
    """Packs the records of the data folder that have pictures, have none, or (None) all."""
    assert recipe.data is not None
    shutil.rmtree(rows, ignore_errors=True)  # whole, but not marked: of a run that was cut off
    listing = rows.with_name(f"{rows.name}.bad.jsonl")
    listing.unlink(missing_ok=True)
    bad = BadRecords(recipe.bad, recipe.data, listing)
    prepare(
        Path(recipe.data) if pictured is None else pictures.of_kind(recipe, bad, pictured),
        load_tokenizer(recipe, out),
        rows,
        recipe.row_len,
        answers_only=stage.answers_only,
        n_records=count_records(recipe.data),
        bad=bad,
    )
    if bad.n_bad:
        print(
            f"{recipe.data}: {bad.n_bad} of {bad.n_records} records are left out, see {listing}",
            file=sys.stderr,
        )


def prepare_rows(
    recipe: Recipe, name: str, stage: StageConfig, out: Path, tokenizers: str
) -> dict[Path, float]:
    """Packed rows of the samples, shard by shard in `workers` processes, all of weight 1."""
    data = (stage.mixture, stage.shard_size, stage.answers_only, stage.foreign_share)
    mark = config_hash(tokenizers, name, pictures.fingerprint(recipe), recipe.seed, *data)
    n_shards = stage.n_shards
    jobs = [(recipe, name, stage, out, mark, shard) for shard in range(n_shards)]
    if recipe.workers > 1 and n_shards > 1:
        done = in_processes(_prepare_shard, jobs, recipe.workers)
        rows = list(track(done, f"prepare {name}", n_shards, "shards"))
    else:
        rows = [prepare_shard(*job) for job in jobs]
    return dict.fromkeys(rows, 1.0)


def _prepare_shard(job: tuple[Recipe, str, StageConfig, Path, str, int]) -> Path:
    return prepare_shard(*job)


def prepare_shard(
    recipe: Recipe, name: str, stage: StageConfig, out: Path, mark: str, shard: int
) -> Path:
    """Samples one shard into a folder of records and pictures, and packs it into rows."""
    rows = out / "rows" / f"{name}-{shard:03}"
    if is_done(rows, mark):
        return rows
    shutil.rmtree(rows, ignore_errors=True)  # as in `_prepare_part`
    source = out / "samples" / f"{name}-{shard:03}"
    made_by = config_hash(
        name, shard, pictures.fingerprint(recipe), recipe.seed, stage.mixture,
        stage.shard_size, stage.foreign_share,
    )  # fmt: skip
    if not is_done(source, made_by):
        pictures.write_shard(recipe, name, stage, shard, source)
        mark_of(source).write_text(made_by)
    tokenizer = load_tokenizer(recipe, out)
    prepare(source, tokenizer, rows, recipe.row_len, answers_only=stage.answers_only)
    mark_of(rows).write_text(mark)
    return rows


def train_stage(
    recipe: Recipe,
    name: str,
    stage: StageConfig,
    out: Path,
    rows: dict[Path, float],
    before: Path | None,
) -> Path:
    """Trains the transformer for one stage; returns its last checkpoint."""
    config = model_config(recipe)
    model = Transformer(config)
    if before is None:
        model.init_weights(recipe.seed)
    else:
        load_weights(model, before)
    streams = {path.name: (path, weight) for path, weight in rows.items()}
    loader = RowLoader(streams, stage.train.batch_size, stage.train.seed)
    run = out / "runs" / name
    checkpoint = fit(
        model.to(device()),
        loader,
        stage.train,
        stage.optim,
        run,
        is_code=code_ids(vocab_of(recipe)),
        hooks=_hooks(recipe, out),
        begun_from=checkpoint_hash(before) if before else None,
    )
    plot_metrics(run / "metrics.jsonl", run / "curves.png")
    return checkpoint


def _hooks(recipe: Recipe, out: Path) -> dict[str, Callable[[Transformer, int], dict[str, float]]]:
    """Scores on a few fresh scenes while training; none with a data folder of one's own."""
    if recipe.data:
        return {}
    config, tokenizer = folder_config(recipe), load_tokenizer(recipe, out)

    def score(model: Transformer, step: int) -> dict[str, float]:
        return quick_scores(Chameleon(config, model, tokenizer), recipe.preset.name)

    return {"world": score}


def load_weights(model: Transformer, checkpoint: Path) -> None:
    """The weights alone of a run's checkpoint, its optimizer left behind."""
    tensors, _ = load_checkpoint(checkpoint)
    prefix = "model/"
    model.load_state_dict(
        {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    )
