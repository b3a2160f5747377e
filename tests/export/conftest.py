"""A small random model, quantized, captured and lowered once for all tests of the exporter."""

from __future__ import annotations

import pytest
import torch
from random_checkpoint import RandomCheckpoint, Sizes

from mvlm.export.capture import capture_text_decoder, capture_token_embedding, capture_vision_encoder
from mvlm.export.checkpoint import LoadedCheckpoint, load
from mvlm.export.contract import TEXT_DECODER, TOKEN_EMBEDDING, VISION_ENCODER
from mvlm.export.lower import Lowered, lower
from mvlm.export.quantize import quantize
from mvlm.export.recipe import Recipe


@pytest.fixture(scope="session")
def small_recipe() -> Recipe:
    """What the fixtures below are made by."""
    return Recipe(max_context_len=32)


@pytest.fixture(scope="session")
def quantized(tmp_path_factory: pytest.TempPathFactory, small_recipe: Recipe) -> LoadedCheckpoint:
    """A random checkpoint with the cheapest projector, quantized; tests must not change it."""
    checkpoint = load(str(RandomCheckpoint.make(Sizes(projector="linear")).write(tmp_path_factory.mktemp("quantized"))))
    quantize(checkpoint.model, small_recipe)
    return checkpoint


@pytest.fixture(scope="session")
def lowered_vision(quantized: LoadedCheckpoint, small_recipe: Recipe) -> Lowered:
    """``vision_encoder`` and ``token_embedding``. A lowered program can be made into a .pte once."""
    with torch.no_grad():
        methods = {
            VISION_ENCODER: capture_vision_encoder(quantized.model),
            TOKEN_EMBEDDING: capture_token_embedding(quantized.model, small_recipe.max_context_len),
        }
    return lower(methods, {})


@pytest.fixture(scope="session")
def lowered_text(quantized: LoadedCheckpoint, small_recipe: Recipe) -> Lowered:
    """``text_decoder`` alone."""
    with torch.no_grad():
        methods = {TEXT_DECODER: capture_text_decoder(quantized.model, small_recipe.max_context_len)}
    return lower(methods, {})
