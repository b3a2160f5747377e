"""A small random model, quantized, captured and lowered once for all tests of the exporter."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from random_checkpoint import RandomCheckpoint, Sizes

from mvlm.export.capture import CapturedMethod, capture
from mvlm.export.checkpoint import Checkpoint, open_checkpoint
from mvlm.export.lower import Lowered, lower
from mvlm.export.models import MobileVLM
from mvlm.export.progress import Progress
from mvlm.export.quantize import QuantizedCheckpoint, quantize, quantize_checkpoint
from mvlm.export.recipe import Recipe
from mvlm.export.spool import Spool


@pytest.fixture(scope="session")
def small_recipe() -> Recipe:
    """What the fixtures below are made by."""
    return Recipe(max_context_len=32)


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Random, with the cheapest projector, and two layers in each stack."""
    sizes = Sizes(projector="linear", num_hidden_layers=2, vision_num_hidden_layers=3)
    return open_checkpoint(str(RandomCheckpoint.make(sizes).write(tmp_path_factory.mktemp("small"))))


@pytest.fixture(scope="session")
def small_quantized_model(small_checkpoint: Checkpoint, small_recipe: Recipe) -> MobileVLM:
    """The whole model, quantized in memory; tests must not change it."""
    model = small_checkpoint.load_model()
    with torch.no_grad():
        quantize(model, small_recipe)
    return model


@pytest.fixture(scope="session")
def small_quantized(
    small_checkpoint: Checkpoint, small_recipe: Recipe, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[QuantizedCheckpoint]:
    """The same, quantized tensor by tensor."""
    with Spool(tmp_path_factory.mktemp("spool")) as spool:
        yield quantize_checkpoint(small_checkpoint, small_recipe, spool, Progress(quiet=True))


@pytest.fixture(scope="session")
def captured(small_quantized: QuantizedCheckpoint) -> tuple[CapturedMethod, ...]:
    return capture(small_quantized)


@pytest.fixture(scope="session")
def lowered_with_nodes(captured: tuple[CapturedMethod, ...]) -> tuple[Lowered, dict[str, list[torch.fx.Node]]]:
    """All methods, and the nodes of each as they are before a .pte is made of them, which changes the programs."""
    lowered = lower(captured, Progress(quiet=True))
    return lowered, {name: list(copy.deepcopy(program.graph).nodes) for name, program in lowered.programs.items()}


@pytest.fixture(scope="session")
def lowered(lowered_with_nodes: tuple[Lowered, dict[str, list[torch.fx.Node]]]) -> Lowered:
    """All methods. A lowered program can be made into a .pte once."""
    return lowered_with_nodes[0]
