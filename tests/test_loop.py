"""A run that is interrupted anywhere ends with the same bits as one that is not."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_checkpoint import in_child

from openchameleon.data.loader import Batch, RowLoader
from openchameleon.data.pack import pack, save_manifest, write_rows
from openchameleon.errors import Stopped, UserError
from openchameleon.model.config import ModelConfig
from openchameleon.model.transformer import Transformer
from openchameleon.train import loop
from openchameleon.train.checkpoint import NoSpaceError, load_checkpoint
from openchameleon.train.loop import Hook, TrainConfig, _as_configured, fit
from openchameleon.train.metrics import MetricsLog, plot_metrics, read_metrics
from openchameleon.train.optim import OptimConfig
from openchameleon.vocab import Vocab

VOCAB = Vocab.compact(n_codes=8, codes_per_item=4, n_text=16)
MODEL = ModelConfig(dim=16, n_layers=1, n_heads=2, n_kv_heads=2, vocab_size=VOCAB.size,
                    max_seq_len=16, ffn_dim=32, dropout=0.2)  # fmt: skip
CONFIG = TrainConfig(steps=12, batch_size=4, seed=1, log_every=1, save_every=5, threads=1)
OPTIM = OptimConfig(lr=1e-2, warmup_steps=3)


def make_rows(folder: Path) -> Path:
    """Documents of text with a picture, of several lengths, in rows of 16."""
    if not folder.exists():
        folder.mkdir(parents=True)
        rng = np.random.default_rng(0)
        documents = []
        for _ in range(40):
            text = (VOCAB.text_start + rng.integers(0, 16, rng.integers(1, 6))).tolist()
            picture = VOCAB.image.ids_from_codes(rng.integers(0, 8, 4).tolist())
            ids = [VOCAB.bos_id, *text, *picture, VOCAB.eos_id]
            documents.append((ids, [0] + [1] * (len(ids) - 1)))
        save_manifest(folder, write_rows(pack(documents, 16), folder, 16, VOCAB))
    return folder


def train(
    run: Path,
    config: TrainConfig = CONFIG,
    optim: OptimConfig = OPTIM,
    hooks: Mapping[str, Hook] | None = None,
    loader: RowLoader | None = None,
    model_config: ModelConfig = MODEL,
    **more: Any,
) -> Path:
    """A new process's work: a new model, trained in `run`, by rows beside it."""
    model = Transformer(model_config)
    model.init_weights(seed=0)
    data = make_rows(run.parent / "rows")
    loader = loader or RowLoader({"all": (data, 1.0)}, config.batch_size, seed=config.seed)
    image = VOCAB.image
    ids = torch.arange(VOCAB.size)
    is_code = (ids >= image.first_id) & (ids < image.stop_id)
    return fit(model, loader, config, optim, run, is_code=is_code, hooks=hooks, **more)


def bits(checkpoint: Path) -> dict[str, bytes]:
    tensors, _ = load_checkpoint(checkpoint)
    return {k: bytes(t.flatten().view(torch.uint8).tolist()) for k, t in tensors.items()}


def losses(run: Path) -> list[tuple[Any, ...]]:
    """The logged steps, but for their speed, to the last digit."""
    return [
        tuple((k, repr(v)) for k, v in line.items() if k != "tokens_per_s")
        for line in read_metrics(run / "metrics.jsonl")
    ]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of 12 steps in one go."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train(run)
    return run


def final(run: Path) -> Path:
    return run / "checkpoints" / "step-00000012"


@pytest.fixture
def run(uninterrupted: Path, tmp_path: Path) -> Path:
    """A new run folder on the same rows."""
    os.symlink(uninterrupted.parent / "rows", tmp_path / "rows")
    return tmp_path / "run"


def test_training_lowers_the_loss_and_saves(uninterrupted: Path) -> None:
    lines = read_metrics(uninterrupted / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert {"text_loss", "code_loss", "lr", "grad_norm", "tokens_per_s"} <= lines[0].keys()
    names = sorted(p.name for p in (uninterrupted / "checkpoints").iterdir())
    assert names == ["step-00000010", "step-00000012"]


def test_a_run_stopped_at_any_steps_ends_with_the_same_bits(uninterrupted: Path, run: Path) -> None:
    for stop in (1, 4, 5, 7, 11):
        path = train(run, stop_at=stop)
        assert path.name == f"step-{stop:08d}"
    assert train(run).name == "step-00000012"
    assert bits(final(run)) == bits(final(uninterrupted))
    assert losses(run) == losses(uninterrupted)
    assert any(name.startswith("optimizer/") for name in bits(final(run)))


def test_a_finished_run_returns_its_checkpoint_unchanged(run: Path) -> None:
    first = train(run)
    before = (first / "MANIFEST.json").stat().st_mtime_ns
    assert train(run) == first
    assert (first / "MANIFEST.json").stat().st_mtime_ns == before


def killed_at(step: int) -> Hook:
    def hook(model: Transformer, at: int) -> dict[str, float]:
        if at == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return {}

    return hook


def test_a_killed_process_resumes_to_the_same_bits(uninterrupted: Path, run: Path) -> None:
    """One real process, killed at step 8, between checkpoints and with its log ahead of them."""
    config = dataclasses.replace(CONFIG, eval_every=1)
    status = in_child(lambda: train(run, config, hooks={"kill": killed_at(8)}))
    assert status == signal.SIGKILL
    steps = [line["step"] for line in read_metrics(run / "metrics.jsonl")]
    assert max(steps) == 8
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-00000005"]
    train(run, config)
    assert bits(final(run)) == bits(final(uninterrupted))
    assert losses(run) == losses(uninterrupted)


def test_a_run_begun_from_other_weights_is_another_run(run: Path) -> None:
    train(run, stop_at=2, begun_from="a checkpoint")
    train(run, stop_at=3, begun_from="a checkpoint")
    with pytest.raises(UserError, match="begun_from was a checkpoint, is another"):
        train(run, begun_from="another")


def holds_lock(run: Path, pid: int) -> bool:
    lock = run / "lock"
    return lock.exists() and lock.read_text().startswith(f"process {pid} ")


def test_a_broken_newest_checkpoint_costs_only_the_steps_since_the_one_before(
    uninterrupted: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(run, stop_at=7)
    with (run / "checkpoints" / "step-00000007" / "tensors.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    train(run)
    assert "step-00000007: broken checkpoint passed over" in capsys.readouterr().err
    assert bits(final(run)) == bits(final(uninterrupted))
    assert losses(run) == losses(uninterrupted)


@pytest.mark.parametrize("at", [3, CONFIG.steps])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_stops(
    number: signal.Signals, at: int, uninterrupted: Path, run: Path
) -> None:
    config = dataclasses.replace(CONFIG, eval_every=1)

    def send(model: Transformer, step: int) -> dict[str, float]:
        if step == at:
            signal.raise_signal(number)
        return {}

    before = signal.getsignal(number)
    with pytest.raises(Stopped, match=f"by {number.name} after step {at}"):
        train(run, config, hooks={"send": send})
    assert (run / "checkpoints" / f"step-{at:08}").is_dir()
    assert signal.getsignal(number) == before
    train(run, config)
    assert bits(final(run)) == bits(final(uninterrupted))


def test_a_second_signal_stops_at_once(run: Path) -> None:
    def send_twice(model: Transformer, step: int) -> dict[str, float]:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("still here")

    config = dataclasses.replace(CONFIG, eval_every=1)
    # A shell starts what it puts in the background with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            train(run, config, hooks={"send": send_twice})
    finally:
        signal.signal(signal.SIGINT, before)


def test_training_works_outside_the_main_thread(run: Path) -> None:
    paths: list[Path] = []
    thread = threading.Thread(target=lambda: paths.append(train(run, stop_at=1)))
    thread.start()
    thread.join()
    assert [p.name for p in paths] == ["step-00000001"]


def test_a_deadline_ends_a_run_with_a_checkpoint(run: Path) -> None:
    assert train(run, deadline=time.monotonic()).name == "step-00000000"
    assert train(run, stop_at=2, deadline=time.monotonic() + 1e6).name == "step-00000002"


def test_another_config_is_refused_with_the_values_that_differ(run: Path) -> None:
    train(run, stop_at=1)
    other = dataclasses.replace(CONFIG, steps=13)
    with pytest.raises(UserError, match=r"another config: train.steps was 12, is 13; optim.lr was"):
        train(run, other, dataclasses.replace(OPTIM, lr=0.5))
    other_order = RowLoader({"all": (make_rows(run.parent / "rows"), 1.0)}, 4, seed=2)
    with pytest.raises(UserError, match=r"data\.seed was 1, is 2"):
        train(run, loader=other_order)
    free = dataclasses.replace(CONFIG, log_every=3, save_every=2, eval_every=4, keep=1)
    assert train(run, free, stop_at=2).name == "step-00000002"


def test_another_thread_count_at_resumption_warns(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train(run, stop_at=1)
    train(run, stop_at=2)
    assert "warning" not in capsys.readouterr().err
    elsewhere = loop.environment(torch.device("cpu")) | {"threads": 64}
    monkeypatch.setattr(loop, "environment", lambda device: elsewhere)
    train(run, stop_at=3)
    assert "threads was 1, is 64" in capsys.readouterr().err


def test_a_second_trainer_is_refused_and_told_of_the_first(run: Path) -> None:
    def train_too(model: Transformer, step: int) -> dict[str, float]:
        train(run)
        return {}

    config = dataclasses.replace(CONFIG, eval_every=1)
    with pytest.raises(UserError, match=f"in use by process {os.getpid()} on "):
        train(run, config, hooks={"second": train_too})
    (run / "lock").write_text("process 1 on elsewhere")  # of a process that is gone
    assert train(run, stop_at=2).name == "step-00000002"


def test_a_folder_that_cannot_be_written_is_said_before_the_first_step(run: Path) -> None:
    run.write_text("a file")
    with pytest.raises(UserError, match="Cannot write to"):
        train(run)


def test_hooks_are_called_in_eval_mode_and_logged_as_scores(uninterrupted: Path, run: Path) -> None:
    modes = []

    def hook(model: Transformer, step: int) -> dict[str, float]:
        modes.append((step, model.training))
        torch.rand(5)  # a hook that draws random numbers does not change the run
        return {"exact": step / 100}

    train(run, dataclasses.replace(CONFIG, eval_every=5), hooks={"world": hook})
    assert modes == [(5, False), (10, False), (12, False)]
    lines = read_metrics(run / "metrics.jsonl")
    scores = [(n["step"], n["score/world/exact"]) for n in lines if "score/world/exact" in n]
    assert scores == [(5, 0.05), (10, 0.1), (12, 0.12)]
    assert bits(final(run)) == bits(final(uninterrupted))


def test_a_step_is_saved_although_a_hook_fails(uninterrupted: Path, run: Path) -> None:
    def fails(model: Transformer, step: int) -> dict[str, float]:
        raise RuntimeError("no scores")

    config = dataclasses.replace(CONFIG, eval_every=10)
    with pytest.raises(RuntimeError, match="no scores"):
        train(run, config, hooks={"world": fails})
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 10
    assert (run / "checkpoints" / "step-00000010").is_dir()
    assert bits(train(run, config)) == bits(final(uninterrupted))


def test_hooks_see_the_model_as_it_is_saved_whatever_it_trains_in(run: Path) -> None:
    token_ids = torch.arange(8)[None]
    seen = []

    def hook(model: Transformer, step: int) -> dict[str, float]:
        saved = Transformer(MODEL).eval()
        saved.load_state_dict(model.state_dict())
        with torch.no_grad():
            seen.append(torch.equal(model(token_ids), saved(token_ids)))
        return {}

    train(run, dataclasses.replace(CONFIG, eval_every=6, dtype="bfloat16"), hooks={"look": hook})
    assert seen == [True, True]


def test_the_warning_signs_are_logged_and_change_no_bit(uninterrupted: Path, run: Path) -> None:
    for folder, every in ((run, 1), (run.with_name("unmonitored"), 0)):
        path = train(folder, dataclasses.replace(CONFIG, monitor_every=every, log_every=5))
        assert bits(path) == bits(final(uninterrupted))
        lines = read_metrics(folder / "metrics.jsonl")
        steps = [line["step"] for line in lines if "layer/0/output_norm" in line]
        assert steps == (list(range(1, 13)) if every else [])
        assert all({"loss", "lr"} <= line.keys() for line in lines)


def test_growing_signs_are_told_and_logged_once_across_a_resumption(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = dataclasses.replace(CONFIG, steps=40, monitor_every=1)
    breaking = dataclasses.replace(OPTIM, lr=1.0, warmup_steps=40)
    train(run, config, breaking, stop_at=30)
    train(run, config, breaking)
    lines = [n for n in read_metrics(run / "metrics.jsonl") if "alarm/output_norm" in n]
    assert [n["alarm/output_norm"] > 2 for n in lines] == [True]
    assert capsys.readouterr().err.count("output_norm has grown to") == 1
    train(run.with_name("sound"), dataclasses.replace(config, steps=40))
    assert "grown" not in capsys.readouterr().err


def with_bad_steps(rows: Path, bad: set[int]) -> RowLoader:
    """A loader whose batches of the steps `bad` have a loss that is not finite."""

    class Poisoned(RowLoader):
        def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
            batch = super().batch(step, rank, world)
            if step not in bad:
                return batch
            return dataclasses.replace(batch, loss_weights=batch.loss_weights * float("nan"))

    return Poisoned({"all": (rows, 1.0)}, 4, seed=1)


def test_a_step_that_is_not_finite_is_left_out_and_training_goes_on(run: Path) -> None:
    rows = make_rows(run.parent / "rows")
    path = train(run, loader=with_bad_steps(rows, {2, 3, 6}))
    assert path.name == "step-00000012"
    assert all(t.isfinite().all() for t in load_checkpoint(path)[0].values())
    skipped = {n["step"]: n["not_finite"] for n in read_metrics(run / "metrics.jsonl")
               if "not_finite" in n}  # fmt: skip
    assert skipped == {3: 1, 4: 2, 7: 1}


def test_three_steps_not_finite_in_a_row_end_the_run_even_across_a_resumption(run: Path) -> None:
    rows = make_rows(run.parent / "rows")
    train(run, loader=with_bad_steps(rows, {2, 3, 4}), stop_at=4)
    with pytest.raises(UserError, match="3 steps in a row were not finite, the last one 5"):
        train(run, loader=with_bad_steps(rows, {2, 3, 4}))
    tensors, _ = load_checkpoint(run / "checkpoints" / "step-00000005")
    assert all(t.isfinite().all() for t in tensors.values())


def test_a_full_disk_is_waited_out_until_the_third_save(
    uninterrupted: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, refusals = loop.save_checkpoint, iter([1, 1, 0, 1, 1, 1])

    def full_at_times(*args: Any, **kwargs: Any) -> Path:
        if next(refusals):
            raise NoSpaceError("No space to save.")
        return save(*args, **kwargs)

    monkeypatch.setattr(loop, "save_checkpoint", full_at_times)
    config = dataclasses.replace(CONFIG, save_every=1)
    with pytest.raises(NoSpaceError):
        train(run, config)
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-00000003"]
    monkeypatch.setattr(loop, "save_checkpoint", save)
    train(run, config)
    assert bits(final(run)) == bits(final(uninterrupted))


def test_micro_batches_change_nothing_but_rounding(run: Path) -> None:
    still = dataclasses.replace(MODEL, dropout=0.0)
    parts = dataclasses.replace(CONFIG, micro_batch_size=3)
    whole, _ = load_checkpoint(train(run, model_config=still))
    cut, _ = load_checkpoint(train(run.with_name("cut"), parts, model_config=still))
    assert whole.keys() == cut.keys()
    for name in whole:
        torch.testing.assert_close(whole[name], cut[name], rtol=1e-3, atol=1e-4)


def test_bfloat16_products_train_float32_weights(run: Path, uninterrupted: Path) -> None:
    path = train(run, dataclasses.replace(CONFIG, dtype="bfloat16"))
    tensors, _ = load_checkpoint(path)
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    model = Transformer(MODEL)
    with _as_configured(model, TrainConfig(1, 1, dtype="bfloat16")):
        assert model.hidden(torch.arange(8)[None]).dtype == torch.bfloat16  # so is the head
    lower, exact = (read_metrics(r / "metrics.jsonl")[-1]["loss"] for r in (run, uninterrupted))
    assert lower != exact  # it did run in another dtype
    assert lower == pytest.approx(exact, rel=0.05)


# metrics


def test_a_resumed_log_drops_later_and_incomplete_lines(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    log = MetricsLog(path)
    for step in (1, 2, 3):
        log.log(step, {"loss": step / 10})
    log.close()
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    log = MetricsLog(path, resumed_step=2)
    log.log(3, {"loss": float("nan")})
    log.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 0.1},
        {"step": 2, "loss": 0.2},
        {"step": 3, "loss": None},
    ]


def test_the_curves_are_drawn_from_any_log(uninterrupted: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    for log in (uninterrupted / "metrics.jsonl", tmp_path / "empty.jsonl"):
        png = tmp_path / f"{log.stem}.png"
        plot_metrics(log, png)
        assert png.read_bytes().startswith(b"\x89PNG")
