"""Talk without pictures: greetings, counting, and plain answers to what the world cannot do.

Words from outside the world, wishes for other work, and the one forbidden emoji each have a fixed
answer, so that whether a model gives it can be scored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from random import Random

from openchameleon.world.atlas import WorldPreset, load_atlas
from openchameleon.world.captions import (
    COUNT_WORDS,
    GRAMMARS,
    capitalised,
    caption,
    request,
    with_article,
)
from openchameleon.world.programs import program
from openchameleon.world.scene import Placed, Scene
from openchameleon.world.splits import share
from openchameleon.world.stories import opening

FORBIDDEN = "skull"
"""Never drawn, however it is asked for; no atlas holds it."""

REFUSAL = "I will not draw that."
UNKNOWN_WORD = "Sorry, I do not know that word."
ABILITIES = "I can draw, read and tell stories about pictures."

GREETINGS: dict[str, tuple[str, ...]] = {
    "Hello! What shall I draw?": ("hello", "hi", "hey", "hello there", "good morning", "good day"),
    "I am a small model that reads and draws pictures.": ("who are you", "what are you"),
    ABILITIES: ("what can you do", "help", "how do you work"),
    "I am well, thank you.": ("how are you", "are you well"),
    "You are welcome.": ("thank you", "thanks", "thank you very much"),
    "Goodbye!": ("bye", "goodbye", "see you", "good night"),
}

OTHER_WORK: tuple[str, ...] = (
    "sing a song", "sing for me", "tell me a joke", "tell a joke", "write a poem", "write a letter",
    "play chess", "play a game", "what time is it", "what is the weather", "translate this",
    "write an email", "open the door", "call my mother", "buy some milk", "what day is it",
    "how old are you", "cook dinner", "book a flight", "who won the game", "read the news",
    "play some music", "dance with me", "do my homework", "explain gravity", "what is love",
    "who is the king", "where do you live", "make me laugh", "clean my room", "add two and two",
    "spell my name", "write a book", "guess my age", "what should I eat", "wake me up",
)  # fmt: skip

_OUTSIDE = """
dragon wizard knight queen king princess pirate mermaid fairy giant dwarf troll elf goblin vampire
zombie angel devil monster witch nurse doctor teacher farmer soldier sailor singer dancer painter
baby boy girl man woman uncle sister brother grandmother kangaroo koala lobster walrus otter
beaver moose badger weasel ferret hyena jaguar cheetah leopard gazelle antelope buffalo donkey
mule ostrich pelican seagull sparrow pigeon crow raven swallow woodpecker vulture salmon trout
tuna eel jellyfish starfish seahorse worm beetle mosquito wasp moth cricket grasshopper dragonfly
table chair sofa desk lamp carpet curtain mirror shelf drawer cupboard pillow blanket spoon fork
knife plate bowl cup mug kettle oven fridge toaster window roof wall floor chimney stairs fence
gate garden bridge road street river lake ocean beach island valley desert forest jungle cave
swamp cliff hill waterfall rain snow wind fog storm cloud thunder planet comet galaxy rocket ship
submarine canoe raft wagon sled carriage tram subway engine hammer nail saw drill wrench shovel
rake bucket rope broom brush needle thread button zipper belt sock glove coat jacket sweater skirt
trousers ring necklace bracelet wallet purse suitcase basket bottle jar candle match ball puppet
doll toy puzzle chess flag statue painting letter stamp envelope newspaper scissors ruler eraser
paper chalk trumpet flute harp cello trombone banjo soup rice pasta noodle salad sandwich sausage
steak yogurt butter salt sugar tea milk juice water garlic spinach lettuce celery radish turnip
pea bean walnut almond plum fig lime raspberry apricot blueberry moss fern grass bush ivy bamboo
oak willow sidewalk computer radio laptop printer battery cable satellite museum library hospital
airport stadium prison palace temple pyramid lighthouse windmill barn farm shop market office
elbow knee shoulder finger
"""
OUTSIDE_WORDS = tuple(_OUTSIDE.split())
"""Nouns a person may ask for; those that a world does know are left out there."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """What a user says, and the answer a model must give, exactly."""

    kind: str
    request: str
    answer: str


@cache
def outside_words(preset: WorldPreset, held_out: bool = False) -> tuple[str, ...]:
    """Words the preset does not know: trained ones, or the fifth that is kept for scoring."""
    words = dict.fromkeys((*OUTSIDE_WORDS, *load_atlas().names))
    unknown = (w for w in words if w not in preset.emoji and w != FORBIDDEN)
    return tuple(w for w in unknown if (share(f"outside/{w}") < 0.2) == held_out)


def made_up_word(rng: Random) -> str:
    """A word of two or three open syllables and a closing consonant, such as "mirudok"."""
    syllables = (
        rng.choice("bdfgklmnprtvz") + rng.choice("aeiou") for _ in range(rng.choice((2, 3)))
    )
    return "".join(syllables) + rng.choice("kmnprtx")


def outside(preset: WorldPreset, rng: Random, held_out: bool = False) -> Exchange:
    """A wish for something the preset does not know, alone or among things it does."""
    word = rng.choice(outside_words(preset, held_out))
    if rng.random() < 0.3:
        word = made_up_word(rng)
    return Exchange("outside", _wish_for(word, preset, rng), UNKNOWN_WORD)


def forbidden(preset: WorldPreset, rng: Random, held_out: bool = False) -> Exchange:
    """A wish for the forbidden emoji: asked directly, in lists, in stories, in programs."""
    return Exchange("forbidden", _wish_for(FORBIDDEN, preset, rng), REFUSAL)


def greeting(preset: WorldPreset, rng: Random, held_out: bool = False) -> Exchange:
    """A greeting or a question about the model."""
    answer = rng.choice(tuple(GREETINGS))
    return Exchange("greeting", _styled(rng.choice(GREETINGS[answer]), rng), answer)


def other_work(preset: WorldPreset, rng: Random, held_out: bool = False) -> Exchange:
    """A wish for work the model cannot do; a fifth of them is kept for scoring."""
    wishes = [w for w in OTHER_WORK if (share(f"work/{w}") < 0.2) == held_out]
    return Exchange("other_work", _styled(rng.choice(wishes), rng), ABILITIES)


def counting(preset: WorldPreset, rng: Random, held_out: bool = False) -> Exchange:
    """Counting up or down with number words from one to nine."""
    n = rng.randint(2, 9)
    words = list(COUNT_WORDS[1 : n + 1])
    if rng.random() < 0.5:
        text = f"Count to {words[-1]}."
    else:
        text = f"Count down from {words[-1]}."
        words.reverse()
    return Exchange("counting", text, capitalised(", ".join(words)) + ".")


KINDS: dict[str, tuple[float, Callable[[WorldPreset, Random, bool], Exchange]]] = {
    "outside": (0.4, outside),
    "forbidden": (0.2, forbidden),
    "greeting": (0.15, greeting),
    "other_work": (0.15, other_work),
    "counting": (0.1, counting),
}
"""Kinds of talk with their share of it."""


def talk(preset: WorldPreset, rng: Random, held_out: bool = False) -> Exchange:
    """One exchange of any kind.

    `held_out` takes words from outside the world and other work that training never has. Greetings,
    counting and the forbidden are too few to hold any out.
    """
    weights, kinds = zip(*KINDS.values(), strict=True)
    return rng.choices(kinds, weights)[0](preset, rng, held_out)


def noise(text: str, rng: Random) -> str:
    """`text` as carelessly typed: no capitals, no end, or one word with two letters swapped.

    Only letters inside a word of five or more are swapped, so that no name becomes another.
    """
    words = text.split(" ")
    long = [i for i, w in enumerate(words) if len(w) >= 5 and w.isalpha()]
    kind = rng.choice(("lower", "open", "both", "typo"))
    if kind == "typo" and long:
        i = rng.choice(long)
        at = rng.randint(1, len(words[i]) - 3)
        w = words[i]
        words[i] = w[:at] + w[at + 1] + w[at] + w[at + 2 :]
        return " ".join(words)
    text = text if kind == "open" else text.lower()
    return text if kind == "lower" else text.rstrip(".?")


def _wish_for(word: str, preset: WorldPreset, rng: Random) -> str:
    """A request for a picture, a story or a program's run: `word`, or several, or among names."""
    n = rng.choice((1, 1, 2, 3))
    names = [word] * n if rng.random() < 0.2 else [word, *rng.sample(preset.emoji, n - 1)]
    cells = rng.sample(preset.grid.cells, n)
    objects = [Placed(c, name) for c, name in zip(cells, names, strict=True)]
    scene = Scene(rng.choice(preset.backgrounds), objects)
    form = rng.random()
    if form < 0.7:
        trained = (g for g in GRAMMARS if not g.held_out)
        return request(caption(scene, preset.grid, rng, trained), rng)
    if form < 0.8:
        return f"Tell a story about {with_article(word)}."
    if form < 0.9:
        start = Scene(scene.background, objects[:2])
        return f"Tell a story: {opening(start, preset.grid, named=rng.random() < 0.5)}"
    return f"Run:\n{program(scene, preset.grid)}"


def _styled(text: str, rng: Random) -> str:
    """A short saying as people type it: with or without a capital and an end."""
    text = capitalised(text) if rng.random() < 0.5 else text
    asks = text.lower().startswith(("who", "what", "how", "where", "are"))
    return text + rng.choice(("", "?" if asks else "."))
