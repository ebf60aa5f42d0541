"""Serves a model over HTTP: OpenAI's API with pictures in and out, and a page to converse on.

  openchameleon serve
  openchameleon serve --model models/7b --host 0.0.0.0 --api-key KEY

http://127.0.0.1:8000 is then the page, and http://127.0.0.1:8000/v1 the base URL for clients.
SIGTERM or Ctrl-C: no new requests, answers under way have --drain seconds to end; a second
one ends them at once. docs/serving.md has the rest.
"""

from __future__ import annotations

import argparse
import os
import sys

from openchameleon.cli.dtype import add_dtype
from openchameleon.errors import UserError

KEY_VARIABLE = "OPENCHAMELEON_API_KEY"
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="nano", metavar="M",
                        help="an embedded model or a model folder (%(default)s)")  # fmt: skip
    parser.add_argument("--name", metavar="N", help="what clients call it (the name of the folder)")
    parser.add_argument("--host", default="127.0.0.1", help="where to listen (%(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="(%(default)s; 0: a free one)")
    parser.add_argument("--api-key", default=os.environ.get(KEY_VARIABLE), metavar="KEY",
                        help=f"what clients must send (${KEY_VARIABLE}, or none)")  # fmt: skip
    parser.add_argument("--max-running", type=int, default=64, metavar="N",
                        help="answers written at a time (%(default)s)")  # fmt: skip
    parser.add_argument("--max-open", type=int, default=128, metavar="N",
                        help="requests let in at a time; more get 429 (%(default)s)")  # fmt: skip
    parser.add_argument("--drain", type=float, default=30.0, metavar="S",
                        help="seconds for answers to end after SIGTERM (%(default)s)")  # fmt: skip
    parser.add_argument("--image-host", action="append", default=[], metavar="HOST",
                        help="fetch pictures from https://HOST/..., and from nowhere else; may be"
                        " given again (none)")  # fmt: skip
    parser.add_argument("--device", help="such as cuda:1 (the GPU where there is one)")
    add_dtype(parser)
    parser.add_argument("--compile", action="store_true",
                        help="on a GPU: compile the step; starts slowly")  # fmt: skip
    parser.add_argument("--tensor", type=int, default=1, metavar="N",
                        help="processes that compute the model together (%(default)s)")  # fmt: skip
    parser.add_argument("--allow-pickle", action="store_true",
                        help="read Meta's .pth files, which are pickles")  # fmt: skip


def run(options: argparse.Namespace) -> int:
    _check(options)
    try:
        from openchameleon.serve.server import serve
    except ModuleNotFoundError as error:
        raise UserError(f"Serving needs {error.name}, which is not installed: install"
                        " openchameleon[serve].") from error  # fmt: skip
    from openchameleon.model_folder import find_model
    from openchameleon.pipeline import Chameleon
    from openchameleon.serve.folder import ServedFolder
    from openchameleon.serve.service import Settings

    folder = find_model(options.model)
    settings = Settings(
        name=options.name or folder.resolve().name,
        api_key=options.api_key or None,
        max_running=options.max_running,
        max_open=options.max_open,
        drain=options.drain,
        image_hosts=tuple(options.image_host),
    )

    if options.host not in LOOPBACK and settings.api_key is None:
        print("openchameleon: others can reach this address and no --api-key is set: whoever does"
              " may use the model.", file=sys.stderr)  # fmt: skip
    if options.tensor == 1:
        source = ServedFolder(
            folder, options.device, options.dtype, options.allow_pickle, options.compile
        )
        serve(settings, source.load, options.host, options.port, load_anew=source.load_anew)
        return 0
    from openchameleon.serve.parallel import with_model

    def lead(chameleon: Chameleon) -> int:  # its engine cannot be made again: others follow it
        serve(settings, lambda: chameleon, options.host, options.port, lambda c: c.engine)
        return 0

    return with_model(str(folder), lead, options.tensor, options.dtype, options.allow_pickle)


def _check(options: argparse.Namespace) -> None:
    if not 0 <= options.port < 2**16:
        raise UserError(f"--port {options.port} is not in 0 .. 65535.")
    if options.max_running < 1 or options.max_open < 1:
        raise UserError("--max-running and --max-open are at least 1.")
    if options.tensor != 1 and options.device is not None:
        raise UserError("--tensor gives each process a device of its own; leave --device out.")
    if options.tensor != 1 and options.compile:
        raise UserError("--compile is for a model in one process; leave it or --tensor out.")
    if not 0 <= options.drain < 1e6:
        raise UserError(f"--drain {options.drain} is not a time in seconds.")
    if options.api_key and not options.api_key.isascii():
        raise UserError("--api-key must be ASCII: it travels in an HTTP header.")
