"""Puts a trained model folder into the package, with the sha256 of each of its files.

python tools/embed.py runs/nano/model nano
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path

EMBEDDED = Path(__file__).resolve().parent.parent / "src" / "openchameleon" / "embedded"


def main(source: Path, name: str) -> None:
    if not (source / "config.json").is_file():
        sys.exit(f"{source} is no model folder.")
    target = EMBEDDED / name
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    files = sorted(p for p in target.rglob("*") if p.is_file())
    sums = {str(p.relative_to(target)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    (target / "sha256.json").write_text(json.dumps(sums, indent=1) + "\n")
    size = sum(p.stat().st_size for p in files)
    print(f"{target}: {len(files)} files, {size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
