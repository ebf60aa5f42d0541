"""Sources, packing, preparation and the loader: nothing lost, nothing cut, one order."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from letters import VOCAB, Letters

from openchameleon.data.loader import RowLoader, make_batch, permuted
from openchameleon.data.pack import (
    ARRAYS,
    Encoded,
    Rows,
    joined_manifest,
    pack,
    save_manifest,
    write_rows,
)
from openchameleon.data.prepare import prepare
from openchameleon.data.sources import count_records, read_records
from openchameleon.data.sources.bad import FEW, BadPolicy, BadRecords
from openchameleon.document import Conversation, Document, Image, Record, Text, documents_of
from openchameleon.errors import UserError
from openchameleon.files import sha256_of
from openchameleon.train.run_folder import claim
from openchameleon.vocab import Vocab


def picture(path: Path, colour: str = "red") -> None:
    PIL.Image.new("RGB", (4, 4), colour).save(path)


def write_jsonl(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def make_rows(folder: Path, n: int, first: int = 0, row_len: int = 4) -> Path:
    """`n` rows of one document; the second token of row i is the text id i + `first`."""
    folder.mkdir(parents=True)
    rows = [[([0, VOCAB.text_start + i + first, 2], [0, 1, 1])] for i in range(n)]
    save_manifest(folder, write_rows(rows, folder, row_len, VOCAB))
    return folder


# sources


def test_records_are_read_lazily_and_in_order(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", "blue")
    write_jsonl(
        tmp_path / "records.jsonl",
        {"segments": [{"text": "A "}, {"image": "a.png"}]},
        {
            "messages": [
                {"role": "user", "segments": [{"text": "q"}]},
                {"role": "assistant", "segments": [{"text": "a"}]},
            ]
        },
        {"segments": [{"image": "absent.png"}]},
    )
    records = read_records(tmp_path)
    first, second = next(records), next(records)
    assert isinstance(first, Document)
    assert first.text == "A "
    assert first.images[0].getpixel((0, 0)) == (0, 0, 255)
    assert isinstance(second, Conversation)
    assert count_records(tmp_path) == count_records(tmp_path / "records.jsonl") == 3
    with pytest.raises(UserError, match=r"records\.jsonl:3: .*absent\.png"):
        next(records)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        ("{}", '"segments" or "messages"'),
        ('{"segments": [{"text": 5}]}', '"text" must be a string'),
        ('{"segments": [{"image": 5}]}', '"image" must be a path'),
        ('{"segments": [{"txt": "a"}]}', "exactly one of"),
        ('{"messages": [{"segments": []}]}', "lacks 'role'"),
        ('{"messages": [{"role": "assistant", "segments": []}]}', "expected 'user'"),
        ('{"messages": [{"role": "user", "segments": []}]}', "end with the assistant's turn"),
        ('{"messages": []}', "end with the assistant's turn"),
        ('{"messages": 5}', "not iterable"),
    ],
)
def test_a_malformed_record_is_named_by_file_and_line(
    line: str, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text('{"segments": []}\n\n' + line + "\n")
    records = read_records(file)
    next(records)
    with pytest.raises(UserError, match=message) as error:
        next(records)
    assert f"{file}:3: " in str(error.value)


def test_captioned_pictures_are_conversations_in_both_directions(tmp_path: Path) -> None:
    for i in range(40):
        picture(tmp_path / f"p{i:02}.png")
        (tmp_path / f"p{i:02}.txt").write_text(f"Picture {i}.\n")

    def kinds() -> list[list[type]]:
        turns = [documents_of(record) for record in read_records(tmp_path)]
        return [[type(segment) for turn in both for segment in turn] for both in turns]

    counts = Counter(tuple(kind) for kind in kinds())
    assert set(counts) == {(Text, Image), (Image, Text)}
    assert counts.total() == count_records(tmp_path) == 40
    assert 10 <= counts[Text, Image] <= 30
    assert kinds() == kinds()
    texts = ["".join(d.text for d in documents_of(record)) for record in read_records(tmp_path)]
    assert texts == [f"Picture {i}." for i in range(40)]


def test_bytes_that_are_no_text_name_their_file(tmp_path: Path) -> None:
    (tmp_path / "records.jsonl").write_bytes(b'{"segments": [{"text": "\xff"}]}')
    with pytest.raises(UserError, match=r"records\.jsonl:1: not UTF-8"):
        list(read_records(tmp_path))


def test_a_picture_without_a_caption_is_named(tmp_path: Path) -> None:
    picture(tmp_path / "cat.png")
    with pytest.raises(UserError, match=r"cat\.png has no caption: write it in cat\.txt"):
        list(read_records(tmp_path))


def test_a_plain_folder_is_pictures_with_captions_texts_and_code_in_order(tmp_path: Path) -> None:
    for name in ("b.py", "a.md", "sub/c.rst", "sub/note.txt", ".hidden.py", ".git/x.py", "d.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}")
    picture(tmp_path / "sub/cat.PNG")
    (tmp_path / "sub/cat.txt").write_text("A cat.")
    texts = ["".join(d.text for d in documents_of(record)) for record in read_records(tmp_path)]
    assert texts == [
        "text of a.md",
        "text of b.py",
        "text of sub/c.rst",
        "A cat.",
        "text of sub/note.txt",
    ]
    assert count_records(tmp_path) == 5
    kinds = [type(record) for record in read_records(tmp_path)]
    assert kinds == [Document, Document, Document, Conversation, Document]
    (one,) = read_records(tmp_path / "b.py")
    assert isinstance(one, Document)
    assert one.text == "text of b.py"


def test_files_that_are_empty_or_no_text_are_bad_records(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes(b"")
    (tmp_path / "b.py").write_bytes(b"# caf\xe9")
    (tmp_path / "c.py").write_text("x = 1")
    with pytest.raises(UserError, match=r"a\.py: empty"):
        list(read_records(tmp_path))
    (tmp_path / "a.py").write_text("y = 2")
    with pytest.raises(UserError, match=r"b\.py: not UTF-8 text"):
        list(read_records(tmp_path))


def test_bad_records_are_skipped_listed_and_leave_the_order(tmp_path: Path) -> None:
    lines = [json.dumps({"segments": [{"text": str(i)}]}) for i in range(50)]
    good = [line for i, line in enumerate(lines) if i not in (7, 8, 30)]
    lines[7], lines[8], lines[30] = "{", '{"segments": [{"image": "absent.png"}]}', "\x00"
    source = tmp_path / "mine.jsonl"
    source.write_text("\n".join(lines))
    bad = BadRecords(BadPolicy("skip"), "mine", tmp_path / "bad.jsonl")
    texts = [r.text for r in read_records(source, bad=bad) if isinstance(r, Document)]
    assert texts == [json.loads(line)["segments"][0]["text"] for line in good]
    assert (bad.n_records, bad.n_bad) == (50, 3)
    listed = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert [line["record"] for line in listed] == [f"{source}:{n}" for n in (8, 9, 31)]
    assert {line["shard"] for line in listed} == {"mine"}
    assert "absent.png" in listed[1]["reason"]


def test_more_bad_records_than_the_limit_stop_the_reading(tmp_path: Path) -> None:
    source = tmp_path / "mine.jsonl"
    source.write_text('{"segments": []}\n' * 100 + "{\n" * (FEW + 1))
    with pytest.raises(UserError, match=rf"{FEW + 1} of the first 111 records .* limit of 0.10%"):
        list(read_records(source, bad=BadRecords(BadPolicy("skip"))))
    generous = BadRecords(BadPolicy("skip", limit=0.2))
    assert len(list(read_records(source, bad=generous))) == 100


def test_an_absent_or_empty_source_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder or file"):
        read_records(tmp_path / "x")
    with pytest.raises(UserError, match=r"neither records\.jsonl nor pictures, texts"):
        read_records(tmp_path)


# packing


@given(
    lengths=st.lists(st.integers(1, 20), max_size=80),
    row_len=st.integers(20, 50),
    buffer=st.integers(1, 100),
)
@settings(max_examples=100, deadline=None)
def test_packing_cuts_no_document_and_loses_no_token(
    lengths: list[int], row_len: int, buffer: int
) -> None:
    documents = [([i] * n, [i % 2] * n) for i, n in enumerate(lengths)]
    rows = list(pack(documents, row_len, buffer))
    assert all(0 < sum(len(ids) for ids, _ in row) <= row_len for row in rows)
    assert sorted(d for row in rows for d in row) == sorted(documents)
    # best fit never leaves two rows of one buffer that would fit in one
    if len(lengths) < buffer:
        used = sorted(sum(len(ids) for ids, _ in row) for row in rows)
        assert len(used) < 2 or used[0] + used[1] > row_len


def test_packing_fills_rows_of_ordinary_documents() -> None:
    lengths = np.random.default_rng(0).integers(20, 200, 5000)
    rows = list(pack((([1] * n, [1] * n) for n in lengths), 512))
    assert lengths.sum() / (len(rows) * 512) > 0.98


def test_a_document_longer_than_a_row_is_named_with_its_length() -> None:
    with pytest.raises(UserError, match="Document 2 has 9 tokens, a row 8"):
        list(pack([([1] * 8, [1] * 8), ([1] * 9, [1] * 9)], 8))


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=30))
@settings(max_examples=25, deadline=None)
def test_rows_on_disk_give_back_the_documents(
    lengths: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    documents = [([3 + i] * n, [i % 2] * n) for i, n in enumerate(lengths)]
    save_manifest(folder, manifest := write_rows(pack(documents, 10), folder, 10, VOCAB))
    rows = Rows.open(folder)
    found = []
    for tokens, ids, mask in zip(rows.tokens, rows.doc_ids, rows.loss_mask, strict=True):
        assert (tokens[ids == 0] == VOCAB.pad_id).all()
        assert not mask[ids == 0].any()
        for d in range(1, ids.max() + 1):
            found.append((tokens[ids == d].tolist(), mask[ids == d].tolist()))
    assert sorted(found) == sorted(documents)
    assert manifest["n_tokens"] == sum(lengths)
    assert manifest["n_documents"] == len(lengths)
    assert (rows.tokens.dtype, rows.doc_ids.dtype, rows.loss_mask.dtype) == (
        np.uint16,
        np.uint16,
        np.uint8,
    )


def test_ids_above_sixteen_bits_are_kept(tmp_path: Path) -> None:
    big = Vocab.compact(n_codes=8, codes_per_item=4, n_text=100_000)
    manifest = write_rows([[([99_999], [1])]], tmp_path, 2, big)
    save_manifest(tmp_path, manifest)
    assert Rows.open(tmp_path).tokens[0, 0] == 99_999


def test_damaged_rows_are_named(tmp_path: Path) -> None:
    folder = make_rows(tmp_path / "rows", 8)
    file = folder / "tokens.npy"
    whole = file.read_bytes()
    for data, message in [
        (whole[:-9], "tokens.npy cannot be read"),
        (b"", "tokens.npy cannot be read"),
        (whole[:-1] + bytes([whole[-1] ^ 1]), "tokens.npy differs"),
    ]:
        file.write_bytes(data)
        with pytest.raises(UserError, match=message):
            Rows.open(folder)
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="is not the manifest"):
        Rows.open(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match="holds no prepared rows"):
        Rows.open(folder)


# preparation


def test_preparing_a_folder_gives_rows_and_their_manifest(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("red")
    out = tmp_path / "out"
    manifest = prepare(tmp_path, Letters(), out, row_len=16)
    rows = Rows.open(out)
    assert rows.manifest == manifest
    assert (len(rows), manifest["n_documents"], manifest["n_tokens"]) == (1, 1, 2 + 3 + 6)
    assert list(tmp_path.glob("out.tmp*")) == []
    with pytest.raises(UserError, match="exists already"):
        prepare(tmp_path, Letters(), out, row_len=16)


def test_only_answers_are_learned_unless_told_otherwise(tmp_path: Path) -> None:
    turns = [
        {"role": "user", "segments": [{"text": "abc"}]},
        {"role": "assistant", "segments": [{"text": "de"}]},
    ]
    source = write_jsonl(tmp_path / "c.jsonl", {"messages": turns})
    answers = prepare(source, Letters(), tmp_path / "answers", 8)
    everything = prepare(source, Letters(), tmp_path / "all", 8, answers_only=False)
    assert answers["n_learned_tokens"] == 3
    assert everything["n_learned_tokens"] == 6


def test_a_long_text_is_cut_and_loses_no_token(tmp_path: Path) -> None:
    text = "".join(chr(97 + i % 26) for i in range(28))
    manifest = prepare([Document([text])], Letters(), tmp_path / "a", 10)
    assert (manifest["n_documents"], manifest["n_tokens"]) == (3, 30)
    tokens = Rows.open(tmp_path / "a").tokens.flatten().tolist()
    assert tokens == [0, *(VOCAB.text_start + ord(c) for c in text), 2]


def test_a_long_record_with_a_picture_or_none_is_an_error(tmp_path: Path) -> None:
    red = Image(PIL.Image.new("RGB", (4, 4), "red"))
    records = [Document(["a" * n, red]) for n in (2, 30)]
    with pytest.raises(UserError, match="Record 2 has 38 tokens, a row 10"):
        prepare(records, Letters(), tmp_path / "a", 10)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="nothing to prepare"):
        prepare([], Letters(), tmp_path / "a", 10)


def test_a_failure_midway_leaves_no_folder(tmp_path: Path) -> None:
    def records() -> Iterator[Document]:
        yield Document(["a"])
        raise RuntimeError("the disk went away")

    (tmp_path / "out.tmp-killed").mkdir()
    with pytest.raises(RuntimeError, match="went away"):
        prepare(records(), Letters(), tmp_path / "out", 8, batch=1)
    assert list(tmp_path.iterdir()) == []


def test_a_corpus_is_encoded_a_batch_at_a_time(tmp_path: Path) -> None:
    sizes = []

    class Counting(Letters):
        def encode_many(self, records: Sequence[Record], answers_only: bool) -> list[Encoded]:
            sizes.append(len(records))
            return super().encode_many(records, answers_only)

    prepare((Document(["a"]) for _ in range(10)), Counting(), tmp_path / "o", 8, batch=4)
    assert sizes == [4, 4, 2]


# batches


def test_a_batch_predicts_the_next_token_of_the_same_document() -> None:
    batch = make_batch(
        np.array([[5, 6, 7, 8, 9, 1]], np.uint16),
        np.array([[1, 1, 1, 2, 2, 0]], np.uint16),
        np.array([[0, 0, 1, 0, 1, 0]], np.uint8),
        pad_id=1,
    )
    assert batch.inputs.tolist() == [[5, 6, 7, 8, 9, 1]]
    assert batch.targets.tolist() == [[6, 7, 1, 9, 1, 1]]
    assert batch.loss_weights.tolist() == [[0, 1, 0, 1, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 0]]
    assert batch.doc_ids.tolist() == [[1, 1, 1, 2, 2, 0]]
    assert batch.n_tokens == 5


@given(n=st.integers(1, 100), key=st.text(max_size=5))
@settings(max_examples=40, deadline=None)
def test_permuted_is_a_permutation(n: int, key: str) -> None:
    assert sorted(permuted(i, n, key) for i in range(n)) == list(range(n))


def test_permutations_differ_between_keys_and_look_random() -> None:
    a, b = ([permuted(i, 1000, key) for i in range(1000)] for key in "ab")
    assert sorted(a) == sorted(b) == list(range(1000))
    assert sum(x == y for x, y in zip(a, b, strict=True)) < 10
    assert abs(np.corrcoef(a, np.arange(1000))[0, 1]) < 0.1
    assert abs(np.corrcoef(a[1:], a[:-1])[0, 1]) < 0.1


def two_streams(tmp_path: Path) -> dict[str, tuple[Path, float]]:
    small, large = tmp_path / "small", tmp_path / "large"
    if not small.exists():
        make_rows(small, 7)
        make_rows(large, 29, first=100)
    return {"small": (small, 1.0), "large": (large, 3.0)}


def test_no_row_returns_within_a_streams_epoch(tmp_path: Path) -> None:
    loader = RowLoader(two_streams(tmp_path), 6, seed=3)
    seen: dict[str, list[int]] = {"small": [], "large": []}
    for step in range(40):
        for name, row in loader.sample_ids(step):
            seen[name].append(row)
    epochs = []
    for name, n_rows in (("small", 7), ("large", 29)):
        for start in range(0, len(seen[name]) - n_rows, n_rows):
            epochs.append(seen[name][start : start + n_rows])
            assert sorted(epochs[-1]) == list(range(n_rows))
    assert epochs[0] != epochs[1]  # each epoch has its own order
    assert len(seen["large"]) == 3 * len(seen["small"])


def test_the_order_does_not_depend_on_the_number_of_ranks(tmp_path: Path) -> None:
    loader = RowLoader(two_streams(tmp_path), 12, seed=3)
    for step in (0, 5, 1000):
        whole = loader.batch(step).inputs.tolist()
        for world in (2, 3, 4):
            ranks = [loader.batch(step, rank, world).inputs.tolist() for rank in range(world)]
            assert [row for rank in ranks for row in rank] == whole
    with pytest.raises(UserError, match="use 1, 2, 3, 4, 6, 12"):
        loader.batch(0, 0, 5)


def test_any_step_can_be_asked_for_in_any_order(tmp_path: Path) -> None:
    loader = RowLoader(two_streams(tmp_path), 4, seed=3)
    forward = [loader.sample_ids(step) for step in range(30)]
    again = RowLoader(two_streams(tmp_path), 4, seed=3)
    assert [again.sample_ids(step) for step in reversed(range(30))] == forward[::-1]
    assert RowLoader(two_streams(tmp_path), 4, seed=4).sample_ids(0) != forward[0]


def test_the_order_is_this_one_on_every_machine(tmp_path: Path) -> None:
    loader = RowLoader(two_streams(tmp_path), 6, seed=0)
    assert loader.sample_ids(0) == [
        ("large", 24),
        ("small", 1),
        ("large", 19),
        ("large", 6),
        ("large", 0),
        ("small", 6),
    ]


def test_a_change_of_weights_between_stages_repeats_no_row(tmp_path: Path) -> None:
    streams = two_streams(tmp_path)
    first = RowLoader(streams, 4, seed=1)
    seen = [s for step in range(3) for s in first.sample_ids(step)]
    used = first.rows_used(3)
    assert used == dict(Counter(name for name, _ in seen))
    weights = {"small": (streams["small"][0], 1.0), "large": (streams["large"][0], 1.0)}
    second = RowLoader(weights, 4, seed=1, start=used)
    seen += [s for step in range(2) for s in second.sample_ids(step)]
    assert len(set(seen)) == len(seen)


def test_streams_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    streams = {"a": (make_rows(tmp_path / "a", 2), 1.0)}
    streams["b"] = (make_rows(tmp_path / "b", 2, row_len=5), 1.0)
    with pytest.raises(UserError, match=r"row_len 5, .* with 4"):
        RowLoader(streams, 2, seed=0)


def test_an_id_outside_the_vocabulary_is_refused_at_reading(tmp_path: Path) -> None:
    first = VOCAB.size - VOCAB.text_start
    loader = RowLoader({"a": (make_rows(tmp_path / "a", 1, first=first), 1.0)}, 1, seed=0)
    with pytest.raises(UserError, match=f"Row 0 of 'a' holds id {VOCAB.size} of a {VOCAB.size}-id"):
        loader.batch(0)


PICTURE = VOCAB.image.ids_from_codes([0, 7, 3, 1])


@pytest.mark.parametrize(
    ("documents", "ok"),
    [
        ([[0, *PICTURE, *PICTURE, 20, 2]], True),
        ([PICTURE, PICTURE], True),
        ([[20, 21]], True),
        ([[0, *PICTURE[:3], *PICTURE[4:]]], False),  # a code too few
        ([[0, *PICTURE[:3], 5, *PICTURE[3:]]], False),  # a code too many
        ([[0, *PICTURE[:-1]]], False),  # no end
        ([[0, *PICTURE[1:]]], False),  # no begin
        ([PICTURE[:3], PICTURE[3:]], False),  # cut between two documents
        ([[0, *PICTURE[:3], 20, *PICTURE[4:]]], False),  # text inside
        ([[0, *PICTURE[:3], PICTURE[0], *PICTURE[4:]]], False),  # a begin inside
        ([[20, 5, 20]], False),  # a code outside
        ([[20, PICTURE[-1]]], False),  # an end outside
    ],
)
def test_a_picture_that_is_not_whole_is_refused_at_reading(
    tmp_path: Path, documents: list[list[int]], ok: bool
) -> None:
    rows = [[([20], [1])], [(d, [1] * len(d)) for d in documents]]
    save_manifest(tmp_path, write_rows(rows, tmp_path, 16, VOCAB))
    loader = RowLoader({"a": (tmp_path, 1.0)}, 2, seed=0)
    if ok:
        loader.batch(0)
    else:
        with pytest.raises(UserError, match="Row 1 of 'a' breaks the image at token"):
            loader.batch(0)


def test_a_picture_that_the_end_of_a_row_cuts_is_refused(tmp_path: Path) -> None:
    save_manifest(tmp_path, write_rows([[(PICTURE[:-1], [1] * 5)]], tmp_path, 5, VOCAB))
    with pytest.raises(UserError, match="Row 0 of 'a' breaks the image at token 0"):
        RowLoader({"a": (tmp_path, 1.0)}, 1, seed=0).batch(0)


def make_shards(folder: Path, *sizes: int) -> Path:
    """Shards of rows that are numbered through."""
    firsts = [sum(sizes[:i]) for i in range(len(sizes))]
    for i, (n, first) in enumerate(zip(sizes, firsts, strict=True)):
        make_rows(folder / "shards" / str(i), n, first)
    save_manifest(folder, joined_manifest(folder, [str(i) for i in range(len(sizes))]))
    return folder


def test_shards_are_read_as_one_folder(tmp_path: Path) -> None:
    rows, one = Rows.open(make_shards(tmp_path / "s", 3, 1, 5)), make_rows(tmp_path / "one", 9)
    assert [r.tolist() for r in rows.tokens] == Rows.open(one).tokens.tolist()
    assert (len(rows), rows.row_len, rows.manifest["n_documents"]) == (9, 4, 9)
    many, whole = (RowLoader({"a": (folder, 1.0)}, 4, seed=1) for folder in (tmp_path / "s", one))
    assert many.batch(7).inputs.tolist() == whole.batch(7).inputs.tolist()


def test_a_damaged_or_missing_shard_is_named(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "s", 3, 2)
    tokens, manifest = folder / "shards/1/tokens.npy", folder / "shards/1/manifest.json"
    whole = tokens.read_bytes()
    for data, words in [(whole[:-1], "read"), (b"", "read"), (whole[:-1] + b"\7", "differs")]:
        tokens.write_bytes(data)
        with pytest.raises(UserError, match=rf"shards/1/tokens\.npy .*{words}"):
            Rows.open(folder)
    tokens.write_bytes(whole)
    manifest.write_text(manifest.read_text() + " ")
    with pytest.raises(UserError, match=r"shards/1/manifest\.json differs"):
        Rows.open(folder)
    manifest.unlink()
    with pytest.raises(UserError, match="shards/1 holds no prepared rows"):
        Rows.open(folder)


@pytest.mark.parametrize("array", ARRAYS)
def test_a_run_is_refused_when_its_rows_have_changed_since_it_began(
    tmp_path: Path, array: str
) -> None:
    folder = make_shards(tmp_path / "s", 3, 2)
    run = tmp_path / "run"
    run.mkdir()
    claim(run, {"data": RowLoader({"a": (folder, 1.0)}, 2, seed=0).describe()})
    claim(run, {"data": RowLoader({"a": (folder, 1.0)}, 2, seed=0).describe()})
    changed = np.load(folder / f"shards/1/{array}.npy")
    changed[0, 1] += 1
    np.save(folder / f"shards/1/{array}.npy", changed)
    manifest = Rows.open(folder / "shards/1", verify=False).manifest
    manifest["sha256"][array] = sha256_of(folder / f"shards/1/{array}.npy")
    save_manifest(folder / "shards/1", manifest)
    save_manifest(folder, joined_manifest(folder, ["0", "1"]))
    with pytest.raises(UserError, match=r"a run of another config: data\.rows\.a was"):
        claim(run, {"data": RowLoader({"a": (folder, 1.0)}, 2, seed=0).describe()})


def test_micro_batches_are_the_batch(tmp_path: Path) -> None:
    batch = RowLoader(two_streams(tmp_path), 5, seed=0).batch(0)
    parts = batch.split(2)
    assert [len(p.inputs) for p in parts] == [2, 2, 1]
    assert [row for p in parts for row in p.targets.tolist()] == batch.targets.tolist()
