from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from mvlm.export.checkpoint import Checkpoint, open_checkpoint
from mvlm.export.models import MobileVLM
from mvlm.export.quantize import quantize
from mvlm.export.recipe import mobile


@dataclass(frozen=True)
class BothModels:
    checkpoint: Checkpoint
    float32: MobileVLM
    quantized: MobileVLM


@pytest.fixture(scope="session")
def models(demo_checkpoint: Path) -> BothModels:
    """The demo checkpoint as float32 and as quantized eager model; tests must not change them."""
    checkpoint = open_checkpoint(str(demo_checkpoint))
    both = BothModels(checkpoint, checkpoint.load_model(), checkpoint.load_model())
    quantize(both.quantized, mobile())
    return both


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield
