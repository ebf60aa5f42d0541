"""Samples in numbers: record i of a split, mixtures of tasks, and data sets on disk.

A record is a function of (WORLD_VERSION, TEXTS_VERSION, task, split, index, preset) alone; a
mixture chooses the task of a number by hash, so that any part of a data set can be made anywhere,
in any order.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from random import Random

import PIL.Image

from openchameleon.document import Text, documents_of, record_to_json
from openchameleon.errors import UserError
from openchameleon.progress import track
from openchameleon.world.atlas import WorldPreset
from openchameleon.world.programs import program
from openchameleon.world.splits import SPLITS, WORLD_VERSION, share
from openchameleon.world.tasks import READING, TASKS, Job, Meta, Sample

TEXTS_VERSION = 2
"""Raised when the same scenes get other texts, so that a run does not go on with the old ones."""

MIXTURE: dict[str, float] = {
    "draw": 0.18,
    "draw_pair": 0.1,
    "unconditional": 0.03,
    "caption": 0.07,
    "inventory": 0.12,
    "question": 0.05,
    "quiz": 0.08,
    "drill": 0.13,
    "story": 0.05,
    "story_turn": 0.06,
    "program_draw": 0.04,
    "program_read": 0.03,
    "text": 0.01,
    "talk": 0.03,
    "dialog": 0.04,
    "changes": 0.05,
}
"""The shares of the tasks in training data. Pictures without a text are a tenth of the drawing."""


def write_record(
    task: str,
    split: str,
    index: int,
    preset: WorldPreset,
    *,
    max_objects: int = 3,
    foreign_share: float = 0.5,
    with_pixels: bool = True,
) -> Sample:
    """Sample `index` of `task` in `split`.

    `foreign_share` of the pictures to be read in training are drawn by other means; all of them
    are in split "foreign", none elsewhere. Without pixels every picture is a single dot.
    ValueError for an unknown task or split.
    """
    if task not in TASKS or split not in SPLITS:
        raise ValueError(f"no task {task!r} in split {split!r}")
    rng = Random(f"{WORLD_VERSION}/{task}/{split}/{index}")
    by_others = rng.random() < {"train": foreign_share, "foreign": 1.0}.get(split, 0.0)
    foreign = by_others and task in READING
    job = Job(task, split, index, preset, rng, max_objects, foreign, with_pixels)
    return TASKS[task](job)


def sample_records(
    preset: WorldPreset,
    split: str,
    mixture: Mapping[str, float],
    n: int,
    seed: int,
    *,
    max_objects: int = 3,
    foreign_share: float = 0.5,
    with_pixels: bool = True,
) -> Iterator[Sample]:
    """Samples 0 to n - 1 of a seed; a task's share of them is its weight in `mixture`."""
    tasks, weights = list(mixture), list(mixture.values())
    for i in range(n):
        index = (seed << 32) + i
        yield write_record(
            _task_of(share(f"task/{index}"), tasks, weights),
            split,
            index,
            preset,
            max_objects=max_objects,
            foreign_share=foreign_share,
            with_pixels=with_pixels,
        )


def all_texts(
    preset: WorldPreset, mixture: Mapping[str, float], n: int, seed: int
) -> Iterator[str]:
    """The text segments of `n` training samples, for training a text tokenizer."""
    for sample in sample_records(preset, "train", mixture, n, seed, with_pixels=False):
        for document in documents_of(sample.record):
            yield from (part.text for part in document if isinstance(part, Text))


def write_samples(folder: Path, samples: Iterable[Sample], total: int, preset: WorldPreset) -> Path:
    """Writes records.jsonl, images/NNNNNN.png and, last, index.json; returns the first's path.

    Each line also says what is right, under "meta", its scenes as programs. UserError if the folder
    already holds samples or pictures, or cannot be written.
    """
    records = folder / "records.jsonl"
    for there in (records, folder / "images"):
        if there.exists():
            raise UserError(f"{there} already exists; choose another folder or delete it first.")
    try:
        (folder / "images").mkdir(parents=True)
    except OSError as error:
        raise UserError(f"Cannot write to {folder}: {error.strerror}.") from error
    tasks: Counter[str] = Counter()
    n_pictures = 0

    def save_image(picture: PIL.Image.Image) -> str:
        nonlocal n_pictures
        path = f"images/{n_pictures:06}.png"
        picture.save(folder / path, compress_level=1)
        n_pictures += 1
        return path

    with records.open("w", encoding="utf-8") as lines:
        for sample in track(samples, "Writing samples", total, "samples"):
            line = record_to_json(sample.record, save_image)
            lines.write(json.dumps({**line, "meta": _meta_json(sample.meta, preset)}) + "\n")
            tasks[sample.meta.task] += 1
    index = {
        "world_version": WORLD_VERSION,
        "texts_version": TEXTS_VERSION,
        "preset": preset.name,
        "n_samples": tasks.total(),
        "n_pictures": n_pictures,
        "tasks": dict(sorted(tasks.items())),
    }
    (folder / "index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return records


def _task_of(at: float, tasks: list[str], weights: list[float]) -> str:
    """The task whose share of the unit interval `at` falls into."""
    left = at * sum(weights)
    for task, weight in zip(tasks, weights, strict=True):
        left -= weight
        if left < 0:
            return task
    return tasks[-1]


def _meta_json(meta: Meta, preset: WorldPreset) -> dict[str, object]:
    return {
        "task": meta.task,
        "split": meta.split,
        "index": meta.index,
        "kind": meta.kind,
        "answer": meta.answer,
        "foreign": meta.foreign,
        "scenes": [program(scene, preset.grid) for scene in meta.scenes],
    }
