"""Tasks: a numbered scene turned into a document or a conversation, with what would be right.

Each task is one function from a `Job` (which sample, in which world, with what randomness) to a
`Sample`. Knows nothing of mixtures or files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from random import Random

import PIL.Image

from openchameleon.document import (
    Conversation,
    Document,
    Image,
    Message,
    Record,
    Segment,
    Text,
)
from openchameleon.world import splits
from openchameleon.world.atlas import WorldPreset
from openchameleon.world.captions import (
    GRAMMARS,
    Caption,
    Demand,
    caption,
    composed,
    describe,
    inventory,
    listed,
    place_name,
    request,
    with_article,
)
from openchameleon.world.foreign import render_foreign
from openchameleon.world.programs import program
from openchameleon.world.questions import KINDS, NAMING, ask
from openchameleon.world.render import render
from openchameleon.world.scene import Placed, Scene
from openchameleon.world.stories import Story, change, write_story
from openchameleon.world.talk import FORBIDDEN, REFUSAL, counting, noise, talk

NOISE_SHARE = 0.05
COMPOSED_SHARE = 0.75
"""Of the trained pictures whose places the words leave open, those that are composed.

Were all of them anywhere, the likeliest next code would nearly always be the background's: a model
that takes the likeliest leaves everything to the last row, where there is no room for it.
"""
DESCRIBE = ("Describe the picture.", "What do you see?", "Describe this.")
HELD_OUT_DESCRIBE = ("Tell me what is in the picture.",)
PROGRAM_OF = "Write the program."
RUN = "Run:\n"


@dataclass(frozen=True, slots=True)
class Meta:
    """What a sample is, and what is right: for its last picture and its last answer in text.

    `kind` is a grammar's, question's or talk's name. `scenes` has one scene a picture, in order.
    """

    task: str
    split: str
    index: int
    kind: str
    scenes: tuple[Scene, ...] = ()
    demand: Demand | None = None
    answer: str | None = None
    foreign: bool = False


@dataclass(frozen=True, slots=True)
class Sample:
    record: Record
    meta: Meta


@dataclass(frozen=True, slots=True)
class Job:
    """One sample to be written: which, in which world, with what randomness."""

    task: str
    split: str
    index: int
    preset: WorldPreset
    rng: Random
    max_objects: int
    foreign: bool
    with_pixels: bool

    def scene(self, at_least: int = 0) -> Scene:
        """The scene of this number; `at_least` raises the largest number of objects."""
        largest = max(self.max_objects, at_least)
        return splits.scene(self.split, self.index, self.preset, largest)

    def allowed(self, scene: Scene) -> bool:
        """May a story or a dialog come through this scene?"""
        if self.split == "train":
            return splits.trainable(scene)
        return not splits.held_out_kinds(scene)

    def drawn(self, scene: Scene) -> Image:
        """The picture a model should draw: never foreign."""
        return Image(render(scene, self.preset) if self.with_pixels else _BLANK)

    def shown(self, scene: Scene) -> Image:
        """A picture to be read: drawn by other means where the sample is foreign."""
        if self.foreign and self.with_pixels:
            hand = Random(f"{self.task}/{self.split}/{self.index}")  # no pixel may change a word
            return Image(render_foreign(scene, self.preset, hand))
        return self.drawn(scene)

    def typed(self, text: str) -> str:
        """A user's words: in training, one time in twenty, not as carefully typed as ours."""
        careless = self.split == "train" and self.rng.random() < NOISE_SHARE
        return noise(text, self.rng) if careless else text

    def meta(
        self,
        kind: str,
        scenes: Iterable[Scene] = (),
        demand: Demand | None = None,
        answer: str | None = None,
    ) -> Meta:
        where = (self.task, self.split, self.index, kind)
        return Meta(*where, tuple(scenes), demand, answer, self.foreign)


_BLANK = PIL.Image.new("RGB", (1, 1))


def _exchange(*turns: str | Segment | Iterable[str | Segment]) -> Conversation:
    """A conversation of turns from the user's first; a turn is one segment or several."""
    documents = (Document([t] if isinstance(t, (str, Text, Image)) else t) for t in turns)
    roles = ("user", "assistant")
    return Conversation(Message(roles[i % 2], d) for i, d in enumerate(documents))  # type: ignore[arg-type]


def _either_order(job: Job, picture: Image, text: str) -> list[str | Segment]:
    return [picture, text] if job.rng.random() < 0.5 else [text, picture]


def _caption(job: Job, scene: Scene, held_out: bool = False) -> Caption:
    """A caption in a grammar that fits the split: one that says what the split is about."""
    able = [g for g in GRAMMARS if g.held_out == held_out]
    if job.split == "unseen_cells":
        able = [g for g in able if g.exact]
    elif job.split == "unseen_counts":
        able = [g for g in able if g.name == "counts"]
    return caption(scene, job.preset.grid, job.rng, able)


def _captioned(job: Job, held_out: bool = False) -> tuple[Caption, Scene]:
    """A caption and the scene to be drawn for it."""
    scene = job.scene()
    said = _caption(job, scene, held_out)
    if job.split == "train" and job.rng.random() < COMPOSED_SHARE:
        better = composed(scene, said.demand, job.preset.grid)
        scene = better if job.allowed(better) else scene
    return said, scene


def _exactly(scene: Scene) -> Demand:
    return Demand(objects=scene.objects, background=scene.background)


def _draw(job: Job) -> Sample:
    novelty = job.rng.choice(("grammar", "grammar", "prefix", "noise"))
    if job.split != "unseen_phrasings":
        novelty = "none"
    said, scene = _captioned(job, held_out=novelty == "grammar")
    text = request(said, job.rng, held_out=novelty == "prefix")
    text = noise(text, job.rng) if novelty == "noise" else job.typed(text)
    record = _exchange(text, job.drawn(scene))
    return Sample(record, job.meta(said.grammar, [scene], said.demand))


def _draw_pair(job: Job) -> Sample:
    said, scene = _captioned(job, held_out=job.split == "unseen_phrasings")
    record = Document(_either_order(job, job.drawn(scene), said.text))
    return Sample(record, job.meta(said.grammar, [scene], said.demand))


def _read_caption(job: Job) -> Sample:
    scene = job.scene()
    ask_for = HELD_OUT_DESCRIBE if job.split == "unseen_phrasings" else DESCRIBE
    answer = describe(scene, job.preset.grid)
    asked = _either_order(job, job.shown(scene), job.typed(job.rng.choice(ask_for)))
    return Sample(_exchange(asked, answer), job.meta("describe", [scene], answer=answer))


def _inventory(job: Job) -> Sample:
    """A picture, then all there is in it: the densest way to learn names with their places."""
    scene = job.scene(at_least=6)
    text = inventory(scene, job.preset.grid, job.preset.emoji, job.rng)
    return Sample(Document([job.shown(scene), text]), job.meta("inventory", [scene]))


def _question(job: Job) -> Sample:
    """A picture and a question; in training one to four questions, which share its cost."""
    return _asked(job, job.scene(), job.rng.randint(1, 4) if job.split == "train" else 1)


def _quiz(job: Job) -> Sample:
    """A picture and five to eight questions, one after the other."""
    return _asked(job, job.scene(), job.rng.randint(5, 8))


def _drill(job: Job) -> Sample:
    """A fuller picture and questions that name what is to be found in it, as many as it can bear.

    To find one of many by its name is hard to guess. In half of them names come back, for counting.
    """
    scene = job.scene(at_least=8)
    if job.rng.random() < 0.5:
        scene = _with_repeats(job, scene)
    n_names = len(set(scene.names()))  # more questions would be of what is not there
    return _asked(job, scene, 2 * n_names + job.rng.randint(1, 3), NAMING)


def _with_repeats(job: Job, scene: Scene) -> Scene:
    """The scene with up to four of its names, each any number of times, where that is allowed."""
    for _ in range(20):
        names = job.rng.sample(scene.names(), min(len(scene.objects), job.rng.randint(2, 4)))
        objects = [Placed(o.cell, job.rng.choice(names)) for o in scene.objects]
        if job.allowed(repeated := Scene(scene.background, objects)):
            return repeated
    return scene


def _asked(job: Job, scene: Scene, n_questions: int, kinds: Iterable[str] = tuple(KINDS)) -> Sample:
    """A picture with its questions as turns; the first stands before or after the picture.

    No two ask the same.
    """
    world = job.preset
    held_out = job.split == "unseen_phrasings"
    turns: list[str | Iterable[str | Segment]] = []
    known: set[tuple[str, str]] = set()
    while len(turns) < 2 * n_questions:
        question = ask(scene, world.grid, world.emoji, world.backgrounds, job.rng, held_out, kinds)
        if (question.kind, question.subject) in known:
            continue
        known.add((question.kind, question.subject))
        text = job.typed(question.text)
        asked = text if turns else _either_order(job, job.shown(scene), text)
        turns += [asked, question.answer]
    meta = job.meta(question.kind, [scene], answer=question.answer)
    return Sample(_exchange(*turns), meta)


def _told(job: Job) -> Story:
    n_pictures = job.rng.choice((4, 5) if job.split == "longer_stories" else (2, 3))
    world = job.preset
    names, backgrounds = world.emoji, world.backgrounds
    return write_story(world.grid, names, backgrounds, job.rng, n_pictures, job.allowed)


def _pages(job: Job, story: Story) -> list[str | Segment]:
    """Sentence, picture, sentence, picture ..."""
    return [part for text, scene in story.steps for part in (text, job.drawn(scene))]


def _story(job: Job) -> Sample:
    story = _told(job)
    pages = _pages(job, story)
    answer = story.answer if job.rng.random() < 0.5 else None
    if answer is not None:
        pages.append(f"{story.question} {answer}")
    return Sample(Document(pages), job.meta("story", [s for _, s in story.steps], answer=answer))


def _story_turn(job: Job) -> Sample:
    story = _told(job)
    first_text, first = story.steps[0]
    pages = _pages(job, story)
    form = job.rng.choice(("about", "about", "begun", "begun", "free"))
    if form == "about":
        wish = f"Tell a story about {listed([with_article(n) for n in first.names()])}."
    elif form == "begun":
        wish, pages = f"Tell a story: {first_text}", pages[1:]
    else:
        wish = "Tell a story."
    turns: list[str | Iterable[str | Segment]] = [job.typed(wish), pages]
    answer = story.answer if job.rng.random() < 0.5 else None
    if answer is not None:
        turns += [job.typed(story.question), answer]
    meta = job.meta(form, [s for _, s in story.steps], answer=answer)
    return Sample(_exchange(*turns), meta)


def _program_draw(job: Job) -> Sample:
    scene = job.scene()
    record = _exchange(RUN + program(scene, job.preset.grid), job.drawn(scene))
    return Sample(record, job.meta("program", [scene], _exactly(scene)))


def _program_read(job: Job) -> Sample:
    scene = job.scene()
    answer = program(scene, job.preset.grid)
    asked = _either_order(job, job.shown(scene), job.typed(PROGRAM_OF))
    return Sample(_exchange(asked, answer), job.meta("program", [scene], answer=answer))


def _text(job: Job) -> Sample:
    """Text alone: the same stories, captions with their programs, counting."""
    kind = job.rng.choice(("story", "program", "counting"))
    if kind == "story":
        story = _told(job)
        text = " ".join([*(t for t, _ in story.steps), story.question, story.answer])
    elif kind == "program":
        scene = job.scene()
        text = f"{describe(scene, job.preset.grid)}\n{program(scene, job.preset.grid)}"
    else:
        exchange = counting(job.preset, job.rng)
        text = f"{exchange.request} {exchange.answer}"
    return Sample(Document([text]), job.meta(kind))


def _talk(job: Job) -> Sample:
    said = talk(job.preset, job.rng, held_out=job.split != "train")
    text = said.request if said.request.startswith(RUN) else job.typed(said.request)
    return Sample(_exchange(text, said.answer), job.meta(said.kind, answer=said.answer))


def _unconditional(job: Job) -> Sample:
    scene = job.scene()
    return Sample(Document([job.drawn(scene)]), job.meta("picture", [scene]))


def _dialog(job: Job) -> Sample:
    """A picture is drawn; then it is asked about, described, or changed, two or three times.

    Its demand or its answer is that of the last turn.
    """
    world, (said, scene) = job.preset, _captioned(job)
    turns: list[str | Segment] = [job.typed(request(said, job.rng)), job.drawn(scene)]
    scenes = [scene]
    for _ in range(job.rng.choice((2, 3))):
        answer: str | None = None
        kind = job.rng.choices(("question", "describe", "change", "forbidden"), (8, 4, 4, 1))[0]
        changed = _changed(job, scene) if kind == "change" else None
        if changed is not None:
            text, scene = changed
            scenes.append(scene)
        elif kind == "forbidden":
            where = place_name(world.grid, job.rng.choice(world.grid.cells))
            them = "it" if len(scene.objects) == 1 else "them"
            text, answer = f"A {FORBIDDEN} joins {them} at {where}.", REFUSAL
        elif kind == "describe":
            text, answer = job.rng.choice(DESCRIBE), describe(scene, world.grid)
        else:
            question = ask(scene, world.grid, world.emoji, world.backgrounds, job.rng)
            text, answer = question.text, question.answer
        turns += [job.typed(text), job.drawn(scene) if answer is None else answer]
    demand = _exactly(scene) if answer is None else None
    return Sample(_exchange(*turns), job.meta("dialog", scenes, demand, answer))


def _changes(job: Job) -> Sample:
    """A fuller picture and what happens in it, one to three changes to a picture.

    Stories are told of few, one change at a time: what a name has to do with what is gone from the
    next picture shows there too seldom to be learned.
    """
    scene = job.scene(at_least=8)
    scenes: list[Scene] = [scene]
    parts: list[str | Segment] = [job.drawn(scene)]
    for _ in range(4):
        said: list[str] = []
        for _ in range(job.rng.choice((1, 2, 3))):
            if (changed := _changed(job, scene)) is not None:
                text, scene = changed
                said.append(text)
        if not said:
            break
        scenes.append(scene)
        parts += [" ".join(said), job.drawn(scene)]
    return Sample(Document(parts), job.meta("changes", scenes))


def _changed(job: Job, scene: Scene) -> tuple[str, Scene] | None:
    newcomers = tuple(n for n in job.preset.emoji if n not in scene.names())
    return change(scene, job.preset.grid, newcomers, job.rng, job.allowed)


TASKS: dict[str, Callable[[Job], Sample]] = {
    "draw": _draw,
    "draw_pair": _draw_pair,
    "unconditional": _unconditional,
    "caption": _read_caption,
    "inventory": _inventory,
    "question": _question,
    "quiz": _quiz,
    "drill": _drill,
    "story": _story,
    "story_turn": _story_turn,
    "program_draw": _program_draw,
    "program_read": _program_read,
    "text": _text,
    "talk": _talk,
    "dialog": _dialog,
    "changes": _changes,
}
"""Every task by name."""

READING = frozenset({"caption", "inventory", "question", "quiz", "drill", "program_read"})
"""The tasks whose pictures are the user's, so that they may be foreign."""
