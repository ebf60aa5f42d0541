"""What is read from the JSON configs of others, with a sentence for whatever is wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from openchameleon.errors import CheckpointError
from openchameleon.model.config import ModelConfig, RopeScaling


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. CheckpointError where the file holds none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds no JSON object.")
    return data


def nested(data: Mapping[str, Any], key: str, where: Path) -> dict[str, Any]:
    """The object under `key`, {} where there is none. CheckpointError for anything else."""
    value = data.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} has {key} = {value!r}, which is no JSON object.")
    return value


def require(data: Mapping[str, Any], values: Mapping[str, Any], where: Path) -> None:
    """CheckpointError where a key has a value that our architecture cannot hold."""
    for key, value in values.items():
        if data.get(key, value) not in (value, None):
            raise CheckpointError(f"{where} has {key} = {data[key]!r}; only {value!r} can be held.")


def whole_number(data: Mapping[str, Any], key: str, default: int, where: Path) -> int:
    """The number under `key`, `default` where there is none. CheckpointError for anything else."""
    value = data.get(key)
    if value is None:
        return default
    if type(value) is not int:
        raise CheckpointError(f"{where} has {key} = {value!r}, which is no whole number.")
    return value


def hub_shape(
    data: Mapping[str, Any], where: Path, *, max_seq_len: int, norm_eps: float, **own: Any
) -> ModelConfig:
    """The shape that a config of the model hub says, Llama's or Chameleon's, and `own`.

    max_seq_len, norm_eps: where the config says none. CheckpointError names the key that is
    missing, or that our architecture cannot hold.
    """
    require(data, {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu"}, where)
    try:
        heads = int(data["num_attention_heads"])
        shape = ModelConfig(
            dim=int(data["hidden_size"]),
            n_layers=int(data["num_hidden_layers"]),
            n_heads=heads,
            n_kv_heads=int(data.get("num_key_value_heads") or heads),
            max_seq_len=int(data.get("max_position_embeddings", max_seq_len)),
            ffn_dim=int(data["intermediate_size"]),
            norm_eps=float(data.get("rms_norm_eps", norm_eps)),
            tie_embeddings=bool(data.get("tie_word_embeddings", False)),
            **_rope(data, where),
            **own,
        )
    except KeyError as error:
        raise CheckpointError(f"{where} has no key {error}.") from error
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: {error}") from error
    require(data, {"head_dim": shape.head_dim}, where)
    return shape


_SCALING = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_seq_len": "original_max_position_embeddings",
}
"""Ours -> theirs, of `RopeScaling`."""


def _rope(data: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """Base and scaling of the rotary positions, of old and new configs."""
    rope = nested(data, "rope_parameters", where) or nested(data, "rope_scaling", where)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise CheckpointError(f"{where} asks for rotary positions of type {kind!r}, which we lack.")
    scaling = RopeScaling(**{k: rope[v] for k, v in _SCALING.items()}) if kind == "llama3" else None
    theta = float(rope.get("rope_theta", data.get("rope_theta", 1e4)))
    return {"rope_theta": theta, "rope_scaling": scaling}


def rope_keys(shape: ModelConfig) -> dict[str, Any]:
    """The hub's keys for the rotary positions, where its versions before and after 5 look."""
    if shape.rope_scaling is None:
        rope = {"rope_theta": shape.rope_theta, "rope_type": "default"}
        return {"rope_parameters": rope, "rope_theta": shape.rope_theta}
    scaling = {theirs: getattr(shape.rope_scaling, ours) for ours, theirs in _SCALING.items()}
    scaling |= {"rope_type": "llama3"}
    return {
        "rope_parameters": scaling | {"rope_theta": shape.rope_theta},
        "rope_theta": shape.rope_theta,
        "rope_scaling": scaling,
    }
