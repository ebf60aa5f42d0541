"""The id space, plain documents, and strict configuration."""

from __future__ import annotations

import dataclasses
import json
from typing import Literal

import PIL.Image
import pytest

from openchameleon import config as config_io
from openchameleon.document import (
    Conversation,
    Document,
    Image,
    Message,
    Text,
    read_jsonl,
    record_from_json,
    record_to_json,
)
from openchameleon.errors import UserError
from openchameleon.vocab import CodeRange, Vocab


def test_codes_and_ids_are_a_bijection():
    image = Vocab.published().image
    codes = list(range(8192))
    for start in range(0, 8192, 1024):
        ids = image.ids_from_codes(codes[start : start + 1024])
        assert (ids[0], ids[-1], len(ids)) == (8197, 8196, image.item_len)
        assert image.codes_from_ids(ids[1:-1]) == codes[start : start + 1024]


def test_codes_and_ids_outside_the_range_are_refused():
    image = Vocab.compact(10, 2, 5).image
    for codes in ([0], [0, 1, 2], [0, 10], [-1, 0]):
        with pytest.raises(ValueError, match="image"):
            image.ids_from_codes(codes)
    for ids in ([3], [14], [4, 14]):
        with pytest.raises(ValueError, match="image"):
            image.codes_from_ids(ids)


def test_what_may_stand_outside_of_codes_lies_in_a_few_spans():
    published = Vocab.published()
    assert published.spans_outside_codes() == [(2, 3), (8196, 8198), (16384, 65536)]
    assert Vocab.compact(1000, 4, 50).spans_outside_codes() == [(2, 3), (1004, 1057)]
    assert Vocab.compact(10, 4, 50).spans_outside_codes() == [(2, 67)]  # near: all in one


def test_the_published_layout_is_the_released_one():
    v = Vocab.published()
    assert (v.size, v.bos_id, v.pad_id, v.eos_id, v.unk_id, v.eot_id) == (65536, 0, 1, 2, 3, 8710)
    image = v.image
    assert (image.first_id, image.stop_id, image.end_id, image.begin_id) == (4, 8196, 8196, 8197)
    assert (image.count, image.codes_per_item, image.item_len) == (8192, 1024, 1026)
    assert v.range_begun_by(8197) is image
    assert v.range_begun_by(8196) is None
    assert [v.is_text(i) for i in (8710, 16383, 16384, 65535, 65536)] == [0, 0, 1, 1, 0]


def test_the_compact_layout_has_no_gap():
    v = Vocab.compact(n_codes=10, codes_per_item=4, n_text=7)
    image = v.image
    used = [v.bos_id, v.pad_id, v.eos_id, v.unk_id, *range(image.first_id, image.stop_id)]
    used += [image.end_id, image.begin_id, v.eot_id, *range(v.text_start, v.text_stop)]
    assert used == list(range(v.size))


@pytest.mark.parametrize(
    "change",
    [{"eot_id": 2}, {"eot_id": 5}, {"eot_id": 17}, {"eot_id": 24}, {"text_start": 10},
     {"text_stop": 25}, {"bos_id": -1}],
)  # fmt: skip
def test_overlapping_or_outlying_ids_are_refused(change):
    v = Vocab.compact(10, 4, 7)
    with pytest.raises(ValueError, match=r"share|lies among|overlap|outside|exceed"):
        dataclasses.replace(v, **change)


def test_two_code_ranges_must_not_overlap():
    v = Vocab.compact(10, 4, 7)
    audio = CodeRange("audio", begin_id=24, end_id=25, first_id=10, count=4, codes_per_item=2)
    with pytest.raises(ValueError, match="overlap"):
        dataclasses.replace(v, size=30, code_ranges=(v.image, audio))
    apart = dataclasses.replace(audio, first_id=26)
    wider = dataclasses.replace(v, size=30, code_ranges=(v.image, apart))
    assert wider.code_range("audio") is apart
    with pytest.raises(KeyError, match="smell"):
        wider.code_range("smell")


def test_a_vocabulary_survives_json():
    for v in (Vocab.published(), Vocab.compact(10, 4, 7)):
        assert Vocab.from_dict(json.loads(json.dumps(v.to_dict()))) == v


def test_a_document_takes_strings_as_text_and_refuses_the_rest():
    picture = PIL.Image.new("RGB", (2, 2))
    document = Document(["a ", Image(picture), Text("b")])
    assert document.segments[0] == Text("a ")
    assert (document.text, document.images, len(document)) == ("a b", [picture], 3)
    with pytest.raises(TypeError, match="not bytes"):
        Document([b"a"])


def test_turns_alternate_from_the_users():
    ask, answer = Message("user", Document(["q"])), Message("assistant", Document(["a"]))
    assert len(Conversation([ask, answer, ask]).messages) == 3
    for turns in ([answer], [ask, ask], [ask, answer, answer]):
        with pytest.raises(ValueError, match=r"turn \d is"):
            Conversation(turns)
    assert Conversation.ask(Document(["q"])).messages[0].role == "user"


def test_records_survive_json_with_their_pictures():
    pictures: dict[str, PIL.Image.Image] = {}

    def save(picture: PIL.Image.Image) -> str:
        pictures[f"{len(pictures)}.png"] = picture
        return f"{len(pictures) - 1}.png"

    a, b = PIL.Image.new("RGB", (1, 1)), PIL.Image.new("RGB", (2, 2))
    document = Document(["x\n\u2581", Image(a), "y"])
    talk = Conversation([Message("user", document), Message("assistant", Document([Image(b)]))])
    for record in (document, talk):
        line = json.dumps(record_to_json(record, save))
        back = record_from_json(json.loads(line), pictures.__getitem__)
        docs = [
            [r] if isinstance(r, Document) else [m.document for m in r.messages]
            for r in (record, back)
        ]
        assert type(back) is type(record)
        assert [(d.text, d.images) for d in docs[0]] == [(d.text, d.images) for d in docs[1]]


@pytest.mark.parametrize(
    "data",
    [{}, {"segments": "x"}, {"segments": ["x"]}, {"segments": [{}]},
     {"segments": [{"text": "a", "image": "b"}]},
     {"messages": [{"role": "system", "segments": []}]}],
)  # fmt: skip
def test_malformed_records_are_refused(data):
    with pytest.raises(ValueError, match=r"segment|record|turn"):
        record_from_json(data, lambda path: PIL.Image.new("RGB", (1, 1)))


def test_jsonl_errors_name_file_and_line(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"segments": []}\n\n{"segments": [\n')
    lines = read_jsonl(path)
    assert next(lines) == (1, {"segments": []})
    with pytest.raises(ValueError, match=r"data\.jsonl:3: not JSON"):
        next(lines)
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match=r"data\.jsonl:1: not a JSON object"):
        next(read_jsonl(path))


@dataclasses.dataclass(frozen=True, slots=True)
class Inner:
    rate: float = 0.5
    kind: Literal["a", "b"] = "a"
    limit: int | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Outer:
    steps: int = 10
    widths: tuple[int, ...] = (1, 2)
    inner: Inner = Inner()


def test_overrides_reach_into_nested_configs_and_keep_their_types():
    config = config_io.override(
        Outer(), ["steps=3", "inner.rate=1", "inner.kind=b", "inner.limit=7", "widths=[4,5,6]"]
    )
    assert config == Outer(3, (4, 5, 6), Inner(1.0, "b", 7))
    assert isinstance(config.inner.rate, float)
    assert config_io.override(config, ["inner.limit=null"]).inner.limit is None


@pytest.mark.parametrize(
    ("assignment", "message"),
    [("stesp=3", "Unknown key 'stesp'. Did you mean 'steps'"),
     ("inner.rat=3", "Unknown key 'inner.rat'. Did you mean 'rate'"),
     ("steps.x=3", "Unknown key 'steps.x'"), ("steps=1.5", "steps = 1.5 is not of type int"),
     ("steps=true", "not of type int"), ("inner.rate=fast", "inner.rate = 'fast'"),
     ("inner.kind=c", "not one of a, b"), ("widths=[1,\"x\"]", r"widths\[1\]"),
     ("steps", "is not KEY=VALUE")],
)  # fmt: skip
def test_a_bad_override_is_refused_by_its_key(assignment, message):
    with pytest.raises(UserError, match=message):
        config_io.override(Outer(), [assignment])


def test_a_config_survives_json_and_its_hash_follows_every_value():
    data = json.loads(json.dumps(config_io.to_dict(Outer())))
    assert config_io.from_dict(Outer, data) == Outer()
    changed = config_io.override(Outer(), ["inner.rate=0.25"])
    assert config_io.config_hash(Outer()) == config_io.config_hash(Outer())
    assert config_io.config_hash(Outer()) != config_io.config_hash(changed)
