"""What becomes integers, in which groups, and how close it stays."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from random_checkpoint import RandomCheckpoint, Sizes
from torch import Tensor, nn
from torchao.quantization import IntxUnpackedToInt8Tensor, quantize_

from mvlm.export import quantize as quantizing
from mvlm.export.checkpoint import Checkpoint, open_checkpoint
from mvlm.export.errors import ExportError
from mvlm.export.models import MobileVLM
from mvlm.export.progress import Progress
from mvlm.export.quantize import (
    Scheme,
    choose_scales_hqq,
    fitting_group_size,
    quantize,
    quantize_checkpoint,
    quantize_weight,
    schemes_of,
    smaller_groups,
)
from mvlm.export.recipe import Recipe
from mvlm.export.report import LayerQuantization
from mvlm.export.spool import Spool, SpooledData, packed_weight

# 352 = 11 * 32: down_proj cannot have groups of 128.
SIZES = Sizes(
    hidden_size=256,
    intermediate_size=352,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    num_hidden_layers=2,
)
#: All linears of the language model, lm_head too, in groups of 128 where their width allows it.
FOUR_BITS = Recipe(group_size=128, lm_head_bits=4)
#: One linear of one layer is an exception.
EIGHT_BIT_DOWN = Recipe(eight_bit_linears=("language_model.layers.0.mlp.down_proj",))
LANGUAGE_LINEARS = 2 * 4 + 1
VISION_LINEARS = 1 + 4 + 2 + 2 * 3  # patches; one block; LDP: two linears, then fc1, fc2 and pointwise of two residuals


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Checkpoint:
    return open_checkpoint(str(RandomCheckpoint.make(SIZES).write(tmp_path_factory.mktemp("checkpoint"))))


@pytest.fixture(scope="module")
def float32(checkpoint) -> MobileVLM:
    """Tests quantize copies of it."""
    return checkpoint.load_model()


@pytest.fixture(scope="module")
def quantized(float32) -> tuple[MobileVLM, dict[str, LayerQuantization]]:
    model = copy.deepcopy(float32)
    return model, {layer.name: layer for layer in quantize(model, FOUR_BITS)}


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
    model = open_checkpoint(str(RandomCheckpoint.make(sizes).write(tmp_path))).load_model()
    with pytest.raises(ExportError, match=r"language_model\.layers\.0\.mlp\.down_proj: its input width 80"):
        quantize(model, Recipe())
    assert not any(isinstance(p, IntxUnpackedToInt8Tensor) for p in model.parameters()), "it is left as it was"


def test_language_linears_have_4_bits(quantized):
    model, report = quantized
    found = linears(model.language_model)
    assert len(found) == LANGUAGE_LINEARS
    assert {f"language_model.{name}" for name in found} < set(report)
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
        assert report[f"language_model.{name}"].scheme == f"int4, groups of {group_size}, search"


def test_scales_are_what_xnnpack_stores(quantized):
    """Group scales are bfloat16 already, so that eager arithmetic is the device's."""
    model, _ = quantized
    for linear in linears(model.language_model).values():
        weight = linear.weight
        assert weight.scale.dtype == torch.bfloat16
        scale = weight.scale.float().repeat_interleave(weight.block_size[1], dim=1)
        assert torch.equal(weight.dequantize().float(), weight.qdata.float() * scale)


def test_vision_linears_have_8_bits_and_gates_4(quantized):
    model, report = quantized
    found = {
        f"{part}.{name}": linear
        for part in ("vision_tower", "mm_projector")
        for name, linear in linears(getattr(model, part)).items()
    }
    assert len(found) == VISION_LINEARS
    positions = {"vision_tower.embeddings.position_embedding"}
    assert set(found) | positions == {name for name in report if not name.startswith("language_model")}
    assert sum("squeeze_excite" in name for name in found) == 4
    for name, linear in found.items():
        weight = linear.weight
        assert isinstance(weight, IntxUnpackedToInt8Tensor)
        assert weight.activation_quantization == "int8_asym_per_token"
        if "squeeze_excite" in name:
            assert weight.target_dtype == torch.int4
        else:
            assert weight.target_dtype == torch.int8
            assert weight.scale.numel() == linear.out_features


def test_positions_are_float16(float32, quantized):
    model, report = quantized
    name = "vision_tower.embeddings.position_embedding"
    positions = model.get_submodule(name).weight
    assert positions.dtype == torch.float16
    assert torch.equal(positions, float32.get_submodule(name).weight.half())
    assert report[name].scheme == "float16"
    assert report[name].num_bytes == 2 * positions.numel()
    assert 60 < report[name].snr_db < 90


def test_patches_have_8_bits_when_the_rest_has_4(float32):
    schemes = schemes_of(float32, Recipe(vision="int4"))
    assert schemes["vision_tower.embeddings.patch_embedding"].bits == 8
    assert schemes["vision_tower.encoder.layers.0.mlp.fc1"].bits == 4


def test_vision_in_float32(float32):
    schemes = schemes_of(float32, Recipe(vision="fp32"))
    assert {scheme.bits for name, scheme in schemes.items() if not name.startswith("language_model.")} == {32}
    assert "vision_tower.embeddings.position_embedding" not in schemes


def test_gates_whose_width_fits_no_group_have_8_bits(tmp_path):
    model = open_checkpoint(str(RandomCheckpoint.make(Sizes()).write(tmp_path))).load_model()
    schemes = schemes_of(model, Recipe())
    assert schemes["mm_projector.blocks.0.squeeze_excite.fc1"].bits == 4, "64 wide"
    assert schemes["mm_projector.blocks.0.squeeze_excite.fc2"].bits == 8, "16 wide"


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
    integers.add(id(model.vision_tower.embeddings.position_embedding.weight))
    rest = {name: parameter for name, parameter in model.named_parameters() if id(parameter) not in integers}
    assert {
        "vision_tower.embeddings.class_embedding",
        "vision_tower.pre_layrnorm.weight",
        "mm_projector.blocks.0.depthwise.conv.weight",
        "mm_projector.blocks.1.pointwise_norm.bias",
        "language_model.layers.1.input_layernorm.weight",
        "language_model.norm.weight",
    } <= set(rest)
    for parameter in rest.values():
        assert not isinstance(parameter, IntxUnpackedToInt8Tensor)
        assert parameter.dtype == torch.float32


def test_smaller_groups(float32):
    assert smaller_groups(schemes_of(float32, FOUR_BITS), FOUR_BITS) == {
        32: ["mlp.down_proj"],
        64: ["squeeze_excite.fc2"],
    }
    recipe = Recipe(group_size=32, lm_head_bits=4)
    assert smaller_groups(schemes_of(float32, recipe), recipe) == {}
    recipe = Recipe(group_size=64, lm_head_bits=4, embedding_bits=4)
    assert smaller_groups(schemes_of(float32, recipe), recipe) == {32: ["mlp.down_proj"]}, "not the embedding"


@pytest.mark.parametrize("projector", ["linear", "ldpnetv2", "mlp2x_gelu"])
def test_other_projectors(projector, tmp_path):
    model = open_checkpoint(str(RandomCheckpoint.make(Sizes(projector=projector)).write(tmp_path))).load_model()
    layers = quantize(model, Recipe())
    count = 1 if projector == "linear" else 2
    assert sum(layer.name.startswith("mm_projector") for layer in layers) == count
    assert all(isinstance(child.weight, IntxUnpackedToInt8Tensor) for child in linears(model).values())


def test_how_close_it_stays(float32, quantized):
    before, after = float32, quantized[0]
    ours, theirs = linears(before), linears(after)
    for name, linear in ours.items():
        least = 15 if name.startswith("language_model") or "squeeze_excite" in name else 30
        assert snr_db(linear.weight, theirs[name].weight.dequantize()) >= least, name

    embedding = before.language_model.embed_tokens.weight
    assert snr_db(embedding, after.language_model.embed_tokens.weight.dequantize()) >= 30

    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    assert snr_db(before.encode_image(pixels), after.encode_image(pixels)) >= 30

    embeddings = torch.randn(1, 9, SIZES.hidden_size, generator=torch.Generator().manual_seed(1))
    assert snr_db(before(embeddings), after(embeddings)) >= 10


def test_better_scales_lower_the_weight_error(float32):
    def error(scales: str) -> float:
        model = copy.deepcopy(float32)
        quantize(model, replace(FOUR_BITS, scales=scales))
        pairs = zip(linears(float32.language_model).values(), linears(model.language_model).values(), strict=True)
        return sum((a.weight - b.weight.dequantize()).square().sum().item() for a, b in pairs)

    assert error("search") < error("hqq") < error("affine")


# -- against torchao --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_size", [32, 128])
@pytest.mark.parametrize("scales", ["affine", "hqq"])
def test_four_bits_are_torchaos(scales, group_size, monkeypatch):
    """In blocks and with our own search for scales, the same as torchao's ``quantize_`` on the whole matrix."""
    monkeypatch.setattr(quantizing, "BLOCK_ELEMENTS", 1000)
    weight = torch.randn(96, 256, generator=torch.Generator().manual_seed(0)) * 0.02
    weight[3] = 0
    weight[4, 100] = 5
    scheme = Scheme(4, group_size, scales)
    ours, snr = quantize_weight(weight, scheme)
    linear = nn.Linear(256, 96, bias=False)
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    quantize_(linear, scheme.config)
    theirs = linear.weight
    for attribute in theirs.tensor_attribute_names:
        assert getattr(ours, attribute) == getattr(theirs, attribute), attribute
    assert ours.scale.dtype == theirs.scale.dtype
    assert torch.equal(ours.zero_point, theirs.zero_point)
    # A block stops searching when its own scales stand still, the matrix when all do.
    assert (ours.qdata != theirs.qdata).float().mean() < 0.01
    assert abs(snr_db(weight, ours.dequantize()) - snr_db(weight, theirs.dequantize())) < 0.01
    if scales == "affine":
        assert torch.equal(ours.scale, theirs.scale)
    assert snr == pytest.approx(snr_db(weight, ours.dequantize()), abs=1e-3)


def test_eight_bits_are_torchaos():
    weight = torch.randn(96, 256, generator=torch.Generator().manual_seed(0))
    for scheme, holder in (
        (Scheme(8), nn.Linear(256, 96, bias=False)),
        (Scheme(8, is_embedding=True), nn.Embedding(96, 256)),
        (Scheme(4, 32, is_embedding=True), nn.Embedding(96, 256)),
    ):
        holder.weight = nn.Parameter(weight.clone(), requires_grad=False)
        quantize_(holder, scheme.config, filter_fn=lambda *_: True)
        ours, _ = quantize_weight(weight, scheme)
        assert torch.equal(ours.qdata, holder.weight.qdata)
        assert torch.equal(ours.scale, holder.weight.scale)


def test_hqq_stops_where_nothing_changes():
    """Weights that are multiples of a scale are found exactly."""
    values = torch.randint(-8, 8, (4, 64), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    values[:, ::32] = -8  # the largest, from which the search begins
    found, scale = choose_scales_hqq(values * 0.25, 32)
    assert torch.equal(found, values)
    assert torch.equal(scale, torch.full((4, 2), 0.25))


# -- recipes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "name", "scheme"),
    [
        (
            Recipe(group_size=32, lm_head_bits=4),
            "language_model.layers.0.mlp.gate_up_proj",
            "int4, groups of 32, search",
        ),
        (
            Recipe(group_size=128, lm_head_bits=4, scales="affine"),
            "language_model.layers.0.mlp.gate_up_proj",
            "int4, groups of 128, affine",
        ),
        (Recipe(group_size=256, lm_head_bits=4), "language_model.layers.0.mlp.down_proj", "int4, groups of 32, search"),
        (FOUR_BITS, "language_model.lm_head", "int4, groups of 128, search"),
        (Recipe(lm_head_bits=8), "language_model.lm_head", "int8, one scale per output channel"),
        (FOUR_BITS, "language_model.embed_tokens", "int8, one scale per row"),
        (Recipe(embedding_bits=4), "language_model.embed_tokens", "int4, groups of 32, affine"),
        (Recipe(embedding_bits=32), "language_model.embed_tokens", "float32"),
        (FOUR_BITS, "vision_tower.encoder.layers.0.mlp.fc1", "int8, one scale per output channel"),
        (
            Recipe(group_size=128, lm_head_bits=4, vision="int4"),
            "vision_tower.encoder.layers.0.mlp.fc1",
            "int4, groups of 128, search",
        ),
        (Recipe(group_size=128, lm_head_bits=4, vision="int4"), "mm_projector.mlp.0", "int4, groups of 128, search"),
        (Recipe(vision="fp32"), "mm_projector.mlp.0", "float32"),
    ],
)
def test_schemes(recipe, name, scheme, float32):
    assert str(schemes_of(float32, recipe)[name]) == scheme


def test_float32_is_left_alone():
    weight = torch.randn(4, 64)
    same, snr = quantize_weight(weight, Scheme(32))
    assert same is weight
    assert snr == math.inf


# -- tensor by tensor -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [FOUR_BITS, EIGHT_BIT_DOWN, Recipe(vision="fp32", embedding_bits=32)])
def test_tensor_by_tensor_is_the_same(recipe, checkpoint, float32, tmp_path):
    """What is exported is what the quantized eager model computes with, byte for byte."""
    model = copy.deepcopy(float32)
    report = quantize(model, recipe)
    with Spool(tmp_path) as spool:
        result = quantize_checkpoint(checkpoint, recipe, spool, Progress(quiet=True))
        # The SNR is summed by as many threads as there are, in another order each time.
        for ours, theirs in zip(result.layers, report, strict=True):
            assert ours.snr_db == pytest.approx(theirs.snr_db, abs=1e-9)
            assert replace(ours, snr_db=0.0) == replace(theirs, snr_db=0.0)
        expected = dict(model.named_parameters())
        stored = 0
        for stack, layers in result.stacks.items():
            assert len(layers) == len(model.get_submodule(stack))
            for index, layer in enumerate(layers):
                for name, tensor in layer.floats.items():
                    assert torch.equal(tensor, expected.pop(f"{stack}.{index}.{name}"))
                for name, parts in layer.weights.items():
                    weight = expected.pop(f"{stack}.{index}.{name}")
                    assert all(isinstance(part.data, SpooledData) for part in parts)
                    assert [part.data.to_bytes() for part in parts] == packed_weight(weight)
                    stored += sum(len(part.data) for part in parts)
        assert spool.size == stored > 0
        for name, weight in expected.items():
            other = result.model.get_parameter(name)
            assert packed_weight(other) == packed_weight(weight), name
        left = {name for name, parameter in result.model.named_parameters() if parameter.is_meta}
        assert all(name.startswith(quantizing.STACKS) for name in left)
    assert list(tmp_path.iterdir()) == []


def test_bytes_in_the_report(quantized):
    """Two weights to a byte and two bytes per scale; or a byte and four per row."""
    _, report = quantized
    assert report["language_model.layers.0.mlp.gate_up_proj"].num_bytes == 704 * 256 // 2 + 704 * 2 * 2
    assert report["language_model.embed_tokens"].num_bytes == SIZES.vocab_size * 256 + SIZES.vocab_size * 4
    for name, layer in report.items():
        if not name.endswith(("embed_tokens", "position_embedding")):  # those XNNPACK does not store
            weight = quantized[0].get_submodule(name).weight
            assert layer.num_bytes == sum(map(len, packed_weight(weight))), name


def test_full_disk_while_quantizing(checkpoint, tmp_path, monkeypatch):
    def fail(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", fail)
    with Spool(tmp_path) as spool, pytest.raises(OSError, match="No space left"):
        quantize_checkpoint(checkpoint, Recipe(), spool, Progress(quiet=True))
