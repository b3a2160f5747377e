"""Capture: the methods of the .pte as chains of ``torch.export`` programs.

A method is cut where its stack of identical layers begins and ends. What comes before and after is captured with its
real weights; of the layers one is captured, with a template's weights, and :mod:`mvlm.export.assemble` puts as many of
it into the chain as there are. So capturing and lowering take as long for 32 layers as for one. Where some linears have
8 bits and others 4, there is such a template for every way in which a layer is stored.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from executorch.exir.passes.constant_prop_pass import constant_prop_pass
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import mvlm.ops
from mvlm.export.checkpoint.configs import ImagePreprocessing
from mvlm.export.contract import TEXT_DECODER, TOKEN_EMBEDDING, VISION_ENCODER
from mvlm.export.models import (
    LOGIT_POSITIONS,
    CLIPVisionTower,
    MobileLlama,
    MobileVLM,
    MobileVLMConfig,
    PictureInput,
    TextDecoder,
    build_kv_cache,
    last_positions,
    rope_tables,
)
from mvlm.export.quantize import QuantizedCheckpoint, Scheme, StackedLayer, layer_storage, template_layer
from mvlm.export.recipe import Recipe


@dataclass(frozen=True)
class Piece:
    """A part of a method.

    Attributes:
        name: of the part.
        program: captured, later lowered.
        inputs: names of the values that it takes from the method's.
        outputs: names of the values that it gives.
        layers: the layers in whose place it stands, one after another; empty for a part that stands for itself.
        first_layer: number of the first of them in its stack.
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
    first_layer: int = 0


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
    def __init__(self, tower: CLIPVisionTower, picture_input: nn.Module) -> None:
        super().__init__()
        self.picture_input = picture_input
        self.embeddings = tower.embeddings
        self.pre_layrnorm = tower.pre_layrnorm

    def forward(self, picture: Tensor) -> tuple[Tensor, Tensor]:
        hidden_1LV = self.pre_layrnorm(self.embeddings(self.picture_input(picture)))
        return hidden_1LV, torch.zeros_like(hidden_1LV)


class _VisionTail(nn.Module):
    def __init__(self, model: MobileVLM) -> None:
        super().__init__()
        self.mm_projector = model.mm_projector

    def forward(self, hidden_1LV: Tensor, branch_1LV: Tensor) -> Tensor:
        return self.mm_projector((hidden_1LV + branch_1LV)[:, 1:])


class VisionEncoder(nn.Module):
    """pixel_values [1, 3, S, S], or what ``picture_input`` makes them of, to image embeddings [1, T, D].

    The method ``vision_encoder`` as a whole.
    """

    def __init__(self, model: MobileVLM, picture_input: nn.Module) -> None:
        super().__init__()
        self.picture_input = picture_input
        self.vision_tower = model.vision_tower
        self.mm_projector = model.mm_projector

    def forward(self, picture: Tensor) -> Tensor:
        return self.mm_projector(self.vision_tower(self.picture_input(picture)))


class TokenEmbedding(nn.Module):
    """ids [1, L] to embeddings [1, L, D]: the method ``token_embedding``."""

    def __init__(self, model: MobileVLM) -> None:
        super().__init__()
        self.embed_tokens = model.language_model.embed_tokens

    def forward(self, ids: Tensor) -> Tensor:
        return self.embed_tokens(ids)


class _TextHead(nn.Module):
    def forward(self, hidden_1LD: Tensor) -> Tensor:
        return torch.zeros_like(hidden_1LD)


class _TextLayer(nn.Module):
    def __init__(self, layer: nn.Module, cache: nn.Module, rope: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.layer = layer
        self.cache = cache
        self.register_buffer("cos", rope[0], persistent=False)
        self.register_buffer("sin", rope[1], persistent=False)

    def forward(self, hidden_1LD: Tensor, branch_1LD: Tensor, start_pos: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(hidden_1LD, branch_1LD, self.cos, self.sin, self.cache, start_pos)


class _TextTail(nn.Module):
    def __init__(self, model: MobileLlama, logit_positions: int) -> None:
        super().__init__()
        self.norm = model.norm
        self.lm_head = model.lm_head
        self.logit_positions = logit_positions

    def forward(self, hidden_1LD: Tensor, branch_1LD: Tensor) -> Tensor:
        last_M = last_positions(hidden_1LD.shape[1], self.logit_positions)
        _, y_1MD = self.norm.add(hidden_1LD.index_select(1, last_M), branch_1LD.index_select(1, last_M))
        return self.lm_head(y_1MD[0])[None]


def _export(module: nn.Module, arguments: tuple[Tensor, ...], dynamic_shapes: Any = None) -> ExportedProgram:
    with torch.no_grad():
        return torch.export.export(module.eval(), arguments, dynamic_shapes=dynamic_shapes, strict=False)


def _fold_weights(program: ExportedProgram) -> ExportedProgram:
    """Computes ahead what is made of weights alone; XNNPACK takes a convolution only if its weight is a constant."""
    quantized = {torch.ops.export.access_subclass_inner_tensor.default, torch.ops.torchao.dequantize_affine.default}
    return constant_prop_pass(program, quantized)


def _operators(recipe: Recipe) -> AbstractContextManager[Any]:
    """In it, what is captured has our operators or, if the recipe wants none of them, what they are made of."""
    return mvlm.ops.References() if recipe.attention_op == "llama" else nullcontext()


def logit_positions(recipe: Recipe, config: MobileVLMConfig) -> int:
    """The last positions of a call of ``text_decoder`` whose logits it gives, if the call has so many."""
    return min(LOGIT_POSITIONS, recipe.max_seq_len(config))


def _num_tokens(max_seq_len: int) -> Dim:
    return Dim("num_tokens", min=1, max=max_seq_len)


def _export_with_picture(module: nn.Module, picture_input: nn.Module, size: int) -> ExportedProgram:
    """Captures a module that begins with ``picture_input``."""
    if not isinstance(picture_input, PictureInput):
        return _export(module, (torch.zeros(1, 3, size, size),))
    shape = {1: Dim("height", min=1, max=size), 2: Dim("width", min=1, max=size)}
    # Sides that are not equal, lest they are taken for one.
    example = torch.zeros(3, size // 2, size // 2 + 1, dtype=torch.uint8)
    return _export(module, (example,), {"picture": shape})


def _picture_input(size: int, preprocessing: ImagePreprocessing, recipe: Recipe) -> nn.Module:
    """What the vision encoder begins with: ExecuTorch's own programs hand pictures over as bytes."""
    if recipe.attention_op != "llama":
        return nn.Identity()
    return PictureInput(size, preprocessing.mean, preprocessing.std, preprocessing.pad_color)


def capture_vision_encoder(model: MobileVLM, preprocessing: ImagePreprocessing, recipe: Recipe) -> ExportedProgram:
    """The method as a whole."""
    size = model.config.vision.image_size
    picture_input = _picture_input(size, preprocessing, recipe)
    with _operators(recipe):
        return _export_with_picture(VisionEncoder(model, picture_input), picture_input, size)


def capture_token_embedding(model: MobileVLM, recipe: Recipe) -> ExportedProgram:
    """The method as a whole."""
    ids = torch.zeros(1, 2, dtype=torch.int64)
    return _export(TokenEmbedding(model), (ids,), {"ids": {1: _num_tokens(recipe.max_seq_len(model.config))}})


def capture_text_decoder(model: MobileVLM, recipe: Recipe) -> ExportedProgram:
    """The method as a whole."""
    arguments = (torch.zeros(1, 2, model.config.text.hidden_size), torch.zeros(1, dtype=torch.int64))
    shapes = {"embeddings_1LD": {1: _num_tokens(recipe.max_seq_len(model.config))}, "start_pos": None}
    decoder = TextDecoder(
        model.language_model,
        recipe.max_context_len,
        recipe.kv_cache,
        recipe.attention_op,
        logit_positions(recipe, model.config),
    )
    with _operators(recipe):
        return _export(decoder, arguments, shapes)


def _layer_pieces(
    quantized: QuantizedCheckpoint,
    stack: str,
    wrap: Callable[[nn.Module], nn.Module],
    arguments: tuple[Tensor, ...],
    dynamic_shapes: Any,
    inputs: tuple[str, ...],
    parameter_prefix: str,
) -> Iterator[Piece]:
    """The layers of a stack. Those that are stored alike and follow each other are a piece, those that are stored alike
    share a template, and so the program.
    """
    layers = quantized.stacks[stack]
    templates: dict[tuple[Scheme | None, ...], tuple[ExportedProgram, dict[str, list[bytes]]]] = {}
    first = 0
    for storage, run in itertools.groupby(range(len(layers)), lambda index: layer_storage(quantized, stack, index)):
        count = len(list(run))
        if storage not in templates:
            template, parameter_bytes = template_layer(quantized, stack, first)
            templates[storage] = _export(wrap(template), arguments, dynamic_shapes), parameter_bytes
        program, parameter_bytes = templates[storage]
        part = tuple(layers[first : first + count])
        yield Piece(stack, program, inputs, ("hidden", "branch"), part, parameter_prefix, parameter_bytes, first)
        first += count


def _vision_pieces(quantized: QuantizedCheckpoint) -> tuple[Piece, ...]:
    model, config = quantized.model, quantized.model.config.vision
    picture_input = _picture_input(config.image_size, quantized.checkpoint.preprocessing, quantized.recipe)
    head = _export_with_picture(_VisionHead(model.vision_tower, picture_input), picture_input, config.image_size)
    # Two tensors: one given twice would be captured as one argument.
    shape = (1, config.num_patches + 1, config.hidden_size)
    stream = (torch.zeros(shape), torch.zeros(shape))
    names = ("hidden", "branch")
    pieces = [Piece("vision_head", head, ("pixel_values",), names)]
    stack = "vision_tower.encoder.layers"
    if stack in quantized.stacks:
        pieces += _layer_pieces(quantized, stack, lambda layer: layer, stream, None, names, "")
    tail = _export(_VisionTail(model), stream)
    if quantized.recipe.attention_op == "llama":
        tail = _fold_weights(tail)
    pieces.append(Piece("vision_tail", tail, names, ("image_embeddings",)))
    return tuple(pieces)


def _text_pieces(quantized: QuantizedCheckpoint) -> tuple[Piece, ...]:
    model, config, recipe = quantized.model.language_model, quantized.model.config.text, quantized.recipe
    num_tokens = _num_tokens(recipe.max_seq_len(quantized.model.config))
    stream = (torch.zeros(1, 2, config.hidden_size), torch.zeros(1, 2, config.hidden_size))
    start_pos = torch.zeros(1, dtype=torch.int64)
    dynamic = {"hidden_1LD": {1: num_tokens}, "branch_1LD": {1: num_tokens}}
    head = _export(_TextHead(), stream[:1], {"hidden_1LD": {1: num_tokens}})
    rope = rope_tables(config.head_dim, recipe.max_context_len, config.rope_theta)
    cache = build_kv_cache(config, recipe.max_context_len, recipe.kv_cache, recipe.attention_op)
    layers = _layer_pieces(
        quantized,
        "language_model.layers",
        lambda layer: _TextLayer(layer, cache, rope),
        (*stream, start_pos),
        dynamic | {"start_pos": None},
        ("hidden", "branch", "start_pos"),
        "layer.",
    )
    tail = _export(_TextTail(model, logit_positions(recipe, quantized.model.config)), stream, dynamic)
    return (
        Piece("text_head", head, ("hidden",), ("branch",)),
        *layers,
        Piece("text_tail", tail, ("hidden", "branch"), ("logits",)),
    )


def capture(quantized: QuantizedCheckpoint) -> tuple[CapturedMethod, ...]:
    """All methods in pieces; the number of tokens is dynamic, 1 .. ``recipe.max_seq_len()``."""
    with _operators(quantized.recipe):
        methods = []
        if quantized.model.config.vision is not None:
            vision = _vision_pieces(quantized)
            methods.append(CapturedMethod(VISION_ENCODER, vision, ("pixel_values",), "image_embeddings"))
        embedding = Piece(
            "token_embedding", capture_token_embedding(quantized.model, quantized.recipe), ("ids",), ("embeddings",)
        )
        methods.append(CapturedMethod(TOKEN_EMBEDDING, (embedding,), ("ids",), "embeddings"))
        methods.append(CapturedMethod(TEXT_DECODER, _text_pieces(quantized), ("hidden", "start_pos"), "logits"))
        return tuple(methods)
