"""What becomes integers, in which groups, and how close it stays."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import pytest
import torch
from random_checkpoint import RandomCheckpoint, Sizes
from torch import Tensor, nn
from torchao.quantization import IntxUnpackedToInt8Tensor

from mvlm.export.checkpoint import LoadedCheckpoint, load
from mvlm.export.errors import ExportError
from mvlm.export.models import MobileVLM
from mvlm.export.pipeline import quantize_checkpoint
from mvlm.export.quantize import QuantizationReport, fitting_group_size, quantize
from mvlm.export.recipe import Recipe

# 352 = 11 * 32: down_proj cannot have groups of 128.
SIZES = Sizes(
    hidden_size=256,
    intermediate_size=352,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    num_hidden_layers=2,
)
LANGUAGE_LINEARS = 2 * 7 + 1
VISION_LINEARS = 6 + 2 + 2 * 3  # one block; LDP: two linears, then fc1, fc2 and pointwise of two residuals


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> LoadedCheckpoint:
    """In float32; tests quantize copies of its model."""
    return load(str(RandomCheckpoint.make(SIZES).write(tmp_path_factory.mktemp("checkpoint"))))


@pytest.fixture(scope="module")
def quantized(checkpoint) -> tuple[MobileVLM, QuantizationReport]:
    model = copy.deepcopy(checkpoint.model)
    return model, quantize(model, Recipe())


def linears(module: nn.Module) -> dict[str, nn.Linear]:
    return {name: child for name, child in module.named_modules() if isinstance(child, nn.Linear)}


def snr_db(reference: Tensor, other: Tensor) -> float:
    """Power of the signal over that of the error, in dB."""
    return 10 * math.log10(reference.square().sum() / (reference - other).square().sum())


@pytest.mark.parametrize(
    ("in_features", "group_size", "expected"),
    [
        (2048, 128, 128),  # MobileLLaMA-1.4B's widths
        (5632, 128, 128),
        (2560, 128, 128),  # and 2.7B's
        (6912, 128, 128),
        (5632, 1024, 512),
        (704, 128, 64),
        (96, 128, 32),
        (96, 32, 32),
        (64, 64, 64),
        (32, 1 << 20, 32),
    ],
)
def test_fitting_group_size(in_features, group_size, expected):
    assert fitting_group_size("lm_head", in_features, group_size) == expected


@pytest.mark.parametrize("in_features", [16, 48, 80, 1000])
def test_no_group_size_fits(in_features):
    message = f"layers.0.mlp.down_proj: its input width {in_features} is not a multiple .* from 128 down to 32"
    with pytest.raises(ExportError, match=message):
        fitting_group_size("layers.0.mlp.down_proj", in_features, 128)


def test_model_whose_width_fits_no_group(tmp_path):
    sizes = Sizes(intermediate_size=80)
    model = load(str(RandomCheckpoint.make(sizes).write(tmp_path))).model
    with pytest.raises(ExportError, match=r"language_model\.layers\.0\.mlp\.down_proj: its input width 80"):
        quantize(model, Recipe())
    assert not any(isinstance(p, IntxUnpackedToInt8Tensor) for p in model.parameters()), "it is left as it was"


def test_language_linears_have_4_bits(quantized):
    model, report = quantized
    found = linears(model.language_model)
    assert len(found) == LANGUAGE_LINEARS
    assert {f"language_model.{name}" for name in found} == set(report.group_sizes)
    for name, linear in found.items():
        weight = linear.weight
        group_size = 32 if name.endswith("down_proj") else 128
        assert isinstance(weight, IntxUnpackedToInt8Tensor)
        assert weight.target_dtype == torch.int4
        assert weight.qdata.min() >= -8
        assert weight.qdata.max() <= 7
        assert weight.qdata.unique().numel() > 12, "the range is used"
        assert tuple(weight.block_size) == (1, group_size)
        assert weight.scale.shape == (linear.out_features, linear.in_features // group_size)
        assert not weight.zero_point.any()
        assert weight.activation_quantization == "int8_asym_per_token"
        assert report.group_sizes[f"language_model.{name}"] == group_size


def test_scales_are_what_xnnpack_stores(quantized):
    """Group scales are bfloat16 already, so that eager arithmetic is the device's."""
    model, _ = quantized
    for linear in linears(model.language_model).values():
        weight = linear.weight
        assert weight.scale.dtype == torch.bfloat16
        scale = weight.scale.float().repeat_interleave(weight.block_size[1], dim=1)
        assert torch.equal(weight.dequantize().float(), weight.qdata.float() * scale)


def test_vision_linears_have_8_bits(quantized):
    model, report = quantized
    found = {
        f"{part}.{name}": linear
        for part in ("vision_tower", "mm_projector")
        for name, linear in linears(getattr(model, part)).items()
    }
    assert len(found) == VISION_LINEARS
    assert set(found) == set(report.int8_linears)
    for linear in found.values():
        weight = linear.weight
        assert isinstance(weight, IntxUnpackedToInt8Tensor)
        assert weight.target_dtype == torch.int8
        assert weight.scale.numel() == linear.out_features
        assert weight.activation_quantization == "int8_asym_per_token"


def test_embedding_has_8_bits_and_a_scale_per_row(quantized):
    weight = quantized[0].language_model.embed_tokens.weight
    assert isinstance(weight, IntxUnpackedToInt8Tensor)
    assert weight.target_dtype == torch.int8
    assert weight.scale.numel() == SIZES.vocab_size
    assert weight.activation_quantization is None


def test_all_else_stays_float32(quantized):
    model, _ = quantized
    integers = {id(child.weight) for child in model.modules() if isinstance(child, nn.Linear)}
    integers.add(id(model.language_model.embed_tokens.weight))
    rest = {name: parameter for name, parameter in model.named_parameters() if id(parameter) not in integers}
    assert {
        "vision_tower.embeddings.patch_embedding.weight",
        "vision_tower.embeddings.position_embedding.weight",
        "mm_projector.blocks.0.depthwise.conv.weight",
        "mm_projector.blocks.1.pointwise_norm.bias",
        "language_model.layers.1.input_layernorm.weight",
        "language_model.norm.weight",
    } <= set(rest)
    for parameter in rest.values():
        assert not isinstance(parameter, IntxUnpackedToInt8Tensor)
        assert parameter.dtype == torch.float32


def test_report_of_smaller_groups(checkpoint, quantized):
    assert quantized[1].smaller_groups(Recipe()) == {32: ["mlp.down_proj"]}

    said: list[str] = []
    copied = copy.copy(checkpoint)
    object.__setattr__(copied, "model", copy.deepcopy(checkpoint.model))
    quantize_checkpoint(copied, Recipe(group_size=256), said.append)
    assert said == [
        "  group size 32 instead of 256 for mlp.down_proj: their width wants it",
    ]


@pytest.mark.parametrize("projector", ["linear", "ldpnetv2", "mlp2x_gelu"])
def test_other_projectors(projector, tmp_path):
    model = load(str(RandomCheckpoint.make(Sizes(projector=projector)).write(tmp_path))).model
    report = quantize(model, Recipe())
    count = 1 if projector == "linear" else 2
    assert sum(name.startswith("mm_projector") for name in report.int8_linears) == count
    assert all(isinstance(child.weight, IntxUnpackedToInt8Tensor) for child in linears(model).values())


def test_how_close_it_stays(checkpoint, quantized):
    before, after = checkpoint.model, quantized[0]
    ours, theirs = linears(before), linears(after)
    for name, linear in ours.items():
        least = 15 if name.startswith("language_model") else 30
        assert snr_db(linear.weight, theirs[name].weight.dequantize()) >= least, name

    embedding = before.language_model.embed_tokens.weight
    assert snr_db(embedding, after.language_model.embed_tokens.weight.dequantize()) >= 30

    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    assert snr_db(before.encode_image(pixels), after.encode_image(pixels)) >= 30

    embeddings = torch.randn(1, 9, SIZES.hidden_size, generator=torch.Generator().manual_seed(1))
    assert snr_db(before(embeddings), after(embeddings)) >= 10


def test_hqq_lowers_the_weight_error(checkpoint, quantized):
    model = copy.deepcopy(checkpoint.model)
    quantize(model, Recipe(scales="affine"))

    def error(quantized_model: MobileVLM) -> float:
        pairs = zip(
            linears(checkpoint.model.language_model).values(),
            linears(quantized_model.language_model).values(),
            strict=True,
        )
        return sum((a.weight - b.weight.dequantize()).square().sum().item() for a, b in pairs)

    assert error(quantized[0]) < error(model)
