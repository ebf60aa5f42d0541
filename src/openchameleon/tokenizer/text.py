"""Text <-> ids, losslessly, in a way that no spelling becomes a control id or a picture's code.

Two backends behind one interface: a sentencepiece BPE that we train, and the BPE of a
`tokenizer.json`, byte-level or with byte fallback. Both decode by bytes: every text id stands for
fixed bytes, so that decoding a sequence is joining the bytes of its ids, whole or as a stream.
Knows nothing of pictures.
"""

from __future__ import annotations

import io
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from openchameleon.errors import UserError
from openchameleon.files import sha256_of
from openchameleon.vocab import Vocab

_MARK = "\u2581"  # what sentencepiece writes for a space

# Whatever a lossy setting would change: a leading space, runs of spaces, newlines, a combining
# accent beside a composed one, the mark itself, digits, an emoji.
_PROBE = "  a\n\n  B\t\r\n e\u0301\u00e9 \u2581 123 \U0001f63a "


class TextTokenizer(ABC):
    """The interface, and decoding, which is the same for every backend.

    `spellings[i]` is the bytes of id i, or None where i is no text (control ids, codes).
    """

    def __init__(self, spellings: Sequence[bytes | None], name: str) -> None:
        self._spellings = list(spellings)
        text_ids = [i for i, spelling in enumerate(self._spellings) if spelling is not None]
        self.n_ids = len(self._spellings)
        """Ids of the whole space, those that are no text included."""
        self.text_start = text_ids[0] if text_ids else 0
        """The lowest id that any text gives."""
        self.text_stop = text_ids[-1] + 1 if text_ids else 0
        """One above the highest id that any text gives."""
        if self.decode(self.encode(_PROBE)) != _PROBE:
            raise UserError(
                f"{name} does not give back the text it is given (it normalizes or adds spaces);"
                " use a tokenizer without normalizer and prefix space."
            )

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Any text to text ids only, whatever it spells. UserError if it has a lone surrogate."""

    def bytes_of(self, token_id: int) -> bytes:
        """The UTF-8 bytes of one id, perhaps part of a character. ValueError if it is no text."""
        spelling = self._spellings[token_id] if 0 <= token_id < self.n_ids else None
        if spelling is None:
            raise ValueError(f"id {token_id} is not a text id")
        return spelling

    def decode(self, token_ids: Iterable[int]) -> str:
        """The inverse of `encode`; bytes that are no UTF-8 become U+FFFD. ValueError: not text."""
        return b"".join(map(self.bytes_of, token_ids)).decode("utf-8", "replace")

    @abstractmethod
    def save(self, path: str | Path) -> None:
        """Writes the one file that `load_text_tokenizer` reads."""

    def fingerprint(self) -> str:
        """Hex digits that change with what `save` writes."""
        with TemporaryDirectory() as folder:
            self.save(file := Path(folder) / "tokenizer")
            return sha256_of(file)


class SentencePieceTokenizer(TextTokenizer):
    """A sentencepiece model with byte fallback: `.model` files, made by `train_text_tokenizer`."""

    def __init__(self, model: bytes, name: str = "The sentencepiece model") -> None:
        from sentencepiece import SentencePieceProcessor

        self._model = model
        try:
            self._processor = SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise UserError(f"{name} is not a sentencepiece model.") from error
        sp = self._processor
        self._bytes_of_mark = [sp.piece_to_id(f"<0x{b:02X}>") for b in _MARK.encode()]
        if not all(map(sp.is_byte, self._bytes_of_mark)):
            raise UserError(f"{name} has no byte pieces, so it cannot write every text.")
        super().__init__([_sentencepiece_spelling(sp, i) for i in range(sp.vocab_size())], name)

    @staticmethod
    def load(path: str | Path) -> SentencePieceTokenizer:
        """Reads a `.model` file. UserError if it is missing, no such model, or lossy."""
        return SentencePieceTokenizer(_read(Path(path)), str(path))

    def encode(self, text: str) -> list[int]:
        _refuse_surrogates(text)
        return _around_marks(text, self._processor.encode, self._bytes_of_mark)

    def save(self, path: str | Path) -> None:
        Path(path).write_bytes(self._model)


class HFTokenizer(TextTokenizer):
    """The BPE of a `tokenizer.json`: byte-level, or with byte fallback and marks for spaces.

    The one is what released Chameleon models have, and Llamas since 3; the other is what Llamas
    before had. It puts a space before each text there, which ours does not: a text is given back
    as it was. `encode(" " + text)` are the ids that such a Llama knows a text's beginning by.
    """

    def __init__(self, source: bytes, name: str = "The tokenizer.json") -> None:
        from tokenizers import Tokenizer

        try:
            data = json.loads(source)
            added = {entry["id"] for entry in data.get("added_tokens") or ()}
            vocab: dict[str, int] = data["model"]["vocab"]
            # Added tokens match their name wherever a text spells it, special or not. The library's
            # switch against it covers the special ones only and is not stored in the file, so the
            # encoder is built without them. Nor does it add, cut or pad: the caller does.
            for key in ("added_tokens", "post_processor", "truncation", "padding"):
                data[key] = [] if key == "added_tokens" else None
            self._has_marks = bool(data["model"].get("byte_fallback"))
            if self._has_marks:
                data |= _marks_without_prefix(data)
            self._tokenizer = Tokenizer.from_str(json.dumps(data))
        except UserError as error:
            raise UserError(f"{name} {error}") from error
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{name} is not a readable tokenizer.json: {error}") from error
        self._source = source
        table = _byte_of_piece() if self._has_marks else _byte_of_character()
        if not all(piece in vocab for piece in table):
            raise UserError(
                f"{name} is neither a byte-level BPE nor one with byte fallback: it lacks some of"
                " the 256 bytes."
            )
        self._id_of_byte = {byte: vocab[piece] for piece, byte in table.items()}
        self._piece_bytes: dict[int, bytes] = {}
        spellings: list[bytes | None] = [None] * (max([*vocab.values(), *added]) + 1)
        for piece, i in vocab.items():
            spelling = self._spelling(piece, table)
            if spelling is not None:
                self._piece_bytes[i] = spelling
                is_byte = self._has_marks and piece in table
                if i not in added and (is_byte or not _CONTROL_NAME.fullmatch(piece)):
                    spellings[i] = spelling
        super().__init__(spellings, name)

    def _spelling(self, piece: str, table: dict[str, int]) -> bytes | None:
        if self._has_marks:
            byte = table.get(piece)
            return piece.replace(_MARK, " ").encode() if byte is None else bytes([byte])
        known = all(character in table for character in piece)
        return bytes(table[character] for character in piece) if known else None

    @staticmethod
    def from_file(path: str | Path) -> HFTokenizer:
        """Reads a `tokenizer.json`. UserError if it is missing, of another kind, or lossy."""
        return HFTokenizer(_read(Path(path)), str(path))

    @staticmethod
    def names_in(path: str | Path) -> dict[str, int]:
        """Every name in a `tokenizer.json` with its id, control ids and codes included."""
        try:
            data = json.loads(_read(Path(path)))
            added = {entry["content"]: entry["id"] for entry in data.get("added_tokens") or ()}
            return dict(data["model"]["vocab"]) | added
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is not a readable tokenizer.json: {error}") from error

    def encode(self, text: str) -> list[int]:
        _refuse_surrogates(text)
        mark = [self._id_of_byte[byte] for byte in _MARK.encode()] if self._has_marks else None
        ids = _around_marks(text, self._encode, mark)
        if all(self._spellings[i] is not None for i in ids):
            return ids
        # A control name can also be an ordinary piece of the BPE: spell it byte by byte.
        spelled: list[int] = []
        for i in ids:
            if self._spellings[i] is not None:
                spelled.append(i)
            else:
                spelled += [self._id_of_byte[byte] for byte in self._piece_bytes[i]]
        return spelled

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def save(self, path: str | Path) -> None:
        Path(path).write_bytes(self._source)


def load_text_tokenizer(path: str | Path) -> TextTokenizer:
    """A `.model` (sentencepiece) or `.json` (tokenizers) file. UserError if it is neither."""
    path = Path(path)
    if path.suffix == ".model":
        return SentencePieceTokenizer.load(path)
    if path.suffix == ".json":
        return HFTokenizer.from_file(path)
    raise UserError(f"{path} is not a text tokenizer: its name must end in .model or .json.")


def train_text_tokenizer(
    texts: Iterable[str],
    n_text: int,
    n_codes: int,
    codes_per_item: int,
    *,
    character_coverage: float = 0.9995,
) -> SentencePieceTokenizer:
    """Trains a BPE of `n_text` pieces whose ids lie as in `Vocab.compact`; same texts, same bytes.

    The 256 bytes and the newline count among the pieces; characters beyond `character_coverage`
    of the texts are written in bytes. UserError if the texts give fewer pieces than asked, or
    `n_text` has no room for their characters: it names the bound.
    """
    import sentencepiece

    vocab = Vocab.compact(n_codes, codes_per_item, n_text)
    if n_text < 257:
        raise UserError(f"n_text = {n_text} is too small: the bytes and the newline alone are 257.")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_training_lines(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab.size,
            bos_id=vocab.bos_id,
            pad_id=vocab.pad_id,
            eos_id=vocab.eos_id,
            unk_id=vocab.unk_id,
            control_symbols=[f"<code:{i}>" for i in range(n_codes)]
            + ["</image>", "<image>", "<eot>"],
            user_defined_symbols=["\n"],
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            character_coverage=character_coverage,
            shuffle_input_sentence=False,  # with one thread: the same texts give the same file
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(_training_failure(str(error), n_text, vocab.text_start)) from error
    return SentencePieceTokenizer(model.getvalue())


# Names of the released vocabulary (and of most others): no text piece looks like them.
_CONTROL_NAME = re.compile(r"<[^<>]*\w[^<>]*>|IMGIMG[A-J]+Z")

# What the trainer must not see: its own reserved characters; spellings of its control and byte
# pieces, which it would otherwise try to learn a second time; halves of surrogate pairs.
_NOT_LEARNT = re.compile(
    r"[\r\n\0\u2581\u2585\ud800-\udfff]+|<(?:s|/s|pad|unk|code:\d+|/?image|eot|0x[0-9A-F]{2})>"
)
_MAX_LINE = 1000  # characters; the trainer skips lines of over 4192 bytes, 4 a character at most


def _training_lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in _NOT_LEARNT.split(text):
            for start in range(0, len(line), _MAX_LINE):
                yield line[start : start + _MAX_LINE]


def _training_failure(message: str, n_text: int, text_start: int) -> str:
    if found := re.search(r"set it to a value <= (\d+)", message):
        most = int(found[1]) - text_start
        return f"n_text = {n_text} is too large for these texts: it can be at most {most}."
    if found := re.search(r"required_chars\. \d+ vs (\d+)", message):
        least = int(found[1]) - text_start
        return (
            f"n_text = {n_text} has no room for the characters of these texts: use {least} or more."
        )
    if "sentences_.empty()" in message:
        return "There is no text to train a tokenizer on."
    return f"The text tokenizer could not be trained: {message}"


def _sentencepiece_spelling(processor: Any, i: int) -> bytes | None:
    piece: str = processor.id_to_piece(i)
    if processor.is_control(i) or processor.is_unknown(i) or processor.is_unused(i):
        return None
    if processor.is_byte(i):
        return bytes([int(piece[3:5], 16)])
    return piece.replace(_MARK, " ").encode()


def _around_marks(
    text: str, encode: Callable[[str], list[int]], mark: list[int] | None
) -> list[int]:
    """The ids of a text, in which a real mark, which would be read back as a space, is `mark`."""
    if mark is None or _MARK not in text:
        return encode(text)
    ids: list[int] = []
    for i, part in enumerate(text.split(_MARK)):
        ids += (mark if i else []) + encode(part)
    return ids


def _marks_without_prefix(data: dict[str, Any]) -> dict[str, Any]:
    """What replaces spaces by marks and adds none, in place of a file's own. UserError."""
    normalizer, splitter = data.get("normalizer") or {}, data.get("pre_tokenizer") or {}
    steps = normalizer.get("normalizers", [normalizer]) if normalizer else []
    kinds = {step["type"] for step in steps} | {splitter.get("type", "Metaspace")}
    if not kinds <= {"Prepend", "Replace", "Metaspace"}:
        raise UserError(
            f"changes or cuts texts in a way that is not known here ({', '.join(sorted(kinds))})."
        )
    split = bool(splitter) and splitter.get("split", True)
    metaspace = {"type": "Metaspace", "replacement": _MARK, "prepend_scheme": "never"}
    return {"normalizer": None, "pre_tokenizer": metaspace | {"split": split}}


def _byte_of_piece() -> dict[str, int]:
    """The pieces of byte fallback."""
    return {f"<0x{byte:02X}>": byte for byte in range(256)}


def _byte_of_character() -> dict[str, int]:
    """The byte-level alphabet: printable Latin-1 is itself, the other bytes are 256, 257, ..."""
    own = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _refuse_surrogates(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"The text has half of a surrogate pair ({text[error.start]!r} at character"
            f" {error.start}), which is no Unicode text; remove it."
        ) from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"Cannot read the text tokenizer {path}: {error.strerror}.") from error
