"""Quantize: a loaded model's linears and embedding become integers, in place.

The scheme, after ExecuTorch's for Llama (8da4w):

- the language model's linears and lm_head: 4-bit weights in groups along the input width, 8-bit activations quantized
  per token as they come. XNNPACK stores group scales as bfloat16, so they are rounded to bfloat16 here already and
  the eager quantized model computes what the device computes;
- the token embedding: 8-bit, one scale per row;
- linears of the vision tower and the projector: 8-bit weights with one scale per output channel, 8-bit dynamic
  activations. Convolutions stay float32: XNNPACK has no dynamically quantized depthwise convolution.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import nn
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerAxis, PerGroup

from mvlm.export.errors import ExportError
from mvlm.export.models import MobileVLM
from mvlm.export.recipe import SCALE_ALGORITHMS, Recipe

#: XNNPACK's smallest group of 4-bit weights.
MIN_GROUP_SIZE = 32


@dataclass(frozen=True)
class QuantizationReport:
    """What was quantized.

    Attributes:
        group_sizes: of every 4-bit linear, by its name in the model.
        int8_linears: names of the 8-bit linears.
    """

    group_sizes: dict[str, int]
    int8_linears: tuple[str, ...]

    def smaller_groups(self, recipe: Recipe) -> dict[int, list[str]]:
        """Group size -> the kinds of layers that could not have the recipe's, e.g. ``{64: ['mlp.down_proj']}``."""
        kinds: dict[int, set[str]] = defaultdict(set)
        for name, group_size in self.group_sizes.items():
            if group_size != recipe.group_size:
                kinds[group_size].add(".".join(name.split(".")[-2:]))
        return {group_size: sorted(names) for group_size, names in sorted(kinds.items())}


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


def _linears(module: nn.Module, prefix: str) -> dict[str, nn.Linear]:
    return {
        f"{prefix}.{name}" if name else prefix: child
        for name, child in module.named_modules()
        if isinstance(child, nn.Linear)
    }


def quantize(model: MobileVLM, recipe: Recipe) -> QuantizationReport:
    """Quantizes ``model`` in place by ``recipe``.

    Raises:
        ExportError: a linear of the language model whose width no group size divides.
    """
    language_linears = _linears(model.language_model, "language_model")
    group_sizes = {
        name: fitting_group_size(name, linear.in_features, recipe.group_size)
        for name, linear in language_linears.items()
    }
    for group_size in sorted(set(group_sizes.values())):
        chosen = {linear for name, linear in language_linears.items() if group_sizes[name] == group_size}
        quantize_(
            model,
            Int8DynamicActivationIntxWeightConfig(
                weight_dtype=torch.int4,
                weight_granularity=PerGroup(group_size),
                weight_scale_dtype=torch.bfloat16,
                intx_choose_qparams_algorithm=SCALE_ALGORITHMS[recipe.scales],
            ),
            filter_fn=lambda module, _name, chosen=chosen: module in chosen,
        )

    vision_linears = _linears(model.vision_tower, "vision_tower") | _linears(model.mm_projector, "mm_projector")
    chosen = set(vision_linears.values())
    quantize_(
        model,
        Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int8, weight_granularity=PerAxis(0)),
        filter_fn=lambda module, _name: module in chosen,
    )
    quantize_(
        model,
        IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0)),
        filter_fn=lambda module, _name: module is model.language_model.embed_tokens,
    )
    return QuantizationReport(group_sizes, tuple(vision_linears))
