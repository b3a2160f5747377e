"""``libmvlm_runner`` as an app has it: installed to a prefix, found with find_package, called through C."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from mvlm.export import demo

ROOT = Path(__file__).parents[2]
QUESTION = "What color is the circle?"


@pytest.fixture(scope="module")
def prefix(native_build: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where ``cmake --install`` put everything, after which the folder was moved."""
    folder = tmp_path_factory.mktemp("install")
    subprocess.run(["cmake", "--install", native_build, "--prefix", folder / "first"], check=True, capture_output=True)
    return (folder / "first").rename(folder / "moved")


@pytest.fixture(scope="module")
def example(prefix: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example, built against the installed library."""
    build = tmp_path_factory.mktemp("example")
    configure = ["cmake", "-S", ROOT / "runner" / "example", "-B", build, "-G", "Ninja"]
    subprocess.run([*configure, f"-DCMAKE_PREFIX_PATH={prefix}"], check=True)
    subprocess.run(["cmake", "--build", build], check=True)
    return build / "ask"


@pytest.fixture
def ask_llava_main(llava_main: Path, demo_pte: Path, tmp_path: Path):
    def ask(*questions: str, image: Path | None = None) -> list[str]:
        command = [llava_main, "--model_path", demo_pte, "--interactive", "--temperature", "0", "--quiet"]
        command += ["--image_path", image] if image else []
        typed = "".join(f"{question}\n" for question in questions)
        words = [str(word) for word in command]
        result = subprocess.run(words, input=typed, capture_output=True, text=True, check=True)
        return result.stdout.splitlines()

    return ask


# find_package


def test_the_example_is_as_short_as_promised():
    lines = (ROOT / "runner" / "example" / "ask.cpp").read_text().splitlines()
    assert len([line for line in lines if line.strip() and not line.startswith("//")]) <= 40


def test_the_example_answers_as_llava_main(example, demo_pte, sample_image, ask_llava_main):
    questions = (QUESTION, "Describe the image.")
    result = subprocess.run([example, demo_pte, sample_image, *questions], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ask_llava_main(*questions, image=sample_image)


def test_the_example_says_what_is_wrong(example, demo_pte, sample_image):
    for arguments, expected in (
        (["none.pte", sample_image, "?"], "none.pte"),
        ([demo_pte, "none.jpg", "?"], "none.jpg"),
        ([demo_pte, sample_image, "Is <image> red?"], "contains <image>"),
        ([demo_pte], "usage: ask"),
    ):
        result = subprocess.run([example, *arguments], capture_output=True, text=True)
        assert result.returncode == 2
        assert result.stdout == ""
        assert expected in result.stderr


def test_the_installed_llava_main_needs_nothing_of_the_build(prefix, demo_pte, sample_image, ask_llava_main):
    command = [prefix / "bin" / "llava_main", "--model_path", demo_pte, "--image_path", sample_image]
    command += ["--prompt", QUESTION, "--temperature", "0"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == ask_llava_main(QUESTION, image=sample_image)
    libraries = sorted((prefix / "lib").glob("*.so*"))
    assert len(libraries) >= 8
    for path in [prefix / "bin" / "llava_main", *libraries]:
        dynamic = subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=True).stdout
        paths = [line for line in dynamic.splitlines() if "RUNPATH" in line or "RPATH" in line]
        assert all("[$ORIGIN" in line and str(ROOT) not in line for line in paths), (path, paths)


# The C interface, from Python without torch and without mvlm

#: What every script below begins with.
CTYPES = """
import ctypes, json, sys, threading, time
from ctypes import *

class RunnerOptions(Structure):
    _fields_ = [("size", c_size_t), ("cpu_threads", c_int64), ("seq_len", c_int64), ("weight_cache", c_char_p),
                ("tokenizer_path", c_char_p), ("low_memory", c_int32)]

class GenerateOptions(Structure):
    _fields_ = [("size", c_size_t), ("max_new_tokens", c_int64), ("temperature", c_double), ("top_p", c_double),
                ("top_k", c_int64), ("seed", c_uint64), ("has_seed", c_int32), ("raw_prompt", c_int32)]

class Stats(Structure):
    _fields_ = [("size", c_size_t), ("load_ms", c_double), ("images", c_int64), ("image_encode_ms", c_double),
                ("prompt_tokens", c_int64), ("prefill_ms", c_double), ("first_token_ms", c_double),
                ("generated_tokens", c_int64), ("decode_ms", c_double), ("decode_tokens", c_int64),
                ("positions_used", c_int64), ("positions_total", c_int64)]

lib = CDLL(sys.argv[1])
lib.mvlm_last_error.restype = lib.mvlm_version.restype = c_char_p
Callback = CFUNCTYPE(c_int32, c_char_p, c_void_p)
OK, FAILURE, INVALID = 0, 1, 2

def check(status, expected=OK):
    assert status == expected, (status, lib.mvlm_last_error())
    return lib.mvlm_last_error().decode()

def load(path, **fields):
    options = RunnerOptions()
    lib.mvlm_runner_options_init(byref(options))
    for name, value in fields.items():
        setattr(options, name, value)
    runner = c_void_p()
    status = lib.mvlm_runner_load(path.encode(), byref(options), byref(runner))
    return status, runner

def generate(runner, on_text=None, expected=OK, **fields):
    options = GenerateOptions()
    lib.mvlm_generate_options_init(byref(options))
    options.temperature = 0
    for name, value in fields.items():
        setattr(options, name, value)
    parts, reason = [], c_int(-1)
    def callback(text, _):
        parts.append(text)
        return 1 if on_text is None else on_text(text)
    keep = Callback(callback)
    check(lib.mvlm_runner_generate(runner, byref(options), keep, None, byref(reason)), expected)
    return b"".join(parts).decode(), reason.value

def stats(runner):
    values = Stats(size=sizeof(Stats))
    lib.mvlm_runner_get_stats(runner, byref(values))
    return values
"""


@pytest.fixture
def through_c(prefix: Path, demo_pte: Path, sample_image: Path):
    """Runs a script after :data:`CTYPES` in a process of its own; what it printed, as JSON."""

    def run(script: str, *arguments: object) -> object:
        code = CTYPES + textwrap.dedent(script)
        library = prefix / "lib" / "libmvlm_runner.so"
        command = [sys.executable, "-I", "-c", code, library, demo_pte, sample_image, *arguments]
        result = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout.splitlines()[-1])

    return run


def test_c_answers_as_llava_main(through_c, ask_llava_main, sample_image):
    found = through_c(
        f"""
        status, runner = load(sys.argv[2])
        check(status)
        check(lib.mvlm_runner_add_picture(runner, sys.argv[3].encode()))
        check(lib.mvlm_runner_add_text(runner, {QUESTION!r}.encode()))
        first = generate(runner)
        used = stats(runner)
        check(lib.mvlm_runner_add_text(runner, b"Describe the image."))
        second = generate(runner)
        lib.mvlm_runner_reset(runner)
        after = stats(runner).positions_used
        check(lib.mvlm_runner_add_picture_data(runner, open(sys.argv[3], "rb").read(), {sample_image.stat().st_size}))
        check(lib.mvlm_runner_add_text(runner, {QUESTION!r}.encode()))
        third = generate(runner)
        lib.mvlm_runner_free(runner)
        lib.mvlm_runner_free(None)
        print(json.dumps([first, second, third, after, lib.mvlm_version().decode(),
                          {{name: getattr(used, name) for name, _ in Stats._fields_}}]))
        """
    )
    first, second, third, after, version, used = found
    assert [first[0], second[0]] == ask_llava_main(QUESTION, "Describe the image.", image=sample_image)
    assert first == third
    assert first[1] == 0
    assert after == 0
    assert version == "0.1.0"
    assert used["images"] == 1
    assert used["positions_total"] == 768
    assert used["positions_used"] == used["prompt_tokens"] + used["generated_tokens"] + 1
    assert used["load_ms"] > 0
    assert used["first_token_ms"] >= used["image_encode_ms"] + used["prefill_ms"] > 0


def test_pixels_are_as_good_as_a_file(through_c, tmp_path):
    """Of rows with padding, with and without alpha."""
    from PIL import Image

    picture = Image.open(demo.SAMPLE_IMAGE).convert("RGB")
    width, height = picture.size
    raw = {}
    for mode in ("RGB", "RGBA"):
        rows = picture.convert(mode).tobytes()
        step = width * len(mode)
        raw[mode] = tmp_path / mode
        raw[mode].write_bytes(b"".join(rows[i * step : (i + 1) * step] + b"\xaa" * 5 for i in range(height)))
    answers = through_c(
        f"""
        status, runner = load(sys.argv[2], low_memory=1, weight_cache=b"off")
        answers = []
        for format, path in enumerate([sys.argv[4], sys.argv[5], None]):
            if path is None:
                check(lib.mvlm_runner_add_picture(runner, sys.argv[3].encode()))
            else:
                pixels = open(path, "rb").read()
                step = len(pixels) // {height}
                check(lib.mvlm_runner_add_picture_pixels(runner, pixels, c_int64({width}), c_int64({height}),
                                                         c_int64(step), format))
            check(lib.mvlm_runner_add_text(runner, b"Describe the image."))
            answers.append(generate(runner, max_new_tokens=30))
            lib.mvlm_runner_reset(runner)
        def pixels_of(width):
            sizes = c_int64(width), c_int64(1), c_int64(5)
            return lib.mvlm_runner_add_picture_pixels(runner, b"123", *sizes, 0)
        short, none = check(pixels_of(2), INVALID), check(pixels_of(0), INVALID)
        print(json.dumps([answers, short, none]))
        """,
        raw["RGB"],
        raw["RGBA"],
    )
    assert answers[0][0] == answers[0][1] == answers[0][2]
    assert "rows of 5 bytes are too short" in answers[1]
    assert "0 x 1 pixels" in answers[2]


def test_stop_from_another_thread(through_c):
    """The callback waits until the other thread has called, so that it surely comes in the middle."""
    found = through_c(
        """
        status, runner = load(sys.argv[2])
        stopped = threading.Event()
        def stop():
            begun.wait()
            lib.mvlm_runner_stop(runner)
            stopped.set()
        begun = threading.Event()
        thread = threading.Thread(target=stop)
        thread.start()
        def on_text(text):
            begun.set()
            stopped.wait()
            return 1
        check(lib.mvlm_runner_add_text(runner, b"Describe the image."))
        text, reason = generate(runner, on_text, temperature=5.0, has_seed=1, seed=3)
        thread.join()
        tokens = stats(runner).generated_tokens
        lib.mvlm_runner_stop(runner)  # nothing runs: without effect
        check(lib.mvlm_runner_add_text(runner, b"What is left?"))
        print(json.dumps([reason, tokens, generate(runner, max_new_tokens=2)[1]]))
        """
    )
    assert found[0] == 3
    assert found[1] >= 1
    assert found[2] in (0, 2)


def test_a_call_within_a_call_is_refused(through_c):
    reasons = through_c(
        """
        status, runner = load(sys.argv[2])
        refused = []
        def on_text(text):
            for call in (lambda: lib.mvlm_runner_reset(runner), lambda: lib.mvlm_runner_add_text(runner, b"x"),
                         lambda: lib.mvlm_runner_add_picture(runner, sys.argv[3].encode()),
                         lambda: lib.mvlm_runner_generate(runner, None, None, None, None)):
                refused.append(check(call(), FAILURE))
            assert stats(runner).generated_tokens == 0
            return 0
        check(lib.mvlm_runner_add_text(runner, b"Describe the image."))
        text, reason = generate(runner, on_text)
        print(json.dumps([refused, reason]))
        """
    )
    assert len(reasons[0]) == 4
    assert all("in another call" in reason for reason in reasons[0])
    assert reasons[1] == 4


def test_what_c_callers_get_wrong(through_c, tmp_path):
    (tmp_path / "not.pte").write_bytes(b"x" * 1000)
    messages = through_c(
        """
        said = []
        def fails(status, expected=INVALID):
            said.append(check(status, expected))
        fails(lib.mvlm_runner_load(None, None, byref(c_void_p())))
        fails(lib.mvlm_runner_load(sys.argv[2].encode(), None, None))
        for path, fields in ((sys.argv[4], {}), ("none.pte", {}), (sys.argv[2], {"cpu_threads": -1}),
                             (sys.argv[2], {"seq_len": 1}), (sys.argv[2], {"weight_cache": b""}),
                             (sys.argv[2], {"tokenizer_path": b"none.model"})):
            status, runner = load(path, **fields)
            assert not runner.value
            fails(status)
        status, runner = load(sys.argv[2], seq_len=80)
        check(status)
        for text in (None, b"see <image>", b"caf\\xc3"):
            status = lib.mvlm_runner_add_text(runner, text)
            if text == b"caf\\xc3":  # found when it is asked
                check(status)
                generate(runner, expected=INVALID)
                said.append(lib.mvlm_last_error().decode())
            else:
                fails(status)
        generate(runner, expected=INVALID)  # nothing was added
        said.append(lib.mvlm_last_error().decode())
        fails(lib.mvlm_runner_add_picture(runner, b"none.jpg"))
        fails(lib.mvlm_runner_add_picture_data(runner, b"GIF89a", 6))
        check(lib.mvlm_runner_add_text(runner, b"word " * 100))
        generate(runner, expected=INVALID)
        said.append(lib.mvlm_last_error().decode())
        for fields in ({"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}, {"max_new_tokens": -1}):
            check(lib.mvlm_runner_add_text(runner, b"Hi"))
            generate(runner, expected=INVALID, **fields)
            said.append(lib.mvlm_last_error().decode())
        assert stats(runner).positions_used == 0
        check(lib.mvlm_runner_add_text(runner, b"Hi"))
        assert generate(runner)[0]
        print(json.dumps(said))
        """,
        tmp_path / "not.pte",
    )
    expected = [
        "model_path is NULL",
        "runner is NULL",
        "not.pte",
        "none.pte",
        "cpu_threads -1",
        "seq_len 1",
        "weight_cache is empty",
        "none.model",
        "text is NULL",
        "contains <image>",
        "not valid UTF-8",
        "the prompt is empty",
        "none.jpg",
        "JPEG and PNG",
        "fit into 80 positions",
        "temperature -1",
        "top_p 0",
        "top_k -1",
        "max_new_tokens -1",
    ]
    assert len(messages) == len(expected)
    for message, part in zip(messages, expected, strict=True):
        assert part in message


def test_an_older_caller_s_shorter_structs(through_c):
    """What a struct of an earlier version lacks has its default, and nothing is written behind its end."""
    found = through_c(
        """
        status, runner = load(sys.argv[2], size=RunnerOptions.weight_cache.offset, weight_cache=b"", seq_len=100)
        check(status)
        values = Stats(size=Stats.prompt_tokens.offset, positions_total=-7)
        lib.mvlm_runner_get_stats(runner, byref(values))
        print(json.dumps([stats(runner).positions_total, values.positions_total, values.load_ms]))
        """
    )
    assert found[:2] == [100, -7]
    assert found[2] > 0


def test_headers_stand_alone(prefix, tmp_path):
    """In C, strictly, and in C++ with a caller's warnings."""
    for name, text, compiler, standard in (
        ("c.c", '#include "mvlm/runner_c.h"\n', os.environ.get("CC", "cc"), "c99"),
        ("runner.cpp", '#include "mvlm/runner.h"\n', os.environ.get("CXX", "c++"), "c++17"),
        ("both.cpp", '#include "mvlm/runner_c.h"\n', os.environ.get("CXX", "c++"), "c++17"),
    ):
        source = tmp_path / name
        source.write_text(text + "int unused_but_not_empty(void);\n")
        flags = [f"-std={standard}", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only"]
        subprocess.run([compiler, *flags, f"-I{prefix / 'include'}", source], check=True)
