"""Assemble: lowered pieces become whole methods, the layer of a stack as often as the stack has layers.

A lowered piece is a graph whose delegates find their weights by key, the hash of the weight's bytes. So a layer is
instantiated by copying the template's nodes and putting the keys of the layer's weights where the template's were;
nothing is traced, partitioned or compiled again. ExecuTorch then plans memory for the whole method and writes it as it
would have written the method lowered at once.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from executorch.exir._serialize._named_data_store import NamedDataStoreOutput
from executorch.exir._serialize.data_serializer import DataEntry
from executorch.exir.delegate import executorch_call_delegate
from executorch.exir.lowered_backend_module import LoweredBackendModule
from executorch.exir.tensor import TensorSpec
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.utils import _pytree as pytree
from torch.utils._sympy.symbol import SymT, symbol_is_type

from mvlm.export.capture import CapturedMethod, Piece
from mvlm.export.errors import ExportError
from mvlm.export.quantize import StackedLayer
from mvlm.export.spool import NamedData, keys_of, tensor_bytes


class _KnownOutputs:
    """Stands for the inside of a delegate where ExecuTorch only wants to know its outputs once more.

    The passes before memory planning run every delegate's original program on fake tensors, to learn shapes that the
    graph already says. That would take most of the time of an export.
    """

    def __init__(self, original: ExportedProgram, outputs: Any) -> None:
        self.graph = original.graph  # for debug handles
        self.outputs = outputs

    def module(self) -> Any:
        return lambda *_: self.outputs


@dataclass(frozen=True)
class _Template:
    """A lowered piece, taken apart."""

    piece: Piece
    placeholders: tuple[tuple[InputSpec, fx.Node], ...]
    body: tuple[fx.Node, ...]
    output: fx.Node

    @classmethod
    def of(cls, piece: Piece) -> _Template:
        nodes = list(piece.program.graph.nodes)
        placeholders = [node for node in nodes if node.op == "placeholder"]
        specs = piece.program.graph_signature.input_specs
        return cls(
            piece,
            tuple(zip(specs, placeholders, strict=True)),
            tuple(node for node in nodes if node.op not in ("placeholder", "output")),
            nodes[-1],
        )

    def user_inputs(self) -> Iterator[tuple[str, fx.Node]]:
        nodes = [node for spec, node in self.placeholders if spec.kind == InputKind.USER_INPUT]
        return zip(self.piece.inputs, nodes, strict=True)

    def initial(self, name: str) -> Tensor:
        program = self.piece.program
        return program.state_dict[name] if name in program.state_dict else program.constants[name]


def template_keys(piece: Piece) -> dict[str, tuple[str, int]]:
    """Key in the template's delegates -> the parameter of the layer and which of its parts it is.

    Raises:
        ExportError: two parameters of the template are equal, so that their keys cannot be told apart.
    """
    known: dict[str, tuple[str, int]] = {}
    for name, parts in piece.parameter_bytes.items():
        for index, key in enumerate(keys_of(parts)):
            if key in known:
                raise ExportError(f"{piece.name}: {name} and {known[key][0]} of the template are equal")
            known[key] = (name, index)
    return known


def layer_data(layer: StackedLayer, name: str) -> list[NamedData]:
    """The parts of one parameter of a layer, as :func:`template_keys` counts them."""
    if name in layer.weights:
        return layer.weights[name]
    data = tensor_bytes(layer.floats[name])
    return [NamedData(keys_of([data])[0], data)]


def instantiate(
    delegate: LoweredBackendModule, keys: Mapping[str, tuple[str, int]], layer: StackedLayer, outputs: Any
) -> LoweredBackendModule:
    """A template's delegate with a layer's weights.

    Raises:
        ExportError: the delegate holds data that are no parameter of the layer. ExecuTorch then stores weights in
            another way than this exporter knows.
    """
    stored = delegate.named_data_store_output
    blob = delegate.processed_bytes
    buffers: list[Any] = []
    entries: dict[str, DataEntry] = {}
    for key, entry in stored.pte_data.items() if stored is not None else ():
        if key not in keys:
            raise ExportError(
                f"a delegate of XNNPACK holds {len(stored.buffers[entry.buffer_index])} bytes that are no weight of "
                "the layer it was made from: this version of ExecuTorch stores weights in a way that this mvlm does "
                "not know; install the versions that pyproject.toml names"
            )
        name, part = keys[key]
        data = layer_data(layer, name)[part]
        if blob.count(key.encode()) != 1 or len(data.data) != len(stored.buffers[entry.buffer_index]):
            raise ExportError(f"{name}: its place in a delegate of XNNPACK was not found, or is of another size")
        blob = blob.replace(key.encode(), data.key.encode())
        # Two layers may hold the same bytes, and one delegate twice the same.
        if data.key not in entries:
            entries[data.key] = DataEntry(len(buffers), entry.alignment, entry.tensor_layout)
            buffers.append(data.data)
    instance = LoweredBackendModule(
        _KnownOutputs(delegate.original_module, outputs),
        delegate.backend_id,
        blob,
        delegate.compile_specs,
        NamedDataStoreOutput(buffers, entries, {}),
    )
    instance.meta = copy.copy(delegate.meta)
    return instance


class _MethodBuilder:
    """Copies pieces into one graph. Values that pass between pieces have names."""

    def __init__(self, method: CapturedMethod) -> None:
        self.method = method
        self.templates = [_Template.of(piece) for piece in method.pieces]
        first = method.pieces[0].program
        self.fake_mode = next(node.meta["val"].fake_mode for node in first.graph.nodes if node.op == "placeholder")
        # Every piece has at most one symbol that comes from the method's arguments, the number of tokens, each in an
        # environment of its own. Those of the first piece stand for all.
        self.range_constraints = dict(first.range_constraints)
        self.arguments_symbols = list(first.range_constraints)
        # Symbols that the copy of a piece makes itself of a tensor's value: the piece's -> this program's.
        self.unbacked: dict[sympy.Symbol, sympy.Symbol] = {}
        self.graph = fx.Graph()
        self.root = torch.nn.Module()
        self.state: dict[str, Tensor] = {}
        self.constants: dict[str, Tensor] = {}
        self.input_specs: list[InputSpec] = []
        self.mutations: list[tuple[fx.Node, str]] = []
        self.values: dict[str, fx.Node] = {}
        self.num_delegates = 0

    def build(self) -> ExportedProgram:
        uses = [
            (template, layer, f"{template.piece.name}.{index}" if layer else template.piece.name)
            for template in self.templates
            for index, layer in enumerate(template.piece.layers or (None,), start=template.piece.first_layer)
        ]
        # Placeholders come first: lifted tensors, then the method's arguments.
        shared: dict[fx.Node, fx.Node] = {}
        lifted = [self._lift(template, layer, name, shared) for template, layer, name in uses]
        for name in self.method.inputs:
            self._add_argument(name)
        for (template, layer, name), known in zip(uses, lifted, strict=True):
            self.unbacked = {}
            self._copy_body(template, layer, name, dict(known))
        return self._finish()

    def _convert(self, template: _Template, value: Any) -> Any:
        """A value of a template's node, in the method's fake mode and with its symbol."""
        ranges = template.piece.program.range_constraints
        symbols = [symbol for symbol in ranges if not symbol_is_type(symbol, SymT.UNBACKED_INT)]
        renamed = dict(zip(symbols, self.arguments_symbols, strict=bool(symbols)))
        environment = self.fake_mode.shape_env

        def convert_int(size: int | torch.SymInt) -> int | torch.SymInt:
            if not isinstance(size, torch.SymInt):
                return size
            for symbol in size.node.expr.free_symbols - renamed.keys() - self.unbacked.keys():
                with environment.ignore_fresh_unbacked_symbols():
                    self.unbacked[symbol] = environment.create_unbacked_symint().node.expr
                if symbol in ranges:
                    self.range_constraints[self.unbacked[symbol]] = ranges[symbol]
            expression = size.node.expr.xreplace(renamed | self.unbacked)
            return environment.create_symintnode(expression, hint=size.node.maybe_as_int())

        def convert(leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                with self.fake_mode:
                    sizes, strides = ([convert_int(n) for n in which] for which in (leaf.shape, leaf.stride()))
                    return torch.empty_strided(sizes, strides, dtype=leaf.dtype)
            return convert_int(leaf)

        return pytree.tree_map(convert, value)

    def _copy_meta(self, template: _Template, node: fx.Node, new: fx.Node) -> None:
        # "spec" belongs to the memory planning of one node and must not be shared.
        new.meta = {key: value for key, value in node.meta.items() if key != "spec"}
        if "val" in node.meta:
            new.meta["val"] = self._convert(template, node.meta["val"])
        if "unbacked_bindings" in node.meta:
            bindings = node.meta["unbacked_bindings"].items()
            new.meta["unbacked_bindings"] = {self.unbacked[symbol]: path for symbol, path in bindings}

    def _lift(
        self, template: _Template, layer: StackedLayer | None, name: str, shared: dict[fx.Node, fx.Node]
    ) -> dict[fx.Node, fx.Node]:
        """Adds placeholders for the tensors of one use of a template."""
        nodes: dict[fx.Node, fx.Node] = {}
        prefix = template.piece.parameter_prefix
        mutated = set(template.piece.program.graph_signature.buffers_to_mutate.values())
        for spec, node in template.placeholders:
            if spec.kind == InputKind.USER_INPUT:
                continue
            is_parameter = spec.kind == InputKind.PARAMETER
            is_common = layer is not None and not is_parameter and spec.target not in mutated
            if is_common and node in shared:
                nodes[node] = shared[node]
                continue
            # Layers of another template, which begin with another number, have their own.
            common = f"{template.piece.name}.from_{template.piece.first_layer}"
            target = f"{common if is_common else name}.{spec.target}"
            if layer is not None and is_parameter:
                tensor = torch.nn.Parameter(layer.floats[spec.target.removeprefix(prefix)], requires_grad=False)
            else:
                tensor = template.initial(spec.target)
            new = self.graph.placeholder(target.replace(".", "_"))
            self._copy_meta(template, node, new)
            self.input_specs.append(InputSpec(spec.kind, TensorArgument(new.name), target, spec.persistent))
            is_state = is_parameter or (spec.kind == InputKind.BUFFER and spec.persistent)
            (self.state if is_state else self.constants)[target] = tensor
            nodes[node] = new
            if is_common:
                shared[node] = new
        return nodes

    def _add_argument(self, name: str) -> None:
        for template in self.templates:
            for taken, node in template.user_inputs():
                if taken == name:
                    new = self.graph.placeholder(name)
                    self._copy_meta(template, node, new)
                    self.input_specs.append(InputSpec(InputKind.USER_INPUT, TensorArgument(new.name), None))
                    self.values[name] = new
                    return
        raise AssertionError(f"no piece of {self.method.name} takes {name}")

    def _copy_body(
        self, template: _Template, layer: StackedLayer | None, name: str, nodes: dict[fx.Node, fx.Node]
    ) -> None:
        piece = template.piece
        keys = template_keys(piece) if layer else {}
        for value, node in template.user_inputs():
            nodes[node] = self.values[value]
        delegates: dict[str, LoweredBackendModule] = {}
        for node in template.body:
            if node.op == "get_attr":
                delegate = getattr(piece.program.graph_module, node.target)
                target = f"lowered_module_{self.num_delegates}"
                self.num_delegates += 1
                delegates[node.name] = delegate
                new = self.graph.get_attr(target)
                # Its outputs are known where it is called.
                self.root.add_module(target, torch.nn.Module())
            else:
                new = self.graph.node_copy(node, lambda argument: nodes[argument])
            self._copy_meta(template, node, new)
            if node.target is executorch_call_delegate:
                delegate = delegates[node.args[0].name]
                outputs = new.meta["val"]
                new.meta["spec"] = pytree.tree_map_only(Tensor, TensorSpec.from_tensor, outputs)
                if layer is not None:
                    instance = instantiate(delegate, keys, layer, outputs)
                else:
                    instance = copy.copy(delegate)
                    instance._original_exported_program = _KnownOutputs(delegate.original_module, outputs)
                setattr(self.root, new.args[0].target, instance)
            nodes[node] = new
        user_outputs = iter(piece.outputs)
        specs = piece.program.graph_signature.output_specs
        for spec, node in zip(specs, template.output.args[0], strict=True):
            if spec.kind == OutputKind.BUFFER_MUTATION:
                self.mutations.append((nodes[node], f"{name}.{spec.target}"))
            else:
                self.values[next(user_outputs)] = nodes[node]

    def _finish(self) -> ExportedProgram:
        result = self.values[self.method.output]
        self.graph.output((*(node for node, _ in self.mutations), result))
        output_specs = [
            OutputSpec(OutputKind.BUFFER_MUTATION, TensorArgument(node.name), target) for node, target in self.mutations
        ]
        output_specs.append(OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(result.name), None))
        first = self.method.pieces[0].program
        module = fx.GraphModule(self.root, self.graph)
        module.meta = dict(first.graph_module.meta)
        arguments = (tuple(None for _ in self.method.inputs), {})
        signature = ModuleCallSignature(
            [], [], pytree.tree_structure(arguments), pytree.tree_structure(torch.zeros(()))
        )
        return ExportedProgram(
            root=module,
            graph=self.graph,
            graph_signature=ExportGraphSignature(self.input_specs, output_specs),
            state_dict=self.state,
            range_constraints=self.range_constraints,
            module_call_graph=[ModuleCallEntry("", signature)],
            constants=self.constants,
            verifiers=[first.verifier],
        )


def assemble(method: CapturedMethod) -> ExportedProgram:
    """One program from the lowered pieces of a method, real weights in place of the templates'.

    Raises:
        ExportError: the lowered pieces hold weights in a way that is not known here.
    """
    if len(method.pieces) == 1 and not method.pieces[0].layers:
        return method.pieces[0].program
    _check_completeness(method.pieces)
    return _MethodBuilder(method).build()


def _check_completeness(pieces: Sequence[Piece]) -> None:
    """Every parameter of a template must have come out of the lowering, as a constant or in a delegate."""
    for piece in pieces:
        if not piece.layers:
            continue
        keys = template_keys(piece)
        graph_module = piece.program.graph_module
        found = {
            keys[key][0]
            for node in graph_module.graph.nodes
            if node.target is executorch_call_delegate
            and (stored := getattr(graph_module, node.args[0].target).named_data_store_output) is not None
            for key in stored.pte_data
            if key in keys
        }
        found |= {
            spec.target.removeprefix(piece.parameter_prefix)
            for spec in piece.program.graph_signature.input_specs
            if spec.kind == InputKind.PARAMETER
        }
        missing = sorted(set(piece.parameter_bytes) - found)
        if missing:
            raise ExportError(
                f"{piece.name}: after lowering, nothing holds {', '.join(missing)}: this version of ExecuTorch "
                "stores weights in a way that this mvlm does not know; install the versions that pyproject.toml names"
            )
