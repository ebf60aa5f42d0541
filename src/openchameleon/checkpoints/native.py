"""Our own layout as a checkpoint; what is in a folder says `model_folder`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from openchameleon.checkpoints.checkpoint import Checkpoint, checked, checked_vq, shapes_of
from openchameleon.checkpoints.fields import read_json
from openchameleon.checkpoints.tensors import Weights, read_safetensors, write_safetensors
from openchameleon.config import from_dict, to_dict
from openchameleon.model_folder import CONFIG, IMAGE_TOKENIZER, read_config
from openchameleon.vqgan.config import VQConfig


def read(folder: Path) -> Checkpoint:
    """A native folder. CheckpointError for weights that are not those of its config."""
    config = read_config(folder)
    weights = checked(read_safetensors(folder), shapes_of(config.model), folder)
    text = folder / config.text_tokenizer
    if not (folder / IMAGE_TOKENIZER).is_dir():
        return Checkpoint(config, weights, text)
    return Checkpoint(config, weights, text, *read_image_tokenizer(folder / IMAGE_TOKENIZER))


def write(checkpoint: Checkpoint, folder: Path, tick: Callable[[int], None]) -> None:
    """Writes a native folder; it holds whatever a checkpoint can."""
    text = json.dumps(to_dict(checkpoint.config), indent=2)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
    shutil.copyfile(checkpoint.text, folder / checkpoint.config.text_tokenizer)
    write_safetensors(checkpoint.weights, folder, tick=tick)
    if checkpoint.vq is not None:
        write_image_tokenizer(checkpoint, folder / IMAGE_TOKENIZER, tick)


def read_image_tokenizer(folder: Path) -> tuple[VQConfig, Weights]:
    """`config.json` and `model.safetensors` of an image tokenizer."""
    config = from_dict(VQConfig, read_json(folder / CONFIG))
    return config, checked_vq(read_safetensors(folder), config, folder)


def write_image_tokenizer(
    checkpoint: Checkpoint, folder: Path, tick: Callable[[int], None]
) -> None:
    """Writes what `read_image_tokenizer` reads."""
    folder.mkdir()
    text = json.dumps(to_dict(checkpoint.vq), indent=2)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
    write_safetensors(checkpoint.vq_weights, folder, tick=tick)
