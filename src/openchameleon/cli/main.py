"""The program `openchameleon`: finds the command, reads its arguments, words its mistakes.

Imports nothing heavy: a command's module is loaded when it is called, and torch when it runs.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import NamedTuple, NoReturn

from openchameleon import __version__
from openchameleon.errors import Stopped, UserError, nearest

COMMANDS = {
    "generate": "continue a prompt of text and pictures with text and pictures",
    "chat": "a conversation in text and pictures, in the terminal",
    "serve": "an HTTP API, and a page, to converse with a model",
    "world": "the emoji world: write samples, check a picture",
    "tokenizer": "train and judge the text and image tokenizers",
    "prepare": "pictures, texts and code into rows of token ids to train on",
    "train": "run a training recipe",
    "rewind": "take a training back to an earlier step, and past some batches",
    "plan": "what a training needs: memory, GPU-hours, tokens a second, cost",
    "evaluate": "score a model",
    "convert": "checkpoints: Meta's, Hugging Face's and ours, each to each",
    "demo": "a conversation in text and pictures, written as a page",
}
"""Command -> what it does; a module beside this one with `add_arguments` and `run`, or ACTIONS."""


class Action(NamedTuple):
    """One thing a command can do, where it can do several: a module lists them as `ACTIONS`."""

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line as every other mistake: one sentence, exit code 2."""

    def __init__(self, prog: str, description: str | None) -> None:
        super().__init__(prog, description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message[:1].upper()}{message[1:]}; see `{self.prog} --help`.")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments, with `run` set to the function to call. UserError for a wrong line."""
    prog = "openchameleon"
    name, rest = _choose(prog, "Text and pictures as one sequence of tokens, read and written by "
                         "one model.", COMMANDS, argv)  # fmt: skip
    module = import_module(f"openchameleon.cli.{name}")
    prog, description = f"{prog} {name}", module.__doc__
    if actions := getattr(module, "ACTIONS", None):
        helps = {key: action.help for key, action in actions.items()}
        name, rest = _choose(prog, module.__doc__, helps, rest)
        prog, action = f"{prog} {name}", actions[name]
        description = action.run.__doc__
    else:
        action = Action(COMMANDS[name], module.add_arguments, module.run)
    parser = _Parser(prog, description)
    parser.set_defaults(run=action.run)
    parser.add_argument("--traceback", action="store_true", help="show where a mistake was found")
    action.add_arguments(parser)
    return parser.parse_intermixed_args(rest)  # options may stand between segments


def _choose(
    prog: str, description: str | None, choices: Mapping[str, str], argv: Sequence[str]
) -> tuple[str, list[str]]:
    """The first word of `argv`, which must be one of the choices, and the words after it."""
    lines = [f"  {name:<10} {help}" for name, help in choices.items()]
    text = "\n".join([(description or "").strip(), "", "commands:", *lines, "",
                      f"`{prog} COMMAND --help` explains one."])  # fmt: skip
    parser = _Parser(prog, text)
    parser.usage = f"{prog} COMMAND ..."
    parser.add_argument("--version", action="version", version=f"openchameleon {__version__}")
    parser.add_argument("command", metavar="COMMAND", help=argparse.SUPPRESS)
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help=argparse.SUPPRESS)
    found = parser.parse_args(argv or ["--help"])
    if found.command not in choices:
        raise UserError(
            f"Unknown command {found.command!r}.{nearest(found.command, choices)}"
            f" The commands of {prog} are {', '.join(choices)}."
        )
    return found.command, found.rest


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. 0: done; 130, 143: stopped; else what went wrong: 2, a user's mistake; 3, a
    broken checkpoint; 4, no space to save; 42, a training that diverged.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    if argv is None:  # as a program: SIGTERM too unwinds, so that nothing half-written stays
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        options = parse(arguments)
        return int(options.run(options))
    except UserError as error:
        if "--traceback" in arguments:
            raise
        if os.environ.get("RANK", "0") == "0":  # of the processes of a run, one speaks
            print(f"openchameleon: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except Stopped as stopped:
        print(f"openchameleon: {stopped}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("openchameleon: stopped.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read our output has gone; keep the interpreter from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SystemExit as stop:  # argparse, after --help or --version; SIGTERM
        return int(stop.code or 0)


if __name__ == "__main__":
    sys.exit(main())
