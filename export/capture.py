"""Capture: the methods of the .pte as chains of ``torch.export`` programs.

A method is cut where its stack of identical layers begins and ends. What comes before and after is captured with its
real weights; of the layers one is captured, with a template's weights, and :mod:`mvlm.export.assemble` puts as many of
it into the chain as there are. So capturing and lowering take as long for 32 layers as for one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from mvlm.export.contract import TEXT_DECODER, TOKEN_EMBEDDING, VISION_ENCODER
from mvlm.export.models import CLIPVisionTower, KVCache, MobileLlama, MobileVLM, TextDecoder, rope_tables
from mvlm.export.quantize import QuantizedCheckpoint, StackedLayer, template_layer


@dataclass(frozen=True)
class Piece:
    """A part of a method.

    Attributes:
        name: of the part.
        program: captured, later lowered.
        inputs: names of the values that it takes from the method's.
        outputs: names of the values that it gives.
        layers: the layers in whose place it stands, one after another; empty for a part that stands for itself.
        parameter_prefix: before a layer's names in ``program``.
        parameter_bytes: of the template's parameters by their names in a layer, as XNNPACK stores them.
    """

    name: str
    program: ExportedProgram
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    layers: tuple[StackedLayer, ...] = ()
    parameter_prefix: str = ""
    parameter_bytes: dict[str, list[bytes]] = field(default_factory=dict)


@dataclass(frozen=True)
class CapturedMethod:
    """A method of the .pte.

    Attributes:
        name: of the method.
        pieces: in order; each takes what the method is given or what those before it made.
        inputs: names of the method's arguments.
        output: name of its result.
    """

    name: str
    pieces: tuple[Piece, ...]
    inputs: tuple[str, ...]
    output: str


class _VisionHead(nn.Module):
    def __init__(self, tower: CLIPVisionTower) -> None:
        super().__init__()
        self.embeddings = tower.embeddings
        self.pre_layrnorm = tower.pre_layrnorm

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.pre_layrnorm(self.embeddings(pixel_values))


class _VisionTail(nn.Module):
    def __init__(self, model: MobileVLM) -> None:
        super().__init__()
        self.mm_projector = model.mm_projector

    def forward(self, hidden_1LV: Tensor) -> Tensor:
        return self.mm_projector(hidden_1LV[:, 1:])


class VisionEncoder(nn.Module):
    """pixel_values [1, 3, S, S] to image embeddings [1, T, D]: the method ``vision_encoder`` as a whole."""

    def __init__(self, model: MobileVLM) -> None:
        super().__init__()
        self.vision_tower = model.vision_tower
        self.mm_projector = model.mm_projector

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.mm_projector(self.vision_tower(pixel_values))


class TokenEmbedding(nn.Module):
    """ids [1, L] to embeddings [1, L, D]: the method ``token_embedding``."""

    def __init__(self, model: MobileVLM) -> None:
        super().__init__()
        self.embed_tokens = model.language_model.embed_tokens

    def forward(self, ids: Tensor) -> Tensor:
        return self.embed_tokens(ids)


class _TextHead(nn.Module):
    def __init__(self, head_dim: int, rope_theta: float, max_context_len: int) -> None:
        super().__init__()
        cos_CR, sin_CR = rope_tables(head_dim, max_context_len, rope_theta)
        self.register_buffer("cos", cos_CR, persistent=False)
        self.register_buffer("sin", sin_CR, persistent=False)

    def forward(self, embeddings_1LD: Tensor, start_pos: Tensor) -> tuple[Tensor, Tensor]:
        positions_L = start_pos + torch.arange(embeddings_1LD.shape[1])
        return self.cos[positions_L], self.sin[positions_L]


class _TextLayer(nn.Module):
    def __init__(self, layer: nn.Module, cache: KVCache) -> None:
        super().__init__()
        self.layer = layer
        self.cache = cache

    def forward(self, hidden_1LD: Tensor, cos_LR: Tensor, sin_LR: Tensor, start_pos: Tensor) -> Tensor:
        return self.layer(hidden_1LD, cos_LR, sin_LR, self.cache, start_pos)


class _TextTail(nn.Module):
    def __init__(self, model: MobileLlama) -> None:
        super().__init__()
        self.norm = model.norm
        self.lm_head = model.lm_head

    def forward(self, hidden_1LD: Tensor) -> Tensor:
        return self.lm_head(self.norm(hidden_1LD[:, -1:]))


def _export(module: nn.Module, arguments: tuple[Tensor, ...], dynamic_shapes: Any = None) -> ExportedProgram:
    with torch.no_grad():
        return torch.export.export(module.eval(), arguments, dynamic_shapes=dynamic_shapes, strict=False)


def _num_tokens(max_context_len: int) -> Dim:
    return Dim("num_tokens", min=1, max=max_context_len)


def capture_vision_encoder(model: MobileVLM) -> ExportedProgram:
    """The method as a whole."""
    size = model.config.vision.image_size
    return _export(VisionEncoder(model), (torch.zeros(1, 3, size, size),))


def capture_token_embedding(model: MobileVLM, max_context_len: int) -> ExportedProgram:
    """The method as a whole."""
    ids = torch.zeros(1, 2, dtype=torch.int64)
    return _export(TokenEmbedding(model), (ids,), {"ids": {1: _num_tokens(max_context_len)}})


def capture_text_decoder(model: MobileVLM, max_context_len: int) -> ExportedProgram:
    """The method as a whole."""
    arguments = (torch.zeros(1, 2, model.config.text.hidden_size), torch.zeros(1, dtype=torch.int64))
    shapes = {"embeddings_1LD": {1: _num_tokens(max_context_len)}, "start_pos": None}
    return _export(TextDecoder(model.language_model, max_context_len), arguments, shapes)


def _layer_piece(
    quantized: QuantizedCheckpoint,
    stack: str,
    wrap: Callable[[nn.Module], nn.Module],
    arguments: tuple[Tensor, ...],
    dynamic_shapes: Any,
    inputs: tuple[str, ...],
    parameter_prefix: str,
) -> Piece:
    template, parameter_bytes = template_layer(quantized, stack)
    program = _export(wrap(template), arguments, dynamic_shapes)
    layers = tuple(quantized.stacks[stack])
    return Piece(stack, program, inputs, ("hidden",), layers, parameter_prefix, parameter_bytes)


def _vision_pieces(quantized: QuantizedCheckpoint) -> tuple[Piece, ...]:
    model, config = quantized.model, quantized.model.config.vision
    pixels = torch.zeros(1, 3, config.image_size, config.image_size)
    hidden = torch.zeros(1, config.num_patches + 1, config.hidden_size)
    pieces = [Piece("vision_head", _export(_VisionHead(model.vision_tower), (pixels,)), ("pixel_values",), ("hidden",))]
    stack = "vision_tower.encoder.layers"
    if stack in quantized.stacks:
        pieces.append(_layer_piece(quantized, stack, lambda layer: layer, (hidden,), None, ("hidden",), ""))
    pieces.append(Piece("vision_tail", _export(_VisionTail(model), (hidden,)), ("hidden",), ("image_embeddings",)))
    return tuple(pieces)


def _text_pieces(quantized: QuantizedCheckpoint) -> tuple[Piece, ...]:
    model, config = quantized.model.language_model, quantized.model.config.text
    max_context_len = quantized.recipe.max_context_len
    num_tokens = _num_tokens(max_context_len)
    hidden = torch.zeros(1, 2, config.hidden_size)
    # Two tensors: one given twice would be captured as one argument.
    cos, sin = torch.zeros(2, config.head_dim // 2), torch.zeros(2, config.head_dim // 2)
    start_pos = torch.zeros(1, dtype=torch.int64)
    head = _export(
        _TextHead(config.head_dim, config.rope_theta, max_context_len),
        (hidden, start_pos),
        {"embeddings_1LD": {1: num_tokens}, "start_pos": None},
    )
    layer = _layer_piece(
        quantized,
        "language_model.layers",
        lambda layer: _TextLayer(layer, KVCache(config, max_context_len)),
        (hidden, cos, sin, start_pos),
        {"hidden_1LD": {1: num_tokens}, "cos_LR": {0: num_tokens}, "sin_LR": {0: num_tokens}, "start_pos": None},
        ("hidden", "cos", "sin", "start_pos"),
        "layer.",
    )
    tail = _export(_TextTail(model), (hidden,), {"hidden_1LD": {1: num_tokens}})
    return (
        Piece("text_head", head, ("hidden", "start_pos"), ("cos", "sin")),
        layer,
        Piece("text_tail", tail, ("hidden",), ("logits",)),
    )


def capture(quantized: QuantizedCheckpoint) -> tuple[CapturedMethod, ...]:
    """All methods in pieces; the number of tokens is dynamic, 1 .. ``max_context_len``."""
    methods = []
    if quantized.model.config.vision is not None:
        methods.append(CapturedMethod(VISION_ENCODER, _vision_pieces(quantized), ("pixel_values",), "image_embeddings"))
    embedding = capture_token_embedding(quantized.model, quantized.recipe.max_context_len)
    methods.append(
        CapturedMethod(
            TOKEN_EMBEDDING, (Piece("token_embedding", embedding, ("ids",), ("embeddings",)),), ("ids",), "embeddings"
        )
    )
    methods.append(CapturedMethod(TEXT_DECODER, _text_pieces(quantized), ("hidden", "start_pos"), "logits"))
    return tuple(methods)
