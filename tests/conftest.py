"""What several test folders share: the demo model, exported once, and where the programs are."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from mvlm.export import demo


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves tests marked ``large`` out unless ``-m`` was given."""
    if config.getoption("-m"):
        return
    large = [item for item in items if "large" in item.keywords]
    if large:
        config.hook.pytest_deselected(items=large)
        items[:] = [item for item in items if "large" not in item.keywords]


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
def llava_main() -> Path:
    """The installed runner."""
    beside_python = Path(sys.executable).with_name("llava_main")
    found = beside_python if beside_python.exists() else shutil.which("llava_main")
    if not found:
        pytest.fail("llava_main is not installed; run ci/test.sh, or pip install -e . first")
    return Path(found)
