"""A conversation in text and pictures with a model of the emoji world, written as a page.

The model draws from words and is asked about its drawing; reads a picture that another hand drew;
and tells an illustrated story. A checker that knows nothing of the model reads every picture.
"""

from __future__ import annotations

import argparse
import base64
import html
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import PIL.Image

from openchameleon.cli.output import make_folder, numbered_pictures
from openchameleon.document import Conversation, Document, Image, Message, Role, Segment, Text
from openchameleon.errors import UserError
from openchameleon.image_io import open_image
from openchameleon.preview import preview
from openchameleon.world.atlas import PRESETS, WorldPreset
from openchameleon.world.checker import check, reading_to_json
from openchameleon.world.foreign import render_foreign
from openchameleon.world.scene import Placed, Scene

if TYPE_CHECKING:
    from openchameleon.pipeline import Chameleon

BROUGHT = Scene("sky", [Placed((1, 1), "penguin"), Placed((0, 2), "carrot")])
"""What the picture that is brought in shows; drawn by other means than the training pictures."""
PAGE, BROUGHT_FILE = "index.html", "brought.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("demo"), metavar="DIR",
                        help="the page and its pictures (%(default)s)")  # fmt: skip
    parser.add_argument("--model", default="nano", metavar="M",
                        help="an embedded model or a model folder (%(default)s)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=1, help="of the answers (%(default)s)")


def run(options: argparse.Namespace) -> int:
    start = time.monotonic()
    from openchameleon.pipeline import Chameleon

    chameleon = Chameleon.from_pretrained(options.model)
    preset = PRESETS.get(chameleon.config.name, PRESETS["nano"])
    show = Show(chameleon, preset, _prepared(options.out), options.seed)
    brought = _brought_picture(options.out, preset)
    chapters = [
        ("It draws what you describe, and sees what it drew", show.converse([
            Document(["Draw a cat at the top left and a pizza at the bottom right."]),
            Document(["What is at the top left?"]),
        ])),
        ("It reads a picture that another hand drew", show.converse([
            Document([Image(brought), Text("What is at the center?")]),
        ])),
        ("It tells a story in words and pictures", show.converse([
            Document(["Tell a story about a cat."]),
        ])),
    ]  # fmt: skip
    page = options.out / PAGE
    seconds = time.monotonic() - start
    page.write_text(to_html(chapters, chameleon, seconds, options.seed), encoding="utf-8")
    print(f"\n{seconds:.0f} s. Open {page} in a browser.")
    return 0


@dataclass(frozen=True, slots=True)
class Shown:
    """A picture of the conversation: its file, and what the checker found in it."""

    path: Path
    reading: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Turn:
    role: Role
    parts: tuple[str | Shown, ...]


Chapter = tuple[str, list[Turn]]


class Show:
    """Holds conversations with a model: prints them, writes and checks their pictures."""

    def __init__(self, chameleon: Chameleon, preset: WorldPreset, folder: Path, seed: int) -> None:
        self.chameleon, self.preset, self.folder, self.seed = chameleon, preset, folder, seed
        self.n_pictures = 0

    def converse(self, questions: Sequence[Document]) -> list[Turn]:
        """The turns of one conversation, each question asked after the answers before it."""
        messages: list[Message] = []
        turns: list[Turn] = []
        for question in questions:
            messages.append(Message("user", question))
            turns.append(self._show("user", question))
            # Half of the context at most: the next question must find room behind the answer.
            answer = self.chameleon.generate(
                Conversation(messages),
                seed=self.seed,
                max_tokens=self.chameleon.config.model.max_seq_len // 2,
            )
            messages.append(Message("assistant", answer))
            turns.append(self._show("assistant", answer))
        return turns

    def _show(self, role: Role, document: Document) -> Turn:
        label = {"user": "you", "assistant": "chameleon"}[role]
        if role == "user":
            print()
        parts = []
        for segment in document:
            part = self._part(segment)
            parts.append(part)
            line = part.strip() if isinstance(part, str) else _described(part)
            if line:
                print(f"{label:<11}{line}", flush=True)
                label = ""
            if isinstance(segment, Image):
                preview(segment.pil, sys.stdout)
        return Turn(role, tuple(parts))

    def _part(self, segment: Segment) -> str | Shown:
        if isinstance(segment, Text):
            return segment.text
        self.n_pictures += 1
        path = self.folder / f"image-{self.n_pictures}.png"
        segment.pil.save(path)
        # What counts is the file, as anyone would open it.
        reading = reading_to_json(check(open_image(path), self.preset), self.preset.grid)
        return Shown(path, reading)


def _prepared(folder: Path) -> Path:
    """The folder, made, without the pictures of a demo before.

    UserError if it cannot be made, or holds pictures or a page of something else.
    """
    make_folder(folder)
    there = [*numbered_pictures(folder), *folder.glob(PAGE)]
    if there and not (folder / BROUGHT_FILE).exists():
        raise UserError(f"{there[0]} is not of a demo; name another --out.")
    for stale in there:
        stale.unlink()
    return folder


def _brought_picture(folder: Path, preset: WorldPreset) -> PIL.Image.Image:
    """A picture file that our renderer did not make, and what it holds when opened."""
    path = folder / BROUGHT_FILE
    render_foreign(BROUGHT, preset, random.Random(9)).save(path)
    return open_image(path)


def _described(shown: Shown) -> str:
    """One line: the file and what was found in it."""
    found = [
        f"{o['name']} at {o['cell']} ({o['confidence']:.2f})" for o in shown.reading["objects"]
    ]
    found += [f"something unreadable at {cell}" for cell in shown.reading["unreadable"]]
    background = shown.reading["background"]
    return f"[{shown.path}: {', '.join(found) or 'nothing'}; background {background}]"


def to_html(chapters: list[Chapter], chameleon: Chameleon, seconds: float, seed: int) -> str:
    """The page: one file, its pictures inside it."""
    template = Template((files("openchameleon.cli") / "demo.html").read_text(encoding="utf-8"))
    n_parameters = sum(p.numel() for p in chameleon.model.parameters())
    return template.substitute(
        chapters="\n".join(_chapter_html(title, turns) for title, turns in chapters),
        model=html.escape(chameleon.config.name),
        parameters=f"{n_parameters / 1e6:.1f}",
        device=html.escape(str(chameleon.device)),
        seconds=f"{seconds:.0f}",
        seed=seed,
    )


def _chapter_html(title: str, turns: list[Turn]) -> str:
    bubbles = "\n".join(_bubble_html(turn) for turn in turns)
    return f"<section>\n<h2>{html.escape(title)}</h2>\n{bubbles}\n</section>"


def _bubble_html(turn: Turn) -> str:
    who = {"user": "You", "assistant": "Chameleon"}[turn.role]
    body = "\n".join(_part_html(part) for part in turn.parts if not _is_blank(part))
    return f'<article class="{turn.role}" aria-label="{who}">\n{body}\n</article>'


def _is_blank(part: str | Shown) -> bool:
    return isinstance(part, str) and not part.strip()


def _part_html(part: str | Shown) -> str:
    if isinstance(part, str):
        return f"<p>{html.escape(part.strip())}</p>"
    data = base64.b64encode(part.path.read_bytes()).decode()
    chips = [
        f"<li>{html.escape(o['name'])} <small>{html.escape(o['cell'])} &middot;"
        f" {100 * o['confidence']:.0f}%</small></li>"
        for o in part.reading["objects"]
    ]
    chips += [
        f'<li class="unreadable">unreadable <small>{html.escape(cell)}</small></li>'
        for cell in part.reading["unreadable"]
    ]
    background = html.escape(part.reading["background"])
    chips.append(f'<li class="background">{background} <small>background</small></li>')
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{html.escape(_described(part))}">'
        f"<figcaption>the checker reads<ul>{''.join(chips)}</ul></figcaption></figure>"
    )
