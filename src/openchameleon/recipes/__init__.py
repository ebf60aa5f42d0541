"""Recipes: functions that return a full config; each docstring says command, hardware, time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from openchameleon.recipes.config import Pretraining, Recipe

RECIPES = ("nano", "small", "files", "debug_cpu", "pretrain_7b", "pretrain_34b")
"""The recipes shipped with the package, by name; each is the module of that name."""


def load_recipe(name_or_path: str) -> Recipe | Pretraining:
    """The recipe of that name, or of a Python file (its `recipe()`) or JSON file. UserError.

    A JSON file that has `streams` is a `Pretraining`, any other a `Recipe`.
    """
    import importlib
    import json
    import runpy

    from openchameleon.config import from_dict
    from openchameleon.errors import UserError, nearest
    from openchameleon.recipes.config import Pretraining, Recipe

    if name_or_path in RECIPES:
        module = importlib.import_module(f"openchameleon.recipes.{name_or_path}")
        return module.recipe()
    path = Path(name_or_path)
    if not path.is_file():
        raise UserError(
            f"No recipe {name_or_path!r}: it is neither a file nor one of {', '.join(RECIPES)}."
            f"{nearest(name_or_path, RECIPES)}"
        )
    if path.suffix == ".json":
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path} is not JSON: {error}") from error
        if isinstance(data, dict):
            if "streams" in data:
                return from_dict(Pretraining, data)
            return from_dict(Recipe, data)
    elif path.suffix == ".py":
        make = runpy.run_path(str(path)).get("recipe")
        try:
            recipe = make() if callable(make) else None
        except ValueError as error:  # of a config's own checks
            raise UserError(f"{path}: {error}") from error
        if isinstance(recipe, Recipe | Pretraining):
            return recipe
    raise UserError(
        f"{path} is no recipe: give a .json file of one, or a .py file whose recipe() returns one."
    )


def run_recipe(recipe: Recipe | Pretraining, out: Path) -> Path:
    """Trains everything the recipe says, going on where it was cut off; the model folder."""
    from openchameleon.recipes import pretraining, stages
    from openchameleon.recipes.config import Pretraining

    if isinstance(recipe, Pretraining):
        return pretraining.run_pretraining(recipe, out)
    return stages.run_recipe(recipe, out)
