"""Inspecting .pte files: the facts agree with what ExecuTorch says of the same file, and no byte is unaccounted for.

The files are plain ExecuTorch's, of modules of a few weights, written in all the ways that there are.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import (
    XnnpackDynamicallyQuantizedPartitioner,
    XnnpackPartitioner,
)
from executorch.exir import ExecutorchBackendConfig, ExecutorchProgramManager, to_edge, to_edge_transform_and_lower
from executorch.exir._serialize import _deserialize_pte_binary, _PTEFile, _serialize_pte_binary
from executorch.exir._serialize._flatbuffer_program import _flatbuffer_to_program, _program_to_flatbuffer
from executorch.exir._serialize._program import _ExtendedHeader, _get_extended_header
from executorch.exir.passes.init_mutable_pass import InitializedMutableBufferPass
from executorch.exir.schema import DataLocation, DataSegment, DelegateCall, KernelCall, NamedData, Program, Tensor
from executorch.runtime import Runtime
from torch import nn
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
from torchao.quantization.granularity import PerGroup

from mvlm.export import inspect
from mvlm.export.contract import FORMAT_VERSION, TOKENIZER, ImageProcessing, Metadata
from mvlm.export.errors import ExportError
from mvlm.export.inspect import DataFacts, MethodFacts, PteFacts, inspect_pte, library_of, main, to_json, to_text
from mvlm.export.recipe import mobile

WIDTH = 64


class Linears(nn.Module):
    """Two linears with ReLU between; the dtype and the number of their constants is easily told."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


class Counting(nn.Module):
    """Adds what it is given to a buffer, which so is a mutable one; beside it a constant buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.arange(8.0))
        self.register_buffer("table", torch.arange(6).reshape(2, 3))

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        self.total.add_(x)
        return self.total * scale + self.table.sum()


class Keyword(nn.Module):
    def forward(self, x: torch.Tensor, *, ids: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        return x + n, ids.to(torch.int32)


# -- the files --------------------------------------------------------------------------------------------------------


def export(
    module: nn.Module, *inputs: torch.Tensor, dynamic: Any = None, **keywords: Any
) -> torch.export.ExportedProgram:
    with torch.no_grad():
        return torch.export.export(module.eval(), inputs, keywords, dynamic_shapes=dynamic)


def xnnpack(*partitioners: Any, module: nn.Module | None = None, **config: Any) -> ExecutorchProgramManager:
    """A module with at most 16 rows of input, delegated to XNNPACK."""
    rows = torch.export.Dim("rows", min=1, max=16)
    program = export(module or Linears(), torch.zeros(4, WIDTH), dynamic=({0: rows},))
    edge = to_edge_transform_and_lower(program, partitioner=list(partitioners) or [XnnpackPartitioner()])
    return edge.to_executorch(ExecutorchBackendConfig(**config))


def portable(**config: Any) -> ExecutorchProgramManager:
    return to_edge(export(Linears(), torch.zeros(4, WIDTH))).to_executorch(ExecutorchBackendConfig(**config))


def quantized() -> ExecutorchProgramManager:
    module = Linears()
    scheme = Int8DynamicActivationIntxWeightConfig(
        torch.int4, weight_granularity=PerGroup(32), weight_scale_dtype=torch.bfloat16
    )
    quantize_(module, scheme, lambda child, name: name == "first")
    return xnnpack(XnnpackDynamicallyQuantizedPartitioner(), XnnpackPartitioner(), module=module)


def methods() -> ExecutorchProgramManager:
    """Two methods that delegate to XNNPACK the same weights, a third with keywords, and constant methods."""
    linears = Linears()
    one, two = (export(linears, torch.zeros(rows, WIDTH)) for rows in (1, 2))
    keyword = export(Keyword(), torch.zeros(2), ids=torch.zeros(3, dtype=torch.int64), n=2)
    edge = to_edge_transform_and_lower(
        {"one": one, "two": two, "keyword": keyword},
        partitioner={"one": [XnnpackPartitioner()], "two": [XnnpackPartitioner()], "keyword": []},
        constant_methods=CONSTANT_METHODS,
    )
    return edge.to_executorch()


CONSTANT_METHODS = {
    "an_int": -3,
    "a_bool": True,
    "a_float": 0.5,
    "infinite": math.inf,
    "a_string": "Grüße\n\x1b[31m",
    "a_list": [1, 2],
    "list_of_one": [7],
    "strings": ["a", "b"],
    "a_tensor": torch.arange(300, dtype=torch.int16).reshape(3, 100),
}


def mutable(**config: Any) -> ExecutorchProgramManager:
    edge = to_edge(export(Counting(), torch.zeros(8), torch.zeros(8)))
    return edge.to_executorch(ExecutorchBackendConfig(**config))


def mvlm_like() -> ExecutorchProgramManager:
    """Not our model, but it says all that our files say about themselves."""
    methods = METADATA.to_constant_methods() | {TOKENIZER: torch.arange(200, dtype=torch.uint8)}
    embedding = export(nn.Embedding(10, 4), torch.zeros(1, 3, dtype=torch.int64))
    return to_edge({"token_embedding": embedding}, constant_methods=methods).to_executorch()


METADATA = Metadata(
    model_name="tiny",
    checkpoint_id="sha256:0123",
    mvlm_version="0.9",
    recipe=mobile().to_json(),
    max_seq_len=256,
    max_context_len=768,
    logit_positions=8,
    vocab_size=10,
    bos_id=1,
    eos_ids=(2,),
    prompt_template="USER: {prompt} ASSISTANT:",
    next_turn_template="USER: {prompt} ASSISTANT:",
    image_marker="<image>",
    image_prefix="<image>\n",
    stop_strings=("</s>",),
    image=ImageProcessing(28, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), (1, 2, 3), 16),
)

FILES: dict[str, Callable[[], ExecutorchProgramManager]] = {
    "portable": portable,
    "xnnpack": xnnpack,
    "quantized": quantized,
    "methods": methods,
    "mutable": mutable,
    "named mutable": lambda: mutable(emit_mutable_buffer_names=True),
    "initialized mutable": lambda: mutable(passes=[InitializedMutableBufferPass(["total"])]),
    "inline delegates": lambda: xnnpack(extract_delegate_segments=False),
    "external constants": lambda: portable(external_constants=True),
    "aligned": lambda: xnnpack(segment_alignment=4096, constant_tensor_alignment=64, delegate_alignment=64),
    "mvlm": mvlm_like,
}


@dataclass(frozen=True)
class Pte:
    """A file, the facts about it, and what ExecuTorch's deserializer makes of it."""

    path: Path
    facts: PteFacts
    reference: _PTEFile

    @property
    def program(self) -> Program:
        return self.reference.program


@pytest.fixture(scope="module")
def pte_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pte]:
    """Makes each of :data:`FILES` once."""
    folder = tmp_path_factory.mktemp("pte")
    made: dict[str, Pte] = {}

    def make(name: str) -> Pte:
        if name not in made:
            torch.manual_seed(0)
            path = folder / f"{name}.pte"
            path.write_bytes(FILES[name]().buffer)
            made[name] = Pte(path, inspect_pte(path), _deserialize_pte_binary(path.read_bytes()))
        return made[name]

    return make


@pytest.fixture(params=FILES)
def pte(request: pytest.FixtureRequest, pte_of: Callable[[str], Pte]) -> Pte:
    return pte_of(request.param)


def method(facts: PteFacts, name: str = "forward") -> MethodFacts:
    [found] = [method for method in facts.methods if method.name == name]
    return found


def total(data: Iterable[DataFacts]) -> int:
    return sum(facts.num_bytes for facts in data)


# -- every file -------------------------------------------------------------------------------------------------------


def test_every_byte_is_accounted_for(pte):
    assert pte.facts.size == os.path.getsize(pte.path)
    assert sum(pte.facts.regions.values()) == pte.facts.size
    assert min(pte.facts.regions.values()) >= 0
    assert pte.facts.regions["segments that nothing refers to"] == 0
    assert pte.facts.regions["bytes after the end"] == 0


def test_regions_are_those_that_executorch_wrote(pte):
    """Bytes of each region, from the objects that ExecuTorch's deserializer makes of the file."""
    regions, data = pte.facts.regions, pte.path.read_bytes()
    header = _get_extended_header(data)
    flatbuffer = _flatbuffer_to_program(data[: header.program_size] if header else data)
    assert pte.facts.extended_header == (header is not None)
    assert regions["extended header"] == (header.length if header else 0)
    named = pte.reference.named_data
    assert regions["named data"] == total(pte.facts.named_data) == (sum(map(len, named.buffers)) if named else 0)
    blobs = {
        (delegate.processed.location, delegate.processed.index)
        for plan in flatbuffer.execution_plan
        for delegate in plan.delegates
    }
    assert regions["delegate blobs"] == sum(
        flatbuffer.segments[index].size
        if location == DataLocation.SEGMENT
        else len(flatbuffer.backend_delegate_data[index].data)
        for location, index in blobs
    )
    constants = {}
    for plan in pte.program.execution_plan:
        for value in plan.values:
            if isinstance(value.val, Tensor) and value.val.data_buffer_idx and not value.val.allocation_info:
                constants[value.val.data_buffer_idx] = value.val
    external = [tensor for tensor in constants.values() if tensor.extra_tensor_info]
    if external:
        assert regions["constants"] == 0
    else:
        assert regions["constants"] == total(pte.facts.constants)
        assert sum(facts.count for facts in pte.facts.constants) == len(constants)
        for index, tensor in constants.items():  # padding apart, the bytes of the constants are those of their tensors
            storage = pte.program.constant_buffer[index].storage
            itemsize = getattr(torch, DTYPE[tensor.scalar_type.name]).itemsize
            assert 0 <= len(storage) - math.prod(tensor.sizes) * itemsize < 64


DTYPE = {"FLOAT": "float32", "LONG": "int64", "SHORT": "int16", "BYTE": "uint8", "INT": "int32"}


def test_methods_are_those_of_the_program(pte):
    plans = {plan.name: plan for plan in pte.program.execution_plan}
    assert {method.name for method in pte.facts.methods} | set(pte.facts.metadata) == set(plans)
    for facts in pte.facts.methods:
        plan = plans[facts.name]
        for values, indices in ((facts.inputs, plan.inputs), (facts.outputs, plan.outputs)):
            assert len(values) == len(indices)
            for value, index in zip(values, indices, strict=True):
                expected = plan.values[index].val
                assert value.kind == type(expected).__name__.lower()
                if isinstance(expected, Tensor):
                    assert value.shape == tuple(expected.sizes)
                    assert value.dtype == DTYPE[expected.scalar_type.name]
                    assert value.dynamism == {0: "static", 1: "bounded", 2: "unbounded"}[expected.shape_dynamism]

        instructions = [instruction.instr_args for chain in plan.chains for instruction in chain.instructions]
        calls = Counter(call.op_index for call in instructions if isinstance(call, KernelCall))
        expected = {
            f"{op.name}.{op.overload}".removesuffix("."): calls[index] for index, op in enumerate(plan.operators)
        }
        assert {operator.name: operator.calls for operator in facts.operators} == expected
        assert sum(delegates.count for delegates in facts.delegates) == len(plan.delegates)
        assert {delegates.backend for delegates in facts.delegates} == {delegate.id for delegate in plan.delegates}
        assert sum(delegates.calls for delegates in facts.delegates) == sum(
            isinstance(call, DelegateCall) for call in instructions
        )
        assert [arena.num_bytes for arena in facts.memory] == plan.non_const_buffer_sizes[1:]
        assert [arena.memory_id for arena in facts.memory] == list(range(1, len(plan.non_const_buffer_sizes)))


@pytest.mark.parametrize("name", ["portable", "xnnpack", "quantized", "methods", "mutable"])
def test_methods_are_those_that_the_runtime_sees(name, pte_of):
    pte = pte_of(name)
    program = Runtime.get().load_program(pte.path)
    assert program.method_names == {method.name for method in pte.facts.methods} | set(pte.facts.metadata)
    for facts in pte.facts.methods:
        meta = program.metadata(facts.name)
        assert (meta.num_inputs(), meta.num_outputs()) == (len(facts.inputs), len(facts.outputs))
        for values, info in ((facts.inputs, meta.input_tensor_meta), (facts.outputs, meta.output_tensor_meta)):
            for index, value in enumerate(values):
                if value.kind == "tensor":
                    size = math.prod(value.shape) * getattr(torch, value.dtype).itemsize
                    assert (info(index).sizes(), info(index).nbytes()) == (value.shape, size)


def test_json_and_text_tell_the_same(pte):
    document = json.loads(to_json(pte.facts), parse_constant=pytest.fail)
    assert document["size"] == pte.facts.size
    assert sum(document["regions"].values()) == pte.facts.size
    assert [method["name"] for method in document["methods"]] == [method.name for method in pte.facts.methods]
    text = to_text(pte.facts)
    assert f"{pte.facts.size:,} bytes" in text
    for facts in pte.facts.methods:
        assert f"method {facts.name}\n" in text
        for operator in facts.operators:
            assert operator.name in text
            assert operator.library in text
    for kind, size in pte.facts.regions.items():
        assert (f"{size:,} bytes" in text) or size == 0, kind
    lines = text[text.index("where the bytes are") :].splitlines()[1:-1]
    assert sum(int(line.split(" bytes ")[0].split()[-1].replace(",", "")) for line in lines) == pte.facts.size


# -- what is in them --------------------------------------------------------------------------------------------------


def test_portable_operators(pte_of):
    facts = pte_of("portable").facts
    assert (facts.identifier, facts.schema_version, facts.mvlm, facts.named_data) == ("ET12", 0, None, ())
    forward = method(facts)
    assert forward.delegates == ()
    assert {operator.library for operator in forward.operators} == {"ExecuTorch portable or optimized kernels"}
    assert "aten::relu.out" in {operator.name for operator in forward.operators}
    assert facts.constants == (DataFacts("float32", 3, 4 * (WIDTH * WIDTH + WIDTH + 8 * WIDTH)),)


@pytest.mark.parametrize("name", ["xnnpack", "inline delegates", "aligned"])
def test_xnnpack_delegate(name, pte_of):
    facts = pte_of(name).facts
    forward = method(facts)
    assert forward.operators == ()
    [delegates] = forward.delegates
    assert (delegates.backend, delegates.count, delegates.calls, delegates.readable) == ("XnnpackBackend", 1, 1, True)
    # ReLU is fused into the linear before it.
    assert delegates.nodes == {"FullyConnected (float32)": 2}
    assert delegates.num_bytes == facts.regions["delegate blobs"] > 0
    assert facts.named_data == (DataFacts("float32", 3, 4 * (WIDTH * WIDTH + WIDTH + 8 * WIDTH)),)
    assert facts.constants == facts.delegate_constants == ()
    [x], [y] = forward.inputs, forward.outputs
    assert (x.dtype, x.shape, x.dynamism) == ("float32", (16, WIDTH), "bounded")
    assert (y.shape, y.dynamism) == ((16, 8), "bounded")
    text = to_text(facts)
    assert f"in   float32 [16, {WIDTH}] at most\n" in text.replace("in     ", "in   ")
    assert "2 FullyConnected (float32)" in text


def test_quantized_delegates(pte_of):
    facts = pte_of("quantized").facts
    nodes = Counter()
    for delegates in method(facts).delegates:
        nodes.update({node: count * delegates.count for node, count in delegates.nodes.items()})
    assert nodes["FullyConnected (int4 in groups of 32)"] == 1
    assert nodes["FullyConnected (float32)"] == 1
    assert nodes["Convert"] == 1
    named = {data.kind: data for data in facts.named_data}
    assert named["int4 in groups of 32"] == DataFacts("int4 in groups of 32", 1, WIDTH * WIDTH // 2)
    scales = named["scales of int4 in groups of 32"]
    assert (scales.count, scales.num_bytes) == (1, 2 * WIDTH * WIDTH // 32)  # bfloat16
    assert named["float32"] == DataFacts("float32", 2, 4 * (WIDTH + 8 * WIDTH))
    assert len(named) == 3


def test_delegate_with_groups_of_no_weights(pte_of, monkeypatch):
    table = inspect._bindings(inspect._XNNPACK_SCHEMA).PerChannelGroupQuant
    monkeypatch.setattr(table, "GroupSize", lambda _self: 0)
    delegates = method(inspect_pte(pte_of("quantized").path)).delegates
    assert sorted(delegate.readable for delegate in delegates) == [False, True, True]


def test_two_methods_share_weights(pte_of):
    facts = pte_of("methods").facts
    assert [method.name for method in facts.methods] == ["keyword", "one", "two"]
    assert facts.named_data == (DataFacts("float32", 3, 4 * (WIDTH * WIDTH + WIDTH + 8 * WIDTH)),)
    assert method(facts, "one").inputs[0].shape == (1, WIDTH)
    assert method(facts, "two").inputs[0].shape == (2, WIDTH)


def test_names_of_keywords(pte_of):
    keyword = method(pte_of("methods").facts, "keyword")
    assert [(value.name, value.kind, value.dtype) for value in keyword.inputs] == [
        (None, "tensor", "float32"),
        ("ids", "tensor", "int64"),
        ("n", "int", None),
    ]
    assert [value.dtype for value in keyword.outputs] == ["float32", "int32"]
    assert any(operator.name.startswith("dim_order_ops::") for operator in keyword.operators)


def test_constant_methods(pte_of):
    facts = pte_of("methods").facts
    assert facts.metadata == CONSTANT_METHODS | {"a_tensor": "int16 [3, 100]"}
    assert facts.constants == (DataFacts("int16", 1, 600), DataFacts("int64", 1, 8)), "the second is keyword's n"
    assert json.loads(to_json(facts))["metadata"]["infinite"] == "inf"
    text = to_text(facts)
    assert r'"Grüße\n\u001b[31m"' in text
    assert "\x1b" not in text


@pytest.mark.parametrize("name", ["mutable", "named mutable", "initialized mutable"])
def test_mutable_buffer(name, pte_of):
    facts = pte_of(name).facts
    [arena] = method(facts).memory
    assert (arena.mutable_buffers, arena.mutable_bytes) == (1, 8 * 4)
    assert f"planned memory: {arena.num_bytes:,} bytes, of that 32 in 1 mutable buffer\n" in to_text(facts)
    assert facts.regions["initial values of mutable buffers"] == (32 if name == "initialized mutable" else 0)
    assert DataFacts("int64", 1, 48) in facts.constants, "the other buffer is a constant"


def test_external_constants(pte_of):
    facts = pte_of("external constants").facts
    assert facts.external == (DataFacts("float32", 3, 4 * (WIDTH * WIDTH + WIDTH + 8 * WIDTH)),)
    assert facts.constants == ()
    assert facts.size < facts.external[0].num_bytes
    assert "constants in a .ptd, not in this file" in to_text(facts)


def test_mvlm_file(pte_of):
    facts = pte_of("mvlm").facts
    mvlm = facts.mvlm
    assert (mvlm.format_version, mvlm.mvlm_version, mvlm.model_name) == (FORMAT_VERSION, "0.9", "tiny")
    assert mvlm.checkpoint_id == "sha256:0123"
    assert mvlm.recipe == json.loads(mobile().to_json())
    assert (mvlm.tokenizer.kind, mvlm.tokenizer.num_bytes, mvlm.tokenizer.pieces) == ("unknown", 200, None)
    assert facts.metadata == METADATA.to_constant_methods() | {TOKENIZER: "uint8 [200]"}
    [ids] = method(facts, "token_embedding").inputs
    assert (ids.name, ids.dtype, ids.shape) == ("ids", "int64", (1, 3))
    text = to_text(facts)
    assert f"made by mvlm 0.9, format {FORMAT_VERSION}\n" in text
    assert "group_size 32" in text
    assert "unknown, 200 bytes" in text
    assert "mvlm_recipe" not in text, "it is told above"


@pytest.mark.parametrize(
    ("operator", "library"),
    [
        ("aten::add", "ExecuTorch portable or optimized kernels"),
        ("aten::sym_size", "ExecuTorch runtime"),
        ("executorch_prim::et_view", "ExecuTorch runtime"),
        ("dim_order_ops::_clone_dim_order", "ExecuTorch portable or optimized kernels"),
        ("quantized_decomposed::embedding_byte", "ExecuTorch quantized kernels"),
        ("mvlm::sdpa_with_kv_cache", "libmvlm_ops"),
        ("llama::custom_sdpa", "ExecuTorch llm custom operators"),
        ("aten_like::add", "unknown"),
        ("", "unknown"),
    ],
)
def test_libraries(operator, library):
    assert library_of(operator) == library


def test_the_demo_model(demo_pte):
    """A real file of ours: what its metadata, its tokenizer and its size are is known from beside it."""
    facts = inspect_pte(demo_pte)
    assert sum(facts.regions.values()) == demo_pte.stat().st_size
    description = json.loads(demo_pte.with_suffix(".json").read_text())
    assert facts.mvlm.checkpoint_id == description["checkpoint_id"]
    assert facts.mvlm.recipe == json.loads(description["recipe"])
    assert facts.mvlm.tokenizer.kind == "SentencePiece"
    assert facts.mvlm.tokenizer.num_bytes == demo_pte.with_name("tokenizer.model").stat().st_size
    assert facts.mvlm.tokenizer.pieces == description["vocab_size"]
    assert {method.name for method in facts.methods} == {"vision_encoder", "token_embedding", "text_decoder"}
    text = method(facts, "text_decoder")
    assert [value.name for value in text.inputs] == ["embeddings", "start_pos"]
    attention = [operator for operator in text.operators if operator.name.startswith("mvlm::sdpa")]
    [arena] = text.memory
    layers = sum(operator.calls for operator in attention)
    assert arena.mutable_buffers == 4 * layers, "keys and values of each layer, and their scales"
    assert all(delegates.readable for method in facts.methods for delegates in method.delegates)
    assert {data.kind for data in facts.named_data} >= {"int8 per channel", "scales of int8 per channel"}
    assert not any("not referred to" in data.kind for data in facts.named_data)
    assert all(operator.library != "unknown" for method in facts.methods for operator in method.operators)


# -- other people's files ---------------------------------------------------------------------------------------------


def test_old_file_without_header(pte_of, tmp_path):
    """As before segments were invented: no header, constants and delegates in the flatbuffer."""
    for name in ("portable", "xnnpack"):
        pte = pte_of(name)
        program = _deserialize_pte_binary(pte.path.read_bytes()).program
        program.constant_segment = None
        path = tmp_path / "old.pte"
        path.write_bytes(_program_to_flatbuffer(program).data)
        facts = inspect_pte(path)
        assert not facts.extended_header
        assert "without extended header" in to_text(facts)
        assert sum(facts.regions.values()) == os.path.getsize(path)
        assert facts.regions["extended header"] == facts.regions["named data"] == 0
        assert facts.constants == pte.facts.constants
        assert facts.methods == pte.facts.methods
        assert facts.regions["delegate blobs"] == pte.facts.regions["delegate blobs"]


def rewritten(pte: Pte, change: Callable[[Program], None]) -> bytes:
    """A file with its program changed, as another exporter might have written it."""
    reference = _deserialize_pte_binary(pte.path.read_bytes())
    change(reference.program)
    return bytes(_serialize_pte_binary(reference, extract_delegate_segments=True))


def test_other_backend(pte_of, tmp_path):
    def change(program: Program) -> None:
        program.execution_plan[0].delegates[0].id = "SomeNpu"

    path = tmp_path / "npu.pte"
    path.write_bytes(rewritten(pte_of("xnnpack"), change))
    facts = inspect_pte(path)
    [delegates] = method(facts).delegates
    assert (delegates.backend, delegates.nodes, delegates.readable) == ("SomeNpu", {}, True)
    assert delegates.num_bytes == facts.regions["delegate blobs"]
    assert [data.kind for data in facts.named_data] == ["not referred to by XNNPACK"]
    assert sum(facts.regions.values()) == os.path.getsize(path)


@pytest.mark.parametrize(
    "blob", [b"\0" * 100, b"\0\0\0\0XH00" + b"\xff" * 40, b"\xff\xff\0\0XN01" + b"\xff" * 9, b"XN"]
)
def test_unreadable_delegate(blob, pte_of, tmp_path):
    """The rest of the file is shown nevertheless."""

    def change(program: Program) -> None:
        program.backend_delegate_data[0].data = blob

    path = tmp_path / "x.pte"
    path.write_bytes(rewritten(pte_of("xnnpack"), change))
    facts = inspect_pte(path)
    [delegates] = method(facts).delegates
    assert (delegates.readable, delegates.nodes, delegates.num_bytes) == (False, {}, len(blob))
    assert "not readable" in to_text(facts)
    assert sum(facts.regions.values()) == os.path.getsize(path)


def test_bytes_after_the_end(pte_of, tmp_path):
    path = tmp_path / "longer.pte"
    path.write_bytes(pte_of("xnnpack").path.read_bytes() + bytes(1000))
    facts = inspect_pte(path)
    assert facts.regions["bytes after the end"] == 1000
    assert sum(facts.regions.values()) == os.path.getsize(path)


# -- large files ------------------------------------------------------------------------------------------------------

#: ru_maxrss would be of no use: it begins with what the parent process had. Bytes read tell of a pass over the weights
#: that keeps nothing; time would tell of the machine.
MEASURE = """
import sys
from pathlib import Path
from mvlm.export.inspect import inspect_pte
def value(file, name):
    [line] = [line for line in Path("/proc/self", file).read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1])
before = value("io", "rchar")
facts = inspect_pte(sys.argv[1])
read, peak_kib = value("io", "rchar") - before, value("status", "VmHWM")
print(facts.size == sum(facts.regions.values()), facts.regions["named data"], read, peak_kib, "torch" in sys.modules)
"""


def test_weights_are_not_read(pte_of, tmp_path):
    """3 GiB of weights, which are a hole in the file: they cost neither memory nor time."""
    weights = 3 * 2**30
    data = pte_of("quantized").path.read_bytes()
    header = _get_extended_header(data)
    program = _flatbuffer_to_program(data[: header.program_size])
    segments = data[header.segment_base_offset :]
    end = -(-len(segments) // 128) * 128
    program.segments.append(DataSegment(offset=end, size=weights))
    program.named_data.append(NamedData(key="huge", segment_index=len(program.segments) - 1))
    flatbuffer = _program_to_flatbuffer(program).data
    program_size = len(flatbuffer) + 32
    base = -(-program_size // 128) * 128
    root = int.from_bytes(flatbuffer[:4], "little") + 32
    path = tmp_path / "huge.pte"
    with path.open("wb") as file:
        file.write(root.to_bytes(4, "little") + flatbuffer[4:8])
        file.write(_ExtendedHeader(program_size, base, end + weights).to_bytes() + flatbuffer[8:])
        file.seek(base)
        file.write(segments)
        file.truncate(base + end + weights)
    result = subprocess.run([sys.executable, "-c", MEASURE, path], capture_output=True, text=True, check=True)
    adds_up, named, read, peak_kib, torch_loaded = result.stdout.split()
    assert adds_up == "True"
    assert int(named) == weights + pte_of("quantized").facts.regions["named data"]
    # Both are many times what Python and the rest of the file take: 3 MiB read, and 38 MiB in memory.
    assert int(read) < weights / 20
    assert int(peak_kib) * 1024 < weights / 20
    assert torch_loaded == "False", "it answers at once"


# -- files that are none ----------------------------------------------------------------------------------------------


def fails(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The message with which the command refuses a file."""
    assert main([str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"mvlm.export.inspect: {path}: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"x", "no ExecuTorch program: it lacks the identifier ET12"),
        (b"a text about something else entirely\n" * 9, "no ExecuTorch program"),
        (bytes(5000), "no ExecuTorch program"),
        (b"\0\0\0\0FT01" + bytes(100), r"is a \.ptd"),
        (b"\0\0\0\0BP08" + bytes(100), "is a bundled program"),
        (b"\0\0\0\0ED00" + bytes(100), "is an ETDump"),
        (b"\0\0\0\0ET12", "is truncated: 8 bytes"),
        (b"\0\0\0\0ET12eh00\x20\0\0\0", "is truncated: 16 bytes"),
        (b"\xff\xff\xff\xffET12" + bytes(100), "is broken or truncated"),
        (b"\x08\0\0\0ET12" + b"\xff" * 100, "is broken or truncated"),
        (b"\0\0\0\0ET12eh00\x20\0\0\0" + bytes(100), "is broken"),
    ],
)
def test_no_pte(content, message, tmp_path, capsys):
    path = tmp_path / "x.pte"
    path.write_bytes(content)
    assert re.search(message, fails(path, capsys))


def test_no_file(tmp_path, capsys):
    assert fails(tmp_path / "none.pte", capsys).endswith(": no such file\n")
    assert fails(tmp_path, capsys).endswith(": is no file\n")


@pytest.mark.parametrize("name", ["quantized", "methods", "mutable", "inline delegates"])
def test_truncated(name, pte_of, tmp_path, capsys):
    """Wherever it is cut, the command says so."""
    data = pte_of(name).path.read_bytes()
    path = tmp_path / "cut.pte"
    for size in sorted({*range(0, 128, 3), *range(128, len(data), max(1, len(data) // 60)), len(data) - 1}):
        path.write_bytes(data[:size])
        fails(path, capsys)


def test_truncated_without_header(pte_of, tmp_path):
    """Such a file does not say how long it is; a cut shows only where it took something that is looked at."""
    program = _deserialize_pte_binary(pte_of("xnnpack").path.read_bytes()).program
    program.constant_segment = None
    data = _program_to_flatbuffer(program).data
    path = tmp_path / "cut.pte"
    for size in range(0, len(data), max(1, len(data) // 100)):
        path.write_bytes(data[:size])
        with pytest.raises(ExportError, match=r"is empty|is truncated|no ExecuTorch program|is broken"):
            inspect_pte(path)


def test_damaged(pte_of, tmp_path):
    """Any byte of the program may be wrong: then the file is refused or the facts are, but nothing is thrown."""
    data = bytearray(pte_of("methods").path.read_bytes())
    path = tmp_path / "damaged.pte"
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        position = int(torch.randint(8, _get_extended_header(bytes(data)).program_size, (), generator=generator))
        damaged = bytearray(data)
        damaged[position] ^= 1 << int(torch.randint(8, (), generator=generator))
        path.write_bytes(damaged)
        with contextlib.suppress(ExportError):
            facts = inspect_pte(path)
            assert sum(facts.regions.values()) == len(data)
            to_text(facts)
            to_json(facts)


# -- the command ------------------------------------------------------------------------------------------------------


def test_command(pte_of, capsys):
    pte = pte_of("methods")
    assert main([str(pte.path)]) == 0
    assert capsys.readouterr().out == to_text(pte.facts) + "\n"
    assert main([str(pte.path), "--json"]) == 0
    assert capsys.readouterr().out == to_json(pte.facts) + "\n"


def test_one_method(pte_of, capsys):
    pte = pte_of("methods")
    assert main([str(pte.path), "--json", "--method", "two"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [method["name"] for method in document["methods"]] == ["two"]
    assert document["size"] == pte.facts.size
    assert main([str(pte.path), "--method", "two"]) == 0
    text = capsys.readouterr().out
    assert "method two" in text
    assert "method one" not in text
    assert main([str(pte.path), "--method", "three"]) == 2
    assert "has no method 'three' that computes something; it has: keyword, one, two" in capsys.readouterr().err


def test_long_lists_are_shortened_unless_asked_for(pte_of, capsys, monkeypatch):
    monkeypatch.setattr(inspect, "_LISTED", 1)
    path = str(pte_of("portable").path)
    operators = method(pte_of("portable").facts).operators
    assert len(operators) > 1
    assert main([path]) == 0
    text = capsys.readouterr().out
    assert operators[0].name in text
    assert operators[-1].name not in text
    assert f"… and {len(operators) - 1} more kinds: --method lists all" in text
    assert main([path, "--method", "forward"]) == 0
    text = capsys.readouterr().out
    assert all(operator.name in text for operator in operators)


def test_help_and_pipe(pte_of):
    """As people call it, from a shell."""
    command = f"{sys.executable} -m mvlm.export.inspect"
    result = subprocess.run([*command.split(), "--help"], capture_output=True, text=True, check=True)
    assert "examples:" in result.stdout
    assert "--method text_decoder" in result.stdout
    # The reader of the pipe is gone before anything is written.
    script = f"{command} {pte_of('quantized').path} | true; test ${{PIPESTATUS[0]}} = 0"
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
