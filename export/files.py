"""Writing files whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from mvlm.export.errors import ExportError


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Opens a temporary file beside ``path`` that takes its name when the block ends without an exception.

    Whatever goes wrong, a full disk or Ctrl-C included, ``path`` is left as it was and no temporary file stays.

    Raises:
        OSError: the folder cannot be written to, or the disk is full.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files private; a new file gets the rights that open() would have given it.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a write that fails does not say of which file
        raise


def check_writable(path: Path) -> None:
    """Checks, before minutes of work, that ``path`` can be written.

    Raises:
        ExportError: its folder does not exist or cannot be written to, or ``path`` is a folder.
    """
    if path.is_dir():
        raise ExportError(f"{path}: is a folder; give the name of a file in it")
    if not path.parent.is_dir():
        raise ExportError(f"{path}: there is no folder {path.parent}; make it first")
    if not os.access(path.parent, os.W_OK):
        raise ExportError(f"{path}: the folder {path.parent} cannot be written to")
