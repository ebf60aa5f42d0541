"""The work of `corpus` as a step of datatrove, whose executors run it: here, on Slurm, on Ray.

Imported only where it is wanted: datatrove is of the extra `data`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

from openchameleon.data.corpus import Corpus, Run, Work, do_job
from openchameleon.errors import UserError

try:
    from datatrove.executor.base import PipelineExecutor
    from datatrove.pipeline.base import PipelineStep
except ImportError as error:
    raise UserError(
        "--executor slurm and ray need datatrove: pip install 'openchameleon[data]'."
    ) from error

Kind = Literal["local", "slurm", "ray"]
LOGS = "logs"


class ShardStep(PipelineStep):
    """Does one work on every `world_size`-th of some shards; reads and passes on no documents."""

    type, name = "rows", "openchameleon"

    def __init__(self, corpus: Corpus, work: Work, numbers: Sequence[int]) -> None:
        super().__init__()
        self.corpus, self.work, self.numbers = corpus, work, list(numbers)

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        for i in self.numbers[rank::world_size]:
            with self.track_time():
                do_job((self.corpus, self.work, i))
            self.stat_update("shards")


def on_cluster(kind: Kind, workers: int, options: Sequence[str] = ()) -> Run:
    """What runs a work as one task a shard, `workers` of them at a time.

    options: "key=value" arguments of the executor, the values as JSON or else plain. On Slurm the
    work is handed on and not waited for. UserError for an argument that there is not.
    """
    more = dict(_parsed(option) for option in options)

    def run(corpus: Corpus, work: Work, numbers: Sequence[int]) -> None:
        # Which tasks are done is told by the shards, so each run begins a log of its own.
        logs = corpus.out / LOGS / f"{work}-{len(list((corpus.out / LOGS).glob('*')))}"
        step = ShardStep(corpus, work, numbers)
        executor = _executor(kind, [step], len(numbers), workers, str(logs), more)
        try:
            executor.run()
        except ImportError as error:  # ray is imported when it runs
            raise UserError(f"--executor {kind} needs a package more: {error}.") from error
        except FileNotFoundError as error:
            if error.filename != "sbatch":
                raise
            raise UserError("This machine has no sbatch, which hands work to Slurm.") from error

    return run


def _executor(
    kind: Kind, steps: list[PipelineStep], tasks: int, workers: int, logs: str, more: dict[str, Any]
) -> PipelineExecutor:
    common = {"pipeline": steps, "tasks": tasks, "workers": min(workers, tasks)}
    common |= {"logging_dir": logs}
    try:
        if kind == "slurm":
            from datatrove.executor.slurm import SlurmPipelineExecutor

            return SlurmPipelineExecutor(**common | {"job_name": "openchameleon-prepare"} | more)
        if kind == "ray":
            from datatrove.executor.ray import RayPipelineExecutor

            return RayPipelineExecutor(**common | more)
        from datatrove.executor.local import LocalPipelineExecutor

        return LocalPipelineExecutor(**common | {"start_method": "spawn"} | more)
    except TypeError as error:
        raise UserError(f"{kind} does not take these --executor-option: {error}.") from error


def _parsed(option: str) -> tuple[str, Any]:
    key, equals, value = option.partition("=")
    if not equals:
        raise UserError(f"--executor-option {option!r} is not KEY=VALUE, such as partition=gpu.")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value
