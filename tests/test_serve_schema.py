"""Requests made from the server's own schema, right and wrong ones, never make it fail."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from serving import Running, serving

from openchameleon import Chameleon

PHASES = (Phase.explicit, Phase.generate, Phase.target)  # a failure need not be made small


@pytest.fixture(scope="module")
def server(model_folder: Path) -> Iterator[Running]:
    model = Chameleon.from_pretrained(model_folder, device="cpu")
    with serving(lambda: model, name="tiny") as running:
        yield running


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_no_request_made_from_the_schema_is_answered_with_5xx(server: Running, mode: str) -> None:
    import schemathesis

    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) == 8
    if mode == "negative":  # a GET without a body cannot be wrong
        operations = [one for one in operations if one.method == "post"]
    statuses: Counter[int] = Counter()
    for operation in operations:
        cases = operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode))

        @settings(max_examples=150, deadline=None, phases=PHASES, database=None,
                  suppress_health_check=list(HealthCheck))  # fmt: skip
        @given(case=cases)
        def run(case: Any) -> None:
            response = case.call(timeout=60)
            statuses[response.status_code] += 1
            assert response.status_code < 500, case.as_curl_command()

        run()
    assert sum(statuses.values()) > 200


words = st.text(max_size=12)
numbers = st.none() | st.floats(0, 10) | st.integers(0, 100)
part = st.fixed_dictionaries({"type": st.just("input_text"), "text": words})
turn = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]),
                              "content": words | st.lists(part, max_size=3)})  # fmt: skip
body = st.fixed_dictionaries(
    {"input": words | st.lists(turn, max_size=4)},
    optional={
        "temperature": numbers, "top_p": st.none() | st.floats(0, 1), "seed": st.integers(0),
        "top_k": st.integers(-1, 2**31), "guidance": numbers, "stream": st.booleans(),
        "mode": st.sampled_from(["text", "image", "interleaved"]),
        "max_output_tokens": st.integers(0, 70), "partial_images": st.integers(0, 64),
        "instructions": words, "metadata": st.dictionaries(words, words, max_size=3),
    },
)  # fmt: skip


@settings(max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(body=body)
def test_likely_requests_are_answered_or_refused(server: Running, body: dict[str, Any]) -> None:
    status, headers, answer = server.ask("POST", "/v1/responses", body)
    assert status in (200, 400, 422), answer
    if body.get("stream") and status == 200:
        assert headers["content-type"].startswith("text/event-stream")
        last = answer.rstrip().rsplit("\n\n", 1)[-1]
        assert last.startswith(("event: response.completed", "event: response.incomplete"))
