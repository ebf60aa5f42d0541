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
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from openchameleon.config import to_dict
from openchameleon.data.loader import Loader
from openchameleon.errors import Diverged, Stopped
from openchameleon.model.transformer import Transformer
from openchameleon.progress import Progress
from openchameleon.train.checkpoint import (
    NoSpaceError,
    flatten_optimizer,
    latest_checkpoint,
    load_meta,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
)
from openchameleon.train.guard import Guard, GuardConfig, StepLeftOut
from openchameleon.train.metrics import SCORE, MetricsLog, read_metrics
from openchameleon.train.monitor import ALARM, Alarm, watched
from openchameleon.train.optim import OptimConfig, lr_at, make_optimizer
from openchameleon.train.parallel import World, alone, compare_copies
from openchameleon.train.rewind import CHECKPOINTS, skipped_steps
from openchameleon.train.run_folder import (
    claim,
    environment,
    stop_signals,
    stopped_text,
    warn_if_elsewhere,
)
from openchameleon.train.sharded import Saver, fill, shapes
from openchameleon.train.step import LossConfig, StepMetrics, train_step

Hook = Callable[[Transformer, int], dict[str, float]]
"""Looks at the model after a step; what it returns is logged as `score/{hook}/{key}`."""

MAX_UNSAVED = 3
"""As many saves without space in a row end a run."""


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """What a run is. Batches have `batch_size` rows, worked through `micro_batch_size` at a time.

    eval_every: steps between calls of the hooks, which are also called after the last step; 0
    never calls them. monitor_every: steps between measurements of the warning signs of divergence
    (`monitor.py`), which are logged; 0 never takes them. keep: checkpoints left on disk. strict: go
    on from the newest checkpoint or not at all. threads: of torch; None leaves them alone. dtype:
    what matrix products run in; weights and optimizer are float32.
    """

    steps: int
    batch_size: int
    micro_batch_size: int | None = None
    seed: int = 0
    loss: LossConfig = field(default_factory=LossConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    dtype: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    threads: int | None = None
    log_every: int = 10
    save_every: int = 500
    eval_every: int = 0
    monitor_every: int = 50
    keep: int = 2
    strict: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1.")
        if self.micro_batch_size is not None and self.micro_batch_size < 1:
            raise ValueError(f"micro_batch_size = {self.micro_batch_size} must be at least 1.")


# What may change between a run and its resumption: none of it changes the weights,
# except `threads`, in the last bits, which the resumption says.
_FREE = {"threads", "log_every", "save_every", "eval_every", "monitor_every", "keep", "strict"}


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
    world: World | None = None,
) -> Path:
    """Trains `model` in place up to `config.steps`; returns its last checkpoint.

    Goes on from the run folder's newest whole checkpoint, if it has any. `stop_at` (a step) and
    `deadline` (of `time.monotonic`) end it earlier. On SIGINT or SIGTERM it finishes the step,
    saves, and raises Stopped; a second signal ends it at once. UserError where the folder belongs
    to another config or is in use. is_code: (V,) bool, which targets count as codes. begun_from:
    what the model's weights came from, where that is no function of the config; it is part of
    whose run it is. world: the processes over which `model` is spread, each of which calls this;
    hooks are not called there.
    """
    world = world or alone(next(model.parameters()).device)
    if loader.batch_size != config.batch_size:
        raise ValueError(f"loader has {loader.batch_size} rows, config {config.batch_size}")
    if config.threads:
        torch.set_num_threads(config.threads)
    last = config.steps if stop_at is None else min(config.steps, stop_at)
    with (
        world.locked(run_folder),
        stop_signals() as received,
        _as_configured(model, config) if world.size == 1 else nullcontext(),
    ):
        origin = {"begun_from": begun_from} if begun_from else {}
        identity = _identity(model, loader, config, optim) | origin
        world.agree(lambda: claim(run_folder, identity))
        run = _Run(model, loader, config, optim, run_folder, is_code, hooks or {}, world)

        def is_told_to_end() -> bool:
            return bool(received) or (deadline is not None and time.monotonic() >= deadline)

        try:
            while run.step < last and not world.any(is_told_to_end()):
                run.take_step()
        finally:
            run.close()
        path = run.save_and_wait()
        if signals := world.agree(lambda: received):
            raise Stopped(stopped_text(signals[0], run.step))
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
        world: World,
    ) -> None:
        self.model, self.loader, self.config, self.optim = model, loader, config, optim
        self.world, self.device = world, world.device
        self.is_code, self.hooks = is_code.to(self.device), hooks if world.size == 1 else {}
        self.saver = Saver(world) if world.size > 1 else None
        self.optimizer = make_optimizer(model, optim)
        self.folder = folder / CHECKPOINTS
        self.step = self.n_unsaved = 0  # the second: in a row
        self.guard, self.skipped = Guard(config.guard), skipped_steps(folder)
        self.saved: tuple[int, Path] | None = None
        self.resume()
        log = folder / "metrics.jsonl"
        self.log = MetricsLog(log, self.step) if world.is_main else None
        self.alarm = Alarm(read_metrics(log) if world.is_main else ())
        self.progress = Progress("train", config.steps, "steps", self.step, not world.is_main)
        self.busy, self.n_tokens = 0.0, 0  # since the last log line
        self.signs: dict[str, float] = {}  # of this step, where it is monitored

    def resume(self) -> None:
        """Takes up the newest whole checkpoint, if there is one."""
        path = self.world.agree(lambda: latest_checkpoint(self.folder, self.config.strict))
        if path is None:
            return
        meta = load_meta(path)
        weights, prefix = self.weights(), "optimizer/"
        stored = {n: s for n, s in shapes(path).items() if n.startswith(prefix)}
        state = optimizer_tensors(self.model, stored, prefix)
        fill(path, weights | state)
        restore_optimizer(self.optimizer, self.model, state, prefix)
        self.step, self.guard = meta["step"], Guard(self.config.guard, meta["guard"])
        self.saved = self.step, path
        if self.world.is_main:
            warn_if_elsewhere(meta["environment"], self.environment())

    def weights(self) -> dict[str, Tensor]:
        """The model's tensors as a checkpoint has them; what is written to them is the model's."""
        return {f"model/{name}": tensor for name, tensor in self.model.state_dict().items()}

    def environment(self) -> dict[str, Any]:
        """What the last bits of this run depend on besides its config."""
        return environment(self.device) | {"processes": self.world.size}

    def take_step(self) -> None:
        """One step, and what is due after it: its log line, the hooks, a checkpoint."""
        start = time.perf_counter()
        if any(first <= self.step < end for first, end in self.skipped):
            self.step += 1
            self.note({"skipped": 1})
            return
        lr = lr_at(self.step, self.config.steps, self.optim)
        try:
            metrics = self.update(lr)
        except StepLeftOut as reason:
            self.pass_over(reason)
            return
        self.step += 1
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
        rank, n_ranks = self.world.data_rank, self.world.data_size
        key = f"{self.config.seed}/{self.step}" + (f"/{rank}" if rank else "")
        digest = hashlib.sha256(key.encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        batch = self.loader.batch(self.step, rank, n_ranks).to(self.device)
        batches = batch.split(self.config.micro_batch_size or self.config.batch_size)
        every = self.config.monitor_every
        watch: AbstractContextManager[dict[str, float]] = nullcontext({})
        if every and self.is_due(every, self.step + 1):
            watch = watched(self.model, batches)
        with watch as self.signs:
            return train_step(
                self.model,
                self.optimizer,
                batches,
                self.config.loss,
                lr=lr,
                grad_clip=self.optim.grad_clip,
                is_code=self.is_code,
                world=self.world,
                guard=self.guard,
            )

    def is_due(self, every: int, step: int | None = None) -> bool:
        """Whether this step, or `step`, is one of `every`. The last step is always due."""
        step = self.step if step is None else step
        return step == self.config.steps or step % every == 0

    def report(self, metrics: StepMetrics, lr: float) -> None:
        """The log line where it is due, and the progress line."""
        values = {k: v for k, v in dataclasses.asdict(metrics).items() if v is not None}
        speed = self.n_tokens / self.busy
        if self.signs or self.is_due(self.config.log_every):
            compare_copies(self.model, self.world)
            self.note(values | {"lr": lr, "tokens_per_s": round(speed, 1)} | self.signs)
            self.warn()
            self.busy, self.n_tokens = 0.0, 0
        losses = [f"{k} {values[k]:.3f}" for k in ("text_loss", "code_loss") if k in values]
        self.progress.update(self.step, " | ".join(["", f"{speed:,.0f} tokens/s", *losses]))

    def warn(self) -> None:
        """Says, and logs, which sign of divergence has now grown for long."""
        for name, times in self.alarm.hear(self.signs).items():
            self.note({f"{ALARM}{name}": times})
            self.say(
                f"warning: step {self.step}: {name} has grown to {self.signs[name]:.4g}, "
                f"{times:.1f} times what it was in the second quarter of the run; what helps is in"
                " docs/stability.md: QK-norm, output norms, z-loss, a lower optim.lr."
            )

    def evaluate(self) -> None:
        """Calls the hooks, for which the model is as it is saved, and logs what they return."""
        with _as_saved(self.model):
            for name, hook in self.hooks.items():
                self.model.eval()
                if scores := hook(self.model, self.step):
                    self.note({f"{SCORE}{name}/{k}": v for k, v in scores.items()})

    def note(self, values: Mapping[str, float]) -> None:
        """A line of the log, which the main process keeps."""
        if self.log is not None:
            self.log.log(self.step, values)

    def pass_over(self, reason: StepLeftOut) -> None:
        """Leaves out a step; where there were too many in a row, saves and ends the run."""
        self.step += 1
        self.say(f"step {self.step} is left out: {reason}")
        counts = {"not_finite": self.guard.not_finite, "outlying": self.guard.outlying}
        self.note({name: n for name, n in counts.items() if n})
        try:
            self.guard.end_if_hopeless(self.step)
        except Diverged as end:
            saved = self.save_and_wait()
            raise Diverged(f"{end} The weights before them are in {saved}.") from end

    def save(self) -> None:
        """Saves this step, unless it is saved already; with many processes beside the training."""
        if self.saved and self.saved[0] == self.step:
            return
        tensors = self.weights() | flatten_optimizer(self.optimizer, self.model, "optimizer/")
        meta = {
            "step": self.step,
            "guard": self.guard.state(),
            "environment": self.environment(),
        }
        keep = self.config.keep
        if self.saver is None:
            path = save_checkpoint(self.folder, self.step, tensors, meta, keep)
        else:
            path = self.saver.save(self.folder, self.step, tensors, meta, keep)
        self.saved, self.n_unsaved = (self.step, path), 0

    def save_and_wait(self) -> Path:
        """Saves this step, and returns its checkpoint when it is whole."""
        self.save()
        if self.saver is not None:
            self.saver.wait()
        assert self.saved is not None
        return self.saved[1]

    def save_if_space(self) -> None:
        """Saves; a full disk is waited out until the third save it prevents."""
        try:
            self.save()
        except NoSpaceError as error:
            self.n_unsaved += 1
            if self.n_unsaved >= MAX_UNSAVED:
                raise
            self.say(f"warning: step {self.step} is not saved: {error}")

    def say(self, sentence: str) -> None:
        """To the user, once."""
        if self.world.is_main:
            print(sentence, file=sys.stderr)

    def close(self) -> None:
        self.progress.close()
        if self.log is not None:
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
    """`model.hidden` in the config's dtype and compiled; parameters and names stay as they are.

    A model that is spread over processes is so already, see `parallel.spread`.
    """
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
