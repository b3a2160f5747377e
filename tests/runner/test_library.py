"""``libmvlm_runner`` as an app has it: installed to a prefix, found with find_package, called through C."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from sentencepiece import SentencePieceProcessor
from tiny_pte import VOCAB_SIZE
from torch import Tensor

from mvlm.export import demo
from mvlm.export.preprocess import load_image, preprocess
from mvlm.runtime.prompt import prompt_ids, prompt_text

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

class ScoreOptions(Structure):
    _fields_ = [("size", c_size_t), ("raw_prompt", c_int32)]

class Stats(Structure):
    _fields_ = [("size", c_size_t), ("load_ms", c_double), ("images", c_int64), ("image_encode_ms", c_double),
                ("prompt_tokens", c_int64), ("prefill_ms", c_double), ("first_token_ms", c_double),
                ("generated_tokens", c_int64), ("decode_ms", c_double), ("decode_tokens", c_int64),
                ("positions_used", c_int64), ("positions_total", c_int64)]

lib = CDLL(sys.argv[1])
lib.mvlm_last_error.restype = lib.mvlm_version.restype = c_char_p
lib.mvlm_runner_vocab_size.restype = c_int64
Callback = CFUNCTYPE(c_int32, c_char_p, c_void_p)
LogitsCallback = CFUNCTYPE(None, c_int64, POINTER(c_float), c_void_p)
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

def tokenize(runner, text):
    count = c_int64(-1)
    check(lib.mvlm_runner_tokenize(runner, text, None, c_int64(0), byref(count)))
    ids = (c_int64 * (count.value + 1))(*[-7] * (count.value + 1))
    check(lib.mvlm_runner_tokenize(runner, text, ids, c_int64(count.value), byref(count)))
    assert ids[count.value] == -7
    return ids[:count.value]

def score(runner, ids, raw_prompt=0, on_row=None, expected=OK):
    # Logarithms of probabilities, and the bytes of the logits that came, one row after another.
    options = ScoreOptions()
    lib.mvlm_score_options_init(byref(options))
    options.raw_prompt = raw_prompt
    size, rows, values = lib.mvlm_runner_vocab_size(runner), [], (c_double * len(ids))(*[7.0] * len(ids))
    def callback(i, logits, _):
        assert i == len(rows)
        rows.append(string_at(logits, 4 * size))
        if on_row is not None:
            on_row(i)
    keep = LogitsCallback(callback)
    given = (c_int64 * len(ids))(*ids)
    check(lib.mvlm_runner_score(runner, given, c_int64(len(ids)), byref(options), keep, None, values), expected)
    return list(values), b"".join(rows)

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
                         lambda: lib.mvlm_runner_tokenize(runner, b"x", None, c_int64(0), byref(c_int64())),
                         lambda: lib.mvlm_runner_score(runner, None, c_int64(0), None, LogitsCallback(), None, None),
                         lambda: lib.mvlm_runner_generate(runner, None, None, None, None)):
                refused.append(check(call(), FAILURE))
            assert stats(runner).generated_tokens == 0
            return 0
        check(lib.mvlm_runner_add_text(runner, b"Describe the image."))
        text, reason = generate(runner, on_text)
        print(json.dumps([refused, reason]))
        """
    )
    assert len(reasons[0]) == 6
    assert all("in another call" in reason for reason in reasons[0])
    assert reasons[1] == 4


# Logits of given ids. The tiny models are float32 and random: torch computes the same but for the order of sums.


def check_scores(found: list[list[float]], logits_file: Path, expected: list[Tensor], ids: list[list[int]]) -> None:
    """Of several calls: the logarithms, and the logits in one file.

    Args:
        expected: logits [n + 1, V] of each call, from the last position of its prompt on.
        ids: n of each call.
    """
    rows = torch.from_numpy(np.fromfile(logits_file, dtype=np.float32)).view(-1, VOCAB_SIZE)
    assert torch.cat(expected).std() > 0.1
    torch.testing.assert_close(rows, torch.cat(expected), atol=1e-4, rtol=1e-4)
    assert [len(values) for values in found] == [len(given) for given in ids]
    for values, logits, given in zip(found, expected, ids, strict=True):
        oracle = torch.log_softmax(logits.double(), dim=-1)[range(len(given)), given]
        torch.testing.assert_close(torch.tensor(values, dtype=torch.float64), oracle, atol=1e-3, rtol=0)


def test_scores_of_a_text(through_c, text_pte, tmp_path):
    """After BOS alone, of any length, one after another."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, VOCAB_SIZE, (n,), generator=generator).tolist() for n in (1, 7, 8, 9, 0, 255)]
    found = through_c(
        """
        status, runner = load(sys.argv[4], weight_cache=b"off")
        check(status)
        results = [score(runner, ids) for ids in json.loads(sys.argv[6])]
        open(sys.argv[5], "wb").write(b"".join(rows for _, rows in results))
        assert stats(runner).positions_used == 0
        print(json.dumps([values for values, _ in results]))
        """,
        text_pte.path,
        tmp_path / "logits",
        json.dumps(ids),
    )
    bos = text_pte.metadata.bos_id
    with torch.no_grad():
        expected = [text_pte.model(text_pte.model.embed_tokens(torch.tensor([[bos, *given]])))[0] for given in ids]
    check_scores(found, tmp_path / "logits", expected, ids)


def test_scores_of_answers_about_a_picture(through_c, llava_pte, sample_image, tmp_path):
    """What was added stays: several answers in any order, then text that is added to it, then another template."""
    found = through_c(
        """
        status, runner = load(sys.argv[4], weight_cache=b"off")
        check(status)
        check(lib.mvlm_runner_add_picture(runner, sys.argv[3].encode()))
        check(lib.mvlm_runner_add_text(runner, b"What is"))
        ids = [tokenize(runner, text) for text in (b"a red circle", b"two blue squares beside a large green circle")]
        results = [score(runner, ids[0]), score(runner, ids[1]), score(runner, ids[0])]
        check(lib.mvlm_runner_add_text(runner, b" in it?"))
        results += [score(runner, ids[0]), score(runner, ids[0], raw_prompt=1)]
        open(sys.argv[5], "wb").write(b"".join(rows for _, rows in results))
        assert results[0] == results[2]
        print(json.dumps([ids, [values for values, _ in results]]))
        """,
        llava_pte.path,
        tmp_path / "logits",
    )
    model, metadata = llava_pte.model, llava_pte.metadata
    tokenizer = SentencePieceProcessor(model_proto=llava_pte.tokenizer)
    first, second = found[0]
    assert [first, second] == tokenizer.encode(["a red circle", "two blue squares beside a large green circle"])
    assert len(second) > 8 > len(first)

    def logits(question: str, ids: list[int], raw: bool = False) -> Tensor:
        text = prompt_text(metadata, question, images=1, raw=raw)
        before, after = prompt_ids(tokenizer, metadata, text)
        before_1LD, after_1LD = (model.embed_tokens(torch.tensor([piece])) for piece in (before, after + ids))
        picture_1TD = model.encode_image(preprocess(load_image(sample_image), metadata.image))
        return model(torch.cat([before_1LD, picture_1TD, after_1LD], dim=1))[0, -len(ids) - 1 :]

    whole = "What is in it?"
    with torch.no_grad():
        expected = [logits("What is", ids) for ids in (first, second, first)]
        expected += [logits(whole, first), logits(metadata.image_prefix + whole, first, raw=True)]
    check_scores(found[1], tmp_path / "logits", expected, [first, second, first, first, first])


def test_an_answer_is_what_scores_best(through_c, sample_image):
    """Token by token, in the first and the second turn; scoring changes neither answers nor the conversation."""
    found = through_c(
        """
        import array
        def likeliest(rows):
            size = lib.mvlm_runner_vocab_size(runner)
            values = array.array("f", rows)
            rows = [values[at : at + size] for at in range(0, len(values), size)]
            return [max(range(size), key=row.__getitem__) for row in rows]
        def turn(runner, question, scored):
            check(lib.mvlm_runner_add_text(runner, question))
            result = [score(runner, tokenize(runner, text)) for text in scored]
            used = stats(runner).positions_used
            return [likeliest(rows) for _, rows in result], [v for v, _ in result], used, generate(runner)[0]
        turns = []
        for scored in ((), (b"Hello there", None)):
            status, runner = load(sys.argv[2], weight_cache=b"off")
            check(lib.mvlm_runner_add_picture(runner, sys.argv[3].encode()))
            for question in (b"Describe the image.", b"What color is the circle?"):
                best = len(turns) > 1 and turns[len(turns) - 2][3].encode()
                turns.append(turn(runner, question, [text or best for text in scored]))
                turns[-1] += (tokenize(runner, turns[-1][3].encode()),)
            lib.mvlm_runner_free(runner)
        print(json.dumps(turns))
        """
    )
    for plain, scored in zip(found[:2], found[2:], strict=True):
        assert plain[2:] == scored[2:]
        (_, likeliest), (other, log_probabilities), _, _, ids = scored
        assert likeliest == [*ids, 2]  # and then the end token
        assert sum(log_probabilities) / len(ids) > -0.7 > sum(other) / len(other)


def test_scoring_is_stopped_and_begun_anew(through_c):
    found = through_c(
        """
        status, runner = load(sys.argv[2], weight_cache=b"off")
        check(lib.mvlm_runner_add_text(runner, b"Describe the image."))
        ids = list(range(5, 25))
        def stop(i):
            if i == 3:
                lib.mvlm_runner_stop(runner)
        values, rows = score(runner, ids, on_row=stop, expected=FAILURE)
        said = lib.mvlm_last_error().decode()
        assert values == [7.0] * 20
        size = 4 * lib.mvlm_runner_vocab_size(runner)
        again = score(runner, ids)
        assert again[1].startswith(rows)
        generate(runner, max_new_tokens=1)
        check(lib.mvlm_runner_add_text(runner, b"Hi"))
        score(runner, ids)
        lib.mvlm_runner_reset(runner)
        check(lib.mvlm_runner_add_text(runner, b"Describe the image."))
        assert score(runner, ids) == again
        print(json.dumps([said, len(rows) // size, len(again[1]) // size]))
        """
    )
    assert found == ["stopped before all was read", 9, 21]


def test_what_cannot_be_scored(through_c):
    messages = through_c(
        """
        said = []
        status, runner = load(sys.argv[2], seq_len=80, weight_cache=b"off")
        size = lib.mvlm_runner_vocab_size(runner)
        def fails(ids, **fields):
            values, rows = score(runner, ids, expected=INVALID, **fields)
            assert not rows
            assert values == [7.0] * len(ids)
            said.append(lib.mvlm_last_error().decode())
        fails([3, -1])
        fails([size])
        fails([3] * 80)
        assert len(score(runner, [3] * 79)[0]) == 79
        check(lib.mvlm_runner_add_text(runner, b"word " * 100))
        fails([3])
        lib.mvlm_runner_reset(runner)
        check(lib.mvlm_runner_add_text(runner, b"  "))
        fails([3])
        none, count = LogitsCallback(), c_int64()
        for call in (lambda: lib.mvlm_runner_score(runner, None, c_int64(1), None, none, None, None),
                     lambda: lib.mvlm_runner_score(runner, None, c_int64(-1), None, none, None, None),
                     lambda: lib.mvlm_runner_tokenize(runner, None, None, c_int64(0), byref(count)),
                     lambda: lib.mvlm_runner_tokenize(runner, b"x", None, c_int64(0), None),
                     lambda: lib.mvlm_runner_tokenize(runner, b"x", None, c_int64(1), byref(count)),
                     lambda: lib.mvlm_runner_tokenize(runner, b"caf\\xc3", None, c_int64(0), byref(count))):
            said.append(check(call(), INVALID))
        lib.mvlm_runner_reset(runner)
        check(lib.mvlm_runner_score(runner, None, c_int64(0), None, none, None, None))
        print(json.dumps(said))
        """
    )
    expected = [
        "id 1 is -1, which is not in 0 .. ",
        "id 0 is ",
        "the prompt takes 1 positions and what is to be scored 80, but of 80 only 80 are left",
        "but of 80 only 80 are left",
        "the prompt is empty",
        "ids is NULL",
        "count is negative",
        "text is NULL",
        "count is NULL",
        "ids is NULL",
        "not valid UTF-8",
    ]
    assert len(messages) == len(expected)
    for message, part in zip(messages, expected, strict=True):
        assert part in message


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
