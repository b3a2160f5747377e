"""The .pte in ExecuTorch's own programs: one with our operators and their library, one without either."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from executorch.runtime import Runtime
from llava_run import answer, check_refused
from PIL import Image
from sentencepiece import SentencePieceProcessor

import mvlm.ops
from mvlm.export.contract import PROMPT_PLACEHOLDER, ImageProcessing, Metadata
from mvlm.export.demo.world import draw, questions, sample_scene
from mvlm.export.errors import ExportError
from mvlm.export.inspect import inspect_pte
from mvlm.export.preprocess import load_image, pad_to_square, preprocess
from mvlm.runtime import PteError, PteProgram

#: What a Python program loads for the operators of a file: the quantized embedding's; and ExecuTorch's for language
#: models, or our library.
QUANTIZED = "executorch.kernels.quantized"
LLAMA = "executorch.extension.llm.custom_ops.custom_ops"

#: Linears of the demo's language model: four in each of four layers, and lm_head.
TEXT_LINEARS = 17
#: Of its vision encoder: the patches, four in each of five layers, and eight in the projector.
VISION_LINEARS = 29


@pytest.fixture(scope="module")
def stock_pte(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo checkpoint for ExecuTorch's own programs, with its artifacts beside it."""
    from mvlm.export.__main__ import main

    path = tmp_path_factory.mktemp("stock") / "stock.pte"
    assert main(["--pte-name", str(path), "--attention-op", "llama", "--with-artifacts", "--quiet"]) == 0
    return path


@dataclass(frozen=True)
class Asked:
    """A question about a picture and the answer of ``llava_main`` with the file that has our operators."""

    picture: Path
    question: str
    tokens: list[int]
    text: str
    prompt_tokens: int


@pytest.fixture(scope="module")
def metadata(demo_pte: Path) -> Metadata:
    return PteProgram(demo_pte).metadata


@pytest.fixture(scope="module")
def asked(llava_main: Path, demo_pte: Path, sample_image: Path, tmp_path_factory: pytest.TempPathFactory):
    """Answers of ``llava_main``, each kind of question about pictures wide and high, small and large."""
    folder = tmp_path_factory.mktemp("asked")
    rng = random.Random(20261121)
    pairs = [(sample_image, "Describe the image."), (sample_image, "What color is the circle?")]
    for index, size in enumerate([(112, 112), (320, 240), (180, 320)]):
        scene = sample_scene(rng)
        picture = folder / f"{index}.png"
        draw(scene, *size).save(picture)
        kinds = {kind: text for text, _answer, kind in questions(scene)}
        assert len(kinds) > 3
        pairs += [(picture, text) for text in kinds.values()]
    result = []
    for picture, text in pairs:
        stats = folder / "stats.json"
        command = [llava_main, "--model_path", demo_pte, "--image_path", picture, "--prompt", text]
        options = ["--temperature", "0", "--quiet", "--stats_path", str(stats)]
        ran = subprocess.run([*map(str, command), *options], capture_output=True, timeout=300)
        said = json.loads(stats.read_text())
        assert said["stop_reason"] == "end of text"
        result.append(Asked(picture, text, said["tokens"], answer(ran).rstrip("\n"), said["prompt_tokens"]))
    return result


def multimodal_runner(pte: Path, asks: list[dict], modules: Sequence[str], libraries: Sequence[Path] = ()) -> dict:
    """Runs ``multimodal_runner.py``; what it printed."""
    job = {
        "pte": str(pte),
        "tokenizer": str(pte.with_name("tokenizer.model")),
        "modules": list(modules),
        "libraries": [str(library) for library in libraries],
        "questions": asks,
    }
    program = Path(__file__).with_name("multimodal_runner.py")
    ran = subprocess.run([sys.executable, program], input=json.dumps(job), capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def job_of(metadata: Metadata, question: str, picture: np.ndarray, path: Path) -> dict:
    """A question in the model's template, cut at the picture."""
    np.save(path, picture)
    text = metadata.prompt_template.replace(PROMPT_PLACEHOLDER, metadata.image_prefix + question)
    before, after = text.split(metadata.image_marker)
    return {"before": before, "picture": str(path), "after": after, "num_bos": 1}


def ids_of(tokenizer: SentencePieceProcessor, pieces: list[str]) -> list[int]:
    ids = [tokenizer.piece_to_id(piece.replace(" ", "▁")) for piece in pieces]
    assert tokenizer.unk_id() not in ids, pieces
    return ids


def check_same(answers: list[dict], asked: list[Asked], pte: Path) -> None:
    """The tokens that came are those of ``llava_main``, and so is the length of the prompts."""
    tokenizer = SentencePieceProcessor(model_file=str(pte.with_name("tokenizer.model")))
    assert len(answers) == len(asked)
    for theirs, ours in zip(answers, asked, strict=True):
        assert "error" not in theirs, theirs
        *pieces, _end = theirs["pieces"]
        assert ids_of(tokenizer, pieces) == ours.tokens, ours
        assert "".join(pieces).strip() == ours.text
        assert theirs["prompt_tokens"] == ours.prompt_tokens


def bytes_of(path: Path, processing: ImageProcessing) -> np.ndarray:
    """uint8 [3, S, S]: a picture padded and resized as our image processor does it, not normalized."""
    square = pad_to_square(load_image(path), processing.pad_color)
    resized = square.resize((processing.size, processing.size), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(resized).transpose(2, 0, 1))


# -- the file with our operators --------------------------------------------------------------------------------------


def test_file_with_our_operators_gives_the_same_tokens(demo_pte, metadata, asked, tmp_path):
    """Through ExecuTorch's runner as through ours, token by token, once our library is loaded."""
    jobs = [
        job_of(metadata, it.question, preprocess(load_image(it.picture), metadata.image)[0].numpy(), tmp_path / f"{i}")
        for i, it in enumerate(asked)
    ]
    for job in jobs:
        job["picture"] += ".npy"
    library = mvlm.ops.native_library_path()
    said = multimodal_runner(demo_pte, jobs, [QUANTIZED, "executorch.runtime"], [library])
    assert any(Path(path).name == library.name for path in said["libraries"])
    check_same(said["answers"], asked, demo_pte)


# -- the file without -------------------------------------------------------------------------------------------------


def test_stock_file_has_no_operator_of_ours(stock_pte):
    """But ExecuTorch's attention; and every linear of the model is in a delegate."""
    methods = {method.name: method for method in inspect_pte(stock_pte).methods}
    operators = {operator.name: operator for method in methods.values() for operator in method.operators}
    spaces = {name.split("::")[0] for name in operators}
    assert spaces == {"aten", "dim_order_ops", "executorch_prim", "llama", "quantized_decomposed"}
    assert "unknown" not in {operator.library for operator in operators.values()}
    text = {operator.name: operator.calls for operator in methods["text_decoder"].operators}
    assert (text["llama::update_cache.out"], text["llama::custom_sdpa.out"]) == (8, 4)
    for method, linears in (("text_decoder", TEXT_LINEARS), ("vision_encoder", VISION_LINEARS)):
        inside = [
            (delegate.count, count)
            for delegate in methods[method].delegates
            for node, count in delegate.nodes.items()
            if node.startswith("FullyConnected")
        ]
        assert sum(delegates * count for delegates, count in inside) == linears
        assert not any("linear" in name or "mm" in name or "convolution" in name for name in operators)
    taken = methods["vision_encoder"].inputs[0]
    assert (taken.dtype, tuple(taken.shape)) == ("uint8", (3, 112, 112))


def test_stock_file_gives_the_same_tokens_without_our_library(stock_pte, metadata, asked, tmp_path):
    jobs = []
    for index, it in enumerate(asked):
        path = tmp_path / f"{index}.npy"
        jobs.append(job_of(metadata, it.question, bytes_of(it.picture, metadata.image), path))
    jobs += [job | {"in_steps": True} for job in jobs[:2]]
    said = multimodal_runner(stock_pte, jobs, [QUANTIZED, LLAMA])
    assert not any("mvlm" in Path(path).name for path in said["libraries"])
    check_same(said["answers"][: len(asked)], asked, stock_pte)
    for once, in_steps in zip(said["answers"][:2], said["answers"][len(asked) :], strict=True):
        assert in_steps["pieces"] == once["pieces"]


def test_stock_file_is_faithful(stock_pte):
    """To the quantized model, stage by stage; in a process of its own, as a user would ask."""
    command = [sys.executable, "-m", "mvlm.runtime.test_pte", str(stock_pte), "--quiet"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.endswith("faithful to its checkpoint\n")


@pytest.mark.parametrize("size", [(112, 112), (112, 84), (84, 112), (111, 35), (1, 1), (112, 1)])
def test_stock_file_pads_pictures_itself(stock_pte, metadata, size):
    """To the same bytes as our image processor, whatever is odd."""
    vision = Runtime.get().load_program(stock_pte).load_method("vision_encoder")
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    square = Image.new("RGB", (112, 112), metadata.image.pad_color)
    square.paste(Image.fromarray(noise), ((112 - size[0]) // 2, (112 - size[1]) // 2))

    def embeddings(picture: np.ndarray) -> torch.Tensor:
        pixels = torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1)))
        return vision.execute([pixels])[0].clone()

    padded = embeddings(np.asarray(square))
    assert torch.equal(embeddings(noise), padded)
    assert torch.equal(PteProgram(stock_pte).vision_encoder(preprocess(square, metadata.image)), padded)


def test_what_stock_file_refuses(stock_pte, metadata, tmp_path):
    """Is an error of the runner, which then answers on."""
    right = np.zeros((3, 112, 112), np.uint8)
    pictures = {
        "right": right,
        "too wide": np.zeros((3, 84, 113), np.uint8),
        "too large": np.zeros((3, 336, 336), np.uint8),
        "normalized": right.astype(np.float32),
        "right again": right,
    }
    jobs = [
        job_of(metadata, "Describe the image.", picture, tmp_path / f"{name}.npy") for name, picture in pictures.items()
    ]
    # Text is read piece by piece, each at once.
    jobs.insert(-1, {"before": "USER: " + "one " * 300 + "ASSISTANT:", "picture": None, "num_bos": 1})
    answers = multimodal_runner(stock_pte, jobs, [QUANTIZED, LLAMA])["answers"]
    assert answers[0] == answers[-1]
    assert answers[0]["pieces"]
    assert ["error" in it for it in answers] == [False, True, True, True, True, False]


@pytest.mark.parametrize("length", [1, 2, 767, 768])
def test_stock_decoder_takes_every_length(stock_pte, length):
    program = PteProgram(stock_pte)
    embeddings = program.token_embedding(torch.full((1, length), 5))
    assert torch.isfinite(program.text_decoder(embeddings, 0)).all()
    for position in (768 - length + 1, -1, 2**40):
        with pytest.raises(PteError, match="text_decoder"):
            program.text_decoder(embeddings, position)


def test_llava_main_refuses_stock_file(run_pte, stock_pte):
    """It has no kernel of ``llama::update_cache``; ExecuTorch gives it to apps and to Python, not to C++ programs."""
    check_refused(run_pte(model_path=stock_pte), str(stock_pte))


def test_operators_that_are_not_there(stock_pte, monkeypatch):
    def refuse() -> None:
        raise ExportError("cannot be loaded: no such file")

    monkeypatch.setattr("mvlm.runtime.program.load_llama_operators", refuse)
    with pytest.raises(PteError, match=r"stock\.pte: cannot be loaded: no such file"):
        PteProgram(stock_pte)


# -- README -----------------------------------------------------------------------------------------------------------


def test_readme(stock_pte, sample_image, tmp_path):
    """The Python of "In other ExecuTorch programs" runs as it stands, in a folder with what it names."""
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    section = readme.split("## In other ExecuTorch programs")[1].split("\n## ")[0]
    [code] = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    shutil.copy(stock_pte, tmp_path / "stock.pte")
    shutil.copy(stock_pte.with_name("tokenizer.model"), tmp_path)
    shutil.copy(sample_image, tmp_path)
    environment = os.environ | {"PYTHONPATH": ""}
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1].strip() == "red"
