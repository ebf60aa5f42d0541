"""Runs a training recipe: a name such as nano, or a recipe file, with `key.sub=value` changes.

A run that was cut off goes on from its last checkpoint when the same command is given again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from openchameleon.config import override, to_dict


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a recipe's name or file")
    parser.add_argument(
        "changes", nargs="*", default=(), metavar="a.b=c", help="changes to the recipe"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write (runs/RECIPE)")
    parser.add_argument(
        "--show", action="store_true", help="print the resolved recipe as JSON and stop"
    )


def run(options: argparse.Namespace) -> int:
    from openchameleon.recipes import load_recipe, run_recipe

    recipe = override(load_recipe(options.recipe), options.changes)
    if options.show:
        print(json.dumps(to_dict(recipe), indent=2))
        return 0
    model = run_recipe(recipe, options.out or Path("runs") / Path(options.recipe).stem)
    sample = model.with_name("sample") / "sample.md"
    if sample.is_file():
        print(f"What it writes is in {sample}.")
    print(f"The model is in {model}; `openchameleon generate ... --model {model}` uses it.")
    return 0
