"""The checker: exact on rendered scenes, alert to each change, calm under noise, honest at junk."""

from __future__ import annotations

import random

import numpy as np
import pytest
from PIL import Image, ImageFilter

from openchameleon.world.atlas import PRESETS, WorldPreset
from openchameleon.world.checker import Found, Reading, check, reading_to_json
from openchameleon.world.render import cell_picture, render
from openchameleon.world.scene import Cell, Placed, Scene

NANO, SMALL = PRESETS["nano"], PRESETS["small"]


def some_scene(preset: WorldPreset, rng: random.Random) -> Scene:
    cells = rng.sample(preset.grid.cells, rng.randint(0, len(preset.grid.cells)))
    return Scene(
        rng.choice(preset.backgrounds), [Placed(c, rng.choice(preset.emoji)) for c in cells]
    )


def changes(drawn: Scene, preset: WorldPreset, rng: random.Random) -> list[Scene]:
    """One scene for each kind of single change that the scene allows."""
    others = [b for b in preset.backgrounds if b != drawn.background]
    changed = [Scene(rng.choice(others), drawn.objects)]
    free = [cell for cell in preset.grid.cells if drawn.at(cell) is None]
    if free:
        changed.append(drawn.with_object(rng.choice(preset.emoji), rng.choice(free)))
    if drawn.objects:
        chosen = rng.choice(drawn.objects)
        without = drawn.without(chosen.cell)
        different = rng.choice([name for name in preset.emoji if name != chosen.name])
        changed += [without, without.with_object(different, chosen.cell)]
        if free:
            changed.append(without.with_object(chosen.name, rng.choice(free)))
    return changed


def worn(picture: Image.Image, noise: np.random.Generator) -> Image.Image:
    """Blurred and noisy, as a tokenizer's reconstruction is."""
    soft = np.asarray(picture.filter(ImageFilter.GaussianBlur(0.7)), np.float32)
    noisy = soft + noise.normal(0, 12, soft.shape)
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def with_cell(picture: Image.Image, cell: Cell, junk: np.ndarray) -> Image.Image:
    side = junk.shape[0]
    spoiled = picture.copy()
    spoiled.paste(Image.fromarray(junk.astype(np.uint8)), (cell[1] * side, cell[0] * side))
    return spoiled


@pytest.mark.parametrize("name", list(PRESETS))
def test_every_emoji_on_every_background_is_read_exactly(name: str) -> None:
    preset, rng = PRESETS[name], random.Random(0)
    cells = preset.grid.cells
    for background in preset.backgrounds[:: 1 if preset.grid.cell_px == 32 else 4]:
        order = rng.sample(preset.emoji, len(preset.emoji))
        for start in range(0, len(order), len(cells)):
            chosen = order[start : start + len(cells)]
            drawn = Scene(background, map(Placed, cells, chosen))
            reading = check(render(drawn, preset), preset)
            assert reading.as_scene() == drawn
            assert min(found.confidence for found in reading.objects) > 0.99


@pytest.mark.parametrize("preset", [NANO, SMALL], ids=["nano", "small"])
def test_every_single_change_is_noticed(preset: WorldPreset) -> None:
    rng = random.Random(2)
    for _ in range(40):
        drawn = some_scene(preset, rng)
        assert check(render(drawn, preset), preset).as_scene() == drawn
        for changed in changes(drawn, preset, rng):
            assert check(render(changed, preset), preset).as_scene() == changed != drawn


def test_background_is_read_even_where_squares_fill_every_cell() -> None:
    for background in SMALL.backgrounds:
        for name in ("blue square", "ghost", "yellow square", "black heart"):
            drawn = Scene(background, [Placed(cell, name) for cell in SMALL.grid.cells])
            assert check(render(drawn, SMALL), SMALL).background == background


@pytest.mark.parametrize("name", list(PRESETS))
def test_blur_and_noise_do_not_change_the_reading(name: str) -> None:
    preset, rng, noise = PRESETS[name], random.Random(3), np.random.default_rng(3)
    for _ in range(40 if preset.grid.cell_px == 32 else 8):
        drawn = some_scene(preset, rng)
        assert check(worn(render(drawn, preset), noise), preset).as_scene() == drawn


def test_a_shift_of_one_pixel_does_not_change_the_reading() -> None:
    rng = random.Random(4)
    for dy, dx in ((0, 1), (1, 0), (-1, -1), (1, -1)):
        drawn = some_scene(NANO, rng)
        moved = np.roll(np.asarray(render(drawn, NANO)), (dy, dx), axis=(0, 1))
        assert check(Image.fromarray(moved), NANO).as_scene() == drawn


def test_other_sizes_and_modes_are_read() -> None:
    rng = random.Random(5)
    for size in (64, 144, 192, 500):
        drawn = some_scene(NANO, rng)
        picture = render(drawn, NANO).resize((size, size), Image.Resampling.BICUBIC)
        assert check(picture.convert("RGBA"), NANO).as_scene() == drawn


@pytest.mark.parametrize("preset", [NANO, SMALL], ids=["nano", "small"])
def test_random_noise_and_grey_smears_are_unreadable_and_spoil_only_their_cell(
    preset: WorldPreset,
) -> None:
    rng, noise = random.Random(6), np.random.default_rng(6)
    y, x = np.mgrid[:32, :32] - 15.5
    for _ in range(25):
        drawn = some_scene(preset, rng)
        cell = rng.choice(preset.grid.cells)
        picture = render(drawn, preset)
        plain = np.asarray(cell_picture(None, drawn.background, 32), np.float32)
        cover = np.exp(-(x**2 + y**2) / 2 / rng.uniform(7, 12) ** 2)[..., None]
        grey = np.full_like(plain, rng.uniform(90, 140))
        for junk in (noise.integers(0, 256, (32, 32, 3)), grey, cover * grey + (1 - cover) * plain):
            reading = check(with_cell(picture, cell, junk), preset)
            assert reading.unreadable == (cell,)
            assert {(o.cell, o.name) for o in reading.objects} == {
                (o.cell, o.name) for o in drawn.objects if o.cell != cell
            }
            assert reading.as_scene() is None


@pytest.mark.parametrize("colour", [(150, 150, 150), (120, 150, 220), (230, 150, 190)])
def test_a_pale_spot_in_an_empty_cell_is_not_taken_for_nothing(colour: tuple[int, ...]) -> None:
    y, x = np.mgrid[:32, :32] - 15.5
    cover = np.exp(-(x**2 + y**2) / 2 / 5**2)[..., None]
    spot = cover * np.array(colour) + (1 - cover) * 255
    reading = check(with_cell(render(Scene("white"), NANO), (1, 1), spot), NANO)
    assert reading == Reading("white", (), ((1, 1),))


def test_two_emoji_blended_into_one_are_unreadable() -> None:
    rng, unreadable = random.Random(7), 0
    for _ in range(100):
        a, b = (np.asarray(cell_picture(n, "white", 32), int) for n in rng.sample(NANO.emoji, 2))
        reading = check(with_cell(render(Scene("white"), NANO), (1, 1), (a + b) // 2), NANO)
        unreadable += reading.unreadable == ((1, 1),)
    assert unreadable >= 97


def test_an_emoji_of_another_world_is_not_given_a_name_of_this_one() -> None:
    strangers = [name for name in SMALL.emoji if name not in NANO.emoji]
    named = []
    for name in strangers:
        picture = with_cell(
            render(Scene("white"), NANO), (0, 2), np.asarray(cell_picture(name, "white", 32))
        )
        named += [(name, found.name) for found in check(picture, NANO).objects]
    assert len(named) <= len(strangers) // 20, named


def test_a_picture_of_noise_is_unreadable_throughout() -> None:
    picture = Image.fromarray(np.random.default_rng(8).integers(0, 256, (96, 96, 3), np.uint8))
    reading = check(picture, NANO)
    assert reading.objects == ()
    assert reading.unreadable == NANO.grid.cells


def test_confidence_falls_as_a_picture_is_worn() -> None:
    drawn = Scene("sky", [Placed((1, 1), "butterfly")])
    seen = []
    for blur in (0, 1, 2):
        picture = render(drawn, NANO).filter(ImageFilter.GaussianBlur(blur))
        reading = check(picture, NANO)
        seen.append(reading.objects[0].confidence if reading.objects else 0.0)
    assert 1 >= seen[0] > seen[1] > seen[2]


def test_a_reading_becomes_plain_data_with_named_cells() -> None:
    reading = Reading("sky", (Found("cat", (0, 0), 0.98),), ((1, 1),))
    assert reading_to_json(reading, NANO.grid) == {
        "background": "sky",
        "objects": [{"name": "cat", "cell": "top left", "confidence": 0.98}],
        "unreadable": ["center"],
    }
