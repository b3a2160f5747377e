"""What a recording adds up to: time by method and phase, by kind of work, by layer, by instruction.

All shares are of the time of all calls together; loading is told apart and is in none of them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from mvlm.runtime.profile_events import Call, Recording
from mvlm.runtime.profile_program import BETWEEN, Method, Program


@dataclass(frozen=True)
class Part:
    """The calls of a method, of the language model those of one phase.

    Attributes:
        method: that was called.
        phase: see :class:`~mvlm.runtime.profile_events.Call`.
        calls: in their order.
    """

    method: Method
    phase: str | None
    calls: tuple[Call, ...]

    @property
    def name(self) -> str:
        """``vision_encoder``, ``text_decoder[decode]``."""
        return f"{self.method.name}[{self.phase}]" if self.phase else self.method.name

    @cached_property
    def total_ns(self) -> float:
        return sum(call.total_ns for call in self.calls)

    @cached_property
    def between_ns(self) -> float:
        return sum(call.between_ns for call in self.calls)

    @cached_property
    def instruction_ns(self) -> Mapping[int, float]:
        """Time of each instruction in all calls."""
        times: Counter[int] = Counter()
        for call in self.calls:
            times.update(call.instruction_ns)
        return dict(sorted(times.items()))

    @cached_property
    def instruction_count(self) -> Mapping[int, int]:
        """In how many calls each instruction ran."""
        return Counter(number for call in self.calls for number in call.instruction_ns)

    def layer_ns(self, stack: int, layer: int) -> float:
        """Time of a layer in all calls."""
        layers = self.method.stacks[stack]
        start = layers.start + layer * layers.period
        return sum(self.instruction_ns.get(number, 0.0) for number in range(start, start + layers.period))


@dataclass(frozen=True)
class Time:
    """A row of a table.

    Attributes:
        name: of what took the time.
        count: of calls, or of runs of instructions.
        total_ms: of all of them.
        share: of the time of all calls, 0 to 1.
        mean_us: of one of them.
    """

    name: str
    count: int
    total_ms: float
    share: float
    mean_us: float


@dataclass(frozen=True)
class Work:
    """Time of a kind of work, in all and in each part, in the order of :attr:`Profile.parts`."""

    time: Time
    part_ms: tuple[float, ...]


@dataclass(frozen=True)
class Layers:
    """Times of a stack of layers.

    Attributes:
        method: that it is in.
        number: of the stack among those of the method.
        start: first instruction of the first layer.
        period: instructions in each layer.
        parts: names of the parts of the method, whose times follow in this order.
        layer_ms: of each layer, in each part.
        places: what is at each place in a layer, and its times in all layers of each part.
    """

    method: str
    number: int
    start: int
    period: int
    parts: tuple[str, ...]
    layer_ms: tuple[tuple[float, ...], ...]
    places: tuple[tuple[str, tuple[float, ...]], ...]


@dataclass(frozen=True)
class InstructionTime:
    """An instruction of a method in one part.

    Attributes:
        time: of it; named as what it calls.
        part: of the recording.
        number: in the method.
        layer: that it is in, ``3``; ``1.3`` in the second stack of a method; None outside of stacks.
        kind: of work.
    """

    time: Time
    part: str
    number: int
    layer: str | None
    kind: str


class Profile:
    """What a recording of a program adds up to.

    Args:
        program: that was run.
        recording: of the run.
    """

    def __init__(self, program: Program, recording: Recording) -> None:
        self.program = program
        self.recording = recording
        groups: dict[tuple[str, str | None], list[Call]] = {}
        for call in recording.calls:
            groups.setdefault((call.method.name, call.phase), []).append(call)
        # Phases of a method beside each other, methods in the order of their first calls.
        methods = list(dict.fromkeys(name for name, _ in groups))
        self.parts = tuple(
            Part(program.methods[name], phase, tuple(groups[name, phase]))
            for method in methods
            for name, phase in groups
            if name == method
        )
        self.total_ns = sum(part.total_ns for part in self.parts)

    def _time(self, name: str, count: int, total_ns: float) -> Time:
        share = total_ns / self.total_ns if self.total_ns else 0.0
        return Time(name, count, total_ns / 1e6, share, total_ns / 1e3 / count if count else 0.0)

    def methods(self) -> tuple[tuple[Time, tuple[tuple[str, Time], ...]], ...]:
        """Each method with its phases, of which there are none for most."""
        rows = []
        for name in dict.fromkeys(part.method.name for part in self.parts):
            parts = [part for part in self.parts if part.method.name == name]
            whole = self._time(name, sum(len(p.calls) for p in parts), sum(p.total_ns for p in parts))
            phases = [(p.phase, self._time(p.name, len(p.calls), p.total_ns)) for p in parts if p.phase]
            rows.append((whole, tuple(phases)))
        return tuple(rows)

    def work(self) -> tuple[Work, ...]:
        """Time by kind of work, the most first; what no instruction took is one, too."""
        counts: Counter[str] = Counter()
        times: dict[str, list[float]] = {}
        for index, part in enumerate(self.parts):
            for number, total in part.instruction_ns.items():
                kind = part.method.instructions[number].kind
                counts[kind] += part.instruction_count[number]
                times.setdefault(kind, [0.0] * len(self.parts))[index] += total
            counts[BETWEEN] += len(part.calls)
            times.setdefault(BETWEEN, [0.0] * len(self.parts))[index] += part.between_ns
        rows = [
            Work(self._time(kind, counts[kind], sum(by_part)), tuple(total / 1e6 for total in by_part))
            for kind, by_part in times.items()
        ]
        return tuple(sorted(rows, key=lambda row: -row.time.total_ms))

    def layers(self) -> tuple[Layers, ...]:
        """The stacks of layers of the methods that were called."""
        stacks = []
        for name in dict.fromkeys(part.method.name for part in self.parts):
            parts = [part for part in self.parts if part.method.name == name]
            method = parts[0].method
            for number, stack in enumerate(method.stacks):
                layers = tuple(
                    tuple(part.layer_ns(number, layer) / 1e6 for part in parts) for layer in range(stack.count)
                )
                places = tuple(
                    (
                        method.instructions[first].name,
                        tuple(
                            sum(part.instruction_ns.get(i, 0.0) for i in range(first, stack.stop, stack.period)) / 1e6
                            for part in parts
                        ),
                    )
                    for first in range(stack.start, stack.start + stack.period)
                )
                names = tuple(part.name for part in parts)
                stacks.append(Layers(name, number, stack.start, stack.period, names, layers, places))
        return tuple(stacks)

    def instructions(self) -> tuple[InstructionTime, ...]:
        """Every instruction that ran, those that took most first."""
        rows = [
            InstructionTime(
                self._time(part.method.instructions[number].name, part.instruction_count[number], total),
                part.name,
                number,
                layer_name(part.method, number),
                part.method.instructions[number].kind,
            )
            for part in self.parts
            for number, total in part.instruction_ns.items()
        ]
        return tuple(sorted(rows, key=lambda row: -row.time.total_ms))

    def inside(self) -> tuple[Time, ...]:
        """What delegates report of themselves, by name; XNNPACK numbers what one delegate has several of."""
        counts: Counter[str] = Counter()
        times: Counter[str] = Counter()
        for call in self.recording.calls:
            for (_, name), total in call.inside_ns.items():
                name = re.sub(r" #\d+$", "", name)
                counts[name] += 1
                times[name] += total
        return tuple(self._time(name, counts[name], total) for name, total in times.most_common())

    def notes(self) -> tuple[str, ...]:
        """What a reader must know to read the numbers right."""
        notes = []
        if self.recording.phases_told_by == "time":
            notes.append(
                "the ETDump does not say which calls of text_decoder read the prompt; those that come first and are "
                "several times as long were taken for it (llava_main --etdump names them)"
            )
        for method in dict.fromkeys(part.method.name for part in self.parts if part.method.has_jumps):
            notes.append(
                f"{method} has jumps: of an instruction that ran several times in a call the Inspector keeps the last, "
                f"the others are in {BETWEEN!r}"
            )
        return tuple(notes)

    def to_dict(self, per_call: bool = False) -> dict[str, Any]:
        """All facts as JSON has them.

        Args:
            per_call: each call by itself, too.
        """
        first = min(call.start_ns for call in self.recording.calls)
        document: dict[str, Any] = {
            "etdump": str(self.recording.path),
            "pte": str(self.program.path),
            "model_name": self.program.model_name,
            "total_ms": self.total_ns / 1e6,
            "phases_told_by": self.recording.phases_told_by,
            "notes": list(self.notes()),
            "methods": [
                asdict(whole) | {"phases": [asdict(time) | {"name": phase} for phase, time in phases]}
                for whole, phases in self.methods()
            ],
            "loading": [{"method": load.method, "total_ms": load.total_ns / 1e6} for load in self.recording.loads],
            "parts": [part.name for part in self.parts],
            "work": [asdict(work.time) | {"part_ms": list(work.part_ms)} for work in self.work()],
            "layers": [
                asdict(layers) | {"places": [{"name": name, "part_ms": list(ms)} for name, ms in layers.places]}
                for layers in self.layers()
            ],
            "instructions": [
                asdict(row.time) | {"part": row.part, "number": row.number, "layer": row.layer, "kind": row.kind}
                for row in self.instructions()
            ],
            "inside_delegates": [asdict(time) for time in self.inside()],
        }
        if per_call:
            document["calls"] = [
                {
                    "method": call.method.name,
                    "phase": call.phase,
                    "start_ms": (call.start_ns - first) / 1e6,
                    "total_ms": call.total_ns / 1e6,
                    "between_ms": call.between_ns / 1e6,
                    "instruction_us": {str(number): ns / 1e3 for number, ns in call.instruction_ns.items()},
                }
                for call in self.recording.calls
            ]
        return document


def layer_name(method: Method, instruction: int) -> str | None:
    """The layer that an instruction is in, see :attr:`InstructionTime.layer`."""
    for number, stack in enumerate(method.stacks):
        layer = stack.layer_of(instruction)
        if layer is not None:
            return f"{number}.{layer}" if number else str(layer)
    return None


def milliseconds(value: float) -> str:
    """To the microsecond, so that columns of them are read like numbers of one size."""
    return f"{value:,.3f}"


def shares(values: Sequence[float]) -> list[float]:
    """Of their sum; zeros of nothing."""
    total = sum(values)
    return [value / total if total else 0.0 for value in values]
