"""What the benchmarks share: arguments, interleaved timing, JSON lines. Needs Linux's /proc."""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from timeit import timeit
from typing import Any

import torch

MATMUL_OPS = 2 * 1024**3
Run = Callable[[], object]


def parser(description: str | None) -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(description=description)
    arguments.add_argument("--out", type=Path, help="file that the JSON lines are appended to")
    arguments.add_argument("--quick", action="store_true", help="small and few: does it work?")
    return arguments


def medians(runs: Mapping[str, Run], repeats: int) -> dict[str, float]:
    """Median seconds of each, after one call to warm up. In turns: what disturbs, disturbs all."""
    turns = [{k: timeit(run, number=1) for k, run in runs.items()} for _ in range(repeats + 1)]
    return {name: statistics.median(turn[name] for turn in turns[1:]) for name in runs}


def matmul() -> Run:
    """A float32 product of MATMUL_OPS operations: what utilisation is measured against."""
    a, b = torch.rand(2, 1024, 1024)
    return lambda: a @ b


def once(run: Run) -> dict[str, float]:
    """One call: seconds of clock and of CPU time, and the most memory it adds, in GiB."""
    ctypes.CDLL(None).malloc_trim(0)  # what earlier calls left behind counts for none
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    kib, cpu = int(_proc("self/status", "VmRSS")), time.process_time()
    cost = {"seconds": timeit(run, number=1), "cpu_seconds": time.process_time() - cpu}
    return {**cost, "peak_gib": (int(_proc("self/status", "VmHWM")) - kib) / 2**20}


def report(bench: str, out: Path | None, sizes: Mapping[str, Any], **values: Any) -> None:
    """Prints one line, and appends it to `out`."""
    cpu = f"cpu: {_proc('cpuinfo', 'model name')}"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    where = {"device": device, "dtype": "float32"}
    line = {"bench": bench, **where, "threads": torch.get_num_threads(), "sizes": sizes, **values}
    # Both while it ran, where the line has its CPU time, and now.
    starved = "cpu_seconds" in values and values["cpu_seconds"] < 0.5 * values["seconds"]
    line |= {"loaded": starved or _loaded(), "git": _commit(), "torch": torch.__version__}
    text = json.dumps({k: float(f"{v:.4g}") if type(v) is float else v for k, v in line.items()})
    print(text, flush=True)
    if out is not None:
        with out.open("a", encoding="utf-8") as file:
            file.write(text + "\n")


def _loaded() -> bool:
    """Whether other work takes the cores: the threads of a product get less than their time."""
    product = matmul()
    cost = once(lambda: [product() for _ in range(5)])
    return cost["cpu_seconds"] < 0.85 * torch.get_num_threads() * cost["seconds"]


def _commit() -> str:
    """The commit that is checked out, by its file; changes that are not committed do not show."""
    git = Path(__file__).resolve().parent.parent / ".git"
    head = (git / "HEAD").read_text().strip() if git.is_dir() else "none"
    ref = git / head.removeprefix("ref: ")
    return (ref.read_text() if ref.is_file() else head)[:12]


def _proc(path: str, key: str) -> str:
    """The first value of `key` in a file of /proc, without its unit."""
    found = re.search(rf"^{key}\s*:\s*(.*?)( kB)?$", Path("/proc", path).read_text(), re.MULTILINE)
    return found[1] if found else ""
