"""Counters and times of the server, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = r = CollectorRegistry()
        self.http = Counter(
            "openchameleon_http_requests", "Requests by path and status (499: the client went).",
            ["path", "status"], registry=r,
        )  # fmt: skip
        self.answers = Counter(
            "openchameleon_answers", "Answers by how they ended: stop, length, nonfinite_logits,"
            " aborted (the client went), refused, crashed, stopped (by the server's end).",
            ["outcome"], registry=r,
        )  # fmt: skip
        self.aborted = Counter("openchameleon_aborted", "Answers given up by their client.",
                               registry=r)  # fmt: skip
        self.restarts = Counter("openchameleon_engine_restarts", "Crashes of the engine.",
                                registry=r)  # fmt: skip
        self.requests = Gauge("openchameleon_requests_open", "Requests let in.", registry=r)
        self.running = Gauge("openchameleon_running", "Answers being written.", registry=r)
        self.waiting = Gauge("openchameleon_waiting", "Answers that wait in line.", registry=r)
        self.ready = Gauge("openchameleon_ready", "1 where new requests are taken.", registry=r)
        self.prompt_tokens = Counter("openchameleon_prompt_tokens", "Tokens read.", registry=r)
        self.new_tokens = Counter("openchameleon_new_tokens", "Tokens written.", registry=r)
        self.pictures = Counter("openchameleon_pictures", "Pictures written.", registry=r)
        self.first_token = Histogram(
            "openchameleon_first_token_seconds", "From standing in line to the first token.",
            buckets=SECONDS, registry=r,
        )  # fmt: skip
        self.picture_seconds = Histogram(
            "openchameleon_picture_seconds", "From a picture's begin to its last code.",
            buckets=SECONDS, registry=r,
        )  # fmt: skip

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self.registry)
