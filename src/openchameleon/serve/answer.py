"""A job's ids as what a client sees: pieces of text, and pictures that grow and are then whole.

Pictures are decoded and written as PNG by a pool of threads: neither the engine nor the event loop
waits for them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from concurrent.futures import Executor
from dataclasses import dataclass
from math import ceil

import numpy as np
import PIL.Image

from openchameleon.image_io import png_base64
from openchameleon.serve.metrics import Metrics
from openchameleon.serve.worker import Job
from openchameleon.tokenizer.mixed import (
    ImageDone,
    ImageProgress,
    MixedTokenizer,
    StreamDecoder,
    TextDelta,
)


@dataclass(frozen=True, slots=True)
class Begun:
    """A picture is begun."""


@dataclass(frozen=True, slots=True)
class Partial:
    """A picture so far, as base64 of a PNG that is transparent where nothing is written yet."""

    png: str
    codes_done: int
    codes_total: int


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture is whole: base64 of its PNG."""

    png: str


Piece = TextDelta | Begun | Partial | Picture


class Answer:
    """Follows one job to its end. `parts` is what has come: text, and pictures as `Picture`.

    partial_pictures: how many growing pictures are wanted on the way to a whole one. Where several
    are due at once, because codes come faster than they can be shown, only the latest is.
    stops: texts that end the answer and are not part of it; `stopped` says that one did.
    """

    def __init__(
        self,
        job: Job,
        tokenizer: MixedTokenizer,
        metrics: Metrics,
        partial_pictures: int = 0,
        stops: tuple[str, ...] = (),
    ) -> None:
        self.job, self.tokenizer, self.metrics = job, tokenizer, metrics
        self.partial_pictures = partial_pictures
        self.parts: list[str | Picture] = []
        self.stopped = False
        self._decoder = StreamDecoder(tokenizer)
        self._stop = StopText(stops)
        self._codes: list[int] = []  # of the picture that is open
        self._begun_at = 0.0

    @property
    def text(self) -> str:
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def pictures(self) -> list[Picture]:
        return [part for part in self.parts if isinstance(part, Picture)]

    @property
    def n_tokens(self) -> int:
        """New tokens, the closing one included where the model wrote it."""
        return len(self.job.ids) + (self.job.outcome == "stop")

    async def pieces(self, pool: Executor) -> AsyncIterator[Piece]:
        """What comes, in order, to the job's end or a stop text."""
        loop = asyncio.get_running_loop()
        async for ids in self.job.batches():
            if self._draws(ids):
                pieces = await loop.run_in_executor(pool, self.read, ids)
            else:
                pieces = self.read(ids)
            for piece in pieces:
                yield piece
            if self.stopped:
                return
        if self.job.outcome in ("stop", "length"):
            for piece in self.finish():
                yield piece

    def read(self, ids: list[int]) -> list[Piece]:
        """The pieces that these ids complete; neighbouring text is one. May decode pictures."""
        pieces: list[Piece] = []
        due: ImageProgress | None = None
        for token_id in ids:
            for event in self._decoder.push(token_id):
                if isinstance(event, TextDelta):
                    self._take_text(self._stop.push(event.text), pieces)
                elif isinstance(event, ImageDone):
                    due = None
                    self._take_picture(event.pil, pieces)
                elif event.codes_done == 0:
                    self._take_text(self._stop.flush(), pieces)
                    self._codes, self._begun_at = [], time.monotonic()
                    pieces.append(Begun())
                else:
                    self._codes.append(token_id)
                    due = event if self._is_due(event) else due
            if self._stop.found:
                self.stopped = True
                return pieces
        if due is not None and len(self._codes) < due.codes_total:
            pieces.append(self._partial(due.codes_total))
        return pieces

    def finish(self) -> list[Piece]:
        """The pieces that the end of the ids completes."""
        pieces: list[Piece] = []
        for event in self._decoder.finish():
            if isinstance(event, TextDelta):
                self._take_text(self._stop.push(event.text), pieces)
        self._take_text(self._stop.flush(), pieces)
        self.stopped = self._stop.found
        return pieces

    def _draws(self, ids: list[int]) -> bool:
        """Whether reading these ids decodes a picture, which takes long."""
        if self.tokenizer.image is None:
            return False
        image = self.tokenizer.vocab.image
        if image.end_id in ids:
            return True
        return self.partial_pictures > 0 and any(image.first_id <= i < image.stop_id for i in ids)

    def _is_due(self, progress: ImageProgress) -> bool:
        done, total, n = progress.codes_done, progress.codes_total, self.partial_pictures
        return done < total and any(done == ceil(total * k / (n + 1)) for k in range(1, n + 1))

    def _take_text(self, text: str, pieces: list[Piece]) -> None:
        if not text:
            return
        if self.parts and isinstance(self.parts[-1], str):
            self.parts[-1] += text
        else:
            self.parts.append(text)
        if pieces and isinstance(pieces[-1], TextDelta):
            text = pieces.pop().text + text  # type: ignore[union-attr]
        pieces.append(TextDelta(text))

    def _take_picture(self, pil: PIL.Image.Image, pieces: list[Piece]) -> None:
        picture = Picture(png_base64(pil))
        self.parts.append(picture)
        pieces.append(picture)
        self.metrics.pictures.inc()
        self.metrics.picture_seconds.observe(time.monotonic() - self._begun_at)

    def _partial(self, codes_total: int) -> Partial:
        first = self.tokenizer.vocab.image.first_id
        pil = partial_picture(self.tokenizer, [i - first for i in self._codes])
        return Partial(png_base64(pil), len(self._codes), codes_total)


class StopText:
    """Text in, text out, up to the first of the stops, which may come in several pieces."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.stops, self.found = stops, False
        self._held = ""

    def push(self, text: str) -> str:
        """What is certainly no part of a stop."""
        self._held += text
        places = [at for stop in self.stops if (at := self._held.find(stop)) >= 0]
        if places:
            self.found = True
            self._held = self._held[: min(places)]
            return self.flush()
        n_held = max((self._overlap(stop) for stop in self.stops), default=0)
        keep = len(self._held) - n_held
        out, self._held = self._held[:keep], self._held[keep:]
        return out

    def flush(self) -> str:
        """What was held back, where no more text follows."""
        out, self._held = self._held, ""
        return out

    def _overlap(self, stop: str) -> int:
        """Characters at the end of what is held that `stop` begins with."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)


def partial_picture(tokenizer: MixedTokenizer, codes: list[int]) -> PIL.Image.Image:
    """A picture of which only the first codes are there; where the others stand, transparent."""
    assert tokenizer.image is not None
    image = tokenizer.image
    missing = image.n_codes - len(codes)
    (pil,) = tokenizer.decode_pictures([codes + codes[-1:] * missing])
    n_side = image.config.codes_per_side
    patch = image.resolution // n_side
    written = np.arange(image.n_codes).reshape(n_side, n_side) < len(codes)
    alpha = (255 * written).astype(np.uint8).repeat(patch, 0).repeat(patch, 1)
    pil.putalpha(PIL.Image.fromarray(alpha))
    return pil
