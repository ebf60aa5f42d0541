"""Documents <-> token ids: text pieces and picture codes in one id space, whole or as a stream."""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import PIL.Image
import torch

from openchameleon.config import config_hash
from openchameleon.document import Conversation, Document, Image, Record, Text
from openchameleon.errors import UserError
from openchameleon.image_io import Fit, to_rgb
from openchameleon.tokenizer import chat
from openchameleon.tokenizer.image import ImageTokenizer
from openchameleon.tokenizer.text import TextTokenizer
from openchameleon.vocab import CodeRange, Vocab

PictureIds = dict[tuple[Fit, bytes], list[int]]
"""(how it becomes a square, hash of a picture) -> its ids."""


class MixedTokenizer:
    """Text and pictures of a document, each by its own tokenizer, laid out by `vocab`.

    Pictures are cropped to squares, but those that a user shows in a conversation are padded, so
    that nothing of them is lost (paper, section 3.2). UserError if the parts do not fit the
    vocabulary. Without an image tokenizer it handles text.

    picture_first: in a conversation, the only picture of a user's turn is read before its words,
    wherever it stands among them: so a small model learns one order of the two, not both
    (docs/LOG.md). Several pictures stay where the words need them.
    """

    def __init__(
        self,
        vocab: Vocab,
        text: TextTokenizer,
        image: ImageTokenizer | None = None,
        picture_first: bool = False,
    ) -> None:
        self.vocab, self.text, self.image = vocab, text, image
        self.picture_first = picture_first
        if text.text_start < vocab.text_start or text.text_stop > vocab.text_stop:
            raise UserError(
                f"The text tokenizer writes ids {text.text_start}..{text.text_stop - 1}, the"
                f" vocabulary keeps {vocab.text_start}..{vocab.text_stop - 1} for text."
            )
        if image is not None:
            room = [(r.codes_per_item, r.count) for r in vocab.code_ranges if r.name == "image"]
            if (image.n_codes, image.codebook_size) not in room:
                raise UserError(
                    f"The image tokenizer writes {image.n_codes} codes out of"
                    f" {image.codebook_size} a picture, the vocabulary (codes, out of) {room}."
                )

    def fingerprint(self) -> str:
        """Sixteen hex digits that change with all that its ids depend on."""
        image = self.image.fingerprint() if self.image else None
        layout = (self.vocab.to_dict(), self.picture_first)
        return config_hash(*layout, self.text.fingerprint(), image)

    def encode(self, document: Document) -> list[int]:
        """The ids of text and pictures in order, without begin and end of sequence.

        UserError for a picture where the model has no image tokenizer, or text that is no Unicode.
        """
        return self._encode_segments(document, "crop", self._picture_ids([(document, "crop")]))

    def n_ids(self, document: Document) -> int:
        """How many ids `encode` gives; no picture is looked at. UserError as there."""
        if document.images:
            self._image_tokenizer()
        return sum(
            len(self.text.encode(s.text)) if isinstance(s, Text) else self.vocab.image.item_len
            for s in document
        )

    def encode_record(self, record: Record, answers_only: bool = True) -> chat.Tokens:
        """A document or a conversation as `(ids, loss_mask)` to learn from; see `chat`."""
        return self.encode_many([record], answers_only)[0]

    def encode_many(
        self, records: Sequence[Record], answers_only: bool = True
    ) -> list[chat.Tokens]:
        """`encode_record` of each, with all their pictures in batches and equal ones once."""
        pictures = self._picture_ids(d for record in records for d in fitted(record))
        return [self._tokens(record, pictures, answers_only) for record in records]

    def render_prompt(self, record: Record) -> list[int]:
        """The ids to continue: `<bos> segments`, or a conversation up to its answer's start."""
        pictures = self._picture_ids(fitted(record))
        if isinstance(record, Document):
            return [self.vocab.bos_id, *self._encode_segments(record, "crop", pictures)]
        return chat.wrap_prompt(self._turns(record, pictures), self.vocab)

    def decode(self, token_ids: Iterable[int]) -> Document:
        """The inverse of `encode`: neighbouring text joined; begin, end, turn and pad ids dropped.

        ValueError with the position where the ids are no document: a picture with a wrong number
        of codes, codes outside a picture, reserved ids. UserError without an image tokenizer.
        """
        reader = _Reader(self.vocab, self.text)
        parts: list[bytearray | list[int]] = []
        for token_id in token_ids:
            piece = reader.push(token_id)
            if isinstance(piece, list):
                parts.append(piece)
            elif isinstance(piece, bytes):
                text = parts[-1] if parts else None
                if not isinstance(text, bytearray):
                    text = bytearray()
                    parts.append(text)
                text += piece
        reader.close()
        pictures = iter(self.decode_pictures([p for p in parts if isinstance(p, list)]))
        return Document(
            Image(next(pictures)) if isinstance(p, list) else Text(p.decode("utf-8", "replace"))
            for p in parts
        )

    def decode_pictures(self, codes: list[list[int]]) -> list[PIL.Image.Image]:
        """Whole pictures from their codes (0 .. count-1), in one batch."""
        if not codes:
            return []
        return self._image_tokenizer().decode(torch.tensor(codes, dtype=torch.int64))

    def _image_tokenizer(self) -> ImageTokenizer:
        if self.image is None:
            raise UserError("This model has no image tokenizer: it reads and writes text only.")
        return self.image

    def _picture_ids(self, documents: Iterable[tuple[Document, Fit]]) -> PictureIds:
        """The ids of every picture of the documents, each encoded once."""
        pictures = {(fit, _key(p)): p for document, fit in documents for p in document.images}
        found: PictureIds = {}
        for fit in sorted({fit for fit, _ in pictures}):
            some = {key: p for key, p in pictures.items() if key[0] == fit}
            codes = self._image_tokenizer().encode(list(some.values()), fit).tolist()
            found |= zip(some, map(self.vocab.image.ids_from_codes, codes), strict=True)
        return found

    def _encode_segments(self, document: Document, fit: Fit, pictures: PictureIds) -> list[int]:
        ids: list[int] = []
        for s in document:
            ids += self.text.encode(s.text) if isinstance(s, Text) else pictures[fit, _key(s.pil)]
        return ids

    def _turns(self, record: Conversation, pictures: PictureIds) -> list[chat.Turn]:
        turns: list[chat.Turn] = []
        for turn, (document, fit) in zip(record.messages, fitted(record), strict=True):
            if self.picture_first and turn.role == "user" and len(document.images) == 1:
                document = Document(sorted(document, key=lambda s: isinstance(s, Text)))
            turns.append((turn.role, self._encode_segments(document, fit, pictures)))
        return turns

    def _tokens(self, record: Record, pictures: PictureIds, answers_only: bool) -> chat.Tokens:
        if isinstance(record, Document):
            return chat.wrap_document(self._encode_segments(record, "crop", pictures), self.vocab)
        return chat.wrap_conversation(self._turns(record, pictures), self.vocab, answers_only)


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More text, of whole characters."""

    text: str


@dataclass(frozen=True, slots=True)
class ImageProgress:
    """A picture is being written: from 0 codes, when it opens, to all."""

    codes_done: int
    codes_total: int


@dataclass(frozen=True, slots=True, eq=False)
class ImageDone:
    """A picture is whole."""

    pil: PIL.Image.Image


Event = TextDelta | ImageProgress | ImageDone


class StreamDecoder:
    """Ids one by one -> events. The text deltas and pictures, joined, are what `decode` returns."""

    def __init__(self, tokenizer: MixedTokenizer) -> None:
        self._tokenizer = tokenizer
        self._reader = _Reader(tokenizer.vocab, tokenizer.text)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> list[Event]:
        """What this id completes. ValueError where `decode` raises one."""
        piece = self._reader.push(token_id)
        if isinstance(piece, bytes):
            return self._text(piece)
        if isinstance(piece, ImageProgress):
            # Half a character before a picture will not be completed after it.
            return [*(self._text(b"", final=True) if piece.codes_done == 0 else []), piece]
        if isinstance(piece, list):
            return [ImageDone(self._tokenizer.decode_pictures([piece])[0])]
        return []

    def finish(self) -> list[Event]:
        """What the end of the ids completes. ValueError if it cuts a picture off."""
        self._reader.close()
        return self._text(b"", final=True)

    def _text(self, data: bytes, final: bool = False) -> list[Event]:
        text = self._utf8.decode(data, final)
        return [TextDelta(text)] if text else []


class _Reader:
    """The grammar of a sequence, one id at a time."""

    def __init__(self, vocab: Vocab, text: TextTokenizer) -> None:
        self._vocab, self._text = vocab, text
        self._dropped = {vocab.bos_id, vocab.pad_id, vocab.eos_id, vocab.eot_id}
        self._open: CodeRange | None = None
        self._codes: list[int] = []
        self._position = -1

    def push(self, token_id: int) -> bytes | ImageProgress | list[int] | None:
        """Bytes of text, progress inside an item, the codes of a closed item, or None: dropped."""
        self._position += 1
        if self._open is not None:
            return self._push_inside(token_id, self._open)
        if self._vocab.is_text(token_id):
            return self._text.bytes_of(token_id)
        if token_id in self._dropped:
            return None
        self._open = self._vocab.range_begun_by(token_id)
        if self._open is None or self._open.name != "image":
            raise ValueError(f"id {token_id} at position {self._position} has no place in text")
        self._codes = []
        return ImageProgress(0, self._open.codes_per_item)

    def _push_inside(self, token_id: int, item: CodeRange) -> ImageProgress | list[int]:
        done, total = len(self._codes), item.codes_per_item
        if item.first_id <= token_id < item.stop_id and done < total:
            self._codes.append(token_id - item.first_id)
            return ImageProgress(done + 1, total)
        if token_id == item.end_id and done == total:
            self._open = None
            return self._codes
        raise ValueError(
            f"id {token_id} at position {self._position} breaks the {item.name} after {done} of"
            f" {total} codes"
        )

    def close(self) -> None:
        """ValueError if the ids end inside an item."""
        if self._open is not None:
            raise ValueError(
                f"the ids end at position {self._position} inside the {self._open.name}, after"
                f" {len(self._codes)} of {self._open.codes_per_item} codes"
            )


def fitted(record: Record) -> list[tuple[Document, Fit]]:
    """The documents of a record, and how their pictures become squares."""
    if isinstance(record, Document):
        return [(record, "crop")]
    return [(m.document, "pad" if m.role == "user" else "crop") for m in record.messages]


def _key(picture: PIL.Image.Image) -> bytes:
    """A hash of what the picture shows: equal keys, equal codes."""
    head = f"{picture.width} {picture.height} ".encode()
    return hashlib.sha256(head + to_rgb(picture).tobytes()).digest()
