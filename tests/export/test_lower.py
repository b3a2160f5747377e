"""Lowering: everything heavy is delegated, a linear left outside is an error, and being quick changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from types import SimpleNamespace
from unittest import mock

import executorch.backends.xnnpack._passes as xnnpack_passes
import pytest
import torch
from executorch.backends.xnnpack._passes import XNNPACKPassManager
from executorch.exir import EdgeProgramManager, ExecutorchBackendConfig
from executorch.exir.backend.partitioner import PartitionResult
from executorch.exir.delegate import executorch_call_delegate
from random_checkpoint import RandomCheckpoint, Sizes
from torch import Tensor, nn
from torch.export import ExportedProgram
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
from torchao.quantization.granularity import PerGroup

from mvlm.export import lower as lowering
from mvlm.export.capture import CapturedMethod, capture
from mvlm.export.checkpoint import open_checkpoint
from mvlm.export.contract import TEXT_DECODER, TOKEN_EMBEDDING, VISION_ENCODER
from mvlm.export.errors import ExportError
from mvlm.export.lower import MethodDelegation, delegation_table, lower_program, skipping_idle_passes
from mvlm.export.progress import Progress
from mvlm.export.quantize import quantize_checkpoint
from mvlm.export.recipe import Recipe
from mvlm.export.spool import Spool

LAYERS = 2
LINEARS_OF_A_LAYER = 4
PATCHES = 1
LINEARS_OF_A_BLOCK = 4
LINEAR_PROJECTOR = 1
LM_HEAD = 1


#: What takes the last positions out of token stream and branch, and makes one sequence of their logits.
LAST_POSITIONS = {
    "aten.sym_size": 1,
    "aten.arange": 1,
    "aten.index_select": 2,
    "aten.select_copy": 1,
    "aten.unsqueeze_copy": 1,
}


def test_all_linears_of_the_text_decoder_are_delegated(lowered):
    text = lowered.delegation[-1]
    assert text.method == TEXT_DECODER
    assert text.quantized_linears == LAYERS * LINEARS_OF_A_LAYER + LM_HEAD
    assert 1 <= text.quantized <= text.quantized_linears
    assert not any("linear" in name or "mm" in name or "quantize" in name for name in text.left)


def test_little_is_left_of_a_decoder_layer(lowered):
    """Two norms with the additions before them, attention, and SwiGLU; around the layers, a few small operators."""
    text = lowered.delegation[-1]
    assert (text.float32, text.float32_operators) == (0, 0)
    assert (
        text.left
        == {
            "mvlm.add_rms_norm": 2 * LAYERS + 1,
            "mvlm.sdpa_with_int8_kv_cache": LAYERS,
            "mvlm.swiglu": LAYERS,
            "aten.full_like": 1,
        }
        | LAST_POSITIONS
    )


def test_all_linears_of_the_vision_encoder_are_delegated(lowered):
    vision, embedding, _ = lowered.delegation
    assert vision.method == VISION_ENCODER
    assert vision.quantized_linears == PATCHES + LAYERS * LINEARS_OF_A_BLOCK + LINEAR_PROJECTOR
    assert vision.float32 >= 1
    assert vision.left == {
        "mvlm.layer_norm": 1,
        "mvlm.add_layer_norm": 2 * LAYERS,
        "mvlm.attention": LAYERS,
        "mvlm.quick_gelu": LAYERS,
        "dim_order_ops._to_dim_order_copy": 1,
        "aten.full_like": 1,
    }

    assert embedding.method == TOKEN_EMBEDDING
    assert (embedding.quantized, embedding.quantized_linears, embedding.float32) == (0, 0, 0)
    assert embedding.left == {"quantized_decomposed.embedding_byte": 1}


def test_what_is_counted_is_what_is_there(lowered_with_nodes):
    """The sums over pieces and layers, against the assembled programs."""
    lowered, nodes_of = lowered_with_nodes
    for method in lowered.delegation:
        nodes = nodes_of[method.method]
        calls = [node for node in nodes if node.target is executorch_call_delegate]
        assert len(calls) == method.quantized + method.float32
        assert lowering._operators_left(nodes) == method.left


def test_table_of_what_was_taken(lowered):
    delegation = lowered.delegation
    lines = delegation_table(delegation).splitlines()
    assert lines[0].split("  ")[0] == "method"
    assert len({len(line) for line in lines[:4]}) == 1, "the columns are aligned"
    for line, method in zip(lines[1:4], delegation, strict=True):
        name, *numbers = line.split()
        assert name == method.method
        assert [int(number) for number in numbers] == [
            method.quantized,
            method.quantized_linears,
            method.float32,
            method.float32_operators,
            sum(method.left.values()),
        ]
    assert [line.split(":")[0] for line in lines[4:]] == [f"left in {method.method}" for method in delegation]
    assert "2 mvlm.sdpa_with_int8_kv_cache" in lines[-1]


def test_table_of_methods_that_are_delegated_whole():
    table = delegation_table([MethodDelegation("vision_encoder", 1, 2, 3, 4, {})])
    assert table.splitlines()[1].split() == ["vision_encoder", "1", "2", "3", "4", "0"]
    assert "left in" not in table


@pytest.mark.parametrize(
    "packet", ["aten.linear", "aten.addmm", "aten.mm", "torchao.choose_qparams_affine", "torchao.dequantize_affine"]
)
def test_linear_that_stayed_outside_is_an_error(packet):
    inside = MethodDelegation(VISION_ENCODER, 1, 1, 1, 1, {"aten.mean": 2})
    embedding = MethodDelegation(TOKEN_EMBEDDING, 0, 0, 0, 0, {"torchao.dequantize_affine": 1})
    lowering._check_delegation([inside, embedding])
    outside = MethodDelegation(TEXT_DECODER, 1, 1, 1, 1, {"aten.mean": 2, packet: 3})
    with pytest.raises(ExportError, match=rf"did not take every .* stayed text_decoder: 3 x {packet}$"):
        lowering._check_delegation([inside, embedding, outside])


class Linears(nn.Module):
    def __init__(self, quantized: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 8, bias=False).requires_grad_(False)
        if quantized:
            scheme = Int8DynamicActivationIntxWeightConfig(torch.int4, weight_granularity=PerGroup(32))
            quantize_(self, scheme)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


@pytest.mark.parametrize("quantized", [False, True], ids=["float32", "quantized"])
def test_linears_that_xnnpack_refuses_are_noticed(quantized, monkeypatch):
    """The same on real programs: with partitioners that take nothing, lower() must not succeed."""
    program = torch.export.export(Linears(quantized), (torch.zeros(1, 2, 32),))

    def refuse(self: object, exported_program: ExportedProgram) -> PartitionResult:
        return PartitionResult(tagged_exported_program=exported_program, partition_tags={})

    monkeypatch.setattr(lowering.XnnpackPartitioner, "partition", refuse)
    with pytest.raises(ExportError, match=r"outside the delegates stayed .*text_decoder: 1 x ") as caught:
        lower_program(TEXT_DECODER, program)
    assert ("torchao." in str(caught.value)) == quantized


# -- quick lowering ---------------------------------------------------------------------------------------------------


def serialized(method: str, program: ExportedProgram) -> bytes:
    edge = EdgeProgramManager({method: program}, {}, lowering.EDGE_COMPILE_CONFIG)
    return edge.to_executorch(ExecutorchBackendConfig()).buffer


def lower_slowly(method: str, program: ExportedProgram) -> tuple[ExportedProgram, MethodDelegation]:
    """As ExecuTorch does it: with all its passes, and deciding about every call by itself."""

    def untuned(self: lowering._CountsWhatItTakes, exported_program: ExportedProgram):
        return super(lowering._CountsWhatItTakes, self).ops_to_not_decompose(exported_program)

    with (
        mock.patch.object(lowering, "skipping_idle_passes", nullcontext),
        mock.patch.object(lowering._CountsWhatItTakes, "ops_to_not_decompose", untuned),
    ):
        return lower_program(method, program)


@pytest.mark.filterwarnings("ignore:Mutation on a buffer")  # the KV cache; it is meant
def test_quick_lowering_gives_the_program_of_slow_lowering(captured):
    """Byte for byte."""
    [program] = [piece.program for piece in captured[-1].pieces if piece.layers]
    quick, delegation = lower_program(TEXT_DECODER, program)
    slow, slow_delegation = lower_slowly(TEXT_DECODER, program)
    assert slow_delegation == delegation
    assert serialized(TEXT_DECODER, slow) == serialized(TEXT_DECODER, quick)


@pytest.fixture(scope="module")
def captured_for_executorch(tmp_path_factory) -> Iterator[dict[str, tuple[CapturedMethod, ...]]]:
    """Small models with both kinds of depthwise convolutions, by projector, without operators of ours."""
    recipe = Recipe(max_context_len=32, kv_cache="fp32", attention_op="llama")
    with ExitStack() as stack, torch.no_grad():
        captured = {}
        for projector in ("ldpnet", "ldpnetv2"):
            folder = RandomCheckpoint.make(Sizes(projector=projector)).write(tmp_path_factory.mktemp(projector))
            spool = stack.enter_context(Spool(tmp_path_factory.mktemp("spool")))
            checkpoint = open_checkpoint(str(folder))
            quantized = quantize_checkpoint(checkpoint, recipe, spool, Progress(quiet=True))
            captured[projector] = capture(quantized)
        yield captured


@pytest.mark.filterwarnings("ignore:Mutation on a buffer")  # the KV cache; it is meant
@pytest.mark.parametrize(
    ("projector", "name"),
    [
        ("ldpnet", "vision_head"),
        ("ldpnet", "vision_tower.encoder.layers"),
        ("ldpnet", "vision_tail"),
        ("ldpnetv2", "vision_tail"),
        ("ldpnet", "language_model.layers"),
        ("ldpnet", "text_tail"),
    ],
)
def test_little_is_left_without_our_operators(captured_for_executorch, projector, name):
    """And what XNNPACK got is, byte for byte, what it gets with all of its passes."""
    methods = captured_for_executorch[projector]
    [(method, piece)] = [(method, piece) for method in methods for piece in method.pieces if piece.name == name]
    # A folded weight is lost to whoever lowers the program a second time.
    again = copy.deepcopy(piece.program)
    quick, delegation = lower_program(method.name, piece.program)
    allowed = {
        "vision_head": {"aten.native_layer_norm", "aten.constant_pad_nd", "aten.sym_size", "aten.unsqueeze_copy"}
        | {"dim_order_ops._to_dim_order_copy", "aten.full_like"},
        "vision_tower.encoder.layers": {"aten.native_layer_norm", "aten.split_with_sizes_copy"},
        "vision_tail": {"aten.native_layer_norm", "aten.full"},
        "language_model.layers": {"aten.mean", "aten.index_select", "aten.arange", "aten.add", "aten.sym_size"}
        | {"aten.split_with_sizes_copy", "aten.unsqueeze_copy", "aten.view_copy", "aten._local_scalar_dense"}
        | {"llama.update_cache", "llama.custom_sdpa"},
        "text_tail": {"aten.mean", *LAST_POSITIONS},
    }
    assert set(delegation.left) <= allowed[name]
    slow, slow_delegation = lower_slowly(method.name, again)
    assert slow_delegation == delegation
    assert serialized(method.name, slow) == serialized(method.name, quick)


class WorkForPasses(nn.Module):
    """What our models do not have: operators that XNNPACK's passes have to rewrite."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 2, 3)
        self.norm = nn.BatchNorm1d(2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(torch.relu(self.conv(x)))
        return torch.cat([y, y + 1, y + 2, y + 3, y + 4, y + 5], dim=1)


def test_quick_lowering_where_passes_have_work():
    program = torch.export.export(WorkForPasses().eval().requires_grad_(False), (torch.zeros(1, 2, 8),))
    quick, _ = lower_program(VISION_ENCODER, program)
    slow, _ = lower_slowly(VISION_ENCODER, program)
    assert serialized(VISION_ENCODER, quick) == serialized(VISION_ENCODER, slow)


def test_only_passes_without_work_are_skipped(monkeypatch):
    """A named pass runs where its operators are and not elsewhere; a pass that is not named always runs."""

    class Softmax(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.softmax(x, dim=-1)

    class Sigmoid(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sigmoid(x)

    with_softmax, without = (
        torch.export.export(module(), (torch.zeros(2, 2),)).run_decompositions() for module in (Softmax, Sigmoid)
    )
    named, other = xnnpack_passes.ConvertToSDPAPass(with_softmax), xnnpack_passes.XNNPACKRemoveCloneOpsTransform()
    original = mock.Mock(side_effect=lambda program, pass_: program)
    monkeypatch.setattr(xnnpack_passes, "_transform", original)
    with skipping_idle_passes():
        for program in (with_softmax, without):
            for pass_ in (named, other):
                assert xnnpack_passes._transform(program, pass_) is program
    ran = [call.args for call in original.call_args_list]
    assert ran == [(with_softmax, named), (with_softmax, other), (without, other)]


def test_passes_are_restored_after_an_error():
    before = xnnpack_passes._transform
    with pytest.raises(KeyError), skipping_idle_passes():
        raise KeyError
    assert xnnpack_passes._transform is before


def test_table_of_passes_names_real_ones():
    """A pass or an operator that ExecuTorch renames would silently no longer be meant."""
    passes = {pass_.__name__ for pass_ in XNNPACKPassManager(None).passes}
    assert set(lowering._PASS_ACTS_ON) <= passes
    for packet in set().union(*lowering._PASS_ACTS_ON.values()) | lowering._LINEAR_PACKETS:
        namespace, name = packet.split(".")
        assert hasattr(getattr(torch.ops, namespace), name), packet


@pytest.mark.parametrize(
    ("verdicts", "kept", "decides_per_call"),
    [([True, True], True, False), ([False, False], False, False), ([True, False], True, True), ([], False, False)],
    ids=["all wanted", "none wanted", "some wanted", "no calls"],
)
def test_what_is_kept_whole(verdicts, kept, decides_per_call):
    linear = torch.ops.aten.linear.default
    nodes = [SimpleNamespace(target=linear, wanted=wanted) for wanted in verdicts]
    nodes.append(SimpleNamespace(target=torch.ops.aten.mean.dim))

    class Partitioner:
        def ops_to_not_decompose(self, exported_program):
            return [linear], lambda node: node.wanted

    class Counting(lowering._CountsWhatItTakes, Partitioner):
        pass

    program = SimpleNamespace(graph=SimpleNamespace(nodes=nodes))
    operators, is_wanted = Counting().ops_to_not_decompose(program)
    assert operators == ([linear] if kept else [])
    assert (is_wanted is not None) == decides_per_call
