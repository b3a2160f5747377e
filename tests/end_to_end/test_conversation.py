"""Several pictures with a question, and several questions in a conversation, through ``llava_main``."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from llava_run import QUESTION, answer, check_refused
from sentencepiece import SentencePieceProcessor
from torch import Tensor

from mvlm.export.demo.world import draw, sample_scene
from mvlm.export.preprocess import load_image, preprocess
from mvlm.runtime.program import PteProgram

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. "
)
EOS = 2


@pytest.fixture
def other_image(tmp_path: Path) -> Path:
    """Another picture than the bundled one."""
    path = tmp_path / "other.png"
    draw(sample_scene(random.Random(7)), 320, 240).save(path)
    return path


@pytest.fixture
def converse(llava_main: Path, demo_pte: Path, tmp_path: Path) -> Callable[..., tuple[int, str, str, list[dict]]]:
    """Types lines; returns the exit code, stdout, stderr and the turns of the statistics."""

    def call(*lines: str, flags: tuple[object, ...] = ()) -> tuple[int, str, str, list[dict]]:
        stats = tmp_path / "stats.json"
        command = [llava_main, "--model_path", demo_pte, "--interactive", "--temperature", 0, "--stats_path", stats]
        result = subprocess.run(
            [str(word) for word in [*command, *flags]],
            input="".join(f"{line}\n" for line in lines),
            capture_output=True,
            text=True,
            timeout=120,
        )
        turns = json.loads(stats.read_text())["turns"] if stats.exists() else []
        return result.returncode, result.stdout, result.stderr, turns

    return call


class Oracle:
    """A conversation as SentencePiece and the model's methods have it, each time from position 0 anew."""

    def __init__(self, pte: Path, tokenizer: bytes) -> None:
        self.tokenizer = SentencePieceProcessor(model_proto=tokenizer)
        self.program = PteProgram(pte)
        self.parts: list[Tensor] = []  # embeddings [1, n, D]

    def ids(self, *ids: int) -> None:
        if ids:
            self.parts.append(self.program.token_embedding(torch.tensor([ids])))

    def text(self, text: str) -> None:
        self.ids(*self.tokenizer.encode(text))

    def picture(self, path: Path) -> None:
        pixels = preprocess(load_image(path), self.program.metadata.image)
        self.parts.append(self.program.vision_encoder(pixels).clone())

    @property
    def length(self) -> int:
        return sum(part.shape[1] for part in self.parts)

    def tokens(self, count: int) -> list[int]:
        """The likeliest tokens, so many at the most, without the end token; the conversation is left as it is."""
        parts, tokens = list(self.parts), []
        for _ in range(count):
            logits = self.program.text_decoder(torch.cat(parts, dim=1), 0)
            token = int(logits.argmax())
            if token == EOS:
                break
            tokens.append(token)
            parts.append(self.program.token_embedding(torch.tensor([[token]])))
        return tokens


@pytest.fixture
def oracle(demo_pte: Path, demo_tokenizer: bytes) -> Oracle:
    return Oracle(demo_pte, demo_tokenizer)


# Several pictures


def test_two_pictures_go_where_the_question_says(run, oracle, sample_image, other_image, tmp_path):
    stats = tmp_path / "stats.json"
    arguments = ("--image_path", str(sample_image), "--image_path", str(other_image))
    answer(run(*arguments, prompt="Is <image> like <image>?", stats_path=stats, max_new_tokens=6))
    oracle.ids(1)
    oracle.text(SYSTEM + "USER: Is ")
    oracle.picture(sample_image)
    oracle.text(" like ")
    oracle.picture(other_image)
    oracle.text("? ASSISTANT:")
    stats = json.loads(stats.read_text())
    assert stats["prompt_tokens"] == oracle.length
    assert stats["tokens"] == oracle.tokens(6)
    assert [image["path"] for image in stats["images"]] == [str(sample_image), str(other_image)]
    assert stats["image_encode_ms"] == pytest.approx(sum(image["encode_ms"] for image in stats["images"]))


def test_without_marks_pictures_go_before_the_question(run, sample_image, other_image):
    pictures = ("--image_path", str(other_image), "--image_path", str(sample_image))
    assert answer(run(*pictures)) == answer(run(*pictures, prompt=f"<image>\n<image>\n{QUESTION}"))


def test_a_second_picture_does_not_overwrite_the_first(run, sample_image, other_image, tmp_path):
    """If it did, both marks would stand for the second picture, whichever the first was."""
    stats = tmp_path / "stats.json"
    seen = set()
    for first in (sample_image, other_image):
        pictures = ("--image_path", str(first), "--image_path", str(other_image))
        answer(run("--ignore_eos", *pictures, prompt=f"{QUESTION} <image><image>", stats_path=stats, max_new_tokens=24))
        seen.add(tuple(json.loads(stats.read_text())["tokens"]))
    assert len(seen) == 2


@pytest.mark.parametrize("marks", [1, 3])
def test_as_many_marks_as_pictures(run, sample_image, marks):
    pictures = ("--image_path", str(sample_image)) * 2
    check_refused(run(*pictures, prompt="<image> " * marks + "?"), f"{marks} times, but there are 2 pictures")


def test_each_of_several_pictures_must_be_good(run, sample_image, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"\xff\xd8\xff nothing")
    check_refused(run("--image_path", str(sample_image), "--image_path", str(tmp_path / "bad.jpg")), "bad.jpg")


# Conversations


def test_a_second_turn_goes_on_from_the_first(converse, oracle, sample_image, other_image):
    """The cache is kept: prompts are only what is new. The answers are those of the whole conversation run anew."""
    code, stdout, stderr, turns = converse(
        f"/image {sample_image}",
        "What color is the circle?",
        f'/image "{other_image}"',
        "Describe the image.",
        "How many objects are there?",
        flags=("--max_new_tokens", 12),
    )
    assert code == 0, stderr
    assert len(turns) == 3

    position = 0
    for i, turn in enumerate(turns):
        if i == 0:
            oracle.ids(1)
            oracle.text(SYSTEM + "USER: ")
            oracle.picture(sample_image)
            oracle.text("\nWhat color is the circle? ASSISTANT:")
        elif i == 1:
            oracle.text("USER: ")
            oracle.picture(other_image)
            oracle.text("\nDescribe the image. ASSISTANT:")
        else:
            oracle.text("USER: How many objects are there? ASSISTANT:")
        assert turn["start_pos"] == position
        assert turn["start_pos"] + turn["prompt_tokens"] == oracle.length
        expected = oracle.tokens(12)
        assert turn["tokens"] == expected
        ended = turn["stop_reason"] == "end of text"
        position = oracle.length + len(expected) - (not ended)
        oracle.ids(*expected, EOS)
    decoded = [oracle.tokenizer.decode(turn["tokens"]) for turn in turns]
    assert stdout.splitlines() == decoded
    assert oracle.tokenizer.decode(turns[0]["tokens"]) == "red"


def test_reset_begins_anew(converse, sample_image):
    first = (f"/image {sample_image}", QUESTION)
    code, stdout, _, turns = converse(*first, "What is left?", "/reset", *first)
    assert code == 0
    lines = stdout.splitlines()
    assert lines[0] == lines[2]
    assert turns[2]["start_pos"] == 0
    assert turns[2]["tokens"] == turns[0]["tokens"]


def test_reset_forgets_pictures(converse, sample_image):
    code, _, _, turns = converse(f"/image {sample_image}", "/reset", QUESTION)
    assert code == 0
    assert turns[0]["images"] == []


def test_flags_give_the_first_question(converse, run, sample_image):
    code, stdout, _, turns = converse(
        "What is left?", flags=("--image_path", sample_image, "--prompt", QUESTION, "--low_memory")
    )
    assert code == 0
    assert stdout.splitlines()[0] + "\n" == answer(run(image_path=sample_image))
    assert [len(turn["images"]) for turn in turns] == [1, 0]


def test_stats_and_help_and_quit(converse, sample_image):
    lines = ("/help", "/stats", f"/image {sample_image}", QUESTION, "/stats", "/quit", "never")
    code, stdout, stderr, _ = converse(*lines)
    assert code == 0
    assert len(stdout.splitlines()) == 1
    for command in ("/image FILE", "/reset", "/stats", "/quit"):
        assert command in stderr
    assert "0 of 768 positions used in 0 answers" in stderr
    assert "positions used in 1 answer;" in stderr
    assert "tok/s" in stderr


def test_a_conversation_that_is_full_says_so_and_can_be_reset(converse, sample_image):
    question = "Is there a red circle in the picture, and where is it? " * 4
    code, _, stderr, turns = converse(*[question] * 12, "/reset", question, flags=("--max_new_tokens", 4))
    assert code == 2, "a script must notice"
    refusals = [line for line in stderr.splitlines() if "error: the conversation has used" in line]
    assert refusals
    assert "of 768 positions" in refusals[0]
    assert "begin a new conversation" in refusals[0]
    assert len(turns) == 13 - len(refusals)
    assert all(turn["start_pos"] + turn["prompt_tokens"] < 768 for turn in turns)
    assert turns[-1]["start_pos"] == 0
    assert turns[-1]["tokens"] == turns[0]["tokens"]


def test_an_answer_may_fill_it(converse):
    """Two ids are left that there is no position for, the last token and the end token."""
    code, _, stderr, turns = converse("Hi", "/stats", "And?", flags=("--ignore_eos", "--max_new_tokens", 767))
    assert code == 2
    assert turns[0]["prompt_tokens"] + len(turns[0]["tokens"]) == 768
    assert "768 of 768 positions used" in stderr
    assert "error: the conversation has used" in stderr


def test_what_is_refused_changes_nothing(converse, sample_image, other_image):
    asked = (f"/image {sample_image}", QUESTION)
    expected = converse(*asked, "What is left?")
    code, stdout, stderr, turns = converse(
        *asked, "/image none.png", "Is <image> red?", "word " * 2000, "/foo", "/reset now", "What is left?"
    )
    assert code == 2
    assert stdout == expected[1]
    assert [turn["tokens"] for turn in turns] == [turn["tokens"] for turn in expected[3]]
    errors = [line for line in stderr.splitlines() if "error:" in line]
    assert len(errors) == 5
    assert "none.png" in errors[0]
    assert "no picture was given" in errors[1]
    assert "the conversation has used" in errors[2]
    assert "there is no command /foo" in errors[3]
    assert "/reset stands alone" in errors[4]


def test_a_language_model_alone_converses_without_pictures(llava_main, text_pte, sample_image):
    command = [llava_main, "--model_path", text_pte.path, "--interactive", "--temperature", 0, "--max_new_tokens", 3]
    lines = f"Hi\n/image {sample_image}\nAnd?\n"
    result = subprocess.run([str(word) for word in command], input=lines, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert len(result.stdout.splitlines()) == 2
    assert "takes no picture" in result.stderr


@pytest.mark.parametrize("flag", [("--prepare",), ("--etdump", "x.etdp")])
def test_what_does_not_go_with_a_conversation(run, flag):
    check_refused(run("--interactive", *flag, prompt=None), "leave", "--interactive")


def test_stdin_that_is_no_text(converse):
    code, _, stderr, turns = converse("\x00\x01", "What is left?")
    assert len(turns) >= 1
    assert code in (0, 2), stderr


# Ctrl-C


def in_terminal(command: list[object], stdout: int = subprocess.DEVNULL) -> tuple[subprocess.Popen, int]:
    """Starts a program with a terminal as its stdin; its end for the one who types."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [str(word) for word in command], stdin=theirs, stdout=stdout, stderr=subprocess.PIPE, bufsize=0
    )
    os.close(theirs)
    return process, ours


def read_until(stream, text: bytes, seconds: float = 60) -> bytes:
    """What a pipe gives until ``text`` comes."""
    os.set_blocking(stream.fileno(), False)
    seen, end = b"", time.monotonic() + seconds
    while text not in seen:
        assert time.monotonic() < end, seen
        seen += stream.read(65536) or b""
        time.sleep(0.005)
    return seen


def test_ctrl_c_ends_an_answer_and_at_the_prompt_the_conversation(llava_main, demo_pte):
    """With stdout full the program hangs at its first word, so that the signal surely comes in the middle."""
    read_end, write_end = os.pipe()
    os.write(write_end, b"." * fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, 4096))
    process, keys = in_terminal([llava_main, "--model_path", demo_pte, "--interactive", "--seed", 1], write_end)
    os.close(write_end)
    try:
        read_until(process.stderr, b"> ")
        os.write(keys, b"Tell me everything.\n")
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
        os.read(read_end, 4096)
        assert b"interrupted" in read_until(process.stderr, b"> ")
        assert process.poll() is None
        os.write(keys, b"/stats\n")
        assert b"ended by: interrupted" in read_until(process.stderr, b"> ")
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
    finally:
        process.kill()
        os.close(keys)
        os.close(read_end)


def test_the_end_of_the_input_ends_it(llava_main, demo_pte):
    process, keys = in_terminal([llava_main, "--model_path", demo_pte, "--interactive"])
    try:
        read_until(process.stderr, b"> ")
        os.write(keys, b"\x04")  # Ctrl-D
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        os.close(keys)
