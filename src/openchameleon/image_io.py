"""Any common picture file -> an upright RGB picture on white, or one sentence why not.

Pictures come from strangers: formats are an allow-list, size is judged from the header before any
pixel is decoded, and half a picture is refused instead of being filled with black.
"""

from __future__ import annotations

import base64
import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
import PIL.Image
from PIL import ImageCms, ImageOps

from openchameleon.errors import UserError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"})
"""How the names of picture files end, where a folder is searched for them."""
Fit = Literal["crop", "pad"]
MAX_BYTES = 128 << 20
MAX_PIXELS = 64 << 20
_MAX_ASPECT = 16


def open_image(
    source: str | Path | bytes, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES
) -> PIL.Image.Image:
    """A file or its bytes -> RGB: EXIF orientation applied, transparency on white, first frame.

    Sixteen-bit levels are scaled, and a colour profile is converted to sRGB. UserError, naming the
    file, for whatever is missing, too large, no picture, or damaged.
    """
    name = "The picture" if isinstance(source, bytes) else str(source)
    data = source if isinstance(source, bytes) else _read(Path(source), max_bytes)
    if not data:
        raise UserError(f"{name} is empty.")
    if len(data) > max_bytes:
        raise UserError(f"{name} is too large: over {max_bytes >> 20} MiB.")
    # Pillow warns of what is checked here (size) or does not matter to pixels (metadata).
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _decode(data, name, max_pixels)


def to_rgb(picture: PIL.Image.Image) -> PIL.Image.Image:
    """A picture of any mode as RGB in sRGB, transparent parts blended with white."""
    if picture.mode == "RGB" and not picture.info:
        return picture
    if picture.mode.startswith("I"):  # 16 bits a pixel; Pillow's own conversion clips at 255
        levels = np.asarray(picture).astype(np.float64).clip(0, 65535)
        picture = PIL.Image.fromarray((levels / 257).round().astype(np.uint8))
    profile = picture.info.get("icc_profile")
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        white = PIL.Image.new("RGBA", layer.size, "white")
        picture = PIL.Image.alpha_composite(white, layer).convert("RGB")
    if profile and picture.mode in ("RGB", "CMYK"):
        picture = _to_srgb(picture, profile)
    picture = picture.convert("RGB")
    picture.info = {}
    return picture


def square(
    picture: PIL.Image.Image, side: int, fit: Fit = "crop", floor: bool = False
) -> PIL.Image.Image:
    """An RGB picture as a square of `side` pixels (Lanczos).

    "crop": the shorter side becomes `side`, the middle of the longer one is kept, as the published
    inference does. "pad": the longer side becomes `side`, on a white square: the paper's rule for
    the pictures of fine-tuning prompts (section 3.2).
    floor: a longer side that is cropped is rounded down, as the model hub does, not to the nearest.
    """
    if fit == "pad":
        scale = side / max(picture.size)
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        padded = PIL.Image.new("RGB", (side, side), "white")
        at = ((side - size[0]) // 2, (side - size[1]) // 2)
        padded.paste(picture.resize(size, PIL.Image.Resampling.LANCZOS), at)
        return padded
    # A strip of one pixel would be enlarged to a side times its length: cut it down first.
    longest = min(picture.size) * _MAX_ASPECT
    picture = _centre_crop(picture, min(picture.width, longest), min(picture.height, longest))
    shorter, scale = min(picture.size), side / min(picture.size)
    size = (round(picture.width * scale), round(picture.height * scale))
    if floor:
        size = (picture.width * side // shorter, picture.height * side // shorter)
    return _centre_crop(picture.resize(size, PIL.Image.Resampling.LANCZOS), side, side)


def png_base64(picture: PIL.Image.Image) -> str:
    """A picture's PNG file in base64."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _centre_crop(picture: PIL.Image.Image, width: int, height: int) -> PIL.Image.Image:
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))


def _read(path: Path, max_bytes: int) -> bytes:
    try:
        if path.is_dir():
            raise UserError(f"{path} is a folder, not a picture.")
        if not path.exists():
            raise UserError(f"There is no picture {path}.")
        if not path.is_file():
            raise UserError(f"{path} is not a regular file.")
        with path.open("rb") as file:
            return file.read(max_bytes + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UserError(f"Cannot read the picture {str(path)!r}: {error}.") from error


def _decode(data: bytes, name: str, max_pixels: int) -> PIL.Image.Image:
    too_many = f"{name} is too large: over {max_pixels / 1e6:.0f} million pixels."
    try:
        picture = PIL.Image.open(io.BytesIO(data), formats=FORMATS)
    except PIL.Image.DecompressionBombError as error:
        raise UserError(too_many) from error
    except Exception as error:  # a decoder may raise anything on hostile bytes
        kinds = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        raise UserError(f"{name} is not a picture that can be read ({kinds}).") from error
    if picture.width * picture.height > max_pixels:
        raise UserError(too_many)
    if picture.format == "PNG" and not _png_has_all_rows(data):
        raise UserError(f"{name} is damaged: rows of the picture are missing.")
    try:
        picture.load()
        return to_rgb(_upright(picture))
    except Exception as error:
        raise UserError(f"{name} is damaged: it cannot be decoded.") from error


def _upright(picture: PIL.Image.Image) -> PIL.Image.Image:
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # broken metadata is no reason to refuse the pixels
        return picture


def _to_srgb(picture: PIL.Image.Image, profile: bytes) -> PIL.Image.Image:
    try:
        converted = ImageCms.profileToProfile(
            picture,
            ImageCms.ImageCmsProfile(io.BytesIO(profile)),
            ImageCms.createProfile("sRGB"),
            outputMode="RGB",
        )
    except (ImageCms.PyCMSError, OSError):  # a broken profile, or one of another colour space
        return picture
    assert converted is not None, "profileToProfile returns a picture unless told to work in place"
    return converted


# First column, first row, column step, row step of the seven passes of an interlaced PNG.
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2),
          (0, 1, 1, 2))  # fmt: skip
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}


def _png_has_all_rows(data: bytes) -> bool:
    """Whether the pixel data inflates to a byte for every pixel: Pillow fills the lack with black.

    Inflates in pieces that are thrown away, and no further than the header's size.
    """
    if data[12:16] != b"IHDR":
        return False
    width, height, depth, colour, _, _, interlace = struct.unpack(">IIBBBBB", data[16:29])
    bits = depth * _PNG_CHANNELS.get(colour, 0)
    passes = _ADAM7 if interlace else ((0, 0, 1, 1),)
    missing = 0
    for x, y, step_x, step_y in passes:
        columns, rows = -(-(width - x) // step_x), -(-(height - y) // step_y)
        if columns > 0 and rows > 0:
            missing += rows * (1 + (columns * bits + 7) // 8)
    inflater = zlib.decompressobj()
    for chunk in _png_pixel_chunks(data):
        while missing > 0 and chunk:
            try:
                missing -= len(inflater.decompress(chunk, 1 << 16))
            except zlib.error:
                return False
            chunk = inflater.unconsumed_tail
    if missing > 0:  # every byte is read, and the last of them may still stand for a short run
        missing -= len(inflater.flush())
    return missing <= 0


def _png_pixel_chunks(data: bytes) -> list[bytes]:
    """The contents of the IDAT chunks, as far as the file goes."""
    chunks, at = [], 8
    while at + 8 <= len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        if data[at + 4 : at + 8] == b"IDAT":
            chunks.append(data[at + 8 : at + 8 + size])
        at += 12 + size
    return chunks
