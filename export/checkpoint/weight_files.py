"""Weight files: which tensors a folder holds, and one of them at a time.

Knows safetensors and PyTorch's ``.bin``, whole and sharded; knows nothing of models or tensor names.

Files are mapped into memory, and the pages of a map that were touched count as resident memory of the process until
the map is dropped. Therefore no map lives long: a safetensors file is mapped for one tensor, a ``.bin``, which is
slower to open, until :data:`REMAP_AFTER` bytes were read through it. Reading a checkpoint of any size, tensor after
tensor, then costs about one tensor of memory.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mvlm.export.checkpoint.configs import read_json
from mvlm.export.errors import ExportError

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")

#: Bytes that are read through one map of a ``.bin`` at most, before it is dropped and made anew; a tensor that is
#: larger is read through one of its own.
REMAP_AFTER = 128 * 2**20

#: Types of tensors that are weights, as torch names them.
FLOATING_POINT = ("float16", "bfloat16", "float32", "float64")

#: What safetensors calls them and the integers; other types go by their own names.
_SAFETENSORS_TYPES = {
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "U8": "uint8",
    "BOOL": "bool",
}


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor before it is read.

    Attributes:
        dtype: its type as torch names it, such as ``float16``.
        shape: its shape in the file.
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def is_floating_point(self) -> bool:
        return self.dtype in FLOATING_POINT


@dataclass
class _OpenBin:
    """A ``.bin`` whose tensors are at hand.

    Attributes:
        path: of the file.
        tensors: views of its map, or of memory for a file that cannot be mapped.
        is_mapped: whether dropping the views gives memory back that reading can bring again for nothing.
        bytes_read: through the map.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    is_mapped: bool
    bytes_read: int = 0


class WeightFiles:
    """The tensors of one folder by name: type and shape at once, values when asked for. Threads may share it.

    Reads ``model.safetensors`` or ``pytorch_model.bin``, or the shards that ``<file>.index.json`` lists; safetensors
    first if both are there. ``.bin`` files are read with ``weights_only``: a pickle that holds anything but tensors is
    refused. Those written before torch 1.6 cannot be mapped and are in memory whole while they are read.

    Attributes:
        folder: where they lie.
        paths: of the files.
        tensors: what they hold.

    Raises:
        ExportError: no weights in the folder, a shard missing, a name twice, or a file that cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.paths = self._find_files()
        self.tensors: dict[str, TensorInfo] = {}
        self._file_of: dict[str, Path] = {}
        self._bin: _OpenBin | None = None
        self._lock = threading.Lock()
        for path in self.paths:
            for name, info in self._describe(path).items():
                if name in self._file_of:
                    raise ExportError(
                        f"{folder}: {name} is in {self._file_of[name].name} and again in {path.name}; "
                        "these shards do not belong together"
                    )
                self._file_of[name] = path
                self.tensors[name] = info

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self.paths)

    def read(self, name: str) -> Tensor:
        """The tensor as float32, contiguous, in memory of its own.

        Raises:
            ExportError: the file can no longer be read.
        """
        path = self._file_of[name]
        if path.suffix != ".safetensors":
            return self._read_from_bin(path, name)
        try:
            with safe_open(path, framework="pt") as file:
                return _copy(file.get_tensor(name))
        except (SafetensorError, OSError) as error:
            raise ExportError(f"{path}: {name} cannot be read ({error}); was the file changed?") from error

    def _find_files(self) -> list[Path]:
        for file_name in WEIGHT_FILES:
            index = self.folder / f"{file_name}.index.json"
            if index.exists():
                weight_map = read_json(index).get("weight_map")
                if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
                    raise ExportError(
                        f"{index}: no 'weight_map' in it; the index of a sharded checkpoint has one, of names"
                    )
                shards = sorted(set(weight_map.values()))
                missing = [shard for shard in shards if not (self.folder / shard).is_file()]
                if missing:
                    raise ExportError(
                        f"{self.folder}: {len(missing)} of {len(shards)} shards missing: {', '.join(missing)} "
                        f"(listed in {index.name}); fetch them into the folder"
                    )
                return [self.folder / shard for shard in shards]
            if (self.folder / file_name).is_file():
                return [self.folder / file_name]
        raise ExportError(
            f"{self.folder}: no weights in it; looked for {' and '.join(WEIGHT_FILES)}, whole or sharded "
            "(with .index.json)"
        )

    def _describe(self, path: Path) -> dict[str, TensorInfo]:
        if path.suffix != ".safetensors":
            return {
                name: TensorInfo(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
                for name, tensor in self._open_bin(path).tensors.items()
            }
        try:
            with safe_open(path, framework="pt") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)
                return {
                    name: TensorInfo(
                        _SAFETENSORS_TYPES.get(part.get_dtype(), part.get_dtype()), tuple(part.get_shape())
                    )
                    for name, part in slices.items()
                }
        except (SafetensorError, OSError) as error:
            raise ExportError(f"{path}: cannot be read as safetensors ({error}); is it truncated?") from error

    def _read_from_bin(self, path: Path, name: str) -> Tensor:
        with self._lock:
            return self._read_from_bin_alone(path, name)

    def _read_from_bin_alone(self, path: Path, name: str) -> Tensor:
        opened = self._open_bin(path)
        if opened.is_mapped and opened.bytes_read and opened.bytes_read + opened.tensors[name].nbytes > REMAP_AFTER:
            del opened
            self._bin = None
            opened = self._open_bin(path)
        tensor = opened.tensors[name]
        opened.bytes_read += tensor.nbytes
        return _copy(tensor)

    def _open_bin(self, path: Path) -> _OpenBin:
        opened = self._bin
        if opened is None or opened.path != path:
            del opened
            self._bin = None  # first, so that two are never there at once
            self._bin = opened = _load_bin(path)
        return opened

    def __getstate__(self) -> dict[str, object]:
        """Without the map and the lock: another process makes its own."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_bin", "_lock")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state, _bin=None, _lock=threading.Lock())


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def _load_bin(path: Path) -> _OpenBin:
    is_mapped = True
    try:
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            # Files written before torch 1.6 are no zip archives and cannot be mapped.
            is_mapped = False
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many types for broken or hostile files
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ExportError(
            f"{path}: cannot be read as PyTorch weights ({reason}); it is truncated, no checkpoint, or holds "
            "Python objects other than tensors, which are refused because loading them could run code"
        ) from error
    if not isinstance(tensors, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in tensors.items()
    ):
        raise ExportError(
            f"{path}: holds {type(tensors).__name__}, not a state dict (names and tensors); "
            "save the model with torch.save(model.state_dict(), path)"
        )
    return _OpenBin(path, tensors, is_mapped)
