"""The emoji world's exam: every answer of a model is compared with what its scene says.

Pictures are judged from the PNG files that were written, by the world's checker. Beside each score
stands the tokenizer's ceiling: the same pictures, encoded and decoded, without the transformer.
"""

from __future__ import annotations

import itertools
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import PIL.Image

from openchameleon.document import Conversation, Document, Image, Text, documents_of
from openchameleon.errors import UserError, nearest
from openchameleon.image_io import open_image
from openchameleon.inference.params import ModalityParams, Mode, SamplingParams
from openchameleon.pipeline import Chameleon, Prompt
from openchameleon.progress import Progress
from openchameleon.vocab import CodeRange
from openchameleon.world.atlas import PRESETS, WorldPreset
from openchameleon.world.captions import parse_caption
from openchameleon.world.checker import check
from openchameleon.world.programs import run_program
from openchameleon.world.sample import write_record
from openchameleon.world.scene import Scene
from openchameleon.world.stories import opening_scene, score_story
from openchameleon.world.tasks import Meta, Sample

GREEDY = SamplingParams(text=ModalityParams(temperature=0), image=ModalityParams(temperature=0))
MAX_ANSWER = 64
"""Ids an answer in words may take: twice the longest right one."""
BATCH = 64

SCORES = (
    "picture_exact",
    "picture_objects",
    "question",
    "caption_exact",
    "caption_objects",
    "program_exact",
    "story_pictures_fit",
    "talk",
    "codes_exact",
)
_ALL = ("draw", "question", "caption", "program_read")
EXAMS: dict[str, tuple[str, ...]] = {
    "iid": (*_ALL, "story_turn", "talk"),
    "unseen_cells": _ALL,
    "unseen_pairs": _ALL,
    "unseen_counts": _ALL,
    "longer_stories": ("told_story",),
    "unseen_phrasings": ("draw", "question", "caption"),
    "foreign": ("question", "caption", "program_read"),
}
"""Split -> its tasks: those of the world, and `told_story`, whose sentences are given."""


def evaluate_world(
    chameleon: Chameleon,
    n: int = 500,
    seed: int = 0,
    splits: Sequence[str] = tuple(EXAMS),
    preset: str | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """Scores of `n` fresh samples of each task in each split, greedy; null where without meaning.

    `preset` is the world's, by default that of the model's name. `out` keeps the pictures.
    UserError for an unknown split or world.
    """
    name = preset or chameleon.config.name
    if name not in PRESETS:
        raise UserError(
            f"There is no world {name!r}; give one of {', '.join(PRESETS)}.{nearest(name, PRESETS)}"
        )
    for split in splits:
        if split not in EXAMS:
            raise UserError(
                f"There is no split {split!r}; there are {', '.join(EXAMS)}.{nearest(split, EXAMS)}"
            )
    with tempfile.TemporaryDirectory() as temporary:
        folder = out or Path(temporary)
        n_answers = n * sum(len(EXAMS[split]) for split in splits)
        exam = _Exam(chameleon, PRESETS[name], n, seed, folder, n_answers)
        results = {split: exam.split(split) for split in splits}
        exam.progress.close()
    return {"model": chameleon.config.name, "n": n, "seed": seed, "splits": results}


def quick_scores(chameleon: Chameleon, preset: str, n: int = 48) -> dict[str, float]:
    """A few scores to watch while training."""
    with tempfile.TemporaryDirectory() as folder:
        exam = _Exam(chameleon, PRESETS[preset], n, 1, Path(folder), 5 * n)
        iid = exam.draw("iid") | exam.question("iid") | exam.caption("iid")
        foreign = exam.question("foreign")["question"]
        story = exam.story_turn("iid")["story_pictures_fit"]
    keys = ("picture_exact", "picture_objects", "question", "caption_exact")
    return {k: iid[k] for k in keys} | {"foreign_question": foreign, "story": story}


class _Exam:
    """One model before one world: a method for each task, each returning its scores."""

    def __init__(
        self,
        chameleon: Chameleon,
        preset: WorldPreset,
        n: int,
        seed: int,
        folder: Path,
        n_answers: int,
    ) -> None:
        self.chameleon, self.preset, self.n, self.seed = chameleon, preset, n, seed
        self.folder = folder
        self.progress, self.done = Progress("evaluate world", n_answers, "answers"), 0
        self.codes: list[bool] = []

    def split(self, split: str) -> dict[str, Any]:
        """All scores of a split, and its ceiling."""
        self.codes = []
        scores: dict[str, Any] = dict.fromkeys((*SCORES, "question_by_kind"))
        for task in EXAMS[split]:
            exam: Callable[[str], dict[str, Any]] = getattr(self, task)
            scores |= exam(split)
        scores["codes_exact"] = _mean(self.codes) if self.codes else None
        return scores | {"ceiling": self.ceiling(split)}

    def samples(self, task: str, split: str) -> list[Sample]:
        first = self.seed << 32
        return [write_record(task, split, first + i, self.preset) for i in range(self.n)]

    def draw(self, split: str) -> dict[str, Any]:
        samples = self.samples("draw", split)
        answers = self.answers([_prompt(s) for s in samples], "interleaved", split, "draw")
        exact, objects = [], []
        for sample, answer in zip(samples, answers, strict=True):
            scene = answer[0] if len(answer) == 1 and not isinstance(answer[0], str) else None
            demand = sample.meta.demand
            assert demand is not None
            exact.append(scene is not None and demand.met_by(scene))
            objects.append(_objects_right(scene, sample.meta))
        return {"picture_exact": _mean(exact), "picture_objects": _mean(objects)}

    def question(self, split: str) -> dict[str, Any]:
        kinds = [sample.meta.kind for sample in self.samples("question", split)]
        right = self.texts_right("question", split)
        by_kind = {
            kind: _mean([r for r, k in zip(right, kinds, strict=True) if k == kind])
            for kind in sorted(set(kinds))
        }
        return {"question": _mean(right), "question_by_kind": by_kind}

    def talk(self, split: str) -> dict[str, Any]:
        return {"talk": _mean(self.texts_right("talk", split))}

    def caption(self, split: str) -> dict[str, Any]:
        samples = self.samples("caption", split)
        answers = self.answers([_prompt(s) for s in samples], "text", split, "caption")
        texts = [_text(a) for a in answers]
        right = [t == s.meta.answer for t, s in zip(texts, samples, strict=True)]
        f1 = []
        for text, sample in zip(texts, samples, strict=True):
            said = parse_caption(text, self.preset.grid, self.preset.emoji)
            f1.append(_f1(said, sample.meta.scenes[0]))
        return {"caption_exact": _mean(right), "caption_objects": _mean(f1)}

    def program_read(self, split: str) -> dict[str, Any]:
        samples = self.samples("program_read", split)
        answers = self.answers([_prompt(s) for s in samples], "text", split, "program")
        right = []
        for sample, answer in zip(samples, answers, strict=True):
            try:
                scene = run_program(_text(answer), self.preset.grid)
            except ValueError:
                scene = None
            right.append(scene == sample.meta.scenes[0])
        return {"program_exact": _mean(right)}

    def story_turn(self, split: str) -> dict[str, Any]:
        """Stories of the model's own, of what was asked: each picture must fit the text so far."""
        samples = self.distinct_stories(split)
        prompts = [_first_turn(s) for s in samples]
        answers = self.answers(prompts, "interleaved", split, "story")
        right = [self.story_right(*told) for told in zip(samples, prompts, answers, strict=True)]
        return {"story_pictures_fit": _mean(right)}

    def distinct_stories(self, split: str) -> list[Sample]:
        """`n` samples whose requests differ: the greedy answer to one of them counts once."""
        found: dict[str, Sample] = {}
        for index in itertools.count(self.seed << 32):
            sample = write_record("story_turn", split, index, self.preset)
            found.setdefault(_first_turn(sample).text, sample)
            if len(found) == self.n:
                return list(found.values())
        raise AssertionError("count ends never")

    def story_right(
        self, sample: Sample, prompt: Document, answer: Sequence[str | Scene | None]
    ) -> bool:
        """Two pictures or more, all of them right, of a story that has what was asked for."""
        grid, names = self.preset.grid, self.preset.emoji
        told = list(answer)
        if sample.meta.kind == "begun":
            told.insert(0, prompt.text.removeprefix("Tell a story: "))
        if sample.meta.kind == "about":
            opened = opening_scene(told, grid, names)
            asked = set(sample.meta.scenes[0].names())
            if opened is None or not asked <= set(opened.names()):
                return False
        fits = score_story(told, grid, names)
        return len(fits) > 1 and all(fits)

    def told_story(self, split: str) -> dict[str, Any]:
        """Stories whose sentences are given one by one; the model draws after each."""
        samples = self.samples("story", split)
        pages = [_sentences(s) for s in samples]
        told: list[Document] = [Document() for _ in samples]
        segments: list[list[str | Scene | None]] = [[] for _ in samples]
        for page in range(max(len(p) for p in pages)):
            active = [i for i in range(len(samples)) if page < len(pages[i])]
            prompts = [Document([*told[i], Text(pages[i][page])]) for i in active]
            ended = sum(len(pages[i]) == page + 1 for i in active)
            drawn = self.documents(prompts, "image", raw=True, n_done=ended)
            for i, prompt, answer in zip(active, prompts, drawn, strict=True):
                told[i] = Document([*prompt, *answer])
                seen = self.seen(answer, f"{split}-{i:04}-{page}")
                segments[i] += [pages[i][page], *seen]
        grid, names = self.preset.grid, self.preset.emoji
        right = [
            len(fits := score_story(s, grid, names)) == len(p) and all(fits)
            for s, p in zip(segments, pages, strict=True)
        ]
        return {"story_pictures_fit": _mean(right)}

    def texts_right(self, task: str, split: str) -> list[bool]:
        """For each sample of a task answered in words, whether the words are exactly right."""
        samples = self.samples(task, split)
        mode: Mode = "interleaved" if task == "talk" else "text"
        answers = self.answers([_prompt(s) for s in samples], mode, split, task)
        return [
            _text(answer) == sample.meta.answer
            for answer, sample in zip(answers, samples, strict=True)
        ]

    def answers(
        self, prompts: Sequence[Prompt], mode: Mode, split: str, task: str
    ) -> list[list[str | Scene | None]]:
        """Each answer as its texts and the scenes read off its pictures."""
        documents = self.documents(prompts, mode)
        return [self.seen(d, f"{split}-{task}-{i:04}") for i, d in enumerate(documents)]

    def documents(
        self, prompts: Sequence[Prompt], mode: Mode, raw: bool = False, n_done: int | None = None
    ) -> list[Document]:
        """The model's greedy answers. n_done: answers that end with these, where not all do."""
        params = replace(GREEDY, mode=mode, max_tokens=MAX_ANSWER if mode == "text" else None)
        found: list[Document] = []
        image = self.chameleon.config.vocab.image
        for start in range(0, len(prompts), BATCH):
            batch = prompts[start : start + BATCH]
            for completion in self.chameleon.complete_many(batch, raw=raw, params=params):
                self.codes += _items_whole(completion, image)
                found.append(self.chameleon.tokenizer.decode(completion))
            if n_done is None:
                self.done += len(batch)
            self.progress.update(self.done)
        self.done += n_done or 0
        self.progress.update(self.done)
        return found

    def seen(self, document: Document, name: str) -> list[str | Scene | None]:
        """A document as its texts and scenes; pictures are written and read back first."""
        found: list[str | Scene | None] = []
        for i, segment in enumerate(document):
            if isinstance(segment, Text):
                found.append(segment.text)
            else:
                found.append(self.scene_of(segment.pil, f"{name}-{i}"))
        return found

    def scene_of(self, picture: PIL.Image.Image, name: str) -> Scene | None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{name}.png"
        picture.save(path)
        return check(open_image(path), self.preset).as_scene()

    def ceiling(self, split: str) -> dict[str, float]:
        """Scores of the split's own pictures after the tokenizer alone."""
        task = "story" if split == "longer_stories" else "question"
        scenes: list[Scene] = []
        pictures: list[PIL.Image.Image] = []
        for sample in self.samples(task, split):
            scenes += sample.meta.scenes
            pictures += _pictures(sample)
        tokenizer = self.chameleon.tokenizer
        ids = [tokenizer.encode(Document([Image(p)])) for p in pictures]
        exact, objects = [], []
        for i, (scene, row) in enumerate(zip(scenes, ids, strict=True)):
            (back,) = tokenizer.decode(row).images
            found = self.scene_of(back, f"{split}-ceiling-{i:04}")
            exact.append(found == scene)
            objects.append(_placed_right(found, scene))
        return {"picture_exact": _mean(exact), "picture_objects": _mean(objects)}


def _prompt(sample: Sample) -> Conversation:
    """The sample's conversation without the answer."""
    assert isinstance(sample.record, Conversation)
    return Conversation(sample.record.messages[:-1])


def _first_turn(sample: Sample) -> Document:
    assert isinstance(sample.record, Conversation)
    return sample.record.messages[0].document


def _sentences(sample: Sample) -> list[str]:
    """The text before each picture of a story document."""
    assert isinstance(sample.record, Document)
    segments = list(sample.record)
    return [
        a.text
        for a, b in itertools.pairwise(segments)
        if isinstance(a, Text) and isinstance(b, Image)
    ]


def _pictures(sample: Sample) -> list[PIL.Image.Image]:
    return [picture for document in documents_of(sample.record) for picture in document.images]


def _text(answer: Sequence[str | Scene | None]) -> str:
    """The answer if it is text and nothing else; else something no answer is."""
    return answer[0] if len(answer) == 1 and isinstance(answer[0], str) else "<not a text>"


def _objects_right(scene: Scene | None, meta: Meta) -> float:
    """The share of what was asked for that is there: in its cell where the cell was said."""
    assert meta.demand is not None
    if meta.demand.objects is not None:
        return _placed_right(scene, Scene("", meta.demand.objects))
    asked = Counter(meta.demand.names or meta.scenes[-1].names())
    there = Counter(scene.names()) if scene is not None else Counter()
    return sum((asked & there).values()) / max(1, asked.total())


def _placed_right(found: Scene | None, scene: Scene) -> float:
    if found is None:
        return 0.0
    return _mean([found.at(o.cell) == o.name for o in scene.objects])


def _f1(said: Scene | None, scene: Scene) -> float:
    """F1 of the objects (name and cell) that a caption claims."""
    claimed, true = set(said.objects if said else ()), set(scene.objects)
    return 2 * len(claimed & true) / max(1, len(claimed) + len(true))


def _items_whole(token_ids: Sequence[int], image: CodeRange) -> list[bool]:
    """For each picture opened in `token_ids`: does it have exactly its codes, then its end?"""
    found = []
    for at, token_id in enumerate(token_ids):
        if token_id == image.begin_id:
            inside = token_ids[at + 1 : at + 1 + image.codes_per_item]
            codes = all(image.first_id <= i < image.stop_id for i in inside)
            closed = token_ids[at + 1 + image.codes_per_item : at + image.item_len] == [
                image.end_id
            ]
            found.append(len(inside) == image.codes_per_item and codes and closed)
    return found


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / max(1, len(values)), 4)
