"""Tensors of checkpoint files, one at a time: read through memory maps, written as they come.

A 7B checkpoint goes through in the memory of its largest tensors. Knows no layout and no names.
"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from openchameleon.checkpoints.pickle_index import Place, tensor_places
from openchameleon.errors import CheckpointError

INDEX = ".safetensors.index.json"
SHARD_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor that is not read yet. where: its file and its name there, for sentences."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    where: str

    @property
    def n_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def map(self, change: Callable[[Tensor], Tensor]) -> Entry:
        """The entry after `change`, of which only the shape is asked before it is read."""
        shape = tuple(change(torch.empty(self.shape, dtype=self.dtype, device="meta")).shape)
        return Entry(shape, self.dtype, lambda: change(self.read()), self.where)

    def only_finite(self) -> Entry:
        """The entry whose reading is a CheckpointError where a number is infinite or none."""

        def read() -> Tensor:
            tensor = self.read()
            if not all(part.isfinite().all() for part in tensor.flatten().split(1 << 20)):
                raise CheckpointError(
                    f"{self.where} holds numbers that are infinite or none; --allow-nonfinite"
                    " carries them over."
                )
            return tensor

        return replace(self, read=read)


Weights = dict[str, Entry]


def entry_of(tensor: Tensor, where: str = "") -> Entry:
    """An entry of a tensor that is in memory."""
    return Entry(tuple(tensor.shape), tensor.dtype, lambda: tensor, where)


def read_safetensors(folder: Path, stem: str = "model") -> Weights:
    """The tensors of `stem.safetensors`, or of the shards that its index names.

    CheckpointError for a file that is missing, damaged, or without a tensor that the index names.
    """
    index = folder / f"{stem}{INDEX}"
    if not index.is_file():
        return _of_safetensors(folder / f"{stem}.safetensors")
    found: Weights = {}
    files = _weight_map(index)
    for file in sorted(set(files.values())):
        for name, entry in _of_safetensors(folder / file).items():
            if files.get(name) != file:
                raise CheckpointError(f"{entry.where} is not where {index.name} says.")
            found[name] = entry
    for name, file in files.items():
        if name not in found:
            raise CheckpointError(
                f"{folder / file} has no tensor {name}, which {index.name} names."
            )
    return {name: found[name] for name in files}


def _weight_map(index: Path) -> dict[str, str]:
    try:
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not all(isinstance(f, str) and Path(f).name == f for f in files.values()):
            raise ValueError("a shard is no plain file name")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not an index of shards: {error}.") from error
    return dict(files)


def _of_safetensors(path: Path) -> Weights:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing.")
    try:
        file = safe_open(path, framework="pt")
        shapes = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}.") from error

    def reader(name: str) -> Callable[[], Tensor]:
        return lambda: file.get_tensor(name)

    found: Weights = {}
    for name, part in shapes.items():
        where = f"{path}: {name}"
        dtype = _DTYPES.get(part.get_dtype())
        if dtype is None:
            raise CheckpointError(
                f"{where} is of type {part.get_dtype()}; only {', '.join(_DTYPES)} can be held."
            )
        found[name] = Entry(tuple(part.get_shape()), dtype, reader(name), where)
    return found


_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip


def write_safetensors(
    weights: Mapping[str, Entry],
    folder: Path,
    stem: str = "model",
    tick: Callable[[int], None] = lambda n_bytes: None,
) -> None:
    """Writes `stem.safetensors`, or shards of about 1 GiB with their index, in the given order.

    tick: told the bytes of each tensor as it is written.
    """
    shards: list[list[str]] = [[]]
    room = SHARD_BYTES
    for name, entry in weights.items():
        if shards[-1] and entry.n_bytes > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(name)
        room -= entry.n_bytes
    n = len(shards)
    files = [f"{stem}-{i:05}-of-{n:05}.safetensors" for i in range(1, n + 1)]
    for file, names in zip(files if n > 1 else [f"{stem}.safetensors"], shards, strict=True):
        held: dict[str, Tensor] = {}
        for name in names:
            held[name] = weights[name].read().clone(memory_format=torch.contiguous_format)
            tick(weights[name].n_bytes)
        save_file(held, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(folder.stat().st_mode & 0o666)  # safetensors creates 0600 always
    if n > 1:
        index = {
            "metadata": {"total_size": sum(e.n_bytes for e in weights.values())},
            "weight_map": {
                name: file for file, names in zip(files, shards, strict=True) for name in names
            },
        }
        (folder / f"{stem}{INDEX}").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def read_pickles(paths: Sequence[Path]) -> list[Weights]:
    """The tensors of each PyTorch `.pth`, whose pickles only another process has read.

    That process reads them with `weights_only` and tells where in its file each tensor lies; this
    one maps the bytes. Nested names are joined by dots. CheckpointError where a file is no such
    archive or holds anything but tensors.
    """
    done = subprocess.run(
        # -P: not from the working directory, which may be the folder of the download.
        [sys.executable, "-P", "-m", "openchameleon.checkpoints.pickle_index", *map(str, paths)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise CheckpointError((done.stderr.strip().splitlines() or ["A pickle was not read."])[-1])
    found: list[Weights] = [{} for _ in paths]
    for line in done.stdout.splitlines():
        place = Place(**json.loads(line))
        path = paths[place.file]
        if not 0 <= place.start <= path.stat().st_size - place.n_bytes:
            raise CheckpointError(f"{path} ends before its tensor {place.name} does.")
        dtype, shape = getattr(torch, place.dtype), tuple(place.shape)
        where = f"{path}: {place.name}"
        found[place.file][place.name] = Entry(shape, dtype, _mapped(path, place), where)
    return found


def _mapped(path: Path, place: Place) -> Callable[[], Tensor]:
    def read() -> Tensor:
        if not place.n_bytes:
            return torch.empty(place.shape, dtype=getattr(torch, place.dtype))
        raw = np.memmap(path, np.uint8, "c", offset=place.start, shape=(place.n_bytes,))
        flat = torch.from_numpy(raw).view(getattr(torch, place.dtype))
        return flat.as_strided(place.shape, place.stride)

    return read


def write_pickle(
    weights: Mapping[str, Entry],
    path: Path,
    key: str | None = None,
    tick: Callable[[int], None] = lambda n_bytes: None,
) -> None:
    """Writes a PyTorch `.pth` without ever holding it: its frame first, then each tensor's bytes.

    key: the tensors lie in a dict under this key, as in `{"state_dict": {...}}`.
    """
    # Memory that is never touched is never taken, and the frame asks for sizes alone.
    frame: Any = {name: torch.empty(e.shape, dtype=e.dtype) for name, e in weights.items()}
    checksums = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)  # they would be of bytes that are not there yet
    try:
        with torch.serialization.skip_data():
            torch.save({key: frame} if key else frame, path)
    except RuntimeError as error:
        raise OSError(f"there may be no room for {path.name} ({error})") from error
    finally:
        torch.serialization.set_crc32_options(checksums)
    places = {place.name: place for place in tensor_places(path)}
    with path.open("r+b") as file:
        for name, entry in weights.items():
            place = places[f"{key}.{name}" if key else name]
            file.seek(place.start)
            file.write(entry.read().contiguous().flatten().view(torch.uint8).numpy().data)
            tick(place.n_bytes)
    _write_checksums(path)


def _write_checksums(path: Path) -> None:
    """Puts each entry's CRC-32 where a zip archive has it: behind its bytes, and in the directory.

    PyTorch does not ask for them; unzip and the scanners of model hubs do.
    """
    with zipfile.ZipFile(path) as archive, path.open("r+b") as file:
        in_directory = archive.start_dir
        for info in archive.infolist():
            file.seek(info.header_offset + 26)
            start = file.tell() + 4 + sum(struct.unpack("<HH", file.read(4)))
            file.seek(start)
            checksum, left = 0, info.file_size
            while left:
                part = file.read(min(left, 1 << 20))
                checksum, left = zlib.crc32(part, checksum), left - len(part)
            packed = struct.pack("<I", checksum)
            if info.flag_bits & 8:  # a descriptor: its mark, then the sum
                file.seek(start + info.file_size + 4)
                file.write(packed)
            file.seek(in_directory + 16)
            file.write(packed)
            file.seek(in_directory + 28)
            in_directory += 46 + sum(struct.unpack("<HHH", file.read(6)))
