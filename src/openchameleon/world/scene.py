"""A scene: a background and emoji on a grid, one a cell. The scene is the truth; all else derives.

Knows names and cells only: no pixels, no words.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

Cell = tuple[int, int]
"""(row, column), both from 0, row 0 at the top."""


@dataclass(frozen=True, slots=True)
class Grid:
    """`n` x `n` cells of `cell_px` pixels."""

    n: int
    cell_px: int

    @property
    def size_px(self) -> int:
        return self.n * self.cell_px

    @property
    def cells(self) -> tuple[Cell, ...]:
        """All cells in raster order."""
        return tuple((r, c) for r in range(self.n) for c in range(self.n))


_THREE = (
    ("top left", "top", "top right"),
    ("left", "center", "right"),
    ("bottom left", "bottom", "bottom right"),
)


def cell_name(grid: Grid, cell: Cell) -> str:
    """What people call the cell: compass words on a 3x3 grid, "row 2, column 3" elsewhere."""
    row, column = cell
    return _THREE[row][column] if grid.n == 3 else f"row {row + 1}, column {column + 1}"


def cell_from_name(grid: Grid, name: str) -> Cell:
    """The inverse of `cell_name`. KeyError if no cell is called so."""
    return {cell_name(grid, cell): cell for cell in grid.cells}[name]


@dataclass(frozen=True, slots=True, order=True)
class Placed:
    """An emoji, by its atlas name, in a cell."""

    cell: Cell
    name: str


@dataclass(frozen=True, slots=True)
class Scene:
    """A background's name and objects in raster order, at most one a cell."""

    background: str
    objects: tuple[Placed, ...]

    def __init__(self, background: str, objects: Iterable[Placed] = ()) -> None:
        ordered = tuple(sorted(objects))
        if len({o.cell for o in ordered}) != len(ordered):
            raise ValueError("two objects share a cell")
        object.__setattr__(self, "background", background)
        object.__setattr__(self, "objects", ordered)

    def at(self, cell: Cell) -> str | None:
        """The name of the object in `cell`, or None."""
        return next((o.name for o in self.objects if o.cell == cell), None)

    def names(self) -> tuple[str, ...]:
        """Object names in raster order, repeats kept."""
        return tuple(o.name for o in self.objects)

    def with_object(self, name: str, cell: Cell) -> Scene:
        return Scene(self.background, (*self.objects, Placed(cell, name)))

    def without(self, cell: Cell) -> Scene:
        return Scene(self.background, (o for o in self.objects if o.cell != cell))
