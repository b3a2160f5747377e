"""What an ETDump says: when each method was called, and how long each of its instructions took.

Read with ExecuTorch's own Inspector. An event of the ETDump that ExecuTorch 1.5 writes has a block (one per call of a
method), a name, the number of the instruction and its beginning and end; no debug handles are needed to join it with
the .pte, and the ETRecord that Inspector could take besides is not either.
"""

from __future__ import annotations

import re
import statistics
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvlm.export.contract import TEXT_DECODER
from mvlm.runtime.profile_program import INSTRUCTION_EVENTS, Instruction, Method, Program

if TYPE_CHECKING:
    from executorch.devtools.inspector import EventBlock

PREFILL, DECODE = "prefill", "decode"

#: Events of whole methods, from ExecuTorch's runtime/executor. They have chain -1, which Inspector drops, and
#: instruction 0.
_WHOLE = ("Method::", "Program::")
_EXECUTE, _LOAD = "Method::execute", "Program::load_method"

#: ``method`` or ``method[phase]``: how llava_main names a block. ExecuTorch itself names all of them alike.
_BLOCK_NAME = re.compile(r"(?P<method>.+?)(?:\[(?P<phase>[^\[\]]+)\])?")
_UNNAMED = ("Execute", "Default")

_IDENTIFIER = b"ED00"


class ProfileError(ValueError):
    """The ETDump cannot be read, or is not one of this .pte; the message says what was given and what to do."""


@dataclass(frozen=True)
class Call:
    """One call of a method.

    Attributes:
        method: that was called.
        phase: ``prefill`` or ``decode`` of the language model, or what the runner named it; None for other methods.
        start_ns: on the device's clock.
        total_ns: from beginning to end.
        instruction_ns: of each instruction that ran, by its number.
        inside_ns: what delegates report of themselves, by instruction and name.
    """

    method: Method
    phase: str | None
    start_ns: float
    total_ns: float
    instruction_ns: Mapping[int, float]
    inside_ns: Mapping[tuple[int, str], float] = field(default_factory=dict)

    @property
    def between_ns(self) -> float:
        """Time of the call that no instruction took."""
        return self.total_ns - sum(self.instruction_ns.values())


@dataclass(frozen=True)
class Load:
    """One loading of a method.

    Attributes:
        method: name of it; None if the ETDump does not say.
        total_ns: of it.
    """

    method: str | None
    total_ns: float


@dataclass(frozen=True)
class Recording:
    """An ETDump, joined with its .pte.

    Attributes:
        path: of the ETDump.
        calls: of methods that compute something, in the order in which they were made.
        loads: of methods.
        phases_told_by: ``runner`` if the ETDump names prefill and decode, ``time`` if they were told by how long the
            calls took; None if there is nothing to tell apart.
    """

    path: Path
    calls: tuple[Call, ...]
    loads: tuple[Load, ...]
    phases_told_by: str | None


def read_recording(path: Path, program: Program) -> Recording:
    """Reads an ETDump of a program.

    Raises:
        ProfileError: no such file, no ETDump, truncated or broken, without a call, or of another program.
    """
    data = check_etdump(path)
    calls: list[Call] = []
    loads: list[Load] = []
    for block in _event_blocks(path, data):
        times = {event.name: event.perf_data.raw for event in block.events if event.perf_data and not _is_inside(event)}
        if _EXECUTE in times:
            calls += _calls(path, program, block, times[_EXECUTE])
        elif _LOAD in times:
            method, _ = _named(block.name, program)
            loads += [Load(method and method.name, total) for total in times[_LOAD]]
        else:
            raise ProfileError(
                f"{path}: block {block.name!r} has neither {_EXECUTE} nor {_LOAD}: the run failed before its end, or "
                "another version of ExecuTorch wrote it; run llava_main --etdump again"
            )
    if not calls:
        raise ProfileError(
            f"{path}: is an ETDump without a call of a method that computes something; methods may have been loaded, "
            "but none was run: ask a question with llava_main --etdump"
        )
    calls.sort(key=lambda call: call.start_ns)
    calls, told_by = _with_phases(calls)
    return Recording(path, tuple(calls), tuple(loads), told_by)


def check_etdump(path: Path) -> bytes:
    """Reads a file and checks what can be told at once: that it is an ETDump, and all of it.

    Raises:
        ProfileError: it is not; the message says why.
    """
    if not path.is_file():
        raise ProfileError(
            f"{path}: {'is no file' if path.exists() else 'no such file'}; make it with llava_main --etdump {path}"
        )
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ProfileError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not data:
        raise ProfileError(f"{path}: is empty; the run that should have written it failed, repeat it")
    # Size of what follows, flatbuffer's root, identifier.
    if data[8:12] != _IDENTIFIER:
        is_program = data[4:6] == b"ET"
        what = "is a .pte, which goes behind --pte; first comes the" if is_program else "is no"
        raise ProfileError(f"{path}: {what} ETDump, which llava_main --etdump writes")
    size = 4 + int.from_bytes(data[:4], "little")
    if len(data) < size:
        raise ProfileError(f"{path}: is truncated: {len(data):,} bytes, its header says {size:,}; copy it again")
    return data


def _event_blocks(path: Path, data: bytes) -> list[EventBlock]:
    # Late: this loads torch and pandas, seconds before a word about a file that is not there.
    from executorch.devtools import Inspector
    from executorch.devtools.inspector import TimeScale

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that tensors' values are not in it, which nobody asked for
            # ExecuTorch counts in nanoseconds on every platform of ours.
            inspector = Inspector(etdump_data=data, source_time_scale=TimeScale.NS, target_time_scale=TimeScale.NS)
    except Exception as error:  # of flatc, JSON or the Inspector itself, which has no type for it
        raise ProfileError(f"{path}: is broken: ExecuTorch's Inspector cannot read it; copy it again") from error
    return inspector.event_blocks


def _is_inside(event: Any) -> bool:
    """Whether a delegate reported the event of itself."""
    return event.delegate_debug_identifier is not None


def _named(block: str, program: Program) -> tuple[Method | None, str | None]:
    """The method and phase that a block is named after, as llava_main does it."""
    if block in program.methods:
        return program.methods[block], None
    match = _BLOCK_NAME.fullmatch(block)
    if match and match["method"] in program.methods:
        return program.methods[match["method"]], match["phase"]
    return None, None


def _calls(path: Path, program: Program, block: EventBlock, totals: list[float]) -> list[Call]:
    """The calls of a block. Inspector puts calls with the same events into one block, and their times into lists."""
    # Inspector offers no other way to an event's instruction.
    events = [
        (event._instruction_id, event)
        for event in block.events
        if event.perf_data is not None and not event.name.startswith(_WHOLE)
    ]
    instructions = {number: event for number, event in events if event.name in INSTRUCTION_EVENTS}
    method, phase = _named(block.name, program)
    if method is None and not instructions and block.name in _UNNAMED:
        return []  # of a method that only returns a constant
    if method is not None:
        if reason := _mismatch(method, instructions, events):
            raise _other_program(path, program, f"{method.name}: {reason}")
    else:
        method = _told_by_instructions(path, program, block.name, instructions, events)
    starts = next(event.start_time for event in block.events if event.name == _EXECUTE)
    inside = [(number, str(event.delegate_debug_identifier), event) for number, event in events if _is_inside(event)]
    return [
        Call(
            method,
            phase,
            starts[run],
            total,
            {number: event.perf_data.raw[run] for number, event in instructions.items()},
            {(number, name): event.perf_data.raw[run] for number, name, event in inside},
        )
        for run, total in enumerate(totals)
    ]


def _told_by_instructions(
    path: Path, program: Program, block: str, instructions: Mapping[int, Any], events: list[tuple[int, Any]]
) -> Method:
    """The method of a block that is not named after one, which runners other than llava_main write."""
    reasons = {name: _mismatch(method, instructions, events) for name, method in program.methods.items()}
    fitting = [name for name, reason in reasons.items() if reason is None]
    if not fitting:
        told = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise _other_program(path, program, f"block {block!r} with {len(instructions)} instructions fits none ({told})")
    if len(fitting) > 1:
        raise ProfileError(
            f"{path}: does not say whether block {block!r} is of {' or '.join(fitting)}, whose instructions are alike; "
            "make the ETDump with llava_main --etdump, which names the method"
        )
    return program.methods[fitting[0]]


def _mismatch(method: Method, instructions: Mapping[int, Any], events: list[tuple[int, Any]]) -> str | None:
    """Why a call's events cannot be those of a method; None if they can."""
    for number, event in sorted(instructions.items()):
        if not 0 <= number < len(method.instructions):
            return f"instruction {number} ran, the .pte has {len(method.instructions)}"
        ours = method.instructions[number]
        if ours.event != event.name:
            return f"instruction {number} was a {event.name}, in the .pte it is a {ours.event} ({ours.name})"
    for number, event in events:
        if number in instructions and not _is_inside(event) and event.name not in INSTRUCTION_EVENTS:
            ours = method.instructions[number]
            if _is_other_operator(event.name, ours):
                return f"instruction {number} was {event.name}, in the .pte it is {ours.name}"
    missing = [number for number in range(len(method.instructions)) if number not in instructions]
    if missing and not method.has_jumps:
        return f"instruction {missing[0]} of the .pte's {len(method.instructions)} did not run"
    return None


def _is_other_operator(kernel: str, instruction: Instruction) -> bool:
    """Whether the kernel that ran is known to be of another operator than the .pte calls.

    ExecuTorch's generated kernels are called ``native_call_add.out``, ours ``mvlm::attention.out``; whatever else
    somebody measures inside a kernel is no operator's name.
    """
    if instruction.operator is None:
        return False
    if kernel.startswith("native_call_"):
        return kernel.removeprefix("native_call_") != instruction.operator.split("::")[-1]
    return "::" in kernel and kernel != instruction.operator


def _other_program(path: Path, program: Program, reason: str) -> ProfileError:
    return ProfileError(
        f"{path}: is not of {program.path}: {reason}; give the .pte that was run (llava_main's --model_path), or run "
        "this one with --etdump"
    )


# -- prefill and decode -----------------------------------------------------------------------------------------------


def _with_phases(calls: list[Call]) -> tuple[list[Call], str | None]:
    """The calls of the language model split into prefill and decode, and who told them apart."""
    decoder = [call for call in calls if call.method.name == TEXT_DECODER]
    if any(call.phase for call in decoder):
        return calls, "runner"
    prefill = leading_long_calls([call.instruction_ns for call in decoder])
    if not prefill:
        return calls, None
    phases: Iterator[str] = iter([PREFILL] * prefill + [DECODE] * (len(decoder) - prefill))
    return [replace(call, phase=next(phases)) if call.method.name == TEXT_DECODER else call for call in calls], "time"


def leading_long_calls(calls: Sequence[Mapping[int, float]]) -> int:
    """How many calls at the beginning read the prompt, told by their times; 0 if that cannot be told.

    An ETDump has no shapes, so this is for those whose blocks no runner has named. A prompt comes first, and with it
    nearly every instruction takes several times as long as for one token. So a call is prompt if half of its
    instructions take more than three times as long as in the calls after it, more exactly in the faster quarter of
    them; the first call that is not ends the prompt. A step in which the machine was busy elsewhere is longer in a few
    instructions only, and stays a step. A second prompt, after an answer, is taken for a step too.

    Args:
        calls: time of each instruction, by its number.
    """
    for index, call in enumerate(calls):
        rest = calls[index + 1 :]
        ratios = []
        for number, time in call.items():
            later = sorted(other[number] for other in rest if number in other)
            if later:
                ratios.append(time / max(later[len(later) // 4], 1.0))
        if not ratios or statistics.median(ratios) <= 3:
            return index
    return 0
