"""The tokenizer: one SentencePiece model with every token in it that the checkpoint's files add.

The runner knows SentencePiece and nothing else. transformers keeps added tokens beside the SentencePiece model, in up
to three files; here they become pieces of the model, so that their text is encoded as their id and no other.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from mvlm.export.checkpoint.configs import read_json
from mvlm.export.errors import ExportError

TOKENIZER_MODEL = "tokenizer.model"

#: SentencePiece's kinds of pieces, sentencepiece_model.proto: ModelProto.SentencePiece.Type.
NORMAL, USER_DEFINED, UNUSED = 1, 4, 5


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer that was read.

    Attributes:
        model: a SentencePiece model file.
        paths: of the files it was made from.
        added: id and text of the tokens that tokenizer.model lacks.
    """

    model: bytes
    paths: tuple[Path, ...]
    added: dict[int, str]


def read_tokenizer(folder: Path, vocab_size: int, base_model: str) -> Tokenizer:
    """Reads tokenizer.model and the added tokens of added_tokens.json, tokenizer_config.json and tokenizer.json.

    Args:
        folder: of the checkpoint.
        vocab_size: rows of the model's embedding.
        base_model: a hub id that has the same tokenizer.model, for the message that it is missing.

    Raises:
        ExportError: there is no SentencePiece model, it is broken or has more pieces than ``vocab_size``, an added
            token lies beyond ``vocab_size``, or two files disagree.
    """
    path = folder / TOKENIZER_MODEL
    model, processor = _read_model(path, base_model)
    pieces = processor.get_piece_size()
    if pieces > vocab_size:
        raise ExportError(
            f"{path}: has {pieces} pieces, more than the model's vocab_size {vocab_size}; it belongs to another model"
        )
    tokens: dict[int, tuple[str, Path]] = {token: (processor.id_to_piece(token), path) for token in range(pieces)}
    ids = {text: token for token, (text, _) in tokens.items()}
    paths = [path]
    for token, text, where in _added_tokens(folder):
        known_text, known_where = tokens.setdefault(token, (text, where))
        if known_text != text:
            raise ExportError(
                f"{where}: token {token} is {text!r}, but {known_text!r} in {known_where.name}; "
                "the files belong to different tokenizers"
            )
        if ids.setdefault(text, token) != token:
            raise ExportError(
                f"{where}: the token {text!r} has the id {token}, but {ids[text]} in {tokens[ids[text]][1].name}; "
                "the files belong to different tokenizers"
            )
        if token >= vocab_size:
            raise ExportError(
                f"{where}: the added token {text!r} has the id {token}, beyond the model's vocab_size {vocab_size}: "
                "the model has no embedding for it; remove it from the file, or fetch the files that belong together"
            )
        if token >= pieces and where not in paths:
            paths.append(where)
    added = {token: text for token, (text, _) in sorted(tokens.items()) if token >= pieces}
    if added:
        model += b"".join(_pieces_for(added, pieces))
        _check(model, added, path)
    return Tokenizer(model, tuple(paths), added)


def _read_model(path: Path, base_model: str) -> tuple[bytes, SentencePieceProcessor]:
    if not path.is_file():
        instead = "; tokenizer.json cannot stand in for it" if path.with_name("tokenizer.json").is_file() else ""
        raise ExportError(
            f"{path}: no such file; the SentencePiece model of the checkpoint is required{instead}. The model that it "
            f"was trained from has the same: hf download {base_model} {path.name} --local-dir {path.parent}"
        )
    data = path.read_bytes()
    if not data:
        raise ExportError(f"{path}: not a SentencePiece model (it is empty)")
    try:
        return data, SentencePieceProcessor(model_proto=data)
    except Exception as error:  # SentencePiece raises many types for what is no model
        raise ExportError(f"{path}: not a SentencePiece model ({error})") from error


def _in_added_tokens(value: dict[str, Any]) -> list[tuple[Any, Any]]:
    return [(token, text) for text, token in value.items()]


def _in_tokenizer_config(value: dict[str, Any]) -> list[tuple[Any, Any]]:
    return [(int(token), entry["content"]) for token, entry in (value.get("added_tokens_decoder") or {}).items()]


def _in_tokenizer_json(value: dict[str, Any]) -> list[tuple[Any, Any]]:
    return [(entry["id"], entry["content"]) for entry in value.get("added_tokens") or ()]


#: File that may add tokens -> id and text of those in it.
_ADDED_TOKENS = {
    "added_tokens.json": _in_added_tokens,
    "tokenizer_config.json": _in_tokenizer_config,
    "tokenizer.json": _in_tokenizer_json,
}


def _added_tokens(folder: Path) -> Iterator[tuple[int, str, Path]]:
    """Id, text and file of every added token, as often as it is stated."""
    for name, tokens_in in _ADDED_TOKENS.items():
        path = folder / name
        if not path.is_file():
            continue
        value = read_json(path)
        try:
            tokens = tokens_in(value)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ExportError(f"{path}: its added tokens are not in a form that is known ({error!r})") from error
        for token, text in tokens:
            if type(token) is not int or token < 0 or not isinstance(text, str) or not text:
                raise ExportError(f"{path}: the added token {text!r} has the id {token!r}; text and id are expected")
            yield token, text, path


def _pieces_for(added: dict[int, str], first: int) -> Iterator[bytes]:
    """Pieces from id ``first`` to the last added one, as parts of a ModelProto."""
    for token in range(first, max(added) + 1):
        if token in added:
            # SentencePiece's own text has ▁ for a space.
            yield piece(added[token].replace(" ", "\u2581"), 0.0, USER_DEFINED)
        else:
            yield piece(f"<unused {token}>", 0.0, UNUSED)


def piece(text: str, score: float, kind: int) -> bytes:
    """One piece in protobuf's wire format, to be appended to a SentencePiece model file.

    The file is a ModelProto, whose field 1 is the repeated SentencePiece { string piece = 1; float score = 2;
    Type type = 3; }; repeated fields of two messages put one after the other are joined
    (https://protobuf.dev/programming-guides/encoding/).
    """
    utf8 = text.encode()
    message = b"\x0a" + _varint(len(utf8)) + utf8 + b"\x15" + struct.pack("<f", score) + b"\x18" + _varint(kind)
    return b"\x0a" + _varint(len(message)) + message


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _check(model: bytes, added: dict[int, str], path: Path) -> None:
    """Makes sure that SentencePiece takes the model with the tokens added, and gives each its id."""
    try:
        processor = SentencePieceProcessor(model_proto=model)
    except Exception as error:
        raise ExportError(f"{path}: cannot take the checkpoint's added tokens {added} ({error})") from error
    for token, text in added.items():
        if token not in processor.encode(text):
            raise ExportError(
                f"{path}: the added token {text!r} is not encoded as its id {token} but as {processor.encode(text)}"
            )


def with_filler(model: bytes, vocab_size: int) -> bytes:
    """A tokenizer with as many pieces as ``vocab_size``, for random weights, which choose any id.

    What is added is written ⟨id⟩, and so unlikely that no text is encoded with it if it can be encoded without.

    Raises:
        ExportError: ``model`` has more pieces than that.
    """
    pieces = SentencePieceProcessor(model_proto=model).get_piece_size()
    if pieces > vocab_size:
        raise ExportError(f"vocab_size {vocab_size} is less than the {pieces} pieces of the bundled demo tokenizer")
    return model + b"".join(piece(f"⟨{token}⟩", -1e6, NORMAL) for token in range(pieces, vocab_size))
