"""What a ``.pte`` says of its methods' instructions: which operator or delegate each one is, and where layers repeat.

An ETDump knows an instruction only by its number. This is the other side of that join. Knows nothing of torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# ExecuTorch's flatbuffers are read in one place, mvlm.export.inspect, whose facts sum up over instructions; here each
# instruction is wanted, so this goes through what lies under those facts.
from mvlm.export import inspect
from mvlm.export.errors import ExportError

#: Kind of work that is not in one of a method's instructions.
BETWEEN = "between instructions"
OTHER_OPERATORS = "other operators"
CONTROL_FLOW = "control flow"
_OUR_OPERATORS = "mvlm::"

#: Instruction in a .pte -> the name of its event in an ETDump (ExecuTorch's runtime/executor/method.cpp).
_EVENTS = {
    "KernelCall": "OPERATOR_CALL",
    "DelegateCall": "DELEGATE_CALL",
    "JumpFalseCall": "JF_CALL",
    "MoveCall": "MOVE_CALL",
    "FreeCall": "FREE_CALL",
}
INSTRUCTION_EVENTS = frozenset(_EVENTS.values())


@dataclass(frozen=True)
class Instruction:
    """One instruction of a method.

    Attributes:
        event: name of its event in an ETDump, ``OPERATOR_CALL``.
        name: for people: ``mvlm::attention.out``; of a delegate, what is in it:
            ``linear 2048 → 5632, int4 in groups of 128``.
        kind: of work: ``mvlm::attention``, ``linear, int8 per channel``, ``other operators``, …
        operator: with namespace and overload; None if it calls no operator.
    """

    event: str
    name: str
    kind: str
    operator: str | None


@dataclass(frozen=True)
class Stack:
    """Layers: the same instructions over and over.

    Attributes:
        start: first instruction of the first layer.
        period: instructions in each layer.
        count: of layers.
    """

    start: int
    period: int
    count: int

    @property
    def stop(self) -> int:
        """First instruction after the last layer."""
        return self.start + self.period * self.count

    def layer_of(self, instruction: int) -> int | None:
        """Number of the layer that an instruction is in; None outside the stack."""
        return (instruction - self.start) // self.period if self.start <= instruction < self.stop else None


@dataclass(frozen=True)
class Method:
    """A method of the program.

    Attributes:
        name: of it.
        instructions: in the order in which the .pte has them.
        stacks: of layers, in the same order.
        has_jumps: whether it may leave out instructions or run them again.
    """

    name: str
    instructions: tuple[Instruction, ...]
    stacks: tuple[Stack, ...]
    has_jumps: bool


@dataclass(frozen=True)
class Program:
    """The methods of a ``.pte`` that compute something.

    Attributes:
        path: of the file.
        model_name: that mvlm's exporter gave it; None in other people's files.
        methods: name -> method.
    """

    path: Path
    model_name: str | None
    methods: dict[str, Method]


def read_program(path: Path) -> Program:
    """Reads the instructions of a ``.pte``.

    Raises:
        ExportError: no such file, no ``.pte``, truncated or broken; the message says which.
    """
    facts = inspect.inspect_pte(path)
    try:
        with path.open("rb") as file:
            program = inspect._Program(path, file)
            methods = [_method(program, plan) for plan in program.plans]
    except inspect._BROKEN as error:
        raise ExportError(f"{path}: is broken or truncated: its instructions lead outside it ({error})") from error
    computing = {method.name: method for method in methods if method.instructions}
    return Program(path, None if facts.mvlm is None else str(facts.mvlm.model_name), computing)


def _method(program: Any, plan: Any) -> Method:
    instructions, has_jumps = [], False
    kinds = inspect._names(program.fb.InstructionArguments)
    signatures: list[tuple[Any, ...]] = []
    for chain in inspect._items(plan.ChainsLength(), plan.Chains):
        for entry in inspect._items(chain.InstructionsLength(), chain.Instructions):
            kind = kinds.get(entry.InstrArgsType(), "NONE")
            if kind not in _EVENTS:
                raise ValueError(f"an instruction of kind {entry.InstrArgsType()}")
            call = inspect._cast(entry.InstrArgs(), getattr(program.fb, kind))
            has_jumps |= kind == "JumpFalseCall"
            if kind == "KernelCall":
                instruction = _operator_call(plan.Operators(call.OpIndex()))
                signatures.append((instruction.name,))
            elif kind == "DelegateCall":
                instruction, signature = _delegate_call(program, plan.Delegates(call.DelegateIndex()))
                signatures.append(signature)
            else:
                instruction = Instruction(_EVENTS[kind], kind.removesuffix("Call").lower(), CONTROL_FLOW, None)
                signatures.append((instruction.name,))
            instructions.append(instruction)
    return Method(inspect._text(plan.Name()), tuple(instructions), find_stacks(signatures), has_jumps)


def _operator_call(operator: Any) -> Instruction:
    name, overload = inspect._text(operator.Name()), inspect._text(operator.Overload())
    full_name = f"{name}.{overload}" if overload else name
    kind = name if name.startswith(_OUR_OPERATORS) else OTHER_OPERATORS
    return Instruction(_EVENTS["KernelCall"], full_name, kind, full_name)


def _delegate_call(program: Any, delegate: Any) -> tuple[Instruction, tuple[Any, ...]]:
    """The instruction, and what must be equal in two delegates for them to have the same place in two layers."""
    backend = inspect._text(delegate.Id())
    event = _EVENTS["DelegateCall"]
    if backend != inspect._XNNPACK:
        return Instruction(event, backend, f"delegates of {backend}", None), (backend,)
    graph = program.graph(delegate)
    if graph is None:
        return Instruction(event, "XNNPACK, not readable", "XNNPACK, not readable", None), (backend, None)
    kind, nodes = _delegate_kind(graph.nodes), tuple(graph.nodes.items())
    shapes = tuple((linear.in_features, linear.out_features) for linear in graph.linears)
    if shapes and kind.startswith("linear, ") and " + " not in kind:
        widths = ", ".join(f"{width_in} → {width_out}" for width_in, width_out in shapes)
        others = [node for node in graph.nodes if node != "Convert" and not node.startswith("FullyConnected")]
        name = ", ".join([f"linear{'s' if len(shapes) > 1 else ''} {widths}", kind.removeprefix("linear, "), *others])
    else:
        name = ", ".join(node if count == 1 else f"{count} {node}" for node, count in nodes)
    return Instruction(event, name, kind, None), (backend, *nodes, *shapes)


def _delegate_kind(nodes: Iterable[str]) -> str:
    """What most of a delegate's time goes into: ``linear, int4 in groups of 128``; nodes as inspect names them."""
    kinds = []
    for node in nodes:
        match = re.fullmatch(r"(\w+) \((.+)\)", node)
        if match:  # inspect names the weights of those that have any
            kinds.append(f"{'linear' if match[1] == 'FullyConnected' else 'convolution'}, {match[2]}")
    return " + ".join(sorted(set(kinds))) or "delegates without weights"


# -- layers -----------------------------------------------------------------------------------------------------------


def find_stacks(signatures: Sequence[Any]) -> tuple[Stack, ...]:
    """Stacks of layers in a sequence of instructions: where the same two or more come again right after themselves.

    The repetition that covers most is taken first, of those that cover the same the one with the shortest period: it
    is the layers, and not pairs of layers nor what repeats inside one. Then what is before and after it is searched in
    the same way.

    Args:
        signatures: an entry per instruction, equal for those that may stand for each other.
    """
    return tuple(_stacks(list(signatures), 0, len(signatures)))


def _stacks(signatures: list[Any], start: int, stop: int) -> list[Stack]:
    best: Stack | None = None
    for period in range(2, (stop - start) // 2 + 1):
        at = start
        while at + period < stop:
            length = 0  # of the run in which each instruction equals the one a period later
            while at + length + period < stop and signatures[at + length] == signatures[at + length + period]:
                length += 1
            count = length // period + 1
            if count > 1 and (best is None or count * period > best.count * best.period):
                # Layers may also begin a few instructions later in the run: they do where a normalization is.
                slack = range(at, at + length % period + 1)
                first = next((i for i in slack if "norm" in str(signatures[i])), at)
                if len(set(signatures[at : at + period])) > 1:
                    best = Stack(first, period, count)
            at += length + 1
    if best is None:
        return []
    return [*_stacks(signatures, start, best.start), best, *_stacks(signatures, best.stop, stop)]
