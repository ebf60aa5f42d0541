"""Answers a prompt of text and pictures with text and pictures.

Each SEGMENT is text, or a picture as @FILE (write @@ for a text that begins with @); words in a row
are joined by spaces. Text is shown as it comes. With --out, the answer is DIR/response.md and
DIR/image-1.png, DIR/image-2.png ...; without it, an answer that has pictures goes to a new folder
openchameleon-1, -2 ... here.

  openchameleon generate "Draw a cat at the top left and a pizza at the bottom right." --out out
  openchameleon generate "What is at the top left?" @out/image-1.png --mode text
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterable
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from openchameleon.cli.output import make_folder, numbered_pictures
from openchameleon.document import Document, Image, Segment, Text
from openchameleon.errors import UserError
from openchameleon.image_io import open_image
from openchameleon.preview import preview
from openchameleon.progress import Progress

if TYPE_CHECKING:
    import PIL.Image

    from openchameleon.tokenizer.mixed import Event

RESPONSE = "response.md"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("segments", nargs="+", metavar="SEGMENT", help="text or @picture.png")
    parser.add_argument("--model", default="nano", metavar="M",
                        help="an embedded model or a model folder (%(default)s)")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write the answer")
    parser.add_argument("--force", action="store_true", help="replace an answer that is in --out")
    parser.add_argument("--mode", choices=("interleaved", "text", "image"), default="interleaved",
                        help="what may be written (%(default)s)")  # fmt: skip
    parser.add_argument("--seed", type=int, metavar="N", help="the same seed, the same answer")
    parser.add_argument("--raw", action="store_true", help="continue the prompt; do not answer it")
    parser.add_argument("--temperature", type=float, metavar="F", help="0 takes the likeliest")
    parser.add_argument("--top-p", type=float, metavar="F", help="in (0, 1]; 1 is off")
    parser.add_argument("--guidance", type=float, metavar="F",
                        help="how closely pictures follow the words")  # fmt: skip
    parser.add_argument("--max-tokens", type=int, metavar="N", help="tokens of answer at most")
    parser.add_argument("--json", action="store_true", help="print the answer as JSON at its end")
    parser.add_argument("--no-preview", action="store_true", help="no pictures in the terminal")


def run(options: argparse.Namespace) -> int:
    _refuse_contradictions(options)
    document = read_segments(options.segments)
    stale = [] if options.out is None else _prepare(options.out, options.force)
    seed = random.SystemRandom().randrange(2**31) if options.seed is None else options.seed
    from openchameleon.pipeline import Chameleon

    events = Chameleon.from_pretrained(options.model).stream(
        document,
        raw=options.raw,
        mode=options.mode,
        seed=seed,
        temperature=options.temperature,
        top_p=options.top_p,
        guidance=options.guidance,
        max_tokens=options.max_tokens,
    )
    answer = Answer(options.out, stale, quiet=options.json, previews=not options.no_preview)
    try:
        answer.take(events)
    finally:  # what has come so far is kept, whatever stopped the rest
        answer.close()
    if options.json:
        print(json.dumps({"model": options.model, "seed": seed, "segments": answer.to_json()}))
    return 0


def read_segments(arguments: Iterable[str]) -> Document:
    """The prompt that the arguments spell, words in a row joined by spaces.

    UserError for a file that is no picture.
    """
    segments: list[Segment] = []
    for argument in arguments:
        if argument == "@":
            raise UserError("'@' names no file: write @picture.png, or @@ for a literal @.")
        if argument.startswith("@") and not argument.startswith("@@"):
            segments.append(Image(open_image(Path(argument[1:]))))
            continue
        text = argument[1:] if argument.startswith("@@") else argument
        before = segments[-1] if segments else None
        if isinstance(before, Text):  # words without quotes
            segments[-1] = Text(f"{before.text} {text}")
        else:
            segments.append(Text(text))
    document = Document(segments)
    if not document.images and not document.text.strip():
        raise UserError("The prompt is empty: give some text or @picture.png.")
    return document


class Answer:
    """Shows an answer as it comes and writes it: pictures at once, the text at the end.

    folder: None makes a new one when the first picture comes. stale: files of an answer before,
    removed when this one begins. quiet: nothing on standard output.
    """

    def __init__(self, folder: Path | None, stale: list[Path], quiet: bool, previews: bool) -> None:
        self.folder, self.stale, self.quiet, self.previews = folder, stale, quiet, previews
        self.parts: list[str | Path] = []
        self._line_open = False

    def take(self, events: Iterable[Event]) -> None:
        """Follows the events of one answer to their end."""
        from openchameleon.tokenizer.mixed import ImageDone, ImageProgress, TextDelta

        progress: Progress | None = None
        for event in events:
            self._remove_stale()
            if isinstance(event, TextDelta):
                self._text(event.text)
            elif isinstance(event, ImageProgress):
                number = sum(isinstance(p, Path) for p in self.parts) + 1
                progress = progress or Progress(f"picture {number}", event.codes_total, "codes")
                progress.update(event.codes_done)
            elif isinstance(event, ImageDone):
                if progress is not None:
                    progress.close()
                progress = None
                self._picture(event.pil)
        self._remove_stale()  # an answer may be empty

    def close(self) -> None:
        """Writes `response.md`, if anything came and there is a folder, and ends the line."""
        if self.folder is not None and self.parts:
            blocks = [
                part.strip() if isinstance(part, str) else f"![{part.stem}]({part.name})"
                for part in self.parts
            ]
            text = "\n\n".join(block for block in blocks if block)
            (self.folder / RESPONSE).write_text(text + "\n", encoding="utf-8")
        self._end_line()  # last: whoever read the terminal may have gone

    def to_json(self) -> list[dict[str, str]]:
        return [{"text": p} if isinstance(p, str) else {"image": str(p)} for p in self.parts]

    def _text(self, text: str) -> None:
        if self.parts and isinstance(self.parts[-1], str):
            self.parts[-1] += text
        else:
            self.parts.append(text)
            text = text if self._line_open else text.lstrip()
        if not self.quiet and text:
            print(text, end="", flush=True)
            self._line_open = not text.endswith("\n")

    def _picture(self, pil: PIL.Image.Image) -> None:
        if self.folder is None:
            self.folder = _new_folder()
        number = sum(isinstance(p, Path) for p in self.parts) + 1
        path = self.folder / f"image-{number}.png"
        pil.save(path)
        self.parts.append(path)
        self._end_line()
        if not self.quiet:
            if self.previews:
                preview(pil, sys.stdout)
            print(f"[{path}]", flush=True)

    def _remove_stale(self) -> None:
        for path in self.stale:
            path.unlink(missing_ok=True)
        self.stale = []

    def _end_line(self) -> None:
        if self._line_open and not self.quiet:
            print(flush=True)
        self._line_open = False


def _refuse_contradictions(options: argparse.Namespace) -> None:
    if options.mode == "text" and options.guidance is not None:
        raise UserError("--guidance is about pictures and --mode text writes none; drop one.")
    if options.temperature == 0 and options.top_p is not None:
        raise UserError("--temperature 0 takes the likeliest token, so --top-p means nothing;"
                        " drop one.")  # fmt: skip
    if options.force and options.out is None:
        raise UserError("--force replaces what is in --out, and there is no --out.")


def _prepare(folder: Path, force: bool) -> list[Path]:
    """Makes the folder; returns the files of an answer that is there, to be replaced by `force`.

    UserError if the folder cannot be made, or the answer must stay.
    """
    make_folder(folder)
    existing = [p for p in (folder / RESPONSE, *numbered_pictures(folder)) if p.exists()]
    if existing and not force:
        raise UserError(
            f"{existing[0]} exists already; name another --out, or give --force to replace it."
        )
    return existing


def _new_folder() -> Path:
    """The first of openchameleon-1, openchameleon-2 ... that is not there yet, made."""
    for number in count(1):
        folder = Path(f"openchameleon-{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise AssertionError("count ends never")
