"""The atlas: which emoji there are, what each looks like, and the worlds made of them.

Knows names, tiles and sizes; no scenes and no words beyond the names.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from functools import cache
from importlib import resources

from PIL import Image

from openchameleon.world.scene import Grid

TILE_PX = 128
TILES_A_ROW = 16

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "sky": (196, 226, 255),
    "sand": (255, 236, 179),
    "mint": (200, 242, 214),
    "pink": (255, 214, 226),
    "lilac": (224, 210, 250),
    "aqua": (150, 228, 236),
    "night": (30, 40, 120),
}
"""Background colours by name, light ones first. No emoji is called like a background."""


@dataclass(frozen=True, slots=True)
class Atlas:
    """Named emoji tiles in a fixed order. Names are unique lower-case words."""

    names: tuple[str, ...]
    nano_names: tuple[str, ...]
    sheet: Image.Image = field(repr=False, compare=False)
    _scaled: dict[tuple[str, int], Image.Image] = field(
        default_factory=dict, repr=False, compare=False
    )

    def tile(self, name: str, px: int) -> Image.Image:
        """The emoji as RGBA, `px` pixels a side, transparent around. KeyError if unknown.

        The same object comes back each time: callers must not draw on it.
        """
        if (name, px) not in self._scaled:
            if name not in self.names:
                raise KeyError(name)
            row, column = divmod(self.names.index(name), TILES_A_ROW)
            corner = (column * TILE_PX, row * TILE_PX)
            tile = self.sheet.crop((*corner, corner[0] + TILE_PX, corner[1] + TILE_PX))
            self._scaled[name, px] = tile.resize((px, px), Image.Resampling.LANCZOS)
        return self._scaled[name, px]


@cache
def load_atlas() -> Atlas:
    """The atlas shipped with the package."""
    folder = resources.files("openchameleon.world") / "atlas_data"
    entries = json.loads((folder / "atlas.json").read_text(encoding="utf-8"))
    sheet = Image.open(io.BytesIO((folder / "sheet.png").read_bytes()))  # decoded at first use
    return Atlas(
        names=tuple(entry["name"] for entry in entries),
        nano_names=tuple(entry["name"] for entry in entries if entry["nano"]),
        sheet=sheet,
    )


@dataclass(frozen=True, slots=True)
class WorldPreset:
    """A world's size: its grid and the emoji and backgrounds its scenes are drawn from."""

    name: str
    grid: Grid
    emoji: tuple[str, ...]
    backgrounds: tuple[str, ...]


def _presets() -> dict[str, WorldPreset]:
    atlas, backgrounds = load_atlas(), tuple(BACKGROUNDS)
    return {
        "nano": WorldPreset("nano", Grid(3, 32), atlas.nano_names, backgrounds[:2]),
        "small": WorldPreset("small", Grid(4, 32), atlas.names, backgrounds),
        "base": WorldPreset("base", Grid(4, 64), atlas.names, backgrounds),
        "full": WorldPreset("full", Grid(4, 128), atlas.names, backgrounds),
    }


PRESETS: dict[str, WorldPreset] = _presets()
