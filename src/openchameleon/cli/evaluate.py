"""Scores a model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from openchameleon.cli.dtype import add_dtype
from openchameleon.cli.main import Action
from openchameleon.cli.output import make_folder, refuse_existing
from openchameleon.errors import UserError

SCORES_FILE = "scores.json"


def add_world_arguments(world: argparse.ArgumentParser) -> None:
    world.add_argument("--model", default="nano", help="embedded name or folder (%(default)s)")
    world.add_argument("--n", type=int, default=500, help="samples a split (%(default)s)")
    world.add_argument("--seed", type=int, default=0, help="of sampling (%(default)s)")
    world.add_argument("--splits", metavar="A,B", help="only these splits, comma-separated")
    world.add_argument("--preset", help="the world to examine in (the one of the model's name)")
    add_dtype(world)
    world.add_argument("--json", action="store_true", help="print JSON instead of a table")
    world.add_argument("--out", type=Path, metavar="DIR",
                       help="keep scores.json and the pictures there")  # fmt: skip


def run_world(options: argparse.Namespace) -> int:
    """Draws, reads and tells held-out samples of the emoji world, and prints the scores."""
    if options.n < 1:
        raise UserError(f"--n is {options.n}; it must be at least 1.")
    if options.seed < 0:
        raise UserError(f"--seed is {options.seed}; it must not be negative.")
    if options.out is not None:
        refuse_existing(options.out / SCORES_FILE)
        make_folder(options.out)
    from openchameleon.evaluation.world import EXAMS, evaluate_world
    from openchameleon.pipeline import Chameleon

    splits = [s.strip() for s in options.splits.split(",")] if options.splits else list(EXAMS)
    scores = evaluate_world(
        Chameleon.from_pretrained(options.model, dtype=options.dtype),
        n=options.n,
        seed=options.seed,
        splits=splits,
        preset=options.preset,
        out=options.out,
    )
    text = json.dumps(scores, indent=2)
    if options.out is not None:
        (options.out / SCORES_FILE).write_text(text + "\n", encoding="utf-8")
    if options.json:
        print(text)
    else:
        _print_table(scores)
    return 0


def _print_table(scores: dict[str, Any]) -> None:
    """One row a score, one column a split; null, where a score has no meaning, as a dash."""
    from rich.console import Console
    from rich.table import Table

    splits: dict[str, dict[str, Any]] = scores["splits"]
    table = Table(title=f"{scores['model']}, {scores['n']} samples a split, seed {scores['seed']}")
    table.add_column("score")
    for split in splits:
        table.add_column(split, justify="right")
    names = dict.fromkeys(name for values in splits.values() for name in _flat(values))
    for name in names:
        cells = (_flat(values).get(name) for values in splits.values())
        table.add_row(name, *("-" if c is None else f"{c:.3f}" for c in cells))
    Console().print(table)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, float | None]:
    """Nested scores as `outer inner` -> number."""
    flat: dict[str, float | None] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name} ")
        else:
            flat[prefix + name] = value
    return flat


ACTIONS = {
    "world": Action("the emoji world, scored by its checker", add_world_arguments, run_world),
}
