"""Chameleon: a model folder as one object; documents in, documents out.

Everything is a part of its own (`model`, `tokenizer`, `engine`); this file loads them together,
hands a prompt from one to the next, and holds the model to the outputs its folder allows.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypedDict, Unpack

import torch
from safetensors.torch import load_file

from openchameleon.checkpoints.checkpoint import Checkpoint
from openchameleon.checkpoints.convert import (
    layout_of,
    load_image_tokenizer,
    load_transformer,
    open_checkpoint,
)
from openchameleon.config import to_dict
from openchameleon.document import Conversation, Document, Text
from openchameleon.errors import UserError
from openchameleon.inference.engine import Engine
from openchameleon.inference.params import Mode, SamplingParams
from openchameleon.inference.sequence import FinishReason, Request
from openchameleon.inference.stored import StoredAs, store_weights
from openchameleon.model.transformer import Transformer
from openchameleon.model_folder import (
    CONFIG,
    IMAGE_TOKENIZER,
    TEXT_TOKENIZER,
    WEIGHTS,
    FolderConfig,
    find_model,
    named_dtype,
    read_config,
    read_model,
    save_weights,
)
from openchameleon.model_folder import embedded_models as embedded_models
from openchameleon.tokenizer.image import ImageTokenizer
from openchameleon.tokenizer.mixed import Event, MixedTokenizer, StreamDecoder
from openchameleon.tokenizer.text import load_text_tokenizer
from openchameleon.vocab import Vocab

NOT_FINITE = (
    "The model computed numbers that are not finite: its weights are damaged, or the dtype is too"
    " narrow for them."
)

Prompt = str | Document | Conversation
"""What a model continues: one user turn (text alone, or text and pictures), or a conversation."""


class PromptTooLong(UserError):
    """The prompt leaves the model no room for an answer."""


class Wishes(TypedDict, total=False):
    """What a call may change in a model's own sampling; None leaves it.

    mode: "interleaved" lets the model choose, "text" writes no picture, "image" writes a picture
    and nothing else. seed: the same seed gives the same answer. max_tokens: new ids at most.
    temperature, top_p, top_k: of text and pictures alike. guidance: how much more a picture
    follows the words than it would by itself.
    """

    mode: Mode | None
    seed: int | None
    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    guidance: float | None


class Chameleon:
    """A mixed-modal model with its tokenizers, ready to generate.

    `model(token_ids)`, with int64 (B, T), gives float32 logits (B, T, V). `tokenizer.encode` and
    `.decode` go between documents and ids. `engine` generates ids from ids.
    """

    def __init__(
        self,
        config: FolderConfig,
        model: Transformer,
        tokenizer: MixedTokenizer,
        engine: Engine | None = None,
    ) -> None:
        self.config = config
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.engine = engine or Engine(self.model, config.vocab)
        self.device = model.output_weight.device

    @staticmethod
    def from_pretrained(
        name_or_folder: str | Path,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        allow_pickle: bool = False,
        compiled: bool = False,
    ) -> Chameleon:
        """Loads an embedded model by its name, or a folder: ours, Hugging Face's or Meta's.

        device: by default the GPU where there is one. dtype: of the transformer, by default float32
        on a CPU and what the file holds elsewhere. On a CPU "bfloat16" is how the weights are held,
        in half the memory, and arithmetic is float32 still. "int8" rounds the weights to a quarter,
        on any device; such a model generates faster and cannot be saved.
        allow_pickle: Meta's files are pickles, which another process reads, for tensors alone.
        compiled: on a GPU, the step that writes is compiled and replayed as a graph: the first
        answer takes minutes longer, the others less. UserError where it is not a CUDA device.
        All of it is in memory then: nothing that happens to the files changes it.
        UserError says what was looked for, or which file is missing or damaged.
        """
        folder = find_model(str(name_or_folder))
        place = _device(device)
        if compiled and place.type != "cuda":
            raise UserError(
                f"Compiling is for a CUDA GPU, and this is {place.type}; on a CPU a native step"
                " does more, and by itself."
            )
        kind, stored = _dtype(dtype, place)
        if layout_of(folder) != "native" or (folder / f"{WEIGHTS}.index.json").is_file():
            config, model, tokenizer = _from_checkpoint(folder, place, kind, allow_pickle)
        else:
            config, tokenizer = read_config(folder), load_tokenizer(folder, place)
            with torch.random.fork_rng(devices=[]):  # as in `_image`
                model = read_model(folder, config.model, place, kind)
        if stored is not None:
            store_weights(model, stored, torch.float32 if place.type == "cpu" else None)
        _into_memory(model)
        engine = Engine(model, config.vocab, compiled=True) if compiled else None
        return Chameleon(config, model, tokenizer, engine)

    def save(self, folder: str | Path, dtype: str | torch.dtype | None = None) -> None:
        """Writes the model folder, whole or not at all; a model folder that is there is replaced.

        UserError where the folder holds anything else, which would be lost, and for a model that
        was loaded as int8. dtype: of all weights in the files, such as "bfloat16"; by default as
        they are.
        """
        folder = Path(folder)
        if any(weight.dtype == torch.int8 for weight in self.model.state_dict().values()):
            raise UserError(
                "The weights were rounded to int8 when they were loaded and cannot be saved; load"
                " the model without this dtype."
            )
        if folder.exists() and not _is_only_a_model(folder):
            raise UserError(f"{folder} holds other things than a model; name another folder.")
        temporary = folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex[:8]}")
        temporary.mkdir(parents=True)
        try:
            self._write(temporary, None if dtype is None else named_dtype(dtype))
            if folder.exists():
                aside = folder.with_name(f"{temporary.name}-old")
                folder.rename(aside)
                temporary.rename(folder)
                shutil.rmtree(aside)
            else:
                temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def generate(
        self,
        prompt: Prompt,
        *,
        raw: bool = False,
        params: SamplingParams | None = None,
        **wishes: Unpack[Wishes],
    ) -> Document:
        """The model's answer to `prompt`, which is one user turn or a conversation.

        raw: the prompt is continued as a document, not answered as a turn. params: replaces the
        model's own sampling; `wishes`: changes to single values of it, see `Wishes`.
        UserError if the prompt is empty or too long, a value is out of range, or the mode is one
        that the model must not write.
        """
        return self.generate_many([prompt], raw=raw, params=params, **wishes)[0]

    def generate_many(
        self,
        prompts: Sequence[Prompt],
        *,
        raw: bool = False,
        params: SamplingParams | None = None,
        **wishes: Unpack[Wishes],
    ) -> list[Document]:
        """`generate` for each prompt, in one batch; with a seed, prompt i has `seed + i`."""
        completions = self.complete_many(prompts, raw=raw, params=params, **wishes)
        return [self.tokenizer.decode(token_ids) for token_ids in completions]

    def complete_many(
        self,
        prompts: Sequence[Prompt],
        *,
        raw: bool = False,
        params: SamplingParams | None = None,
        **wishes: Unpack[Wishes],
    ) -> list[list[int]]:
        """`generate_many` before decoding: the new token ids of each answer, its end included."""
        sampling = _sampling(params or self.config.sampling, wishes)
        requests = []
        for i, prompt in enumerate(prompts):
            seed = None if sampling.seed is None else sampling.seed + i
            requests.append(self.request(prompt, raw=raw, params=replace(sampling, seed=seed)))
        completions = self.engine.generate(requests)
        for completion in completions:
            _require_finite(completion.finish_reason)
        return [list(completion.token_ids) for completion in completions]

    def stream(
        self,
        prompt: Prompt,
        *,
        raw: bool = False,
        params: SamplingParams | None = None,
        **wishes: Unpack[Wishes],
    ) -> Iterator[Event]:
        """`generate` as it happens: `TextDelta`, `ImageProgress` and `ImageDone`, in order.

        A wrong prompt is refused here, before the first piece is asked for.
        """
        request = self.request(prompt, raw=raw, params=params, **wishes)
        return self._events(self.engine.stream(request))

    def request(
        self,
        prompt: Prompt,
        *,
        raw: bool = False,
        params: SamplingParams | None = None,
        least_room: int = 1,
        **wishes: Unpack[Wishes],
    ) -> Request:
        """What `engine.add` takes, for those who step the engine themselves.

        least_room: tokens of the context that must be left for the answer; 0 lets a prompt in
        that fills it, whose answer is empty. Other arguments and errors as of `generate`; a prompt
        that is too long is a `PromptTooLong`.
        """
        sampling = _sampling(params or self.config.sampling, wishes)
        mode = self._allowed(sampling.mode)
        ids = self.tokenizer.render_prompt(_record(prompt, raw))
        context = self.config.model.max_seq_len
        if len(ids) + least_room > context:
            raise PromptTooLong(
                f"The prompt is too long: it takes {len(ids)} tokens and the model holds {context},"
                " its answer included; shorten it or leave pictures out."
            )
        room = min(context - len(ids), sampling.max_tokens or context)
        if mode == "image" and room <= self.config.vocab.image.item_len:
            raise UserError(
                f"There is no room for a picture: it takes {self.config.vocab.image.item_len + 1}"
                f" tokens and {room} may be written; shorten the prompt or allow more tokens."
            )
        return Request(ids, replace(sampling, mode=mode))

    def _events(self, token_ids: Generator[int, None, FinishReason]) -> Iterator[Event]:
        decoder = StreamDecoder(self.tokenizer)
        while True:
            try:
                token_id = next(token_ids)
            except StopIteration as end:
                _require_finite(end.value)
                break
            yield from decoder.push(token_id)
        yield from decoder.finish()

    def _allowed(self, mode: Mode) -> Mode:
        """`mode`, narrowed to what the model may write. UserError if nothing is left of it."""
        outputs = self.config.outputs
        if mode == "interleaved" and len(outputs) == 1:
            return outputs[0]
        if mode != "interleaved" and mode not in outputs:
            raise UserError(
                f"The model {self.config.name!r} writes {outputs[0]} only, so mode {mode!r}"
                " cannot be used with it."
            )
        return mode

    def _write(self, folder: Path, dtype: torch.dtype | None) -> None:
        config = to_dict(self.config)
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_weights(self.model.state_dict(), folder / WEIGHTS, dtype)
        self.tokenizer.text.save(folder / self.config.text_tokenizer)
        if self.tokenizer.image is not None:
            self.tokenizer.image.save(folder / IMAGE_TOKENIZER)
            weights = load_file(folder / IMAGE_TOKENIZER / WEIGHTS)
            save_weights(weights, folder / IMAGE_TOKENIZER / WEIGHTS, dtype)


def load_tokenizer(
    name_or_folder: str | Path,
    device: str | torch.device | None = None,
    allow_pickle: bool = False,
) -> MixedTokenizer:
    """The tokenizers of a model, whose own weights are not read, or a folder of tokenizers alone.

    Such a folder holds `tokenizer.model` and `image_tokenizer/`, as `openchameleon tokenizer` makes
    them. Arguments and errors as of `Chameleon.from_pretrained`.
    """
    place, folder = _device(device), Path(name_or_folder)
    if (folder / TEXT_TOKENIZER).is_file() and not (folder / CONFIG).is_file():
        text, image = load_text_tokenizer(folder / TEXT_TOKENIZER), _image(folder, place)
        n_codes, codes_per_item = 8192, 1024  # what `tokenizer text` leaves room for
        if image is not None:
            n_codes, codes_per_item = image.codebook_size, image.n_codes
        vocab = Vocab.compact(n_codes, codes_per_item, text.n_ids - text.text_start)
        return MixedTokenizer(vocab, text, image)
    folder = find_model(str(name_or_folder))
    if layout_of(folder) != "native":
        return _tokenizer_of(open_checkpoint(folder, allow_pickle), place)
    config = read_config(folder)
    text, image = load_text_tokenizer(folder / config.text_tokenizer), _image(folder, place)
    return MixedTokenizer(config.vocab, text, image, config.picture_first)


def _image(folder: Path, device: torch.device) -> ImageTokenizer | None:
    if not (folder / IMAGE_TOKENIZER).is_dir():
        return None
    with torch.random.fork_rng(devices=[]):  # building modules draws from the caller's numbers
        return ImageTokenizer.load(folder / IMAGE_TOKENIZER, device)


def _tokenizer_of(checkpoint: Checkpoint, device: torch.device) -> MixedTokenizer:
    with torch.random.fork_rng(devices=[]):
        image = load_image_tokenizer(checkpoint)
    return MixedTokenizer(
        checkpoint.config.vocab,
        load_text_tokenizer(checkpoint.text),
        image.to(device) if image else None,
        checkpoint.config.picture_first,
    )


def _from_checkpoint(
    folder: Path, device: torch.device, dtype: torch.dtype | None, allow_pickle: bool
) -> tuple[FolderConfig, Transformer, MixedTokenizer]:
    """A model in another layout than ours, or in shards."""
    checkpoint = open_checkpoint(folder, allow_pickle)
    tokenizer = _tokenizer_of(checkpoint, device)
    return checkpoint.config, load_transformer(checkpoint, device, dtype), tokenizer


def _into_memory(model: Transformer) -> None:
    """Copies a tensor at a time what may still be a mapped file.

    A file that is written over would change the model, and one that is cut off would kill the
    process.
    """
    for weight in (*model.parameters(), *model.buffers()):
        if weight.device.type == "cpu":
            weight.data = weight.data.clone()


def _sampling(base: SamplingParams, wishes: Wishes) -> SamplingParams:
    """`base` with what the caller wishes; what is None or absent stays. UserError: out of range."""
    given = {key: value for key, value in wishes.items() if value is not None}
    own = {key: given.pop(key) for key in ("temperature", "top_p", "top_k") if key in given}
    if "guidance" in given:
        given["guidance_text"] = given.pop("guidance")
    try:
        modalities = {name: replace(getattr(base, name), **own) for name in ("text", "image")}
        return replace(base, **modalities, **given)  # type: ignore[arg-type]
    except ValueError as error:
        raise UserError(f"{error}.") from error


def _require_finite(reason: FinishReason) -> None:
    if reason == "nonfinite_logits":
        raise UserError(NOT_FINITE)


def _record(prompt: Prompt, raw: bool) -> Document | Conversation:
    """What the tokenizer is to render: a document to continue, or turns to answer."""
    if isinstance(prompt, Conversation):
        if raw:
            raise UserError("A conversation cannot be continued raw; give one document.")
        if not prompt.messages or prompt.messages[-1].role != "user":
            raise UserError("There is nothing to answer: the last turn must be the user's.")
        return prompt
    document = Document([Text(prompt)]) if isinstance(prompt, str) else prompt
    if not document.images and not document.text.strip():
        raise UserError("The prompt is empty: give some text or a picture.")
    return document if raw else Conversation.ask(document)


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def _dtype(
    dtype: str | torch.dtype | None, device: torch.device
) -> tuple[torch.dtype | None, StoredAs | None]:
    """The type to read weights in, None keeps the file's; and how they are held, if otherwise.

    CPUs compute in float32: half types are slower there.
    """
    on_cpu = device.type == "cpu"
    if dtype is None:
        return torch.float32 if on_cpu else None, None
    if dtype in ("int8", torch.int8):
        return None, "int8"
    if named_dtype(dtype) == torch.bfloat16 and on_cpu:
        return None, "bfloat16"
    return named_dtype(dtype), None


def _is_only_a_model(folder: Path) -> bool:
    """Whether a folder holds a model and nothing else, or nothing at all."""
    if not folder.is_dir():
        return False
    there = {path.name for path in folder.iterdir()}
    try:
        tokenizer = read_config(folder).text_tokenizer if there else ""
    except UserError:
        return False
    return there <= {CONFIG, WEIGHTS, IMAGE_TOKENIZER, tokenizer}
