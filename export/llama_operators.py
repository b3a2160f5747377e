"""ExecuTorch's operators for language models, ``llama::*``: its wheel has them in a library that is loaded on demand.

The library registers them with PyTorch, for an export, and their kernels with ExecuTorch's Python runtime. It imports
much of PyTorch's compiler, so it is loaded only for a file that has such operators.
"""

from __future__ import annotations

import importlib

from mvlm.export.errors import ExportError

#: Operators that a file exported with them has.
LLAMA_OPERATORS = ("llama::update_cache", "llama::custom_sdpa")


def load_llama_operators() -> None:
    """Loads them; later calls do nothing.

    Raises:
        ExportError: this build of ExecuTorch does not have them.
    """
    try:
        importlib.import_module("executorch.extension.llm.custom_ops.custom_ops")
    except (ImportError, OSError, AssertionError) as error:
        raise ExportError(
            "ExecuTorch's operators for language models (executorch.extension.llm.custom_ops) cannot be loaded: "
            f"{error or type(error).__name__}; install executorch from PyPI in the version that pyproject.toml names"
        ) from error
