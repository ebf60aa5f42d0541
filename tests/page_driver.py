"""A person at the web page: Chromium, driven through what is seen and named there."""

from __future__ import annotations

import base64
import io
import json
import shutil
from typing import Any

import PIL.Image
from playwright.sync_api import Browser, Locator, Page, Playwright, expect

FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
]  # fmt: skip
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def launch(playwright: Playwright) -> Browser:
    assert CHROMIUM is not None
    return playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)


class Person:
    """What a person does at the page, and what the page then shows."""

    def __init__(self, page: Page, address: str) -> None:
        self.page, self.address = page, address
        self.requested: list[str] = []
        self.complaints: list[str] = []
        page.on("request", lambda request: self.requested.append(request.url))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", lambda m: m.type == "error" and self.complaints.append(m.text))
        # The seeds that the page draws: the same ones in every run of a test.
        page.add_init_script("crypto.getRandomValues = (numbers) => numbers.fill(1)")
        page.goto(address)
        expect(page.locator("#suggestions button").first).to_be_attached()

    @property
    def editor(self) -> Locator:
        return self.page.get_by_role("textbox", name="Message")

    @property
    def answer(self) -> Locator:
        """The newest answer."""
        return self.page.locator(".assistant").last

    def button(self, name: str) -> Locator:
        return self.page.get_by_role("button", name=name, exact=True)

    def say(self, words: str, wait: bool = True) -> None:
        self.editor.fill(words)
        self.page.keyboard.press("Enter")
        if wait:
            self.wait()

    def wait(self) -> None:
        """Until nothing is being answered."""
        expect(self.button("Stop")).to_be_hidden(timeout=30_000)
        expect(self.answer).to_have_attribute("aria-busy", "false")

    def attach(self, *files: tuple[str, str, bytes]) -> None:
        """Chooses files: (name, type, content)."""
        before = self.page.locator(".chip").count()
        self.page.locator("#files").set_input_files(
            [{"name": name, "mimeType": kind, "buffer": data} for name, kind, data in files]
        )
        expect(self.page.locator(".chip")).to_have_count(before + len(files))

    def shown(self, turn: Locator) -> list[str]:
        """A turn's parts in order: its texts, and "picture" for a picture."""
        return turn.locator(".body > :visible").evaluate_all(
            "parts => parts.map(p => p.matches('figure') ? 'picture' : p.textContent)"
        )

    @property
    def everything(self) -> list[str]:
        """The texts and pictures (as data) of the conversation."""
        return self.page.locator(".body .text, .body img").evaluate_all(
            "parts => parts.map(p => p.src || p.textContent)"
        )

    def picture(self, turn: Locator, i: int = 0) -> PIL.Image.Image:
        """A picture of a turn, as its file holds it."""
        src = turn.locator("figure img").nth(i).get_attribute("src")
        assert src is not None
        return PIL.Image.open(io.BytesIO(base64.b64decode(src.split(",")[1])))


def png(picture: PIL.Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def plain(colour: str, size: int = 48) -> bytes:
    """The file of a picture of one colour."""
    return png(PIL.Image.new("RGB", (size, size), colour))


def stream_of(*events: dict[str, Any]) -> str:
    """The body of a streamed answer, for a route that takes the server's place."""
    return "".join(f"event: {e['type']}\ndata: {json.dumps(e)}\n\n" for e in events)


def text_events(text: str) -> list[dict[str, Any]]:
    item = {"type": "message", "id": "msg_1", "role": "assistant", "content": []}
    return [
        {"type": "response.output_item.added", "output_index": 0, "item": item},
        {"type": "response.output_text.delta", "item_id": "msg_1", "content_index": 0,
         "delta": text},
    ]  # fmt: skip


DONE = {"type": "response.completed", "response": {"status": "completed"}}
