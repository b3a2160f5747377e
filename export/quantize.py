"""Quantize: linears and the token embedding become integers, one at a time.

The scheme, after ExecuTorch's for Llama (8da4w):

- the language model's linears: 4-bit weights in groups along the input width, 8-bit activations quantized per token as
  they come. XNNPACK stores group scales as bfloat16, so they are rounded to bfloat16 here already and the eager
  quantized model computes what the device computes. lm_head may have 8 bits;
- the token embedding: 8-bit, one scale per row; or 4-bit in groups, or float32;
- linears of the vision tower and the projector, the embedding of patches among them: 8-bit weights with one scale per
  output channel, 8-bit dynamic activations; or 4-bit as above, or float32. Beside 8 bits the squeeze-and-excitation's
  have 4, because they make gates between 0 and 1, in which errors count little (0.5 dB of the demo model's picture
  features). The tower's positions are float16. Depthwise convolutions stay float32: XNNPACK has none that is
  dynamically quantized.

:func:`quantize` does it to a whole model in memory, which is what files are checked against.
:func:`quantize_checkpoint` does the same to a checkpoint, reading, quantizing and packing one tensor after another, so
that the model never exists as a whole: that is what is exported.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn
from torchao.quantization import (
    Int8DynamicActivationIntxWeightConfig,
    IntxUnpackedToInt8Tensor,
    IntxWeightOnlyConfig,
    quantize_,
)
from torchao.quantization.granularity import PerAxis, PerGroup

from mvlm.export.checkpoint import Checkpoint
from mvlm.export.errors import ExportError
from mvlm.export.models import MobileVLM, PatchEmbedding
from mvlm.export.progress import Progress, return_freed_memory
from mvlm.export.recipe import Recipe
from mvlm.export.report import LayerQuantization
from mvlm.export.scales import choose_scales_hqq, round_to_scales, search_scales
from mvlm.export.spool import NamedData, Spool, packed_weight, spool_weight

#: XNNPACK's smallest group of 4-bit weights.
MIN_GROUP_SIZE = 32
#: Group of a 4-bit embedding, which ExecuTorch's own kernel reads.
EMBEDDING_GROUP_SIZE = 32

#: Weights are quantized in blocks of about this many, which fit a core's cache together with what is computed of them:
#: ten times as fast as whole matrices, and the temporaries stay small.
BLOCK_ELEMENTS = 1 << 19

#: The learned positions of the vision tower.
POSITION_EMBEDDING = "vision_tower.embeddings.position_embedding"

#: Stacks of identical layers. Their weights go to the spool; everything else is small enough to stay in memory.
STACKS = ("vision_tower.encoder.layers", "language_model.layers")


T = TypeVar("T")


@dataclass(frozen=True)
class Scheme:
    """How one weight is stored.

    Attributes:
        bits: 4, 8, 16 for float16, or 32 for float32.
        group_size: weights that share a scale along the input width; None for one scale per row.
        scales: one of :data:`recipe.SCALE_ALGORITHMS`.
        is_embedding: a table that is looked up, whose activations there is nothing to quantize of.
    """

    bits: int
    group_size: int | None = None
    scales: str = "affine"
    is_embedding: bool = False

    def __str__(self) -> str:
        if self.bits >= 16:
            return f"float{self.bits}"
        per = "row" if self.is_embedding else "output channel"
        share = f"groups of {self.group_size}, {self.scales}" if self.group_size else f"one scale per {per}"
        return f"int{self.bits}, {share}"

    @cached_property
    def config(self) -> Int8DynamicActivationIntxWeightConfig | IntxWeightOnlyConfig:
        """torchao's configuration of it; torchao does not know the search for scales."""
        dtype = {4: torch.int4, 8: torch.int8}[self.bits]
        granularity = PerGroup(self.group_size) if self.group_size else PerAxis(0)
        if self.is_embedding:
            return IntxWeightOnlyConfig(weight_dtype=dtype, granularity=granularity)
        return Int8DynamicActivationIntxWeightConfig(
            weight_dtype=dtype,
            weight_granularity=granularity,
            weight_scale_dtype=torch.bfloat16 if self.group_size else None,
            intx_choose_qparams_algorithm="hqq_scale_only" if self.scales == "hqq" else "affine",
        )


def fitting_group_size(name: str, in_features: int, group_size: int) -> int:
    """The largest of ``group_size``, its half, quarter, … down to 32 that divides ``in_features``.

    Raises:
        ExportError: none does.
    """
    candidate = group_size
    while candidate >= MIN_GROUP_SIZE:
        if in_features % candidate == 0:
            return candidate
        candidate //= 2
    raise ExportError(
        f"{name}: its input width {in_features} is not a multiple of any group size from {group_size} down to "
        f"{MIN_GROUP_SIZE}, so it cannot be quantized to 4 bits in groups"
    )


def scheme_of(name: str, module: nn.Module, recipe: Recipe) -> Scheme | None:
    """How ``recipe`` stores the weight of a module of :class:`MobileVLM`; None for modules it leaves alone.

    Raises:
        ExportError: 4 bits are wanted for a weight whose width no group size divides.
    """
    if name == "language_model.embed_tokens":
        if recipe.embedding_bits == 4:
            group_size = fitting_group_size(name, module.embedding_dim, EMBEDDING_GROUP_SIZE)
            return Scheme(4, group_size, is_embedding=True)
        return Scheme(recipe.embedding_bits, is_embedding=True)
    if name == POSITION_EMBEDDING and recipe.vision != "fp32":
        return Scheme(16, is_embedding=True)
    if not isinstance(module, nn.Linear):
        return None
    if name == "language_model.lm_head":
        bits = recipe.lm_head_bits
    elif name.startswith("language_model."):
        bits = 8 if name in recipe.eight_bit_linears else 4
    else:
        bits = {"int4": 4, "int8": 8, "fp32": 32}[recipe.vision]
        if isinstance(module, PatchEmbedding):
            bits = max(bits, 8)  # no group size divides 3 * 14 * 14
        elif ".squeeze_excite." in name and bits == 8 and module.in_features % MIN_GROUP_SIZE == 0:
            bits = 4
    if bits == 4:
        return Scheme(4, fitting_group_size(name, module.in_features, recipe.group_size), recipe.scales)
    return Scheme(bits)


def schemes_of(model: MobileVLM, recipe: Recipe) -> dict[str, Scheme]:
    """The scheme of every weight that has one, by its module's name. The model may be on the meta device."""
    return {
        name: scheme
        for name, module in model.named_modules()
        if (scheme := scheme_of(name, module, recipe)) is not None
    }


class Calibration(Protocol):
    """What calibration has found out about linears; see :mod:`mvlm.export.calibrate`."""

    def weight(self, name: str) -> IntxUnpackedToInt8Tensor | None:
        """The quantized weight of the linear ``name``; None where calibration did not quantize it."""

    def importance(self, name: str) -> Tensor | None:
        """The second moment [in] of each input of the linear ``name``; None where it is not known."""


def quantized_tensor(values: Tensor, scales: Tensor, scheme: Scheme) -> IntxUnpackedToInt8Tensor:
    """A linear's weight as torchao holds it.

    Args:
        values: int8 [out, in].
        scales: [out, groups]; one group where a row has one scale.
        scheme: how it is stored.
    """
    return IntxUnpackedToInt8Tensor(
        qdata=values,
        scale=scales.to(torch.bfloat16 if scheme.group_size else torch.float32),
        zero_point=torch.zeros_like(scales, dtype=torch.int8),
        target_dtype=torch.int4 if scheme.bits == 4 else torch.int8,
        block_size=(1, scheme.group_size or values.shape[1]),
        dtype=torch.float32,
        activation_quantization="int8_asym_per_token",
    )


def quantize_weight(weight: Tensor, scheme: Scheme, importance: Tensor | None = None) -> tuple[Tensor, float]:
    """Quantizes one weight.

    Args:
        weight: float32 [out, in].
        scheme: how it is stored.
        importance: [in], what the errors of the weights are weighted with where scales are searched for; all are
            equal by default.

    Returns:
        The weight as torchao holds it, or a plain tensor for float16 and float32, and its SNR in dB against the
        original.
    """
    if scheme.bits == 32:
        return weight, math.inf
    if scheme.bits == 16:
        half = weight.half()
        return half, _snr_db(float(weight.square().sum()), float((weight - half.float()).square().sum()))
    if scheme.scales == "search" and scheme.group_size and not scheme.is_embedding:
        importance = torch.ones(weight.shape[1]) if importance is None else importance
        scales = search_scales(weight, importance, scheme.group_size, scheme.bits, torch.bfloat16)
        whole = quantized_tensor(round_to_scales(weight, scales, scheme.bits), scales, scheme)
        return whole, snr_db(weight, whole)
    blocks = [_quantize_block(block, scheme) for block in weight.split(max(1, BLOCK_ELEMENTS // weight.shape[1]))]
    first = blocks[0]
    whole = IntxUnpackedToInt8Tensor(
        *(torch.cat([getattr(block, part) for block in blocks]) for part in first.tensor_data_names),
        *(getattr(first, attribute) for attribute in first.tensor_attribute_names),
    )
    return whole, snr_db(weight, whole)


def snr_db(weight: Tensor, quantized: IntxUnpackedToInt8Tensor) -> float:
    """Signal-to-noise ratio in dB of a quantized weight against the one [out, in] that it was made of."""
    rows = max(1, BLOCK_ELEMENTS // weight.shape[1])
    signal = noise = 0.0
    for start in range(0, len(weight), rows):
        block = weight[start : start + rows]
        values = quantized.qdata[start : start + rows].float().view(len(block), quantized.scale.shape[1], -1)
        restored = (values * quantized.scale[start : start + rows].float().unsqueeze(-1)).view(block.shape)
        signal += float(block.square().sum(dtype=torch.float64))
        noise += float((block - restored).square().sum(dtype=torch.float64))
    return _snr_db(signal, noise)


def _snr_db(signal: float, noise: float) -> float:
    return math.inf if noise == 0 else 10 * math.log10(max(signal, 1e-300) / noise)


def _quantize_block(block: Tensor, scheme: Scheme) -> IntxUnpackedToInt8Tensor:
    if scheme.scales == "hqq" and scheme.group_size:
        return quantized_tensor(*choose_scales_hqq(block, scheme.group_size), scheme)
    rows, columns = block.shape
    with torch.device("meta"):
        holder: nn.Module = nn.Embedding(rows, columns) if scheme.is_embedding else nn.Linear(columns, rows, bias=False)
    holder.weight = nn.Parameter(block, requires_grad=False)
    quantize_(holder, scheme.config, filter_fn=lambda module, _name: module is holder)
    return holder.weight


def _layer_report(name: str, weight: Tensor, scheme: Scheme, snr_db: float) -> LayerQuantization:
    return LayerQuantization(
        name, kind_of(name), str(scheme), tuple(weight.shape), snr_db, stored_bytes(scheme, weight)
    )


def stored_bytes(scheme: Scheme, weight: Tensor) -> int:
    """Bytes in the .pte of a weight [out, in] that is stored by ``scheme``; its scales included."""
    if scheme.bits >= 16:
        return scheme.bits // 8 * weight.numel()
    num_scales = weight.numel() // (scheme.group_size or weight.shape[1])
    # XNNPACK's groups have bfloat16 scales, all else float32.
    bytes_per_scale = 2 if scheme.group_size and not scheme.is_embedding else 4
    return weight.numel() * scheme.bits // 8 + num_scales * bytes_per_scale


def kind_of(name: str) -> str:
    """What layers of one sort are called, e.g. ``language_model mlp.up_proj``; others go by their own name."""
    for stack in (*STACKS, "mm_projector.blocks"):
        if name.startswith(stack + "."):
            part, (_, _, rest) = stack.partition(".")[0], name[len(stack) + 1 :].partition(".")
            return f"{part} {rest}"
    return name


def smaller_groups(schemes: Mapping[str, Scheme], recipe: Recipe) -> dict[int, list[str]]:
    """Group size -> the kinds of layers that could not have the recipe's, e.g. ``{64: ['mlp.down_proj']}``."""
    kinds: dict[int, set[str]] = defaultdict(set)
    for name, scheme in schemes.items():
        if scheme.group_size and not scheme.is_embedding and scheme.group_size != recipe.group_size:
            kinds[scheme.group_size].add(".".join(name.split(".")[-2:]))
    return {group_size: sorted(names) for group_size, names in sorted(kinds.items())}


def quantize(model: MobileVLM, recipe: Recipe, calibration: Calibration | None = None) -> tuple[LayerQuantization, ...]:
    """Quantizes a whole model in place.

    Raises:
        ExportError: a weight whose width no group size divides; the model is left as it was.
    """
    layers = []
    for name, scheme in schemes_of(model, recipe).items():
        module = model.get_submodule(name)
        weight, snr_db = quantize_linear(name, module.weight.detach(), scheme, calibration)
        module.weight = nn.Parameter(weight, requires_grad=False)
        layers.append(_layer_report(name, weight, scheme, snr_db))
    return tuple(layers)


def quantize_linear(name: str, weight: Tensor, scheme: Scheme, calibration: Calibration | None) -> tuple[Tensor, float]:
    """:func:`quantize_weight` of the weight [out, in] of a module, as calibration has found it should be."""
    if calibration is None:
        return quantize_weight(weight, scheme)
    calibrated = calibration.weight(name)
    if calibrated is not None:
        return calibrated, snr_db(weight, calibrated)
    return quantize_weight(weight, scheme, calibration.importance(name))


@dataclass(frozen=True)
class StackedLayer:
    """The weights of one layer of a stack, by their names in the layer.

    Attributes:
        weights: of linears, as their delegates find them.
        floats: all other parameters: norms' weights and biases, and linears' biases; float32.
    """

    weights: dict[str, list[NamedData]]
    floats: dict[str, Tensor]


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """What the quantize stage hands on.

    Attributes:
        checkpoint: that was quantized.
        recipe: by which.
        model: real and quantized but for the layers of the :data:`STACKS`, which stay on the meta device.
        stacks: the layers of each stack, in order.
        layers: what was done to every weight.
    """

    checkpoint: Checkpoint
    recipe: Recipe
    model: MobileVLM
    stacks: dict[str, list[StackedLayer]]
    layers: tuple[LayerQuantization, ...]


def meta_model(checkpoint: Checkpoint) -> MobileVLM:
    """The checkpoint's model without any weights."""
    with torch.device("meta"):
        return MobileVLM(checkpoint.config).eval().requires_grad_(False)


def quantize_checkpoint(
    checkpoint: Checkpoint,
    recipe: Recipe,
    spool: Spool,
    progress: Progress,
    calibration: Calibration | None = None,
) -> QuantizedCheckpoint:
    """Quantizes a checkpoint tensor by tensor; only those being worked on are in memory as float32, one per core.

    Raises:
        ExportError: a weight whose width no group size divides.
        OSError: the disk of the spool is full.
    """
    model = meta_model(checkpoint)
    schemes = schemes_of(model, recipe)
    stacks: dict[str, list[StackedLayer]] = {}
    reports = []
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    total = sum(shape.numel() for shape in shapes.values())
    done = 0

    def work(name: str) -> tuple[Tensor | list[NamedData], LayerQuantization | None]:
        tensor = checkpoint.read(name)
        module_name = name.removesuffix(".weight")
        scheme = schemes.get(module_name) if name.endswith(".weight") else None
        if scheme is None:
            return tensor, None
        weight, snr_db = quantize_linear(module_name, tensor, scheme, calibration)
        del tensor
        report = _layer_report(module_name, weight, scheme, snr_db)
        return_freed_memory()
        return (spool_weight(weight, spool) if place_in_stack(name) else weight), report

    for name, (result, report) in zip(shapes, _map_on_all_cores(work, shapes), strict=True):
        if report is not None:
            reports.append(report)
        place = place_in_stack(name)
        if place is None:
            _set_parameter(model, name, result)
        else:
            stack, index, rest = place
            stacked = stacks.setdefault(stack, [])
            if index == len(stacked):
                stacked.append(StackedLayer({}, {}))
            (stacked[index].floats if report is None else stacked[index].weights)[rest] = result
        done += shapes[name].numel()
        progress.share(done / total)
    return QuantizedCheckpoint(checkpoint, recipe, model, stacks, tuple(reports))


def quantize_parameters(checkpoint: Checkpoint, recipe: Recipe, calibration: Calibration | None = None) -> MobileVLM:
    """The whole model as :func:`quantize` would leave it, quantized as it is read: never in memory as float32.

    Raises:
        ExportError: a weight whose width no group size divides.
    """
    model = meta_model(checkpoint)
    schemes = schemes_of(model, recipe)
    for name, _ in list(model.named_parameters()):
        tensor = checkpoint.read(name)
        module_name = name.removesuffix(".weight")
        if name.endswith(".weight") and module_name in schemes:
            tensor, _ = quantize_linear(module_name, tensor, schemes[module_name], calibration)
        _set_parameter(model, name, tensor)
        return_freed_memory()
    return model


def _map_on_all_cores(work: Callable[[str], T], names: Iterable[str]) -> Iterator[T]:
    """``map``, a thread per core, each with torch's work on one tensor to itself: no core waits for another."""
    workers = torch.get_num_threads()
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            yield from pool.map(work, names)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def place_in_stack(name: str) -> tuple[str, int, str] | None:
    """Of a parameter's name: the stack, the number of the layer in it, and the name in the layer."""
    for stack in STACKS:
        if name.startswith(stack + "."):
            index, _, rest = name[len(stack) + 1 :].partition(".")
            return stack, int(index), rest
    return None


def _set_parameter(model: nn.Module, name: str, tensor: Tensor) -> None:
    module_name, _, parameter_name = name.rpartition(".")
    setattr(model.get_submodule(module_name), parameter_name, nn.Parameter(tensor, requires_grad=False))


def layer_storage(quantized: QuantizedCheckpoint, stack: str, index: int) -> tuple[Scheme | None, ...]:
    """How each linear of a layer is stored; equal for layers of a stack that are stored alike."""
    return tuple(
        scheme_of(f"{stack}.{index}.{name}", module, quantized.recipe)
        for name, module in quantized.model.get_submodule(stack)[index].named_modules()
    )


def template_layer(quantized: QuantizedCheckpoint, stack: str, index: int) -> tuple[nn.Module, dict[str, list[bytes]]]:
    """A layer with arbitrary weights, quantized like layer ``index`` of a stack, to be lowered in its place.

    No two of its tensors are equal, so that each is known by its bytes wherever it comes out of the lowering.

    Returns:
        The layer, and the bytes of each of its parameters as XNNPACK stores them.
    """
    layer = quantized.model.get_submodule(stack)[index]
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        template = type(layer)(layer_config(quantized, stack)).eval().requires_grad_(False)
    parts = {}
    for name, parameter in list(template.named_parameters()):
        tensor = torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
        scheme = None
        if name.endswith(".weight"):
            module_name = name.removesuffix(".weight")
            scheme = scheme_of(f"{stack}.{index}.{module_name}", template.get_submodule(module_name), quantized.recipe)
        if scheme is not None:
            # How scales are chosen makes no difference to the lowering.
            tensor, _ = quantize_weight(tensor, replace(scheme, scales="affine"))
        _set_parameter(template, name, tensor)
        parts[name] = packed_weight(tensor)
    return template, parts


def layer_config(quantized: QuantizedCheckpoint, stack: str):
    config = quantized.model.config
    return config.text if stack.startswith("language_model") else config.vision
