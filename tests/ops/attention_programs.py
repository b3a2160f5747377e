"""What the tests of the attention operators share: tiny programs of a module, run by the Python runtime."""

from __future__ import annotations

from collections.abc import Callable

import torch

import mvlm.ops


def export(module: torch.nn.Module, example: tuple[torch.Tensor, ...], max_tokens: int) -> bytes:
    """The .pte of a module whose first input has 1 to ``max_tokens`` tokens in dim 1."""
    from executorch.exir import (
        EdgeCompileConfig,
        ExecutorchBackendConfig,
        to_edge_transform_and_lower,
    )
    from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass

    tokens = torch.export.Dim("tokens", min=1, max=max_tokens)
    program = torch.export.export(module, example, dynamic_shapes=({1: tokens},) + (None,) * (len(example) - 1))
    lowered = to_edge_transform_and_lower(program, compile_config=EdgeCompileConfig(_check_ir_validity=False))
    config = ExecutorchBackendConfig(sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass())
    return lowered.to_executorch(config).buffer


def load(pte: bytes) -> Callable[..., list[torch.Tensor]]:
    """The forward method, on the Python runtime. Its caches start out undefined."""
    from executorch.runtime import Runtime

    mvlm.ops.load_native_library()
    program = Runtime.get().load_program(pte)
    method = program.load_method("forward")

    def forward(*inputs: torch.Tensor) -> list[torch.Tensor]:
        assert program is not None  # The method does not keep the program's bytes alive; we do.
        return [output.clone() for output in method.execute(inputs)]

    return forward
