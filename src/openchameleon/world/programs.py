"""Scenes as code: a tiny Python-like drawing language, written and run.

background("sky")
place("cat", "top left")
"""

from __future__ import annotations

import ast

from openchameleon.world.scene import Grid, Placed, Scene, cell_from_name, cell_name


def program(scene: Scene, grid: Grid) -> str:
    """The canonical program that draws `scene`: background, then objects in raster order."""
    lines = [f'background("{scene.background}")']
    lines += [f'place("{o.name}", "{cell_name(grid, o.cell)}")' for o in scene.objects]
    return "\n".join(lines)


def run_program(text: str, grid: Grid) -> Scene:
    """The scene a program draws. ValueError, with the line, where it is not of the language.

    The background must be named once, and first. Names of objects are not checked.
    """
    try:
        statements = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"not a program: {error}") from error
    if not statements:
        raise ValueError("an empty program")
    (background,) = _arguments(statements[0], "background", 1)
    placed = []
    for statement in statements[1:]:
        name, cell = _arguments(statement, "place", 2)
        try:
            placed.append(Placed(cell_from_name(grid, cell), name))
        except KeyError:
            raise ValueError(f"line {statement.lineno}: no cell is called {cell!r}") from None
    return Scene(background, placed)


def _arguments(statement: ast.stmt, function: str, n: int) -> tuple[str, ...]:
    """The `n` strings of a statement that is one call of `function`; else ValueError."""
    match statement:
        case ast.Expr(ast.Call(ast.Name(called), arguments, [])) if called == function:
            texts = tuple(
                a.value
                for a in arguments
                if isinstance(a, ast.Constant) and isinstance(a.value, str)
            )
            if len(texts) == len(arguments) == n:
                return texts
    raise ValueError(f"line {statement.lineno}: expected {function} with {n} quoted words")
