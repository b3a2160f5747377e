"""Tokenizer files: added tokens become pieces of the SentencePiece model, and files that disagree are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import transformers
from random_checkpoint import tokenizer_model
from sentencepiece import SentencePieceProcessor

from mvlm.export import demo
from mvlm.export.checkpoint.tokenizer import Tokenizer, read_tokenizer, with_filler
from mvlm.export.errors import ExportError

DEMO = demo.CHECKPOINT / "tokenizer.model"
PIECES = 518
TEXT = "What is in the picture? Répondez: 3 × 4 \t\n ⟨12⟩ ▁"


@pytest.fixture
def folder(tmp_path) -> Path:
    """The demo tokenizer, for tests to add to."""
    shutil.copy(DEMO, tmp_path)
    return tmp_path


def add(folder: Path, file: str, tokens: dict[int, str]) -> None:
    """States added tokens in the way of one of the three files."""
    content = {
        "added_tokens.json": {text: token for token, text in tokens.items()},
        "tokenizer_config.json": {
            "added_tokens_decoder": {str(token): {"content": text, "special": True} for token, text in tokens.items()}
        },
        "tokenizer.json": {"added_tokens": [{"id": token, "content": text} for token, text in tokens.items()]},
    }
    (folder / file).write_text(json.dumps(content[file]))


def read(folder: Path, vocab_size: int = 600) -> Tokenizer:
    return read_tokenizer(folder, vocab_size, "someone/base")


def error_of(folder: Path, vocab_size: int = 600) -> str:
    with pytest.raises(ExportError) as caught:
        read(folder, vocab_size)
    return str(caught.value)


FILES = ("added_tokens.json", "tokenizer_config.json", "tokenizer.json")


@pytest.mark.parametrize("file", FILES)
def test_added_tokens_are_encoded_as_their_ids(file, folder):
    add(folder, file, {0: "<unk>", 1: "<s>", 2: "</s>", PIECES: "<pad>", PIECES + 3: "[INST]", PIECES + 4: "blue ball"})
    tokenizer = read(folder)
    assert tokenizer.added == {PIECES: "<pad>", PIECES + 3: "[INST]", PIECES + 4: "blue ball"}
    assert tokenizer.paths == (folder / "tokenizer.model", folder / file)
    assert tokenizer.model.startswith(DEMO.read_bytes())
    processor, plain = (SentencePieceProcessor(model_proto=model) for model in (tokenizer.model, DEMO.read_bytes()))
    assert processor.get_piece_size() == PIECES + 5
    for token, text in tokenizer.added.items():
        assert processor.encode(f"is {text} it").count(token) == 1
        assert processor.decode([token]) == text
        assert token in processor.encode(text)
        assert token not in plain.encode(text)
    assert all(processor.is_unused(token) for token in (PIECES + 1, PIECES + 2))
    assert [processor.piece_to_id(processor.id_to_piece(token)) for token in range(PIECES, PIECES + 5)] == list(
        range(PIECES, PIECES + 5)
    )
    assert processor.encode(TEXT) == plain.encode(TEXT)


def test_files_that_add_nothing_leave_the_model_as_it_is(folder):
    for file in FILES:
        add(folder, file, {0: "<unk>", 1: "<s>", 2: "</s>"})
    assert read(folder) == Tokenizer(DEMO.read_bytes(), (folder / "tokenizer.model",), {})
    (folder / "tokenizer_config.json").write_text('{"added_tokens_decoder": null}')
    (folder / "tokenizer.json").write_text('{"added_tokens": null}')
    (folder / "added_tokens.json").write_text("{}")
    assert read(folder).added == {}


def test_files_that_agree(folder):
    for file in FILES:
        add(folder, file, {PIECES: "<pad>"})
    tokenizer = read(folder)
    assert tokenizer.added == {PIECES: "<pad>"}
    assert set(tokenizer.paths) == {folder / name for name in ("tokenizer.model", *FILES)}


@pytest.mark.parametrize(
    ("tokens", "others", "message"),
    [
        ({PIECES: "<a>"}, {PIECES: "<b>"}, "token 518 is '<b>', but '<a>' in added_tokens.json"),
        ({PIECES: "<a>"}, {PIECES + 1: "<a>"}, "the token '<a>' has the id 519, but 518 in added_tokens.json"),
        ({}, {2: "<end>"}, "token 2 is '<end>', but '</s>' in tokenizer.model"),
        ({}, {PIECES: "</s>"}, "the token '</s>' has the id 518, but 2 in tokenizer.model"),
    ],
)
def test_files_that_disagree(tokens, others, message, folder):
    add(folder, "added_tokens.json", tokens)
    add(folder, "tokenizer.json", others)
    assert error_of(folder) == f"{folder}/tokenizer.json: {message}; the files belong to different tokenizers"


def test_token_without_an_embedding(folder):
    add(folder, "added_tokens.json", {PIECES: "<pad>"})
    message = error_of(folder, vocab_size=PIECES)
    assert f"{folder}/added_tokens.json: the added token '<pad>' has the id 518, beyond the model's vocab" in message
    assert "remove it from the file" in message
    assert read(folder, vocab_size=PIECES + 1).added == {PIECES: "<pad>"}


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("added_tokens.json", '{"<pad>": "518"}'),
        ("added_tokens.json", '{"": 518}'),
        ("added_tokens.json", '{"<pad>": -1}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"518": "<pad>"}}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "<pad>"}}}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}'),
        ("tokenizer.json", '{"added_tokens": [{"content": "<pad>"}]}'),
        ("tokenizer.json", '{"added_tokens": 3}'),
        ("tokenizer.json", "["),
    ],
)
def test_broken_files(file, content, folder):
    (folder / file).write_text(content)
    assert error_of(folder).startswith(f"{folder}/{file}: ")


def test_missing_model(folder):
    (folder / "tokenizer.model").unlink()
    message = error_of(folder)
    assert "tokenizer.json" not in message
    (folder / "tokenizer.json").write_text("{}")
    message = error_of(folder)
    assert f"{folder}/tokenizer.model: no such file" in message
    assert "tokenizer.json cannot stand in for it" in message
    assert f"hf download someone/base tokenizer.model --local-dir {folder}" in message


def test_same_ids_as_transformers(folder):
    """What transformers writes when tokens are added to it, and what it then makes of texts.

    It cuts the text at added tokens and encodes the pieces apart; SentencePiece keeps one text. They differ in the
    ▁ at cuts, so the texts have an added token where that does not show.
    """
    shutil.copy(demo.CHECKPOINT / "tokenizer_config.json", folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    theirs.add_tokens([transformers.AddedToken(text, normalized=False) for text in ("<pad>", "[INST]", "blue ball")])
    theirs.save_pretrained(folder)
    assert (folder / "tokenizer.json").is_file()
    tokenizer = read(folder)
    assert tokenizer.added == {PIECES: "<pad>", PIECES + 1: "[INST]", PIECES + 2: "blue ball"}
    ours = SentencePieceProcessor(model_proto=tokenizer.model)
    for text in ("What is in the picture?", "a blue ball", "What is this [INST]", "is it <pad><pad>", "3 × 4\n\n"):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), text
        assert ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize("vocab_size", [PIECES, PIECES + 1, 32000])
def test_filler(vocab_size):
    filled = with_filler(DEMO.read_bytes(), vocab_size)
    ours, plain = (SentencePieceProcessor(model_proto=model) for model in (filled, DEMO.read_bytes()))
    assert ours.get_piece_size() == vocab_size
    for text in (TEXT, "a <s> </s>", "⟨518⟩ is ⟨1234⟩", " ".join(map(str, range(99))), Path(demo.__file__).read_text()):
        assert ours.encode(text) == plain.encode(text)
    assert all(ours.decode([token]) for token in (300, vocab_size - 1))
    assert ours.decode(list(range(vocab_size)))
    if vocab_size > 1234:
        assert ours.decode([1234, 31999]) == "⟨1234⟩⟨31999⟩"


def test_filler_for_too_small_a_vocabulary():
    with pytest.raises(ExportError, match="vocab_size 517 is less than the 518 pieces"):
        with_filler(DEMO.read_bytes(), 517)


def test_filler_of_another_tokenizer():
    assert SentencePieceProcessor(model_proto=with_filler(tokenizer_model(), 70)).get_piece_size() == 70
