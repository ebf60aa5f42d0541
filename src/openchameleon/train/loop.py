"""The training loop: batches in, checkpoints out, the same bits however often it is interrupted.

Step s depends on the weights and optimizer after step s - 1, on batch s, which is a function of
s, and on random numbers seeded by (seed, s). So a checkpoint needs nothing but the first two.
Samples and evaluations come in as hooks; nothing here knows text or pictures.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from openchameleon.config import to_dict
from openchameleon.data.loader import Loader
from openchameleon.errors import Stopped, UserError
from openchameleon.model.transformer import Transformer
from openchameleon.progress import Progress
from openchameleon.train.checkpoint import (
    NoSpaceError,
    flatten_optimizer,
    latest_checkpoint,
    load_checkpoint,
    restore_optimizer,
    save_checkpoint,
)
from openchameleon.train.metrics import SCORE, MetricsLog
from openchameleon.train.optim import OptimConfig, lr_at, make_optimizer
from openchameleon.train.run_folder import (
    claim,
    environment,
    locked,
    stop_signals,
    stopped_text,
    warn_if_elsewhere,
)
from openchameleon.train.step import LossConfig, StepMetrics, train_step

Hook = Callable[[Transformer, int], dict[str, float]]
"""Looks at the model after a step; what it returns is logged as `score/{hook}/{key}`."""

MAX_FAILURES = 3
"""As many steps not finite, or saves without space, in a row end a run."""


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """What a run is. Batches have `batch_size` rows, worked through `micro_batch_size` at a time.

    eval_every: steps between calls of the hooks, which are also called after the last step; 0
    never calls them. keep: checkpoints left on disk. threads: of torch; None leaves them alone.
    dtype: what matrix products run in; weights and optimizer are float32.
    """

    steps: int
    batch_size: int
    micro_batch_size: int | None = None
    seed: int = 0
    loss: LossConfig = field(default_factory=LossConfig)
    dtype: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    threads: int | None = None
    log_every: int = 10
    save_every: int = 500
    eval_every: int = 0
    keep: int = 2

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1.")
        if self.micro_batch_size is not None and self.micro_batch_size < 1:
            raise ValueError(f"micro_batch_size = {self.micro_batch_size} must be at least 1.")


# What may change between a run and its resumption: none of it changes the weights,
# except `threads`, in the last bits, which the resumption says.
_FREE = {"threads", "log_every", "save_every", "eval_every", "keep"}


def fit(
    model: Transformer,
    loader: Loader,
    config: TrainConfig,
    optim: OptimConfig,
    run_folder: Path,
    *,
    is_code: Tensor,
    hooks: Mapping[str, Hook] | None = None,
    begun_from: str | None = None,
    stop_at: int | None = None,
    deadline: float | None = None,
) -> Path:
    """Trains `model` in place up to `config.steps`; returns its last checkpoint.

    Goes on from the run folder's newest whole checkpoint, if it has any. `stop_at` (a step) and
    `deadline` (of `time.monotonic`) end it earlier. On SIGINT or SIGTERM it finishes the step,
    saves, and raises Stopped; a second signal ends it at once. UserError where the folder belongs
    to another config or is in use. is_code: (V,) bool, which targets count as codes. begun_from:
    what the model's weights came from, where that is no function of the config; it is part of
    whose run it is.
    """
    if loader.batch_size != config.batch_size:
        raise ValueError(f"loader has {loader.batch_size} rows, config {config.batch_size}")
    if config.threads:
        torch.set_num_threads(config.threads)
    last = config.steps if stop_at is None else min(config.steps, stop_at)
    with locked(run_folder), stop_signals() as received, _as_configured(model, config):
        origin = {"begun_from": begun_from} if begun_from else {}
        claim(run_folder, _identity(model, loader, config, optim) | origin)
        run = _Run(model, loader, config, optim, run_folder, is_code, hooks or {})
        try:
            while run.step < last and not received:
                if deadline is not None and time.monotonic() >= deadline:
                    break
                run.take_step()
        finally:
            run.close()
        path = run.save()
        if received:
            raise Stopped(stopped_text(received[0], run.step))
        return path


class _Run:
    """A run at a step: what `fit` carries from one step to the next."""

    def __init__(
        self,
        model: Transformer,
        loader: Loader,
        config: TrainConfig,
        optim: OptimConfig,
        folder: Path,
        is_code: Tensor,
        hooks: Mapping[str, Hook],
    ) -> None:
        self.model, self.loader, self.config, self.optim = model, loader, config, optim
        self.device = next(model.parameters()).device
        self.is_code, self.hooks = is_code.to(self.device), hooks
        self.optimizer = make_optimizer(model, optim)
        self.folder = folder / "checkpoints"
        self.step = self.n_not_finite = self.n_unsaved = 0  # the last two: in a row
        self.saved: tuple[int, Path] | None = None
        self.resume()
        self.log = MetricsLog(folder / "metrics.jsonl", self.step)
        self.progress = Progress("train", config.steps, "steps", self.step)
        self.busy, self.n_tokens = 0.0, 0  # since the last log line

    def resume(self) -> None:
        """Takes up the newest whole checkpoint, if there is one."""
        path = latest_checkpoint(self.folder)
        if path is None:
            return
        tensors, meta = load_checkpoint(path, verify=False)
        prefix = "model/"
        self.model.load_state_dict(
            {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
        )
        restore_optimizer(self.optimizer, tensors, "optimizer/")
        self.step, self.n_not_finite = meta["step"], meta["n_not_finite"]
        self.saved = self.step, path
        warn_if_elsewhere(meta["environment"], environment(self.device))

    def take_step(self) -> None:
        """One step, and what is due after it: its log line, the hooks, a checkpoint."""
        start = time.perf_counter()
        lr = lr_at(self.step, self.config.steps, self.optim)
        try:
            metrics = self.update(lr)
        except FloatingPointError as error:
            self.pass_over(error)
            return
        self.step, self.n_not_finite = self.step + 1, 0
        self.busy += time.perf_counter() - start
        self.n_tokens += metrics.n_tokens
        self.report(metrics, lr)
        try:
            if self.config.eval_every and self.is_due(self.config.eval_every):
                self.evaluate()  # before the save: after a kill in between, scores are not missing
        finally:  # a hook that fails costs its scores, but no step
            if self.is_due(self.config.save_every):
                self.save_if_space()

    def update(self, lr: float) -> StepMetrics:
        """Trains on the batch of this step."""
        self.model.train()
        # dropout's randomness, a function of the step: nothing to save, nothing to lose
        digest = hashlib.sha256(f"{self.config.seed}/{self.step}".encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        batch = self.loader.batch(self.step).to(self.device)
        batches = batch.split(self.config.micro_batch_size or self.config.batch_size)
        return train_step(
            self.model,
            self.optimizer,
            batches,
            self.config.loss,
            lr=lr,
            grad_clip=self.optim.grad_clip,
            is_code=self.is_code,
        )

    def is_due(self, every: int) -> bool:
        """Whether this step is one of `every`. The last step is always due."""
        return self.step == self.config.steps or self.step % every == 0

    def report(self, metrics: StepMetrics, lr: float) -> None:
        """The log line where it is due, and the progress line."""
        values = {k: v for k, v in dataclasses.asdict(metrics).items() if v is not None}
        speed = self.n_tokens / self.busy
        if self.is_due(self.config.log_every):
            self.log.log(self.step, values | {"lr": lr, "tokens_per_s": round(speed, 1)})
            self.busy, self.n_tokens = 0.0, 0
        losses = [f"{k} {values[k]:.3f}" for k in ("text_loss", "code_loss") if k in values]
        self.progress.update(self.step, " | ".join(["", f"{speed:,.0f} tokens/s", *losses]))

    def evaluate(self) -> None:
        """Calls the hooks, for which the model is as it is saved, and logs what they return."""
        with _as_saved(self.model):
            for name, hook in self.hooks.items():
                self.model.eval()
                if scores := hook(self.model, self.step):
                    self.log.log(self.step, {f"{SCORE}{name}/{k}": v for k, v in scores.items()})

    def pass_over(self, error: FloatingPointError) -> None:
        """Leaves out a step that is not finite; after three in a row saves and ends the run."""
        self.step, self.n_not_finite = self.step + 1, self.n_not_finite + 1
        print(f"step {self.step} is left out: {error}", file=sys.stderr)
        self.log.log(self.step, {"not_finite": self.n_not_finite})
        if self.n_not_finite >= MAX_FAILURES:
            raise UserError(
                f"{MAX_FAILURES} steps in a row were not finite, the last one {self.step}; the "
                f"weights before them are in {self.save()}. Train with a lower optim.lr."
            )

    def save(self) -> Path:
        """Saves this step, unless it is saved already; returns its checkpoint."""
        if self.saved and self.saved[0] == self.step:
            return self.saved[1]
        weights = {f"model/{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors = weights | flatten_optimizer(self.optimizer, "optimizer/")
        meta = {
            "step": self.step,
            "n_not_finite": self.n_not_finite,
            "environment": environment(self.device),
        }
        path = save_checkpoint(self.folder, self.step, tensors, meta, self.config.keep)
        self.saved, self.n_unsaved = (self.step, path), 0
        return path

    def save_if_space(self) -> None:
        """Saves; a full disk is waited out until the third save it prevents."""
        try:
            self.save()
        except NoSpaceError as error:
            self.n_unsaved += 1
            if self.n_unsaved >= MAX_FAILURES:
                raise
            print(f"warning: step {self.step} is not saved: {error}", file=sys.stderr)

    def close(self) -> None:
        self.progress.close()
        self.log.close()


def _identity(
    model: Transformer, loader: Loader, config: TrainConfig, optim: OptimConfig
) -> dict[str, Any]:
    """What must be the same for a run to be resumed, as JSON data."""
    return {
        "train": {k: v for k, v in to_dict(config).items() if k not in _FREE},
        "optim": to_dict(optim),
        "model": to_dict(model.config),
        "data": loader.describe(),
    }


@contextmanager
def _as_configured(model: Transformer, config: TrainConfig) -> Iterator[None]:
    """`model.hidden` in the config's dtype and compiled; parameters and names stay as they are."""
    if config.dtype == "float32" and not config.compile:
        yield
        return
    hidden: Callable[..., Tensor] = model.hidden
    if config.dtype == "bfloat16":
        hidden = _in_bfloat16(hidden, next(model.parameters()).device.type)
    if config.compile:
        hidden = torch.compile(hidden)
    model.hidden = hidden  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.hidden  # the class's method shows again


def _in_bfloat16(hidden: Callable[..., Tensor], device: str) -> Callable[..., Tensor]:
    """Its result too, since the output head's products run in the dtype of what they are given."""

    def in_bfloat16(*args: Any, **kwargs: Any) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            return hidden(*args, **kwargs).to(torch.bfloat16)

    return in_bfloat16


@contextmanager
def _as_saved(model: Transformer) -> Iterator[None]:
    """Undoes `_as_configured` for a while."""
    configured = model.__dict__.pop("hidden", None)
    try:
        yield
    finally:
        if configured is not None:
            model.hidden = configured  # type: ignore[method-assign]
