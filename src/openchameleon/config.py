"""Frozen dataclasses as configuration: strict loading, `a.b=c` overrides, a stable hash."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from openchameleon.errors import UserError, nearest

C = TypeVar("C")


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON data."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(cls: type[C], data: Mapping[str, Any], where: str = "") -> C:
    """Builds `cls` from JSON data, checking every key and type. UserError names the bad key."""
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in data:
        if key not in known:
            raise UserError(f"Unknown key {where + key!r}.{nearest(key, known)}")
    values = {k: _convert(v, hints[k], where + k) for k, v in data.items()}
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where or cls.__name__ + ': '}{error}") from error


def override(config: C, assignments: Iterable[str]) -> C:
    """`config` with each `a.b=value` applied; values are JSON, else plain strings. UserError."""
    data = dataclasses.asdict(config)  # type: ignore[call-overload]
    for assignment in assignments:
        path, sep, raw = assignment.partition("=")
        if not sep:
            raise UserError(f"{assignment!r} is not KEY=VALUE; write for example train.steps=100.")
        node: Any = data
        *parents, last = path.split(".")
        for depth, key in enumerate([*parents, last]):
            if not isinstance(node, dict) or key not in node:
                prefix = ".".join([*parents, last][: depth + 1])
                keys = node.keys() if isinstance(node, dict) else ()
                raise UserError(f"Unknown key {prefix!r}.{nearest(key, keys)}")
            if depth < len(parents):
                node = node[key]
        try:
            node[last] = json.loads(raw)
        except json.JSONDecodeError:
            node[last] = raw
    return from_dict(type(config), data)


def config_hash(*configs: Any) -> str:
    """Sixteen hex digits that change when any value in any of the configs changes."""
    plain = [to_dict(c) if dataclasses.is_dataclass(c) else c for c in configs]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def _convert(value: Any, hint: Any, where: str) -> Any:
    """`value` as the annotated type `hint`; UserError says what was expected."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        if isinstance(value, Mapping):
            return from_dict(typing.cast(type, hint), value, where + ".")
        if isinstance(value, typing.cast(type, hint)):
            return value
    elif origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        inner = [a for a in args if a is not type(None)]
        if len(inner) == 1:
            return _convert(value, inner[0], where)
        for option in inner:
            try:
                return _convert(value, option, where)
            except UserError:
                continue
    elif origin is typing.Literal:
        if value in args:
            return value
        raise UserError(f"{where} = {value!r} is not one of {', '.join(map(str, args))}.")
    elif origin is tuple:
        if isinstance(value, (list, tuple)):
            if len(args) == 2 and args[1] is ...:
                return tuple(_convert(v, args[0], f"{where}[{i}]") for i, v in enumerate(value))
            if len(value) == len(args):
                return tuple(
                    _convert(v, a, f"{where}[{i}]")
                    for i, (v, a) in enumerate(zip(value, args, strict=True))
                )
    elif origin is dict:
        if isinstance(value, Mapping):
            return {k: _convert(v, args[1], f"{where}.{k}") for k, v in value.items()}
    elif hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif hint is Any or (type(value) is hint):
        return value
    expected = getattr(hint, "__name__", str(hint))
    raise UserError(f"{where} = {value!r} is not of type {expected}.")
