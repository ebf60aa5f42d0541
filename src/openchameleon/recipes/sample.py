"""A page of what a new model writes: records of its data as far as a question goes, then itself."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from openchameleon.data.sources.folder import CODE_SUFFIXES, suffix
from openchameleon.document import Conversation, Document, Record, Segment, Text
from openchameleon.inference.params import Mode
from openchameleon.pipeline import Chameleon

PAGE = "sample.md"
MAX_TOKENS = 200
BEGINNING = 120
"""Characters of a text that the model is given to go on from."""


@dataclass(frozen=True, slots=True)
class Given:
    """What of a record the model is given, and what it is to write."""

    name: str
    prompt: Document | Conversation
    mode: Mode

    @property
    def kind(self) -> tuple[object, ...]:
        """One sample is enough of records of one kind: code or not, asked for the same modality."""
        return type(self.prompt), self.mode, suffix(self.name) in CODE_SUFFIXES


def write_sample(model: Chameleon, records: Iterable[tuple[str, Record]], folder: Path) -> Path:
    """Writes `sample.md` and its pictures into the new `folder`, whole or not at all; the page.

    records: the data that the model was trained on, each with its name; the first of each kind is
    shown, so this is no measure of what the model has learned to do by itself.
    """
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    lines = ["# What the model writes", "", "Begun with parts of its own training data.", ""]
    pictures = _Pictures(temporary)
    for given in _one_of_a_kind(records):
        raw = isinstance(given.prompt, Document)
        answer = model.generate(
            given.prompt, raw=raw, mode=given.mode, seed=0, max_tokens=_room(model, given.mode)
        )
        lines += [f"## {given.name}", "", "Given:", "", *pictures.blocks(_segments(given.prompt))]
        lines += ["Written:", "", *pictures.blocks(answer)]
    (temporary / PAGE).write_text("\n".join(lines), encoding="utf-8")
    temporary.rename(folder)
    return folder / PAGE


def _room(model: Chameleon, mode: Mode) -> int | None:
    """Text may run on; a picture ends by itself."""
    return MAX_TOKENS if mode == "text" else None


def _one_of_a_kind(records: Iterable[tuple[str, Record]]) -> Iterator[Given]:
    seen: set[tuple[object, ...]] = set()
    for name, record in records:
        given = _given(name, record)
        if given is not None and given.kind not in seen:
            seen.add(given.kind)
            yield given


def _given(name: str, record: Record) -> Given | None:
    """A conversation up to its answer, or the beginning of a document; None where it has none."""
    if isinstance(record, Conversation):
        *asked, answer = record.messages
        return Given(name, Conversation(asked), _mode(answer.document)) if asked else None
    first = next(iter(record), None)
    if not isinstance(first, Text) or not first.text[:BEGINNING].strip():
        return None
    mode: Mode = "interleaved" if record.images else "text"
    return Given(name, Document([Text(first.text[:BEGINNING])]), mode)


def _mode(answer: Document) -> Mode:
    if answer.images:
        return "interleaved" if answer.text.strip() else "image"
    return "text"


def _segments(prompt: Document | Conversation) -> list[Segment]:
    documents = [prompt] if isinstance(prompt, Document) else [m.document for m in prompt.messages]
    return [segment for document in documents for segment in document]


class _Pictures:
    """Segments as blocks of the page, their pictures numbered through and written beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.n = folder, 0

    def blocks(self, segments: Iterable[Segment]) -> list[str]:
        lines: list[str] = []
        for segment in segments:
            if isinstance(segment, Text):
                lines += ["~~~~", segment.text, "~~~~", ""]
                continue
            self.n += 1
            name = f"image-{self.n}.png"
            segment.pil.save(self.folder / name)
            lines += [f"![{name}]({name})", ""]
        return lines
