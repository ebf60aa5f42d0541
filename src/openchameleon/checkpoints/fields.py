"""What is read from the JSON configs of others, with a sentence for whatever is wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from openchameleon.errors import CheckpointError


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


def rope_theta(data: Mapping[str, Any], where: Path) -> float:
    """Of old and new configs. CheckpointError for positions that are stretched."""
    rope = nested(data, "rope_parameters", where) or nested(data, "rope_scaling", where)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise CheckpointError(f"{where} asks for rotary positions of type {kind!r}, which we lack.")
    return float(rope.get("rope_theta", data.get("rope_theta", 1e4)))
