"""Documents <-> ids, pictures <-> codes, turns, and the stream that writes what `decode` reads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from openchameleon.document import Conversation, Document, Image, Message, Text
from openchameleon.errors import UserError
from openchameleon.tokenizer.image import ImageTokenizer
from openchameleon.tokenizer.mixed import (
    ImageDone,
    ImageProgress,
    MixedTokenizer,
    StreamDecoder,
    TextDelta,
)
from openchameleon.tokenizer.text import train_text_tokenizer
from openchameleon.vocab import Vocab
from openchameleon.vqgan.config import VQConfig
from openchameleon.vqgan.model import VQModel

CONFIG = VQConfig(ch=32, ch_mult=(1, 1), n_res_blocks=1, z_channels=4, embed_dim=4, n_embed=16,
                  resolution=8, stem=2)  # fmt: skip
N_TEXT = 270
VOCAB = Vocab.compact(CONFIG.n_embed, CONFIG.n_codes_per_image, N_TEXT)
BEGIN, END, EOT, BOS, EOS = VOCAB.image.begin_id, VOCAB.image.end_id, VOCAB.eot_id, 0, 2


def image_tokenizer() -> ImageTokenizer:
    torch.manual_seed(0)
    return ImageTokenizer(VQModel(CONFIG), CONFIG)


IMAGE = image_tokenizer()
TEXT = train_text_tokenizer(["a cat, a red cat"], N_TEXT, CONFIG.n_embed, IMAGE.n_codes)
MIXED = MixedTokenizer(VOCAB, TEXT, IMAGE)


def picture(seed: int, width: int = 8, height: int = 8) -> PIL.Image.Image:
    rng = np.random.default_rng(seed)
    return PIL.Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def asked(*answers: Document, question: Sequence[str | Image] = ("cat?",)) -> Conversation:
    turns: list[Message] = []
    for answer in answers:
        turns += [Message("user", Document(question)), Message("assistant", answer)]
    return Conversation(turns)


def test_a_document_is_text_and_bracketed_codes_in_order():
    document = Document(["a ", Image(picture(0)), Image(picture(1)), "b"])
    codes = IMAGE.encode(document.images) + VOCAB.image.first_id
    assert MIXED.encode(document) == [
        *TEXT.encode("a "),
        *(BEGIN, *codes[0].tolist(), END),
        *(BEGIN, *codes[1].tolist(), END),
        *TEXT.encode("b"),
    ]


def test_decode_gives_the_segments_back_with_neighbouring_text_joined():
    document = Document(["a ", "\u2581<s>\n", Image(picture(0)), "\N{CAT FACE}", Text("")])
    ids = MIXED.encode(document)
    back = MIXED.decode([BOS, *ids, EOT, 1, EOS])
    assert [type(s) for s in back] == [Text, Image, Text]
    assert [s.text for s in back if isinstance(s, Text)] == ["a \u2581<s>\n", "\N{CAT FACE}"]
    expected = IMAGE.decode(IMAGE.encode(document.images))[0]
    np.testing.assert_array_equal(np.asarray(back.images[0]), np.asarray(expected))


segment = st.one_of(st.text(max_size=8), st.sampled_from([Image(picture(i)) for i in range(3)]))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(segments=st.lists(segment, max_size=5), broken=st.booleans())
def test_the_stream_writes_what_decode_reads(segments, broken):
    ids = MIXED.encode(Document(segments))
    if broken:  # half a character, at the end or before a picture
        ids = TEXT.encode("\N{CAT FACE}")[:2] + ids + TEXT.encode("\u0416")[:1]
    stream = StreamDecoder(MIXED)
    events = [event for i in [BOS, *ids, EOS] for event in stream.push(i)] + stream.finish()
    whole = MIXED.decode(ids)
    assert "".join(e.text for e in events if isinstance(e, TextDelta)) == whole.text
    pictures = [e.pil for e in events if isinstance(e, ImageDone)]
    assert [p.tobytes() for p in pictures] == [p.tobytes() for p in whole.images]
    if not broken:
        assert whole.text == "".join(s for s in segments if isinstance(s, str))
        assert len(whole.images) == sum(isinstance(s, Image) for s in segments)
        assert ids.count(BEGIN) == len(whole.images), "text opens no picture"


def test_the_stream_never_writes_half_a_character_and_counts_codes():
    stream = StreamDecoder(MIXED)
    deltas = [stream.push(i) for i in TEXT.encode("\N{CAT FACE}")]
    assert deltas == [[], [], [], [TextDelta("\N{CAT FACE}")]]
    codes = MIXED.encode(Document([Image(picture(0))]))
    events = [event for i in codes for event in stream.push(i)]
    progress = [e for e in events if isinstance(e, ImageProgress)]
    assert progress == [ImageProgress(done, 4) for done in range(5)]
    assert isinstance(events[-1], ImageDone)
    assert stream.push(TEXT.encode("\u0416")[0]) == []
    assert stream.finish() == [TextDelta("\ufffd")]


@pytest.mark.parametrize(
    ("ids", "position"),
    [([BEGIN, 4, 4, 4, END], 4), ([BEGIN, 4, 4, 4, 4, 4, END], 5), ([BEGIN, 4, EOS], 2),
     ([BEGIN, BEGIN], 1), ([BEGIN, 4], 1), ([EOS, 4], 1), ([END], 0), ([BOS, 3], 1),
     ([VOCAB.size], 0), ([-1], 0)],
)  # fmt: skip
def test_ids_that_are_no_document_are_refused_with_their_position(ids, position):
    with pytest.raises(ValueError, match=f"position {position} "):
        MIXED.decode(ids)
    stream = StreamDecoder(MIXED)
    with pytest.raises(ValueError, match=f"position {position} "):  # noqa: PT012
        for i in ids:
            stream.push(i)
        stream.finish()


def test_a_document_is_learnt_but_for_its_first_id():
    ids, mask = MIXED.encode_record(Document(["a", Image(picture(0))]))
    assert ids == [BOS, *MIXED.encode(Document(["a", Image(picture(0))])), EOS]
    assert mask == [False] + [True] * (len(ids) - 1)


def test_a_conversation_learns_the_answers_and_what_closes_them():
    first, second = Document(["a cat"]), Document([Image(picture(0)), "cat"])
    user, a, b = TEXT.encode("cat?"), MIXED.encode(first), MIXED.encode(second)
    ids, mask = MIXED.encode_record(asked(first, second))
    assert ids == [BOS, *user, EOT, *a, EOT, *user, EOT, *b, EOS]
    assert [i for i, learnt in zip(ids, mask, strict=True) if learnt] == [*a, EOT, *b, EOS]
    ids_all, mask_all = MIXED.encode_record(asked(first, second), answers_only=False)
    assert ids_all == ids
    assert mask_all == [False] + [True] * (len(ids) - 1)


def test_a_prompt_is_the_start_of_the_conversation_it_leads_to():
    answer = Document(["a cat"])
    whole = asked(answer, answer)
    ids, mask = MIXED.encode_record(whole)
    prompt = MIXED.render_prompt(Conversation(whole.messages[:3]))
    assert prompt == ids[: len(prompt)]
    assert prompt[-1] == EOT
    assert all(mask[len(prompt) :]), "all that follows is the answer"
    assert MIXED.render_prompt(answer) == [BOS, *MIXED.encode(answer)]


def test_a_conversation_without_answer_is_not_learnt_nor_one_with_it_prompted():
    question = Conversation.ask(Document(["cat?"]))
    for talk in (question, Conversation([])):
        with pytest.raises(ValueError, match="assistant's turn"):
            MIXED.encode_record(talk)
    for talk in (asked(Document(["a"])), Conversation([])):
        with pytest.raises(ValueError, match="user's turn"):
            MIXED.render_prompt(talk)


def test_many_records_equal_each_and_encode_equal_pictures_once():
    encoded: list[int] = []

    class Counting(ImageTokenizer):
        def encode(self, pictures, fit="crop"):
            encoded.append(len(pictures))
            return super().encode(pictures, fit)

    mixed = MixedTokenizer(VOCAB, TEXT, Counting(IMAGE.model, CONFIG))
    records = [
        Document([Image(picture(i % 3)), "a"])
        if i % 2
        else asked(Document([Image(picture(i % 3))]))
        for i in range(8)
    ]
    assert mixed.encode_many(records) == [MIXED.encode_record(r) for r in records]
    assert encoded == [3]
    assert mixed.encode_many([]) == []


def test_pictures_of_equal_bytes_and_other_shape_are_not_confused():
    stripes = (bytes(12) + bytes([255] * 12)) * 4  # of one shape they lie, of the other they stand
    flat = PIL.Image.frombytes("RGB", (4, 8), stripes)
    tall = PIL.Image.frombytes("RGB", (8, 4), stripes)
    ((both, _),) = MIXED.encode_many([Document([Image(flat), Image(tall)])])
    ((first, _), (second, _)) = MIXED.encode_many([Document([Image(p)]) for p in (flat, tall)])
    assert both == [*first[:-1], *second[1:]]
    assert first != second


def test_a_users_picture_is_padded_and_every_other_cropped():
    wide = PIL.Image.new("RGB", (48, 16))
    wide.paste("white", (0, 0, 24, 16))
    cropped, padded = (VOCAB.image.ids_from_codes(IMAGE.encode([wide], fit)[0].tolist())
                       for fit in ("crop", "pad"))  # fmt: skip
    assert cropped != padded
    shown = Document([Image(wide)])
    turns = [Message("user", shown), Message("assistant", shown), Message("user", Document(["a"]))]
    ids = MIXED.render_prompt(Conversation(turns))
    eot = VOCAB.eot_id
    assert ids == [VOCAB.bos_id, *padded, eot, *cropped, eot, *TEXT.encode("a"), eot]
    learnt, _ = MIXED.encode_record(Conversation(turns[:2]))
    assert learnt == [VOCAB.bos_id, *padded, eot, *cropped, VOCAB.eos_id]
    assert MIXED.encode(shown) == cropped
    assert MIXED.render_prompt(shown) == [VOCAB.bos_id, *cropped]


def test_the_only_picture_of_a_users_turn_is_read_first_where_that_is_asked_for():
    first = MixedTokenizer(VOCAB, TEXT, IMAGE, picture_first=True)
    a, b, answer = Image(picture(0)), Image(picture(1)), Document(["a", Image(picture(2))])
    for shown in (["a cat?", a], ["a ", a, "cat?"], [a, "a cat?"]):
        moved = sorted(shown, key=lambda part: isinstance(part, str))
        ids, mask = first.encode_record(asked(answer, question=shown))
        assert (ids, mask) == MIXED.encode_record(asked(answer, question=moved))
        prompt = first.render_prompt(Conversation.ask(Document(shown)))
        assert prompt == ids[: len(prompt)], "a prompt begins as its training did"
    for kept in (["a", a, "b", b], ["no picture"]):
        assert first.encode_record(asked(answer, question=kept)) == MIXED.encode_record(
            asked(answer, question=kept)
        )
    assert first.encode_record(answer) == MIXED.encode_record(answer), "documents keep their order"


def test_a_model_without_image_tokenizer_says_so():
    text_only = MixedTokenizer(VOCAB, TEXT)
    assert text_only.decode(text_only.encode(Document(["a cat"]))).text == "a cat"
    with pytest.raises(UserError, match="no image tokenizer"):
        text_only.encode(Document([Image(picture(0))]))
    with pytest.raises(UserError, match="no image tokenizer"):
        text_only.decode([BEGIN, 4, 4, 4, 4, END])


def test_parts_that_do_not_fit_the_vocabulary_are_refused():
    with pytest.raises(UserError, match="text tokenizer writes ids"):
        MixedTokenizer(Vocab.compact(CONFIG.n_embed, 4, N_TEXT - 1), TEXT)
    with pytest.raises(UserError, match="image tokenizer writes 4 codes"):
        MixedTokenizer(Vocab.compact(CONFIG.n_embed, 9, N_TEXT), TEXT, IMAGE)


def test_preprocessing_resizes_by_lanczos_and_crops_the_middle():
    source = picture(0, width=33, height=20)
    resized = source.resize((13, 8), PIL.Image.Resampling.LANCZOS)  # 13.2 rounded
    expected = np.asarray(resized)[:, 2:10]  # floor of 5 / 2
    pixels = IMAGE.preprocess(source)
    assert (pixels.shape, pixels.dtype) == ((3, 8, 8), torch.float32)
    np.testing.assert_allclose(pixels.permute(1, 2, 0), expected / 255 * 2 - 1, atol=1e-6)


def test_padding_keeps_the_whole_picture_on_white():
    pixels = IMAGE.preprocess(PIL.Image.new("RGB", (16, 8), "black"), fit="pad")
    assert pixels[:, 2:6].max() == -1
    assert pixels[:, :2].min() == pixels[:, 6:].min() == 1


@pytest.mark.parametrize("size", [(1, 1), (1, 90_000), (90_000, 1), (8, 8)])
@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_every_shape_preprocesses_without_great_memory(size, fit):
    assert IMAGE.preprocess(PIL.Image.new("RGB", size), fit).shape == (3, 8, 8)


def test_a_transparent_picture_is_put_on_white():
    clear = PIL.Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert IMAGE.preprocess(clear).min() == 1


def test_decoding_pixels_undoes_preprocessing_exactly():
    class Identity(torch.nn.Module):
        def __init__(self, pixels):
            super().__init__()
            self.pixels = torch.nn.Parameter(pixels)
            self.decoder = torch.nn.Identity()

        def decode(self, codes):
            return self.pixels[None]

    levels = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    for offset in (0, 63):
        source = PIL.Image.fromarray(levels + np.uint8(offset))
        tokenizer = ImageTokenizer(Identity(IMAGE.preprocess(source)), CONFIG)
        back = tokenizer.decode(torch.zeros(1, 4, dtype=torch.int64))[0]
        np.testing.assert_array_equal(np.asarray(back), np.asarray(source))


def test_batches_give_the_codes_of_single_pictures():
    pictures = [picture(i, 8 + i, 9) for i in range(19)]
    codes = IMAGE.encode(pictures)
    assert (codes.shape, codes.dtype) == ((19, 4), torch.int64)
    assert torch.equal(codes, torch.cat([IMAGE.encode([p]) for p in pictures]))
    assert IMAGE.encode([]).shape == (0, 4)
    assert len({p.tobytes() for p in IMAGE.decode(codes)}) > 1
    assert len(IMAGE.decode(codes)) == 19


def test_codes_of_a_wrong_shape_or_value_are_refused():
    for codes in (
        torch.zeros(4),
        torch.zeros(1, 5),
        torch.full((1, 4), 16),
        torch.full((1, 4), -1),
    ):
        with pytest.raises(ValueError, match="code"):
            IMAGE.decode(codes)


def test_an_image_tokenizer_loads_as_it_was_saved(tmp_path):
    IMAGE.save(tmp_path / "t")
    loaded = ImageTokenizer.load(tmp_path / "t")
    assert loaded.config == CONFIG
    for name, weight in IMAGE.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], weight), name
    weights = load_file(tmp_path / "t/model.safetensors")
    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in weights.items()}
    save_file(half, tmp_path / "t/model.safetensors")
    assert next(ImageTokenizer.load(tmp_path / "t").model.parameters()).dtype == torch.float32


def test_a_damaged_image_tokenizer_folder_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match="gone holds no readable image tokenizer"):
        ImageTokenizer.load(tmp_path / "gone")
    IMAGE.save(tmp_path / "cut")
    weights = tmp_path / "cut/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="cut holds no readable image tokenizer"):
        ImageTokenizer.load(tmp_path / "cut")
    IMAGE.save(tmp_path / "other")
    config = tmp_path / "other/config.json"
    config.write_text(config.read_text().replace('"n_embed": 16', '"n_embed": 17'))
    with pytest.raises(UserError, match="do not belong to its config"):
        ImageTokenizer.load(tmp_path / "other")
    config.write_text(config.read_text().replace("n_embed", "n_embde"))
    with pytest.raises(UserError, match="Did you mean 'n_embed'"):
        ImageTokenizer.load(tmp_path / "other")
