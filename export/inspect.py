"""Inspect: what is inside a ``.pte``, mvlm's or anybody's, and where its bytes go.

    python -m mvlm.export.inspect mobilevlm.pte

Reads ExecuTorch's flatbuffers through bindings that flatc, out of ExecuTorch's wheel, makes of the schemas in the same
wheel; the XNNPACK delegates' graphs likewise. The file is mapped, and of its weights nothing is touched: a file of
gigabytes takes as little memory as a small one. Knows nothing of torch, so that it answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.resources
import importlib.util
import json
import math
import mmap
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

from mvlm.export.contract import TEXT_DECODER, TOKEN_EMBEDDING, TOKENIZER, VISION_ENCODER
from mvlm.export.errors import ExportError

EPILOG = """\
examples:
  # what is in the file, and where its bytes go
  python -m mvlm.export.inspect mobilevlm.pte

  # everything about one method: each operator, each kind of delegate
  python -m mvlm.export.inspect mobilevlm.pte --method text_decoder

  # for programs: which libraries must a runner link?
  python -m mvlm.export.inspect mobilevlm.pte --json | jq -r '.methods[].operators[].library' | sort -u

Other people's .pte files are read as well.
"""

#: Namespace of an operator -> who provides its kernel at run time.
OPERATOR_LIBRARIES = {
    "aten": "ExecuTorch portable or optimized kernels",
    "dim_order_ops": "ExecuTorch portable or optimized kernels",
    "quantized_decomposed": "ExecuTorch quantized kernels",
    "executorch_prim": "ExecuTorch runtime",
    "mvlm": "libmvlm_ops",
    "llama": "ExecuTorch llm custom operators",
    "torchao": "torchao low-bit kernels",
}
#: Operators that ExecuTorch's runtime has built in, whatever their namespace says (register_prim_ops.cpp).
_PRIM_OPERATORS = {"aten::sym_size", "aten::sym_numel", "aten::_local_scalar_dense"}
UNKNOWN_LIBRARY = "unknown"

#: Names of inputs, which a .pte does not carry, for the methods of mvlm's contract.
_MVLM_INPUTS = {
    VISION_ENCODER: ("pixel_values",),
    TOKEN_EMBEDDING: ("ids",),
    TEXT_DECODER: ("embeddings", "start_pos"),
}

#: ExecuTorch's ScalarType -> what people call it, and bytes per element.
_DTYPES = {
    "BYTE": ("uint8", 1),
    "CHAR": ("int8", 1),
    "SHORT": ("int16", 2),
    "INT": ("int32", 4),
    "LONG": ("int64", 8),
    "HALF": ("float16", 2),
    "FLOAT": ("float32", 4),
    "DOUBLE": ("float64", 8),
    "BOOL": ("bool", 1),
    "QINT8": ("qint8", 1),
    "QUINT8": ("quint8", 1),
    "QINT32": ("qint32", 4),
    "BFLOAT16": ("bfloat16", 2),
    "QUINT4X2": ("quint4x2", 1),
    "QUINT2X4": ("quint2x4", 1),
    "BITS16": ("bits16", 2),
    "FLOAT8E5M2": ("float8_e5m2", 1),
    "FLOAT8E4M3FN": ("float8_e4m3fn", 1),
    "FLOAT8E5M2FNUZ": ("float8_e5m2fnuz", 1),
    "FLOAT8E4M3FNUZ": ("float8_e4m3fnuz", 1),
    "UINT16": ("uint16", 2),
    "UINT32": ("uint32", 4),
    "UINT64": ("uint64", 8),
}

#: XNNPACK's datatype of a constant -> what people call it. Those that are not named here keep XNNPACK's name.
_XNNPACK_DATATYPES = {
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
    "qint8": "int8 per tensor",
    "quint8": "uint8 per tensor",
    "qint32": "int32 per tensor",
    "qcint8": "int8 per channel",
    "qcint32": "int32 per channel",
    "qcint4": "int4 per channel",
    "qbint4": "int4 in groups",
}
#: Quantization with scales in constants -> bytes of a scale: bfloat16, float32.
_SCALE_BYTES = {"PerChannelGroupQuant": 2, "PerChannelQuant": 4}
_XNNPACK = "XnnpackBackend"
_UINT64_MAX = 2**64 - 1

#: First bytes of other files that ExecuTorch writes -> what they are.
_OTHER_IDENTIFIERS = {
    b"FT01": "a .ptd, the weights of a program without the program; give the .pte beside it",
    b"BP08": "a bundled program (.bpte), a program with test inputs; give the .pte it was made from",
    b"ED00": "an ETDump, a profile of a run; give the .pte that was run",
}

_PROGRAM_SCHEMA = "schema/program.fbs"
#: The schema that the delegate itself reads: also graphs of older exporters, with constants inside the flatbuffer.
_XNNPACK_SCHEMA = "backends/xnnpack/serialization/runtime_schema.fbs"

#: How many operators and kinds of delegates of each method are listed, unless one method is asked for.
_LISTED = 12


# -- facts ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ValueFacts:
    """An input or output of a method.

    Attributes:
        name: where the file or mvlm's contract tells it.
        kind: ``tensor``, or ``int``, ``bool``, ``double``, ``string``, ``null``, …
        dtype: of a tensor, as torch calls it; otherwise None.
        shape: of a tensor; the largest there may be where ``dynamism`` is ``bounded``, without meaning where it is
            ``unbounded``.
        dynamism: ``static``, ``bounded`` or ``unbounded``. Which of the dimensions vary the file does not say.
    """

    name: str | None
    kind: str
    dtype: str | None = None
    shape: tuple[int, ...] = ()
    dynamism: str = "static"


@dataclass(frozen=True)
class OperatorFacts:
    """An operator that a method calls outside its delegates.

    Attributes:
        name: with namespace and overload, ``aten::add.out``.
        library: who provides the kernel, :data:`UNKNOWN_LIBRARY` if we do not know.
        calls: instructions that call it.
    """

    name: str
    library: str
    calls: int


@dataclass(frozen=True)
class DelegateFacts:
    """The delegates of a method that are of one kind.

    Attributes:
        backend: id of who runs them, ``XnnpackBackend``.
        count: of delegates of this kind.
        calls: instructions that call one of them.
        num_bytes: of their blobs; blobs that several share count once.
        nodes: what is in each of them and how often, as XNNPACK calls it; empty for other backends.
        readable: False for an XNNPACK blob that could not be read.
    """

    backend: str
    count: int
    calls: int
    num_bytes: int
    nodes: Mapping[str, int]
    readable: bool = True


@dataclass(frozen=True)
class ArenaFacts:
    """A piece of memory that a method needs while it is loaded.

    Attributes:
        memory_id: from 1 on.
        num_bytes: of the whole.
        mutable_buffers: tensors in it that keep their values from call to call, a KV cache for example.
        mutable_bytes: of these.
    """

    memory_id: int
    num_bytes: int
    mutable_buffers: int
    mutable_bytes: int


@dataclass(frozen=True)
class MethodFacts:
    """A method that computes. Methods that only return a constant are metadata, see :attr:`PteFacts.metadata`."""

    name: str
    inputs: tuple[ValueFacts, ...]
    outputs: tuple[ValueFacts, ...]
    operators: tuple[OperatorFacts, ...]
    delegates: tuple[DelegateFacts, ...]
    memory: tuple[ArenaFacts, ...]


@dataclass(frozen=True)
class DataFacts:
    """Data of one kind: constants by dtype, named data by what refers to it.

    Attributes:
        kind: ``float32``, ``int4 in groups of 128``, ``scales of int8 per channel``, …
        count: of tensors or blobs.
        num_bytes: of these, without padding.
    """

    kind: str
    count: int
    num_bytes: int


@dataclass(frozen=True)
class TokenizerFacts:
    """The tokenizer that travels in an mvlm file.

    Attributes:
        kind: ``SentencePiece`` or ``unknown``.
        num_bytes: of the model file.
        pieces: in its vocabulary, None if unknown.
    """

    kind: str
    num_bytes: int
    pieces: int | None


@dataclass(frozen=True)
class MvlmFacts:
    """Who made an mvlm file, of what and how; None for what the file does not say.

    Attributes:
        format_version: of the contract.
        mvlm_version: of the exporter.
        model_name: of the checkpoint, for people.
        checkpoint_id: hash over the checkpoint's files.
        recipe: fields of the recipe.
        tokenizer: None if there is none.
    """

    format_version: Any
    mvlm_version: Any
    model_name: Any
    checkpoint_id: Any
    recipe: Any
    tokenizer: TokenizerFacts | None


@dataclass(frozen=True)
class PteFacts:
    """What is inside a ``.pte``.

    Attributes:
        path: as it was given.
        size: of the file, in bytes.
        identifier: of the file format, ``ET12``.
        schema_version: of the program, as the file says.
        extended_header: whether the file has one; files without are old or carry neither weights nor delegates.
        methods: that compute.
        metadata: name -> value of the methods that only return a constant; of a tensor, its dtype and shape.
        mvlm: None for a file that ``mvlm.export`` did not make.
        constants: by dtype, those that belong to the program itself; what delegates hold is in ``named_data``.
        external: by dtype, constants that are not in this file but in a ``.ptd``.
        named_data: by what refers to it.
        delegate_constants: by datatype, constants inside the delegates' blobs, where older exporters put them.
        regions: name -> bytes; they sum up to ``size`` exactly.
    """

    path: str
    size: int
    identifier: str
    schema_version: int
    extended_header: bool
    methods: tuple[MethodFacts, ...]
    metadata: Mapping[str, Any]
    mvlm: MvlmFacts | None
    constants: tuple[DataFacts, ...]
    external: tuple[DataFacts, ...]
    named_data: tuple[DataFacts, ...]
    delegate_constants: tuple[DataFacts, ...]
    regions: Mapping[str, int]


# -- bindings ---------------------------------------------------------------------------------------------------------


@functools.cache
def _bindings(schema: str) -> ModuleType:
    """Python bindings of a schema in ExecuTorch's wheel.

    The wheel carries bindings of the program's schema, but to import them is to import torch, and of XNNPACK's schema
    it carries none. flatc makes both in a hundredth of a second.

    Raises:
        ExportError: there is no flatc.
    """
    package = importlib.resources.files("executorch")
    in_wheel = package / "data" / "bin" / "flatc"
    flatc = str(in_wheel) if in_wheel.is_file() else shutil.which("flatc")
    if flatc is None:
        raise ExportError("flatc is neither in the executorch package nor on PATH; reinstall executorch")
    with importlib.resources.as_file(package / schema) as path, tempfile.TemporaryDirectory() as folder:
        command = [flatc, "--python", "--gen-onefile", "--gen-all", "-o", folder, str(path)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise ExportError(f"{flatc} could not read {schema}: {getattr(error, 'stderr', '') or error}") from error
        [generated] = Path(folder).glob("*_generated.py")
        spec = importlib.util.spec_from_file_location(f"{__name__}.{path.stem}", generated)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


@functools.cache
def _names(enum: type) -> dict[int, str]:
    """Value -> name of a generated enumeration."""
    return {value: name for name, value in vars(enum).items() if isinstance(value, int)}


def _items(count: int, get: Callable[[int], Any]) -> Iterator[Any]:
    """The entries of a vector, one by one: a count that damage made huge costs nothing before its first wrong entry."""
    return map(get, range(count))


def _cast(union: Any, table: type) -> Any:
    """The member of a union as its type, which flatbuffers' bindings leave to the caller."""
    member = table()
    member.Init(union.Bytes, union.Pos)
    return member


def _bytes(array: Any) -> memoryview:
    """A vector of bytes, not copied; the bindings return 0 instead of one that is not there."""
    return memoryview(b"") if isinstance(array, int) else memoryview(array)


def _text(string: bytes | None) -> str:
    return (string or b"").decode(errors="replace")


#: What reading a broken flatbuffer may raise: it leads outside the file, or to a table that is not there, or has a size
#: of 0 where there is none.
_BROKEN = (struct.error, LookupError, ValueError, TypeError, AttributeError, ArithmeticError)


# -- the file ---------------------------------------------------------------------------------------------------------


class _Mapping(mmap.mmap):
    """A mapped file that refuses slices beyond its end, where mmap itself, and so flatbuffers' strings, falls short."""

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice) and key.stop is not None and key.stop > len(self):
            raise IndexError(f"byte {key.stop:,} of {len(self):,}")
        return super().__getitem__(key)


@dataclass(frozen=True)
class _Layout:
    """Where things are: [0, program_size) the flatbuffer with ``header_size`` bytes of header in it, then segments."""

    header_size: int
    program_size: int
    segment_base: int


def _read_layout(path: Path, data: memoryview) -> _Layout:
    """Layout as the extended header has it (ExecuTorch's docs, "PTE file format").

    Raises:
        ExportError: ``data`` is no .pte, or shorter than its header says.
    """
    size = len(data)
    identifier = bytes(data[4:8])
    if identifier[:2] != b"ET":
        what = _OTHER_IDENTIFIERS.get(identifier, "no ExecuTorch program: it lacks the identifier ET12 at byte 4")
        raise ExportError(f"{path}: is {what}")
    if size < 12:
        raise ExportError(f"{path}: is truncated: {size} bytes, which is not even a header")
    if data[8:12] != b"eh00":
        return _Layout(0, size, size)
    # Magic, length of the header, size of the flatbuffer with it, where segments begin; since 2025 their total size.
    if size < 32:
        raise ExportError(f"{path}: is truncated: {size} bytes, which is not even a header")
    header_size, program_size, segment_base = struct.unpack_from("<IQQ", data, 12)
    segment_size = struct.unpack_from("<Q", data, 32)[0] if header_size >= 32 and size >= 40 else 0
    expected = max(program_size, segment_base + segment_size)
    if size < expected:
        raise ExportError(f"{path}: is truncated: {size:,} bytes, its header says {expected:,}; copy it again")
    if not 8 + header_size <= program_size or 0 < segment_base < program_size:
        raise ExportError(f"{path}: is broken: its header contradicts itself")
    return _Layout(header_size, program_size, segment_base or program_size)


@dataclass(frozen=True)
class _Segment:
    start: int
    size: int


class _Program:
    """The program in a mapped file, through its bindings."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        # Unmapped when the last table that points into them is gone.
        self.data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        self.layout = _read_layout(path, self.data)
        self.fb = _bindings(_PROGRAM_SCHEMA)
        flatbuffer = _Mapping(file.fileno(), self.layout.program_size, access=mmap.ACCESS_READ)
        self.root = self.fb.Program.GetRootAs(flatbuffer, 0)
        self.segments = [
            _Segment(self.layout.segment_base + segment.Offset(), segment.Size())
            for segment in _items(self.root.SegmentsLength(), self.root.Segments)
        ]
        for index, segment in enumerate(self.segments):
            if segment.start + segment.size > len(self.data):
                raise ExportError(
                    f"{path}: is truncated: {len(self.data):,} bytes, but segment {index} ends at "
                    f"{segment.start + segment.size:,}; copy it again"
                )
        self.plans = list(_items(self.root.ExecutionPlanLength(), self.root.ExecutionPlan))
        self._graphs: dict[tuple[str, int], _Graph | None] = {}

    def values(self, plan: Any) -> list[tuple[str, Any]]:
        """Kind and table of each value of a method."""
        kinds = _names(self.fb.KernelTypes)
        values = []
        for value in _items(plan.ValuesLength(), plan.Values):
            kind = kinds.get(value.ValType(), "NONE")
            union = value.Val()
            values.append((kind, None if kind == "NONE" or union is None else _cast(union, getattr(self.fb, kind))))
        return values

    def instructions(self, plan: Any) -> Iterator[tuple[str, Any]]:
        """Kind and table of each instruction of a method."""
        kinds = _names(self.fb.InstructionArguments)
        for chain in _items(plan.ChainsLength(), plan.Chains):
            for instruction in _items(chain.InstructionsLength(), chain.Instructions):
                kind = kinds.get(instruction.InstrArgsType(), "NONE")
                union = instruction.InstrArgs()
                if kind != "NONE" and union is not None:
                    yield kind, _cast(union, getattr(self.fb, kind))

    def dtype(self, tensor: Any) -> str:
        return self._dtype(tensor)[0]

    def nbytes(self, tensor: Any) -> int:
        return math.prod(self.shape(tensor)) * self._dtype(tensor)[1]

    def shape(self, tensor: Any) -> tuple[int, ...]:
        return tuple(_items(tensor.SizesLength(), tensor.Sizes))

    def _dtype(self, tensor: Any) -> tuple[str, int]:
        scalar_type = tensor.ScalarType()
        name = _names(self.fb.ScalarType).get(scalar_type, f"dtype {scalar_type}")
        return _DTYPES.get(name, (name.lower(), 1))

    def is_external(self, tensor: Any) -> bool:
        extra = tensor.ExtraTensorInfo()
        return extra is not None and extra.Location() == self.fb.TensorDataLocation.EXTERNAL

    def is_constant(self, tensor: Any) -> bool:
        """Whether the tensor's data is among the program's constants in this file."""
        return tensor.DataBufferIdx() > 0 and tensor.AllocationInfo() is None and not self.is_external(tensor)

    def constant(self, index: int) -> tuple[int, int]:
        """Start in the file and bytes, with padding, of a constant in the constant segment; (0, 0) for inline ones."""
        table = self.root.ConstantSegment()
        if table is None or table.OffsetsLength() == 0:
            return 0, 0
        segment = self.segments[table.SegmentIndex()]
        offset = table.Offsets(index)
        end = table.Offsets(index + 1) if index + 1 < table.OffsetsLength() else segment.size
        return segment.start + offset, max(0, min(end, segment.size) - offset)

    def constant_bytes(self, tensor: Any) -> memoryview:
        """The data of a constant tensor."""
        index = tensor.DataBufferIdx()
        if self.root.ConstantBufferLength():
            return _bytes(self.root.ConstantBuffer(index).StorageAsNumpy())[: self.nbytes(tensor)]
        start, available = self.constant(index)
        return self.data[start : start + min(available, self.nbytes(tensor))]

    def blob(self, delegate: Any) -> tuple[tuple[str, int], int]:
        """Identity and bytes of a delegate's blob, which is in a segment or in the flatbuffer."""
        reference = delegate.Processed()
        if reference is None:
            return ("none", 0), 0
        if reference.Location() == self.fb.DataLocation.SEGMENT:
            return ("segment", reference.Index()), self.segments[reference.Index()].size
        inline = self.root.BackendDelegateData(reference.Index())
        return ("inline", reference.Index()), len(_bytes(inline.DataAsNumpy()))

    def graph(self, delegate: Any) -> _Graph | None:
        """What an XNNPACK delegate's blob holds; None if it cannot be read. Each blob is read once."""
        key, size = self.blob(delegate)
        if key not in self._graphs:
            kind, index = key
            try:
                if kind == "segment":
                    start = self.segments[index].start
                    self._graphs[key] = _read_graph(self.data[start : start + size])
                else:
                    self._graphs[key] = _read_graph(_bytes(self.root.BackendDelegateData(index).DataAsNumpy()))
            except _BROKEN:
                self._graphs[key] = None
        return self._graphs[key]

    def graphs(self) -> list[_Graph]:
        """All graphs that were read."""
        return [graph for graph in self._graphs.values() if graph is not None]


# -- XNNPACK's graphs -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Linear:
    """A FullyConnected node with a constant weight.

    Attributes:
        rows: of its input at the most.
        in_features: columns of the weight.
        out_features: rows of the weight.
        weights: bits of a weight as XNNPACK multiplies it: 4, 8, 16 or 32.
        num_bytes: of weight and scales.
    """

    rows: int
    in_features: int
    out_features: int
    weights: int
    num_bytes: int


@dataclass(frozen=True)
class _Graph:
    """An XNNPACK delegate's blob.

    Attributes:
        nodes: what it computes -> how often.
        linears: in order; nodes, too.
        named: key of named data -> what it is.
        inline: (what it is, bytes) of each constant in the blob itself.
    """

    nodes: Mapping[str, int]
    linears: tuple[Linear, ...]
    named: Mapping[str, str]
    inline: tuple[tuple[str, int], ...]


def _read_graph(blob: memoryview) -> _Graph:
    """The graph in an XNNPACK delegate's blob; raises one of :data:`_BROKEN` if there is none."""
    if blob[4:8] == b"XH00":
        # Magic, length of the header, offset and size of the flatbuffer (executorch's XNNHeader).
        _, offset, size = struct.unpack_from("<HII", blob, 8)
        blob = blob[offset : offset + size]
    if blob[4:6] != b"XN":
        raise ValueError("no XNNPACK graph")
    fb = _bindings(_XNNPACK_SCHEMA)
    graph = fb.XNNGraph.GetRootAs(blob, 0)
    constants: dict[int, str] = {}  # index of constant data -> what it is
    kind_of_value: dict[int, str] = {}
    tensors: dict[int, tuple[Any, str, Any]] = {}
    for value in _items(graph.XvaluesLength(), graph.Xvalues):
        tensor, quantization, parameters = _tensor_value(fb, value)
        kind = _kind(fb, tensor.Datatype(), quantization, parameters)
        kind_of_value[tensor.IdOut()] = kind
        tensors[tensor.IdOut()] = (tensor, quantization, parameters)
        if tensor.ConstantBufferIdx():
            constants[tensor.ConstantBufferIdx()] = kind
            if quantization in _SCALE_BYTES and parameters.ScaleBufferIdx():
                constants[parameters.ScaleBufferIdx()] = f"scales of {kind}"

    nodes: Counter[str] = Counter()
    linears = []
    for node in _items(graph.XnodesLength(), graph.Xnodes):
        if node.XnodeUnionType() != fb.XNodeUnion.NONE:
            nodes[_node(fb, node, kind_of_value)] += 1
        if node.XnodeUnionType() == fb.XNodeUnion.XNNFullyConnected:
            linears += _linear(fb, _cast(node.XnodeUnion(), fb.XNNFullyConnected), tensors)
    named, inline = {}, []
    for index, constant in enumerate(_items(graph.ConstantDataLength(), graph.ConstantData)):
        kind = constants.get(index, "not referred to")
        if constant.NamedKey():
            named[_text(constant.NamedKey())] = kind
        elif index and constant.Offset() != _UINT64_MAX:  # index 0 stands for "not constant"
            inline.append((kind, constant.Size()))
    for index, buffer in enumerate(_items(graph.ConstantBufferLength(), graph.ConstantBuffer)):
        if index and buffer.StorageLength():
            inline.append((constants.get(index, "not referred to"), buffer.StorageLength()))
    return _Graph(dict(sorted(nodes.items())), tuple(linears), named, tuple(inline))


def _linear(fb: ModuleType, node: Any, tensors: Mapping[int, tuple[Any, str, Any]]) -> Iterator[Linear]:
    """The linear, if its weight is a constant matrix."""
    weight, quantization, parameters = tensors[node.FilterId()]
    shape = tuple(_items(weight.DimsLength(), weight.Dims))
    if not weight.ConstantBufferIdx() or len(shape) != 2 or not math.prod(shape):
        return
    out_features, in_features = shape
    activation, _, _ = tensors[node.Input1Id()]
    rows = math.prod(_items(activation.DimsLength(), activation.Dims)) // in_features
    bits = re.search(r"(?:int|float)(\d+)", _kind(fb, weight.Datatype(), quantization, parameters))
    weights = int(bits[1]) if bits else 32
    num_bytes = in_features * out_features * weights // 8
    if quantization in _SCALE_BYTES:
        groups = in_features // parameters.GroupSize() if quantization == "PerChannelGroupQuant" else 1
        num_bytes += out_features * groups * _SCALE_BYTES[quantization]
    yield Linear(rows, in_features, out_features, weights, num_bytes)


def _tensor_value(fb: ModuleType, value: Any) -> tuple[Any, str, Any]:
    """Tensor, kind of its quantization (``NONE`` for none) and parameters of that."""
    union = value.XvalueUnion()
    if value.XvalueUnionType() == fb.XValueUnion.XNNTensorValue:
        return _cast(union, fb.XNNTensorValue), "NONE", None
    quantized = _cast(union, fb.XNNQuantizedTensorValue)
    quantization = _names(fb.XNNQuantParams)[quantized.QuantParamsType()]
    parameters = None if quantization == "NONE" else _cast(quantized.QuantParams(), getattr(fb, quantization))
    return quantized.TensorValue(), quantization, parameters


def _kind(fb: ModuleType, datatype: int, quantization: str, parameters: Any) -> str:
    name = _names(fb.XNNDatatype).get(datatype, f"datatype {datatype}").removeprefix("xnn_datatype_")
    kind = _XNNPACK_DATATYPES.get(name, name)
    return f"{kind} of {parameters.GroupSize()}" if quantization == "PerChannelGroupQuant" else kind


def _node(fb: ModuleType, node: Any, kind_of_value: Mapping[int, str]) -> str:
    """``Softmax``; for nodes with weights, of which kind these are: ``FullyConnected (int8 per channel)``."""
    kind = node.XnodeUnionType()
    name = _names(fb.XNodeUnion).get(kind, f"node {kind}").removeprefix("XNN")
    if name == "FullyConnected":
        table = fb.XNNFullyConnected
    elif "Conv" in name and name != "Convert":
        table = fb._XNNNodeConv
    else:
        return name
    return f"{name} ({kind_of_value.get(_cast(node.XnodeUnion(), table).FilterId(), 'unknown')})"


# -- facts from a program ---------------------------------------------------------------------------------------------


def inspect_pte(path: str | Path) -> PteFacts:
    """Reads what is inside a ``.pte``.

    Raises:
        ExportError: no such file, no ``.pte``, truncated or broken; the message says which.
    """
    path = Path(path)
    if not path.is_file():
        raise ExportError(f"{path}: {'is no file' if path.exists() else 'no such file'}")
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise ExportError(f"{path}: is empty")
            return _facts(path, _Program(path, file))
    except OSError as error:
        raise ExportError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ExportError:
        raise
    except _BROKEN as error:
        raise ExportError(f"{path}: is broken or truncated: its program leads outside the file ({error})") from error


def _facts(path: Path, program: _Program) -> PteFacts:
    methods, metadata = [], {}
    for plan in program.plans:
        values = program.values(plan)
        if _is_constant_method(program, plan, values):
            metadata[_text(plan.Name())] = _constant_value(program, plan, values)
        else:
            methods.append(_method(program, plan, values))
    mvlm = _mvlm(program, metadata)
    if mvlm is not None:
        methods = [_with_contract_names(method) for method in methods]
    constants, external = _constants(program)
    return PteFacts(
        path=str(path),
        size=len(program.data),
        identifier=bytes(program.data[4:8]).decode(errors="replace"),
        schema_version=program.root.Version(),
        extended_header=program.layout.header_size > 0,
        methods=tuple(methods),
        metadata=metadata,
        mvlm=mvlm,
        constants=constants,
        external=external,
        named_data=_named_data(program),
        delegate_constants=_sum_up(constant for graph in program.graphs() for constant in graph.inline),
        regions=_regions(program, sum(data.num_bytes for data in constants)),
    )


def _sum_up(data: Iterable[tuple[str, int]]) -> tuple[DataFacts, ...]:
    """Of (kind, bytes) pairs, the facts per kind, the largest first."""
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for kind, num_bytes in data:
        counts[kind] += 1
        sizes[kind] += num_bytes
    return tuple(DataFacts(kind, counts[kind], size) for kind, size in sizes.most_common())


def _is_constant_method(program: _Program, plan: Any, values: Sequence[tuple[str, Any]]) -> bool:
    """Whether a method takes nothing, computes nothing and returns constants."""
    if plan.InputsLength() or next(program.instructions(plan), None) is not None:
        return False
    outputs = [values[index] for index in _items(plan.OutputsLength(), plan.Outputs)]
    return bool(outputs) and all(kind != "Tensor" or program.is_constant(table) for kind, table in outputs)


def _constant_value(program: _Program, plan: Any, values: Sequence[tuple[str, Any]]) -> Any:
    """What a constant method returns: a number, a string, a description of a tensor, or a list of these."""
    outputs = [_plain(program, *values[index]) for index in _items(plan.OutputsLength(), plan.Outputs)]
    return outputs if len(outputs) != 1 or _returns_list(plan) else outputs[0]


def _returns_list(plan: Any) -> bool:
    """Whether a method returns a list; a list of one and a plain value differ only in the tree of the outputs."""
    try:
        return json.loads(_text(plan.ContainerMetaType().EncodedOutStr()))[1]["type"] in (
            "builtins.list",
            "builtins.tuple",
        )
    except _BROKEN:
        return False


def _plain(program: _Program, kind: str, table: Any) -> Any:
    match kind:
        case "Int":
            return table.IntVal()
        case "Bool":
            return table.BoolVal()
        case "Double":
            return table.DoubleVal()
        case "String":
            return _text(table.StringVal())
        case "IntList" | "DoubleList" | "BoolList":
            return list(_items(table.ItemsLength(), table.Items))
        case "Tensor":
            return f"{program.dtype(table)} {list(program.shape(table))}"
        case _:
            return None


def _method(program: _Program, plan: Any, values: Sequence[tuple[str, Any]]) -> MethodFacts:
    inputs = list(_items(plan.InputsLength(), plan.Inputs))
    names = _input_names(plan, len(inputs))
    outputs = list(_items(plan.OutputsLength(), plan.Outputs))
    kernel_calls: Counter[int] = Counter()
    delegate_calls: Counter[int] = Counter()
    for kind, call in program.instructions(plan):
        if kind == "KernelCall":
            kernel_calls[call.OpIndex()] += 1
        elif kind == "DelegateCall":
            delegate_calls[call.DelegateIndex()] += 1
    return MethodFacts(
        name=_text(plan.Name()),
        inputs=tuple(_value(program, *values[i], name) for i, name in zip(inputs, names, strict=True)),
        outputs=tuple(_value(program, *values[i], None) for i in outputs),
        operators=_operators(plan, kernel_calls),
        delegates=_delegates(program, plan, delegate_calls),
        memory=_memory(program, plan, values, inputs),
    )


def _input_names(plan: Any, count: int) -> list[str | None]:
    """Names of the inputs; the tree of the inputs has them for those that were given by keyword, which come last."""
    names: list[str | None] = [None] * count
    try:
        tree = json.loads(_text(plan.ContainerMetaType().EncodedInpStr()))[1]
        positional, by_keyword = tree["children_spec"]
        keywords = json.loads(by_keyword["context"])
        plain = all(not child["children_spec"] for child in positional["children_spec"] + by_keyword["children_spec"])
        if plain and len(positional["children_spec"]) + len(keywords) == count:
            names[count - len(keywords) :] = [str(keyword) for keyword in keywords]
    except _BROKEN:
        pass  # no tree, or of a kind that we do not know: nothing is lost but names
    return names


def _value(program: _Program, kind: str, table: Any, name: str | None) -> ValueFacts:
    if kind != "Tensor":
        return ValueFacts(name, kind.lower())
    extra = table.ExtraTensorInfo()
    if name is None and extra is not None:
        name = _text(extra.FullyQualifiedName()) or None
    dynamism = {"STATIC": "static", "DYNAMIC_BOUND": "bounded", "DYNAMIC_UNBOUND": "unbounded"}
    return ValueFacts(
        name,
        "tensor",
        program.dtype(table),
        program.shape(table),
        dynamism[_names(program.fb.TensorShapeDynamism)[table.ShapeDynamism()]],
    )


def _with_contract_names(method: MethodFacts) -> MethodFacts:
    names = _MVLM_INPUTS.get(method.name, ())
    if len(names) != len(method.inputs):
        return method
    pairs = zip(method.inputs, names, strict=True)
    return replace(method, inputs=tuple(replace(value, name=value.name or name) for value, name in pairs))


def _operators(plan: Any, calls: Counter[int]) -> tuple[OperatorFacts, ...]:
    operators = []
    for index, operator in enumerate(_items(plan.OperatorsLength(), plan.Operators)):
        name, overload = _text(operator.Name()), _text(operator.Overload())
        operators.append(OperatorFacts(f"{name}.{overload}" if overload else name, library_of(name), calls[index]))
    return tuple(sorted(operators, key=lambda operator: (-operator.calls, operator.name)))


def library_of(operator: str) -> str:
    """Who provides the kernel of an operator, ``aten::add``."""
    if operator in _PRIM_OPERATORS:
        return OPERATOR_LIBRARIES["executorch_prim"]
    return OPERATOR_LIBRARIES.get(operator.split("::")[0], UNKNOWN_LIBRARY)


def _delegates(program: _Program, plan: Any, calls: Counter[int]) -> tuple[DelegateFacts, ...]:
    kinds: dict[tuple[Any, ...], DelegateFacts] = {}
    seen: set[tuple[tuple[str, int], tuple[Any, ...]]] = set()
    for index, delegate in enumerate(_items(plan.DelegatesLength(), plan.Delegates)):
        backend = _text(delegate.Id())
        graph = program.graph(delegate) if backend == _XNNPACK else None
        nodes = dict(graph.nodes) if graph else {}
        blob, size = program.blob(delegate)
        readable = backend != _XNNPACK or graph is not None
        key = (backend, readable, *nodes.items())
        facts = kinds.get(key, DelegateFacts(backend, 0, 0, 0, nodes, readable))
        kinds[key] = replace(
            facts,
            count=facts.count + 1,
            calls=facts.calls + calls[index],
            num_bytes=facts.num_bytes + (0 if (blob, key) in seen else size),
        )
        seen.add((blob, key))
    return tuple(sorted(kinds.values(), key=lambda facts: -facts.count))


def _memory(
    program: _Program, plan: Any, values: Sequence[tuple[str, Any]], inputs: Sequence[int]
) -> tuple[ArenaFacts, ...]:
    """Planned memory.

    ExecuTorch emits a method's parameters and buffers first, then its inputs, then what it computes. So a planned
    tensor that comes before an input and is none itself is a buffer that the method changes, unless it has a name or
    an initial value and is known to be one anyway.
    """
    last_input = max(inputs, default=-1)
    mutable: dict[int, dict[int, int]] = {}  # memory id -> offset -> bytes
    for index, (kind, tensor) in enumerate(values):
        if kind != "Tensor" or index in inputs or (allocation := tensor.AllocationInfo()) is None:
            continue
        extra = tensor.ExtraTensorInfo()
        has_name = extra is not None and bool(extra.FullyQualifiedName())
        if index < last_input or tensor.DataBufferIdx() > 0 or has_name:
            offset = allocation.MemoryOffsetLow() + (allocation.MemoryOffsetHigh() << 32)
            mutable.setdefault(allocation.MemoryId(), {})[offset] = program.nbytes(tensor)
    arenas = []
    for memory_id in range(1, plan.NonConstBufferSizesLength()):  # 0 stands for constants
        buffers = mutable.get(memory_id, {})
        arenas.append(ArenaFacts(memory_id, plan.NonConstBufferSizes(memory_id), len(buffers), sum(buffers.values())))
    return tuple(arenas)


def _constants(program: _Program) -> tuple[tuple[DataFacts, ...], tuple[DataFacts, ...]]:
    """The program's own constants by dtype, in the file and outside of it; those that methods share count once."""
    inside: dict[int, tuple[str, int]] = {}
    outside: dict[str, tuple[str, int]] = {}
    for plan in program.plans:
        for kind, tensor in program.values(plan):
            if kind != "Tensor":
                continue
            size = program.nbytes(tensor)
            if program.is_external(tensor):
                name = _text(tensor.ExtraTensorInfo().FullyQualifiedName())
                outside.setdefault(name, (program.dtype(tensor), size))
            elif program.is_constant(tensor):
                index = tensor.DataBufferIdx()
                if index not in inside or size > inside[index][1]:
                    inside[index] = (program.dtype(tensor), min(size, _available(program, index)))
    return _sum_up(inside.values()), _sum_up(outside.values())


def _available(program: _Program, index: int) -> int:
    """Bytes that the file has for a constant, padding included."""
    if program.root.ConstantBufferLength():
        return len(_bytes(program.root.ConstantBuffer(index).StorageAsNumpy()))
    return program.constant(index)[1]


def _named_data(program: _Program) -> tuple[DataFacts, ...]:
    """Named data by what the delegates' graphs say it is; keys that share their data count once."""
    kinds: dict[str, str] = {}
    for graph in program.graphs():
        kinds.update(graph.named)
    segments: dict[int, str] = {}
    for entry in _items(program.root.NamedDataLength(), program.root.NamedData):
        kind = kinds.get(_text(entry.Key()))
        if kind is not None or entry.SegmentIndex() not in segments:
            segments[entry.SegmentIndex()] = kind or "not referred to by XNNPACK"
    return _sum_up((kind, program.segments[index].size) for index, kind in segments.items())


def _regions(program: _Program, constant_bytes: int) -> dict[str, int]:
    """What the file's bytes are, all of them."""
    root, layout, segments = program.root, program.layout, program.segments
    inline_constants = sum(
        len(_bytes(buffer.StorageAsNumpy())) for buffer in _items(root.ConstantBufferLength(), root.ConstantBuffer)
    )
    inline_blobs = sum(
        len(_bytes(blob.DataAsNumpy())) for blob in _items(root.BackendDelegateDataLength(), root.BackendDelegateData)
    )
    owners: dict[int, str] = {}  # segment -> what it holds
    for entry in _items(root.NamedDataLength(), root.NamedData):
        owners[entry.SegmentIndex()] = "named data"
    for plan in program.plans:
        for delegate in _items(plan.DelegatesLength(), plan.Delegates):
            (kind, index), _ = program.blob(delegate)
            if kind == "segment":
                owners[index] = "delegate blobs"
    for table in _items(root.MutableDataSegmentsLength(), root.MutableDataSegments):
        owners[table.SegmentIndex()] = "initial values of mutable buffers"
    constants = root.ConstantSegment()
    if constants is not None and constants.OffsetsLength():
        owners[constants.SegmentIndex()] = "constants"

    regions = dict.fromkeys(
        (
            "extended header",
            "program flatbuffer",
            "constants",
            "initial values of mutable buffers",
            "delegate blobs",
            "named data",
            "segments that nothing refers to",
            "padding",
            "bytes after the end",
        ),
        0,
    )
    regions["extended header"] = layout.header_size
    regions["program flatbuffer"] = layout.program_size - layout.header_size - inline_constants - inline_blobs
    regions["constants"] += inline_constants
    regions["delegate blobs"] += inline_blobs
    end = layout.program_size
    for index, segment in sorted(enumerate(segments), key=lambda item: item[1].start):
        start = max(segment.start, end)
        regions["padding"] += start - end
        stop = max(start, segment.start + segment.size)
        regions[owners.get(index, "segments that nothing refers to")] += stop - start
        end = stop
    regions["bytes after the end"] = len(program.data) - end
    # Within their segment, constants are padded to be aligned.
    between = regions["constants"] - constant_bytes
    regions["constants"] -= between
    regions["padding"] += between
    if min(regions.values()) < 0:
        raise ValueError("its parts are larger than the file")
    return regions


# -- what mvlm says ---------------------------------------------------------------------------------------------------


def _mvlm(program: _Program, metadata: Mapping[str, Any]) -> MvlmFacts | None:
    if "mvlm_format_version" not in metadata:
        return None
    recipe = metadata.get("mvlm_recipe")
    with contextlib.suppress(TypeError, ValueError, RecursionError):  # otherwise it is shown as it is
        recipe = json.loads(recipe)
    return MvlmFacts(
        format_version=metadata["mvlm_format_version"],
        mvlm_version=metadata.get("mvlm_version"),
        model_name=metadata.get("mvlm_model_name"),
        checkpoint_id=metadata.get("mvlm_checkpoint_id"),
        recipe=recipe,
        tokenizer=_tokenizer(program) if TOKENIZER in metadata else None,
    )


def _tokenizer(program: _Program) -> TokenizerFacts | None:
    [plan] = [plan for plan in program.plans if _text(plan.Name()) == TOKENIZER]
    kind, tensor = program.values(plan)[plan.Outputs(0)]
    if kind != "Tensor":
        return None
    model = bytes(program.constant_bytes(tensor))
    # Late, because most files that are inspected have none.
    from sentencepiece import SentencePieceProcessor

    try:
        return TokenizerFacts("SentencePiece", len(model), SentencePieceProcessor(model_proto=model).vocab_size())
    except RuntimeError:
        return TokenizerFacts("unknown", len(model), None)


# -- for people and for programs --------------------------------------------------------------------------------------


def to_json(facts: PteFacts) -> str:
    """The facts as one JSON document; numbers that JSON lacks are strings: ``"inf"``, ``"-inf"``, ``"nan"``."""
    return json.dumps(_strict(asdict(facts)), indent=2, allow_nan=False)


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def to_text(facts: PteFacts, whole_methods: bool = False) -> str:
    """The facts for a terminal.

    Args:
        facts: of a file.
        whole_methods: list all operators and kinds of delegates, not only the most frequent.
    """
    header = "with" if facts.extended_header else "without"
    lines = [
        f"{facts.path}: {_size(facts.size)}",
        f"ExecuTorch program {facts.identifier}, schema version {facts.schema_version}, {header} extended header",
    ]
    if facts.mvlm is not None:
        lines += ["", *_mvlm_lines(facts.mvlm)]
    for method in facts.methods:
        lines += ["", *_method_lines(method, None if whole_methods else _LISTED)]
    shown = {name: value for name, value in facts.metadata.items() if not (facts.mvlm and name in _SHOWN_ABOVE)}
    if shown:
        rows = [(name, _shortened(json.dumps(value, ensure_ascii=False))) for name, value in shown.items()]
        lines += ["", "constant methods", *_table(rows, "<<")]
    for title, data in (
        ("constants of the program", facts.constants),
        ("constants in a .ptd, not in this file", facts.external),
        ("named data", facts.named_data),
        ("constants in the delegates' blobs", facts.delegate_constants),
    ):
        if data:
            lines += ["", title, *_table([(d.kind, f"{d.count:,}", f"{d.num_bytes:,} bytes") for d in data], "<>>")]
    rows = [
        (name, f"{size:,} bytes", f"{size / facts.size:.1%}")
        for name, size in [*facts.regions.items(), ("the file", facts.size)]
        if size
    ]
    lines += ["", "where the bytes are", *_table(rows, "<>>")]
    # Names and strings are other people's; none of them shall write to the terminal but as text.
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in "\n".join(lines))


#: Constant methods that the first lines of an mvlm file tell.
_SHOWN_ABOVE = {
    "mvlm_format_version",
    "mvlm_version",
    "mvlm_model_name",
    "mvlm_checkpoint_id",
    "mvlm_recipe",
    TOKENIZER,
}


def _mvlm_lines(mvlm: MvlmFacts) -> list[str]:
    recipe = mvlm.recipe
    if isinstance(recipe, dict):
        recipe = ", ".join(f"{name} {value}" for name, value in recipe.items())
    tokenizer = "none"
    if mvlm.tokenizer is not None:
        pieces = "" if mvlm.tokenizer.pieces is None else f", {mvlm.tokenizer.pieces:,} pieces"
        tokenizer = f"{mvlm.tokenizer.kind}{pieces}, {mvlm.tokenizer.num_bytes:,} bytes"
    rows = [
        ("model", str(mvlm.model_name)),
        ("checkpoint", str(mvlm.checkpoint_id)),
        ("recipe", str(recipe)),
        ("tokenizer", tokenizer),
    ]
    return [f"made by mvlm {mvlm.mvlm_version}, format {mvlm.format_version}", *_table(rows, "<<")]


def _method_lines(method: MethodFacts, listed: int | None) -> list[str]:
    rows = [("in", value.name or "", _type(value)) for value in method.inputs]
    rows += [("out", value.name or "", _type(value)) for value in method.outputs]
    lines = [f"method {method.name}", *_table(rows, "<<<")]
    for arena in method.memory:
        which = f" {arena.memory_id}" if len(method.memory) > 1 else ""
        mutable = f", of that {arena.mutable_bytes:,} in {_count(arena.mutable_buffers, 'mutable buffer')}"
        lines.append(f"  planned memory{which}: {_size(arena.num_bytes)}{mutable if arena.mutable_buffers else ''}")
    if method.operators:
        calls = sum(operator.calls for operator in method.operators)
        lines.append(f"  {_count(len(method.operators), 'operator')} outside delegates, {_count(calls, 'call')}")
        rows = [(f"{operator.calls:,}", operator.name, operator.library) for operator in method.operators]
        lines += _listing(rows, "><<", listed)
    if method.delegates:
        count = sum(delegate.count for delegate in method.delegates)
        size = sum(delegate.num_bytes for delegate in method.delegates)
        lines.append(f"  {_count(count, 'delegate')}, {size:,} bytes")
        rows = [
            (f"{delegate.count:,}", delegate.backend, f"{delegate.num_bytes:,} bytes", _nodes(delegate))
            for delegate in method.delegates
        ]
        lines += _listing(rows, "><><", listed)
    return lines


def _listing(rows: Sequence[tuple[str, ...]], align: str, listed: int | None) -> list[str]:
    lines = _table(rows if listed is None else rows[:listed], align, indent=4)
    if listed is not None and len(rows) > listed:
        lines.append(f"    … and {len(rows) - listed} more kinds: --method lists all")
    return lines


def _nodes(delegate: DelegateFacts) -> str:
    if not delegate.readable:
        return "not readable"
    return ", ".join(name if count == 1 else f"{count} {name}" for name, count in delegate.nodes.items())


def _type(value: ValueFacts) -> str:
    if value.kind != "tensor":
        return value.kind
    if value.dynamism == "unbounded":
        return f"{value.dtype}, {len(value.shape)} dimensions of any size"
    return f"{value.dtype} {list(value.shape)}{' at most' if value.dynamism == 'bounded' else ''}"


def _table(rows: Sequence[tuple[str, ...]], align: str, indent: int = 2) -> list[str]:
    """Rows in columns, ``<`` to the left and ``>`` to the right."""
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(len(align))]
    lines = []
    for row in rows:
        cells = (f"{cell:{side}{width}}" for cell, side, width in zip(row, align, widths, strict=True) if width)
        lines.append((" " * indent + "  ".join(cells)).rstrip())
    return lines


def _size(num_bytes: int) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if num_bytes >= unit:
            return f"{num_bytes:,} bytes ({num_bytes / unit:.1f} {name})"
    return f"{num_bytes:,} bytes"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _shortened(text: str, limit: int = 100) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


# -- command line -----------------------------------------------------------------------------------------------------


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m mvlm.export.inspect",
        description="Show what is inside a .pte: methods, operators, delegates, memory, and where its bytes go.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("pte", metavar="FILE", type=Path, help="the .pte, mvlm's or anybody's")
    parser.add_argument("--json", action="store_true", help="print one JSON document with the same facts")
    parser.add_argument("--method", metavar="NAME", help="of the methods, only this one, but with everything about it")
    return parser.parse_args(arguments)


def _only(facts: PteFacts, method: str) -> PteFacts:
    methods = tuple(facts_of_method for facts_of_method in facts.methods if facts_of_method.name == method)
    if not methods:
        names = ", ".join(facts_of_method.name for facts_of_method in facts.methods) or "none"
        raise ExportError(f"{facts.path}: has no method {method!r} that computes something; it has: {names}")
    return replace(facts, methods=methods)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, or 2 for a file that cannot be inspected."""
    options = parse_arguments(arguments)
    try:
        facts = inspect_pte(options.pte)
        if options.method is not None:
            facts = _only(facts, options.method)
    except ExportError as error:
        print(f"mvlm.export.inspect: {error}", file=sys.stderr)
        return 2
    try:
        print(to_json(facts) if options.json else to_text(facts, whole_methods=options.method is not None), flush=True)
    except BrokenPipeError:
        # Whoever reads has seen enough (| head); Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
