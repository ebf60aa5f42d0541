"""Converses in the terminal, in text and pictures.

A line is a turn: words, and pictures as @FILE anywhere between them (@@ for a literal @ where a
word begins with it; quotes or backslashes for spaces in a name). @2 is the second picture of the
conversation, shown or drawn. Pictures that are drawn go to DIR/image-N.png, N their number.

  /retry          asks the last question again
  /undo           takes the last turn back
  /new            begins a new conversation
  /seed N         the same seed, the same answer
  /temperature T  0 takes the likeliest
  /guidance X     how closely pictures follow the words
  /mode M         interleaved, text or image
  /save FILE      writes the conversation as Markdown, its pictures beside it
  /help           the commands, and what is set
  /quit           ends, as Ctrl-D does

A setting without a value goes back to the model's own. A turn that begins with / is written //.
Ctrl-C stops the answer and keeps what came; at an empty prompt it ends the conversation.

  openchameleon chat
  printf '%s\\n' "Draw a cat at the top left." "Where is the cat?" | openchameleon chat --seed 1
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, cast

from openchameleon.cli.answer import Answer, Pictures
from openchameleon.cli.output import make_folder, numbered_pictures
from openchameleon.cli.segments import read_line
from openchameleon.cli.session import Session, note
from openchameleon.cli.wishes import add_wishes, read_wishes
from openchameleon.errors import UserError, nearest
from openchameleon.inference.params import ModalityParams, Mode, SamplingParams

if TYPE_CHECKING:
    from openchameleon.pipeline import Chameleon

PROMPT = "> "
COMMANDS = ("retry", "undo", "new", "seed", "temperature", "guidance", "mode", "save", "help",
            "quit")  # fmt: skip
SETTINGS = ("mode", "seed", "temperature", "guidance")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, metavar="DIR",
                        help="where to write pictures (a new folder openchameleon-N)")  # fmt: skip
    parser.add_argument("--history", type=Path, metavar="FILE",
                        help="keep the lines typed here; they are kept nowhere else")  # fmt: skip
    add_wishes(parser)


def run(options: argparse.Namespace) -> int:
    wishes = read_wishes(options)
    if options.out is not None:
        make_folder(options.out)
        for there in numbered_pictures(options.out):
            raise UserError(f"{there} exists already; name another --out.")
    lines = Lines(options.history)
    from openchameleon.serve.parallel import with_model

    def converse(chameleon: Chameleon) -> int:
        session = Session(chameleon, wishes, Pictures(options.out), options.json,
                          not options.no_preview)  # fmt: skip
        Chat(session, options.json, options.traceback).converse(lines)
        return 0

    return with_model(options.model, converse, options.tensor, options.dtype)


class Lines:
    """Lines from the terminal, edited and with those before them at hand, or from a pipe.

    history: a file that they are read from and written to, None for neither.
    """

    def __init__(self, history: Path | None) -> None:
        self.typed, self.history = sys.stdin.isatty(), history
        self._editor: ModuleType | None = None
        reconfigure = getattr(sys.stdin, "reconfigure", None)
        if reconfigure is not None:  # a byte that is no UTF-8 must not end a conversation
            reconfigure(errors="replace")
        if self.typed:
            self._editor = _line_editor()
        if self._editor is not None and history is not None:
            try:
                history.touch()  # here, so that a wrong name is known before the conversation
                self._editor.read_history_file(history)
            except OSError as error:
                raise UserError(f"--history {history}: {error.strerror}.") from error

    def next(self) -> str | None:
        """A line without its end; None at the end of all, as after Ctrl-C at an empty prompt."""
        while True:
            try:
                if self.typed:
                    return input(PROMPT)
                line = sys.stdin.readline()
                return line.rstrip("\n") if line else None
            except EOFError:
                print(file=sys.stderr)
                return None
            except KeyboardInterrupt:
                print(file=sys.stderr)
                if not (self._editor and self._editor.get_line_buffer()):
                    return None

    def close(self) -> None:
        if self._editor is not None and self.history is not None:
            self._editor.write_history_file(self.history)


def _line_editor() -> ModuleType | None:
    """`readline`, which `input` uses once it is imported; None where Python is built without."""
    try:
        import readline
    except ImportError:
        return None
    return readline


class Chat:
    """Lines to turns and commands, until their end; no mistake ends a conversation."""

    def __init__(self, session: Session, as_json: bool, traceback: bool) -> None:
        self.session, self.as_json, self.traceback = session, as_json, traceback

    def converse(self, lines: Lines) -> None:
        if lines.typed:
            name = self.session.chameleon.config.name
            print(f"{name}: words and @pictures; /help lists the commands, Ctrl-D ends.",
                  file=sys.stderr)  # fmt: skip
        try:
            while (line := lines.next()) is not None and line.strip() != "/quit":
                self._take(line.strip())
        finally:
            lines.close()

    def _take(self, line: str) -> None:
        """One line; whatever is wrong with it is said in a sentence."""
        try:
            if line.startswith("/") and not line.startswith("//"):
                command, _, value = line[1:].partition(" ")
                self._obey(command, value.strip())
            elif line:
                text = line[1:] if line.startswith("//") else line
                self._report(self.session.ask(read_line(text, self.session.pictures.all)))
        except BrokenPipeError:  # whoever read the answers has gone
            raise
        except (UserError, OSError, RuntimeError) as error:  # RuntimeError: memory, of a GPU too
            if self.traceback:
                raise
            note(" ".join(str(error).split()))

    def _report(self, answer: Answer) -> None:
        if self.as_json:
            print(json.dumps({"seed": self.session.seed, "segments": answer.to_json()}), flush=True)

    def _obey(self, command: str, value: str) -> None:
        """A command and what stands behind it. UserError for one that is none."""
        if command not in COMMANDS:
            raise UserError(
                f"There is no command /{command}.{nearest(command, COMMANDS)} /help lists them;"
                " a turn that begins with / is written //."
            )
        if command in SETTINGS:
            self._set(command, value)
        elif command == "save":
            if not value:
                raise UserError("/save needs the name of a file.")
            note(f"written to {self.session.save(Path(value))}.")
        elif value:
            raise UserError(f"/{command} takes nothing behind it.")
        elif command == "retry":
            self._report(self.session.retry())
        elif command == "undo":
            self.session.undo()
            note(f"the last turn is taken back; {len(self.session.turns)} are left.")
        elif command == "new":
            self.session.forget()
            note("a new conversation.")
        else:
            self._help()

    def _set(self, name: str, value: str) -> None:
        """Changes a wish; without a value it is the model's own again. UserError: not a value."""
        wishes = self.session.wishes
        try:
            if name == "seed":
                wishes["seed"] = SamplingParams(seed=int(value)).seed if value else None
            elif name == "temperature":
                hot = ModalityParams(temperature=float(value)).temperature if value else None
                wishes["temperature"] = hot
            elif name == "guidance":
                scale = SamplingParams(guidance_text=float(value)).guidance_text if value else None
                wishes["guidance"] = scale
            else:
                wishes["mode"] = SamplingParams(mode=cast(Mode, value)).mode if value else None
        except ValueError as error:
            raise UserError(f"/{name} {value} cannot be: {error}.") from error
        note(self._settings())

    def _help(self) -> None:
        _, about, commands, rest, _ = (__doc__ or "").split("\n\n")
        print(about, commands, rest, sep="\n\n", file=sys.stderr)
        note(self._settings())

    def _settings(self) -> str:
        """What is set, in words."""
        return ", ".join(
            f"{name} {'as the model has it' if wish is None else wish}"
            for name, wish in self.session.wishes.items()
            if name in SETTINGS
        )
