"""A model over several processes writes what one process writes, and they stay in step."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tensor_processes
import torch
from test_parallel import children_of, free_port

from openchameleon.cli.main import main
from openchameleon.errors import UserError
from openchameleon.model.config import ModelConfig
from openchameleon.model.transformer import Transformer
from openchameleon.pipeline import Chameleon
from openchameleon.train.parallel import require_divisible

HERE = Path(__file__).resolve().parent

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {"n_heads": 4, "n_kv_heads": 4},
    "grouped": {"n_heads": 8, "n_kv_heads": 4, "qk_norm_groups": 2, "norm_placement": "output"},
    "tied": {"n_heads": 4, "n_kv_heads": 2, "tie_embeddings": True, "qk_norm": False},
}
JOBS: dict[str, dict[str, Any]] = {
    "plain by 2": {"shape": "plain", "processes": 2, "does": "answers"},
    "grouped by 2": {"shape": "grouped", "processes": 2, "does": "answers"},
    "grouped by 4": {"shape": "grouped", "processes": 4, "does": "answers"},
    "tied by 2": {"shape": "tied", "processes": 2, "does": "answers"},
    "alone": {"shape": "plain", "processes": 1, "does": "answers"},
    "aborted": {"shape": "grouped", "processes": 2, "does": "aborted"},
    "streamed": {"shape": "plain", "processes": 2, "does": "streamed"},
    "refused": {"shape": "plain", "processes": 2, "does": "refused"},
    "fails": {"shape": "plain", "processes": 2, "does": "fails"},
    "differs": {"shape": "plain", "processes": 2, "does": "differs"},
    "tied by 4": {"shape": "tied", "processes": 4, "does": "answers"},
}


@pytest.fixture(scope="module")
def folders(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model folders of the tiny model's tokenizers, one for each shape."""
    tiny = Chameleon.from_pretrained(model_folder)
    made = {}
    for name, shape in SHAPES.items():
        config: ModelConfig = replace(tiny.config.model, dim=64, **shape)
        model = Transformer(config)
        model.init_weights(seed=1)
        numbers = torch.Generator().manual_seed(1)
        for parameter in model.parameters():  # so that no two heads have the same norm
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=numbers)
        made[name] = tmp_path_factory.mktemp("divided") / name
        Chameleon(replace(tiny.config, model=config), model, tiny.tokenizer).save(made[name])
    return made


@pytest.fixture(scope="module")
def seen(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Job -> what it saw, and how each of its processes ended; all forked from one."""
    out = tmp_path_factory.mktemp("seen")
    listed = [
        {**job, "model": str(folders[job["shape"]]), "out": str(out / name), "port": free_port()}
        for name, job in JOBS.items()
    ]
    (out / "jobs.json").write_text(json.dumps(listed))
    done = subprocess.run(
        [sys.executable, str(HERE / "tensor_processes.py"), str(out / "jobs.json")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])},
        capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = {}
    for name, job in JOBS.items():
        ends = [Path(f"{out / name}.{rank}") for rank in range(job["processes"])]
        assert all(end.exists() for end in ends), f"{name}: {done.stderr[-3000:]}"
        saw = json.loads((out / name).read_text()) if (out / name).exists() else {}
        found[name] = {**saw, "ends": [end.read_text() for end in ends]}
    return found


@pytest.fixture(scope="module")
def alone(folders: dict[str, Path]) -> dict[str, list[list[int]]]:
    """Shape -> what one process writes."""
    return {
        name: tensor_processes.answers(Chameleon.from_pretrained(folder, device="cpu"))
        for name, folder in folders.items()
    }


@pytest.mark.parametrize("job", ["plain by 2", "grouped by 2", "grouped by 4", "tied by 2",
                                 "alone"])  # fmt: skip
def test_many_processes_write_what_one_does(
    job: str, seen: dict[str, Any], alone: dict[str, list[list[int]]]
) -> None:
    assert seen[job]["saw"] == alone[JOBS[job]["shape"]]
    assert sum(map(len, seen[job]["saw"])) > 60, "they wrote something"
    assert set(seen[job]["ends"]) == {""}


def test_no_process_holds_more_than_its_part_of_the_layers(
    seen: dict[str, Any], folders: dict[str, Path]
) -> None:
    model = Chameleon.from_pretrained(folders["plain"], device="cpu").model
    divided = sum(
        p.numel()
        for name, p in model.named_parameters()
        if name.startswith("layers.") and "norm" not in name
    )
    whole = sum(p.numel() for p in model.parameters())
    assert seen["plain by 2"]["held"] == whole - divided // 2
    assert seen["alone"]["held"] == whole


def test_requests_that_come_and_go_between_steps_leave_the_processes_in_step(
    seen: dict[str, Any], alone: dict[str, list[list[int]]]
) -> None:
    assert seen["aborted"]["saw"] == alone["grouped"]
    assert seen["aborted"]["ends"] == ["", ""]


def test_a_divided_model_reads_and_writes_documents(seen: dict[str, Any]) -> None:
    assert seen["streamed"]["saw"] == ["ImageProgress"] * 5 + ["ImageDone"]


def test_a_request_that_cannot_be_is_refused_by_the_first_process_alone(
    seen: dict[str, Any], alone: dict[str, list[list[int]]]
) -> None:
    sentence, after = seen["refused"]["saw"]
    assert "The prompt is empty" in sentence
    assert after == alone["plain"]


def test_after_a_step_that_failed_nothing_is_begun(seen: dict[str, Any]) -> None:
    first, second = seen["fails"]["saw"]
    assert first == "MemoryError: no memory"
    assert "RuntimeError: A step has failed" in second
    assert seen["fails"]["ends"][0] == ""
    assert seen["fails"]["ends"][1], "the other one ends too, with an error"


def test_a_process_that_draws_other_tokens_says_so_and_ends(seen: dict[str, Any]) -> None:
    assert "Process 1 draws other tokens than process 0" in seen["differs"]["ends"][1]


def test_processes_that_cannot_divide_the_layers_are_refused(seen: dict[str, Any]) -> None:
    sentence = "UserError: 4 processes cannot divide a layer: n_kv_heads = 2."
    assert seen["tied by 4"]["ends"] == [sentence] * 4
    shape = {"dim": 64, "n_layers": 1, "vocab_size": 64, "max_seq_len": 8, "ffn_dim": 60}
    config = ModelConfig(n_heads=4, n_kv_heads=4, **shape)
    require_divisible(config, 4)
    with pytest.raises(UserError, match="n_heads = 4"):
        require_divisible(config, 3)
    groups = ModelConfig(n_heads=12, n_kv_heads=12, qk_norm_groups=4, **{**shape, "dim": 96})
    with pytest.raises(UserError, match="qk_norm_groups = 4"):
        require_divisible(groups, 6)


# started from one command


def program(*arguments: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "openchameleon.cli.main", *arguments]
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


def test_one_command_converses_with_a_divided_model_and_leaves_no_process(
    folders: dict[str, Path],
) -> None:
    options = ("--mode", "text", "--temperature", "0", "--max-tokens", "6", "--json")
    run = program("chat", "--model", str(folders["plain"]), "--tensor", "2", *options)
    assert run.stdin is not None
    assert run.stdout is not None
    run.stdin.write("a cat\n")
    run.stdin.flush()
    first = json.loads(run.stdout.readline())
    (other,) = children_of(run.pid)
    out, err = run.communicate("a dog\n", timeout=60)
    assert run.returncode == 0, err
    model = Chameleon.from_pretrained(folders["plain"], device="cpu")
    said = model.generate("a cat", mode="text", temperature=0, max_tokens=6).text
    assert first["segments"] == [{"text": said}]
    assert out.count("segments") == 1
    assert not Path(f"/proc/{other}").exists()


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["first", "other"])
def test_where_one_process_is_killed_the_other_ends(lost: str, folders: dict[str, Path]) -> None:
    run = program("chat", "--model", str(folders["plain"]), "--tensor", "2", "--json")
    assert run.stdin is not None
    assert run.stdout is not None
    run.stdin.write("a cat\n")
    run.stdin.flush()
    run.stdout.readline()
    (other,) = children_of(run.pid)
    os.kill(run.pid if lost == "first" else other, signal.SIGKILL)
    code = run.wait(30)  # the input stays open: nothing but the loss ends it
    _, err = run.communicate()
    if lost == "other":
        assert code == 1
        assert "process 1 of 2 has ended with code -9, and the others cannot go on" in err
    end = time.monotonic() + 20
    while Path(f"/proc/{other}/cwd").exists():  # a zombie has none
        assert time.monotonic() < end, "the other process is still there"
        time.sleep(0.1)


def test_a_number_of_processes_that_cannot_be_is_refused(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for number, words in (("0", "at least one"), ("3", "cannot divide a layer: n_heads = 4")):
        assert main(["generate", "a", "--model", str(folders["plain"]), "--tensor", number]) == 2
        assert words in capsys.readouterr().err
