"""Where a command writes: folders are made, and what is there already is never overwritten."""

from __future__ import annotations

from pathlib import Path

from openchameleon.errors import UserError


def make_folder(folder: Path) -> None:
    """UserError where the folder cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"Cannot write to {folder}: {error.strerror}.") from error


def refuse_existing(path: Path) -> None:
    """UserError where what is to be written is there already."""
    if path.exists():
        raise UserError(f"{path} exists already; remove it, or name another --out.")


def numbered_pictures(folder: Path) -> list[Path]:
    """image-1.png, image-2.png ... in a folder: pictures of an answer, and no others."""
    return sorted(p for p in folder.glob("image-*.png") if p.stem.removeprefix("image-").isdigit())
