"""Profile: where the time of a run went, by method, kind of work, layer and instruction.

    llava_main --model_path mobilevlm.pte --image_path photo.jpg --prompt "…" --etdump run.etdp
    python -m mvlm.runtime.profile run.etdp --pte mobilevlm.pte

Joins an ETDump, which knows times and numbers of instructions, with the .pte, which knows what the instructions are.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mvlm.runtime.profile_facts import Layers, Profile

EPILOG = """\
examples:
  # record a run, then see where its time went
  llava_main --model_path mobilevlm.pte --image_path cat.jpg --prompt "What is in the image?" \\
      --temperature 0 --etdump run.etdp
  python -m mvlm.runtime.profile run.etdp --pte mobilevlm.pte

  # a picture of it: width is time; point at a box to see its numbers
  python -m mvlm.runtime.profile run.etdp --pte mobilevlm.pte --html run.html

  # for programs: which instruction took longest?
  python -m mvlm.runtime.profile run.etdp --pte mobilevlm.pte --json run.json && jq '.instructions[0]' run.json

Recording costs time, most where instructions are short. ETDumps of other runners are read as well; where the runner
does not name prefill and decode, they are told by time. Exit code: 0, or 2 if the files do not allow for a profile.
"""

_PROGRAM = "python -m mvlm.runtime.profile"


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number, 0 or more")
    return int(text)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=_PROGRAM,
        description="Show where the time of a run went: by method, kind of work, layer and instruction.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("etdump", metavar="ETDUMP", type=Path, help="a record of a run, of llava_main --etdump")
    parser.add_argument("--pte", metavar="FILE", type=Path, required=True, help="the .pte that was run")
    parser.add_argument(
        "--top", metavar="N", type=_count, default=15, help="list the N longest instructions (default: %(default)s)"
    )
    parser.add_argument("--per-call", action="store_true", help="also every call of a method, in its order")
    parser.add_argument("--html", metavar="FILE", type=Path, help="write a page with a chart and the tables")
    parser.add_argument("--svg", metavar="FILE", type=Path, help="write the chart alone")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the same facts, of all instructions")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, or 2 for files that do not allow for a profile."""
    options = parse_arguments(arguments)
    from mvlm.export.errors import ExportError
    from mvlm.runtime.profile_events import ProfileError

    try:
        profile = _profile(options)
        _write(profile, options)
    except (ExportError, ProfileError) as error:
        print(f"mvlm.runtime.profile: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"mvlm.runtime.profile: {error.filename}: cannot be written: {error.strerror}", file=sys.stderr)
        return 2
    try:
        print(to_text(profile, options.top, options.per_call), flush=True)
    except BrokenPipeError:
        # Whoever reads has seen enough (| head); Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _outputs(options: argparse.Namespace) -> list[Path]:
    return [path for path in (options.html, options.svg, options.json) if path is not None]


def _profile(options: argparse.Namespace) -> Profile:
    """Reads both files; what can be wrong with flags and files is told before the seconds that Inspector needs."""
    from mvlm.export.errors import ExportError
    from mvlm.export.files import check_writable
    from mvlm.runtime.profile_events import check_etdump, read_recording
    from mvlm.runtime.profile_facts import Profile
    from mvlm.runtime.profile_program import read_program

    outputs = _outputs(options)
    for index, path in enumerate(outputs):
        check_writable(path)
        if path.resolve() in {other.resolve() for other in (options.etdump, options.pte, *outputs[:index])}:
            raise ExportError(f"{path}: is named twice; give each output a name of its own")
    check_etdump(options.etdump)
    program = read_program(options.pte)
    from mvlm.export.progress import quiet_libraries

    quiet_libraries()
    return Profile(program, read_recording(options.etdump, program))


def _write(profile: Profile, options: argparse.Namespace) -> None:
    from mvlm.export.files import atomic_write
    from mvlm.runtime.profile_page import to_html, to_svg

    for path, content in (
        (options.html, lambda: to_html(profile, options.top)),
        (options.svg, lambda: to_svg(profile)),
        (options.json, lambda: json.dumps(profile.to_dict(options.per_call), indent=2, allow_nan=False) + "\n"),
    ):
        if path is not None:
            with atomic_write(path) as file:
                file.write(content().encode())


# -- for the terminal -------------------------------------------------------------------------------------------------


def to_text(profile: Profile, top: int = 15, per_call: bool = False) -> str:
    """The profile for a terminal.

    Args:
        profile: to show.
        top: how many of the longest instructions to list.
        per_call: list every call, too.
    """
    from mvlm.runtime.profile_facts import milliseconds

    name = f" ({profile.program.model_name})" if profile.program.model_name else ""
    lines = [
        f"{profile.recording.path}: {milliseconds(profile.total_ns / 1e6)} ms in "
        f"{len(profile.recording.calls):,} calls of {profile.program.path}{name}",
        *(f"note: {note}" for note in profile.notes()),
    ]
    lines += ["", *_method_lines(profile)]
    lines += ["", *_work_lines(profile)]
    for layers in profile.layers():
        lines += ["", *_layer_lines(layers)]
    if top:
        lines += ["", *_top_lines(profile, top)]
    if inside := profile.inside():
        rows = [("inside delegates, as they report it", "count", "ms", "of all", "mean µs")]
        rows += [_row(time) for time in inside[: max(top, 1)]]
        lines += ["", *_table(rows, "<>>>>")]
    if per_call:
        lines += ["", *_call_lines(profile)]
    # Names are other people's; none of them shall write to the terminal but as text.
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in "\n".join(lines))


def _row(time, name: str | None = None) -> tuple[str, ...]:
    from mvlm.runtime.profile_facts import milliseconds

    shown = time.name if name is None else name
    return shown, f"{time.count:,}", milliseconds(time.total_ms), f"{time.share:.1%}", f"{time.mean_us:,.1f}"


def _method_lines(profile: Profile) -> list[str]:
    from mvlm.runtime.profile_facts import milliseconds

    rows = [("method", "calls", "ms", "of all", "mean µs")]
    for whole, phases in profile.methods():
        rows.append(_row(whole))
        rows += [_row(time, f"  {phase}") for phase, time in phases]
    lines = _table(rows, "<>>>>")
    loads = [f"{load.method or 'a method'} {milliseconds(load.total_ns / 1e6)}" for load in profile.recording.loads]
    return [*lines, f"loading, not in these, in ms: {', '.join(loads)}"] if loads else lines


def _work_lines(profile: Profile) -> list[str]:
    from mvlm.runtime.profile_facts import milliseconds

    parts = [part.name for part in profile.parts]
    # One part is all there is.
    shown = parts if len(parts) > 1 else []
    rows = [("kind of work", "count", "ms", "of all", *shown)]
    for work in profile.work():
        by_part = [milliseconds(ms) if ms else "" for ms in work.part_ms] if shown else []
        rows.append((*_row(work.time)[:4], *by_part))
    total = [milliseconds(part.total_ns / 1e6) for part in profile.parts] if shown else []
    rows.append(("all", "", milliseconds(profile.total_ns / 1e6), "100.0%", *total))
    return _table(rows, "<>>>" + ">" * len(shown))


def _layer_lines(layers: Layers) -> list[str]:
    from mvlm.runtime.profile_facts import milliseconds, shares

    header = [cell for part in layers.parts for cell in (f"{part} ms", "share")]
    stack = f", stack {layers.number + 1}" if layers.number else ""
    count = len(layers.layer_ms)
    last = layers.start + layers.period * count - 1
    title = f"layers of {layers.method}{stack}: {count} of {layers.period} instructions, {layers.start} to {last}"

    def cells(times: Sequence[Sequence[float]]) -> list[tuple[str, ...]]:
        """Of each row, time and share in each part."""
        by_part = [shares([row[part] for row in times]) for part in range(len(layers.parts))]
        return [
            tuple(cell for part, ms in enumerate(row) for cell in (milliseconds(ms), f"{by_part[part][index]:.1%}"))
            for index, row in enumerate(times)
        ]

    align = "<" + ">>" * len(layers.parts)
    rows = [("layer", *header)]
    rows += [(str(index), *row) for index, row in enumerate(cells(layers.layer_ms))]
    places = [("in all its layers", *header)]
    times = [ms for _, ms in layers.places]
    places += [(name, *row) for (name, _), row in zip(layers.places, cells(times), strict=True)]
    return [title, *_table(rows, align), "", *_table(places, align)]


def _top_lines(profile: Profile, top: int) -> list[str]:
    instructions = profile.instructions()
    rows = [("longest instructions", "count", "ms", "of all", "mean µs", "number", "layer", "in")]
    rows += [(*_row(row.time), str(row.number), row.layer or "", row.part) for row in instructions[:top]]
    lines = _table(rows, "<>>>>>><")
    left = len(instructions) - top
    return [*lines, f"… and {left:,} more: --top"] if left > 0 else lines


def _call_lines(profile: Profile) -> list[str]:
    from mvlm.runtime.profile_facts import milliseconds

    first = profile.recording.calls[0].start_ns
    rows = [("call", "", "begins at ms", "takes ms", "between instructions ms")]
    for number, call in enumerate(profile.recording.calls):
        name = f"{call.method.name}[{call.phase}]" if call.phase else call.method.name
        times = ((call.start_ns - first) / 1e6, call.total_ns / 1e6, call.between_ns / 1e6)
        rows.append((str(number), name, *map(milliseconds, times)))
    return _table(rows, "><>>>")


def _table(rows: Sequence[tuple[str, ...]], align: str) -> list[str]:
    """Rows in columns, ``<`` to the left and ``>`` to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(align))]
    return [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, align, widths, strict=True)).rstrip()
        for row in rows
    ]


if __name__ == "__main__":
    sys.exit(main())
