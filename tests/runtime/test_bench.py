"""``mvlm.runtime.bench``: its arithmetic, what it understands of other programs, and a small benchmark of the demo."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from sentencepiece import SentencePieceProcessor
from torch import nn

from mvlm.export.inspect import Linear
from mvlm.runtime import bench, child_process, machine
from mvlm.runtime.bench import BenchError, Job, main, parse_against, parse_arguments
from mvlm.runtime.bench_output import FIGURES, parse_llama_cpp
from mvlm.runtime.bench_prompt import picture_prompt, text_prompt, words_of_length
from mvlm.runtime.bench_report import OURS, Run, compare, ratio_of, results_of, share_of_limit, summarize
from mvlm.runtime.child_process import ChildError, run_child
from mvlm.runtime.machine import CpuClock, Limits, LimitsLibrary, MachineError, MultiplyRate
from mvlm.runtime.work import Work, read_pte

# What llama.cpp's programs print, in the forms of several versions.

MTMD_CLI = """\
0.05.140.563 I main: loading model: llm-q4_0.gguf
0.12.122.391 I encoding mtmd batch, n_chunks = 1 (done = 1, total = 3)
0.13.258.465 I mtmd batch encoding done in 1136 ms
0.13.258.492 I decoding image batch 1/1, n_tokens_batch = 144
0.13.914.073 I image decoded (batch 1/1) in 655 ms
 some answer
0.35.316.435 I llama_perf_context_print:        load time =     418.18 ms
0.35.316.458 I llama_perf_context_print: prompt eval time =    2280.50 ms /   211 tokens (   10.81 ms per token,    92.52 tokens per second)
0.35.316.533 I llama_perf_context_print:        eval time =     775.00 ms /    31 runs   (   25.00 ms per token,    40.00 tokens per second)
0.35.316.555 I llama_perf_context_print:       total time =    3606.37 ms /   242 tokens
"""  # noqa: E501

TEXT_CLI = """\
llama_perf_sampler_print:    sampling time =       1.20 ms /    73 runs   (    0.02 ms per token, 60833.33 tokens per second)
llama_perf_context_print:        load time =     350.00 ms
llama_perf_context_print: prompt eval time =     950.00 ms /   190 tokens (    5.00 ms per token,   200.00 tokens per second)
llama_perf_context_print:        eval time =    1600.00 ms /    64 runs   (   25.00 ms per token,    40.00 tokens per second)
"""  # noqa: E501


def llama_bench(*tests: dict) -> str:
    return f"ggml: some warning [1]\n{json.dumps(list(tests), indent=2)}\nbuild: 0c1e570 (1)\n"


def test_llama_mtmd_cli():
    """Its prompt time has the picture in it: the time to the first token, but no speed of prefill."""
    output = parse_llama_cpp(MTMD_CLI)
    assert output.figures == {"encode": 1136, "load": 418.18, "first_token": 2280.5, "decode": 40}
    assert output.counts == {"prompt_tokens": 211, "depth": 211, "decode_tokens": 31}


def test_a_picture_in_slices_and_older_words():
    text = "image slice encoded in 500 ms\nimage decoded (batch 1/1) in 70 ms\nimage slice encoded in 600 ms\n"
    assert parse_llama_cpp(text).figures == {"encode": 1100}
    assert parse_llama_cpp("image encoded in  1413.50 ms by CLIP ( 2.45 ms per image patch)").figures == {
        "encode": 1413.5
    }


def test_llama_cli():
    output = parse_llama_cpp(TEXT_CLI)
    assert output.figures == {"load": 350, "first_token": 950, "prefill": 200, "decode": 40}
    assert output.counts == {"prompt_tokens": 190, "depth": 190, "decode_tokens": 64}


def test_llama_bench():
    prompt = {"n_prompt": 190, "n_gen": 0, "n_depth": 0, "samples_ts": [200, 210, 190]}
    answer = {"n_prompt": 0, "n_gen": 64, "n_depth": 190, "samples_ts": [40.5]}
    shallow = {"n_prompt": 0, "n_gen": 64, "n_depth": 0, "samples_ts": [44.5]}
    output = parse_llama_cpp(llama_bench(prompt, shallow, answer))
    assert output.figures == {"prefill": 200, "decode": 40.5}
    assert output.counts == {"prompt_tokens": 190, "depth": 190, "decode_tokens": 64}
    assert parse_llama_cpp(llama_bench(prompt)).figures == {"prefill": 200}


def test_of_repeated_encodes_the_fastest_counts():
    assert parse_llama_cpp("encode 0: 1300.0 ms\nencode 1: 1112.3 ms  tokens 144\n").figures == {"encode": 1112.3}


@pytest.mark.parametrize("text", ["", "no figures\n", "[\n1, 2\n]", "[\nbroken"])
def test_unknown_output_has_no_figures(text):
    assert not parse_llama_cpp(text).figures


# Statistics.


def run_of(name: str, value: float, who: str = OURS, round_: int = 1, disturbed: bool = False, **others) -> Run:
    values = dict(threads=2, job="text", counts={}, others=0.0, attempts=1, wall_seconds=1.0, cpu_seconds=1.0)
    figures = {name: value}
    return Run(**values | others, round=round_, who=who, figures=figures, disturbed=disturbed, command=(), stats=None)


def test_disturbed_runs_count_only_if_most_were():
    summary = summarize([(5.0, False), (4.0, False), (90.0, True)])
    assert (summary.median, summary.min, summary.max, summary.count, summary.disturbed) == (4.5, 4, 5, 2, False)
    summary = summarize([(5.0, False), (7.0, True), (90.0, True)])
    assert (summary.median, summary.count, summary.disturbed) == (7, 3, True)
    assert summarize([(7.0, True)]).disturbed


def test_a_ratio_above_1_is_in_our_favour():
    assert ratio_of("encode", 500.0, 1000.0) == 2
    assert ratio_of("prefill", 400.0, 200.0) == 2
    assert ratio_of("memory", 1000.0, 1500.0) == 1.5


def test_ratios_are_taken_within_a_round():
    """A machine that becomes half as fast slows both down; the ratio stays."""
    ours = [run_of("decode", value, round_=index) for index, value in enumerate((60.0, 30.0, 15.0), 1)]
    theirs = [run_of("decode", value, "them", index) for index, value in enumerate((40.0, 20.0, 10.0), 1)]
    other = compare("decode", ours, theirs, "them")
    assert (other.ratio.min, other.ratio.median, other.ratio.max) == (1.5, 1.5, 1.5)
    assert other.theirs.median == 20
    assert compare("encode", ours, theirs, "them") is None
    assert compare("decode", ours[:1], theirs[1:], "them") is None


def test_the_best_opponent_comes_first():
    runs = [run_of("encode", 500.0), run_of("encode", 1400.0, "F16"), run_of("encode", 1100.0, "BF16")]
    [result] = results_of(runs, {"text": ["encode"]}, lambda *_: (0.5, "int8"))
    assert [(other.label, other.fastest) for other in result.against] == [("BF16", True), ("F16", False)]
    assert (result.share, result.limit) == (0.5, "int8")


def test_a_figure_is_taken_from_its_job_only():
    runs = [run_of("load", 100.0), run_of("load", 900.0, job="picture")]
    [result] = results_of(runs, {"text": ["load"], "picture": []}, lambda *_: None)
    assert result.ours.median == 100


def test_shares_of_the_limits():
    vision = (Linear(rows=577, in_features=1000, out_features=1000, weights=8, num_bytes=1_000_000),)
    text = (
        Linear(rows=256, in_features=1000, out_features=1000, weights=4, num_bytes=500_000),
        Linear(rows=8, in_features=1000, out_features=4000, weights=4, num_bytes=2_000_000),
    )
    work = Work(vision, text, max_seq_len=256, max_context_len=768, cache_bytes=768_000)
    assert work.encode_macs() == {8: 577_000_000}
    assert work.prefill_macs(300) == {4: 300_000_000 + 2 * 8 * 4_000_000}, "two calls, each with logits of 8 positions"
    assert work.prefill_macs(5) == {4: 5_000_000 + 5 * 4_000_000}
    assert work.decode_bytes(100) == 2_500_000 + 100_000
    rates = {8: MultiplyRate("a", 1e9), 4: MultiplyRate("b", 2e9), 32: MultiplyRate("c", 1e9)}
    limits = Limits(2, 1e9, rates)
    share, what = share_of_limit(work, limits, "encode", 1154.0, 300, 0)
    assert (share, what) == (pytest.approx(0.5), "int8 × int8")
    share, _ = share_of_limit(work, limits, "prefill", 1000.0, 300, 0)
    assert share == pytest.approx(0.364 / 2 / 0.3)
    share, what = share_of_limit(work, limits, "decode", 100.0, 100, 0)
    assert (share, what) == (pytest.approx(0.26), "reads")
    assert share_of_limit(work, limits, "load", 1.0, 100, 0) is None


# Prompts.


@pytest.mark.parametrize("positions", [2, 3, 4, 5, 9, 17, 67, 190, 511, 700])
def test_prompts_have_exactly_so_many_positions(demo_tokenizer, positions):
    tokenizer = SentencePieceProcessor(model_proto=demo_tokenizer)
    prompt = text_prompt(tokenizer, positions)
    assert 1 + len(tokenizer.encode(prompt)) == positions
    assert prompt.strip() == prompt != ""


def test_a_picture_prompt_has_its_marker(demo_tokenizer):
    tokenizer = SentencePieceProcessor(model_proto=demo_tokenizer)
    prompt, words = picture_prompt(tokenizer, "<image>", 67)
    assert 1 + sum(len(tokenizer.encode(piece)) for piece in prompt.split("<image>")) == 67
    assert words in prompt
    assert "<image>" not in words


def test_impossible_lengths():
    with pytest.raises(ValueError, match="too few"):
        words_of_length(len, 2)
    with pytest.raises(ValueError, match=r"no text of 6 positions was found, but one of 5"):
        words_of_length(lambda text: 5 * len(text.split()), 6)


# --against.

TEXT_JOB = Job("text", "words", "words", None, 190, 64, ("load", "prefill", "decode"))
PICTURE_JOB = Job("picture", "<image>words", "words", Path("a b.jpg"), 211, 32, ("encode", "first_token", "memory"))


def test_against_with_label_and_stages():
    opponent = parse_against("llama.cpp Q4_0@prefill,memory: env -t {threads} -p '{prompt_tokens} x' {prompt}", 1)
    assert opponent.label == "llama.cpp Q4_0"
    assert opponent.figures == ("prefill", "memory", "anonymous")
    assert not opponent.writes_stats
    assert (opponent.does(TEXT_JOB), opponent.does(PICTURE_JOB)) == (True, False)
    command = opponent.command(TEXT_JOB, 2, Path("s.json"), True)
    assert command[1:] == ["-t", "2", "-p", "190 x", "words"]


def test_against_alone():
    opponent = parse_against("env --image {image}", 3)
    assert (opponent.label, opponent.figures) == ("env 3", None)
    assert (opponent.does(TEXT_JOB), opponent.does(PICTURE_JOB)) == (False, True)
    assert opponent.command(PICTURE_JOB, 1, Path("s"), True)[1:] == ["--image", "a b.jpg"]
    assert parse_against("mine@: env", 1).label == "mine"
    assert parse_against("encode: env", 1).figures == ("encode",)


def test_against_another_llava_main():
    opponent = parse_against("env --model_path old.pte {run}", 1)
    assert opponent.writes_stats
    assert opponent.does(TEXT_JOB)
    assert opponent.does(PICTURE_JOB)
    command = opponent.command(PICTURE_JOB, 1, Path("s.json"), ignore_eos=False)
    assert command[command.index("--stats_path") + 1] == "s.json"
    assert command[command.index("--image_path") + 1] == "a b.jpg"
    assert command[command.index("--max_new_tokens") + 1] == "33"
    assert "--ignore_eos" not in command
    text = opponent.command(TEXT_JOB, 1, Path("s.json"), ignore_eos=True)
    assert "--image_path" not in text
    assert "--ignore_eos" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no command"),
        ("'", "No closing quotation"),
        ("no-such-program-here", "no program"),
        ("speed: env", "no such stage; stages are load, encode"),
        ("me@speed: env", "no such stage"),
        ("env {thread}", r"there is no \{thread\}; there are \{run\}, \{stats\}"),
        ("env --flags={run}", "stand alone"),
    ],
)
def test_wrong_against(text, message):
    with pytest.raises(BenchError, match=message):
        parse_against(text, 1)


# The machine.


def test_busy_time_and_others():
    before = "cpu  100 10 50 9000 5 1 2 3 0 0\ncpu0 …\n"
    assert machine.busy_seconds(before, 100) == pytest.approx(1.66)
    start, end = CpuClock(10.0, 100.0, 5.0), CpuClock(12.0, 103.5, 5.1)
    assert machine.cores_of_others(start, end, child_seconds=3.0) == pytest.approx(0.2)
    assert machine.cores_of_others(start, end, child_seconds=9.0) == 0
    assert machine.cores_of_others(CpuClock(0, None, 0), CpuClock(1, None, 0), 0.0) == 0


def test_short_runs_are_forgiven_the_ticks_of_proc_stat():
    assert not machine.is_disturbed(0.05, wall_seconds=10.0, tolerance=0.08)
    assert machine.is_disturbed(0.2, wall_seconds=10.0, tolerance=0.08)
    assert not machine.is_disturbed(0.3, wall_seconds=0.1, tolerance=0.08)
    assert machine.is_disturbed(0.5, wall_seconds=0.1, tolerance=0.08)


def test_waiting_has_an_end():
    said = []
    waiter = machine.QuietWaiter(0.2, -1.0, said.append)  # never quiet enough
    waiter.wait(look_seconds=0.1)
    waiter.wait(look_seconds=0.1)
    assert waiter.left <= 0
    assert len(said) == 1
    assert "waiting for at most 0 s" in said[0]


def test_more_threads_than_cores():
    assert machine.warning_of_thread_counts([1, 2], 2) is None
    assert "4 threads on 2 cores" in machine.warning_of_thread_counts([1, 4], 2)


def test_limits_of_this_machine():
    library = LimitsLibrary()
    for threads in (1, 2):
        limits = library.measure(threads, buffer_bytes=8 * 2**20, seconds=0.002)
        assert limits.threads == threads
        assert limits.read_bytes_per_second > 0
        assert set(limits.multiply) == {4, 8, 32}
        assert all(rate.per_second > 0 and rate.instructions for rate in limits.multiply.values())
    with pytest.raises(MachineError, match="cannot be measured"):
        library.measure(0, seconds=0.001)


def test_the_better_of_two_measurements():
    first = Limits(2, 10.0, {8: MultiplyRate("a", 5.0)})
    second = Limits(2, 9.0, {8: MultiplyRate("b", 6.0)})
    assert first.best(second) == Limits(2, 10.0, {8: MultiplyRate("b", 6.0)})


def test_a_limits_library_that_is_none(tmp_path):
    path = tmp_path / "libmvlm_machine.so"
    path.write_text("nothing")
    with pytest.raises(MachineError, match="cannot be loaded"):
        LimitsLibrary(path)


def test_this_machine_is_described():
    described = machine.describe_machine()
    assert described.cores >= 1
    assert described.memory_bytes > 2**28
    assert described.cpu
    assert described.kernel


# Children.


def test_a_child_is_measured():
    code = "import time; block = bytearray(64 * 2**20); print('out'); time.sleep(0.3)"
    child = run_child([sys.executable, "-c", code])
    assert child.stdout == "out\n"
    assert child.peak_rss_bytes > child.peak_anonymous_bytes > 64 * 2**20
    assert child.wall_seconds > 0.3 > child.cpu_seconds > 0


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import sys; sys.exit('it broke')", r"exit code 1: .*\n  it broke"),
        ("import os; os.kill(os.getpid(), 9)", "killed by SIGKILL"),
        ("print('only this'); exit(3)", r"exit code 3: .*\n  only this"),
        ("exit(3)", "and said nothing"),
    ],
)
def test_a_child_that_fails(code, message):
    with pytest.raises(ChildError, match=message):
        run_child([sys.executable, "-c", code])


def test_a_child_that_takes_too_long_is_stopped(monkeypatch):
    monkeypatch.setattr(child_process, "_GRACE_SECONDS", 0.2)
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    begin = time.monotonic()
    with pytest.raises(ChildError, match=r"took longer than 0\.5 s"):
        run_child([sys.executable, "-c", code], timeout=0.5)
    assert time.monotonic() - begin < 30


def test_no_such_program():
    with pytest.raises(ChildError, match="cannot be run"):
        run_child(["/no/such/program"])


# What a file has to do.


def test_work_is_that_of_the_linears(demo_pte, models):
    """Counted once more, in the eager model while it runs."""
    pte = read_pte(demo_pte)
    model = models.float32

    def macs_of(module: nn.Module, call) -> int:
        total = 0

        def count(linear: nn.Linear, inputs: tuple, _output: object) -> None:
            nonlocal total
            total += inputs[0].numel() * linear.out_features

        hooks = [part.register_forward_hook(count) for part in module.modules() if isinstance(part, nn.Linear)]
        call()
        for hook in hooks:
            hook.remove()
        return total

    size = pte.facts.metadata["mvlm_image_size"]
    pixels = torch.zeros(1, 3, size, size)
    vision = sum(pte.work.encode_macs().values())
    features = model.vision_tower(pixels)
    counted = macs_of(model.vision_tower, lambda: model.vision_tower(pixels))
    counted += macs_of(model.mm_projector, lambda: model.mm_projector(features))
    assert vision == counted

    language_model = model.language_model
    linears = sum(part.weight.numel() for part in language_model.modules() if isinstance(part, nn.Linear))
    assert sum(pte.work.prefill_macs(1).values()) == linears
    head = pte.facts.metadata["get_vocab_size"] * language_model.embed_tokens.embedding_dim
    assert sum(pte.work.prefill_macs(10).values()) == 10 * (linears - head) + 8 * head
    assert linears / 2 < pte.work.decode_bytes(0) < linears
    assert pte.work.decode_bytes(768) == pte.work.decode_bytes(0) + pte.work.cache_bytes


# The whole.

STAND_IN = """
import sys
print("encode 0: 100.0 ms")
print("prompt eval time = 1000.00 ms / 20 tokens ( 5.00 ms per token, 20.00 tokens per second)")
print("eval time = 100.00 ms / 3 runs ( 33.00 ms per token, 30.00 tokens per second)", file=sys.stderr)
"""

FAST = ["--repeat", "2", "--prompt-tokens", "20", "--decode-tokens", "4", "--wait", "0", "--retries", "0"]


@pytest.fixture
def stand_in(tmp_path: Path) -> str:
    """A program that prints what llama.cpp does, as the beginning of a command."""
    path = tmp_path / "stand in.py"
    path.write_text(STAND_IN)
    return f"{sys.executable} '{path}'"


@pytest.fixture(autouse=True)
def cache_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What llava_main keeps between runs, for these tests alone."""
    folder = tmp_path_factory.getbasetemp() / "bench-cache"
    folder.mkdir(exist_ok=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))


@pytest.fixture
def short_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's limits, measured in no time and not well."""
    measure = LimitsLibrary.measure
    monkeypatch.setattr(LimitsLibrary, "measure", lambda self, threads: measure(self, threads, 2**20, 0.001))


@pytest.mark.usefixtures("short_limits")
def test_bench_of_the_demo(demo_pte, llava_main, stand_in, tmp_path, capsys):
    arguments = [str(demo_pte), *FAST, "--threads", "1,2", "--llava-main", str(llava_main)]
    arguments += ["--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.svg")]
    arguments += ["--against", f"stand-in@prefill,decode: {stand_in}"]
    arguments += ["--against", f"same@: {llava_main} --model_path {demo_pte} {{run}}"]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    for text in ("mobilevlm-demo", "1 thread ", "2 threads", "image encode", "of the machine's limit", "× as fast"):
        assert text in out
    assert "2 threads against 1 thread: image encode " in out
    assert "round 2/2, 2 threads, picture, same: " in err
    assert max(map(len, out.splitlines())) < 160

    report = json.loads((tmp_path / "out.json").read_text())
    assert report["format"] == 1
    assert set(report) == {
        *("format", "model", "machine", "versions", "settings", "started", "limits", "work", "results", "notes", "runs")
    }
    assert report["model"]["bytes"] == demo_pte.stat().st_size
    assert [limits["threads"] for limits in report["limits"]] == [1, 2]
    results = {(result["threads"], result["name"]): result for result in report["results"]}
    assert set(results) == {(threads, name) for threads in (1, 2) for name in FIGURES}
    for result in results.values():
        assert 0 < result["ours"]["min"] <= result["ours"]["median"] <= result["ours"]["max"]
        assert result["ours"]["count"] <= 2
    # The stand-in says 20 and 30 tok/s.
    for name, theirs in (("prefill", 20), ("decode", 30)):
        against = {other["label"]: other for other in results[1, name]["against"]}
        assert set(against) == {"stand-in", "same"}
        assert against["stand-in"]["theirs"]["median"] == theirs
        assert against["stand-in"]["ratio"]["median"] > 1
        assert sum(other["fastest"] for other in against.values()) == 1
    assert [other["label"] for other in results[2, "encode"]["against"]] == ["same"]
    # Per round and number of threads: ours, stand-in and same with text; ours and same with the picture.
    assert len(report["runs"]) == 2 * 2 * 5
    first = report["runs"][:5]
    assert [(run["job"], run["who"]) for run in first] == [
        *(("text", "ours"), ("text", "stand-in"), ("text", "same"), ("picture", "ours"), ("picture", "same"))
    ]
    text = first[0]["stats"]
    assert (text["prompt_tokens"], text["decode_tokens"], text["threads"]) == (20, 4, 1)
    picture = first[3]["stats"]
    assert picture["prompt_tokens"] == picture["images"][0]["tokens"] + bench.PICTURE_TEXT_TOKENS
    assert picture["decode_tokens"] == bench.PICTURE_DECODE_TOKENS

    root = ElementTree.parse(tmp_path / "out.svg").getroot()
    assert root.tag.endswith("svg")
    drawn = " ".join(root.itertext())
    for figure in FIGURES.values():
        assert figure.title in drawn
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "out.svg", "stand in.py"]


@pytest.mark.usefixtures("short_limits")
def test_bench_of_a_language_model_alone(text_pte, llava_main, capsys):
    arguments = [
        str(text_pte.path),
        *FAST,
        "--repeat",
        "1",
        "--threads",
        "1",
        "--llava-main",
        str(llava_main),
        "--quiet",
    ]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert "no pictures" in out
    assert "image encode" not in out
    for name in ("load", "prefill", "decode", "first_token", "memory"):
        assert FIGURES[name].title in out
    assert err == ""


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (["--llava-main", "nowhere/llava_main"], "nowhere/llava_main: no such file", 2),
        (["--prompt-tokens", "700", "--decode-tokens", "68"], r"take 769 positions, but .* has 768", 2),
        (["--image", "nowhere.jpg"], "nowhere.jpg: no such file", 2),
        (["--json", "nowhere/out.json"], "there is no folder nowhere", 2),
        (["--against", "python3 -c 'print(1)'"], "tells nothing that is known of load, prefill, decode", 2),
        (["--against", "python3 -c 'exit(4)' {image}"], "exit code 4", 1),
        (["--against", "python3 -c '1' {stats}"], "wrote no statistics", 1),
        (["--against", "ours@: python3"], "no label for an opponent", 2),
        (["--against", "a@: env", "--against", "a@load: env"], "a stage in common", 2),
        (["--", "--no_such_flag"], r"exit code 2: (.|\n)*no_such_flag", 1),
    ],
)
def test_what_cannot_be_measured(demo_pte, llava_main, tmp_path, monkeypatch, capsys, arguments, message, code):
    monkeypatch.chdir(tmp_path)
    with_runner = [] if "--llava-main" in arguments else ["--llava-main", str(llava_main)]
    assert main([str(demo_pte), "--quiet", "--wait", "0", *with_runner, *arguments]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("mvlm.runtime.bench: ")
    assert re.search(message, err), err
    assert not list(tmp_path.iterdir())


def test_files_that_are_no_pte(tmp_path, capsys):
    path = tmp_path / "not.pte"
    path.write_bytes(b"x" * 100)
    for pte, message in ((path, "no ExecuTorch program"), (tmp_path / "nowhere.pte", "no such file")):
        assert main([str(pte)]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["x.pte", "--threads", "0"],
        ["x.pte", "--threads", "1,1"],
        ["x.pte", "--repeat", "0"],
        ["x.pte", "--wait", "-1"],
    ],
)
def test_wrong_flags(arguments):
    with pytest.raises(SystemExit) as stopped:
        parse_arguments(arguments)
    assert stopped.value.code == 2


def test_what_comes_after_two_dashes_is_for_llava_main():
    options = parse_arguments(["x.pte", "--threads", "1,2", "--", "--low_memory", "--threads"])
    assert options.extra == ["--low_memory", "--threads"]
    assert options.threads == [1, 2]


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    out = capsys.readouterr().out
    assert "examples:" in out
    assert "--against" in out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopping_leaves_no_child(demo_pte, llava_main, tmp_path, number):
    pid_file = tmp_path / "pid"
    code = f"import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    script = tmp_path / "sleeper.py"
    script.write_text(code)
    command = [sys.executable, "-m", "mvlm.runtime.bench", str(demo_pte), "--quiet", "--llava-main", str(llava_main)]
    process = subprocess.Popen(
        [*command, "--against", f"{sys.executable} {script}"],
        stderr=subprocess.PIPE,
        # Tests that a shell runs in the background, or nohup, are given SIGINT ignored, and would hand that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not (pid_file.exists() and pid_file.read_text()) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err == b"mvlm.runtime.bench: stopped\n"
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)
