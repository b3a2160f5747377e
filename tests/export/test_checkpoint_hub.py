"""The Hugging Face hub: what is asked of it, and what is done without a network."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from random_checkpoint import RandomCheckpoint, Sizes

from mvlm.export.checkpoint import hub, open_checkpoint
from mvlm.export.errors import ExportError

REVISION = "9a5b623a83feae6a6b2ecad7a843334ccc119ce1"


def write_v2(folder: Path, form: str = "model.safetensors") -> Path:
    return RandomCheckpoint.make(Sizes(projector="ldpnetv2"), own_tower=True).write(folder, form)


def error_of(model: str, **options: str) -> str:
    with pytest.raises(ExportError) as caught:
        open_checkpoint(model, **options)
    return str(caught.value)


class FakeHub:
    """Stands in for huggingface_hub's functions; remembers what was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, files: list[str]) -> None:
        self.folder, self.files = folder, files
        self.downloads: list[dict[str, object]] = []
        monkeypatch.setattr(huggingface_hub, "model_info", self.model_info)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot_download)

    def model_info(self, name: str, revision: str | None = None) -> SimpleNamespace:
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=file) for file in self.files])

    def snapshot_download(self, name: str, **options: object) -> str:
        self.downloads.append({"name": name} | options)
        return str(self.folder)


@pytest.mark.parametrize(
    ("files", "pattern"),
    [
        (["model.safetensors", "pytorch_model.bin"], "model*.safetensors"),
        (["model-00001-of-00002.safetensors", "model.safetensors.index.json"], "model*.safetensors"),
        (["pytorch_model.bin", "mm_projector.bin", "training_args.bin"], "pytorch_model*.bin"),
        (["onnx/model.safetensors", "pytorch_model-00001-of-00002.bin"], "pytorch_model*.bin"),
    ],
)
def test_only_what_is_needed_is_fetched(files, pattern, tmp_path, monkeypatch):
    fake = FakeHub(monkeypatch, write_v2(tmp_path), files)
    checkpoint = open_checkpoint("someone/Model-1B", revision="v1.0")
    assert checkpoint.name == "someone/Model-1B"
    assert fake.downloads == [
        {
            "name": "someone/Model-1B",
            "revision": "v1.0",
            "allow_patterns": ["*.json", "tokenizer.model", pattern],
        }
    ]


def test_tower_from_the_hub(tmp_path, monkeypatch):
    """The revision is the model's; the tower has revisions of its own."""
    source = RandomCheckpoint.make()
    source.config["mm_vision_tower"] = "openai/clip-vit-large-patch14-336"
    fake = FakeHub(monkeypatch, source.write_tower(tmp_path / "clip"), ["pytorch_model.bin"])
    source.write(tmp_path / "v1")
    open_checkpoint(str(tmp_path / "v1"))
    open_checkpoint(str(tmp_path / "v1"), "someone/clip")
    assert [download["name"] for download in fake.downloads] == ["openai/clip-vit-large-patch14-336", "someone/clip"]
    assert [download["revision"] for download in fake.downloads] == [None, None]


def test_revision_of_a_folder(tmp_path):
    folder = write_v2(tmp_path)
    assert error_of(str(folder), revision="main") == (
        f"model {folder}: is a folder, which has no revisions; leave out --revision main, or give a hub id"
    )


def test_without_network_only_the_cache_is_asked(tmp_path, monkeypatch):
    """Not the network again, with the client's long waits, and not for a .bin that a safetensors download lacks."""
    fake = FakeHub(monkeypatch, write_v2(tmp_path), [])

    def model_info(name: str, revision: str | None = None) -> None:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "model_info", model_info)
    open_checkpoint("someone/Model-1B")
    [download] = fake.downloads
    assert download["local_files_only"] is True
    assert download["allow_patterns"] == ["*.json", "tokenizer.model", "model*.safetensors"]


def test_what_the_hub_says_is_passed_on(monkeypatch):
    def model_info(name: str, revision: str | None = None) -> None:
        raise OSError("404: there is no such thing\nand more")

    monkeypatch.setattr(huggingface_hub, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", os.devnull)
    assert error_of("someone/Model-1B", revision="nope") == (
        "model someone/Model-1B at revision nope: no such folder, and the Hugging Face hub did not provide it "
        "(404: there is no such thing); pass a folder, or check the id and the network"
    )


# -- without a network, with huggingface_hub's own code ---------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, and no network whether the machine has one or not."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def fill(cache: Path, form: str) -> None:
    """A download as it lies in the cache: files are links into blobs, a branch is a file with a commit in it
    (https://huggingface.co/docs/huggingface_hub/guides/manage-cache)."""
    repo = cache / "models--someone--Model-1B"
    snapshot = repo / "snapshots" / REVISION
    write_v2(snapshot, form)
    (repo / "blobs").mkdir()
    for number, path in enumerate(sorted(snapshot.iterdir())):
        blob = repo / "blobs" / f"{number:040x}"
        path.rename(blob)
        path.symlink_to(os.path.relpath(blob, snapshot))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(REVISION)


@pytest.mark.parametrize("form", ["model.safetensors", "pytorch_model.bin", "pytorch_model*.bin"])
@pytest.mark.parametrize("revision", [None, "main", REVISION])
def test_cache_without_network(revision, form, cache):
    fill(cache, form)
    checkpoint = open_checkpoint("someone/Model-1B", revision=revision)
    assert checkpoint.name == "someone/Model-1B"
    assert checkpoint.read("language_model.norm.weight").shape == (64,)
    assert checkpoint.checkpoint_id.startswith("sha256:")


def test_revision_that_the_cache_lacks(cache):
    fill(cache, "model.safetensors")
    for revision in ("v2.0", "0" * 40):
        message = error_of("someone/Model-1B", revision=revision)
        assert f"model someone/Model-1B at revision {revision}: no such folder, and the Hugging Face hub" in message


def test_download_that_stopped_halfway(cache):
    fill(cache, "pytorch_model*.bin")
    snapshot = cache / "models--someone--Model-1B" / "snapshots" / REVISION
    (snapshot / "pytorch_model-00002-of-00003.bin").unlink()
    assert "1 of 3 shards missing: pytorch_model-00002-of-00003.bin" in error_of("someone/Model-1B")


def test_empty_cache_without_network(cache):
    message = error_of("mtgv/MobileVLM-1.7B")
    assert message.startswith(
        "model mtgv/MobileVLM-1.7B: no such folder, and the Hugging Face hub did not provide it ("
    )
    assert message.endswith("pass a folder, or check the id and the network")


def test_patterns_fetch_what_is_read():
    """Every file that opening may read is one that is fetched."""
    from fnmatch import fnmatch

    patterns = (*hub.HUB_PATTERNS, hub.SAFETENSORS_PATTERN, hub.BIN_PATTERN)
    for name in (
        "config.json",
        "preprocessor_config.json",
        "processor_config.json",
        "tokenizer.model",
        "tokenizer.json",
        "tokenizer_config.json",
        "added_tokens.json",
        "model.safetensors",
        "model-00001-of-00003.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model-00001-of-00002.bin",
        "pytorch_model.bin.index.json",
    ):
        assert any(fnmatch(name, pattern) for pattern in patterns), name
