"""Takes a run back to an earlier checkpoint, and past the batches that spoiled it.

  openchameleon rewind runs/mine/runs/pretrain --to 3000 --skip 200

The same `train` command then goes on from there. What came later is kept in `rewound-N/`.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", type=Path, help="the folder of a run: that with `checkpoints` in it"
    )
    parser.add_argument("--to", type=int, required=True, metavar="STEP",
                        help="the newest checkpoint of so many steps or fewer")  # fmt: skip
    parser.add_argument("--skip", type=int, default=0, metavar="N",
                        help="batches after it to leave out (%(default)s)")  # fmt: skip


def run(options: argparse.Namespace) -> int:
    from openchameleon.train.rewind import rewind

    last = rewind(options.folder, options.to, options.skip)
    skips = f"; the {options.skip} batches after it will be left out" if options.skip else ""
    print(f"{options.folder} goes on from {last.name}{skips}")
    return 0
