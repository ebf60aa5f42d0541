"""What clients send as a conversation -> the conversation, with its pictures read under limits.

Each endpoint's messages become a flat list of `Given` parts. Parts of one role in a row are one
turn, so that a client can give back the items of an answer as they came. There are no role words
in this model family: what a system has to say stands before the first words of the user.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

import PIL.Image

from openchameleon.document import Conversation, Document, Image, Message, Role, Segment, Text
from openchameleon.errors import UserError
from openchameleon.image_io import FORMATS, open_image
from openchameleon.inference.sequence import Request
from openchameleon.serve import limits
from openchameleon.serve.errors import ApiError

MEDIA_TYPES = {f"image/{name.lower()}" for name in FORMATS} | {"image/jpg", "image/x-ms-bmp"}
SIGNATURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a", b"RIFF", b"BM")


@dataclass(frozen=True, slots=True)
class Given:
    """A part of a conversation: text, or a picture's URL or bare base64, and where it stood."""

    role: Role | Literal["system"]
    param: str
    text: str | None = None
    url: str | None = None
    png: str | None = None
    new_message: bool = False


def conversation(parts: Iterable[Given], context: int, param: str) -> Conversation:
    """The turns that the parts make. ApiError names the part that is wrong.

    context: the tokens a model holds; text that cannot fit is refused before it is looked at.
    param: what the whole of the parts is called.
    """
    parts = list(parts)
    n_chars = sum(len(part.text or "") for part in parts)
    if n_chars > context * limits.MAX_CHARS_PER_TOKEN:
        at_least = n_chars // limits.MAX_CHARS_PER_TOKEN
        raise ApiError(400, "context_length_exceeded",
                       f"The prompt is too long: its {n_chars} characters take at least {at_least}"
                       f" tokens and the model holds {context}; shorten it.", param)  # fmt: skip
    pictures = read_pictures(parts)
    system = [part for part in parts if part.role == "system"]
    turns: list[Message] = []
    said = [part for part in parts if part.role != "system"]
    for role, group in groupby(said, key=lambda part: part.role):
        assert role != "system"
        turn = list(group)
        if len(turns) % 2 != (role == "assistant"):
            raise ApiError(400, "invalid_value", "The first message must be the user's.",
                           turn[0].param)  # fmt: skip
        segments = [] if turns else [Text(f"{part.text}\n") for part in system]
        turns.append(Message(role, Document([*segments, *_segments(turn, pictures)])))
    if not turns or turns[-1].role != "user":
        raise ApiError(400, "invalid_value", "There is nothing to answer: the last message must be"
                       " the user's.", parts[-1].param if parts else param)  # fmt: skip
    last = turns[-1].document
    if not last.images and not last.text.strip():
        raise ApiError(400, "invalid_value", "The last message is empty: give some text or a"
                       " picture.", said[-1].param)  # fmt: skip
    return Conversation(turns)


def seeded(request: Request, n: int) -> list[Request]:
    """The request n times; answer i has the seed + i."""
    seed = request.params.seed
    assert seed is not None, "requests of clients have a seed"
    params = [replace(request.params, seed=(seed + i) % 2**63) for i in range(n)]
    return [replace(request, params=p) for p in params]


def _segments(turn: list[Given], pictures: dict[int, PIL.Image.Image]) -> Iterator[Segment]:
    for i, part in enumerate(turn):
        if i and part.new_message and part.role == "user":
            yield Text("\n")
        yield Image(pictures[id(part)]) if part.text is None else Text(part.text)


def read_pictures(parts: list[Given]) -> dict[int, PIL.Image.Image]:
    """id(part) -> picture of the parts that are one. Sizes are judged before pixels are decoded."""
    given = [part for part in parts if part.text is None]
    if len(given) > limits.MAX_PICTURES:
        raise ApiError(400, "too_many_images", f"The request has {len(given)} pictures, at most"
                       f" {limits.MAX_PICTURES} are read.", given[-1].param)  # fmt: skip
    files = [(part, _file(part)) for part in given]
    total = 0
    for part, data in files:
        total += _n_pixels(data, part.param)
        if total > limits.MAX_TOTAL_PIXELS:
            raise _too_large(f"The pictures have over {limits.MAX_TOTAL_PIXELS >> 20} million"
                             " pixels together", part.param)  # fmt: skip
    return {id(part): _decoded(data, part.param) for part, data in files}


def _file(part: Given) -> bytes:
    """The bytes of a picture's file."""
    if part.url is None:
        return _from_base64(part.png or "", part.param)
    scheme, _, rest = part.url.partition(":")
    if scheme.lower() != "data":
        raise ApiError(400, "url_not_allowed", "A picture's URL must be a data: URL, as in"
                       " data:image/png;base64,...; nothing is fetched.", part.param)  # fmt: skip
    head, comma, data = rest.partition(",")
    media_type, *options = head.lower().split(";")
    if media_type.startswith("image/") and media_type not in MEDIA_TYPES:
        raise _unsupported(part.param)
    if media_type not in MEDIA_TYPES or options[-1:] != ["base64"] or not comma:
        raise ApiError(400, "invalid_image", "A picture's URL must begin with"
                       " data:image/png;base64, or another image type.", part.param)  # fmt: skip
    return _from_base64(data, part.param)


def _from_base64(text: str, param: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):  # ValueError: characters beyond ASCII
        raise ApiError(400, "invalid_image", "The picture is not base64.", param) from None


def _n_pixels(data: bytes, param: str) -> int:
    """What the header says. ApiError for what is no picture, or too large a one."""
    if not data.startswith(SIGNATURES):
        raise _unsupported(param)
    try:
        with PIL.Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            n_pixels = picture.width * picture.height
    except PIL.Image.DecompressionBombError:
        n_pixels = limits.MAX_PIXELS + 1
    except Exception:  # a decoder may raise anything on hostile bytes
        raise ApiError(400, "invalid_image", "The picture cannot be read: it is damaged.",
                       param) from None  # fmt: skip
    if n_pixels > limits.MAX_PIXELS:
        raise _too_large(f"The picture has over {limits.MAX_PIXELS >> 20} million pixels", param)
    return n_pixels


def _decoded(data: bytes, param: str) -> PIL.Image.Image:
    try:
        return open_image(data, limits.MAX_PIXELS, limits.MAX_BODY)
    except UserError as error:
        raise ApiError(400, "invalid_image", str(error), param) from None


def _too_large(what: str, param: str) -> ApiError:
    return ApiError(400, "image_too_large", f"{what}; make it smaller.", param)


def _unsupported(param: str) -> ApiError:
    kinds = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
    return ApiError(415, "unsupported_image", f"The picture must be {kinds}.", param)
