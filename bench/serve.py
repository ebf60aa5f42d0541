"""The server under 1, 8 and 32 clients at once: tokens a second, pictures a minute, waiting times.

Starts `openchameleon serve` as a process of its own and asks it over HTTP, each client one
question after the other. First-token times are from the request to the first text of its answer.
"""

from __future__ import annotations

import http.client
import json
import socket
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from common import parser, report

CASES = {  # what is asked; what it is called
    "text": {"input": "Tell a story about a cat.", "mode": "text"},
    "picture": {"input": "Draw a cat at the top left and a pizza at the right.", "mode": "image"},
}


@dataclass(frozen=True, slots=True)
class Timing:
    first: float  # seconds to the first text, or to the end of the first picture
    whole: float
    n_tokens: int


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--model", default="nano")
    args = arguments.parse_args()
    port = free_port()
    command = [sys.executable, "-m", "openchameleon.cli.main", "serve", "--model", args.model]
    server = subprocess.Popen([*command, "--port", str(port)])
    try:
        wait_until_ready(port)
        for case, body in CASES.items():
            for n_clients in (1, 8, 32):
                n_each = 1 if args.quick else max(2, 32 // n_clients)
                sizes = {"model": args.model, "clients": n_clients, "answers": n_clients * n_each}
                report(f"serve/{case}", args.out, sizes, **measure(port, body, n_clients, n_each))
    finally:
        server.terminate()
        server.wait()


def measure(port: int, body: dict[str, Any], n_clients: int, n_each: int) -> dict[str, float]:
    """n_clients at once, each asking n_each times, with seeds of their own."""
    with ThreadPoolExecutor(n_clients) as pool:
        asked = [{**body, "seed": seed} for seed in range(n_clients * n_each)]
        list(pool.map(lambda b: ask(port, b), asked[:n_clients]))  # to warm up
        start = time.monotonic()
        timings = list(pool.map(lambda b: ask(port, b), asked))
        took = time.monotonic() - start
    rates = {"tokens_per_s": sum(t.n_tokens for t in timings) / took}
    if body["mode"] == "image":
        rates["pictures_per_min"] = 60 * len(timings) / took
    firsts = sorted(t.first for t in timings)
    slowest = firsts[-(-99 * len(firsts) // 100) - 1]
    name = "picture" if body["mode"] == "image" else "first_token"
    whole = statistics.median(t.whole for t in timings)
    times = {f"{name}_s": statistics.median(firsts), f"{name}_p99_s": slowest, "answer_s": whole}
    return rates | times


def ask(port: int, body: dict[str, Any]) -> Timing:
    """One streamed answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    start, first, n_tokens = time.monotonic(), None, 0
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/responses", json.dumps(body | {"stream": True}), headers)
    answer = connection.getresponse()
    assert answer.status == 200, answer.read().decode()
    wanted = ("response.output_text.delta", "response.image_generation_call.completed")
    for line in answer:
        if line.startswith(b"data: "):
            event = json.loads(line[6:])
            if first is None and event["type"] in wanted:
                first = time.monotonic() - start
            if event["type"] in ("response.completed", "response.incomplete"):
                n_tokens = event["response"]["usage"]["output_tokens"]
    connection.close()
    assert first is not None, "an answer without text or picture"
    return Timing(first, time.monotonic() - start, n_tokens)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def wait_until_ready(port: int) -> None:
    for _ in range(600):
        with suppress(OSError):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/ready")
            if connection.getresponse().status == 200:
                return
        time.sleep(0.1)
    raise SystemExit("The server did not get ready in a minute.")


if __name__ == "__main__":
    main()
