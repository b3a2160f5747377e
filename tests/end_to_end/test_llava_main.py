"""``llava_main`` as a person uses it: answers, bad input, exit codes, signals, and what is left behind."""

from __future__ import annotations

import fcntl
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time

import pytest
import sentencepiece
import torch
from llava_run import QUESTION, answer, check_refused
from PIL import Image
from sentencepiece import SentencePieceProcessor
from tiny_pte import TinyPte, hollow_constants, write_hollow_pte
from torch import Tensor

from mvlm.export.preprocess import load_image, preprocess
from mvlm.runtime import MobileVLM
from mvlm.runtime.prompt import StreamingDecoder, prompt_ids

# Answers


def test_the_answer_alone_is_on_stdout(run, sample_image):
    result = run(image_path=sample_image)
    text = answer(result)
    assert text.endswith("\n")
    assert text.strip() == text[:-1] != ""
    stderr = result.stderr.decode()
    assert all(line.startswith("llava_main: ") for line in stderr.splitlines())
    assert "loaded" in stderr
    assert "encoded into" in stderr
    assert "tok/s" in stderr


def test_quiet_says_nothing(run, sample_image):
    result = run("--quiet", image_path=sample_image)
    assert answer(result) == answer(run(image_path=sample_image))
    assert result.stderr == b""


def test_without_a_picture_it_still_answers(run):
    assert answer(run()).strip()


def test_the_picture_matters(run, sample_image, tmp_path):
    other = tmp_path / "white.png"
    Image.new("RGB", (100, 100), "white").save(other)
    assert answer(run(image_path=sample_image)) != answer(run(image_path=other))


def test_the_marker_may_say_where_the_picture_goes(run, sample_image):
    """Spelled out, the default prompt gives the default answer, also through ``--raw_prompt``."""
    default = answer(run(image_path=sample_image))
    assert answer(run(image_path=sample_image, prompt=f"<image>\n{QUESTION}")) == default
    system = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        f"detailed, and polite answers to the user's questions. USER: <image>\n{QUESTION} ASSISTANT:"
    )
    assert answer(run("--raw_prompt", image_path=sample_image, prompt=system)) == default


def test_stats(run, sample_image, tmp_path, demo_pte):
    path = tmp_path / "stats.json"
    result = run(image_path=sample_image, stats_path=path, cpu_threads=1, max_new_tokens=4)
    answer(result)
    stats = json.loads(path.read_text())
    for name in ("load_ms", "image_encode_ms", "prefill_ms", "time_to_first_token_ms", "decode_ms"):
        assert stats[name] > 0, name
    assert stats["prompt_tokens"] > stats["images"][0]["tokens"] > 0
    assert len(stats["tokens"]) == 4
    assert stats["decode_tokens"] == 3
    assert stats["stop_reason"] == "max new tokens"
    assert stats["peak_rss_bytes"] > stats["peak_anonymous_bytes"] > 2**20
    assert stats["threads"] == 1
    assert stats["model"]["bytes"] == demo_pte.stat().st_size
    assert stats["model"]["checkpoint_id"].startswith("sha256:")
    assert sum(stats["load"].values()) == pytest.approx(stats["load_ms"])
    assert sum(stats["prefill_steps"]) == stats["prompt_tokens"]
    assert not stats["low_memory"]
    stages = [stage["stage"] for stage in stats["memory"]]
    assert stages == ["loaded", "encoded", "vision unloaded", "answered"]
    assert all(stage["rss_bytes"] >= stage["anonymous_bytes"] > 0 for stage in stats["memory"])
    assert set(stats["versions"]) == {"mvlm", "executorch", "contract"}
    assert list(tmp_path.glob("stats.json*")) == [path], "a temporary file was left"
    width, height = Image.open(sample_image).size
    assert (stats["images"][0]["width"], stats["images"][0]["height"]) == (width, height)


def test_the_time_to_the_first_token_holds_its_parts(run, sample_image, tmp_path):
    path = tmp_path / "stats.json"
    answer(run(image_path=sample_image, stats_path=path))
    stats = json.loads(path.read_text())
    assert stats["time_to_first_token_ms"] >= stats["image_encode_ms"] + stats["prefill_ms"]


def test_an_older_stats_file_is_replaced_only_by_a_whole_one(run, tmp_path):
    path = tmp_path / "stats.json"
    path.write_text("old")
    check_refused(run(stats_path=path, seq_len=5), "takes")
    assert path.read_text() == "old"
    answer(run(stats_path=path))
    assert json.loads(path.read_text())["tokens"]


def test_a_seed_repeats_the_answer(run, sample_image):
    options = {"image_path": sample_image, "temperature": 3.0, "max_new_tokens": 40}
    first = answer(run(seed=5, **options))
    assert answer(run(seed=5, **options)) == first
    assert len({answer(run(seed=seed, **options)) for seed in range(6, 12)}) > 1


def test_a_random_seed_is_said_and_repeats_the_answer(run):
    result = run(temperature=3.0, max_new_tokens=40)
    seed = re.search(rb"--seed (\d+)", result.stderr)
    assert seed
    assert answer(run(temperature=3.0, max_new_tokens=40, seed=seed[1].decode())) == answer(result)


def test_top_k_1_and_a_tiny_top_p_are_greedy(run, sample_image):
    greedy = answer(run(image_path=sample_image))
    assert answer(run(image_path=sample_image, temperature=5, top_k=1)) == greedy
    assert answer(run(image_path=sample_image, temperature=5, top_p=1e-6)) == greedy


def test_threads_and_workspaces_do_not_change_the_answer(run, sample_image):
    answers = {answer(run(image_path=sample_image, workspace_sharing=mode)) for mode in ("off", "model", "global")}
    answers |= {answer(run(image_path=sample_image, cpu_threads=count)) for count in (1, 2, 3)}
    assert len(answers) == 1


def test_any_number_of_threads_gives_the_same_tokens(run, sample_image, tmp_path):
    def tokens(threads: int) -> list[int]:
        path = tmp_path / "stats.json"
        flags = {"cpu_threads": threads, "max_new_tokens": 60, "stats_path": path}
        answer(run("--ignore_eos", image_path=sample_image, **flags))
        return json.loads(path.read_text())["tokens"]

    expected = tokens(1)
    assert len(expected) == 60
    assert tokens(2) == expected
    assert tokens(3) == expected


def test_ignore_eos_goes_on_to_the_last_token_asked_for(run, tmp_path, demo_pte):
    path = tmp_path / "stats.json"
    answer(run(stats_path=path))
    short = json.loads(path.read_text())
    assert short["stop_reason"] == "end of text"
    answer(run("--ignore_eos", stats_path=path, max_new_tokens=100))
    long = json.loads(path.read_text())
    assert long["stop_reason"] == "max new tokens"
    assert len(long["tokens"]) == 100
    assert long["decode_tokens"] == 99
    assert long["tokens"][: len(short["tokens"])] == short["tokens"]
    assert long["tokens"][len(short["tokens"])] in MobileVLM(demo_pte).metadata.eos_ids


def test_a_long_prompt_is_read_in_steps(run, tmp_path, demo_pte):
    """As the steps are, or a token at a time: the same answer."""
    model = MobileVLM(demo_pte)
    most = model.metadata.max_seq_len
    question = "What color is the circle?"
    prompt = question
    stats_path = tmp_path / "stats.json"
    while len(ids := prompt_ids(model.tokenizer, model.metadata, prompt)[0]) <= 2 * most:
        prompt += " " + question
        if len(ids) > model.metadata.max_context_len - 60:
            pytest.skip(f"the file takes {most} tokens in one call")
    answer(run("--raw_prompt", "--ignore_eos", prompt=prompt, max_new_tokens=12, stats_path=stats_path))
    stats = json.loads(stats_path.read_text())
    assert stats["prompt_tokens"] == len(ids)
    assert stats["prefill_steps"] == [most, most, len(ids) - 2 * most]

    tokens: list[int] = []
    for position in range(len(ids) + 12):
        token = ids[position] if position < len(ids) else tokens[-1]
        embedding = model.program.token_embedding(torch.tensor([[token]])).clone()
        logits = model.program.text_decoder(embedding, position)
        if position >= len(ids) - 1:
            tokens.append(int(logits.argmax()))
    assert stats["tokens"] == tokens[:12]


def test_low_memory_gives_the_same_answer(run, sample_image, tmp_path):
    path = tmp_path / "stats.json"
    expected = answer(run(image_path=sample_image))
    for cache in ("auto", "off"):
        assert answer(run("--low_memory", image_path=sample_image, weight_cache=cache, stats_path=path)) == expected
        stats = json.loads(path.read_text())
        assert stats["low_memory"]
        memory = {stage["stage"]: stage for stage in stats["memory"]}
        assert list(memory) == ["encoded", "vision unloaded", "loaded", "answered"]
        assert memory["vision unloaded"]["rss_bytes"] < memory["encoded"]["rss_bytes"]
    assert answer(run("--low_memory")) == answer(run())


# Profile


def test_etdump_is_what_the_inspector_reads(run, sample_image, tmp_path):
    from executorch.devtools import Inspector

    path, stats_path = tmp_path / "run.etdump", tmp_path / "stats.json"
    expected = answer(run(image_path=sample_image))
    assert answer(run(image_path=sample_image, etdump=path, stats_path=stats_path)) == expected
    assert list(tmp_path.glob("run.etdump*")) == [path], "a temporary file was left"
    stats = json.loads(stats_path.read_text())
    calls = {
        block.name: len(event.perf_data.raw)
        for block in Inspector(etdump_path=str(path)).event_blocks
        for event in block.events
        if event.name == "Method::execute"
    }
    assert calls["vision_encoder"] == 1
    assert calls["text_decoder[decode]"] == stats["decode_tokens"]
    assert calls["text_decoder[prefill]"] == len(stats["prefill_steps"])
    assert calls["token_embedding"] >= 2 + stats["decode_tokens"]


def test_an_older_etdump_is_replaced_only_by_a_whole_one(run, tmp_path):
    path = tmp_path / "run.etdump"
    path.write_text("old")
    check_refused(run(etdump=path, seq_len=5), "takes")
    assert path.read_text() == "old"


def test_seq_len_limits_prompt_and_answer_together(run, tmp_path):
    path = tmp_path / "stats.json"
    answer(run(stats_path=path))
    prompt_tokens = json.loads(path.read_text())["prompt_tokens"]
    answer(run(stats_path=path, seq_len=prompt_tokens + 2))
    stats = json.loads(path.read_text())
    assert stats["max_new_tokens"] == 2
    assert len(stats["tokens"]) <= 2
    check_refused(run(seq_len=prompt_tokens), f"takes {prompt_tokens} tokens", f"at most {prompt_tokens - 1} fit")


def test_the_whole_cache_can_be_used(run):
    """Up to the last position, with tokens at random so that it does not end before."""
    result = run(temperature=1000.0, seed=3, max_new_tokens=100_000)
    assert b"--max_new_tokens 100000 becomes" in result.stderr
    answer(result)


def test_a_tokenizer_beside_the_pte(run, demo_pte, sample_image, tmp_path):
    beside = demo_pte.with_name("tokenizer.model")
    default = answer(run(image_path=sample_image))
    assert answer(run(image_path=sample_image, tokenizer_path=beside)) == default
    check_refused(run(tokenizer_path=tmp_path / "none"), "No such file")
    check_refused(run(tokenizer_path=sample_image), "is not a SentencePiece model")


def test_a_tokenizer_of_another_model(run, tmp_path):
    prefix = tmp_path / "large"
    words = random.Random(1)
    sentences = ["".join(words.choices("abcdefghij", k=6)) for _ in range(4000)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_prefix=str(prefix), vocab_size=3000, model_type="bpe", minloglevel=2
    )
    check_refused(run(tokenizer_path=f"{prefix}.model"), "3000 pieces", "belongs to another model")


# Help


def test_help_teaches(llava_main):
    result = subprocess.run([llava_main, "--help"], capture_output=True, text=True)
    assert result.returncode == 0
    assert result.stdout.count("llava_main --model_path") == 6
    flags = "model_path tokenizer_path image_path prompt raw_prompt seq_len max_new_tokens temperature top_p top_k seed"
    flags += " cpu_threads workspace_sharing weight_cache prepare low_memory ignore_eos stats_path etdump quiet"
    flags += " interactive linear_kernels"
    for flag in [*flags.split(), "version", "help"]:
        assert f"--{flag}" in result.stdout, flag
    assert "A .pte without a vision encoder takes none" in result.stdout


def test_version(llava_main):
    result = subprocess.run([llava_main, "--version"], capture_output=True, text=True)
    assert result.returncode == 0
    assert re.fullmatch(r"llava_main \d+\.\d+\S* \(ExecuTorch \d.*, \.pte format 4\)\n", result.stdout)


# Bad usage


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"model_path": None}, ["--model_path is required"]),
        ({"prompt": None}, ["--prompt is required"]),
        ({"prompt": ""}, ["the prompt is empty"]),
        ({"prompt": " \n\t"}, ["the prompt is empty"]),
        ({"prompt": b"caf\xe9 \xff"}, ["not valid UTF-8", "byte 3"]),
        ({"prompt": "<image> what?"}, ["<image>", "no picture was given"]),
        ({"temperature": -0.1}, ["--temperature -0.1", "0 (always the likeliest token) or more"]),
        ({"temperature": "nan"}, ["--temperature nan"]),
        ({"temperature": "warm"}, ["--temperature", "warm"]),
        ({"top_p": 0}, ["--top_p 0", "above 0 and up to 1"]),
        ({"top_p": 1.01}, ["--top_p 1.01"]),
        ({"top_k": -1}, ["--top_k -1"]),
        ({"seed": -1}, ["--seed", "-1"]),
        ({"seed": 2**64}, ["--seed"]),
        ({"max_new_tokens": 0}, ["--max_new_tokens 0", "1 or more"]),
        ({"max_new_tokens": 1.5}, ["--max_new_tokens", "1.5"]),
        ({"cpu_threads": 0}, ["--cpu_threads 0", "1 to"]),
        ({"seq_len": 769}, ["--seq_len 769", "768 positions"]),
        ({"seq_len": 1}, ["--seq_len 1"]),
        ({"weight_cache": ""}, ["--weight_cache is empty", "auto, off or a folder"]),
        ({"etdump": "no/such/folder/x.etdump"}, ["no/such/folder/x.etdump", "No such file"]),
        ({"workspace_sharing": "some"}, ["--workspace_sharing", "some", "off", "model", "global"]),
        ({"stats_path": "no/such/folder/stats.json"}, ["no/such/folder/stats.json", "No such file"]),
        ({"stats_path": "."}, ["is a folder"]),
        ({"image": "a.png"}, ["--image"]),
    ],
    ids=str,
)
def test_bad_usage(run, tmp_path, flags, expected):
    check_refused(run(**flags), *expected)
    assert list((tmp_path / "run").iterdir()) == []


def test_several_markers_for_one_picture(run, sample_image):
    check_refused(run(image_path=sample_image, prompt="<image> and <image>"), "2 times, but there is 1 picture")


def test_a_raw_prompt_must_say_where_the_picture_goes(run, sample_image):
    check_refused(run("--raw_prompt", image_path=sample_image), "put <image> into it")


def test_a_prompt_longer_than_the_cap_says_how_much_fits(run, sample_image):
    result = run(image_path=sample_image, prompt="What color is the circle? " * 200)
    check_refused(result, "the prompt takes", "at most 767 fit", "768 positions")
    assert int(re.search(rb"takes (\d+) tokens", result.stderr)[1]) > 1000


# Bad .pte files


def test_no_such_pte(run):
    check_refused(run(model_path="none.pte"), "none.pte", "No such file")


def test_a_folder_is_not_a_pte(run, tmp_path):
    check_refused(run(model_path=tmp_path), "a folder")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is empty (0 bytes)"),
        (b"short", "is not an ExecuTorch program"),
        (random.Random(1).randbytes(100_000), "is not an ExecuTorch program"),
        (b"\x30\0\0\0ET12" + random.Random(2).randbytes(100_000), "is not an ExecuTorch program"),
        (b"\x30\0\0\0ET12eh00\x20\0\0\0" + random.Random(3).randbytes(100_000), "is cut off or damaged"),
    ],
    ids=["empty", "short", "random", "random after magic", "random after header magic"],
)
def test_a_file_that_is_no_program(run, tmp_path, content, expected):
    path = tmp_path / "bad.pte"
    path.write_bytes(content)
    check_refused(run(model_path=path), str(path), expected)


@pytest.mark.parametrize("fraction", [0.001, 0.01, 0.1, 0.5, 0.9, 0.999999])
def test_a_truncated_pte(run, tmp_path, demo_pte, fraction):
    whole = demo_pte.read_bytes()
    path = tmp_path / "cut.pte"
    path.write_bytes(whole[: int(len(whole) * fraction)])
    check_refused(run(model_path=path), str(path), "is cut off or damaged", f"only {path.stat().st_size} bytes")


def test_a_damaged_program_does_not_crash(run, tmp_path, demo_pte):
    """Bits flipped in the program's tables, which tell where everything else is."""
    whole = demo_pte.read_bytes()
    program_bytes = int.from_bytes(whole[16:24], "little")
    path = tmp_path / "damaged.pte"
    for seed in range(15):
        rng = random.Random(seed)
        damaged = bytearray(whole)
        for _ in range(rng.choice([1, 5, 50])):
            damaged[rng.randrange(8, program_bytes)] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        result = run(model_path=path, max_new_tokens=2)
        assert result.returncode in (0, 1, 2), f"seed {seed}: {result}"


def test_a_pte_of_another_model(run, tmp_path):
    from executorch.exir import to_edge

    program = to_edge(torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),))).to_executorch()
    path = tmp_path / "linear.pte"
    path.write_bytes(program.buffer)
    check_refused(
        run(model_path=path), "not an mvlm .pte", "mvlm_format_version", "it has methods forward", "mvlm.export"
    )


@pytest.mark.parametrize(
    ("version", "expected"),
    [(3, "made by an older mvlm: export it again"), (5, "made by a newer mvlm: install that here too")],
)
def test_a_pte_of_another_format(run_pte, tmp_path, demo_tokenizer, version, expected):
    """It is said before what such a file lacks."""
    constants = hollow_constants(demo_tokenizer, ("mvlm_logit_positions",)) | {"mvlm_format_version": version}
    path = write_hollow_pte(tmp_path / "other.pte", constants, with_vision=True)
    check_refused(run_pte(model_path=path), str(path), f"is of format {version}", "reads format 4 alone", expected)


def test_a_pte_for_other_programs(run_pte, tmp_path, demo_tokenizer):
    constants = hollow_constants(demo_tokenizer, ()) | {"mvlm_recipe": '{"attention_op": "llama"}'}
    path = write_hollow_pte(tmp_path / "stock.pte", constants, with_vision=True)
    check_refused(run_pte(model_path=path), str(path), "--attention-op llama", "export one for llava_main without")


# Pictures


def test_no_such_picture(run):
    check_refused(run(image_path="none.png"), "none.png", "No such file")


def test_a_text_file_named_jpg(run, tmp_path):
    path = tmp_path / "notes.jpg"
    path.write_text("These are notes, not a picture.\n")
    check_refused(run(image_path=path), str(path), "looks like text", "JPEG and PNG")


@pytest.mark.parametrize(("extension", "name"), [("gif", "GIF"), ("webp", "WebP"), ("bmp", "BMP"), ("tiff", "TIFF")])
def test_another_picture_format_is_named(run, tmp_path, sample_image, extension, name):
    path = tmp_path / f"a.{extension}"
    Image.open(sample_image).save(path)
    check_refused(run(image_path=path), str(path), name, "JPEG and PNG")


@pytest.mark.parametrize("extension", ["jpg", "png"])
def test_a_truncated_picture(run, tmp_path, sample_image, extension):
    path = tmp_path / f"a.{extension}"
    Image.open(sample_image).save(path)
    whole = path.read_bytes()
    for length in (0, 3, 20, len(whole) // 2, len(whole) - 3):
        path.write_bytes(whole[:length])
        check_refused(run(image_path=path), str(path))


@pytest.mark.parametrize("size", [(1, 1), (20_000, 10), (10, 20_000)])
def test_extreme_sizes(run, tmp_path, size):
    path, stats = tmp_path / "a.png", tmp_path / "stats.json"
    Image.new("RGB", size, (200, 30, 30)).save(path)
    answer(run(image_path=path, stats_path=stats))
    ordinary = tmp_path / "ordinary.png"
    Image.new("RGB", (100, 100), (200, 30, 30)).save(ordinary)
    stats_of_ordinary = tmp_path / "stats_of_ordinary.json"
    answer(run(image_path=ordinary, stats_path=stats_of_ordinary))
    peaks = [json.loads(file.read_text())["peak_rss_bytes"] for file in (stats, stats_of_ordinary)]
    assert peaks[0] - peaks[1] < 32 * 2**20, "the padded square must not exist"


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "I;16", "CMYK"])
def test_every_kind_of_picture_is_seen_as_its_rgb_version(run, tmp_path, sample_image, mode):
    source = Image.open(sample_image).convert("RGB")
    if mode == "I;16":
        source = source.convert("L").convert("I").convert("I;16")
    elif mode == "LA":
        source = source.convert("LA")
        source.putalpha(128)
    elif mode == "RGBA":
        source.putalpha(Image.linear_gradient("L").resize(source.size))
    else:
        source = source.convert(mode)
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    source.save(path)
    assert Image.open(path).mode == mode
    as_rgb = tmp_path / "rgb.png"
    Image.open(path).convert("RGB").save(as_rgb)
    assert answer(run(image_path=path)) == answer(run(image_path=as_rgb))


def test_the_content_counts_not_the_name(run, tmp_path, sample_image):
    as_png, misnamed = tmp_path / "a.png", tmp_path / "b.jpg"
    Image.open(sample_image).save(as_png)
    shutil.copy(as_png, misnamed)
    assert answer(run(image_path=misnamed)) == answer(run(image_path=as_png))


# Tiny random models: a language model alone, and one whose picture takes 576 tokens


def greedy(tiny: TinyPte, prompt: list[list[int]], count: int, pixels: Tensor | None = None) -> list[int]:
    """The eager model's likeliest tokens, each from the whole sequence anew; the picture goes between two pieces."""
    with torch.no_grad():
        parts = [tiny.model.embed_tokens(torch.tensor([piece])) for piece in prompt]
        if pixels is not None:
            parts.insert(1, tiny.model.encode_image(pixels))
        embeddings = torch.cat(parts, dim=1)
        tokens: list[int] = []
        for _ in range(count):
            tokens.append(int(tiny.model(embeddings)[0, -1].argmax()))
            embeddings = torch.cat([embeddings, tiny.model.embed_tokens(torch.tensor([tokens[-1:]]))], dim=1)
    return tokens


def test_a_language_model_alone_answers(run_pte, text_pte, tmp_path):
    """The same tokens as the eager model's and the same text as the Python runtime's.

    Most of the tokens are such that the tokenizer has no piece for them: the model is random, and its vocabulary twice
    as large as the tokenizer's. They have no text.
    """
    stats_path = tmp_path / "stats.json"
    question = "A question, é?"
    text = answer(run_pte(model_path=text_pte.path, prompt=question, max_new_tokens=24, stats_path=stats_path))
    stats = json.loads(stats_path.read_text())
    model = MobileVLM(text_pte.path)
    prompt = prompt_ids(model.tokenizer, model.metadata, f"USER: {question} ASSISTANT:")
    assert stats["images"] == []
    assert stats["image_encode_ms"] is None
    assert stats["prompt_tokens"] == len(prompt[0])
    assert stats["tokens"] == greedy(text_pte, prompt, 24)
    assert any(token >= len(model.tokenizer) for token in stats["tokens"])
    assert text == model.answer(None, question, max_new_tokens=24) + "\n"


@pytest.mark.parametrize("seed", range(5))
def test_tokens_without_a_piece_have_no_text(run_pte, text_pte, tmp_path, seed):
    stats_path = tmp_path / "stats.json"
    result = run_pte(model_path=text_pte.path, temperature=100, seed=seed, max_new_tokens=60, stats_path=stats_path)
    decoder = StreamingDecoder(SentencePieceProcessor(model_proto=text_pte.tokenizer), text_pte.metadata.stop_strings)
    tokens = json.loads(stats_path.read_text())["tokens"]
    text = "".join([*map(decoder.push, tokens), decoder.finish()])
    assert text
    assert answer(result) == text + "\n"


def test_a_language_model_alone_takes_no_picture(run_pte, text_pte, sample_image):
    result = run_pte(model_path=text_pte.path, image_path=sample_image)
    check_refused(
        result,
        f"{text_pte.path} (tiny) is a language model without a vision encoder and takes no picture",
        "leave out --image_path",
    )


def test_to_a_language_model_alone_an_image_marker_is_text(run_pte, text_pte, tmp_path):
    stats_path = tmp_path / "stats.json"
    prompt = "<image> and <image>"
    answer(run_pte("--raw_prompt", model_path=text_pte.path, prompt=prompt, stats_path=stats_path, max_new_tokens=1))
    ids = SentencePieceProcessor(model_proto=text_pte.tokenizer).encode(prompt)
    assert json.loads(stats_path.read_text())["prompt_tokens"] == len(ids) + 1


def test_a_picture_may_take_576_tokens(run_pte, llava_pte, tmp_path, sample_image):
    stats_path = tmp_path / "stats.json"
    flags = {"model_path": llava_pte.path, "stats_path": stats_path}
    text = answer(run_pte(**flags, image_path=sample_image, max_new_tokens=12))
    stats = json.loads(stats_path.read_text())
    model = MobileVLM(llava_pte.path)
    prompt = prompt_ids(model.tokenizer, model.metadata, f"USER: <image>\n{QUESTION} ASSISTANT:")
    assert stats["images"][0]["tokens"] == 576
    assert stats["prompt_tokens"] == 576 + sum(map(len, prompt))
    pixels = preprocess(load_image(sample_image), model.metadata.image)
    assert stats["tokens"] == greedy(llava_pte, prompt, 12, pixels)
    assert text == model.answer(sample_image, QUESTION, max_new_tokens=12) + "\n"

    # All that is left of the cache.
    answer(run_pte(**flags, image_path=sample_image, temperature=1000, seed=1))
    stats = json.loads(stats_path.read_text())
    assert stats["max_new_tokens"] == 768 - stats["prompt_tokens"]
    check_refused(run_pte(**flags, image_path=sample_image, prompt=QUESTION * 60), "at most 767 fit")
    assert answer(run_pte(**flags, max_new_tokens=3))


@pytest.mark.parametrize(
    ("with_vision", "left_out", "expected"),
    [
        (True, None, "constant methods mvlm_image_marker, mvlm_image_prefix, mvlm_image_size"),
        (False, (), "method vision_encoder is missing, though it has mvlm_image_marker"),
        (True, ("mvlm_image_size", "mvlm_image_tokens"), "constant methods mvlm_image_size, mvlm_image_tokens are"),
        (False, ("mvlm_image_prefix",), "constant method mvlm_image_prefix is missing"),
    ],
    ids=["encoder without constants", "constants without encoder", "some constants", "some constants, no encoder"],
)
def test_a_pte_that_contradicts_itself(run_pte, tmp_path, demo_tokenizer, with_vision, left_out, expected):
    """``left_out``: image constants that the file lacks; None for all."""
    path = write_hollow_pte(tmp_path / "hollow.pte", hollow_constants(demo_tokenizer, left_out), with_vision)
    check_refused(run_pte(model_path=path), str(path), "not a proper mvlm .pte", expected)


# Failures and signals


def test_a_full_disk_is_a_failure(llava_main, demo_pte):
    with open("/dev/full", "wb") as full:
        command = [llava_main, "--model_path", demo_pte, "--prompt", QUESTION, "--temperature", "0", "--quiet"]
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE)
    assert result.returncode == 1
    assert b"cannot write the answer: No space left on device" in result.stderr


def test_a_closed_pipe_ends_it_without_noise(llava_main, demo_pte):
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [llava_main, "--model_path", demo_pte, "--prompt", QUESTION, "--temperature", "0", "--quiet"]
    result = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE)
    os.close(write_end)
    assert result.returncode == 1
    assert result.stderr == b""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_it_cleanly(llava_main, demo_pte, sample_image, tmp_path, number):
    """With stdout full the program hangs at its first word, so that the signal surely comes in the middle."""
    stats_path = tmp_path / "stats.json"
    read_end, write_end = os.pipe()
    size = fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, 4096)
    os.write(write_end, b"." * size)
    command = [llava_main, "--model_path", demo_pte, "--image_path", sample_image, "--prompt", QUESTION]
    command += ["--temperature", "0", "--stats_path", stats_path]
    process = subprocess.Popen(command, stdout=write_end, stderr=subprocess.PIPE)
    os.close(write_end)
    for line in process.stderr:
        if b"encoded into" in line:  # the last line before the answer
            break
    time.sleep(1.0)
    process.send_signal(number)
    with os.fdopen(read_end, "rb") as pipe:
        text = pipe.read()[size:].decode()
    stderr = process.stderr.read().decode()
    assert process.wait(timeout=60) == 130, stderr
    assert text.endswith("\n")
    stats = json.loads(stats_path.read_text())
    assert stats["stop_reason"] == "interrupted"
    assert len(stats["tokens"]) >= 1
    assert list(tmp_path.glob("stats.json*")) == [stats_path]
