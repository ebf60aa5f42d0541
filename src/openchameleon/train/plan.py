"""What a training run needs: memory, time, GPU-hours and cost, from shapes and datasheets alone.

Nothing here is measured. Speed is a stated utilisation times the datasheet's rate, and the network
only bounds it from below; what a machine really reaches has to be seen there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from openchameleon.errors import UserError, nearest
from openchameleon.model.config import PRESETS, ModelConfig, n_params
from openchameleon.model.flops import counting_conventions, train_flops_per_token
from openchameleon.train.memory import BFLOAT16, FLOAT32, Layout, Memory, memory_of

NODE = 8
"""GPUs of one machine, which tensor parallelism does not leave."""
USABLE = 0.9
"""Part of a GPU's memory that a plan may fill; CUDA, communication and fragments take the rest."""


@dataclass(frozen=True, slots=True)
class Machine:
    """A GPU in a node of eight.

    flops: dense bfloat16 operations a second. memory: GiB. network: bytes a second that the node
    sends to others.
    """

    flops: float
    memory: float
    network: float


MACHINES = {
    "a100-40": Machine(312e12, 40, 200e9),
    "a100-80": Machine(312e12, 80, 200e9),
    "h100": Machine(989e12, 80, 400e9),
    "h200": Machine(989e12, 140, 400e9),
    "b200": Machine(2250e12, 179, 400e9),
}
"""NVIDIA's datasheets, SXM modules; a network link of 200 or 400 Gbit/s for each GPU."""


@dataclass(frozen=True, slots=True)
class Work:
    """What is to be trained: `tokens` in steps of `batch_size` rows of `row_len`."""

    name: str
    model: ModelConfig
    row_len: int
    batch_size: int
    tokens: float
    chunk: int = 512


@dataclass(frozen=True, slots=True)
class PaperRun:
    """A pretraining that the paper reports (Tables 1 and 2), and the GPU-hours it took."""

    work: Work
    machine: str
    gpus: int
    gpu_hours: int


PAPER = {
    "7b": PaperRun(Work("7b", PRESETS["7b"], 4096, 2048, 9.2e12), "a100-80", 1024, 856_481),
    "34b": PaperRun(Work("34b", PRESETS["34b"], 4096, 3072, 9.2e12), "a100-80", 3072, 4_282_407),
}
"""Batches of 2^23 and 3 x 2^22 tokens, as the paper has them, in rows of its context."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A training on its GPUs.

    compute_s: seconds of a step at `utilisation`, by `train_flops_per_token`. What checkpointing
    computes again does not count, and lowers by up to a quarter what utilisation can be reached.
    network_s: see `network_seconds`.
    """

    work: Work
    machine: str
    layout: Layout
    utilisation: float
    memory: Memory
    compute_s: float
    network_s: float

    @property
    def fits(self) -> bool:
        return self.memory.total <= USABLE * MACHINES[self.machine].memory * 2**30

    @property
    def step_s(self) -> float:
        """Seconds a step: computing and the network overlap, and the slower one decides."""
        return max(self.compute_s, self.network_s)

    @property
    def n_steps(self) -> float:
        return self.work.tokens / (self.work.batch_size * self.work.row_len)

    @property
    def tokens_per_s(self) -> float:
        """Of one GPU."""
        return self.work.batch_size * self.work.row_len / self.step_s / self.layout.gpus

    @property
    def gpu_hours(self) -> float:
        return self.n_steps * self.step_s * self.layout.gpus / 3600

    @property
    def days(self) -> float:
        return self.n_steps * self.step_s / 86_400


def plan(work: Work, machine: str, layout: Layout, utilisation: float = 0.45) -> Plan:
    """The plan, whether it fits or not. UserError where the work cannot be laid out so."""
    if machine not in MACHINES:
        raise UserError(
            f"No machine {machine!r}: there are {', '.join(MACHINES)}.{nearest(machine, MACHINES)}"
        )
    if not 0 < utilisation <= 1:
        raise UserError(f"The utilisation is {utilisation}; it must lie above 0 and at most at 1.")
    n_micro = micro_steps(work, layout)
    flops = train_flops_per_token(work.model, work.row_len) * work.batch_size * work.row_len
    return Plan(
        work,
        machine,
        layout,
        utilisation,
        memory=memory_of(work.model, layout, work.row_len, work.chunk),
        compute_s=flops / (layout.gpus * MACHINES[machine].flops * utilisation),
        network_s=network_seconds(work.model, layout, n_micro, MACHINES[machine].network),
    )


def micro_steps(work: Work, layout: Layout) -> int:
    """Micro-batches of a step on each GPU. UserError where the batch or the heads do not divide."""
    if layout.tp > NODE or work.model.n_kv_heads % layout.tp:
        legal = [n for n in range(1, NODE + 1) if work.model.n_kv_heads % n == 0]
        raise UserError(
            f"tp is {layout.tp}; within a node of {NODE} it must divide the "
            f"{work.model.n_kv_heads} key heads of {work.name}: {', '.join(map(str, legal))}."
        )
    at_once = layout.gpus // layout.tp * layout.micro_batch
    if work.batch_size % at_once:
        raise UserError(
            f"A batch of {work.batch_size} rows is no multiple of the {at_once} that "
            f"{layout.gpus} GPUs take at a time; use fewer GPUs, or more of them for each row (tp)."
        )
    return work.batch_size // at_once


def network_seconds(config: ModelConfig, layout: Layout, n_micro: int, bandwidth: float) -> float:
    """The least seconds of a step that the network between nodes of eight needs.

    Each micro-batch brings every node the shards that others hold, in bfloat16, for forward and
    again for backward, and takes its gradients to them in float32: 8 bytes a parameter. Replicas
    average their gradients once a step: 2 x 4 bytes of what a node holds. Nothing of it is counted
    inside a node, where tensor parallelism is.
    """
    shards = layout.fsdp * layout.tp
    elsewhere = max(0.0, 1 - NODE / shards)
    sharded = n_micro * (2 * BFLOAT16 + FLOAT32) * elsewhere
    replicas = layout.gpus // max(shards, NODE)
    replicated = 2 * FLOAT32 * (1 - 1 / replicas if replicas else 0) * min(1, NODE / shards)
    return n_params(config) * (sharded + replicated) / bandwidth


def layouts(gpus: int) -> Iterator[Layout]:
    """Ways to lay a training on that many GPUs, one row at a time, the simplest first."""
    for tp in (1, 2, 4, 8):
        if gpus % tp == 0:
            yield Layout(gpus, gpus // tp, tp)
            yield Layout(gpus, gpus // tp, tp, checkpointing="layers")


def best_fit(work: Work, machine: str, gpus: int, utilisation: float = 0.45) -> Plan | None:
    """Of the layouts that fit, the one of the shortest step; of those, the simplest."""
    plans = []
    for layout in layouts(gpus):
        with suppress(UserError):  # the batch or the heads do not divide so
            plans.append(plan(work, machine, layout, utilisation))
    return min((p for p in plans if p.fits), key=lambda p: p.step_s, default=None)


def remedies(unfit: Plan) -> list[Plan]:
    """Plans that do fit: on these GPUs, else on two to 1,024 times as many; and on larger ones."""
    work, gpus, memory = unfit.work, unfit.layout.gpus, MACHINES[unfit.machine].memory
    larger = [name for name, machine in MACHINES.items() if machine.memory > memory]
    here = (best_fit(work, unfit.machine, gpus << k, unfit.utilisation) for k in range(11))
    elsewhere = (best_fit(work, name, gpus, unfit.utilisation) for name in larger)
    return [p for plans in (here, elsewhere) if (p := next(filter(None, plans), None))]


def implied_utilisation(run: PaperRun) -> tuple[float, dict[str, float]]:
    """Tokens a second of one GPU that the hours imply, and by convention the utilisation."""
    tokens_per_s = run.work.tokens / (run.gpu_hours * 3600)
    counts = counting_conventions(run.work.model, run.work.row_len)
    peak = MACHINES[run.machine].flops
    return tokens_per_s, {name: tokens_per_s * n / peak for name, n in counts.items()}
