"""Meta's layout <-> a checkpoint.

    params.json                 the shape, under "model"
    consolidate_params.json     the number of shards
    consolidated.pth            or consolidated.00.pth, .01, .. : tensor-parallel shards
    tokenizer/                  text_tokenizer.json, vqgan.yaml, vqgan.ckpt; also found beside the
                                folder of models, where the release has it

Names are ours already. A shard holds rows or columns of a matrix, whole norms, and a QK-norm of its
own: our groups.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from openchameleon.checkpoints.checkpoint import (
    MARK,
    Checkpoint,
    checked,
    checked_vq,
    config_of_mark,
    released_config,
    shapes_of,
    vocab_from_names,
    vq_shapes_of,
)
from openchameleon.checkpoints.fields import nested, read_json
from openchameleon.checkpoints.tensors import (
    Entry,
    Weights,
    entry_of,
    read_pickles,
    write_pickle,
)
from openchameleon.checkpoints.tokenizer_json import as_released
from openchameleon.config import to_dict
from openchameleon.errors import CheckpointError
from openchameleon.model.config import ModelConfig, ffn_dim_for
from openchameleon.model_folder import META_CONFIG, FolderConfig
from openchameleon.tokenizer.text import HFTokenizer
from openchameleon.vqgan.config import VQConfig

PARAMS, SHARDS_OF, TOKENIZER = META_CONFIG, "consolidate_params.json", "tokenizer"
CONTEXT = 4096  # of the released models; their files do not say

_ROWS = ("wq", "wk", "wv", "w1", "w3", "output")
_COLUMNS = ("tok_embeddings", "wo", "w2")


def read(folder: Path, allow_pickle: bool) -> Checkpoint:
    """A folder of one or several shards. CheckpointError names the file and the tensor.

    allow_pickle: their files are pickles. Another process reads them, for tensors alone; even so
    it must be wished.
    """
    if not allow_pickle:
        raise CheckpointError(
            f"{folder} holds pickles, which can run code when they are read; if you trust where it"
            " comes from, convert it with --allow-pickle (in Python, allow_pickle=True)."
        )
    params = read_json(folder / PARAMS)
    beside = read_json(folder / SHARDS_OF) if (folder / SHARDS_OF).is_file() else {}
    flat = {**params, **nested(params, "model", folder / PARAMS), **beside}
    tokenizer = _tokenizer_folder(folder)
    vqgan = tokenizer / "vqgan.ckpt"
    pickles = [*_shard_files(folder, flat), *([vqgan] if vqgan.is_file() else [])]
    shards = read_pickles(pickles)
    vq_found = shards.pop() if vqgan.is_file() else {}
    for shard in shards:
        shard.pop("rope.freqs", None)  # a buffer of theirs, computed from the shape
    shape = _shape(flat, shards, folder / PARAMS)
    weights = checked(_joined(shards, folder), shapes_of(shape), folder)
    vq, vq_weights = _image_tokenizer(vq_found, vqgan) if vq_found else (None, {})
    text = tokenizer / "text_tokenizer.json"
    if mark := nested(params, MARK, folder / PARAMS):
        unsaid = ("dropout", "embedding_std", "max_seq_len")
        config = config_of_mark(mark, shape, folder / PARAMS, unsaid)
        if nested(mark, "model", folder / PARAMS).get("tie_embeddings"):
            config, weights = _tied(config, weights)
    else:
        codes_per_item = (vq or VQConfig()).n_codes_per_image
        names, reads = HFTokenizer.names_in(text), HFTokenizer.from_file(text)
        vocab = vocab_from_names(names, reads, shape.vocab_size, codes_per_item, text)
        config = released_config(folder.name, vocab, shape, "tokenizer.json")
    return Checkpoint(config, weights, text, vq, vq_weights)


def _tied(config: FolderConfig, weights: Weights) -> tuple[FolderConfig, Weights]:
    """Tied again, as before it was written, unless the tables have since become different."""
    output, embeddings = weights["output.weight"], weights["tok_embeddings.weight"]
    if not torch.equal(output.read(), embeddings.read()):
        return config, weights
    weights = {name: entry for name, entry in weights.items() if entry is not output}
    return replace(config, model=replace(config.model, tie_embeddings=True)), weights


def _shard_files(folder: Path, params: Mapping[str, Any]) -> list[Path]:
    whole = folder / "consolidated.pth"
    files = [whole] if whole.is_file() else sorted(folder.glob("consolidated.[0-9][0-9].pth"))
    n = params.get("model_parallel_size") or len(files) or 1
    if not isinstance(n, int) or n < 1:
        raise CheckpointError(f"{folder / PARAMS} has model_parallel_size = {n!r}.")
    expected = [whole] if n == 1 and whole in files else [_shard(folder, i) for i in range(n)]
    for path in expected:
        if path not in files:
            raise CheckpointError(f"{path} is missing; {PARAMS} asks for {n} shards.")
    return expected


def _shard(folder: Path, i: int) -> Path:
    return folder / f"consolidated.{i:02}.pth"


def _shape(params: Mapping[str, Any], shards: list[Weights], where: Path) -> ModelConfig:
    try:
        dim, heads = int(params["dim"]), int(params["n_heads"])
        multiplier = params.get("ffn_dim_multiplier")
        qk_norm = bool(params.get("qk_normalization", False))
        vocab = shards[0].get("output.weight")
        return ModelConfig(
            dim=dim,
            n_layers=int(params["n_layers"]),
            n_heads=heads,
            n_kv_heads=int(params.get("n_kv_heads") or heads),
            vocab_size=vocab.shape[0] * len(shards)
            if vocab and vocab.shape
            else int(params["vocab_size"]),
            max_seq_len=CONTEXT,
            ffn_dim=int(params.get("ffn_dim") or 0)
            or ffn_dim_for(dim, int(params.get("multiple_of", 256)), multiplier),
            rope_theta=float(params.get("rope_theta", 1e4)),
            norm_eps=float(params.get("norm_eps", 1e-5)),
            norm_placement="output" if params.get("swin_norm") else "input",
            qk_norm=qk_norm,
            qk_norm_groups=len(shards) if qk_norm else 1,
        )
    except KeyError as error:
        raise CheckpointError(f"{where} has no key {error}.") from error
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: {error}") from error


def _axis(name: str) -> int | None:
    """The dimension along which shards hold parts of a tensor; None where each holds its own."""
    owner = name.rpartition(".")[0].rpartition(".")[2]
    return 0 if owner in _ROWS else 1 if owner in _COLUMNS else None


def _joined(shards: list[Weights], folder: Path) -> Weights:
    for i, shard in enumerate(shards):
        for name in shards[0].keys() ^ shard.keys():
            raise CheckpointError(f"{folder}: only one of shards 0 and {i} has {name}.")
    return {name: _join(name, [shard[name] for shard in shards]) for name in shards[0]}


def _join(name: str, parts: list[Entry]) -> Entry:
    if any(part.shape != parts[0].shape or part.dtype != parts[0].dtype for part in parts):
        raise CheckpointError(f"{parts[0].where} has another shape or type than in other shards.")
    first, axis = parts[0], _axis(name)
    if "_normalization." in name:
        shape = (len(parts), *first.shape)
        return Entry(
            shape, first.dtype, lambda: torch.stack([p.read() for p in parts]), first.where
        )
    if axis is None:
        return Entry(first.shape, first.dtype, lambda: _equal(parts), first.where)
    shape = tuple(n * len(parts) if i == axis else n for i, n in enumerate(first.shape))
    return Entry(
        shape, first.dtype, lambda: torch.cat([p.read() for p in parts], dim=axis), first.where
    )


def _equal(parts: list[Entry]) -> torch.Tensor:
    tensor = parts[0].read()
    for part in parts[1:]:
        if not torch.equal(part.read(), tensor):
            raise CheckpointError(f"{part.where} differs from shard 0, where both hold it whole.")
    return tensor


def _tokenizer_folder(folder: Path) -> Path:
    # The release keeps models/7b and models/30b beside one tokenizer/.
    places = [folder / TOKENIZER, folder.parent / TOKENIZER, folder.parent.parent / TOKENIZER]
    for place in places:
        if (place / "text_tokenizer.json").is_file():
            return place
    raise CheckpointError(
        f"No text_tokenizer.json in any of {', '.join(map(str, places))}; put the tokenizer there."
    )


def _image_tokenizer(found: Weights, path: Path) -> tuple[VQConfig, Weights]:
    where = path.with_suffix(".yaml")
    try:
        params = yaml.safe_load(where.read_text(encoding="utf-8"))["model"]["params"]
        sizes = params["ddconfig"]
        if sizes.get("double_z") or sizes.get("in_channels", 3) != 3:
            raise ValueError("double_z and other than three channels cannot be held")
        config = VQConfig(
            ch=int(sizes["ch"]),
            ch_mult=tuple(sizes["ch_mult"]),
            n_res_blocks=int(sizes["num_res_blocks"]),
            z_channels=int(sizes["z_channels"]),
            embed_dim=int(params["embed_dim"]),
            n_embed=int(params["n_embed"]),
            resolution=int(sizes["resolution"]),
            attn_resolutions=tuple(sizes.get("attn_resolutions") or ()),
            dropout=float(sizes.get("dropout", 0.0)),
        )
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where} does not describe a VQ-GAN: {error}.") from error
    ours = {name.removeprefix("state_dict."): entry for name, entry in found.items()}
    # The training's networks, averages and counters may lie beside the model.
    expected = vq_shapes_of(config)
    kept = {name: entry for name, entry in ours.items() if name in expected}
    return config, checked_vq(kept, config, path)


def write(checkpoint: Checkpoint, folder: Path, tick: Callable[[int], None]) -> None:
    """Writes one shard for each group of the QK-norm. CheckpointError for what has no place."""
    _refuse_what_has_no_place(checkpoint)
    config, shape = checkpoint.config, checkpoint.config.model
    n = shape.qk_norm_groups if shape.qk_norm else 1
    params = {
        "model": {
            "dim": shape.dim, "n_layers": shape.n_layers, "n_heads": shape.n_heads,
            "n_kv_heads": shape.n_kv_heads, "vocab_size": shape.vocab_size,
            "norm_eps": shape.norm_eps, "rope_theta": shape.rope_theta,
            "qk_normalization": shape.qk_norm, "swin_norm": shape.norm_placement == "output",
            **_ffn_params(shape),
        },
        "model_parallel_size": n,
        MARK: to_dict(config),
    }  # fmt: skip
    _write_json(folder / PARAMS, params)
    _write_json(folder / SHARDS_OF, {"model_parallel_size": n})
    weights = dict(checkpoint.weights)
    weights.setdefault("output.weight", weights["tok_embeddings.weight"])
    files = [folder / "consolidated.pth"] if n == 1 else [_shard(folder, i) for i in range(n)]
    for i, path in enumerate(files):
        shard = {name: _part(name, entry, i, n) for name, entry in weights.items()}
        write_pickle(shard | {"rope.freqs": entry_of(_frequencies(shape))}, path, tick=tick)
    _write_checklist(folder)
    _write_tokenizer(checkpoint, folder / TOKENIZER, tick)


def _refuse_what_has_no_place(checkpoint: Checkpoint) -> None:
    shape, vq = checkpoint.config.model, checkpoint.vq
    n = shape.qk_norm_groups if shape.qk_norm else 1
    for name, entry in checkpoint.weights.items():
        axis = _axis(name)
        if axis is not None and entry.shape[axis] % n:
            raise CheckpointError(
                f"Meta's layout has a shard for each of the {n} groups of the QK-norm, and"
                f" {name} {list(entry.shape)} cannot be cut into {n}."
            )
    if shape.rope_scaling is not None:
        raise CheckpointError(
            "Meta's layout has no place for stretched rotary positions (rope_scaling)."
        )
    if checkpoint.text.suffix != ".json":
        raise CheckpointError(
            f"Meta's layout has a byte-level tokenizer.json; {checkpoint.text.name} is a"
            " sentencepiece model, which it cannot hold."
        )
    if vq is None:
        return
    if not checkpoint.can_decode:
        raise CheckpointError(
            "Meta's vqgan.ckpt holds encoder and decoder; this checkpoint has no decoder.* tensors,"
            " so it cannot be written in that layout."
        )
    if (vq.stem, vq.encoder_kernel, vq.decoder_kernel, vq.mid_attention) != (1, 3, 3, True):
        raise CheckpointError(
            f"Meta's vqgan.ckpt has no place for encoder.conv_in.weight of a stem of {vq.stem} and"
            f" a kernel of {vq.encoder_kernel}; only published shapes can be written there."
        )


def _ffn_params(shape: ModelConfig) -> dict[str, int]:
    """`multiple_of`, where rounding up to it gives the width; Meta's files have no other way.

    Else the width itself, which this program reads back.
    """
    for multiple in (256, 128, 64, 32, 16, 8):
        if ffn_dim_for(shape.dim, multiple) == shape.ffn_dim:
            return {"multiple_of": multiple}
    return {"ffn_dim": shape.ffn_dim}


def _part(name: str, entry: Entry, i: int, n: int) -> Entry:
    axis = _axis(name)
    if "_normalization." in name:
        return entry.map(lambda groups: groups[i])
    return entry if axis is None or n == 1 else entry.map(lambda w: w.chunk(n, dim=axis)[i])


def _frequencies(shape: ModelConfig) -> torch.Tensor:
    steps = torch.arange(0, shape.head_dim, 2).float() / shape.head_dim
    return shape.rope_theta**-steps


def _write_tokenizer(checkpoint: Checkpoint, folder: Path, tick: Callable[[int], None]) -> None:
    folder.mkdir()
    text = as_released(checkpoint.text.read_bytes(), checkpoint.config.vocab.bos_id)
    (folder / "text_tokenizer.json").write_bytes(text)
    vq = checkpoint.vq
    if vq is not None:
        sizes = {
            "double_z": False, "z_channels": vq.z_channels, "resolution": vq.resolution,
            "in_channels": 3, "out_ch": 3, "ch": vq.ch, "ch_mult": list(vq.ch_mult),
            "num_res_blocks": vq.n_res_blocks, "attn_resolutions": list(vq.attn_resolutions),
            "dropout": vq.dropout,
        }  # fmt: skip
        params = {"embed_dim": vq.embed_dim, "n_embed": vq.n_embed, "ddconfig": sizes}
        text = yaml.safe_dump({"model": {"params": params}}, sort_keys=False)
        (folder / "vqgan.yaml").write_text(text, encoding="utf-8")
        write_pickle(checkpoint.vq_weights, folder / "vqgan.ckpt", "state_dict", tick)
    _write_checklist(folder)


def _write_checklist(folder: Path) -> None:
    """`md5  name` of each file, as the release has it."""
    lines = []
    for path in sorted(p for p in folder.iterdir() if p.is_file()):
        with path.open("rb") as file:
            lines.append(f"{hashlib.file_digest(file, 'md5').hexdigest()}  {path.name}\n")
    (folder / "checklist.chk").write_text("".join(lines), encoding="utf-8")


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
