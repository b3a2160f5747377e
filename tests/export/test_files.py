"""Files appear whole or not at all, and a full disk is an error with nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import resource
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mvlm.export import pipeline
from mvlm.export.__main__ import main
from mvlm.export.checkpoint import Checkpoint
from mvlm.export.contract import CONSTANT_METHODS, TOKEN_EMBEDDING, TOKENIZER, Metadata
from mvlm.export.errors import ExportError
from mvlm.export.files import atomic_write, check_writable
from mvlm.export.lower import Lowered, lower
from mvlm.export.package import constant_methods, describe, write_artifacts, write_pte
from mvlm.export.progress import Progress

#: More than ExecuTorch's own temporary files here, less than the .pte with its padded tokenizer.
DISK_SIZE = 100_000


@contextmanager
def full_disk(size: int = DISK_SIZE) -> Iterator[None]:
    """No file can grow beyond ``size`` bytes: like a full disk, but for this process alone."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


# -- atomic_write -----------------------------------------------------------------------------------------------------


def test_file_appears_whole_when_the_block_ends(tmp_path):
    path = tmp_path / "x.pte"
    with atomic_write(path) as file:
        file.write(b"one ")
        file.flush()
        assert not path.exists()
        assert [other.parent for other in tmp_path.iterdir()] == [tmp_path], "on the same file system"
        file.write(b"two")
    assert path.read_bytes() == b"one two"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "exception", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), KeyError()]
)
@pytest.mark.parametrize("old", [None, b"the old file"], ids=["new", "replaced"])
def test_nothing_is_left_of_a_failed_write(exception, old, tmp_path):
    path = tmp_path / "x.pte"
    if old is not None:
        path.write_bytes(old)

    def write_half() -> None:
        with atomic_write(path) as file:
            file.write(b"half of the new fi")
            raise exception

    with pytest.raises(type(exception)):
        write_half()
    assert [other.name for other in tmp_path.iterdir()] == (["x.pte"] if old else [])
    if old is not None:
        assert path.read_bytes() == old


def test_write_without_folder(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "none" / "x.pte"):
        pass


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_follow_umask(mask, mode, tmp_path):
    path = tmp_path / "x.pte"
    with umask(mask):
        with atomic_write(path) as file:
            file.write(b"x")
        assert os.umask(mask) == mask, "it is as it was"
    assert stat.S_IMODE(path.stat().st_mode) == mode


@pytest.mark.parametrize("beyond", [1, 10_000_000], ids=["when flushed", "when written"])
def test_full_disk(beyond, tmp_path):
    path = tmp_path / "x.pte"
    path.write_bytes(b"the old file")
    with full_disk(4096), pytest.raises(OSError, match="File too large"), atomic_write(path) as file:
        file.write(bytes(4096 + beyond))
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"the old file"


# -- check_writable ---------------------------------------------------------------------------------------------------


def test_writable(tmp_path, monkeypatch):
    check_writable(tmp_path / "new.pte")
    (tmp_path / "old.pte").write_bytes(b"x")
    check_writable(tmp_path / "old.pte")
    monkeypatch.chdir(tmp_path)
    check_writable(Path("new.pte"))
    assert [path.name for path in tmp_path.iterdir()] == ["old.pte"]


def test_not_writable(tmp_path, monkeypatch):
    with pytest.raises(ExportError, match=r": is a folder; give the name of a file in it"):
        check_writable(tmp_path)
    with pytest.raises(ExportError, match=r"x\.pte: there is no folder .*/none; make it first"):
        check_writable(tmp_path / "none" / "x.pte")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ExportError, match=r"there is no folder .*/file; make it first"):
        check_writable(tmp_path / "file" / "x.pte")
    # Taking the right away would not stop root, who may well run the tests.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ExportError, match=r"x\.pte: the folder .* cannot be written to"):
        check_writable(tmp_path / "x.pte")


# -- the .pte and what lies beside it ---------------------------------------------------------------------------------


@pytest.fixture
def metadata(small_checkpoint, small_recipe) -> Metadata:
    return describe(small_checkpoint, small_recipe)


@pytest.fixture
def embedding_alone(captured) -> Lowered:
    """``token_embedding``, which is quickly lowered."""
    methods = [method for method in captured if method.name == TOKEN_EMBEDDING]
    return lower(methods, Progress(quiet=True))


@pytest.fixture
def constants(metadata) -> dict[str, object]:
    """A tokenizer among them that makes the file larger than the disk."""
    return constant_methods(metadata, bytes(2 * DISK_SIZE), "sha256:0", "sha256:1")


def test_metadata(small_checkpoint, small_recipe, metadata):
    assert metadata.model_name == small_checkpoint.name
    assert metadata.checkpoint_id == small_checkpoint.checkpoint_id
    assert metadata.recipe == small_recipe.to_json()
    assert metadata.max_context_len == small_recipe.max_context_len
    assert metadata.vocab_size == 96
    assert (metadata.bos_id, metadata.eos_ids) == (1, (2,))
    assert (metadata.image.size, metadata.image.tokens, metadata.image.pad_color) == (28, 16, (122, 116, 104))
    # MobileVLM's template "v1", letter by letter.
    assert metadata.prompt_template.replace("{prompt}", metadata.image_prefix + "Why?") == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: <image>\nWhy? ASSISTANT:"
    )
    assert metadata.stop_strings == ("</s>",)


def test_metadata_round_trip(metadata):
    values = metadata.to_constant_methods()
    assert tuple(values) == CONSTANT_METHODS
    assert Metadata.from_constant_methods(values) == metadata

    with pytest.raises(ValueError, match="constant methods missing: get_bos_id, mvlm_image_std"):
        Metadata.from_constant_methods(
            {key: value for key, value in values.items() if key not in ("get_bos_id", "mvlm_image_std")}
        )
    with pytest.raises(ValueError, match=r"must contain \{prompt\} once: 'no place'"):
        replace(metadata, prompt_template="no place")


def test_tokenizer_travels_as_bytes(metadata):
    data = bytes(range(256))
    tokenizer = constant_methods(metadata, data, "sha256:0", "sha256:1")[TOKENIZER]
    assert tokenizer.dtype == torch.uint8
    assert bytes(tokenizer.tolist()) == data


def test_pte_is_written(embedding_alone, constants, tmp_path):
    path = tmp_path / "x.pte"
    assert write_pte(embedding_alone, constants, path) == path.stat().st_size > 2 * DISK_SIZE
    assert list(tmp_path.iterdir()) == [path]
    data = path.read_bytes()
    assert data[4:8] == b"ET12", "the magic of an ExecuTorch program"
    assert b"quantized_decomposed::embedding_byte" in data, "the look-up and the dequantization are one operator"


def test_full_disk_while_exporting(embedding_alone, constants, tmp_path, monkeypatch, capsys):
    """All of the writing is real; only the stages before it are left out."""
    path = tmp_path / "x.pte"
    path.write_bytes(b"the old file")

    def export_checkpoint(checkpoint: Checkpoint, path: Path, *_: object) -> None:
        with full_disk():
            write_pte(embedding_alone, constants, path)

    monkeypatch.setattr(pipeline, "export_checkpoint", export_checkpoint)
    assert main(["--pte-name", str(path), "--quiet"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"mvlm.export: {path}: could not be read or written: File too large\n"
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"the old file"


def test_artifacts(metadata, sample_image, tmp_path):
    written = write_artifacts(tmp_path / "some.pte", metadata, b"the tokenizer", sample_image)
    assert sorted(written) == sorted(tmp_path.iterdir())
    assert (tmp_path / "tokenizer.model").read_bytes() == b"the tokenizer"
    assert (tmp_path / sample_image.name).read_bytes() == sample_image.read_bytes()
    description = json.loads((tmp_path / "some.json").read_text())
    assert description["checkpoint_id"] == metadata.checkpoint_id
    assert description["image"]["mean"] == list(metadata.image.mean)
    assert set(description) == {field for field in metadata.__dataclass_fields__}
