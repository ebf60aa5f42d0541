"""A model's folder as a server reads it: at its start, and anew while it serves."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from openchameleon.checkpoints.convert import require_as_written
from openchameleon.errors import UserError
from openchameleon.pipeline import Chameleon


@dataclass(frozen=True, slots=True)
class ServedFolder:
    """A folder, and how it is read; arguments as of `Chameleon.from_pretrained`."""

    folder: Path
    device: str | None = None
    dtype: str | None = None
    allow_pickle: bool = False
    compiled: bool = False

    def load(self) -> Chameleon:
        """The model. Errors as of `Chameleon.from_pretrained`."""
        return Chameleon.from_pretrained(
            self.folder, self.device, self.dtype, self.allow_pickle, self.compiled
        )

    def load_anew(self) -> Chameleon:
        """`load`, after the files were compared with the manifest, where `convert` has left one.

        UserError for clients to read: it names files, and not where they lie.
        """
        folder = self.folder.absolute()
        try:
            if not folder.is_dir():
                raise UserError("The model's folder is not there any more.")
            require_as_written(folder)
            return replace(self, folder=folder).load()
        except UserError as error:
            said = str(error)
            for place in (folder, *folder.parents[:-1]):  # Meta's releases have files beside it
                said = said.replace(f"{place}/", "").replace(str(place), "the folder")
            raise UserError(said) from error
