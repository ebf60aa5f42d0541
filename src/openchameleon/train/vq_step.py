"""One update of the image tokenizer: its config, its state, its losses. Knows no files.

The recipe follows VQGAN (arXiv 2012.09841): pixel, perceptual, quantisation and adversarial terms.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from openchameleon.errors import UserError
from openchameleon.vqgan.config import VQConfig
from openchameleon.vqgan.discriminator import PatchDiscriminator
from openchameleon.vqgan.losses import (
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    pixel_loss,
)
from openchameleon.vqgan.metrics import code_counts
from openchameleon.vqgan.model import VQModel
from openchameleon.vqgan.perceptual import PerceptualKind, make_perceptual


@dataclass(frozen=True, slots=True)
class VQTrainConfig:
    """How an image tokenizer is trained; steps count from 0. ValueError on impossible values.

    Until `autoencoder_warmup_steps` nothing is quantised; there the codebook becomes the k-means
    centres of `kmeans_samples` encoder vectors (0 = keep the random codebook). From then until
    `restart_until` (None = the end), every `restart_every` steps (0 = never), codes unused for
    that long move to the worst-coded vectors of the batch. Foreground pixels, as the weight map
    has them, count `foreground_weight` times. The discriminator joins at `adversarial_start`.
    """

    steps: int = 10_000
    batch_size: int = 32
    lr: float = 5e-4
    lr_min_ratio: float = 0.1
    warmup: int = 100
    betas: tuple[float, float] = (0.5, 0.9)
    grad_clip: float = 1.0
    l1: float = 1.0
    l2: float = 1.0
    foreground_weight: float = 1.0
    perceptual: PerceptualKind = "multiscale"
    perceptual_weight: float = 1.0
    perceptual_path: str = ""
    perceptual_heads: str = ""
    vq_weight: float = 1.0
    adversarial_start: int | None = None
    adversarial_weight: float = 0.8
    autoencoder_warmup_steps: int = 1000
    kmeans_samples: int = 50_000
    kmeans_iters: int = 10
    restart_every: int = 100
    restart_until: int | None = None
    seed: int = 0
    log_every: int = 50
    save_every: int = 1000

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size, self.log_every, self.save_every) < 1:
            raise ValueError("steps, batch_size, log_every and save_every must be at least 1")
        if self.lr <= 0 or self.grad_clip <= 0:
            raise ValueError("lr and grad_clip must be above 0")
        if not 0 <= self.autoencoder_warmup_steps < self.steps:
            raise ValueError(
                f"autoencoder_warmup_steps {self.autoencoder_warmup_steps} must be below steps "
                f"{self.steps}: a tokenizer has to be trained with its codes"
            )


@dataclass(slots=True)
class VQTrainState:
    """All that changes while training, and the frozen perceptual distance."""

    model: VQModel
    optimizer: torch.optim.Optimizer
    discriminator: PatchDiscriminator | None
    discriminator_optimizer: torch.optim.Optimizer | None
    perceptual: nn.Module | None
    counts: Tensor  # (n_embed,) int64: uses of each code since the last log line
    idle: Tensor  # (n_embed,) int64: steps since each code was last used


class StepOutput(NamedTuple):
    losses: dict[str, Tensor]  # scalars, detached
    reconstruction: Tensor  # (B, 3, P, P), detached
    vectors: Tensor  # (B h w, embed_dim): what was quantised, detached


def build_vq_state(
    config: VQConfig, train: VQTrainConfig, device: torch.device | str = "cpu"
) -> VQTrainState:
    """A fresh state; its weights are a function of the configs and the seed.

    UserError where an adversarial run's pictures are smaller than one patch of the discriminator.
    """
    if train.adversarial_start is not None and config.resolution < PatchDiscriminator.smallest_side:
        raise UserError(
            f"A picture of {config.resolution} pixels a side is too small for the discriminator, "
            f"which needs {PatchDiscriminator.smallest_side}: set adversarial_start to null."
        )
    discriminator = discriminator_optimizer = None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(train.seed)
        model = VQModel(config).to(device)
        if train.adversarial_start is not None:
            discriminator = PatchDiscriminator().to(device)
            discriminator_optimizer = _adam(discriminator, train)
    perceptual = make_perceptual(train.perceptual, train.perceptual_path, train.perceptual_heads)
    zeros = torch.zeros(config.n_embed, dtype=torch.int64, device=device)
    return VQTrainState(
        model=model,
        optimizer=_adam(model, train),
        discriminator=discriminator,
        discriminator_optimizer=discriminator_optimizer,
        perceptual=None if perceptual is None else perceptual.to(device),
        counts=zeros,
        idle=zeros.clone(),
    )


def vq_train_step(
    state: VQTrainState,
    train: VQTrainConfig,
    step: int,
    pictures: Tensor,
    foreground: Tensor | None = None,
) -> StepOutput:
    """One update of the tokenizer and, once it has joined, of the discriminator.

    `pictures` (B, 3, P, P) uint8; `foreground` (B, 1, P, P) in [0, 1] or None.
    """
    model, pixels = state.model, to_pixels(pictures)
    weight = None if foreground is None else 1 + (train.foreground_weight - 1) * foreground
    adversarial = train.adversarial_start is not None and step >= train.adversarial_start
    _set_lr(state, learning_rate(train, step))
    z = model.encode_vectors(pixels)
    z_q, losses = z, {}
    if step >= train.autoencoder_warmup_steps:
        z_q, codes, losses["vq"] = model.quantize(z)
        _count_codes(state, codes)
    reconstruction = model.decode_vectors(z_q)

    losses["pixel"] = pixel_loss(reconstruction, pixels, train.l1, train.l2, weight)
    fidelity = losses["pixel"]
    if state.perceptual is not None:
        losses["perceptual"] = state.perceptual(reconstruction, pixels)
        fidelity = fidelity + train.perceptual_weight * losses["perceptual"]
    loss = fidelity + train.vq_weight * losses.get("vq", 0.0)
    if adversarial and state.discriminator is not None:
        losses["generator"] = generator_loss(state.discriminator(reconstruction))
        balance = adaptive_weight(fidelity, losses["generator"], model.last_weight)
        loss = loss + train.adversarial_weight * balance * losses["generator"]

    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), train.grad_clip)
    state.optimizer.step()
    if adversarial:
        losses["discriminator"] = discriminator_step(state, pixels, reconstruction.detach())
    losses["loss"] = loss
    return StepOutput(
        {name: value.detach() for name, value in losses.items()},
        reconstruction.detach(),
        z.detach().movedim(1, -1).flatten(0, 2),
    )


def discriminator_step(state: VQTrainState, real: Tensor, fake: Tensor) -> Tensor:
    """One update of the discriminator on pictures and reconstructions; its loss."""
    discriminator, optimizer = state.discriminator, state.discriminator_optimizer
    assert discriminator is not None
    assert optimizer is not None
    loss = discriminator_loss(discriminator(real), discriminator(fake))
    # The generator's backward left gradients here too: they are not the discriminator's.
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss


def to_pixels(pictures: Tensor) -> Tensor:
    """uint8 [0, 255] -> float32 [-1, 1]."""
    return pictures.float() / 127.5 - 1


def learning_rate(train: VQTrainConfig, step: int) -> float:
    """Linear warm-up, then a cosine from `lr` to `lr * lr_min_ratio` at the last step."""
    if step < train.warmup:
        return train.lr * (step + 1) / train.warmup
    done = (step - train.warmup) / max(1, train.steps - 1 - train.warmup)
    cosine = (1 + math.cos(math.pi * min(done, 1.0))) / 2
    return train.lr * (train.lr_min_ratio + (1 - train.lr_min_ratio) * cosine)


def _count_codes(state: VQTrainState, codes: Tensor) -> None:
    """Notes which codes a batch used."""
    counts = code_counts(codes, len(state.counts))
    state.counts += counts
    state.idle += 1
    state.idle[counts > 0] = 0


def _set_lr(state: VQTrainState, lr: float) -> None:
    for optimizer in filter(None, (state.optimizer, state.discriminator_optimizer)):
        for group in optimizer.param_groups:
            group["lr"] = lr


def _adam(module: nn.Module, train: VQTrainConfig) -> torch.optim.Optimizer:
    return torch.optim.Adam(module.parameters(), lr=train.lr, betas=train.betas, fused=True)
