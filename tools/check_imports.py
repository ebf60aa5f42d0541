"""Holds the direction of imports: each part of the package names the parts it may import.

Imports inside functions and under TYPE_CHECKING count too. Run as `python tools/check_imports.py`;
prints one line a violation and exits with 1 if there is any.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "openchameleon"
ROOT = Path(__file__).resolve().parent.parent / "src" / PACKAGE

GROUND = {"config", "document", "errors", "files", "image_io", "preview", "progress", "vocab"}
TOKENIZER = GROUND | {"vqgan", "tokenizer"}
DATA = TOKENIZER | {"model", "data"}
CHECKPOINTS = TOKENIZER | {"model", "inference", "model_folder", "checkpoints"}
PIPELINE = DATA | CHECKPOINTS | {"pipeline"}
EVALUATION = PIPELINE | {"world", "evaluation"}
SERVE = PIPELINE | {"train", "serve", "__version__"}
RECIPES = EVALUATION | {"train", "recipes"}

ALLOWED: dict[str, set[str]] = {
    **dict.fromkeys(GROUND, GROUND),
    "vqgan": {"config", "errors", "vqgan"},
    "model": {"config", "errors", "model"},
    "world": GROUND | {"world"},
    "tokenizer": TOKENIZER,
    "data": DATA | {"world"},
    "inference": GROUND | {"model", "inference"},
    "train": DATA | {"train"},
    "checkpoints": CHECKPOINTS,
    "model_folder": GROUND | {"model", "inference"},
    "pipeline": PIPELINE,
    "evaluation": EVALUATION,
    "serve": SERVE,
    "recipes": RECIPES,
    "cli": RECIPES | {"serve", "cli", "__version__"},
    "__init__": PIPELINE,
}
"""Part of the package -> the parts it may import. A part is a sub-package or a top-level module."""

NO_TORCH = GROUND | {"world", "__init__"}
"""Parts that must stay cheap to import: no torch in them at all."""


def imported_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """`(line, dotted name)` of everything a module imports, at any depth of nesting."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import; write it in full"
            if node.module == PACKAGE:
                yield from ((node.lineno, f"{PACKAGE}.{alias.name}") for alias in node.names)
            elif node.module:
                yield node.lineno, node.module


def part_of(path: Path, root: Path) -> str:
    """The part a file belongs to: its sub-package, or its own name at the top."""
    relative = path.relative_to(root)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def violations(root: Path = ROOT) -> list[str]:
    """One line for each import that goes the wrong way, in the order of files."""
    found = []
    for path in sorted(root.rglob("*.py")):
        part = part_of(path, root)
        if part not in ALLOWED:
            found.append(f"{path}:1: {part!r} has no entry in tools/check_imports.py")
            continue
        for line, name in imported_names(ast.parse(path.read_text(encoding="utf-8"))):
            top, _, rest = name.partition(".")
            target = rest.split(".")[0]
            if top == PACKAGE and target not in ALLOWED[part]:
                found.append(f"{path}:{line}: {part} must not import {name}")
            elif top == "torch" and part in NO_TORCH:
                found.append(f"{path}:{line}: {part} must not import torch")
    return found


def main() -> int:
    found = violations()
    print("\n".join(found) if found else "imports: every one goes the right way")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
