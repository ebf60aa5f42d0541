"""Training of the image tokenizer: it learns, its codebook stays alive, a cut run goes on."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from openchameleon.errors import Stopped, UserError
from openchameleon.train import vq_step
from openchameleon.train.image_tokenizer import (
    codebook_from_data,
    restart_dead_codes,
    restarts_at,
    train_image_tokenizer,
)
from openchameleon.train.vq_step import (
    VQTrainConfig,
    build_vq_state,
    learning_rate,
    to_pixels,
    vq_train_step,
)
from openchameleon.vqgan.config import VQConfig
from openchameleon.vqgan.discriminator import PatchDiscriminator
from openchameleon.vqgan.quantize import nearest

SIDE = 24
CONFIG = VQConfig(
    ch=16, ch_mult=(1,), n_res_blocks=1, z_channels=8, embed_dim=8, n_embed=16, resolution=SIDE,
    stem=4, encoder_kernel=1, mid_attention=False, dropout=0.1,
)  # fmt: skip
TRAIN = VQTrainConfig(
    steps=12, batch_size=4, lr=2e-3, warmup=2, autoencoder_warmup_steps=4, kmeans_samples=64,
    kmeans_iters=2, restart_every=3, log_every=2, save_every=100, seed=3,
)  # fmt: skip


class Narrow(PatchDiscriminator):
    def __init__(self) -> None:
        super().__init__(ch=8)


@pytest.fixture(scope="module", autouse=True)
def _narrow_discriminator() -> Iterator[None]:
    """An eighth of the channels: it took most of the time, and no claim is about its width."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vq_step, "PatchDiscriminator", Narrow)
        yield


def squares(step: int, batch_size: int) -> Tensor:
    """A coloured square on a coloured ground: (B, 3, 24, 24) uint8, a function of the step."""
    generator = torch.Generator().manual_seed(step)
    colours = torch.randint(0, 4, (batch_size, 2, 3), generator=generator) * 85
    corners = torch.randint(0, 3, (batch_size, 2), generator=generator) * 4
    pictures = colours[:, 0, :, None, None].repeat(1, 1, SIDE, SIDE)
    for i, (y, x) in enumerate(corners.tolist()):
        pictures[i, :, y : y + 8, x : x + 8] = colours[i, 1, :, None, None]
    return pictures.to(torch.uint8)


def foreground(pictures: Tensor) -> Tensor:
    """Where a picture differs from its bottom right corner."""
    ground = pictures[:, :, -1:, -1:]
    return (pictures != ground).any(1, keepdim=True).float()


def metrics(folder: Path) -> list[dict]:
    return [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]


class Cut(Exception):
    """Stands for a killed process."""


def run(folder: Path, train: VQTrainConfig, cut_at: int | None = None) -> dict[str, Tensor]:
    def pictures(step: int, batch_size: int) -> Tensor:
        if step == cut_at:
            raise Cut
        return squares(step, batch_size)

    return train_image_tokenizer(CONFIG, train, pictures, foreground, folder).state_dict()


def test_loss_falls_and_the_codebook_is_used(tmp_path: Path) -> None:
    config = replace(CONFIG, ch=32, n_embed=64, dropout=0.0, decoder_kernel=1)
    train = replace(
        TRAIN, steps=160, batch_size=16, autoencoder_warmup_steps=60, kmeans_samples=1000,
        restart_every=20, log_every=10, lr=4e-3, perceptual="none",
    )  # fmt: skip
    model = train_image_tokenizer(config, train, squares, None, tmp_path)
    lines = metrics(tmp_path)
    assert not model.training
    assert lines[-1]["loss"] < 0.4 * lines[0]["loss"]
    assert lines[-1]["psnr"] > lines[0]["psnr"] + 6
    assert lines[-1]["usage"] > 0.6
    assert lines[-1]["perplexity"] > 10
    pixels = to_pixels(squares(10_000, 8))
    with torch.no_grad():
        error = (model.decode(model.encode(pixels)) - pixels).square().mean()
    assert error < 0.3 * pixels.var()


ADVERSARIAL = replace(TRAIN, adversarial_start=7, foreground_weight=3.0)


@pytest.fixture(scope="module")
def uncut(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], list[dict]]:
    folder = tmp_path_factory.mktemp("uncut")
    return run(folder, ADVERSARIAL), metrics(folder)


# In the autoencoder; just before k-means; between k-means and a restart; with the discriminator.
@pytest.mark.parametrize("saved_at", [2, 4, 5, 9])
def test_a_cut_run_ends_with_the_same_bits(
    tmp_path: Path, uncut: tuple[dict[str, Tensor], list[dict]], saved_at: int
) -> None:
    train = replace(ADVERSARIAL, save_every=saved_at)
    with pytest.raises(Cut):
        run(tmp_path, train, cut_at=min(saved_at + 1, 11))
    torch.manual_seed(99)  # the process that goes on has another global state
    weights = run(tmp_path, train)
    expected, lines = uncut
    assert weights.keys() == expected.keys()
    assert [k for k in expected if not torch.equal(weights[k], expected[k])] == []
    assert metrics(tmp_path) == lines


def test_a_signal_finishes_the_step_saves_and_stops(
    tmp_path: Path, uncut: tuple[dict[str, Tensor], list[dict]]
) -> None:
    def pictures(step: int, batch_size: int) -> Tensor:
        if step == 6:
            signal.raise_signal(signal.SIGINT)
        return squares(step, batch_size)

    with pytest.raises(Stopped, match="by SIGINT after step 7"):
        train_image_tokenizer(CONFIG, ADVERSARIAL, pictures, foreground, tmp_path)
    weights = run(tmp_path, ADVERSARIAL, cut_at=5)  # what is done is not done again
    expected, lines = uncut
    assert [k for k in expected if not torch.equal(weights[k], expected[k])] == []
    assert metrics(tmp_path) == lines


def test_a_finished_run_is_returned_as_it_is(tmp_path: Path) -> None:
    first = run(tmp_path, TRAIN)
    again = run(tmp_path, TRAIN, cut_at=0)
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert [x["step"] for x in metrics(tmp_path)] == [2, 4, 6, 8, 10, 12]


def test_training_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    run(tmp_path, TRAIN)
    assert torch.equal(torch.get_rng_state(), before)


def test_another_config_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    run(tmp_path, TRAIN)
    lines = metrics(tmp_path)
    with pytest.raises(UserError, match="another config"):
        run(tmp_path, replace(TRAIN, lr=1e-3))
    with pytest.raises(UserError, match="other pictures"):
        train_image_tokenizer(CONFIG, TRAIN, squares, foreground, tmp_path, data="others")
    assert metrics(tmp_path) == lines


def test_nothing_is_quantised_in_the_warm_up() -> None:
    state = build_vq_state(CONFIG, TRAIN)
    before = state.model.quantize.embedding.weight.detach().clone()
    output = vq_train_step(state, TRAIN, 3, squares(0, 4))
    assert "vq" not in output.losses
    assert torch.equal(state.model.quantize.embedding.weight, before)
    assert "vq" in vq_train_step(state, TRAIN, 4, squares(0, 4)).losses
    assert not torch.equal(state.model.quantize.embedding.weight, before)


def test_codebook_from_data_serves_the_encoders_vectors() -> None:
    state = build_vq_state(CONFIG, TRAIN)
    vectors = (
        state.model.eval().encode_vectors(to_pixels(squares(0, 4))).movedim(1, -1).flatten(0, 2)
    )
    _, before = nearest(vectors, state.model.quantize.embedding.weight)
    codebook_from_data(state, TRAIN, squares)
    _, after = nearest(vectors, state.model.quantize.embedding.weight)
    assert state.model.training
    assert after.mean() < 0.2 * before.mean()


def test_dead_codes_move_to_the_worst_coded_vectors() -> None:
    state = build_vq_state(CONFIG, TRAIN)
    n, width = CONFIG.n_embed, CONFIG.embed_dim
    codebook = state.model.quantize.embedding.weight
    before = codebook.detach().clone()
    state.idle[[2, 5]] = 3
    vectors = before[:10].clone()
    vectors[4] += 7.0
    vectors[8] -= 9.0
    assert restart_dead_codes(state, vectors, dead_after=3) == 2
    assert torch.equal(codebook[[2, 5]], vectors[[8, 4]])
    untouched = [i for i in range(n) if i not in (2, 5)]
    assert torch.equal(codebook[untouched], before[untouched])
    assert state.idle.sum() == 0
    assert restart_dead_codes(state, torch.zeros(4, width), dead_after=3) == 0


def test_restarts_start_with_the_codebook_and_stop_when_told() -> None:
    train = replace(TRAIN, restart_until=9)
    assert [s for s in range(12) if restarts_at(train, s)] == [6]
    assert [s for s in range(12) if restarts_at(TRAIN, s)] == [6, 9]
    assert not any(restarts_at(replace(TRAIN, restart_every=0), s) for s in range(12))


def test_discriminator_learns_only_once_it_has_joined() -> None:
    state = build_vq_state(CONFIG, ADVERSARIAL)
    assert state.discriminator is not None
    first = state.discriminator.layers[0].weight
    before = first.detach().clone()
    assert "discriminator" not in vq_train_step(state, ADVERSARIAL, 6, squares(6, 4)).losses
    assert torch.equal(first, before)
    output = vq_train_step(state, ADVERSARIAL, 7, squares(7, 4))
    assert {"generator", "discriminator"} <= output.losses.keys()
    assert not torch.equal(first, before)


def test_foreground_weight_raises_the_pixel_loss_of_the_foreground_alone() -> None:
    train = replace(TRAIN, foreground_weight=3.0)
    losses = []
    batch = squares(0, 4)
    for mask in (torch.zeros(4, 1, SIDE, SIDE), torch.ones(4, 1, SIDE, SIDE)):
        state = build_vq_state(replace(CONFIG, dropout=0.0), train)
        losses.append(vq_train_step(state, train, 0, batch, mask).losses["pixel"].item())
    assert losses[1] == pytest.approx(3 * losses[0])


def test_learning_rate_warms_up_and_falls_to_its_floor() -> None:
    rates = [learning_rate(TRAIN, s) for s in range(TRAIN.steps)]
    assert rates[0] == pytest.approx(TRAIN.lr / 2)
    assert rates[2] == pytest.approx(TRAIN.lr)
    assert rates[-1] == pytest.approx(TRAIN.lr * TRAIN.lr_min_ratio)
    assert rates[2:] == sorted(rates[2:], reverse=True)


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="The loss is nan at step 0"):
        train_image_tokenizer(CONFIG, replace(TRAIN, l1=float("nan")), squares, None, tmp_path)


def test_impossible_settings_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be below steps"):
        VQTrainConfig(steps=10, autoencoder_warmup_steps=10)
    with pytest.raises(UserError, match="kmeans_samples 8 is less than the 16 codes"):
        run(tmp_path, replace(TRAIN, kmeans_samples=8))
    with pytest.raises(UserError, match="foreground_weight"):
        train_image_tokenizer(
            CONFIG, replace(TRAIN, foreground_weight=2.0), squares, None, tmp_path
        )
