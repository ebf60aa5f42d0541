"""Pictures are decoded by processes of their own: one that hangs or dies is replaced.

The program is `decoder.py`. A process is started for the first picture that needs it.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from queue import LifoQueue

import PIL.Image

from openchameleon.errors import UserError
from openchameleon.serve import limits
from openchameleon.serve.decoder import HEAD, LENGTH, READY
from openchameleon.serve.errors import unavailable

log = logging.getLogger(__name__)

N_PROCESSES = 2  # so that a picture that hangs holds up no other
SECONDS = 5.0  # for a picture
SECONDS_TO_START = 30.0
MEMORY = 1 << 30  # addresses of a process: the largest picture in 16 bits takes 570 MB
MAX_SENTENCE = 1 << 12  # bytes
PROGRAM = (
    # -P: not from the working directory, which may be the folder of a download.
    sys.executable, "-P", "-m", "openchameleon.serve.decoder",
    *map(str, (limits.MAX_PIXELS, limits.MAX_BODY, MEMORY, round(SECONDS) + 1)),
)  # fmt: skip
ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
"""Numpy's: for each core it would take addresses that count as memory."""


class Decoders:
    """A few decoders, each for one picture at a time; whoever finds none free waits."""

    def __init__(
        self, n: int = N_PROCESSES, program: Sequence[str] = PROGRAM, seconds: float = SECONDS
    ) -> None:
        self.all = [Decoder(program, seconds) for _ in range(n)]
        self._free: LifoQueue[Decoder] = LifoQueue()  # the last one used is up already
        for decoder in self.all:
            self._free.put(decoder)

    def decode(self, data: bytes) -> PIL.Image.Image:
        """A picture's file -> RGB, as `open_image` does. UserError, ApiError 503: see `Decoder`."""
        decoder = self._free.get()
        try:
            return decoder.decode(data)
        finally:
            self._free.put(decoder)

    def close(self) -> None:
        """Ends the processes, and with them what they are at."""
        for decoder in self.all:
            decoder.close()


class Decoder:
    """One process of the program, for one thread at a time; `close` may come from any."""

    def __init__(self, program: Sequence[str], seconds: float) -> None:
        self._program, self._seconds = program, seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False
        self._lock = threading.Lock()  # around the process's begin and end
        self._busy = threading.Lock()

    @property
    def pid(self) -> int | None:
        """Of its process, where there is one."""
        return None if self._process is None else self._process.pid

    def decode(self, data: bytes) -> PIL.Image.Image:
        """A picture's file -> RGB.

        UserError for one that is damaged, takes too long or ends the process; ApiError 503 where no
        process can be started.
        """
        with self._busy:
            return self._decode(self._started(), data)

    def close(self) -> None:
        """Ends the process; a thread that waits for its answer gets none."""
        with self._lock:
            self._closed = True
            if self._process is not None:
                self._process.kill()
        with self._busy:
            self._end("")

    def _decode(self, process: subprocess.Popen[bytes], data: bytes) -> PIL.Image.Image:
        try:
            with _killed_after(self._seconds, process):
                return _asked(process, data)
        except TimeoutError:
            self._end("a picture took too long")
            raise UserError(
                f"The picture could not be decoded in {self._seconds:.0f} seconds."
            ) from None
        except (OSError, EOFError):
            self._end("it died of a picture")
            raise UserError("The picture cannot be decoded: its decoder died of it.") from None
        except UserError:
            raise
        except BaseException:  # the rest of its answer would be taken for the next picture's
            self._end("its answer was not read")
            raise

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is not None:
            self._end("it died")
        if self._process is None:
            try:
                self._start()
            except (OSError, EOFError) as error:
                log.error("A picture's decoder cannot be started: %s.", error)
                self._end("")
                raise unavailable("Pictures cannot be decoded now; try again soon.") from None
        assert self._process is not None, "it was just started"
        return self._process

    def _start(self) -> None:
        with self._lock:
            if self._closed:
                raise EOFError("the server ends")
            # In a session of its own: Ctrl-C is for the server, which ends it.
            self._process = subprocess.Popen(
                self._program, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                env=os.environ | ONE_THREAD, start_new_session=True,
            )  # fmt: skip
        with _killed_after(SECONDS_TO_START, self._process):
            _read(self._process, len(READY))

    def _end(self, why: str) -> None:
        with self._lock:
            process, self._process = self._process, None
        if process is None:
            return
        if why and not self._closed:
            log.warning("A picture's decoder is replaced: %s.", why)
        process.kill()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None, "both are pipes"
            with suppress(OSError):  # what could not be written still cannot
                pipe.close()
        process.wait()


def _asked(process: subprocess.Popen[bytes], data: bytes) -> PIL.Image.Image:
    """The process's answer. UserError if it is a sentence; OSError, EOFError if there is none."""
    assert process.stdin is not None, "it is a pipe"
    process.stdin.write(LENGTH.pack(len(data)))
    process.stdin.write(data)
    process.stdin.flush()
    width, height = HEAD.unpack(_read(process, HEAD.size))
    if width * height > limits.MAX_PIXELS or (width == 0 and height > MAX_SENTENCE):
        raise EOFError("it answers with what cannot be")
    if width == 0:
        raise UserError(_read(process, height).decode())
    return PIL.Image.frombytes("RGB", (width, height), _read(process, 3 * width * height))


def _read(process: subprocess.Popen[bytes], n_bytes: int) -> bytes:
    assert process.stdout is not None, "it is a pipe"
    data = process.stdout.read(n_bytes)
    if len(data) < n_bytes:
        raise EOFError("its answer ends too soon")
    return data


@contextmanager
def _killed_after(seconds: float, process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Whatever reads from the process or writes to it waits no longer: then TimeoutError."""
    late = threading.Event()

    def kill() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(seconds, kill)
    timer.start()
    try:
        yield
    except (OSError, EOFError):
        if not late.is_set():
            raise
    finally:
        timer.cancel()
    if late.is_set():
        raise TimeoutError
