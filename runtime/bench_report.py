"""What came of a benchmark: medians, ratios, shares of the machine's limits, and how they are written down.

Knows nothing of how programs are run.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mvlm.runtime.bench_output import FIGURES
from mvlm.runtime.machine import Limits, Machine
from mvlm.runtime.work import Work

#: Of the JSON.
FORMAT_VERSION = 1
#: Name of our own runs.
OURS = "ours"


@dataclass(frozen=True)
class Run:
    """One process that was measured.

    Attributes:
        round: from 1 on; runs of one round were made one after another.
        threads: that it was told to use.
        job: ``text`` or ``picture``.
        who: :data:`OURS`, or the label of an opponent.
        figures: name in FIGURES -> value.
        counts: see :class:`mvlm.runtime.bench_output.Output`.
        others: cores that other programs used meanwhile.
        disturbed: whether that was too much.
        attempts: how often it was run; the least disturbed attempt is this one.
        wall_seconds: of the process.
        cpu_seconds: likewise.
        command: what was run.
        stats: all that it wrote about itself, if it writes that.
    """

    round: int
    threads: int
    job: str
    who: str
    figures: Mapping[str, float]
    counts: Mapping[str, int]
    others: float
    disturbed: bool
    attempts: int
    wall_seconds: float
    cpu_seconds: float
    command: tuple[str, ...]
    stats: Mapping[str, Any] | None


@dataclass(frozen=True)
class Summary:
    """Of several runs.

    Attributes:
        median: of those that count, like the others.
        min: smallest.
        max: largest.
        count: how many count.
        disturbed: whether disturbed runs had to be counted.
    """

    median: float
    min: float
    max: float
    count: int
    disturbed: bool


@dataclass(frozen=True)
class Comparison:
    """A figure of an opponent beside ours.

    Attributes:
        label: of the opponent.
        theirs: what it reached.
        ratio: how many times as fast ours is, or how many times less memory it takes, run by run.
        fastest: whether it is the best of the opponents in this, by the ratio.
    """

    label: str
    theirs: Summary
    ratio: Summary
    fastest: bool


@dataclass(frozen=True)
class FigureResult:
    """A figure with a number of threads.

    Attributes:
        threads: the number.
        name: in FIGURES.
        ours: what was measured.
        share: of the machine's limit, 0 .. 1, by the median; None where there is no limit, or it was not measured.
        limit: which limit that is, for people.
        against: the opponents, the best first.
    """

    threads: int
    name: str
    ours: Summary
    share: float | None
    limit: str | None
    against: tuple[Comparison, ...] = ()


@dataclass(frozen=True)
class Settings:
    """What was asked for.

    Attributes:
        repeat: runs that are counted, per number of threads and program.
        prompt_tokens: positions of the prompt without a picture.
        decode_tokens: after the first one.
        picture_tokens: positions of the picture; None for a language model alone.
        picture_text_tokens: positions of the text that comes with the picture; likewise.
        busy_tolerance: cores that others may use.
        image: the picture; likewise.
        llava_main: the program.
        extra_flags: it was given besides.
        opponents: label -> command.
    """

    repeat: int
    prompt_tokens: int
    decode_tokens: int
    picture_tokens: int | None
    picture_text_tokens: int | None
    busy_tolerance: float
    image: str | None
    llava_main: str
    extra_flags: tuple[str, ...]
    opponents: Mapping[str, str]


@dataclass(frozen=True)
class Report:
    """A whole benchmark.

    Attributes:
        model: ``path``, ``name``, ``checkpoint_id``, ``recipe`` and ``bytes`` of the file.
        machine: it was measured on.
        versions: of mvlm, ExecuTorch and the contract, as llava_main says.
        settings: what was asked for.
        started: date and time.
        limits: of the machine, per number of threads; empty if they were not measured.
        work: what the file has to compute and read: ``encode_macs`` and ``prefill_macs`` by bits of the weights,
            ``decode_bytes`` per token.
        results: figure by figure.
        notes: what a reader should know, such as runs that were disturbed.
        runs: all that were counted.
    """

    model: Mapping[str, Any]
    machine: Machine
    versions: Mapping[str, Any]
    settings: Settings
    started: str
    limits: tuple[Limits, ...]
    work: Mapping[str, Any]
    results: tuple[FigureResult, ...]
    notes: tuple[str, ...]
    runs: tuple[Run, ...] = field(repr=False)


# -- statistics -------------------------------------------------------------------------------------------------------


def summarize(values: Sequence[tuple[float, bool]]) -> Summary:
    """Of (value, disturbed) pairs: of the undisturbed ones, if they are at least half of all, otherwise of all."""
    clean = [value for value, disturbed in values if not disturbed]
    use_clean = bool(clean) and 2 * len(clean) >= len(values)
    used = clean if use_clean else [value for value, _ in values]
    return Summary(statistics.median(used), min(used), max(used), len(used), not use_clean)


def ratio_of(name: str, ours: float, theirs: float) -> float:
    """How many times as fast ours is; of memory, how many times less."""
    return ours / theirs if FIGURES[name].higher_is_better else theirs / ours


def compare(name: str, ours: Sequence[Run], theirs: Sequence[Run], label: str) -> Comparison | None:
    """A figure of an opponent's runs beside our runs of the same rounds; None if one of the two lacks it."""
    mine = {(run.round, run.job): run for run in ours if name in run.figures}
    pairs = [(mine[run.round, run.job], run) for run in theirs if name in run.figures and (run.round, run.job) in mine]
    if not pairs:
        return None
    return Comparison(
        label,
        summarize([(run.figures[name], run.disturbed) for _, run in pairs]),
        summarize(
            [
                (ratio_of(name, our.figures[name], run.figures[name]), our.disturbed or run.disturbed)
                for our, run in pairs
            ]
        ),
        fastest=False,
    )


def results_of(
    runs: Sequence[Run],
    jobs: Mapping[str, Sequence[str]],
    share: Callable[[int, str, float], tuple[float, str] | None],
) -> tuple[FigureResult, ...]:
    """All figures of all runs.

    Args:
        runs: ours and the opponents'.
        jobs: job -> the figures that are taken from it.
        share: (threads, figure, median) -> share of a limit of the machine and what limit, if there is one.
    """
    results = []
    for threads in dict.fromkeys(run.threads for run in runs):
        here = [run for run in runs if run.threads == threads]
        ours = [run for run in here if run.who == OURS]
        labels = list(dict.fromkeys(run.who for run in here if run.who != OURS))
        for name in FIGURES:
            values = [
                (run.figures[name], run.disturbed) for run in ours if name in jobs[run.job] and name in run.figures
            ]
            if not values:
                continue
            summary = summarize(values)
            found = [compare(name, ours, [run for run in here if run.who == label], label) for label in labels]
            against = sorted((other for other in found if other is not None), key=lambda other: other.ratio.median)
            reached = share(threads, name, summary.median)
            results.append(
                FigureResult(
                    threads,
                    name,
                    summary,
                    *(reached or (None, None)),
                    against=tuple(
                        Comparison(other.label, other.theirs, other.ratio, fastest=index == 0)
                        for index, other in enumerate(against)
                    ),
                )
            )
    return tuple(results)


def share_of_limit(
    work: Work, limits: Limits, name: str, value: float, prompt_tokens: int, decode_tokens: int
) -> tuple[float, str] | None:
    """What share of the machine's limit a figure reaches, and of which limit.

    Encoding and prefill are held against the time that their linears alone would take if they ran at the rate of
    multiply-adds in registers; decoding against reading its weights, and the KV cache so far, at full bandwidth.
    """
    if name == "encode" and work.vision:
        return _compute_share(work.encode_macs(), limits, value / 1000)
    if name == "prefill":
        return _compute_share(work.prefill_macs(prompt_tokens), limits, prompt_tokens / value)
    if name == "decode":
        num_bytes = work.decode_bytes(prompt_tokens + decode_tokens / 2)
        return num_bytes * value / limits.read_bytes_per_second, "reads"
    return None


#: Bits of weights -> name of the limit.
LIMIT_NAMES = {4: "int4 × int8", 8: "int8 × int8", 32: "float32"}


def _compute_share(macs: Mapping[int, int], limits: Limits, seconds: float) -> tuple[float, str] | None:
    if seconds <= 0 or not macs or not all(bits in limits.multiply for bits in macs):
        return None
    at_least = sum(count / limits.multiply[bits].per_second for bits, count in macs.items())
    return at_least / seconds, " and ".join(LIMIT_NAMES[bits] for bits in sorted(macs, key=lambda bits: -macs[bits]))


# -- for people and for programs --------------------------------------------------------------------------------------


def to_json(report: Report) -> str:
    """Everything, each run's raw figures too, as one JSON document."""
    return json.dumps({"format": FORMAT_VERSION, **asdict(report)}, indent=2, allow_nan=False) + "\n"


def to_text(report: Report) -> str:
    """The report for a terminal."""
    settings, machine, model = report.settings, report.machine, report.model
    lines = [
        f"{model['name']} ({model['path']}, {model['bytes'] / 2**20:,.0f} MiB)",
        f"  prompt of {settings.prompt_tokens} positions, then {settings.decode_tokens} tokens"
        + (
            f"; picture of {settings.picture_tokens} positions with {settings.picture_text_tokens} of text"
            if settings.picture_tokens is not None
            else "; no pictures"
        )
        + f"; {settings.repeat} runs of each, one process per run",
        f"{machine.cpu}, {machine.cores} cores, {machine.memory_bytes / 2**30:.1f} GiB, {machine.architecture}"
        + (f" with {' '.join(machine.features)}" if machine.features else ""),
        f"  {machine.system}, {machine.kernel}, CPU governor {machine.governor or 'unknown'}",
    ]
    if report.limits:
        lines += ["", *_limits_table(report.limits)]
    for threads in dict.fromkeys(result.threads for result in report.results):
        lines += ["", *_table(threads, [result for result in report.results if result.threads == threads])]
    if scaling := _scaling(report.results):
        lines += ["", scaling]
    if report.notes:
        lines += ["", *(f"note: {note}" for note in report.notes)]
    return "\n".join(lines)


def number(value: float) -> str:
    """A figure with three digits or more, ``0.713``, ``5.32``, ``48.1``, ``1,112``."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def _threads(count: int) -> str:
    return f"{count} thread{'' if count == 1 else 's'}"


def _limits_table(limits: Sequence[Limits]) -> list[str]:
    """What the machine can do at the most, a column per number of threads."""
    rows = [("the machine's limits", *(_threads(limit.threads) for limit in limits), "", "")]
    rows.append(("reads", *(f"{limit.read_bytes_per_second / 1e9:.1f}" for limit in limits), "GB/s", "from memory"))
    for bits in sorted(limits[0].multiply):
        rates = [limit.multiply[bits] for limit in limits]
        names = " or ".join(dict.fromkeys(rate.instructions for rate in rates))
        rows.append((LIMIT_NAMES[bits], *(f"{rate.per_second / 1e9:,.0f}" for rate in rates), "GMAC/s", names))
    return _aligned(rows, "<" + ">" * len(limits) + "<<")


def _aligned(rows: Sequence[tuple[str, ...]], align: str) -> list[str]:
    """Rows in columns, ``<`` to the left and ``>`` to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, align, widths, strict=False)).rstrip()
        for row in rows
    ]


def _table(threads: int, results: Sequence[FigureResult]) -> list[str]:
    compared = any(result.against for result in results)
    rows = [(_threads(threads), "median", "", "min", "max", "of the machine's limit")]
    if compared:
        rows = [(*rows[0], "against", "theirs", "ours is")]
    for result in results:
        row = (
            FIGURES[result.name].title,
            number(result.ours.median) + _mark(result.ours),
            FIGURES[result.name].unit,
            number(result.ours.min),
            number(result.ours.max),
            "" if result.share is None else f"{100 * result.share:.0f} % of {result.limit}",
        )
        # The best opponent beside ours, the others below it.
        for index, other in enumerate(result.against or [None]):
            right = ("", "", "")
            if other is not None:
                right = (other.label, number(other.theirs.median) + _mark(other.theirs), _ratio(result.name, other))
            left = row if index == 0 else ("",) * len(row)
            rows.append((*left, *right) if compared else left)
    return _aligned(rows, "<><>><<><")


def _mark(summary: Summary) -> str:
    return "~" if summary.disturbed else " "


def _ratio(name: str, other: Comparison) -> str:
    ratio = other.ratio
    if FIGURES[name].unit == "MiB":  # 0.6 times less would be no English
        return f"{short_ratio(name, ratio)} ({100 / ratio.max:.0f} … {100 / ratio.min:.0f} %)"
    return f"{short_ratio(name, ratio)} ({ratio.min:.2f} … {ratio.max:.2f})"


def short_ratio(name: str, ratio: Summary) -> str:
    """``2.53 × as fast``, or of memory, ``61 % of it``."""
    mark = "~" if ratio.disturbed else ""
    if FIGURES[name].unit == "MiB":
        return f"{100 / ratio.median:.0f}{mark} % of it"
    return f"{ratio.median:.2f}{mark} × as fast"


def _scaling(results: Sequence[FigureResult]) -> str | None:
    """How much faster more threads are, stage by stage."""
    counts = sorted({result.threads for result in results})
    if len(counts) < 2:
        return None
    first, last = counts[0], counts[-1]
    medians = {(result.threads, result.name): result.ours.median for result in results}
    parts = [
        f"{FIGURES[name].title} {ratio_of(name, medians[last, name], medians[first, name]):.2f} ×"
        for name in ("encode", "prefill", "decode", "first_token")
        if (first, name) in medians and (last, name) in medians
    ]
    return f"{_threads(last)} against {_threads(first)}: {', '.join(parts)}"
