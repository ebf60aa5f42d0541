"""The API through the stock client: text, pictures and both, whole and streamed, with `nano`."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Iterator
from typing import Any

import openai
import PIL.Image
import pytest
from serving import Running, serving, until

from openchameleon import Chameleon, Conversation, Document, Image, Message
from openchameleon.pipeline import Prompt
from openchameleon.serve.answer import Partial, StopText, partial_picture
from openchameleon.tokenizer.mixed import ImageDone, TextDelta
from openchameleon.world.atlas import PRESETS
from openchameleon.world.checker import check
from openchameleon.world.render import render
from openchameleon.world.scene import Placed, Scene, cell_from_name

NANO = PRESETS["nano"]
DRAW = "Draw a cat at the top left and a pizza at the bottom right."
DRAWN = {("cat", "top left"), ("pizza", "bottom right")}
STORY = "Tell a story about a cat."


@pytest.fixture(scope="module")
def nano() -> Chameleon:
    return Chameleon.from_pretrained("nano", device="cpu")


@pytest.fixture(scope="module")
def server(nano: Chameleon) -> Iterator[Running]:
    with serving(lambda: nano) as running:
        yield running


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with server.client as client:
        yield client


def scene(*objects: tuple[str, str]) -> Scene:
    return Scene("sky", [Placed(cell_from_name(NANO.grid, cell), name) for name, cell in objects])


def data_url(picture: PIL.Image.Image, kind: str = "PNG") -> str:
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def picture_of(png: str | None) -> PIL.Image.Image:
    assert png is not None
    return PIL.Image.open(io.BytesIO(base64.b64decode(png)))


def shows(picture: PIL.Image.Image) -> set[tuple[str, Any]]:
    return {(o.name, o.cell) for o in check(picture, NANO).objects}


def wanted(objects: set[tuple[str, str]]) -> set[tuple[str, Any]]:
    return {(name, cell_from_name(NANO.grid, cell)) for name, cell in objects}


def alone(nano: Chameleon, prompt: Prompt, **wishes: Any) -> list[str | bytes]:
    """The text and the pixels of an answer that no server gave, in order."""
    parts: list[str | bytes] = []
    for event in nano.stream(prompt, **wishes):
        if isinstance(event, ImageDone):
            parts.append(event.pil.tobytes())
        elif isinstance(event, TextDelta):
            text = parts.pop() if parts and isinstance(parts[-1], str) else ""
            parts.append(text + event.text)  # type: ignore[operator]
    return parts


def shown_in(response: Any) -> list[str | bytes]:
    """The text and the pixels of a response's items, in order."""
    return [
        picture_of(item.result).tobytes()
        if item.type == "image_generation_call"
        else item.content[0].text
        for item in response.output
    ]


def test_a_drawing_is_what_was_asked_for(client: openai.OpenAI) -> None:
    response = client.responses.create(model="nano", input=DRAW, extra_body={"seed": 1})
    (call,) = [item for item in response.output if item.type == "image_generation_call"]
    assert response.status == "completed"
    assert shows(picture_of(call.result)) == wanted(DRAWN)


def test_a_question_about_an_uploaded_picture_is_answered(client: openai.OpenAI) -> None:
    url = data_url(render(scene(("dog", "center"), ("pizza", "bottom left")), NANO))
    content: Any = [
        {"type": "input_text", "text": "What is at the center?"},
        {"type": "input_image", "image_url": url, "detail": "auto"},
    ]
    response = client.responses.create(
        model="nano", input=[{"role": "user", "content": content}], temperature=0
    )
    assert response.output_text == "dog"
    asked: Any = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "What is at the bottom left?"},
    ]
    chat = client.chat.completions.create(
        model="nano", messages=[{"role": "user", "content": asked}], temperature=0
    )
    assert chat.choices[0].message.content == "pizza"
    assert chat.choices[0].finish_reason == "stop"


def test_an_interleaved_answer_keeps_its_order(client: openai.OpenAI, nano: Chameleon) -> None:
    response = client.responses.create(model="nano", input=STORY, extra_body={"seed": 1})
    assert shown_in(response) == alone(nano, STORY, seed=1)
    kinds = [item.type for item in response.output]
    assert kinds[:3] == ["message", "image_generation_call", "message"]
    assert response.usage is not None
    assert response.usage.input_tokens == len(nano.request(STORY).token_ids)
    (ids,) = nano.complete_many([STORY], seed=1)
    assert response.usage.output_tokens == len(ids) + 1


def test_a_streamed_response_tells_the_same_as_a_whole_one(client: openai.OpenAI) -> None:
    asked: Any = {"model": "nano", "input": STORY, "extra_body": {"seed": 3}}
    whole = client.responses.create(**asked)
    asked["extra_body"] |= {"partial_images": 3}
    events = list(client.responses.create(**asked, stream=True))
    assert [e.sequence_number for e in events] == list(range(len(events)))
    assert [e.type for e in events[:2]] == ["response.created", "response.in_progress"]
    last = events[-1]
    assert last.type == "response.completed"
    assert shown_in(last.response) == shown_in(whole)
    texts: dict[int, str] = {}
    for e in events:
        if e.type == "response.output_text.delta":
            texts[e.output_index] = texts.get(e.output_index, "") + e.delta
    done = {e.output_index: e.item for e in events if e.type == "response.output_item.done"}
    assert [done[i].model_dump() for i in sorted(done)] == [
        item.model_dump() for item in last.response.output
    ]
    assert texts == {i: x.content[0].text for i, x in done.items() if x.type == "message"}


def test_the_events_of_an_item_come_in_the_order_of_openais(client: openai.OpenAI) -> None:
    events = list(
        client.responses.create(
            model="nano", input=STORY, stream=True, tools=[IMAGE_TOOL], extra_body={"seed": 1}
        )
    )
    of_item = {
        i: [e.type.removeprefix("response.") for e in events if getattr(e, "output_index", -1) == i]
        for i in (0, 1)
    }
    text = [kind for kind in of_item[0] if kind != "output_text.delta"]
    assert text == ["output_item.added", "content_part.added", "output_text.done",
                    "content_part.done", "output_item.done"]  # fmt: skip
    call = "image_generation_call"
    assert of_item[1] == ["output_item.added", f"{call}.in_progress", f"{call}.generating",
                          *[f"{call}.partial_image"] * of_item[1].count(f"{call}.partial_image"),
                          f"{call}.completed", "output_item.done"]  # fmt: skip


IMAGE_TOOL: Any = {"type": "image_generation", "partial_images": 2}


def test_partial_pictures_grow_into_the_whole_one(client: openai.OpenAI) -> None:
    events = client.responses.create(
        model="nano", input=DRAW, stream=True, tools=[IMAGE_TOOL], extra_body={"mode": "image"}
    )
    partials, whole, n_done = [], None, []
    for e in events:
        if e.type == "response.image_generation_call.partial_image":
            partials.append(picture_of(e.partial_image_b64))
            n_done.append(e.codes_done)  # type: ignore[attr-defined]
            assert e.partial_image_index == len(partials) - 1
        elif e.type == "response.output_item.done":
            whole = picture_of(e.item.result)  # type: ignore[union-attr]
    assert whole is not None
    assert 1 <= len(partials) <= 2
    assert n_done == sorted(n_done)
    assert n_done[0] >= 12
    for partial, n in zip(partials, n_done, strict=True):
        assert partial.size == whole.size
        opaque = partial.getchannel("A").point(lambda a: a and 255)
        assert sum(opaque.histogram()[255:]) == n * 16 * 16
        assert PIL.Image.composite(partial.convert("RGB"), whole, opaque).tobytes() == (
            whole.tobytes()
        )


def test_a_partial_picture_shows_its_codes_and_nothing_else(nano: Chameleon) -> None:
    picture = render(scene(("cat", "top left")), NANO)
    codes = nano.tokenizer.encode(Document([Image(picture)]))[1:-1]
    codes = [i - nano.config.vocab.image.first_id for i in codes]
    (whole,) = nano.tokenizer.decode_pictures([codes])
    for n in (1, 6, 7, 35):
        alpha = partial_picture(nano.tokenizer, codes[:n]).getchannel("A")
        assert sum(alpha.histogram()[255:]) == n * 16 * 16
    partial = partial_picture(nano.tokenizer, codes[:12]).crop((0, 0, 96, 32)).convert("RGB")
    assert partial.tobytes() == whole.crop((0, 0, 96, 32)).tobytes()


def test_what_was_answered_can_be_given_back(client: openai.OpenAI, nano: Chameleon) -> None:
    first = client.responses.create(model="nano", input=STORY, extra_body={"seed": 1})
    question = "What is at the center?"
    turns: Any = [{"role": "user", "content": STORY}, *first.output,
                  {"role": "user", "content": question}]  # fmt: skip
    second = client.responses.create(model="nano", input=turns, temperature=0)
    answer = nano.generate(STORY, seed=1)
    conversation = Conversation(
        [
            Message("user", Document([STORY])),
            Message("assistant", answer),
            Message("user", Document([question])),
        ]
    )
    assert shown_in(second) == alone(nano, conversation, temperature=0.0)
    assert second.usage is not None
    assert second.usage.input_tokens == len(nano.request(conversation).token_ids)


def test_a_seed_repeats_an_answer_and_the_answer_tells_its_seed(client: openai.OpenAI) -> None:
    first: Any = client.responses.create(model="nano", input=STORY)
    again = client.responses.create(model="nano", input=STORY, extra_body={"seed": first.seed})
    assert shown_in(again) == shown_in(first)


def test_modes_and_guidance_hold(client: openai.OpenAI, nano: Chameleon) -> None:
    for mode, kinds in (("text", {"message"}), ("image", {"image_generation_call"})):
        response = client.responses.create(model="nano", input=DRAW, extra_body={"mode": mode})
        assert {item.type for item in response.output} == kinds
    none = client.responses.create(model="nano", input=DRAW, tool_choice="none")
    assert {item.type for item in none.output} == {"message"}
    guided: Any = {"seed": 5, "guidance": 3.0, "mode": "image"}
    response = client.responses.create(model="nano", input=DRAW, extra_body=guided)
    assert shown_in(response) == alone(nano, DRAW, **guided)


def test_an_answer_that_is_cut_says_so(client: openai.OpenAI) -> None:
    asked: Any = {"model": "nano", "input": STORY, "max_output_tokens": 4, "temperature": 0}
    response = client.responses.create(**asked)
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.output[0].status == "incomplete"
    *_, last = client.responses.create(**asked, stream=True)
    assert last.type == "response.incomplete"
    chat = client.chat.completions.create(
        model="nano", messages=[{"role": "user", "content": STORY}], max_tokens=4
    )
    assert chat.choices[0].finish_reason == "length"


def test_chat_answers_with_text_and_pictures(client: openai.OpenAI, nano: Chameleon) -> None:
    messages: Any = [{"role": "user", "content": STORY}]
    chat: Any = client.chat.completions.create(model="nano", messages=messages, seed=1)
    answer = alone(nano, STORY, seed=1)
    message = chat.choices[0].message
    assert message.content == "".join(part for part in answer if isinstance(part, str))
    pictures = [picture_of(image["image_url"]["url"].split(",")[1]) for image in message.images]
    assert [p.tobytes() for p in pictures] == [part for part in answer if isinstance(part, bytes)]


def test_streamed_chat_keeps_the_order(client: openai.OpenAI, nano: Chameleon) -> None:
    chunks = list(
        client.chat.completions.create(
            model="nano", messages=[{"role": "user", "content": STORY}], seed=1, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    parts: list[str | bytes] = []
    for chunk in chunks:
        delta: Any = chunk.choices[0].delta if chunk.choices else None
        if delta is not None and getattr(delta, "images", None):
            parts.append(picture_of(delta.images[0]["image_url"]["url"].split(",")[1]).tobytes())
        elif delta is not None and delta.content:
            if parts and isinstance(parts[-1], str):
                parts[-1] += delta.content
            else:
                parts.append(delta.content)
    assert parts == alone(nano, STORY, seed=1)
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 36


def test_several_answers_have_seeds_in_a_row(client: openai.OpenAI, nano: Chameleon) -> None:
    messages: Any = [{"role": "user", "content": STORY}]
    asked: Any = {"model": "nano", "messages": messages, "seed": 10, "n": 3, "temperature": 1,
                  "extra_body": {"mode": "text"}}  # fmt: skip
    chat = client.chat.completions.create(**asked)
    alone = [nano.generate(STORY, seed=10 + i, temperature=1.0, mode="text").text for i in range(3)]
    assert [choice.message.content for choice in chat.choices] == alone
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == alone


def test_a_stop_text_ends_an_answer_before_it(client: openai.OpenAI, server: Running) -> None:
    messages: Any = [{"role": "user", "content": STORY}]
    asked: Any = {"model": "nano", "messages": messages, "seed": 1, "extra_body": {"mode": "text"}}
    whole = client.chat.completions.create(**asked).choices[0].message.content
    assert whole is not None
    stop = whole[7:14]
    chat = client.chat.completions.create(**asked, stop=["never written", stop])
    assert chat.choices[0].message.content == whole[: whole.index(stop)]
    assert chat.choices[0].finish_reason == "stop"
    chunks = client.chat.completions.create(**asked, stop=stop, stream=True)
    deltas = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert "".join(deltas) == whole[: whole.index(stop)]
    until(lambda: server.service.n_open == 0)


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_stop_texts_are_found_however_the_text_is_cut(size: int) -> None:
    text, stops = "one two tw two-three", ("two-", "xx", "tw twx")
    stop, out = StopText(stops), ""
    for at in range(0, len(text), size):
        out += stop.push(text[at : at + size])
        if stop.found:
            break
    assert out + stop.flush() == "one two tw "
    kept = StopText(stops)
    assert kept.push("one tw") + kept.flush() == "one tw"
    assert not kept.found


def test_pictures_are_made_from_words(client: openai.OpenAI) -> None:
    pictures = client.images.generate(
        model="nano", prompt=DRAW, n=2, response_format="b64_json", extra_body={"seed": 1}
    )
    assert pictures.data is not None
    assert len(pictures.data) == 2
    for one in pictures.data:
        assert shows(picture_of(one.b64_json)) == wanted(DRAWN)


def test_the_model_is_listed(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "nano"
    assert client.models.retrieve("nano").id == "nano"
    with pytest.raises(openai.NotFoundError, match="no model 'gpt'"):
        client.models.retrieve("gpt")
    with pytest.raises(openai.NotFoundError, match="no model 'gpt'"):
        client.responses.create(model="gpt", input="hello")


def test_what_a_system_says_stands_before_the_user(client: openai.OpenAI, nano: Chameleon) -> None:
    response = client.responses.create(
        model="nano", instructions="Be brief.", input="hello", max_output_tokens=1
    )
    assert response.usage is not None
    ids = nano.request(Document(["Be brief.\n", "hello"])).token_ids
    assert response.usage.input_tokens == len(ids)
    messages: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    chat = client.chat.completions.create(model="nano", messages=messages, max_tokens=1)
    assert chat.usage is not None
    ids = nano.request(Document(["Be brief.\n", "hi"])).token_ids
    assert chat.usage.prompt_tokens == len(ids)


def test_partials_that_are_late_are_left_out(nano: Chameleon, server: Running) -> None:
    async def submit() -> Any:
        return server.service.submit(nano.request(DRAW, mode="image", seed=1), partial_pictures=5)

    answer = asyncio.run_coroutine_threadsafe(submit(), server.service.loop).result()
    (ids,) = nano.complete_many([DRAW], mode="image", seed=1)
    pieces = [p for p in answer.read(ids[:20]) if isinstance(p, Partial)]
    assert [p.codes_done for p in pieces] == [19], "the begin id is none"
    pieces = [p for p in answer.read(ids[20:]) if isinstance(p, Partial)]
    assert pieces == []
