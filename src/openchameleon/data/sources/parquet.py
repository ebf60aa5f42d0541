"""Parquet: a picture and its caption a row, or two parallel lists of texts and pictures a row.

A picture is its bytes, or a struct with them in `bytes`, as data sets of the model hub have it; in
parallel lists (the form of OBELICS) also the path of a file beside. Each place of such lists holds
a text or a picture, and None in the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from openchameleon.data.sources.entry import Entry, Pairs, pair
from openchameleon.data.sources.location import beside, opened, picture_at
from openchameleon.document import Document, Image, Record, Segment, Text
from openchameleon.errors import UserError
from openchameleon.image_io import open_image

if TYPE_CHECKING:
    import PIL.Image

IMAGE_COLUMNS = ("image", "jpg", "png", "webp")
TEXT_COLUMNS = ("caption", "text", "txt")
INTERLEAVED = ("texts", "images")
ROWS_HELD = 64


def entries(location: str, pairs: Pairs) -> Iterator[Entry]:
    """A record a row, named by its number from 1: a pair, a text, or a document of both.

    UserError where no column is known; ValueError or OSError where the file is damaged.
    """
    with opened(location) as file:
        table = _parquet().ParquetFile(file)
        names = table.schema_arrow.names
        columns: tuple[str, ...]
        read: Callable[..., Record]
        if set(INTERLEAVED) <= set(names):
            columns, read = INTERLEAVED, partial(_lists, location)
        else:
            text = next((name for name in TEXT_COLUMNS if name in names), None)
            image = next((name for name in IMAGE_COLUMNS if name in names), None)
            if text is None:
                raise UserError(
                    f"{location} has no column {' or '.join(TEXT_COLUMNS)}, and not"
                    f" {' and '.join(INTERLEAVED)}: only {', '.join(names)}."
                )
            columns = (text, image) if image else (text,)
            read = partial(_pair, pairs) if image else _text
        name = location.rpartition("/")[2]
        for number, values in _rows(table, columns):
            yield Entry(f"{location}:{number}", partial(read, f"{name}:{number}", *values))


def _parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            "To read parquet, install pyarrow: pip install 'openchameleon[data]'."
        ) from error
    return pyarrow.parquet


def _rows(table: Any, columns: Sequence[str]) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """`(number from 1, values of the columns)` of each row, few of them held."""
    number = 0
    for batch in table.iter_batches(batch_size=ROWS_HELD, columns=list(columns)):
        for values in zip(*(batch.column(name).to_pylist() for name in columns), strict=True):
            number += 1
            yield number, values


def _pair(pairs: Pairs, key: str, caption: Any, image: Any) -> Record:
    return pair(key, _worded(caption).strip(), _picture(image), pairs)


def _text(key: str, text: Any) -> Record:
    return Document([Text(_worded(text))])


def _lists(location: str, key: str, texts: Any, images: Any) -> Record:
    if not isinstance(texts, list) or not isinstance(images, list) or len(texts) != len(images):
        raise ValueError("its texts and images are not two lists of one length")
    segments: list[Segment] = []
    for place, (text, image) in enumerate(zip(texts, images, strict=True), 1):
        if text is not None and image is not None:
            raise ValueError(f"place {place} holds a text and a picture; one of them must be None")
        if text is not None:
            segments.append(Text(text))
        elif isinstance(image, str):
            segments.append(Image(picture_at(beside(location, image))))
        elif image is not None:
            segments.append(Image(_picture(image)))
    if not segments:
        raise ValueError("empty")
    return Document(segments)


def _picture(image: Any) -> PIL.Image.Image:
    data = image.get("bytes") if isinstance(image, dict) else image
    if not isinstance(data, bytes):
        raise ValueError("there is no picture")
    return open_image(data)


def _worded(text: Any) -> str:
    if not isinstance(text, str) or not text.strip():
        raise ValueError("there is no text")
    return text
