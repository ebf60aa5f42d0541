"""Hugging Face's Chameleon layout <-> a checkpoint.

Their rotary pairs are halves of a head where ours are neighbours, so the rows of the query and key
projections and of the QK-norm are permuted; their QK-norm holds a row for every head where ours
holds one for each group. They have no decoder of pictures: what is written has it beside, in
`image_tokenizer/`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from openchameleon.checkpoints import native
from openchameleon.checkpoints.checkpoint import (
    MARK,
    Checkpoint,
    checked,
    checked_vq,
    config_of_mark,
    names_of_codes,
    released_config,
    shapes_of,
    vocab_from_names,
)
from openchameleon.checkpoints.fields import (
    hub_shape,
    nested,
    read_json,
    require,
    rope_keys,
    whole_number,
)
from openchameleon.checkpoints.rotary import halves_from_pairs, pairs_from_halves
from openchameleon.checkpoints.tensors import (
    Entry,
    Weights,
    read_safetensors,
    write_safetensors,
)
from openchameleon.checkpoints.tokenizer_json import as_hub, names_for_hub
from openchameleon.config import to_dict
from openchameleon.errors import CheckpointError
from openchameleon.model.config import ModelConfig
from openchameleon.model_folder import CONFIG, IMAGE_TOKENIZER
from openchameleon.tokenizer.text import HFTokenizer
from openchameleon.vocab import Vocab
from openchameleon.vqgan.config import VQConfig

TOKENIZER = "tokenizer.json"
VQ = "model.vqmodel."

_TOP = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_IN_LAYER = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention.q_normalization": "self_attn.q_norm",
    "attention.k_normalization": "self_attn.k_norm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def name_of(ours: str) -> str:
    """Their name of one of the transformer's parameters."""
    if ours in _TOP:
        return _TOP[ours]
    _, layer, *middle, kind = ours.split(".")
    return f"model.layers.{layer}.{_IN_LAYER['.'.join(middle)]}.{kind}"


def read(folder: Path) -> Checkpoint:
    """A folder of safetensors, sharded or not, with the config keys of any version.

    CheckpointError names the file and the tensor or key that is wrong.
    """
    data = read_json(folder / CONFIG)
    if data.get("model_type") != "chameleon":
        raise CheckpointError(
            f"{folder / CONFIG} is of a {data.get('model_type')!r}, no chameleon."
        )
    theirs = read_safetensors(folder)
    shape = _shape(data, folder / CONFIG)
    vq, vq_weights = _image_tokenizer(data, theirs, folder)
    found = by_our_names({n: e for n, e in theirs.items() if not n.startswith(VQ)}, shape, folder)
    shape = replace(shape, qk_norm_groups=_groups(found, shape))
    mark = nested(data, MARK, folder / CONFIG)
    text = folder / Path(str(mark.get("text_tokenizer", TOKENIZER))).name
    if not text.is_file():
        raise CheckpointError(f"{text} is missing.")
    if mark:
        config = config_of_mark(mark, shape, folder / CONFIG)
    else:
        vocab = _vocab(data, text, shape.vocab_size, vq, folder)
        config = released_config(folder.name, vocab, shape, TOKENIZER)
    return Checkpoint(config, _ours(found, shape), text, vq, vq_weights)


def by_our_names(theirs: Weights, shape: ModelConfig, folder: Path) -> Weights:
    """The transformer's tensors under our names, with their rows still in their order.

    CheckpointError for one that lacks, has no place, or has another shape than the config says.
    """
    expected = {name_of(name): name for name in shapes_of(shape)}
    for name, entry in theirs.items():
        if name not in expected and not _is_implied(name, shape):
            raise CheckpointError(f"{entry.where} has no place in a model of its config.")
    found = {ours: theirs[name] for name, ours in expected.items() if name in theirs}
    return checked(found, _their_shapes(shape), folder)


def _is_implied(name: str, shape: ModelConfig) -> bool:
    """Tensors of older files that the config says already."""
    tied = shape.tie_embeddings and name == _TOP["output.weight"]
    return tied or name.endswith("rotary_emb.inv_freq")


def _their_shapes(shape: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Theirs by our names: a norm has a row for each head."""
    rows = {"q_normalization": shape.n_heads, "k_normalization": shape.n_kv_heads}
    return {
        name: (rows[owner], shape.head_dim) if (owner := name.split(".")[-2]) in rows else size
        for name, size in shapes_of(shape).items()
    }


def _shape(data: Mapping[str, Any], where: Path) -> ModelConfig:
    """The shape, with as many groups of norms as the config says."""
    return hub_shape(
        data,
        where,
        max_seq_len=4096,
        norm_eps=1e-5,
        vocab_size=whole_number(data, "vocab_size", 65536, where),
        norm_placement="output" if data.get("swin_norm") else "input",
        qk_norm_groups=whole_number(data, "model_parallel_size", 1, where) or 1,
    )


def _groups(found: Weights, shape: ModelConfig) -> int:
    """The least number of groups, from the stated one up, whose heads share their norms.

    Fine-tuning can have moved the norms of single heads apart.
    """
    norms = [entry for name, entry in found.items() if "_normalization." in name]
    apart = ""
    for n in range(shape.qk_norm_groups, shape.n_kv_heads + 1):
        if shape.n_kv_heads % n == 0:
            apart = next((e.where for e in norms if not _shared(e, n)), "")
            if not apart:
                return n
    raise CheckpointError(
        f"{apart} differs between heads that share their keys, so no group of heads can hold it."
    )


def _shared(entry: Entry, n_groups: int) -> bool:
    groups = entry.read().unflatten(0, (n_groups, -1))
    return bool((groups == groups[:, :1]).all())


def _ours(found: Weights, shape: ModelConfig) -> Weights:
    def change(name: str) -> Callable[[Tensor], Tensor] | None:
        if name.endswith(("wq.weight", "wk.weight")):
            return lambda w: pairs_from_halves(w, shape.head_dim)
        if "_normalization." in name:
            return lambda heads: _pairs_of_groups(heads, shape)
        return None

    changes = {name: change(name) for name in found}
    return {n: e.map(c) if (c := changes[n]) is not None else e for n, e in found.items()}


def _pairs_of_groups(heads: Tensor, shape: ModelConfig) -> Tensor:
    """(heads, D) -> (groups, D): the first head of each group."""
    groups = heads.unflatten(0, (shape.qk_norm_groups, -1))[:, 0]
    return pairs_from_halves(groups.T, shape.head_dim).T


def _image_tokenizer(
    data: Mapping[str, Any], theirs: Weights, folder: Path
) -> tuple[VQConfig | None, Weights]:
    """The one beside, which has a decoder, else theirs."""
    if (folder / IMAGE_TOKENIZER).is_dir():
        return native.read_image_tokenizer(folder / IMAGE_TOKENIZER)
    found = {n.removeprefix(VQ): e for n, e in theirs.items() if n.startswith(VQ)}
    if not found:
        return None, {}
    config = _vq_config(nested(data, "vq_config", folder / CONFIG), folder / CONFIG)
    return config, checked_vq(found, config, folder)


_VQ_KEYS = {
    "ch": ("base_channels", "ch"),
    "ch_mult": ("channel_multiplier", "ch_mult"),
    "n_res_blocks": ("num_res_blocks",),
    "z_channels": ("latent_channels", "z_channels"),
    "embed_dim": ("embed_dim",),
    "n_embed": ("num_embeddings", "n_embed"),
    "resolution": ("resolution",),
    "attn_resolutions": ("attn_resolutions",),
    "dropout": ("dropout",),
}
"""Ours -> theirs, the newest first."""


def _vq_config(data: Mapping[str, Any], where: Path) -> VQConfig:
    require(data, {"double_latent": False, "double_z": False, "in_channels": 3}, where)
    values: dict[str, Any] = {}
    for ours, keys in _VQ_KEYS.items():
        value = next((data[key] for key in keys if data.get(key) is not None), None)
        if value is not None:
            values[ours] = tuple(value) if isinstance(value, list) else value
    try:
        return VQConfig(**values, mid_attention=data.get("attn_type", "vanilla") == "vanilla")
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where}, vq_config: {error}") from error


def _vocab(
    data: Mapping[str, Any], text: Path, size: int, vq: VQConfig | None, folder: Path
) -> Vocab:
    codes_per_item = (vq or VQConfig()).n_codes_per_image
    names = nested(data, "vocabulary_map", folder / CONFIG) or HFTokenizer.names_in(text)
    tokenizer = HFTokenizer.from_file(text)
    return vocab_from_names(names, tokenizer, size, codes_per_item, folder)


def write(checkpoint: Checkpoint, folder: Path, tick: Callable[[int], None]) -> None:
    """Writes their layout. CheckpointError, before anything is written, for what it cannot hold."""
    _refuse_what_has_no_place(checkpoint)
    shape = checkpoint.config.model
    theirs = {name_of(n): _theirs(n, e, shape) for n, e in checkpoint.weights.items()}
    for name, entry in checkpoint.vq_weights.items():
        if not name.startswith("decoder."):
            theirs[VQ + name] = entry
    config = json.dumps(_config(checkpoint), indent=2)
    (folder / CONFIG).write_text(config + "\n", encoding="utf-8")
    _write_tokenizer(checkpoint, folder)
    write_safetensors(theirs, folder, tick=tick)
    if checkpoint.can_decode:
        native.write_image_tokenizer(checkpoint, folder / IMAGE_TOKENIZER, tick)


def _refuse_what_has_no_place(checkpoint: Checkpoint) -> None:
    shape, vq = checkpoint.config.model, checkpoint.vq
    if not shape.qk_norm:
        raise CheckpointError(
            "Hugging Face's Chameleon always has a QK-norm (layers.0.attention.q_normalization);"
            " this model has none, so it cannot be written in that layout."
        )
    if vq is None:
        raise CheckpointError(
            "Hugging Face's layout needs an image tokenizer; this model has none."
        )
    if (vq.stem, vq.encoder_kernel) != (1, 3):
        raise CheckpointError(
            f"Hugging Face's encoder has no place for encoder.conv_in.weight of a stem of {vq.stem}"
            f" and a kernel of {vq.encoder_kernel}; only published shapes can be written there."
        )


def _theirs(name: str, entry: Entry, shape: ModelConfig) -> Entry:
    if name.endswith(("wq.weight", "wk.weight")):
        return entry.map(lambda w: halves_from_pairs(w, shape.head_dim))
    if "_normalization." in name:
        heads = shape.n_heads if ".q_" in name else shape.n_kv_heads
        each = heads // shape.qk_norm_groups
        return entry.map(
            lambda g: halves_from_pairs(g.T, shape.head_dim).T.repeat_interleave(each, dim=0)
        )
    return entry


def _config(checkpoint: Checkpoint) -> dict[str, Any]:
    config, shape, vq = checkpoint.config, checkpoint.config.model, checkpoint.vq
    assert vq is not None
    vocab = config.vocab
    return {
        "architectures": ["ChameleonForConditionalGeneration"],
        "model_type": "chameleon",
        "hidden_size": shape.dim,
        "intermediate_size": shape.ffn_dim,
        "num_hidden_layers": shape.n_layers,
        "num_attention_heads": shape.n_heads,
        "num_key_value_heads": shape.n_kv_heads,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_seq_len,
        "rms_norm_eps": shape.norm_eps,
        **rope_keys(shape),
        "swin_norm": shape.norm_placement == "output",
        "model_parallel_size": shape.qk_norm_groups,
        "tie_word_embeddings": shape.tie_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": vocab.bos_id,
        "pad_token_id": vocab.pad_id,
        "eos_token_id": vocab.eos_id,
        "dtype": str(checkpoint.dtype).removeprefix("torch."),
        "vocabulary_map": _vocabulary_map(checkpoint),
        "vq_config": {
            "model_type": "chameleon_vqgan",
            "base_channels": vq.ch,
            "channel_multiplier": list(vq.ch_mult),
            "num_res_blocks": vq.n_res_blocks,
            "latent_channels": vq.z_channels,
            "embed_dim": vq.embed_dim,
            "num_embeddings": vq.n_embed,
            "resolution": vq.resolution,
            "attn_resolutions": list(vq.attn_resolutions) or None,
            "dropout": vq.dropout,
            "double_latent": False,
            "in_channels": 3,
            "attn_type": "vanilla" if vq.mid_attention else None,
        },
        MARK: to_dict(config),
    }


def _names(checkpoint: Checkpoint) -> dict[str, int]:
    is_json = checkpoint.text.suffix == ".json"
    return HFTokenizer.names_in(checkpoint.text) if is_json else {}


def _vocabulary_map(checkpoint: Checkpoint) -> dict[str, int]:
    """Name -> id, as their model needs it to turn codes into ids."""
    vocab, names = checkpoint.config.vocab, _names(checkpoint)
    control = dict(names_for_hub(vocab, names).values())
    codes = {n: vocab.image.first_id + i for i, n in enumerate(names_of_codes(vocab.image.count))}
    return names | control | codes


def _write_tokenizer(checkpoint: Checkpoint, folder: Path) -> None:
    """The text tokenizer, and what their processor is made from where it can be one of theirs."""
    vocab, vq = checkpoint.config.vocab, checkpoint.vq
    target = folder / checkpoint.config.text_tokenizer
    if checkpoint.text.suffix != ".json" or vq is None:
        shutil.copyfile(checkpoint.text, target)
        return
    names = names_for_hub(vocab, _names(checkpoint))
    target.write_bytes(as_hub(checkpoint.text.read_bytes(), names))
    theirs = {"bos": "bos", "eos": "eos", "unk": "unk", "pad": "pad", "sep": "eot",
              "image": "image", "boi": "begin", "eoi": "end"}  # fmt: skip
    tokenizer: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{key}_token": names[role][0] for key, role in theirs.items()},
        "model_max_length": checkpoint.config.model.max_seq_len,
    }
    side = vq.resolution
    processor = {
        "processor_class": "ChameleonProcessor",
        "image_processor_type": "ChameleonImageProcessor",
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
        # Exact, where theirs is 0.0078: the codes are those of the published tokenizer.
        "rescale_factor": 2 / 255,
        "image_mean": [1.0, 1.0, 1.0],
        "image_std": [1.0, 1.0, 1.0],
        "image_seq_length": vq.n_codes_per_image,
    }
    for name, data in (("tokenizer_config", tokenizer), ("preprocessor_config", processor)):
        (folder / f"{name}.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    sizes = {"processor_class": "ChameleonProcessor", "image_seq_length": vq.n_codes_per_image}
    (folder / "processor_config.json").write_text(json.dumps(sizes, indent=2) + "\n", "utf-8")
