"""Runs a pretraining: streams of rows -> a transformer -> a model folder that loads.

    runs/NAME/rows/        the streams that the run makes for itself, if there are any
    runs/NAME/run/         checkpoints, metrics.jsonl, curves.png
    runs/NAME/model/       the model, with the tokenizers that it was given
    runs/NAME/recipe.json  what was run

A run that was cut off goes on from its last checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from openchameleon.config import config_hash, to_dict
from openchameleon.data.loader import Loader
from openchameleon.data.phases import PhasedLoader
from openchameleon.data.prepare import prepare
from openchameleon.document import Record
from openchameleon.errors import UserError
from openchameleon.model.config import ModelConfig
from openchameleon.model.transformer import Transformer
from openchameleon.model_folder import FolderConfig, Outputs
from openchameleon.pipeline import Chameleon, load_tokenizer
from openchameleon.recipes.config import Pretraining, WorldStream
from openchameleon.recipes.marks import make_once
from openchameleon.recipes.stages import MODEL, code_ids, device
from openchameleon.tokenizer.mixed import MixedTokenizer
from openchameleon.tokenizer.text import HFTokenizer
from openchameleon.train.loop import fit
from openchameleon.train.metrics import plot_metrics
from openchameleon.train.run_folder import differences, locked
from openchameleon.vocab import Vocab
from openchameleon.world.atlas import PRESETS
from openchameleon.world.sample import TEXTS_VERSION, sample_records
from openchameleon.world.splits import WORLD_VERSION

_PROBE = 4  # samples that tell one tokenizer's rows from another's


def run_pretraining(recipe: Pretraining, out: Path) -> Path:
    """Trains what `recipe` says in the folder `out`; returns the model folder.

    UserError where `out` holds the run of another recipe or is in use, or where the streams do not
    fit the recipe's tokenizers or model.
    """
    with locked(out):
        tokenizer = load_tokenizer(recipe.tokenizer)
        loader = open_streams(recipe, tokenizer, out)
        start = Chameleon.from_pretrained(recipe.tokenizer, "cpu") if recipe.from_weights else None
        model = make_model(recipe, tokenizer.vocab, start)
        train_model(recipe, model, loader, tokenizer.vocab, out / "run")
        # What was begun with another's weights writes no more than that may.
        outputs = start.config.outputs if start else _outputs(tokenizer)
        config = folder_config(recipe, tokenizer, model.config, outputs)
        Chameleon(config, model, tokenizer).save(out / MODEL, dtype="bfloat16")
        (out / "recipe.json").write_text(json.dumps(to_dict(recipe), indent=2) + "\n")
        return out / MODEL


def open_streams(recipe: Pretraining, tokenizer: MixedTokenizer, out: Path) -> PhasedLoader:
    """The streams, in the mixtures of both stages; those of the world are made in `out` first."""
    context = recipe.model.max_seq_len
    folders: dict[str, Path] = {}
    for i, (name, stream) in enumerate(recipe.streams.items()):
        if isinstance(stream, WorldStream):
            folders[name] = out / "rows" / name
            _make_rows(stream, i, tokenizer, folders[name], context)
        else:
            folders[name] = Path(stream)
    loader = PhasedLoader(folders, recipe.phases(), recipe.train.batch_size, recipe.train.seed)
    if loader.row_len > context:
        raise UserError(
            f"The rows have {loader.row_len} tokens, the model a context of {context}: set"
            f" model.max_seq_len={loader.row_len}, or prepare shorter rows."
        )
    if any(
        r.manifest["vocab"] != config_hash(tokenizer.vocab.to_dict()) for r in loader.rows.values()
    ):
        raise UserError(
            f"The streams were not prepared with the tokenizers of {recipe.tokenizer}: name the"
            " ones that they were prepared with as `tokenizer`, or prepare them again."
        )
    return loader


def _make_rows(
    stream: WorldStream, number: int, tokenizer: MixedTokenizer, rows: Path, row_len: int
) -> None:
    """Samples of the world as rows, unless they are there; every token of them is learned."""

    def records(n: int) -> Iterator[Record]:
        samples = sample_records(PRESETS[stream.world], "train", stream.mixture, n, seed=number)
        return (sample.record for sample in samples)

    def make() -> None:
        shutil.rmtree(rows, ignore_errors=True)  # whole, but not marked: of a run that was cut off
        n = stream.n_samples
        prepare(records(n), tokenizer, rows, row_len, answers_only=False, n_records=n)

    # The first samples' ids stand for the tokenizers, wherever these come from.
    probe = tokenizer.encode_many(list(records(_PROBE)), answers_only=False)
    versions = (WORLD_VERSION, TEXTS_VERSION)
    make_once(rows, config_hash(stream, number, row_len, versions, [ids for ids, _ in probe]), make)


def make_model(recipe: Pretraining, vocab: Vocab, start: Chameleon | None = None) -> Transformer:
    """The model before its first step, on the CPU: with fresh weights, or with those of `start`.

    UserError where `start` has another shape.
    """
    config = replace(recipe.model, vocab_size=vocab.size)
    model = Transformer(config)
    if start is None:
        model.init_weights(recipe.train.seed)
        return model
    theirs = replace(
        start.config.model,
        max_seq_len=config.max_seq_len,
        dropout=config.dropout,
        embedding_std=config.embedding_std,
    )
    if changes := differences(to_dict(theirs), to_dict(config)):
        raise UserError(
            f"{recipe.tokenizer} has another shape than `model`: {'; '.join(changes)}. Give its"
            " values, or from_weights=false."
        )
    model.load_state_dict(start.model.state_dict())
    return model


def train_model(
    recipe: Pretraining, model: Transformer, loader: Loader, vocab: Vocab, run: Path
) -> Path:
    """Trains `model` in place and draws the curves; returns its last checkpoint."""
    checkpoint = fit(
        model.to(device()),
        loader,
        recipe.train,
        recipe.optim,
        run,
        is_code=code_ids(vocab),
        begun_from=_weights_hash(model) if recipe.from_weights else None,
    )
    plot_metrics(run / "metrics.jsonl", run / "curves.png")
    return checkpoint


def folder_config(
    recipe: Pretraining, tokenizer: MixedTokenizer, model: ModelConfig, outputs: Outputs
) -> FolderConfig:
    """`config.json` of the model that the recipe makes."""
    suffix = ".json" if isinstance(tokenizer.text, HFTokenizer) else ".model"
    return FolderConfig(
        recipe.name,
        tokenizer.vocab,
        model,
        outputs,
        sampling=recipe.sampling,
        text_tokenizer=f"tokenizer{suffix}",
        picture_first=tokenizer.picture_first,
    )


def _outputs(tokenizer: MixedTokenizer) -> Outputs:
    """What a model that is trained here from nothing may write: all that it can."""
    return ("text", "image") if tokenizer.image and tokenizer.image.can_decode else ("text",)


def _weights_hash(model: Transformer) -> str:
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
