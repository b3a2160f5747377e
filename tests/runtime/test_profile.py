"""Profiles: what an ETDump says is joined with the right instructions, adds up, and wrong pairs of files are refused.

Numbers are checked on ETDumps that are written here, event by event, with times chosen so that every sum is known; that
such files are like real ones is checked on recordings of ExecuTorch's Python runtime and of llava_main.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.devtools.etdump.schema_flatcc import ETDumpFlatCC, Event, ProfileEvent, RunData
from executorch.devtools.etdump.serialize import serialize_to_etdump_flatcc
from executorch.exir import to_edge_transform_and_lower
from torch import nn

from mvlm.export.errors import ExportError
from mvlm.runtime.profile import main, to_text
from mvlm.runtime.profile_events import ProfileError, Recording, leading_long_calls, read_recording
from mvlm.runtime.profile_facts import Profile, layer_name
from mvlm.runtime.profile_page import boxes, to_html, to_svg
from mvlm.runtime.profile_program import BETWEEN, Method, Program, Stack, find_stacks, read_program

WIDTH, LAYERS = 16, 3


class Decoder(nn.Module):
    """Layers of a linear, which becomes a delegate, and an operator that XNNPACK lacks; one more after them."""

    def __init__(self) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))

    def forward(self, x_LD: torch.Tensor) -> torch.Tensor:
        for linear in self.linears:
            x_LD = torch.cumsum(linear(x_LD), 0)
        return torch.flip(x_LD, (0,))


class Encoder(nn.Module):
    """Two operators, no layers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cumsum(torch.flip(x, (0,)), 0)


#: What ExecuTorch makes of them: event and, of operators, name of the kernel that runs.
DELEGATE, CUMSUM, FLIP = ("DELEGATE_CALL", None), ("OPERATOR_CALL", "cumsum.out"), ("OPERATOR_CALL", "flip.out")
INSTRUCTIONS = {
    "text_decoder": [DELEGATE, CUMSUM] * LAYERS + [FLIP],
    "vision_encoder": [FLIP, CUMSUM],
}
LINEAR = "linear, float32"


def export(path: Path, modules: Mapping[str, tuple[nn.Module, bool]], constants: Mapping[str, object]) -> Path:
    """Writes a .pte; the first dimension of a method's input varies if that is said of it."""
    programs = {}
    for name, (module, is_dynamic) in modules.items():
        example = (torch.zeros(4, WIDTH),)
        shapes = ({0: torch.export.Dim("tokens", min=1, max=512)},) if is_dynamic else None
        programs[name] = torch.export.export(module.eval(), example, dynamic_shapes=shapes)
    lowered = to_edge_transform_and_lower(
        programs, partitioner=[XnnpackPartitioner()], constant_methods=dict(constants) or None
    )
    path.write_bytes(lowered.to_executorch().buffer)
    return path


@pytest.fixture(scope="module")
def pte(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("profile") / "tiny.pte"
    methods = {"text_decoder": (Decoder(), True), "vision_encoder": (Encoder(), False)}
    return export(path, methods, {"get_answer": 42})


@pytest.fixture(scope="module")
def program(pte: Path) -> Program:
    return read_program(pte)


# -- ETDumps ----------------------------------------------------------------------------------------------------------


def event(name: str | None, number: int, start: int, time: int, inside: str = "", chain: int = 0) -> Event:
    return Event(ProfileEvent(name, chain, number, -1, inside, None, start, start + time), None, None)


def call(block: str, start: int, total: int, times: Sequence[int], method: str | None = None) -> RunData:
    """A call of a method as ExecuTorch records it: what is inside an event comes before it."""
    events, at = [], start
    instructions = INSTRUCTIONS[method or block.split("[")[0]]
    for number, ((name, kernel), time) in enumerate(zip(instructions, times, strict=True)):
        if kernel:
            events.append(event(f"native_call_{kernel}", number, at, time - 1))
        else:
            events.append(event(None, number, at, time // 2, inside="Fully Connected (NC, F32) GEMM #1"))
        events.append(event(name, number, at, time))
        at += time
    events.append(event("Method::execute", 0, start, total, chain=-1))
    return RunData(block, -1, [], events)


def load(block: str, total: int) -> RunData:
    names = (("Method::init", total - 10), ("Program::load_method", total))
    return RunData(block, -1, [], [event(name, 0, 5, time, chain=-1) for name, time in names])


def write(path: Path, runs: Sequence[RunData]) -> Path:
    data = serialize_to_etdump_flatcc(ETDumpFlatCC(0, list(runs)))
    path.write_bytes(len(data).to_bytes(4, "little") + data)  # as ETDumpGen does it
    return path


#: Times of instructions in ns, prime so that no two sums are equal by chance.
PREFILL = (2003, 1009, 3001, 1013, 4001, 1019, 503)
DECODE_1 = (211, 101, 307, 103, 401, 107, 53)
DECODE_2 = (223, 109, 311, 113, 409, 127, 59)
VISION = (701, 809)
RUN = (
    load("vision_encoder[load]", 5000),
    load("text_decoder[load]", 7000),
    call("vision_encoder", 10_000, 2000, VISION),
    call("text_decoder[prefill]", 20_000, 13_000, PREFILL),
    call("text_decoder[decode]", 40_000, 1400, DECODE_1),
    call("text_decoder[decode]", 50_000, 1500, DECODE_2),
)
TOTAL = 2000 + 13_000 + 1400 + 1500
DECODE = [a + b for a, b in zip(DECODE_1, DECODE_2, strict=True)]


@pytest.fixture(scope="module")
def etdump(pte: Path) -> Path:
    return write(pte.with_name("run.etdp"), RUN)


@pytest.fixture(scope="module")
def profile(program: Program, etdump: Path) -> Profile:
    return Profile(program, read_recording(etdump, program))


def record(pte: Path, path: Path, calls: Sequence[tuple[str, int]]) -> Path:
    """Calls methods with so many tokens through ExecuTorch's Python runtime, which writes the ETDump."""
    from executorch.extension.pybindings.portable_lib import _load_for_executorch

    module = _load_for_executorch(str(pte), enable_etdump=True)
    for method, tokens in calls:
        module.run_method(method, (torch.ones(tokens, WIDTH),))
    module.write_etdump_result_to_file(str(path))
    return path


# -- the program ------------------------------------------------------------------------------------------------------


def test_instructions_are_named_as_the_pte_has_them(program):
    assert list(program.methods) == ["text_decoder", "vision_encoder"]
    decoder = program.methods["text_decoder"].instructions
    assert [instruction.event for instruction in decoder] == [name for name, _ in INSTRUCTIONS["text_decoder"]]
    assert decoder[0].name == f"linear {WIDTH} → {WIDTH}, float32"
    assert [instruction.kind for instruction in decoder[:2]] == [LINEAR, "other operators"]
    assert (decoder[1].name, decoder[-1].name) == ("aten::cumsum.out", "aten::flip.out")
    assert program.methods["text_decoder"].stacks == (Stack(0, 2, LAYERS),)
    assert program.methods["vision_encoder"].stacks == ()
    assert not program.methods["text_decoder"].has_jumps


def test_widths_of_a_linear_are_told_from_input_to_output(tmp_path):
    path = export(tmp_path / "a.pte", {"forward": (nn.Linear(WIDTH, 5), False)}, {})
    [instruction] = read_program(path).methods["forward"].instructions
    assert instruction.name == f"linear {WIDTH} → 5, float32"


@pytest.mark.parametrize(
    ("sequence", "stacks"),
    [
        ("abcabcabc", [(0, 3, 3)]),
        ("xabababy", [(1, 2, 3)]),
        ("abababab", [(0, 2, 4)]),  # and not (0, 4, 2)
        ("xaaaaaay", []),  # the same once more is no layer
        ("aabcaabc", [(0, 4, 2)]),
        ("abcdef", []),
        ("ab", []),
        ("", []),
        ("ababxxcdecde", [(0, 2, 2), (6, 3, 2)]),
        ("cdecdexxabab", [(0, 3, 2), (8, 2, 2)]),
        ("abbabbabbabbcdcd", [(0, 3, 4), (12, 2, 2)]),
        ("abcabcab", [(0, 3, 2)]),
        ("abxabyab", []),
    ],
)
def test_layers_are_what_repeats(sequence, stacks):
    assert [(stack.start, stack.period, stack.count) for stack in find_stacks(sequence)] == stacks


def test_layers_begin_with_a_normalization_where_they_may():
    # What is before the first layer is like what ends one.
    assert find_stacks(["linear", "norm", "attention", "linear"] + ["norm", "attention", "linear"] * 2) == (
        Stack(1, 3, 3),
    )
    assert find_stacks(["linear", "attention"] * 2 + ["x"]) == (Stack(0, 2, 2),)


def test_layer_of_an_instruction():
    method = Method("m", (), (Stack(1, 2, 2), Stack(6, 3, 2)), False)
    names = [layer_name(method, number) for number in range(13)]
    assert names == [None, "0", "0", "1", "1", None, *["1.0"] * 3, *["1.1"] * 3, None]


# -- sums -------------------------------------------------------------------------------------------------------------


def test_methods_and_phases(profile):
    rows = {whole.name: (whole, dict(phases)) for whole, phases in profile.methods()}
    assert list(rows) == ["vision_encoder", "text_decoder"]  # as they were called
    vision, phases = rows["vision_encoder"]
    assert (vision.count, vision.total_ms, vision.share) == (1, 0.002, pytest.approx(2000 / TOTAL))
    assert phases == {}
    decoder, phases = rows["text_decoder"]
    assert (decoder.count, decoder.total_ms) == (3, pytest.approx(0.0159))
    assert (phases["prefill"].count, phases["prefill"].total_ms) == (1, 0.013)
    assert (phases["decode"].count, phases["decode"].total_ms) == (2, 0.0029)
    assert phases["decode"].mean_us == pytest.approx(1.45)
    assert sum(whole.share for whole, _ in rows.values()) == pytest.approx(1)


def test_kinds_of_work(profile):
    work = {row.time.name: row for row in profile.work()}
    assert [part.name for part in profile.parts] == ["vision_encoder", "text_decoder[prefill]", "text_decoder[decode]"]
    assert set(work) == {LINEAR, "other operators", BETWEEN}
    linear = work[LINEAR]
    assert linear.time.count == 3 * LAYERS
    assert linear.part_ms == pytest.approx((0, sum(PREFILL[:6:2]) / 1e6, sum(DECODE[:6:2]) / 1e6))
    assert linear.time.total_ms == pytest.approx(sum(linear.part_ms))
    between = (2000 - sum(VISION), 13_000 - sum(PREFILL), 2900 - sum(DECODE))
    assert work[BETWEEN].part_ms == pytest.approx([ns / 1e6 for ns in between])
    assert sum(row.time.total_ms for row in work.values()) == pytest.approx(TOTAL / 1e6)
    assert sum(row.time.share for row in work.values()) == pytest.approx(1)
    shares = [row.time.share for row in profile.work()]
    assert shares == sorted(shares, reverse=True)


def test_layers(profile):
    [layers] = profile.layers()
    assert (layers.method, layers.start, layers.period) == ("text_decoder", 0, 2)
    assert layers.parts == ("text_decoder[prefill]", "text_decoder[decode]")
    expected = [(sum(PREFILL[at : at + 2]) / 1e6, sum(DECODE[at : at + 2]) / 1e6) for at in range(0, 2 * LAYERS, 2)]
    assert [ms for layer in layers.layer_ms for ms in layer] == pytest.approx([ms for row in expected for ms in row])
    (linear, linear_ms), (cumsum, cumsum_ms) = layers.places
    assert (linear, cumsum) == (f"linear {WIDTH} → {WIDTH}, float32", "aten::cumsum.out")
    assert linear_ms == pytest.approx((sum(PREFILL[:6:2]) / 1e6, sum(DECODE[:6:2]) / 1e6))
    assert cumsum_ms == pytest.approx((sum(PREFILL[1:6:2]) / 1e6, sum(DECODE[1:6:2]) / 1e6))


def test_longest_instructions(profile):
    rows = profile.instructions()
    assert len(rows) == len(VISION) + len(PREFILL) + len(DECODE)
    first = rows[0]
    assert (first.part, first.number, first.layer) == ("text_decoder[prefill]", 4, "2")
    assert (first.time.count, first.time.mean_us) == (1, pytest.approx(4.001))
    times = [row.time.total_ms for row in rows]
    assert times == sorted(times, reverse=True)
    [last] = [row for row in rows if row.part == "text_decoder[decode]" and row.number == 6]
    assert (last.time.count, last.layer) == (2, None)
    assert last.time.mean_us == pytest.approx((53 + 59) / 2 / 1e3)
    assert last.time.share == pytest.approx((53 + 59) / TOTAL)


def test_inside_delegates(profile):
    [row] = profile.inside()
    linears = [*PREFILL[:6:2], *DECODE_1[:6:2], *DECODE_2[:6:2]]
    assert (row.name, row.count) == ("Fully Connected (NC, F32) GEMM", len(linears))
    assert row.total_ms == pytest.approx(sum(time // 2 for time in linears) / 1e6)


def test_loading_is_told_apart(profile):
    assert [(load.method, load.total_ns) for load in profile.recording.loads] == [
        ("vision_encoder", 5000),
        ("text_decoder", 7000),
    ]
    assert profile.total_ns == TOTAL


def test_calls_are_in_their_order(profile):
    assert [(c.method.name, c.phase, c.total_ns) for c in profile.recording.calls] == [
        ("vision_encoder", None, 2000),
        ("text_decoder", "prefill", 13_000),
        ("text_decoder", "decode", 1400),
        ("text_decoder", "decode", 1500),
    ]
    last = profile.recording.calls[-1]
    assert dict(last.instruction_ns) == dict(enumerate(DECODE_2))
    assert last.between_ns == 1500 - sum(DECODE_2)


def test_json(profile):
    document = json.loads(json.dumps(profile.to_dict(per_call=True), allow_nan=False))
    assert document["total_ms"] == pytest.approx(TOTAL / 1e6)
    assert document["phases_told_by"] == "runner"
    decoder = document["methods"][1]
    assert (decoder["name"], [phase["name"] for phase in decoder["phases"]]) == ("text_decoder", ["prefill", "decode"])
    assert sum(row["total_ms"] for row in document["work"]) == pytest.approx(TOTAL / 1e6)
    instructions = sum(row["total_ms"] for row in document["instructions"])
    [between] = [row["total_ms"] for row in document["work"] if row["name"] == BETWEEN]
    assert instructions + between == pytest.approx(TOTAL / 1e6)
    assert document["layers"][0]["places"][1]["name"] == "aten::cumsum.out"
    assert [round(call["start_ms"] * 1e6) for call in document["calls"]] == [0, 10_000, 30_000, 40_000]
    assert document["calls"][2]["instruction_us"]["4"] == pytest.approx(0.401)
    assert "calls" not in profile.to_dict()


# -- prefill and decode -----------------------------------------------------------------------------------------------


def steps(*factors: float) -> list[dict[int, float]]:
    return [{number: factor * (100 + number) for number in range(5)} for factor in factors]


@pytest.mark.parametrize(
    ("factors", "expected"),
    [
        ((40, 1, 1.1, 1.2, 1.3), 1),
        ((40, 40, 20, 1, 1), 3),  # a long prompt in pieces
        ((40, 40, 40, 1), 3),  # and a short answer
        ((40, 1), 1),
        ((40, 1, 40, 1, 1, 1), 1),  # a second prompt is not looked for
        ((1, 1, 1), 0),
        ((2.5, 1, 1), 0),  # cold caches
        ((40,), 0),
        ((), 0),
    ],
)
def test_prompts_are_told_by_time(factors, expected):
    assert leading_long_calls(steps(*factors)) == expected


def test_a_step_that_the_machine_interrupted_is_no_prompt():
    calls = steps(40, 1, 1, 1, 1)
    calls[1][2] += 1e6
    assert leading_long_calls(calls) == 1
    assert leading_long_calls(calls[1:]) == 0


def test_unnamed_blocks(program, tmp_path):
    # As runners that name no blocks leave it; out of order, because Inspector groups by what happened.
    runs = [
        load("Default", 7000),
        call("Execute", 10_000, 2000, VISION, "vision_encoder"),
        call("Execute", 20_000, 13_000, [10 * time for time in DECODE_1], "text_decoder"),
        call("Execute", 60_000, 1400, DECODE_1, "text_decoder"),
        call("Execute", 50_000, 1500, DECODE_2, "text_decoder"),
        RunData("Execute", -1, [], [event("Method::execute", 0, 1, 30, chain=-1)]),  # of a constant
    ]
    recording = read_recording(write(tmp_path / "a.etdp", runs), program)
    assert [(c.method.name, c.phase, c.total_ns) for c in recording.calls] == [
        ("vision_encoder", None, 2000),
        ("text_decoder", "prefill", 13_000),
        ("text_decoder", "decode", 1500),
        ("text_decoder", "decode", 1400),
    ]
    assert recording.phases_told_by == "time"
    assert [load.method for load in recording.loads] == [None]
    assert any("told" in note or "taken for it" in note for note in Profile(program, recording).notes())


def test_names_of_the_runner_go_before_times(program, tmp_path):
    runs = [call(f"text_decoder[{phase}]", at, 1500, DECODE_1) for at, phase in ((1, "decode"), (9000, "prefill"))]
    recording = read_recording(write(tmp_path / "a.etdp", runs), program)
    assert [c.phase for c in recording.calls] == ["decode", "prefill"]
    assert recording.phases_told_by == "runner"
    assert Profile(program, recording).notes() == ()


def test_a_single_call_is_not_split(program, tmp_path):
    recording = read_recording(write(tmp_path / "a.etdp", [call("text_decoder", 1, 1500, DECODE_1)]), program)
    assert (recording.calls[0].phase, recording.phases_told_by) == (None, None)
    [part] = Profile(program, recording).parts
    assert part.name == "text_decoder"


# -- real recordings --------------------------------------------------------------------------------------------------


def check_adds_up(profile: Profile) -> None:
    """All views of a profile tell of the same time, and no more of it than there was."""
    total = sum(call.total_ns for call in profile.recording.calls)
    assert total > 0
    assert profile.total_ns == pytest.approx(total)
    for call_ in profile.recording.calls:
        assert set(call_.instruction_ns) == set(range(len(call_.method.instructions)))
        assert 0 < call_.between_ns < call_.total_ns
    assert sum(row.time.total_ms for row in profile.work()) == pytest.approx(total / 1e6)
    for part_index, part in enumerate(profile.parts):
        assert sum(row.part_ms[part_index] for row in profile.work()) == pytest.approx(part.total_ns / 1e6)
    for layers in profile.layers():
        by_place = [sum(ms) for ms in zip(*(ms for _, ms in layers.places), strict=True)]
        assert by_place == pytest.approx([sum(ms) for ms in zip(*layers.layer_ms, strict=True)])


def test_recording_of_the_python_runtime(pte, program, tmp_path):
    calls = [("vision_encoder", 4), ("text_decoder", 512), ("text_decoder", 1), ("text_decoder", 1)]
    path = record(pte, tmp_path / "a.etdp", calls)
    profile = Profile(program, read_recording(path, program))
    assert [call_.method.name for call_ in profile.recording.calls] == [method for method, _ in calls]
    check_adds_up(profile)
    assert len(profile.recording.loads) == 2
    assert "Fully Connected" in profile.inside()[0].name
    assert {row.time.name for row in profile.work()} == {LINEAR, "other operators", BETWEEN}


def test_recording_of_llava_main(demo_pte, sample_image, llava_main, tmp_path, capsys):
    path = tmp_path / "run.etdp"
    command = [llava_main, "--model_path", demo_pte, "--image_path", sample_image, "--prompt", "Describe the image."]
    subprocess.run([*command, "--temperature", "0", "--etdump", path, "--quiet"], check=True, capture_output=True)
    program = read_program(demo_pte)
    profile = Profile(program, read_recording(path, program))
    check_adds_up(profile)
    assert profile.recording.phases_told_by == "runner"
    parts = {part.name: part for part in profile.parts}
    assert {"vision_encoder", "token_embedding", "text_decoder[prefill]", "text_decoder[decode]"} <= set(parts)
    assert len(parts["vision_encoder"].calls) == 1
    # The answer has more than ten tokens, each of which was decoded and embedded.
    assert len(parts["text_decoder[decode]"].calls) > 10
    # The prompt fits into one call, which comes before all that decode.
    [prefill] = parts["text_decoder[prefill]"].calls
    assert prefill.start_ns + prefill.total_ns <= min(call.start_ns for call in parts["text_decoder[decode]"].calls)
    layers = {stack.method: len(stack.layer_ms) for stack in profile.layers()}
    assert layers["text_decoder"] == 4
    assert layers["vision_encoder"] == 5
    kinds = {row.time.name for row in profile.work()}
    assert {"linear, int8 per channel", "linear, int4 in groups of 32", BETWEEN} <= kinds
    assert any(kind.startswith("mvlm::") for kind in kinds)
    assert {load.method for load in profile.recording.loads} == set(program.methods)
    outputs = [tmp_path / f"run.{ending}" for ending in ("html", "svg", "json")]
    flags = itertools.chain.from_iterable((f"--{output.suffix[1:]}", str(output)) for output in outputs)
    assert main([str(path), "--pte", str(demo_pte), *flags]) == 0
    assert "text_decoder" in capsys.readouterr().out
    ElementTree.parse(outputs[1])


# -- wrong pairs and broken files -------------------------------------------------------------------------------------


def swapped(times: Sequence[int]) -> RunData:
    """A call of vision_encoder whose operators come in the other order."""
    run = call("vision_encoder", 10, 2000, times)
    for entry in run.events:
        name = entry.profile_event.name
        other = {"native_call_flip.out": "native_call_cumsum.out", "native_call_cumsum.out": "native_call_flip.out"}
        entry.profile_event.name = other.get(name, name)
    return run


def renamed(block: str, kernel: str) -> RunData:
    """A call of vision_encoder whose first kernel is of that name."""
    run = call(block, 10, 2000, VISION, "vision_encoder")
    run.events[0].profile_event.name = kernel
    return run


def partial(block: str, method: str, count: int) -> RunData:
    """A call of only the first instructions."""
    run = call(block, 10, 99_000, PREFILL if method == "text_decoder" else VISION, method)
    events = [entry for entry in run.events if entry.profile_event.instruction_id < count]
    return RunData(block, -1, [], events)


@pytest.mark.parametrize(
    ("run", "told"),
    [
        (swapped(VISION), "vision_encoder: instruction 0 was native_call_cumsum.out, in the .pte it is aten::flip.out"),
        (call("text_decoder", 1, 2000, VISION, "vision_encoder"), "instruction 0 was a OPERATOR_CALL"),
        (call("vision_encoder", 1, 13_000, PREFILL, "text_decoder"), "instruction 0 was a DELEGATE_CALL"),
        (partial("text_decoder[decode]", "text_decoder", 5), "instruction 5 of the .pte's 7 did not run"),
        (partial("Execute", "text_decoder", 5), "block 'Execute' with 5 instructions fits none"),
        (renamed("vision_encoder", "native_call_flip.other"), "instruction 0 was native_call_flip.other"),
        (renamed("vision_encoder", "mvlm::flip.out"), "instruction 0 was mvlm::flip.out"),
        (call("other_method", 1, 2000, [5] * 7, "text_decoder"), None),
        (renamed("vision_encoder", "a measurement inside"), None),
    ],
)
def test_etdumps_of_other_programs_are_refused(program, tmp_path, run, told):
    path = write(tmp_path / "a.etdp", [run])
    if told is None:  # what is not known to be wrong is not refused
        read_recording(path, program)
        return
    with pytest.raises(ProfileError, match=re.escape(told)) as error:
        read_recording(path, program)
    assert f"{path}: is not of {program.path}" in str(error.value)
    assert "--etdump" in str(error.value)


def test_more_instructions_than_the_pte_has(program, tmp_path):
    run = call("text_decoder", 1, 99_000, PREFILL)
    run.events.append(event("OPERATOR_CALL", 7, 98_000, 5))
    with pytest.raises(ProfileError, match=r"instruction 7 ran, the \.pte has 7"):
        read_recording(write(tmp_path / "a.etdp", [run]), program)


def test_instructions_may_be_left_out_where_there_are_jumps(program, tmp_path):
    decoder = replace(program.methods["text_decoder"], has_jumps=True)
    jumping = replace(program, methods=program.methods | {"text_decoder": decoder})
    path = write(tmp_path / "a.etdp", [partial("text_decoder[decode]", "text_decoder", 5)])
    recording = read_recording(path, jumping)
    profile = Profile(jumping, recording)
    assert set(recording.calls[0].instruction_ns) == set(range(5))
    assert "text_decoder has jumps" in profile.notes()[0]
    assert sum(row.time.total_ms for row in profile.work()) == pytest.approx(0.099)
    to_text(profile, per_call=True), to_html(profile), to_svg(profile)


def test_methods_that_are_alike_are_not_guessed(tmp_path):
    path = export(tmp_path / "a.pte", {"one": (Encoder(), False), "two": (Encoder(), False)}, {})
    alike = read_program(path)
    etdump = write(tmp_path / "a.etdp", [call("Execute", 1, 2000, VISION, "vision_encoder")])
    with pytest.raises(ProfileError, match="of one or two, whose instructions are alike"):
        read_recording(etdump, alike)
    named = write(tmp_path / "b.etdp", [call("two", 1, 2000, VISION, "vision_encoder")])
    assert read_recording(named, alike).calls[0].method.name == "two"


def test_real_recording_of_another_program(pte, tmp_path):
    other = read_program(export(tmp_path / "other.pte", {"text_decoder": (Encoder(), False)}, {}))
    path = record(pte, tmp_path / "a.etdp", [("text_decoder", 2)])
    with pytest.raises(ProfileError, match="is not of"):
        read_recording(path, other)


def damaged(data: bytes) -> bytes:
    return data[:40] + bytes(byte ^ 0xFF for byte in data[40:])


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (lambda etdump, pte: None, "no such file; make it with llava_main --etdump"),
        (lambda etdump, pte: b"", "is empty"),
        (lambda etdump, pte: b"no ETDump at all", "is no ETDump"),
        (lambda etdump, pte: etdump[:11], "is no ETDump"),
        (lambda etdump, pte: pte, "is a .pte, which goes behind --pte"),
        (lambda etdump, pte: etdump[:-1], "is truncated"),
        (lambda etdump, pte: damaged(etdump), "is broken"),
    ],
)
def test_files_that_are_no_etdump(pte, etdump, tmp_path, capfd, content: Callable[[bytes, bytes], bytes | None], told):
    path = tmp_path / "a.etdp"
    data = content(etdump.read_bytes(), pte.read_bytes())
    if data is not None:
        path.write_bytes(data)
    output = tmp_path / "a.json"
    assert main([str(path), "--pte", str(pte), "--json", str(output)]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith(f"mvlm.runtime.profile: {path}: ")
    assert told in err
    assert err.count("\n") == 1
    assert not output.exists()


def test_folders_are_no_etdumps(pte, tmp_path, capsys):
    assert main([str(tmp_path), "--pte", str(pte)]) == 2
    assert "is no file" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["missing.pte", "run.etdp"])
def test_files_that_are_no_pte(pte, etdump, capsys, name):
    assert main([str(etdump), "--pte", str(pte.with_name(name))]) == 2
    err = capsys.readouterr().err
    assert name in err
    assert ("no such file" if name == "missing.pte" else "no ExecuTorch program") in err


def test_etdump_without_a_call(pte, tmp_path, program):
    path = write(tmp_path / "a.etdp", [load("text_decoder[load]", 100)])
    with pytest.raises(ProfileError, match="without a call"):
        read_recording(path, program)


def test_etdump_of_a_run_that_failed(program, tmp_path):
    run = call("text_decoder[decode]", 1, 1500, DECODE_1)
    path = write(tmp_path / "a.etdp", [RunData(run.name, -1, [], run.events[:-1])])
    with pytest.raises(ProfileError, match=r"neither Method::execute nor Program::load_method: the run failed"):
        read_recording(path, program)


def test_damaged_ptes_are_read_or_refused(pte, tmp_path):
    """Whatever damage leads to, it is an error that says so, and never another exception."""
    data, path, generator = pte.read_bytes(), tmp_path / "damaged.pte", random.Random(0)
    refused = []
    for _ in range(200):
        damaged_data = bytearray(data)
        at = generator.randrange(64, len(data) - 4)
        damaged_data[at : at + 4] = generator.randbytes(4)
        path.write_bytes(damaged_data)
        try:
            read_program(path)
        except ExportError as error:
            refused.append(str(error))
    assert 0 < len(refused) < 200
    assert all(str(path) in message for message in refused)


# -- outputs ----------------------------------------------------------------------------------------------------------

SVG = "{http://www.w3.org/2000/svg}"


class Page(HTMLParser):
    """A page as data; it complains of tags that are not closed."""

    VOID = frozenset({"meta", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def check_self_contained(text: str) -> None:
    assert "<script" not in text
    without_namespace = text.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not re.search(r"https?:|//|@import|url\(|\bsrc=|\bhref=|\bon\w+=", without_namespace)


def rectangles(svg: ElementTree.Element) -> list[tuple[float, float, float, str]]:
    """Left and right edge, top and tooltip of each box."""
    found = []
    for group in svg.iter(f"{SVG}g"):
        rect = group.find(f"{SVG}rect")
        x, width, y = (float(rect.get(name)) for name in ("x", "width", "y"))
        found.append((x, x + width, y, group.find(f"{SVG}title").text))
    return found


def test_svg(profile):
    text = to_svg(profile)
    svg = ElementTree.fromstring(text)
    check_self_contained(text)
    assert svg.get("role") == "img"
    ids = [svg.find(f"{SVG}{tag}").get("id") for tag in ("title", "desc")]
    assert svg.get("aria-labelledby").split() == ids
    assert "17.900" not in svg.find(f"{SVG}desc").text  # 17,900 ns are 0.018 ms
    assert "0.018 ms in all" in svg.find(f"{SVG}desc").text
    assert "prefers-color-scheme: dark" in text
    assert "var(" not in text  # which other programs than browsers do not draw
    found = rectangles(svg)
    tooltips = [tooltip for *_, tooltip in found]
    assert tooltips[0].startswith("all calls, 0.018 ms, 100.0% of all, 4 times")
    [longest] = [tooltip for tooltip in tooltips if "prefill › layer 2 › 4: linear" in tooltip]
    assert longest.endswith(f"0.004 ms, {4001 / TOTAL:.1%} of all, 1 time 4.0 µs")
    assert LINEAR in longest


def test_boxes_are_as_wide_as_they_took_time(profile):
    found = rectangles(ElementTree.fromstring(to_svg(profile)))
    left, right, *_ = found[0]
    per_ns = (right - left) / TOTAL

    def width(end: str) -> float:
        [(x, stop, _, _)] = [box for box in found if end in box[3]]
        return (stop - x) / per_ns

    assert width("text_decoder › prefill, ") == pytest.approx(13_000, rel=1e-3)
    assert width("decode › layer 1, ") == pytest.approx(DECODE[2] + DECODE[3], rel=0.02)
    assert width("vision_encoder › 1: aten::cumsum") == pytest.approx(809, rel=0.02)
    # Nothing sticks out of what it is under, and neighbours do not overlap.
    for top in {y for _, _, y, _ in found}:
        row = sorted(box for box in found if box[2] == top)
        for (_, stop, _, _), (start, _, _, _) in itertools.pairwise(row):
            assert start >= stop - 0.02


def test_every_box_consists_of_what_is_below(profile):
    def check(box):
        if box.children:
            below = sum(child.total_ns for child in box.children)
            assert below == pytest.approx(box.total_ns)
            assert all(child.level > box.level for child in box.children)
        for child in box.children:
            check(child)

    check(boxes(profile))


def test_page(profile):
    text = to_html(profile, top=3)
    page = Page(text)
    check_self_contained(text)
    svgs = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]
    assert len(svgs) == 1 + len(profile.parts)
    assert len(rectangles(svgs[0])) > len(rectangles(svgs[1]))
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids)) == 2 * len(svgs)
    for row in profile.work():
        assert row.time.name in page.text
    assert page.text.count("aten::flip.out") >= 1
    assert ("lang", "en") in page.attributes
    # Every colour that is used is defined, in both modes.
    used = set(re.findall(r'class="(?:swatch )?(kind[\w-]+|frame|gap)"', text))
    assert used
    for name in used:
        assert text.count(f".{name} {{") == 2


def hostile(program: Program, recording: Recording) -> Profile:
    """All names are of somebody who wants to be more than text."""
    evil = "</title><script>alert('1')</script>\x1b[31m\x00&\""
    methods = {
        name: replace(
            method,
            instructions=tuple(replace(i, name=evil + i.name, kind=evil + i.kind) for i in method.instructions),
        )
        for name, method in program.methods.items()
    }
    calls = tuple(replace(c, method=methods[c.method.name], phase=c.phase and evil) for c in recording.calls)
    return Profile(
        replace(program, model_name=evil, methods=methods, path=Path(f"/{evil}.pte")), replace(recording, calls=calls)
    )


def test_names_are_text(program, profile):
    evil = hostile(program, profile.recording)
    for text in (to_html(evil), to_svg(evil)):
        assert "<script" not in text
        assert not re.search(r"[\x00-\x09\x0b-\x1f]", text)
        assert "alert(" in text
    ElementTree.fromstring(to_svg(evil))
    Page(to_html(evil))
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", to_text(evil, per_call=True))
    json.dumps(evil.to_dict(per_call=True))


def test_many_kinds_of_work(program, profile):
    """More than there are colours."""
    decoder = program.methods["text_decoder"]
    method = replace(
        decoder,
        instructions=tuple(replace(i, kind=f"kind of {n}") for n, i in enumerate([*decoder.instructions] * 3)),
        stacks=(),
    )
    call_ = replace(profile.recording.calls[-1], method=method, instruction_ns=dict.fromkeys(range(21), 50.0))
    many = Profile(replace(program, methods={"text_decoder": method}), replace(profile.recording, calls=(call_,)))
    text = to_html(many)
    assert 'class="kind-other"' in text
    Page(text)


# -- command line -----------------------------------------------------------------------------------------------------


def test_text(profile):
    text = to_text(profile, top=2, per_call=True)
    assert "0.018 ms in 4 calls" in text
    rows = [line.split() for line in text.splitlines()]
    assert ["prefill", "1", "0.013", f"{13_000 / TOTAL:.1%}", "13.0"] in rows
    assert ["decode", "2", "0.003", f"{2900 / TOTAL:.1%}", "1.4"] in rows
    assert "layers of text_decoder: 3 of 2 instructions, 0 to 5" in text
    assert "… and 14 more: --top" in text
    assert ["3", "text_decoder[decode]", "0.040", "0.002", "0.000"] in rows
    assert "longest instructions" not in to_text(profile, top=0)
    assert "begins at ms" not in to_text(profile)


def test_command_line(pte, etdump, tmp_path, capsys):
    html, svg, js = (tmp_path / f"out.{ending}" for ending in ("html", "svg", "json"))
    flags = ["--html", str(html), "--svg", str(svg), "--json", str(js), "--top", "1", "--per-call"]
    assert main([str(etdump), "--pte", str(pte), *flags]) == 0
    out, err = capsys.readouterr()
    assert "linear, float32" in out
    assert "begins at ms" in out
    assert err == ""
    assert html.read_text().startswith("<!DOCTYPE html>")
    ElementTree.parse(svg)
    assert len(json.loads(js.read_text())["calls"]) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.html", "out.json", "out.svg"]


def test_outputs_that_cannot_be_written(pte, etdump, tmp_path, capsys):
    missing = tmp_path / "nowhere" / "a.html"
    assert main([str(etdump), "--pte", str(pte), "--html", str(missing)]) == 2
    assert "there is no folder" in capsys.readouterr().err
    before = etdump.read_bytes()
    assert main([str(etdump), "--pte", str(pte), "--json", str(etdump)]) == 2
    assert "named twice" in capsys.readouterr().err
    assert etdump.read_bytes() == before
    same = str(tmp_path / "a")
    assert main([str(etdump), "--pte", str(pte), "--json", same, "--svg", same]) == 2
    assert "named twice" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--top", "-1"], ["--top", "x"], [], ["--pte"]])
def test_wrong_flags(etdump, capsys, flags):
    with pytest.raises(SystemExit) as error:
        main([str(etdump), *flags])
    assert error.value.code == 2
    assert "usage: python -m mvlm.runtime.profile" in capsys.readouterr().err


def test_help_teaches_and_is_quick():
    code = (
        "import sys; from mvlm.runtime.profile import main\n"
        "try: main(['--help'])\n"
        "finally: assert not {'torch', 'executorch', 'pandas'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "llava_main --model_path mobilevlm.pte" in result.stdout
    assert "--etdump run.etdp" in result.stdout
    assert len(max(result.stdout.splitlines(), key=len)) <= 120
