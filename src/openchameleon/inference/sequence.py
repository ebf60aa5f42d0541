"""What passes through the engine: a request, the sequence it becomes, and its completion."""

from __future__ import annotations

from collections.abc import Sequence as Ids
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from openchameleon.inference.params import ModalityParams, SamplingParams

FinishReason = Literal["stop", "length", "nonfinite_logits", "aborted"]


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt, ids in and bos included, and what is wished of its answer."""

    token_ids: Ids[int]
    params: SamplingParams = field(default_factory=SamplingParams)


@dataclass(frozen=True, slots=True)
class Completion:
    """The new ids, without the prompt and without the closing eos, and why they end.

    "stop": the model wrote eos. "length": no room was left, in max_tokens or in the context, for
    what would have had to come next. "nonfinite_logits": the model's output was not finite; only
    then, and when it was "aborted" by who asked, may the last item be incomplete.
    """

    token_ids: list[int]
    finish_reason: FinishReason


@dataclass(slots=True, eq=False)
class Stream:
    """Ids that the model reads as one row, the blocks of the cache they are read into.

    n_read: how many of them it has read. guess: what may follow them, read with the last (see
    lookahead.py). hidden: what the output head reads after the last of them and after each guess,
    (1 + len(guess), C), once all are read. serial, n_published: the bookkeeping of shared blocks.
    """

    token_ids: list[int]
    guess: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    n_read: int = 0
    hidden: Tensor | None = None
    serial: int = 0
    n_published: int = 0

    @property
    def n_pending(self) -> int:
        return len(self.token_ids) - self.n_read


@dataclass(slots=True, eq=False)
class Sequence:
    """A request under way. `state` is its row of modality state (see modality.py)."""

    params: SamplingParams
    prompt: list[int]
    state: list[int]
    arrival: int
    full: Stream = field(init=False)
    guidance: list[Stream] = field(default_factory=list)
    generator: torch.Generator | None = None
    uniforms: list[float] = field(default_factory=list)
    seen: Tensor | None = None
    finish_reason: FinishReason | None = None

    def __post_init__(self) -> None:
        self.full = Stream(list(self.prompt))
        self.generator = generator_for(self.params)

    @property
    def new_ids(self) -> list[int]:
        return self.full.token_ids[len(self.prompt) :]

    @property
    def streams(self) -> list[Stream]:
        """Its own, and while it writes codes under guidance one or two that see less."""
        return [self.full, *self.guidance]

    @property
    def is_read(self) -> bool:
        """Whether the model has read all of it, so that its next id can be drawn."""
        return not any(stream.n_pending for stream in self.streams)

    @property
    def drawing_from(self) -> int:
        """Index of the code range whose codes come next, or -1."""
        open_range, codes_left = self.state[:2]
        return open_range if codes_left else -1

    @property
    def modality(self) -> ModalityParams:
        return self.params.text if self.drawing_from < 0 else self.params.image

    @property
    def max_rows(self) -> int:
        """Streams it may come to have."""
        return 1 if self.params.guidance is None or self.params.mode == "text" else 3

    @property
    def guess(self) -> list[int]:
        """The codes that are guessed to come next."""
        return self.full.guess

    def set_guess(self, codes: list[int]) -> None:
        for stream in self.streams:
            stream.guess = codes

    def append(self, token_ids: list[int]) -> None:
        """Gives it its next ids. All but the last were guessed, and so are read already."""
        for stream in self.streams:
            stream.token_ids += token_ids
            stream.n_read += len(token_ids) - 1
        if self.modality.temperature > 0:
            del self.uniforms[: len(token_ids)]

    def next_uniforms(self, n: int) -> list[float]:
        """The random numbers of the next n ids, one each; `append` uses them up."""
        if self.modality.temperature == 0:
            return [0.0] * n
        while len(self.uniforms) < n:
            self.uniforms.append(uniform(self.generator, self.modality))
        return self.uniforms[:n]

    def completion(self) -> Completion:
        assert self.finish_reason is not None, "a completion was asked of an unfinished sequence"
        return Completion(self.new_ids, self.finish_reason)


def generator_for(params: SamplingParams) -> torch.Generator | None:
    """The request's own randomness, on the CPU; None where nothing is drawn (greedy throughout)."""
    if params.text.temperature == 0 and params.image.temperature == 0:
        return None
    generator = torch.Generator()
    if params.seed is None:
        generator.seed()
        return generator
    return generator.manual_seed(params.seed)


def uniform(generator: torch.Generator | None, params: ModalityParams) -> float:
    """The number that an id is drawn at; a greedy one has no use for any and takes none."""
    return torch.rand((), generator=generator).item() if params.temperature > 0 else 0.0
