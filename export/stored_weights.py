"""The quantized linears of a ``.pte`` as they lie in it, and a digest that tells whether they are those of the export.

At export each linear's weights are packed and forgotten; graphs are captured, lowered and put together without them,
and at the end the file is written from bytes that were kept apart. Whether each has arrived where it belongs is told by
a digest over all of them, made right after quantization and kept in the file (:data:`contract.WEIGHTS_DIGEST`). Whoever
compares it hashes every byte, and takes no key in the file for granted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torchao.quantization import IntxUnpackedToInt8Tensor

from mvlm.export import inspect
from mvlm.export.contract import TEXT_DECODER, VISION_ENCODER
from mvlm.export.errors import ExportError
from mvlm.export.linear_specs import LINEAR_SPEC
from mvlm.export.models import MobileVLM
from mvlm.export.quantize import QuantizedCheckpoint, Scheme, place_in_stack, quantized_tensor
from mvlm.export.spool import packed_weight


@dataclass(frozen=True)
class StoredLinear:
    """A dynamically quantized linear of a file.

    Attributes:
        in_features: columns of the weight.
        out_features: rows of it.
        group_size: 4-bit weights that share a scale; 0 for 8-bit weights with a scale for each row.
        weight: its bytes, see :func:`spool.packed_weight`.
        scales: theirs.
    """

    in_features: int
    out_features: int
    group_size: int
    weight: memoryview
    scales: memoryview

    def tensor(self) -> IntxUnpackedToInt8Tensor:
        """The weight as torchao holds it."""
        packed = torch.frombuffer(bytearray(self.weight), dtype=torch.uint8).view(self.out_features, -1)
        if self.group_size:
            values = torch.stack([packed & 15, packed >> 4], dim=-1).view(self.out_features, -1).to(torch.int8) - 8
            scheme, stored_as = Scheme(4, self.group_size), torch.bfloat16
        else:
            values, scheme, stored_as = packed.view(torch.int8), Scheme(8), torch.float32
        scales = torch.frombuffer(bytearray(self.scales), dtype=stored_as).view(self.out_features, -1)
        return quantized_tensor(values, scales, scheme)


def read_stored_linears(path: Path) -> dict[str, list[StoredLinear]]:
    """The linears of a file by method, in the order in which they are run.

    Raises:
        ExportError: the file cannot be read, or a linear's data are not in it.
    """
    try:
        with path.open("rb") as file:
            return dict(_linears(path, inspect._Program(path, file)))
    except OSError as error:
        raise ExportError(f"{path}: cannot be read: {error.strerror or error}") from error
    except inspect._BROKEN as error:
        raise ExportError(f"{path}: is broken: {error}") from error


def _linears(path: Path, program: inspect._Program) -> Iterator[tuple[str, list[StoredLinear]]]:
    segments = {
        inspect._text(entry.Key()): program.segments[entry.SegmentIndex()]
        for entry in inspect._items(program.root.NamedDataLength(), program.root.NamedData)
    }

    def data(key: str) -> memoryview:
        if key not in segments:
            raise ExportError(f"{path}: is broken: a linear's weights, {key}, are not in it")
        segment = segments[key]
        return program.data[segment.start : segment.start + segment.size]

    for plan in program.plans:
        name = inspect._text(plan.Name())
        if name not in (VISION_ENCODER, TEXT_DECODER):
            continue
        delegates = list(inspect._items(plan.DelegatesLength(), plan.Delegates))
        found = []
        for kind, call in program.instructions(plan):
            if kind != "DelegateCall":
                continue
            delegate = delegates[call.DelegateIndex()]
            for spec in inspect._items(delegate.CompileSpecsLength(), delegate.CompileSpecs):
                if inspect._text(spec.Key()) == LINEAR_SPEC:
                    sizes = bytes(inspect._bytes(spec.ValueAsNumpy())).decode().split()
                    in_features, out_features, group_size = map(int, sizes[:3])
                    weight, scales = data(sizes[3]), data(sizes[4])
                    found.append(_checked(path, in_features, out_features, group_size, weight, scales))
        yield name, found


def _checked(
    path: Path, in_features: int, out_features: int, group_size: int, weight: memoryview, scales: memoryview
) -> StoredLinear:
    """A linear whose data have the sizes that it needs; what is stored may be padded."""
    count = in_features * out_features
    weight_size = count // 2 if group_size else count
    scales_size = 2 * count // group_size if group_size else 4 * out_features
    if len(weight) < weight_size or len(scales) < scales_size:
        raise ExportError(f"{path}: is broken: a linear {in_features} -> {out_features} has too few weights or scales")
    return StoredLinear(in_features, out_features, group_size, weight[:weight_size], scales[:scales_size])


def linear_names(model: MobileVLM, schemes: Mapping[str, Scheme], method: str) -> list[str]:
    """Names of a method's quantized linears, in the order in which they are run."""
    is_text = method == TEXT_DECODER
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and name in schemes
        and schemes[name].bits < 16
        and name.startswith("language_model.") == is_text
    ]


def weights_digest(linears: Iterable[tuple[str, Sequence[bytes | memoryview]]]) -> str:
    """``sha256:`` and a hash over names of linears, and the hash of what is stored of each."""
    return digest_of_hashes((name, [hashlib.sha256(part).hexdigest() for part in parts]) for name, parts in linears)


def digest_of_hashes(linears: Iterable[tuple[str, Sequence[str]]]) -> str:
    """:func:`weights_digest` where the parts' hashes are known."""
    digest = hashlib.sha256()
    for name, hashes in linears:
        digest.update(f"{name} {' '.join(hashes)}\n".encode())
    return f"sha256:{digest.hexdigest()}"


def digest_of_quantized(quantized: QuantizedCheckpoint, schemes: Mapping[str, Scheme]) -> str:
    """The digest of what the quantize stage has made; of what it has spooled, the hashes are known."""

    def hashes(name: str) -> list[str]:
        place = place_in_stack(f"{name}.weight")
        if place is None:
            weight: Tensor = quantized.model.get_submodule(name).weight
            return [hashlib.sha256(part).hexdigest() for part in packed_weight(weight)]
        stack, index, rest = place
        return [data.key.removeprefix("scale_") for data in quantized.stacks[stack][index].weights[rest]]

    names = [
        name for method in (VISION_ENCODER, TEXT_DECODER) for name in linear_names(quantized.model, schemes, method)
    ]
    return digest_of_hashes((name, hashes(name)) for name in names)
