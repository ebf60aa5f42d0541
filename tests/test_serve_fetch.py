"""Pictures that are fetched from hosts that were named: from a TLS server of the test's own."""

from __future__ import annotations

import asyncio
import base64
import io
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from serving import Running, serving, until

from openchameleon import Chameleon
from openchameleon.cli.main import main
from openchameleon.errors import UserError
from openchameleon.serve import limits
from openchameleon.serve.errors import ApiError
from openchameleon.serve.fetch import Fetcher, is_public
from openchameleon.serve.pictures import Source, fetched

HERE, ELSEWHERE = "127.0.0.1", "127.0.0.2"


def file_of(picture: PIL.Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return buffer.getvalue()


PNG = file_of(PIL.Image.effect_noise((16, 16), 90).convert("RGB"))
LARGE = bytes(200_000)


class Pictures(BaseHTTPRequestHandler):
    """Serves a good picture, and each kind of bad answer at a path of its own."""

    def do_GET(self) -> None:
        self.server.asked.append((self.headers["Host"], self.path))  # type: ignore[attr-defined]
        try:
            getattr(self, self.path.strip("/").partition("?")[0].replace(".png", ""))()
        except OSError:  # the other side has had enough
            self.close_connection = True

    def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def good(self) -> None:
        self.answer(PNG)

    def text(self) -> None:
        self.answer(b"<html></html>")

    def missing(self) -> None:
        self.answer(b"", 404)

    def redirect(self) -> None:
        self.answer(b"", 302, Location="https://pictures.test/good.png")

    def large(self) -> None:
        self.answer(LARGE)

    def cut(self) -> None:
        self.answer(PNG[:-1], **{"Content-Length": str(len(PNG))})
        self.close_connection = True

    def endless(self) -> None:
        self.send_response(200)
        self.end_headers()
        while True:
            self.wfile.write(LARGE)

    def slow(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.drip()

    def slow_head(self) -> None:
        self.wfile.write(b"HTTP/1.0 200 ")
        self.drip()

    def drip(self) -> None:
        for _ in range(600):
            self.wfile.write(b"a")
            time.sleep(0.05)

    def log_message(self, *_: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, certificate: Path) -> None:
        super().__init__((HERE, 0), Pictures)
        self.asked: list[tuple[str, str]] = []
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(certificate)

    def get_request(self) -> tuple[Any, Any]:
        sock, address = super().get_request()
        return self.context.wrap_socket(sock, server_side=True), address  # OSError: left out


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key and its certificate for pictures.test, in one file."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl here")
    folder = tmp_path_factory.mktemp("tls")
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
        " -subj /CN=pictures.test -addext subjectAltName=DNS:pictures.test"
        f" -keyout {folder}/key.pem -out {folder}/own.pem"
    )
    subprocess.run(command.split(), check=True, capture_output=True)
    both = folder / "both.pem"
    both.write_bytes((folder / "own.pem").read_bytes() + (folder / "key.pem").read_bytes())
    return both


@pytest.fixture(scope="module")
def pictures(certificate: Path) -> Iterator[Server]:
    with Server(certificate) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def resolved() -> list[str]:
    return []


@pytest.fixture
def fetcher(pictures: Server, certificate: Path, resolved: list[str]) -> Fetcher:
    """Knows pictures.test and other.test, both at this machine, which counts as public here."""
    port = pictures.server_port

    def resolve(host: str, _: int) -> list[str]:
        resolved.append(host)
        return [HERE]

    pictures.asked.clear()
    return Fetcher([f"pictures.test:{port}", f"Other.test:{port}"],
                   ssl.create_default_context(cafile=certificate), resolve,
                   lambda address: address == HERE)  # fmt: skip


def get(fetcher: Fetcher, url: str, seconds: float = 10.0, **limit: int) -> bytes:
    return asyncio.run(fetcher.fetch(url, "here", time.monotonic() + seconds, **limit))


def refused(fetcher: Fetcher, url: str, code: str, seconds: float = 10.0, **limit: int) -> str:
    with pytest.raises(ApiError) as error:
        get(fetcher, url, seconds, **limit)
    assert (error.value.status_code, error.value.code, error.value.param) == (400, code, "here")
    return error.value.message


def at(pictures: Server, path: str, host: str = "pictures.test") -> str:
    return f"https://{host}:{pictures.server_port}/{path}"


def test_a_picture_is_fetched_from_a_host_that_was_named(
    fetcher: Fetcher, pictures: Server, resolved: list[str]
) -> None:
    assert get(fetcher, at(pictures, "good.png?a=b&c=%20")) == PNG
    assert get(fetcher, at(pictures, "good.png", "PICTURES.Test")) == PNG
    host = f"pictures.test:{pictures.server_port}"
    assert pictures.asked == [(host, "/good.png?a=b&c=%20"), (host, "/good.png")]
    assert resolved == ["pictures.test"] * 2


@pytest.mark.parametrize(
    "url",
    [
        "http://pictures.test:{port}/good.png", "https://pictures.test/good.png",
        "https://else.test:{port}/good.png", "https://pictures.test.else:{port}/good.png",
        "https://127.0.0.1:{port}/good.png", "https://pictures.test@127.0.0.1:{port}/good.png",
        "https://127.0.0.1:{port}\\@pictures.test:{port}/good.png",
        "https://pictures.test:{port}\\@127.0.0.1/", "https://pictures.test:{port}@127.0.0.1/",
        "https://a:b@pictures.test:{port}/", "https://pictures.test.:{port}/",
        "https://pictures.test:{port}/ good.png", "https://pictures.test:{port}/a\r\nHost: b",
        "https://pictures.test:{port}/#good.png", "https://pictures.test:{port}:443/",
        " https://pictures.test:{port}/", "https:pictures.test:{port}/", "//pictures.test:{port}/",
        "ftp://pictures.test:{port}/good.png", "file:///etc/passwd", "", "https://",
        "https://p\u0131ctures.test:{port}/good.png",
    ],
)  # fmt: skip
def test_no_other_url_is_looked_up(
    fetcher: Fetcher, pictures: Server, resolved: list[str], url: str
) -> None:
    message = refused(fetcher, url.format(port=pictures.server_port), "url_not_allowed")
    assert "pictures.test" in message
    assert resolved == pictures.asked == []


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("1.1.1.1", True), ("2606:4700:4700::1111", True), ("::ffff:1.1.1.1", True),
        ("127.0.0.1", False), ("0.0.0.0", False), ("10.1.2.3", False), ("172.16.0.1", False),
        ("192.168.1.1", False), ("169.254.169.254", False), ("100.64.0.1", False),
        ("224.0.0.1", False), ("240.0.0.1", False), ("255.255.255.255", False), ("::1", False),
        ("::", False), ("fe80::1%eth0", False), ("fc00::1", False), ("ff02::1", False),
        ("::ffff:127.0.0.1", False), ("::ffff:169.254.169.254", False), ("::127.0.0.1", False),
        ("fec0::1", False),
        ("64:ff9b::7f00:1", False), ("2002:7f00:1::", False), ("2001:0:1::1", False),
    ],
)  # fmt: skip
def test_an_address_is_public_or_not(address: str, public: bool) -> None:
    assert is_public(address) == public


def test_a_name_that_leads_home_opens_no_socket() -> None:
    with socket.create_server((HERE, 0)) as canary:
        canary.setblocking(False)
        port = canary.getsockname()[1]
        for named in (HERE, "localhost"):
            url = f"https://{named}:{port}/"
            assert "not public" in refused(Fetcher([f"{named}:{port}"]), url, "url_not_allowed")
        both = Fetcher([f"a.test:{port}"], resolve=lambda *_: ["1.1.1.1", HERE])
        refused(both, f"https://a.test:{port}/", "url_not_allowed")
        with pytest.raises(BlockingIOError):
            canary.accept()


def test_a_name_that_changes_its_address_is_asked_once(pictures: Server, certificate: Path) -> None:
    """Public when it is looked at, and not when it would be connected to."""
    answers = [HERE, ELSEWHERE, ELSEWHERE]
    port = pictures.server_port
    with socket.create_server((ELSEWHERE, port)) as canary:
        canary.setblocking(False)
        fetcher = Fetcher([f"pictures.test:{port}"], ssl.create_default_context(cafile=certificate),
                          lambda *_: [answers.pop(0)], lambda address: address == HERE)  # fmt: skip
        assert get(fetcher, at(pictures, "good.png")) == PNG
        assert answers == [ELSEWHERE, ELSEWHERE]
        refused(fetcher, at(pictures, "good.png"), "url_not_allowed")
        with pytest.raises(BlockingIOError):
            canary.accept()


def test_another_certificate_than_the_hosts_is_refused(fetcher: Fetcher, pictures: Server) -> None:
    message = refused(fetcher, at(pictures, "good.png", "other.test"), "image_not_fetched")
    assert "certificate" in message
    named = [f"pictures.test:{pictures.server_port}"]
    own_trust = Fetcher(named, resolve=lambda *_: [HERE], is_allowed=lambda _: True)
    refused(own_trust, at(pictures, "good.png"), "image_not_fetched")
    assert pictures.asked == []


def test_a_redirect_is_not_followed(fetcher: Fetcher, pictures: Server) -> None:
    assert "not followed" in refused(fetcher, at(pictures, "redirect"), "url_not_allowed")
    assert len(pictures.asked) == 1
    assert "404" in refused(fetcher, at(pictures, "missing"), "image_not_fetched")


@pytest.mark.parametrize("path", ["large", "endless"])
def test_a_body_is_read_up_to_the_limit(fetcher: Fetcher, pictures: Server, path: str) -> None:
    refused(fetcher, at(pictures, path), "image_too_large", max_bytes=len(LARGE) - 1)
    if path == "large":
        assert get(fetcher, at(pictures, path), max_bytes=len(LARGE)) == LARGE


def test_a_body_that_is_cut_off_is_no_picture(fetcher: Fetcher, pictures: Server) -> None:
    refused(fetcher, at(pictures, "cut"), "image_not_fetched")


@pytest.mark.parametrize("path", ["slow", "slow_head"])
def test_what_comes_too_slowly_is_given_up(fetcher: Fetcher, pictures: Server, path: str) -> None:
    begin = time.monotonic()
    message = refused(fetcher, at(pictures, path), "image_not_fetched", seconds=0.4)
    assert time.monotonic() - begin < 5
    assert "did not come" in message
    until(lambda: not any(thread.name == "fetch" for thread in threading.enumerate()), 5)
    assert get(fetcher, at(pictures, "good.png")) == PNG


def test_a_resolver_or_a_handshake_without_end_is_given_up(certificate: Path) -> None:
    stop = threading.Event()

    def never(host: str, port: int) -> list[str]:
        stop.wait(60)
        return []

    refused(Fetcher(["a.test"], resolve=never), "https://a.test/", "image_not_fetched", 0.2)
    stop.set()
    with socket.create_server((HERE, 0)) as silent:
        port = silent.getsockname()[1]
        fetcher = Fetcher([f"a.test:{port}"], resolve=lambda *_: [HERE], is_allowed=lambda _: True)
        refused(fetcher, f"https://a.test:{port}/", "image_not_fetched", 0.2)
    message = refused(fetcher, f"https://a.test:{port}/", "image_not_fetched")
    assert "cannot be talked to" in message


# --- in a server


@pytest.fixture(scope="module")
def server(model_folder: Path) -> Iterator[Running]:
    model = Chameleon.from_pretrained(model_folder, device="cpu")
    with serving(lambda: model, name="tiny") as running:
        yield running


def body(*urls: str) -> dict[str, Any]:
    parts = [{"type": "input_image", "image_url": url} for url in urls]
    return {"input": [{"role": "user", "content": parts}], "temperature": 0, "mode": "text"}


def test_a_fetched_picture_is_read_as_one_that_was_sent(
    server: Running, fetcher: Fetcher, pictures: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"
    url = at(pictures, "good.png")
    monkeypatch.setattr(server.service, "fetcher", fetcher)
    _, _, sent = server.ask("POST", "/v1/responses", body(data, data))
    status, _, answer = server.ask("POST", "/v1/responses", body(url, data))
    assert status == 200
    assert answer["usage"] == sent["usage"]
    assert answer["output"][0]["content"] == sent["output"][0]["content"]
    assert len(pictures.asked) == 1
    for path, code, status in (
        ("text", "unsupported_image", 415),
        ("redirect", "url_not_allowed", 400),
    ):
        found, _, answer = server.ask("POST", "/v1/responses", body(data, at(pictures, path)))
        assert (found, answer["error"]["code"]) == (status, code)
        assert answer["error"]["param"] == "input[0].content[1].image_url"


def test_fetched_pictures_count_to_the_limits_of_their_request(
    server: Running, fetcher: Fetcher, pictures: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.service, "fetcher", fetcher)
    url = at(pictures, "good.png")
    _, _, answer = server.ask("POST", "/v1/responses", body(*[url] * 9))
    assert answer["error"]["code"] == "too_many_images"
    assert pictures.asked == []
    monkeypatch.setattr(limits, "MAX_BODY", 2 * len(PNG) + 1)  # of all, and fetched ones too
    with pytest.raises(ApiError) as error:
        asyncio.run(fetched([Source("x", url)] * 3, fetcher))
    assert error.value.code == "image_too_large"
    assert len(asyncio.run(fetched([Source("x", url)] * 2, fetcher))) == 2


def test_a_host_that_does_not_answer_holds_up_nobody_else(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()

    def resolve(host: str, port: int) -> list[str]:
        go.wait(60)
        return []

    monkeypatch.setattr(server.service, "fetcher", Fetcher(["a.test"], resolve=resolve))
    data = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"
    with ThreadPoolExecutor(40) as pool:
        slow = [
            pool.submit(server.ask, "POST", "/v1/responses", body("https://a.test/"))
            for _ in range(40)
        ]
        until(lambda: server.metric("openchameleon_requests_open") == 40)
        assert server.ask("POST", "/v1/responses", body(data))[0] == 200
        assert not any(one.done() for one in slow)
        go.set()
        assert {one.result()[0] for one in slow} == {400}


def test_by_default_nothing_is_fetched(server: Running) -> None:
    assert server.service.fetcher is None


@pytest.mark.parametrize("host", ["https://a.test", "a.test/b", "a test", "", "*.test", "a:b", "@"])
def test_a_host_that_is_none_is_a_sentence(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="is not a host's name"):
        Fetcher([host])
    assert main(["serve", "--image-host", host]) == 2
    assert "is not a host's name" in capsys.readouterr().err
