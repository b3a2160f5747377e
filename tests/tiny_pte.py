"""Files of the contract with tiny random float32 models, made in seconds.

They go past the exporter on purpose: runner and runtime are tested with them against the eager model, whatever the
exporter's recipes do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import EdgeCompileConfig, to_edge, to_edge_transform_and_lower
from torch import nn
from torch.export import Dim, export

from mvlm.export.contract import (
    IMAGE_CONSTANT_METHODS,
    PROGRAM_ID,
    PROMPT_PLACEHOLDER,
    TEXT_DECODER,
    TOKEN_EMBEDDING,
    TOKENIZER,
    VISION_ENCODER,
    WEIGHTS_DIGEST,
    ImageProcessing,
    Metadata,
)
from mvlm.export.models import (
    LOGIT_POSITIONS,
    CLIPVisionConfig,
    MobileLlamaConfig,
    MobileVLM,
    MobileVLMConfig,
    TextDecoder,
)

#: Rows of the embedding table and logits; about half of them more than the demo's tokenizer has pieces.
VOCAB_SIZE = 1024

LANGUAGE_MODEL = MobileLlamaConfig(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=32,
    vocab_size=VOCAB_SIZE,
    max_position_embeddings=1024,
)

#: As many patches as LLaVA-1.5's tower has, 24 x 24, each of them an image token.
LLAVA_TOWER = CLIPVisionConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=336, patch_size=14
)


@dataclass(frozen=True)
class TinyPte:
    """A file and the eager model in it; tests must not change it."""

    path: Path
    model: MobileVLM
    metadata: Metadata
    tokenizer: bytes


def tiny_metadata(config: MobileVLMConfig, max_context_len: int) -> Metadata:
    has_vision = config.vision is not None
    return Metadata(
        model_name="tiny",
        checkpoint_id="sha256:0",
        mvlm_version="0",
        recipe="{}",
        max_seq_len=max_context_len,
        max_context_len=max_context_len,
        logit_positions=min(LOGIT_POSITIONS, max_context_len),
        vocab_size=config.text.vocab_size,
        bos_id=1,
        eos_ids=(2,),
        prompt_template=f"USER: {PROMPT_PLACEHOLDER} ASSISTANT:",
        next_turn_template=f"USER: {PROMPT_PLACEHOLDER} ASSISTANT:",
        image_marker="<image>" if has_vision else "",
        image_prefix="<image>\n" if has_vision else "",
        stop_strings=("</s>",),
        image=ImageProcessing(config.vision.image_size, (0.5,) * 3, (0.25,) * 3, (127,) * 3, config.num_image_tokens)
        if config.vision is not None
        else None,
    )


def other_constants(tokenizer: bytes) -> dict[str, Any]:
    """Those that are no metadata."""
    return {
        PROGRAM_ID: "sha256:0",
        WEIGHTS_DIGEST: "sha256:0",
        TOKENIZER: torch.from_numpy(np.frombuffer(tokenizer, dtype=np.uint8).copy()),
    }


def write_tiny_pte(path: Path, config: MobileVLMConfig, tokenizer: bytes, max_context_len: int) -> TinyPte:
    """Makes a random model and a file of it."""
    torch.manual_seed(0)
    model = MobileVLM(config).eval()
    metadata = tiny_metadata(config, max_context_len)
    decoder = TextDecoder(model.language_model, max_context_len, logit_positions=metadata.logit_positions).eval()
    tokens = Dim("tokens", min=1, max=max_context_len)
    with torch.no_grad():
        methods = {
            TOKEN_EMBEDDING: export(
                model.language_model.embed_tokens,
                (torch.zeros(1, 2, dtype=torch.int64),),
                dynamic_shapes={"input": {1: tokens}},
                strict=False,
            ),
            TEXT_DECODER: export(
                decoder,
                (torch.zeros(1, 2, config.text.hidden_size), torch.zeros(1, dtype=torch.int64)),
                dynamic_shapes={"embeddings_1LD": {1: tokens}, "start_pos": None},
                strict=False,
            ),
        }
        if config.vision is not None:
            pixels = torch.zeros(1, 3, config.vision.image_size, config.vision.image_size)
            encoder = nn.Sequential(model.vision_tower, model.mm_projector)
            methods[VISION_ENCODER] = export(encoder, (pixels,), strict=False)
    edge = to_edge_transform_and_lower(
        methods,
        partitioner={name: [] if name == TOKEN_EMBEDDING else [XnnpackPartitioner()] for name in methods},
        constant_methods=metadata.to_constant_methods() | other_constants(tokenizer),
        compile_config=EdgeCompileConfig(_check_ir_validity=False),
    )
    path.write_bytes(edge.to_executorch().buffer)
    return TinyPte(path, model, metadata, tokenizer)


def hollow_constants(tokenizer: bytes, left_out: Sequence[str] | None) -> dict[str, Any]:
    """Constant methods of a model with pictures without those ``left_out``; None leaves out all about pictures."""
    constants = tiny_metadata(MobileVLMConfig(LANGUAGE_MODEL, LLAVA_TOWER, "mlp2x_gelu"), 768).to_constant_methods()
    left_out = IMAGE_CONSTANT_METHODS if left_out is None else left_out
    return {name: value for name, value in constants.items() if name not in left_out} | other_constants(tokenizer)


def write_hollow_pte(path: Path, constants: Mapping[str, Any], with_vision: bool) -> Path:
    """Writes a file with the contract's methods, of which none does anything, and any constant methods."""
    names = [TOKEN_EMBEDDING, TEXT_DECODER] + ([VISION_ENCODER] if with_vision else [])
    program = export(nn.ReLU(), (torch.ones(2),))
    path.write_bytes(to_edge(dict.fromkeys(names, program), constant_methods=dict(constants)).to_executorch().buffer)
    return path
