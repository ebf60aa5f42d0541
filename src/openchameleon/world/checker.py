"""Picture -> scene, by comparing every cell with every emoji on every background.

The ruler of the emoji world: exact on rendered pictures, tolerant of blur and noise, and
`unreadable` where something is there that is no emoji. Learns nothing, knows no words.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from openchameleon.world.atlas import BACKGROUNDS, WorldPreset
from openchameleon.world.render import cell_picture
from openchameleon.world.scene import Cell, Grid, Placed, Scene, cell_name

CELL_PX = 32  # pictures are read at this many pixels a cell
SIDE = CELL_PX // 2  # and a cell is compared as SIDE x SIDE means of 2 x 2 pixels
SHIFTS = tuple((dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1))
STILL = SHIFTS.index((0, 0))
UNREADABLE_BELOW = 0.5

# Logistic fit of "the best match is right" over blurred, noisy, JPEG-coded and foreign pictures,
# cells whose emoji was taken from the templates, smears, flat patches and blends of two emoji.
BIAS, PER_LEVEL, PER_LOG_RATIO, PER_LIKENESS = -8.4, -0.063, 4.4, 9.7
MAX_RATIO = 3.0  # a second best three times as far away is as good as none
EMPTY_LEVELS = 40.0  # an empty cell has no pattern to be like: its likeness falls with distance


@dataclass(frozen=True, slots=True)
class Found:
    """An emoji read in a cell. `confidence` in [0.5, 1]: the chance that the name is right."""

    name: str
    cell: Cell
    confidence: float


@dataclass(frozen=True, slots=True)
class Reading:
    """What a picture shows: nearest background, objects and unreadable cells in raster order."""

    background: str
    objects: tuple[Found, ...]
    unreadable: tuple[Cell, ...]

    def as_scene(self) -> Scene | None:
        """The scene that was read, or None if a cell is unreadable."""
        if self.unreadable:
            return None
        return Scene(self.background, (Placed(found.cell, found.name) for found in self.objects))


def check(picture: Image.Image, preset: WorldPreset) -> Reading:
    """Reads a picture of any size as one of the preset's world."""
    windows = _windows(_pixels(picture, preset.grid.n), preset.grid.n)
    background = min(preset.backgrounds, key=lambda name: _misfit(windows[STILL], preset, name))
    cells = windows - _colour(background)
    templates = _templates(preset, background)
    levels = _levels(cells, templates)

    shift = levels.argmin(axis=0)
    nearest = levels.min(axis=0)
    best, second = np.argsort(nearest, axis=1)[:, :2].T
    index = np.arange(len(best))
    matched = cells[shift[index, best], index]
    likeness = _likeness(matched, templates[best])
    likeness = np.where(best == 0, 1 - (nearest[:, 0] / EMPTY_LEVELS) ** 2, likeness)
    confidence = _confidence(nearest[index, best], nearest[index, second], likeness)

    objects, unreadable = [], []
    for k, cell in enumerate(preset.grid.cells):
        if confidence[k] < UNREADABLE_BELOW:
            unreadable.append(cell)
        elif best[k] > 0:
            objects.append(Found(preset.emoji[best[k] - 1], cell, round(float(confidence[k]), 4)))
    return Reading(background, tuple(objects), tuple(unreadable))


def reading_to_json(reading: Reading, grid: Grid) -> dict[str, Any]:
    """The reading in plain data, with cells by name."""
    return {
        "background": reading.background,
        "objects": [
            {"name": o.name, "cell": cell_name(grid, o.cell), "confidence": o.confidence}
            for o in reading.objects
        ],
        "unreadable": [cell_name(grid, cell) for cell in reading.unreadable],
    }


def _pixels(picture: Image.Image, n_cells: int) -> np.ndarray:
    """The picture as float32 levels (n * 32 + 2, n * 32 + 2, 3), its edge doubled all around."""
    side = n_cells * CELL_PX
    picture = picture.convert("RGB")
    if picture.size != (side, side):
        smaller = min(picture.size) < side
        how = Image.Resampling.BICUBIC if smaller else Image.Resampling.BOX
        picture = picture.resize((side, side), how)
    return np.pad(np.asarray(picture, np.float32), ((1, 1), (1, 1), (0, 0)), mode="edge")


def _windows(pixels: np.ndarray, n_cells: int) -> np.ndarray:
    """Every cell under every shift of one pixel: (shift, n * n cells, SIDE * SIDE * 3)."""
    side = n_cells * CELL_PX
    means = (pixels[:-1, :-1] + pixels[1:, :-1] + pixels[:-1, 1:] + pixels[1:, 1:]) / 4
    shifted = []
    for dy, dx in SHIFTS:
        halved = means[1 + dy : 1 + dy + side : 2, 1 + dx : 1 + dx + side : 2]
        cells = halved.reshape(n_cells, SIDE, n_cells, SIDE, 3).swapaxes(1, 2)
        shifted.append(cells.reshape(n_cells * n_cells, -1))
    return np.stack(shifted)


@cache
def _templates(preset: WorldPreset, background: str) -> np.ndarray:
    """Row 0 the empty cell, row i + 1 the preset's emoji i, as `_windows` cells less background."""
    names = (None, *preset.emoji)
    pictures = (cell_picture(name, background, preset.grid.cell_px) for name in names)
    rows = [_windows(_pixels(picture, 1), 1)[STILL, 0] for picture in pictures]
    return np.stack(rows) - _colour(background)


def _colour(background: str) -> np.ndarray:
    return np.tile(np.asarray(BACKGROUNDS[background], np.float32), SIDE * SIDE)


def _levels(cells: np.ndarray, templates: np.ndarray) -> np.ndarray:
    """Root mean square difference in grey levels of each cell (..., D) to each template (K, D)."""
    products = cells @ templates.T
    squares = (cells**2).sum(-1)[..., None] + (templates**2).sum(-1) - 2 * products
    return np.sqrt(np.maximum(squares, 0) / cells.shape[-1])


def _misfit(cells: np.ndarray, preset: WorldPreset, background: str) -> float:
    """How badly the cells can be explained on that background."""
    levels = _levels(cells - _colour(background), _templates(preset, background))
    return float(levels.min(axis=1).sum())


def _likeness(cells: np.ndarray, templates: np.ndarray) -> np.ndarray:
    """Correlation, row by row, of the patterns that are left when each channel's mean is taken off.

    Tells a flat or smeared patch of about the right colour from an emoji.
    """
    patterns = []
    for rows in (cells, templates):
        pattern = rows.reshape(len(rows), -1, 3)
        patterns.append((pattern - pattern.mean(axis=1, keepdims=True)).reshape(len(rows), -1))
    a, b = patterns
    size = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    return (a * b).sum(1) / np.maximum(size, 1.0)


def _confidence(best: np.ndarray, second: np.ndarray, likeness: np.ndarray) -> np.ndarray:
    """From the distances of the two best matches and the likeness of the best; in [0, 1]."""
    ratio = np.minimum(second / np.maximum(best, 1.0), MAX_RATIO)
    score = BIAS + PER_LEVEL * best + PER_LOG_RATIO * np.log(ratio) + PER_LIKENESS * likeness
    return 1 / (1 + np.exp(-score))
