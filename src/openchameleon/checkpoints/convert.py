"""Any layout that we know -> any other: found, read, written whole or not at all, verified."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from openchameleon.checkpoints import hf, llama, meta, native
from openchameleon.checkpoints.checkpoint import Checkpoint
from openchameleon.checkpoints.fields import read_json
from openchameleon.errors import CheckpointError, UserError
from openchameleon.files import sha256_of, sync_file, sync_folder
from openchameleon.model.transformer import Transformer
from openchameleon.model_folder import CONFIG
from openchameleon.progress import Progress
from openchameleon.tokenizer.image import ImageTokenizer

Layout = Literal["native", "hf", "meta"]
LAYOUTS: tuple[Layout, ...] = ("native", "hf", "meta")
MANIFEST = "manifest.json"
PROBE_LEN = 64


@dataclass(frozen=True, slots=True)
class WarmStart:
    """How a text-only Llama becomes a mixed-modal model; see `llama.read`."""

    image_tokenizer: Path
    qk_norm: bool = False
    seed: int = 0

    def read(self, folder: Path) -> Checkpoint:
        return _of_checkpoint(
            lambda: llama.read(folder, self.image_tokenizer, self.qk_norm, self.seed)
        )


def layout_of(folder: Path) -> Layout:
    """Which layout a folder has. CheckpointError says what was looked for."""
    if (folder / CONFIG).is_file():
        config = read_json(folder / CONFIG)
        if "format" in config and "vocab" in config:
            return "native"
        if config.get("model_type") == "chameleon":
            return "hf"
        hint = (
            " A llama can be given an image tokenizer (--image-tokenizer), to be trained."
            if config.get("model_type") == "llama"
            else ""
        )
        raise CheckpointError(
            f"{folder / CONFIG} is of a {config.get('model_type')!r}, not of a Chameleon.{hint}"
        )
    if (folder / meta.PARAMS).is_file():
        return "meta"
    raise CheckpointError(
        f"{folder} holds no checkpoint: neither {CONFIG} (ours, or Hugging Face's) nor"
        f" {meta.PARAMS} (Meta's)."
    )


def open_checkpoint(folder: Path, allow_pickle: bool = False) -> Checkpoint:
    """The checkpoint in a folder of any layout, with no tensor read yet. CheckpointError."""
    layout = layout_of(folder)
    if layout == "meta":
        return _of_checkpoint(lambda: meta.read(folder, allow_pickle))
    return _of_checkpoint(lambda: hf.read(folder) if layout == "hf" else native.read(folder))


def _of_checkpoint(read: Callable[[], Checkpoint]) -> Checkpoint:
    try:
        return read()
    except UserError as error:  # of a config or a tokenizer: it is the checkpoint's all the same
        raise CheckpointError(str(error)) from error


def convert(
    source: Path,
    target: Path,
    to: Layout,
    *,
    allow_pickle: bool = False,
    allow_nonfinite: bool = False,
    verify: bool = False,
    warm_start: WarmStart | None = None,
) -> dict[str, Any]:
    """Writes the checkpoint of `source` into the new folder `target`; returns its manifest.

    allow_nonfinite: numbers that are infinite or none are carried over, not refused.
    warm_start: what a text-only Llama in `source` becomes.
    verify: reads the target back and compares, see `compare`.
    Nothing is left under the target's name where anything fails. CheckpointError names the file
    and the tensor; UserError where `target` exists or cannot be written.
    """
    if os.path.lexists(target):
        raise UserError(f"{target} exists already; remove it, or name another folder.")
    if warm_start is None:
        checkpoint, layout = open_checkpoint(source, allow_pickle), str(layout_of(source))
    else:
        checkpoint, layout = warm_start.read(source), "llama"
    if not allow_nonfinite:
        checkpoint = checkpoint.only_finite()
    temporary = target.with_name(f"{target.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        temporary.mkdir(parents=True)
        needed, free = checkpoint.n_bytes, shutil.disk_usage(temporary).free
        if needed > free:
            raise OSError(f"no space: needed {needed / 2**30:.1f} GiB, had {free / 2**30:.1f} GiB")
        manifest = write_checkpoint(checkpoint, temporary, to)
        manifest["from"] = layout
        if verify:
            manifest["verified"] = compare(checkpoint, temporary, manifest)
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        for path in temporary.rglob("*"):
            sync_folder(path) if path.is_dir() else sync_file(path)
        temporary.rename(target)
        sync_folder(target.parent)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{target} could not be written: {error}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return manifest


def write_checkpoint(checkpoint: Checkpoint, folder: Path, to: Layout) -> dict[str, Any]:
    """Writes a checkpoint into a folder that is there, and says what the files are."""
    total = checkpoint.n_bytes >> 20
    progress = Progress(f"convert to {to}", total, "MiB")
    done = 0

    def tick(n_bytes: int) -> None:
        nonlocal done
        done += n_bytes
        progress.update(min(done >> 20, total))  # a layout may hold a tensor twice

    {"native": native.write, "hf": hf.write, "meta": meta.write}[to](checkpoint, folder, tick)
    progress.close()
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        "to": to,
        "files": {
            str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
            for path in files
        },
    }


def compare(checkpoint: Checkpoint, folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Reads back what was written: every file's sum, every tensor, the logits of a prompt.

    CheckpointError names what differs by as much as a bit.
    """
    for name, file in manifest["files"].items():
        if sha256_of(folder / name) != file["sha256"]:
            raise CheckpointError(f"{folder / name} does not read back as it was written.")
    back = open_checkpoint(folder, allow_pickle=True)
    source, target = checkpoint.all_weights, back.all_weights
    for name in source.keys() ^ target.keys():
        raise CheckpointError(f"Only one of {folder} and its source has {name}.")
    progress = Progress("verify", checkpoint.n_bytes >> 20, "MiB")
    done = 0
    for name, entry in target.items():
        if not _same_bits(entry.read(), source[name].read()):
            raise CheckpointError(f"{entry.where} differs from {source[name].where}.")
        done += entry.n_bytes
        progress.update(done >> 20)
    progress.close()
    ids = torch.randint(
        0,
        checkpoint.config.model.vocab_size,
        (1, PROBE_LEN),
        generator=torch.Generator().manual_seed(0),
    )
    if not _same_bits(probe_logits(checkpoint, ids), probe_logits(back, ids)):
        raise CheckpointError(f"The logits of {folder} differ from the source's.")
    return {"tensors": len(source), "probe_tokens": PROBE_LEN}


def require_as_written(folder: Path) -> None:
    """CheckpointError names a file that is not as the folder's manifest has it, if it has one."""
    if not (folder / MANIFEST).is_file():
        return
    files = read_json(folder / MANIFEST).get("files")
    if not isinstance(files, dict):
        raise CheckpointError(f"{folder / MANIFEST} lists no files; convert the model again.")
    for name, file in files.items():
        path = folder / name
        expected = file.get("sha256") if isinstance(file, dict) else None
        if not path.is_file() or sha256_of(path) != expected:
            raise CheckpointError(f"{path} is not as {MANIFEST} says; copy the folder again.")


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(*(x.contiguous().flatten().view(torch.uint8) for x in (a, b)))


@torch.no_grad()
def probe_logits(checkpoint: Checkpoint, ids: Tensor) -> Tensor:
    """Logits of `ids`; each block's weights are read when it is reached, and dropped behind it."""
    with torch.device("meta"):
        model = Transformer(checkpoint.config.model).eval()
    weights = checkpoint.weights

    def fill(module: nn.Module, prefix: str) -> None:
        part = {n.removeprefix(prefix): e for n, e in weights.items() if n.startswith(prefix)}
        module.load_state_dict({name: entry.read() for name, entry in part.items()}, assign=True)

    def empty(module: nn.Module, *_: object) -> None:
        module.to("meta")

    for i, block in enumerate(model.layers):
        block.register_forward_pre_hook(lambda module, _, i=i: fill(module, f"layers.{i}."))
        block.register_forward_hook(empty)
    around = {n: e.read() for n, e in weights.items() if not n.startswith("layers.")}
    model.load_state_dict(around, strict=False, assign=True)
    return model(ids)


def load_transformer(
    checkpoint: Checkpoint, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> Transformer:
    """The transformer with its weights; `dtype` None keeps the file's."""
    with torch.device("meta"):
        model = Transformer(checkpoint.config.model)
    state = {name: e.read().to(device, dtype) for name, e in checkpoint.weights.items()}
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def load_image_tokenizer(checkpoint: Checkpoint) -> ImageTokenizer | None:
    """The image tokenizer with its weights, if there is one."""
    if checkpoint.vq is None:
        return None
    weights = {name: entry.read() for name, entry in checkpoint.vq_weights.items()}
    return ImageTokenizer.from_weights(weights, checkpoint.vq)
