"""Words and pictures as a user types them -> a document.

A picture is `@FILE`; `@@` is a literal @ where a word begins with it.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from openchameleon.document import Document, Image, Segment, Text
from openchameleon.errors import UserError
from openchameleon.image_io import open_image

if TYPE_CHECKING:
    import PIL.Image

# A word that begins with @: quotes and backslashes keep its spaces, as in a shell.
AT_WORD = re.compile(r"""(?<!\S)@((?:\\.|"[^"]*"|'[^']*'|[^\s\\])*)""")
AFTER_A_NAME = "?!.,;:)"
NO_NAME = "'@' names no file: write @picture.png, or @@ for a literal @."


def read_segments(arguments: Iterable[str]) -> Document:
    """The prompt that the arguments of a command spell, words in a row joined by spaces.

    UserError for a file that is no picture.
    """
    segments: list[Segment] = []
    for argument in arguments:
        if argument == "@":
            raise UserError(NO_NAME)
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


def read_line(line: str, pictures: Sequence[PIL.Image.Image] = ()) -> Document:
    """The turn that a typed line spells; its text is taken as it is, quotes included.

    `@2` is the second of `pictures`. What closes a sentence may stand behind a name: `@cat.png?`.
    UserError for a file that is no picture, or a number that no picture has.
    """
    segments: list[Segment] = []
    text, begin = "", 0
    for match in AT_WORD.finditer(line):
        text += line[begin : match.start()]
        begin = match.end()
        if match[1].startswith("@"):
            text += match[1]
            continue
        picture, rest = _picture(match[1], pictures)
        segments += [*_words(text), Image(picture)]
        text = rest
    segments += _words(text + line[begin:])
    if not segments:
        raise UserError("The turn is empty: write some text or @picture.png.")
    return Document(segments)


def _words(text: str) -> list[Text]:
    return [Text(text.strip())] if text.strip() else []


def _picture(word: str, pictures: Sequence[PIL.Image.Image]) -> tuple[PIL.Image.Image, str]:
    """The picture that the word behind an @ names, and what of the word is not its name."""
    try:
        (name,) = shlex.split(word) or [""]
    except ValueError:  # a quote that nothing closes is a part of the name
        name = word
    rest = ""
    while name and name[-1] in AFTER_A_NAME and not os.path.exists(name):
        name, rest = name[:-1], name[-1] + rest
    if not name:
        raise UserError(NO_NAME)
    if not name.isdecimal():
        return open_image(Path(name)), rest
    if not 1 <= int(name) <= len(pictures):
        known = f"there are @1 .. @{len(pictures)}" if pictures else "there is none yet"
        raise UserError(f"There is no picture @{name}: {known}.")
    return pictures[int(name) - 1], rest
