"""The world's language: whatever it writes is true of its scene, and held-out stays held out."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from pathlib import Path
from random import Random

import PIL.Image
import pytest

from openchameleon.document import Conversation, Document, Text, record_from_json, record_to_json
from openchameleon.errors import UserError
from openchameleon.world import splits
from openchameleon.world.atlas import PRESETS, WorldPreset, load_atlas
from openchameleon.world.captions import (
    GRAMMARS,
    Demand,
    Relation,
    caption,
    composed,
    describe,
    inventory,
    parse_caption,
    plural,
    request,
    with_article,
)
from openchameleon.world.programs import program, run_program
from openchameleon.world.questions import KINDS, ask
from openchameleon.world.render import render
from openchameleon.world.sample import (
    MIXTURE,
    TEXTS_VERSION,
    all_texts,
    sample_records,
    write_record,
    write_samples,
)
from openchameleon.world.scene import Grid, Placed, Scene, cell_from_name, cell_name
from openchameleon.world.splits import SPLITS, held_out_kinds, trainable
from openchameleon.world.stories import continue_text, score_story, write_story
from openchameleon.world.talk import (
    FORBIDDEN,
    REFUSAL,
    UNKNOWN_WORD,
    made_up_word,
    noise,
    outside,
    outside_words,
    talk,
)
from openchameleon.world.tasks import TASKS

NANO, SMALL = PRESETS["nano"], PRESETS["small"]
GRID = NANO.grid


def on_sky(*objects: tuple[str, str]) -> Scene:
    return Scene("sky", (Placed(cell_from_name(GRID, cell), name) for name, cell in objects))


CAT_PIZZA = on_sky(("cat", "top left"), ("pizza", "bottom right"))


def scenes(split: str, n: int, preset=NANO) -> list[Scene]:
    return [splits.scene(split, i, preset) for i in range(n)]


def texts_of(record: Document | Conversation) -> list[str]:
    documents = [record] if isinstance(record, Document) else [m.document for m in record.messages]
    return [s.text for d in documents for s in d if isinstance(s, Text)]


# Captions


def test_canonical_request_and_caption_are_spelt_as_documented() -> None:
    grammar = next(g for g in GRAMMARS if g.name == "list")
    requests = {
        request(caption(CAT_PIZZA, GRID, Random(i), [grammar]), Random(i)) for i in range(99)
    }
    assert "Draw a cat at the top left and a pizza at the bottom right." in requests
    expected = "A cat at the top left and a pizza at the bottom right, on sky."
    assert describe(CAT_PIZZA, GRID) == expected


@pytest.mark.parametrize("name", ["a cat", "an apple", "a unicorn", "an hourglass", "an owl"])
def test_article_follows_the_sound(name: str) -> None:
    assert with_article(name.split(" ", 1)[1]) == name


def test_plurals_are_distinct_from_each_other() -> None:
    names = load_atlas().names
    assert [plural(n) for n in ("red circle", "mouse", "cherry", "bus")] == [
        "red circles",
        "mice",
        "cherries",
        "buses",
    ]
    assert len({plural(n) for n in names}) == len(names)


def test_what_the_words_leave_open_is_composed_in_their_order() -> None:
    def places(scene: Scene, demand: Demand) -> list[tuple[str, str]]:
        made = composed(scene, demand, GRID)
        assert demand.met_by(made)
        return [(o.name, cell_name(GRID, o.cell)) for o in made.objects]

    def named(scene: Scene) -> Demand:
        return Demand(names=tuple(sorted(scene.names())))

    cat = on_sky(("cat", "top left"))
    assert places(cat, named(cat)) == [("cat", "center")]
    assert places(CAT_PIZZA, named(CAT_PIZZA)) == [("cat", "left"), ("pizza", "right")]
    cats = on_sky(("cat", "top"), ("dog", "left"), ("cat", "bottom"))
    row = [("cat", "left"), ("cat", "center"), ("dog", "right")]  # "two cats and a dog"
    assert places(cats, named(cats)) == row
    upright = on_sky(("owl", "left"), ("fox", "bottom left"))
    for relation in (Relation("owl", "above", "fox"), Relation("fox", "below", "owl")):
        demand = Demand(names=("fox", "owl"), relation=relation)
        assert places(upright, demand) == [("owl", "top"), ("fox", "bottom")]
    settled = Demand(objects=CAT_PIZZA.objects)
    assert composed(CAT_PIZZA, settled, GRID) == CAT_PIZZA
    four = on_sky(("cat", "top"), ("dog", "left"), ("owl", "right"), ("fox", "bottom"))
    assert composed(four, named(four), GRID) == four


@pytest.mark.parametrize("preset", [NANO, SMALL], ids=lambda p: p.name)
def test_canonical_caption_reads_back(preset) -> None:
    for scene in [*scenes("train", 200, preset), Scene("white")]:
        text = describe(scene, preset.grid)
        assert parse_caption(text, preset.grid, preset.emoji) == scene


def test_an_inventory_is_true_and_lists_all_objects_in_any_order() -> None:
    forms, orders = set(), set()
    for i, scene in enumerate([*scenes("train", 300, NANO), Scene("white")]):
        text = inventory(scene, GRID, NANO.emoji, Random(i))
        entries = (text[0].lower() + text[1:-1]).split("; ")
        by_cell = {f"{cell_name(GRID, c)} {scene.at(c) or 'nothing'}": c for c in GRID.cells}
        if entries[0] in by_cell:
            forms.add("cells")
            assert set(entries) <= set(by_cell)
            assert {o.cell for o in scene.objects} <= {by_cell[entry] for entry in entries}
            continue
        forms.add("names")
        places: dict[str, list[str]] = {}
        for placed in scene.objects:
            places.setdefault(placed.name, []).append(cell_name(GRID, placed.cell))
        there = [f"{name} {', '.join(cells)}" for name, cells in places.items()]
        others = {f"{name} nowhere" for name in {*NANO.emoji, "nothing"} - set(places)}
        assert set(there) <= set(entries) <= set(there) | others
        orders.add(tuple(entries) == tuple(there))
    assert forms == {"cells", "names"}
    assert orders == {True, False}


def test_changes_follow_from_what_is_said() -> None:
    kinds: Counter[bool] = Counter()
    several = 0
    for i in range(150):
        sample = write_record("changes", "train", i, NANO, with_pixels=False)
        assert isinstance(sample.record, Document)
        scenes = sample.meta.scenes
        texts = [part.text for part in sample.record if isinstance(part, Text)]
        assert len(sample.record.images) == len(scenes) == len(texts) + 1
        for text, before, after in zip(texts, scenes, scenes[1:], strict=False):
            told: Scene | None = before
            for sentence in re.findall(r"[^.]+\.", text):
                told = continue_text(told, sentence.strip(), GRID, NANO.emoji)
                kinds["leaves" in sentence] += 1
            assert told == after
            assert trainable(after)
            several += text.count(".") > 1
    assert kinds[True] > 200
    assert several > 200


@pytest.mark.parametrize(
    "text",
    [
        "",
        "A cat at the top left.",
        "A cat at the top lef, on sky.",
        "A gnu at the top left, on sky.",
        "A owl at the top left, on sky.",
        "A cat at the top left and a dog at the top left, on sky.",
        "A cat at the top left, on sky. And more.",
    ],
)
def test_other_text_is_no_caption(text: str) -> None:
    assert parse_caption(text, GRID, NANO.emoji) is None


def test_caption_reads_objects_in_any_order() -> None:
    text = "A pizza at the bottom right and a cat at the top left, on sky."
    assert parse_caption(text, GRID, NANO.emoji) == CAT_PIZZA


@pytest.mark.parametrize("grammar", GRAMMARS, ids=lambda g: g.name)
def test_every_grammar_demands_its_own_scene_and_notices_another(grammar) -> None:
    written = 0
    for i, scene in enumerate(scenes("train", 300)):
        said = grammar.write(scene, GRID, Random(i))
        if said is None:
            continue
        written += 1
        assert said.demand.met_by(scene)
        missing_one = scene.without(scene.objects[0].cell)
        assert not said.demand.met_by(missing_one)
        free = next(c for c in GRID.cells if scene.at(c) is None)
        moved = missing_one.with_object(scene.objects[0].name, free)
        if grammar.exact:
            assert not said.demand.met_by(moved)
        for placed in scene.objects:
            assert placed.name in said.text.lower() or plural(placed.name) in said.text.lower()
        assert (said.demand.background is not None) == (f" {scene.background}" in said.text[-8:])
    assert written > 20


def test_relation_is_met_by_that_side_alone() -> None:
    demand = Demand(names=("cat", "pizza"), relation=Relation("cat", "left of", "pizza"))
    assert demand.met_by(CAT_PIZZA)
    assert not demand.met_by(on_sky(("pizza", "top left"), ("cat", "bottom right")))
    assert not demand.met_by(on_sky(("cat", "top"), ("pizza", "bottom")))


def test_unnamed_background_is_met_by_any() -> None:
    assert Demand(objects=CAT_PIZZA.objects).met_by(Scene("white", CAT_PIZZA.objects))
    assert not Demand(background="sky").met_by(Scene("white", CAT_PIZZA.objects))


# Questions


def answer_of(question, scene: Scene) -> str:
    """The answer, found anew from the words of the question."""
    text = question.text.rstrip("?.")
    words = ("none", "one", "two", "three")
    if question.kind == "background":
        return scene.background
    if question.kind == "what":
        return scene.at(cell_from_name(GRID, text.split(" at the ")[1])) or "nothing"
    names = sorted(NANO.emoji, key=len, reverse=True)
    if question.kind == "how_many":
        if "objects" in text:
            return words[len(scene.objects)]
        name = next(n for n in names if plural(n) in text)
        return words[scene.names().count(name)]
    name = next(n for n in names if text.endswith(n) or f" {n} " in text)
    if question.kind == "is_there":
        return "yes" if name in scene.names() else "no"
    found = [o.cell for o in scene.objects if o.name == name]
    assert len(found) < 2, "asked where a repeated object is"
    by_cell = {cell_from_name(GRID, w): w for w in ("top left", "top", "top right", "left",
               "center", "right", "bottom left", "bottom", "bottom right")}  # fmt: skip
    return by_cell[found[0]] if found else "nowhere"


@pytest.mark.parametrize("held_out", [False, True])
def test_answers_are_true_of_the_scene(held_out: bool) -> None:
    for i, scene in enumerate(scenes("train", 1000)):
        question = ask(scene, GRID, NANO.emoji, NANO.backgrounds, Random(i), held_out)
        assert question.answer == answer_of(question, scene), question


def test_no_constant_answer_pays() -> None:
    answers: dict[str, Counter[str]] = {}
    for i, scene in enumerate(scenes("train", 6000)):
        question = ask(scene, GRID, NANO.emoji, NANO.backgrounds, Random(i))
        answers.setdefault(question.kind, Counter())[question.answer] += 1
    answers["overall"] = sum(answers.values(), Counter())
    assert len(answers) == 6
    for kind, counts in answers.items():
        assert counts.most_common(1)[0][1] / counts.total() < 0.55, (kind, counts.most_common(3))


def test_one_background_is_not_asked_for() -> None:
    kinds = {ask(CAT_PIZZA, GRID, NANO.emoji, ("sky",), Random(i)).kind for i in range(100)}
    assert "background" not in kinds
    assert len(kinds) == 4


def asked_for(text: str) -> tuple[str, str] | None:
    """A question's kind and subject, or None where it is carelessly typed."""
    for kind, made in KINDS.items():
        for form in made.texts:
            head, _, tail = form.partition("{}")
            if text.startswith(head) and text.endswith(tail):
                return kind, text.removeprefix(head).removesuffix(tail)
    return None


@pytest.mark.parametrize("task", ["question", "quiz", "drill"])
def test_no_two_questions_about_a_picture_ask_the_same(task: str) -> None:
    for i in range(200):
        made = write_record(task, "train", i, NANO, with_pixels=False).record
        assert isinstance(made, Conversation)
        asked = [asked_for(m.document.text) for m in made.messages if m.role == "user"]
        read = [a for a in asked if a is not None]
        assert len(set(read)) == len(read), read


def test_drills_count_names_that_come_back() -> None:
    made = [write_record("drill", "train", i, NANO, with_pixels=False) for i in range(400)]
    repeated = [len(set(names)) < len(names) for s in made for names in [s.meta.scenes[0].names()]]
    assert 0.35 < sum(repeated) / 400 < 0.65


# Stories


def segments_of(story) -> list[str | Scene | None]:
    return [part for step in story.steps for part in step]


def stories(preset, n_pictures: int, n: int = 100):
    world = (preset.grid, preset.emoji, preset.backgrounds)
    return [write_story(*world, Random(i), n_pictures, trainable) for i in range(n)]


@pytest.mark.parametrize("preset", [NANO, SMALL], ids=lambda p: p.name)
@pytest.mark.parametrize("n_pictures", [2, 5])
def test_every_written_story_scores_full(preset, n_pictures: int) -> None:
    for story in stories(preset, n_pictures):
        scored = score_story(segments_of(story), preset.grid, preset.emoji)
        assert scored == [True] * n_pictures
        for _, scene in story.steps:
            assert trainable(scene)
            assert 1 <= len(scene.objects) <= 3
            assert scene.background == story.steps[0][1].background


def test_every_change_of_a_story_picture_is_noticed() -> None:
    for i, story in enumerate(stories(NANO, 3)):
        segments = segments_of(story)
        at = 1 + 2 * (i % 3)
        good = segments[at]
        assert isinstance(good, Scene)
        first = good.objects[0]
        free = next(c for c in GRID.cells if good.at(c) is None)
        for bad in (None, good.without(first.cell), good.with_object("cat", free)):
            scored = score_story([*segments[:at], bad, *segments[at + 1 :]], GRID, NANO.emoji)
            expected = [j != i % 3 for j in range(3)]
            assert scored == expected or (i % 3 == 0 and not scored[0])


def test_a_sentence_that_cannot_be_followed_spoils_the_rest() -> None:
    cat, both = on_sky(("cat", "top")), on_sky(("cat", "top"), ("dog", "right"))
    said: list[str | Scene | None] = ["A cat sits at the top.", cat, "The dog leaves.", cat, cat]
    assert score_story(said, GRID, NANO.emoji) == [True, False, False]
    two_at_once = ["A cat sits at the top. A dog joins it at the right.", both]
    assert score_story(two_at_once, GRID, NANO.emoji) == [True]
    assert score_story([cat], GRID, NANO.emoji) == [False]
    nonsense_at_the_end = ["A cat sits at the top.", cat, "The cat moves to the moon."]
    assert score_story(nonsense_at_the_end, GRID, NANO.emoji) == [False]


@pytest.mark.parametrize(
    ("sentence", "after"),
    [
        ("The pizza leaves.", on_sky(("cat", "top left"))),
        ("The cat moves to the top.", on_sky(("cat", "top"), ("pizza", "bottom right"))),
        (
            "The cat and the pizza swap places.",
            on_sky(("pizza", "top left"), ("cat", "bottom right")),
        ),
        ("An owl joins them at the left.", CAT_PIZZA.with_object("owl", (1, 0))),
        ("The dog leaves.", None),
        ("The cat moves to the bottom right.", None),
        ("A dog joins them at the top left.", None),
        ("A cat joins them at the top.", None),
        ("A owl joins them at the left.", None),
        ("The cat sleeps.", None),
        ("A cat sits at the top left.", None),
    ],
)
def test_sentences_mean_what_they_say(sentence: str, after: Scene | None) -> None:
    assert continue_text(CAT_PIZZA, sentence, GRID, NANO.emoji) == after


def test_closing_answers_are_true() -> None:
    seen = set()
    for story in stories(NANO, 3, 300):
        states = [scene for _, scene in story.steps]
        ever = {n for s in states for n in s.names()}
        first, last = set(states[0].names()), states[-1]
        expected = {
            "Who stayed?": [f"The {n}." for n in first & set(last.names())],
            "Who left?": [f"The {n}." for n in ever - set(last.names())],
            "Who joined?": [f"The {n}." for n in ever - first],
            "How many are there now?": [("One.", "Two.", "Three.")[len(last.objects) - 1]],
        }
        if story.question in expected:
            assert [story.answer] == expected[story.question]
            seen.add(story.question)
        else:
            name, cell = story.question[13:-5], story.answer[7:-1]
            assert last.at(cell_from_name(GRID, cell)) == name
    assert len(seen) == 4


# Programs


@pytest.mark.parametrize("preset", [NANO, SMALL], ids=lambda p: p.name)
def test_programs_run_to_their_scene(preset) -> None:
    for scene in [*scenes("train", 100, preset), Scene("white")]:
        assert run_program(program(scene, preset.grid), preset.grid) == scene
        assert run_program(program(scene, preset.grid) + "\n", preset.grid) == scene


@pytest.mark.parametrize(
    "text",
    [
        "",
        "background(",
        'place("cat", "top")',
        'background("sky")\nbackground("sky")',
        'background("sky")\nplace("cat")',
        'background("sky")\nplace("cat", "up")',
        'background("sky")\nplace("cat", 3)',
        'background("sky")\nplace("cat", cell="top")',
        'background("sky")\nplace("cat", "top")\nplace("dog", "top")',
        '__import__("os").system("true")',
        "\0",
        "(" * 5000,
    ],
)
def test_other_code_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        run_program(text, GRID)


# Talk


def test_outside_words_are_outside_and_partly_held_out() -> None:
    for preset in (NANO, SMALL):
        trained, held_out = outside_words(preset), outside_words(preset, held_out=True)
        assert len(trained) + len(held_out) >= 150
        assert len(held_out) >= 20
        assert not set(trained) & set(held_out)
        assert not {*trained, *held_out} & {*preset.emoji, FORBIDDEN}
    assert "dragon" in outside_words(NANO) + outside_words(NANO, held_out=True)


def test_made_up_words_are_not_known() -> None:
    assert not {made_up_word(Random(i)) for i in range(2000)} & {*load_atlas().names, FORBIDDEN}


def test_forbidden_and_unknown_words_get_their_own_answer_alone() -> None:
    answers = Counter()
    for i in range(3000):
        said = talk(NANO, Random(i))
        answers[said.answer] += 1
        assert (said.answer == REFUSAL) == (FORBIDDEN in said.request), said
        if said.answer == UNKNOWN_WORD:
            words = set(said.request.lower().replace('"', " ").replace(".", " ").split())
            assert not words <= {*" ".join(NANO.emoji).split(), "draw"}
    assert answers[REFUSAL] > 400
    assert answers[UNKNOWN_WORD] > 800


def test_held_out_words_are_never_said_in_training() -> None:
    held_out = set(outside_words(NANO, held_out=True))
    for i in range(1000):
        words = outside(NANO, Random(i)).request.lower().replace(":", " ").replace(".", " ").split()
        assert not held_out & set(words)


def test_the_forbidden_is_in_no_atlas_and_no_scene() -> None:
    assert FORBIDDEN not in load_atlas().names


def test_a_dialog_refuses_the_forbidden_too() -> None:
    refused = 0
    for i in range(300):
        record = write_record("dialog", "train", i, NANO, with_pixels=False).record
        assert isinstance(record, Conversation)
        for asked, answered in zip(record.messages[::2], record.messages[1::2], strict=True):
            assert (FORBIDDEN in asked.document.text) == (answered.document.text == REFUSAL)
            refused += FORBIDDEN in asked.document.text
    assert refused > 10


# Splits


def test_unseen_splits_hold_their_kind_alone_and_training_none() -> None:
    for split in ("unseen_cells", "unseen_pairs", "unseen_counts"):
        assert {held_out_kinds(s) for s in scenes(split, 100)} == {frozenset({split})}
    for split in ("train", "iid", "longer_stories", "unseen_phrasings", "foreign"):
        assert {held_out_kinds(s) for s in scenes(split, 100)} == {frozenset()}


def test_training_scenes_are_in_no_other_split() -> None:
    trained = set(scenes("train", 3000))
    for split in ("iid", "unseen_cells", "unseen_pairs", "unseen_counts", "foreign"):
        assert not trained & set(scenes(split, 300))


def test_held_out_shares_are_as_stated() -> None:
    names = load_atlas().names
    cells = [splits.held_out_pair(n, c) for n in names for c in Grid(4, 32).cells]
    pairs = [splits.held_out_together(a, b) for a in names for b in names if a < b]
    counts = [splits.held_out_count(n, k) for n in names for k in (2, 3)]
    for held_out, share in ((cells, 0.08), (pairs, 0.05), (counts, 0.15)):
        assert sum(held_out) / len(held_out) == pytest.approx(share, rel=0.25)
    assert splits.held_out_together("cat", "dog") == splits.held_out_together("dog", "cat")
    assert not splits.held_out_count("cat", 1)


def test_scenes_vary_in_number_and_repeat_sometimes() -> None:
    drawn = scenes("train", 3000)
    numbers = Counter(len(s.objects) for s in drawn)
    assert all(numbers[n] / 3000 == pytest.approx(1 / 3, abs=0.05) for n in (1, 2, 3))
    repeats = sum(len(set(s.names())) < len(s.names()) for s in drawn) / 3000
    assert repeats == pytest.approx(0.15, abs=0.03)
    assert all(len(splits.scene("train", i, NANO, max_objects=1).objects) == 1 for i in range(50))
    dense = [splits.dense_scene(i, NANO) for i in range(100)]
    assert {len(s.objects) for s in dense} == set(range(3, 10))


def test_a_scene_is_the_same_on_every_machine() -> None:
    world = WorldPreset("toy", GRID, ("cat", "dog", "owl", "pizza", "rocket"), ("white", "sky"))
    said = [describe(splits.scene("train", i, world), GRID) for i in (0, 1, 10**12)]
    assert said == [
        "A dog at the top left and a dog at the bottom left, on white.",
        "A pizza at the bottom right, on sky.",
        "A rocket at the right and a rocket at the bottom right, on sky.",
    ]


# Samples


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", SPLITS)
def test_records_agree_with_their_meta_and_repeat_exactly(task: str, split: str) -> None:
    for i in range(8):
        one, two = (write_record(task, split, i, NANO, with_pixels=False) for _ in range(2))
        assert texts_of(one.record) == texts_of(two.record)
        assert one.meta == two.meta
        documents = (
            [one.record]
            if isinstance(one.record, Document)
            else [m.document for m in one.record.messages]
        )
        assert sum(len(d.images) for d in documents) == len(one.meta.scenes)
        if one.meta.answer is not None:
            assert documents[-1].text.endswith(one.meta.answer)
        if one.meta.demand is not None:
            assert one.meta.demand.met_by(one.meta.scenes[-1])
        for scene in one.meta.scenes:
            assert not held_out_kinds(scene) or split.startswith("unseen_")
            assert split != "train" or trainable(scene)


def test_open_places_are_composed_in_training_and_anywhere_in_tests() -> None:
    for split, low, high in (("train", 0.6, 0.85), ("iid", 0.0, 0.2)):
        made = [write_record("draw", split, i, NANO, with_pixels=False) for i in range(800)]
        is_composed = [
            composed(s.meta.scenes[0], s.meta.demand, GRID) == s.meta.scenes[0]
            for s in made
            if s.meta.demand is not None and s.meta.demand.objects is None
        ]
        assert len(is_composed) > 100
        assert low < sum(is_composed) / len(is_composed) < high


def test_pictures_are_the_scenes_drawn() -> None:
    for task in ("draw", "story", "dialog", "program_draw"):
        for i in range(5):
            sample = write_record(task, "train", i, NANO, foreign_share=1.0)
            record = sample.record
            documents = (
                [record] if isinstance(record, Document) else [m.document for m in record.messages]
            )
            pictures = [p for d in documents for p in d.images]
            for picture, scene in zip(pictures, sample.meta.scenes, strict=True):
                assert picture.tobytes() == render(scene, NANO).tobytes()
            assert not sample.meta.foreign


def test_foreign_pictures_are_for_reading_only() -> None:
    for task in TASKS:
        foreign = [write_record(task, "foreign", i, NANO, with_pixels=False) for i in range(3)]
        expected = task in {
            "caption",
            "inventory",
            "question",
            "quiz",
            "drill",
            "program_read",
        }
        assert {s.meta.foreign for s in foreign} == {expected}
    trained = [write_record("caption", "train", i, NANO, with_pixels=False) for i in range(400)]
    assert sum(s.meta.foreign for s in trained) / 400 == pytest.approx(0.5, abs=0.1)


def test_words_do_not_depend_on_pixels() -> None:
    for task in TASKS:
        for i in range(6):
            drawn, undrawn = (write_record(task, "train", i, NANO, with_pixels=p) for p in (1, 0))
            assert texts_of(drawn.record) == texts_of(undrawn.record)


def test_held_out_phrasings_are_held_out() -> None:
    for i in range(300):
        for task in ("draw", "draw_pair", "caption", "question", "dialog"):
            text = " ".join(
                texts_of(write_record(task, "train", i, NANO, with_pixels=False).record)
            )
            for held_out in ("I would", "there is also", "You can", "Can you tell", "Tell me",
                             "At which place", "Does the", "What is the number"):  # fmt: skip
                assert held_out not in text


def test_longer_stories_are_longer() -> None:
    def lengths(split: str) -> set[int]:
        made = (write_record("story", split, i, NANO, with_pixels=False) for i in range(40))
        return {len(s.meta.scenes) for s in made}

    assert lengths("train") == {2, 3}
    assert lengths("longer_stories") == {4, 5}


def test_noise_never_makes_another_name() -> None:
    names = set(load_atlas().names)
    for i, name in enumerate(sorted(names) * 20):
        noisy = noise(name, Random(i))
        assert noisy == name or noisy not in names


def test_mixture_shares_are_kept_and_seeds_differ() -> None:
    assert MIXTURE.keys() == TASKS.keys()
    made = list(sample_records(NANO, "train", MIXTURE, 2000, seed=0, with_pixels=False))
    counts = Counter(s.meta.task for s in made)
    for task, weight in MIXTURE.items():
        assert counts[task] / 2000 == pytest.approx(weight / sum(MIXTURE.values()), abs=0.03)
    other = next(sample_records(NANO, "train", MIXTURE, 1, seed=1, with_pixels=False))
    assert other.meta.index != made[0].meta.index


def test_written_samples_read_back(tmp_path: Path) -> None:
    made = list(sample_records(NANO, "train", MIXTURE, 30, seed=3))
    records = write_samples(tmp_path / "data", made, len(made), NANO)

    def load(path: str) -> PIL.Image.Image:
        return PIL.Image.open(records.parent / path).convert("RGB")

    lines = [json.loads(line) for line in records.read_text().splitlines()]
    for line, sample in zip(lines, made, strict=True):
        record = record_from_json(line, load)
        assert texts_of(record) == texts_of(sample.record)
        for text, scene in zip(line["meta"]["scenes"], sample.meta.scenes, strict=True):
            assert run_program(text, GRID) == scene
    index = json.loads((tmp_path / "data/index.json").read_text())
    assert index["n_samples"] == 30
    assert index["n_pictures"] == len(list((tmp_path / "data/images").iterdir()))
    with pytest.raises(UserError, match="already exists"):
        write_samples(tmp_path / "data", made, len(made), NANO)


def test_texts_for_the_tokenizer_are_few_and_plain() -> None:
    texts = list(all_texts(NANO, MIXTURE, 500, seed=0))
    assert len(texts) > 800
    assert all(text.isascii() and text == text.strip() and text for text in texts)


TEXTS = {
    "draw": "31881425", "draw_pair": "6ccd535a", "unconditional": "63c41fbe", "caption": "36d58c44",
    "inventory": "a6ba23cc", "question": "b456622f", "quiz": "0aab2a79", "drill": "4e784875",
    "story": "546e7bc1", "story_turn": "3bb97a14", "program_draw": "d7c11af5",
    "program_read": "2af15bde", "text": "2deadcd6", "talk": "9c4a5919", "dialog": "ea816a8d",
    "changes": "accc9b81",
}  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
def test_the_version_of_the_texts_is_raised_with_every_change_of_them(task: str) -> None:
    """Else a run that was begun before the change would go on with the texts of before."""
    said = hashlib.sha256()
    for split in ("train", "iid"):
        for i in range(12):
            sample = write_record(task, split, i, NANO, with_pixels=False)
            said.update(json.dumps(record_to_json(sample.record, lambda _: "")).encode())
            said.update(repr(sample.meta.scenes).encode())
    assert (TEXTS_VERSION, said.hexdigest()[:8]) == (2, TEXTS[task])
