"""What several test folders share: the demo model, exported once, tiny models, and where the programs are."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mvlm.export import demo

if TYPE_CHECKING:
    from tiny_pte import TinyPte


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves tests marked ``large`` out unless ``-m`` was given."""
    if config.getoption("-m"):
        return
    large = [item for item in items if item.get_closest_marker("large")]
    if large:
        config.hook.pytest_deselected(items=large)
        items[:] = [item for item in items if not item.get_closest_marker("large")]


@pytest.fixture(scope="session")
def demo_checkpoint() -> Path:
    """The bundled demo checkpoint."""
    return demo.CHECKPOINT


@pytest.fixture(scope="session")
def sample_image() -> Path:
    """The bundled picture."""
    return demo.SAMPLE_IMAGE


@pytest.fixture(scope="session")
def demo_pte(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo checkpoint, exported through the command line, with its artifacts beside it."""
    from mvlm.export.__main__ import main

    path = tmp_path_factory.mktemp("demo") / "mobilevlm.pte"
    assert main(["--pte-name", str(path), "--with-artifacts", "--quiet"]) == 0
    return path


@pytest.fixture(scope="session")
def demo_tokenizer() -> bytes:
    """The demo checkpoint's SentencePiece model."""
    return (demo.CHECKPOINT / "tokenizer.model").read_bytes()


@pytest.fixture(scope="session")
def text_pte(tmp_path_factory: pytest.TempPathFactory, demo_tokenizer: bytes) -> TinyPte:
    """A tiny random language model alone, with 256 positions and a vocabulary that the tokenizer fills by half."""
    from tiny_pte import LANGUAGE_MODEL, write_tiny_pte

    from mvlm.export.models import MobileVLMConfig

    config = MobileVLMConfig(text=LANGUAGE_MODEL, vision=None)
    return write_tiny_pte(tmp_path_factory.mktemp("text") / "text.pte", config, demo_tokenizer, 256)


@pytest.fixture(scope="session")
def llava_pte(tmp_path_factory: pytest.TempPathFactory, demo_tokenizer: bytes) -> TinyPte:
    """A tiny random model that turns a picture into 576 tokens, as LLaVA-1.5 does, with 768 positions."""
    from tiny_pte import LANGUAGE_MODEL, LLAVA_TOWER, write_tiny_pte

    from mvlm.export.models import MobileVLMConfig

    config = MobileVLMConfig(text=LANGUAGE_MODEL, vision=LLAVA_TOWER, projector_type="mlp2x_gelu")
    return write_tiny_pte(tmp_path_factory.mktemp("llava") / "llava.pte", config, demo_tokenizer, 768)


@pytest.fixture(scope="session")
def llava_main() -> Path:
    """The installed runner."""
    beside_python = Path(sys.executable).with_name("llava_main")
    found = beside_python if beside_python.exists() else shutil.which("llava_main")
    if not found:
        pytest.fail("llava_main is not installed; run ci/test.sh, or pip install -e . first")
    return Path(found)
