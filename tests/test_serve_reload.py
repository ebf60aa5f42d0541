"""A model that is loaded anew while it is served, and files that change under it."""

from __future__ import annotations

import gc
import http.client
import json
import os
import shutil
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from serving import Running, serving, start, until

from openchameleon import Chameleon, Document, Image
from openchameleon.checkpoints.convert import convert
from openchameleon.errors import UserError
from openchameleon.image_io import png_base64
from openchameleon.inference.engine import Engine
from openchameleon.inference.sequence import Sequence
from openchameleon.model.transformer import Transformer
from openchameleon.serve import service
from openchameleon.serve.folder import ServedFolder

RESPONSES, RELOAD, KEY = "/v1/responses", "/admin/reload", {"Authorization": "Bearer sesame"}
ASKED: dict[str, Any] = {"input": "a cat", "temperature": 0, "mode": "text"}


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    """A model folder that a test may harm."""
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


def replaced(folder: Path, seed: int = 1) -> Chameleon:
    """Other weights, and a shorter context, in the folder: the model that it now holds."""
    model = Chameleon.from_pretrained(folder, device="cpu")
    model.model.init_weights(seed)
    shape = replace(model.config.model, max_seq_len=48)
    Chameleon(replace(model.config, model=shape), model.model, model.tokenizer).save(folder)
    return Chameleon.from_pretrained(folder, device="cpu")


@contextmanager
def served(folder: Path, **how: Any) -> Iterator[Running]:
    source = ServedFolder(folder, device="cpu")
    how = {"api_key": "sesame", "name": "tiny", "load_anew": source.load_anew} | how
    with serving(source.load, **how) as running:
        yield running


def ask(running: Running, path: str = RESPONSES, body: Any = None) -> tuple[int, Any]:
    status, _, answer = running.ask("POST", path, body or ASKED, KEY)
    return status, answer


def text_of(answer: dict[str, Any]) -> str:
    return "".join(item["content"][0]["text"] for item in answer["output"])


def alone(model: Chameleon) -> str:
    return model.generate("a cat", temperature=0.0, mode="text").text


class Waiting(Engine):
    """An engine that steps only once it is let go."""

    def __init__(self, model: Chameleon) -> None:
        super().__init__(model.model, model.config.vocab)
        self.go = threading.Event()

    def step(self) -> list[Sequence]:
        assert self.go.wait(60)
        return super().step()


def waiting_in(engines: list[Waiting]) -> Callable[[Chameleon], Engine]:
    """Makes engines that wait, the newest last of `engines`."""

    def make(model: Chameleon) -> Engine:
        engines.append(Waiting(model))
        return engines[-1]

    return make


def test_a_model_that_is_loaded_anew_takes_the_place_of_the_old_one(folder: Path) -> None:
    old = Chameleon.from_pretrained(folder, device="cpu")
    with served(folder) as running:
        assert text_of(ask(running)[1]) == alone(old)
        new = replaced(folder)
        assert alone(new) != alone(old)
        assert text_of(ask(running)[1]) == alone(old), "until it is asked for"
        assert ask(running, RELOAD) == (200, {"object": "model", "id": "tiny"})
        assert text_of(ask(running)[1]) == alone(new)
        _, _, models = running.ask("GET", "/v1/models", None, KEY)
        assert models["data"][0]["context_length"] == 48


def test_only_who_has_the_key_of_a_server_loads_its_model_anew(folder: Path) -> None:
    with served(folder) as running:
        for headers in ({}, {"Authorization": "Bearer sesam"}):
            assert running.ask("POST", RELOAD, None, headers)[0] == 401
        assert running.ask("GET", RELOAD, None, KEY)[0] == 405
    with served(folder, api_key=None) as running:
        status, _, answer = running.ask("POST", RELOAD)
        assert (status, answer["error"]["code"]) == (403, "forbidden")
        assert "--api-key" in answer["error"]["message"]


def damage(folder: Path, how: str) -> None:
    weights = folder / "model.safetensors"
    if how == "no folder":
        shutil.rmtree(folder)
    elif how == "no weights":
        weights.unlink()
    elif how == "half of the weights":
        os.truncate(weights, weights.stat().st_size // 2)
    elif how == "no config":
        (folder / "config.json").write_text("{")
    else:
        (folder / "manifest.json").write_text(json.dumps({"files": {
            "model.safetensors": {"bytes": weights.stat().st_size, "sha256": "0" * 64}}
        }))  # fmt: skip


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("no folder", "not there any more"), ("no weights", "model.safetensors cannot be read"),
        ("half of the weights", "model.safetensors cannot be read"), ("no config", "config.json"),
        ("another sum", "model.safetensors is not as manifest.json says"),
    ],
)  # fmt: skip
def test_a_damaged_folder_is_told_and_the_old_model_goes_on(
    folder: Path, how: str, words: str
) -> None:
    with served(folder) as running:
        before = ask(running)[1]["output"][0]["content"]
        damage(folder, how)
        status, answer = ask(running, RELOAD)
        assert (status, answer["error"]["code"]) == (422, "invalid_model")
        assert "The old model goes on" in answer["error"]["message"]
        assert words in answer["error"]["message"]
        assert str(folder.parent) not in json.dumps(answer)
        assert running.ask("GET", "/ready")[0] == 200
        assert ask(running)[1]["output"][0]["content"] == before


def test_a_folder_that_was_converted_is_compared_with_its_manifest(
    model_folder: Path, tmp_path: Path
) -> None:
    convert(model_folder, tmp_path / "copy", "native")
    source = ServedFolder(tmp_path / "copy", device="cpu")
    assert alone(source.load_anew()) == alone(source.load())
    with (tmp_path / "copy" / "config.json").open("a") as file:
        file.write(" ")
    source.load()
    with pytest.raises(UserError, match=r"^config.json is not as manifest.json says"):
        source.load_anew()


def test_no_way_to_a_folder_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor to the folders around it, where a tokenizer of Meta's is sought too."""
    folder = tmp_path / "models" / "7b"
    folder.mkdir(parents=True)
    (folder / "params.json").write_text('{"model": {}}')
    monkeypatch.chdir(tmp_path)
    for place in (folder, folder.relative_to(tmp_path)):
        with pytest.raises(UserError, match="No text_tokenizer") as error:
            ServedFolder(place, "cpu", allow_pickle=True).load_anew()
        assert tmp_path.name not in str(error.value)
    shutil.copytree(folder, "e")  # a name that is part of words
    with pytest.raises(UserError, match="put the tokenizer there"):
        ServedFolder(Path("e"), "cpu", allow_pickle=True).load_anew()


def test_answers_under_way_end_with_the_old_model_and_new_ones_wait_for_the_new(
    folder: Path,
) -> None:
    old, engines = Chameleon.from_pretrained(folder, device="cpu"), []

    waiting = waiting_in(engines)

    with (
        served(folder, engine=waiting, max_running=1) as running,
        ThreadPoolExecutor(4) as pool,
    ):
        before = [pool.submit(ask, running) for _ in range(2)]  # the second one is in line
        until(lambda: running.metric("openchameleon_requests_open") == 2)
        until(lambda: running.metric("openchameleon_waiting") == 1)
        new = replaced(folder)
        reload = pool.submit(ask, running, RELOAD)
        until(lambda: not running.service._stays.is_set())
        after = pool.submit(ask, running)
        until(lambda: running.metric("openchameleon_requests_open") == 4)
        assert running.ask("GET", "/ready")[0] == 200
        status, answer = ask(running, RELOAD)
        assert (status, answer["error"]["code"]) == (409, "conflict")
        assert len(engines) == 1, "the old one is not left before its answers have ended"
        engines[0].go.set()
        assert [text_of(one.result()[1]) for one in before] == [alone(old)] * 2
        assert reload.result()[0] == 200
        assert len(engines) == 2
        engines[1].go.set()
        assert text_of(after.result()[1]) == alone(new)


class Engines:
    """Makes engines, but for models of a context of `refused`; holds none of them."""

    def __init__(self, refused: int | None = None) -> None:
        self.refused = refused
        self.models: list[weakref.ref[Transformer]] = []
        self.made: list[weakref.ref[Engine]] = []
        self.alive: list[int] = []

    def __call__(self, model: Chameleon) -> Engine:
        self.models.append(weakref.ref(model.model))
        self.alive.append(sum(engine() is not None for engine in self.made))
        if model.config.model.max_seq_len == self.refused:
            raise MemoryError("no memory at /some/path")
        engine = Engine(model.model, model.config.vocab)
        self.made.append(weakref.ref(engine))
        return engine


def test_a_picture_that_is_read_meanwhile_is_answered_by_the_model_that_reads_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(data: bytes) -> PIL.Image.Image:
        begun.set()
        assert go.wait(60)
        return picture

    old, begun, go = (
        Chameleon.from_pretrained(folder, device="cpu"),
        threading.Event(),
        threading.Event(),
    )
    picture = PIL.Image.linear_gradient("L").convert("RGB")
    url = f"data:image/png;base64,{png_base64(picture)}"
    asked = ASKED | {"input": [{"role": "user", "content": [
        {"type": "input_image", "image_url": url}]}]}  # fmt: skip
    with served(folder) as running, ThreadPoolExecutor(2) as pool:
        monkeypatch.setattr(running.service.decoders, "decode", decode)
        before = pool.submit(ask, running, RESPONSES, asked)
        assert begun.wait(60)
        new = replaced(folder)
        reload = pool.submit(ask, running, RELOAD)
        until(lambda: not running.service._stays.is_set())
        time.sleep(0.1)  # in which it could go wrong
        assert not reload.done()
        go.set()
        prompt = Document([Image(picture)])
        texts = [m.generate(prompt, temperature=0.0, mode="text").text for m in (old, new)]
        assert texts[0] != texts[1]
        assert text_of(before.result()[1]) == texts[0]
        assert reload.result()[0] == 200
        assert text_of(ask(running, RESPONSES, asked)[1]) == texts[1]


def test_a_new_model_that_no_engine_can_be_made_for_is_not_taken(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with served(folder, engine=Engines(refused=48)) as running:
        before = text_of(ask(running)[1])
        replaced(folder)
        status, answer = ask(running, RELOAD)
        assert (status, answer["error"]["code"]) == (500, "server_error")
        assert "path" not in answer["error"]["message"]
        assert text_of(ask(running)[1]) == before
        assert running.metric("openchameleon_engine_restarts_total") == 0
    assert "no memory at" in caplog.text


@pytest.mark.parametrize("refused", [None, 48])
def test_of_two_models_only_the_one_that_is_served_stays_in_memory(
    folder: Path, refused: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a cache at a time: one that is made beside another would be small for ever."""
    engines = Engines(refused)
    # Pytest would keep what was raised.
    monkeypatch.setattr(service.log, "exception", lambda _: None)
    with served(folder, engine=engines) as running:
        ask(running)
        replaced(folder)
        gc.disable()
        try:
            assert ask(running, RELOAD)[0] == (500 if refused else 200)
            ask(running)
            kept, gone = (0, 1) if refused else (1, 0)
            until(lambda: engines.models[gone]() is None, 5)
            assert engines.models[kept]() is not None
        finally:
            gc.enable()
        assert engines.alive == [0] * (3 if refused else 2)


def test_an_engine_that_crashes_while_a_new_model_waits_leaves_its_place_to_it(
    folder: Path,
) -> None:
    engines: list[Waiting] = []

    waiting = waiting_in(engines)

    with served(folder, engine=waiting) as running, ThreadPoolExecutor(2) as pool:
        lost = pool.submit(ask, running)
        until(lambda: running.metric("openchameleon_running") == 1)
        new = replaced(folder)
        reload = pool.submit(ask, running, RELOAD)
        until(lambda: not running.service._stays.is_set())
        engines[0].runner = None  # type: ignore[assignment]
        engines[0].go.set()
        assert lost.result()[0] == 500
        assert reload.result()[0] == 200
        until(lambda: running.ask("GET", "/ready")[0] == 200, 5)
        engines[1].go.set()
        assert text_of(ask(running)[1]) == alone(new)


def test_a_model_that_several_processes_share_is_not_loaded_anew(folder: Path) -> None:
    with served(folder, load_anew=None) as running:
        status, answer = ask(running, RELOAD)
        assert (status, answer["error"]["code"]) == (409, "conflict")
        assert "several processes" in answer["error"]["message"]


def test_a_server_ends_while_a_model_waits_for_its_place(folder: Path) -> None:
    engines: list[Waiting] = []

    waiting = waiting_in(engines)

    with (
        served(folder, engine=waiting, drain=0.1) as running,
        ThreadPoolExecutor(3) as pool,
    ):
        pool.submit(ask, running)
        until(lambda: running.metric("openchameleon_running") == 1)
        pool.submit(ask, running, RELOAD)
        until(lambda: not running.service._stays.is_set())
        waits = pool.submit(ask, running)
        until(lambda: running.metric("openchameleon_requests_open") == 3)
        running.end()
        until(lambda: running.service.draining)
        for engine in engines:
            engine.go.set()
        assert waits.result()[0] == 503
        running.join()


def test_a_server_ends_without_waiting_for_a_model_that_is_loaded(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    go = threading.Event()

    def slowly() -> Chameleon:
        go.wait(60)
        raise UserError("nobody waits for this")

    begin = time.monotonic()
    with served(folder, load_anew=slowly, drain=0.1) as running, ThreadPoolExecutor(1) as pool:
        reload = pool.submit(ask, running, RELOAD)
        until(lambda: running.metric("openchameleon_requests_open") == 1)
        running.end()
        status, answer = reload.result()
        assert (status, answer["error"]["code"]) == (503, "unavailable")
    with serving(slowly, ready=False):
        pass
    assert time.monotonic() - begin < 30
    go.set()
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_weights_that_are_cut_off_in_place_change_nothing(folder: Path, kind: str) -> None:
    """They may be mapped files, and then this kills: so in a process of its own."""
    Chameleon.from_pretrained(folder, device="cpu").save(folder, kind)
    process, port = start("--model", str(folder), "--dtype", kind, "--device", "cpu")
    try:
        until(lambda: _get(port, "/ready") == 200)
        os.truncate(folder / "model.safetensors", 100)
        os.truncate(folder / "image_tokenizer" / "model.safetensors", 100)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        body = json.dumps({"prompt": "a cat"})
        connection.request(
            "POST", "/v1/images/generations", body, {"Content-Type": "application/json"}
        )
        response = connection.getresponse()
        assert response.status == 200
        assert json.loads(response.read())["data"]
        connection.close()
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0


def _get(port: int, path: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path)
    status = connection.getresponse().status
    connection.close()
    return status
