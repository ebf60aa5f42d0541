"""Checkpoints of many processes: each writes its parts, and any number of them reads them back.

The parts are PyTorch's distributed checkpoint, in a directory as of `checkpoint`. Its index is a
pickle: it is read only where the directory's manifest has been checked.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from openchameleon.train.checkpoint import (
    SHARDS,
    TENSORS,
    abandoned_on_error,
    begin_save,
    final_path,
    finish_save,
)
from openchameleon.train.parallel import World, local, place_of


class Saver:
    """Saves while training goes on. A method is called by all processes together."""

    def __init__(self, world: World) -> None:
        self.world = world
        # A group of its own: its exchanges run beside the training's.
        self.group = torch.distributed.new_group(backend="gloo")
        self.pool = ThreadPoolExecutor(1)
        self.written: Future[Any] | None = None
        self.finished: Future[Path] | None = None

    def save(
        self,
        folder: Path,
        step: int,
        tensors: Mapping[str, Tensor],
        meta: dict[str, Any],
        keep: int,
    ) -> Path:
        """Begins to save as `save_checkpoint` does, after the save before; `wait` ends it.

        The tensors may change as soon as this returns. Returns where the checkpoint will be.
        """
        import torch.distributed.checkpoint as dcp

        self.wait()
        n_bytes = sum(t.numel() * t.element_size() for t in tensors.values())
        temporary = self.world.agree(lambda: begin_save(folder, step, n_bytes))
        written: Future[Any] = dcp.async_save(  # type: ignore[assignment]
            dict(tensors), checkpoint_id=temporary / SHARDS, process_group=self.group
        )

        self.written = written

        def finish() -> Path:
            with abandoned_on_error(temporary, n_bytes):
                written.result()  # on the main process: after all have written
                return finish_save(temporary, step, meta, keep)

        if self.world.is_main:
            self.finished = self.pool.submit(finish)
        return final_path(folder, step)

    def wait(self) -> None:
        """Returns when the last save is whole on the disk. Raises what prevented it."""
        if self.written is None:
            return
        written, finished = self.written, self.finished
        self.written = self.finished = None
        written.exception()
        self.world.agree(lambda: finished.result() if finished else None)


def read_whole(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder of parts, on the CPU, read by one process alone."""
    tensors = {
        name: torch.empty(tuple(entry.size), dtype=entry.properties.dtype)
        for name, entry in _index(folder).items()
    }
    _load(tensors, folder, alone=True)
    return tensors


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of each tensor of a checkpoint of either kind."""
    if (path / TENSORS).is_file():
        with safe_open(path / TENSORS, framework="pt") as file:
            return {n: tuple(file.get_slice(n).get_shape()) for n in file.keys()}  # noqa: SIM118
    return {name: tuple(entry.size) for name, entry in _index(path / SHARDS).items()}


def _index(folder: Path) -> dict[str, Any]:
    from torch.distributed.checkpoint import FileSystemReader

    return FileSystemReader(folder).read_metadata().state_dict_metadata


def fill(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Reads a checkpoint of either kind into `tensors`, of which each process has its parts."""
    if (path / TENSORS).is_file():
        with torch.no_grad(), safe_open(path / TENSORS, framework="pt") as file:
            for name, tensor in tensors.items():
                mine = local(tensor)
                if tensor.ndim:
                    mine.copy_(file.get_slice(name)[place_of(tensor)])
                else:
                    mine.copy_(file.get_tensor(name))
        return
    _load(dict(tensors), path / SHARDS, alone=not torch.distributed.is_initialized())


def _load(tensors: dict[str, Tensor], folder: Path, alone: bool) -> None:
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        if alone:  # which is meant, and would be warned of
            warnings.simplefilter("ignore")
        dcp.load(tensors, checkpoint_id=folder, no_dist=alone)
