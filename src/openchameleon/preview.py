"""A picture in the terminal: inline where the terminal can, else two pixels to a character."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, TextIO

from openchameleon.image_io import png_base64

if TYPE_CHECKING:
    import PIL.Image

Way = Literal["kitty", "iterm", "truecolor", "256"]

MAX_COLUMNS = 48
UPPER_HALF = "\u2580"


def preview(pil: PIL.Image.Image, stream: TextIO, env: Mapping[str, str] = os.environ) -> bool:
    """Draws an RGB picture on `stream` if it is a terminal that can; says whether it did."""
    way = way_of(stream, env)
    if way is None:
        return False
    columns = min(MAX_COLUMNS, shutil.get_terminal_size().columns)
    if way == "kitty":
        stream.write(_kitty(pil, columns))
    elif way == "iterm":
        stream.write(_iterm(pil, columns))
    else:
        stream.write(half_blocks(pil, columns, way))
    stream.flush()
    return True


def way_of(stream: TextIO, env: Mapping[str, str]) -> Way | None:
    """How `stream` can show a picture, from what the terminal says of itself; None: not at all."""
    if not stream.isatty() or env.get("NO_COLOR") or env.get("TERM", "dumb") == "dumb":
        return None
    if "TMUX" not in env and not env["TERM"].startswith("screen"):  # these drop inline pictures
        if "KITTY_WINDOW_ID" in env or "kitty" in env["TERM"]:
            return "kitty"
        if env.get("TERM_PROGRAM") in ("iTerm.app", "WezTerm"):
            return "iterm"
    if env.get("COLORTERM") in ("truecolor", "24bit"):
        return "truecolor"
    return "256" if "256color" in env["TERM"] else None


def half_blocks(pil: PIL.Image.Image, columns: int, way: Way) -> str:
    """Lines of upper half blocks: the ink shows one pixel, the paper the one below it."""
    rows = max(1, round(columns * pil.height / pil.width / 2))
    small = pil.convert("RGB").resize((columns, 2 * rows))
    colour = _truecolor if way == "truecolor" else _colour_of_256
    raw = small.tobytes()
    pixels = [(raw[i], raw[i + 1], raw[i + 2]) for i in range(0, len(raw), 3)]
    lines = []
    for top in range(0, 2 * rows * columns, 2 * columns):
        pairs = zip(pixels[top : top + columns], pixels[top + columns : top + 2 * columns],
                    strict=True)  # fmt: skip
        cells = (f"\x1b[38;{colour(a)}m\x1b[48;{colour(b)}m{UPPER_HALF}" for a, b in pairs)
        lines.append("".join(cells) + "\x1b[0m\n")
    return "".join(lines)


def _truecolor(rgb: tuple[int, int, int]) -> str:
    return "2;" + ";".join(map(str, rgb))


def _colour_of_256(rgb: tuple[int, int, int]) -> str:
    r, g, b = (round(value / 255 * 5) for value in rgb)
    return f"5;{16 + 36 * r + 6 * g + b}"


def _kitty(pil: PIL.Image.Image, columns: int) -> str:
    """Kitty's graphics protocol: the PNG in base64, in chunks of at most 4096 characters."""
    data = png_base64(pil)
    chunks = [data[i : i + 4096] for i in range(0, len(data), 4096)]
    out = []
    for i, chunk in enumerate(chunks):
        keys = f"a=T,f=100,c={columns}," if i == 0 else ""
        out.append(f"\x1b_G{keys}m={int(i < len(chunks) - 1)};{chunk}\x1b\\")
    return "".join(out) + "\n"


def _iterm(pil: PIL.Image.Image, columns: int) -> str:
    """iTerm2's inline images protocol."""
    return f"\x1b]1337;File=inline=1;width={columns}:{png_base64(pil)}\x07\n"
