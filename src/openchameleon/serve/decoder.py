"""A program that decodes pictures for the server: files come in on stdin, pixels go out on stdout.

What strangers send is the likeliest to make a decoder hang, take all memory or die, and here it
takes nothing else with it. It is started as `python -m openchameleon.serve.decoder PIXELS BYTES
MEMORY SECONDS` and ends when its stdin does, which is also when the server is gone.

  out   READY, once
  in    the length of a file (LENGTH), and the file
  out   width and height (HEAD), and the RGB pixels; or 0 and a length, and a sentence why not
"""

from __future__ import annotations

import os
import resource
import signal
import struct
import sys
from contextlib import suppress
from pathlib import Path

from openchameleon.errors import UserError
from openchameleon.image_io import open_image

READY = b"+"
LENGTH, HEAD = struct.Struct(">Q"), struct.Struct(">II")


def main() -> int:
    """PIXELS and BYTES: of a picture at most. MEMORY: bytes of addresses. SECONDS: of a picture."""
    max_pixels, max_bytes, memory, seconds = map(int, sys.argv[1:])
    with suppress(OSError, ValueError):  # a system without this limit
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    with suppress(OSError):  # where memory ends, this process goes and not the server
        Path("/proc/self/oom_score_adj").write_text("1000")
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    out.write(READY)
    out.flush()
    while len(head := sys.stdin.buffer.read(LENGTH.size)) == LENGTH.size:
        data = sys.stdin.buffer.read(*LENGTH.unpack(head))
        signal.alarm(seconds)  # which kills: the server may be gone and see no hang
        for part in answer(data, max_pixels, max_bytes):
            out.write(part)
        out.flush()
        signal.alarm(0)
    return 0


def answer(data: bytes, max_pixels: int, max_bytes: int) -> tuple[bytes, bytes]:
    """What goes out for a file."""
    try:
        picture = open_image(data, max_pixels, max_bytes)
        return HEAD.pack(*picture.size), picture.tobytes()
    except UserError as error:
        why = str(error)
        if isinstance(error.__cause__, MemoryError):
            why = "The picture takes too much memory to decode; make it smaller."
        sentence = why.encode()
        return HEAD.pack(0, len(sentence)), sentence


if __name__ == "__main__":
    sys.exit(main())
