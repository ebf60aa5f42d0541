"""Trains in several processes at once, forked from one that imports torch a single time.

    python processes.py JOBS.json

A job is a run of `fit` on rows of `test_loop`, as torchrun would start it; what it saw is written
to its "out": the losses, the samples of each process, the sentence it ended with.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # the forks would else import it each for themselves, which takes seconds
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.tensor.parallel
from test_loop import CONFIG, OPTIM, VOCAB, make_rows

from openchameleon.data.loader import Batch, RowLoader
from openchameleon.errors import UserError
from openchameleon.model.config import ModelConfig
from openchameleon.model.transformer import Transformer
from openchameleon.train.loop import fit
from openchameleon.train.metrics import read_metrics
from openchameleon.train.parallel import (
    ParallelConfig,
    World,
    init_weights,
    local,
    spread,
    whole,
    world_of_torchrun,
)

SHAPE = ModelConfig(dim=16, n_layers=2, n_heads=4, n_kv_heads=4, vocab_size=VOCAB.size,
                    max_seq_len=16, ffn_dim=32, qk_norm_groups=2)  # fmt: skip


class Watched(RowLoader):
    """Remembers the samples it gave, and spoils the batches of some steps on some rank."""

    def __init__(self, *args: Any, spoiled: list[int], rank_spoiled: int) -> None:
        super().__init__(*args)
        self.seen: dict[int, list[Any]] = {}
        self.spoiled, self.rank_spoiled = spoiled, rank_spoiled
        self.before_step: Callable[[int], None] | None = None

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        batch = super().batch(step, rank, world)
        self.seen[step] = self.sample_ids(step, rank, world)
        if self.before_step:
            self.before_step(step)
        if step in self.spoiled and rank == self.rank_spoiled:
            return dataclasses.replace(batch, loss_weights=batch.loss_weights * float("nan"))
        return batch


def train(job: dict[str, Any], world: World, parallel: ParallelConfig) -> dict[str, Any]:
    """One process's part of a job; what it saw."""
    run = Path(job["run"])
    shape = dataclasses.replace(SHAPE, **job.get("shape", {}))
    config = dataclasses.replace(CONFIG, **{"save_every": 4, **job.get("train", {})})
    with torch.device("meta"):
        model = Transformer(shape)
    spread(model, world, parallel, config.dtype).to_empty(device="cpu")
    init_weights(model, 0)
    spoiled, rank = job.get("spoiled", []), job.get("rank_spoiled", 0)
    rows = {"all": (run.parent / "rows", 1.0)}
    loader = Watched(rows, config.batch_size, config.seed, spoiled=spoiled, rank_spoiled=rank)

    def flip_a_bit(step: int) -> None:
        if step == job["flip"]["step"] and world.rank == job["flip"]["rank"]:
            held = local(model.get_parameter(job["flip"]["name"]).detach()).view(torch.int32)
            held.flatten()[3] ^= 1 << 12

    if "flip" in job:
        loader.before_step = flip_a_bit
    types: list[str] = []  # of what a layer is given: the stream, the rotary tables

    def note_types(_: Any, args: Any) -> None:
        types[:] = [
            str(args[0].dtype),
            str(args[1][0].dtype),
        ]

    model.layers[1].register_forward_pre_hook(note_types)
    is_code = torch.zeros(VOCAB.size, dtype=torch.bool)
    is_code[VOCAB.image.first_id : VOCAB.image.stop_id] = True
    sentence = ""
    try:
        fit(model, loader, config, OPTIM, run, is_code=is_code, world=world,
            stop_at=job.get("stop_at"))  # fmt: skip
    except UserError as error:
        sentence = str(error)
    weights = {
        name: whole(p.detach()).double().sum().item() for name, p in model.named_parameters()
    }
    seen = {step: loader.seen[step] for step in loader.seen} if world.tensor_rank == 0 else {}
    return {"sentence": sentence, "weights": weights, "samples": seen, "types": types}


def work(job: dict[str, Any], rank: int) -> None:
    """A forked process: as torchrun would have started it."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job["processes"]),
        "MASTER_ADDR": "localhost", "MASTER_PORT": str(job["port"]),
    }  # fmt: skip
    torch.set_num_threads(1)
    parallel = ParallelConfig(**job.get("parallel", {}))
    with world_of_torchrun(parallel) as world:
        saw = train(job, world, parallel)
        Path(f"{job['out']}.{rank}").write_text(json.dumps(saw))


def start(job: dict[str, Any]) -> list[int]:
    """Forks the job's processes; their numbers."""
    children = []
    for rank in range(job["processes"]):
        if (child := os.fork()) == 0:
            code = 1
            try:
                work(job, rank)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    return children


def ended(children: list[int]) -> int:
    """Waits for all; how many failed."""
    return sum(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0 for child in children)


def kill_after(job: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Starts the job and ends it by SIGKILL; how far it had come, and whether it was saving.

    The seconds count from its first log line, those below 0 from the start.
    """
    log = Path(job["run"]) / "metrics.jsonl"
    before = log.stat().st_mtime_ns if log.exists() else 0
    children = start(job)
    while seconds >= 0 and not (log.exists() and log.stat().st_mtime_ns > before):
        time.sleep(0.01)
    time.sleep(abs(seconds))
    for child in children:
        os.kill(child, signal.SIGKILL)
    ended(children)
    names = [path.name for path in (Path(job["run"]) / "checkpoints").glob("step-*")]
    steps = [int(name[5:]) for name in names if ".tmp" not in name]
    return {"step": max(steps, default=0), "saving": any(".tmp" in name for name in names)}


def run_job(job: dict[str, Any]) -> None:
    """The job, killed after each of its "kills" seconds and begun again, then to its end."""
    kills = [kill_after(job, seconds) for seconds in job.get("kills", [])]
    failed = ended(start(job))
    ranks = [Path(f"{job['out']}.{rank}") for rank in range(job["processes"])]
    saw = [json.loads(path.read_text()) for path in ranks if path.exists()]
    lines = read_metrics(Path(job["run"]) / "metrics.jsonl")
    result = {"failed": failed, "ranks": saw, "lines": lines, "kills": kills}
    Path(job["out"]).write_text(json.dumps(result))


def main() -> None:
    torch.set_num_threads(1)
    for job in json.loads(Path(sys.argv[1]).read_text()):
        make_rows(Path(job["run"]).parent / "rows")
        if source := job.get("copy_of"):
            shutil.copytree(source, job["run"])
        run_job(job)


if __name__ == "__main__":
    main()
