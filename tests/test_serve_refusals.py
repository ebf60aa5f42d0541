"""What the server refuses, with which status and which words, and what it costs it."""

from __future__ import annotations

import base64
import io
import json
import os
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from serving import Running, serving

from openchameleon import Chameleon, Document, Image
from openchameleon.serve import app as app_module
from openchameleon.serve import limits
from openchameleon.serve.decoding import Decoders
from openchameleon.serve.pictures import Decode, Source, read_pictures

RESPONSES, CHAT, IMAGES = "/v1/responses", "/v1/chat/completions", "/v1/images/generations"


@pytest.fixture(scope="module")
def tiny(model_folder: Path) -> Chameleon:
    return Chameleon.from_pretrained(model_folder, device="cpu")


@pytest.fixture(scope="module")
def server(tiny: Chameleon) -> Iterator[Running]:
    with serving(lambda: tiny, name="tiny") as running:
        yield running


@pytest.fixture(scope="module")
def decode() -> Iterator[Decode]:
    """Reads a picture as the server does, in another process."""
    decoders = Decoders(1)
    yield decoders.decode
    decoders.close()


def file_of(picture: PIL.Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def url_of(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def with_pictures(*urls: str) -> dict[str, Any]:
    parts = [{"type": "input_image", "image_url": url} for url in urls]
    words = {"type": "input_text", "text": "what"}
    return {"input": [{"role": "user", "content": [words, *parts]}], "max_output_tokens": 1}


def refused(server: Running, status: int, code: str, body: Any, path: str = RESPONSES) -> Any:
    """The error object of a request that must be refused in the shape of all errors."""
    found, headers, answer = server.ask("POST", path, body)
    assert (found, answer.get("error", {}).get("code")) == (status, code), answer
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code", "request_id"}
    assert error["request_id"] == headers["x-request-id"]
    assert "Traceback" not in error["message"]
    assert str(Path(__file__).parent.parent) not in json.dumps(answer)
    return error


GREY = PIL.Image.new("RGB", (16, 16), (120, 130, 140))
PNG = file_of(GREY)


def png_header(width: int, height: int) -> bytes:
    """A PNG of a hundred bytes that claims to be of this size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(b""))
        + (chunk(b"IEND", b""))
    )


# --- JSON


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b'{"input": "a"', "line 1"),
        (b"", "no JSON body"),
        (b'{"input": "\xff"}', "cannot be read"),
        (b'{"input": "a", "temperature": NaN}', "NaN"),
        (b'{"input": "a", "temperature": Infinity}', "Infinity"),
        (b'{"input": "a", "seed": ' + b"9" * 5000 + b"}", "cannot be read"),
        (b'{"input": "a", "input": "b"}', "'input' stands twice"),
        (b'{"input": ' + b"[" * 10**4 + b"]" * 10**4 + b"}", "nested too deeply"),
        (b'{"a":' * 10**4 + b"1" + b"}" * 10**4, "nested too deeply"),
    ],
)
def test_broken_json_is_refused_in_no_time(server: Running, data: bytes, words: str) -> None:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        status, _, answer = server.ask("POST", RESPONSES, data)
        times.append(time.perf_counter() - start)
        assert status in (400, 422)
        assert words in answer["error"]["message"]
    assert min(times) < 0.05


@pytest.mark.parametrize(
    ("path", "body", "code", "param"),
    [
        (RESPONSES, {}, "missing_parameter", "input"),
        (RESPONSES, [], "invalid_value", None),
        (RESPONSES, {"input": 3}, "invalid_value", "input"),
        (RESPONSES, {"input": "a", "colour": 1}, "unknown_parameter", "colour"),
        (RESPONSES, {"input": "a", "temperature": "hot"}, "invalid_value", "temperature"),
        (RESPONSES, {"input": "a", "temperature": -1}, "invalid_value", "temperature"),
        (RESPONSES, {"input": "a", "top_p": 2}, "invalid_value", "top_p"),
        (RESPONSES, {"input": "a", "top_p": 0}, "invalid_value", "top_p"),
        (RESPONSES, {"input": "a", "max_output_tokens": 10**9}, "invalid_value",
         "max_output_tokens"),
        (RESPONSES, {"input": "a", "seed": -1}, "invalid_value", "seed"),
        (RESPONSES, {"input": "a", "seed": True}, "invalid_value", "seed"),
        (RESPONSES, {"input": "a", "partial_images": 65}, "invalid_value", "partial_images"),
        (RESPONSES, {"input": "a", "mode": "sound"}, "invalid_value", "mode"),
        (RESPONSES, {"input": "a", "previous_response_id": "resp_1"}, "unsupported_parameter",
         "previous_response_id"),
        (RESPONSES, {"input": "a", "tools": [{"type": "function", "name": "f"}]}, "invalid_value",
         "tools[0].type"),
        (RESPONSES, {"input": [{"role": "tool", "content": "a"}]}, "invalid_value",
         "input[0].role"),
        (RESPONSES, {"input": [{"role": "user", "content": [{"type": "input_text", "text": 1}]}]},
         "invalid_value", "input[0].content[0].text"),
        (RESPONSES, {"input": [{"role": "user", "content": [{"type": "x"}]}]}, "invalid_value",
         "input[0].content[0]"),
        (RESPONSES, {"input": [{"type": "item_reference", "id": "a"}]}, "invalid_value",
         "input[0]"),
        (CHAT, {"messages": []}, "invalid_value", "messages"),
        (CHAT, {"messages": [{"role": "user", "content": "a", "colour": 1}]}, "unknown_parameter",
         "messages[0].colour"),
        (CHAT, {"messages": [{"role": "user", "content": "a"}], "n": 10**9}, "invalid_value", "n"),
        (CHAT, {"messages": [{"role": "user", "content": "a"}], "stop": ["a"] * 10**5},
         "invalid_value", "stop"),
        (CHAT, {"messages": [{"role": "user", "content": "a"}], "logprobs": True},
         "unsupported_parameter", "logprobs"),
        (IMAGES, {"prompt": "a", "response_format": "url"}, "unsupported_parameter",
         "response_format"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named(
    server: Running, path: str, body: Any, code: str, param: str | None
) -> None:
    assert refused(server, 422, code, body, path)["param"] == param


def test_half_a_surrogate_pair_is_refused_and_told_in_ascii(server: Running) -> None:
    assert refused(server, 400, "invalid_request", {"input": "\ud800"})["param"] == "input"
    refused(server, 422, "invalid_value", {"input": "a", "\ud800": 1})
    body = {"input": "a cat", "max_output_tokens": 1, "metadata": {"a": "\ud800"}}
    assert server.ask("POST", RESPONSES, body)[2]["metadata"] == {"a": "\ud800"}
    refused(server, 404, "model_not_found", {"input": "a", "model": "\ud800"})


def test_fields_that_change_nothing_are_ignored(server: Running) -> None:
    harmless = {"user": "u", "store": False, "metadata": {"a": "b"}, "service_tier": "auto",
                "background": False, "previous_response_id": None, "truncation": "disabled",
                "parallel_tool_calls": True, "include": [], "reasoning": {"effort": "low"},
                "text": {"format": {"type": "text"}, "verbosity": "low"}}  # fmt: skip
    body = {"input": "a cat", "max_output_tokens": 1, **harmless}
    status, _, answer = server.ask("POST", RESPONSES, body)
    assert status == 200, answer
    assert answer["metadata"] == {"a": "b"}
    chat = {"messages": [{"role": "user", "content": "a cat"}], "max_tokens": 1, "user": "u",
            "frequency_penalty": 0, "response_format": {"type": "text"}, "tools": []}  # fmt: skip
    assert server.ask("POST", CHAT, chat)[0] == 200


def test_a_picture_of_another_size_is_refused(server: Running) -> None:
    refused(server, 400, "invalid_value", {"prompt": "a cat", "size": "1024x1024"}, IMAGES)
    for size in ("auto", "16x16"):
        assert server.ask("POST", IMAGES, {"prompt": "a cat", "size": size})[0] == 200


@pytest.mark.parametrize(
    ("turns", "param"),
    [
        ([], "input"),
        ([{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}],
         "input[0].content"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
         "input[1].content"),
        ([{"role": "user", "content": "  \n"}], "input[0].content"),
        ([{"role": "system", "content": "a"}], "input[0].content"),
    ],
)  # fmt: skip
def test_a_conversation_without_a_question_is_refused(
    server: Running, turns: Any, param: str
) -> None:
    assert refused(server, 400, "invalid_value", {"input": turns})["param"] == param


def test_another_content_type_is_refused(server: Running) -> None:
    status, _, answer = server.ask(
        "POST", RESPONSES, b'{"input": "a"}', {"Content-Type": "text/plain"}
    )
    assert status == 422, "else any page of the web could send requests to a server on this machine"
    assert answer["error"]["code"] == "invalid_value"


def test_unknown_addresses_and_methods_are_told(server: Running) -> None:
    for method, path, status in (
        ("GET", "/v1/nothing", 404), ("POST", "/v1/nothing", 404), ("GET", RESPONSES, 405),
    ):  # fmt: skip
        found, _, answer = server.ask(method, path)
        assert found == status
        assert answer["error"]["request_id"]


# --- size


def send_slowly(server: Running, head: str, chunk: bytes, n: int) -> tuple[int, bytes]:
    """Sends a head and up to n chunks; (bytes that were taken, what came back)."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as s:
        s.sendall(head.encode())
        sent = 0
        for _ in range(n):
            try:
                s.sendall(chunk)
            except OSError:
                break
            sent += len(chunk)
        try:
            return sent, s.recv(4096)
        except OSError:
            return sent, b""


def test_a_declared_gigabyte_is_refused_unread(server: Running) -> None:
    head = (
        f"POST {RESPONSES} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        f"Content-Length: {1 << 30}\r\n\r\n"
    )
    _, answer = send_slowly(server, head, b"", 0)
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"connection: close" in answer.lower()


def test_a_body_without_end_is_cut_at_the_limit(server: Running) -> None:
    head = (
        f"POST {RESPONSES} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        "Transfer-Encoding: chunked\r\n\r\n"
    )
    data = b"x" * (1 << 18)
    chunk = f"{len(data):x}\r\n".encode() + data + b"\r\n"
    sent, _ = send_slowly(server, head, chunk, 400)
    buffers = 12 << 20  # of the two sockets
    assert sent < limits.MAX_BODY + buffers
    assert server.metric("openchameleon_http_requests_total", path=RESPONSES, status="413") >= 1
    assert server.service.n_open == 0


def test_a_body_that_does_not_come_is_given_up(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "BODY_TIMEOUT", 0.2)
    head = (
        f"POST {RESPONSES} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        "Content-Length: 10\r\n\r\n{"
    )
    _, answer = send_slowly(server, head, b"", 0)
    assert answer.startswith(b"HTTP/1.1 408")


def words(tiny: Chameleon, n_tokens: int) -> str:
    """A text whose prompt takes exactly that many tokens."""
    text = "cat "
    while (n := len(tiny.tokenizer.render_prompt(Document([text])))) + 1 < n_tokens:
        text += "z" * (n_tokens - 1 - n)
    assert n + 1 == n_tokens
    return text


def test_a_prompt_that_leaves_one_token_gets_that_one(server: Running, tiny: Chameleon) -> None:
    """The context of 64 holds the answer too."""
    status, _, answer = server.ask("POST", RESPONSES, {"input": words(tiny, 63), "temperature": 0})
    assert status == 200
    assert answer["usage"]["input_tokens"] == 63
    assert answer["usage"]["total_tokens"] == 64


def test_a_prompt_that_fills_the_context_gets_an_empty_answer(
    server: Running, tiny: Chameleon
) -> None:
    full = words(tiny, 64)
    _, _, answer = server.ask("POST", RESPONSES, {"input": full})
    assert (answer["status"], answer["output"]) == ("incomplete", [])
    assert answer["incomplete_details"] == {"reason": "max_output_tokens"}
    assert (answer["usage"]["input_tokens"], answer["usage"]["output_tokens"]) == (64, 0)
    _, _, events = server.ask("POST", RESPONSES, {"input": full, "stream": True})
    assert events.rstrip().rsplit("\n\n", 1)[-1].startswith("event: response.incomplete")
    messages = [{"role": "user", "content": full}]
    _, _, answer = server.ask("POST", CHAT, {"messages": messages, "n": 2, "guidance": 2})
    assert [c["finish_reason"] for c in answer["choices"]] == ["length", "length"]
    assert [c["message"]["content"] for c in answer["choices"]] == ["", ""]
    assert answer["usage"]["total_tokens"] == 64
    _, _, events = server.ask("POST", CHAT, {"messages": messages, "stream": True})
    assert '"finish_reason":"length"' in events
    picture = refused(server, 400, "context_length_exceeded", {"prompt": full}, IMAGES)
    assert "64 tokens" in picture["message"]


def test_a_prompt_one_token_too_long_is_refused_with_both_numbers(
    server: Running, tiny: Chameleon
) -> None:
    long = words(tiny, 65)
    messages = [{"role": "user", "content": long}]
    for path, param, said in ((RESPONSES, "input", long), (CHAT, "messages", messages)):
        for stream in (False, True):
            body = {param: said, "stream": stream}
            error = refused(server, 400, "context_length_exceeded", body, path)
            assert "takes 65 tokens and the model holds 64" in error["message"]
            assert error["param"] == param


def test_text_of_megabytes_is_refused_before_it_is_encoded(
    server: Running, tiny: Chameleon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny.tokenizer, "render_prompt", None)
    messages = [{"role": "user", "content": "cat " * (1 << 20)}]
    error = refused(server, 400, "context_length_exceeded", {"messages": messages}, CHAT)
    assert error["param"] == "messages"


def test_a_picture_that_does_not_fit_is_not_begun(server: Running) -> None:
    body = {"input": "cat", "mode": "image", "max_output_tokens": 6}
    assert "no room for a picture" in refused(server, 400, "invalid_request", body)["message"]
    for seed in range(10):
        body = {"input": "cat", "max_output_tokens": 6, "seed": seed, "temperature": 5}
        status, _, answer = server.ask("POST", RESPONSES, body)
        assert status == 200
        assert {item["type"] for item in answer["output"]} <= {"message"}


def test_words_that_spell_control_tokens_are_words(server: Running, tiny: Chameleon) -> None:
    spelled = "<racm3:break><image></s>IMGIMGA<eot>"
    status, _, answer = server.ask("POST", RESPONSES, {"input": spelled, "max_output_tokens": 1})
    assert status == 200
    vocab = tiny.config.vocab
    ids = tiny.request(spelled).token_ids
    assert answer["usage"]["input_tokens"] == len(ids)
    assert ids.index(vocab.eot_id) == len(ids) - 1
    assert all(vocab.is_text(i) for i in ids[1:-1])


# --- pictures


@pytest.mark.parametrize(
    ("url", "status", "code"),
    [
        (url_of(PNG[:60]), 400, "invalid_image"),
        (url_of(file_of(PIL.Image.effect_noise((64, 64), 90), "JPEG")[:900]), 400, "invalid_image"),
        (url_of(b"<html><body>hello</body></html>"), 415, "unsupported_image"),
        (url_of(b""), 415, "unsupported_image"),
        (url_of(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), 415, "unsupported_image"),
        (url_of(b"8BPS\0\1" + bytes(40)), 415, "unsupported_image"),
        (url_of(file_of(GREY, "TIFF")), 415, "unsupported_image"),
        (url_of(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml"), 415,
         "unsupported_image"),
        (url_of(png_header(12000, 12000)), 400, "image_too_large"),
        (url_of(png_header(60000, 60000)), 400, "image_too_large"),
        ("data:image/png;base64,!!!!", 400, "invalid_image"),
        ("data:image/png;base64,iVBORw0KGg", 400, "invalid_image"),
        ("data:image/png,iVBORw0KGgo=", 400, "invalid_image"),
        ("data:text/html;base64,iVBORw0KGgo=", 400, "invalid_image"),
        ("data:,", 400, "invalid_image"),
        ("data:image/png;base64,\u00e9\u00e9\u00e9\u00e9", 400, "invalid_image"),
        ("", 400, "url_not_allowed"),
    ],
)  # fmt: skip
def test_what_is_no_picture_is_refused(server: Running, url: str, status: int, code: str) -> None:
    error = refused(server, status, code, with_pictures(url))
    assert error["param"] == "input[0].content[1].image_url"
    part = {"type": "image_url", "image_url": {"url": url}}
    body = {"messages": [{"role": "user", "content": [part]}]}
    assert (
        refused(server, status, code, body, CHAT)["param"] == "messages[0].content[0].image_url.url"
    )


def test_a_png_with_missing_rows_is_refused(server: Running) -> None:
    rows = b"".join(b"\0" + bytes(16 * 3) for _ in range(4))  # of 16
    header = png_header(16, 16)
    at = header.index(b"IDAT") - 4
    data = zlib.compress(rows)
    chunk = struct.pack(">I", len(data)) + b"IDAT" + data
    chunk += struct.pack(">I", zlib.crc32(b"IDAT" + data))
    broken = header[:at] + chunk + header[-12:]
    PIL.Image.open(io.BytesIO(broken)).load()  # which finds nothing wrong
    error = refused(server, 400, "invalid_image", with_pictures(url_of(broken)))
    assert "rows" in error["message"]


def test_a_bomb_takes_neither_memory_nor_time(decode: Decode) -> None:
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = _peak()
    for size in (12000, 60000):
        start = time.perf_counter()
        with pytest.raises(Exception, match="million pixels"):
            read_pictures([Source("x", url_of(png_header(size, size)))], decode)
        assert time.perf_counter() - start < 0.05
    assert _peak() - before < 20 << 10


def _peak() -> int:
    """The most memory since the last reset, in KiB."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def test_pictures_are_counted_over_the_whole_request(server: Running, decode: Decode) -> None:
    error = refused(server, 400, "too_many_images", with_pictures(*[url_of(PNG)] * 200))
    assert "200 pictures" in error["message"]
    turns = []
    for _ in range(9):
        turns += with_pictures(url_of(PNG))["input"]
        turns.append({"role": "assistant", "content": "a"})
    refused(server, 400, "too_many_images", {"input": turns[:-1]})
    large = url_of(file_of(PIL.Image.new("L", (4000, 4000))))
    with pytest.raises(Exception, match="32 million pixels together"):
        read_pictures([Source("x", large)] * 3, decode)
    twenty = [{"type": "image_generation_call", "result": url_of(PNG).split(",")[1]}] * 20
    given_back = [{"role": "user", "content": "a"}, *twenty, {"role": "user", "content": "b"}]
    refused(server, 400, "context_length_exceeded", {"input": given_back})


def test_pictures_of_every_kind_become_their_true_colours(decode: Decode) -> None:
    levels = np.full((16, 16), 40000, np.uint16)
    palette = PIL.Image.new("P", (16, 16), 1)
    palette.putpalette([255, 0, 0, 120, 130, 140])
    clear = PIL.Image.new("P", (16, 16), 0)
    clear.putpalette([255, 0, 0, 120, 130, 140])
    kinds = {
        file_of(GREY.convert("CMYK"), "JPEG", quality=98): (120, 130, 140),
        file_of(PIL.Image.fromarray(levels)): (156, 156, 156),
        file_of(PIL.Image.new("1", (16, 16), 1)): (255, 255, 255),
        file_of(PIL.Image.new("LA", (16, 16), (0, 0))): (255, 255, 255),
        file_of(palette): (120, 130, 140),
        file_of(clear, transparency=0): (255, 255, 255),
        file_of(GREY, "WEBP", lossless=True): (120, 130, 140),
    }
    found, warnings = read_pictures([Source("x", url_of(data)) for data in kinds], decode)
    assert warnings == []
    for picture, colour in zip(found, kinds.values(), strict=True):
        assert picture.mode == "RGB"
        difference = np.abs(np.asarray(picture, np.int32) - np.asarray(colour))
        assert difference.max() <= 2, colour


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_of_an_animation_the_first_frame_is_read_and_this_is_said(
    server: Running, tiny: Chameleon, kind: str, decode: Decode
) -> None:
    frames = [PIL.Image.new("RGB", (16, 16), (10 * i, 250, 250)) for i in range(10)]
    data = file_of(frames[0], kind, save_all=True, append_images=frames[1:], duration=100)
    source = Source("x", url_of(data, f"image/{kind.lower()}"))
    ((picture,), warnings) = read_pictures([source], decode)
    assert np.abs(np.asarray(picture, np.int32) - np.asarray((0, 250, 250))).max() <= 2
    assert warnings == ["x is animated: only its first frame was read."]
    status, _, answer = server.ask("POST", RESPONSES, with_pictures(url_of(data)))
    assert status == 200
    assert len(answer["warnings"]) == 1
    assert answer["usage"]["input_tokens"] == len(
        tiny.request(Document(["what", Image(picture)])).token_ids
    )


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:{port}/", "http://localhost:{port}/", "http://[::1]:{port}/",
        "http://0x7f000001:{port}/", "http://2130706433:{port}/", "https://127.0.0.1:{port}/",
        "http://good.com\\@127.0.0.1:{port}/", "//127.0.0.1:{port}/",
        "http://169.254.169.254/latest/meta-data", "ftp://127.0.0.1:{port}/a.png",
        "gopher://127.0.0.1:{port}/_a", "file:///etc/passwd", "FILE:///etc/passwd",
        "file://localhost/etc/passwd", "../../etc/passwd", "/etc/passwd", "%2e%2e/etc/passwd",
        " data:image/png;base64,AAAA", "javascript:1", "a\0b",
    ],
)  # fmt: skip
def test_no_url_makes_the_server_look_anywhere(server: Running, url: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as canary:
        canary.setblocking(False)
        url = url.format(port=canary.getsockname()[1])
        error = refused(server, 400, "url_not_allowed", with_pictures(url))
        with pytest.raises(BlockingIOError):
            canary.accept()
    assert url not in error["message"]


# --- files and keys


PATHS_OUT = [
    "/page/../app.py", "/page/%2e%2e/app.py", "/page/..%2fapp.py", "/page/....//app.py",
    "/page//etc/passwd", "/page/%2fetc%2fpasswd", "/page/a%00b", "/page/link", "/page/.",
    "/../app.py", "/page/%5c..%5capp.py", "/page/" + "a" * 5000,
]  # fmt: skip


def test_no_path_leads_out_of_the_page(
    tiny: Chameleon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "page"
    folder.mkdir()
    (tmp_path / "app.py").write_text("secret")
    (folder / "index.html").write_text("<!doctype html><title>page</title>")
    (folder / "link").symlink_to(tmp_path / "app.py")
    monkeypatch.setattr(app_module, "PAGE", folder)
    with serving(lambda: tiny) as running:
        status, headers, body = running.ask("GET", "/")
        assert status == 200
        assert "page" in body
        assert "default-src 'self'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert running.ask("GET", "/page/index.html")[0] == 200
        for path in PATHS_OUT:
            status, _, answer = running.ask("GET", path)
            assert status in (400, 404), path
            assert "secret" not in str(answer), path
            assert str(tmp_path) not in str(answer), path


def test_every_route_wants_the_key_but_those_that_say_the_server_is_there(tiny: Chameleon) -> None:
    with serving(lambda: tiny, api_key="open sesame") as running:
        app = running.server.config.loaded_app
        while not hasattr(app, "openapi"):
            app = app.app
        paths = {(method.upper(), path.replace("{name}", "nano"))
                 for path, ways in app.openapi()["paths"].items() for method in ways}  # fmt: skip
        paths |= {("GET", "/openapi.json"), ("GET", "/nothing"), ("POST", "/health/../v1/models")}
        assert len(paths) > 10
        for method, path in sorted(paths):
            for headers in ({}, {"Authorization": "Bearer open sesam"}, {"Authorization": "open"},
                            {"Authorization": "Basic open sesame"}):  # fmt: skip
                status, found, _ = running.ask(method, path, None, headers)
                assert (status == 401) == (path not in ("/health", "/ready")), (method, path)
                assert status != 401 or found["www-authenticate"] == "Bearer"
        right = {"Authorization": "Bearer open sesame"}
        assert running.ask("GET", "/v1/models", None, right)[0] == 200
        assert running.ask("GET", "/page/none.js")[0] == 404
        assert running.ask("GET", "/docs")[0] == 200


def test_other_origins_get_no_leave(server: Running) -> None:
    origin = {"Origin": "https://example.com", "Access-Control-Request-Method": "POST"}
    for method, path in (("OPTIONS", RESPONSES), ("GET", "/v1/models")):
        _, headers, _ = server.ask(method, path, None, origin)
        assert not [name for name in headers if name.startswith("access-control")]


def test_the_schema_is_there_and_knows_the_errors(server: Running) -> None:
    status, _, schema = server.ask("GET", "/openapi.json")
    assert status == 200
    for path in (RESPONSES, CHAT, IMAGES):
        answers = schema["paths"][path]["post"]["responses"]
        assert set(answers) == {"200", "4XX", "5XX"}
    assert "HTTPValidationError" not in schema["components"]["schemas"]


def test_no_number_of_files_is_left_open(server: Running) -> None:
    def n_files() -> int:
        return len(os.listdir("/proc/self/fd"))

    server.ask("POST", RESPONSES, with_pictures(url_of(PNG)))
    before = n_files()
    for _ in range(20):
        server.ask("POST", RESPONSES, with_pictures(url_of(PNG)))
        server.ask("POST", RESPONSES, with_pictures(url_of(PNG[:60])))
    assert n_files() <= before + 3
