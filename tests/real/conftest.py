"""The gauge and its float32 models, for the tests here; fetched once into build/real."""

from __future__ import annotations

import pytest
import torch
from gauge import FetchError, Gauge, make_gauge, windows
from sentencepiece import SentencePieceProcessor
from torch import Tensor

from mvlm.export.checkpoint import Checkpoint, open_checkpoint
from mvlm.export.models import MobileLlama, MobileVLM


@pytest.fixture(scope="session")
def gauge() -> Gauge:
    """All parts, made if need be."""
    try:
        return make_gauge(gguf=True)
    except FetchError as error:
        pytest.fail(f"the gauge cannot be made: {error}", pytrace=False)


@pytest.fixture(scope="session")
def r_checkpoint(gauge: Gauge) -> Checkpoint:
    """R, opened."""
    return open_checkpoint(str(gauge.language_model))


@pytest.fixture(scope="session")
def r_model(r_checkpoint: Checkpoint) -> MobileLlama:
    """R in float32; tests must not change it."""
    return r_checkpoint.load_model().language_model


@pytest.fixture(scope="session")
def r_tokenizer(r_checkpoint: Checkpoint) -> SentencePieceProcessor:
    """R's tokenizer."""
    return SentencePieceProcessor(model_proto=r_checkpoint.tokenizer)


@pytest.fixture(scope="session")
def evaluation_windows(gauge: Gauge, r_tokenizer: SentencePieceProcessor) -> Tensor:
    """Token ids int64 [12, 512] of the evaluation text."""
    return windows(gauge.evaluation_text.read_text(encoding="utf-8"), r_tokenizer)


@pytest.fixture(scope="session")
def vlm_checkpoint(gauge: Gauge) -> Checkpoint:
    """The vision-language model, opened."""
    return open_checkpoint(str(gauge.vision_language_model))


@pytest.fixture(scope="session")
def vlm(vlm_checkpoint: Checkpoint) -> MobileVLM:
    """The vision-language model in float32; tests must not change it."""
    return vlm_checkpoint.load_model()


@pytest.fixture(autouse=True)
def no_gradients() -> None:
    """Nothing here trains; yet an export, which some of these tests run, must not be in inference mode."""
    with torch.no_grad():
        yield
