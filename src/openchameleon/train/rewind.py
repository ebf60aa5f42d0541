"""Back to an earlier step of a run, and past the rows that spoiled it.

PaLM's remedy for a loss that rises to stay: go back by some hundred steps and leave out the
batches that were seen there (Chowdhery et al., 2022, section 5.1).
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from openchameleon.errors import UserError
from openchameleon.files import locked
from openchameleon.train.checkpoint import checkpoints_in, latest_checkpoint

SKIPPED = "skipped.json"
CHECKPOINTS = "checkpoints"


def skipped_steps(run_folder: Path) -> list[tuple[int, int]]:
    """The steps, counted from 0, that the run passes over: from a to before b, for each (a, b)."""
    path = run_folder / SKIPPED
    return [(a, b) for a, b in json.loads(path.read_text())] if path.exists() else []


def rewind(run_folder: Path, to: int, skip: int) -> Path:
    """Makes the newest whole checkpoint of `to` steps or fewer the last one; returns it.

    The run then passes over the batches of the `skip` steps after it. What was later is moved into
    `rewound-N/`, the log as it was with it. UserError where there is no such checkpoint, or the
    run is being trained.
    """
    if to < 0 or skip < 0:
        raise UserError(f"--to {to} and --skip {skip} must not be negative.")
    folder = run_folder / CHECKPOINTS
    if not folder.is_dir():
        raise UserError(f"{run_folder} is no run: it has no folder {CHECKPOINTS}.")
    with locked(run_folder):
        later = [path for step, path in checkpoints_in(folder) if step > to]
        kept = [step for step, _ in checkpoints_in(folder) if step <= to]
        if not kept:
            there = ", ".join(str(step) for step, _ in checkpoints_in(folder)) or "none"
            raise UserError(f"{folder} has no checkpoint of {to} steps or fewer (there: {there}).")
        number = 1 + sum(1 for _ in run_folder.glob("rewound-*"))
        aside = run_folder / f"rewound-{number}"
        aside.mkdir()
        if (log := run_folder / "metrics.jsonl").exists():
            shutil.copyfile(log, aside / log.name)
        for path in later:
            path.rename(aside / path.name)
        last = latest_checkpoint(folder)
        assert last is not None
        step = int(last.name.removeprefix("step-"))
        ranges = [*skipped_steps(run_folder), *([(step, step + skip)] if skip else [])]
        temporary = run_folder / f"{SKIPPED}.tmp"
        temporary.write_text(json.dumps(ranges) + "\n")
        os.replace(temporary, run_folder / SKIPPED)
        return last
