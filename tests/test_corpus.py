"""Sources to shards: each a pure function, gone on with after a stop, and read as one."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from letters import VOCAB, Letters, die_unless_zero, stop_unless_zero

from openchameleon.cli.main import main
from openchameleon.data import corpus as corpus_module
from openchameleon.data import workers
from openchameleon.data.corpus import (
    Corpus,
    CorpusConfig,
    Work,
    do_job,
    local,
    plan_corpus,
    prepare_corpus,
    run_here,
)
from openchameleon.data.loader import RowLoader
from openchameleon.data.pack import Rows
from openchameleon.data.report import write_report
from openchameleon.data.sources import shards_of
from openchameleon.data.sources.bad import BadPolicy
from openchameleon.data.workers import in_processes
from openchameleon.errors import UserError
from openchameleon.files import sha256_of

CONFIG = CorpusConfig(row_len=40)
RAISE, SKIP = BadPolicy("raise"), BadPolicy("skip")


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than all the rest; one test asks for it."""
    monkeypatch.setattr(corpus_module, "write_report", lambda manifest, out: None)


def write_texts(folder: Path, n: int, shard: int = 0) -> Path:
    folder.mkdir(exist_ok=True)
    for i in range(n):
        (folder / f"{shard}{i:03}.md").write_text(f"text {shard} {i} " + "x" * (i % 20))
    return folder


def write_pair(folder: Path, name: str, size: tuple[int, int], colour: str = "red") -> None:
    PIL.Image.new("RGB", size, colour).save(folder / f"{name}.png")
    (folder / f"{name}.txt").write_text(f"a {colour} one")


def plan(source: Path, out: Path, config: CorpusConfig = CONFIG, bad: BadPolicy = RAISE,
         files: int = 4) -> Corpus:  # fmt: skip
    return plan_corpus(shards_of(str(source), None, files), out, config, "letters", Letters, bad)


def prepared(source: Path, out: Path, config: CorpusConfig = CONFIG, bad: BadPolicy = RAISE,
             files: int = 4) -> dict[str, Any]:  # fmt: skip
    manifest = prepare_corpus(plan(source, out, config, bad, files), local(1))
    assert manifest is not None
    return manifest


def texts_in(out: Path) -> list[str]:
    """The texts of the documents, in the order of rows; pictures as P."""
    found, rows, image = [], Rows.open(out), VOCAB.image
    for tokens, ids in zip(rows.tokens, rows.doc_ids, strict=True):
        for d in range(1, ids.max() + 1):
            text = [
                "P" if i == image.begin_id else chr(i - VOCAB.text_start)
                for i in tokens[ids == d].tolist()
                if VOCAB.is_text(i) or i == image.begin_id
            ]
            found.append("".join(text))
    return found


def sums(out: Path) -> dict[str, str]:
    return {str(f.relative_to(out)): sha256_of(f) for f in sorted(out.rglob("*.npy"))}


def test_every_record_is_in_the_rows_once_and_the_loader_takes_them(tmp_path: Path) -> None:
    source = write_texts(tmp_path / "s", 10)
    write_pair(source, "p", (8, 4))
    (source / "z.py").write_text("y" * 100)
    manifest = prepared(source, tmp_path / "out")
    texts = texts_in(tmp_path / "out")
    wanted = {f"text 0 {i} " + "x" * (i % 20) for i in range(10)}
    assert wanted < set(texts)
    assert {"Pa red one", "a red oneP"} & set(texts)
    assert "".join(t for t in texts if set(t) == {"y"}) == "y" * 100
    assert len(manifest["shards"]) == 3
    statistics = manifest["statistics"]
    assert statistics["records"] == {"text": 11, "pair": 1}
    assert statistics["tokens"]["image"] == 6
    assert sum(statistics["tokens"].values()) == manifest["n_tokens"]
    assert sum(statistics["lengths"]) == manifest["n_documents"]
    assert sum(statistics["fills"]) == manifest["n_rows"]
    assert (sum(statistics["sides"]), manifest["n_records"], manifest["n_bad"]) == (1, 12, 0)
    loader = RowLoader({"all": (tmp_path / "out", 1.0)}, 2, seed=0)
    n_rows = manifest["n_rows"]
    seen = Counter(row for step in range(n_rows) for _, row in loader.sample_ids(step))
    assert seen == dict.fromkeys(range(n_rows), 2)
    assert loader.batch(0).inputs.shape == (2, 40)
    write_report(manifest, tmp_path)
    assert "| pair | 1 | 8.33% |" in (tmp_path / "report.md").read_text()
    with PIL.Image.open(tmp_path / "report.png") as png:
        assert png.width > 800


def test_a_run_that_was_cut_off_goes_on_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    source = write_texts(tmp_path / "s", 12)
    undisturbed = prepared(source, tmp_path / "whole")

    def two_then_die(corpus: Corpus, work: Work, numbers: Sequence[int]) -> None:
        run_here(corpus, work, numbers[:2])
        (corpus.folder(2).parent / "00002.tmp-dead").mkdir()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_corpus(plan(source, tmp_path / "out"), two_then_die)
    with pytest.raises(UserError, match="holds no prepared rows"):
        Rows.open(tmp_path / "out")
    done = []

    def rest(corpus: Corpus, work: Work, numbers: Sequence[int]) -> None:
        done.extend(numbers)
        run_here(corpus, work, numbers)

    manifest = prepare_corpus(plan(source, tmp_path / "out"), rest)
    assert done == [2]
    assert manifest == undisturbed
    assert sums(tmp_path / "out") == sums(tmp_path / "whole")
    assert list(tmp_path.rglob("*.tmp*")) == []
    # a shard that has been cut short since is made again, and nothing else is
    file = tmp_path / "out/shards/00001/tokens.npy"
    file.write_bytes(file.read_bytes()[:-2])
    prepare_corpus(plan(source, tmp_path / "out"), rest)
    prepare_corpus(plan(source, tmp_path / "out"), rest)
    assert done == [2, 1]
    assert sums(tmp_path / "out") == sums(tmp_path / "whole")


def test_another_option_input_or_tokenizer_is_refused(tmp_path: Path) -> None:
    source, out = write_texts(tmp_path / "s", 6), tmp_path / "out"
    prepared(source, out)
    with pytest.raises(UserError, match="begun otherwise: row_len was 40, is 50"):
        plan(source, out, replace(CONFIG, row_len=50))
    with pytest.raises(UserError, match="tokenizer was letters, is others"):
        plan_corpus(shards_of(str(source), None, 4), out, CONFIG, "others", Letters, SKIP)
    plan(source, out, bad=SKIP)  # what is done about bad records may change
    (source / "0001.md").write_text("changed")
    with pytest.raises(UserError, match=r"the input .*/s has changed"):
        plan(source, out)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other things already"):
        plan(source, tmp_path / "full")


def test_bad_records_are_left_out_listed_and_limited(tmp_path: Path) -> None:
    source = write_texts(tmp_path / "s", 8)
    (source / "0003.md").write_bytes(b"\xff")
    (source / "0005.md").write_text("caf\u00e9")  # this tokenizer refuses it
    write_pair(source, "long", (4, 4))
    (source / "long.txt").write_text("l" * 100)
    with pytest.raises(UserError, match=r"0003\.md: not UTF-8"):
        prepared(source, tmp_path / "raise")
    manifest = prepared(source, tmp_path / "out", bad=SKIP)
    assert (manifest["n_bad"], manifest["n_records"]) == (3, 9)
    lines = [json.loads(line) for f in sorted((tmp_path / "out/quarantine").iterdir())
             for line in f.read_text().splitlines()]  # fmt: skip
    assert [Path(line["record"]).name for line in lines] == ["0003.md", "0005.md", "long.png"]
    assert "has 108 tokens, a row 40" in lines[2]["reason"]
    good = tmp_path / "good"
    good.mkdir()
    for i in (0, 1, 2, 4, 6, 7):
        (good / f"{i}.md").write_bytes((source / f"000{i}.md").read_bytes())
    prepared(good, tmp_path / "ok", files=100)
    assert sorted(texts_in(tmp_path / "out")) == sorted(texts_in(tmp_path / "ok"))
    for i in range(20):
        (source / f"9{i}.md").write_bytes(b"")
    with pytest.raises(UserError, match=r"1\d of the first \d+ records of .* limit of 0.10%"):
        prepared(source, tmp_path / "many", bad=SKIP)


def test_pictures_that_are_too_small_or_narrow_are_left_out(tmp_path: Path) -> None:
    source = tmp_path / "s"
    source.mkdir()
    for name, size in [("ok", (20, 30)), ("small", (9, 30)), ("narrow", (20, 50))]:
        write_pair(source, name, size)
    config = replace(CONFIG, min_side=10, max_aspect=2.0)
    manifest = prepared(source, tmp_path / "out", config)
    assert manifest["left_out"] == {"duplicate": 0, "small": 1, "narrow": 1}
    assert manifest["n_documents"] == 1


def test_equal_records_are_kept_once_over_all_shards(tmp_path: Path) -> None:
    source = write_texts(tmp_path / "s", 3)
    for name, colour in [("1", "red"), ("2", "blue"), ("3", "red"), ("9", "red")]:
        write_pair(source, name, (4, 4), colour)
    (source / "a.md").write_text((source / "0001.md").read_text())
    (source / "b.md").write_bytes(b"\xff")
    (source / "c.md").write_bytes(b"\xfe")
    config = replace(CONFIG, dedup="exact")
    manifest = prepared(source, tmp_path / "out", config, SKIP, files=2)
    assert (manifest["left_out"]["duplicate"], manifest["n_bad"]) == (3, 2)
    texts = texts_in(tmp_path / "out")
    assert sorted(t.replace("P", "") for t in texts) == sorted(
        ["a red one", "a blue one", *((source / f"000{i}.md").read_text() for i in range(3))]
    )


def test_texts_that_are_nearly_equal_are_kept_once(tmp_path: Path) -> None:
    source = tmp_path / "s"
    source.mkdir()
    words = [a + b for a in "abcdefghijklmn" for b in "opqrstuvwxyz"]  # digits count as one
    texts = {
        "a": " ".join(words),
        "b": " ".join([*words[:-1], "other"]),  # nearly a
        "c": " ".join(reversed(words)),
        "d": " ".join(words),  # equal to a
        "e": "too short",
        "f": "too short",  # no signature, but equal
    }
    for name, text in texts.items():
        (source / f"{name}.md").write_text(text)
    for name in "gh":  # one caption of two pictures
        write_pair(source, name, (4, 4) if name == "g" else (5, 5))
        (source / f"{name}.txt").write_text("one caption of two red pictures")
    manifest = prepared(source, tmp_path / "out", CorpusConfig(1200, dedup="near"), files=3)
    assert manifest["left_out"]["duplicate"] == 3
    kept = sorted(t.replace("P", "") for t in texts_in(tmp_path / "out"))
    assert kept == sorted(
        [texts["a"], texts["c"], texts["e"], *["one caption of two red pictures"] * 2]
    )


def test_processes_and_datatroves_executor_write_the_same_bytes(tmp_path: Path) -> None:
    import dill

    from openchameleon.data.engine import ShardStep, on_cluster

    source = write_texts(tmp_path / "s", 12)
    manifest = prepared(source, tmp_path / "here")
    for name, run in [("processes", local(2)), ("engine", on_cluster("local", 1))]:
        assert prepare_corpus(plan(source, tmp_path / name), run) == manifest
        assert sums(tmp_path / name) == sums(tmp_path / "here")
    step = ShardStep(plan(source, tmp_path / "x"), "prepare", [0])
    assert dill.loads(dill.dumps(step)).corpus == step.corpus  # as Slurm's tasks get it


def test_what_a_cluster_lacks_is_said(tmp_path: Path) -> None:
    from openchameleon.data.engine import on_cluster

    source = write_texts(tmp_path / "s", 2)
    with pytest.raises(UserError, match="does not take these --executor-option"):
        on_cluster("slurm", 1, ["partition=gpu"])(plan(source, tmp_path / "x"), "prepare", [0])
    corpus = plan(source, tmp_path / "y")
    if shutil.which("sbatch") is None:
        with pytest.raises(UserError, match="has no sbatch"):
            on_cluster("slurm", 1, ["partition=gpu", "time=1:00"])(corpus, "prepare", [0])
    if importlib.util.find_spec("ray") is None:
        with pytest.raises(UserError, match="--executor ray needs a package more"):
            on_cluster("ray", 1)(corpus, "prepare", [0])
    with pytest.raises(UserError, match="is not KEY=VALUE"):
        on_cluster("slurm", 1, ["gpu"])


def test_work_that_was_handed_on_is_finished_by_the_same_command(tmp_path: Path) -> None:
    source = write_texts(tmp_path / "s", 12)
    config = replace(CONFIG, dedup="exact")
    queue: list[tuple[Corpus, Work, int]] = []

    def submit(corpus: Corpus, work: Work, numbers: Sequence[int]) -> None:
        queue.extend((corpus, work, i) for i in numbers)

    for work in ("scan", "prepare"):
        assert prepare_corpus(plan(source, tmp_path / "out", config), submit) is None
        assert [w for _, w, _ in queue] == [work] * 3
        while queue:
            do_job(queue.pop())
    assert prepare_corpus(plan(source, tmp_path / "out", config), submit) is not None
    assert len(Rows.open(tmp_path / "out")) > 0


def test_a_worker_that_is_killed_ends_the_work_with_a_sentence() -> None:
    with pytest.raises(UserError, match="A worker process was killed"):
        list(in_processes(die_unless_zero, [0, 1], 1))


def test_a_worker_that_hangs_ends_the_work_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "SILENCE", 1.0)
    with pytest.raises(UserError, match="gave no sign of life for 1 s"):
        list(in_processes(stop_unless_zero, [0, 1], 1))


def test_the_command_prepares_and_goes_on(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    source = write_texts(tmp_path / "s", 3)
    write_pair(source, "p", (30, 20))
    out = tmp_path / "out"
    line = ["prepare", str(source), "--model", str(model_folder), "--out", str(out)]
    assert main([*line, "--workers", "1"]) == 0
    assert "4 documents" in capsys.readouterr().out
    rows = Rows.open(out)
    assert rows.row_len == 64
    assert rows.manifest["statistics"]["tokens"]["image"] == 6
    with monkeypatch.context() as patch:
        patch.setattr(corpus_module, "prepare_shard", None)  # nothing is left to do
        assert main([*line, "--workers", "1"]) == 0
    for more, words in [
        (["--row-len", "32"], "row_len was 64, is 32"),
        (["--row-len", "1"], "row_len = 1 is no row"),
        (["--max-aspect", "0.5"], "an aspect at least 1"),
        (["--bad-limit", "2"], "no share of records"),
        (["--workers", "0"], "--workers is 0"),
        (["--executor-option", "a=b"], "is for slurm and ray"),
        (["--out", str(source / "rows")], "lies inside the source"),
        (["--out", str(model_folder)], "holds other things already"),
        (["--kind", "parquet"], r"holds no .parquet files"),
    ]:
        assert main([*line, *more]) == 2
        assert words in capsys.readouterr().err
    assert not (source / "lock").exists()
    alone = tmp_path / "tokenizers"
    shutil.copytree(model_folder / "image_tokenizer", alone / "image_tokenizer")
    shutil.copy(model_folder / "tokenizer.model", alone)
    line[3], line[5] = str(alone), str(tmp_path / "again")
    assert main(line) == 2
    assert "holds tokenizers alone: give --row-len" in capsys.readouterr().err
    assert main([*line, "--workers", "1", "--row-len", "64"]) == 0
    assert sums(tmp_path / "again") == sums(out)
