"""Weight files: how much memory reading them takes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from random_checkpoint import write_sparse

from mvlm.export.checkpoint import weight_files
from mvlm.export.checkpoint.weight_files import WeightFiles
from mvlm.export.errors import ExportError

#: Prints by how many bytes reading all tensors of a folder raised the peak of resident memory. VmHWM is what
#: ru_maxrss reports, but ru_maxrss begins with what the process had before it became another program.
READ_ALL = """
import sys
from pathlib import Path
from mvlm.export.checkpoint.weight_files import WeightFiles

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

files = WeightFiles(Path(sys.argv[1]))
files.read(list(files)[0])  # loads what torch needs to convert at all
files = WeightFiles(Path(sys.argv[1]))
before = peak()
for name in files:
    assert files.read(name).sum() == 0
print(peak() - before)
"""

MIB = 2**20
#: Bytes of a tensor in the file. As float32 it is more than the 32 MiB below which malloc may keep what was freed.
TENSOR = 20 * MIB


@pytest.mark.parametrize(
    ("form", "size", "allowed"),
    [
        ("model.safetensors", 600 * MIB, 4 * TENSOR),
        ("pytorch_model.bin", 400 * MIB, weight_files.REMAP_AFTER + 4 * TENSOR),
    ],
)
def test_reading_takes_the_memory_of_a_tensor(form, size, allowed, tmp_path):
    count = size // TENSOR
    if form == "model.safetensors":
        write_sparse(tmp_path / form, {f"tensor {i}": (TENSOR // 2,) for i in range(count)})
    else:
        tensors = {f"tensor {i}": torch.zeros(TENSOR // 2, dtype=torch.float16) for i in range(count)}
        torch.save(tensors, tmp_path / form)
    assert (tmp_path / form).stat().st_size >= size
    ran = subprocess.run([sys.executable, "-c", READ_ALL, tmp_path], capture_output=True, text=True, check=True)
    assert int(ran.stdout) < allowed < 0.55 * size


def test_a_bin_is_mapped_anew(tmp_path, monkeypatch):
    """Dropping a map must not take away tensors that were read through it."""
    opened = []
    load = weight_files._load_bin
    monkeypatch.setattr(weight_files, "_load_bin", lambda path: opened.append(path) or load(path))
    monkeypatch.setattr(weight_files, "REMAP_AFTER", 160)
    tensors = {name: torch.randn(20) for name in "abcdef"}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    files = WeightFiles(tmp_path)
    read = {name: files.read(name) for name in files}
    assert len(opened) == 3  # 80 bytes a tensor, so two through each map
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_a_bin_that_cannot_be_mapped_is_read_once(tmp_path, monkeypatch):
    opened = []
    load = weight_files._load_bin
    monkeypatch.setattr(weight_files, "_load_bin", lambda path: opened.append(path) or load(path))
    monkeypatch.setattr(weight_files, "REMAP_AFTER", 100)
    tensors = {name: torch.randn(20) for name in "abcdef"}
    torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    files = WeightFiles(tmp_path)
    assert all(torch.equal(files.read(name), tensors[name]) for name in tensors)
    assert len(opened) == 1


def test_types_and_shapes_are_known_without_reading(tmp_path):
    types = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.int64, torch.bool)
    tensors = {str(dtype).removeprefix("torch."): torch.zeros(2, 3).to(dtype) for dtype in types}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    from_bin = WeightFiles(tmp_path).tensors
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "model.safetensors")
    assert WeightFiles(tmp_path).tensors == from_bin
    assert {info.dtype for info in from_bin.values()} == set(tensors)
    assert {name for name, info in from_bin.items() if info.is_floating_point} == {
        "float16",
        "bfloat16",
        "float32",
        "float64",
    }


def test_a_tensor_in_two_shards(tmp_path):
    from random_checkpoint import save_tensors

    save_tensors(tmp_path, {name: torch.zeros(1) for name in "abc"}, "model*.safetensors")
    (tmp_path / "model-00002-of-00003.safetensors").write_bytes(
        (tmp_path / "model-00001-of-00003.safetensors").read_bytes()
    )
    with pytest.raises(ExportError, match=r"a is in model-00001-of-00003\.safetensors and again in model-00002-of"):
        WeightFiles(tmp_path)


def test_a_file_that_changes_under_us(tmp_path):
    write_sparse(tmp_path / "model.safetensors", {"a": (4,)})
    files = WeightFiles(tmp_path)
    Path(tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ExportError, match=r"a cannot be read .*; was the file changed\?"):
        files.read("a")
