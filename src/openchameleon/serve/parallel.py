"""One model over the processes of a host: the first decides, the others follow it step by step.

Each process holds its heads and its part of the feed-forward's width, and
the whole of everything else; two sums a layer make the hidden states the same on all. Every process
runs the same engine on the same requests: what the first one was asked since the step before goes
to the others when the next step begins.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from openchameleon.checkpoints.convert import open_checkpoint
from openchameleon.errors import UserError
from openchameleon.inference.engine import (
    BLOCK_SIZE,
    MAX_BATCH,
    Engine,
    default_cache_tokens,
)
from openchameleon.inference.params import new_seed
from openchameleon.inference.sequence import Request, Sequence
from openchameleon.model.transformer import Transformer
from openchameleon.model_folder import FolderConfig, find_model, named_dtype
from openchameleon.pipeline import Chameleon, load_tokenizer
from openchameleon.serve.companions import companions
from openchameleon.train.parallel import (
    ParallelConfig,
    World,
    divide_norms,
    require_divisible,
    world_of_torchrun,
)

COLUMNS, ROWS = ("wq", "wk", "wv", "w1", "w3"), ("wo", "w2")
"""The matrices that are divided: by what they write, and by what they read."""
FOR_EVER = timedelta(days=3650)


def with_model(
    name_or_folder: str,
    work: Callable[[Chameleon], int],
    tensor: int = 1,
    dtype: str | None = None,
    allow_pickle: bool = False,
) -> int:
    """`work` with the model of that name, computed by so many processes; returns what it returns.

    This process works, and starts `tensor - 1` others that follow it until it is done. Where
    `torchrun` has started them already, the first works, and for the others 0 is returned.
    UserError where the layers cannot be divided by the number of processes; other arguments and
    errors as of `Chameleon.from_pretrained`.
    """
    arguments: dict[str, Any] = {
        "name_or_folder": name_or_folder,
        "dtype": dtype,
        "allow_pickle": allow_pickle,
    }
    if tensor < 1:
        raise UserError(f"--tensor {tensor}: a model takes at least one process.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return _in_world(work, **arguments)
    if tensor == 1:
        return work(Chameleon.from_pretrained(name_or_folder, None, dtype, allow_pickle))
    if (n := torch.cuda.device_count()) and n < tensor:
        raise UserError(f"--tensor {tensor}: there are {n} GPUs, and each process takes one.")
    checkpoint = open_checkpoint(find_model(name_or_folder), allow_pickle)
    require_divisible(checkpoint.config.model, tensor)  # here, so that it is said once
    with companions(tensor, arguments):
        return _in_world(work, **arguments)


def _in_world(
    work: Callable[[Chameleon], int], name_or_folder: str, dtype: str | None, allow_pickle: bool
) -> int:
    """`with_model` as one of several processes."""
    n_processes = int(os.environ["WORLD_SIZE"])
    with world_of_torchrun(ParallelConfig(tensor=n_processes)) as world:
        if world.device.type == "cpu":
            torch.set_num_threads(max(1, torch.get_num_threads() // n_processes))
        config, model = load_part(name_or_folder, world, dtype, allow_pickle)
        orders = Orders(world)
        n_tokens = orders.least(default_cache_tokens(model, MAX_BATCH, BLOCK_SIZE))
        if not world.is_main:
            follow(Engine(model, config.vocab, cache_tokens=n_tokens), orders)
            return 0
        engine = LeadingEngine(orders, model, config.vocab, cache_tokens=n_tokens)
        try:
            tokenizer = load_tokenizer(name_or_folder, world.device, allow_pickle)
            return work(Chameleon(config, model, tokenizer, engine))
        finally:
            engine.close()


# The weights


def load_part(
    name_or_folder: str, world: World, dtype: str | None, allow_pickle: bool
) -> tuple[FolderConfig, Transformer]:
    """This process's part of a model, read tensor by tensor: it never holds the whole.

    Arguments and errors as of `Chameleon.from_pretrained`.
    """
    checkpoint = open_checkpoint(find_model(name_or_folder), allow_pickle)
    kind = None if dtype is None else named_dtype(dtype)
    if dtype is None and world.device.type == "cpu":
        kind = torch.float32
    with torch.device("meta"):
        model = Transformer(checkpoint.config.model)
    divide(model, world)
    state = {
        name: part_of(name, entry.read(), world).to(world.device, kind, copy=True)
        for name, entry in checkpoint.weights.items()
    }
    model.load_state_dict(state, assign=True)
    return checkpoint.config, model.eval().requires_grad_(False)


def divide(model: Transformer, world: World) -> None:
    """Leaves the model its part of this process; `model.config` is of that part then.

    UserError where heads or widths cannot be divided.
    """
    n, config = world.tensor_size, model.config
    require_divisible(config, n)
    group = world.mesh["tensor"].get_group() if world.mesh else None

    def add_up(_: nn.Module, __: Any, out: Tensor) -> Tensor:
        torch.distributed.all_reduce(out, group=group)
        return out

    for name, parameter in list(model.named_parameters()):
        whole = parameter.detach()
        part = part_of(name, whole, world)
        if part is not whole:
            owner = model.get_submodule(name.rpartition(".")[0])
            owner.register_parameter("weight", nn.Parameter(part.contiguous(), False))
            if name.split(".")[-2] in ROWS:
                owner.register_forward_hook(add_up)
    divide_norms(model, world)
    model.config = replace(
        config,
        n_kv_heads=config.n_kv_heads // n,
        qk_norm_groups=max(1, config.qk_norm_groups // n),
    )


def part_of(name: str, weight: Tensor, world: World) -> Tensor:
    """What a process of `world` holds of the weight of that name; a view."""
    owner = name.split(".")[-2]
    if owner not in COLUMNS + ROWS:
        return weight
    return weight.chunk(world.tensor_size, 0 if owner in COLUMNS else 1)[world.tensor_rank]


# The steps


@dataclass(frozen=True, slots=True)
class Order:
    """What happened since the step before, in order: requests, and numbers of those taken out.

    drawn: what the step before has drawn, in short.
    """

    acts: tuple[Request | int, ...]
    drawn: int


class Orders:
    """How the first process reaches the others: on the CPU, whatever the model runs on."""

    def __init__(self, world: World) -> None:
        # A group of its own: its members may wait for days until somebody asks something.
        self._group = torch.distributed.new_group(backend="gloo", timeout=FOR_EVER)

    def exchange(self, order: Order | None) -> Order | None:
        """The first process's order, on all; None is the end. RuntimeError where one has gone."""
        box = [order]
        try:
            torch.distributed.broadcast_object_list(box, src=0, group=self._group)
        except RuntimeError as error:
            raise RuntimeError("Another process of the model has gone; start anew.") from error
        return box[0]

    def least(self, number: int) -> int:
        """The least of all processes' numbers."""
        box = torch.tensor(number)
        torch.distributed.all_reduce(box, torch.distributed.ReduceOp.MIN, self._group)
        return int(box)


class LeadingEngine(Engine):
    """The first process's engine, for one thread.

    A step that fails cannot be taken again: the others wait in it. After that everything but
    `abort` raises RuntimeError, and the program has to be started anew.
    """

    def __init__(self, orders: Orders, *arguments: Any, **sizes: Any) -> None:
        super().__init__(*arguments, **sizes)
        self._orders = orders
        self._acts: list[Request | int] = []
        self._numbers: dict[Sequence, int] = {}
        self._n_added = 0
        self._drawn = 0
        self._in_step = False

    def add(self, request: Request) -> Sequence:
        self._require_order()
        if request.params.seed is None:  # all must draw alike
            request = replace(request, params=replace(request.params, seed=new_seed()))
        sequence = super().add(request)
        self._acts.append(Request(list(request.token_ids), request.params))
        self._numbers[sequence] = self._n_added
        self._n_added += 1
        return sequence

    def abort(self, sequence: Sequence) -> None:
        if sequence.finish_reason is None:
            self._acts.append(self._numbers.pop(sequence))
        super().abort(sequence)

    def step(self) -> list[Sequence]:
        self._require_order()
        self._in_step = True
        self._orders.exchange(Order(tuple(self._acts), self._drawn))
        self._acts = []
        moved = super().step()
        self._in_step = False
        self._drawn = in_short(moved)
        self._numbers = {s: n for s, n in self._numbers.items() if s.finish_reason is None}
        return moved

    def close(self) -> None:
        """Lets the others go, if they are there."""
        if not self._in_step:
            with suppress(RuntimeError):
                self._orders.exchange(None)

    def _require_order(self) -> None:
        if self._in_step:
            raise RuntimeError("A step has failed and the processes are out of step; start anew.")


def follow(engine: Engine, orders: Orders) -> None:
    """Takes every step that the first process takes, until it ends.

    UserError where this process draws anything else than the first one.
    """
    under_way: dict[int, Sequence] = {}
    n_added, drawn = 0, 0
    while (order := orders.exchange(None)) is not None:
        if order.drawn != drawn:
            raise UserError(
                f"Process {torch.distributed.get_rank()} draws other tokens than process 0: their"
                " machines or libraries differ, or one computes wrongly."
            )
        for act in order.acts:
            if isinstance(act, Request):
                under_way[n_added] = engine.add(act)
                n_added += 1
            else:
                engine.abort(under_way.pop(act))
        drawn = in_short(engine.step())
        under_way = {n: s for n, s in under_way.items() if s.finish_reason is None}


def in_short(moved: list[Sequence]) -> int:
    """A number for what a step has drawn."""
    return hash(tuple((len(s.full.token_ids), s.full.token_ids[-1]) for s in moved))
