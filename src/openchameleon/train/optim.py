"""The optimizer, its parameter groups, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import nn

from openchameleon.errors import UserError


@dataclass(frozen=True, slots=True)
class OptimConfig:
    """How weights move. The paper pretrains with lr 1e-4, eps 1e-5 and 4000 warm-up steps.

    matrices: what moves the weights of linear layers. The paper's is "adamw"; "muon" (momentum made
    orthogonal, its steps scaled to be as long as AdamW's, so that `lr` serves both) lowered the
    loss in fewer steps at the size of `nano`, each half as long again; see docs/LOG.md.
    min_lr_ratio: what decay ends at, as a part of `lr`. Exponential decay needs it above 0: the
    paper decays "to 0" at a rate it does not state.
    grad_clip: the largest global gradient norm; larger ones are scaled down to it.
    """

    lr: float = 1e-3
    matrices: Literal["adamw", "muon"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    warmup_steps: int = 100
    decay: Literal["cosine", "exponential", "linear", "constant"] = "cosine"
    min_lr_ratio: float = 0.1
    grad_clip: float = 1.0

    def __post_init__(self) -> None:
        if self.lr <= 0 or self.grad_clip <= 0:
            raise ValueError(f"lr = {self.lr} and grad_clip = {self.grad_clip} must be above 0.")
        if self.matrices not in ("adamw", "muon"):
            raise ValueError(f"matrices = {self.matrices!r} must be adamw or muon.")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps = {self.warmup_steps} must not be negative.")
        if not 0.0 <= self.min_lr_ratio <= 1.0:
            raise ValueError(f"min_lr_ratio = {self.min_lr_ratio} must lie in [0, 1].")
        if self.decay == "exponential" and self.min_lr_ratio == 0.0:
            raise ValueError("Exponential decay never reaches 0: set min_lr_ratio above 0.")


def lr_at(step: int, total_steps: int, config: OptimConfig) -> float:
    """The learning rate of `step`, counted from 0: linear warm-up, then decay.

    Warm-up's last step has the full rate; the run's last step is one short of the decay's end.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    progress = min(1.0, progress)
    low = config.min_lr_ratio
    if config.decay == "cosine":
        ratio = low + (1 - low) * (1 + math.cos(math.pi * progress)) / 2
    elif config.decay == "linear":
        ratio = low + (1 - low) * (1 - progress)
    elif config.decay == "exponential":
        ratio = low**progress
    else:
        ratio = 1.0
    return config.lr * ratio


class Optimizer(Protocol):
    """What training asks of an optimizer: PyTorch's own, or two of them as one."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...
    def zero_grad(self) -> None: ...
    def step(self) -> object: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


class Pair:
    """Two optimizers over different parameters as one; the second's are numbered on."""

    def __init__(self, first: torch.optim.Optimizer, second: torch.optim.Optimizer) -> None:
        self.both = (first, second)
        self.n_first = sum(len(group["params"]) for group in first.param_groups)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of both, as they are: a change of one is a change of theirs."""
        return [group for optimizer in self.both for group in optimizer.param_groups]

    def zero_grad(self) -> None:
        for optimizer in self.both:
            optimizer.zero_grad()

    def step(self) -> None:
        for optimizer in self.both:
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        first, second = (optimizer.state_dict() for optimizer in self.both)
        groups = [_renumbered(group, self.n_first) for group in second["param_groups"]]
        state = {index + self.n_first: value for index, value in second["state"].items()}
        return {
            "state": {**first["state"], **state},
            "param_groups": [*first["param_groups"], *groups],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        n_groups = len(self.both[0].param_groups)
        state, groups = state_dict["state"], state_dict["param_groups"]
        mine = {i: value for i, value in state.items() if i < self.n_first}
        other = {i - self.n_first: value for i, value in state.items() if i >= self.n_first}
        renumbered = [_renumbered(group, -self.n_first) for group in groups[n_groups:]]
        self.both[0].load_state_dict({"state": mine, "param_groups": groups[:n_groups]})
        self.both[1].load_state_dict({"state": other, "param_groups": renumbered})


def _renumbered(group: dict[str, Any], by: int) -> dict[str, Any]:
    return {**group, "params": [index + by for index in group["params"]]}


def make_optimizer(model: nn.Module, config: OptimConfig) -> Optimizer:
    """An optimizer over the parameters that require gradients.

    Weight decay applies to the matrices of linear layers. It spares norms and biases, where it
    would fight their purpose, and embedding tables, tied or not, where it would shrink the rows
    of ids that the data seldom shows. With "muon" it spares the output head too, which AdamW moves.
    """
    linear = {name: m.weight for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    if config.matrices == "muon":
        # An output head is a table of rows, one an id, and no map from one space to another.
        linear.pop("output", None)
    matrices = {id(weight) for weight in linear.values()}
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if id(p) in matrices]
    spared = {"params": [p for p in trained if id(p) not in matrices], "weight_decay": 0.0}
    if config.matrices == "adamw":
        decaying = {"params": decayed, "weight_decay": config.weight_decay}
        return _adamw([*_by_mesh(decaying), *_by_mesh(spared)], config)
    if any(hasattr(weight, "device_mesh") for weight in decayed):
        raise UserError(
            'optim.matrices = "muon" needs whole matrices, and these are spread over processes; use'
            ' "adamw" under torchrun.'
        )
    muon = torch.optim.Muon(
        decayed, lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    return Pair(muon, _adamw([spared], config))


def _by_mesh(group: dict[str, Any]) -> list[dict[str, Any]]:
    """The group, cut so that weights spread over different meshes of processes are not together.

    The fused step takes one mesh at a time.
    """
    parts: dict[Any, list[nn.Parameter]] = {}
    for parameter in group["params"]:
        parts.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    return [{**group, "params": part} for part in parts.values()]


def _adamw(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.AdamW:
    # The fused step is four to six times the others' speed on a CPU as well.
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
