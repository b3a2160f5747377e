"""Says beside each delegate of one dynamically quantized linear what it computes.

XNNPACK does not look at it. A runner that has faster kernels for the CPU it is on (``ops/linear_backend.h``) reads it
there, and need not know how XNNPACK describes its graphs.
"""

from __future__ import annotations

import torch
from executorch.exir.backend.compile_spec_schema import CompileSpec
from executorch.exir.delegate import executorch_call_delegate
from executorch.exir.lowered_backend_module import LoweredBackendModule
from torch import Tensor
from torch.export import ExportedProgram

#: Key of the compile spec; ``ops/linear_backend.cpp`` has the other end.
LINEAR_SPEC = "mvlm_linear"


def linear_spec(delegate: LoweredBackendModule, in_features: int, out_features: int) -> CompileSpec | None:
    """``in out group weight scales bias`` of a delegate's linear, the last three as keys of named data.

    ``group`` is the number of 4-bit weights that share a scale, 0 for 8-bit weights with a scale per output channel;
    ``bias`` is ``-`` where there is none. None for a delegate that is no such linear.
    """
    operators = [node for node in delegate.original_module.graph.nodes if node.op == "call_function"]
    linears = [node for node in operators if node.target.__name__.startswith(("linear", "aten.linear"))]
    stored = delegate.named_data_store_output
    if len(linears) != 1 or stored is None:
        return None
    sizes = {key: len(stored.buffers[entry.buffer_index]) for key, entry in stored.pte_data.items()}
    scales = [key for key in sizes if key.startswith("scale_")]
    if len(scales) != 1:
        return None
    count = in_features * out_features
    weights = [key for key in sizes if key not in scales and sizes[key] in (count, count // 2)]
    biases = [key for key in sizes if key not in scales and sizes[key] == 4 * out_features and key not in weights]
    if len(weights) != 1 or len(weights) + len(biases) + 1 != len(sizes):
        return None
    group = 0
    if sizes[weights[0]] == count // 2:
        groups_per_row = sizes[scales[0]] // 2 // out_features  # bfloat16
        if groups_per_row == 0 or in_features % groups_per_row:
            return None
        group = in_features // groups_per_row
    elif sizes[scales[0]] != 4 * out_features:
        return None
    text = f"{in_features} {out_features} {group} {weights[0]} {scales[0]} {biases[0] if biases else '-'}"
    return CompileSpec(LINEAR_SPEC, text.encode())


def describe_linears(program: ExportedProgram) -> int:
    """Adds :func:`linear_spec` to every delegate of a lowered program that is such a linear; returns how many are."""
    count = 0
    for node in program.graph.nodes:
        if node.target is not executorch_call_delegate:
            continue
        delegate = getattr(program.graph_module, node.args[0].target)
        values = [argument.meta["val"] for argument in node.args[1:]]
        outputs = node.meta["val"]
        if len(values) != 1 or len(outputs) != 1 or not isinstance(values[0], Tensor):
            continue
        if values[0].dtype != torch.float32 or outputs[0].dtype != torch.float32:
            continue
        spec = linear_spec(delegate, values[0].shape[-1], outputs[0].shape[-1])
        if spec is not None:
            delegate._compile_specs = [*delegate.compile_specs, spec]
            count += 1
    return count
