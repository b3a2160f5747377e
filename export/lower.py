"""Lower: captured pieces of methods become edge programs whose heavy parts are XNNPACK delegates.

Two partitioners take turns on ``vision_encoder`` and ``text_decoder``, and their order matters: the first takes every
dynamically quantized linear by itself, so that the activations' quantization travels with it; the second takes what
float32 operators are left, in partitions as large as they get. ``token_embedding`` is a table look-up and stays with
ExecuTorch's own kernel.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import executorch.backends.xnnpack._passes as xnnpack_passes
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import (
    XnnpackDynamicallyQuantizedPartitioner,
    XnnpackPartitioner,
)
from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
from executorch.exir.backend.partitioner import PartitionResult
from executorch.exir.delegate import executorch_call_delegate
from executorch.exir.passes.quant_fusion_pass import quant_fusion_and_const_prop_pass
from executorch.exir.passes.remove_graph_asserts_pass import RemoveGraphAssertsPass
from torch.export import ExportedProgram

from mvlm.export.assemble import assemble
from mvlm.export.capture import CapturedMethod
from mvlm.export.contract import TEXT_DECODER, VISION_ENCODER
from mvlm.export.errors import ExportError
from mvlm.export.linear_specs import describe_linears
from mvlm.export.progress import Progress

DELEGATED_METHODS = (VISION_ENCODER, TEXT_DECODER)

#: The verifier knows only ATen's operators and would refuse ours.
EDGE_COMPILE_CONFIG = EdgeCompileConfig(_check_ir_validity=False)

#: Packets of operators that a linear is made of, before or after decomposition.
_LINEAR_PACKETS = {"aten.linear", "aten.addmm", "aten.mm"}
#: Packets that quantization leaves in a graph around its linears.
_QUANTIZATION_PACKETS = {
    f"{namespace}.{name}"
    for namespace, names in (
        ("torchao", ("choose_qparams_affine", "quantize_affine", "dequantize_affine")),
        (
            "quantized_decomposed",
            ("choose_qparams_per_token_asymmetric", "quantize_per_token", "dequantize_per_token"),
        ),
    )
    for name in names
}


def _packet(node: torch.fx.Node) -> str | None:
    """``aten.add`` for a call of ``aten::add.Tensor``, in either dialect; None for nodes that call no operator."""
    # An operator that writes to its arguments, like our attention, is an argument of a higher-order one.
    target = node.args[0] if node.target is torch.ops.higher_order.auto_functionalized_v2 else node.target
    schema = getattr(target, "_schema", None)
    if node.op != "call_function" or schema is None:
        return None
    return schema.name.replace("::", ".")


class _CountsWhatItTakes:
    """A partitioner that remembers how many partitions it made and of which operators."""

    def __init__(self) -> None:
        super().__init__()
        self.partitions = 0
        self.operators: Counter[str] = Counter()

    def ops_to_not_decompose(self, exported_program: ExportedProgram) -> tuple[list[Any], Any]:
        """What XNNPACK wants left whole, decided per operator where all its calls agree.

        ExecuTorch lets a partitioner decide call by call, and then traces the whole program twice more for each
        partitioner. In our models every call of an operator is taken or none is, so a plain list says the same.
        """
        operators, is_wanted = super().ops_to_not_decompose(exported_program)  # type: ignore[misc]
        wanted = []
        for operator in operators:
            verdicts = {is_wanted(node) for node in exported_program.graph.nodes if node.target == operator}
            if len(verdicts) == 2:
                return operators, is_wanted
            if verdicts == {True}:
                wanted.append(operator)
        return wanted, None

    def partition(self, exported_program: ExportedProgram) -> PartitionResult:
        result: PartitionResult = super().partition(exported_program)  # type: ignore[misc]
        self.partitions = len(result.partition_tags)
        self.operators = Counter(
            packet
            for node in result.tagged_exported_program.graph.nodes
            if node.meta.get("delegation_tag") in result.partition_tags and (packet := _packet(node))
        )
        return result


class _DynamicallyQuantized(_CountsWhatItTakes, XnnpackDynamicallyQuantizedPartitioner):
    pass


class _Float32(_CountsWhatItTakes, XnnpackPartitioner):
    pass


#: XNNPACK's passes over the inside of a delegate -> operators without any of which the pass changes nothing. The
#: passes that are not named here always run.
_PASS_ACTS_ON = {
    "DimOrderOpsRevertPass": {"dim_order_ops._to_dim_order_copy", "dim_order_ops._empty_dim_order"},
    "ConvertToUpsampleBilinear2d": {"aten.index", "aten.upsample_bilinear2d"},
    "ConvertToLinearPass": {"aten.mm", "aten.addmm", "aten.bmm"},
    "ConvertToSDPAPass": {"aten._softmax"},
    "FuseBatchNormPass": {"aten.native_batch_norm", "aten._native_batch_norm_legit_no_training"},
    "DecomposeBatchNorm": {"aten.native_batch_norm", "aten._native_batch_norm_legit_no_training"},
    "FuseActivationPass": {"aten.relu", "aten.hardtanh"},
    "DecomposeConcatenate": {"aten.cat"},
    "RemoveGetItemPass": {"aten.max_pool2d_with_indices", "aten.max"},
    "InsertPadQDQPass": {"aten.constant_pad_nd"},
    "Conv1dUnsqueezePass": {"aten.convolution"},
    "PReLUReshapePass": {"aten._prelu_kernel"},
    "RemoveRedundantCopyPass": {"aten._to_copy"},
}


@contextmanager
def skipping_idle_passes() -> Iterator[None]:
    """Leaves out those of XNNPACK's passes that have nothing to act on in a delegate.

    XNNPACK runs 17 passes over each of some hundred delegates, and every pass traces the delegate anew whether it
    changes anything or not; that was most of the time an export took.
    """
    original = xnnpack_passes._transform

    def transform(program: ExportedProgram, pass_: Any) -> ExportedProgram:
        acts_on = _PASS_ACTS_ON.get(type(pass_).__name__)
        if acts_on is not None and not any(_packet(node) in acts_on for node in program.graph.nodes):
            return program
        return original(program, pass_)

    xnnpack_passes._transform = transform
    try:
        yield
    finally:
        xnnpack_passes._transform = original


@dataclass(frozen=True)
class MethodDelegation:
    """Who runs what in one method.

    Attributes:
        method: its name.
        quantized: delegates made by ``XnnpackDynamicallyQuantizedPartitioner``.
        quantized_linears: linears in them.
        float32: delegates made by ``XnnpackPartitioner``.
        float32_operators: operators in those.
        left: operators outside every delegate, by name; ExecuTorch's or our own kernels run them.
    """

    method: str
    quantized: int
    quantized_linears: int
    float32: int
    float32_operators: int
    left: dict[str, int]


@dataclass(frozen=True)
class Lowered:
    """What the lower stage hands on.

    Attributes:
        programs: edge programs by method name, their delegates in them.
        delegation: who runs what in each.
    """

    programs: dict[str, ExportedProgram]
    delegation: tuple[MethodDelegation, ...]


def lower_program(method: str, program: ExportedProgram) -> tuple[ExportedProgram, MethodDelegation]:
    """Lowers one program, a method or a piece of one.

    Raises:
        ExportError: a quantized linear stayed outside the delegates, where it would run many times slower.
    """
    partitioners = [_DynamicallyQuantized(), _Float32()] if method in DELEGATED_METHODS else []
    with skipping_idle_passes():
        edge = to_edge_transform_and_lower(
            {method: program},
            partitioner={method: partitioners},
            compile_config=EDGE_COMPILE_CONFIG,
        ).exported_program(method)
    # They hold bounds that were found for the example's number of tokens; kernels check what they are given.
    RemoveGraphAssertsPass()(edge.graph_module)
    left = _operators_left(edge.graph.nodes)
    if partitioners:
        quantized, float32 = partitioners
        delegation = MethodDelegation(
            method,
            quantized.partitions,
            sum(quantized.operators[packet] for packet in _LINEAR_PACKETS),
            float32.partitions,
            sum(float32.operators.values()),
            left,
        )
    else:
        # Fuses a quantized embedding's dequantization and look-up into one operator, quantized_decomposed.embedding_*.
        edge = quant_fusion_and_const_prop_pass(edge)
        delegation = MethodDelegation(method, 0, 0, 0, 0, _operators_left(edge.graph.nodes))
    _check_delegation([delegation])
    return edge, delegation


def lower(methods: Sequence[CapturedMethod], progress: Progress) -> Lowered:
    """Lowers every piece of every method once, and assembles the methods from them.

    Raises:
        ExportError: a quantized linear stayed outside the delegates, or a layer cannot be instantiated.
    """
    programs = {}
    delegation = []
    done, total = 0, sum(len(method.pieces) for method in methods)
    for method in methods:
        pieces = []
        parts = []
        # Pieces whose layers are stored alike share a program.
        lowered: dict[int, tuple[ExportedProgram, MethodDelegation]] = {}
        for piece in method.pieces:
            if id(piece.program) not in lowered:
                lowered[id(piece.program)] = lower_program(method.name, piece.program)
            program, part = lowered[id(piece.program)]
            pieces.append(replace(piece, program=program))
            parts += [part] * max(1, len(piece.layers))
            done += 1
            progress.share(done / total)
        programs[method.name] = assemble(replace(method, pieces=tuple(pieces)))
        describe_linears(programs[method.name])
        delegation.append(_sum(method.name, parts))
    return Lowered(programs, tuple(delegation))


def _sum(method: str, parts: Iterable[MethodDelegation]) -> MethodDelegation:
    parts = list(parts)
    left: Counter[str] = Counter()
    for part in parts:
        left.update(part.left)
    return MethodDelegation(
        method,
        sum(part.quantized for part in parts),
        sum(part.quantized_linears for part in parts),
        sum(part.float32 for part in parts),
        sum(part.float32_operators for part in parts),
        dict(left.most_common()),
    )


def _operators_left(nodes: Iterable[torch.fx.Node]) -> dict[str, int]:
    counter = Counter(
        packet
        for node in nodes
        if node.target is not executorch_call_delegate and (packet := _packet(node)) is not None
    )
    return dict(counter.most_common())


def _check_delegation(delegation: Iterable[MethodDelegation]) -> None:
    outside = [
        f"{method.method}: {count} x {packet}"
        for method in delegation
        if method.method in DELEGATED_METHODS
        for packet, count in method.left.items()
        if packet in _LINEAR_PACKETS | _QUANTIZATION_PACKETS
    ]
    if outside:
        raise ExportError(
            "XNNPACK did not take every quantized linear; outside the delegates stayed " + ", ".join(outside)
        )


def delegation_table(delegation: Iterable[MethodDelegation]) -> str:
    """A table for people of what each partitioner took and what is left."""
    rows = [("method", "8da4w/int8 delegates", "linears in them", "float32 delegates", "operators in them", "left")]
    rows += [
        (
            method.method,
            str(method.quantized),
            str(method.quantized_linears),
            str(method.float32),
            str(method.float32_operators),
            str(sum(method.left.values())),
        )
        for method in delegation
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    for method in delegation:
        if method.left:
            listing = ", ".join(f"{count} {packet}" for packet, count in method.left.items())
            lines.append(f"left in {method.method}: {listing}")
    return "\n".join(lines)
