"""Captions: a scene as text, what a text demands of a picture, and the canonical one read back.

Every grammar writes a caption together with its `Demand`, so that whatever a model draws for it can
be scored. Knows nothing of pixels, questions or stories.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Literal

from openchameleon.world.scene import Cell, Grid, Placed, Scene, cell_from_name, cell_name

COUNT_WORDS = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PREFIXES = ("Draw ", "Please draw ", "Make a picture of ")
HELD_OUT_PREFIXES = ("I would like to see ",)

_IRREGULAR = {
    "mouse": "mice", "leaf": "leaves", "scarf": "scarves", "snowman": "snowmen",
    "tomato": "tomatoes", "potato": "potatoes", "volcano": "volcanoes", "wolf": "wolves",
    "goose": "geese", "foot": "feet", "knife": "knives", "sheep": "sheep", "deer": "deer",
    "fish": "fish", "broccoli": "broccoli", "corn": "corn", "popcorn": "popcorn",
    "bread": "bread", "bacon": "bacon", "honey": "honey", "sushi": "sushi",
    "lightning": "lightning", "soccer": "soccer", "tennis": "tennis",
}  # fmt: skip


def with_article(name: str) -> str:
    """`"a cat"`, `"an apple"`, `"a unicorn"`, `"an hourglass"`: by sound, not by letter."""
    opens = name[0] in "aeiou" and not name.startswith(("uni", "eu"))
    return f"{'an' if opens or name.startswith('hour') else 'a'} {name}"


def plural(name: str) -> str:
    """The plural of a name, by its last word: `"red circles"`, `"mice"`, `"cherries"`."""
    head, space, last = name.rpartition(" ")
    if last in _IRREGULAR:
        many = _IRREGULAR[last]
    elif last.endswith("y") and last[-2] not in "aeiou":
        many = last[:-1] + "ies"
    elif last.endswith(("s", "x", "z", "ch", "sh")):
        many = last + "es"
    else:
        many = last + "s"
    return head + space + many


def counted(name: str, n: int) -> str:
    """`"a cat"`, `"two cats"`, for n from 1 to 9."""
    return with_article(name) if n == 1 else f"{COUNT_WORDS[n]} {plural(name)}"


def place_name(grid: Grid, cell: Cell) -> str:
    """`"the top left"` on a 3x3 grid, `"row 2, column 3"` elsewhere."""
    return ("the " if grid.n == 3 else "") + cell_name(grid, cell)


def listed(parts: Sequence[str]) -> str:
    """`"a, b and c"`."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


Side = Literal["left of", "right of", "above", "below"]


@dataclass(frozen=True, slots=True)
class Relation:
    """`first` is on that `side` of `second`; each names exactly one object."""

    first: str
    side: Side
    second: str

    def holds(self, scene: Scene) -> bool:
        where = {o.name: o.cell for o in scene.objects}
        if self.first not in where or self.second not in where:
            return False
        (row, column), (other_row, other_column) = where[self.first], where[self.second]
        return {
            "left of": column < other_column,
            "right of": column > other_column,
            "above": row < other_row,
            "below": row > other_row,
        }[self.side]


@dataclass(frozen=True, slots=True)
class Demand:
    """What a text asks of a picture; a field that is None asks nothing.

    `objects`: exactly these in these cells. `names`: exactly these, sorted, repeats kept, anywhere.
    """

    objects: tuple[Placed, ...] | None = None
    names: tuple[str, ...] | None = None
    relation: Relation | None = None
    background: str | None = None

    def met_by(self, scene: Scene) -> bool:
        return (
            (self.objects is None or scene.objects == self.objects)
            and (self.names is None or tuple(sorted(scene.names())) == self.names)
            and (self.relation is None or self.relation.holds(scene))
            and (self.background is None or scene.background == self.background)
        )


@dataclass(frozen=True, slots=True)
class Caption:
    """A scene in words: `text` stands alone, `phrase` follows "Draw "; both demand the same."""

    text: str
    phrase: str
    demand: Demand
    grammar: str


@dataclass(frozen=True, slots=True)
class Grammar:
    """One way to write a scene. `exact`: it says every object's cell. `held_out`: never trained."""

    name: str
    held_out: bool
    exact: bool
    weight: float
    words: Callable[[Scene, Grid, Random], tuple[str, str, Demand] | None]

    def write(self, scene: Scene, grid: Grid, rng: Random) -> Caption | None:
        """The caption, or None where this grammar cannot say the scene."""
        written = self.words(scene, grid, rng) if scene.objects else None
        return Caption(*written, self.name) if written else None


def _mention(scene: Scene, rng: Random) -> tuple[str, str | None]:
    """A background's mention and demand, half of the time; both empty otherwise."""
    if rng.random() < 0.5:
        return "", None
    return rng.choice((", on ", " on ")) + scene.background, scene.background


def _order(scene: Scene, rng: Random) -> list[Placed]:
    """Raster order half of the time, any order otherwise."""
    keep = rng.random() < 0.5
    return list(scene.objects) if keep else rng.sample(scene.objects, len(scene.objects))


def _item(grid: Grid, placed: Placed) -> str:
    return f"{with_article(placed.name)} at {place_name(grid, placed.cell)}"


def _list(scene: Scene, grid: Grid, rng: Random) -> tuple[str, str, Demand]:
    mention, background = _mention(scene, rng)
    text = f"{listed([_item(grid, o) for o in _order(scene, rng)])}{mention}."
    return capitalised(text), text, Demand(objects=scene.objects, background=background)


def _labels(scene: Scene, grid: Grid, rng: Random) -> tuple[str, str, Demand]:
    parts = [f"{capitalised(cell_name(grid, o.cell))}: {o.name}." for o in _order(scene, rng)]
    background = scene.background if rng.random() < 0.5 else None
    text = " ".join([*parts, f"Background: {background}."] if background else parts)
    return text, f"this. {text}", Demand(objects=scene.objects, background=background)


def _relation(scene: Scene, grid: Grid, rng: Random) -> tuple[str, str, Demand] | None:
    if len(scene.objects) != 2 or scene.objects[0].name == scene.objects[1].name:
        return None
    one, two = scene.objects  # in raster order: one is left of two, or above it
    if one.cell[0] != two.cell[0] and one.cell[1] != two.cell[1]:
        return None
    side, converse = _SIDES[one.cell[0] == two.cell[0]]
    if rng.random() < 0.5:
        one, two, side = two, one, converse
    relation = Relation(one.name, side, two.name)
    mention, background = _mention(scene, rng)
    return (
        f"The {one.name} is {side} the {two.name}{mention}.",
        f"{with_article(one.name)} {side} {with_article(two.name)}{mention}.",
        Demand(names=tuple(sorted(scene.names())), relation=relation, background=background),
    )


_SIDES: dict[bool, tuple[Side, Side]] = {
    True: ("left of", "right of"),
    False: ("above", "below"),
}  # keyed by "in one row"


def _counts(scene: Scene, grid: Grid, rng: Random) -> tuple[str, str, Demand]:
    mention, background = _mention(scene, rng)
    text = f"{listed([counted(n, k) for n, k in Counter(scene.names()).items()])}{mention}."
    demand = Demand(names=tuple(sorted(scene.names())), background=background)
    return capitalised(text), text, demand


def _title(scene: Scene, grid: Grid, rng: Random) -> tuple[str, str, Demand] | None:
    if len(set(scene.names())) != len(scene.objects):
        return None
    text = listed(scene.names())
    return capitalised(text), text, Demand(names=tuple(sorted(scene.names())))


def _seen(scene: Scene, grid: Grid, rng: Random) -> tuple[str, str, Demand]:
    def where(cell: Cell) -> str:
        in_corner = grid.n == 3 and cell[0] != 1 != cell[1]
        name = place_name(grid, cell)
        return f"in {name} corner" if in_corner else f"at {name}"

    items = [f"{with_article(o.name)} {where(o.cell)}" for o in scene.objects]
    text = "; there is also ".join(items) + "."
    return f"You can see {text}", text, Demand(objects=scene.objects)


def _place_first(scene: Scene, grid: Grid, rng: Random) -> tuple[str, str, Demand]:
    items = [f"at {place_name(grid, o.cell)} {with_article(o.name)}" for o in scene.objects]
    text = capitalised(", ".join(items)) + "."
    return text, f"this. {text}", Demand(objects=scene.objects)


GRAMMARS: tuple[Grammar, ...] = (
    Grammar("list", held_out=False, exact=True, weight=0.5, words=_list),
    Grammar("labels", held_out=False, exact=True, weight=0.15, words=_labels),
    Grammar("relation", held_out=False, exact=False, weight=0.2, words=_relation),
    Grammar("counts", held_out=False, exact=False, weight=0.2, words=_counts),
    Grammar("title", held_out=False, exact=False, weight=0.1, words=_title),
    Grammar("seen", held_out=True, exact=True, weight=0.5, words=_seen),
    Grammar("place_first", held_out=True, exact=True, weight=0.5, words=_place_first),
)


def caption(scene: Scene, grid: Grid, rng: Random, grammars: Iterable[Grammar]) -> Caption:
    """`scene` in one of `grammars`, by weight. ValueError if none of them can say it."""
    able = [(g.weight, c) for g in grammars if (c := g.write(scene, grid, rng)) is not None]
    if not able:
        raise ValueError(f"no grammar can say {scene}")
    return rng.choices([c for _, c in able], [w for w, _ in able])[0]


def composed(scene: Scene, demand: Demand, grid: Grid) -> Scene:
    """The scene as a careful hand would draw it from the words alone.

    Where they leave the places open, objects stand in the order of the words, evenly along the
    middle row; along the middle column where one is above the other. Scenes that `demand` settles,
    or with more objects than a row has cells, come back as they are.
    """
    names = tuple(Counter(scene.names()).elements())
    if demand.objects is not None or len(names) > grid.n:
        return scene
    middle, last, steps = (grid.n - 1) // 2, grid.n - 1, len(names) - 1
    along = [round(i * last / steps) for i in range(steps + 1)] if steps else [middle]
    upright = demand.relation is not None and demand.relation.side in ("above", "below")
    cells = [(i, middle) if upright else (middle, i) for i in along]
    return Scene(scene.background, map(Placed, cells, names))


def request(caption: Caption, rng: Random, held_out: bool = False) -> str:
    """A user's wish for the picture: "Draw a cat at the top left."""
    return rng.choice(HELD_OUT_PREFIXES if held_out else PREFIXES) + caption.phrase


def describe(scene: Scene, grid: Grid) -> str:
    """The one canonical caption: objects in raster order, then the background."""
    items = listed([_item(grid, o) for o in scene.objects]) if scene.objects else "nothing"
    return capitalised(f"{items}, on {scene.background}.")


def inventory(scene: Scene, grid: Grid, names: tuple[str, ...], rng: Random) -> str:
    """All there is, in any order: each cell with its object, or each object with its cells.

    Up to two empty cells ("nothing"), or `names` that are not there ("nowhere"), are among them.
    The order tells nothing, so each entry is a question about the picture and its answer; and the
    answer follows at once: with a word between, names did not bind to codes (docs/LOG.md).
    """
    if rng.random() < 0.35:
        taken = [o.cell for o in scene.objects]
        empty = [c for c in grid.cells if c not in taken]
        cells = taken + rng.sample(empty, min(len(empty), rng.randint(0, 2) if taken else 2))
        rng.shuffle(cells)
        return _listing(f"{cell_name(grid, c)} {scene.at(c) or 'nothing'}" for c in cells)
    places: dict[str, str] = {}
    for placed in scene.objects:
        cell = cell_name(grid, placed.cell)
        places[placed.name] = f"{places[placed.name]}, {cell}" if placed.name in places else cell
    absent = dict.fromkeys(rng.sample(names, rng.randint(0, 2)), "nowhere")
    entries = list((absent | places).items())
    rng.shuffle(entries)
    return _listing(f"{name} {cells}" for name, cells in entries or [("nothing", "nowhere")])


def _listing(entries: Iterable[str]) -> str:
    return capitalised("; ".join(entries)) + "."


def parse_caption(text: str, grid: Grid, names: tuple[str, ...]) -> Scene | None:
    """The scene of a canonical caption (objects in any order), or None if it is not one.

    None also where a name is not in `names`, a cell does not exist, or two objects share a cell.
    """
    item, whole = _patterns(grid, names)
    match = whole.fullmatch(text[:1].lower() + text[1:])
    if match is None:
        return None
    found = item.findall(match["items"])
    placed = [Placed(cell_from_name(grid, cell), name.split(" ", 1)[1]) for name, cell in found]
    one_a_cell = len({o.cell for o in placed}) == len(placed)
    return Scene(match["background"], placed) if one_a_cell else None


def one_of(words: Iterable[str]) -> str:
    """A regular expression for any of `words`, the longest that fits."""
    return "|".join(re.escape(w) for w in sorted(words, key=len, reverse=True))


@lru_cache(maxsize=8)
def _patterns(grid: Grid, names: tuple[str, ...]) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """One object with its place; a whole canonical caption with its first letter in lower case."""
    the = "the " if grid.n == 3 else ""
    cells = one_of(cell_name(grid, c) for c in grid.cells)
    item = rf"({one_of(with_article(n) for n in names)}) at {the}({cells})"
    plain = item.replace("(", "(?:")
    items = rf"nothing|{plain}|{plain}(?:, {plain})* and {plain}"
    return re.compile(item), re.compile(rf"(?P<items>{items}), on (?P<background>[a-z ]+)\.")
