"""A conversation under way: its turns, the wishes for the next answer, and what the model can hold.

Knows nothing of how turns are typed.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from openchameleon.cli.answer import Answer, Pictures, to_markdown
from openchameleon.document import Conversation, Document, Message, Role
from openchameleon.errors import UserError
from openchameleon.inference.params import new_seed

if TYPE_CHECKING:
    from openchameleon.pipeline import Chameleon, Wishes

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """What was asked, and as much of the answer as came."""

    question: Document
    answer: Document

    @property
    def messages(self) -> tuple[Message, Message]:
        return Message("user", self.question), Message("assistant", self.answer)


def note(sentence: str) -> None:
    """Says what is no answer, beside the answers."""
    print(f"openchameleon: {sentence}", file=sys.stderr, flush=True)


class Session:
    """Asks a model, and remembers.

    pictures: numbers all pictures, shown and drawn. seed: of the last answer.
    """

    def __init__(
        self, chameleon: Chameleon, wishes: Wishes, pictures: Pictures, quiet: bool, previews: bool
    ) -> None:
        self.chameleon, self.wishes, self.pictures = chameleon, wishes, pictures
        self.quiet, self.previews = quiet, previews
        self.turns: list[Turn] = []
        self.asked: Document | None = None
        self.seed: int | None = None
        self._n_left_out = 0

    def ask(self, question: Document) -> Answer:
        """Shows the answer and remembers the turn, or nothing where nothing came.

        Ctrl-C ends the answer, and what came is kept. UserError for what cannot be answered.
        """
        self.asked = question
        for pil in question.images:
            if not any(pil is known for known in self.pictures.all):
                self.pictures.add(pil)
        self.seed = self.wishes.get("seed")
        if self.seed is None:
            self.seed = new_seed()
        wishes: Wishes = {**self.wishes, "seed": self.seed}
        answer = Answer(self.pictures, self.quiet, self.previews)
        with Interrupt() as interrupt:
            events = self.chameleon.stream(self._prompt(question), **wishes)
            try:
                answer.take(interrupt.watching(events))
            finally:
                if answer.segments:
                    self.turns.append(Turn(question, answer.document))
                answer.end_line()
        if interrupt.came:
            note("stopped; " + ("what came is kept." if answer.segments else "nothing had come."))
        elif not answer.segments:
            note("the answer is empty, and the turn is not kept.")
        return answer

    def undo(self) -> None:
        """Takes the last turn back. UserError where there is none."""
        if not self.turns:
            raise UserError("There is no turn to take back.")
        self.turns.pop()

    def retry(self) -> Answer:
        """Asks the last question again, where a seed is set with the next one."""
        if self.asked is None:
            raise UserError("Nothing was asked yet.")
        if self.turns and self.turns[-1].question is self.asked:
            self.turns.pop()
        if (seed := self.wishes.get("seed")) is not None:
            self.wishes["seed"] = seed + 1
        return self.ask(self.asked)

    def forget(self) -> None:
        """Begins anew; the pictures keep their numbers, as their files do."""
        self.turns, self.asked = [], None

    def save(self, path: Path) -> Path:
        """Writes the conversation as Markdown, its pictures beside it; returns the file.

        UserError where a file is there already, or cannot be written.
        """
        if not self.turns:
            raise UserError("There is nothing to save yet.")
        path = path if path.suffix else path.with_suffix(".md")
        names: dict[Role, str] = {"user": "You", "assistant": self.chameleon.config.name}
        pictures: dict[Path, Any] = {}
        blocks = []
        for message in (m for turn in self.turns for m in turn.messages):
            first = len(pictures) + 1
            paths = [
                path.with_name(f"{path.stem}-{number}.png")
                for number, _ in enumerate(message.document.images, first)
            ]
            pictures |= zip(paths, message.document.images, strict=True)
            blocks.append(f"## {names[message.role]}\n\n{to_markdown(message.document, paths)}")
        for there in (path, *pictures):
            if there.exists():
                raise UserError(f"{there} exists already; name another file.")
        for file, pil in pictures.items():
            pil.save(file)
        path.write_text("\n\n".join(blocks) + "\n", encoding="utf-8")
        return path

    def _prompt(self, question: Document) -> Conversation:
        """The turns that fit with `question` and an answer; says so when others are left out."""
        left_out = self._too_many(question)
        if left_out > self._n_left_out:
            first = "the first turn is" if left_out == 1 else f"the first {left_out} turns are"
            context = self.chameleon.config.model.max_seq_len
            note(f"the conversation is longer than the {context} tokens that the model holds:"
                 f" {first} left out.")  # fmt: skip
        self._n_left_out = left_out
        kept = [message for turn in self.turns[left_out:] for message in turn.messages]
        return Conversation([*kept, Message("user", question)])

    def _too_many(self, question: Document) -> int:
        """How many turns, the oldest, do not fit beside `question` and room for an answer."""
        config, count = self.chameleon.config, self.chameleon.tokenizer.n_ids
        picture = max((r.item_len for r in config.vocab.code_ranges), default=0)
        room = max(config.model.max_seq_len // 4, picture + 1)
        room = min(room, self.wishes.get("max_tokens") or room)
        needed = 1 + count(question) + 1 + room
        for n_kept, turn in enumerate(reversed(self.turns)):
            needed += count(turn.question) + count(turn.answer) + 2
            if needed > config.model.max_seq_len:
                return len(self.turns) - n_kept
        return 0


class Interrupt:
    """Ctrl-C as a question to ask between two pieces: it leaves no step of the model half done.

    A second one interrupts as usual.
    """

    def __init__(self) -> None:
        self.came = False

    def __enter__(self) -> Interrupt:
        self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def watching(self, events: Iterator[T]) -> Iterator[T]:
        """The events until Ctrl-C; what makes them is closed in any case."""
        try:
            while not self.came and (event := next(events, None)) is not None:
                yield event
        finally:
            close = getattr(events, "close", None)
            if close is not None:
                close()

    def _note(self, *_: object) -> None:
        if self.came:
            raise KeyboardInterrupt
        self.came = True
