"""Text <-> ids: lossless, deterministic, and unable to spell a control id."""

import json
import random
from functools import cache

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Regex as HFRegex
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from openchameleon.errors import UserError
from openchameleon.tokenizer.text import (
    HFTokenizer,
    SentencePieceTokenizer,
    TextTokenizer,
    load_text_tokenizer,
    train_text_tokenizer,
)
from openchameleon.vocab import Vocab

N_CODES, CODES_PER_ITEM, N_TEXT = 24, 9, 380
VOCAB = Vocab.compact(N_CODES, CODES_PER_ITEM, N_TEXT)
WORDS = ["cat", "dog", "pizza", "rocket", "red", "circle", "blue", "heart", "a", "the", "top"]


def corpus() -> list[str]:
    rng = random.Random(0)
    lines = [" ".join(rng.choice(WORDS) for _ in range(8)) for _ in range(300)]
    return [*lines, *WORDS * 30, *['def f():\n    place("cat", "top left")\n'] * 20]


def released_json() -> str:
    """A tokenizer.json of the released kind: byte-level BPE, and names of controls and codes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(HFRegex("(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z"), "isolated"),
            pre_tokenizers.Split(HFRegex("([\t\n]|    |  )"), "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Punctuation("isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    codes = ["IMGIMG" + "".join("ABCDEFGHIJ"[int(d)] for d in str(i)) + "Z" for i in range(12)]
    special += [*codes, "<eoss>", "<racm3:break>", "<reserved08706>", "<image>"]
    trainer = trainers.BpeTrainer(
        vocab_size=len(special) + 320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    # Names in the BPE itself, one of them reachable as a whole word, and one added but not special.
    data = json.loads(tokenizer.to_str())
    data["model"]["ignore_merges"] = True
    for entry in data["added_tokens"]:
        entry["special"] = entry["content"] != "<reserved08706>"
    data["added_tokens"] = [e for e in data["added_tokens"] if not e["content"].startswith("IMG")]
    return json.dumps(data)


@cache
def llama_json() -> str:
    """A tokenizer.json as of the first Llamas: byte fallback, marks, a space before each text."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    names = ["<unk>", "<s>", "</s>", *(f"<reserved{i}>" for i in range(17))]
    trainer = trainers.BpeTrainer(
        vocab_size=20 + 256 + 200,
        special_tokens=[*names, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator([word for line in corpus() for word in line.split()], trainer)
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = data["added_tokens"][:20]
    return json.dumps(data)


SENTENCEPIECE = train_text_tokenizer(corpus(), N_TEXT, N_CODES, CODES_PER_ITEM)
RELEASED = HFTokenizer(released_json().encode())
LLAMA = HFTokenizer(llama_json().encode())
EACH = pytest.mark.parametrize(
    "tokenizer", [SENTENCEPIECE, RELEASED, LLAMA], ids=["own", "released", "llama"]
)
CONTROL_NAMES = ["<s>", "</s>", "<pad>", "<unk>", "<code:0>", "<code:23>", "<image>", "</image>",
                 "<eot>", "<0x41>", "<racm3:break>", "<eoss>", "<reserved08706>", "IMGIMGAZ",
                 "IMGIMGBBZ", "\u2581", "\u2581<s>", "\0", "\u200b", "\ufeff"]  # fmt: skip
spellings = st.lists(st.sampled_from([*CONTROL_NAMES, " ", "\n", "a", "<", ">"])).map("".join)
fuzz = settings(max_examples=150, deadline=None, derandomize=True)


def assert_harmless(tokenizer: TextTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    if tokenizer is SENTENCEPIECE:
        assert all(VOCAB.is_text(i) for i in ids)
    else:
        assert all(i >= 20 for i in ids), "the names have ids 0..19"


@EACH
@fuzz
@given(text=st.text())
def test_any_text_comes_back_and_gives_text_ids_only(tokenizer, text):
    assert_harmless(tokenizer, text)


@EACH
@fuzz
@given(text=spellings)
def test_spelling_control_names_gives_text_ids_only(tokenizer, text):
    assert_harmless(tokenizer, text)


@EACH
@pytest.mark.parametrize("name", CONTROL_NAMES)
def test_each_control_name_is_ordinary_text(tokenizer, name):
    for text in (name, f"a {name} b", name * 3, f" {name}\r\n\t{name} "):
        assert_harmless(tokenizer, text)


def test_the_released_file_would_spell_controls_without_our_reading():
    naive = Tokenizer.from_str(released_json())
    assert naive.encode("</s>").ids == [2]
    naive.encode_special_tokens = True
    assert naive.encode("<reserved08706>").ids == [18], "the library's switch misses this one"
    assert naive.encode("IMGIMGAZ").ids == [4], "and an ordinary piece of the BPE"


def test_ids_lie_as_the_compact_vocabulary_says():
    assert SENTENCEPIECE.n_ids == VOCAB.size
    assert (SENTENCEPIECE.text_start, SENTENCEPIECE.text_stop) == (VOCAB.text_start, VOCAB.size)
    for i in range(VOCAB.text_start):
        with pytest.raises(ValueError, match="not a text id"):
            SENTENCEPIECE.bytes_of(i)
    assert SENTENCEPIECE.encode("\n") == [VOCAB.text_start]


def test_names_of_the_corpus_are_single_pieces_alone_and_after_a_space():
    for name in ("cat", "pizza", "rocket"):
        assert len(SENTENCEPIECE.encode(name)) == 1
        assert len(SENTENCEPIECE.encode(f" {name}")) == 1
    assert len(SENTENCEPIECE.encode("2024")) == 4, "digits stand alone"


def test_training_twice_gives_the_same_bytes(tmp_path):
    again = train_text_tokenizer(corpus(), N_TEXT, N_CODES, CODES_PER_ITEM)
    SENTENCEPIECE.save(tmp_path / "a.model")
    again.save(tmp_path / "b.model")
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()


def test_training_on_control_names_and_reserved_characters_succeeds():
    texts = [" ".join(CONTROL_NAMES), "\u2585 \ud800 \r\n"] * 100 + corpus()
    tokenizer = train_text_tokenizer(texts, 400, N_CODES, CODES_PER_ITEM)
    for name in CONTROL_NAMES:
        ids = tokenizer.encode(name)
        assert all(i >= VOCAB.text_start for i in ids)
        assert tokenizer.decode(ids) == name


def test_a_long_line_is_learnt_from_whole():
    words = random.Random(1).choices(WORDS, k=4000)
    tokenizer = train_text_tokenizer([" ".join(words)], 320, N_CODES, CODES_PER_ITEM)
    assert len(tokenizer.encode(" pizza")) == 1


def test_too_many_pieces_for_the_texts_names_the_largest_number_that_works():
    with pytest.raises(UserError, match=r"n_text = 5000 is too large .* at most (\d+)\.") as caught:
        train_text_tokenizer(corpus(), 5000, N_CODES, CODES_PER_ITEM)
    most = int(str(caught.value).split()[-1].rstrip("."))
    assert train_text_tokenizer(corpus(), most, N_CODES, CODES_PER_ITEM).n_ids == 31 + most
    with pytest.raises(UserError, match="too large"):
        train_text_tokenizer(corpus(), most + 1, N_CODES, CODES_PER_ITEM)


def test_too_few_pieces_for_the_characters_names_the_smallest_number_that_works():
    with pytest.raises(UserError, match=r"use (\d+) or more") as caught:
        train_text_tokenizer(corpus(), 260, N_CODES, CODES_PER_ITEM)
    least = int(str(caught.value).split()[-3])
    train_text_tokenizer(corpus(), least, N_CODES, CODES_PER_ITEM)
    with pytest.raises(UserError, match="too small"):
        train_text_tokenizer(corpus(), 256, N_CODES, CODES_PER_ITEM)


@pytest.mark.parametrize("texts", [[], [""], ["\n", "<s>"]])
def test_no_text_to_train_on_is_said(texts):
    with pytest.raises(UserError, match="no text"):
        train_text_tokenizer(texts, N_TEXT, N_CODES, CODES_PER_ITEM)


@EACH
def test_a_lone_surrogate_is_refused_in_a_sentence(tokenizer):
    with pytest.raises(UserError, match=r"half of a surrogate pair .* character 2"):
        tokenizer.encode("ab\ud83dc")


@EACH
def test_bytes_that_are_no_utf8_decode_to_the_replacement_character(tokenizer):
    first_byte = tokenizer.encode("\u0416")[0]
    assert tokenizer.decode([first_byte, *tokenizer.encode("a")]) == "\ufffda"


@EACH
def test_control_ids_and_ids_out_of_range_do_not_decode(tokenizer):
    for bad in (0, 2, 4, -1, tokenizer.n_ids):
        with pytest.raises(ValueError, match="not a text id"):
            tokenizer.decode([bad])


@EACH
def test_a_saved_tokenizer_loads_as_itself(tokenizer, tmp_path):
    path = tmp_path / ("t.model" if tokenizer is SENTENCEPIECE else "t.json")
    tokenizer.save(path)
    loaded = load_text_tokenizer(path)
    assert type(loaded) is type(tokenizer)
    text = "a cat, </s> \u2581 \N{SLICE OF PIZZA}\n IMGIMGAZ"
    assert loaded.encode(text) == tokenizer.encode(text)


def test_what_is_no_tokenizer_is_refused_by_name(tmp_path):
    for name in ("a.model", "b.json", "c.txt"):
        (tmp_path / name).write_bytes(b"\xff")
        with pytest.raises(UserError, match=name):
            load_text_tokenizer(tmp_path / name)
    with pytest.raises(UserError, match="No such file"):
        load_text_tokenizer(tmp_path / "gone.model")


def test_a_lossy_tokenizer_is_refused():
    data = json.loads(released_json())
    data["normalizer"] = {"type": "NFC"}
    with pytest.raises(UserError, match="does not give back"):
        HFTokenizer(json.dumps(data).encode())
    data["normalizer"] = None
    del data["model"]["vocab"]["\u0120"]  # a space
    data["model"]["merges"] = [m for m in data["model"]["merges"] if "\u0120" not in "".join(m)]
    with pytest.raises(UserError, match="neither a byte-level BPE nor"):
        HFTokenizer(json.dumps(data).encode())


@fuzz
@given(text=st.text() | st.lists(st.sampled_from([*WORDS, " ", "\n"])).map("".join))
def test_the_ids_of_a_first_llama_are_ours_of_the_text_with_its_space(text):
    theirs = Tokenizer.from_str(llama_json())
    assume(text and "\u2581" not in text and "<" not in text)
    assert LLAMA.encode(" " + text) == theirs.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("split", [False, True])
def test_newer_files_of_first_llamas_give_the_same_ids(split):
    data = json.loads(llama_json())
    data["normalizer"] = None
    data["pre_tokenizer"] = {"type": "Metaspace", "replacement": "\u2581",
                             "prepend_scheme": "first", "split": split}  # fmt: skip
    newer = HFTokenizer(json.dumps(data).encode())
    text = " the cat  is\n top "
    theirs = Tokenizer.from_str(json.dumps(data))
    assert newer.encode(text) == theirs.encode(text, add_special_tokens=False).ids


def test_a_byte_fallback_that_changes_texts_is_refused():
    data = json.loads(llama_json())
    data["normalizer"] = {"type": "NFKC"}
    with pytest.raises(UserError, match=r"not known here \(.*NFKC"):
        HFTokenizer(json.dumps(data).encode())


def test_a_sentencepiece_model_that_adds_a_space_is_refused():
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()), model_writer=model, vocab_size=330, model_type="bpe",
        byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    with pytest.raises(UserError, match="does not give back"):
        SentencePieceTokenizer(model.getvalue())
