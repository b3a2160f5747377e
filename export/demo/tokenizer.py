"""The demo model's SentencePiece tokenizer: LLaMA's settings, trained on the world's sentences."""

from __future__ import annotations

import io
import re

import sentencepiece

from mvlm.export.demo import world

BOS_ID = 1
EOS_ID = 2

#: The prompt around a question, MobileVLM's template "v1"; the picture's embeddings go between the two.
BEFORE_IMAGE = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: "
)


def after_image(question: str) -> str:
    return f"\n{question} ASSISTANT:"


def _train(sentences: list[str], vocab_size: int) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        character_coverage=1.0,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        add_dummy_prefix=True,
        allow_whitespace_only_pieces=True,
        unk_id=0,
        bos_id=BOS_ID,
        eos_id=EOS_ID,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def train_tokenizer() -> bytes:
    """Trains the tokenizer and returns its ``tokenizer.model``.

    Byte-pair encoding with 256 byte pieces for what the world does not know, and a vocabulary just large enough that
    every word of the world is one piece.
    """
    sentences = [BEFORE_IMAGE + "0" + sentence + " ASSISTANT:" for sentence in world.vocabulary_sentences()]
    # A question follows a line break, which SentencePiece takes as a byte, without a space between: "What" must be a
    # piece as well as "▁What". Digits are pieces of their own, so the 0 above has the same effect on training text.
    sentences += list(world.vocabulary_sentences())
    words = {
        ("▁" if before in ("", " ") else "") + word
        for sentence in sentences
        for before, word in re.findall(r"(^|[ 0])([A-Za-z]+)", sentence)
    }
    low, high = 300, 1000
    best = b""
    while low < high:
        size = (low + high) // 2
        try:
            model = _train(sentences, size)
        except RuntimeError:  # more pieces than there are pairs left to merge
            high = size
            continue
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        if all(processor.piece_to_id(word) != processor.unk_id() for word in words):
            best, high = model, size
        else:
            low = size + 1
    if not best:
        raise RuntimeError("no vocabulary of up to 1000 pieces holds every word of the world")
    return best
