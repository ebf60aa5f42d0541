"""Checkpoints survive kills at every point of a save, full disks and broken files."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import stat
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from openchameleon.errors import UserError
from openchameleon.train import checkpoint
from openchameleon.train.checkpoint import (
    NoSpaceError,
    flatten_optimizer,
    latest_checkpoint,
    load_checkpoint,
    restore_optimizer,
    save_checkpoint,
)
from openchameleon.train.optim import OptimConfig, Optimizer, make_optimizer


def state(seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "float": torch.randn(7, 5, generator=g),
        "bfloat16": torch.randn(9, generator=g).bfloat16(),
        "int": torch.randint(0, 1 << 40, (3,), generator=g),
        "scalar": torch.randn((), generator=g),
        "bytes": torch.randint(0, 256, (11,), generator=g, dtype=torch.uint8),
        "empty": torch.zeros(0, 4),
        "special": torch.tensor([float("inf"), -0.0, 1e-45, float("nan")]),
    }


def bits(tensors: dict[str, Tensor]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {
        name: (str(t.dtype), tuple(t.shape), bytes(t.flatten().view(torch.uint8).tolist()))
        for name, t in tensors.items()
    }


def saved(folder: Path, *steps: int, keep: int = 9) -> list[Path]:
    return [save_checkpoint(folder, s, state(s), {"step": s}, keep) for s in steps]


def in_child(work: Callable[[], Any]) -> int:
    """Runs `work` in a forked process; its exit status as `os.waitpid` gives it."""
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            torch.set_num_threads(1)  # OpenMP's threads, once begun, do not survive a fork
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(pid, 0)[1]


def test_what_is_loaded_is_what_was_saved_bit_for_bit(tmp_path: Path) -> None:
    meta = {"step": 3, "loss": 0.1 + 0.2, "name": "\u00e9", "nested": {"list": [1, None]}}
    path = save_checkpoint(tmp_path, 3, state(0), meta)
    tensors, loaded = load_checkpoint(path)
    assert bits(tensors) == bits(state(0))
    assert loaded == meta


def test_tensors_that_share_memory_and_views_are_saved_each_whole(tmp_path: Path) -> None:
    weight = torch.arange(12.0).reshape(3, 4)
    tensors = {"a": weight, "tied": weight, "row": weight[1], "transposed": weight.T}
    loaded, _ = load_checkpoint(save_checkpoint(tmp_path, 1, tensors, {}))
    assert bits(loaded) == bits(tensors)


def test_file_modes_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        path = saved(tmp_path, 1)[0]
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o640}


def test_only_the_newest_are_kept_and_the_newest_is_found(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 10, 9999, 123456789, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00009999", "step-123456789"]
    assert latest_checkpoint(tmp_path) == tmp_path / "step-123456789"


def test_no_folder_and_no_checkpoint_are_none(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "absent") is None
    assert latest_checkpoint(tmp_path) is None


def test_a_whole_checkpoint_is_never_written_over(tmp_path: Path) -> None:
    saved(tmp_path, 5)
    with pytest.raises(FileExistsError, match="step-00000005"):
        save_checkpoint(tmp_path, 5, state(6), {})
    assert bits(load_checkpoint(tmp_path / "step-00000005")[0]) == bits(state(5))


def flip_a_bit(path: Path) -> None:
    data = bytearray((path / "tensors.safetensors").read_bytes())
    data[-1] ^= 4
    (path / "tensors.safetensors").write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path / "tensors.safetensors", 100)


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "flipped bit": (flip_a_bit, "tensors.safetensors differs"),
    "truncated": (truncate, r"tensors.safetensors has 100 bytes, expected \d{3}"),
    "missing": (lambda p: (p / "tensors.safetensors").unlink(), "tensors.safetensors is missing"),
    "meta": (lambda p: (p / "meta.json").write_text("{}"), "meta.json has 2 bytes, expected"),
    "no manifest": (lambda p: (p / "MANIFEST.json").unlink(), "MANIFEST.json is missing"),
    "half manifest": (
        lambda p: os.truncate(p / "MANIFEST.json", 30),
        "MANIFEST.json is not a manifest",
    ),
    "future": (
        lambda p: (p / "MANIFEST.json").write_text('{"format": 99}'),
        "MANIFEST.json has format 99",
    ),
    "emptied": (lambda p: [f.unlink() for f in p.iterdir()] and None, "MANIFEST.json is missing"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_broken_checkpoint_is_named_and_the_one_before_used(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, broken = saved(tmp_path, 100, 200)
    break_it, message = DAMAGE[damage]
    break_it(broken)
    assert latest_checkpoint(tmp_path) == good
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert str(broken) in lines[0]
    with pytest.raises(UserError, match=message) as refusal:
        load_checkpoint(broken)
    assert str(refusal.value).split(": ", 1)[1].rstrip(".") in lines[0]


def test_a_broken_checkpoint_gives_way_to_a_new_one_of_its_step(tmp_path: Path) -> None:
    _, broken = saved(tmp_path, 100, 200)
    flip_a_bit(broken)
    assert saved(tmp_path, 200) == [broken]
    assert latest_checkpoint(tmp_path) == broken


def test_starting_over_is_not_silent_when_every_checkpoint_is_broken(tmp_path: Path) -> None:
    for path in saved(tmp_path, 1, 2):
        flip_a_bit(path)
    with pytest.raises(UserError, match="None of the 2 checkpoints"):
        latest_checkpoint(tmp_path)


def kill_at(n: int) -> None:
    """SIGKILLs this process right before or after its n-th change of the disk."""
    calls = 0

    def point() -> None:
        nonlocal calls
        calls += 1
        if calls == n:
            os.kill(os.getpid(), signal.SIGKILL)

    def wrap(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            point()
            result = original(*args, **kwargs)
            point()
            return result

        setattr(owner, name, wrapped)

    for owner, name in [(os, "fsync"), (checkpoint, "save_file"), (os, "unlink"), (os, "rmdir")]:
        wrap(owner, name)
    for name in ("rename", "mkdir", "write_text", "chmod"):
        wrap(Path, name)


def test_a_kill_at_any_point_of_a_save_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    n_killed = 0
    while True:
        folder = tmp_path / str(n_killed)
        saved(folder, 1, 2, keep=2)

        def killed_save(folder: Path = folder, n: int = n_killed + 1) -> None:
            kill_at(n)
            saved(folder, 3, keep=2)

        status = in_child(killed_save)
        found = latest_checkpoint(folder)
        assert found is not None
        step = int(found.name[-1])
        assert step in (2, 3)
        assert bits(load_checkpoint(found)[0]) == bits(state(step))
        saved(folder, 4, keep=2)
        assert not list(folder.glob("*.tmp-*"))
        assert len(list(folder.iterdir())) == 2
        shutil.rmtree(folder)
        if status == 0:
            break
        assert status == signal.SIGKILL
        n_killed += 1
    assert n_killed > 25  # the points really were inside the save


def test_a_full_disk_is_one_sentence_and_leaves_nothing_behind(tmp_path: Path) -> None:
    good = saved(tmp_path, 1)[0]

    def save_with_small_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        with pytest.raises(NoSpaceError, match=r"No space .* needed 0.5 MB, had"):
            save_checkpoint(tmp_path, 2, {"x": torch.zeros(100_000)}, {})

    assert in_child(save_with_small_files) == 0
    assert list(tmp_path.iterdir()) == [good]
    assert latest_checkpoint(tmp_path) == good


def test_a_disk_known_to_be_too_small_is_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(NoSpaceError, match=r"needed 0\.0 MB"):
        saved(tmp_path, 1)
    assert list(tmp_path.iterdir()) == []


def test_another_error_of_the_disk_is_not_called_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken_disk(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken_disk)
    with pytest.raises(OSError, match="Input/output error"):
        saved(tmp_path, 1)
    assert list(tmp_path.iterdir()) == []


def test_files_are_tensors_and_json_only(tmp_path: Path) -> None:
    path = saved(tmp_path, 1)[0]
    names = sorted(p.name for p in path.iterdir())
    assert names == ["MANIFEST.json", "meta.json", "tensors.safetensors"]
    assert json.loads((path / "MANIFEST.json").read_text())["files"].keys() == set(names[1:])


@pytest.mark.parametrize(
    ("matrices", "state"), [("adamw", "0.weight.exp_avg"), ("muon", "0.weight.momentum_buffer")]
)
def test_a_restored_optimizer_goes_on_bit_for_bit(
    tmp_path: Path, matrices: Literal["adamw", "muon"], state: str
) -> None:
    def make() -> tuple[nn.Module, Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        return model, make_optimizer(model, OptimConfig(lr=0.1, matrices=matrices))

    def steps(model: nn.Module, optimizer: Optimizer, seeds: range) -> None:
        for seed in seeds:
            x = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()

    model, optimizer = make()
    steps(model, optimizer, range(3))
    tensors = dict(model.state_dict()) | flatten_optimizer(optimizer, model, "optimizer/")
    loaded, _ = load_checkpoint(save_checkpoint(tmp_path, 3, tensors, {}))
    steps(model, optimizer, range(3, 6))

    resumed, its_optimizer = make()
    resumed.load_state_dict({k: loaded[k] for k in resumed.state_dict()})
    restore_optimizer(its_optimizer, resumed, loaded, "optimizer/")
    steps(resumed, its_optimizer, range(3, 6))
    assert bits(dict(resumed.state_dict())) == bits(dict(model.state_dict()))
    expected = flatten_optimizer(optimizer, model, "")
    assert bits(flatten_optimizer(its_optimizer, resumed, "")) == bits(expected)
    assert state in expected
    assert any(key.endswith(".exp_avg") for key in expected)


def test_an_optimizer_of_fewer_parameters_is_refused() -> None:
    model = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match="no parameter 'bias'"):
        restore_optimizer(optimizer, model, {"o/bias.step": torch.tensor(1.0)}, "o/")
