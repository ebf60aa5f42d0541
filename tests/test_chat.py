"""`openchameleon chat`: turns and commands from lines, and no mistake that ends a conversation."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from openchameleon import pipeline
from openchameleon.cli.main import main
from openchameleon.cli.segments import read_line
from openchameleon.document import Conversation, Document, Image, Message, Text
from openchameleon.errors import UserError
from openchameleon.tokenizer.mixed import Event, ImageDone, ImageProgress, TextDelta

RED = PIL.Image.new("RGB", (16, 16), "red")


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


Talk = Callable[..., tuple[str, str]]


@pytest.fixture
def talk(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Talk:
    """Gives lines to the program, which must end well; what it says on stdout and on stderr."""

    def run(*lines: str, options: tuple[str, ...] = ()) -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        assert main(["chat", "--model", str(model_folder), *options]) == 0
        return capsys.readouterr()

    return run


class Listener:
    """Stands for `Chameleon.stream`: keeps what was asked, and answers "1", "2" ..."""

    def __init__(self) -> None:
        self.asked: list[list[Any]] = []
        self.wishes: list[dict[str, Any]] = []

    def __call__(self, prompt: Conversation, **wishes: Any) -> Iterator[Event]:
        self.asked.append([shown(message.document) for message in prompt.messages])
        self.wishes.append(wishes)
        return self.answer(len(self.asked))

    def answer(self, number: int) -> Iterator[Event]:
        yield TextDelta(f"{number}")


def listen(monkeypatch: pytest.MonkeyPatch, listener: Listener) -> Listener:
    monkeypatch.setattr(pipeline.Chameleon, "stream", lambda _, *a, **k: listener(*a, **k))
    return listener


@pytest.fixture
def listener(monkeypatch: pytest.MonkeyPatch) -> Listener:
    return listen(monkeypatch, Listener())


def shown(document: Document) -> Any:
    """Text as it is, a picture as the colour of its corner; alone where it is one segment."""
    parts = [s.text if isinstance(s, Text) else s.pil.getpixel((0, 0)) for s in document]
    return parts[0] if len(parts) == 1 else parts


# what a line spells


def test_words_and_pictures_stand_in_the_order_they_were_typed() -> None:
    RED.save("red.png")
    RED.save("my red.png")
    red = (255, 0, 0)
    for line, parts in {
        "what is it?": "what is it?",
        'say "hi",  don\'t  shout': 'say "hi",  don\'t  shout',
        "@red.png": red,
        "is @red.png like @red.png?": ["is", red, "like", red, "?"],
        "a@red.png @@red.png @@": "a@red.png @red.png @",
        '@"my red.png" is': [red, "is"],
        "@my\\ red.png is": [red, "is"],
        "@'my red.png'@": [],
    }.items():
        if parts:
            assert shown(read_line(line)) == parts, line
    with pytest.raises(UserError, match="no picture my red"):
        read_line("@'my red.png'x")


def test_a_number_names_a_picture_of_the_conversation() -> None:
    blue = PIL.Image.new("RGB", (16, 16), "blue")
    assert read_line("is @2? red", [RED, blue]).images == [blue]
    for line, words in (("@3", r"@3: there are @1 \.\. @2"), ("@0", "no picture @0")):
        with pytest.raises(UserError, match=words):
            read_line(line, [RED, blue])
    with pytest.raises(UserError, match="there is none yet"):
        read_line("@1")
    with pytest.raises(UserError, match="names no file"):
        read_line("what is @ ?")


# conversations


def test_an_answer_is_that_of_the_model_to_all_turns_so_far(model_folder: Path, talk: Talk) -> None:
    options = ("--seed", "3", "--mode", "text", "--max-tokens", "6")
    out, _ = talk("a cat", "and a dog", options=options)
    model = pipeline.Chameleon.from_pretrained(model_folder)
    first = model.generate("a cat", seed=3, mode="text", max_tokens=6)
    turns = [Message("user", Document(["a cat"])), Message("assistant", first),
             Message("user", Document(["and a dog"]))]  # fmt: skip
    second = model.generate(Conversation(turns), seed=3, mode="text", max_tokens=6)
    assert out.split() == (first.text + " " + second.text).split()


def test_turns_are_remembered_taken_back_asked_again_and_forgotten(
    talk: Talk, listener: Listener
) -> None:
    talk("a", "", "b", "/retry", "/undo", "c", "/new", "//d", "/undo", "/retry")
    assert listener.asked == [
        ["a"], ["a", "1", "b"], ["a", "1", "b"], ["a", "1", "c"], ["/d"], ["/d"],
    ]  # fmt: skip


def test_settings_hold_for_the_answers_after_them(talk: Talk, listener: Listener) -> None:
    _, said = talk("a", "/seed 5", "/temperature 0", "b", "/retry", "/guidance 2.5", "/mode image",
                   "/temperature", "c", "/mode", "/seed", "d", "d")  # fmt: skip
    seeds = [wishes["seed"] for wishes in listener.wishes]
    assert seeds[1:4] == [5, 6, 6], "asked again, with the next seed"
    assert len({seeds[0], seeds[4], seeds[5]}) == 3, "a new one each time"
    for name, values in {
        "temperature": [None, 0.0, 0.0, None, None],
        "guidance": [None, None, None, 2.5, 2.5],
        "mode": ["interleaved", "interleaved", "interleaved", "image", None],
    }.items():
        assert [wishes[name] for wishes in listener.wishes[:5]] == values
    assert "mode image, seed 6, temperature as the model has it, guidance 2.5" in said


def test_no_mistake_ends_a_conversation(talk: Talk, listener: Listener, tmp_path: Path) -> None:
    (tmp_path / "letter.png").write_text("Dear Sir or Madam")
    mistakes = {
        "@no.png": "no picture no.png",
        "see @letter.png": "not a picture",
        "@4": "no picture @4",
        "/sed 3": "Did you mean 'seed'?",
        "/seed two": "/seed two cannot be",
        "/temperature nan": "temperature = nan",
        "/guidance -1": "guidance",
        "/mode sound": "mode = 'sound'",
        "/undo": "no turn to take back",
        "/retry": "Nothing was asked yet",
        "/save": "name of a file",
        "/save talk": "nothing to save yet",
        "/undo it": "takes nothing",
    }
    out, said = talk(*mistakes, "a", "/save no/such/folder/talk.md", "b")
    assert out == "1\n2\n"
    lines = said.splitlines()
    assert len(lines) == len(mistakes) + 1
    for line, words in zip(lines, [*mistakes.values(), "No such file"], strict=True):
        assert line.startswith("openchameleon: ")
        assert words in line
    assert listener.asked[0] == ["a"], "a turn that failed is not remembered"


def test_a_failure_of_the_model_is_a_sentence(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(Listener):
        def answer(self, number: int) -> Iterator[Event]:
            if number == 1:
                yield TextDelta("so f")
                raise RuntimeError("out of memory")
            yield TextDelta("fine")

    failing = listen(monkeypatch, Failing())
    out, said = talk("a", "b")
    assert out == "so f\nfine\n"
    assert said == "openchameleon: out of memory\n"
    assert failing.asked[1] == ["a", "so f", "b"]


def test_pictures_are_numbered_through_the_conversation(
    talk: Talk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Drawing(Listener):
        def answer(self, number: int) -> Iterator[Event]:
            yield TextDelta("Here:")
            yield ImageProgress(0, 4)
            yield ImageDone(PIL.Image.new("RGB", (16, 16), (0, 0, number)))

    drawing = listen(monkeypatch, Drawing())
    RED.save("red.png")
    lines = ("like @red.png", "and @2 beside @1", "/undo", "another", "/save talk", "/save talk")
    out, said = talk(*lines, options=("--out", "out"))
    assert re.findall(r"\[(.*)\]", out) == [str(Path(f"out/image-{n}.png")) for n in (2, 3, 4)]
    assert drawing.asked[1][2] == ["and", (0, 0, 1), "beside", (255, 0, 0)]
    assert sorted(p.name for p in tmp_path.glob("talk*")) == [
        "talk-1.png", "talk-2.png", "talk-3.png", "talk.md",
    ]  # fmt: skip
    assert PIL.Image.open("talk-3.png").getpixel((0, 0)) == (0, 0, 3)
    text = (tmp_path / "talk.md").read_text()
    assert text.startswith(
        "## You\n\nlike\n\n![talk-1](talk-1.png)\n\n## tiny\n\nHere:\n\n![talk-2]"
    )
    assert "talk.md exists already" in said
    monkeypatch.setattr(sys, "stdin", io.StringIO("draw\n"))
    assert main(["chat", "--out", "out"]) == 2, "pictures that are there are not overwritten"


def test_each_answer_is_a_line_of_json_on_request(talk: Talk, listener: Listener) -> None:
    out, _ = talk("a", "/seed 5", "b", options=("--json",))
    first, second = map(json.loads, out.splitlines())
    assert first["segments"] == [{"text": "1"}]
    assert second == {"seed": 5, "segments": [{"text": "2"}]}
    assert first["seed"] == listener.wishes[0]["seed"]


def test_turns_that_outgrow_the_context_are_left_out_and_it_is_said(
    talk: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The context is 64, of which a quarter is kept for the answer."""
    lengths: list[int] = []
    ask = pipeline.Chameleon.stream

    def counted(self: pipeline.Chameleon, prompt: Conversation, **wishes: Any) -> Any:
        lengths.append(len(self.tokenizer.render_prompt(prompt)))
        return ask(self, prompt, **wishes)

    monkeypatch.setattr(pipeline.Chameleon, "stream", counted)
    turn = "a cat and a dog what is the pizza at"
    options = ("--mode", "text", "--seed", "1", "--max-tokens", "4")
    _, said = talk(turn, turn, turn, turn, turn, options=options)
    assert len(lengths) == 5
    assert max(lengths) + 4 <= 64
    assert max(lengths) > 32, "what fits is kept"
    told = [line for line in said.splitlines() if "left out" in line]
    assert "longer than the 64 tokens that the model holds: the first turn is left out" in told[0]
    assert "first 2 turns are left out" in told[1]
    assert len(told) == len(said.splitlines())


def test_a_turn_too_long_by_itself_is_refused_and_the_next_is_answered(talk: Talk) -> None:
    out, said = talk("cat " * 100, "a cat", options=("--mode", "text", "--max-tokens", "4",
                                                     "--temperature", "0"))  # fmt: skip
    assert out.strip()
    assert said.count("\n") == 1
    assert "The prompt is too long" in said


def test_a_document_is_counted_as_it_is_encoded(model_folder: Path) -> None:
    tokenizer = pipeline.load_tokenizer(model_folder)
    document = Document(["a cat", Image(RED), "and", Image(RED)])
    assert tokenizer.n_ids(document) == len(tokenizer.encode(document))


# Ctrl-C


class Interrupted(Listener):
    def answer(self, number: int) -> Iterator[Event]:
        yield TextDelta("once upon")
        signal.raise_signal(signal.SIGINT)
        yield TextDelta(" a time")
        yield TextDelta(" there was")


def test_ctrl_c_ends_the_answer_and_keeps_what_came(
    talk: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted = listen(monkeypatch, Interrupted())
    before = signal.getsignal(signal.SIGINT)
    out, said = talk("a", "b")
    assert out == "once upon a time\n" * 2
    assert said == "openchameleon: stopped; what came is kept.\n" * 2
    assert interrupted.asked[1] == ["a", "once upon a time", "b"]
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_while_pictures_are_read_stops_before_the_first_word(
    talk: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Early(Listener):
        def __call__(self, prompt: Conversation, **wishes: Any) -> Iterator[Event]:
            signal.raise_signal(signal.SIGINT)
            return super().__call__(prompt, **wishes)

    early = listen(monkeypatch, Early())
    out, said = talk("a", "/retry")
    assert out == ""
    assert said == "openchameleon: stopped; nothing had come.\n" * 2
    assert early.asked == [["a"], ["a"]]


def test_a_second_ctrl_c_ends_a_step_that_does_not(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stuck(Listener):
        def answer(self, number: int) -> Iterator[Event]:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            yield TextDelta("never")

    listen(monkeypatch, Stuck())
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\n"))
    assert main(["chat", "--model", str(model_folder)]) == 130


SLOWLY = """
import sys, time
from openchameleon import pipeline
from openchameleon.cli.main import main
stream = pipeline.Chameleon.stream
def slowly(*arguments, **wishes):
    for event in stream(*arguments, **wishes):
        time.sleep(0.04)
        yield event
pipeline.Chameleon.stream = slowly
sys.exit(main())
"""
"""The program, its answers slow enough to be stopped."""


class Screen:
    """The program on a terminal of its own."""

    def __init__(self, *options: str) -> None:
        self.master, end = pty.openpty()
        command = [sys.executable, "-c", SLOWLY, "chat", *options]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TERM": "xterm"}
        self.process = subprocess.Popen(command, stdin=end, stdout=end, stderr=end,
                                        env=environment, start_new_session=True,
                                        preexec_fn=take_terminal)  # fmt: skip
        os.close(end)
        self.seen = self.all = ""

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def interrupt(self) -> None:
        """Ctrl-C, a moment after what was typed: a signal that comes with a key may be lost."""
        time.sleep(0.3)
        self.type("\x03")

    def wait_for(self, words: str, seconds: float = 60) -> None:
        """Reads until the words come, and forgets what came before their end."""
        end = time.monotonic() + seconds
        while words not in self.seen:
            assert time.monotonic() < end, f"{words!r} did not come: {self.seen!r}"
            if select.select([self.master], [], [], 0.1)[0]:
                new = os.read(self.master, 65536).decode(errors="replace")
                self.seen, self.all = self.seen + new, self.all + new
        self.seen = self.seen.partition(words)[2]


def take_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    # A shell starts what it puts in the background with SIGINT ignored, and so its children.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_on_a_terminal_ctrl_c_stops_an_answer_clears_a_line_and_ends(tmp_path: Path) -> None:
    screen = Screen("--seed", "1", "--no-preview", "--history", str(tmp_path / "typed"))
    try:
        screen.wait_for("Ctrl-D ends.")
        screen.wait_for("> ")
        screen.type("Tell a story about a cat.\n")
        screen.wait_for("image-1.png]")
        screen.type("\x03")
        screen.wait_for("stopped; what came is kept.")
        screen.wait_for("> ")
        screen.type("half a li")
        screen.wait_for("half a li")
        screen.interrupt()
        screen.wait_for("> ")
        screen.type("/save talk\n")
        screen.wait_for("written to talk.md")
        screen.wait_for("> ")
        screen.interrupt()
        assert screen.process.wait(20) == 0
    finally:
        screen.process.kill()
        screen.process.wait()
        os.close(screen.master)
    assert "Traceback" not in screen.all
    assert "![talk-1](talk-1.png)" in (tmp_path / "talk.md").read_text()
    assert (tmp_path / "typed").read_text().split("\n")[:2] == [
        "Tell a story about a cat.", "/save talk",
    ]  # fmt: skip
