"""Many processes learn what one does, from the same samples, and take up each other's runs."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from openchameleon.errors import CheckpointError, UserError
from openchameleon.train.checkpoint import latest_checkpoint, load_checkpoint

HERE = Path(__file__).resolve().parent

LAYOUTS: dict[str, dict[str, Any]] = {
    "alone": {"processes": 1},
    "shared": {"processes": 2},
    "divided": {"processes": 2, "parallel": {"tensor": 2}},
    "both": {"processes": 4, "parallel": {"tensor": 2}, "train": {"monitor_every": 4}},
    "in bfloat16": {"processes": 2, "train": {"dtype": "bfloat16"}},
    "watched alone": {"processes": 1, "train": {"monitor_every": 4}},
    "copied": {"processes": 4, "parallel": {"replicate": 2}},
    "in parts": {"processes": 2, "parallel": {"checkpoint_layers": True},
                 "train": {"micro_batch_size": 1}},
    "tied": {"processes": 4, "parallel": {"tensor": 2},
             "shape": {"tie_embeddings": True, "qk_norm_groups": 1, "n_kv_heads": 2}},
    "tied, alone": {"processes": 1,
                    "shape": {"tie_embeddings": True, "qk_norm_groups": 1, "n_kv_heads": 2}},
}  # fmt: skip
FLIPPED = {"a bit of a copy": {"replicate": 2}, "a bit beside divided layers": {"tensor": 2}}
RESUMED = {"1 to 2": (1, 2), "2 to 1": (2, 1), "2 to 4": (2, 4), "4 to 2": (4, 2)}


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("localhost", 0))
        port: int = server.getsockname()[1]
        return port


def run_jobs(
    folder: Path, jobs: dict[str, dict[str, Any]], timeout: int = 280
) -> dict[str, dict[str, Any]]:
    """Name -> what the job saw."""
    listed = []
    for name, job in jobs.items():
        listed.append(
            {"run": str(folder / name), "out": str(folder / f"{name}.json"),
             "port": free_port(), **job}
        )  # fmt: skip
    (folder / "jobs.json").write_text(json.dumps(listed))
    done = subprocess.run(
        [sys.executable, str(HERE / "processes.py"), str(folder / "jobs.json")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])},
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = {name: json.loads((folder / f"{name}.json").read_text()) for name in jobs}
    for name, job in seen.items():
        assert not job["failed"], f"{name}: {done.stderr[-3000:]}"
    return seen


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parallel")


@pytest.fixture(scope="module")
def seen(folder: Path) -> dict[str, dict[str, Any]]:
    """All runs of this file, in processes forked from one."""
    jobs = dict(LAYOUTS)
    two_by_two = {"processes": 4, "parallel": {"tensor": 2}}
    for n in (1, 2, 4):
        jobs[f"half of {n}"] = {**(two_by_two if n == 4 else {"processes": n}), "stop_at": 6}
    for name, (before, after) in RESUMED.items():
        layout = two_by_two if after == 4 else {"processes": after}
        jobs[name] = {**layout, "copy_of": str(folder / f"half of {before}")}
    flip = {"step": 5, "rank": 1, "name": "norm.weight"}
    for name, parallel in FLIPPED.items():
        jobs[name] = {"processes": 2, "parallel": parallel, "flip": flip}
    jobs["spoiled once"] = {"processes": 2, "spoiled": [3], "rank_spoiled": 1}
    jobs["spoiled"] = {"processes": 2, "spoiled": [5, 6, 7], "rank_spoiled": 1}
    return run_jobs(folder, jobs)


def losses(job: dict[str, Any]) -> list[float]:
    return [line["loss"] for line in job["lines"]]


def samples(job: dict[str, Any]) -> dict[str, list[Any]]:
    """Step -> the samples of all processes, in their order."""
    joined: dict[str, list[Any]] = {}
    for rank in job["ranks"]:
        for step, ids in rank["samples"].items():
            joined.setdefault(step, []).extend(ids)
    return joined


@pytest.mark.parametrize("name", ["shared", "divided", "both", "copied", "in parts"])
def test_many_processes_learn_what_one_does(name: str, seen: dict[str, dict[str, Any]]) -> None:
    assert len(losses(seen[name])) == 12
    assert losses(seen[name]) == pytest.approx(losses(seen["alone"]), rel=1e-5)
    for key in ("grad_norm", "text_loss", "code_loss", "log_z_max", "n_tokens"):
        ours, alone = ([line[key] for line in seen[n]["lines"]] for n in (name, "alone"))
        assert ours == pytest.approx(alone, rel=1e-4), key
    weights = [rank["weights"] for rank in seen[name]["ranks"]]
    assert all(w == weights[0] for w in weights), "the processes agree"
    alone = seen["alone"]["ranks"][0]["weights"]
    assert weights[0] == pytest.approx(alone, rel=1e-3, abs=1e-3)


def test_tied_tables_and_norms_of_one_group_are_learned_alike(seen: dict[str, Any]) -> None:
    assert losses(seen["tied"]) == pytest.approx(losses(seen["tied, alone"]), rel=1e-5)
    assert losses(seen["tied"]) != pytest.approx(losses(seen["alone"]), rel=1e-3)


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_goes_on_with_another_number_of_processes(name: str, seen: dict[str, Any]) -> None:
    assert losses(seen[name]) == pytest.approx(losses(seen["alone"]), rel=1e-5)
    whole = samples(seen["alone"])
    went_on = samples(seen[name])
    assert went_on == {step: whole[step] for step in map(str, range(6, 12))}


def test_every_number_of_processes_sees_the_same_samples(seen: dict[str, Any]) -> None:
    whole = samples(seen["alone"])
    for name in ("shared", "both", "copied", "in parts"):
        assert samples(seen[name]) == whole


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda file: file.write_bytes(flipped(file.read_bytes())), "differs from what was"),
        (lambda file: file.write_bytes(file.read_bytes()[:-5]), r"bytes, expected"),
        (lambda file: file.unlink(), "is missing"),
    ],
    ids=["a flipped bit", "a truncated part", "a missing part"],
)
def test_a_broken_part_is_named_and_the_checkpoint_before_is_used(
    spoil: Callable[[Path], object],
    message: str,
    seen: dict[str, Any],
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(folder / "half of 4/checkpoints", tmp_path / "checkpoints")
    assert latest_checkpoint(tmp_path / "checkpoints") == tmp_path / "checkpoints/step-00000006"
    part = max((tmp_path / "checkpoints/step-00000006/tensors").glob("*.distcp"))
    spoil(part)
    assert latest_checkpoint(tmp_path / "checkpoints") == tmp_path / "checkpoints/step-00000004"
    assert re.search(rf"tensors/{part.name} .*{message}", capsys.readouterr().err)


class Hostile:
    """A pickle that writes a file when it is read."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.target, "owned")


def test_an_index_that_was_exchanged_is_not_read(
    seen: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder / "half of 4/checkpoints", tmp_path / "checkpoints")
    newest = tmp_path / "checkpoints/step-00000006"
    (newest / "tensors/.metadata").write_bytes(pickle.dumps(Hostile(tmp_path / "owned")))
    assert latest_checkpoint(tmp_path / "checkpoints") == tmp_path / "checkpoints/step-00000004"
    with pytest.raises(UserError, match=r"tensors/\.metadata"):
        load_checkpoint(newest)
    with pytest.raises(CheckpointError, match=r"step-00000006 is a broken checkpoint: tensors/\.m"):
        latest_checkpoint(tmp_path / "checkpoints", strict=True)
    assert not (tmp_path / "owned").exists()


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def test_a_checkpoint_of_many_is_read_by_one_whole(seen: dict[str, Any], folder: Path) -> None:
    of_four, _ = load_checkpoint(folder / "half of 4/checkpoints/step-00000006")
    of_one, _ = load_checkpoint(folder / "half of 1/checkpoints/step-00000006")
    assert of_four.keys() == of_one.keys()
    for name, tensor in of_one.items():
        torch.testing.assert_close(of_four[name], tensor, rtol=1e-3, atol=1e-4)


def test_a_step_spoiled_on_one_process_is_taken_by_none(seen: dict[str, Any]) -> None:
    lines = seen["spoiled once"]["lines"]
    assert [line["step"] for line in lines if "not_finite" in line] == [4]
    assert lines[-1]["step"] == 12
    weights = [rank["weights"] for rank in seen["spoiled once"]["ranks"]]
    assert weights[0] == weights[1]
    assert all(value == value for value in weights[0].values())


def test_three_spoiled_steps_in_a_row_end_the_run_with_a_checkpoint(seen: dict[str, Any]) -> None:
    job = seen["spoiled"]
    assert [line["not_finite"] for line in job["lines"] if "not_finite" in line] == [1, 2, 3]
    for rank in job["ranks"]:
        assert "3 steps in a row were not finite" in rank["sentence"]
        assert "step-00000008" in rank["sentence"]


@pytest.mark.parametrize("name", FLIPPED)
def test_a_bit_that_flips_on_one_process_ends_the_run_and_is_named(
    name: str, seen: dict[str, Any]
) -> None:
    for rank in seen[name]["ranks"]:
        assert re.search(r"Processes 0 and 1 hold different numbers in \S+,", rank["sentence"])
        if name == "a bit of a copy":  # whose gradients are the mean of both copies' again
            assert "in norm.weight," in rank["sentence"]
    assert seen[name]["lines"][-1]["step"] == 5


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "steps"), [(1, 6000), (2, 2000)])
def test_a_run_killed_at_fifty_random_moments_ends_with_the_same_bits(
    processes: int, steps: int, tmp_path: Path
) -> None:
    """SIGKILL by the clock, wherever it strikes: in a step, a save, a log line, at the start."""
    rng = random.Random(0)
    job = {"processes": processes,
           "train": {"steps": steps, "save_every": 10, "log_every": 7}}  # fmt: skip
    kills = [rng.uniform(-1.0, 2.0) for _ in range(50)]
    seen = run_jobs(tmp_path, {"whole": job, "killed": {**job, "kills": kills}}, timeout=3000)
    where = seen["killed"]["kills"]
    saving = sum(kill["saving"] for kill in where)
    print(f"{processes} processes: stopped at {[k['step'] for k in where]}, {saving} while saving")
    assert len({kill["step"] for kill in where}) > 10, "the kills struck a run under way"
    assert saving > 0
    last = f"checkpoints/step-{steps:08}"
    whole, killed = (load_checkpoint(tmp_path / name / last)[0] for name in ("whole", "killed"))
    assert all(torch.equal(killed[name], tensor) for name, tensor in whole.items())
    for one in seen.values():
        for line in one["lines"]:
            line.pop("tokens_per_s")
    assert seen["killed"]["lines"] == seen["whole"]["lines"]


@pytest.mark.slow
def test_where_one_process_dies_the_others_end_and_the_same_command_goes_on(tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
        "-m", "openchameleon.cli.main", "train", "debug_cpu", "train.steps=400",
        "train.save_every=20", "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "out/run/metrics.jsonl"
    while not (log.exists() and len(log.read_text().splitlines()) > 40):
        time.sleep(0.1)
    worker = next(child for child in children_of(run.pid))
    os.kill(worker, signal.SIGKILL)
    killed_at = time.monotonic()
    _, errors = run.communicate(timeout=60)
    print(f"ended {time.monotonic() - killed_at:.1f} s after the kill")
    assert run.returncode
    assert "Signal 9 (SIGKILL)" in errors, "torchrun says which process was lost"
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=600)
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == list(range(1, 401))
    assert (tmp_path / "out/model/model.safetensors").is_file()


def children_of(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(stat.parent.name))
    return sorted(found)


def test_the_signs_of_divergence_are_those_of_one_process(seen: dict[str, Any]) -> None:
    both, alone = (seen[name]["lines"][3] for name in ("both", "watched alone"))
    for sign in ("update_norm", "layer/0/grad_norm", "layer/1/update_norm"):
        assert both[sign] == pytest.approx(alone[sign], rel=1e-3), sign
    assert both["output_norm"] == pytest.approx(alone["output_norm"], rel=0.2)  # of half the rows


def test_products_in_bfloat16_leave_positions_and_weights_in_float32(
    seen: dict[str, Any], folder: Path
) -> None:
    job = seen["in bfloat16"]
    assert job["ranks"][0]["types"] == ["torch.bfloat16", "torch.float32"]
    assert losses(job) == pytest.approx(losses(seen["alone"]), rel=0.02)
    assert losses(job) != pytest.approx(losses(seen["alone"]), rel=1e-5)
    tensors, _ = load_checkpoint(folder / "in bfloat16/checkpoints/step-00000012")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
