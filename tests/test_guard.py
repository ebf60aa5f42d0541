"""Outlying steps are left out, runs are taken back, and neither is forgotten."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import pytest
import torch
from test_loop import CONFIG, VOCAB, losses, make_rows, train

from openchameleon.cli.main import main
from openchameleon.data.loader import Batch, RowLoader
from openchameleon.errors import Diverged, UserError
from openchameleon.train.guard import Guard, GuardConfig, StepLeftOut
from openchameleon.train.metrics import read_metrics
from openchameleon.train.rewind import rewind

SIX = GuardConfig(sigmas=6.0, window=32, least=16)


def guard_after(n: int, config: GuardConfig = SIX) -> Guard:
    """A guard that has seen `n` steps of a calm run."""
    guard, rng = Guard(config), random.Random(0)
    for _ in range(n):
        guard.judge(rng.gauss(3.0, 0.1), rng.gauss(1.0, 0.05))
    return guard


def test_a_calm_run_is_left_alone() -> None:
    assert guard_after(2000).outlying == 0


@pytest.mark.parametrize(("loss", "norm"), [(9.0, 1.0), (3.0, 50.0)])
def test_a_spike_is_left_out_and_does_not_hide_the_next(loss: float, norm: float) -> None:
    guard = guard_after(100)
    before = guard.state()
    for n in range(1, 4):
        with pytest.raises(StepLeftOut, match=r"6 deviations over the mean of 32 steps"):
            guard.judge(loss, norm)
        assert guard.outlying == n
    assert guard.state()["losses"] == before["losses"]
    guard.judge(3.0, 1.0)
    assert guard.outlying == 0


def test_nothing_is_judged_before_enough_was_seen_or_without_a_wish() -> None:
    guard_after(15).judge(100.0, 100.0)
    guard_after(100, GuardConfig()).judge(100.0, 100.0)


def test_a_number_that_is_not_finite_leaves_no_trace_in_the_window() -> None:
    guard = guard_after(100)
    with pytest.raises(StepLeftOut, match="loss nan"):
        guard.judge(float("nan"), 1.0)
    with pytest.raises(StepLeftOut, match="deviations"):
        guard.judge(9.0, 1.0)
    guard.judge(3.0, 1.0)


def test_a_level_that_stays_ends_the_run() -> None:
    guard = guard_after(100)
    for _ in range(5):
        guard.end_if_hopeless(7)
        with pytest.raises(StepLeftOut):
            guard.judge(9.0, 1.0)
    with pytest.raises(Diverged, match=r"5 steps in a row .* the last one 7"):
        guard.end_if_hopeless(7)


def test_a_guard_goes_on_from_its_state() -> None:
    guard = guard_after(100)
    again = Guard(SIX, json.loads(json.dumps(guard.state())))
    for one in (guard, again):
        with pytest.raises(StepLeftOut):
            one.judge(9.0, 1.0)
    assert guard.state() == again.state()


class Repeated(RowLoader):
    """At one step, rows of a single token over and over: a loss far outside of the others."""

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        batch = super().batch(step, rank, world)
        if step != 40:
            return batch
        rare = torch.full_like(batch.inputs, VOCAB.text_start + 15)
        return dataclasses.replace(batch, inputs=rare, targets=rare)


def test_a_batch_of_repeated_tokens_is_left_out_and_the_next_is_taken(tmp_path: Path) -> None:
    guard = GuardConfig(sigmas=10.0, window=32, least=32)
    config = dataclasses.replace(CONFIG, steps=60, guard=guard)
    rows = make_rows(tmp_path / "rows")
    train(tmp_path / "run", config, loader=Repeated({"all": (rows, 1.0)}, 4, seed=1))
    lines = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [line["step"] for line in lines if "outlying" in line] == [41]
    assert [line["step"] for line in lines] == list(range(1, 61))


def test_a_run_that_is_taken_back_repeats_its_steps_to_the_last_bit(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(run)
    before = losses(run)
    assert rewind(run, to=11, skip=0).name == "step-00000010"
    assert (run / "rewound-1/step-00000012/MANIFEST.json").is_file()
    train(run)
    assert losses(run) == before
    assert [line["step"] for line in read_metrics(run / "rewound-1/metrics.jsonl")][-1] == 12


def test_batches_that_are_skipped_teach_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train(run)
    assert main(["rewind", str(run), "--to", "10", "--skip", "1"]) == 0
    assert "goes on from step-00000010; the 1 batches after it" in capsys.readouterr().out
    train(run)
    lines = read_metrics(run / "metrics.jsonl")
    assert lines[10] == {"step": 11, "skipped": 1.0} or lines[10] == {"step": 11, "skipped": 1}
    assert "loss" in lines[11]


@pytest.mark.parametrize(
    ("to", "skip", "words"),
    [(3, 0, r"no checkpoint of 3 steps or fewer \(there: 12, 10\)"), (-1, 0, "negative")],
)
def test_a_step_that_cannot_be_gone_back_to_is_said(
    to: int, skip: int, words: str, tmp_path: Path
) -> None:
    train(tmp_path / "run")
    with pytest.raises(UserError, match=words):
        rewind(tmp_path / "run", to, skip)
    with pytest.raises(UserError, match="is no run"):
        rewind(tmp_path, 1, 0)
