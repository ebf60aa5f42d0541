"""Tables, tars and far places: every form gives the same records, and a broken one says where."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import fsspec
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from openchameleon.data.sources import count_records, read_records, shards_of
from openchameleon.data.sources.bad import BadPolicy, BadRecords
from openchameleon.document import Conversation, Document, Image, Text
from openchameleon.errors import UserError

COLOURS = ["red", "green", "blue", "white", "black", "yellow"]


def png(colour: str) -> bytes:
    file = io.BytesIO()
    PIL.Image.new("RGB", (4, 4), colour).save(file, "png")
    return file.getvalue()


def tar_of(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def shown(source: Path | str) -> list[list[object]]:
    """The documents of a source: texts, and the colours of pictures."""
    records = read_records(source, pairs="documents")
    return [
        [s.text if isinstance(s, Text) else s.pil.getpixel((0, 0)) for s in record]
        for record in records
        if isinstance(record, Document)
    ]


@pytest.fixture
def memory() -> Iterator[str]:
    """The root of an empty file system in memory."""
    files = fsspec.filesystem("memory")
    files.store.clear()
    yield "memory://data"
    files.store.clear()


def put(location: str, data: bytes) -> str:
    with fsspec.open(location, "wb") as file:
        file.write(data)
    return location


def test_a_tar_is_read_key_by_key(tmp_path: Path) -> None:
    file = tmp_path / "a.tar"
    members = {
        "x/1.PNG": png("red"),
        "x/1.txt": b"Red.",
        "x/2.json": b'{"caption": "Blue."}',
        "x/2.png": png("blue"),
        "x/2.cls": b"7",
        "3.txt": b"Only words.",
    }
    file.write_bytes(tar_of(members))
    red, blue, words = shown(file)
    assert sorted(map(str, red)) == ["(255, 0, 0)", "Red."]
    assert sorted(map(str, blue)) == ["(0, 0, 255)", "Blue."]
    assert words == ["Only words."]
    assert count_records(file) == 3
    (tmp_path / "b.tar").write_bytes(tar_of({"9.txt": b"Second shard."}))
    (tmp_path / "README.md").write_text("No record.")
    assert [s.location for s in shards_of(str(tmp_path))] == [str(file), str(tmp_path / "b.tar")]
    assert shown(tmp_path)[-1] == ["Second shard."]


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"1.png": png("red")}, "a.tar/1: there is no .txt or .json beside .png"),
        ({"1.png": png("red")[:45], "1.txt": b"Red."}, "a.tar/1: The picture is "),
        ({"1.png": png("red"), "1.jpg": b"", "1.txt": b"?"}, "2 pictures have one key"),
        ({"1.png": png("red"), "1.json": b"[]"}, "has no text in caption or text"),
        ({"1.png": png("red"), "1.json": b"{"}, "a.tar/1: "),
        ({"1.txt": b"\xff"}, "a.tar/1: not UTF-8 text"),
    ],
)
def test_a_record_of_a_tar_that_cannot_be_used_is_named(
    tmp_path: Path, members: dict[str, bytes], words: str
) -> None:
    (tmp_path / "a.tar").write_bytes(tar_of({"0.txt": b"Good."} | members | {"9.txt": b"Too."}))
    with pytest.raises(UserError, match=words.replace(".", r"\.")):
        shown(tmp_path / "a.tar")
    bad = BadRecords(BadPolicy("skip"))
    texts = [r.text for r in read_records(tmp_path / "a.tar", bad=bad) if isinstance(r, Document)]
    assert (texts, bad.n_bad, bad.n_records) == (["Good.", "Too."], 1, 3)


def table(path: Path, **columns: list[object]) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=2)
    return path


def test_parquet_gives_pairs_from_bytes_or_structs_and_texts_alone(tmp_path: Path) -> None:
    data = [png(c) for c in COLOURS]
    plain = table(tmp_path / "a.parquet", image=data, caption=COLOURS)
    structs = [{"bytes": d, "path": None} for d in data]
    hub = table(tmp_path / "hub.parquet", image=structs, text=COLOURS)
    for file in (plain, hub):
        records = shown(file)
        assert [next(s for s in r if isinstance(s, str)) for r in records] == COLOURS
        assert {len(r) for r in records} == {2}
    assert shown(table(tmp_path / "t.parquet", text=["one", "two"])) == [["one"], ["two"]]
    assert count_records(plain) == 6
    with pytest.raises(UserError, match=r"has no column caption or text .* only words"):
        shown(table(tmp_path / "w.parquet", words=["one"]))


def test_parallel_lists_give_documents_in_their_order(tmp_path: Path) -> None:
    (tmp_path / "beside.png").write_bytes(png("blue"))
    red, blue = png("red"), "beside.png"
    file = table(tmp_path / "a.parquet", texts=[["A ", None, "B"], [None]], images=[
        [None, red, None], [red]])  # fmt: skip
    assert shown(file) == [["A ", (255, 0, 0), "B"], [(255, 0, 0)]]
    paths = table(tmp_path / "b.parquet", texts=[[None, "C", None]], images=[[blue, None, None]])
    assert shown(paths) == [[(0, 0, 255), "C"]]
    for texts, images, words in [
        (["A"], [red], "place 1 holds a text and a picture"),
        (["A"], [None, red], "not two lists of one length"),
        ([None], [None], "empty"),
        ([None], [png("red")[:50]], "damaged"),
    ]:
        broken = table(tmp_path / "c.parquet", texts=[texts], images=[images])
        with pytest.raises(UserError, match=rf"c\.parquet:1: .*{words}"):
            shown(broken)


@pytest.mark.parametrize("name", ["a.tar", "a.parquet"])
@pytest.mark.parametrize("left", [0, 1, 0.4, 0.41])
def test_a_file_cut_off_anywhere_is_named_and_skipped_after_what_it_holds(
    tmp_path: Path, name: str, left: float
) -> None:
    file = tmp_path / name
    if name == "a.tar":
        file.write_bytes(tar_of({f"{i}.txt": f"Text {i}.".encode() * 50 for i in range(20)}))
    else:
        table(file, text=[f"Text {i}." * 50 for i in range(20)])
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * left) if left != 1 else 1])
    with pytest.raises(UserError, match=rf"{name} cannot be read on after \d+ records"):
        shown(file)
    bad = BadRecords(BadPolicy("skip"), "s", tmp_path / "bad.jsonl")
    n = sum(1 for _ in read_records(file, bad=bad))
    assert (bad.n_bad, bad.n_records) == (1, n + 1)
    assert name in json.loads((tmp_path / "bad.jsonl").read_text())["reason"]


def test_a_damaged_header_is_not_taken_for_the_end_of_a_tar(tmp_path: Path) -> None:
    data = bytearray(tar_of({f"{i}.txt": b"Text." for i in range(5)}))
    data[2 * 1024 : 2 * 1024 + 9] = b"\xff" * 9
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(UserError, match="cannot be read on after 1 records: bad checksum"):
        shown(tmp_path / "a.tar")


def test_any_source_may_lie_on_another_file_system(tmp_path: Path, memory: str) -> None:
    put(f"{memory}/tar/a.tar", tar_of({"1.txt": b"tar"}))
    table(tmp_path / "t.parquet", text=["parquet"])
    put(f"{memory}/parquet/a.parquet", (tmp_path / "t.parquet").read_bytes())
    lines = '{"segments": [{"text": "jsonl"}, {"image": "p/red.png"}]}\n'
    put(f"{memory}/jsonl/records.jsonl", lines.encode())
    put(f"{memory}/jsonl/p/red.png", png("red"))
    put(f"{memory}/plain/a.py", b"x = 1")
    put(f"{memory}/plain/sub/cat.png", png("blue"))
    put(f"{memory}/plain/sub/cat.txt", b"Blue.")
    assert shown(f"{memory}/tar") == [["tar"]]
    assert shown(f"{memory}/parquet/a.parquet") == [["parquet"]]
    assert shown(f"{memory}/jsonl") == [["jsonl", (255, 0, 0)]]
    code, cat = shown(f"{memory}/plain/")
    assert code == ["x = 1"]
    assert sorted(map(str, cat)) == ["(0, 0, 255)", "Blue."]
    with pytest.raises(UserError, match="no folder or file memory://data/absent"):
        shown(f"{memory}/absent")
    put(f"{memory}/bad/records.jsonl", b'{"segments": [{"image": "http://x/y.png"}]}')
    with pytest.raises(UserError, match="only files of the source itself"):
        shown(f"{memory}/bad")
    with pytest.raises(UserError, match="nothing://x cannot be opened"):
        shown("nothing://x")


def test_pairs_are_conversations_or_documents_in_one_order(tmp_path: Path) -> None:
    for i in range(40):
        (tmp_path / f"{i}.png").write_bytes(png("red"))
        (tmp_path / f"{i}.txt").write_text("Red.")
    documents = [r for r in read_records(tmp_path, "documents") if isinstance(r, Document)]
    chats = [r for r in read_records(tmp_path, "chat") if isinstance(r, Conversation)]
    first = [type(document.segments[0]) for document in documents]
    assert 10 <= first.count(Image) <= 30
    assert first == [type(chat.messages[0].document.segments[0]) for chat in chats]


def test_a_large_folder_is_several_shards_of_files_in_order(tmp_path: Path) -> None:
    for i in range(7):
        (tmp_path / f"{i}.py").write_text(f"x = {i}")
    shards = shards_of(str(tmp_path), files_a_shard=3)
    assert [s.names for s in shards] == [("0.py", "1.py", "2.py"), ("3.py", "4.py", "5.py"),
                                         ("6.py",)]  # fmt: skip
    before = shards[0].stamps()
    (tmp_path / "1.py").write_text("y = 1.5")
    assert shards[0].stamps() != before
    (tmp_path / "cat.png").write_bytes(png("red"))
    cat = shards_of(str(tmp_path / "cat.png"))[0]
    before = cat.stamps()
    (tmp_path / "cat.txt").write_text("A cat.")
    assert cat.stamps() != before
    with pytest.raises(UserError, match=r"holds no \.jsonl files"):
        shards_of(str(tmp_path), "jsonl")


def test_a_package_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = table(tmp_path / "a.parquet", text=["one"])
    for name in ("fsspec", "pyarrow.parquet", "datatrove.data", "datatrove.executor.base"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("near", "engine"):
        monkeypatch.delitem(sys.modules, f"openchameleon.data.{name}", raising=False)
        with pytest.raises(UserError, match=r"datatrove: pip install 'openchameleon\[data\]'"):
            import_module(f"openchameleon.data.{name}")
    for source, package in [(str(file), "pyarrow"), ("memory://x", "fsspec")]:
        with pytest.raises(UserError, match=rf"install {package}: pip install"):
            shown(source)
