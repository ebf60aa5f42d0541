"""Makes a library of a C file with the C compiler at hand, once for each source and CPU."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

OPTIMISED = ["-std=gnu11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fPIC"]
THIS_CPU = {"arm64": ["-mcpu=native"], "aarch64": ["-mcpu=native"]}
SECONDS = 120


class NotBuilt(Exception):
    """Why there is no library, in a sentence without its full stop."""


def load(source: Path) -> ctypes.CDLL:
    """The library of a C file: from the user's cache, else compiled now. NotBuilt says why not."""
    compiler = find_compiler()
    flags = [*OPTIMISED, *THIS_CPU.get(platform.machine(), ["-march=native"])]
    key = "\0".join([source.read_text(encoding="utf-8"), compiler, *flags, loaded_openmp(), cpu()])
    name = f"{source.stem}-{hashlib.sha256(key.encode()).hexdigest()[:20]}.so"
    try:
        folder = cache_folder()
        if not (folder / name).is_file():
            _compile(compiler, flags, source, folder / name)
        return ctypes.CDLL(str(folder / name))
    except OSError as error:
        raise NotBuilt(f"the library cannot be written or loaded ({error})") from error


def find_compiler() -> str:
    """The path of the C compiler: `CC`, else cc, gcc or clang. NotBuilt if there is none."""
    wished = os.environ.get("CC")
    for name in [wished] if wished else ["cc", "gcc", "clang"]:
        if path := shutil.which(name):
            return path
    raise NotBuilt(f"CC = {wished} is no program" if wished else "there is no C compiler")


def loaded_openmp() -> str:
    """The OpenMP library that PyTorch runs on, or "": of one library there is one pool of threads.

    With two, the threads of the one would wait busily for work on the cores of the other.
    """
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    paths = {line.split(maxsplit=5)[-1] for line in lines if "omp" in line}
    found = sorted(p for p in paths if re.fullmatch(r"lib(g|i)?omp\d?[-.].*", Path(p).name))
    return next((p for p in found if "torch" in p), found[0] if found else "")


def cpu() -> str:
    """What tells this kind of CPU from others: a home folder may be shared by several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()} {platform.node()}"
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def cache_folder() -> Path:
    """`openchameleon` in the user's folder of caches, made if need be. OSError if it cannot be."""
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "openchameleon"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def _compile(compiler: str, flags: list[str], source: Path, target: Path) -> None:
    """Writes `target` whole or not at all; whichever of several processes is last stays.

    With OpenMP, or without it where the compiler has none. NotBuilt says what the compiler said.
    """
    with tempfile.TemporaryDirectory(prefix="build-", dir=target.parent) as folder:
        made, unlinked = Path(folder) / target.name, Path(folder) / "unlinked.o"
        openmp = loaded_openmp()
        compiled = [compiler, *flags, "-fopenmp", "-c", str(source), "-o", str(unlinked)]
        # All names must be found now: another compiler's OpenMP has other ones than PyTorch's.
        linked = [compiler, "-shared", "-Wl,--no-undefined", str(unlinked), openmp, "-lm"]
        plain = [compiler, *flags, "-shared", str(source), "-lm", "-o", str(made)]
        if not openmp or _fault(compiled) or _fault([*linked, "-o", str(made)]):
            fault = _fault(plain)
            if fault:
                raise NotBuilt(fault)
        made.replace(target)


def _fault(command: list[str]) -> str:
    """Runs a command; "" if it went well, else what is wrong."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.SubprocessError) as error:
        return f"{command[0]} cannot be run ({error})"
    if done.returncode == 0:
        return ""
    lines = done.stderr.strip().splitlines() or ["it said nothing"]
    return f"{command[0]} ended with {done.returncode}: {lines[-1]}"
