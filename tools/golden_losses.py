"""Writes tests/golden/debug_cpu.jsonl: the losses that the recipe `debug_cpu` must give.

Run as `python tools/golden_losses.py`, on purpose, after a change that is meant to move them; the
commit says why they moved.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from openchameleon.recipes import load_recipe, run_recipe
from openchameleon.train.metrics import read_metrics

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden" / "debug_cpu.jsonl"
KEYS = ("step", "loss", "text_loss", "code_loss", "grad_norm")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        run_recipe(load_recipe("debug_cpu"), Path(folder))
        lines = read_metrics(Path(folder) / "run" / "metrics.jsonl")
    kept = [{key: round(line[key], 6) for key in KEYS} for line in lines]
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    print(GOLDEN)


if __name__ == "__main__":
    main()
