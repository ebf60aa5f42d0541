"""The command line: what it writes, and one sentence with exit code 2 for whatever is wrong."""

from __future__ import annotations

import base64
import io
import json
import re
import struct
import sys
import zlib
from pathlib import Path

import PIL.Image
import pytest

from openchameleon import pipeline
from openchameleon.cli.main import main, parse
from openchameleon.document import Conversation, Document, Image
from openchameleon.errors import CheckpointError, Diverged, UserError
from openchameleon.preview import half_blocks, preview, way_of
from openchameleon.tokenizer.mixed import ImageDone, ImageProgress, TextDelta
from openchameleon.train.checkpoint import NoSpaceError


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    PIL.Image.linear_gradient("L").save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Runs a command that must be refused: exit code 2, one line on stderr, which is returned."""
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("openchameleon: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1, err
    return err


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header claims a size, with next to no data behind it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


# generate


def test_generate_writes_the_answer_and_its_pictures(model_folder: Path, tmp_path: Path) -> None:
    command = [
        "generate",
        "draw a cat",
        "--model",
        str(model_folder),
        "--out",
        "out",
        "--seed",
        "1",
    ]
    assert main([*command, "--mode", "image"]) == 0
    assert (tmp_path / "out/response.md").read_text() == "![image-1](image-1.png)\n"
    drawn = PIL.Image.open(tmp_path / "out/image-1.png")
    expected = pipeline.Chameleon.from_pretrained(model_folder).generate(
        Document(["draw a cat"]), mode="image", seed=1
    )
    assert drawn.tobytes() == expected.images[0].tobytes()


def test_generate_prints_text_and_writes_nothing_without_out(
    model_folder: Path, tmp_path: Path, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.iterdir())
    command = ["generate", "what", "--mode", "text", f"@{picture}", "--model", str(model_folder)]
    assert main([*command, "--seed", "1", "--max-tokens", "8"]) == 0
    prompt = Document(["what", Image(PIL.Image.open(picture).convert("RGB"))])
    expected = pipeline.Chameleon.from_pretrained(model_folder).generate(
        prompt, mode="text", seed=1, max_tokens=8
    )
    assert capsys.readouterr().out.strip() == expected.text.strip()
    assert sorted(tmp_path.iterdir()) == before


def test_pictures_without_out_go_to_a_new_folder_each_time(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        assert main(["generate", "draw", "--model", str(model_folder), "--mode", "image"]) == 0
    assert capsys.readouterr().out.split() == [
        f"[{Path('openchameleon-1/image-1.png')}]",
        f"[{Path('openchameleon-2/image-1.png')}]",
    ]
    assert (tmp_path / "openchameleon-2/response.md").is_file()


def test_generate_json_names_the_seed_that_repeats_it(
    model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", "a cat", "--model", str(model_folder), "--mode", "text", "--json"]
    assert main(command) == 0
    first = json.loads(capsys.readouterr().out)
    assert main([*command, "--seed", str(first["seed"])]) == 0
    assert json.loads(capsys.readouterr().out)["segments"] == first["segments"]


def test_an_answer_is_never_overwritten_unless_forced(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", "draw", "--model", str(model_folder), "--mode", "image", "--out", "out"]
    assert main(command) == 0
    before = (tmp_path / "out/image-1.png").read_bytes()
    assert "response.md exists already" in refusal(capsys, *command)
    (tmp_path / "out/response.md").unlink()
    assert "image-1.png exists already" in refusal(capsys, *command)
    assert (tmp_path / "out/image-1.png").read_bytes() == before
    assert main([*command, "--force"]) == 0


def test_a_forced_answer_leaves_nothing_of_the_one_before(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in ("image-1.png", "image-2.png", "response.md", "mine.txt", "image-mine.png"):
        (out / name).write_text("old")
    monkeypatch.setattr(pipeline.Chameleon, "stream", lambda *_, **__: iter([TextDelta("New.")]))
    command = ["generate", "what", "--model", str(model_folder), "--out", "out", "--force"]
    assert main(command) == 0
    assert {p.name: p.read_text() for p in out.iterdir()} == {
        "mine.txt": "old",
        "image-mine.png": "old",
        "response.md": "New.\n",
    }


def test_the_answer_is_written_when_its_reader_has_gone(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(pipeline.Chameleon, "stream", lambda *_, **__: iter([TextDelta("Hm.")]))
    command = ["generate", "what", "--model", str(model_folder), "--out", "out"]
    options = parse(command)
    monkeypatch.setattr(sys, "stdout", Gone())
    with pytest.raises(BrokenPipeError):
        options.run(options)
    assert (tmp_path / "out/response.md").read_text() == "Hm.\n"


def test_what_came_before_an_interruption_is_kept(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(*_: object, **__: object) -> object:
        yield TextDelta("Here is a cat:")
        yield ImageProgress(0, 4)
        yield ImageDone(PIL.Image.new("RGB", (16, 16), "red"))
        yield TextDelta("and th")
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline.Chameleon, "stream", cut)
    command = ["generate", "draw", "--model", str(model_folder), "--out", "out", "--no-preview"]
    assert main(command) == 130
    text = (tmp_path / "out/response.md").read_text()
    assert text == "Here is a cat:\n\n![image-1](image-1.png)\n\nand th\n"
    assert PIL.Image.open(tmp_path / "out/image-1.png").getpixel((0, 0)) == (255, 0, 0)


def test_two_at_signs_are_one_literal(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def listen(self: object, document: Document, **_: object) -> list[object]:
        seen.append(document.text)
        return []

    monkeypatch.setattr(pipeline.Chameleon, "stream", listen)
    assert main(["generate", "@@home", "a@b", "--model", str(model_folder)]) == 0
    assert seen == ["@home a@b"]


# bad pictures


def test_a_missing_picture_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no.png" in refusal(capsys, "generate", "what", "@no.png")
    assert "names no file" in refusal(capsys, "generate", "what", "@")


def test_a_file_that_is_no_picture_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "letter.png").write_text("Dear Sir or Madam")
    assert "not a picture" in refusal(capsys, "generate", "@letter.png")
    assert "not a picture" in refusal(capsys, "world", "check", "letter.png")
    assert "folder" in refusal(capsys, "generate", f"@{tmp_path}")


def test_a_truncated_picture_is_refused(picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = picture.read_bytes()
    picture.write_bytes(whole[: len(whole) // 2])
    assert "damaged" in refusal(capsys, "generate", f"@{picture}")


def test_a_decompression_bomb_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bomb.png").write_bytes(png_of_size(60_000, 60_000))
    assert "too large" in refusal(capsys, "generate", "@bomb.png")


# bad prompts, models and options


@pytest.mark.parametrize("prompt", [[""], ["  ", "\n"]])
def test_an_empty_prompt_is_refused(prompt: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "empty" in refusal(capsys, "generate", *prompt)


def test_a_prompt_longer_than_the_context_is_refused(
    model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "a cat and a dog " * 50
    assert "too long" in refusal(capsys, "generate", long, "--model", model_folder)


def test_an_unknown_model_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(capsys, "generate", "a cat", "--model", "nanoo")
    assert "'nanoo'" in message
    assert "no such folder" in message
    if "nano" in pipeline.embedded_models():
        assert "Did you mean 'nano'?" in message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--mode", "text", "--guidance", "3"], "--mode text"),
        (["--temperature", "0", "--top-p", "0.9"], "--temperature 0"),
        (["--force"], "--out"),
        (["--mode", "sound"], "sound"),
        (["--seed", "two"], "two"),
        (["--guidance"], "guidance"),
        (["--no-such-option"], "--no-such-option"),
    ],
)
def test_options_that_cannot_be_are_refused(
    options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refusal(capsys, "generate", "a cat", *options)


@pytest.mark.parametrize(
    "options",
    [
        ["--top-p", "0"],
        ["--temperature", "-1"],
        ["--temperature", "nan"],
        ["--guidance", "-2"],
        ["--max-tokens", "0"],
        ["--seed", "-5"],
    ],
)
def test_values_out_of_range_are_refused(
    options: list[str], model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = options[0].removeprefix("--").replace("-", "_")
    assert name in refusal(capsys, "generate", "a cat", "--model", model_folder, *options)


def test_an_out_that_cannot_be_a_folder_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").write_text("a file")
    assert "taken" in refusal(capsys, "generate", "a cat", "--out", "taken")
    assert (tmp_path / "taken").read_text() == "a file"


# the program


def test_an_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Did you mean 'generate'?" in refusal(capsys, "genrate")
    assert "Did you mean 'check'?" in refusal(capsys, "world", "chek")


def test_a_missing_argument_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert "SEGMENT" in refusal(capsys, "generate")
    assert "--out" in refusal(capsys, "world", "sample")


def test_the_debug_flag_shows_where_a_mistake_was_found() -> None:
    with pytest.raises(Exception, match="empty"):
        main(["generate", "", "--traceback"])


def test_version_and_help_answer_with_zero(capsys: pytest.CaptureFixture[str]) -> None:
    from openchameleon import __version__

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"openchameleon {__version__}\n"
    assert main([]) == 0
    assert "generate" in capsys.readouterr().out


# world


def test_world_check_reads_back_what_was_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from openchameleon.world.atlas import PRESETS
    from openchameleon.world.render import render
    from openchameleon.world.scene import Placed, Scene

    scene = Scene("sky", [Placed((0, 0), "cat"), Placed((2, 2), "pizza")])
    render(scene, PRESETS["nano"]).save(tmp_path / "scene.png")
    assert main(["world", "check", "scene.png", "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    reading = json.loads(out)
    assert reading["background"] == "sky"
    assert [(o["name"], o["cell"]) for o in reading["objects"]] == [
        ("cat", "top left"),
        ("pizza", "bottom right"),
    ]
    assert reading["unreadable"] == []
    assert main(["world", "check", "scene.png"]) == 0
    assert json.loads(capsys.readouterr().out) == reading


def test_world_sample_writes_what_training_reads(tmp_path: Path) -> None:
    from openchameleon.data.sources import read_records

    assert main(["world", "sample", "--n", "6", "--tasks", "draw", "--out", "data"]) == 0
    records = list(read_records(tmp_path / "data"))
    assert len(records) == 6
    assert len(list((tmp_path / "data/images").iterdir())) == 6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--split", "idd"], "'iid'"),
        (["--tasks", "drow"], "'draw'"),
        (["--preset", "nanno"], "'nano'"),
        (["--n", "0"], "--n is 0"),
        (["--seed", "-1"], "--seed is -1"),
    ],
)
def test_world_sample_refuses_what_is_not_there(
    options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refusal(capsys, "world", "sample", "--out", "data", *options)


def test_world_sample_keeps_what_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["world", "sample", "--n", "1", "--tasks", "talk", "--out", "data"]
    assert main(command) == 0
    before = (tmp_path / "data/records.jsonl").read_bytes()
    assert "already exists" in refusal(capsys, *command)
    assert (tmp_path / "data/records.jsonl").read_bytes() == before


# tokenizer


def test_tokenizer_text_and_image_train_tokenizers_that_load(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from openchameleon.tokenizer.image import ImageTokenizer
    from openchameleon.tokenizer.text import load_text_tokenizer

    for i, colour in enumerate(["red", "green", "blue"]):
        (tmp_path / "pictures").mkdir(exist_ok=True)
        PIL.Image.new("RGB", (20, 30), colour).save(tmp_path / f"pictures/{i}.png")
    sizes = ["vq.ch=32", "vq.n_res_blocks=1", "vq.resolution=32", "vq.n_embed=8"]
    train = ["train.steps=3", "train.batch_size=2", "train.autoencoder_warmup_steps=1",
             "train.kmeans_samples=16", "train.perceptual=none"]  # fmt: skip
    command = ["tokenizer", "image", "pictures", "--preset", "nano", "--out", "vq"]
    assert main([*command, *sizes, *train]) == 0
    image = ImageTokenizer.load(tmp_path / "vq")
    assert (image.resolution, image.codebook_size) == (32, 8)
    lines = "\n".join(f"the cat number {i} sat on the mat {i * i}" for i in range(300))
    (tmp_path / "corpus.txt").write_text(lines)
    command = ["tokenizer", "text", "corpus.txt", "--image-tokenizer", "vq", "--n-text", "290"]
    assert main([*command, "--out", "tokenizer.model"]) == 0
    text = load_text_tokenizer(tmp_path / "tokenizer.model")
    assert text.decode(text.encode("a cat")) == "a cat"
    assert text.n_ids == 4 + 8 + 3 + 290


def test_tokenizer_commands_refuse_what_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "pics" in refusal(capsys, "tokenizer", "image", "pics", "--out", "vq")
    message = refusal(capsys, "tokenizer", "image", tmp_path, "--out", "vq", "vq.resolutoin=9")
    assert "Did you mean 'resolution'?" in message
    assert "no pictures" in refusal(capsys, "tokenizer", "image", tmp_path, "--out", "vq")
    assert "'smal'" in refusal(
        capsys, "tokenizer", "image", tmp_path, "--out", "v", "--preset", "smal"
    )
    assert "corpus.txt" in refusal(capsys, "tokenizer", "text", "corpus.txt", "--out", "t.model")


# train and evaluate


def test_an_unknown_recipe_or_key_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert "'nano'" in refusal(capsys, "train", "nanno")
    assert "Unknown key 'no'" in refusal(capsys, "train", "nano", "no.such=1")
    assert "Did you mean 'seed'?" in refusal(capsys, "train", "nano", "sed=1")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["train", "nano", "world=nan"], "'nan' is not one of nano"),
        (["train", "nano", 'tune.mixture={"drwa": 1}'], "no task 'drwa'. Did you mean 'draw'"),
        (["train", "nano", "model.tie_embeddings=true"], "embedding_std"),
        (["train", "nano", "vq.dropout=2.0"], "dropout"),
        (["train", "five.json"], "is no recipe"),
        (["train", "notes.txt"], "is no recipe"),
        (["train", "five.py"], "is no recipe"),
        (["train", "nano", "--out", "notes.txt"], "Cannot write to"),
        (["world", "sample", "--out", "notes.txt/here"], "Cannot write to"),
        (["world", "sample", "--out", "."], "images already exists"),
        (["demo", "--out", "."], "image-7.png is not of a demo"),
        (["evaluate", "world", "--out", "."], "scores.json exists already"),
        (["tokenizer", "text", "notes.txt", "--out", "t.model"], "t.model exists already"),
        (["tokenizer", "image", "images", "--out", "."], "config.json exists already"),
        (["tokenizer", "report", ".", "images", "--out", "notes.txt"], "Cannot write to"),
        (["train", "nano", "data=images", "--out", "images/out"], "lies inside the data folder"),
        (["train", "nano", "data=notes.txt", "--out", "here"], "lies inside the data folder"),
        (["tokenizer", "report", ".", "images", "--out", "r"], "no readable image tokenizer"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_one_sentence_and_nothing_is_lost(
    command: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images").mkdir()
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "images/mine.png")
    there = {
        "five.json": "5",
        "five.py": "def recipe():\n    return 5\n",
        "notes.txt": "raise SystemExit('I was run')",
        "image-7.png": "a picture",
        "scores.json": "{}",
        "t.model": "mine",
        "config.json": "{",
    }
    for name, text in there.items():
        (tmp_path / name).write_text(text)
    assert words in refusal(capsys, *command)
    assert {name: (tmp_path / name).read_text() for name in there} == there


def test_an_interrupted_training_does_not_end_in_success(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from openchameleon import recipes
    from openchameleon.errors import Stopped
    from openchameleon.train.run_folder import stopped_text

    def stop(*_: object) -> None:
        raise Stopped(stopped_text("SIGINT", 3))

    monkeypatch.setattr(recipes, "run_recipe", stop)
    assert main(["train", "nano"]) == 130
    assert "the same command goes on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("no"), 2),
        (CheckpointError("no"), 3),
        (NoSpaceError("no"), 4),
        (Diverged("no"), 42),
    ],
)
def test_the_exit_code_says_what_kind_of_end_a_training_had(
    error: UserError, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from openchameleon import recipes

    def end(*_: object) -> None:
        raise error

    monkeypatch.setattr(recipes, "run_recipe", end)
    assert main(["train", "nano"]) == code


def test_evaluate_refuses_numbers_that_make_no_sense(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--n is 0" in refusal(capsys, "evaluate", "world", "--n", "0")


# demo


def test_demo_writes_a_page_that_needs_no_other_file(
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from openchameleon.world.atlas import PRESETS
    from openchameleon.world.render import render
    from openchameleon.world.scene import Placed, Scene

    drawn = render(Scene("white", [Placed((0, 0), "cat")]), PRESETS["nano"])

    def answer(self: object, prompt: Conversation, **_: object) -> Document:
        asked = prompt.messages[-1].document.text
        return Document([Image(drawn)] if asked.startswith("Draw") else ["a <cat> & a dog"])

    monkeypatch.setattr(pipeline.Chameleon, "generate", answer)
    command = ["demo", "--model", str(model_folder), "--out", "show"]
    assert main(command) == 0
    out = capsys.readouterr().out
    page = (tmp_path / "show/index.html").read_text()
    assert "What is at the top left?" in page
    assert "a &lt;cat&gt; &amp; a dog" in page
    assert page.count('src="data:image/png;base64,') == page.count("<img") == 2
    assert "http" not in page
    assert "cat at top left" in out
    assert "penguin at center" in out, "the checker reads the picture that was brought in"
    assert sorted(p.name for p in (tmp_path / "show").iterdir()) == [
        "brought.png",
        "image-1.png",
        "image-2.png",
        "index.html",
    ]
    assert main(command) == 0, "it replaces its own"


# preview


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("env", "way"),
    [
        ({"TERM": "xterm", "COLORTERM": "truecolor"}, "truecolor"),
        ({"TERM": "xterm-256color"}, "256"),
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, "iterm"),
        ({"TERM": "screen-256color", "TMUX": "1", "TERM_PROGRAM": "iTerm.app"}, "256"),
        ({"TERM": "xterm-kitty", "NO_COLOR": "1"}, None),
        ({"TERM": "dumb", "COLORTERM": "truecolor"}, None),
        ({}, None),
    ],
)
def test_the_terminal_says_how_it_can_show_a_picture(env: dict[str, str], way: str | None) -> None:
    assert way_of(Terminal(), env) == way
    assert way_of(io.StringIO(), env) is None, "a file or a pipe is no terminal"


def test_a_half_block_shows_two_pixels() -> None:
    pil = PIL.Image.new("RGB", (1, 2), (255, 0, 0))
    pil.putpixel((0, 1), (0, 0, 255))
    expected = "\x1b[38;2;255;0;0m\x1b[48;2;0;0;255m\u2580\x1b[0m\n"
    assert half_blocks(pil, 1, "truecolor") == expected
    assert half_blocks(pil, 1, "256") == "\x1b[38;5;196m\x1b[48;5;21m\u2580\x1b[0m\n"


def test_an_inline_picture_is_the_whole_png() -> None:
    pil = PIL.Image.effect_noise((96, 96), 80).convert("RGB")
    terminal = Terminal()
    assert preview(pil, terminal, {"TERM": "xterm-kitty"})
    chunks = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", terminal.getvalue())
    assert [keys[-3:] for keys, _ in chunks] == ["m=1"] * (len(chunks) - 1) + ["m=0"]
    assert max(len(data) for _, data in chunks) <= 4096
    data = base64.b64decode("".join(data for _, data in chunks))
    assert PIL.Image.open(io.BytesIO(data)).tobytes() == pil.tobytes()
