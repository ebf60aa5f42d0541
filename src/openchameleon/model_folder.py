"""A model folder: what is in it, where it is found, and how its files are read and written.

config.json           FolderConfig: name, what it may write, vocabulary, shape, sampling
model.safetensors     the transformer; a large one as shards with an index
tokenizer.model       the text tokenizer (config.json has its name)
image_tokenizer/      config.json and model.safetensors; absent for a model of text alone
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from openchameleon.config import from_dict
from openchameleon.errors import UserError, nearest
from openchameleon.inference.params import SamplingParams
from openchameleon.model.config import ModelConfig, n_params
from openchameleon.model.transformer import Transformer
from openchameleon.vocab import Vocab

FORMAT = 1
CONFIG, WEIGHTS, IMAGE_TOKENIZER = "config.json", "model.safetensors", "image_tokenizer"
TEXT_TOKENIZER = "tokenizer.model"
META_CONFIG = "params.json"
LARGE = 100_000_000  # parameters


Outputs = tuple[Literal["text", "image"], ...]
"""What a model may write."""


@dataclass(frozen=True, slots=True)
class FolderConfig:
    """`config.json` of a model folder.

    outputs: what the model may write; a model released as text only is ["text"], whatever its
    weights could do. sampling: the defaults of generation. picture_first: see MixedTokenizer; a
    folder that does not say keeps the order of the words and the picture. examples: prompts that
    show what the model can do, for those who meet it.
    """

    name: str
    vocab: Vocab
    model: ModelConfig
    outputs: Outputs = ("text", "image")
    sampling: SamplingParams = field(default_factory=SamplingParams)
    text_tokenizer: str = TEXT_TOKENIZER
    picture_first: bool = False
    examples: tuple[str, ...] = ()
    format: int = FORMAT

    def __post_init__(self) -> None:
        if Path(self.text_tokenizer).name != self.text_tokenizer:
            raise ValueError(f"text_tokenizer = {self.text_tokenizer!r} is no plain file name.")
        if self.vocab.size != self.model.vocab_size:
            raise ValueError(
                f"The vocabulary has {self.vocab.size} ids, the model {self.model.vocab_size}."
            )


def embedded_models() -> dict[str, Path]:
    """Name -> folder of the models that are shipped with the package."""
    root = Path(str(files("openchameleon"))) / "embedded"
    return {path.parent.name: path.parent for path in sorted(root.glob(f"*/{CONFIG}"))}


def find_model(name_or_folder: str) -> Path:
    """The folder of an embedded model, else the folder itself. UserError says what was sought."""
    embedded = embedded_models()
    if name_or_folder in embedded:
        return embedded[name_or_folder]
    folder = Path(name_or_folder)
    if any((folder / name).is_file() for name in (CONFIG, META_CONFIG)):
        return folder
    names = ", ".join(embedded) or "none"
    what = (
        f"the folder has neither {CONFIG} (ours and Hugging Face's) nor {META_CONFIG} (Meta's)"
        if folder.is_dir()
        else "there is no such folder"
    )
    raise UserError(
        f"No model {name_or_folder!r}: it is not an embedded model ({names}) and"
        f" {what}.{nearest(name_or_folder, embedded)}"
    )


def read_config(folder: Path) -> FolderConfig:
    """The folder's `config.json`. UserError if it is missing, malformed or of another format."""
    try:
        data = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / CONFIG} cannot be read: {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise UserError(f"{folder / CONFIG} is not a model folder's config of format {FORMAT}.")
    return from_dict(FolderConfig, data)


def read_model(
    folder: Path, config: ModelConfig, device: torch.device, dtype: torch.dtype | None
) -> Transformer:
    """The transformer of a folder that is not in shards. UserError for weights that do not fit."""
    try:
        weights = load_file(folder / WEIGHTS, device=str(device))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / WEIGHTS} cannot be read: {error}") from error
    # First values are replaced at once, so a large model does without. Not a small one: meta
    # tensors import half of torch's compiler, which takes seconds.
    with torch.device("meta" if n_params(config) > LARGE else "cpu"):
        model = Transformer(config)
    try:
        model.load_state_dict({k: v.to(dtype or v.dtype) for k, v in weights.items()}, assign=True)
    except RuntimeError as error:
        raise UserError(
            f"The weights in {folder} do not belong to its {CONFIG}: {error}"
        ) from error
    return model.requires_grad_(False)


def save_weights(weights: dict[str, torch.Tensor], path: Path, dtype: torch.dtype | None) -> None:
    """Writes tensors, in `dtype` unless it is None, with the permissions of the config beside."""
    out = {k: v.detach().cpu().to(dtype or v.dtype).contiguous() for k, v in weights.items()}
    save_file(out, path)
    path.chmod((path.parent / CONFIG).stat().st_mode)  # safetensors creates 0600 whatever the umask


def named_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """ "bfloat16" -> torch.bfloat16. UserError if there is no such type."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UserError(
            f"The dtype {dtype!r} cannot be used here: use float32, bfloat16 or float16."
        )
    return found
