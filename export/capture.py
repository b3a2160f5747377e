"""Capture: the methods of the .pte as ``torch.export`` programs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from mvlm.export.contract import TEXT_DECODER, TOKEN_EMBEDDING, VISION_ENCODER
from mvlm.export.models import MobileVLM, TextDecoder


class VisionEncoder(nn.Module):
    """pixel_values [1, 3, S, S] to image embeddings [1, T, D]."""

    def __init__(self, model: MobileVLM) -> None:
        super().__init__()
        self.vision_tower = model.vision_tower
        self.mm_projector = model.mm_projector

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.mm_projector(self.vision_tower(pixel_values))


class TokenEmbedding(nn.Module):
    """ids [1, L] to embeddings [1, L, D]."""

    def __init__(self, model: MobileVLM) -> None:
        super().__init__()
        self.embed_tokens = model.language_model.embed_tokens

    def forward(self, ids: Tensor) -> Tensor:
        return self.embed_tokens(ids)


def capture_vision_encoder(model: MobileVLM) -> ExportedProgram:
    size = model.config.vision.image_size
    return torch.export.export(VisionEncoder(model).eval(), (torch.zeros(1, 3, size, size),), strict=False)


def capture_token_embedding(model: MobileVLM, max_context_len: int) -> ExportedProgram:
    ids = torch.zeros(1, 2, dtype=torch.int64)
    return torch.export.export(
        TokenEmbedding(model).eval(),
        (ids,),
        dynamic_shapes={"ids": {1: Dim("num_tokens", min=1, max=max_context_len)}},
        strict=False,
    )


def capture_text_decoder(model: MobileVLM, max_context_len: int) -> ExportedProgram:
    embeddings = torch.zeros(1, 2, model.config.text.hidden_size)
    start_pos = torch.zeros(1, dtype=torch.int64)
    return torch.export.export(
        TextDecoder(model.language_model, max_context_len).eval(),
        (embeddings, start_pos),
        dynamic_shapes={
            "embeddings_1LD": {1: Dim("num_tokens", min=1, max=max_context_len)},
            "start_pos": None,
        },
        strict=False,
    )


def capture(model: MobileVLM, max_context_len: int) -> dict[str, ExportedProgram]:
    """The three methods by name; the number of tokens is dynamic, 1 .. ``max_context_len``."""
    with torch.no_grad():
        return {
            VISION_ENCODER: capture_vision_encoder(model),
            TOKEN_EMBEDDING: capture_token_embedding(model, max_context_len),
            TEXT_DECODER: capture_text_decoder(model, max_context_len),
        }
