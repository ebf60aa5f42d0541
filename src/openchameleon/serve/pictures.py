"""Pictures that clients send, in base64 or as URLs -> RGB, under limits for the request.

What a header says is judged for all of them before a pixel of any is decoded.
"""

from __future__ import annotations

import base64
import binascii
import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import PIL.Image

from openchameleon.errors import UserError
from openchameleon.image_io import FORMATS
from openchameleon.serve import limits
from openchameleon.serve.errors import ApiError
from openchameleon.serve.fetch import MAX_BYTES, SECONDS, Fetcher

MEDIA_TYPES = {f"image/{name.lower()}" for name in FORMATS} | {"image/jpg", "image/x-ms-bmp"}
SIGNATURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a", b"RIFF", b"BM")


@dataclass(frozen=True, slots=True)
class Source:
    """A picture as it was sent: `url`, or its file in base64, and the path of its field.

    file: what was fetched from the URL.
    """

    param: str
    url: str | None = None
    base64: str = ""
    file: bytes | None = None


Decode = Callable[[bytes], PIL.Image.Image]
"""A picture's file -> RGB. UserError for one that is damaged."""


async def fetched(sources: Sequence[Source], fetcher: Fetcher) -> list[Source]:
    """The pictures with the files of those whose URLs are no data, which are fetched here.

    All of a request's within one time and one number of bytes. ApiError.
    """
    deadline, left = time.monotonic() + SECONDS, limits.MAX_BODY
    found = []
    for source in sources:
        if source.url is not None and source.url[:5].lower() != "data:":
            file = await fetcher.fetch(source.url, source.param, deadline, min(MAX_BYTES, left))
            left -= len(file)
            source = replace(source, file=file)
        found.append(source)
    return found


def read_pictures(
    sources: Sequence[Source], decode: Decode
) -> tuple[list[PIL.Image.Image], list[str]]:
    """The pictures, and a sentence for each of which only a part is read. ApiError for the rest."""
    files = [(source.param, _file(source)) for source in sources]
    total, warnings = 0, []
    for param, data in files:
        n_pixels, animated = _header(data, param)
        total += n_pixels
        if total > limits.MAX_TOTAL_PIXELS:
            raise _too_large(f"The pictures have over {limits.MAX_TOTAL_PIXELS >> 20} million"
                             " pixels together", param)  # fmt: skip
        if animated:
            warnings.append(f"{param} is animated: only its first frame was read.")
    return [_decoded(data, param, decode) for param, data in files], warnings


def _file(source: Source) -> bytes:
    """The bytes of a picture's file."""
    param = source.param
    if source.file is not None:
        return source.file
    if source.url is None:
        return _from_base64(source.base64, param)
    scheme, _, rest = source.url.partition(":")
    if scheme.lower() != "data":
        raise ApiError(400, "url_not_allowed", "A picture's URL must be a data: URL, as in"
                       " data:image/png;base64,...; nothing is fetched.", param)  # fmt: skip
    head, comma, data = rest.partition(",")
    media_type, *options = head.lower().split(";")
    if media_type.startswith("image/") and media_type not in MEDIA_TYPES:
        raise _unsupported(param)
    if media_type not in MEDIA_TYPES or options[-1:] != ["base64"] or not comma:
        raise ApiError(400, "invalid_image", "A picture's URL must begin with"
                       " data:image/png;base64, or another image type.", param)  # fmt: skip
    return _from_base64(data, param)


def _from_base64(text: str, param: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):  # ValueError: characters beyond ASCII
        raise ApiError(400, "invalid_image", "The picture is not base64.", param) from None


def _header(data: bytes, param: str) -> tuple[int, bool]:
    """(pixels, animated or not). ApiError for what is no picture, or too large a one."""
    if not data.startswith(SIGNATURES):
        raise _unsupported(param)
    too_large = _too_large(f"The picture has over {limits.MAX_PIXELS >> 20} million pixels", param)
    try:
        with PIL.Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            n_pixels = picture.width * picture.height
            if n_pixels > limits.MAX_PIXELS:
                raise too_large
            return n_pixels, bool(getattr(picture, "is_animated", False))
    except (ApiError, PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning):
        raise too_large from None
    except Exception:  # a decoder may raise anything on hostile bytes
        raise ApiError(400, "invalid_image", "The picture cannot be read: it is damaged.",
                       param) from None  # fmt: skip


def _decoded(data: bytes, param: str, decode: Decode) -> PIL.Image.Image:
    try:
        return decode(data)
    except UserError as error:
        raise ApiError(400, "invalid_image", str(error), param) from None


def _too_large(what: str, param: str) -> ApiError:
    return ApiError(400, "image_too_large", f"{what}; make it smaller.", param)


def _unsupported(param: str) -> ApiError:
    kinds = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
    return ApiError(415, "unsupported_image", f"The picture must be {kinds}.", param)
