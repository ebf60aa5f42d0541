"""A text-only Llama of Hugging Face's layout -> a mixed-modal model, ready to be trained.

Its text ids and their rows stay; behind them come the control ids that it lacks, a picture's begin
and end, and the codes of an image tokenizer. Without QK-norm the logits of text are the source's.
"""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openchameleon.checkpoints.checkpoint import Checkpoint, shapes_of
from openchameleon.checkpoints.fields import hub_shape, read_json
from openchameleon.checkpoints.hf import by_our_names
from openchameleon.checkpoints.native import read_image_tokenizer
from openchameleon.checkpoints.rotary import pairs_from_halves
from openchameleon.checkpoints.tensors import Entry, Weights, entry_of, read_safetensors
from openchameleon.errors import CheckpointError
from openchameleon.model.config import ModelConfig
from openchameleon.model_folder import CONFIG, FolderConfig
from openchameleon.tokenizer.text import HFTokenizer
from openchameleon.vocab import CodeRange, Vocab
from openchameleon.vqgan.config import VQConfig

NOISE = 0.02
"""New rows of the output head are the mean row with noise of this part of the rows' deviation."""


def read(folder: Path, image_tokenizer: Path, qk_norm: bool, seed: int = 0) -> Checkpoint:
    """The warm start from `folder`, with the pictures of `image_tokenizer`, a folder of ours.

    New embeddings are drawn with the mean and deviation of the old ones. New rows of the output
    head are nearly the mean of the old ones, so that no new id is likely and none is impossible
    before training. qk_norm: adds the paper's norms, with weight 1, which changes the text
    function.
    CheckpointError names the file, and the key or tensor, that cannot be held.
    """
    data = read_json(folder / CONFIG)
    if data.get("model_type") != "llama":
        raise CheckpointError(f"{folder / CONFIG} is of a {data.get('model_type')!r}, not a llama.")
    vq, vq_weights = read_image_tokenizer(image_tokenizer)
    theirs = read_safetensors(folder)
    text = folder / "tokenizer.json"
    if not text.is_file():
        raise CheckpointError(f"{text} is missing; a tokenizer.model alone cannot be carried over.")
    embeddings = theirs.get("model.embed_tokens.weight")
    if embeddings is None or not embeddings.shape:
        raise CheckpointError(f"{folder} has no table model.embed_tokens.weight.")
    vocab = _grown(data, HFTokenizer.from_file(text), embeddings.shape[0], vq, folder / CONFIG)
    shape = hub_shape(
        data, folder / CONFIG, max_seq_len=2048, norm_eps=1e-6,
        vocab_size=vocab.size, qk_norm=qk_norm,
    )  # fmt: skip
    source = replace(shape, vocab_size=embeddings.shape[0], qk_norm=False)
    weights = _ours(by_our_names(theirs, source, folder), shape, seed)
    config = FolderConfig(folder.name, vocab, shape, text_tokenizer=text.name)
    return Checkpoint(config, weights, text, vq, vq_weights)


def _grown(data: dict[str, Any], text: HFTokenizer, n_old: int, vq: VQConfig, where: Path) -> Vocab:
    """Old ids as they are; new ones, from `n_old` on, for what a text model has none of."""
    ids: dict[str, int] = {}
    following = n_old + 1  # the first new id stays free: the hub has a placeholder of pictures
    for key in ("bos", "pad", "eos", "unk", "eot"):
        old = data.get(f"{key}_token_id")
        old = old[0] if isinstance(old, list) and old else old
        taken = old in ids.values() or (isinstance(old, int) and old < 0)
        if isinstance(old, int) and not taken:
            ids[key] = old
        else:
            ids[key], following = following, following + 1
    codes = CodeRange("image", following, following + 1, following + 2, vq.n_embed,
                      vq.n_codes_per_image)  # fmt: skip
    try:
        return Vocab(
            codes.stop_id,
            text.text_start,
            text.text_stop,
            (codes,),
            **{f"{key}_id": i for key, i in ids.items()},
        )
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}.") from error


def _ours(found: Weights, shape: ModelConfig, seed: int) -> Weights:
    made: Weights = {}
    dtype = found["norm.weight"].dtype
    for name, size in shapes_of(shape).items():
        if "_normalization." in name:
            plain = torch.full(size, float(name.endswith("weight")), dtype=dtype)
            made[name] = entry_of(plain, name)
        elif name.endswith(("wq.weight", "wk.weight")):
            made[name] = found[name].map(lambda w: pairs_from_halves(w, shape.head_dim))
        elif name in ("tok_embeddings.weight", "output.weight"):
            # A tied table is the head too, where a new id must not be likely.
            embeds = name == "tok_embeddings.weight" and not shape.tie_embeddings
            noise = 1.0 if embeds else NOISE
            made[name] = _extended(found[name], size, noise, f"{seed}/{name}")
        else:
            made[name] = found[name]
    return made


def _extended(entry: Entry, size: tuple[int, ...], noise: float, seed: str) -> Entry:
    """The old rows, and new ones around their mean, with `noise` of their deviation."""

    def read() -> Tensor:
        old = entry.read()
        deviation, mean = torch.std_mean(old.float(), dim=0)
        generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
        new = torch.randn(size[0] - old.shape[0], size[1], generator=generator)
        return torch.cat([old, (mean + noise * deviation * new).to(old.dtype)])

    return Entry(size, entry.dtype, read, entry.where)
