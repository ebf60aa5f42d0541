"""Sources -> a folder of prepared shards, one for each of theirs, gone on with where it stopped.

plan.json       what is prepared, how and by which tokenizer: another plan is refused
shards/         a folder of rows for each shard of the sources, a pure function of it and the plan
quarantine/     the bad records of each shard that has any, as JSON lines
duplicates/     with deduplication: of each shard, which records are left out
manifest.json   written last: `pack.Rows` reads it all as one folder of rows
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from openchameleon.config import config_hash, to_dict
from openchameleon.data.duplicates import Dedup, decide, dropped, is_decided, is_scanned, scan
from openchameleon.data.pack import ARRAYS, MANIFEST, SHARDS, joined_manifest, pack, write_rows
from openchameleon.data.prepare import RecordTokenizer, encode, save_manifest, whole
from openchameleon.data.report import write_report
from openchameleon.data.sources import Shard, entries
from openchameleon.data.sources.bad import BadPolicy, BadRecords
from openchameleon.data.sources.entry import Entry, Pairs
from openchameleon.data.statistics import Statistics, total
from openchameleon.data.workers import in_processes
from openchameleon.document import Record, documents_of
from openchameleon.errors import UserError
from openchameleon.progress import Progress, track

PLAN, QUARANTINE = "plan.json", "quarantine"
BATCH = 256


@dataclass(frozen=True, slots=True)
class CorpusConfig:
    """What becomes of the records.

    pairs: what a picture with its caption is. min_side, max_aspect: records with a picture whose
    shorter side has fewer pixels, or whose longer side is more times the shorter, are left out;
    0: none is. dedup: of equal records (exact), or of texts that are nearly equal too (near), the
    first is kept.
    """

    row_len: int
    pairs: Pairs = "documents"
    answers_only: bool = True
    min_side: int = 0
    max_aspect: float = 0.0
    dedup: Dedup = "none"

    def __post_init__(self) -> None:
        if self.row_len < 2:
            raise ValueError(f"row_len = {self.row_len} is no row of tokens.")
        if self.min_side < 0 or (self.max_aspect and self.max_aspect < 1):
            raise ValueError(
                f"min_side = {self.min_side} and max_aspect = {self.max_aspect:g}: a side is at"
                " least 0, an aspect at least 1 (or 0 for any)."
            )


@dataclass(frozen=True, slots=True)
class Corpus:
    """What a worker needs to prepare any of the shards.

    tokenizer: changes with what it does. load: makes one, in whatever process. made_by: of each
    shard, changes with it and with all that its rows depend on.
    """

    out: Path
    config: CorpusConfig
    bad: BadPolicy
    shards: tuple[Shard, ...]
    made_by: tuple[str, ...]
    tokenizer: str
    load: Callable[[], RecordTokenizer] = field(repr=False)

    def folder(self, i: int) -> Path:
        return self.out / SHARDS / f"{i:05d}"


Work = Literal["scan", "prepare"]
Run = Callable[[Corpus, Work, Sequence[int]], None]
"""Does some work on the shards of these numbers, or hands it on and returns at once."""


def plan_corpus(
    shards: Sequence[Shard],
    out: Path,
    config: CorpusConfig,
    tokenizer: str,
    load: Callable[[], RecordTokenizer],
    bad: BadPolicy,
) -> Corpus:
    """Writes down what `out` is to hold. UserError where it holds anything else already."""
    options = to_dict(config)
    stamps = [config_hash(shard.stamps()) for shard in shards]
    plan = {
        "options": options | {"tokenizer": tokenizer},
        "inputs": [[s.kind, s.location, stamp] for s, stamp in zip(shards, stamps, strict=True)],
    }
    refuse_other(out)
    path = out / PLAN
    if path.exists():
        _require_same(out, json.loads(path.read_text(encoding="utf-8")), plan)
    else:
        out.mkdir(parents=True, exist_ok=True)
        _write_json(path, plan)
    made_by = tuple(config_hash(options, tokenizer, stamp) for stamp in stamps)
    return Corpus(out, config, bad, tuple(shards), made_by, tokenizer, load)


def refuse_other(out: Path) -> None:
    """UserError where a folder holds something that is no corpus, begun or done."""
    if not out.exists() or (out / PLAN).exists():
        return
    if not out.is_dir() or any(file.name != "lock" for file in out.iterdir()):
        raise UserError(f"{out} holds other things already; name another --out.")


def _require_same(out: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    changes = [
        f"{key} was {before['options'].get(key)}, is {value}"
        for key, value in now["options"].items()
        if before["options"].get(key) != value
    ]
    old, new = ({json.dumps(i): i[1] for i in plan["inputs"]} for plan in (before, now))
    changed = sorted({(old | new)[key] for key in old.keys() ^ new.keys()})
    if changed:
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        changes.append(f"the input {changed[0]}{more} has changed")
    if changes:
        raise UserError(
            f"{out} was begun otherwise: {'; '.join(changes)}. Give these back, or name another"
            " --out."
        )


def prepare_corpus(corpus: Corpus, run: Run) -> dict[str, Any] | None:
    """Does what is not done yet; the manifest, or None where `run` has handed work on.

    UserError where a record or too many of them are bad, or none is left.
    """
    numbers = range(len(corpus.shards))
    if corpus.config.dedup != "none" and not is_decided(corpus.out):
        if missing := [i for i in numbers if not is_scanned(corpus.out, i)]:
            run(corpus, "scan", missing)
        if not all(is_scanned(corpus.out, i) for i in numbers):
            return None
        decide(corpus.out, len(corpus.shards), corpus.config.dedup)
    missing = [i for i in numbers if manifest_of(corpus, i) is None]
    if missing:
        run(corpus, "prepare", missing)
    elif finished := _finished(corpus):
        return finished
    manifests = [manifest_of(corpus, i) for i in numbers]
    done = [manifest for manifest in manifests if manifest is not None]
    _check_bad(corpus, done)
    return finish(corpus) if len(done) == len(manifests) else None


def run_here(corpus: Corpus, work: Work, numbers: Sequence[int], workers: int = 1) -> None:
    """Does the work in processes of this machine; or in this one, where one is enough."""
    jobs = [(corpus, work, i) for i in numbers]
    n = min(workers, len(jobs))
    done = in_processes(do_job, jobs, n) if n > 1 else map(do_job, jobs)
    if n > 1 or work == "scan":  # a shard that is prepared here shows its own progress
        done = track(done, work, len(jobs), "shards")
    results = []
    for result in done:
        results.append(result)
        if work == "prepare":
            _check_bad(corpus, results)


def do_job(job: tuple[Corpus, Work, int]) -> dict[str, Any]:
    """One work on one shard, as a process of any executor does it."""
    corpus, work, i = job
    if work == "prepare":
        return prepare_shard(corpus, i)
    bad = BadRecords(corpus.bad, corpus.shards[i].location)
    scan(corpus.out, i, _entries(corpus, i), bad, corpus.config.dedup, len(corpus.shards))
    return {}


def prepare_shard(corpus: Corpus, i: int) -> dict[str, Any]:
    """Writes the rows of one shard, whole or not at all; returns their manifest."""
    folder, shard, config = corpus.folder(i), corpus.shards[i], corpus.config
    tokenizer = _tokenizer(corpus)
    if folder.exists():  # not what is wanted, or damaged
        shutil.rmtree(folder)
    listing = corpus.out / QUARANTINE / f"{folder.name}.jsonl"
    listing.unlink(missing_ok=True)
    listing.parent.mkdir(exist_ok=True)
    bad = BadRecords(corpus.bad, shard.location, listing)
    drop = dropped(corpus.out, i) if config.dedup != "none" else frozenset()
    kept = (entry for n, entry in enumerate(_entries(corpus, i)) if n not in drop)
    statistics, left_out = Statistics(), {"duplicate": len(drop), "small": 0, "narrow": 0}
    records = statistics.of_records(_fitting(bad.load(kept), config, left_out))
    progress = Progress(f"prepare {i + 1} of {len(corpus.shards)}", 0, "records")
    documents = encode(
        records, tokenizer, config.row_len, config.answers_only, BATCH, bad, progress
    )
    with whole(folder) as temporary:
        rows = statistics.of_rows(pack(documents, config.row_len), config.row_len, tokenizer.vocab)
        manifest = write_rows(rows, temporary, config.row_len, tokenizer.vocab) | {
            "made_by": corpus.made_by[i],
            "source": shard.location,
            "n_records": bad.n_records + len(drop),
            "n_bad": bad.n_bad,
            "left_out": left_out,
            "statistics": statistics.to_dict(),
        }
        save_manifest(temporary, manifest)
    return manifest


def manifest_of(corpus: Corpus, i: int) -> dict[str, Any] | None:
    """The manifest of a shard whose rows are there, each file of its size; None where not."""
    folder = corpus.folder(i)
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        sizes = {name: (folder / f"{name}.npy").stat().st_size for name in ARRAYS}
    except (OSError, ValueError):
        return None
    wanted = (corpus.made_by[i], sizes)
    return manifest if (manifest.get("made_by"), manifest.get("bytes")) == wanted else None


def _finished(corpus: Corpus) -> dict[str, Any] | None:
    """The manifest of all shards, if it has been written."""
    path = corpus.out / MANIFEST
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def finish(corpus: Corpus) -> dict[str, Any]:
    """Writes the report and, last, the manifest of all shards; returns it."""
    names = [corpus.folder(i).name for i in range(len(corpus.shards))]
    parts = [m for i in range(len(names)) if (m := manifest_of(corpus, i)) is not None]
    left_out = {key: sum(part["left_out"][key] for part in parts) for key in parts[0]["left_out"]}
    manifest = joined_manifest(corpus.out, names) | {
        "made_by": config_hash(corpus.made_by),
        "options": to_dict(corpus.config) | {"tokenizer": corpus.tokenizer},
        "n_records": sum(part["n_records"] for part in parts),
        "n_bad": sum(part["n_bad"] for part in parts),
        "left_out": left_out,
        "statistics": total(part["statistics"] for part in parts).to_dict(),
    }
    if not manifest["n_rows"]:
        raise UserError("There is nothing to prepare: no record of the sources can be used.")
    write_report(manifest, corpus.out)
    _write_json(corpus.out / MANIFEST, manifest)
    return manifest


def _entries(corpus: Corpus, i: int) -> Iterator[Entry]:
    return entries(corpus.shards[i], corpus.config.pairs)


def _fitting(
    records: Iterable[tuple[str, Record]], config: CorpusConfig, left_out: dict[str, int]
) -> Iterator[tuple[str, Record]]:
    """The records whose pictures are as large and as square as they must be."""
    for name, record in records:
        sizes = [sorted(p.size) for document in documents_of(record) for p in document.images]
        if any(short < config.min_side for short, _ in sizes):
            left_out["small"] += 1
        elif config.max_aspect and any(long > short * config.max_aspect for short, long in sizes):
            left_out["narrow"] += 1
        else:
            yield name, record


def _check_bad(corpus: Corpus, manifests: Sequence[dict[str, Any]]) -> None:
    """UserError where the shards prepared so far have more bad records than they may."""
    n_bad, n_records = (sum(m[key] for m in manifests) for key in ("n_bad", "n_records"))
    if corpus.bad.on_bad == "skip":
        corpus.bad.check(n_bad, n_records, f"{len(manifests)} shards ({corpus.out / QUARANTINE})")


def _write_json(path: Path, data: dict[str, Any]) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


_loaded: dict[str, RecordTokenizer] = {}


def _tokenizer(corpus: Corpus) -> RecordTokenizer:
    """The tokenizer, loaded once in a process."""
    if corpus.tokenizer not in _loaded:
        _loaded.clear()
        _loaded[corpus.tokenizer] = corpus.load()
    return _loaded[corpus.tokenizer]


def local(workers: int) -> Run:
    """`run_here` with so many processes."""
    return partial(run_here, workers=workers)
