"""A checkpoint between two layouts: our config and our names, with no tensor read yet."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from openchameleon.checkpoints.tensors import Weights
from openchameleon.config import from_dict
from openchameleon.errors import CheckpointError, UserError
from openchameleon.inference.params import ModalityParams, SamplingParams
from openchameleon.model.config import ModelConfig
from openchameleon.model.transformer import Transformer
from openchameleon.model_folder import FolderConfig
from openchameleon.tokenizer.text import TextTokenizer
from openchameleon.vocab import CodeRange, Vocab
from openchameleon.vqgan.config import VQConfig
from openchameleon.vqgan.model import VQModel

MARK = "openchameleon"
"""The key under which a foreign config keeps what only ours can say."""

PUBLISHED = {
    "bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>",
    "begin": "<racm3:break>", "end": "<eoss>", "eot": "<reserved08706>",
}  # fmt: skip
"""What the released vocabulary calls its control ids (spec of the released tokenizer)."""

_CODE = re.compile(r"IMGIMG([A-J]+)Z")

# As the released inference code samples text; pictures as the model gives them.
RELEASED_SAMPLING = SamplingParams(
    text=ModalityParams(temperature=0.7, top_p=0.9, repetition_penalty=1.2)
)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """config: as a native folder has it. weights, vq_weights: by our names, in our order.

    text: the file of the text tokenizer. vq: None where there is no image tokenizer; one without
    "decoder." among its weights reads pictures and writes none.
    """

    config: FolderConfig
    weights: Weights
    text: Path
    vq: VQConfig | None = None
    vq_weights: Weights = field(default_factory=dict)

    @property
    def can_decode(self) -> bool:
        """Whether there is a decoder of pictures."""
        return any(name.startswith("decoder.") for name in self.vq_weights)

    @property
    def all_weights(self) -> Weights:
        """The tensors of both models."""
        return self.weights | {f"image tokenizer: {n}": e for n, e in self.vq_weights.items()}

    @property
    def n_bytes(self) -> int:
        """Of all tensors."""
        return sum(entry.n_bytes for entry in self.all_weights.values())

    def only_finite(self) -> Checkpoint:
        """The same, of which no number that is infinite or none can be read: CheckpointError."""
        parts = (self.weights, self.vq_weights)
        weights, vq_weights = ({n: e.only_finite() for n, e in p.items()} for p in parts)
        return replace(self, weights=weights, vq_weights=vq_weights)

    @property
    def dtype(self) -> torch.dtype:
        """The type of most of the transformer's numbers."""
        sizes: dict[torch.dtype, int] = {}
        for entry in self.weights.values():
            sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.n_bytes
        return max(sizes, key=lambda dtype: sizes[dtype])


def shapes_of(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Our names of the transformer's parameters, in order, with their shapes."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in Transformer(config).state_dict().items()}


def vq_shapes_of(config: VQConfig) -> dict[str, tuple[int, ...]]:
    """The same of the image tokenizer."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in VQModel(config).state_dict().items()}


def checked(found: Weights, expected: Mapping[str, tuple[int, ...]], where: Path) -> Weights:
    """`found` in the order of `expected`. CheckpointError names what lacks or does not belong."""
    for name in expected:
        if name not in found:
            raise CheckpointError(f"{where} has no tensor for {name}.")
    for name, entry in found.items():
        if name not in expected:
            raise CheckpointError(f"{entry.where} has no place in a model of its config.")
        if entry.shape != expected[name]:
            raise CheckpointError(
                f"{entry.where} has shape {list(entry.shape)}, its config asks for"
                f" {list(expected[name])}."
            )
    return {name: found[name] for name in expected}


def checked_vq(found: Weights, config: VQConfig, where: Path) -> Weights:
    """`checked` for an image tokenizer, which may be without its decoder."""
    expected = vq_shapes_of(config)
    if not any(name.startswith("decoder.") for name in found):
        expected = {name: s for name, s in expected.items() if not name.startswith("decoder.")}
    return checked(found, expected, where)


def released_config(name: str, vocab: Vocab, shape: ModelConfig, text: str) -> FolderConfig:
    """Our config of a checkpoint that did not come from us.

    It may write text only: the owner of the released ones took their image output away.
    """
    return FolderConfig(name, vocab, shape, ("text",), RELEASED_SAMPLING, text)


def config_of_mark(
    mark: Mapping[str, Any],
    shape: ModelConfig,
    where: Path,
    ours_alone: tuple[str, ...] = ("dropout", "embedding_std"),
) -> FolderConfig:
    """Our config of a checkpoint that came from us, as its mark says.

    What the layout itself says of the shape holds over the mark; `ours_alone` is what it does not.
    CheckpointError for a mark that is malformed or of another vocabulary.
    """
    try:
        ours = from_dict(FolderConfig, mark)
        kept = {key: getattr(ours.model, key) for key in ours_alone}
        return replace(ours, model=replace(shape, **kept))
    except (UserError, ValueError) as error:
        raise CheckpointError(f"{where}, key {MARK!r}: {error}") from error


def vocab_from_names(
    names: Mapping[str, int], text: TextTokenizer, size: int, codes_per_item: int, where: Path
) -> Vocab:
    """The vocabulary of a released tokenizer, whose control ids are known by their names.

    CheckpointError where a name is missing, codes have gaps, or ids are claimed twice.
    """
    if not all(isinstance(i, int) for i in names.values()):
        raise CheckpointError(f"{where}: the ids of its names are not all whole numbers.")
    codes = {int(_digits(m[1])): i for n, i in names.items() if (m := _CODE.fullmatch(n))}
    lacking = [name for name in PUBLISHED.values() if name not in names]
    if lacking or not codes:
        what = ", ".join(lacking) or "names of picture codes (IMGIMG..Z)"
        raise CheckpointError(f"{where} lacks {what}, so it is no Chameleon vocabulary.")
    first = codes.get(0, -1)
    if sorted(codes) != list(range(len(codes))) or any(i != first + c for c, i in codes.items()):
        raise CheckpointError(
            f"{where}: the ids of the picture codes are not a run in their order."
        )
    ids = {key: names[name] for key, name in PUBLISHED.items()}
    image = CodeRange("image", ids["begin"], ids["end"], first, len(codes), codes_per_item)
    control = ("eot", "bos", "pad", "eos", "unk")
    try:
        return Vocab(
            size, text.text_start, text.text_stop, (image,), **{f"{k}_id": ids[k] for k in control}
        )
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}.") from error


def names_of_codes(n_codes: int) -> Iterable[str]:
    """The released names of picture codes: IMGIMGAZ, IMGIMGBZ, .. digits as letters."""
    for code in range(n_codes):
        letters = "".join(chr(ord("A") + int(digit)) for digit in str(code))
        yield f"IMGIMG{letters}Z"


def _digits(letters: str) -> str:
    return "".join(str(ord(letter) - ord("A")) for letter in letters)
