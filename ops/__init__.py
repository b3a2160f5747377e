"""Custom operators of mvlm: schema and eager reference in Python, kernel in C++.

Importing this package registers the operators with PyTorch, under ``torch.ops.mvlm``. Running an
exported program that uses them from Python also needs the kernels:

>>> import mvlm.ops
>>> mvlm.ops.load_native_library()  # before executorch.runtime loads such a program

This package knows nothing of models, exporting or the .pte file.
"""

from .activation import quick_gelu, swiglu
from .attention import attention
from .definition import References
from .depthwise_conv2d import depthwise_conv2d
from .native import load_native_library, native_library_path
from .norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from .sdpa_with_kv_cache import sdpa_with_int8_kv_cache, sdpa_with_kv_cache

__all__ = [
    "References",
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "depthwise_conv2d",
    "layer_norm",
    "load_native_library",
    "native_library_path",
    "quick_gelu",
    "rms_norm",
    "sdpa_with_int8_kv_cache",
    "sdpa_with_kv_cache",
    "swiglu",
]
