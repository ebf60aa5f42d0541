"""Generates in several processes at once, forked from one that imports torch a single time.

    python tensor_processes.py JOBS.json

A job is `serve.parallel.with_model` on a model folder, as torchrun would start it, and something
to do with the model: a function of this file by its name. What that returned is written to "out".
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from openchameleon.inference.engine import Engine
from openchameleon.inference.params import ModalityParams, SamplingParams
from openchameleon.inference.sequence import Request
from openchameleon.pipeline import Chameleon
from openchameleon.serve import parallel

GREEDY = ModalityParams(temperature=0.0)


def requests(vocab_start: int) -> list[Request]:
    """Text, pictures and both, greedy and drawn, guided and not; two prompts begin alike."""
    prompt = [0, *(vocab_start + n for n in (5, 9, 9, 30, 2, 7, 41, 8, 3, 3, 12, 5, 6, 7, 8, 9))]
    greedy = SamplingParams(text=GREEDY, image=GREEDY, max_tokens=24)
    return [
        Request([*prompt, vocab_start + 4], greedy),
        Request([*prompt, vocab_start + 11], replace(greedy, mode="text")),
        Request([0, vocab_start + 6], replace(greedy, mode="image", guidance_text=3.0)),
        Request([0, vocab_start + 3], SamplingParams(seed=5, max_tokens=20, guidance_text=2.0)),
        Request([0, vocab_start + 3], SamplingParams(seed=6, max_tokens=30)),
    ]


def answers(chameleon: Chameleon) -> Any:
    """All requests at once."""
    engine = chameleon.engine
    return [c.token_ids for c in engine.generate(requests(chameleon.config.vocab.text_start))]


def aborted(chameleon: Chameleon) -> Any:
    """Requests come and go between the steps, one without a seed; then all of them again."""
    engine = chameleon.engine
    first, second, *_ = requests(chameleon.config.vocab.text_start)
    unseeded = replace(second, params=SamplingParams(mode="text", max_tokens=30))
    one, other = engine.add(first), engine.add(unseeded)
    engine.step()
    engine.step()
    engine.abort(one)
    third = engine.add(second)
    while other.finish_reason is None or third.finish_reason is None:
        engine.step()
    left = engine.add(unseeded)
    engine.abort(left)
    return answers(chameleon)


def streamed(chameleon: Chameleon) -> Any:
    """The pieces of a document, read and written through the tokenizer."""
    events = chameleon.stream("a cat", mode="image", seed=3, temperature=0.0)
    return [type(event).__name__ for event in events]


def refused(chameleon: Chameleon) -> Any:
    """A request that cannot be is refused before the others hear of it."""
    try:
        chameleon.engine.add(Request([]))
    except Exception as error:
        return [str(error), answers(chameleon)]
    return None


def fails(chameleon: Chameleon) -> Any:
    """A step that breaks on the first process."""

    def broken(*_: object) -> None:
        raise MemoryError("no memory")

    chameleon.engine.runner.read = broken  # type: ignore[method-assign, assignment]
    said = []
    for _ in range(2):
        try:
            answers(chameleon)
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def differs(chameleon: Chameleon) -> Any:
    """The other process has other weights (see `run`)."""
    try:
        answers(chameleon)
    except RuntimeError:  # the other one has gone
        return "alone"
    return None


def run(job: dict[str, Any], rank: int) -> None:
    """A forked process: as torchrun would have started it."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job["processes"]),
        "MASTER_ADDR": "localhost", "MASTER_PORT": str(job["port"]),
    }  # fmt: skip
    torch.set_num_threads(1)
    does: Callable[[Chameleon], Any] = globals()[job["does"]]
    if job["does"] == "differs" and rank == 1:
        step = Engine.step

        def other_step(engine: Engine) -> Any:
            moved = step(engine)
            for sequence in moved:
                sequence.full.token_ids[-1] ^= 1
            return moved

        Engine.step = other_step  # type: ignore[method-assign]

    def work(chameleon: Chameleon) -> int:
        held = sum(p.numel() for p in chameleon.model.parameters())
        saw = {"held": held, "saw": does(chameleon)}
        Path(job["out"]).write_text(json.dumps(saw))
        return 0

    said = ""
    try:
        parallel.with_model(job["model"], work)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    Path(f"{job['out']}.{rank}").write_text(said)


def warm_up() -> None:
    """Imports what the forks would else import each for themselves, which takes seconds."""
    import torch.distributed.device_mesh
    import torch.distributed.tensor

    with torch.device("meta"):
        layer = torch.nn.Embedding(2, 2)
    layer.weight.chunk(2)[0].contiguous()


def main() -> None:
    torch.set_num_threads(1)
    warm_up()
    for job in json.loads(Path(sys.argv[1]).read_text()):
        children = []
        for rank in range(job["processes"]):
            if (child := os.fork()) == 0:
                try:
                    run(job, rank)
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stderr.flush()
                    os._exit(0)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)


if __name__ == "__main__":
    main()
