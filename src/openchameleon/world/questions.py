"""Questions about a scene with answers of a word or two, balanced so that no guess pays.

The best constant answer stays under 55%, overall and within each kind.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from random import Random

from openchameleon.world.captions import COUNT_WORDS, place_name, plural, with_article
from openchameleon.world.scene import Grid, Scene, cell_name

EMPTY_SHARE = 0.15
"""How often "what is at" asks for an empty cell and "where is" for an absent object."""


@dataclass(frozen=True, slots=True)
class Question:
    """`answer` is what a model must write, exactly: "cat", "top left", "two", "yes", "sky".

    Two questions of one `kind` and `subject` ask the same in other words.
    """

    kind: str
    text: str
    answer: str
    subject: str


@dataclass(frozen=True, slots=True)
class _Look:
    """What a question is made from: the scene and the world it lies in."""

    scene: Scene
    grid: Grid
    names: tuple[str, ...]
    rng: Random

    def absent(self) -> str:
        """A name that is not in the scene."""
        there = set(self.scene.names())
        while (name := self.rng.choice(self.names)) in there:
            pass
        return name


def _what(look: _Look) -> tuple[str, str]:
    empty = [c for c in look.grid.cells if look.scene.at(c) is None]
    taken = [o.cell for o in look.scene.objects]
    if not taken or (empty and look.rng.random() < EMPTY_SHARE):
        cell = look.rng.choice(empty)
    else:
        cell = look.rng.choice(taken)
    return place_name(look.grid, cell), look.scene.at(cell) or "nothing"


def _where(look: _Look) -> tuple[str, str]:
    counts = Counter(look.scene.names())
    single = [o for o in look.scene.objects if counts[o.name] == 1]
    if not single or look.rng.random() < EMPTY_SHARE:
        return look.absent(), "nowhere"
    placed = look.rng.choice(single)
    return placed.name, cell_name(look.grid, placed.cell)


def _how_many(look: _Look) -> tuple[str, str]:
    counts = Counter(look.scene.names())
    if look.rng.random() < 0.5:
        return "objects", COUNT_WORDS[len(look.scene.objects)]
    repeated = [name for name, n in counts.items() if n > 1]
    if repeated and look.rng.random() < 0.7:
        name = look.rng.choice(repeated)
    elif counts and look.rng.random() < 0.55:
        name = look.rng.choice(sorted(counts))
    else:
        name = look.absent()
    return plural(name), COUNT_WORDS[counts[name]]


def _is_there(look: _Look) -> tuple[str, str]:
    if look.scene.objects and look.rng.random() < 0.5:
        return with_article(look.rng.choice(look.scene.names())), "yes"
    return with_article(look.absent()), "no"


def _background(look: _Look) -> tuple[str, str]:
    return "", look.scene.background


@dataclass(frozen=True, slots=True)
class Kind:
    """How one kind of question is made, and the texts its subject is put into."""

    subject_and_answer: Callable[[_Look], tuple[str, str]]
    texts: tuple[str, ...]
    held_out_texts: tuple[str, ...]


KINDS: dict[str, Kind] = {
    "what": Kind(
        _what,
        ("What is at {}?", "What do you see at {}?", "Which object is at {}?"),
        ("Can you tell me what is at {}?",),
    ),
    "where": Kind(
        _where,
        ("Where is the {}?", "Where do you see the {}?", "Find the {}."),
        ("At which place is the {}?",),
    ),
    "how_many": Kind(
        _how_many,
        ("How many {} are there?", "How many {} do you see?", "Count the {}."),
        ("What is the number of {}?",),
    ),
    "is_there": Kind(
        _is_there,
        ("Is there {}?", "Do you see {}?", "Can you see {}?"),
        ("Does the picture show {}?",),
    ),
    "background": Kind(
        _background,
        ("Which background is it?", "What is the background?", "Which background do you see?"),
        ("Tell me the background.",),
    ),
}


NAMING = ("where", "where", "how_many", "how_many", "is_there")
"""The kinds of question that name what is to be found, the harder ones twice."""


def ask(
    scene: Scene,
    grid: Grid,
    names: tuple[str, ...],
    backgrounds: tuple[str, ...],
    rng: Random,
    held_out: bool = False,
    kinds: Iterable[str] = tuple(KINDS),
) -> Question:
    """A question about `scene` (at most 9 objects), each of `kinds` as likely as it stands there.

    `names` is the vocabulary absent objects come from; `held_out` takes phrasings never trained. A
    world of one background is not asked for it.
    """
    kind = rng.choice([k for k in kinds if k != "background" or len(backgrounds) > 1])
    subject, answer = KINDS[kind].subject_and_answer(_Look(scene, grid, names, rng))
    texts = KINDS[kind].held_out_texts if held_out else KINDS[kind].texts
    return Question(kind, rng.choice(texts).format(subject), answer, subject)
