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
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from openchameleon.cli.answer import Answer, Pictures
from openchameleon.cli.output import make_folder, numbered_pictures
from openchameleon.cli.segments import read_segments
from openchameleon.cli.wishes import add_wishes, read_wishes
from openchameleon.errors import UserError
from openchameleon.inference.params import new_seed

if TYPE_CHECKING:
    from openchameleon.document import Document
    from openchameleon.pipeline import Chameleon, Wishes
    from openchameleon.tokenizer.mixed import Event

RESPONSE = "response.md"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("segments", nargs="+", metavar="SEGMENT", help="text or @picture.png")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write the answer")
    parser.add_argument("--force", action="store_true", help="replace an answer that is in --out")
    parser.add_argument("--raw", action="store_true", help="continue the prompt; do not answer it")
    add_wishes(parser)


def run(options: argparse.Namespace) -> int:
    wishes = read_wishes(options)
    if options.force and options.out is None:
        raise UserError("--force replaces what is in --out, and there is no --out.")
    document = read_segments(options.segments)
    stale = [] if options.out is None else _prepare(options.out, options.force)
    if wishes["seed"] is None:
        wishes["seed"] = new_seed()
    from openchameleon.serve.parallel import with_model

    def answer(chameleon: Chameleon) -> int:
        return _answer(chameleon, document, wishes, stale, options)

    return with_model(options.model, answer, options.tensor, options.dtype)


def _answer(
    chameleon: Chameleon,
    document: Document,
    wishes: Wishes,
    stale: list[Path],
    options: argparse.Namespace,
) -> int:
    events = chameleon.stream(document, raw=options.raw, **wishes)
    answer = Answer(Pictures(options.out), options.json, not options.no_preview)
    try:
        answer.take(_replacing(stale, iter(events)))
    finally:  # what has come so far is kept, whatever stopped the rest
        _write(answer)
        answer.end_line()  # last: whoever read the terminal may have gone
    if options.json:
        said = {"model": options.model, "seed": wishes["seed"], "segments": answer.to_json()}
        print(json.dumps(said))
    return 0


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


def _replacing(stale: list[Path], events: Iterator[Event]) -> Iterator[Event]:
    """The events; the files of an answer before are removed when this one begins, or is empty."""
    first = next(events, None)
    for path in stale:
        path.unlink(missing_ok=True)
    if first is not None:
        yield first
        yield from events


def _write(answer: Answer) -> None:
    """Writes `response.md`, if anything came and there is a folder."""
    folder = answer.pictures.folder
    if folder is not None and answer.segments:
        (folder / RESPONSE).write_text(answer.to_markdown() + "\n", encoding="utf-8")
