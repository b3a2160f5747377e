from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from mvlm.export.checkpoint import LoadedCheckpoint, load
from mvlm.export.quantize import quantize
from mvlm.export.recipe import mobile


@dataclass(frozen=True)
class BothModels:
    float32: LoadedCheckpoint
    quantized: LoadedCheckpoint


@pytest.fixture(scope="session")
def models(demo_checkpoint: Path) -> BothModels:
    """The demo checkpoint as float32 and as quantized eager model; tests must not change them."""
    both = BothModels(load(str(demo_checkpoint)), load(str(demo_checkpoint)))
    quantize(both.quantized.model, mobile())
    return both


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield
