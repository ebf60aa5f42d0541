"""The same scenes drawn by other means: other sizes, places, resampling, JPEG, a scaled screenshot.

For testing whether a reader of pictures learned the emoji or `render`'s pixels: nothing here
goes through `render`, and no object's pixels are the same.
"""

from __future__ import annotations

import io
import random

from PIL import Image, ImageDraw

from openchameleon.world.atlas import BACKGROUNDS, TILE_PX, WorldPreset, load_atlas
from openchameleon.world.render import object_px
from openchameleon.world.scene import Scene

MAX_OFFSET_PX = 3
SCALE_CHANGE = (0.08, 0.12)
JPEG_QUALITY = 75
PAGE_ZOOM = (2.6, 3.4)
BORDER = (150, 150, 150)


def render_foreign(scene: Scene, preset: WorldPreset, rng: random.Random) -> Image.Image:
    """The scene as an RGB picture of the preset's size, a function of (scene, preset, rng's state).

    Always: all objects 8 to 12% larger or smaller, each up to 3 pixels off its place.
    Half of the pictures each, independently: drawn as a page about three times as large and
    scaled down; written and read again as JPEG of quality 75.
    """
    size = preset.grid.size_px
    change = rng.choice((-1, 1)) * rng.uniform(*SCALE_CHANGE)
    if rng.random() < 0.5:
        page = _draw(scene, preset, 1 + change, rng.uniform(*PAGE_ZOOM), rng)
        ImageDraw.Draw(page).rectangle((0, 0, page.width - 1, page.height - 1), outline=BORDER)
        down = rng.choice((Image.Resampling.BILINEAR, Image.Resampling.HAMMING))
        picture = page.resize((size, size), down)
    else:
        picture = _draw(scene, preset, 1 + change, 1.0, rng)
    return _through_jpeg(picture) if rng.random() < 0.5 else picture


def _draw(
    scene: Scene, preset: WorldPreset, scale: float, zoom: float, rng: random.Random
) -> Image.Image:
    """The scene `zoom` times the preset's size, objects `scale` times theirs and displaced."""
    cell = preset.grid.cell_px * zoom
    side = round(object_px(preset.grid.cell_px) * zoom * scale)
    page = round(preset.grid.size_px * zoom)
    picture = Image.new("RGB", (page, page), BACKGROUNDS[scene.background])
    for placed in scene.objects:
        tile = load_atlas().tile(placed.name, TILE_PX)
        tile = tile.resize((side, side), Image.Resampling.BICUBIC)
        row, column = placed.cell
        dy, dx = (rng.randint(-MAX_OFFSET_PX, MAX_OFFSET_PX) * zoom for _ in range(2))
        corner = (
            round((column + 0.5) * cell + dx - side / 2),
            round((row + 0.5) * cell + dy - side / 2),
        )
        picture.paste(tile, corner, tile)
    return picture


def _through_jpeg(picture: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return Image.open(buffer).convert("RGB")
