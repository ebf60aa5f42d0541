"""Checkpoints: immutable, verified directories of tensors and JSON. Knows no model and no trainer.

    step-00000100/
      tensors.safetensors   every tensor, bit for bit; of many processes a folder, `tensors/`
      meta.json             everything else
      MANIFEST.json         size and sha256 of all of them; written last

A save happens under a temporary name, is synced and then renamed, so that a directory named
`step-N` is whole however the process ended; the sha256 finds what a disk broke afterwards.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from openchameleon.config import config_hash
from openchameleon.errors import CheckpointError, UserError
from openchameleon.files import sha256_of, sync_file, sync_folder
from openchameleon.train.optim import Optimizer

FORMAT = 2
TENSORS, SHARDS, META, MANIFEST = "tensors.safetensors", "tensors", "meta.json", "MANIFEST.json"
_STEP_NAME = re.compile(r"step-(\d{8,})")
_NO_SPACE = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}


class NoSpaceError(UserError):
    """The disk cannot hold the checkpoint; earlier checkpoints are untouched."""

    exit_code = 4


def save_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, Tensor], meta: dict[str, Any], keep: int = 2
) -> Path:
    """Writes `folder/step-N` and returns it; then leaves it and the `keep - 1` before it.

    NoSpaceError when the disk is full (nothing is left behind); FileExistsError when a whole
    checkpoint of this step is already there.
    """
    temporary = begin_save(folder, step, needed := sum(t.nbytes for t in tensors.values()))
    with abandoned_on_error(temporary, needed):
        save_file(_own_storage(tensors), temporary / TENSORS)
        return finish_save(temporary, step, meta, keep)


def begin_save(folder: Path, step: int, n_bytes: int) -> Path:
    """A new folder for the tensors of `step`, `n_bytes` of them; errors of `save_checkpoint`."""
    folder.mkdir(parents=True, exist_ok=True)
    final = final_path(folder, step)
    if final.exists() and _fault(final) is None:
        raise FileExistsError(f"{final} is a whole checkpoint already")
    for stale in folder.glob("step-*.tmp-*"):
        shutil.rmtree(stale)
    needed, free = int(1.2 * n_bytes), shutil.disk_usage(folder).free
    if needed > free:
        raise NoSpaceError(_no_space(folder, needed, free))
    temporary = _temporary_name(final)
    temporary.mkdir()
    return temporary


def final_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return folder / f"step-{step:08d}"


def finish_save(temporary: Path, step: int, meta: dict[str, Any], keep: int) -> Path:
    """Makes the folder of `begin_save`, whose tensors are written, the checkpoint of `step`."""
    if keep < 1:
        raise ValueError(f"keep = {keep}: at least the new checkpoint is kept")
    folder, final = temporary.parent, final_path(temporary.parent, step)
    _complete(temporary, step, meta)
    if final.exists():  # a broken one of the same step makes room
        _remove(final)
    temporary.rename(final)
    sync_folder(folder)
    if fault := _fault(final):
        raise OSError(f"{final} does not read back as written: {fault}")
    older = [path for number, path in checkpoints_in(folder) if number < step]
    for path in older[keep - 1 :]:
        _remove(path)
    return final


@contextmanager
def abandoned_on_error(temporary: Path, n_bytes: int) -> Iterator[None]:
    """Leaves nothing of a save that fails; NoSpaceError where the disk is full."""
    try:
        yield
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if _is_no_space(error):
            folder = temporary.parent
            free = shutil.disk_usage(folder).free
            raise NoSpaceError(_no_space(folder, int(1.2 * n_bytes), free)) from error
        raise


def latest_checkpoint(folder: Path, strict: bool = False) -> Path | None:
    """The newest checkpoint that verifies, or None where there is no checkpoint at all.

    Each broken one passed over is named on standard error; with `strict` the first is a
    CheckpointError. UserError when all are broken: starting from nothing must be the user's
    decision.
    """
    steps = checkpoints_in(folder)
    for _, path in steps:
        fault = _fault(path)
        if fault is None:
            return path
        if strict:
            raise CheckpointError(f"{path} is a broken checkpoint: {fault}.")
        print(f"{path}: broken checkpoint passed over: {fault}", file=sys.stderr)
    if steps:
        raise UserError(
            f"None of the {len(steps)} checkpoints in {folder} is whole; "
            "remove them to start from the beginning."
        )
    return None


def load_checkpoint(path: Path, verify: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """`(tensors, meta)` as they were saved, on the CPU. UserError names what is broken."""
    if verify and (fault := _fault(path)):
        raise UserError(f"{path} is a broken checkpoint: {fault}.")
    if (path / TENSORS).is_file():
        tensors = load_file(path / TENSORS)
    else:
        from openchameleon.train.sharded import read_whole

        tensors = read_whole(path / SHARDS)
    return tensors, load_meta(path)


def load_meta(path: Path) -> dict[str, Any]:
    """What a checkpoint holds besides tensors."""
    meta: dict[str, Any] = json.loads((path / META).read_text(encoding="utf-8"))
    return meta


def checkpoint_hash(path: Path) -> str:
    """A hash of a checkpoint's tensors, from its manifest."""
    files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
    if TENSORS in files:
        sha256: str = files[TENSORS]["sha256"]
        return sha256
    return config_hash({name: file["sha256"] for name, file in files.items() if name != META})


def flatten_optimizer(optimizer: Optimizer, model: nn.Module, prefix: str) -> dict[str, Tensor]:
    """The optimizer's state as `{prefix}{parameter's name}.{name}` tensors, its step among them.

    Hyperparameters are not part of it: they come from the config, the learning rate from the step.
    """
    names = _names_in_order(optimizer, model)
    flat: dict[str, Tensor] = {}
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            if not isinstance(value, Tensor):
                raise ValueError(f"optimizer state {name!r} is a {type(value).__name__}")
            flat[f"{prefix}{names[index]}.{name}"] = value
    return flat


def restore_optimizer(
    optimizer: Optimizer, model: nn.Module, tensors: Mapping[str, Tensor], prefix: str
) -> None:
    """The inverse of `flatten_optimizer`, into an optimizer over the same parameters.

    ValueError for state of a parameter that the optimizer does not have.
    """
    index_of = {name: index for index, name in enumerate(_names_in_order(optimizer, model))}
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith(prefix):
            parameter, _, name = key.removeprefix(prefix).rpartition(".")
            if parameter not in index_of:
                raise ValueError(f"{key}: the optimizer has no parameter {parameter!r}")
            state.setdefault(index_of[parameter], {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def optimizer_tensors(
    model: nn.Module, shapes: Mapping[str, tuple[int, ...]], prefix: str
) -> dict[str, Tensor]:
    """Zeros for the optimizer's state of these names and shapes, spread as its parameters are."""
    parameters = dict(model.named_parameters())

    def zeros(name: str, shape: tuple[int, ...]) -> Tensor:
        parameter = parameters.get(name.removeprefix(prefix).rpartition(".")[0])
        if parameter is None or parameter.shape != shape:
            return torch.zeros(shape)
        return torch.zeros_like(parameter)

    return {name: zeros(name, shape) for name, shape in shapes.items()}


def _names_in_order(optimizer: Optimizer, model: nn.Module) -> list[str]:
    """Names of the optimizer's parameters, in the order in which its state numbers them."""
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    return [name_of[id(p)] for group in optimizer.param_groups for p in group["params"]]


def _complete(folder: Path, step: int, meta: dict[str, Any]) -> None:
    """Writes what lacks beside the tensors, the manifest last, and syncs all."""
    (folder / META).write_text(json.dumps(meta, indent=1, sort_keys=True), encoding="utf-8")
    mode = (folder / META).stat().st_mode
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        path.chmod(mode)  # safetensors creates 0600; the umask is the user's wish
        sync_file(path)
        name = path.relative_to(folder).as_posix()
        files[name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    manifest = {"format": FORMAT, "step": step, "torch": torch.__version__, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    sync_file(folder / MANIFEST)
    for inner in [p for p in folder.iterdir() if p.is_dir()]:
        sync_folder(inner)
    sync_folder(folder)


def _own_storage(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CPU tensors of which no two share memory, as safetensors requires (tied weights do)."""
    seen: set[int] = set()
    out = {}
    for name, tensor in tensors.items():
        host = tensor.detach().cpu().contiguous()
        storage = host.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != host.nbytes:
            host = host.clone()
        seen.add(host.untyped_storage().data_ptr())
        out[name] = host
    return out


def _fault(path: Path) -> str | None:
    """What is wrong with a checkpoint directory, naming the file; None if it verifies."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            return f"{MANIFEST} has format {manifest['format']}, this version reads {FORMAT}"
        expected = {n: (file["bytes"], file["sha256"]) for n, file in manifest["files"].items()}
        if META not in expected or len(expected) < 2:
            return f"{MANIFEST} is not a manifest"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is not a manifest"
    for name, (size, sha256) in expected.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, expected {size}"
        if sha256_of(file) != sha256:
            return f"{name} differs from what was written (sha256)"
    return None


def checkpoints_in(folder: Path) -> list[tuple[int, Path]]:
    """`(step, path)` of each checkpoint directory, whole or not, newest first."""
    if not folder.is_dir():
        return []
    found = [(m, path) for path in folder.iterdir() if (m := _STEP_NAME.fullmatch(path.name))]
    return sorted(((int(m[1]), path) for m, path in found), reverse=True)


def _remove(path: Path) -> None:
    """Deletes a checkpoint so that a kill on the way leaves no half of one under its name."""
    shutil.rmtree(path.rename(_temporary_name(path)))


def _temporary_name(final: Path) -> Path:
    return final.with_name(f"{final.name}.tmp-{uuid.uuid4().hex[:8]}")


def _is_no_space(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno in _NO_SPACE
    # safetensors wraps the system's error in its own, as text
    return isinstance(error, SafetensorError) and any(
        os.strerror(code) in str(error) for code in _NO_SPACE
    )


def _no_space(folder: Path, needed: int, free: int) -> str:
    return (
        f"No space to save a checkpoint in {folder}: needed {needed / 1e6:.1f} MB, "
        f"had {free / 1e6:.1f} MB; the checkpoints before it are intact."
    )
