"""Perplexity, and the divergence from float32: figures against transformers' and torch's own, and what is refused."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from executorch.exir import to_edge
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor
from tiny_pte import hollow_constants, write_hollow_pte
from torch import Tensor
from torch.export import export
from torch.nn.functional import kl_div, nll_loss
from transformers import LlamaConfig, LlamaForCausalLM

from mvlm.export.checkpoint import open_checkpoint
from mvlm.export.demo.world import draw, questions, sample_scene
from mvlm.export.preprocess import load_image, preprocess
from mvlm.runtime import PteProgram
from mvlm.runtime.perplexity import main, texts_of
from mvlm.runtime.prompt import prompt_ids, prompt_text

#: Tokens of the text: two windows of 512 and some that are left over.
TOKENS = 1100

#: What is told without a checkpoint, and what else with one.
OF_THE_FILE = ("perplexity", "perplexity_error", "tokens")
OF_BOTH = ("float_perplexity", "kl_mean", "kl_error", "kl_p99", "top1", "top1_error")

#: Sums of the same numbers in another order: float32 has 24 bits.
SAME = 1e-5

#: How much further than transformers' float32 model another one may be from float64: it adds up in another order.
FLOAT32_MARGIN = 10


@pytest.fixture(scope="module")
def tokenizer(demo_tokenizer: bytes) -> SentencePieceProcessor:
    return SentencePieceProcessor(model_proto=demo_tokenizer)


@pytest.fixture(scope="module")
def text(tokenizer: SentencePieceProcessor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations about pictures, of ``TOKENS`` tokens."""
    rng = random.Random(0)
    words: list[str] = []
    while len(tokenizer.encode(" ".join(words))) < TOKENS:
        for question, answer, *_ in questions(sample_scene(rng)):
            words += f"USER: {question} ASSISTANT: {answer}".split()
    while len(tokenizer.encode(" ".join(words))) > TOKENS:
        words.pop()
    path = tmp_path_factory.mktemp("perplexity") / "text.txt"
    path.write_text(" ".join(words), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def ids(tokenizer: SentencePieceProcessor, text: Path) -> Tensor:
    return torch.tensor(tokenizer.encode(text.read_text(encoding="utf-8")))


@dataclass(frozen=True)
class Oracle:
    """The demo checkpoint's language model in transformers, in two precisions."""

    float32: LlamaForCausalLM
    float64: LlamaForCausalLM

    def score(self, parts: Sequence[Tensor], first: int) -> tuple[Tensor, float]:
        """Log probabilities [n, V], float64, from a position on, and how far those of a float32 model may be away.

        Args:
            parts: ids [l] or embeddings [l, D], one behind another.
            first: the first position that is wanted.
        """
        both = []
        for model in (self.float64, self.float32):
            embed = model.get_input_embeddings()
            embeddings = [part.to(model.dtype) if part.is_floating_point() else embed(part) for part in parts]
            both.append(model(inputs_embeds=torch.cat(embeddings)[None]).logits[0, first:].double().log_softmax(-1))
        return both[0], FLOAT32_MARGIN * float((both[0] - both[1]).abs().max())


@pytest.fixture(scope="module")
def oracle(demo_checkpoint: Path) -> Oracle:
    config = json.loads((demo_checkpoint / "config.json").read_text())
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    kept = {name: config[name] for name in (*sizes, "vocab_size", "max_position_embeddings", "rms_norm_eps")}
    rope = {"rope_type": "default", "rope_theta": config["rope_theta"]}
    tensors = load_file(demo_checkpoint / "model.safetensors")

    def model(dtype: torch.dtype) -> LlamaForCausalLM:
        model = LlamaForCausalLM(LlamaConfig(**kept, rope_parameters=rope, attn_implementation="eager")).eval()
        model.load_state_dict({name: tensors[name].float() for name in model.state_dict()})
        return model.to(dtype)

    return Oracle(model(torch.float32), model(torch.float64))


@pytest.fixture
def perplexity(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict]:
    """What the command line writes as JSON of a file and the text."""

    def call(pte: Path, *flags: object) -> dict:
        out = tmp_path / "out.json"
        code = main([str(pte), "--text", str(text), "--json", str(out), "--quiet", *map(str, flags)])
        assert code == 0, capsys.readouterr().err
        return json.loads(out.read_text(encoding="utf-8"))

    return call


@pytest.fixture
def refused(text: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What the command line says of something that it cannot use; a --text of the flags goes before ours."""

    def call(pte: Path, *flags: object) -> str:
        code = main([str(pte), "--text", str(text), "--quiet", *map(str, flags)])
        captured = capsys.readouterr()
        assert code == 2, captured
        assert captured.out == ""
        assert captured.err.startswith("mvlm.runtime.perplexity: ")
        return captured.err.removeprefix("mvlm.runtime.perplexity: ").rstrip("\n")

    return call


def losses(logits: Sequence[Tensor], ids: Sequence[Tensor]) -> Tensor:
    """Negative log probabilities of tokens, given the logits [n, V] that are to say them."""
    parts = [nll_loss(a.log_softmax(-1), b, reduction="none") for a, b in zip(logits, ids, strict=True)]
    return torch.cat(parts).double()


def standard_error(values: Tensor) -> float:
    return float(np.std(values.double().numpy(), ddof=1)) / math.sqrt(len(values))


def assert_perplexity(found: dict, expected: Tensor, bound: float) -> None:
    """The file's figures, against the losses of all scored tokens, each of which may be off by ``bound``."""
    mean, error = float(expected.mean()), standard_error(expected)
    assert found["tokens"] == len(expected)
    assert math.log(found["perplexity"]) == pytest.approx(mean, abs=bound)
    # A standard deviation changes by no more than the values do, in root mean square.
    theirs = math.exp(mean) * error
    assert found["perplexity_error"] == pytest.approx(theirs, rel=2 * bound * (1 + 1 / float(expected.std())))


def assert_comparison(
    found: dict, logits: Sequence[Tensor], float64: Sequence[tuple[Tensor, float]], ids: Sequence[Tensor]
) -> None:
    """The figures of a comparison, against torch's of the file's logits and those of :meth:`Oracle.score`."""
    off = max(bound for _, bound in float64)
    file = torch.cat(list(logits)).double().log_softmax(-1)
    exact = torch.cat([logp for logp, _ in float64])
    assert math.log(found["float_perplexity"]) == pytest.approx(float(nll_loss(exact, torch.cat(ids))), abs=off)
    # Where log probabilities are off, probabilities are by as much of themselves: each p (log p - log q) by p and by as
    # much of itself. Means change by no more than values do, percentiles and standard deviations by no more than the
    # largest change.
    terms = kl_div(file, exact, reduction="none", log_target=True)
    values = terms.sum(-1)
    bounds = (off + SAME) * (1 + terms.abs().sum(-1))
    assert values.mean() > 10 * bounds.mean()
    assert found["kl_mean"] == pytest.approx(float(values.mean()), abs=float(bounds.mean()))
    assert found["kl_error"] == pytest.approx(standard_error(values), abs=2 * float(bounds.max()) / len(values) ** 0.5)
    assert found["kl_p99"] == pytest.approx(float(np.percentile(values.numpy(), 99)), abs=float(bounds.max()))
    same = file.argmax(-1) == exact.argmax(-1)
    first, second = exact.topk(2).values.unbind(-1)
    assert (first - second).min() > 2 * off  # else the likeliest token might be another one for a float32 model
    assert found["top1"] == pytest.approx(float(same.double().mean()))
    assert found["top1_error"] == pytest.approx(standard_error(same))
    assert 0.5 < found["top1"] < 1


# -- windows ----------------------------------------------------------------------------------------------------------


def test_windows_are_of_512_tokens_without_bos_and_their_second_half_is_scored(perplexity, demo_pte, ids):
    """Each from position 0 on; what is left of the text is not read."""
    program = PteProgram(demo_pte)
    windows = [ids[:512], ids[512:1024]]
    expected = losses(
        [program.score(program.token_embedding(window[None])[:, :511], 256) for window in windows],
        [window[257:] for window in windows],
    )
    assert len(expected) == 2 * 255
    found = perplexity(demo_pte)
    assert_perplexity(found, expected, SAME)
    # A BOS before the first window would change it by far more.
    with_bos = torch.tensor([program.metadata.bos_id, *windows[0].tolist()])
    other = losses([program.score(program.token_embedding(with_bos[None])[:, :512], 257)], [windows[0][257:]])
    assert abs(float(other.mean() - expected[:255].mean())) > 100 * SAME


@pytest.mark.parametrize(
    ("flags", "length", "first", "count"),
    [
        (("--window", 64), 64, 33, TOKENS // 64),
        (("--window", 63, "--score", "second-half"), 63, 32, TOKENS // 63),
        (("--window", 64, "--score", "all"), 64, 1, TOKENS // 64),
        (("--window", 64, "--limit", 2), 64, 33, 2),
        (("--window", 100, "--score", "all", "--limit", 1), 100, 1, 1),
        (("--window", 256, "--limit", 100), 256, 129, TOKENS // 256),
        (("--window", 5, "--limit", 1), 5, 3, 1),
    ],
)
def test_perplexity_is_that_of_the_float32_model_in_a_file(perplexity, text_pte, ids, flags, length, first, count):
    """Which is read at once here, without a KV cache. 256 tokens are as many as the file has positions."""
    windows = ids[: count * length].view(count, length)
    logits = text_pte.model(text_pte.model.embed_tokens(windows[:, :-1]))
    expected = losses(list(logits[:, first - 1 :]), list(windows[:, first:]))
    assert len(expected) == count * (length - first)
    # As far as logits of the same model may be apart in test_program.py; a loss is the difference of two of them.
    bound = 2 * 1e-4 * (1 + float(logits.abs().max()))
    assert bound < 2e-3
    assert_perplexity(perplexity(text_pte.path, *flags), expected, bound)


# -- against float32 --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "length", "first", "count"),
    [((), 512, 257, 2), (("--window", 48, "--score", "all", "--limit", 5), 48, 1, 5)],
)
def test_comparison_with_the_checkpoint(
    perplexity, demo_pte, demo_checkpoint, oracle, ids, flags, length, first, count
):
    """Against transformers' logits of whole windows and those of the file."""
    program = PteProgram(demo_pte)
    windows = ids[: count * length].view(count, length)
    logits = [program.score(program.token_embedding(window[None, :-1]), first - 1) for window in windows]
    theirs = [oracle.score([window[:-1]], first - 1) for window in windows]
    said = list(windows[:, first:])
    found = perplexity(demo_pte, "--model", demo_checkpoint, *flags)
    assert_perplexity(found, losses(logits, said), SAME)
    assert_comparison(found, logits, theirs, said)


# -- pictures ---------------------------------------------------------------------------------------------------------


def test_windows_behind_pictures_which_take_turns(
    perplexity, demo_pte, demo_checkpoint, oracle, tokenizer, sample_image, ids, tmp_path
):
    """Behind BOS, the prompt template up to the picture, and the picture; three windows and two pictures."""
    other = tmp_path / "other.png"
    draw(sample_scene(random.Random(5)), 150, 112).save(other)
    pictures = [sample_image, other, sample_image]
    program = PteProgram(demo_pte)
    float32 = open_checkpoint(str(demo_checkpoint)).load_model()
    asked = prompt_text(program.metadata, "?", images=1, raw=False)
    opening = torch.tensor(prompt_ids(tokenizer, program.metadata, asked)[0])
    assert opening[0] == program.metadata.bos_id
    length, first = 40, 21
    windows = list(ids[: 3 * length].view(3, length))
    logits, theirs = [], []
    for window, picture in zip(windows, pictures, strict=True):
        pixels = preprocess(load_image(picture), program.metadata.image)
        features = program.vision_encoder(pixels).clone()
        before, behind = (program.token_embedding(part[None]) for part in (opening, window[:-1]))
        start = len(opening) + program.metadata.image.tokens + first - 1
        logits.append(program.score(torch.cat([before, features, behind], 1), start))
        features = float32.mm_projector(float32.vision_tower(pixels))[0]
        theirs.append(oracle.score([opening, features, window[:-1]], start))
    said = [window[first:] for window in windows]
    flags = ("--window", length, "--limit", 3, "--model", demo_checkpoint)
    found = perplexity(demo_pte, *flags, "--images", sample_image, other)
    assert_perplexity(found, losses(logits, said), SAME)
    assert_comparison(found, logits, theirs, said)
    # Neither picture is without consequences.
    for images in ((), ("--images", sample_image), ("--images", other)):
        without = perplexity(demo_pte, *flags, *images)
        assert without["tokens"] == found["tokens"]
        assert abs(math.log(without["perplexity"] / found["perplexity"])) > 50 * SAME
        assert abs(math.log(without["float_perplexity"] / found["float_perplexity"])) > 2 * theirs[0][1]


# -- output -----------------------------------------------------------------------------------------------------------


def test_report_and_json(perplexity, text_pte, demo_pte, demo_checkpoint, capsys):
    found = perplexity(text_pte.path, "--window", 64, "--limit", 2)
    report = capsys.readouterr()
    assert set(found) == {*OF_THE_FILE, *OF_BOTH}
    assert [name for name in found if found[name] is None] == list(OF_BOTH)
    ours = f"{found['perplexity']:.3f} ± {found['perplexity_error']:.3f} ({found['tokens']} tokens)"
    assert " ".join(report.out.split()) == f"perplexity {ours}"
    assert report.err == ""

    found = perplexity(demo_pte, "--window", 32, "--limit", 2, "--model", demo_checkpoint)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert all(isinstance(value, float) for name, value in found.items() if name != "tokens")
    assert lines[1:] == [
        f"of float32 {found['float_perplexity']:.3f}",
        f"KL to float32 {found['kl_mean']:.4f} ± {found['kl_error']:.4f} (nats a token)",
        f"99 % below {found['kl_p99']:.3f}",
        f"same top token {found['top1']:.1%} ± {found['top1_error']:.1%}",
    ]


def test_says_how_far_it_is(text_pte, text, capsys):
    assert main([str(text_pte.path), "--text", str(text), "--window", "64", "--limit", "1"]) == 0
    assert "read through the file" in capsys.readouterr().err


def test_json_is_written_whole_or_not_at_all(refused, text_pte, text, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out.json"
    out.write_text("as it was", encoding="utf-8")
    refused(text_pte.path, "--json", out)  # a window of 512 does not fit

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)
    arguments = [str(text_pte.path), "--text", str(text), "--window", "64", "--limit", "1", "--json", str(out)]
    assert main([*arguments, "--quiet"]) == 1
    assert capsys.readouterr().err == f"mvlm.runtime.perplexity: {out}: No space left on device\n"
    assert out.read_text(encoding="utf-8") == "as it was"
    assert list(tmp_path.iterdir()) == [out]
    monkeypatch.undo()
    assert main([*arguments, "--quiet"]) == 0
    assert json.loads(out.read_text(encoding="utf-8"))["tokens"] == 31
    assert list(tmp_path.iterdir()) == [out]


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hollow_pte(demo_tokenizer: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model alone with 768 positions, whose methods do nothing: what is refused is so before they run."""
    path = tmp_path_factory.mktemp("hollow") / "hollow.pte"
    return write_hollow_pte(path, hollow_constants(demo_tokenizer, None), with_vision=False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "--text {path}: no such file; give the name of a file of UTF-8 text"),
        (b"", "the text has 0 tokens, less than a window of 512; give more text"),
        (b"a", "the text has {tokens} tokens, less than a window of 512; give more text"),
        (
            b"What color is the star?",
            "the text has {tokens} tokens, less than a window of 512; give more text, or --window {tokens} or less",
        ),
        (
            b"caf\xe9",
            "--text {path}: is no UTF-8 text ('utf-8' codec can't decode byte 0xe9 in position 3: unexpected end of "
            "data); convert it",
        ),
    ],
)
def test_text_that_cannot_be_scored(refused, hollow_pte, tokenizer, tmp_path, content, message):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    tokens = len(tokenizer.encode((content or b"").decode(errors="replace")))
    assert refused(hollow_pte, "--text", path) == message.format(path=path, tokens=tokens)


def test_a_folder_is_no_text_and_no_json(refused, hollow_pte, tmp_path):
    said = refused(hollow_pte, "--text", tmp_path)
    assert said == f"--text {tmp_path}: is a folder; give the name of a file of UTF-8 text"
    assert refused(hollow_pte, "--json", tmp_path) == f"{tmp_path}: is a folder; give the name of a file in it"
    path = tmp_path / "nowhere" / "out.json"
    assert refused(hollow_pte, "--json", path) == f"{path}: there is no folder {path.parent}; make it first"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--window", 769),
            "a window of 769 tokens takes 769 positions, and {pte} has 768; choose --window 768 or less",
        ),
        (("--window", 1), "--window 1 is not possible: choose 5 or more"),
        (("--window", 4), "--window 4 is not possible: choose 5 or more"),
        (("--window", -512), "--window -512 is not possible: choose 5 or more"),
        (("--limit", 0), "--limit 0 is not possible: choose 1 or more"),
        (("--seed", 3), "--seed 3 goes with --random-weights; a checkpoint's weights are not random"),
        (("--revision", "main"), "--revision main goes with --model and the id of a model on the hub"),
        (("--vision-tower", "clip"), "--vision-tower goes with --model; the bundled demo checkpoint has its own"),
    ],
)
def test_flags_that_are_not_possible(refused, hollow_pte, flags, message):
    assert refused(hollow_pte, *flags) == message.format(pte=hollow_pte)


def test_pictures_that_leave_no_room(refused, demo_pte, sample_image):
    """33 tokens before them and 16 of their own."""
    said = refused(demo_pte, "--window", 768, "--images", sample_image)
    assert said == (
        f"a window of 768 tokens behind a picture takes 817 positions, and {demo_pte} has 768; choose --window 719 or "
        "less"
    )
    program = PteProgram(demo_pte)
    program.metadata = replace(program.metadata, max_context_len=53)
    with pytest.raises(ValueError, match=r"; leave out the pictures, or export with more .* \(--max-context-len\)$"):
        texts_of(program, range(100), 5, score_all=False, pictures=1)
    program.metadata = replace(program.metadata, max_context_len=54)
    with pytest.raises(ValueError, match=r"; choose --window 5 or less$"):
        texts_of(program, range(100), 6, score_all=False, pictures=1)
    assert len(texts_of(program, range(100), 5, score_all=False, pictures=1)) == 20


def test_pictures_that_cannot_be_read(refused, demo_pte, hollow_pte, sample_image, tmp_path):
    path = tmp_path / "picture.jpg"
    assert refused(demo_pte, "--images", sample_image, path) == f"{path}: no such file"
    path.write_text("no picture")
    assert refused(demo_pte, "--images", sample_image, path) == f"{path}: is no picture that Pillow knows"
    path.write_bytes(sample_image.read_bytes()[:2000])
    said = refused(demo_pte, "--images", path)
    assert said.startswith(f"{path}: cannot be decoded: image file is truncated")
    assert refused(hollow_pte, "--images", sample_image) == (
        f"{hollow_pte} (tiny) is a language model without a vision encoder and takes no picture; leave out the "
        "picture or use a .pte with a vision encoder"
    )


def test_files_that_are_no_pte_of_ours(refused, demo_pte, tmp_path):
    path = tmp_path / "file.pte"
    assert refused(path) == f"{path}: no such file"
    path.write_bytes(b"no program" * 100)
    expected = f"{path}: is no ExecuTorch program; make one with: python -m mvlm.export --pte-name file.pte"
    assert refused(path) == expected
    path.write_bytes(demo_pte.read_bytes()[:-1000])
    assert refused(path).startswith(f"{path}: is truncated: ")
    path.write_bytes(to_edge({"forward": export(torch.nn.ReLU(), (torch.ones(2),))}).to_executorch().buffer)
    said = refused(path)
    assert said.startswith(f"{path}: is an ExecuTorch program, but not one of mvlm's: it lacks ")
    assert said.endswith(" and has forward; make one with: python -m mvlm.export")


def test_a_checkpoint_that_the_file_was_not_made_of(refused, demo_pte, demo_checkpoint, tmp_path):
    """Another vocabulary, two tokens larger; and none at all."""
    other = tmp_path / "other"
    shutil.copytree(demo_checkpoint, other)
    config = json.loads((other / "config.json").read_text())
    config["vocab_size"] += 2
    (other / "config.json").write_text(json.dumps(config))
    tensors = load_file(other / "model.safetensors")
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        tensors[name] = torch.cat([tensors[name], tensors[name][:2]])
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    checkpoint_id = open_checkpoint(str(other)).checkpoint_id
    metadata = PteProgram(demo_pte).metadata
    assert checkpoint_id != metadata.checkpoint_id
    assert refused(demo_pte, "--model", other) == (
        f"{demo_pte} was not made of other as it is now (it says mobilevlm-demo, {metadata.checkpoint_id[:19]}…; the "
        f"checkpoint is {checkpoint_id[:19]}…); give the checkpoint that it was made of, or export it again"
    )
    nowhere = tmp_path / "nowhere"
    assert refused(demo_pte, "--model", nowhere).startswith(f"model {nowhere}: no such folder, and no hub id either")


def test_the_module_is_a_program(text_pte, text):
    command = [sys.executable, "-m", "mvlm.runtime.perplexity", str(text_pte.path), "--text", str(text), "--quiet"]
    ran = subprocess.run([*command, "--window", "1"], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == "mvlm.runtime.perplexity: --window 1 is not possible: choose 5 or more\n"
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True)
    assert shown.returncode == 0
    assert "(default: none, and no comparison with float32)" in " ".join(shown.stdout.split())
