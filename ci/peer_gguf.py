#!/usr/bin/env python3
"""MobileVLM-1.7B's shapes with random weights, as llama.cpp wants them: what our speed is compared with.

    python ci/peer_gguf.py llm MODELS/llm-f16.gguf
    python ci/peer_gguf.py mmproj ldp BF16 MODELS/mmproj-ldp-bf16-fl23.gguf

Needs numpy and gguf. Names of tensors and keys are those that llama.cpp's LLaVA converter writes and its clip.cpp
reads. Speed does not depend on what weights are, only on their shapes and types; "fl23" says that all 23 blocks of the
tower run (clip.vision.feature_layer), which llama.cpp would otherwise leave one of out.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, TokenType, quants

HIDDEN, INTERMEDIATE, LAYERS, HEADS, VOCABULARY = 2048, 5632, 24, 16, 32000
TOWER, TOWER_INTERMEDIATE, BLOCKS, TOWER_HEADS = 1024, 4096, 23, 16
IMAGE, PATCH = 336, 14
SQUEEZED = HIDDEN // 4

#: What ci/bench.sh asks; the vocabulary has its words, so that it makes about as many tokens as with LLaMA's own.
PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: Who is the author of this book? Answer the question using a "
    "single word or phrase. ASSISTANT:"
)

_random = np.random.default_rng(0)


def _normal(*shape: int, scale: float = 0.02) -> np.ndarray:
    return _random.standard_normal(shape, dtype=np.float32) * np.float32(scale)


def _near_one(size: int) -> np.ndarray:
    return 1 + _normal(size)


# -- language model ---------------------------------------------------------------------------------------------------


def vocabulary() -> Iterator[tuple[str, TokenType]]:
    """Pieces for SentencePiece's way of merging, which only finds a word whose beginnings are pieces, too."""
    yield "<unk>", TokenType.UNKNOWN
    yield "<s>", TokenType.CONTROL
    yield "</s>", TokenType.CONTROL
    for byte in range(256):
        yield f"<0x{byte:02X}>", TokenType.BYTE
    pieces: dict[str, None] = {}
    for word in PROMPT.split():
        bare = "\u2581" + word.strip(".,:?")
        pieces.update(dict.fromkeys(bare[:length] for length in range(2, len(bare) + 1)))
    pieces.update(dict.fromkeys(["\u2581", *map(chr, range(0x21, 0x7F))]))
    for piece in pieces:
        yield piece, TokenType.NORMAL
    for index in range(VOCABULARY - 259 - len(pieces)):
        yield f"\u2581<{index}>", TokenType.NORMAL


def write_language_model(path: Path) -> None:
    writer = GGUFWriter(path, "llama")
    writer.add_name("MobileLLaMA-1.4B, random weights")
    writer.add_file_type(LlamaFileType.MOSTLY_F16)
    writer.add_vocab_size(VOCABULARY)
    writer.add_context_length(2048)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    pieces = list(vocabulary())
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([piece for piece, _ in pieces])
    writer.add_token_scores([-float(index) for index in range(len(pieces))])  # earlier pieces are merged first
    writer.add_token_types([kind for _, kind in pieces])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)

    def linear(name: str, out_features: int, in_features: int) -> None:
        writer.add_tensor(f"{name}.weight", _normal(out_features, in_features).astype(np.float16))

    linear("token_embd", VOCABULARY, HIDDEN)
    for layer in range(LAYERS):
        prefix = f"blk.{layer}"
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            linear(f"{prefix}.{name}", HIDDEN, HIDDEN)
        linear(f"{prefix}.ffn_gate", INTERMEDIATE, HIDDEN)
        linear(f"{prefix}.ffn_up", INTERMEDIATE, HIDDEN)
        linear(f"{prefix}.ffn_down", HIDDEN, INTERMEDIATE)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"{prefix}.{name}.weight", _near_one(HIDDEN))
    writer.add_tensor("output_norm.weight", _near_one(HIDDEN))
    linear("output", VOCABULARY, HIDDEN)
    _finish(writer)


# -- vision tower and projector ---------------------------------------------------------------------------------------


def tower() -> Iterator[tuple[str, np.ndarray]]:
    """CLIP ViT-L/14-336 without what LLaVA does not use."""
    positions = 1 + (IMAGE // PATCH) ** 2
    yield "v.class_embd", _normal(TOWER)
    yield "v.patch_embd.weight", _normal(TOWER, 3, PATCH, PATCH).astype(np.float16)
    yield "v.position_embd.weight", _normal(positions, TOWER).astype(np.float16)
    yield "v.pre_ln.weight", _near_one(TOWER)
    yield "v.pre_ln.bias", _normal(TOWER)
    for block in range(BLOCKS):
        prefix = f"v.blk.{block}"
        for name in ("attn_q", "attn_k", "attn_v", "attn_out"):
            yield from _linear(f"{prefix}.{name}", TOWER, TOWER)
        # LLaVA's converter calls fc1 "down" and fc2 "up"; clip.cpp looks at the shapes and swaps them.
        yield from _linear(f"{prefix}.ffn_down", TOWER_INTERMEDIATE, TOWER)
        yield from _linear(f"{prefix}.ffn_up", TOWER, TOWER_INTERMEDIATE)
        for name in ("ln1", "ln2"):
            yield f"{prefix}.{name}.weight", _near_one(TOWER)
            yield f"{prefix}.{name}.bias", _normal(TOWER)


def projector(kind: str) -> Iterator[tuple[str, np.ndarray]]:
    """MobileVLM's LDP or LDPv2."""
    first, second = (1, 3) if kind == "ldp" else (0, 2)
    yield from _linear(f"mm.model.mlp.{first}", HIDDEN, TOWER)
    yield from _linear(f"mm.model.mlp.{second}", HIDDEN, HIDDEN)
    if kind == "ldpv2":
        yield "mm.model.peg.0.weight", _normal(HIDDEN, 3, 3, scale=0.1).astype(np.float16)
        yield "mm.model.peg.0.bias", _normal(HIDDEN)
        return
    for block in (1, 2):
        prefix = f"mm.model.mb_block.{block}.block"
        yield f"{prefix}.0.0.weight", _normal(HIDDEN, 3, 3, scale=0.1).astype(np.float16)
        yield f"{prefix}.0.1.weight", _near_one(HIDDEN)
        yield f"{prefix}.0.1.bias", _normal(HIDDEN)
        yield from _linear(f"{prefix}.1.fc1", SQUEEZED, HIDDEN)
        yield from _linear(f"{prefix}.1.fc2", HIDDEN, SQUEEZED)
        yield f"{prefix}.2.0.weight", _normal(HIDDEN, HIDDEN)
        yield f"{prefix}.2.1.weight", _near_one(HIDDEN)
        yield f"{prefix}.2.1.bias", _normal(HIDDEN)


def _linear(name: str, out_features: int, in_features: int) -> Iterator[tuple[str, np.ndarray]]:
    yield f"{name}.weight", _normal(out_features, in_features)
    yield f"{name}.bias", _normal(out_features)


def write_mmproj(path: Path, kind: str, dtype: GGMLQuantizationType) -> None:
    """Tower and projector, with the matrices of their linears as ``dtype``."""
    writer = GGUFWriter(path, "clip")
    writer.add_name("CLIP ViT-L/14-336, random weights")
    writer.add_file_type(LlamaFileType.MOSTLY_F16)
    writer.add_bool("clip.has_text_encoder", False)
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_bool("clip.has_llava_projector", True)
    writer.add_string("clip.projector_type", kind)
    writer.add_bool("clip.use_gelu", False)  # quick GELU
    numbers = {
        "image_size": IMAGE,
        "patch_size": PATCH,
        "embedding_length": TOWER,
        "feed_forward_length": TOWER_INTERMEDIATE,
        "projection_dim": 768,
        "attention.head_count": TOWER_HEADS,
        "block_count": BLOCKS,
    }
    for name, value in numbers.items():
        writer.add_uint32(f"clip.vision.{name}", value)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-5)
    writer.add_array("clip.vision.feature_layer", [BLOCKS])
    writer.add_array("clip.vision.image_mean", [0.48145466, 0.4578275, 0.40821073])
    writer.add_array("clip.vision.image_std", [0.26862954, 0.26130258, 0.27577711])
    for tensors in (projector(kind), tower()):
        for name, values in tensors:
            # Matrices of linears are the float32 ones with two dimensions; the rest has the type it needs.
            if values.ndim == 2 and values.dtype == np.float32:
                writer.add_tensor(name, quants.quantize(values, dtype), raw_dtype=dtype)
            else:
                writer.add_tensor(name, values)
    _finish(writer)


def _finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_subparsers(dest="which", required=True)
    which.add_parser("llm", help="MobileLLaMA-1.4B, F16").add_argument("path", type=Path)
    mmproj = which.add_parser("mmproj", help="CLIP and a projector")
    mmproj.add_argument("kind", choices=("ldp", "ldpv2"))
    mmproj.add_argument("dtype", choices=("F16", "BF16", "Q8_0"))
    mmproj.add_argument("path", type=Path)
    options = parser.parse_args()
    # A file that was not finished must not look like one.
    part = options.path.with_suffix(".part")
    if options.which == "llm":
        write_language_model(part)
    else:
        write_mmproj(part, options.kind, GGMLQuantizationType[options.dtype])
    part.replace(options.path)


if __name__ == "__main__":
    main()
