"""Scene -> picture: every object in the middle of its cell, on a plain background. Exact."""

from __future__ import annotations

from functools import cache

from PIL import Image

from openchameleon.world.atlas import BACKGROUNDS, WorldPreset, load_atlas
from openchameleon.world.scene import Scene


def object_px(cell_px: int) -> int:
    """The side of an object in a cell: a margin of one pixel in 32 around it."""
    return cell_px - 2 * max(1, cell_px // 32)


@cache
def cell_picture(name: str | None, background: str, cell_px: int) -> Image.Image:
    """A cell as RGB: the background, and the object on it unless `name` is None.

    Shared between calls: callers must not draw on it.
    """
    cell = Image.new("RGBA", (cell_px, cell_px), BACKGROUNDS[background])
    if name is not None:
        side = object_px(cell_px)
        margin = (cell_px - side) // 2
        cell.alpha_composite(load_atlas().tile(name, side), (margin, margin))
    return cell.convert("RGB")


def render(scene: Scene, preset: WorldPreset) -> Image.Image:
    """The scene as an RGB picture of `preset.grid.size_px` pixels a side.

    The same scene gives the same pixels. KeyError if the atlas has no such emoji or background;
    ValueError if an object lies outside the grid.
    """
    grid = preset.grid
    picture = Image.new("RGB", (grid.size_px, grid.size_px), BACKGROUNDS[scene.background])
    for placed in scene.objects:
        row, column = placed.cell
        if not (0 <= row < grid.n and 0 <= column < grid.n):
            raise ValueError(f"cell {placed.cell} is outside a {grid.n}x{grid.n} grid")
        tile = cell_picture(placed.name, scene.background, grid.cell_px)
        picture.paste(tile, (column * grid.cell_px, row * grid.cell_px))
    return picture
