"""What calibration has done so far, on disk, so that one that was interrupted goes on where it was."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mvlm.export.errors import ExportError
from mvlm.export.files import atomic_write

#: Tells whose work it is; what makes a folder one of ours.
FINGERPRINT = "fingerprint.txt"


class WorkFolder:
    """Tensors by name, in files that appear whole or not at all.

    Args:
        path: of the folder, which need not exist.
        fingerprint: of the work; what another work has left there is removed.

    Attributes:
        path: of the folder.
        is_resumed: whether it holds something of the same work.

    Raises:
        ExportError: there is something else in the folder.
        OSError: it cannot be made or written to.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path = path
        marker = path / FINGERPRINT
        if path.exists() and not marker.is_file() and (not path.is_dir() or any(path.iterdir())):
            raise ExportError(
                f"{path}: is in the way: calibration keeps its work there while it runs, and this was not made by it; "
                "move it, or choose another --pte-name"
            )
        if marker.is_file() and marker.read_text() != fingerprint:
            shutil.rmtree(path)
        self.is_resumed = marker.is_file()
        path.mkdir(exist_ok=True)
        if not self.is_resumed:
            with atomic_write(marker) as file:
                file.write(fingerprint.encode())

    def load(self, name: str) -> dict[str, Tensor] | None:
        """What was saved under a name; None if nothing was, or it is damaged."""
        path = self.path / f"{name}.safetensors"
        try:
            return load_file(path) if path.is_file() else None
        except (SafetensorError, OSError):
            return None

    def has(self, name: str) -> bool:
        return (self.path / f"{name}.safetensors").is_file()

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keeps tensors under a name, over what was there.

        Raises:
            OSError: the disk is full.
        """
        path = self.path / f"{name}.safetensors"
        temporary = path.with_suffix(".part")
        try:
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, temporary)
            temporary.replace(path)
        except SafetensorError as error:
            raise OSError(f"{path}: cannot be written: {error}") from error
        finally:
            temporary.unlink(missing_ok=True)

    def remove(self) -> None:
        """Removes the folder with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
