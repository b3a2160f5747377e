"""The runner's SentencePiece against the Python package's, through ``mvlm_stage_dump``.

They are different versions (Debian's library is 0.1.97), so that this also shows that they agree.
"""

from __future__ import annotations

import io
import json
import random
import subprocess
from pathlib import Path

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

CORPUS = [
    "A chat between a curious user and an artificial intelligence assistant.",
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    "What color is the circle? Where is the star? How many shapes are there?",
    "A red circle is at the top left. A yellow star is at the bottom right.",
    "Le café est fermé; die Straße ist naß; ελληνικά; русский; 日本語の文章です。",
] * 20

TEXTS = [
    "",
    " ",
    "a",
    "What color is the circle?",
    "  two  spaces   and three ",
    "\nWhat color is the star? ASSISTANT:",
    "USER: ",
    "tabs\tand\nlines\r\n",
    "</s> <s> <unk> <0x41> {prompt} <image>",
    "ﬁ ligature, ① circled, ½, Å ngström",
    "unseen: 你好, 😀👩‍👩‍👧, \u200b, \ufffd, \x01",
    "日本語",
    "naïve café",
    "▁ the symbol itself ▁▁",
    "x" * 3000,
]

MODELS = {
    # LLaMA's tokenizer is like the first.
    "bpe with bytes": dict(
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False
    ),
    "unigram": dict(model_type="unigram"),
    "unigram with bytes": dict(model_type="unigram", byte_fallback=True, vocab_size=420),
    "bpe without a space in front": dict(model_type="bpe", add_dummy_prefix=False, byte_fallback=True),
    "user symbols": dict(model_type="bpe", byte_fallback=True, user_defined_symbols=["<image>", "  "]),
}


@pytest.fixture(scope="module", params=MODELS)
def tokenizer(request, tmp_path_factory) -> tuple[Path, sentencepiece.SentencePieceProcessor]:
    """A small model as a file and in the oracle."""
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=buffer,
        **{"vocab_size": 500, "hard_vocab_limit": False, "character_coverage": 0.98, "minloglevel": 2}
        | MODELS[request.param],
    )
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(buffer.getvalue())
    return path, sentencepiece.SentencePieceProcessor(model_proto=buffer.getvalue())


def ask(stage_dump: Path, command: str, model: Path, question: list) -> list:
    run = subprocess.run([stage_dump, command, model], input=json.dumps(question).encode(), capture_output=True)
    assert run.returncode == 0, run.stderr.decode()
    return json.loads(run.stdout)


def test_encode_equals_sentencepiece(stage_dump, tokenizer):
    path, oracle = tokenizer
    rng = random.Random(1)
    alphabet = sorted(set("".join(CORPUS))) + list("😀你\u0301\t\n  ")
    texts = TEXTS + ["".join(rng.choices(alphabet, k=rng.randrange(60))) for _ in range(200)]
    for text, ids in zip(texts, ask(stage_dump, "encode", path, texts), strict=True):
        assert ids == oracle.encode(text), repr(text)


def test_streamed_text_equals_sentencepiece(stage_dump, tokenizer):
    """Whatever a model may say: whole texts, random ids, runs of bytes that are characters or are not."""
    path, oracle = tokenizer
    rng = random.Random(2)
    sequences = [oracle.encode(text) for text in TEXTS]
    sequences += [[rng.randrange(len(oracle)) for _ in range(rng.randrange(40))] for _ in range(300)]
    byte_ids = {
        int(oracle.id_to_piece(i)[3:5], 16): i for i in range(len(oracle)) if oracle.is_byte(i)
    }  # "<0xE2>" -> 0xE2
    if byte_ids:
        for _ in range(300):
            mixed: list[int] = []
            for _ in range(rng.randrange(12)):
                if rng.random() < 0.3:
                    mixed.append(rng.randrange(len(oracle)))
                character = rng.choice("aé€😀你").encode()
                mixed += [byte_ids[byte] for byte in character[: rng.choice([1, 2, 3, 4, 4, 4])]]
            sequences.append(mixed)
    streamed = ask(stage_dump, "decode", path, sequences)
    for ids, parts in zip(sequences, streamed, strict=True):
        assert "".join(parts) == oracle.decode(ids), ids


@pytest.mark.parametrize(
    "tokenizer", [name for name, options in MODELS.items() if options.get("byte_fallback")], indirect=True
)
def test_a_character_comes_whole_and_at_once(stage_dump, tokenizer):
    path, oracle = tokenizer
    ids = [oracle.piece_to_id(piece) for piece in ("<0x61>", "<0xE2>", "<0x82>", "<0xAC>", "<0xC3>")]
    assert ask(stage_dump, "decode", path, [ids]) == [["a", "", "", "€", "", "\ufffd"]]


@pytest.mark.parametrize("tokenizer", ["bpe with bytes"], indirect=True)
def test_added_tokens_are_one_id_each(stage_dump, tokenizer, tmp_path):
    """The exporter appends a checkpoint's added tokens to its SentencePiece model, as user-defined pieces."""
    added = ["<image>", "<pad>", "<a>", "<a>b", "<|im_end|>", "</tool>", "<two▁words>", "日本語の", "ASSISTANT"]
    model = sentencepiece_model_pb2.ModelProto.FromString(tokenizer[0].read_bytes())
    first = len(model.pieces)
    for piece in added:
        model.pieces.add(piece=piece, score=0.0, type=model.SentencePiece.USER_DEFINED)
    path = tmp_path / "added.model"
    path.write_bytes(model.SerializeToString())
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(path))

    texts = [f"{before}{piece.replace('▁', ' ')}{after}" for piece in added for before in ("", "é") for after in " y"]
    texts += ["<a><a>b<a> b", "<image><image>\n<pad>", " <pad> ", "<imag", "<two  words>", *TEXTS]
    ids = ask(stage_dump, "encode", path, texts)
    for text, actual in zip(texts, ids, strict=True):
        assert actual == oracle.encode(text), repr(text)
    for index, piece in enumerate(added):
        assert ask(stage_dump, "encode", path, [f"x{piece.replace('▁', ' ')}y"])[0].count(first + index) == 1

    rng = random.Random(4)
    sequences = ids + [[rng.randrange(first - 40, len(oracle)) for _ in range(20)] for _ in range(100)]
    for sequence, parts in zip(sequences, ask(stage_dump, "decode", path, sequences), strict=True):
        assert "".join(parts) == oracle.decode(sequence), sequence


@pytest.mark.parametrize(
    "tokenizer", [name for name, options in MODELS.items() if options.get("byte_fallback")], indirect=True
)
def test_ids_without_a_piece_do_not_part_a_character(stage_dump, tokenizer):
    path, oracle = tokenizer
    euro = [oracle.piece_to_id(f"<0x{byte:02X}>") for byte in "€".encode()]
    padded = [id_ for byte in euro for id_ in (byte, len(oracle), 2**40)]
    assert ask(stage_dump, "decode", path, [padded])[0] == ["", "", "", "", "", "", "€", "", "", ""]


def test_ids_without_text_are_skipped(stage_dump, tokenizer):
    """A padded vocabulary has ids that no piece belongs to."""
    path, oracle = tokenizer
    ids = oracle.encode("red circle")
    padded = [len(oracle), *ids, len(oracle) + 5, oracle.eos_id(), -1]
    assert "".join(ask(stage_dump, "decode", path, [padded])[0]) == oracle.decode(ids)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\0" * 100, bytes(range(256))], ids=range(4))
def test_something_else_is_not_a_tokenizer(stage_dump, tmp_path, content):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    run = subprocess.run([stage_dump, "encode", path], input="[]", capture_output=True, text=True)
    assert run.returncode == 2
    assert f"{path} is not a SentencePiece model" in run.stderr
    assert len(run.stderr.splitlines()) == 1, "SentencePiece or protobuf said something too"
