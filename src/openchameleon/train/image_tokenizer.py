"""Training of the image tokenizer: autoencoder, then a codebook from its own vectors, then VQ-GAN.

Pictures come from a pure function of (step, batch size) and all randomness from (seed, step), so
that a resumed run repeats an uninterrupted one. Knows nothing of what the pictures show.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openchameleon.config import config_hash, to_dict
from openchameleon.errors import Stopped, UserError
from openchameleon.files import locked
from openchameleon.progress import Progress
from openchameleon.train.checkpoint import (
    flatten_optimizer,
    latest_checkpoint,
    load_checkpoint,
    restore_optimizer,
    save_checkpoint,
)
from openchameleon.train.metrics import MetricsLog
from openchameleon.train.run_folder import (
    environment,
    stop_signals,
    stopped_text,
    warn_if_elsewhere,
)
from openchameleon.train.vq_step import (
    StepOutput,
    VQTrainConfig,
    VQTrainState,
    build_vq_state,
    learning_rate,
    to_pixels,
    vq_train_step,
)
from openchameleon.vqgan.config import VQConfig
from openchameleon.vqgan.kmeans import kmeans
from openchameleon.vqgan.metrics import codebook_perplexity, codebook_usage, psnr
from openchameleon.vqgan.model import VQModel
from openchameleon.vqgan.quantize import nearest

Pictures = Callable[[int, int], Tensor]  # (step, batch_size) -> (B, 3, P, P) uint8; pure
WeightMap = Callable[[Tensor], Tensor]  # pictures uint8 -> foreground (B, 1, P, P) in [0, 1]

METRICS = "metrics.jsonl"


def train_image_tokenizer(
    config: VQConfig,
    train: VQTrainConfig,
    pictures: Pictures,
    weight_map: WeightMap | None,
    run_folder: Path,
    device: torch.device | str = "cpu",
    on_save: Callable[[int, VQModel], None] | None = None,
    data: str = "",
) -> VQModel:
    """Trains, or goes on from the last checkpoint in `run_folder`, and returns the model in eval.

    Writes checkpoints and metrics.jsonl (one line every `log_every` steps; usage and perplexity of
    the codebook are over the steps since the line before). On the CPU a run that is cut and
    resumed ends with the same bits. On SIGINT or SIGTERM it finishes the step, saves, and raises
    Stopped. `on_save(step, model)` is called after each checkpoint. data: a name or a hash of what
    the pictures are. UserError where the folder holds a run of another config or other data, or is
    in use, or where the loss is not finite.
    """
    if 0 < train.kmeans_samples < config.n_embed:
        raise UserError(
            f"kmeans_samples {train.kmeans_samples} is less than the {config.n_embed} codes; "
            "raise it, or set it to 0 to start from a random codebook."
        )
    if train.foreground_weight != 1.0 and weight_map is None:
        raise UserError(
            "foreground_weight is for pictures whose foreground is known, as in a recipe; leave it "
            "at 1 here."
        )
    with locked(run_folder), stop_signals() as received:
        state = build_vq_state(config, train, device)
        run = config_hash(run_hash(config, train), data)
        start = resume(state, run, run_folder)
        state.model.train()
        with (
            closing(MetricsLog(run_folder / METRICS, start)) as log,
            closing(Progress("image tokenizer", train.steps, "steps", start)) as progress,
        ):
            for step in range(start, train.steps):
                output, batch = take_step(state, train, step, pictures, weight_map)
                done, told_to_stop = step + 1, received[:1]
                if done % train.log_every == 0 or done == train.steps:
                    line = metrics_line(state, train, done, batch, output)
                    log.log(done, line)
                    progress.update(done, f"| loss {line['loss']:.4f}, {line['psnr']:.1f} dB")
                if done % train.save_every == 0 or done == train.steps or told_to_stop:
                    save(state, config, train, run, run_folder, done)
                    if on_save is not None:
                        on_save(done, state.model)
                progress.update(done)
                if told_to_stop:
                    raise Stopped(stopped_text(told_to_stop[0], done))
        if received:
            raise Stopped(stopped_text(received[0], train.steps))
        return state.model.eval()


def take_step(
    state: VQTrainState,
    train: VQTrainConfig,
    step: int,
    pictures: Pictures,
    weight_map: WeightMap | None,
) -> tuple[StepOutput, Tensor]:
    """One step with all that it begins or ends with; its output and its batch."""
    device = state.model.last_weight.device
    if step == train.autoencoder_warmup_steps and train.kmeans_samples > 0:
        codebook_from_data(state, train, pictures)
    batch = pictures(step, train.batch_size).to(device)
    foreground = None if weight_map is None else weight_map(batch).to(device)
    output = seeded_step(state, train, step, batch, foreground)
    if restarts_at(train, step):
        restart_dead_codes(state, output.vectors, train.restart_every)
    return output, batch


def seeded_step(
    state: VQTrainState,
    train: VQTrainConfig,
    step: int,
    batch: Tensor,
    foreground: Tensor | None,
) -> StepOutput:
    """`vq_train_step` with dropout drawn from (seed, step). UserError on a loss not finite."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(train.seed * 1_000_003 + step)
        output = vq_train_step(state, train, step, batch, foreground)
    if not output.losses["loss"].isfinite():
        raise UserError(
            f"The loss is {output.losses['loss'].item()} at step {step}; lower lr or raise warmup, "
            "and start again in another folder."
        )
    return output


def restarts_at(train: VQTrainConfig, step: int) -> bool:
    """Whether dead codes are restarted after this step."""
    since = step + 1 - train.autoencoder_warmup_steps
    if train.restart_every == 0 or since <= 0 or since % train.restart_every:
        return False
    return train.restart_until is None or step < train.restart_until


@torch.no_grad()
def restart_dead_codes(state: VQTrainState, vectors: Tensor, dead_after: int) -> int:
    """Moves codes unused for `dead_after` steps to the worst-coded of `vectors`; how many moved.

    At most a quarter of the vectors are taken: beyond the worst, a vector is served well already.
    """
    dead = (state.idle >= dead_after).nonzero().flatten()[: max(1, len(vectors) // 4)]
    _, distance = nearest(vectors, state.model.quantize.embedding.weight)
    state.model.quantize.restart(dead, vectors[distance.topk(len(dead)).indices])
    state.idle[dead] = 0
    return len(dead)


@torch.no_grad()
def codebook_from_data(state: VQTrainState, train: VQTrainConfig, pictures: Pictures) -> None:
    """Sets the codebook to the k-means centres of the encoder's vectors on the first pictures."""
    model, vectors, found, step = state.model, [], 0, 0
    device = model.last_weight.device
    model.eval()
    while found < train.kmeans_samples:
        z = model.encode_vectors(to_pixels(pictures(step, train.batch_size).to(device)))
        vectors.append(z.movedim(1, -1).flatten(0, 2))
        found, step = found + len(vectors[-1]), step + 1
    model.train()
    n_embed = model.config.n_embed
    centres = kmeans(torch.cat(vectors), n_embed, train.kmeans_iters, train.seed)
    model.quantize.restart(torch.arange(n_embed, device=device), centres)


def metrics_line(
    state: VQTrainState, train: VQTrainConfig, done: int, batch: Tensor, output: StepOutput
) -> dict[str, Any]:
    """What is logged of the step that ended as number `done`; starts a new usage count."""
    reconstruction = output.reconstruction.clamp(-1, 1)
    line = {
        "lr": learning_rate(train, done - 1),
        **{name: value.item() for name, value in output.losses.items()},
        "psnr": psnr(reconstruction, to_pixels(batch)).mean().item(),
        "usage": codebook_usage(state.counts),
        "perplexity": codebook_perplexity(state.counts),
    }
    state.counts.zero_()
    return line


def save(
    state: VQTrainState,
    config: VQConfig,
    train: VQTrainConfig,
    run: str,
    run_folder: Path,
    done: int,
) -> None:
    """Writes the checkpoint of the run with hash `run` that has done `done` steps."""
    tensors = {f"model/{k}": v for k, v in state.model.state_dict().items()}
    tensors |= flatten_optimizer(state.optimizer, state.model, "optimizer/")
    if state.discriminator is not None and state.discriminator_optimizer is not None:
        tensors |= {f"disc/{k}": v for k, v in state.discriminator.state_dict().items()}
        tensors |= flatten_optimizer(
            state.discriminator_optimizer, state.discriminator, "disc_optimizer/"
        )
    tensors |= {"counts": state.counts, "idle": state.idle}
    meta = {
        "step": done,
        "run": run,
        "config": to_dict(config),
        "train": to_dict(train),
        "environment": environment(state.model.last_weight.device),
    }
    save_checkpoint(run_folder, done, tensors, meta)


def resume(state: VQTrainState, run: str, run_folder: Path) -> int:
    """Fills `state` from the last checkpoint; the steps done (0)."""
    path = latest_checkpoint(run_folder)
    if path is None:
        return 0
    tensors, meta = load_checkpoint(path)
    if meta["run"] != run:
        raise UserError(
            f"{run_folder} holds an image tokenizer's run with another config or other pictures; "
            "give those that it was started with, or another folder."
        )
    warn_if_elsewhere(meta["environment"], environment(state.model.last_weight.device))
    state.model.load_state_dict(_under(tensors, "model/"))
    restore_optimizer(state.optimizer, state.model, tensors, "optimizer/")
    if state.discriminator is not None and state.discriminator_optimizer is not None:
        state.discriminator.load_state_dict(_under(tensors, "disc/"))
        restore_optimizer(
            state.discriminator_optimizer, state.discriminator, tensors, "disc_optimizer/"
        )
    state.counts.copy_(tensors["counts"])
    state.idle.copy_(tensors["idle"])
    return meta["step"]


def run_hash(config: VQConfig, train: VQTrainConfig) -> str:
    """Changes with whatever changes the result; how often to log or save does not."""
    return config_hash(config, dataclasses.replace(train, log_every=1, save_every=1))


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
