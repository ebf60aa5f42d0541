"""Splits: which scene is number i of which split, and which combinations training never sees.

A scene is a function of (WORLD_VERSION, split, index, preset, max_objects) alone: infinitely many,
in any order, the same on every machine. What is held out is decided by hashes of names and cells.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from functools import cache
from itertools import combinations
from random import Random

from openchameleon.world.atlas import WorldPreset
from openchameleon.world.scene import Cell, Grid, Placed, Scene

WORLD_VERSION = 1
SPLITS = (
    "train",
    "iid",
    "unseen_cells",
    "unseen_pairs",
    "unseen_counts",
    "longer_stories",
    "unseen_phrasings",
    "foreign",
)
REPEAT_SHARE = 0.225  # of scenes with two objects or more, so 15% of all


def share(key: str) -> float:
    """A number in [0, 1) that depends on the text `key` alone."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


@cache
def held_out_pair(name: str, cell: Cell) -> bool:
    """Is `name` never trained in this cell? True for 8% of (object, cell)."""
    return share(f"pair/{name}/{cell[0]},{cell[1]}") < 0.08


@cache
def held_out_together(one: str, other: str) -> bool:
    """Are the two never trained in one picture? True for 5% of unordered pairs of names."""
    first, second = sorted((one, other))
    return first != second and share(f"together/{first}/{second}") < 0.05


@cache
def held_out_count(name: str, n: int) -> bool:
    """Is a picture with exactly `n` of `name` never trained? True for 15%, n = 2 and 3 only."""
    return n in (2, 3) and share(f"count/{name}/{n}") < 0.15


def held_out_kinds(scene: Scene) -> frozenset[str]:
    """Which of the unseen splits the scene has a combination of; empty for most scenes."""
    counts = Counter(scene.names())
    kinds = {
        "unseen_cells": any(held_out_pair(o.name, o.cell) for o in scene.objects),
        "unseen_pairs": any(held_out_together(a, b) for a, b in combinations(counts, 2)),
        "unseen_counts": any(held_out_count(name, n) for name, n in counts.items()),
    }
    return frozenset(kind for kind, is_in in kinds.items() if is_in)


def reserved(scene: Scene) -> bool:
    """Is this whole scene kept for evaluation? True for 5%; no rule connects them."""
    objects = ";".join(f"{o.name}@{o.cell[0]},{o.cell[1]}" for o in scene.objects)
    return share(f"scene/{scene.background}/{objects}") < 0.05


def trainable(scene: Scene) -> bool:
    """May the scene stand in training data? No held-out combination, and not reserved."""
    return not held_out_kinds(scene) and not reserved(scene)


def belongs(scene: Scene, split: str) -> bool:
    """Is this a scene of `split`? Training and the splits of unseen combinations are disjoint."""
    if split == "train":
        return trainable(scene)
    kinds = held_out_kinds(scene)
    if split.startswith("unseen_") and split != "unseen_phrasings":
        return kinds == {split}
    return not kinds and (split == "longer_stories" or reserved(scene))


def scene(split: str, index: int, preset: WorldPreset, max_objects: int = 3) -> Scene:
    """Scene `index` of `split`: 1 to `max_objects` objects (from 2 where the split needs two)."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; one of {', '.join(SPLITS)}")
    rng = Random(f"{WORLD_VERSION}/{split}/{index}")
    needs_two = split in ("unseen_pairs", "unseen_counts")
    n = rng.randint(2 if needs_two else 1, max(max_objects, 2 if needs_two else 1))
    background = rng.choice(preset.backgrounds)
    repeat = n > 1 and (split == "unseen_counts" or rng.random() < REPEAT_SHARE)
    if split == "unseen_pairs" and n == 2:
        repeat = False
    while True:
        candidate = _any_scene(preset.grid, background, preset.emoji, n, repeat, rng)
        if belongs(candidate, split):
            return candidate


def dense_scene(index: int, preset: WorldPreset) -> Scene:
    """A scene of 3 to n * n objects for training image tokenizers, which may see everything."""
    rng = Random(f"{WORLD_VERSION}/dense/{index}")
    n = rng.randint(3, len(preset.grid.cells))
    background = rng.choice(preset.backgrounds)
    return _any_scene(preset.grid, background, preset.emoji, n, repeat=False, rng=rng)


def _any_scene(
    grid: Grid, background: str, names: tuple[str, ...], n: int, repeat: bool, rng: Random
) -> Scene:
    """`n` distinct objects in distinct cells; with `repeat`, one of them several times."""
    chosen = rng.sample(names, n)
    if repeat:
        times = rng.randint(2, n)
        chosen[:times] = [chosen[0]] * times
    cells = rng.sample(grid.cells, n)
    return Scene(background, (Placed(c, name) for c, name in zip(cells, chosen, strict=True)))
