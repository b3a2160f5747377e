"""Packed weights on disk: what XNNPACK's delegates will find in the .pte, kept out of memory until it is written.

The bytes and the keys are those that ExecuTorch's XNNPACK backend stores for the same weights (a key is the SHA-256 of
the bytes, with ``scale_`` before it for scales). :mod:`mvlm.export.assemble` relies on that and checks it at every
export: the keys of a lowered template must be those computed here.
"""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from executorch.exir._serialize._cord import FileBackedData
from torch import Tensor

_COPY_BYTES = 8 << 20


class SpooledData(FileBackedData):
    """A range of a spool's file, which ExecuTorch copies into the .pte without holding it in memory."""

    def __init__(self, file: IO[bytes], offset: int, size: int, digest: bytes) -> None:
        # The base class stands for a whole named file; ours has no name and many tenants.
        self._file = file
        self._offset = offset
        self._size = size
        self._sha256 = digest
        self._finalizer = None

    def prefix(self, size: int) -> bytes:
        return os.pread(self._file.fileno(), min(size, self._size), self._offset)

    def sha256(self) -> bytes:
        assert self._sha256 is not None
        return self._sha256

    def to_bytes(self) -> bytes:
        buffer = io.BytesIO()
        self.write_to_file(buffer)
        return buffer.getvalue()

    def write_to_file(self, outfile: io.BufferedIOBase) -> None:
        done = 0
        while done < self._size:
            chunk = os.pread(self._file.fileno(), min(_COPY_BYTES, self._size - done), self._offset + done)
            if not chunk:
                raise OSError(f"the spool file ended {self._size - done} bytes early")
            outfile.write(chunk)
            done += len(chunk)


class Spool:
    """A temporary file without a name: it vanishes with the process, however that ends. Threads may share it.

    Args:
        folder: on whose disk it lies.
    """

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  (closed by __exit__)
        self._lock = threading.Lock()
        self.size = 0

    def add(self, data: bytes) -> SpooledData:
        """Appends ``data``; an error of the disk is an OSError."""
        with self._lock:
            offset = self.size
            self.size += len(data)
        done = 0
        while done < len(data):
            done += os.pwrite(self._file.fileno(), memoryview(data)[done:], offset + done)
        return SpooledData(self._file, offset, len(data), hashlib.sha256(data).digest())

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


@dataclass(frozen=True)
class NamedData:
    """A constant of a delegate under the key by which XNNPACK asks for it."""

    key: str
    data: bytes | SpooledData


def tensor_bytes(tensor: Tensor) -> bytes:
    """The elements in row-major order."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def pack_int4(values: Tensor) -> Tensor:
    """int8 values -8 .. 7 [out, in], two to a byte: uint8 [out, in / 2], offset by 8, even columns in the low half.

    Source: ``convert_to_qc4w`` in executorch/backends/xnnpack/operators/node_visitor.py (1.5.1).
    """
    nibbles = values.view(torch.uint8) + 8
    return (nibbles[:, 1::2] << 4) | (nibbles[:, ::2] & 15)


def packed_weight(weight: Tensor) -> list[bytes]:
    """What XNNPACK stores for one weight: the values and, where it is quantized, the scales behind them.

    Args:
        weight: a float tensor, or torchao's ``IntxUnpackedToInt8Tensor`` [out, in] with 4 bits in groups or 8 bits
            with a scale per row.
    """
    if not hasattr(weight, "qdata"):
        return [tensor_bytes(weight.float())]
    if weight.target_dtype == torch.int4:
        return [tensor_bytes(pack_int4(weight.qdata)), tensor_bytes(weight.scale.to(torch.bfloat16))]
    return [tensor_bytes(weight.qdata), tensor_bytes(weight.scale.float())]


def keys_of(parts: list[bytes]) -> list[str]:
    """The keys under which XNNPACK asks for the parts of :func:`packed_weight`."""
    prefixes = ("", "scale_")
    return [prefix + hashlib.sha256(part).hexdigest() for prefix, part in zip(prefixes, parts, strict=False)]


def spool_weight(weight: Tensor, spool: Spool) -> list[NamedData]:
    """Writes a weight's parts to the spool."""
    stored = [spool.add(part) for part in packed_weight(weight)]
    return [NamedData(prefix + data.sha256().hex(), data) for prefix, data in zip(("", "scale_"), stored, strict=False)]
