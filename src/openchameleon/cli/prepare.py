"""Makes rows of token ids to train on out of pictures with captions, texts, code and documents.

A source is a folder of real files, records.jsonl, WebDataset tars or parquet files, here or at an
address that fsspec opens. What was cut off goes on when the same command is given again.

  openchameleon prepare pictures code --model nano --out rows
  openchameleon prepare s3://bucket/tars --model model --out rows --on-bad skip --dedup near
  openchameleon prepare shards/*.parquet --model model --out rows --executor slurm \\
    --executor-option partition=gpu --executor-option time=12:00:00

docs/data.md says what each source looks like, and what becomes of records that cannot be used.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from openchameleon.errors import UserError

if TYPE_CHECKING:
    from openchameleon.tokenizer.mixed import MixedTokenizer

KINDS = ("folder", "jsonl", "webdataset", "parquet")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("sources", nargs="+", metavar="SOURCE", help="folders, files or addresses, in their order")
    add(
        "--model",
        required=True,
        help="whose tokenizer: an embedded name, a model's folder, or one of tokenizers alone",
    )
    add("--out", type=Path, required=True, metavar="DIR", help="the folder of shards")
    add("--row-len", type=int, metavar="N", help="tokens in a row (the model's longest)")
    add("--kind", choices=KINDS, help="what the sources are (by their names and files)")
    add(
        "--pairs",
        choices=("documents", "chat"),
        default="documents",
        help="a picture with its caption: text of either order, or an answer (%(default)s)",
    )
    add(
        "--on-bad",
        choices=("raise", "skip"),
        default="raise",
        help="what a record that cannot be used does (%(default)s)",
    )
    add(
        "--bad-limit",
        type=float,
        default=0.001,
        metavar="SHARE",
        help="with skip: stop beyond this share of the records (%(default)s)",
    )
    add(
        "--min-side",
        type=int,
        default=0,
        metavar="PX",
        help="leave out records with a picture that has a shorter side",
    )
    add(
        "--max-aspect",
        type=float,
        default=0,
        metavar="R",
        help="leave out records with a picture that is more than R times as long as wide",
    )
    add(
        "--dedup",
        choices=("none", "exact", "near"),
        default="none",
        help="keep the first of equal records, or of nearly equal texts too (%(default)s)",
    )
    add(
        "--files-a-shard",
        type=int,
        default=1000,
        metavar="N",
        help="files of a plain folder that are prepared as one (%(default)s)",
    )
    add("--workers", type=int, metavar="N", help="processes (one for each core)")
    add(
        "--device",
        choices=("cpu", "cuda"),
        help="where pictures become codes (a GPU if there is one)",
    )
    add("--allow-pickle", action="store_true", help="for a model in Meta's layout")
    add(
        "--executor",
        choices=("local", "slurm", "ray"),
        default="local",
        help="who runs the work (%(default)s: processes of this machine)",
    )
    add("--executor-option", action="append", default=[], metavar="KEY=VALUE",
        help="for slurm and ray: an argument of datatrove's executor")  # fmt: skip


def run(options: argparse.Namespace) -> int:
    import torch

    from openchameleon.data.corpus import (
        CorpusConfig,
        local,
        plan_corpus,
        prepare_corpus,
        refuse_other,
    )
    from openchameleon.data.sources import shards_of
    from openchameleon.data.sources.bad import BadPolicy
    from openchameleon.files import locked
    from openchameleon.pipeline import load_tokenizer

    if options.executor == "local" and options.executor_option:
        raise UserError("--executor-option is for slurm and ray; name one by --executor.")
    for name in ("workers", "files_a_shard"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least 1.")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("There is no GPU that PyTorch can use; leave --device out.")
    refuse_other(options.out)
    for source in options.sources:
        if options.out.resolve().is_relative_to(Path(source).resolve()):
            raise UserError(f"--out {options.out} lies inside the source {source}; name another.")
    shards = [
        shard
        for source in options.sources
        for shard in shards_of(source, options.kind, options.files_a_shard)
    ]
    tokenizer = load_tokenizer(options.model, "cpu", options.allow_pickle).fingerprint()
    row_len = _longest(options) if options.row_len is None else options.row_len
    try:
        config = CorpusConfig(row_len, options.pairs, True, options.min_side, options.max_aspect,
                              options.dedup)  # fmt: skip
        bad = BadPolicy(options.on_bad, options.bad_limit)
    except ValueError as error:
        raise UserError(str(error)) from error
    load = partial(_load, options.model, options.device, options.allow_pickle)
    workers = options.workers or torch.get_num_threads()
    with locked(options.out):
        corpus = plan_corpus(shards, options.out, config, tokenizer, load, bad)
        if options.executor == "local":
            manifest = prepare_corpus(corpus, local(workers))
        else:
            from openchameleon.data.engine import on_cluster

            run_there = on_cluster(options.executor, workers, options.executor_option)
            manifest = prepare_corpus(corpus, run_there)
    if manifest is None:
        print(f"{options.out}: handed to {options.executor}; the same command goes on afterwards.")
        return 0
    print(
        f"{options.out}: {manifest['n_tokens']:,} tokens of {manifest['n_documents']:,} documents"
        f" in {manifest['n_rows']:,} rows, {manifest['fill']:.1%} full; {manifest['n_bad']:,} of"
        f" {manifest['n_records']:,} records were bad. See report.md there."
    )
    return 0


def _longest(options: argparse.Namespace) -> int:
    """The longest sequence of the model."""
    from openchameleon.checkpoints.convert import open_checkpoint
    from openchameleon.model_folder import CONFIG, TEXT_TOKENIZER, find_model

    folder = Path(options.model)
    if (folder / TEXT_TOKENIZER).is_file() and not (folder / CONFIG).is_file():
        raise UserError(f"{folder} holds tokenizers alone: give --row-len, the tokens of a row.")
    checkpoint = open_checkpoint(find_model(options.model), options.allow_pickle)
    return checkpoint.config.model.max_seq_len


def _load(model: str, device: str | None, allow_pickle: bool) -> MixedTokenizer:
    """In a worker: the tokenizer, its pictures to become codes on the device at hand."""
    from openchameleon.pipeline import load_tokenizer

    return load_tokenizer(model, device, allow_pickle)
