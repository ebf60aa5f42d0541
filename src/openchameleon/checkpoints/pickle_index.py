"""Where the tensors of a PyTorch `.pth` lie in the file: what a pickle is asked for, and no more.

Run as a program, `python -m openchameleon.checkpoints.pickle_index FILE..` prints a line of JSON
for each tensor, so that the process that uses the tensors never reads the pickles.
"""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Place:
    """`n_bytes` from byte `start` of a file hold a tensor of this type, shape and stride.

    file: the number of the file among those that were asked for.
    """

    name: str
    dtype: str
    shape: list[int]
    stride: list[int]
    start: int
    n_bytes: int
    file: int = 0


def tensor_places(path: Path) -> list[Place]:
    """The tensors of the archive, names of nested dicts joined by dots; no byte of them is read.

    Whatever torch raises for a file that is damaged or asks for more than tensors.
    """
    read = torch.load(path, map_location="meta", weights_only=True)
    return [_place(name, tensor) for name, tensor in _tensors(read, "")]


def _tensors(node: Any, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(node, torch.Tensor):
        yield name, node
    elif isinstance(node, dict):
        for key, value in node.items():
            yield from _tensors(value, f"{name}.{key}" if name else str(key))


def _place(name: str, tensor: torch.Tensor) -> Place:
    start = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if start is None:
        raise ValueError("it is of the old format without a zip archive; save it again with torch")
    spans = ((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    n_items = 1 + sum(spans) if tensor.numel() else 0
    size = tensor.dtype.itemsize
    return Place(
        name,
        str(tensor.dtype).removeprefix("torch."),
        list(tensor.shape),
        list(tensor.stride()),
        start + tensor.storage_offset() * size,
        n_items * size,
    )


def main() -> int:
    """Prints the places of the files of `sys.argv`; 1 and one line of what is wrong with one."""
    for number, path in enumerate(sys.argv[1:]):
        why = ""
        try:
            for place in tensor_places(Path(path)):
                print(json.dumps(asdict(replace(place, file=number))))
        except pickle.UnpicklingError:
            why = "it holds more than tensors, or is no PyTorch archive."
        except Exception as error:  # torch raises many kinds for a damaged file
            why = " ".join(str(error).split()).split(". ")[0]
        if why:
            print(f"{path} is not a readable PyTorch checkpoint: {why}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
