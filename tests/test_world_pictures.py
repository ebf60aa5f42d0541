"""The atlas, the renderer and the foreign renderer: what is drawn, where, and how it differs."""

from __future__ import annotations

import random
from importlib import resources

import numpy as np
import pytest
from PIL import Image

from openchameleon.world.atlas import BACKGROUNDS, PRESETS, TILE_PX, WorldPreset, load_atlas
from openchameleon.world.foreign import render_foreign
from openchameleon.world.render import render
from openchameleon.world.scene import Placed, Scene

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "black")
SHAPES = ("circle", "square", "heart")


def scene(preset: WorldPreset, rng: random.Random) -> Scene:
    cells = rng.sample(preset.grid.cells, rng.randint(1, len(preset.grid.cells)))
    return Scene(
        rng.choice(preset.backgrounds), [Placed(c, rng.choice(preset.emoji)) for c in cells]
    )


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture, np.float32)


def test_atlas_has_over_200_distinct_nameable_emoji_and_no_skull() -> None:
    names = load_atlas().names
    assert len(names) >= 200
    assert len(set(names)) == len(names)
    assert not {name + ending for name in names for ending in ("s", "es")} & set(names)
    assert all(name.replace(" ", "").isalpha() and name == name.lower() for name in names)
    assert "skull" not in names
    assert not set(names) & set(BACKGROUNDS)


def test_nano_has_144_emoji_with_every_colour_in_every_shape() -> None:
    atlas = load_atlas()
    assert len(atlas.nano_names) == 144
    assert set(atlas.nano_names) < set(atlas.names)
    shapes = {f"{colour} {shape}" for colour in COLOURS for shape in SHAPES}
    assert shapes | {"cat", "dog", "pizza", "rocket"} <= set(atlas.nano_names)


def test_every_tile_is_drawn_to_its_edge_and_the_sheet_holds_no_more() -> None:
    atlas = load_atlas()
    for name in atlas.names:
        box = atlas.tile(name, TILE_PX).getbbox()
        assert box is not None
        assert max(box[2] - box[0], box[3] - box[1]) >= TILE_PX - 2, name
    after = len(atlas.names)
    corner = (after % 16 * TILE_PX, after // 16 * TILE_PX)
    rest = atlas.sheet.crop((*corner, atlas.sheet.width, corner[1] + TILE_PX))
    assert rest.getbbox() is None


def test_every_emoji_is_visible_on_every_background() -> None:
    atlas = load_atlas()
    for background, colour in BACKGROUNDS.items():
        for name in atlas.names:
            page = Image.new("RGBA", (32, 32), colour)
            page.alpha_composite(atlas.tile(name, 32))
            difference = np.abs(pixels(page.convert("RGB")) - colour)
            assert (difference.max(axis=2) > 40).mean() > 0.08, (name, background)


def test_a_tile_is_scaled_once_and_an_unknown_name_is_a_key_error() -> None:
    atlas = load_atlas()
    assert atlas.tile("cat", 32).size == (32, 32)
    assert atlas.tile("cat", 32) is atlas.tile("cat", 32)
    with pytest.raises(KeyError):
        atlas.tile("dragon", 32)


def test_the_font_licence_and_its_copyright_line_are_shipped() -> None:
    folder = resources.files("openchameleon.world") / "atlas_data"
    text = (folder / "OFL.txt").read_text(encoding="utf-8")
    assert "Copyright 2013-2017 Google Inc." in text
    assert "SIL OPEN FONT LICENSE Version 1.1 - 26 February 2007" in text
    assert "DISCLAIMER" in text


def test_preset_sizes() -> None:
    sizes = {name: (p.grid.n, p.grid.size_px) for name, p in PRESETS.items()}
    assert sizes == {"nano": (3, 96), "small": (4, 128), "base": (4, 256), "full": (4, 512)}
    assert PRESETS["nano"].emoji == load_atlas().nano_names
    assert len(PRESETS["nano"].backgrounds) == 2


@pytest.mark.parametrize("name", list(PRESETS))
def test_objects_stay_inside_their_cells_with_a_margin(name: str) -> None:
    preset = PRESETS[name]
    px, cell = preset.grid.cell_px, (1, 2)
    for emoji in preset.emoji[:: 1 if px == 32 else 16]:
        picture = pixels(render(Scene("white", [Placed(cell, emoji)]), preset))
        inside = picture[px + 1 : 2 * px - 1, 2 * px + 1 : 3 * px - 1].copy()
        picture[px + 1 : 2 * px - 1, 2 * px + 1 : 3 * px - 1] = 255
        assert (picture == 255).all()
        assert (inside != 255).any()


def test_render_is_the_same_each_time_and_depends_on_every_part_of_the_scene() -> None:
    preset = PRESETS["small"]
    drawn = Scene("mint", [Placed((0, 1), "cat"), Placed((3, 3), "pizza")])
    changes = [
        Scene("sky", drawn.objects),
        drawn.without((0, 1)),
        drawn.with_object("cat", (2, 2)),
        drawn.without((0, 1)).with_object("dog", (0, 1)),
        drawn.without((0, 1)).with_object("cat", (1, 0)),
    ]
    pictures = [render(s, preset).tobytes() for s in (drawn, *changes)]
    assert render(drawn, preset).tobytes() == pictures[0]
    assert len(set(pictures)) == len(pictures)


def test_render_refuses_a_cell_outside_the_grid() -> None:
    with pytest.raises(ValueError, match="outside a 3x3 grid"):
        render(Scene("white", [Placed((0, 3), "cat")]), PRESETS["nano"])
    with pytest.raises(KeyError):
        render(Scene("white", [Placed((0, 0), "skull")]), PRESETS["nano"])


@pytest.mark.parametrize("name", ["nano", "base"])
def test_foreign_pictures_have_the_size_and_follow_the_generator(name: str) -> None:
    preset, rng = PRESETS[name], random.Random(1)
    for seed in range(12):
        drawn = scene(preset, rng)
        picture = render_foreign(drawn, preset, random.Random(seed))
        assert (picture.mode, picture.size) == ("RGB", render(drawn, preset).size)
        again = render_foreign(drawn, preset, random.Random(seed))
        assert picture.tobytes() == again.tobytes()
        assert picture.tobytes() != render_foreign(drawn, preset, random.Random(99)).tobytes()
        assert picture.tobytes() != render(drawn, preset).tobytes()


def test_foreign_objects_are_8_to_12_percent_off_in_size_and_up_to_3_pixels_in_place() -> None:
    preset, centre = PRESETS["nano"], 47.5
    drawn = Scene("white", [Placed((1, 1), "blue square")])
    widths, places = [], []
    for seed in range(60):
        picture = pixels(render_foreign(drawn, preset, random.Random(seed)))
        inner = picture[16:80, 16:80, 0] < 130  # half way from white to the square's blue
        rows, columns = np.nonzero(inner)
        widths.append(columns.max() - columns.min() + 1)
        places.append((rows.mean() + 16 - centre, columns.mean() + 16 - centre))
    assert all(25 <= width <= 35 for width in widths)
    assert not {29, 30, 31} & set(widths)
    assert {width > 30 for width in widths} == {True, False}
    assert np.abs(places).max() <= 4
    assert np.abs(places).max() > 2
    assert np.std(places) > 1
