"""The web page against what is not to be trusted, and when things go wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from openchameleon import Chameleon

pytest.importorskip("fastapi")
pytest.importorskip("playwright")

from page_driver import DONE, Person, stream_of, text_events
from playwright.sync_api import Route, expect
from serving import serving

from openchameleon.serve import app

ANSWERS = "**/v1/responses"
OTHER_FILES = [("Page", "html"), ("Markdown", "md")]
Visit = Callable[..., Person]


def test_markup_of_the_model_and_of_the_person_is_text(visit: Visit, tmp_path: Path) -> None:
    evil = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
    person = visit()
    body = stream_of(*text_events(evil), DONE)
    person.page.route(
        ANSWERS, lambda r: r.fulfill(status=200, content_type="text/event-stream", body=body)
    )
    person.say(evil)
    assert person.shown(person.answer) == [evil]
    assert person.shown(person.page.locator(".user")) == [evil]
    with person.page.expect_download() as download:
        person.button("Download the conversation").click()
        person.page.get_by_role("button", name="Page .html").click()
    download.value.save_as(tmp_path / "conversation.html")
    other = person.page.context.new_page()
    other.goto((tmp_path / "conversation.html").as_uri())
    assert other.locator("article p").all_inner_texts() == [evil, evil]
    assert other.locator("img, script").count() == 0
    assert "owned" not in (person.page.title(), other.title())


def test_the_page_has_no_inline_code_and_parses_no_markup() -> None:
    for path in app.PAGE.iterdir():
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)
        if path.suffix == ".html":
            assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=", text)
        hosts = set(re.findall(r"https?://[^/\"'\s)]+", text))
        assert hosts <= {"http://www.w3.org"}, path  # the name of SVG


# --- what goes wrong


def refuse(status: int, code: str, message: str, **headers: str) -> Callable[[Route], None]:
    error = {"error": {"message": message, "code": code}}
    return lambda route: route.fulfill(
        status=status,
        headers={name.replace("_", "-"): value for name, value in headers.items()},
        content_type="application/json",
        body=json.dumps(error),
    )


def test_a_busy_server_is_asked_again_when_it_said(visit: Visit) -> None:
    person = visit()
    person.page.route(ANSWERS, refuse(429, "too_many_requests", "x", Retry_After="2"), times=1)
    person.say("hello", wait=False)
    error = person.answer.locator(".error")
    expect(error).to_contain_text("The server is busy with other answers. Trying again in 2 s.")
    expect(error).to_contain_text("Trying again in 1 s.")
    expect(person.answer.locator(".text")).to_be_visible(timeout=10_000)
    person.wait()
    person.page.route(ANSWERS, refuse(503, "unavailable", "Loading.", Retry_After="30"), times=1)
    person.say("hello", wait=False)
    expect(error).to_contain_text("Loading. Trying again in 30 s.")
    person.page.keyboard.press("Escape")
    expect(error.get_by_role("button", name="Try again")).to_be_visible()
    error.get_by_role("button", name="Try again").click()
    expect(error).to_have_count(0)
    person.wait()
    assert person.shown(person.answer) != []


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("unreachable", "The server cannot be reached"),
        ("cut", "The connection was lost before the answer was whole."),
        ("failed", "The model computed numbers that are not finite."),
        pytest.param("ending", "The server is ending.", marks=pytest.mark.slow),
        pytest.param("no json", "The server answered with status 502.", marks=pytest.mark.slow),
    ],
)
def test_what_goes_wrong_is_said_in_place_and_can_be_tried_again(
    visit: Visit, how: str, words: str
) -> None:
    failed = {"error": {"code": "nonfinite_logits", "message": words}}
    streams = {
        "cut": [],
        "failed": [{"type": "response.failed", "response": failed}],
        "ending": [{"type": "error", "code": "unavailable", "message": words}],
    }

    def answer(route: Route) -> None:
        if how == "unreachable":
            route.abort()
        elif how == "no json":
            route.fulfill(status=502, body="<h1>Bad gateway</h1>")
        else:
            body = stream_of(*text_events("A cat"), *streams[how])
            route.fulfill(status=200, content_type="text/event-stream", body=body)

    person = visit()
    person.page.route(ANSWERS, answer, times=1)
    person.say("Draw a cat.")
    expect(person.answer.locator(".error")).to_contain_text(words)
    if how in streams:
        assert person.shown(person.answer) == ["A cat"]
    person.button("Try again").click()
    person.wait()
    assert person.shown(person.answer) == ["picture"]


def test_a_prompt_without_room_is_asked_again_without_its_oldest_turns(visit: Visit) -> None:
    person = visit()
    for words in ("hello", "What can you do?", "thanks"):
        person.say(words)
    long = refuse(400, "context_length_exceeded", "The prompt is too long: it takes 600 tokens.")
    person.page.route(ANSWERS, long, times=2)
    with person.page.expect_response(lambda r: r.status == 200 and "responses" in r.url) as got:
        person.say("Draw a cat.")
    asked = [i["content"][0]["text"] for i in got.value.request.post_data_json["input"]]
    assert asked[::2] == ["thanks", "Draw a cat."]
    expect(person.page.locator(".divider:visible")).to_have_count(1)
    person.page.route(ANSWERS, long)
    person.say("hello")
    expect(person.answer.locator(".error")).to_contain_text("it takes 600 tokens")


def test_a_key_is_asked_for_and_kept_for_the_tab(visit: Visit, page_model: Chameleon) -> None:
    with serving(lambda: page_model, api_key="sesame") as server:
        person = visit(server.url)
        dialog = person.page.get_by_role("dialog")
        person.say("hello", wait=False)
        dialog.get_by_label("API key").fill("wrong")
        dialog.get_by_role("button", name="Go on").click()
        expect(dialog.get_by_label("API key")).to_have_value("")
        dialog.get_by_label("API key").fill("sesame")
        person.page.keyboard.press("Enter")
        expect(dialog).to_be_hidden()
        person.wait()
        assert person.shown(person.answer) == ["Hello! What shall I draw?"]
        person.page.reload()
        person.say("hello")
        assert person.page.locator(".error").count() == 0
        stored = person.page.evaluate("JSON.stringify([{...localStorage}, document.cookie])")
        assert "sesame" not in stored
        person.page.context.close()


@pytest.mark.parametrize(
    ("name", "ending"),
    [("Data", "json"), *(pytest.param(*kind, marks=pytest.mark.slow) for kind in OTHER_FILES)],
)
def test_the_conversation_is_downloaded_with_its_pictures(
    visit: Visit, tmp_path: Path, name: str, ending: str
) -> None:
    person = visit()
    person.say("Draw a cat.")
    src = person.answer.locator("figure img").get_attribute("src") or ""
    person.button("Download the conversation").click()
    with person.page.expect_download() as download:
        person.page.get_by_role("button", name=name).click()
    assert download.value.suggested_filename.endswith(f".{ending}")
    download.value.save_as(tmp_path / "file")
    text = (tmp_path / "file").read_text(encoding="utf-8")
    assert "Draw a cat." in text
    if ending == "json":
        items = json.loads(text)["input"]
        assert items[1]["result"] == src.split(",")[1]
    else:
        assert src in text
