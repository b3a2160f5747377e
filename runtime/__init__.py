"""A ``.pte`` from Python: load it, ask it, check it against the eager model.

>>> from mvlm.runtime import MobileVLM
>>> model = MobileVLM("mobilevlm.pte")
>>> for piece in model.generate("photo.jpg", "What is in the picture?"):
...     print(piece, end="", flush=True)
"""

from mvlm.runtime.mobilevlm import MobileVLM
from mvlm.runtime.program import PteError, PteProgram

__all__ = ["MobileVLM", "PteError", "PteProgram"]
