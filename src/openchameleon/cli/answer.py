"""An answer in the terminal: its text as it comes, its pictures shown and written at once."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from openchameleon.document import Document, Image, Segment, Text
from openchameleon.preview import preview
from openchameleon.progress import Progress

if TYPE_CHECKING:
    import PIL.Image

    from openchameleon.tokenizer.mixed import Event


class Pictures:
    """Pictures by their numbers, from 1: image-1.png, image-2.png ... in a folder.

    folder: None makes a new one, openchameleon-1, -2 ..., when the first picture is saved.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.all: list[PIL.Image.Image] = []

    def add(self, pil: PIL.Image.Image) -> None:
        """Gives a picture its number; its file is elsewhere."""
        self.all.append(pil)

    def save(self, pil: PIL.Image.Image) -> Path:
        """Gives a picture its number and writes it."""
        if self.folder is None:
            self.folder = _new_folder()
        path = self.folder / f"image-{len(self.all) + 1}.png"
        pil.save(path)
        self.add(pil)
        return path


class Answer:
    """Shows an answer as it comes and saves its pictures.

    quiet: nothing on standard output. previews: pictures too are shown, where the terminal can.
    """

    def __init__(self, pictures: Pictures, quiet: bool, previews: bool) -> None:
        self.pictures, self.quiet, self.previews = pictures, quiet, previews
        self.segments: list[Segment] = []
        self.paths: list[Path] = []
        self._line_open = False

    def take(self, events: Iterable[Event]) -> None:
        """Follows the events of one answer to their end."""
        from openchameleon.tokenizer.mixed import ImageDone, ImageProgress, TextDelta

        progress: Progress | None = None
        try:
            for event in events:
                if isinstance(event, TextDelta):
                    self._text(event.text)
                elif isinstance(event, ImageProgress):
                    label = f"picture {len(self.pictures.all) + 1}"
                    progress = progress or Progress(label, event.codes_total, "codes")
                    progress.update(event.codes_done)
                elif isinstance(event, ImageDone):
                    if progress is not None:
                        progress.close()
                    progress = None
                    self._picture(event.pil)
        finally:
            if progress is not None:  # stopped within a picture
                progress.close()

    @property
    def document(self) -> Document:
        """What has come so far."""
        return Document(self.segments)

    def to_markdown(self) -> str:
        """The answer with its pictures by their file names, for a file beside them."""
        return to_markdown(self.document, self.paths)

    def to_json(self) -> list[dict[str, str]]:
        paths = iter(self.paths)
        return [
            {"text": s.text} if isinstance(s, Text) else {"image": str(next(paths))}
            for s in self.segments
        ]

    def end_line(self) -> None:
        """Ends the line where text has left it open."""
        if self._line_open and not self.quiet:
            print(flush=True)
        self._line_open = False

    def _text(self, text: str) -> None:
        before = self.segments[-1] if self.segments else None
        if isinstance(before, Text):
            self.segments[-1] = Text(before.text + text)
        else:
            self.segments.append(Text(text))
            text = text if self._line_open else text.lstrip()
        if not self.quiet and text:
            print(text, end="", flush=True)
            self._line_open = not text.endswith("\n")

    def _picture(self, pil: PIL.Image.Image) -> None:
        path = self.pictures.save(pil)
        self.segments.append(Image(pil))
        self.paths.append(path)
        self.end_line()
        if not self.quiet:
            if self.previews:
                preview(pil, sys.stdout)
            print(f"[{path}]", flush=True)


def to_markdown(document: Document, paths: Iterable[Path]) -> str:
    """A document in Markdown, `paths` the files of its pictures in the folder of the text."""
    names = iter(paths)
    blocks = []
    for segment in document:
        if isinstance(segment, Text):
            blocks.append(segment.text.strip())
        else:
            path = next(names)
            blocks.append(f"![{path.stem}]({path.name})")
    return "\n\n".join(block for block in blocks if block)


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
