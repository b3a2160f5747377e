"""Custom operators of mvlm: schema and eager reference in Python, kernel in C++.

Importing this package registers the operators with PyTorch, under ``torch.ops.mvlm``. Running an
exported program that uses them from Python also needs the kernels:

>>> import mvlm.ops
>>> mvlm.ops.load_native_library()  # before executorch.runtime loads such a program

This package knows nothing of models, exporting or the .pte file.
"""

from .native import load_native_library, native_library_path
from .sdpa_with_kv_cache import sdpa_with_kv_cache

__all__ = ["load_native_library", "native_library_path", "sdpa_with_kv_cache"]
