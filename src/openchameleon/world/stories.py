"""Stories: sentences that change a scene, a picture after each, and the parser that scores them.

Everything a story says is one of five sentences (opening, joins, leaves, moves, swap), so that what
a model tells can be followed exactly: `continue_text` is the meaning of a sentence.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random

from openchameleon.world.captions import (
    COUNT_WORDS,
    capitalised,
    listed,
    one_of,
    place_name,
    with_article,
)
from openchameleon.world.scene import Grid, Placed, Scene, cell_from_name, cell_name

MAX_OBJECTS = 3
Allowed = Callable[[Scene], bool]


@dataclass(frozen=True, slots=True)
class Story:
    """Sentences, each with the scene it leads to, and a closing question about all of them."""

    steps: tuple[tuple[str, Scene], ...]
    question: str
    answer: str


def write_story(
    grid: Grid,
    names: tuple[str, ...],
    backgrounds: tuple[str, ...],
    rng: Random,
    n_pictures: int,
    allowed: Allowed,
) -> Story:
    """A story of `n_pictures` scenes, each of them `allowed`, on one background.

    No name comes back after it left, so that every sentence has one meaning.
    """
    scene = _first_scene(grid, names, rng.choice(backgrounds), rng, allowed)
    steps = [(opening(scene, grid, named=rng.random() < 0.5), scene)]
    told = set(scene.names())
    for _ in range(n_pictures - 1):
        newcomers = tuple(n for n in names if n not in told)
        step = change(steps[-1][1], grid, newcomers, rng, allowed)
        assert step is not None, f"nothing allowed can follow {steps[-1][1]}"
        steps.append(step)
        told.update(step[1].names())
    question, answer = _closing(tuple(s for _, s in steps), grid, rng)
    return Story(tuple(steps), question, answer)


def opening(scene: Scene, grid: Grid, named: bool) -> str:
    """The first sentence of one or two objects: who sits where; `named`: on which background."""
    first, *others = scene.objects
    items = [f"{with_article(first.name)} sits at {place_name(grid, first.cell)}"]
    items += [f"{with_article(o.name)} at {place_name(grid, o.cell)}" for o in others]
    mention = f", on {scene.background}" if named else ""
    return capitalised(f"{listed(items)}{mention}.")


def change(
    scene: Scene, grid: Grid, newcomers: tuple[str, ...], rng: Random, allowed: Allowed
) -> tuple[str, Scene] | None:
    """A sentence that changes `scene`, and the scene after it.

    Only objects whose name stands once are spoken of. None if no allowed change was found.
    """
    once = [o for o in scene.objects if scene.names().count(o.name) == 1]
    free = [c for c in grid.cells if scene.at(c) is None]
    kinds = ["join"] * (0 < len(scene.objects) < MAX_OBJECTS) + ["move"] * bool(once)
    kinds += ["leave"] * (bool(once) and len(scene.objects) > 1) + ["swap"] * (len(once) > 1)
    for _ in range(200 if kinds else 0):
        kind = rng.choice(kinds)
        if kind == "join":
            name, cell = rng.choice(newcomers), rng.choice(free)
            them = "it" if len(scene.objects) == 1 else "them"
            text = f"{with_article(name)} joins {them} at {place_name(grid, cell)}."
            after = scene.with_object(name, cell)
        elif kind == "leave":
            gone = rng.choice(once)
            text, after = f"the {gone.name} leaves.", scene.without(gone.cell)
        elif kind == "move":
            moved, cell = rng.choice(once), rng.choice(free)
            text = f"the {moved.name} moves to {place_name(grid, cell)}."
            after = scene.without(moved.cell).with_object(moved.name, cell)
        else:
            one, two = rng.sample(once, 2)
            text = f"the {one.name} and the {two.name} swap places."
            after = _swapped(scene, one, two)
        if allowed(after):
            return capitalised(text), after
    return None


def continue_text(
    scene: Scene | None, sentence: str, grid: Grid, names: tuple[str, ...]
) -> Scene | None:
    """The scene after a sentence, exactly as this module writes them; None if it is not one.

    `scene` None expects an opening; its background is "" where the sentence names none. None also
    where the sentence contradicts the scene: who leaves must be there, a cell holds one object.
    """
    match = next((m for p in _sentences(grid, names) if (m := p.fullmatch(sentence))), None)
    if match is None or ("opener" in match.groupdict()) != (scene is None):
        return None
    parts = match.groupdict()
    if scene is None:
        return _opened(parts, grid)
    by_name = {o.name: o for o in scene.objects}
    if "newcomer" in parts:
        name, cell = _bare(parts["newcomer"]), cell_from_name(grid, parts["cell"])
        fits = name not in by_name and scene.at(cell) is None
        return scene.with_object(name, cell) if fits else None
    one = by_name.get(parts["one"])
    if one is None:
        return None
    if "two" in parts:
        two = by_name.get(parts["two"])
        return _swapped(scene, one, two) if two and two != one else None
    left = scene.without(one.cell)
    if "cell" not in parts:
        return left
    cell = cell_from_name(grid, parts["cell"])
    return left.with_object(one.name, cell) if scene.at(cell) is None else None


def score_story(
    segments: Sequence[str | Scene | None], grid: Grid, names: tuple[str, ...]
) -> list[bool]:
    """For each picture of a told story: does it show the text so far, and nothing else?

    Segments in order: text, or a picture as the scene read from it (None: unreadable). The opening
    must come before the first picture. A background the text does not name is the first picture's.
    From a sentence on that cannot be followed, every picture is wrong; at the end, the last one.
    """
    fits: list[bool] = []
    expected: Scene | None = None
    lost = False
    for segment in segments:
        if isinstance(segment, str):
            for sentence in filter(None, re.split(r"(?<=[.?!])\s*", segment)):
                expected = None if lost else continue_text(expected, sentence, grid, names)
                lost = expected is None
            continue
        if expected is not None and expected.background == "" and segment is not None:
            expected = Scene(segment.background, expected.objects)
        fits.append(not lost and expected is not None and segment == expected)
    if lost and fits:
        fits[-1] = False
    return fits


def opening_scene(
    segments: Sequence[str | Scene | None], grid: Grid, names: tuple[str, ...]
) -> Scene | None:
    """The scene that the first sentence of a told story sets; None if it sets none."""
    first = segments[0] if segments else None
    if not isinstance(first, str):
        return None
    return continue_text(None, re.split(r"(?<=[.?!])\s*", first)[0], grid, names)


def _first_scene(
    grid: Grid, names: tuple[str, ...], background: str, rng: Random, allowed: Allowed
) -> Scene:
    n = rng.choice((1, 2))
    for _ in range(1000):
        cells, chosen = rng.sample(grid.cells, n), rng.sample(names, n)
        scene = Scene(background, (Placed(c, name) for c, name in zip(cells, chosen, strict=True)))
        if allowed(scene):
            return scene
    raise ValueError("no allowed scene found to open a story with")


def _swapped(scene: Scene, one: Placed, two: Placed) -> Scene:
    rest = scene.without(one.cell).without(two.cell)
    return rest.with_object(one.name, two.cell).with_object(two.name, one.cell)


def _closing(scenes: tuple[Scene, ...], grid: Grid, rng: Random) -> tuple[str, str]:
    """A question about the whole story that has one answer."""
    first, last = scenes[0].names(), scenes[-1].names()
    ever = {name for scene in scenes for name in scene.names()}
    stayed, left = set(first) & set(last), ever - set(last)
    joined = ever - set(first)
    placed = rng.choice(scenes[-1].objects)
    options = [
        (f"Where is the {placed.name} now?", f"At {place_name(grid, placed.cell)}."),
        ("How many are there now?", f"{capitalised(COUNT_WORDS[len(last)])}."),
    ]
    for question, names in (("Who stayed?", stayed), ("Who left?", left), ("Who joined?", joined)):
        if len(names) == 1 and len(ever) > 1:
            options.append((question, f"The {min(names)}."))
    return rng.choice(options)


@lru_cache(maxsize=8)
def _sentences(grid: Grid, names: tuple[str, ...]) -> tuple[re.Pattern[str], ...]:
    """The five sentences, their parts as named groups."""
    name, article_name = one_of(names), one_of(with_article(n) for n in names)
    capital_name = one_of(capitalised(with_article(n)) for n in names)
    the = "the " if grid.n == 3 else ""
    cell = one_of(cell_name(grid, c) for c in grid.cells)
    return (
        re.compile(
            rf"(?P<opener>{capital_name}) sits at {the}(?P<cell>{cell})"
            rf"(?: and (?P<second>{article_name}) at {the}(?P<second_cell>{cell}))?"
            r"(?:, on (?P<background>[a-z ]+))?\."
        ),
        re.compile(rf"(?P<newcomer>{capital_name}) joins (?:it|them) at {the}(?P<cell>{cell})\."),
        re.compile(rf"The (?P<one>{name}) leaves\."),
        re.compile(rf"The (?P<one>{name}) moves to {the}(?P<cell>{cell})\."),
        re.compile(rf"The (?P<one>{name}) and the (?P<two>{name}) swap places\."),
    )


def _bare(article_name: str) -> str:
    """`"cat"` of `"A cat"`."""
    return article_name.split(" ", 1)[1]


def _opened(parts: dict[str, str | None], grid: Grid) -> Scene | None:
    """The scene an opening sets; None if its two objects share a name or a cell."""
    found = ((parts["opener"], parts["cell"]), (parts["second"], parts["second_cell"]))
    placed = [Placed(cell_from_name(grid, c), _bare(name)) for name, c in found if name and c]
    if len({o.cell for o in placed}) < len(placed) or len({o.name for o in placed}) < len(placed):
        return None
    return Scene(parts["background"] or "", placed)
