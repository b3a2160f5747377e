"""A ``.pte`` from Python: load it, ask it, check it against the eager model.

>>> from mvlm.runtime import MobileVLM
>>> model = MobileVLM("mobilevlm.pte")
>>> for piece in model.generate("photo.jpg", "What is in the picture?"):
...     print(piece, end="", flush=True)
>>> chat = model.chat()
>>> chat.answer("What is in the picture?", "photo.jpg")
>>> chat.answer("And where is it?")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mvlm.runtime.chat import Chat
    from mvlm.runtime.mobilevlm import MobileVLM
    from mvlm.runtime.program import PteError, PteProgram

__all__ = ["Chat", "MobileVLM", "PteError", "PteProgram"]

_MODULE_OF = {"Chat": "chat", "MobileVLM": "mobilevlm", "PteError": "program", "PteProgram": "program"}


def __getattr__(name: str) -> Any:
    # On first use, so that the programs in this package answer --help without loading torch and ExecuTorch.
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
