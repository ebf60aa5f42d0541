"""What clients send as a conversation -> the conversation that the model answers.

Each endpoint's messages become a flat list of `Given` parts. Parts of one role in a row are one
turn, so that a client can give back the items of an answer as they came. There are no role words
in this model family: what a system has to say stands before the first words of the user.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

from openchameleon.document import Conversation, Document, Image, Message, Role, Segment, Text
from openchameleon.inference.sequence import Request
from openchameleon.pipeline import Chameleon
from openchameleon.serve import limits
from openchameleon.serve.errors import ApiError
from openchameleon.serve.fetch import Fetcher
from openchameleon.serve.pictures import Decode, Source, fetched, read_pictures

Speaker = Role | Literal["system"]


@dataclass(frozen=True, slots=True)
class Given:
    """A part of a conversation, and where it stood; `new_message`: it begins one."""

    role: Speaker
    param: str
    content: str | Source
    new_message: bool = False


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation that ends with the user's turn, and what of it was not read."""

    conversation: Conversation
    warnings: list[str]


def read_prompt(parts: list[Given], model: Chameleon, param: str, decode: Decode) -> Prompt:
    """The turns that the parts make, with their pictures. ApiError names the part that is wrong.

    The parts are none that `refuse_too_much` refuses. param: what the whole of them is called.
    decode: reads a picture's file.
    """
    sources = [part.content for part in parts if isinstance(part.content, Source)]
    pictures, warnings = read_pictures(sources, decode)
    pixels = iter(pictures)
    segments: list[tuple[Given, Segment]] = [
        (part, Text(part.content) if isinstance(part.content, str) else Image(next(pixels)))
        for part in parts
    ]
    system = [Text(f"{s.text}\n") for part, s in segments if isinstance(s, Text) and _told(part)]
    turns: list[Message] = []
    said = [(part, segment) for part, segment in segments if not _told(part)]
    for role, group in groupby(said, key=lambda pair: pair[0].role):
        turn = list(group)
        if (role == "assistant") != bool(len(turns) % 2):
            raise ApiError(400, "invalid_value", "The first message must be the user's.",
                           turn[0][0].param)  # fmt: skip
        before: list[Segment] = [] if turns else [*system]
        turns.append(Message(role, Document([*before, *_joined(turn)])))
    _refuse_nothing_asked(turns, parts, param)
    return Prompt(Conversation(turns), warnings)


async def with_fetched(parts: list[Given], fetcher: Fetcher) -> list[Given]:
    """The parts, with the files of pictures that stand elsewhere. ApiError as of `fetched`."""
    sources = [part.content for part in parts if isinstance(part.content, Source)]
    files = iter(await fetched(sources, fetcher))
    return [replace(p, content=next(files)) if isinstance(p.content, Source) else p for p in parts]


def seeded(request: Request, n: int) -> list[Request]:
    """The request n times; answer i has the seed + i."""
    seed = request.params.seed
    assert seed is not None, "requests of clients have a seed"
    params = [replace(request.params, seed=(seed + i) % 2**63) for i in range(n)]
    return [replace(request, params=p) for p in params]


def _told(part: Given) -> bool:
    return part.role == "system"


def _joined(turn: list[tuple[Given, Segment]]) -> Iterator[Segment]:
    """The segments of a turn; between two messages of a user there is a line's end."""
    for i, (part, segment) in enumerate(turn):
        if i and part.new_message and part.role == "user":
            yield Text("\n")
        yield segment


def refuse_too_much(parts: list[Given], model: Chameleon, param: str) -> None:
    """ApiError for what cannot fit, before pictures are read or text is encoded."""
    pictures = [part for part in parts if isinstance(part.content, Source)]
    told = [part for part in pictures if _told(part)]
    if told:
        raise ApiError(400, "invalid_value", "A system message cannot have pictures.",
                       told[0].param)  # fmt: skip
    users = [part for part in pictures if part.role == "user"]
    if len(users) > limits.MAX_PICTURES:
        raise ApiError(400, "too_many_images", f"The request has {len(users)} pictures, at most"
                       f" {limits.MAX_PICTURES} are read.", users[-1].param)  # fmt: skip
    n_chars = sum(len(part.content) for part in parts if isinstance(part.content, str))
    context = model.config.model.max_seq_len
    at_least = n_chars // limits.MAX_CHARS_PER_TOKEN
    if pictures and model.tokenizer.image is not None:
        at_least += len(pictures) * model.config.vocab.image.item_len
    if at_least > context:
        raise ApiError(400, "context_length_exceeded",
                       f"The prompt is too long: it takes over {at_least} tokens and the model"
                       f" holds {context}, its answer included; shorten it.", param)  # fmt: skip


def _refuse_nothing_asked(turns: list[Message], parts: list[Given], param: str) -> None:
    where = parts[-1].param if parts else param
    if not turns or turns[-1].role != "user":
        raise ApiError(400, "invalid_value", "There is nothing to answer: the last message must be"
                       " the user's.", where)  # fmt: skip
    last = turns[-1].document
    if not last.images and not last.text.strip():
        raise ApiError(400, "invalid_value", "The last message is empty: give some text or a"
                       " picture.", where)  # fmt: skip
