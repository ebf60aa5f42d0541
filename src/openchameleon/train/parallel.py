"""Many processes train one model: who they are, and how its weights are spread over them.

`torchrun` starts the processes; PyTorch's FSDP2 and tensor parallelism do the work. All of it is
applied to a model from outside, in one order, by `spread`; alone, the same calls change nothing.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from openchameleon.errors import Diverged, UserError
from openchameleon.files import locked
from openchameleon.model.config import ModelConfig
from openchameleon.model.transformer import HeadNorm, Transformer, initial_weight

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ParallelConfig:
    """How a run uses its processes; none of it changes what is learned, but for the last digits.

    tensor: processes that compute each layer together, each a part of the heads and of the
    feed-forward's width. replicate: copies of the weights. All others share a copy (FSDP2). Copies
    and sharers have each a part of the rows of a batch.
    checkpoint_layers: keep the input of each layer only, and compute the rest again for the
    gradient.
    """

    tensor: int = 1
    replicate: int = 1
    checkpoint_layers: bool = False

    def __post_init__(self) -> None:
        if self.tensor < 1 or self.replicate < 1:
            raise ValueError(
                f"tensor = {self.tensor} and replicate = {self.replicate} must be at least 1."
            )


@dataclass(frozen=True)
class World:
    """The processes of a run, as one of them sees them. `alone` is a run of one process.

    data_rank of data_size: which part of a batch is this process's. tensor_rank of tensor_size:
    which part of each layer.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None

    @property
    def is_main(self) -> bool:
        """Whether this process speaks, logs and renames for all."""
        return self.rank == 0

    def rank_in(self, *dims: str) -> int:
        """This process's number along these dimensions of the mesh, the last running fastest."""
        number = 0
        for dim in dims:
            own = self.mesh[dim].get_local_rank() if self.mesh else 0
            number = number * self.size_of(dim) + own
        return number

    def size_of(self, *dims: str) -> int:
        """How many processes there are along these dimensions."""
        return math.prod(self.mesh[dim].size() for dim in dims) if self.mesh else 1

    @property
    def data_rank(self) -> int:
        return self.rank_in("replicate", "shard")

    @property
    def data_size(self) -> int:
        return self.size_of("replicate", "shard")

    @property
    def tensor_rank(self) -> int:
        return self.rank_in("tensor")

    @property
    def tensor_size(self) -> int:
        return self.size_of("tensor")

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the parts of a batch: the same on all processes."""
        return self._over_data(value, "SUM") / self.data_size

    def largest(self, value: Tensor) -> Tensor:
        """The largest over the parts of a batch."""
        return self._over_data(value, "MAX")

    def _over_data(self, value: Tensor, op: str) -> Tensor:
        for dim in ("replicate", "shard"):
            if self.mesh and self.size_of(dim) > 1:
                value, group = value.clone(), self.mesh[dim].get_group()
                torch.distributed.all_reduce(value, getattr(torch.distributed.ReduceOp, op), group)
        return value

    def any(self, flag: bool) -> bool:
        """Whether it is so on any process."""
        if self.mesh is None:
            return flag
        votes = torch.tensor(int(flag), device=self.device)
        torch.distributed.all_reduce(votes)
        return bool(votes)

    @contextmanager
    def locked(self, folder: Path) -> Iterator[None]:
        """`files.locked` by the main process, for all."""
        with ExitStack() as stack:
            self.agree(lambda: stack.enter_context(locked(folder)))
            yield

    def agree(self, make: Callable[[], T]) -> T:
        """What `make` returns on the main process, on all. An error there is an error on all."""
        if self.mesh is None:
            return make()
        answer: list[Any] = [None, None]
        if self.is_main:
            try:
                answer[0] = make()
            except Exception as error:
                answer[1] = error
        torch.distributed.broadcast_object_list(answer, src=0)
        if answer[1] is not None:
            raise answer[1]
        return answer[0]


def alone(device: torch.device | str = "cpu") -> World:
    """A world of one process."""
    return World(torch.device(device))


@contextmanager
def world_of_torchrun(config: ParallelConfig) -> Iterator[World]:
    """The world that `torchrun` started, or a process alone. UserError where it cannot be divided.

    Each process takes the GPU of its local rank, where there are GPUs.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    has_gpu = torch.cuda.is_available()
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if has_gpu else "cpu")
    copies = config.replicate * config.tensor
    if size % copies:
        raise UserError(
            f"parallel.replicate * parallel.tensor = {copies} does not divide the {size} processes;"
            " torchrun's --nproc-per-node times its --nnodes is their number."
        )
    if size == 1:
        yield alone(device)
        return
    from torch.distributed.device_mesh import init_device_mesh

    if has_gpu:
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if has_gpu else "gloo")
    try:
        mesh = init_device_mesh(
            device.type,
            (config.replicate, size // copies, config.tensor),
            mesh_dim_names=("replicate", "shard", "tensor"),
        )
        yield World(device, torch.distributed.get_rank(), size, mesh)
    finally:
        torch.distributed.destroy_process_group()


def spread(
    model: Transformer,
    world: World,
    config: ParallelConfig,
    dtype: Literal["float32", "bfloat16"] = "float32",
    compile: bool = False,
) -> Transformer:
    """The model with its weights over the processes of `world`: the same object, changed.

    In this order: tensor parallel, checkpointing of layers, compilation, FSDP2. Parameters keep
    their names. dtype: of products and of the weights in transit, where there are several
    processes; gradients are reduced in float32. UserError where heads or widths cannot be divided.
    """
    if world.tensor_size > 1:
        _divide_layers(model, world)
    if config.checkpoint_layers:
        for layer in model.layers:
            layer.forward = partial(_checkpointed, layer.forward)
    if world.size > 1:
        if compile:
            for layer in model.layers:
                layer.compile()
        _shard(model, world, dtype)
    return model


def _divide_layers(model: Transformer, world: World) -> None:
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    assert world.mesh is not None
    require_divisible(model.config, world.tensor_size)
    rows, columns = RowwiseParallel(), ColwiseParallel()
    plan = {
        "attention.wq": columns, "attention.wk": columns, "attention.wv": columns,
        "attention.wo": rows,
        "feed_forward.w1": columns, "feed_forward.w3": columns, "feed_forward.w2": rows,
    }  # fmt: skip
    for layer in model.layers:
        parallelize_module(layer, world.mesh["tensor"], plan)
    divide_norms(model, world)


def require_divisible(config: ModelConfig, n_parts: int) -> None:
    """UserError unless each layer can be computed in that many parts."""
    for name in ("n_heads", "n_kv_heads", "ffn_dim"):
        if (value := getattr(config, name)) % n_parts:
            raise UserError(f"{n_parts} processes cannot divide a layer: {name} = {value}.")
    groups = config.qk_norm_groups
    if config.qk_norm and groups % n_parts and n_parts % groups:
        raise UserError(
            f"{n_parts} processes cannot divide a layer with qk_norm_groups = {groups}: one must"
            " divide the other."
        )


def divide_norms(model: Transformer, world: World) -> None:
    """Each process takes the QK-norms of its own heads."""
    for norm in _head_norms(model):
        norm.part, norm.n_parts = world.tensor_rank, world.tensor_size


def _head_norms(model: nn.Module) -> list[HeadNorm]:
    return [module for module in model.modules() if isinstance(module, HeadNorm)]


def _checkpointed(forward: Callable[..., Tensor], *args: Any) -> Tensor:
    from torch.utils.checkpoint import checkpoint

    result: Tensor = checkpoint(forward, *args, use_reentrant=False)
    return result


def _shard(model: Transformer, world: World, dtype: str) -> None:
    from torch.distributed.fsdp import (
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    assert world.mesh is not None
    half = torch.bfloat16 if dtype == "bfloat16" else None
    # Inputs are not cast: rotary tables must stay in float32.
    policy = MixedPrecisionPolicy(half, torch.float32, cast_forward_inputs=False)
    copies = world.size_of("replicate") > 1
    mesh = world.mesh["replicate", "shard"] if copies else world.mesh["shard"]
    for part in (*model.layers, model):
        fully_shard(part, mesh=mesh, mp_policy=policy)
    # The loss asks for `hidden`, and then for the output head, which the root keeps unsharded.
    register_fsdp_forward_method(model, "hidden")


def add_up_norms(model: Transformer, world: World) -> None:
    """Sums the gradients of the QK-norms, of which each process has seen its own heads only."""
    if world.tensor_size == 1:
        return
    assert world.mesh is not None
    group = world.mesh["tensor"].get_group()
    for norm in _head_norms(model):
        for parameter in norm.parameters():
            if parameter.grad is not None:
                torch.distributed.all_reduce(local(parameter.grad), group=group)


def compare_copies(model: Transformer, world: World) -> None:
    """Raises Diverged where processes that must hold the same numbers do not: a machine's fault.

    Compared are the copies of `replicate`, and what the processes of `tensor` do not divide.
    """
    if world.mesh is None:
        return
    parameters = dict(model.named_parameters())
    sums = [local(p.detach()).view(torch.int32).sum(dtype=torch.int64) for p in parameters.values()]
    mine = torch.stack(sums)
    of_all = [torch.empty_like(mine) for _ in range(world.size)]
    torch.distributed.all_gather(of_all, mine)
    ranks = world.mesh.mesh.cpu()  # (replicate, shard, tensor)
    table = torch.stack(of_all).cpu()[ranks]
    undivided = torch.tensor(["tensor" not in _mesh_dims(p) for p in parameters.values()])
    for dim, differs in (
        (0, table != table[:1]),
        (2, (table != table[:, :, :1]) & undivided),
    ):
        for *place, index in differs.nonzero().tolist():
            first = [0 if i == dim else n for i, n in enumerate(place)]
            raise Diverged(
                f"Processes {int(ranks[*first])} and {int(ranks[*place])} hold different numbers in"
                f" {list(parameters)[index]}, which should be copies: a machine has computed or"
                " stored something wrongly. Go on from the last checkpoint without it."
            )


def _mesh_dims(tensor: Any) -> tuple[str, ...]:
    mesh = getattr(tensor, "device_mesh", None)
    return (mesh.mesh_dim_names or ()) if mesh is not None else ()


def clip_gradients(parameters: Sequence[Tensor], max_norm: float) -> Tensor:
    """The norm of all gradients together, before it is cut to `max_norm`: the same everywhere."""
    gradients: dict[Any, list[Tensor]] = {}
    trained = [p for p in parameters if p.grad is not None]
    for parameter in trained:
        assert parameter.grad is not None
        gradients.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter.grad)
    # One norm for each mesh: those of layers that are divided lie on another than the rest.
    norms = [whole(torch.nn.utils.get_total_norm(part)) for part in gradients.values()]
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    for part in gradients.values():
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_([local(gradient) for gradient in part], scale)
    return norm


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that is spread, or the tensor."""
    to_local: Callable[[], Tensor] | None = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that is spread: a call for all processes together."""
    full: Callable[[], Tensor] | None = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()


def place_of(tensor: Any) -> tuple[slice, ...]:
    """Where this process's part of a tensor lies in all of it."""
    if not hasattr(tensor, "placements"):
        return tuple(slice(0, n) for n in tensor.shape)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sizes, starts = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return tuple(slice(a, a + n) for a, n in zip(starts, sizes, strict=True))


@torch.no_grad()
def fill_weights(model: Transformer, value_of: Callable[[str, torch.Size], Tensor]) -> None:
    """Fills the parameters of a model, spread or not, from a whole value for each name."""
    for name, parameter in model.named_parameters():
        local(parameter).copy_(value_of(name, parameter.shape)[place_of(parameter)])


def init_weights(model: Transformer, seed: int) -> None:
    """`Transformer.init_weights` for a model that is spread: the same numbers."""
    fill_weights(model, lambda name, shape: initial_weight(model.config, name, shape, seed))
