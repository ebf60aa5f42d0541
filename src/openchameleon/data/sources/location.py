"""Where sources lie: paths of this machine, and whatever fsspec opens by an address with "://"."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from openchameleon.errors import UserError
from openchameleon.image_io import MAX_BYTES, open_image

if TYPE_CHECKING:
    import PIL.Image

VERSIONS = ("ETag", "etag", "md5Hash", "LastModified", "mtime")
"""What file systems call that which changes with a file's content."""


def is_remote(location: str) -> bool:
    return "://" in location


def opened(location: str) -> BinaryIO:
    """A file to read bytes from, in order."""
    if not is_remote(location):
        return Path(location).open("rb")
    files, path = _remote(location)
    return cast(BinaryIO, files.open(path, "rb"))


def beside(location: str, name: str) -> str:
    """The file `name` relative to the folder that `location`, a file, is in."""
    if not is_remote(location):
        return str(Path(location).parent / name)
    if is_remote(name):
        raise ValueError(f"{name!r} is no path: only files of the source itself are read")
    return f"{location.rpartition('/')[0]}/{name}"


def picture_at(location: str) -> PIL.Image.Image:
    """The picture of a file, as `open_image` gives it. UserError, naming the file."""
    if not is_remote(location):
        return open_image(location)
    with opened(location) as file:
        data = file.read(MAX_BYTES + 1)
    try:
        return open_image(data)
    except UserError as error:
        raise UserError(f"{location}: {error}") from error


def is_file(location: str) -> bool:
    if not is_remote(location):
        return Path(location).is_file()
    files, path = _remote(location)
    return bool(files.isfile(path))


def is_folder(location: str) -> bool:
    if not is_remote(location):
        return Path(location).is_dir()
    files, path = _remote(location)
    return bool(files.isdir(path))


def names_below(folder: str) -> list[str]:
    """The files under a folder, relative to it, in the order of their paths; none that is hidden.

    Hidden is what begins with a dot, or lies in a folder that does.
    """
    if not is_remote(folder):
        found = [p.relative_to(folder).as_posix() for p in Path(folder).rglob("*") if p.is_file()]
    else:
        files, root = _remote(folder)
        found = [name.removeprefix(root).lstrip("/") for name in files.find(root)]
    parts = sorted(name.split("/") for name in found)
    return ["/".join(p) for p in parts if not any(part.startswith(".") for part in p)]


def stamp(location: str) -> list[object]:
    """Size, and time or version, of a file: changes with what is in it. Empty: there is none."""
    try:
        if not is_remote(location):
            stat = Path(location).stat()
            return [stat.st_size, stat.st_mtime_ns]
        files, path = _remote(location)
        info = files.info(path)
    except FileNotFoundError:
        return []
    version = next((info[k] for k in VERSIONS if k in info), None)
    return [info["size"], None if version is None else str(version)]


def _remote(location: str) -> tuple[Any, str]:
    """The file system of an address, and the path in it."""
    try:
        import fsspec
    except ImportError as error:
        raise UserError(
            f"To read {location}, install fsspec: pip install 'openchameleon[data]'."
        ) from error
    try:
        return fsspec.core.url_to_fs(location)
    except (ValueError, ImportError) as error:  # an unknown protocol, or one not installed
        raise UserError(f"{location} cannot be opened: {error}") from error
