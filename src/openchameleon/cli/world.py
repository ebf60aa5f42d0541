"""The emoji world: writes samples of it as a data set, and reads pictures of it back."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from openchameleon.cli.main import Action
from openchameleon.errors import UserError, nearest
from openchameleon.image_io import open_image
from openchameleon.world.atlas import PRESETS, WorldPreset
from openchameleon.world.checker import check, reading_to_json
from openchameleon.world.sample import MIXTURE, sample_records, write_samples
from openchameleon.world.splits import SPLITS
from openchameleon.world.tasks import TASKS


def add_sample_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--n", type=int, default=100, help="samples (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which samples (%(default)s)")
    parser.add_argument("--split", default="train", help=f"of {', '.join(SPLITS)} (%(default)s)")
    parser.add_argument("--tasks", metavar="A,B",
                        help=f"only these, of {', '.join(TASKS)}")  # fmt: skip
    parser.add_argument("--preset", default="nano", help=f"of {', '.join(PRESETS)} (%(default)s)")


def run_sample(options: argparse.Namespace) -> int:
    """Writes records.jsonl and images/: documents and conversations, as training reads them."""
    if options.n < 1:
        raise UserError(f"--n is {options.n}; it must be at least 1.")
    if options.seed < 0:
        raise UserError(f"--seed is {options.seed}; it must not be negative.")
    if options.split not in SPLITS:
        raise UserError(f"Unknown split {options.split!r}.{nearest(options.split, SPLITS)}")
    mixture = dict(MIXTURE)
    if options.tasks is not None:
        names = [name.strip() for name in options.tasks.split(",")]
        for name in names:
            if name not in TASKS:
                raise UserError(f"Unknown task {name!r}.{nearest(name, TASKS)}")
        mixture = {name: MIXTURE[name] for name in names}
    preset = find_preset(options.preset)
    samples = sample_records(preset, options.split, mixture, options.n, options.seed)
    print(write_samples(options.out, samples, options.n, preset))
    return 0


def add_check_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="a picture")
    parser.add_argument("--preset", default="nano", help=f"of {', '.join(PRESETS)} (%(default)s)")
    parser.add_argument("--json", action="store_true", help="the same JSON on one line")


def run_check(options: argparse.Namespace) -> int:
    """Prints as JSON what a picture shows: background, objects, cells that cannot be read."""
    preset = find_preset(options.preset)
    reading = reading_to_json(check(open_image(options.file), preset), preset.grid)
    print(json.dumps(reading, indent=None if options.json else 2))
    return 0


def find_preset(name: str) -> WorldPreset:
    if name not in PRESETS:
        raise UserError(
            f"Unknown preset {name!r}.{nearest(name, PRESETS)} The presets are"
            f" {', '.join(PRESETS)}."
        )
    return PRESETS[name]


ACTIONS = {
    "sample": Action("write samples as a data set", add_sample_arguments, run_sample),
    "check": Action("say what a picture shows", add_check_arguments, run_check),
}
