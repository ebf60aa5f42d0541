"""The options of every command that generates: which model, and how it is to answer."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from openchameleon.cli.dtype import add_dtype
from openchameleon.errors import UserError

if TYPE_CHECKING:
    from openchameleon.pipeline import Wishes


def add_wishes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="nano", metavar="M",
                        help="an embedded model or a model folder (%(default)s)")  # fmt: skip
    parser.add_argument("--tensor", type=int, default=1, metavar="N",
                        help="processes that share a model, a GPU each (%(default)s)")  # fmt: skip
    add_dtype(parser)
    parser.add_argument("--mode", choices=("interleaved", "text", "image"), default="interleaved",
                        help="what may be written (%(default)s)")  # fmt: skip
    parser.add_argument("--seed", type=int, metavar="N", help="the same seed, the same answer")
    parser.add_argument("--temperature", type=float, metavar="F", help="0 takes the likeliest")
    parser.add_argument("--top-p", type=float, metavar="F", help="in (0, 1]; 1 is off")
    parser.add_argument("--guidance", type=float, metavar="F",
                        help="how closely pictures follow the words")  # fmt: skip
    parser.add_argument("--max-tokens", type=int, metavar="N", help="tokens of answer at most")
    parser.add_argument("--json", action="store_true", help="print each answer as JSON at its end")
    parser.add_argument("--no-preview", action="store_true", help="no pictures in the terminal")


def read_wishes(options: argparse.Namespace) -> Wishes:
    """UserError where two options contradict each other."""
    if options.mode == "text" and options.guidance is not None:
        raise UserError("--guidance is about pictures and --mode text writes none; drop one.")
    if options.temperature == 0 and options.top_p is not None:
        raise UserError("--temperature 0 takes the likeliest token, so --top-p means nothing;"
                        " drop one.")  # fmt: skip
    return {
        "mode": options.mode,
        "seed": options.seed,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "guidance": options.guidance,
        "max_tokens": options.max_tokens,
    }
