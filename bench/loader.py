"""Rows and tokens a second that one process loads, against what eight H100s train on.

Rows of 4,096 ids of synthetic documents in two streams. "cold" is after the system was asked to
drop the files from memory; a virtual disk may still hold them.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from timeit import timeit
from typing import cast

import numpy as np
from common import medians, parser, report

from openchameleon.data.loader import RowLoader
from openchameleon.data.pack import Encoded, pack, save_manifest, write_rows
from openchameleon.train.memory import Layout
from openchameleon.train.plan import PAPER, plan
from openchameleon.vocab import Vocab

ROW_LEN, BATCH = 4096, 64
STREAMS = {"pairs": 0.6, "text": 0.4}
VOCAB = Vocab.published()


def main() -> None:
    args = parser(__doc__).parse_args()
    n_rows, n_steps, repeats = (256, 2, 1) if args.quick else (8192, 64, 5)
    eight = plan(PAPER["7b"].work, "h100", Layout(gpus=8, fsdp=8), utilisation=0.45)
    needed = 8 * eight.tokens_per_s
    cold = []
    with tempfile.TemporaryDirectory() as root:
        for name in STREAMS:
            write(Path(root, name), n_rows // len(STREAMS), name)
        streams = {name: (Path(root, name), weight) for name, weight in STREAMS.items()}
        files = [file for name in STREAMS for file in Path(root, name).glob("*.npy")]
        for _ in range(repeats):
            loader = RowLoader(streams, BATCH, seed=0)  # which reads all, for its sums
            drop_from_memory(files)
            cold.append(timeit(lambda: load(loader, n_steps), number=1))  # noqa: B023
        warm = medians({"warm": lambda: load(loader, n_steps)}, repeats)
        mib = sum(file.stat().st_size for file in files) / 2**20
    sizes = {"row_len": ROW_LEN, "rows": n_rows, "mib": round(mib), "batch": BATCH}
    for case, seconds in {"cold": statistics.median(cold), **warm}.items():
        rows_per_s = n_steps * BATCH / seconds
        speed = {"rows_per_s": rows_per_s, "tokens_per_s": rows_per_s * ROW_LEN}
        need = {"needed_by_8_h100": needed, "times_needed": rows_per_s * ROW_LEN / needed}
        report(f"loader/{case}", args.out, sizes, dtype="uint16", **speed, **need)


def load(loader: RowLoader, n_steps: int) -> None:
    for step in range(n_steps):
        loader.batch(step)


def write(folder: Path, n_rows: int, name: str) -> None:
    """About `n_rows` rows: pictures with a caption of some 50 ids, or texts of some 500."""
    folder.mkdir()
    random, image, n_left = np.random.default_rng(0), VOCAB.image, n_rows * ROW_LEN

    def documents() -> Iterator[Encoded]:
        nonlocal n_left
        while n_left > 0:
            length = 1 + min(int(random.exponential(50 if name == "pairs" else 500)), 3000)
            ids = random.integers(VOCAB.text_start, VOCAB.text_stop, length)
            if name == "pairs":
                codes = random.integers(image.first_id, image.stop_id, image.codes_per_item)
                ids = np.concatenate([ids, [image.begin_id], codes, [image.end_id]])
            n_left -= len(ids)
            yield cast(Encoded, (ids, np.ones(len(ids), np.uint8)))  # lists would be slow

    save_manifest(folder, write_rows(pack(documents(), ROW_LEN), folder, ROW_LEN, VOCAB))


def drop_from_memory(files: list[Path]) -> None:
    """Asks the system to; pages that are mapped stay."""
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()
