"""Pictures that make their decoder hang, die or take all memory harm nobody else."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from serving import serving, start, until

from openchameleon import Chameleon
from openchameleon.errors import UserError
from openchameleon.image_io import open_image
from openchameleon.serve import decoding, limits
from openchameleon.serve.decoding import Decoders
from openchameleon.serve.errors import ApiError

RESPONSES = "/v1/responses"
PROGRAM = """
import ctypes, os, sys, time
from openchameleon.serve import decoder

def open_image(data, *limits, real=decoder.open_image):
    if data.endswith(b"evil"):
        {evil}
    return real(data, *limits)

decoder.open_image = open_image
sys.exit(decoder.main())
"""
HANG, DIE, CRASH = "time.sleep(60)", "os._exit(0)", "ctypes.string_at(0)"
LIE = "os.write(3, decoder.HEAD.pack(60000, 60000))"  # to where answers go
CHATTER = "os.write(3, decoder.HEAD.pack(0, 2**32 - 1)); time.sleep(60)"


@pytest.fixture(scope="module")
def tiny(model_folder: Path) -> Chameleon:
    return Chameleon.from_pretrained(model_folder, device="cpu")


def program(evil: str = "pass", memory: int = decoding.MEMORY, alarm: int = 60) -> list[str]:
    """The decoder's program, which does as it is told with what ends with "evil"."""
    numbers = (limits.MAX_PIXELS, limits.MAX_BODY, memory, alarm)
    return [sys.executable, "-c", PROGRAM.format(evil=evil), *map(str, numbers)]


@contextmanager
def decoding_with(*arguments: Any) -> Iterator[Decoders]:
    decoders = Decoders(*arguments)
    try:
        yield decoders
    finally:
        decoders.close()


def file_of(picture: PIL.Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return buffer.getvalue()


GOOD = file_of(PIL.Image.effect_noise((40, 30), 90).convert("RGB"))
EVIL = GOOD + b"evil"


def body(data: bytes) -> dict[str, Any]:
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    content = [{"type": "input_image", "image_url": url}]
    return {"input": [{"role": "user", "content": content}], "max_output_tokens": 1}


def is_alive(pid: int) -> bool:
    """Whether there is such a process, and not only its exit code."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_another_process_decodes_as_this_one_does() -> None:
    with decoding_with(1) as decoders:
        for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP"):
            data = file_of(PIL.Image.effect_noise((41, 30), 90).convert("RGB"), kind)
            assert decoders.decode(data).tobytes() == open_image(data).tobytes()
        with pytest.raises(UserError, match="rows of the picture are missing"):
            decoders.decode(GOOD[:200])
        assert decoders.decode(GOOD).size == (40, 30)


def test_the_decoder_knows_nothing_of_models_and_servers() -> None:
    heavy = "{'torch', 'fastapi', 'starlette', 'pydantic'}"
    code = f"import openchameleon.serve.decoder, sys; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_processes_are_started_when_they_are_needed() -> None:
    with decoding_with(2) as decoders:
        assert [decoder.pid for decoder in decoders.all] == [None, None]
        for _ in range(3):
            decoders.decode(GOOD)
        assert [decoder.pid for decoder in decoders.all].count(None) == 1


@pytest.mark.parametrize(
    ("evil", "words"),
    [(HANG, "in 1 seconds"), (DIE, "died"), (CRASH, "died"), (LIE, "died"), (CHATTER, "died")],
    ids=["hang", "die", "crash", "lie", "chatter"],
)
def test_a_picture_that_harms_its_decoder_is_refused_and_the_next_one_is_read(
    evil: str, words: str
) -> None:
    with decoding_with(1, program(evil), 1.0) as decoders:
        decoders.decode(GOOD)
        (decoder,) = decoders.all
        before = decoder.pid
        assert before is not None
        begin = time.monotonic()
        with pytest.raises(UserError, match=words):
            decoders.decode(EVIL)
        assert time.monotonic() - begin < 5
        assert not is_alive(before)
        assert decoders.decode(GOOD).size == (40, 30)


def test_a_picture_that_takes_all_memory_is_refused_by_the_limit() -> None:
    large = file_of(PIL.Image.fromarray(np.full((3000, 3000), 40000, np.uint16)))
    with decoding_with(1, program(memory=256 << 20)) as decoders:
        decoders.decode(GOOD)
        before = decoders.all[0].pid
        with pytest.raises(UserError, match="takes too much memory"):
            decoders.decode(large)
        assert decoders.decode(GOOD).size == (40, 30)
        assert decoders.all[0].pid == before
    with decoding_with(1) as decoders:
        assert decoders.decode(large).getpixel((0, 0)) == (156, 156, 156)


def test_a_decoder_that_died_in_between_is_not_the_next_pictures_fault() -> None:
    with decoding_with(1) as decoders:
        decoders.decode(GOOD)
        pid = decoders.all[0].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        until(lambda: not is_alive(pid))
        assert decoders.decode(GOOD).size == (40, 30)


def test_an_answer_that_is_read_in_part_is_not_the_next_pictures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_memory(
        process: subprocess.Popen[bytes], n_bytes: int, real: Any = decoding._read
    ) -> Any:
        if n_bytes > 1000:
            raise MemoryError
        return real(process, n_bytes)

    with decoding_with(1) as decoders:
        with monkeypatch.context() as patch:
            patch.setattr(decoding, "_read", no_memory)
            with pytest.raises(MemoryError):
                decoders.decode(GOOD)
        other = file_of(PIL.Image.new("RGB", (5, 5), "red"))
        assert decoders.decode(other).tobytes() == open_image(other).tobytes()


def test_a_decoder_reads_no_code_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "numpy.py").write_text("open('ran', 'w')")
    monkeypatch.chdir(tmp_path)
    with decoding_with(1) as decoders:
        assert decoders.decode(GOOD).size == (40, 30)
    assert not (tmp_path / "ran").exists()


def test_where_memory_ends_a_decoder_goes_before_the_server() -> None:
    with decoding_with(1) as decoders:
        decoders.decode(GOOD)
        assert Path(f"/proc/{decoders.all[0].pid}/oom_score_adj").read_text() == "1000\n"


def test_where_no_decoder_can_be_started_pictures_wait_for_another_time() -> None:
    for nothing in (["/no/such/program"], [sys.executable, "-c", ""]):
        with decoding_with(1, nothing) as decoders:
            with pytest.raises(ApiError) as error:
                decoders.decode(GOOD)
            assert error.value.status_code == 503


def test_a_decoder_whose_server_is_gone_does_not_hang_for_ever() -> None:
    with decoding_with(1, program(HANG, alarm=1)) as decoders:
        begin = time.monotonic()
        with pytest.raises(UserError, match="died"):  # by its own alarm: 5 seconds are not over
            decoders.decode(EVIL)
        assert time.monotonic() - begin < 5


def test_pictures_that_hang_hold_up_nobody_else(tiny: Chameleon) -> None:
    with serving(lambda: tiny, name="tiny") as running, ThreadPoolExecutor(2) as pool:
        decoders = running.service.decoders = Decoders(2, program(HANG), 60.0)
        words = {"input": "a cat", "max_output_tokens": 1}
        drawn = {"prompt": "a cat"}
        hang = []
        for n, others in ((1, (words, body(GOOD), words, body(GOOD))), (2, (words, words))):
            hang.append(pool.submit(running.ask, "POST", RESPONSES, body(EVIL)))
            until(lambda n=n: sum(decoder.pid is not None for decoder in decoders.all) >= n)
            for other in others:
                assert running.ask("POST", RESPONSES, other)[0] == 200
            assert running.ask("POST", "/v1/images/generations", drawn)[0] == 200
            assert running.ask("GET", "/ready")[0] == 200
        assert not any(one.done() for one in hang)
        for decoder in decoders.all:
            assert decoder.pid is not None
            os.kill(decoder.pid, signal.SIGKILL)
        for one in hang:
            status, _, answer = one.result()
            assert (status, answer["error"]["code"]) == (400, "invalid_image")
            assert answer["error"]["param"] == "input[0].content[0].image_url"
        assert running.ask("POST", RESPONSES, body(GOOD))[0] == 200


def test_a_server_that_ends_does_not_wait_for_a_picture(tiny: Chameleon) -> None:
    with serving(lambda: tiny, name="tiny", drain=0.2) as running, ThreadPoolExecutor(1) as pool:
        decoders = running.service.decoders = Decoders(2, program(HANG), 30.0)
        pool.submit(running.ask, "POST", RESPONSES, body(EVIL)).add_done_callback(_ignored)
        until(lambda: any(decoder.pid for decoder in decoders.all))
        pids = [decoder.pid for decoder in decoders.all if decoder.pid]
        begin = time.monotonic()
        running.end()
        running.join()
        assert time.monotonic() - begin < 10
        assert not any(map(is_alive, pids))


def _ignored(future: Any) -> None:
    future.exception()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_decoders_end_with_the_server(model_folder: Path, number: signal.Signals) -> None:
    process, port = start("--model", str(model_folder))
    try:
        until(lambda: _post(port, body(GOOD)) == 200)
        (child,) = children(process.pid)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    until(lambda: not is_alive(child))
    assert err == ""


def _post(port: int, asked: Any) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", RESPONSES, json.dumps(asked), {"Content-Type": "application/json"})
    status = connection.getresponse().status
    connection.close()
    return status


def children(pid: int) -> list[int]:
    """The processes that it started."""
    paths = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for path in paths for child in path.read_text().split()]
