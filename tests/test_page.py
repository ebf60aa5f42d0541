"""The web page in a real browser: whole conversations with `nano`, by mouse, key and finger."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import PIL.Image
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("playwright")

from page_driver import Person, plain, png
from playwright.sync_api import expect
from serving import Running, until

from openchameleon.world.atlas import PRESETS
from openchameleon.world.checker import check
from openchameleon.world.render import render
from openchameleon.world.scene import Placed, Scene, cell_from_name

NANO = PRESETS["nano"]
DRAW = "Draw a cat at the top left and a pizza at the bottom right."
ANSWERS = "**/v1/responses"
Visit = Callable[..., Person]


def scene_of(picture: PIL.Image.Image) -> set[tuple[str, str]]:
    """(what, where) of all that the checker finds in a drawing."""
    scene = check(picture.convert("RGB"), NANO).as_scene()
    assert scene is not None
    return {(o.name, o.cell) for o in scene.objects}  # type: ignore[misc]


def placed(*objects: tuple[str, str]) -> set[tuple[str, object]]:
    return {(name, cell_from_name(NANO.grid, cell)) for name, cell in objects}


def shown_picture() -> bytes:
    scene = Scene("white", [Placed(cell_from_name(NANO.grid, "top left"), "dog")])
    return png(render(scene, NANO))


# --- conversations with the model


def test_a_conversation_with_an_upload_and_an_interleaved_answer(visit: Visit) -> None:
    person = visit()
    person.attach(("dog.png", "image/png", shown_picture()))
    person.editor.press_sequentially("What is at the top left?")
    person.button("Send").click()
    person.wait()
    assert person.shown(person.page.locator(".user")) == ["picture", "What is at the top left?"]
    assert person.shown(person.answer) == ["dog"]

    person.button("New conversation").click()
    person.say("Tell a story about a rocket.")
    kinds = [part if part == "picture" else "text" for part in person.shown(person.answer)]
    assert kinds[:4] == ["text", "picture", "text", "picture"]
    expect(person.page.get_by_role("status").last).to_contain_text("rocket")


@pytest.mark.usefixtures("slow_engine")
def test_a_drawing_grows_in_its_place_and_is_what_was_asked(visit: Visit, tmp_path: Path) -> None:
    person = visit()
    person.page.evaluate(
        """() => {
            window.seen = [];
            new MutationObserver((changes) => {
                for (const { target } of changes) seen.push(Number(target.ariaValueNow));
            }).observe(document.getElementById("turns"),
                       { subtree: true, attributeFilter: ["aria-valuenow"] });
        }"""
    )
    person.say(DRAW, wait=False)
    expect(person.page.get_by_role("progressbar", name="Drawing")).to_be_visible()
    person.wait()
    seen = person.page.evaluate("seen")
    assert seen == sorted(seen)
    assert len(set(seen)) > 4, "the picture came in few steps"
    asked = placed(("cat", "top left"), ("pizza", "bottom right"))
    assert scene_of(person.picture(person.answer)) == asked

    person.answer.hover()
    with person.page.expect_download() as download:
        person.button("Save the picture").click()
    download.value.save_as(tmp_path / "saved.png")
    assert download.value.suggested_filename == "picture-1.png"
    assert scene_of(PIL.Image.open(tmp_path / "saved.png")) == asked


@pytest.mark.usefixtures("slow_engine")
def test_stopping_keeps_what_came_and_ends_the_work(visit: Visit, page_server: Running) -> None:
    person = visit()
    person.say("Tell a story about a cat.", wait=False)
    expect(person.answer.locator("figure img[src]").first).to_be_visible()
    person.page.keyboard.press("Escape")
    expect(person.answer.locator(".note")).to_have_text("Stopped.")
    assert person.shown(person.answer)[1:] == ["picture"]
    until(lambda: page_server.service.n_open == 0, 5)
    # Half a picture is not given back to the model, the sentence before it is.
    with person.page.expect_request(ANSWERS) as request:
        person.say("What can you do?")
    kinds = [item["type"] for item in request.value.post_data_json["input"]]
    assert kinds == ["message", "message", "message"]


def test_answering_again_with_a_fixed_seed_gives_the_same_picture(visit: Visit) -> None:
    person = visit()
    person.button("Settings of the answer").click()
    person.page.get_by_label("Seed").fill("7")
    person.button("Done").click()
    person.say("Draw a dog.")
    first = person.picture(person.answer)
    with person.page.expect_request(ANSWERS) as request:
        person.button("Answer again").click()
    person.wait()
    assert request.value.post_data_json["seed"] == 7
    assert person.picture(person.answer).tobytes() == first.tobytes()
    assert person.page.locator(".turn").count() == 2


def test_the_settings_are_in_the_request_and_survive_a_reload(visit: Visit) -> None:
    person = visit()
    person.button("Settings of the answer").click()
    person.page.get_by_label("Guidance").fill("2.5")
    person.page.get_by_label("Temperature").fill("0")
    person.page.get_by_text("A picture", exact=True).click()
    person.page.keyboard.press("Escape")
    person.page.reload()
    with person.page.expect_request(ANSWERS) as request:
        person.say("Draw a cat.")
    body = request.value.post_data_json
    assert (body["guidance"], body["temperature"], body["mode"]) == (2.5, 0, "image")
    assert 0 <= body["seed"] < 2**53
    assert person.shown(person.answer) == ["picture"]
    expect(person.button("Settings of the answer, 3 changed")).to_be_visible()


def test_the_last_message_can_be_edited(visit: Visit) -> None:
    person = visit()
    person.say("hello")
    person.say("Draw a cat at the top.")
    person.button("Edit your message").click()
    expect(person.editor).to_have_text("Draw a cat at the top. ")
    person.button("Cancel").click()
    expect(person.page.locator(".turn")).to_have_count(4)
    person.button("Edit your message").click()
    person.say("Draw a dog at the top.")
    assert person.page.locator(".user .body").all_inner_texts() == [
        "hello",
        "Draw a dog at the top.",
    ]
    assert {name for name, _ in scene_of(person.picture(person.answer))} == {"dog"}


def test_a_suggestion_is_one_click(visit: Visit) -> None:
    person = visit()
    person.page.locator("#suggestions button").first.click()
    person.wait()
    assert person.shown(person.answer) != []
    expect(person.page.locator("#welcome")).to_be_hidden()


def test_a_reload_brings_the_conversation_and_the_draft_back(visit: Visit) -> None:
    person = visit()
    person.attach(("dog.png", "image/png", shown_picture()))
    person.editor.press_sequentially("What is at the top left?")
    person.page.keyboard.press("Enter")
    person.wait()
    person.say("Draw a cat.")
    person.editor.fill("not sent yet")
    person.page.wait_for_timeout(500)
    before = person.everything
    person.page.reload()
    expect(person.editor).to_have_text("not sent yet ")
    assert len(before) == 5
    assert person.everything == before
    with person.page.expect_request(ANSWERS) as request:
        person.say("Where is the cat?")
    assert len(request.value.post_data_json["input"]) == 5

    person.button("New conversation").click()
    expect(person.page.locator(".turn")).to_have_count(0)
    person.button("Bring the old one back").click()
    expect(person.page.locator(".turn")).to_have_count(6)


def test_a_reload_right_after_an_answer_keeps_it(visit: Visit) -> None:
    person = visit()
    person.say("hello")
    person.page.reload()
    expect(person.answer).to_contain_text("Hello! What shall I draw?")


@pytest.mark.slow
@pytest.mark.usefixtures("slow_engine")
def test_a_reload_in_the_middle_of_an_answer_keeps_what_had_come(visit: Visit) -> None:
    person = visit()
    person.say("Tell a story about a cat.", wait=False)
    expect(person.answer.locator("figure img[src]").first).to_be_visible()
    person.page.wait_for_timeout(600)
    person.page.reload()
    expect(person.answer.locator(".note")).to_have_text("Stopped when the page was left.")
    assert person.shown(person.answer)[0].startswith("A cat")
    person.button("Answer again").click()
    person.wait()
    assert len(person.shown(person.answer)) > 2


@pytest.mark.slow
def test_a_conversation_longer_than_the_context_goes_on_without_its_beginning(visit: Visit) -> None:
    person = visit()
    for _ in range(12):
        person.say(DRAW)
        assert person.page.locator(".error").count() == 0
    assert person.page.locator(".divider:visible").count() == 1


# --- writing a message


def test_pictures_stand_among_the_words_where_they_were_put(visit: Visit) -> None:
    person = visit()
    person.editor.press_sequentially("From this ")
    person.attach(("red.png", "image/png", plain("red")))
    person.editor.press_sequentially("to that ")
    person.attach(
        ("blue.png", "image/png", plain("blue")), ("lime.png", "image/png", plain("lime"))
    )
    order = "[...document.querySelectorAll('.chip')].map(chip => chip.title)"
    assert person.page.evaluate(order) == ["red.png", "blue.png", "lime.png"]
    lime = person.page.get_by_role("group", name="Picture lime.png")
    lime.focus()
    for _ in range(4):  # over blue, over "that", over "to", over red
        person.page.keyboard.press("ArrowLeft")
    assert person.page.evaluate(order) == ["lime.png", "red.png", "blue.png"]
    expect(lime).to_be_focused()
    person.page.get_by_role("group", name="Picture blue.png").focus()
    person.page.keyboard.press("Delete")
    with person.page.expect_request(ANSWERS) as request:
        person.page.keyboard.press("Enter")
    content = request.value.post_data_json["input"][0]["content"]
    assert [part.get("text", "picture") for part in content] == [
        "From this", "picture", "picture", "to that"
    ]  # fmt: skip


@pytest.mark.parametrize("how", ["paste", "drop"])
def test_pictures_are_pasted_and_dropped(visit: Visit, how: str) -> None:
    person = visit()
    person.editor.focus()
    person.page.evaluate(
        """([how, bytes]) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], "red.png", { type: "image/png" }));
            const target = document.getElementById("editor");
            const box = target.getBoundingClientRect();
            const at = { bubbles: true, cancelable: true, clientX: box.x + 9, clientY: box.y + 20 };
            target.dispatchEvent(how === "paste"
                ? new ClipboardEvent("paste", { ...at, clipboardData: data })
                : new DragEvent("drop", { ...at, dataTransfer: data }));
        }""",
        [how, list(plain("red"))],
    )
    expect(person.page.locator(".chip")).to_have_count(1)


def test_pasted_markup_is_pasted_as_text(visit: Visit) -> None:
    person = visit()
    person.editor.focus()
    person.page.evaluate(
        """() => {
            const data = new DataTransfer();
            data.setData("text/plain", "<b>bold</b>");
            data.setData("text/html", "<b>bold</b><img src=x onerror=alert(1)>");
            document.getElementById("editor").dispatchEvent(new ClipboardEvent(
                "paste", { bubbles: true, cancelable: true, clipboardData: data }));
        }"""
    )
    expect(person.editor).to_have_text("<b>bold</b>")
    assert person.page.locator("#editor *").count() == 0


def test_a_picture_that_is_too_large_or_none_is_refused_before_it_is_sent(
    visit: Visit, tmp_path: Path
) -> None:
    large, svg = tmp_path / "large.png", tmp_path / "a.svg"
    with large.open("wb") as file:
        file.truncate(21 << 20)
    svg.write_text('<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>')
    person = visit()
    n_before = len(person.requested)
    files = person.page.locator("#files")
    files.set_input_files(large)
    problem = person.page.locator("#problem")
    expect(problem).to_have_text("large.png is too large: it has 21 MB; the most is 20 MB.")
    files.set_input_files(svg)
    expect(problem).to_contain_text("a.svg cannot be read as a picture.")
    assert person.page.locator(".chip").count() == 0
    assert person.requested[n_before:] == []


def test_a_photograph_is_made_smaller_before_it_is_sent(visit: Visit) -> None:
    person = visit()
    person.attach(("wide.png", "image/png", png(PIL.Image.new("RGB", (3000, 1000), "red"))))
    with person.page.expect_request(ANSWERS) as request:
        person.button("Send").click()
    person.wait()
    assert len(request.value.post_data or "") < 100_000
    assert person.picture(person.page.locator(".user")).size == (1024, 341)


# --- seeing, hearing, typing


def test_the_keyboard_is_enough(visit: Visit) -> None:
    person = visit()
    keys = person.page.keyboard
    expect(person.editor).to_be_focused()
    keys.type("Draw a cat")
    keys.press("Shift+Enter")
    keys.type("at the top.")
    keys.press("Enter")
    person.wait()
    assert person.page.locator(".user .text").inner_text() == "Draw a cat\nat the top."
    reached = []
    person.page.locator("body").evaluate("() => document.activeElement.blur()")
    for _ in range(14):
        keys.press("Tab")
        outline, name = person.page.evaluate(
            """() => { const at = document.activeElement;
                return [getComputedStyle(at).outlineStyle,
                        at === document.body ? "" : at.ariaLabel || at.textContent.trim()
                            || at.querySelector("img")?.alt || at.title]; }"""
        )
        reached.append(name)
        # The frame around the editor shows its focus.
        assert outline != "none" or name in ("Message", ""), f"no focus to be seen on {name}"
    for name in ["New conversation", "Light or dark", "Edit your message", "Save the picture",
                 "Answer again", "Message", "Add pictures", "Settings of the answer"]:  # fmt: skip
        assert any(name in r or (name == "Light or dark" and "theme" in r) for r in reached), (
            name, reached)  # fmt: skip
    person.button("Answer again").focus()
    keys.press("Enter")
    person.wait()
    person.answer.locator(".enlarge").focus()
    keys.press("Enter")
    expect(person.page.get_by_role("dialog", name="Picture")).to_be_visible()
    keys.press("Escape")
    expect(person.answer.locator(".enlarge")).to_be_focused()


def test_every_control_and_picture_has_a_name(visit: Visit) -> None:
    person = visit()
    person.attach(("dog.png", "image/png", shown_picture()))
    person.say("Draw a cat.")
    unnamed = person.page.evaluate(
        """() => [...document.querySelectorAll("button, a, input, img, [role=textbox]")]
            .filter(e => !(e.ariaLabel || e.textContent.trim() || e.labels?.length || e.alt
                           || e.querySelector("img[alt]") || e.hidden
                           || e.closest("dialog") || e.closest(".chip")))
            .map(e => e.outerHTML)"""
    )
    assert unnamed == []
    assert person.page.evaluate("document.documentElement.lang") == "en"


def test_the_theme_is_the_systems_until_another_is_chosen(visit: Visit) -> None:
    def background(person: Person) -> int:
        value = person.page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(map(int, re.findall(r"\d+", value)[:3]))

    light, dark = visit(color_scheme="light"), visit(color_scheme="dark")
    assert background(light) > 700
    assert background(dark) < 100
    light.button("Dark theme").click()
    assert background(light) < 100
    light.page.reload()
    assert background(light) < 100
    expect(light.button("Dark theme")).to_have_attribute("aria-pressed", "true")


def test_a_phone_shows_everything(visit: Visit) -> None:
    person = visit(viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True)
    person.say("Tell a story about a dog.")
    person.say("A very long word: " + "a" * 200)
    wide = "document.documentElement.scrollWidth <= 360 && scroller.scrollWidth <= 360"
    assert person.page.evaluate(wide)
    for name in ("New conversation", "Add pictures", "Settings of the answer", "Send"):
        box = person.button(name).bounding_box()
        assert box is not None, name
        assert box["x"] >= 0, name
        assert box["x"] + box["width"] <= 360, name
        assert min(box["width"], box["height"]) >= 36, f"{name} is too small for a finger"
    size = person.editor.evaluate("e => parseFloat(getComputedStyle(e).fontSize)")
    assert size >= 16, "a phone would zoom in"
    person.button("Settings of the answer").tap()
    expect(person.button("Done")).to_be_in_viewport()


@pytest.mark.usefixtures("slow_engine")
def test_the_page_follows_the_answer_until_the_reader_scrolls_up(visit: Visit) -> None:
    person = visit(viewport={"width": 800, "height": 420})
    scroller = person.page.locator("#scroller")
    end = "e => e.scrollHeight - e.scrollTop - e.clientHeight"
    person.say("Tell a story about a cat.", wait=False)
    expect(person.answer.locator("figure")).to_have_count(2, timeout=20_000)
    assert scroller.evaluate(end) < 60
    person.page.mouse.move(400, 200)
    person.page.mouse.wheel(0, -300)
    expect(person.page.get_by_role("button", name="Latest")).to_be_visible()
    top = scroller.evaluate("e => e.scrollTop")
    person.wait()
    assert scroller.evaluate("e => e.scrollTop") == top
    person.page.get_by_role("button", name="Latest").click()
    assert scroller.evaluate(end) < 60


@pytest.mark.slow
def test_less_motion_where_it_is_asked_for(visit: Visit) -> None:
    for wish, names in (("reduce", {"none"}), ("no-preference", {"pulse"})):
        person = visit(reduced_motion=wish)
        person.page.route(ANSWERS, lambda _: None)  # an answer that never comes
        person.say("hello", wait=False)
        animation = "getComputedStyle(document.querySelector('.waiting .body'), '::after')"
        assert {person.page.evaluate(f"{animation}.animationName")} == names


def test_the_api_is_a_page_to_read(visit: Visit, page_server: Running) -> None:
    page = visit().page
    page.goto(f"{page_server.url}/docs")
    expect(page.locator("h2", has_text="POST/v1/responses")).to_be_visible()
    fields = page.locator("#operations dl").first
    expect(fields).to_contain_text("guidance")
    expect(fields).to_contain_text("number (0 to 100)")
    _, _, described = page_server.ask("GET", "/openapi.json")
    n_ways = sum(len(ways) for ways in described["paths"].values())
    expect(page.locator("h2 .method")).to_have_count(n_ways)
