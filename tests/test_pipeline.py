"""Chameleon: folders, documents in and out, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import PIL.Image
import pytest
import torch

from openchameleon import Chameleon, Conversation, Document, Image, Message, SamplingParams, Text
from openchameleon import model_folder as model_folder_module
from openchameleon.errors import UserError
from openchameleon.tokenizer.mixed import ImageDone, ImageProgress, TextDelta


@pytest.fixture(scope="module")
def tiny(model_folder: Path) -> Chameleon:
    return Chameleon.from_pretrained(model_folder, device="cpu")


def with_config(model_folder: Path, folder: Path, **changes: object) -> Path:
    """A copy of the model folder with changed keys of its config.json."""
    shutil.copytree(model_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def shown(document: Document) -> list[str | bytes]:
    return [s.text if isinstance(s, Text) else s.pil.tobytes() for s in document]


PICTURE = PIL.Image.linear_gradient("L").convert("RGB")


def test_the_folder_holds_what_the_format_says(model_folder: Path) -> None:
    names = {str(p.relative_to(model_folder)) for p in model_folder.rglob("*") if p.is_file()}
    assert names == {
        "config.json",
        "model.safetensors",
        "tokenizer.model",
        "image_tokenizer/config.json",
        "image_tokenizer/model.safetensors",
    }
    assert json.loads((model_folder / "config.json").read_text())["format"] == 1


def test_save_and_load_keep_logits_codes_and_text(tiny: Chameleon, tmp_path: Path) -> None:
    tiny.save(tmp_path / "copy")
    copy = Chameleon.from_pretrained(tmp_path / "copy", device="cpu")
    document = Document(["a cat ", Image(PICTURE)])
    ids = tiny.tokenizer.encode(document)
    assert copy.tokenizer.encode(document) == ids
    assert torch.equal(copy.model(torch.tensor([ids])), tiny.model(torch.tensor([ids])))
    assert copy.config == tiny.config


def test_a_folder_says_whether_a_picture_is_read_before_its_question(
    model_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "first"
    shutil.copytree(model_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    question, turned = (
        Conversation.ask(Document(parts))
        for parts in (["a?", Image(PICTURE)], [Image(PICTURE), "a?"])
    )
    for picture_first in (False, True):
        (folder / "config.json").write_text(json.dumps(config | {"picture_first": picture_first}))
        model = Chameleon.from_pretrained(folder, device="cpu")
        prompts = [model.tokenizer.render_prompt(c) for c in (question, turned)]
        assert (prompts[0] == prompts[1]) == picture_first
        model.save(tmp_path / "again")
        again = Chameleon.from_pretrained(tmp_path / "again", device="cpu")
        assert again.tokenizer.render_prompt(question) == prompts[0]


def test_weights_saved_in_bfloat16_run_in_float32_on_a_cpu(tiny: Chameleon, tmp_path: Path) -> None:
    tiny.save(tmp_path / "half", dtype="bfloat16")
    half = Chameleon.from_pretrained(tmp_path / "half", device="cpu")
    assert (tmp_path / "half/model.safetensors").stat().st_size < 0.6 * sum(
        p.nbytes for p in tiny.model.parameters()
    )
    weight = half.model.tok_embeddings.weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, tiny.model.tok_embeddings.weight.bfloat16().float())


def test_loading_draws_no_random_numbers_and_large_models_load_alike(
    model_folder: Path, tiny: Chameleon, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_rng_state()
    Chameleon.from_pretrained(model_folder, device="cpu")
    assert torch.equal(torch.get_rng_state(), before)
    monkeypatch.setattr(model_folder_module, "LARGE", 0)
    large = Chameleon.from_pretrained(model_folder, device="cpu")
    for (name, a), (_, b) in zip(
        large.model.named_parameters(), tiny.model.named_parameters(), strict=True
    ):
        assert torch.equal(a, b), name


def test_save_replaces_a_model_but_nothing_else(tiny: Chameleon, tmp_path: Path) -> None:
    tiny.save(tmp_path / "model")
    tiny.save(tmp_path / "model")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters/dear.txt").write_text("hello")
    with pytest.raises(UserError, match="other things"):
        tiny.save(tmp_path / "letters")
    assert (tmp_path / "letters/dear.txt").read_text() == "hello"


def test_logits_are_float32_for_every_position(tiny: Chameleon) -> None:
    logits = tiny.model(torch.zeros(2, 5, dtype=torch.int64))
    assert logits.dtype == torch.float32
    assert logits.shape == (2, 5, tiny.config.vocab.size)


def test_the_same_seed_gives_the_same_document(tiny: Chameleon) -> None:
    prompt = Document([Text("draw a cat")])
    first = tiny.generate(prompt, mode="interleaved", seed=1)
    assert shown(first) == shown(tiny.generate(prompt, mode="interleaved", seed=1))
    assert shown(first) != shown(tiny.generate(prompt, mode="interleaved", seed=2))


def test_mode_image_writes_one_picture_and_mode_text_none(tiny: Chameleon) -> None:
    (segment,) = tiny.generate("draw a cat", mode="image", seed=3)
    assert isinstance(segment, Image)
    assert segment.pil.size == (16, 16)
    assert tiny.generate("draw a cat", mode="text", seed=3).images == []


def test_a_batch_equals_each_prompt_alone(tiny: Chameleon) -> None:
    prompts = ["a cat", Document([Image(PICTURE), Text("what is at the top")]), "draw"]
    together = tiny.generate_many(prompts, seed=5)
    alone = [tiny.generate(p, seed=5 + i) for i, p in enumerate(prompts)]
    assert [shown(d) for d in together] == [shown(d) for d in alone]


def test_the_stream_joined_is_the_document(tiny: Chameleon) -> None:
    events = list(tiny.stream("draw a cat", mode="image", seed=4))
    assert [e.codes_done for e in events if isinstance(e, ImageProgress)] == [0, 1, 2, 3, 4]
    (picture,) = [e.pil for e in events if isinstance(e, ImageDone)]
    (expected,) = tiny.generate("draw a cat", mode="image", seed=4).images
    assert picture.tobytes() == expected.tobytes()
    text = "".join(
        e.text for e in tiny.stream("a", mode="text", seed=4) if isinstance(e, TextDelta)
    )
    assert text == tiny.generate("a", mode="text", seed=4).text


def test_a_turn_and_a_raw_continuation_differ_in_the_prompt(tiny: Chameleon) -> None:
    ids = tiny.tokenizer.encode(Document(["a cat"]))
    vocab = tiny.config.vocab
    turn = tiny.tokenizer.render_prompt(Conversation.ask(Document(["a cat"])))
    assert turn == [vocab.bos_id, *ids, vocab.eot_id]
    assert tiny.tokenizer.render_prompt(Document(["a cat"])) == [vocab.bos_id, *ids]
    assert shown(tiny.generate("a cat", seed=1)) != shown(tiny.generate("a cat", seed=1, raw=True))


def test_a_conversation_is_answered_from_its_last_turn(tiny: Chameleon) -> None:
    first = Message("user", Document(["a cat"]))
    turns = Conversation([first, Message("assistant", Document(["ok"]))])
    with pytest.raises(UserError, match="last turn"):
        tiny.generate(turns)
    longer = Conversation([*turns.messages, Message("user", Document(["a dog"]))])
    assert shown(tiny.generate(longer, seed=1)) == shown(tiny.generate(longer, seed=1))


def test_arguments_override_params_which_override_the_folder(tiny: Chameleon) -> None:
    own = tiny.generate("a cat", mode="text")
    assert shown(own) == shown(tiny.generate("a cat", mode="text", seed=7)), "the folder's seed"
    params = SamplingParams(seed=9, mode="text")
    given = tiny.generate("a cat", params=params)
    assert shown(given) == shown(tiny.generate("a cat", params=params, seed=9))
    greedy = [tiny.generate("a cat", params=params, temperature=0, seed=s) for s in (1, 2)]
    assert shown(greedy[0]) == shown(greedy[1])


def test_max_tokens_bounds_the_answer(tiny: Chameleon) -> None:
    short = tiny.generate("a cat", mode="text", seed=1, max_tokens=3)
    assert len(tiny.tokenizer.encode(short)) <= 6, "bytes of a cut character may be re-encoded"
    with pytest.raises(UserError, match="no room for a picture"):
        tiny.generate("a cat", mode="image", max_tokens=6)


def test_a_text_only_model_draws_nothing(model_folder: Path, tmp_path: Path) -> None:
    folder = with_config(model_folder, tmp_path / "reader", outputs=["text"])
    reader = Chameleon.from_pretrained(folder, device="cpu")
    for seed in range(5):
        document = reader.generate(Document([Image(PICTURE), Text("what")]), seed=seed)
        assert document.images == []
    with pytest.raises(UserError, match="writes text only"):
        reader.generate("draw a cat", mode="image")


@pytest.mark.parametrize("prompt", ["", "  \n", Document(), Document([Text("")])])
def test_an_empty_prompt_is_refused(tiny: Chameleon, prompt: str | Document) -> None:
    with pytest.raises(UserError, match="empty"):
        tiny.generate(prompt)


def test_a_prompt_beyond_the_context_is_refused_at_the_call(tiny: Chameleon) -> None:
    with pytest.raises(UserError, match="too long"):
        tiny.stream("a cat and a dog " * 50)


def test_values_out_of_range_are_refused_in_a_sentence(tiny: Chameleon) -> None:
    with pytest.raises(UserError, match="top_p"):
        tiny.generate("a cat", top_p=0.0)
    with pytest.raises(UserError, match="mode"):
        tiny.generate("a cat", mode="sound")  # type: ignore[arg-type]


def test_an_unknown_model_names_what_was_sought(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'missing'.*no such folder"):
        Chameleon.from_pretrained("missing")
    with pytest.raises(UserError, match=r"neither config\.json .* nor params\.json"):
        Chameleon.from_pretrained(tmp_path)


def test_a_damaged_folder_is_refused_with_the_file(model_folder: Path, tmp_path: Path) -> None:
    folder = with_config(model_folder, tmp_path / "a", colour="red")
    with pytest.raises(UserError, match="colour"):
        Chameleon.from_pretrained(folder)
    folder = with_config(model_folder, tmp_path / "b", format=99)
    with pytest.raises(UserError, match="format 1"):
        Chameleon.from_pretrained(folder)
    weights = with_config(model_folder, tmp_path / "c") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"model\.safetensors"):
        Chameleon.from_pretrained(tmp_path / "c")


def test_weights_that_are_not_finite_are_reported(tiny: Chameleon, tmp_path: Path) -> None:
    tiny.save(tmp_path / "model")
    broken = Chameleon.from_pretrained(tmp_path / "model", device="cpu")
    broken.model.norm.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        broken.generate("a cat")
    with pytest.raises(UserError, match="not finite"):
        list(broken.stream("a cat"))


def test_weights_can_be_held_in_fewer_bytes(model_folder: Path, tmp_path: Path) -> None:
    whole = Chameleon.from_pretrained(model_folder, device="cpu")
    ids = torch.tensor([whole.tokenizer.encode(Document([Text("a cat the dog")]))])
    errors = {}
    for dtype in ("bfloat16", "int8"):
        held = Chameleon.from_pretrained(model_folder, device="cpu", dtype=dtype)
        logits = held.model(ids)
        assert logits.dtype == held.model.dtype == torch.float32
        errors[dtype] = float((logits - whole.model(ids)).norm() / whole.model(ids).norm())
        assert {w.dtype for n, w in held.model.state_dict().items() if "attention.w" in n} >= {
            getattr(torch, dtype)
        }
        assert held.generate("a cat", seed=1, max_tokens=8)
    assert 1e-4 < errors["bfloat16"] < errors["int8"] < 0.1


def test_int8_is_not_saved_and_bfloat16_is_saved_as_it_is(
    model_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"int8.*cannot be saved"):
        Chameleon.from_pretrained(model_folder, "cpu", "int8").save(tmp_path / "int8")
    assert not list(tmp_path.iterdir())
    half = Chameleon.from_pretrained(model_folder, "cpu", "bfloat16")
    half.save(tmp_path / "half")
    again = Chameleon.from_pretrained(tmp_path / "half", "cpu")
    ids = torch.tensor([[0, 5, 9]])
    assert torch.equal(again.model(ids), half.model(ids))
    with pytest.raises(UserError, match="float32, bfloat16 or float16"):
        half.save(tmp_path / "other", dtype="int8")


def test_the_layouts_of_others_are_held_in_fewer_bytes_too(
    model_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "shards"
    shutil.copytree(model_folder, folder)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    names = Chameleon.from_pretrained(model_folder, "cpu").model.state_dict()
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    held = Chameleon.from_pretrained(folder, "cpu", "int8")
    ids = torch.tensor([[0, 5, 9]])
    wanted = Chameleon.from_pretrained(model_folder, "cpu", "int8").model(ids)
    assert torch.equal(held.model(ids), wanted)


@pytest.mark.parametrize("dtype", [None, "bfloat16", "int8"])
@pytest.mark.parametrize("layout", ["one file", "shards"])
def test_files_that_are_written_over_change_no_model_that_was_loaded(
    model_folder: Path, tmp_path: Path, layout: str, dtype: str | None
) -> None:
    """What is read as it is was mapped: so the files have the type that the weights are held in."""
    folder = tmp_path / "model"
    Chameleon.from_pretrained(model_folder, "cpu").save(folder, dtype if dtype != "int8" else None)
    if layout == "shards":
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        names = Chameleon.from_pretrained(model_folder, "cpu").model.state_dict()
        index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    model = Chameleon.from_pretrained(folder, "cpu", dtype)
    ids = torch.tensor([[0, 5, 9]])
    image = model.tokenizer.image
    assert image is not None
    logits, codes = model.model(ids), image.encode([PICTURE])
    for path in folder.rglob("*.safetensors"):
        with path.open("r+b") as file:
            file.write(bytes(path.stat().st_size))
    assert torch.equal(model.model(ids), logits)
    assert torch.equal(image.encode([PICTURE]), codes)
