"""Finds and loads libmvlm_ops.so, the ExecuTorch kernels of the custom operators.

The same library serves the C++ runner, which links it.
"""

from __future__ import annotations

import ctypes
import importlib
import sys
from pathlib import Path

_LIBRARY_NAME = "libmvlm_ops.dylib" if sys.platform == "darwin" else "libmvlm_ops.so"

# Kept for the life of the process: unloading it would leave the registry pointing nowhere.
_library: ctypes.CDLL | None = None


def native_library_path() -> Path:
    """Where the native library lies.

    An editable install keeps the Python files in the source tree and the library in
    site-packages, so every folder of the package's ``__path__`` is searched.

    Raises:
        FileNotFoundError: the library is in none of them.
    """
    folders = [Path(entry) for entry in sys.modules[__name__.rpartition(".")[0]].__path__]
    for folder in folders:
        candidate = folder / _LIBRARY_NAME
        if candidate.is_file():
            return candidate
    searched = ", ".join(str(folder) for folder in folders)
    raise FileNotFoundError(
        f"{_LIBRARY_NAME} was not found; searched {searched}. It is built and installed with the "
        "package: run `pip install .` (or `pip install -e .`) in the repository."
    )


def load_native_library() -> Path:
    """Registers the operators' kernels with ExecuTorch's Python runtime; later calls do nothing.

    Returns:
        The path of the loaded library.

    Raises:
        FileNotFoundError: see :func:`native_library_path`.
        ImportError: executorch is not installed.
        OSError: the library cannot be loaded, for example because one that it needs is missing.
    """
    global _library
    path = native_library_path()
    if _library is None:
        # The runtime must be in the process first: the library registers its kernels with the
        # libexecutorch.so that this import loads.
        importlib.import_module("executorch.runtime")
        _library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    return path
