"""How fast a ``.pte`` is here, how much of the machine that is, and how much faster than something else.

    python -m mvlm.runtime.bench mobilevlm.pte
    python -m mvlm.runtime.bench mobilevlm.pte --against "old/llava_main --model_path old.pte {run}"

Drives ``llava_main`` as a user does: every run is a process of its own. Two jobs are measured, because a picture and a
prompt of a given length do not go together:

- *text*: a prompt of exactly ``--prompt-tokens`` positions without a picture, then ``--decode-tokens`` tokens. It
  gives load, prefill and decode;
- *picture*: a picture with 67 positions of text, then 32 tokens. It gives image encode, time to first token (the
  picture file is read, encoded, and picture and text are prefilled; loading the model is not in it) and peak memory.

A language model alone has the first job only, which then gives everything. Runs of all programs and jobs alternate
within a round, and a ratio is taken within a round, so that a machine that gets slower slows down both. Everything is
run once before, uncounted, which fills file cache and weight cache.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from mvlm.export import demo
from mvlm.export.contract import VISION_ENCODER
from mvlm.export.errors import ExportError
from mvlm.export.files import atomic_write, check_writable
from mvlm.runtime.bench_output import FIGURES, Output, parse_llama_cpp, parse_stats
from mvlm.runtime.bench_plot import plot_svg
from mvlm.runtime.bench_prompt import picture_prompt, text_prompt
from mvlm.runtime.bench_report import OURS, Report, Run, Settings, number, results_of, share_of_limit, to_json, to_text
from mvlm.runtime.child_process import ChildError, ChildRun, run_child
from mvlm.runtime.machine import (
    Limits,
    LimitsLibrary,
    MachineError,
    QuietWaiter,
    describe_machine,
    is_disturbed,
    usable_cores,
    warning_of_thread_counts,
)
from mvlm.runtime.work import PteSummary, read_pte

#: Of the job with a picture: MobileVLM's template with a question of 15 words, and a short answer.
PICTURE_TEXT_TOKENS = 67
PICTURE_DECODE_TOKENS = 32

TEXT, PICTURE = "text", "picture"

#: What a user may call it in --against -> figures.
STAGES = {
    "load": ("load",),
    "encode": ("encode",),
    "prefill": ("prefill",),
    "decode": ("decode",),
    "first-token": ("first_token",),
    "memory": ("memory", "anonymous"),
}

PLACEHOLDERS = ("run", "stats", "threads", "prompt", "image", "prompt_tokens", "decode_tokens")

EPILOG = """\
examples:
  # how fast is it, with one thread and with two?
  python -m mvlm.runtime.bench mobilevlm.pte --threads 1,2

  # is the new build faster than the old one? {run} stands for all flags that make it do the same
  python -m mvlm.runtime.bench mobilevlm.pte --against "old/llava_main --model_path mobilevlm.pte {run}"

  # what does a flag of llava_main change? what comes after -- goes to ours
  python -m mvlm.runtime.bench mobilevlm.pte --against "llava_main --model_path mobilevlm.pte {run}" -- --low_memory

  # against llama.cpp, stage by stage; of several opponents in a stage the best one counts (ci/bench.sh does this)
  python -m mvlm.runtime.bench mobilevlm.pte --json out.json --plot out.svg \\
    --against "llama.cpp Q4_0@prefill: llama-bench -m q4_0.gguf -t {threads} -p {prompt_tokens} -n 0 -r 1 -o json" \\
    --against "llama.cpp Q4_0@decode: llama-bench -m q4_0.gguf -t {threads} -p 0 -n {decode_tokens} \\
                 -d {prompt_tokens} -r 1 -o json" \\
    --against "llama.cpp@encode,first-token,memory: llama-mtmd-cli -m q4_0.gguf --mmproj mmproj.gguf --perf \\
                 --image {image} -p {prompt} -t {threads} -n {decode_tokens} --temp 0"

what --against takes: [[LABEL@]STAGES: ]COMMAND
  STAGES    which of load, encode, prefill, decode, first-token, memory to take from it, with commas between; without
            any: all that the job gives and the command tells. "LABEL@: COMMAND" gives a label alone
  COMMAND   is not given to a shell. In it are replaced:
              {run}            all flags that make a llava_main do the same job, {stats} included
              {stats}          a file that llava_main's --stats_path shall write; times are then taken from it
              {threads} {prompt} {image} {prompt_tokens} {decode_tokens}
  A command with {image} does what our job with the picture does, any other what our job with text does, and one with
  {run} both. What writes no {stats} must print lines as llama.cpp's programs do ("prompt eval time = …", "eval time =
  …", "load time = …", "mtmd batch encoding done in … ms", "encode 0: … ms") or the JSON of llama-bench. Its memory is
  looked at from outside, as ours is.

how to read the result
  A ratio is the median over the rounds, with its least and most; above 1 ours is better. "~" marks a figure that other
  programs have disturbed, in spite of repetitions: trust it less. "of the machine's limit" holds the stage's linears
  against what the CPU can multiply at the most, measured here and now, and decoding against reading the weights at the
  memory's full bandwidth.

exit code: 0 measured; 2 the flags or files are at fault; 1 a program failed; 130 stopped with Ctrl-C
"""


class BenchError(ValueError):
    """What was asked for cannot be measured; the message says why and what to do."""


# -- what is asked for ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """Something that a program is told to do.

    Attributes:
        name: ``text`` or ``picture``.
        prompt: raw, with the marker of a picture in it.
        words: the text of it without marker and template, for programs with templates of their own.
        image: the picture, or None.
        prompt_tokens: positions of all of it.
        decode_tokens: after the first one.
        figures: that are taken from it.
    """

    name: str
    prompt: str
    words: str
    image: Path | None
    prompt_tokens: int
    decode_tokens: int
    figures: tuple[str, ...]

    def flags(self, threads: int, stats: Path, ignore_eos: bool) -> list[str]:
        """Of llava_main."""
        flags = ["--prompt", self.prompt, "--raw_prompt", "--temperature", "0", "--quiet"]
        if self.image is not None:
            flags += ["--image_path", str(self.image)]
        if ignore_eos:
            flags.append("--ignore_eos")
        # The first token comes out of the prompt.
        flags += ["--max_new_tokens", str(self.decode_tokens + 1)]
        return [*flags, "--cpu_threads", str(threads), "--stats_path", str(stats)]


@dataclass(frozen=True)
class Opponent:
    """A command that ours is compared with.

    Attributes:
        label: for people.
        figures: that are taken from it; None for those that its job gives.
        arguments: with placeholders.
    """

    label: str
    figures: tuple[str, ...] | None
    arguments: tuple[str, ...]

    @property
    def writes_stats(self) -> bool:
        return self.uses("run") or self.uses("stats")

    def uses(self, placeholder: str) -> bool:
        return any(f"{{{placeholder}}}" in argument for argument in self.arguments)

    def does(self, job: Job) -> bool:
        """Whether it is to be compared in this job."""
        return self.uses("run") or self.uses("image") == (job.image is not None)

    def takes(self, job: Job) -> tuple[str, ...]:
        """The figures that are wanted of it in a job."""
        if self.figures is None:
            return job.figures
        return tuple(name for name in self.figures if not self.uses("run") or name in job.figures)

    def command(self, job: Job, threads: int, stats: Path, ignore_eos: bool) -> list[str]:
        values = {
            "stats": str(stats),
            "threads": str(threads),
            "prompt": job.words,
            "image": str(job.image),
            "prompt_tokens": str(job.prompt_tokens),
            "decode_tokens": str(job.decode_tokens),
        }
        command: list[str] = []
        for argument in self.arguments:
            if argument == "{run}":
                command += job.flags(threads, stats, ignore_eos)
            else:
                command.append(re.sub(r"\{(\w+)\}", lambda match: values[match[1]], argument))
        return command


def parse_against(text: str, number: int) -> Opponent:
    """One --against; ``number`` tells opponents without a label apart.

    Raises:
        BenchError: it makes no sense.
    """
    stages = "|".join(STAGES)
    match = re.match(
        rf"(?:(?P<label>[^@:]+)@)?(?P<stages>(?:{stages})(?:,(?:{stages}))*)?:\s+(?P<command>.+)", text, re.S
    )
    if match is not None and not (match["label"] or match["stages"]):
        match = None
    label = match["label"] if match else None
    figures = None
    if match is not None and match["stages"]:
        figures = tuple(name for stage in match["stages"].split(",") for name in STAGES[stage])
    command = match["command"] if match else text
    try:
        arguments = shlex.split(command)
    except ValueError as error:
        raise BenchError(f"--against {text!r}: {error}") from error
    if not arguments:
        raise BenchError("--against: there is no command")
    if arguments[0].endswith((":", "@")) or "@" in arguments[0].partition(":")[0]:
        raise BenchError(f"--against {text!r}: there is no such stage; stages are {', '.join(STAGES)}")
    for argument in arguments:
        for name in re.findall(r"\{(\w+)\}", argument):
            if name not in PLACEHOLDERS:
                known = ", ".join(f"{{{placeholder}}}" for placeholder in PLACEHOLDERS)
                raise BenchError(f"--against {text!r}: there is no {{{name}}}; there are {known}")
            if name == "run" and argument != "{run}":
                raise BenchError(f"--against {text!r}: {{run}} stands for several flags and must stand alone")
    program = _find_program(arguments[0])
    if program is None:
        raise BenchError(
            f"--against: {arguments[0]} is no program, neither as a file nor on PATH nor beside this Python"
        )
    return Opponent(label or f"{Path(program).name} {number}", figures, (program, *arguments[1:]))


def _find_program(name: str) -> str | None:
    found = shutil.which(name)
    if found is None and Path(name).name == name:
        found = shutil.which(str(Path(sys.executable).with_name(name)))
    return found


def make_jobs(pte: PteSummary, prompt_tokens: int, decode_tokens: int, image: Path | None) -> list[Job]:
    """The jobs that a file can do.

    Raises:
        BenchError: the model has too few positions, or the tokenizer finds no such prompt.
    """
    tokenizer = SentencePieceProcessor(model_proto=pte.tokenizer)
    metadata = pte.facts.metadata
    positions = metadata["get_max_context_len"]
    if prompt_tokens + decode_tokens + 1 > positions:
        raise BenchError(
            f"--prompt-tokens {prompt_tokens} and --decode-tokens {decode_tokens} take "
            f"{prompt_tokens + decode_tokens + 1} positions, but {pte.facts.path} has {positions}"
        )
    try:
        prompt = text_prompt(tokenizer, prompt_tokens)
    except ValueError as error:
        raise BenchError(f"--prompt-tokens {prompt_tokens}: {error}") from error
    if image is None:
        everything = ("load", "prefill", "decode", "first_token", "memory", "anonymous")
        return [Job(TEXT, prompt, prompt, None, prompt_tokens, decode_tokens, everything)]
    tokens = metadata["mvlm_image_tokens"] + PICTURE_TEXT_TOKENS
    room = positions - tokens - 1
    if room < 1:
        raise BenchError(f"{pte.facts.path} has {positions} positions; a picture with a question takes {tokens}")
    with_picture, words = picture_prompt(tokenizer, metadata["mvlm_image_marker"], PICTURE_TEXT_TOKENS)
    figures = ("encode", "first_token", "memory", "anonymous")
    decode = min(PICTURE_DECODE_TOKENS, room)
    return [
        Job(TEXT, prompt, prompt, None, prompt_tokens, decode_tokens, ("load", "prefill", "decode")),
        Job(PICTURE, with_picture, words, image, tokens, decode, figures),
    ]


def find_llava_main(given: Path | None) -> Path:
    """The program: as given, beside this Python, or on PATH.

    Raises:
        BenchError: there is none.
    """
    if given is not None:
        found = shutil.which(str(given)) or shutil.which(str(given.absolute()))
        if found is None:
            raise BenchError(f"--llava-main {given}: {'cannot be executed' if given.exists() else 'no such file'}")
        return Path(found)
    # The one of this installation first: it belongs to the Python files.
    found = shutil.which(str(Path(sys.executable).with_name("llava_main"))) or shutil.which("llava_main")
    if found is None:
        raise BenchError(
            "llava_main is neither beside this Python nor on PATH; build it with pip install . or give --llava-main"
        )
    return Path(found)


# -- measuring --------------------------------------------------------------------------------------------------------


class Bench:
    """Runs programs and takes down what they reach.

    Args:
        options: of the command line.
        llava_main: the program that is ours.
        opponents: that it is compared with.
        folder: for files of statistics.
    """

    def __init__(
        self, options: argparse.Namespace, llava_main: Path, opponents: Sequence[Opponent], folder: Path
    ) -> None:
        self._options = options
        self._llava_main = llava_main
        self._opponents = opponents
        self._stats = folder / "stats.json"
        self._waiter = QuietWaiter(options.wait, options.busy_tolerance, self.say)
        self._ignores_eos: dict[str, bool] = {}
        self.runs: list[Run] = []
        #: What a reader should know, without repetitions.
        self.notes: dict[str, None] = {}

    def say(self, text: str) -> None:
        if not self._options.quiet:
            print(text, file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes[text] = None

    def warm_up(self, jobs: Sequence[Job]) -> None:
        """Runs everything once, which also shows what does not work."""
        threads = self._options.threads[0]
        for job in jobs:
            for opponent in self._players(job):
                self.say(f"warming up: {job.name}, {_label(opponent)}")
                self._attempt(job, threads, opponent)

    def measure(self, jobs: Sequence[Job]) -> None:
        """All rounds."""
        for round_ in range(1, self._options.repeat + 1):
            for threads in self._options.threads:
                for job in jobs:
                    for opponent in self._players(job):
                        run = self._run(round_, job, threads, opponent)
                        self.runs.append(run)
                        self.say(_line(run, self._options.repeat))

    def _players(self, job: Job) -> list[Opponent | None]:
        """Ours, as None, and the opponents that a job is for."""
        return [None, *(opponent for opponent in self._opponents if opponent.does(job))]

    def _run(self, round_: int, job: Job, threads: int, opponent: Opponent | None) -> Run:
        """One run, repeated while it is disturbed; the least disturbed one."""
        best: tuple[ChildRun, Output, Mapping | None] | None = None
        tolerance = self._options.busy_tolerance
        attempts = 0
        while True:
            self._waiter.wait()
            attempt = self._attempt(job, threads, opponent)
            attempts += 1
            if best is None or attempt[0].others < best[0].others:
                best = attempt
            child, output, stats = best
            disturbed = is_disturbed(child.others, child.wall_seconds, tolerance)
            if not disturbed or attempts > self._options.retries:
                break
        wanted = job.figures if opponent is None else opponent.takes(job)
        figures = dict(output.figures)
        # Looked at from outside for everybody, and for those that look at themselves the larger of the two.
        figures["memory"] = max(figures.get("memory", 0.0), child.peak_rss_bytes / 2**20)
        figures["anonymous"] = max(figures.get("anonymous", 0.0), child.peak_anonymous_bytes / 2**20)
        if opponent is not None:
            figures = {name: value for name, value in figures.items() if name in wanted}
            # The memory of something that only encodes, say, is no answer's.
            if opponent.figures is None and "first_token" not in output.figures:
                figures = {name: value for name, value in figures.items() if name not in STAGES["memory"]}
        return Run(
            round=round_,
            threads=threads,
            job=job.name,
            who=_label(opponent),
            figures=figures,
            counts=output.counts,
            others=child.others,
            disturbed=disturbed,
            attempts=attempts,
            wall_seconds=child.wall_seconds,
            cpu_seconds=child.cpu_seconds,
            command=child.command,
            stats=stats,
        )

    def _attempt(self, job: Job, threads: int, opponent: Opponent | None) -> tuple[ChildRun, Output, Mapping | None]:
        self._stats.unlink(missing_ok=True)
        if opponent is None:
            flags = job.flags(threads, self._stats, self._ignores_end(str(self._llava_main)))
            command = [str(self._llava_main), "--model_path", str(self._options.pte), *flags, *self._options.extra]
        else:
            ignore_eos = opponent.uses("run") and self._ignores_end(opponent.arguments[0])
            command = opponent.command(job, threads, self._stats, ignore_eos)
        child = run_child(command, self._options.timeout)
        if opponent is not None and not opponent.writes_stats:
            output, stats = parse_llama_cpp(f"{child.stdout}\n{child.stderr}"), None
        else:
            output, stats = self._read_stats(command)
        if opponent is None and output.counts["prompt_tokens"] != job.prompt_tokens:
            raise ChildError(
                f"llava_main read {output.counts['prompt_tokens']} positions where the .pte's tokenizer makes "
                f"{job.prompt_tokens}; --tokenizer_path is of no use here: {shlex.join(command)}"
            )
        self._check(job, opponent, output, command)
        return child, output, stats

    def _read_stats(self, command: Sequence[str]) -> tuple[Output, Mapping]:
        try:
            stats = json.loads(self._stats.read_text())
            return parse_stats(stats), stats
        except FileNotFoundError as error:
            raise ChildError(f"wrote no statistics to {self._stats}: {shlex.join(command)}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ChildError(f"wrote statistics that cannot be read ({error!r}): {shlex.join(command)}") from error

    def _check(self, job: Job, opponent: Opponent | None, output: Output, command: Sequence[str]) -> None:
        """That a program said what is wanted, and did the same as ours."""
        wanted = job.figures if opponent is None else opponent.takes(job)
        told = [name for name in wanted if name in output.figures]
        if opponent is not None and not told and not set(wanted) & set(STAGES["memory"]):
            raise BenchError(
                f"--against: {opponent.label} tells nothing that is known of {', '.join(wanted)}; it must write "
                f"{{stats}} or print what llama.cpp's programs do: {shlex.join(command)}"
            )
        if opponent is not None and not opponent.writes_stats and "load" in told:
            self.note(f"{opponent.label}: what llama.cpp says of loading is the language model alone")
        # What was not asked for may differ.
        compared = {
            "prefill": ("prompt_tokens",),
            "first_token": ("prompt_tokens",),
            "decode": ("depth", "decode_tokens"),
        }
        expected = {"prompt_tokens": job.prompt_tokens, "depth": job.prompt_tokens, "decode_tokens": job.decode_tokens}
        names = {
            "prompt_tokens": "a prompt of",
            "depth": "tokens decoded at a depth of",
            "decode_tokens": "decoding of",
        }
        for count in dict.fromkeys(count for name in told for count in compared.get(name, ())):
            # An answer of n tokens is counted as n or n - 1, depending on whose the first one is.
            slack = 1 if count == "decode_tokens" else 0
            if count in output.counts and abs(output.counts[count] - expected[count]) > slack:
                self.note(
                    f"{_label(opponent)}, {job.name}: {names[count]} {output.counts[count]} positions where "
                    f"{expected[count]} were asked for"
                )

    def _ignores_end(self, program: str) -> bool:
        """Whether a llava_main knows --ignore_eos; an older one may end its answers early."""
        if program not in self._ignores_eos:
            try:
                self._ignores_eos[program] = "--ignore_eos" in run_child([program, "--help"], 60).stdout
            except ChildError as error:
                raise BenchError(f"{program} does not answer --help: {error}") from error
            if not self._ignores_eos[program]:
                self.note(f"{program} has no --ignore_eos: its answers may be shorter than was asked for")
        return self._ignores_eos[program]


def _label(opponent: Opponent | None) -> str:
    return OURS if opponent is None else opponent.label


def _line(run: Run, rounds: int) -> str:
    parts = [f"{FIGURES[name].title} {number(run.figures[name])}" for name in FIGURES if name in run.figures]
    disturbed = f"   ~ others used {run.others:.2f} cores" if run.disturbed else ""
    return (
        f"round {run.round}/{rounds}, {run.threads} thread{'' if run.threads == 1 else 's'}, {run.job}, {run.who}: "
        f"{', '.join(parts)}{disturbed}"
    )


def measure_limits(threads: Sequence[int], before: Sequence[Limits] = ()) -> tuple[Limits, ...]:
    """The machine's limits per number of threads; the better of this and an earlier measurement.

    Raises:
        MachineError: they cannot be measured.
    """
    library = LimitsLibrary()
    now = [library.measure(count) for count in threads]
    return tuple(limits.best(earlier) for limits, earlier in zip(now, before, strict=True)) if before else tuple(now)


def run_bench(options: argparse.Namespace) -> Report:
    """Measures.

    Raises:
        BenchError: what was asked for makes no sense.
        ExportError: the .pte cannot be read, or a file cannot be written.
        ChildError: a program failed.
    """
    pte = read_pte(options.pte)
    llava_main = find_llava_main(options.llava_main)
    has_vision = any(method.name == VISION_ENCODER for method in pte.facts.methods)
    if options.image is not None and not has_vision:
        raise BenchError(f"{options.pte} is a language model without a vision encoder; leave --image out")
    image = (options.image or demo.SAMPLE_IMAGE) if has_vision else None
    if image is not None and not image.is_file():
        raise BenchError(f"--image {image}: no such file")
    jobs = make_jobs(pte, options.prompt_tokens, options.decode_tokens, image)
    opponents = [parse_against(text, number) for number, text in enumerate(options.against, 1)]
    _check_opponents(opponents, jobs)
    for path in (options.json, options.plot):
        if path is not None:
            check_writable(path)

    started = time.strftime("%Y-%m-%d %H:%M:%S")
    with tempfile.TemporaryDirectory(prefix="mvlm-bench-") as folder:
        bench = Bench(options, llava_main, opponents, Path(folder))
        if warning := warning_of_thread_counts(options.threads, usable_cores()):
            bench.note(warning)
            bench.say(f"warning: {warning}")
        bench.warm_up(jobs)
        limits: tuple[Limits, ...] = ()
        try:
            bench.say("measuring the machine's limits")
            limits = measure_limits(options.threads)
            bench.measure(jobs)
            limits = measure_limits(options.threads, limits)
        except MachineError as error:
            if not bench.runs:
                bench.note(f"no limits of the machine: {error}")
                bench.measure(jobs)
    return _report(options, pte, llava_main, opponents, jobs, bench, limits, started)


def _check_opponents(opponents: Sequence[Opponent], jobs: Sequence[Job]) -> None:
    for opponent in opponents:
        if opponent.label == OURS:
            raise BenchError(f"--against: {OURS} is no label for an opponent")
        if not any(opponent.does(job) for job in jobs):
            raise BenchError(f"--against: {opponent.label} takes an {{image}}, and the .pte is a language model alone")
        same = [other for other in opponents if other.label == opponent.label]
        if len(same) > 1 and any(
            set(a.figures or ()) & set(b.figures or ()) or None in (a.figures, b.figures)
            for i, a in enumerate(same)
            for b in same[i + 1 :]
        ):
            raise BenchError(f"--against: {len(same)} commands have the label {opponent.label!r} and a stage in common")


def _report(
    options: argparse.Namespace,
    pte: PteSummary,
    llava_main: Path,
    opponents: Sequence[Opponent],
    jobs: Sequence[Job],
    bench: Bench,
    limits: tuple[Limits, ...],
    started: str,
) -> Report:
    by_threads = {limit.threads: limit for limit in limits}
    machine = describe_machine()
    decode_bytes = pte.work.decode_bytes(options.prompt_tokens + options.decode_tokens / 2)

    def share(threads: int, name: str, value: float) -> tuple[float, str] | None:
        if threads not in by_threads:
            return None
        if name == "decode" and decode_bytes < (machine.last_cache_bytes or 0):
            return None  # a model that stays in the cache is not held up by the memory
        job = next((job for job in jobs if name in job.figures), jobs[0])
        return share_of_limit(pte.work, by_threads[threads], name, value, job.prompt_tokens, job.decode_tokens)

    disturbed = [run for run in bench.runs if run.disturbed]
    if disturbed:
        bench.note(
            f"{len(disturbed)} of {len(bench.runs)} runs were disturbed: other programs used up to "
            f"{max(run.others for run in disturbed):.1f} cores; figures without ~ leave these runs out"
        )
    picture = next((job for job in jobs if job.image is not None), None)
    stats = next(run.stats for run in bench.runs if run.who == OURS and run.stats is not None)
    facts = pte.facts
    return Report(
        model={
            "path": str(options.pte),
            "name": facts.mvlm.model_name,
            "checkpoint_id": facts.mvlm.checkpoint_id,
            "recipe": facts.mvlm.recipe,
            "bytes": facts.size,
        },
        machine=machine,
        versions=stats.get("versions", {}),
        settings=Settings(
            repeat=options.repeat,
            prompt_tokens=options.prompt_tokens,
            decode_tokens=options.decode_tokens,
            picture_tokens=facts.metadata["mvlm_image_tokens"] if picture else None,
            picture_text_tokens=PICTURE_TEXT_TOKENS if picture else None,
            busy_tolerance=options.busy_tolerance,
            image=str(picture.image) if picture else None,
            llava_main=str(llava_main),
            extra_flags=tuple(options.extra),
            opponents={
                f"{opponent.label} {' '.join(opponent.figures or ())}".strip(): shlex.join(opponent.arguments)
                for opponent in opponents
            },
        ),
        started=started,
        limits=limits,
        work={
            "encode_macs": pte.work.encode_macs(),
            "prefill_macs": pte.work.prefill_macs(options.prompt_tokens),
            "decode_bytes": decode_bytes,
        },
        results=results_of(bench.runs, {job.name: job.figures for job in jobs}, share),
        notes=tuple(bench.notes),
        runs=tuple(bench.runs),
    )


# -- command line -----------------------------------------------------------------------------------------------------


def _thread_counts(text: str) -> list[int]:
    counts = [int(part) for part in text.split(",")]
    if any(count < 1 for count in counts) or len(set(counts)) < len(counts):
        raise ValueError
    return counts


_thread_counts.__name__ = "list of thread counts"  # argparse says: invalid ... value


def _at_least(least: int, kind: type = int):
    def parse(text: str) -> float:
        value = kind(text)
        if not value >= least:
            raise argparse.ArgumentTypeError(f"{text} is not possible: {least} at least")
        return value

    parse.__name__ = "number"
    return parse


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m mvlm.runtime.bench",
        description="Measure load, image encode, prefill, decode, time to first token and memory of a .pte with\n"
        "llava_main, beside the machine's own limits, and beside other programs if you like.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s FILE.pte [options] [-- flags of llava_main]",
    )
    parser.add_argument("pte", metavar="FILE.pte", type=Path, help="made by mvlm.export")
    cores = usable_cores()
    parser.add_argument(
        "--threads",
        metavar="N,N",
        type=_thread_counts,
        default=[cores],
        help=f"thread counts to measure with, with commas between (default: {cores}, all cores)",
    )
    parser.add_argument(
        "--repeat", metavar="N", type=_at_least(1), default=5, help="counted runs of everything (default: %(default)s)"
    )
    parser.add_argument(
        "--prompt-tokens",
        metavar="N",
        type=_at_least(2),
        default=190,
        help="positions of the prompt without a picture (default: %(default)s)",
    )
    parser.add_argument(
        "--decode-tokens",
        metavar="N",
        type=_at_least(1),
        default=64,
        help="tokens to decode after it (default: %(default)s)",
    )
    parser.add_argument("--image", metavar="FILE", type=Path, help="a JPEG or PNG picture (default: the bundled one)")
    parser.add_argument(
        "--against",
        metavar="COMMAND",
        action="append",
        default=[],
        help="another program to compare with, run in turns with ours; may be given several times, see below",
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write everything, each run included")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="write a picture of the result, SVG")
    parser.add_argument("--llava-main", metavar="FILE", type=Path, help="the program (default: the one installed)")
    parser.add_argument(
        "--busy-tolerance",
        metavar="CORES",
        type=_at_least(0, float),
        default=0.08,
        help="how much other programs may use before a run counts as disturbed (default: %(default)s)",
    )
    parser.add_argument(
        "--retries",
        metavar="N",
        type=_at_least(0),
        default=2,
        help="how often a disturbed run is repeated (default: %(default)s)",
    )
    parser.add_argument(
        "--wait",
        metavar="SECONDS",
        type=_at_least(0, float),
        default=120.0,
        help="how long to wait in all for other programs to become quiet (default: %(default).0f)",
    )
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=_at_least(1, float),
        default=600.0,
        help="stop a program that takes longer (default: %(default).0f)",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    extra: list[str] = []
    if "--" in arguments:
        at = arguments.index("--")
        arguments, extra = arguments[:at], arguments[at + 1 :]
    options = parser.parse_args(arguments)
    options.extra = extra
    return options


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    options = parse_arguments(arguments)
    # As Ctrl-C, so that no child stays.
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        report = run_bench(options)
        if options.json is not None:
            with atomic_write(options.json) as file:
                file.write(to_json(report).encode())
        if options.plot is not None:
            with atomic_write(options.plot) as file:
                file.write(plot_svg(report).encode())
    except (BenchError, ExportError) as error:
        print(f"mvlm.runtime.bench: {error}", file=sys.stderr)
        return 2
    except (ChildError, OSError) as error:
        print(f"mvlm.runtime.bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("mvlm.runtime.bench: stopped", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    try:
        print(to_text(report), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
